# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Gradients of a convolution behind a max-pool, for maps with their channels in the lanes.

Behind a pool a pixel of the convolution has a gradient only if it won its window, and if the ReLU
between them was on. Let filter f win window q at pixel s(q, f), with the gradient g(q, f). Then

    dw[f]                += g(q, f) * x[patch at s(q, f)]       for all windows q
    dx[patch at s(q, f)] += g(q, f) * w[f]                      for all q and f

and no other product is needed: one in four behind a 2x2 pool, and fewer behind a ReLU. Channels
lie side by side in memory (N, H, W, P), so a patch is a few long runs of numbers. It is cut into
units of V vectors, and R units make a tile, which stays in registers while a list runs by:

    dw    for each filter, the list of its winners: the tile is a part of dw[f]
    dx    for each pixel, the list of filters that won there: the tile is a part of dx's patch

Work is cut into blocks of images for dx and groups of filters for dw. Nothing is shared between
two of them, so any number of threads gives the same bits. Padding, stride and dilation are in the
tables of offsets; maps with padding are copied into a buffer with zeros around them.

A gradient of zero meets no pixel here: 0 times infinity does not become NaN, as it would in the
sums over all pixels.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import round_up
from minicnn.ops.conv_block import OFF
from minicnn.ops.copy_numba import clear, copy
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.packed import pack, unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    add,
    first_bit,
    lane_count,
    lanes,
    list_tile,
    load,
    load_winner,
    multiples,
    offsets,
    store,
    tile_add,
    tile_load,
    tile_store,
    unless_winner,
    winner_bits,
    zero,
)
from minicnn.shapes import Window

# Tiles (R, V) to choose from, each compiled when first used: 16 registers with AVX, else 32.
# Few, so that what a tile needs of all filters stays in the L1 cache.
TILES = (5, 2), (3, 3), (8, 1)
BITS = 64  # of an integer
FEW, MANY = 8, 16  # filters of a group, an item of work for dw; each reads all of x
ENTRIES = 48  # of a list for dw at least, where there are so many windows: a tile is loaded and
PIXELS = 64  # stored once a list. For dx, the windows of a block.
LISTS = 16  # lists add up to a sum, and these sums to dw: three short sums for a long one


class Plan(NamedTuple):
    """Sizes and tables of offsets of one geometry."""

    image: int  # numbers of an image of x, and of its buffer
    buffer: int
    padded: bool  # the buffer is not the image itself
    row: int  # numbers of a row of x, and of the buffer
    buffer_row: int
    top: int  # rows above x, and numbers to its left
    left: int
    rows: int  # of x
    weights: int  # numbers of w for a filter
    slots: int  # numbers of a pixel of dy: filters, rounded up
    filters: int
    windows: int
    positions: int  # in a window
    units: int
    tiles: int
    filter_images: int  # a list for dw is of so many images, ...
    filter_windows: int  # ... and of so many windows in each
    pixel_images: int
    pixel_windows: int
    window_at: np.ndarray  # (windows,) where the patch of a window's first pixel starts
    position_at: np.ndarray  # (256,) from there to the winner's; 0 for OFF
    unit_at: np.ndarray  # (units,) where each starts in a patch
    weight_at: np.ndarray  # (tiles * R * V * L,) number of the unit in w[f], or -1 in empty lanes


_unpack = unpacker(Plan, {"int32 1": "window_at position_at unit_at weight_at"})


@lru_cache(maxsize=256)
def plan_of(
    C: int, H: int, W: int, F: int, win: Window, pool: tuple[int, int], N: int, L: int
) -> tuple[Plan, np.ndarray, tuple[int, ...], tuple[int, ...]]:
    """Return the plan, the plan as kernels get it, and tuples of R and V zeros: their lengths
    choose the kernels."""
    (KH, KW), (SH, SW), (DH, DW) = win.kernel, win.stride, win.dilation
    (top, _), (left, _) = win.padding
    HB, WB = win.padded(H, W)
    OH, OW = win.output_size("conv_block", H, W)
    PH, PW = OH // pool[0], OW // pool[1]
    P = round_up(C, L)

    # Runs of a patch: the taps of a row lie side by side unless they are dilated.
    p, q = np.divmod(np.arange(KH * KW), KW)
    tap_at = (p * DH * WB + q * DW) * P
    run = P if DW > 1 else KW * P
    R, V = _tile(KH * KW * P // run, run // L)
    at = np.arange(KH * KW * P).reshape(-1, V * L)  # (units, numbers of a unit)
    tap, channel = at // P, at % P
    weight_at = np.where(channel < C, channel * (KH * KW) + tap, -1)  # (units, V*L)
    tiles = -(-len(at) // R)
    # The last unit again, where the last tile has more rows than there are units.
    weight_at = weight_at[np.minimum(np.arange(tiles * R), len(at) - 1)]

    i, j = np.divmod(np.arange(PH * PW), max(1, PW))
    window_at = (i * pool[0] * SH * WB + j * pool[1] * SW) * P
    i, j = np.divmod(np.arange(pool[0] * pool[1]), pool[1])
    position_at = np.zeros(256, np.int32)
    position_at[: len(i)] = (i * SH * WB + j * SW) * P

    def block(least: int) -> tuple[int, int]:
        """Return images and windows (whole rows of them) so that both make `least` or more."""
        if least <= PH * PW:
            return 1, -(-least // PW) * PW
        return min(N, -(-least // max(1, PH * PW))), PH * PW

    filter_images, filter_windows = block(ENTRIES)
    pixel_images, pixel_windows = block(PIXELS)
    plan = Plan(
        image=H * W * P,
        buffer=HB * WB * P,
        padded=(HB, WB) != (H, W),
        row=W * P,
        buffer_row=WB * P,
        top=top,
        left=left * P,
        rows=H,
        weights=C * KH * KW,
        slots=round_up(F, L),
        filters=F,
        windows=PH * PW,
        positions=pool[0] * pool[1],
        units=len(at),
        tiles=tiles,
        filter_images=filter_images,
        filter_windows=filter_windows,
        pixel_images=pixel_images,
        pixel_windows=pixel_windows,
        window_at=window_at.astype(np.int32),
        position_at=position_at,
        unit_at=(tap_at[tap[:, 0]] + channel[:, 0]).astype(np.int32),
        weight_at=weight_at.astype(np.int32).ravel(),
    )
    return plan, pack(plan), (0,) * R, (0,) * V


def _tile(runs: int, vectors: int) -> tuple[int, int]:
    """Choose R and V for so many runs of so many vectors, at least cost an entry of a list."""

    def cost(R: int, V: int) -> float:
        tiles = -(-(runs * (vectors // V)) // R)
        # A tile's products, the loads of its entry, and a share of its own loads and stores.
        return tiles * (max(R * V, 4) + 2 + 3)

    return min((t for t in TILES if vectors % t[1] == 0), key=lambda t: cost(*t))


# ---------------------------------------------------------------- padding


@kernel()
def _pad(x, n, images, plan, out):
    """Copy images from n on into the middle of zeros."""
    for m in range(images):
        clear(out, m * plan.buffer, plan.buffer)
        for i in range(plan.rows):
            at = m * plan.buffer + (plan.top + i) * plan.buffer_row + plan.left
            start = (n + m) * plan.image + i * plan.row
            copy(x, start, plan.row, out, at)


@kernel()
def _crop(out, n, images, plan, x):
    """Copy the middle of the buffer back: the inverse of `_pad`."""
    for m in range(images):
        for i in range(plan.rows):
            at = m * plan.buffer + (plan.top + i) * plan.buffer_row + plan.left
            start = (n + m) * plan.image + i * plan.row
            copy(out, at, plan.row, x, start)


# ---------------------------------------------------------------- dw


@kernel()
def _list_winners(dy, winner, n, images, first, end, f, filters, plan, at_of, g, ends):
    """List the winners of some filters in windows first .. end."""
    room = plan.filter_images * plan.filter_windows
    for r in range(filters):
        ends[r] = r * room
    for m in range(images):
        for q in range(first, end):
            e = ((n + m) * plan.windows + q) * plan.slots + f
            base = m * plan.buffer + plan.window_at[q]
            for r in range(filters):
                # One that is off is overwritten by the next. (Unsigned: no index is negative.)
                k, c = winner[np.uint64(e + r)], np.uint64(ends[r])
                at_of[c], g[c] = base + plan.position_at[k], dy[np.uint64(e + r)]
                ends[r] += k != OFF


@kernel()
def _gradient_group(
    x, dy, winner, N, f, filters, plan, R, V, padding, padded, at_of, g, ends, sums
):
    """Add up dw of some filters from f on, in tiles behind the sums."""
    L = lane_count(sums)
    unit = len(V) * L
    tile = len(R) * unit
    room = plan.filter_images * plan.filter_windows
    places = multiples(0, len(R) - 1, unit, R)
    size, lists = filters * plan.tiles * tile, 0
    clear(sums, 0, 2 * size)
    for n in range(0, N, plan.filter_images):
        images = min(plan.filter_images, N - n)
        if plan.padded:
            _pad(x, n, images, plan, padding)
        source, start = (padded, 0) if plan.padded else (x, n * plan.image)
        for first in range(0, plan.windows, plan.filter_windows):
            end = min(plan.windows, first + plan.filter_windows)
            _list_winners(dy, winner, n, images, first, end, f, filters, plan, at_of, g, ends)
            for t in range(plan.tiles):
                rows = offsets(plan.unit_at, t * len(R), plan.units - 1, R)
                for r in range(filters):
                    at = (r * plan.tiles + t) * tile
                    for i in range(r * room, ends[r], BLOCK):
                        c = min(BLOCK, ends[r] - i)
                        block = list_tile(g, i, c, at_of, source, start, rows, V)
                        block = tile_add(tile_load(block, sums, at, places), block)
                        tile_store(block, sums, at, places)
            lists += 1
            if lists % LISTS == 0:
                _add_up(sums, size)
    _add_up(sums, size)


@kernel()
def _add_up(sums, size):
    """Add the first `size` sums to the totals behind them, and begin them anew."""
    for i in range(0, size, lane_count(sums)):
        store(sums, size + i, add(load(sums, size + i), load(sums, i)))
    clear(sums, 0, size)


@kernel()
def _bias_gradient(dy, winner, N, f, plan, accumulate, sums, db):
    """Add up the gradients of a vector of filters from f on where they won."""
    total, rows = zero(dy), N * plan.windows
    for first in range(0, rows, BLOCK):
        block = zero(dy)
        for i in range(first, min(rows, first + BLOCK)):
            at = i * plan.slots + f
            block = add(block, unless_winner(load_winner(winner, at, dy), OFF, load(dy, at)))
        total = add(total, block)
    store(sums, 0, total)
    for r in range(min(lane_count(dy), plan.filters - f)):
        db[f + r] = db[f + r] + sums[r] if accumulate else sums[r]


@kernel()
def _write_group(sums, f, filters, plan, rows, accumulate, dw):
    """Lay the totals out as w is."""
    size = plan.weight_at.size
    real = size // (plan.tiles * rows) * plan.units
    for r in range(filters):
        if f + r < plan.filters:
            at = (f + r) * plan.weights
            for e in range(real):
                i = np.int64(plan.weight_at[np.uint64(e)])
                if i >= 0:
                    total, to = sums[np.uint64((filters + r) * size + e)], np.uint64(at + i)
                    dw[to] = dw[to] + total if accumulate else total


# ---------------------------------------------------------------- dx


@kernel()
def _pack_filter(w, f, plan, out):
    """Lay w[f] out in tiles: ``out[t, f]`` is the tile that meets tile t of a patch."""
    tile = plan.weight_at.size // plan.tiles
    for t in range(plan.tiles):
        at = (t * plan.slots + f) * tile
        for e in range(t * tile, (t + 1) * tile):
            i = np.int64(plan.weight_at[np.uint64(e)])
            out[np.uint64(at)] = w[np.uint64(f * plan.weights + i)] if i >= 0 else 0
            at += 1


@kernel()
def _list_filters(dy, winner, n, images, first, end, plan, tile, at_of, g, ends):
    """For every position of windows first .. end, list the filters that won there.

    The list of position z is ``ends[z] .. ends[z + 1]``.
    """
    L, z, c = lane_count(dy), 0, 0
    ends[0] = 0
    for m in range(images):
        for q in range(first, end):
            e = ((n + m) * plan.windows + q) * plan.slots
            for k in range(plan.positions):
                for start in range(0, plan.filters, BITS):
                    bits, here = 0, min(BITS, plan.filters - start)
                    for r in range(0, here, L):
                        bits |= winner_bits(winner, e + start + r, k, dy) << r
                    if here < BITS:
                        bits &= (1 << here) - 1  # nothing in the surplus counts
                    while bits != 0:
                        f = start + first_bit(bits)
                        at_of[c], g[c] = f * tile, dy[e + f]
                        c += 1
                        bits &= bits - 1
                z += 1
                ends[z] = c


@kernel()
def _scatter_block(dy, winner, weights, n, images, plan, R, V, padding, at_of, g, ends, dx):
    """Write dx of some images from n on."""
    L = lane_count(weights)
    unit = len(V) * L
    tile = len(R) * unit
    inner = multiples(0, len(R) - 1, unit, R)
    out, start = (padding, 0) if plan.padded else (dx, n * plan.image)
    clear(out, start, images * plan.buffer)
    for first in range(0, plan.windows, plan.pixel_windows):
        end = min(plan.windows, first + plan.pixel_windows)
        _list_filters(dy, winner, n, images, first, end, plan, tile, at_of, g, ends)
        for t in range(plan.tiles):
            rows = offsets(plan.unit_at, t * len(R), plan.units - 1, R)
            w0 = t * plan.slots * tile
            z = 0
            for m in range(images):
                for q in range(first, end):
                    at = start + m * plan.buffer + plan.window_at[q]
                    for k in range(plan.positions):
                        pixel = at + plan.position_at[k]
                        for i in range(ends[z], ends[z + 1], BLOCK):
                            c = min(BLOCK, ends[z + 1] - i)
                            block = list_tile(g, i, c, at_of, weights, w0, inner, V)
                            block = tile_add(tile_load(block, out, pixel, rows), block)
                            tile_store(block, out, pixel, rows)
                        z += 1
    if plan.padded:
        _crop(padding, n, images, plan, dx)


# ---------------------------------------------------------------- whole batches


@kernel(parallel=True)
def _backward(
    x, dy, winner, w, dw, db, dx, N, accumulate, table, R, V, group, taken,
    weights, padding, padded, at_of, g, ends, sums,
):  # fmt: skip
    if dx.size:
        for f in numba.prange(_unpack(table).filters):
            _pack_filter(w, f, _unpack(table), weights)
    taken[0] = 0
    for t in numba.prange(len(padding)):
        plan = _unpack(table)
        mine = padding[t], at_of[t], g[t], ends[t]
        # Blocks of images for dx, then groups of filters for dw.
        blocks = (N + plan.pixel_images - 1) // plan.pixel_images if dx.size else 0
        groups = (plan.filters + group - 1) // group
        i = take(taken, 0)
        while i < blocks:
            n = i * plan.pixel_images
            images = min(plan.pixel_images, N - n)
            _scatter_block(dy, winner, weights, n, images, plan, R, V, *mine, dx)
            i = take(taken, 0)
        own, sums_, L = padded[t], sums[t], lane_count(dy)
        while i < blocks + groups:
            f = (i - blocks) * group
            filters = min(group, plan.slots - f)
            _gradient_group(
                x, dy, winner, N, f, filters, plan, R, V, mine[0], own, *mine[1:], sums_
            )
            _write_group(sums_, f, filters, plan, len(R), accumulate, dw)
            for v in range((f + L - 1) // L * L, f + filters, L):  # a vector may be two groups
                _bias_gradient(dy, winner, N, v, plan, accumulate, sums_, db)
            i = take(taken, 0)


def backward(
    x: Array,
    dy: Array,
    winner: Array,
    w: Array,
    dw: Array,
    db: Array,
    dx: Array | None,
    win: Window,
    pool: tuple[int, int],
    accumulate: bool,
) -> Call:
    """Return what writes the gradients of x and of w and b, or adds the latter two.

    x and dx are (N, H, W, P); dy and winner, those of the pooled map, are (N, PH, PW, slots).
    """
    F, C = w.shape[:2]
    N, H, W, _ = x.shape
    plan, table, R, V = plan_of(C, H, W, F, win, pool, max(1, N), lanes(x.dtype))
    threads = numba.get_num_threads()
    group = MANY if MANY * threads <= F else FEW  # each thread gets one
    size = plan.weight_at.size
    images = max(plan.filter_images, plan.pixel_images)
    padding = images * plan.buffer if plan.padded else 0
    windows = plan.pixel_images * plan.pixel_windows
    entries = max(group * plan.filter_images * plan.filter_windows + 1, windows * F)
    lists = max(group, windows * plan.positions + 1)

    return Call(
        _backward,
        (
            flat(x),
            flat(dy),
            flat(winner),
            flat(w),
            dw.reshape(-1),
            db,
            np.empty(0, x.dtype) if dx is None else dx.reshape(-1),
            N,
            accumulate,
            table,
            R,
            V,
            group,
            np.zeros(1, np.int64),
        ),
        x.dtype,
        (
            (1, 0 if dx is None else size * plan.slots),
            (threads, padding),
            (threads, entries, np.int32),
            (threads, entries),
            (threads, lists, np.int64),
            (threads, 2 * group * size),
        ),
        lambda weights, padding, *own: (weights[0], padding, _read_only(padding), *own),
    )


def _read_only(a: Array) -> Array:
    view = a.view()
    view.flags.writeable = False
    return view
