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
from minicnn.ops.copy_numba import load_some, store_some
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
    lanes,
    maximum,
    mul,
    splat,
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
        largest = maximum(largest, load_some(x, at + c, C - c, lowest))
    most = splat(horizontal_max(largest))
    total = 0.0
    for start in range(0, C, L * BLOCK):
        block = zero(x)
        for c in range(start, min(C, start + L * BLOCK), L):
            e = vector.exp(sub(load_some(x, at + c, C - c, lowest), most))
            block = add(block, e)
            if not log:
                store_some(y, at + c, C - c, e)
        total += horizontal_sum(block)
    if log:
        shift = constant(math.log(total), most)
        for c in range(0, C, L):
            v = sub(sub(load_some(x, at + c, C - c, lowest), most), shift)
            store_some(y, at + c, C - c, v)
    else:
        sums = constant(total, most)
        for c in range(0, C, L):
            store_some(y, at + c, C - c, div(load_some(y, at + c, C - c, sums), sums))


@kernel()
def _row_gradient(dy, y, dx, at, C, log):
    L, none, total = lane_count(y), zero(y), 0.0
    for start in range(0, C, L * BLOCK):
        block = zero(y)
        for c in range(start, min(C, start + L * BLOCK), L):
            g = load_some(dy, at + c, C - c, none)
            block = add(block, g) if log else fma(g, load_some(y, at + c, C - c, none), block)
        total += horizontal_sum(block)
    sums = constant(total, none)
    for c in range(0, C, L):
        g, v = load_some(dy, at + c, C - c, none), load_some(y, at + c, C - c, none)
        d = sub(g, mul(vector.exp(v), sums)) if log else mul(v, sub(g, sums))
        store_some(dx, at + c, C - c, d)


# ---------------------------------------------------------------- along another axis


@kernel()
def _column(x, y, at, n, C, B, log):
    """Softmax of n columns side by side, each of the C numbers ``x[at :: B]``."""
    none = zero(x)
    most = load_some(x, at, n, none)
    for c in range(1, C):
        most = maximum(most, load_some(x, at + c * B, n, none))
    total = zero(x)
    for start in range(0, C, BLOCK):
        block = zero(x)
        for c in range(start, min(C, start + BLOCK)):
            e = vector.exp(sub(load_some(x, at + c * B, n, none), most))
            block = add(block, e)
            if not log:
                store_some(y, at + c * B, n, e)
        total = add(total, block)
    if log:
        shift = vector.log(total)
        for c in range(C):
            v = sub(sub(load_some(x, at + c * B, n, none), most), shift)
            store_some(y, at + c * B, n, v)
    else:
        for c in range(C):
            store_some(y, at + c * B, n, div(load_some(y, at + c * B, n, none), total))


@kernel()
def _column_gradient(dy, y, dx, at, n, C, B, log):
    none, total = zero(y), zero(y)
    for start in range(0, C, BLOCK):
        block = zero(y)
        for c in range(start, min(C, start + BLOCK)):
            g = load_some(dy, at + c * B, n, none)
            block = add(block, g) if log else fma(g, load_some(y, at + c * B, n, none), block)
        total = add(total, block)
    for c in range(C):
        g, v = load_some(dy, at + c * B, n, none), load_some(y, at + c * B, n, none)
        d = sub(g, mul(vector.exp(v), total)) if log else mul(v, sub(g, total))
        store_some(dx, at + c * B, n, d)


# ---------------------------------------------------------------- whole arrays


# Each of these does the rows, or the vectors of columns, from `first` to `last`.


@kernel()
def some_rows(x, y, first, last, C, log):
    for a in range(first, last):
        _row(x, y, a * C, C, log)


@kernel()
def _some_rows_gradient(dy, y, dx, first, last, C, log):
    for a in range(first, last):
        _row_gradient(dy, y, dx, a * C, C, log)


@kernel()
def _some_columns(x, y, first, last, each, C, B, log):
    L = lane_count(x)
    for k in range(first, last):
        b = k % each * L
        _column(x, y, k // each * C * B + b, min(L, B - b), C, B, log)


@kernel()
def _some_columns_gradient(dy, y, dx, first, last, each, C, B, log):
    L = lane_count(y)
    for k in range(first, last):
        b = k % each * L
        _column_gradient(dy, y, dx, k // each * C * B + b, min(L, B - b), C, B, log)


# One thread works where it is: waking the others takes longer than a few rows.


@kernel(parallel=True)
def _rows(x, y, A, C, log, threads):
    if threads == 1:
        some_rows(x, y, 0, A, C, log)
    else:
        for t in numba.prange(threads):
            some_rows(x, y, t * A // threads, (t + 1) * A // threads, C, log)


@kernel(parallel=True)
def _rows_gradient(dy, y, dx, A, C, log, threads):
    if threads == 1:
        _some_rows_gradient(dy, y, dx, 0, A, C, log)
    else:
        for t in numba.prange(threads):
            _some_rows_gradient(dy, y, dx, t * A // threads, (t + 1) * A // threads, C, log)


@kernel(parallel=True)
def _columns(x, y, A, each, C, B, log, threads):
    n = A * each
    for t in numba.prange(threads):
        _some_columns(x, y, t * n // threads, (t + 1) * n // threads, each, C, B, log)


@kernel(parallel=True)
def _columns_gradient(dy, y, dx, A, each, C, B, log, threads):
    n = A * each
    for t in numba.prange(threads):
        first, last = t * n // threads, (t + 1) * n // threads
        _some_columns_gradient(dy, y, dx, first, last, each, C, B, log)


def forward(x: Array, dim: int, log: bool) -> Array:
    """Return softmax or log_softmax of x along `dim`."""
    y = np.empty_like(x)
    (A, C, B), threads = _sizes(x, dim), threads_for(x)
    with buffers(x.dtype):
        if B == 1:
            _rows(flat(x), y.reshape(-1), A, C, log, threads)
        else:
            each = -(-B // lanes(x.dtype))  # vectors
            _columns(flat(x), y.reshape(-1), A, each, C, B, log, threads)
    return y


def backward(dy: Array, y: Array, dim: int, log: bool) -> Array:
    """Return the gradient to x."""
    dx = np.empty_like(y)
    (A, C, B), threads = _sizes(y, dim), threads_for(y)
    with buffers(y.dtype):
        if B == 1:
            _rows_gradient(flat(dy), flat(y), dx.reshape(-1), A, C, log, threads)
        else:
            each = -(-B // lanes(y.dtype))
            _columns_gradient(flat(dy), flat(y), dx.reshape(-1), A, each, C, B, log, threads)
    return dx


def _sizes(x: Array, dim: int) -> tuple[int, int, int]:
    dim %= x.ndim
    return size(x.shape[:dim]), x.shape[dim], size(x.shape[dim + 1 :])


def threads_for(x: Array) -> int:
    return max(1, min(numba.get_num_threads(), x.size // WORTH))
