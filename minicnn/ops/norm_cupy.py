"""Batch, layer and group normalisation on the GPU: the host's side of norm.cu."""

from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda

BLOCK = 256
SHORTEST = 4096  # values that are worth a block of their own in batch statistics


def _parts(C: int, total: int) -> tuple[int, int]:
    """Return into how many parts a channel's values are cut, and the length of one."""
    count = max(1, min(-(-total // SHORTEST), 4 * cuda.multiprocessors() // C))
    length = -(-total // count)
    return -(-total // length), length


def batch_norm_forward(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None, var: Array | None
) -> tuple[Array, Array, Array]:
    """Return y, and the mean and variance it was normalised by, (C,) float64."""
    xp, (N, C, L) = array_module(x), x.shape
    y, scale = xp.empty_like(x), xp.empty(C, x.dtype)
    count = length = 0
    parts: Array = cuda.NULL
    if mean is None or var is None:
        mean, var = xp.empty(C, np.float64), xp.empty(C, np.float64)
        count, length = _parts(C, N * L)
        parts = xp.empty((C, count, 2), np.float64)
        grid, args = (count, C), (x, parts, N, C, L, length)
        cuda.launch("norm", "batch_statistics", x.dtype, grid, BLOCK, *args)
    last = (np.int64(N * L), np.float64(eps))
    cuda.each("norm", "batch_merge", scale, parts, w, mean, var, scale, count, length, *last)
    cuda.each("norm", "batch_apply", y, x, mean, scale, b, y, C, L)
    return y, mean, var


def batch_norm_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    """Return dx, dw and db."""
    xp, (N, C, L) = array_module(x), x.shape
    dx, dw, db = xp.empty_like(x), xp.empty_like(w), xp.empty_like(w)
    count, length = _parts(C, N * L)
    parts, per = xp.empty((C, count, 2), np.float64), xp.empty((C, 3), x.dtype)
    grid, args = (count, C), (dy, x, mean, rstd, parts, N, C, L, length)
    cuda.launch("norm", "batch_gradient_sums", x.dtype, grid, BLOCK, *args)
    last = (count, np.int64(N * L), int(training))
    cuda.each("norm", "batch_gradient_merge", dw, parts, w, rstd, dw, db, per, *last)
    cuda.each("norm", "batch_gradient_apply", dx, dy, x, mean, rstd, per, dx, C, L)
    return dx, dw, db


def rows_forward(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    """Return y, mean (N, G) and rstd (N, G) of x (N, G, CG, L) with w and b of G * CG values."""
    xp, (N, G, CG, L) = array_module(x), x.shape
    y, mean, rstd = xp.empty_like(x), xp.empty((N, G), np.float64), xp.empty((N, G), np.float64)
    args = (x, w, b, y, mean, rstd, G, CG, L, np.float64(eps))
    cuda.launch("norm", "rows_forward", x.dtype, (N * G,), BLOCK, *args)
    return y, mean, rstd


def rows_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    """Return dx, and dw and db of w's shape."""
    xp, (N, G, CG, L) = array_module(x), x.shape
    dx, dw, db = xp.empty_like(x), xp.empty_like(w), xp.empty_like(w)
    args = (dy, x, w, mean, rstd, dx, G, CG, L)
    cuda.launch("norm", "rows_backward", x.dtype, (N * G,), BLOCK, *args)
    sums = (dy, x, mean, rstd, dw, db, N, G, CG)
    if L == 1:
        cuda.launch("norm", "column_sums", x.dtype, (-(-G * CG // 32),), BLOCK, *sums)
    else:
        cuda.launch("norm", "channel_sums", x.dtype, (G * CG,), BLOCK, *sums, L)
    return dx, dw, db
