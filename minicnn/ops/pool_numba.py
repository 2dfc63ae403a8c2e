# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Pooling in Numba: each thread takes whole maps, and writes nothing outside them.

Maps are (M, H, W) with M = N*C. Average and adaptive pooling are one pair of kernels: row i of y
is a mean over the rows ``rows[i, 0]`` to ``rows[i, 1]`` of x, and columns alike.
"""

from __future__ import annotations

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.shapes import Pair, Window


@kernel(parallel=True)
def _max_pool(x, y, winner, M, H, W, OH, OW, KH, KW, SH, SW, DH, DW, top, left):
    for m in numba.prange(M):
        map_ = x[m * H * W : (m + 1) * H * W]
        for i in range(OH):
            h0 = i * SH - top
            p0 = (-h0 + DH - 1) // DH if h0 < 0 else 0  # the first tap on the map
            for j in range(OW):
                w0 = j * SW - left
                q0 = (-w0 + DW - 1) // DW if w0 < 0 else 0
                at = (h0 + p0 * DH) * W + w0 + q0 * DW
                best = map_[at]
                for p in range(p0, KH):
                    h = h0 + p * DH
                    if h >= H:
                        break
                    for q in range(q0, KW):
                        w = w0 + q * DW
                        if w >= W:
                            break
                        v = map_[h * W + w]
                        if v > best or (v != v and best == best):
                            best, at = v, h * W + w
                to = (m * OH + i) * OW + j
                y[to] = best
                winner[to] = at


@kernel(parallel=True)
def _max_pool_gradient(dy, winner, dx, M, S, places):
    for m in numba.prange(M):
        map_ = dx[m * S : (m + 1) * S]
        map_[:] = 0
        for i in range(m * places, (m + 1) * places):
            map_[winner[i]] += dy[i]


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


def max_pool_forward(x: Array, win: Window) -> tuple[Array, Array]:
    N, C, H, W = x.shape
    (top, _), (left, _) = win.padding
    OH, OW = win.output_size("max_pool2d", H, W)
    y = np.empty((N, C, OH, OW), x.dtype)
    winner = np.empty(y.shape, np.int64)
    sizes = (N * C, H, W, OH, OW, *win.kernel, *win.stride, *win.dilation, top, left)
    with buffers(x.dtype):
        _max_pool(flat(x), y.reshape(-1), winner.reshape(-1), *sizes)
    return y, winner


def max_pool_backward(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    N, C, H, W = x_shape
    dx = np.empty(x_shape, dy.dtype)
    with buffers(dy.dtype):
        places = dy.shape[2] * dy.shape[3]
        _max_pool_gradient(flat(dy), flat(winner), dx.reshape(-1), N * C, H * W, places)
    return dx


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


def spans(size: int, places: int, kernel: int, stride: int, before: int) -> Array:
    """Return from where to where each place of a window lies on the map: (places, 2)."""
    start = np.arange(places) * stride - before
    return np.stack([start.clip(0, size), (start + kernel).clip(0, size)], axis=1)
