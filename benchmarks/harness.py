"""What all benchmarks share: fair settings, turns, medians, the machine's limits, and the report.

Contenders take turns in one process. Before each measurement there is a pause (the thread pools
of two libraries would spin against each other) and a call to warm up; the median of the calls
counts. Ratios are ours to a peer's best mode. With ``--device cuda`` arrays are on the GPU before,
and times are those between two CUDA events, recorded by CuPy around our calls and by PyTorch around
its own.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from minicnn.backend import cupy_or_error

# Freed memory stays with the process: without this PyTorch spends much of its time on fresh
# pages. OpenBLAS threads sleep soon after a product instead of spinning for a tenth of a second,
# beside whatever is timed next. OPENBLAS_CORETYPE would choose slower kernels than a user has.
# PyTorch's OpenMP threads wait for each other without sleep for some milliseconds. Where anything
# else runs on the machine, both may be given one core; then every small operation, of which an
# optimiser's step has dozens, took a time slice, 4 or 8 ms. So they sleep sooner.
SETTINGS = {
    "GOMP_SPINCOUNT": "10000",
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "OPENBLAS_THREAD_TIMEOUT": "10",
}
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
PEERS = ("PyTorch", "JAX", "ONNX Runtime", "DeZero", "CS231n")
GPU_PEERS = ("PyTorch",)
PAUSE = 0.02  # seconds, for the threads of the one before to fall asleep
LONG = 0.25  # seconds of a call that needs no warming up
TURN, SERIES = 0.03, 10

Call = Callable[[], Any]


def arguments(
    description: str, repeats: int = 15, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the options that every benchmark has, and restart under SETTINGS where they differ."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--repeats", type=int, default=repeats, help="measurements of each (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: version cupy against PyTorch on the GPU (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="of every library (all cores)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        help="names that start those to run, with commas; 'none' for minicnn alone "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave out torch.compile, which takes seconds"
    )
    parser.add_argument(
        "--default-malloc",
        action="store_true",
        help="leave the C allocator as it is: PyTorch is slower then",
    )
    parser.add_argument(
        "--peak", action="store_true", help="measure peak memory too, each in a fresh process"
    )
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "CONTENDER"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repeats < 1 or args.threads < 0:
        parser.error("--repeats: expected 1 or more; --threads: expected 0 or more")
    if args.device == "cuda":
        if args.peak:
            parser.error("--peak: expected --device cpu: it is the host's memory that is measured")
        try:
            cupy_or_error()
        except RuntimeError as error:
            parser.error(f"--device cuda: {error}")
    settings = {k: v for k, v in SETTINGS.items() if not (args.default_malloc and "MALLOC" in k)}
    differ = any(os.environ.get(k) != v for k, v in settings.items())
    if argv is None and (differ or any(k in os.environ for k in UNSET)):
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


@functools.cache
def optional(name: str) -> Any:
    """Import a peer, or return None and say once that it is left out."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        print(f"({name} is not installed: left out)")
        return None


def measure(contenders: Mapping[Any, Call], repeats: int, device: str = "cpu") -> dict[Any, float]:
    """Return the median seconds of one call of each contender, by its name or (name, pass).

    A turn is one call to warm up and then as many, each timed by itself, as fit in TURN seconds
    (SERIES at most): a short call is soon delayed by another process. Calls of more than LONG
    seconds stand alone, three of them at most. On the GPU the calls of a turn are queued one after
    the other between two events, and their mean is one measurement.
    """
    times: dict[Any, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name, call in contenders.items():
            long = bool(times[name]) and min(times[name]) > LONG
            if long and turn >= 3:
                continue
            time.sleep(PAUSE)
            clock = _clock(name, device)
            count = 1 if long else max(1, min(SERIES, int(TURN / max(*clock(call, 1), 1e-6))))
            times[name] += clock(call, count)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def _clock(name: Any, device: str) -> Callable[[Call, int], list[float]]:
    """Return what times a number of calls of a contender."""
    if device == "cpu":
        return lambda call, count: [_seconds(call) for _ in range(count)]
    contender = name if isinstance(name, str) else name[0]
    between = torch_seconds if contender.startswith("PyTorch") else event_seconds
    return lambda call, count: [between(call, count)]


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def warm_up(contenders: Mapping[Any, Call], device: str = "cpu") -> dict[Any, float]:
    """Return the seconds of every contender's first call, compilation included unless cached."""
    return {name: _clock(name, device)(call, 1)[0] for name, call in contenders.items()}


def best(times: Mapping[str, float], peer: str) -> str | None:
    """Return the fastest mode of a peer: the contender whose name starts with `peer`."""
    modes = [name for name in times if name.startswith(peer)]
    return min(modes, key=lambda name: times[name]) if modes else None


def headline(args: argparse.Namespace) -> dict[str, Any]:
    """Set the threads, print what is measured with, and return it for the report."""
    threads = use_threads(args.threads)
    about: dict[str, Any] = {
        "device": args.device,
        "threads": threads,
        "settings": {k: os.environ[k] for k in SETTINGS if k in os.environ},
    }
    if args.device == "cuda":
        gpu = describe_gpu()
        about |= {
            "machine": gpu["name"],
            "versions": gpu["versions"],
            "fma_peak_gflops": gpu["float32_peak"] / 1e9,
            "copy_gb_per_s": gpu_copy_speed(),
        }
    else:
        about |= {
            "machine": machine(),
            "versions": versions(),
            "fma_peak_gflops": fma_peak(threads),
            "copy_gb_per_s": copy_speed(),
        }
    print(f"{about['machine']}, {threads} thread(s)")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    print("set", *(f"{k}={v}" for k, v in about["settings"].items()), "and unset", *UNSET)
    peak, copied = about["fma_peak_gflops"], about["copy_gb_per_s"]
    print(f"limits: {peak:.0f} GFLOP/s of float32 FMA, {copied:.1f} GB/s read and written")
    return about


def ratios(seconds: Mapping[str, float], ours: str) -> dict[str, float]:
    """Return the ratio of `ours` to the best mode of every peer."""
    modes = [mode for peer in PEERS if (mode := best(seconds, peer)) is not None]
    return {mode: seconds[ours] / seconds[mode] for mode in modes}


def peak_memory(case: str, contender: str) -> float:
    """Return how many MB a contender adds to the process, measured in a process of its own."""
    argv = [sys.executable, sys.argv[0], "--memory", case, contender]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def report_memory(calls: Sequence[Call]) -> None:
    """In the child of `peak_memory`: print by how much a few calls raise the peak, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        for call in calls:
            call()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def machine() -> str:
    """Return the processor's name."""
    import platform

    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    """Return the versions of all libraries that are installed."""
    from importlib import metadata

    found = {}
    for name in ("numpy", "numba", "torch", "jax", "onnxruntime", "dezero"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            print(f"({name} is not installed)")
    return found


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


def copy_speed(megabytes: int = 64) -> float:
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


# ---------------------------------------------------------------- on the GPU


def event_seconds(call: Call, calls: int = 1, stream: Any = None) -> float:
    """Return the seconds a call between two events on a stream, by default the null stream."""
    import cupy

    stream = stream or cupy.cuda.Stream.null
    with stream:
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for _ in range(calls):
            call()
        end.record(stream)
        end.synchronize()
    return cupy.cuda.get_elapsed_time(start, end) / 1e3 / calls


def torch_seconds(call: Call, calls: int = 1) -> float:
    """Return the seconds a call between two events on PyTorch's stream."""
    torch = optional("torch")
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / calls


def torch_on(device: str) -> Any:
    """Return PyTorch, set to compute in float32 as we do, or None where it does not run there."""
    torch = optional("torch")
    if torch is None or device == "cpu":
        return torch
    if not torch.cuda.is_available():
        print("(PyTorch finds no CUDA device: left out)")
        return None
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    return torch


def describe_gpu() -> dict[str, Any]:
    """Return what the GPU is, the libraries' versions, and the most operations a second."""
    import numpy as np

    cupy = cupy_or_error()
    properties = cupy.cuda.runtime.getDeviceProperties(0)
    count, clock = properties["multiProcessorCount"], highest_clock()
    found = {
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "cupy": cupy.__version__,
    }
    if (torch := optional("torch")) is not None:
        found |= {"torch": torch.__version__, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "name": properties["name"].decode(),
        "multiprocessors": count,
        "clock": clock,
        "driver": cupy.cuda.runtime.driverGetVersion(),
        "versions": found,
        # 128 float32 lanes a multiprocessor (compute capability 8.6 to 9.0), 2 operations each.
        "float32_peak": count * 128 * 2 * clock,
    }


def highest_clock() -> float:
    """Return the multiprocessors' highest clock in Hz."""
    query = ["--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits", "-i", "0"]
    done = subprocess.run(["nvidia-smi", *query], capture_output=True, text=True, check=True)
    return 1e6 * float(done.stdout)


def gpu_copy_speed(megabytes: int = 256) -> float:
    """Measure GB/s of reading and writing the device's memory in a plain copy."""
    import cupy

    a = cupy.ones(megabytes << 18, "f4")
    b = cupy.empty_like(a)
    return 2 * a.nbytes / min(event_seconds(lambda: cupy.copyto(b, a), 10) for _ in range(6)) / 1e9


# ---------------------------------------------------------------- the report


def table(rows: Sequence[Sequence[str]]) -> str:
    """Align rows of text in columns, the first to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            f"{t:{w}}" if i == 0 else f"{t:>{w}}" for i, (t, w) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
