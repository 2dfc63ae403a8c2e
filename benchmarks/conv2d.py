"""Time conv2d: forward and both gradients, all versions, PyTorch, JAX and a course-style im2col.

Through the op, arrays are NCHW. "channels-last" runs the same kernels on channels-last arrays that
exist already, as the fused path of Trainer does.

    python benchmarks/conv2d.py --only "3x3 64"
    python benchmarks/conv2d.py --only depthwise --repeats 30 --json conv2d.json
    python benchmarks/conv2d.py --peers none               minicnn alone: share of the FMA peak
    python benchmarks/conv2d.py --device cuda              the CUDA kernels against cuDNN
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import contest
import harness
import numpy as np
from peers import course_conv2d

from minicnn import ops
from minicnn.ops import conv2d_winograd
from minicnn.shapes import window


class Case(NamedTuple):
    """Square images and kernels."""

    N: int
    C: int
    F: int
    H: int
    K: int
    padding: int = 0
    groups: int = 1
    stride: int = 1


CASES = {
    "3x3 64 to 64, 32x32": Case(64, 64, 64, 32, 3, 1),
    "3x3 128 to 128, 16x16": Case(64, 128, 128, 16, 3, 1),
    "3x3 256 to 256, 8x8": Case(64, 256, 256, 8, 3, 1),
    "5x5 1 to 32, 28x28": Case(64, 1, 32, 28, 5),
    "5x5 32 to 64, 12x12": Case(64, 32, 64, 12, 5),
    "1x1 256 to 256, 16x16": Case(64, 256, 256, 16, 1),
    "3x3 stride 2, 64 to 128, 32x32": Case(64, 64, 128, 32, 3, 1, stride=2),
    "depthwise 3x3 128, 16x16": Case(64, 128, 128, 16, 3, 1, 128),
    "depthwise 3x3 128, 32x32": Case(64, 128, 128, 32, 3, 1, 128),
    "grouped 3x3 128, 8 groups, 16x16": Case(64, 128, 128, 16, 3, 1, 8),
}


def make(case: Case, args: argparse.Namespace) -> contest.Contest:
    N, C, F, H, K, padding, groups, stride = case
    x, b = contest.draw(0, (N, C, H, H)), contest.draw(1, (F,))
    w = contest.draw(2, (F, C // groups, K, K))
    options = {"stride": stride, "padding": padding, "groups": groups}

    torch, jax = harness.optional("torch"), harness.optional("jax")

    def torch_function(x: Any, w: Any, b: Any) -> Any:
        return torch.nn.functional.conv2d(x, w, b, **options)

    def jax_function(x: Any, w: Any, b: Any) -> Any:
        lax = jax.lax
        pads = [(padding, padding)] * 2
        y = lax.conv_general_dilated(x, w, (stride, stride), pads, feature_group_count=groups)
        return y + b[:, None, None]

    win = window("benchmark", K, stride, padding)
    winograd = conv2d_winograd.applies(w, win, groups)
    op = contest.Op(
        ops.conv2d_forward,
        ops.conv2d_backward,
        (x, w, b),
        options,
        torch_function,
        jax_function,
        ("numpy", "numba", "winograd") if winograd else ("numpy", "numba"),
    )
    if args.device == "cpu":  # where compiled code calls the eager kernels
        args = argparse.Namespace(**{**vars(args), "no_compile": True})
    calls = contest.contenders(op, args)
    views = {}
    y = calls["minicnn numpy"]["forward"]()
    dy = contest.draw(3, y.shape)
    if args.device == "cpu":
        for name, passes in channels_last(x, w, b, dy, win, groups, winograd).items():
            calls[name] = passes
            # A pass that gives maps gives one array, and that of the weights two.
            views[name] = lambda a: a[0].transpose(0, 3, 1, 2) if len(a) == 1 else a
    if groups == 1 and stride == 1 and contest.asked(args, "CS231n"):
        calls["CS231n-style NumPy"] = course_conv2d(x, w, b, dy, padding)
    flop = 2.0 * N * F * (C // groups) * K * K * y.shape[2] * y.shape[3]
    return contest.Contest(
        calls,
        {"forward": flop, "backward": 2 * flop},
        {"forward": contest.bytes_of(x, w, b, y), "backward": contest.bytes_of(x, w, x, w, y)},
        views,
    )


def channels_last(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray, win: Any, groups: int, fast: bool
) -> dict[str, contest.Passes]:
    """Return the kernels of the fused path, on arrays (N, H, W, channels) in whole vectors."""
    from minicnn.ops import conv2d_channels, last
    from minicnn.ops.conv2d_maps import Geometry
    from minicnn.ops.vector import lanes

    (N, C, H, W), F, L = x.shape, len(w), lanes(x.dtype)
    if groups > 1 or C % L or F % L:
        return {}
    x_, dy_ = (np.empty((N, *a.shape[2:], a.shape[1]), a.dtype) for a in (x, dy))
    last.to_last(x, x_)
    last.to_last(dy, dy_)
    y_, dx_, dw, db = np.empty_like(dy_), np.empty_like(x_), np.empty_like(w), np.empty_like(b)
    to = conv2d_channels.Layouts(True, True)
    forward, adjoint = (Geometry(a, C, H, W, F, win, groups) for a in (False, True))

    def correlate() -> Any:
        conv2d_channels.correlate(forward, x_, w, b, y_, to)
        return (y_,)

    def dx() -> Any:
        conv2d_channels.correlate(adjoint, dy_, w, None, dx_, to)
        return (dx_,)

    def dw_db() -> Any:
        conv2d_channels.weight_gradient(forward, x_, dy_, dw, db, to)
        return dw, db

    calls = {"minicnn numba channels-last": {"forward": correlate, "dx": dx, "dw": dw_db}}
    if fast:

        def transformed() -> Any:
            conv2d_winograd.forward(x_, w, b, win, y_)
            return (y_,)

        def transformed_dx() -> Any:
            conv2d_winograd.input_gradient(dy_, w, win, dx_)
            return (dx_,)

        def transformed_dw() -> Any:
            conv2d_winograd.weight_gradient(x_, dy_, win, dw)
            return dw, last.channel_sums(dy_, F)

        calls["minicnn winograd channels-last"] = {
            "forward": transformed,
            "dx": transformed_dx,
            "dw": transformed_dw,
        }
    return calls


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
