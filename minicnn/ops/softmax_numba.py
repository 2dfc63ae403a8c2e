# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""softmax and log_softmax along one axis in Numba: a row is in the cache from first to last.

An array is (A, C, B) with the axis in the middle. The exponentials are in float64, and so are all
sums.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.elementwise_numba import exp
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.shapes import size

ROWS = 64


@kernel()
def _forward_row(x, y, at, C, B, log):
    """Softmax of the C numbers ``x[at :: B]``."""
    largest = -np.inf
    for c in range(C):
        v = np.float64(x[at + c * B])
        if v > largest or v != v:  # a NaN stays: no number is larger
            largest = v
    total = 0.0
    for c in range(C):
        total += exp(np.float64(x[at + c * B]) - largest)
    for c in range(C):
        v = np.float64(x[at + c * B]) - largest
        y[at + c * B] = v - math.log(total) if log else exp(v) / total


@kernel()
def _backward_row(dy, y, dx, at, C, B, log):
    total = 0.0
    for c in range(C):
        g = np.float64(dy[at + c * B])
        total += g if log else g * np.float64(y[at + c * B])
    for c in range(C):
        g, v = np.float64(dy[at + c * B]), np.float64(y[at + c * B])
        dx[at + c * B] = g - exp(v) * total if log else v * (g - total)


@kernel(parallel=True)
def _forward(x, y, A, C, B, log):
    for k in numba.prange((A * B + ROWS - 1) // ROWS):
        for row in range(k * ROWS, min(A * B, (k + 1) * ROWS)):
            _forward_row(x, y, row // B * C * B + row % B, C, B, log)


@kernel(parallel=True)
def _backward(dy, y, dx, A, C, B, log):
    for k in numba.prange((A * B + ROWS - 1) // ROWS):
        for row in range(k * ROWS, min(A * B, (k + 1) * ROWS)):
            _backward_row(dy, y, dx, row // B * C * B + row % B, C, B, log)


def forward(x: Array, dim: int, log: bool) -> Array:
    y = np.empty_like(x)
    with buffers(x.dtype):
        _forward(flat(x), y.reshape(-1), *_sizes(x, dim), log)
    return y


def backward(dy: Array, y: Array, dim: int, log: bool) -> Array:
    dx = np.empty_like(y)
    with buffers(y.dtype):
        _backward(flat(dy), flat(y), dx.reshape(-1), *_sizes(y, dim), log)
    return dx


def _sizes(x: Array, dim: int) -> tuple[int, int, int]:
    dim %= x.ndim
    return size(x.shape[:dim]), x.shape[dim], size(x.shape[dim + 1 :])
