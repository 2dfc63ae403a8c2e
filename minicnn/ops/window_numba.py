# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Max and average pooling in Numba, with the places of a map in the lanes.

A map is sorted into a buffer: padded, and its rows and columns taken apart by their remainder
modulo the stride, which makes SH*SW planes with rows of P numbers. Place t = i*P + j of the output
then finds tap k of its window at

    buffer[t + taps[k]]     for tap k = (p, q)

so that L places in a row read L numbers in a row, whatever the tap and the stride. The places
between two rows (j >= OW) are computed and thrown away.

Every thread takes whole maps, so the number of threads changes no bit.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.copy_numba import clear
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import (
    add,
    div,
    halves,
    lane_count,
    lanes,
    load,
    load_part,
    load_winner,
    splat,
    store,
    store_part,
    take_larger,
    zero,
    zip_halves,
)
from minicnn.shapes import Window

TAPS = 256  # at most: the winner of a place is a byte
WORTH = 1 << 14  # numbers of x that are worth a thread


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry."""

    rows: int  # of a map
    columns: int
    row_at: np.ndarray  # (H,) where each row starts in the buffer
    column_at: np.ndarray  # (W,) and its columns from there
    column_step: int  # SW
    size: int  # of the buffer
    out_rows: int
    out_columns: int
    pitch: int  # P
    places: int  # in whole vectors
    kernel_columns: int
    taps: np.ndarray  # (KH*KW,)
    # Where a winner is on the map: its window's first tap, and from there
    corner: int
    row_step: int
    offsets: np.ndarray  # (KH*KW,)
    first: np.ndarray  # (places,) the first tap that is not padding


@lru_cache(maxsize=256)
def _plan(H: int, W: int, win: Window, L: int) -> Plan:
    (KH, KW), (SH, SW), (DH, DW) = win.kernel, win.stride, win.dilation
    (top, _), (left, _) = win.padding
    OH, OW = win.output_size("pool", H, W)
    HP, WP = win.padded(H, W)
    sub_rows, pitch = -(-HP // SH), -(-WP // SW)
    sub_plane = sub_rows * pitch
    h, w = np.arange(H) + top, np.arange(max(W, 2)) + left
    p, q = np.arange(KH) * DH, np.arange(KW) * DW
    taps = np.add.outer(
        p % SH * SW * sub_plane + p // SH * pitch, q % SW * sub_plane + q // SW
    ).ravel()
    places = -(-((OH - 1) * pitch + OW) // L) * L
    first_row = np.maximum(0, -(-(top - np.arange(OH) * SH) // DH))
    first_column = np.maximum(0, -(-(left - np.arange(OW) * SW) // DW))
    first = np.zeros(-(-OH * pitch // L) * L, np.uint8)
    rows = first[: OH * pitch].reshape(OH, pitch)  # (OH, P), a view
    rows[:, :OW] = np.add.outer(first_row * KW, first_column)
    return Plan(
        rows=H,
        columns=W,
        row_at=h % SH * SW * sub_plane + h // SH * pitch,
        column_at=w % SW * sub_plane + w // SW,
        column_step=SW,
        size=max(SH * SW * sub_plane, int(taps.max()) + places),
        out_rows=OH,
        out_columns=OW,
        pitch=pitch,
        places=places,
        kernel_columns=KW,
        taps=taps.astype(np.int32),
        corner=-top * W - left,
        row_step=SH * W,
        offsets=np.add.outer(p * W, q).ravel(),
        first=first,
    )


# ---------------------------------------------------------------- into the buffer and back


@kernel(inline=True)
def _sort(x, at, plan, out):
    """Lay one map out in the buffer; what lies between its pixels stays."""
    L, none, W, columns = lane_count(x), zero(x), plan.columns, plan.column_at
    for h in range(plan.rows):
        i, o = at + h * W, plan.row_at[h]
        if plan.column_step == 1:
            for w in range(0, W, L):
                store_part(out, o + columns[0] + w, W - w, load_part(x, i + w, W - w, none))
        elif plan.column_step == 2:
            for w in range(0, W, 2 * L):
                n = W - w
                even, odd = load_part(x, i + w, n, none), load_part(x, i + w + L, n - L, none)
                even, odd = halves(even, odd)
                store_part(out, o + columns[0] + w // 2, (n + 1) // 2, even)
                store_part(out, o + columns[1] + w // 2, n // 2, odd)
        else:
            for w in range(W):
                out[o + columns[w]] = x[i + w]


@kernel(inline=True)
def _unsort(a, plan, dx, at):
    """Write one map from the buffer: the inverse of `_sort`."""
    L, none, W, columns = lane_count(a), zero(a), plan.columns, plan.column_at
    for h in range(plan.rows):
        o, i = at + h * W, plan.row_at[h]
        if plan.column_step == 1:
            for w in range(0, W, L):
                store_part(dx, o + w, W - w, load_part(a, i + columns[0] + w, W - w, none))
        elif plan.column_step == 2:
            for w in range(0, W, 2 * L):
                n = W - w
                even = load_part(a, i + columns[0] + w // 2, (n + 1) // 2, none)
                odd = load_part(a, i + columns[1] + w // 2, n // 2, none)
                even, odd = zip_halves(even, odd)
                store_part(dx, o + w, n, even)
                store_part(dx, o + w + L, n - L, odd)
        else:
            for w in range(W):
                dx[o + w] = a[i + columns[w]]


@kernel(inline=True)
def _rows_out(a, plan, y, at):
    """Write the places of one map, row by row, without those between the rows."""
    L, none, W = lane_count(a), zero(a), plan.out_columns
    for i in range(plan.out_rows):
        for j in range(0, W, L):
            part = load_part(a, i * plan.pitch + j, W - j, none)
            store_part(y, at + i * W + j, W - j, part)


# ---------------------------------------------------------------- max


@kernel(inline=True)
def _largest(source, plan, best_out, winner_out):
    for t in range(0, plan.places, lane_count(source)):
        # The padding is -inf, which is larger than nothing, and a window of -inf has its first.
        best = splat(source.dtype.type(-np.inf))
        winner = load_winner(plan.first, t, source)
        for k in range(plan.taps.size):
            best, winner = take_larger(best, winner, load(source, t + plan.taps[k]), k)
        store(best_out, t, best)
        store(winner_out, t, winner)


@kernel(inline=True)
def _winners_out(taps, plan, winner, at):
    """Turn winning taps into where they are on the map."""
    W = plan.out_columns
    for i in range(plan.out_rows):
        for j in range(W):
            corner = plan.corner + i * plan.row_step + j * plan.column_step
            winner[at + i * W + j] = corner + plan.offsets[taps[i * plan.pitch + j]]


@kernel(parallel=True)
def _max_pool(x, y, winner, M, plan, sources, bests, taps):
    threads = len(sources)
    for t in numba.prange(threads):
        source, best, tap = sources[t], bests[t], taps[t]
        for i in range(source.size):
            source[i] = -np.inf
        size = plan.out_rows * plan.out_columns
        for m in range(t * M // threads, (t + 1) * M // threads):
            _sort(x, m * plan.rows * plan.columns, plan, source)
            _largest(source, plan, best, tap)
            _rows_out(best, plan, y, m * size)
            _winners_out(tap, plan, winner, m * size)


@kernel(parallel=True)
def _max_pool_gradient(dy, winner, dx, M, S, places, threads):
    for t in numba.prange(threads):
        for m in range(t * M // threads, (t + 1) * M // threads):
            clear(dx, m * S, S)
            for i in range(m * places, (m + 1) * places):
                dx[m * S + winner[i]] += dy[i]


def max_pool_forward(x: Array, win: Window) -> tuple[Array, Array]:
    """Return the maxima and where each lies in its map, for at most TAPS taps."""
    N, C, H, W = x.shape
    plan = _plan(H, W, win, lanes(x.dtype))
    y = np.empty((N, C, plan.out_rows, plan.out_columns), x.dtype)
    winner = np.empty(y.shape, np.int64)
    threads = _threads(x.size)
    sizes = threads * plan.size, threads * plan.places, threads * plan.places
    with buffers(x.dtype, *sizes) as (sources, bests, taps):
        _max_pool(
            flat(x),
            y.reshape(-1),
            winner.reshape(-1),
            N * C,
            plan,
            sources.reshape(threads, -1),
            bests.reshape(threads, -1),
            taps.view(np.uint8).reshape(threads, -1),
        )
    return y, winner


def max_pool_backward(dy: Array, winner: Array, x_shape: tuple[int, ...]) -> Array:
    """Add every dy to its winner."""
    N, C, H, W = x_shape
    dx = np.empty(x_shape, dy.dtype)
    with buffers(dy.dtype):
        sizes = N * C, H * W, dy.shape[2] * dy.shape[3], _threads(dx.size)
        _max_pool_gradient(flat(dy), flat(winner), dx.reshape(-1), *sizes)
    return dx


# ---------------------------------------------------------------- average


@kernel(inline=True)
def _sum(source, plan, divisor, out):
    KW = plan.kernel_columns
    for t in range(0, plan.places, lane_count(source)):
        total = zero(source)
        for p in range(0, plan.taps.size, KW):
            row = zero(source)  # sums of sums: they round less
            for k in range(p, p + KW):
                row = add(row, load(source, t + plan.taps[k]))
            total = add(total, row)
        store(out, t, div(total, load(divisor, t)))


@kernel(inline=True)
def _shares_in(dy, at, plan, divisor, out):
    """Lay dy over the divisor out as places; those between the rows stay."""
    L, W = lane_count(dy), plan.out_columns
    for i in range(plan.out_rows):
        for j in range(0, W, L):
            o = i * plan.pitch + j
            n = W - j
            one = splat(dy.dtype.type(1))
            share = div(load_part(dy, at + i * W + j, n, one), load_part(divisor, o, n, one))
            store_part(out, o, n, share)


@kernel(inline=True)
def _spread(shares, plan, out):
    """Add every share to the pixels under its window."""
    clear(out, 0, plan.size)
    for k in range(plan.taps.size):
        for t in range(0, plan.places, lane_count(out)):
            at = t + plan.taps[k]
            store(out, at, add(load(out, at), load(shares, t)))


@kernel(parallel=True)
def _average(x, y, M, plan, divisor, sources, outs):
    threads = len(sources)
    for t in numba.prange(threads):
        source, out = sources[t], outs[t]
        clear(source, 0, source.size)
        for m in range(t * M // threads, (t + 1) * M // threads):
            _sort(x, m * plan.rows * plan.columns, plan, source)
            _sum(source, plan, divisor, out)
            _rows_out(out, plan, y, m * plan.out_rows * plan.out_columns)


@kernel(parallel=True)
def _average_gradient(dy, dx, M, plan, divisor, sources, outs):
    threads = len(sources)
    for t in numba.prange(threads):
        shares, out = sources[t], outs[t]
        clear(shares, 0, shares.size)
        for m in range(t * M // threads, (t + 1) * M // threads):
            _shares_in(dy, m * plan.out_rows * plan.out_columns, plan, divisor, shares)
            _spread(shares, plan, out)
            _unsort(out, plan, dx, m * plan.rows * plan.columns)


def avg_pool_forward(x: Array, divisor: Array, win: Window) -> Array:
    """Return the sums of all windows over ``divisor`` (OH, OW)."""
    N, C, H, W = x.shape
    plan = _plan(H, W, win, lanes(x.dtype))
    y = np.empty((N, C, *divisor.shape), x.dtype)
    threads = _threads(x.size)
    sizes = threads * plan.size, threads * plan.places
    with buffers(x.dtype, *sizes) as (sources, outs):
        _average(
            flat(x),
            y.reshape(-1),
            N * C,
            plan,
            _of_places(divisor, plan),
            sources.reshape(threads, -1),
            outs.reshape(threads, -1),
        )
    return y


def avg_pool_backward(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Return the adjoint of `avg_pool_forward`."""
    N, C, H, W = x_shape
    plan = _plan(H, W, win, lanes(dy.dtype))
    dx = np.empty(x_shape, dy.dtype)
    threads = _threads(dx.size)
    sizes = threads * plan.places, threads * plan.size
    with buffers(dy.dtype, *sizes) as (shares, outs):
        _average_gradient(
            flat(dy),
            dx.reshape(-1),
            N * C,
            plan,
            _of_places(divisor, plan),
            shares.reshape(threads, -1),
            outs.reshape(threads, -1),
        )
    return dx


def _of_places(divisor: Array, plan: Plan) -> Array:
    """Spread the divisors (OH, OW) over the places, with ones between the rows."""
    out = np.ones(max(plan.places, plan.out_rows * plan.pitch), divisor.dtype)
    rows = out[: plan.out_rows * plan.pitch].reshape(plan.out_rows, plan.pitch)
    rows[:, : plan.out_columns] = divisor
    return flat(out)


def _threads(numbers: int) -> int:
    return max(1, min(numba.get_num_threads(), numbers // WORTH))
