# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""dw of a convolution behind a small max-pool, for images (N, C, H, W), with filters in the lanes.

As in `conv_block_lists`, only the winners count: dw[f] is the sum of g(q, f) times the patch at
the pixel that won window q. Here a vector holds L filters, whose winners in a window are different
pixels, but few: all that the taps of one row of the kernel can meet from there is

    pool rows x reach of the window's columns,    2 x 6 numbers for a 5x5 kernel behind a 2x2 pool,

which fit one vector, a table. From it each lane picks its number in one instruction, so a product
costs that and a multiply-add, and the R x S sums of a tile (S taps in a row) stay in registers
while the windows run by. `conv_block_patches` does what does not fit: see `fits`.

Tables are written once for each row of pixels and column of windows, in an order in which windows
side by side, and window rows too, have their tables side by side: a tile walks straight through.

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
from minicnn.ops.conv_block_patches import add_parts
from minicnn.ops.copy_numba import clear, copy
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.packed import pack, unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    VECTOR_BYTES,
    add,
    lane_count,
    lanes,
    load,
    load_winner,
    multiples,
    offsets,
    pick_tile,
    place_winners,
    store,
    tile_add,
    tile_load,
    tile_store,
    unless_winner,
    zero,
)
from minicnn.shapes import Window

SUMS = 10 if VECTOR_BYTES == 32 else 25  # of a tile at most, with 16 and with 32 registers
BAND_BYTES = 24 << 10  # tables of a band of windows: they stay in the L1 cache


class Plan(NamedTuple):
    """Sizes of one geometry. A band is some rows of windows of one image."""

    channels: int
    rows: int  # of x
    columns: int
    top: int  # rows of padding
    left: int
    buffer_columns: int  # of a row of x with padding
    buffer_rows: int  # that a band needs at most
    row_stride: int
    column_dilation: int
    kernel_rows: int
    kernel_reach: int  # rows from a kernel's first to its last
    pool_rows: int
    pool_columns: int
    window_rows: int
    window_columns: int
    window_row_step: int  # rows of x from one row of windows to the next
    window_column_step: int
    pick_step: int  # lanes of a table from a pixel of a window to the next in the row, ...
    pick_row: int  # ... and to the next row
    band: int  # rows of windows
    residue: int  # tables for rows of x that are equal modulo window_row_step
    tiles: int
    slots: int  # numbers of a pixel of dy: filters, rounded up
    filters: int
    row_at: np.ndarray  # (kernel rows,) where the tables of each begin


_unpack = unpacker(Plan, {"int32 1": "row_at"})


def fits(win: Window, pool: tuple[int, int], L: int) -> bool:
    """Tell whether what a row of the kernel can meet in a window fits one vector."""
    return pool[0] <= 2 and _reach(win, pool) <= L // pool[0]


def _reach(win: Window, pool: tuple[int, int]) -> int:
    return (win.kernel[1] - 1) * win.dilation[1] + (pool[1] - 1) * win.stride[1] + 1


@lru_cache(maxsize=256)
def _plan(
    C: int, H: int, W: int, F: int, win: Window, pool: tuple[int, int], L: int
) -> tuple[Plan, np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """Return the plan, the plan as kernels get it, and tuples of R and of S zeros: their lengths
    choose the kernels."""
    (KH, KW), (SH, SW) = win.kernel, win.stride
    OH, OW = win.output_size("conv_block", H, W)
    PH, PW = OH // pool[0], OW // pool[1]
    tiles = -(-KH // max(1, SUMS // KW))
    R = -(-KH // tiles)
    step, reach = pool[0] * SH, (KH - 1) * win.dilation[0]
    more = reach // step  # rows of tables beyond the windows' own
    row = step * PW * L
    band = max(1, min(PH, BAND_BYTES * L // VECTOR_BYTES // max(1, C * row) - more))
    row_at, at = np.divmod(np.arange(KH) * win.dilation[0], step)
    residue = (band + more) * PW * L + L  # what is written beyond the last is not another's
    plan = Plan(
        channels=C,
        rows=H,
        columns=W,
        top=win.padding[0][0],
        left=win.padding[1][0],
        buffer_columns=win.padded(H, W)[1],
        buffer_rows=(band - 1) * step + reach + (pool[0] - 1) * SH + 1,
        row_stride=SH,
        column_dilation=win.dilation[1],
        kernel_rows=KH,
        kernel_reach=reach,
        pool_rows=pool[0],
        pool_columns=pool[1],
        window_rows=PH,
        window_columns=PW,
        window_row_step=step,
        window_column_step=pool[1] * SW,
        pick_step=SW,
        pick_row=L // pool[0],
        band=band,
        residue=residue,
        tiles=tiles,
        slots=round_up(F, L),
        filters=F,
        row_at=(at * residue + row_at * PW * L).astype(np.int32),
    )
    return plan, pack(plan), (0,) * R, (0,) * KW


@kernel()
def _write_tables(x, n, c, first, count, plan, rows, out, to):
    """Write the tables for windows in `count` rows from `first` on, of one channel."""
    L, width = lane_count(x), plan.buffer_columns
    top = first * plan.window_row_step - plan.top
    height = (count - 1) * plan.window_row_step + plan.kernel_reach + 1  # rows of pixels
    more = (plan.pool_rows - 1) * plan.row_stride
    clear(rows, 0, (height + more) * width)
    start = (n * plan.channels + c) * plan.rows * plan.columns
    for i in range(max(0, -top), min(height + more, plan.rows - top)):
        copy(x, start + (top + i) * plan.columns, plan.columns, rows, i * width + plan.left)
    for i in range(height):
        at = to + i % plan.window_row_step * plan.residue
        at += i // plan.window_row_step * plan.window_columns * L
        for j in range(plan.window_columns):
            pixel = i * width + j * plan.window_column_step
            store(out, at, load(rows, pixel))
            # In the upper half, and beyond it, where the next table will be.
            if plan.pool_rows > 1:
                store(out, at + plan.pick_row, load(rows, pixel + more * width))
            at += L


@kernel()
def _list_picks(dy, winner, start, n, plan, at_of, g, bias, db):
    """For n windows: the lane of every filter's winner, and its gradient, added to db."""
    L = lane_count(dy)
    skip = plan.pick_row - plan.pool_columns * plan.pick_step
    for f in range(0, plan.slots, L):
        total = zero(dy)
        for z in range(f, f + n * plan.slots, plan.slots):
            who = load_winner(winner, start + z, dy)
            gradient = unless_winner(who, OFF, load(dy, start + z))
            store(at_of, z, place_winners(who, OFF, 0, plan.pool_columns, plan.pick_step, skip))
            store(g, z, gradient)
            total = add(total, gradient)
        store(bias, f, total)
    for f in range(plan.slots):
        db[f] += bias[f]


@kernel()
def _add_block(at_of, g, n, tables, first, plan, R, S, T, sums):
    """Add what n windows give to the sums of all filters; `first` is where their tables begin."""
    L = lane_count(g)
    tile = len(T) * L
    places = multiples(0, len(T) - 1, L, T)
    size, to = plan.window_row_step * plan.residue, 0
    for f in range(0, plan.slots, L):
        for c in range(plan.channels):
            at = first + c * size
            for t in range(plan.tiles):
                rows = offsets(plan.row_at, t * len(R), plan.kernel_rows - 1, R)
                acc = pick_tile(
                    g, f, n, plan.slots, at_of, tables, at, rows, S, plan.column_dilation
                )
                tile_store(tile_add(tile_load(acc, sums, to, places), acc), sums, to, places)
                to += tile


@kernel(parallel=True)
def _weight_gradient(
    x, dy, winner, dw, db, N, accumulate, table, R, S, T, taken,
    rows, tables, at_of, g, bias, dws, dbs,
):  # fmt: skip
    taken[0] = 0
    for t in numba.prange(len(tables)):
        plan, parts, L = _unpack(table), len(dws), lane_count(x)
        rows_, tables_, at, g_, bias_ = rows[t], tables[t], at_of[t], g[t], bias[t]
        size = plan.window_row_step * plan.residue
        part = take(taken, 0)
        while part < parts:
            dw_, db_ = dws[part], dbs[part]
            clear(dw_, 0, dw_.size)
            clear(db_, 0, db_.size)
            for n in range(part * N // parts, (part + 1) * N // parts):
                for first in range(0, plan.window_rows, plan.band):
                    count = min(plan.band, plan.window_rows - first)
                    for c in range(plan.channels):
                        _write_tables(x, n, c, first, count, plan, rows_, tables_, c * size)
                    before = (n * plan.window_rows + first) * plan.window_columns
                    windows = count * plan.window_columns
                    for q in range(0, windows, BLOCK):
                        here = min(BLOCK, windows - q)
                        start = (before + q) * plan.slots
                        _list_picks(dy, winner, start, here, plan, at, g_, bias_, db_)
                        _add_block(at, g_, here, tables_, q * L, plan, R, S, T, dw_)
            part = take(taken, 0)
    plan = _unpack(table)
    add_parts(dws, dbs, plan.filters, accumulate, db)
    sums, L = dws[0], lane_count(x)
    for f in range(plan.filters):
        for c in range(plan.channels):
            first = (f // L * plan.channels + c) * plan.tiles * len(T) * L + f % L
            for i in range(plan.kernel_rows * len(S)):
                e = (f * plan.channels + c) * plan.kernel_rows * len(S) + i
                total = sums[first + i * L]
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
    plan, table, R, S = _plan(C, H, W, len(dw), win, pool, L)
    threads = numba.get_num_threads()
    sums = plan.slots * C * plan.tiles * len(R) * len(S)
    parts = number_of_parts(max(1, N), sums * x.itemsize)
    # Whole vectors are read and written at the end of rows and tables.
    buffer = plan.buffer_rows * plan.buffer_columns + L
    tables = C * plan.window_row_step * plan.residue + L
    entries = BLOCK * plan.slots
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
            S,
            (0,) * (len(R) * len(S)),
            np.zeros(1, np.int64),
        ),
        x.dtype,
        (
            (threads, buffer),
            (threads, tables),
            (threads, entries, np.int32),
            (threads, entries),
            (threads, plan.slots),
            (parts, sums),
            (parts, plan.slots, np.float64),
        ),
    )
