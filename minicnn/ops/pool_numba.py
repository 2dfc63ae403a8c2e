# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Adaptive average pooling in Numba: each thread takes whole maps, and writes nothing outside them.

Maps are (M, H, W) with M = N*C. Row i of y is a mean over the rows ``rows[i, 0]`` to
``rows[i, 1]`` of x, and columns alike. Pooling with a sliding window is in `window_numba`.
"""

from __future__ import annotations

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.shapes import Pair


@kernel(parallel=True)
def _average(x, y, M, H, W, rows, columns, divisor):
    OH, OW = len(rows), len(columns)
    for m in numba.prange(M):
        sums = np.empty(W, np.float64)
        for i in range(OH):
            sums[:] = 0
            for h in range(rows[i, 0], rows[i, 1]):
                row = x[(m * H + h) * W : (m * H + h + 1) * W]
                for w in range(W):
                    sums[w] += row[w]
            for j in range(OW):
                total = 0.0
                for w in range(columns[j, 0], columns[j, 1]):
                    total += sums[w]
                y[(m * OH + i) * OW + j] = total / divisor[i * OW + j]


@kernel(parallel=True)
def _average_gradient(dy, dx, M, H, W, rows, columns, divisor):
    OH, OW = len(rows), len(columns)
    for m in numba.prange(M):
        shares = np.empty(W, np.float64)
        sums = np.zeros((H, W), np.float64)
        for i in range(OH):
            shares[:] = 0
            for j in range(OW):
                share = dy[(m * OH + i) * OW + j] / np.float64(divisor[i * OW + j])
                for w in range(columns[j, 0], columns[j, 1]):
                    shares[w] += share
            for h in range(rows[i, 0], rows[i, 1]):
                for w in range(W):
                    sums[h, w] += shares[w]
        for h in range(H):
            for w in range(W):
                dx[(m * H + h) * W + w] = sums[h, w]


def average_forward(x: Array, rows: Array, columns: Array, divisor: Array) -> Array:
    """Return the sums over ``rows`` (OH, 2) and ``columns`` (OW, 2) over ``divisor`` (OH, OW)."""
    N, C, H, W = x.shape
    y = np.empty((N, C, len(rows), len(columns)), x.dtype)
    with buffers(x.dtype):
        _average(flat(x), y.reshape(-1), N * C, H, W, rows, columns, flat(divisor))
    return y


def average_backward(dy: Array, size: Pair, rows: Array, columns: Array, divisor: Array) -> Array:
    """Return the adjoint of `average_forward` for maps of `size`."""
    N, C = dy.shape[:2]
    dx = np.empty((N, C, *size), dy.dtype)
    with buffers(dy.dtype):
        _average_gradient(flat(dy), dx.reshape(-1), N * C, *size, rows, columns, flat(divisor))
    return dx
