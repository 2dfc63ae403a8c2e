"""What all benchmarks share: fair settings, turns, medians, the machine's peak, and the report.

Contenders take turns in one process. Before each measurement there is a pause (the thread pools
of two libraries would spin against each other) and a call to warm up; the median of the calls
counts. Ratios are ours to a peer's best mode.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Freed memory stays with the process: without this PyTorch spends much of its time on fresh
# pages. OpenBLAS threads sleep soon after a product instead of spinning for a tenth of a second,
# beside whatever is timed next. OPENBLAS_CORETYPE would choose slower kernels than a user has.
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "OPENBLAS_THREAD_TIMEOUT": "10",
}
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
PEERS = ("PyTorch", "JAX", "ONNX Runtime", "DeZero", "CS231n")
PAUSE = 0.02  # seconds, for the threads of the one before to fall asleep

Call = Callable[[], Any]


def arguments(description: str, repeats: int = 15) -> argparse.Namespace:
    """Parse the options that every benchmark has, and restart under SETTINGS where they differ."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument(
        "--repeats", type=int, default=repeats, help=f"measurements of each ({repeats})"
    )
    parser.add_argument("--threads", type=int, default=0, help="of every library (all cores)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave the C allocator as it is: PyTorch is slower then",
    )
    parser.add_argument(
        "--peak", action="store_true", help="measure peak memory too, each in a fresh process"
    )
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = {k: v for k, v in SETTINGS.items() if not (args.default_malloc and "MALLOC" in k)}
    if any(os.environ.get(k) != v for k, v in settings.items()) or any(
        k in os.environ for k in UNSET
    ):
        environment = {k: v for k, v in os.environ.items() if k not in UNSET}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**environment, **settings})
    return args


def use_threads(count: int) -> int:
    """Give every library so many threads (0: all cores) and return the number."""
    import numba
    from threadpoolctl import threadpool_limits

    count = count or numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(count)
    threadpool_limits(count, "blas")
    if (torch := optional("torch")) is not None:
        torch.set_num_threads(count)
    return count


def optional(name: str) -> Any:
    """Import a peer, or return None and say that it is left out."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"({name} is not installed: left out)")
        return None


def measure(contenders: Mapping[str, Call], repeats: int, calls: int = 1) -> dict[str, float]:
    """Return the median seconds of one call of each contender.

    Short calls come in series of `calls` after one to warm up, each timed by itself.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, call in contenders.items():
            time.sleep(PAUSE)
            call()
            for _ in range(calls):
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def warm_up(contenders: Mapping[str, Call]) -> dict[str, float]:
    """Return the seconds of every contender's first call, compilation included unless cached."""
    seconds = {}
    for name, call in contenders.items():
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
    return seconds


def best(times: Mapping[str, float], peer: str) -> str | None:
    """Return the fastest mode of a peer: the contender whose name starts with `peer`."""
    modes = [name for name in times if name.startswith(peer)]
    return min(modes, key=lambda name: times[name]) if modes else None


def headline(threads: int) -> None:
    """Print what was measured with."""
    versions = [
        f"{name} {m.__version__}"
        for name in ("numpy", "numba", "torch", "jax", "onnxruntime")
        if (m := optional(name)) is not None
    ]
    print(*versions, f"{threads} thread(s)", sep=", ")
    print("set", *(f"{k}={os.environ[k]}" for k in SETTINGS if k in os.environ), "; unset", *UNSET)


def show(
    title: str,
    seconds: Mapping[str, float],
    ours: str,
    flop: float = 0,
    peak: float = 0,
    memory: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Print the medians of one case, best first, with ratios of `ours` to each peer's best mode.

    `flop` are the floating-point operations of a call, `peak` the machine's a second in GFLOP.
    """
    print(f"\n{title}")
    for name, s in sorted(seconds.items(), key=lambda item: item[1]):
        line = f"  {name:32} {1e3 * s:9.3f} ms"
        if flop:
            line += f"  {flop / s / 1e9:6.0f} GFLOP/s"
        if flop and peak:
            line += f"  {100 * flop / s / 1e9 / peak:4.0f} % of the FMA peak"
        if memory:
            line += f"  {memory.get(name, float('nan')):7.1f} MB"
        print(line)
    ratios = {}
    for peer in PEERS:
        mode = best(seconds, peer)
        if mode is not None:
            ratios[mode] = seconds[ours] / seconds[mode]
    print("  ratio of", ours, "to", ", ".join(f"{m}: {r:.2f}" for m, r in ratios.items()))
    return {"seconds": dict(seconds), "ratios": ratios, "flop": flop}


def peak_memory(case: str, contender: str) -> float:
    """Return how many MB a contender adds to the process, measured in a process of its own."""
    argv = [sys.executable, sys.argv[0], "--memory", case, contender]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def report_memory(call: Call) -> None:
    """In the child of `peak_memory`: print by how much a few calls raise the peak, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        call()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def save(args: argparse.Namespace, report: Any) -> None:
    """Write the report as JSON if asked to."""
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def fma_peak(threads: int) -> float:
    """Measure GFLOP/s of nothing but fused multiply-adds, in registers, on all threads."""
    import numba
    import numpy as np

    from minicnn.ops import vector

    @numba.njit
    def work(a: Any, n: int) -> Any:
        x, y = vector.load(a, 0), vector.zero(a)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = s8 = s9 = y
        for _ in range(n):
            s0, s1 = vector.fma(x, s0, x), vector.fma(x, s1, x)
            s2, s3 = vector.fma(x, s2, x), vector.fma(x, s3, x)
            s4, s5 = vector.fma(x, s4, x), vector.fma(x, s5, x)
            s6, s7 = vector.fma(x, s6, x), vector.fma(x, s7, x)
            s8, s9 = vector.fma(x, s8, x), vector.fma(x, s9, x)
        for s in (s0, s1, s2, s3, s4, s5, s6, s7, s8, s9):
            y = vector.add(y, s)
        return vector.horizontal_sum(y)

    @numba.njit(parallel=True)
    def run(a: Any, n: int, out: Any) -> None:
        for t in numba.prange(out.size):
            out[t] = work(a[t], n)

    a = np.random.default_rng(0).random((threads, 64), dtype=np.float32)
    out, n, seconds = np.zeros(threads), 2_000_000, float("inf")
    for _ in range(10):
        start = time.perf_counter()
        run(a, n, out)
        seconds = min(seconds, time.perf_counter() - start)
    return threads * n * 10 * 2 * vector.lanes(np.float32) / seconds / 1e9


def copy_speed(megabytes: int = 256) -> float:
    """Measure GB/s of reading and writing memory in a plain copy on all threads."""
    import numba
    import numpy as np

    @numba.njit(parallel=True)
    def run(a: Any, b: Any) -> None:
        for i in numba.prange(a.size):
            b[i] = a[i]

    a = np.ones(megabytes << 18, np.float32)
    b, seconds = np.zeros_like(a), float("inf")
    for _ in range(6):
        start = time.perf_counter()
        run(a, b)
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * a.nbytes / seconds / 1e9


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of text in columns, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{t:{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(row, widths))
        )
        for row in rows
    )
