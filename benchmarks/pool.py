"""Time max, average and adaptive average pooling: forward (with the winners) and backward.

A maximum counts as one operation a tap, as does a sum. The passes read and write memory more than
they compute: GB/s says how near they come to a plain copy.

    python benchmarks/pool.py --only max
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import contest
import harness
import numpy as np

from minicnn import ops


class Case(NamedTuple):
    """The op, x's shape, and the window (or output size)."""

    op: str
    shape: tuple[int, int, int, int]
    kernel: int
    stride: int = 1
    padding: int = 0


CASES = {
    "max 2x2, 32 maps 24x24": Case("max_pool2d", (64, 32, 24, 24), 2, 2),
    "max 2x2, 64 maps 8x8": Case("max_pool2d", (64, 64, 8, 8), 2, 2),
    "max 3x3 stride 2, 64 maps 32x32": Case("max_pool2d", (64, 64, 32, 32), 3, 2, 1),
    "max 3x3 stride 1, 64 maps 32x32": Case("max_pool2d", (64, 64, 32, 32), 3, 1, 1),
    "average 2x2, 32 maps 24x24": Case("avg_pool2d", (64, 32, 24, 24), 2, 2),
    "average 3x3 stride 2, 64 maps 32x32": Case("avg_pool2d", (64, 64, 32, 32), 3, 2, 1),
    "adaptive average to 1x1, 128 maps 8x8": Case("adaptive_avg_pool2d", (64, 128, 8, 8), 1),
}


def make(case: Case, args: argparse.Namespace) -> contest.Contest:
    name, shape, kernel, stride, padding = case
    x = contest.draw(0, shape)
    adaptive = name.startswith("adaptive")
    options = (
        {"output_size": kernel}
        if adaptive
        else {"kernel_size": kernel, "stride": stride, "padding": padding}
    )

    torch, jax = harness.optional("torch"), harness.optional("jax")

    def torch_function(x: Any) -> Any:
        return getattr(torch.nn.functional, name)(x, **options)

    def jax_function(x: Any) -> Any:
        if adaptive:
            return x.mean((2, 3), keepdims=True)
        lax, pads = jax.lax, [(0, 0)] * 2 + [(padding, padding)] * 2
        window = (1, 1, kernel, kernel), (1, 1, stride, stride), pads
        if name == "max_pool2d":
            return lax.reduce_window(x, -np.inf, lax.max, *window)
        return lax.reduce_window(x, 0.0, lax.add, *window) / kernel**2

    op = contest.Op(
        getattr(ops, f"{name}_forward"),
        getattr(ops, f"{name}_backward"),
        (x,),
        options,
        torch_function,
        jax_function,
    )
    calls = contest.contenders(op, args)
    y = calls["minicnn numpy"]["forward"]()
    taps = x.size / y.size if adaptive else kernel**2
    winners = 2 * y.nbytes if name == "max_pool2d" else 0  # int64
    return contest.Contest(
        calls,
        {"forward": taps * y.size, "backward": (1 if winners else taps) * y.size},
        dict.fromkeys(("forward", "backward"), contest.bytes_of(x, y) + winners),
    )


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
