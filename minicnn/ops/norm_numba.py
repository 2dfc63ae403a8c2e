# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Batch, layer and group normalisation in Numba, on runs of numbers that lie side by side.

A run is one map (batch and group norm) or one row (layer norm). Its sums are taken in blocks in
the lanes of a few vectors, and the blocks in float64. Numbers enter as ``x - k`` with k the mean
rounded to x's type, so that squares do not cancel and the rest of the mean is made up for exactly.

Threads share runs out. What runs have in common is added up afterwards, in the order of the runs,
so that the number of threads changes no bit.
"""

from __future__ import annotations

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.copy_numba import clear, load_some, store_some
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import (
    add,
    constant,
    fma,
    horizontal_sum,
    lane_count,
    load,
    mul,
    splat,
    store,
    sub,
    zero,
)

BLOCK = 64  # vectors that are added up in a lane before float64 takes over
PARTS = 16  # of the rows, for the sums over rows in layer norm


# ---------------------------------------------------------------- one run


@kernel()
def _sums(x, at, n, k):
    """Return the sums of x - k and of its square over ``x[at : at + n]``."""
    L, first, second = lane_count(x), 0.0, 0.0
    whole = n - n % (2 * L)
    kv = splat(k)
    for start in range(0, whole, 2 * L * BLOCK):
        a, b, c, d = zero(x), zero(x), zero(x), zero(x)
        for i in range(at + start, at + min(whole, start + 2 * L * BLOCK), 2 * L):
            u, v = sub(load(x, i), kv), sub(load(x, i + L), kv)
            a, b, c, d = add(a, u), add(b, v), fma(u, u, c), fma(v, v, d)
        first += horizontal_sum(add(a, b))
        second += horizontal_sum(add(c, d))
    for i in range(at + whole, at + n):
        u = np.float64(x[i] - k)
        first += u
        second += u * u
    return first, second


@kernel()
def _moments_of(x, at, n):
    """Return the mean of a run, and the sum of squares of what its numbers differ from it."""
    k = x.dtype.type(0)
    first, _ = _sums(x, at, n, k)
    if np.isfinite(first):
        k = x.dtype.type(first / n)
    # The second time the run is in the cache.
    first, second = _sums(x, at, n, k)
    squares = second - first * first / n
    return k + first / n, 0.0 if squares < 0 else squares


@kernel()
def _dots(g, x, at, n, k):
    """Return the sums of g and of g * (x - k) over a run."""
    L, first, second = lane_count(x), 0.0, 0.0
    whole = n - n % (2 * L)
    kv = splat(k)
    for start in range(0, whole, 2 * L * BLOCK):
        a, b, c, d = zero(x), zero(x), zero(x), zero(x)
        for i in range(at + start, at + min(whole, start + 2 * L * BLOCK), 2 * L):
            u, v = load(g, i), load(g, i + L)
            a, b = add(a, u), add(b, v)
            c, d = fma(u, sub(load(x, i), kv), c), fma(v, sub(load(x, i + L), kv), d)
        first += horizontal_sum(add(a, b))
        second += horizontal_sum(add(c, d))
    for i in range(at + whole, at + n):
        first += g[i]
        second += np.float64(g[i]) * np.float64(x[i] - k)
    return first, second


@kernel()
def _scale(x, at, n, k, scale, shift, y):
    """Write ``y = (x - k) * scale + shift``."""
    L = lane_count(x)
    whole = n - n % L
    kv, a, b = splat(k), splat(scale), splat(shift)
    for i in range(at, at + whole, L):
        store(y, i, fma(sub(load(x, i), kv), a, b))
    for i in range(at + whole, at + n):
        y[i] = (x[i] - k) * scale + shift


@kernel()
def _combine(g, x, at, n, k, scale, slope, shift, dx):
    """Write ``dx = g * scale + (x - k) * slope + shift``."""
    L = lane_count(x)
    whole = n - n % L
    kv, a, b, c = splat(k), splat(scale), splat(slope), splat(shift)
    for i in range(at, at + whole, L):
        store(dx, i, fma(load(g, i), a, fma(sub(load(x, i), kv), b, c)))
    for i in range(at + whole, at + n):
        dx[i] = g[i] * scale + ((x[i] - k) * slope + shift)


# ---------------------------------------------------------------- runs, each with its own numbers


@kernel(parallel=True)
def _moments(x, R, n, mean, squares):
    for r in numba.prange(R):
        mean[r], squares[r] = _moments_of(x, r * n, n)


@kernel(parallel=True)
def _run_dots(g, x, R, n, k, first, second):
    for r in numba.prange(R):
        first[r], second[r] = _dots(g, x, r * n, n, k[r])


@kernel(parallel=True)
def _run_scale(x, R, n, k, scale, shift, y):
    for r in numba.prange(R):
        _scale(x, r * n, n, k[r], scale[r], shift[r], y)


@kernel(parallel=True)
def _run_combine(g, x, R, n, k, scale, slope, shift, dx):
    for r in numba.prange(R):
        _combine(g, x, r * n, n, k[r], scale[r], slope[r], shift[r], dx)


def run_moments(x: Array) -> tuple[Array, Array]:
    """Return, for each run of x (..., L), the mean and the sum of ``(x - mean)^2``, in float64."""
    mean, squares = np.empty((2, *x.shape[:-1]))
    with buffers(x.dtype):
        _moments(flat(x), mean.size, x.shape[-1], mean.reshape(-1), squares.reshape(-1))
    return mean, squares


def run_dots(g: Array, x: Array, k: Array) -> tuple[Array, Array]:
    """Return, for each run of x (..., L), the sums of g and of g * (x - k), in float64."""
    first, second = np.empty((2, *x.shape[:-1]))
    sizes = first.size, x.shape[-1]
    with buffers(x.dtype):
        out = first.reshape(-1), second.reshape(-1)
        _run_dots(flat(g), flat(x), *sizes, *_of_runs(x, k), *out)
    return first, second


def scale_runs(x: Array, k: Array, scale: Array, shift: Array) -> Array:
    """Return ``(x - k) * scale + shift`` with numbers for each run; k is of x's dtype."""
    y = np.empty_like(x)
    with buffers(x.dtype):
        numbers = _of_runs(x, k, scale, shift)
        _run_scale(flat(x), x.size // x.shape[-1], x.shape[-1], *numbers, y.reshape(-1))
    return y


def combine_runs(g: Array, x: Array, k: Array, scale: Array, slope: Array, shift: Array) -> Array:
    """Return ``g * scale + (x - k) * slope + shift`` with numbers for each run."""
    dx = np.empty_like(x)
    with buffers(x.dtype):
        numbers = _of_runs(x, k, scale, slope, shift)
        sizes = x.size // x.shape[-1], x.shape[-1]
        _run_combine(flat(g), flat(x), *sizes, *numbers, dx.reshape(-1))
    return dx


def _of_runs(x: Array, *numbers: Array) -> list[Array]:
    """Spread numbers over the runs of x (..., L), in x's dtype."""
    return [flat(np.array(np.broadcast_to(a, x.shape[:-1]), x.dtype)) for a in numbers]


# ---------------------------------------------------------------- rows, with w and b for columns


# A row ends with a part of a vector. k is its mean in x's type, and rest what that leaves of it.


@kernel()
def _normalize_row(x, at, D, k, rest, rstd, w, b, y):
    """Write ``y = xhat * w + b`` with ``xhat = (x - k - rest) * rstd``."""
    L, none, kv = lane_count(x), zero(x), splat(k)
    scale, shift = constant(rstd, none), constant(-rest * rstd, none)
    for d in range(0, D, L):
        n = D - d
        xhat = fma(sub(load_some(x, at + d, n, kv), kv), scale, shift)
        store_some(y, at + d, n, fma(xhat, load_some(w, d, n, none), load_some(b, d, n, none)))


@kernel()
def _dots_of_row(dy, x, w, at, D, k):
    """Return the sums of ``dy * w`` and of ``dy * w * (x - k)``."""
    L, none, kv, first, second = lane_count(x), zero(x), splat(k), 0.0, 0.0
    for start in range(0, D, L * BLOCK):
        a, b = none, none
        for d in range(start, min(D, start + L * BLOCK), L):
            n = D - d
            g = mul(load_some(dy, at + d, n, none), load_some(w, d, n, none))
            a, b = add(a, g), fma(g, sub(load_some(x, at + d, n, kv), kv), b)
        first += horizontal_sum(a)
        second += horizontal_sum(b)
    return first, second


@kernel()
def _row_gradient(dy, x, w, at, D, k, rest, rstd, dx, dw, db):
    """Write dx, and add ``dy * xhat`` to dw and dy to db."""
    L, none, kv = lane_count(x), zero(x), splat(k)
    first, second = _dots_of_row(dy, x, w, at, D, k)
    slope = -rstd * rstd * rstd * (second - rest * first) / D
    shift = constant(-rstd * first / D - rest * slope, none)
    slope_, scale, shift_of_xhat = (
        constant(slope, none),
        constant(rstd, none),
        constant(-rest * rstd, none),
    )
    for d in range(0, D, L):
        n = D - d
        g, u = load_some(dy, at + d, n, none), sub(load_some(x, at + d, n, kv), kv)
        v = fma(mul(g, load_some(w, d, n, none)), scale, fma(u, slope_, shift))
        store_some(dx, at + d, n, v)
        xhat = fma(u, scale, shift_of_xhat)
        store_some(dw, d, n, fma(g, xhat, load_some(dw, d, n, none)))
        store_some(db, d, n, add(g, load_some(db, d, n, none)))


@kernel(parallel=True)
def _row_norm(x, R, D, w, b, eps, mean, rstd, y):
    for r in numba.prange(R):
        mean[r], squares = _moments_of(x, r * D, D)
        rstd[r] = (squares / D + eps) ** -0.5
        k = x.dtype.type(mean[r])
        _normalize_row(x, r * D, D, k, mean[r] - k, rstd[r], w, b, y)


@kernel(parallel=True)
def _row_norm_gradient(dy, x, R, D, w, mean, rstd, dx, dws, dbs, dw_blocks, db_blocks):
    """Write dx, and the sums for dw and db over the rows, in parts: in blocks, then in float64."""
    for part in numba.prange(len(dws)):
        dw, db, end = dw_blocks[part], db_blocks[part], (part + 1) * R // len(dws)
        for d in range(D):
            dws[part, d] = dbs[part, d] = 0
        for start in range(part * R // len(dws), end, BLOCK):
            clear(dw, 0, D)
            clear(db, 0, D)
            for r in range(start, min(end, start + BLOCK)):
                k = x.dtype.type(mean[r])
                rest = mean[r] - k
                _row_gradient(dy, x, w, r * D, D, k, rest, rstd[r], dx, dw, db)
            for d in range(D):
                dws[part, d] += dw[d]
                dbs[part, d] += db[d]


# ---------------------------------------------------------------- batch norm, x (N, C, L)


def batch_norm_forward(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None, var: Array | None
) -> tuple[Array, Array, Array]:
    if mean is None or var is None:
        N, _, L = x.shape
        means, squares = run_moments(x)  # (N, C)
        mean = means.mean(axis=0)
        var = (squares.sum(axis=0) + L * ((means - mean) ** 2).sum(axis=0)) / (N * L)
    k, rest = _rounded(mean, x)
    scale = w * (var + eps) ** -0.5
    return scale_runs(x, k, scale, b - rest * scale), mean, var


def batch_norm_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    M = x.size // x.shape[1]
    k, rest = _rounded(mean, x)  # (C,)
    db, products = (a.sum(axis=0) for a in run_dots(dy, x, k))
    dw = (products - rest * db) * rstd
    scale = w * rstd
    if training:
        slope = -scale * rstd * dw / M
        dx = combine_runs(dy, x, k, scale, slope, -scale * db / M - rest * slope)
    else:
        dx = scale_runs(dy, np.zeros_like(k), scale, np.zeros_like(k))
    return dx, dw.astype(x.dtype), db.astype(x.dtype)


# ---------------------------------------------------------------- group norm, x (N, G, C/G, L)


def group_norm_forward(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    N, G, CG, L = x.shape
    mean, squares = run_moments(x.reshape(N, G, CG * L))  # (N, G)
    rstd = (squares / (CG * L) + eps) ** -0.5
    k, rest = _rounded(mean[:, :, None], x)  # (N, G, 1)
    scale = w[:, :, 0] * rstd[:, :, None]  # (N, G, C/G)
    return scale_runs(x, k, scale, b[:, :, 0] - rest * scale), mean, rstd


def group_norm_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    M, w_ = x.shape[2] * x.shape[3], w[:, :, 0]  # w_: (G, C/G)
    k, rest = _rounded(mean[:, :, None], x)  # (N, G, 1)
    r = rstd[:, :, None]
    sums, products = run_dots(dy, x, k)  # (N, G, C/G)
    with_xhat = (products - rest * sums) * r
    dw, db = with_xhat.sum(axis=0), sums.sum(axis=0)  # (G, C/G)
    slope = -r * r * (w_ * with_xhat).sum(axis=2, keepdims=True) / M  # (N, G, 1)
    shift = -r * (w_ * sums).sum(axis=2, keepdims=True) / M - rest * slope
    dx = combine_runs(dy, x, k, w_ * r, slope, shift)
    return dx, dw[:, :, None].astype(x.dtype), db[:, :, None].astype(x.dtype)


# ---------------------------------------------------------------- layer norm, x (R, D)


def layer_norm_forward(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    y, (mean, rstd) = np.empty_like(x), np.empty((2, len(x)))
    with buffers(x.dtype):
        _row_norm(flat(x), *x.shape, flat(w), flat(b), float(eps), mean, rstd, y.reshape(-1))
    return y, mean, rstd


def layer_norm_backward(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    R, D = x.shape
    parts = min(PARTS, R)
    dx, (dw, db) = np.empty_like(x), np.empty((2, parts, D))
    with buffers(x.dtype, parts * D, parts * D) as scratch:
        arrays = flat(dy), flat(x), R, D, flat(w), flat(mean), flat(rstd), dx.reshape(-1)
        _row_norm_gradient(*arrays, dw, db, *(a.reshape(parts, D) for a in scratch))
    return dx, dw.sum(axis=0).astype(x.dtype), db.sum(axis=0).astype(x.dtype)


def _rounded(mean: Array, x: Array) -> tuple[Array, Array]:
    """Return the mean in x's type and what that leaves of it."""
    k = mean.astype(x.dtype)
    return k, mean - k
