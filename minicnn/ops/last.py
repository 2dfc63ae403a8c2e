# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Kernels of the fast path on maps with their channels in the lanes.

In the layout LAST a batch of maps is (N, H, W, P): the channels of a pixel lie side by side, and
P is their number rounded up to whole vectors, with zeros beyond. A kernel then works a vector of
channels at a time, whatever the shape. It gets flat arrays and writes what it is given to write:
the plan (`minicnn.plan`) owns the memory.

Sums over pixels are taken in PARTS parts, which do not depend on the number of threads, each in
blocks of BLOCK.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import round_up
from minicnn.ops.conv_block import OFF
from minicnn.ops.jit import flat, kernel
from minicnn.ops.vector import (
    add,
    broadcast,
    div,
    fma,
    lane_count,
    lane_offsets,
    lanes,
    load,
    load_rows,
    load_winner,
    maximum,
    relu_winner,
    store,
    sub,
    take_larger,
    tile_store,
    transpose,
    where_positive,
    where_winner,
    winner_of,
    zero,
)
from minicnn.shapes import Pair, Window

CHUNK = 1 << 14  # numbers: a piece of work where nothing is summed
PARTS = 16
BLOCK = 64


def padded(channels: int, dtype: Any) -> int:
    """Return P for so many channels."""
    return round_up(channels, lanes(dtype))


# ---------------------------------------------------------------- layout


@kernel()
def _image_to_last(x, at, y, to, C, P, S, planes, pixels):
    """Copy an image from planes of S numbers at ``x[at:]`` to S pixels of P numbers."""
    L = lane_count(x)
    whole = C // L * L if S >= L else 0
    for c in range(0, whole, L):
        rows = lane_offsets(planes, c, x)
        for i in range(0, S, L):
            p = min(i, S - L)  # the last block overlaps the one before
            block = transpose(load_rows(x, at + p, rows))
            tile_store(block, y, to + c, lane_offsets(pixels, p, x))
    for p in range(S):
        for c in range(whole, C):
            y[to + p * P + c] = x[at + c * S + p]
        for c in range(C, P):
            y[to + p * P + c] = 0


@kernel()
def _image_to_first(x, at, y, to, C, P, S, planes, pixels):
    """Copy an image back: the inverse of `_image_to_last`."""
    L = lane_count(x)
    whole = C // L * L if S >= L else 0
    for c in range(0, whole, L):
        rows = lane_offsets(planes, c, x)
        for i in range(0, S, L):
            p = min(i, S - L)
            block = transpose(load_rows(x, at + c, lane_offsets(pixels, p, x)))
            tile_store(block, y, to + p, rows)
    for c in range(whole, C):
        for p in range(S):
            y[to + c * S + p] = x[at + p * P + c]


@kernel(parallel=True)
def _to_last(x, y, N, C, P, S, planes, pixels):
    for n in numba.prange(N):
        _image_to_last(x, n * C * S, y, n * S * P, C, P, S, planes, pixels)


@kernel(parallel=True)
def _to_first(x, y, N, C, P, S, planes, pixels):
    for n in numba.prange(N):
        _image_to_first(x, n * S * P, y, n * C * S, C, P, S, planes, pixels)


def to_last(x: Array, y: Array) -> None:
    """Copy x (N, C, H, W) to y (N, H, W, P)."""
    N, C, H, W = x.shape
    P = y.shape[3]
    _to_last(flat(x), y.reshape(-1), N, C, P, H * W, *_tables(C, P, H * W))


def to_first(x: Array, y: Array) -> None:
    """Copy x (N, H, W, P) to y (N, C, H, W)."""
    N, C, H, W = y.shape
    P = x.shape[3]
    _to_first(flat(x), y.reshape(-1), N, C, P, H * W, *_tables(C, P, H * W))


@lru_cache(maxsize=256)
def _tables(C: int, P: int, S: int) -> tuple[np.ndarray, np.ndarray]:
    """Return where the planes of an image begin in layout FIRST, and its pixels in LAST."""
    return np.arange(C) * S, np.arange(S) * P


# ---------------------------------------------------------------- one number at a time


@kernel(parallel=True)
def _relu(x, y):
    L = lane_count(x)
    for k in numba.prange((x.size + CHUNK - 1) // CHUNK):
        end = min(x.size, (k + 1) * CHUNK)
        whole = end - (end - k * CHUNK) % L
        for i in range(k * CHUNK, whole, L):
            store(y, i, maximum(zero(x), load(x, i)))
        for i in range(whole, end):
            y[i] = 0 if x[i] <= 0 else x[i]


@kernel(parallel=True)
def _relu_gradient(dy, y, dx):
    L = lane_count(y)
    for k in numba.prange((y.size + CHUNK - 1) // CHUNK):
        end = min(y.size, (k + 1) * CHUNK)
        whole = end - (end - k * CHUNK) % L
        for i in range(k * CHUNK, whole, L):
            store(dx, i, where_positive(load(y, i), load(dy, i)))
        for i in range(whole, end):
            dx[i] = dy[i] if y[i] > 0 else 0


@kernel(parallel=True)
def _add(a, b, y, relu):
    L = lane_count(a)
    for k in numba.prange((a.size + CHUNK - 1) // CHUNK):
        for i in range(k * CHUNK, min(a.size, (k + 1) * CHUNK), L):  # maps end with a vector
            v = add(load(a, i), load(b, i))
            store(y, i, maximum(zero(a), v) if relu else v)


def relu(x: Array, y: Array) -> None:
    """``y = max(x, 0)``; y may be x."""
    _relu(flat(x), y.reshape(-1))


def relu_gradient(dy: Array, y: Array, dx: Array) -> None:
    """``dx = dy where y > 0, else 0``; dx may be dy."""
    _relu_gradient(flat(dy), flat(y), dx.reshape(-1))


def add_maps(a: Array, b: Array, y: Array, relu: bool = False) -> None:
    """``y = a + b``, and ReLU of it if asked for; y may be a."""
    _add(flat(a), flat(b), y.reshape(-1), relu)


# ---------------------------------------------------------------- some of the pixels


@kernel(parallel=True)
def _take_every(x, y, N, H, W, P, OH, OW, SH, SW):
    L = lane_count(x)
    for row in numba.prange(N * OH):
        n, i = row // OH, row % OH
        for j in range(OW):
            at, to = ((n * H + i * SH) * W + j * SW) * P, (row * OW + j) * P
            for c in range(0, P, L):
                store(y, to + c, load(x, at + c))


@kernel(parallel=True)
def _spread(dy, dx, N, H, W, P, OH, OW, SH, SW, more):
    L = lane_count(dy)
    for n in numba.prange(N):
        if not more:
            dx[n * H * W * P : (n + 1) * H * W * P] = 0
        for i in range(OH):
            for j in range(OW):
                at, to = ((n * OH + i) * OW + j) * P, ((n * H + i * SH) * W + j * SW) * P
                for c in range(0, P, L):
                    store(dx, to + c, add(load(dx, to + c), load(dy, at + c)))


def take_every(x: Array, stride: Pair, y: Array) -> None:
    """Write every so many rows and columns of x to y."""
    (N, H, W, P), (OH, OW) = x.shape, y.shape[1:3]
    _take_every(flat(x), y.reshape(-1), N, H, W, P, OH, OW, *stride)


def spread(dy: Array, stride: Pair, dx: Array, more: bool = False) -> None:
    """Put the pixels of dy into every so many rows and columns of dx, or add them if `more`."""
    (N, H, W, P), (OH, OW) = dx.shape, dy.shape[1:3]
    _spread(flat(dy), dx.reshape(-1), N, H, W, P, OH, OW, *stride, more)


# ---------------------------------------------------------------- batch-norm


@kernel()
def _add_block(block, total):
    """Add the sums of a block to the total, and set them to zero."""
    for c in range(0, total.size, lane_count(total)):
        store(total, c, add(load(total, c), load(block, c)))
        store(block, c, zero(block))


@kernel(parallel=True)
def _moments(x, rows, P, shift, sums, squares, blocks):
    """Add up x - shift and its square over the rows, in parts."""
    # The sums of a block lie in the cache, not in registers: memory is read in order that way.
    L, parts = lane_count(x), len(sums)
    for part in numba.prange(parts):
        first, end = part * rows // parts, (part + 1) * rows // parts
        s, q = blocks[part, 0], blocks[part, 1]
        s[:], q[:], sums[part, :], squares[part, :] = 0, 0, 0, 0
        for r in range(first, end, BLOCK):
            for i in range(r, min(end, r + BLOCK)):
                for c in range(0, P, L):
                    d = sub(load(x, i * P + c), load(shift, c))
                    store(s, c, add(load(s, c), d))
                    store(q, c, fma(d, d, load(q, c)))
            _add_block(s, sums[part])
            _add_block(q, squares[part])


@kernel(parallel=True)
def _normalise(x, rows, P, mean, scale, bias, other, other_by, relu, y):
    L = lane_count(x)
    blocks = (rows + BLOCK - 1) // BLOCK
    for b in numba.prange(blocks):
        k = blocks - 1 - b  # the moments were taken in order: what they read last is in the cache
        for i in range(k * BLOCK, min(rows, (k + 1) * BLOCK)):
            for c in range(0, P, L):
                v = sub(load(x, i * P + c), load(mean, c))
                v = fma(v, load(scale, c), load(bias, c))
                if other.size:
                    d = sub(load(other, i * P + c), load(other_by[0], c))
                    v = add(v, fma(d, load(other_by[1], c), load(other_by[2], c)))
                store(y, i * P + c, maximum(zero(x), v) if relu else v)


@kernel(parallel=True)
def _gradient_sums(x, dy, rows, P, mean, scale, bias, relu, sums, products, blocks):
    """Add up g and g * (x - mean) over the rows, in parts; g is dy where the ReLU was on."""
    L, parts = lane_count(x), len(sums)
    for part in numba.prange(parts):
        first, end = part * rows // parts, (part + 1) * rows // parts
        s, q = blocks[part, 0], blocks[part, 1]
        s[:], q[:], sums[part, :], products[part, :] = 0, 0, 0, 0
        for r in range(first, end, BLOCK):
            for i in range(r, min(end, r + BLOCK)):
                for c in range(0, P, L):
                    g, d = load(dy, i * P + c), sub(load(x, i * P + c), load(mean, c))
                    if relu:  # of what `_normalise` made of x, to the bit
                        g = where_positive(fma(d, load(scale, c), load(bias, c)), g)
                    store(s, c, add(load(s, c), g))
                    store(q, c, fma(g, d, load(q, c)))
            _add_block(s, sums[part])
            _add_block(q, products[part])


@kernel(parallel=True)
def _input_gradient(x, dy, rows, P, mean, scale, bias, relu, slope, constant, factor, dx):
    """``dx = g * factor + (x - mean) * slope + constant``."""
    L = lane_count(x)
    blocks = (rows + BLOCK - 1) // BLOCK
    for b in numba.prange(blocks):
        k = blocks - 1 - b  # the sums were taken in order
        for i in range(k * BLOCK, min(rows, (k + 1) * BLOCK)):
            for c in range(0, P, L):
                g, d = load(dy, i * P + c), sub(load(x, i * P + c), load(mean, c))
                if relu:
                    g = where_positive(fma(d, load(scale, c), load(bias, c)), g)
                rest = fma(d, load(slope, c), load(constant, c))
                store(dx, i * P + c, fma(g, load(factor, c), rest))


@kernel(parallel=True)
def _sums(x, rows, P, sums, blocks):
    """Add up the rows, in parts."""
    L, parts = lane_count(x), len(sums)
    for part in numba.prange(parts):
        first, end = part * rows // parts, (part + 1) * rows // parts
        s = blocks[part]
        s[:], sums[part, :] = 0, 0
        for r in range(first, end, BLOCK):
            for i in range(r, min(end, r + BLOCK)):
                for c in range(0, P, L):
                    store(s, c, add(load(s, c), load(x, i * P + c)))
            _add_block(s, sums[part])


def channel_sums(x: Array, channels: int) -> Array:
    """Return the sum of each channel over all pixels, in float64."""
    P = x.shape[-1]
    sums, blocks = np.empty((2, PARTS, P), x.dtype)
    _sums(flat(x), x.size // P, P, sums, blocks)
    return sums[:, :channels].sum(axis=0, dtype=np.float64)


def moments(x: Array, channels: int) -> tuple[Array, Array]:
    """Return the mean and the biased variance of each channel, in float64.

    One pass: the numbers are taken from the mean of a few pixels, so that nothing cancels.
    """
    P, rows = x.shape[3], x.size // x.shape[3]
    shift = x.reshape(rows, P)[:BLOCK].mean(axis=0, dtype=np.float64).astype(x.dtype)
    shift[~np.isfinite(shift)] = 0
    sums, squares, blocks = _sum_buffers(P, x.dtype)
    _moments(flat(x), rows, P, shift, sums, squares, blocks)
    s, q = (a[:, :channels].sum(axis=0, dtype=np.float64) / rows for a in (sums, squares))
    return shift[:channels] + s, np.maximum(q - s * s, 0)


def factors(x: Array, *values: Array) -> Array:
    """Return values of each channel as the kernels take them: (len(values), P), zeros beyond."""
    out = np.zeros((len(values), x.shape[-1]), x.dtype)
    for row, a in zip(out, values):
        row[: len(a)] = a
    return out


def normalise(
    x: Array,
    by: Array,
    y: Array,
    relu: bool = False,
    other: Array | None = None,
    other_by: Array | None = None,
) -> None:
    """``y = (x - mean) * scale + bias`` for each channel, and ReLU of it if asked for.

    `by` are the `factors` mean, scale and bias. `other` is added ahead of the ReLU: as it is, or
    normalised by factors of its own.
    """
    P = x.shape[3]
    more = np.empty(0, x.dtype) if other is None else other
    if other_by is None:
        other_by = np.zeros((3, P), x.dtype)
        other_by[1] = 1
    _normalise(flat(x), x.size // P, P, *by, flat(more), other_by, relu, y.reshape(-1))


def normalise_gradient(
    x: Array,
    dy: Array,
    by: Array,
    relu: bool,
    var: Array,
    eps: float,
    w: Array | None,
    dx: Array | None,
) -> tuple[Array, Array]:
    """Write dx, and return dw and db, of batch-norm with the statistics of its own batch.

    `by` is what `normalise` got, and `var` the variance of x.
    """
    C, P = len(var), x.shape[3]
    rows = x.size // P
    sums, products, blocks = _sum_buffers(P, x.dtype)
    arrays = flat(x), flat(dy), rows, P, *by, relu
    _gradient_sums(*arrays, sums, products, blocks)
    db = sums[:, :C].sum(axis=0, dtype=np.float64)
    inverse = 1 / np.sqrt(var + eps)
    dw = products[:, :C].sum(axis=0, dtype=np.float64) * inverse
    if dx is not None:
        scale = inverse if w is None else inverse * w
        terms = -scale * inverse * dw / rows, -scale * db / rows, scale
        _input_gradient(*arrays, *factors(x, *terms), dx.reshape(-1))
    return dw, db


def _sum_buffers(P: int, dtype: Any) -> tuple[Array, Array, Array]:
    sums, squares = np.empty((2, PARTS, P), dtype)
    return sums, squares, np.empty((PARTS, 2, P), dtype)


# ---------------------------------------------------------------- pooling


@kernel(parallel=True)
def _max_pool(x, y, winner, N, H, W, P, OH, OW, KH, KW, SH, SW, top, left):
    L = lane_count(x)
    for row in numba.prange(N * OH):
        n, i = row // OH, row % OH
        for j in range(OW):
            to = (row * OW + j) * P
            h0, w0 = i * SH - top, j * SW - left
            p0, q0 = max(0, -h0), max(0, -w0)
            for c in range(0, P, L):
                best = load(x, ((n * H + h0 + p0) * W + w0 + q0) * P + c)
                who = winner_of(p0 * KW + q0, x)
                for p in range(p0, min(KH, H - h0)):
                    for q in range(q0, min(KW, W - w0)):
                        v = load(x, ((n * H + h0 + p) * W + w0 + q) * P + c)
                        best, who = take_larger(best, who, v, p * KW + q)
                store(y, to + c, best)
                if winner.size:
                    store(winner, to + c, who)


@kernel(parallel=True)
def _max_pool_gradient(dy, winner, dx, N, H, W, P, OH, OW, KH, KW, SH, SW, top, left):
    L = lane_count(dy)
    for n in numba.prange(N):
        dx[n * H * W * P : (n + 1) * H * W * P] = 0
        for i in range(OH):
            for j in range(OW):
                at = ((n * OH + i) * OW + j) * P
                h0, w0 = i * SH - top, j * SW - left
                for c in range(0, P, L):
                    g, who = load(dy, at + c), load_winner(winner, at + c, dy)
                    for p in range(max(0, -h0), min(KH, H - h0)):
                        for q in range(max(0, -w0), min(KW, W - w0)):
                            to = ((n * H + h0 + p) * W + w0 + q) * P + c
                            store(dx, to, add(load(dx, to), where_winner(who, p * KW + q, g)))


@kernel(parallel=True)
def _mean(x, y, N, S, P, count):
    L, size = lane_count(x), broadcast(count, 0)
    for n in numba.prange(N):
        for c in range(0, P, L):
            total = zero(x)
            for r in range(0, S, BLOCK):
                block = zero(x)
                for i in range(r, min(S, r + BLOCK)):
                    block = add(block, load(x, (n * S + i) * P + c))
                total = add(total, block)
            store(y, n * P + c, div(total, size))


@kernel(parallel=True)
def _mean_gradient(dy, dx, N, S, P, count):
    L, size = lane_count(dy), broadcast(count, 0)
    for n in numba.prange(N):
        for c in range(0, P, L):
            g = div(load(dy, n * P + c), size)
            for i in range(S):
                store(dx, (n * S + i) * P + c, g)


def max_pool(x: Array, win: Window, y: Array, winner: Array | None) -> None:
    """Write the maxima to y and, unless None, the number of the tap that won to winner (uint8)."""
    (N, H, W, P), (OH, OW) = x.shape, y.shape[1:3]
    who = np.empty(0, np.uint8) if winner is None else winner.reshape(-1)
    _max_pool(flat(x), y.reshape(-1), who, N, H, W, P, OH, OW, *_sizes(win))


def max_pool_gradient(dy: Array, winner: Array, win: Window, dx: Array) -> None:
    """Write dx: each gradient goes to the tap that won, and overlapping windows add up."""
    (N, H, W, P), (OH, OW) = dx.shape, dy.shape[1:3]
    _max_pool_gradient(flat(dy), flat(winner), dx.reshape(-1), N, H, W, P, OH, OW, *_sizes(win))


def _sizes(win: Window) -> tuple[int, ...]:
    (top, _), (left, _) = win.padding
    return (*win.kernel, *win.stride, top, left)


def mean(x: Array, y: Array) -> None:
    """Write the mean over all pixels to y (N, 1, 1, P)."""
    N, H, W, P = x.shape
    _mean(flat(x), y.reshape(-1), N, H * W, P, np.array([H * W], x.dtype))


def mean_gradient(dy: Array, dx: Array) -> None:
    """Spread dy (N, 1, 1, P) over all pixels of dx."""
    N, H, W, P = dx.shape
    _mean_gradient(flat(dy), dx.reshape(-1), N, H * W, P, np.array([H * W], dx.dtype))


# ---------------------------------------------------------------- the end of a convolution


@kernel()
def finish(packed, shift, pitch, P, n, first, rows, OH, OW, KH, KW, relu, more, y, winner):
    """Write rows of image n, from `first` on, to y: as they are, or through ReLU and max-pool.

    Without a pool they are added to what is there if `more`.

    Pixel p of them is ``packed[shift + p * pitch :][: P]``. They are whole windows of the pool.
    """
    L = lane_count(y)
    if KH * KW == 1:
        to = (n * OH + first) * OW * P
        for p in range(rows * OW):
            for c in range(0, P, L):
                v = load(packed, shift + p * pitch + c)
                if more:
                    v = add(load(y, to + p * P + c), v)
                store(y, to + p * P + c, maximum(zero(y), v) if relu else v)
        return
    PH, PW = OH // KH, OW // KW
    for i in range(rows // KH):
        for j in range(PW):
            at = shift + (i * KH * OW + j * KW) * pitch
            to = ((n * PH + first // KH + i) * PW + j) * P
            for c in range(0, P, L):
                best, who = load(packed, at + c), winner_of(0, y)
                for p in range(KH):
                    for q in range(KW):
                        v = load(packed, at + (p * OW + q) * pitch + c)
                        best, who = take_larger(best, who, v, p * KW + q)
                if relu:
                    best, who = relu_winner(best, who, OFF)
                store(y, to + c, best)
                if winner.size:
                    store(winner, to + c, who)
