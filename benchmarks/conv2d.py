"""Time conv2d: all versions and PyTorch, forward and both gradients, interleaved in one run.

First every contender's results are compared; only then are they timed. PyTorch runs eagerly, with
NCHW and with channels_last arrays, and its better total counts; ratios are ours to that.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import harness

CASES = {  # batch, channels, filters, rows and columns, kernel, padding, groups
    "3x3 64 to 64, 32x32": (64, 64, 64, 32, 3, 1, 1),
    "3x3 128 to 128, 16x16": (64, 128, 128, 16, 3, 1, 1),
    "3x3 256 to 256, 8x8": (64, 256, 256, 8, 3, 1, 1),
    "5x5 1 to 32, 28x28": (64, 1, 32, 28, 5, 0, 1),
    "5x5 32 to 64, 12x12": (64, 32, 64, 12, 5, 0, 1),
    "depthwise 3x3 128, 16x16": (64, 128, 128, 16, 3, 1, 128),
    "depthwise 3x3 128, 32x32": (64, 128, 128, 32, 3, 1, 128),
}
PASSES = ("forward", "dx", "dw")
Contender = dict[str, Callable[[], Any]]  # pass to call; a "backward" stands for dx and dw


def main() -> None:
    args = harness.arguments(__doc__)
    threads = harness.use_threads(args.threads)
    harness.headline(threads)
    peak = harness.fma_peak(threads)
    print(f"FMA peak, float32: {peak:.0f} GFLOP/s")
    cases = {
        name: bench(name, case, args, peak) for name, case in CASES.items() if args.only in name
    }
    harness.save(args, {"threads": threads, "fma_peak_gflops": peak, "cases": cases})


def bench(
    name: str, case: tuple[int, ...], args: argparse.Namespace, peak: float
) -> dict[str, Any]:
    contenders, check, warm_up = contend(case)
    check()
    calls = {(c, p): call for c, passes in contenders.items() for p, call in passes.items()}
    seconds = harness.measure(calls, args.repeats)
    times = {c: {p: seconds[c, p] for p in passes} for c, passes in contenders.items()}
    N, C, F, H, K, padding, groups = case
    flop = 2 * N * F * C // groups * K * K * (H + 2 * padding - K + 1) ** 2
    print(f"\n{name}, batch {N}: {flop / 1e9:.2f} GFLOP a pass")
    print(f"  numba warm-up, compilation included unless cached: {warm_up:.2f} s")
    for contender, passes in times.items():
        each = "  ".join(f"{p} {1e3 * t:7.2f} ms" for p, t in passes.items())
        print(f"  {contender:24} {each}")
    totals = {c: sum(passes.values()) for c, passes in times.items()}
    shown = {c: t for c, t in totals.items() if c != "numpy"}
    return {
        "passes": times,
        "warm_up_seconds": warm_up,
        **{
            ours: harness.show("total", shown, ours, 3 * flop, peak)
            for ours in ("numba", "winograd")
            if ours in shown
        },
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
    from minicnn.ops import conv2d_numba, conv2d_winograd

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
    if conv2d_winograd.applies(w, win, groups):
        contenders["winograd"] = {
            "forward": lambda: conv2d_winograd.forward_first(x, w, b, win),
            "backward": lambda: conv2d_winograd.backward_first(dy, x, w, win),
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
            if name != "numpy":
                got = [contender["forward"]()]
                if "backward" in contender:
                    got += contender["backward"]()
                else:
                    got += [contender["dx"](), *contender["dw"]()]
                for what, a, e in zip(("y", "dx", "dw", "db"), got, expected):
                    gap = abs(np.asarray(a) - e).max() / abs(e).max()
                    if not gap < 5e-5:
                        raise SystemExit(f"{name} disagrees in {what}: relative error {gap:.1e}")

    return contenders, check, warm_up


if __name__ == "__main__":
    main()
