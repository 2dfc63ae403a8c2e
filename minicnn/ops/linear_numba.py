# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""linear in Numba: its three matrix products, from the arrays as they lie.

    y[n, o]  = b[o] + sum over i of x[n, i] w[o, i]     rows of both: dot products, lanes over i
    dx[n, i] = sum over o of dy[n, o] w[o, i]           lanes over i
    dw[o, i] = sum over n of dy[n, o] x[n, i]           lanes over i
    db[o]    = sum over n of dy[n, o]

A thread takes a range of o in the forward and one of i in the backward, so that each reads its
part of w once; every sum is taken by one thread, in one order.
"""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import flat, kernel
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    dot_tile,
    lane_count,
    lanes,
    multiples,
    outer_tile,
    tile_add,
    tile_store,
    tile_sums,
    zeros,
)

NARROW, WIDE = ROWS, 2 * ROWS
# Tiles of dot products: rows of x, rows of w, and their product.
MANY = (0,) * 4, (0,) * 4, (0,) * 16
ONE = (0,), (0,) * 8, (0,) * 8


@kernel()
def _dots(R, S, RS, x, w, bias, relu, y, N, I, O, o):
    """Write y of filters o, o + 1, ... for all rows of x, in tiles of R by S."""
    L = lane_count(x)
    whole = I // L
    acc, filters = zeros(x, RS), multiples(o, O - 1, I, S)
    for n in range(0, N, len(R)):
        rows = multiples(n, N - 1, I, R)
        total = acc
        for k in range(0, whole, BLOCK):
            block = dot_tile(acc, x, k * L, rows, w, k * L, filters, min(BLOCK, whole - k))
            total = tile_add(total, block)
        sums = tile_sums(total)
        for r in range(len(R)):
            for s in range(len(S)):
                if n + r < N and o + s < O:
                    value = sums[r * len(S) + s] + bias[o + s]
                    for i in range(whole * L, I):
                        value += x[(n + r) * I + i] * w[(o + s) * I + i]
                    if relu and value <= 0:
                        value = y.dtype.type(0)
                    y[(n + r) * O + o + s] = value


@kernel(parallel=True)
def _forward(R, S, RS, x, w, bias, relu, y, N, I, O):
    step = len(S)
    for item in numba.prange((O + step - 1) // step):
        _dots(R, S, RS, x, w, bias, relu, y, N, I, O, item * step)


@kernel()
def _products(acc, a, row_step, cols, b, at, I, out, R, K):
    """``out[r, at ...] = sum over k < K of a[r * row_step + cols[k]] * b[k, at ...]``, r < R."""
    for r in range(0, R, ROWS):
        rows = multiples(r, R - 1, row_step, ROWS)
        total = acc
        for k in range(0, K, BLOCK):
            n = min(BLOCK, K - k)
            block = outer_tile(acc, a, 0, rows, cols, k, n, b, k * I + at, I)
            total = tile_add(total, block)
        tile_store(total, out, at, multiples(r, R - 1, I, ROWS))


@kernel(parallel=True)
def _backward(dy, x, w, dx, dw, db, N, I, O, filters, samples):
    L = lane_count(x)
    width = 2 * L if I >= 2 * L else L
    for item in numba.prange((I + width - 1) // width):
        i = min(item * width, I - width)  # the last overlaps the one before, with equal results
        if width == L:
            _products(zeros(x, NARROW), dy, 1, samples, x, i, I, dw, O, N)
            if dx.size:
                _products(zeros(x, NARROW), dy, O, filters, w, i, I, dx, N, O)
        else:
            _products(zeros(x, WIDE), dy, 1, samples, x, i, I, dw, O, N)
            if dx.size:
                _products(zeros(x, WIDE), dy, O, filters, w, i, I, dx, N, O)
    for o in range(O):
        total = 0.0
        for n in range(N):
            total += dy[n * O + o]
        db[o] = total


# ---------------------------------------------------------------- entry points


def forward(x: Array, w: Array, b: Array | None, y: Array, relu: bool = False) -> None:
    """Write y (N, O), or ReLU of it, from x (N, I) and w (O, I)."""
    (N, I), O = x.shape, len(w)
    bias = np.zeros(O, w.dtype) if b is None else b
    tile = MANY if N > 2 else ONE
    _forward(*tile, flat(x), flat(w), flat(bias), relu, y.reshape(-1), N, I, O)


def backward(dy: Array, x: Array, w: Array, dx: Array | None, dw: Array, db: Array) -> None:
    """Write dx (N, I) unless None, dw (O, I) and db (O,)."""
    (N, I), O = x.shape, len(w)
    if I < lanes(x.dtype):  # no whole vector in a row
        np.matmul(dy.T, x, out=dw)
        db[...] = dy.sum(axis=0, dtype=np.float64)
        if dx is not None:
            np.matmul(dy, w, out=dx)
        return
    gradient = np.empty(0, x.dtype) if dx is None else dx.reshape(-1)
    arrays = flat(dy), flat(x), flat(w), gradient, dw.reshape(-1), db
    _backward(*arrays, N, I, O, _steps(O, 1), _steps(N, O))


@lru_cache(maxsize=64)
def _steps(count: int, step: int) -> np.ndarray:
    return (np.arange(count) * step).astype(np.int32)
