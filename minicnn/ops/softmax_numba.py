# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""softmax and log_softmax along one axis in Numba: a row stays in the cache from first to last.

An array is (A, C, B) with the axis in the middle. Where B is 1, the lanes of a vector are numbers
of one row; otherwise they are the same number of rows side by side. Exponentials are in the
array's own type, and long sums are sums of blocks.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops import vector
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import (
    BLOCK,
    add,
    constant,
    div,
    fma,
    horizontal_max,
    horizontal_sum,
    lane_count,
    load_part,
    maximum,
    mul,
    splat,
    store_part,
    sub,
    zero,
)
from minicnn.shapes import size

WORTH = 1 << 13  # numbers that are worth a thread


# ---------------------------------------------------------------- along the last axis


@kernel()
def _row(x, y, at, C, log):
    """Softmax of the C numbers ``x[at:]``."""
    L = lane_count(x)
    lowest = splat(x.dtype.type(-np.inf))  # beside the row: no maximum, and e^-inf adds nothing
    largest = lowest
    for c in range(0, C, L):
        largest = maximum(largest, load_part(x, at + c, C - c, lowest))
    most = splat(horizontal_max(largest))
    total = 0.0
    for start in range(0, C, L * BLOCK):
        block = zero(x)
        for c in range(start, min(C, start + L * BLOCK), L):
            e = vector.exp(sub(load_part(x, at + c, C - c, lowest), most))
            block = add(block, e)
            store_part(y, at + c, C - c, e)
        total += horizontal_sum(block)
    if log:
        shift = constant(math.log(total), most)
        for c in range(0, C, L):
            v = sub(sub(load_part(x, at + c, C - c, lowest), most), shift)
            store_part(y, at + c, C - c, v)
    else:
        sums = constant(total, most)
        for c in range(0, C, L):
            store_part(y, at + c, C - c, div(load_part(y, at + c, C - c, sums), sums))


@kernel()
def _row_gradient(dy, y, dx, at, C, log):
    L, none, total = lane_count(y), zero(y), 0.0
    for start in range(0, C, L * BLOCK):
        block = zero(y)
        for c in range(start, min(C, start + L * BLOCK), L):
            g = load_part(dy, at + c, C - c, none)
            block = add(block, g) if log else fma(g, load_part(y, at + c, C - c, none), block)
        total += horizontal_sum(block)
    sums = constant(total, none)
    for c in range(0, C, L):
        g, v = load_part(dy, at + c, C - c, none), load_part(y, at + c, C - c, none)
        d = sub(g, mul(vector.exp(v), sums)) if log else mul(v, sub(g, sums))
        store_part(dx, at + c, C - c, d)


# ---------------------------------------------------------------- along another axis


@kernel()
def _column(x, y, at, n, C, B, log):
    """Softmax of n columns side by side, each of the C numbers ``x[at :: B]``."""
    none = zero(x)
    most = load_part(x, at, n, none)
    for c in range(1, C):
        most = maximum(most, load_part(x, at + c * B, n, none))
    total = zero(x)
    for start in range(0, C, BLOCK):
        block = zero(x)
        for c in range(start, min(C, start + BLOCK)):
            e = vector.exp(sub(load_part(x, at + c * B, n, none), most))
            block = add(block, e)
            store_part(y, at + c * B, n, e)
        total = add(total, block)
    if log:
        shift = vector.log(total)
        for c in range(C):
            v = sub(sub(load_part(x, at + c * B, n, none), most), shift)
            store_part(y, at + c * B, n, v)
    else:
        for c in range(C):
            store_part(y, at + c * B, n, div(load_part(y, at + c * B, n, none), total))


@kernel()
def _column_gradient(dy, y, dx, at, n, C, B, log):
    none, total = zero(y), zero(y)
    for start in range(0, C, BLOCK):
        block = zero(y)
        for c in range(start, min(C, start + BLOCK)):
            g = load_part(dy, at + c * B, n, none)
            block = add(block, g) if log else fma(g, load_part(y, at + c * B, n, none), block)
        total = add(total, block)
    for c in range(C):
        g, v = load_part(dy, at + c * B, n, none), load_part(y, at + c * B, n, none)
        d = sub(g, mul(vector.exp(v), total)) if log else mul(v, sub(g, total))
        store_part(dx, at + c * B, n, d)


# ---------------------------------------------------------------- whole arrays


@kernel(parallel=True)
def _rows(x, y, A, C, log, threads):
    for t in numba.prange(threads):
        for a in range(t * A // threads, (t + 1) * A // threads):
            _row(x, y, a * C, C, log)


@kernel(parallel=True)
def _columns(x, y, A, C, B, log, threads):
    L = lane_count(x)
    each = (B + L - 1) // L  # vectors
    for t in numba.prange(threads):
        for k in range(t * A * each // threads, (t + 1) * A * each // threads):
            b = k % each * L
            _column(x, y, k // each * C * B + b, min(L, B - b), C, B, log)


@kernel(parallel=True)
def _rows_gradient(dy, y, dx, A, C, log, threads):
    for t in numba.prange(threads):
        for a in range(t * A // threads, (t + 1) * A // threads):
            _row_gradient(dy, y, dx, a * C, C, log)


@kernel(parallel=True)
def _columns_gradient(dy, y, dx, A, C, B, log, threads):
    L = lane_count(y)
    each = (B + L - 1) // L
    for t in numba.prange(threads):
        for k in range(t * A * each // threads, (t + 1) * A * each // threads):
            b = k % each * L
            _column_gradient(dy, y, dx, k // each * C * B + b, min(L, B - b), C, B, log)


def forward(x: Array, dim: int, log: bool) -> Array:
    """Return softmax or log_softmax of x along `dim`."""
    y = np.empty_like(x)
    (A, C, B), threads = _sizes(x, dim), _threads(x)
    with buffers(x.dtype):
        if B == 1:
            _rows(flat(x), y.reshape(-1), A, C, log, threads)
        else:
            _columns(flat(x), y.reshape(-1), A, C, B, log, threads)
    return y


def backward(dy: Array, y: Array, dim: int, log: bool) -> Array:
    """Return the gradient to x."""
    dx = np.empty_like(y)
    (A, C, B), threads = _sizes(y, dim), _threads(y)
    with buffers(y.dtype):
        if B == 1:
            _rows_gradient(flat(dy), flat(y), dx.reshape(-1), A, C, log, threads)
        else:
            _columns_gradient(flat(dy), flat(y), dx.reshape(-1), A, C, B, log, threads)
    return dx


def _sizes(x: Array, dim: int) -> tuple[int, int, int]:
    dim %= x.ndim
    return size(x.shape[:dim]), x.shape[dim], size(x.shape[dim + 1 :])


def _threads(x: Array) -> int:
    return max(1, min(numba.get_num_threads(), x.size // WORTH))
