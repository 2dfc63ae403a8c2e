"""Softmax and cross-entropy on the GPU: the host's side of softmax.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda
from minicnn.shapes import size

WARPS = 8  # rows that a block takes
MOST_ROWS = 1 << 14  # of `labelled`, whose warps all count the labels


def _sizes(x: Array, dim: int) -> tuple[int, int, int]:
    """Return the number of rows along `dim`, their length, and the step between their entries."""
    dim %= x.ndim
    inner = size(x.shape[dim + 1 :])
    return size(x.shape[:dim]) * inner, x.shape[dim], inner


def _rows(kernel: str, x: Array, dim: int, *args: Any) -> None:
    rows, C, inner = _sizes(x, dim)
    arrays = [a for a in args if not isinstance(a, int)]
    rest = [a for a in args if isinstance(a, int)]
    warps = max(1, min(WARPS, rows))
    args = (np.int64(rows), *arrays, C, inner, *rest)
    cuda.launch("softmax", kernel, x.dtype, (-(-rows // warps),), 32 * warps, *args)


def forward(x: Array, dim: int, logarithm: bool) -> Array:
    """Return the softmax of x along `dim`, or its logarithm."""
    y = array_module(x).empty_like(x)
    _rows("softmax_forward", x, dim, x, y, int(logarithm))
    return y


def backward(dy: Array, y: Array, dim: int, logarithm: bool) -> Array:
    """Return dx."""
    dx = array_module(y).empty_like(y)
    _rows("softmax_backward", y, dim, dy, y, dx, int(logarithm))
    return dx


def cross_entropy_forward(x: Array, a: Array) -> tuple[Array, Array]:
    """Return the losses (N, D1, ...) and log p (N, C, D1, ...)."""
    xp = array_module(x)
    log_p, losses = xp.empty_like(x), xp.empty((x.shape[0], *x.shape[2:]), x.dtype)
    _rows("cross_entropy_forward", x, 1, x, a, log_p, losses)
    return losses, log_p


def cross_entropy_backward(g: Array, log_p: Array, a: Array) -> Array:
    """Return dx; g is one number, or one for each loss."""
    dx = array_module(a).empty_like(a)
    _rows("cross_entropy_backward", a, 1, g, log_p, a, dx, int(g.ndim > 0))
    return dx


def labelled_applies(x: Array, labels: Array) -> bool:
    """Tell whether `labelled` takes these scores and labels."""
    shapes = x.ndim == 2 and labels.shape == x.shape[:1] and 0 < len(x) <= MOST_ROWS
    return shapes and x.dtype.name in cuda.REAL and labels.dtype == np.int64


def labelled(
    x: Array, labels: Array, ignore_index: int = -100
) -> tuple[Array, Array, Array, Array]:
    """Softmax + cross-entropy of labels, averaged over the rows that count, in one launch.

    Parameters
    ----------
    x : array, shape (N, C), with 1 to MOST_ROWS rows
    labels : array, shape (N,), int64
        Nobody looks at them on the host: one out of range makes the loss NaN.
    ignore_index : int
        A label that counts nothing.

    Returns
    -------
    loss : array, shape (), of x's dtype
    dx : array, shape (N, C)
        Gradient of the loss.
    kept, correct : array, shape (), int64
        How many labels count, and in how many rows the largest score, the first of equal ones, is
        at the label.
    """
    xp, (N, C) = array_module(x), x.shape
    warps = min(WARPS, N)
    blocks = -(-N // warps)
    dx, sums, hits = xp.empty_like(x), xp.empty(blocks, np.float64), xp.empty(blocks, np.int32)
    loss, kept, correct = xp.empty((), x.dtype), xp.empty((), np.int64), xp.empty((), np.int64)
    finished = cuda.counters(xp)
    arrays = (x, labels, dx, sums, hits, finished, loss, kept, correct)
    args = (np.int64(N), *arrays, C, np.int64(ignore_index))
    cuda.launch("softmax", "softmax_cross_entropy", x.dtype, (blocks,), 32 * warps, *args)
    return loss, dx, kept, correct
