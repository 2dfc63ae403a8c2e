# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""im2col and col2im in Numba: copies of row pieces, without a padded map.

im2col shares out the rows of `cols`, col2im the maps of x: a thread writes nothing else.
"""

from __future__ import annotations

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.copy_numba import clear, load_some, store_some
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import add, lane_count, zero
from minicnn.shapes import Window


@kernel()
def _inside(size, places, stride, offset):
    """Return the first place that lies on the map, and the one after the last.

    Place i is at ``i * stride + offset``.
    """
    first = (stride - 1 - offset) // stride if offset < 0 else 0
    end = (size - 1 - offset) // stride + 1 if offset < size else 0
    return min(first, places), min(max(first, end), places)


@kernel(parallel=True)
def _im2col(x, cols, N, C, H, W, OH, OW, KH, KW, SH, SW, DH, DW, top, left):
    for k in numba.prange(C * KH * KW):
        L, none = lane_count(x), zero(x)
        c, dh, dw = k // (KH * KW), k // KW % KH * DH - top, k % KW * DW - left
        j0, j1 = _inside(W, OW, SW, dw)
        for n in range(N):
            for i in range(OH):
                to, h = ((k * N + n) * OH + i) * OW, i * SH + dh
                if h < 0 or h >= H or j0 == j1:
                    clear(cols, to, OW)
                    continue
                for j in range(j0):
                    cols[to + j] = 0
                for j in range(j1, OW):
                    cols[to + j] = 0
                to, at, count = to + j0, ((n * C + c) * H + h) * W + j0 * SW + dw, j1 - j0
                if SW == 1:
                    for j in range(0, count, L):
                        v = load_some(x, at + j, count - j, none)
                        store_some(cols, to + j, count - j, v)
                else:
                    for j in range(count):
                        cols[to + j] = x[at + j * SW]


@kernel(parallel=True)
def _col2im(cols, x, N, C, H, W, OH, OW, KH, KW, SH, SW, DH, DW, top, left):
    for m in numba.prange(N * C):
        n, c, L, none = m // C, m % C, lane_count(x), zero(x)
        clear(x, m * H * W, H * W)
        for k in range(c * KH * KW, (c + 1) * KH * KW):
            dh, dw = k // KW % KH * DH - top, k % KW * DW - left
            i0, i1 = _inside(H, OH, SH, dh)
            j0, j1 = _inside(W, OW, SW, dw)
            if j0 == j1:
                continue
            for i in range(i0, i1):
                at, count = ((k * N + n) * OH + i) * OW + j0, j1 - j0
                to = (m * H + i * SH + dh) * W + j0 * SW + dw
                if SW == 1:
                    for j in range(0, count, L):
                        v = load_some(cols, at + j, count - j, none)
                        v = add(load_some(x, to + j, count - j, none), v)
                        store_some(x, to + j, count - j, v)
                else:
                    for j in range(count):
                        x[to + j * SW] += cols[at + j]


def im2col(x: Array, win: Window) -> Array:
    N, C, H, W = x.shape
    OH, OW = win.output_size("im2col", H, W)
    KH, KW = win.kernel
    cols = np.empty((C * KH * KW, N * OH * OW), x.dtype)
    with buffers(x.dtype):
        _im2col(flat(x), cols.reshape(-1), N, C, H, W, OH, OW, *_numbers(win))
    return cols


def col2im(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    N, C, H, W = x_shape
    OH, OW = win.output_size("col2im", H, W)
    x = np.empty(x_shape, cols.dtype)
    with buffers(cols.dtype):
        _col2im(flat(cols), x.reshape(-1), N, C, H, W, OH, OW, *_numbers(win))
    return x


def _numbers(win: Window) -> tuple[int, ...]:
    (top, _), (left, _) = win.padding
    return (*win.kernel, *win.stride, *win.dilation, top, left)
