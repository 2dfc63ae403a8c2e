"""Time conv_transpose2d, as generators and decoders use it: forward, and dx, dw, db together.

python benchmarks/conv_transpose2d.py --repeats 30
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import contest
import harness

from minicnn import ops


class Case(NamedTuple):
    """Square images and kernels."""

    N: int
    C: int
    F: int
    H: int
    K: int
    stride: int
    padding: int


CASES = {
    "4x4 stride 2, 128 to 64, 8x8": Case(64, 128, 64, 8, 4, 2, 1),
    "4x4 stride 2, 64 to 32, 16x16": Case(64, 64, 32, 16, 4, 2, 1),
    "2x2 stride 2, 64 to 64, 16x16": Case(64, 64, 64, 16, 2, 2, 0),
}


def make(case: Case, args: argparse.Namespace) -> contest.Contest:
    N, C, F, H, K, stride, padding = case
    x, w, b = (contest.draw(i, s) for i, s in enumerate(((N, C, H, H), (C, F, K, K), (F,))))
    options = {"stride": stride, "padding": padding}

    torch, jax = harness.optional("torch"), harness.optional("jax")

    def torch_function(x: Any, w: Any, b: Any) -> Any:
        return torch.nn.functional.conv_transpose2d(x, w, b, **options)

    def jax_function(x: Any, w: Any, b: Any) -> Any:
        turned = w[:, :, ::-1, ::-1].swapaxes(0, 1)  # the adjoint of a correlation
        pads = [(K - 1 - padding,) * 2] * 2
        y = jax.lax.conv_general_dilated(x, turned, (1, 1), pads, lhs_dilation=(stride, stride))
        return y + b[:, None, None]

    op = contest.Op(
        ops.conv_transpose2d_forward,
        ops.conv_transpose2d_backward,
        (x, w, b),
        options,
        torch_function,
        jax_function,
    )
    if args.device == "cpu":  # where compiled code calls the eager kernels
        args = argparse.Namespace(**{**vars(args), "no_compile": True})
    OH = (H - 1) * stride - 2 * padding + K
    flop, y = 2.0 * N * C * F * K * K * H * H, (N, F, OH, OH)
    return contest.Contest(
        contest.contenders(op, args),
        {"forward": flop, "backward": 2 * flop},
        {"forward": contest.bytes_of(x, w, b, y), "backward": contest.bytes_of(x, w, x, w, y)},
    )


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
