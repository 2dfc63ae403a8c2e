"""Pooling, im2col and col2im on the GPU: the host's side of pool.cu and im2col.cu."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda
from minicnn.shapes import Pair, Window


def _geometry(
    x_size: Sequence[int], y_size: Sequence[int], win: Window | None = None
) -> tuple[int, ...]:
    """Return rows and columns of x and y and the window, as the kernels take them.

    Raises
    ------
    ValueError
        If a map is too large for the kernels' 32-bit offsets.
    """
    (H, W), (OH, OW) = x_size, y_size
    if not cuda.fits(H * W, OH * OW):
        raise ValueError(f"pool: x: expected maps of less than 2**30 pixels, got {H}x{W}")
    if win is None:
        return H, W, OH, OW
    (top, _), (left, _) = win.padding
    return (H, W, OH, OW, top, left, *win.kernel, *win.stride, *win.dilation)


def max_forward(x: Array, win: Window) -> tuple[Array, Array]:
    """Return y and winner (N, C, OH, OW)."""
    xp, (N, C, H, W) = array_module(x), x.shape
    OH, OW = win.output_size("max_pool2d", H, W)
    y, winner = xp.empty((N, C, OH, OW), x.dtype), xp.empty((N, C, OH, OW), np.int64)
    cuda.each("pool", "max_pool2d_forward", y, x, y, winner, *_geometry((H, W), (OH, OW), win))
    return y, winner


def max_backward(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Return dx."""
    dx = array_module(dy).empty(x_shape, dy.dtype)
    geometry = _geometry(x_shape[2:], dy.shape[2:], win)
    cuda.each("pool", "max_pool2d_backward", dx, dy, winner, dx, *geometry)
    return dx


def avg_forward(x: Array, divisor: Array, win: Window) -> Array:
    """Return y."""
    OH, OW = divisor.shape
    y = array_module(x).empty((*x.shape[:2], OH, OW), x.dtype)
    geometry = _geometry(x.shape[2:], (OH, OW), win)
    cuda.each("pool", "avg_pool2d_forward", y, x, divisor, y, *geometry)
    return y


def avg_backward(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Return dx."""
    dx = array_module(dy).empty(x_shape, dy.dtype)
    geometry = _geometry(x_shape[2:], dy.shape[2:], win)
    cuda.each("pool", "avg_pool2d_backward", dx, dy, divisor, dx, *geometry)
    return dx


def adaptive_forward(x: Array, output_size: Pair) -> Array:
    """Return y."""
    y = array_module(x).empty((*x.shape[:2], *output_size), x.dtype)
    cuda.each("pool", "adaptive_forward", y, x, y, *_geometry(x.shape[2:], output_size))
    return y


def adaptive_backward(dy: Array, input_size: Pair) -> Array:
    """Return dx."""
    dx = array_module(dy).empty((*dy.shape[:2], *input_size), dy.dtype)
    cuda.each("pool", "adaptive_backward", dx, dy, dx, *_geometry(input_size, dy.shape[2:]))
    return dx


def im2col(x: Array, win: Window) -> Array:
    """Return cols (C*KH*KW, N*OH*OW)."""
    N, C, H, W = x.shape
    OH, OW = win.output_size("im2col", H, W)
    rows = C * win.kernel[0] * win.kernel[1]
    cols = array_module(x).empty((rows, N * OH * OW), x.dtype)
    cuda.each("im2col", "im2col", cols, x, cols, N, C, *_geometry((H, W), (OH, OW), win))
    return cols


def col2im(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Return x (N, C, H, W)."""
    N, C, H, W = x_shape
    x = array_module(cols).empty(x_shape, cols.dtype)
    geometry = _geometry((H, W), win.output_size("col2im", H, W), win)
    cuda.each("im2col", "col2im", x, cols, x, N, C, *geometry)
    return x
