"""Time conv2d: all versions and PyTorch, forward and both gradients, interleaved in one run.

First every contender's results are compared; only then are they timed. Each measurement is one
call after a pause and a call to warm up (the thread pools of two libraries would spin against
each other), the contenders take turns, and the median counts. PyTorch runs eagerly, with NCHW
and with channels_last arrays, and its better total counts; ratios are ours to that.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

# Freed memory stays with the process: without this PyTorch spends much of its time on fresh
# pages. OpenBLAS threads sleep soon after a product instead of spinning for a tenth of a second,
# beside whatever is timed next. OPENBLAS_CORETYPE would choose slower kernels than a user has.
SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": "1000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "OPENBLAS_THREAD_TIMEOUT": "10",
}
UNSET = ("OPENBLAS_CORETYPE",)

CASES = {  # batch, channels, filters, rows and columns, kernel, padding, groups
    "3x3 64 to 64, 32x32": (64, 64, 64, 32, 3, 1, 1),
    "3x3 128 to 128, 16x16": (64, 128, 128, 16, 3, 1, 1),
    "3x3 256 to 256, 8x8": (64, 256, 256, 8, 3, 1, 1),
    "5x5 1 to 32, 28x28": (64, 1, 32, 28, 5, 0, 1),
    "5x5 32 to 64, 12x12": (64, 32, 64, 12, 5, 0, 1),
    "depthwise 3x3 128, 16x16": (64, 128, 128, 16, 3, 1, 128),
    "depthwise 3x3 128, 32x32": (64, 128, 128, 32, 3, 1, 128),
}
PAUSE = 0.02  # seconds, for threads of the one before to fall asleep
PASSES = ("forward", "dx", "dw")
Contender = dict[str, Callable[[], Any]]  # pass to call; a "backward" stands for dx and dw


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=15, help="measurements of each (15)")
    parser.add_argument("--threads", type=int, default=0, help="of every library (all cores)")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    if any(os.environ.get(k) != v for k, v in SETTINGS.items()) or any(
        k in os.environ for k in UNSET
    ):
        environment = {k: v for k, v in os.environ.items() if k not in UNSET}
        os.execve(sys.executable, [sys.executable, *sys.argv], {**environment, **SETTINGS})

    import numba
    import torch
    from threadpoolctl import threadpool_limits

    threads = args.threads or numba.config.NUMBA_NUM_THREADS
    numba.set_num_threads(threads)
    torch.set_num_threads(threads)
    print(f"NumPy, Numba {numba.__version__}, PyTorch {torch.__version__}, {threads} thread(s)")
    print("set", *(f"{k}={v}" for k, v in SETTINGS.items()), "; unset", *UNSET)
    with threadpool_limits(threads, "blas"):
        peak = fma_peak(threads)
        print(f"FMA peak, float32: {peak:.0f} GFLOP/s")
        report: dict[str, Any] = {"threads": threads, "fma_peak_gflops": peak, "cases": {}}
        for name, case in CASES.items():
            if args.only in name:
                report["cases"][name] = bench(name, case, args.repeats, peak)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=1)


def bench(name: str, case: tuple[int, ...], repeats: int, peak: float) -> dict[str, Any]:
    contenders, check, warm_up = contend(case)
    check()
    times = measure(contenders, repeats)
    N, C, F, H, K, padding, groups = case
    flop = 2 * N * F * C // groups * K * K * (H + 2 * padding - K + 1) ** 2
    print(f"\n{name}, batch {N}: {flop / 1e9:.2f} GFLOP a pass")
    print(f"  numba warm-up, compilation included unless cached: {warm_up:.2f} s")
    totals = {}
    for contender, passes in times.items():
        totals[contender] = total = sum(passes.values())
        each = "  ".join(
            f"{p} {1e3 * t:7.2f} ms ({flop * (2 if p == 'backward' else 1) / t / 1e9:3.0f} GFLOP/s)"
            for p, t in passes.items()
        )
        print(f"  {contender:20} {each}  total {1e3 * total:7.2f} ms")
    best = min((c for c in totals if "PyTorch" in c), key=lambda c: totals[c])
    ratio = totals["numba"] / totals[best]
    parts = ", ".join(f"{p} {times['numba'][p] / times[best][p]:.2f}" for p in PASSES)
    share = 3 * flop / totals["numba"] / 1e9 / peak
    print(f"  numba / {best}: {ratio:.2f} ({parts}); {100 * share:.0f} % of the FMA peak")
    return {
        "seconds": times,
        "warm_up_seconds": warm_up,
        "flop_a_pass": flop,
        "best_peer": best,
        "ratio": ratio,
        "share_of_peak": share,
    }


def contend(case: tuple[int, ...]) -> tuple[dict[str, Contender], Callable[[], None], float]:
    """Return the contenders of one case, a check that they agree, and Numba's warm-up time."""
    import numpy as np
    import torch

    from minicnn.ops import conv2d
    from minicnn.shapes import window

    N, C, F, H, K, padding, groups = case
    rng = np.random.default_rng(0)
    x, w, b = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((N, C, H, H), (F, C // groups, K, K), (F,))
    )
    win = window("benchmark", K, 1, padding)
    plain, fast = conv2d.VERSIONS["numpy"], conv2d.VERSIONS["numba"]
    dy = rng.standard_normal(plain.forward(x, w, b, win, groups).shape, dtype=np.float32)
    start = time.perf_counter()
    fast.forward(x, w, b, win, groups)
    fast.backward(dy, x, w, win, groups)
    warm_up = time.perf_counter() - start
    from minicnn.ops import conv2d_numba

    contenders: dict[str, Contender] = {
        "numpy": {
            "forward": lambda: plain.forward(x, w, b, win, groups),
            "backward": lambda: plain.backward(dy, x, w, win, groups),
        },
        "numba": {
            "forward": lambda: conv2d_numba.forward(x, w, b, win, groups),
            "dx": lambda: conv2d_numba.input_gradient(dy, x, w, win, groups),
            "dw": lambda: conv2d_numba.weight_gradient(dy, x, w, win, groups),
        },
    }
    bias = torch.from_numpy(b)
    for layout in ("NCHW", "channels_last"):
        tx, tw, tdy = (torch.from_numpy(a.copy()) for a in (x, w, dy))
        if layout == "channels_last":
            tx, tw, tdy = (a.contiguous(memory_format=torch.channels_last) for a in (tx, tw, tdy))

        def gradient(*mask: bool, x: Any = tx, w: Any = tw, dy: Any = tdy) -> Any:
            sizes = [1, 1], [padding, padding], [1, 1], False, [0, 0], groups
            return torch.ops.aten.convolution_backward(dy, x, w, [F], *sizes, mask)

        contenders[f"PyTorch {layout}"] = {
            "forward": lambda x=tx, w=tw: torch.nn.functional.conv2d(
                x, w, bias, padding=padding, groups=groups
            ),
            "dx": lambda gradient=gradient: gradient(True, False, False)[0],
            "dw": lambda gradient=gradient: gradient(False, True, True)[1:],
        }

    def check() -> None:
        expected = plain.forward(x, w, b, win, groups), *plain.backward(dy, x, w, win, groups)
        for name, contender in contenders.items():
            if "backward" not in contender:
                got = contender["forward"](), contender["dx"](), *contender["dw"]()
                for what, a, e in zip(("y", "dx", "dw", "db"), got, expected):
                    gap = abs(np.asarray(a) - e).max() / abs(e).max()
                    if not gap < 2e-5:
                        raise SystemExit(f"{name} disagrees in {what}: relative error {gap:.1e}")

    return contenders, check, warm_up


def measure(contenders: dict[str, Contender], repeats: int) -> dict[str, dict[str, float]]:
    """Return the median seconds of every pass of every contender."""
    times: dict[str, dict[str, list[float]]] = {
        name: {p: [] for p in contender} for name, contender in contenders.items()
    }
    for _ in range(repeats):
        for name, contender in contenders.items():
            time.sleep(PAUSE)
            for p, call in contender.items():
                call()
                start = time.perf_counter()
                call()
                times[name][p].append(time.perf_counter() - start)
    return {
        name: {p: statistics.median(seconds) for p, seconds in passes.items()}
        for name, passes in times.items()
    }


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
    out, n, best = np.zeros(threads), 2_000_000, float("inf")
    for _ in range(10):
        start = time.perf_counter()
        run(a, n, out)
        best = min(best, time.perf_counter() - start)
    return threads * n * 10 * 2 * vector.lanes(np.float32) / best / 1e9


if __name__ == "__main__":
    main()
