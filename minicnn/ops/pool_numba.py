# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Pooling in Numba, with maps in the lanes of a vector.

A place of the output looks at a rectangle of its map, rows ``rows[i]`` and columns ``columns[j]``
(first, end): a window without what lies in the padding, or a bin. L maps are transposed into a
buffer of pixels, L numbers each. Then a window of any size and stride is a loop over whole vectors,
and the results are transposed back. Backward, a pixel looks at the rectangle of the places that
have looked at it, so that average pooling is the same loop both ways.

Work is shared out by groups of L maps and bands of rows, whose buffers stay in the cache. Who takes
which changes no bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.adaptive_avg_pool2d import _bins
from minicnn.ops.copy_numba import clear
from minicnn.ops.jit import Call, buffers, flat, kernel
from minicnn.ops.vector import (
    BLOCK,
    add,
    constant,
    div,
    lane_count,
    lane_multiples,
    lanes,
    load,
    load_rows,
    splat,
    store,
    store_rows,
    take_larger,
    transpose,
    widen,
    zero,
)
from minicnn.shapes import Pair, Window

WORTH = 1 << 14  # numbers of x that are worth a thread
PIXELS = 1 << 11  # that the buffers of a band hold, unless a row of it needs more

Ranges = Sequence[tuple[int, int]]  # (first, end) for every row, or column


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry."""

    rows: np.ndarray  # (OH, 2): the first one and how many
    columns: np.ndarray  # (OW, 2)
    row_step: int  # from one to the next
    column_step: int
    size: int  # of a map that is read
    width: int
    out_size: int  # of one that is written
    bands: np.ndarray  # (B, 4): the band's first row and its end, and those of what it reads
    read: int  # pixels in the buffers, at most
    written: int


def _plan(rows: Ranges, columns: Ranges, height: int, width: int, steps: Pair = (1, 1)) -> Plan:
    OW = len(columns)
    bands: list[tuple[int, int, int, int]] = []
    start, low, high = 0, height, 0
    for i, (first, end) in enumerate(rows):
        lower, higher = (min(low, first), max(high, end)) if first < end else (low, high)
        if i > start and max(0, higher - lower) * width + (i + 1 - start) * OW > PIXELS:
            bands.append((start, i, min(low, high), high))
            start, lower, higher = i, first, max(first, end)
        low, high = lower, higher
    bands.append((start, len(rows), min(low, high), high))
    return Plan(
        rows=np.array([(a, -((a - end) // steps[0])) for a, end in rows], np.int64),
        columns=np.array([(a, -((a - end) // steps[1])) for a, end in columns], np.int64),
        row_step=steps[0],
        column_step=steps[1],
        size=height * width,
        width=width,
        out_size=len(rows) * OW,
        bands=np.array(bands),
        read=max(high - low for _, _, low, high in bands) * width,
        written=max(end - start for start, end, _, _ in bands) * OW,
    )


def _back(rows: Ranges, columns: Ranges, size: Pair) -> Plan:
    """Turn round who looks at whom; `size` is that of the maps that have been read."""

    def turned(ranges: Ranges, n: int) -> list[tuple[int, int]]:
        first, end = np.array(ranges).T  # neither falls
        places = np.arange(n)
        looked = np.searchsorted(end, places, "right"), np.searchsorted(first, places, "right")
        return list(zip(*(a.tolist() for a in looked)))

    turned_rows, turned_columns = turned(rows, size[0]), turned(columns, size[1])
    return _plan(turned_rows, turned_columns, len(rows), len(columns))


@lru_cache(maxsize=256)
def _of_windows(H: int, W: int, win: Window, back: bool = False) -> Plan:
    ranges = []
    for size, places, s, d, extent, (before, _) in zip(
        (H, W), win.output_size("pool", H, W), win.stride, win.dilation, win.extent, win.padding
    ):
        starts = [i * s - before for i in range(places)]
        firsts = [start if start >= 0 else start % d for start in starts]  # of the taps on the map
        ranges.append([(a, min(size, start + extent)) for a, start in zip(firsts, starts)])
    rows, columns = ranges
    return _back(rows, columns, (H, W)) if back else _plan(rows, columns, H, W, win.dilation)


@lru_cache(maxsize=256)
def _of_bins(size: Pair, places: Pair, dtype: Any, back: bool = False) -> tuple[Plan, Array]:
    """Return the plan of adaptive pooling and the divisors (OH * OW)."""
    rows, columns = ([(b.start, b.stop) for b in _bins(*n)] for n in zip(size, places))
    plan = _back(rows, columns, size) if back else _plan(rows, columns, *size)
    counts = (np.array([end - first for first, end in r]) for r in (rows, columns))
    return plan, flat(np.multiply.outer(*counts).astype(dtype))


# ---------------------------------------------------------------- into the lanes and back


# The last vectors of a map overlap with the ones before, which changes nothing.


@kernel()
def _into_lanes(a, at, step, maps, n, out):
    """``out[t * L + m] = a[at + m * step + t]`` for t < n and m < maps."""
    L = lane_count(a)
    if n < L:
        for m in range(maps):
            for t in range(n):
                out[t * L + m] = a[at + m * step + t]
    else:
        rows, to = lane_multiples(maps, step, 0, a), lane_multiples(L, L, 0, a)
        for k in range(0, n, L):
            t = min(k, n - L)
            store_rows(out, t * L, to, transpose(load_rows(a, at + t, rows)))


@kernel()
def _out_of_lanes(a, n, out, at, step, maps):
    """``out[at + m * step + t] = a[t * L + m]`` for t < n and m < maps."""
    L = lane_count(a)
    if n < L:
        for m in range(maps):
            for t in range(n):
                out[at + m * step + t] = a[t * L + m]
    else:
        rows, to = lane_multiples(L, L, 0, a), lane_multiples(maps, step, -1, a)
        for k in range(0, n, L):
            t = min(k, n - L)
            vs = transpose(load_rows(a, t * L, rows))
            store_rows(out, at + t, to, widen(vs, out))


# ---------------------------------------------------------------- max


@kernel()
def _largest(source, plan, band, best_out, where_out):
    """Write the maxima of a band and where on the map the first of equal ones is."""
    L, o, W = lane_count(source), 0, plan.width
    for i in range(band[0], band[1]):
        h, rows = plan.rows[i, 0], plan.rows[i, 1]
        for j in range(len(plan.columns)):
            w, columns = plan.columns[j, 0], plan.columns[j, 1]
            best = splat(source.dtype.type(-np.inf))
            where = splat(where_out.dtype.type(h * W + w))
            for p in range(rows):
                at = (h + p * plan.row_step) * W + w
                for _ in range(columns):
                    v = load(source, (at - band[2] * W) * L)
                    best, where = take_larger(best, where, v, at)
                    at += plan.column_step
            store(best_out, o, best)
            store(where_out, o, where)
            o += L


@kernel(parallel=True)
def _max_pool(x, y, winner, M, plan, sources, bests, wheres):
    threads, L = len(sources), lane_count(x)
    items = (M + L - 1) // L * len(plan.bands)
    for t in numba.prange(threads):
        source, best, where = sources[t], bests[t], wheres[t]
        for k in range(t * items // threads, (t + 1) * items // threads):
            m, band = k // len(plan.bands) * L, plan.bands[k % len(plan.bands)]
            maps = min(L, M - m)
            n, at = (band[3] - band[2]) * plan.width, m * plan.size + band[2] * plan.width
            _into_lanes(x, at, plan.size, maps, n, source)
            _largest(source, plan, band, best, where)
            OW = len(plan.columns)
            n, at = (band[1] - band[0]) * OW, m * plan.out_size + band[0] * OW
            _out_of_lanes(best, n, y, at, plan.out_size, maps)
            _out_of_lanes(where, n, winner, at, plan.out_size, maps)


@kernel(parallel=True)
def _max_pool_gradient(dy, winner, dx, M, S, places, threads):
    for t in numba.prange(threads):
        for m in range(t * M // threads, (t + 1) * M // threads):
            clear(dx, m * S, S)
            for i in range(m * places, (m + 1) * places):
                dx[m * S + winner[i]] += dy[i]


def max_forward(x: Array, win: Window) -> tuple[Array, Array]:
    """Return the maxima and where each lies in its map."""
    N, C, H, W = x.shape
    plan = _of_windows(H, W, win)
    y = np.empty((N, C, len(plan.rows), len(plan.columns)), x.dtype)
    winner = np.empty(y.shape, np.int64)
    L, threads = lanes(x.dtype), _threads(x.size)
    read, written = plan.read * L, plan.written * L
    Call(
        _max_pool,
        (flat(x), y.reshape(-1), winner.reshape(-1), N * C, plan),
        x.dtype,
        [(threads, read), (threads, written), (threads, written, f"i{x.itemsize}")],
    )()
    return y, winner


def max_backward(dy: Array, winner: Array, x_shape: tuple[int, ...]) -> Array:
    """Add every dy to its winner."""
    N, C, H, W = x_shape
    dx = np.empty(x_shape, dy.dtype)
    with buffers(dy.dtype):
        sizes = N * C, H * W, dy.shape[2] * dy.shape[3], _threads(dx.size)
        _max_pool_gradient(flat(dy), flat(winner), dx.reshape(-1), *sizes)
    return dx


# ---------------------------------------------------------------- average


@kernel(inline=True)
def _block(source, at, rows, columns, step):
    """Return the sum of a rectangle, row by row: sums of sums round less."""
    L, block = lane_count(source), zero(source)
    for _ in range(rows):
        row = zero(source)
        for q in range(columns):
            row = add(row, load(source, at + q * L))
        block = add(block, row)
        at += step
    return block


@kernel()
def _sums(source, plan, band, out):
    """Write the sums of a band."""
    L, o, step = lane_count(source), 0, plan.width * lane_count(source)
    for i in range(band[0], band[1]):
        h, rows = plan.rows[i, 0] - band[2], plan.rows[i, 1]
        for j in range(len(plan.columns)):
            w, columns = plan.columns[j, 0], plan.columns[j, 1]
            at = h * step + w * L
            if rows == 1 and columns == 1:
                total = load(source, at)
            else:
                total = _block(source, at, min(rows, BLOCK), columns, step)
                for p in range(BLOCK, rows, BLOCK):
                    block = _block(source, at + p * step, min(rows - p, BLOCK), columns, step)
                    total = add(total, block)
            store(out, o, total)
            o += L


@kernel()
def _divide(a, n, divisor, at):
    L = lane_count(a)
    for i in range(n):
        store(a, i * L, div(load(a, i * L), constant(divisor[at + i], zero(a))))


@kernel(parallel=True)
def _average(x, y, M, plan, divisor, before, sources, outs):
    """Write sums of rectangles of x over the divisor, or of x over it (`before`)."""
    threads, L = len(sources), lane_count(x)
    items = (M + L - 1) // L * len(plan.bands)
    for t in numba.prange(threads):
        source, out = sources[t], outs[t]
        for k in range(t * items // threads, (t + 1) * items // threads):
            m, band = k // len(plan.bands) * L, plan.bands[k % len(plan.bands)]
            maps, W, OW = min(L, M - m), plan.width, len(plan.columns)
            n, written = (band[3] - band[2]) * W, (band[1] - band[0]) * OW
            _into_lanes(x, m * plan.size + band[2] * W, plan.size, maps, n, source)
            if before:
                _divide(source, n, divisor, band[2] * W)
            _sums(source, plan, band, out)
            if not before:
                _divide(out, written, divisor, band[0] * OW)
            at = m * plan.out_size + band[0] * OW
            _out_of_lanes(out, written, y, at, plan.out_size, maps)


def average_forward(x: Array, divisor: Array, win: Window) -> Array:
    """Return the sums of all windows over ``divisor`` (OH, OW)."""
    H, W = x.shape[2:]
    return _run(x, _of_windows(H, W, win), flat(divisor), before=False)


def average_backward(dy: Array, divisor: Array, size: Pair, win: Window) -> Array:
    """Return the adjoint of `average_forward` for maps of `size`."""
    return _run(dy, _of_windows(*size, win, back=True), flat(divisor), before=True)


def adaptive_forward(x: Array, output_size: Pair) -> Array:
    """Return the means of the bins."""
    H, W = x.shape[2:]
    return _run(x, *_of_bins((H, W), output_size, x.dtype), before=False)


def adaptive_backward(dy: Array, size: Pair) -> Array:
    """Return the adjoint of `adaptive_forward` for maps of `size`."""
    OH, OW = dy.shape[2:]
    return _run(dy, *_of_bins(size, (OH, OW), dy.dtype, back=True), before=True)


def _run(x: Array, plan: Plan, divisor: Array, before: bool) -> Array:
    N, C = x.shape[:2]
    y = np.empty((N, C, len(plan.rows), len(plan.columns)), x.dtype)
    threads = _threads(max(x.size, y.size))
    Call(
        _average,
        (flat(x), y.reshape(-1), N * C, plan, divisor, before),
        x.dtype,
        [(threads, n * lanes(x.dtype)) for n in (plan.read, plan.written)],
    )()
    return y


def _threads(numbers: int) -> int:
    return max(1, min(numba.get_num_threads(), numbers // WORTH))
