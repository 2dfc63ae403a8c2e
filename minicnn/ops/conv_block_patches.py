# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""dw of a convolution behind a max-pool, for images as they come: (N, C, H, W) with few channels.

As in `conv_block_lists`, only the winners count: dw[f] is the sum of g(q, f) times the patch at
the pixel that won window q. Few channels would leave most lanes of a channels-last map empty, so
here the patches themselves are written down (im2col), column by column: tap (c, p, q) in lane
(q*C + c)*KH + p. What a row of pixels reads, written in that order once, then holds every patch of
the row in one piece. A patch is short, and one filter alone would wait for each sum before it adds
the next; R filters at a time keep the machine busy, window by window. For that, every filter has
an entry for every window, with a gradient of zero where the ReLU was off.

The batch is cut into parts whose sums are added in order: the parts depend on the shapes alone,
so any number of threads gives the same bits.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import number_of_parts, round_up
from minicnn.ops.conv_block import OFF
from minicnn.ops.copy_numba import clear, copy, spread
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.packed import pack, unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    VECTOR_BYTES,
    add,
    lane_count,
    lanes,
    lists_tile,
    load,
    load_winner,
    multiples,
    place_winners,
    store,
    tile_add,
    tile_load,
    tile_store,
    unless_winner,
    zero,
)
from minicnn.shapes import Window

REGISTERS = 12 if VECTOR_BYTES == 32 else 16  # vectors of a tile
BAND_BYTES = 20 << 10  # patches of a band of windows: they stay in the L1 cache


class Plan(NamedTuple):
    """Sizes of one geometry. A band is some rows of windows of one image."""

    channels: int
    rows: int  # of x
    columns: int
    kernel_rows: int
    kernel_columns: int
    row_stride: int
    column_stride: int
    row_dilation: int
    column_dilation: int
    top: int
    left: int
    padded: bool
    strip_columns: int  # columns of x, with padding
    pool_rows: int
    pool_columns: int
    window_rows: int
    window_columns: int
    band: int  # rows of windows
    patch: int  # numbers of a patch, rounded up
    weights: int  # and those that count
    slots: int  # numbers of a pixel of dy: filters, rounded up
    filters: int


_unpack = unpacker(Plan, {})


@lru_cache(maxsize=256)
def _plan(
    C: int, H: int, W: int, F: int, win: Window, pool: tuple[int, int], L: int
) -> tuple[Plan, np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """Return the plan, the plan as kernels get it, and tuples of R and V zeros: their lengths
    choose the kernels."""
    OH, OW = win.output_size("conv_block", H, W)
    PH, PW = OH // pool[0], OW // pool[1]
    weights = C * win.kernel[0] * win.kernel[1]
    vectors = -(-weights // L)
    V = 1 if vectors % 2 else 2  # few sizes, as each is compiled
    R = min(L, 8 if V * 8 <= REGISTERS else 4)
    patch = vectors * L
    row = pool[0] * PW * pool[1] * patch * (VECTOR_BYTES // L)
    band = max(1, min(PH, BAND_BYTES // max(1, row)))
    plan = Plan(
        channels=C,
        rows=H,
        columns=W,
        kernel_rows=win.kernel[0],
        kernel_columns=win.kernel[1],
        row_stride=win.stride[0],
        column_stride=win.stride[1],
        row_dilation=win.dilation[0],
        column_dilation=win.dilation[1],
        top=win.padding[0][0],
        left=win.padding[1][0],
        padded=win.padded(H, W) != (H, W),
        strip_columns=win.padded(H, W)[1],
        pool_rows=pool[0],
        pool_columns=pool[1],
        window_rows=PH,
        window_columns=PW,
        band=band,
        patch=patch,
        weights=weights,
        slots=round_up(F, L),
        filters=F,
    )
    return plan, pack(plan), (0,) * R, (0,) * V


@kernel()
def _write_strips(x, n, first, count, plan, out):
    """Write what each of `count` rows of pixels reads, from row `first` of an image on.

    A strip holds the taps (c, p) of every column side by side, and zeros for padding.
    """
    taps = plan.channels * plan.kernel_rows
    length = plan.strip_columns * taps
    for i in range(count):
        if plan.padded:
            clear(out, i * length, length)
        top = (first + i) * plan.row_stride - plan.top
        for c in range(plan.channels):
            for p in range(plan.kernel_rows):
                row = top + p * plan.row_dilation
                if 0 <= row < plan.rows:
                    start = ((n * plan.channels + c) * plan.rows + row) * plan.columns
                    to = i * length + plan.left * taps + c * plan.kernel_rows + p
                    spread(x, start, plan.columns, out, to, taps)


@kernel()
def _write_patches(strips, count, plan, out):
    """Write the patches of `count` rows of pixels side by side, each as whole vectors.

    What stands behind a patch's own numbers does not matter.
    """
    L = lane_count(strips)
    taps = plan.channels * plan.kernel_rows
    pixels = plan.window_columns * plan.pool_columns
    for i in range(count):
        for j in range(pixels):
            at = (i * plan.strip_columns + j * plan.column_stride) * taps
            to = (i * pixels + j) * plan.patch
            if plan.column_dilation == 1:
                for v in range(0, plan.patch, L):
                    store(out, to + v, load(strips, at + v))
            else:
                for q in range(plan.kernel_columns):
                    start = at + q * plan.column_dilation * taps
                    copy(strips, start, taps, out, to + q * taps)


@kernel()
def _list_windows(dy, winner, n, first, end, plan, at_of, g):
    """For every window and filter: where the winner's patch is, and its gradient."""
    L, patch, columns = lane_count(dy), plan.patch, plan.pool_columns
    row = plan.window_columns * columns * patch  # from a row of pixels to the next
    skip = row - columns * patch
    z = 0
    for i in range(first, end):
        for j in range(plan.window_columns):
            base = (i - first) * plan.pool_rows * row + j * columns * patch
            e = ((n * plan.window_rows + i) * plan.window_columns + j) * plan.slots
            for f in range(0, plan.slots, L):
                who = load_winner(winner, e + f, dy)
                store(at_of, z + f, place_winners(who, OFF, base, columns, patch, skip))
                store(g, z + f, unless_winner(who, OFF, load(dy, e + f)))
            z += plan.slots


@kernel()
def _add_band(at_of, g, windows, patches, plan, R, V, sums, bias, db):
    """Add what some windows give to the sums of all filters, and to db."""
    L = lane_count(patches)
    unit = len(V) * L
    for f in range(0, plan.slots, len(R)):
        places = multiples(f, plan.slots - 1, plan.patch, R)
        for v in range(0, plan.patch, unit):
            for q in range(0, windows, BLOCK):
                n, at = min(BLOCK, windows - q), q * plan.slots + f
                block = lists_tile(g, at, n, plan.slots, at_of, patches, v, R, V)
                tile_store(tile_add(tile_load(block, sums, v, places), block), sums, v, places)
    for f in range(0, plan.slots, L):
        total = zero(g)
        for q in range(windows):
            total = add(total, load(g, q * plan.slots + f))
        store(bias, f, total)
    for f in range(plan.slots):
        db[f] += bias[f]


@kernel()
def add_parts(dws, dbs, filters, accumulate, db):
    """Add the sums of all parts to those of the first, in order, and write db or add to it."""
    sums, parts = dws[0], len(dws)
    for part in range(1, parts):
        more = dws[part]
        for i in range(0, sums.size, lane_count(sums)):
            store(sums, i, add(load(sums, i), load(more, i)))
    for f in range(filters):
        total = 0.0
        for part in range(parts):
            total += dbs[part, f]
        db[f] = db[f] + total if accumulate else total


@kernel(parallel=True)
def _weight_gradient(
    x, dy, winner, dw, db, N, accumulate, table, R, V, taken,
    strips, patches, at_of, g, bias, dws, dbs,
):  # fmt: skip
    taken[0] = 0
    for t in numba.prange(len(strips)):
        plan, parts = _unpack(table), len(dws)
        strips_, patches_, at, g_, bias_ = strips[t], patches[t], at_of[t], g[t], bias[t]
        part = take(taken, 0)
        while part < parts:
            dw_, db_ = dws[part], dbs[part]
            clear(dw_, 0, dw_.size)
            clear(db_, 0, db_.size)
            for n in range(part * N // parts, (part + 1) * N // parts):
                for first in range(0, plan.window_rows, plan.band):
                    end = min(plan.window_rows, first + plan.band)
                    rows = (end - first) * plan.pool_rows
                    _write_strips(x, n, first * plan.pool_rows, rows, plan, strips_)
                    _write_patches(strips_, rows, plan, patches_)
                    _list_windows(dy, winner, n, first, end, plan, at, g_)
                    windows = (end - first) * plan.window_columns
                    _add_band(at, g_, windows, patches_, plan, R, V, dw_, bias_, db_)
            part = take(taken, 0)
    plan = _unpack(table)
    add_parts(dws, dbs, plan.filters, accumulate, db)
    sums = dws[0]
    for f in range(plan.filters):
        for i in range(plan.weights):
            tap, q = i // plan.kernel_columns, i % plan.kernel_columns
            total = sums[f * plan.patch + q * (plan.channels * plan.kernel_rows) + tap]
            e = f * plan.weights + i
            dw[e] = dw[e] + total if accumulate else total


def weight_gradient(
    x: Array,
    dy: Array,
    winner: Array,
    dw: Array,
    db: Array,
    win: Window,
    pool: tuple[int, int],
    accumulate: bool,
) -> Call:
    """Return what writes the gradients of w and b, or adds them. x is (N, C, H, W), dy and winner
    of the pooled map (N, PH, PW, slots)."""
    N, C, H, W = x.shape
    L = lanes(x.dtype)
    plan, table, R, V = _plan(C, H, W, len(dw), win, pool, L)
    threads = numba.get_num_threads()
    parts = number_of_parts(max(1, N), plan.slots * plan.patch * x.itemsize)
    windows = plan.band * plan.window_columns
    rows = plan.band * plan.pool_rows
    pixels = windows * plan.pool_rows * plan.pool_columns
    entries = windows * plan.slots
    return Call(
        _weight_gradient,
        (
            flat(x),
            flat(dy),
            flat(winner),
            dw.reshape(-1),
            db,
            N,
            accumulate,
            table,
            R,
            V,
            np.zeros(1, np.int64),
        ),
        x.dtype,
        (
            (threads, rows * plan.strip_columns * C * plan.kernel_rows + plan.patch),
            (threads, pixels * plan.patch),
            (threads, entries, np.int32),
            (threads, entries),
            (threads, plan.slots),
            (parts, plan.slots * plan.patch),
            (parts, plan.slots, np.float64),
        ),
    )
