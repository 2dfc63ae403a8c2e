# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""conv2d in Numba with channels in the lanes: a block of the output stays in registers.

A convolution is a matrix product whose left factor is never written down. With maps packed
channels-last into a flat buffer, pixel (i, j) of the output and tap k = (p, q, c) meet at

    x[pixels[i, j] + cols[k]]      pixels[i, j] = (i*SH*WB + j*SW) * pitch
                                   cols[p, q, c] = (p*DH*WB + q*DW) * pitch + c

with WB the columns of the buffer and `pitch` the numbers from one pixel to the next. Two tables
of offsets hold stride, dilation, padding and kernel, and three products remain:

    y[pixel, f]   = sum over k      of x[pixels + cols] * w[k, f]       forward
    dw[k, f]      = sum over pixels of x[cols + pixels] * dy[pixel, f]  the same tables, swapped
    dx[pixel, c]  = sum over k      of dy[pixels + cols] * w[k, c]      the tables of the adjoint

`tile_products` and `tile_gradients` compute them, from packed arrays to packed arrays: a tile of
8 pixels by 2 vectors of filters stays in registers while `vector.outer_tile` runs over k. Taps
on padding are left out: every tile has its runs of k (or of pixels, for dw). With the pixels of
8 images side by side, a tile is one place of 8 images, and none of its products is wasted. In a
depthwise convolution each lane of y reads its own lane of x, with `vector.lane_tile`.

Where y's channels are in the lanes too, a tile is some whole windows of the pool that follows (or
8 single pixels), and goes through ReLU and max-pool to y while it is in the registers.

Otherwise `pack` and `unpack` around the products turn a band of rows of an NCHW image into packed
form and back, within the cache. A thread takes whole bands and owns what it writes. Weight
gradients are summed in a number of parts that depends on the shapes alone, so the number of threads
changes no bit. Sums longer than BLOCK are added block by block, which keeps rounding errors small.

References
----------
M. Dukhan, "The Indirect Convolution Algorithm", 2019, arXiv:1907.02129.
E. Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures", SC 2018, arXiv:1808.05567.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import (
    Geometry,
    Maps,
    Phase,
    maps_of,
    number_of_parts,
    round_up,
)
from minicnn.ops.conv_block import OFF
from minicnn.ops.copy_numba import copy
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.last import finish
from minicnn.ops.packed import pack as pack_plan
from minicnn.ops.packed import unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    VECTOR_BYTES,
    add,
    lane_count,
    lane_offsets,
    lane_tile,
    lanes,
    load,
    load_rows,
    multiples,
    offsets,
    outer_tile,
    scaled,
    store,
    store_rows,
    tile_add,
    tile_load,
    tile_pool,
    tile_repeat,
    tile_store,
    transpose,
    zero,
    zeros,
)
from minicnn.shapes import Pair

NARROW, WIDE = ROWS, 2 * ROWS  # vectors of a tile on a panel of one and of two vectors
BAND_BYTES = 768 << 10  # packed input and output of a band: they stay in the L2 cache
SHORT = 32  # shorter rows of taps or pixels are not worth leaving their padding out
SHARES = 16  # a batch is cut into at least so many bands, if its images have the rows ...
LEAST = 1 << 13  # ... and a band has about so much work, in vector operations: some 2 us


# ---------------------------------------------------------------- geometry


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry: sizes and tables of offsets.

    "Source" is the map that is read (x, or dy in the adjoint), "target" the one that is written.
    """

    depthwise: bool  # one channel in, one out, for each group
    images: int  # side by side in the buffers: an item of work
    whole: bool  # tiles are whole windows of the pool: the target is y itself
    cost: int  # vector operations an image
    # Maps: rows, columns, and elements of an image
    source_channels: int
    source_rows: int
    source_columns: int
    source_image: int
    target_rows: int
    target_columns: int
    target_image: int
    # Slots: where the plane of each starts in its image. Of those that pad the target's groups to
    # whole vectors, target_planes tells -1 and target_from some plane.
    source_planes: np.ndarray
    target_planes: np.ndarray
    target_from: np.ndarray
    # A band: target rows from band*band_rows, and source rows from band*band_step + first_row
    bands: int
    band_rows: int
    band_step: int
    first_row: int
    buffer_rows: int
    buffer_columns: int
    first_column: int  # the source column at column 0 of the buffer; at most 0
    source_pixels: np.ndarray  # (pixels,) where each pixel of a band's source rows goes
    target_pixels: np.ndarray  # (pixels,) and where those of the target's rows are
    # Phases: tables of offsets into the packed source, the packed target and the weights
    lattice_rows: np.ndarray  # (phases,)
    lattice_columns: np.ndarray  # (phases,)
    band_lattice: int  # rows of each lattice in a band
    pixels: np.ndarray  # (phases, pixels)
    targets: np.ndarray  # (phases, pixels), or one for each window where tiles are `whole`
    depth: np.ndarray  # (phases,) number of taps k
    cols: np.ndarray  # (phases, depth)
    weight_taps: np.ndarray  # (phases, depth) where tap k lies in w, from ...
    weight_order: np.ndarray  # (phases, depth) the k in the order in which they lie there
    weight_slots: np.ndarray  # (target slots,) ... the filter (or channel) of the slot
    weight_start: np.ndarray  # (phases + 1,) where the packed weights of each phase start
    # Panels: one or two vectors of target slots, all of one group
    panel_slot: np.ndarray  # (panels,) the first
    panel_width: np.ndarray  # (panels,) how many
    panel_source: np.ndarray  # (panels,) the first source slot of the group, or of the panel
    # Runs of k that a tile of pixels needs, and of pixels that a tile of k needs: the rest is
    # padding. Tile t of a band has runs[at[t]] .. runs[at[t + 1]], each (first, end).
    tap_runs_at: np.ndarray  # (phases, bands, tiles + 1)
    tap_runs: np.ndarray  # (runs, 2)
    pixel_runs_at: np.ndarray  # (bands, tiles + 1), of a forward plan
    pixel_runs: np.ndarray  # (runs, 2)


_unpack = unpacker(
    Plan,
    {
        "int64 1": "source_planes target_planes target_from lattice_rows lattice_columns depth "
        "weight_slots weight_start panel_slot panel_width panel_source",
        "int32 1": "source_pixels target_pixels",
        "int32 2": "pixels targets cols",
        "int64 2": "weight_taps weight_order tap_runs pixel_runs_at pixel_runs",
        "int64 3": "tap_runs_at",
    },
)


@lru_cache(maxsize=256)
def _plan(
    geometry: Geometry, N: int, L: int, pool: Pair = (1, 1), y_last: bool = False
) -> tuple[Plan, np.ndarray]:
    """Tabulate the forward of a geometry, or its adjoint, in the cheaper of two packings.

    A band has whole windows of the pool. Also return the plan as kernels get it.
    """
    maps, KW = maps_of(geometry), geometry.window.kernel[1]
    whole = y_last and ROWS % (pool[0] * pool[1]) == 0
    plans = [_tabulate(maps, KW, N, L, images, pool, whole and images == 1) for images in (1, ROWS)]
    plan = min(plans, key=lambda plan: plan.cost * round_up(N, plan.images))
    return plan, pack_plan(plan)


def _tabulate(maps: Maps, KW: int, N: int, L: int, images: int, pool: Pair, whole: bool) -> Plan:
    (SC, SH, SW), (TC, TH, TW) = maps.source, maps.target
    rows, columns, SG, TG = maps.rows, maps.columns, maps.source_group, maps.target_group

    # Slots, each group of the target padded to whole vectors, and their panels. Depthwise, all
    # groups share the vectors, in source and target alike.
    depthwise = SG == TG == 1
    groups = 1 if depthwise else TC // TG
    run = round_up(TC // groups, L)
    table = np.full((groups, run), -1)
    table[:, : TC // groups] = np.arange(TC).reshape(groups, -1)
    channel = table.ravel()
    narrow = SC < L and not depthwise  # then nothing is read but its own channels
    source_channel = np.minimum(np.arange(SC if narrow else round_up(SC, L)), SC - 1)
    pitch, width = len(source_channel) * images, len(channel) * images
    firsts = np.arange(0, run, 2 * L)
    panel_slot = np.add.outer(np.arange(groups) * run, firsts).ravel()
    panel_width = np.tile(np.minimum(2 * L, run - firsts), groups)
    panel_source = panel_slot if depthwise else np.repeat(np.arange(groups) * SG, len(firsts))

    # The buffer of a band.
    at_rows = [i for phase in rows for i in phase.offsets] or [0]
    first_row, halo = min(at_rows), max(at_rows) - min(at_rows)
    at_columns = [i for phase in columns for i in phase.offsets]
    ends = [(phase.places - 1) * phase.scale + i + 1 for phase in columns for i in phase.offsets]
    first_column = min([0, *at_columns])
    WB = max([SW, *ends]) - first_column
    scale, step, lattice = rows[0].scale, rows[0].step, max(phase.places for phase in rows)
    room = BAND_BYTES * L // VECTOR_BYTES - halo * WB * pitch
    most = max(1, room // (scale * WB * pitch + step * TW * width))
    depths = sum(len(r.taps) * len(c.taps) * r.places * c.places for r in rows for c in columns)
    work = depths * SG * len(channel) // L * images
    shares = min(-(-SHARES // -(-N // images)), 1 << (work // LEAST).bit_length())
    band = round_up(-(-lattice // max(-(-lattice // most), min(shares, lattice))), pool[0])
    bands = -(-lattice // band)
    buffer_rows = (band - 1) * scale + halo + 1

    phases = [(r, c) for r in rows for c in columns]
    unit = pool if whole else (1, 1)
    orders = [_order(band, c.places, images, unit) for _, c in phases]
    places = max(i.size for i, _, _ in orders)
    deepest = max(len(r.taps) * len(c.taps) for r, c in phases) * SG
    pixels, targets = np.zeros((2, len(phases), places), np.int32)
    cols = np.zeros((len(phases), deepest), np.int32)
    weight_taps, weight_order = np.zeros((2, len(phases), deepest), np.int64)
    depth = np.array([len(r.taps) * len(c.taps) * SG for r, c in phases])
    for a, ((r, c), (i, j, k)) in enumerate(zip(phases, orders)):
        at = (i * r.scale * WB + j * c.scale) * pitch + k * len(source_channel)
        pixels[a, : at.size] = at
        row, column = r.start + i * r.step, c.start + j * c.step
        at = (row * TW + column) * width + k * len(channel)
        if whole:
            at = (row // pool[0] * (TW // pool[1]) + column // pool[1]) * len(channel)
            at = at[:: pool[0] * pool[1]]
        targets[a, : at.size] = at
        at = np.add.outer(
            (np.array(r.offsets, int) - first_row) * WB, np.array(c.offsets, int) - first_column
        )
        tap = np.add.outer(np.array(r.taps, int) * KW, np.array(c.taps, int))
        c_in = np.arange(SG)
        cols[a, : depth[a]] = np.add.outer(at * pitch, c_in).ravel()
        weight_taps[a, : depth[a]] = np.add.outer(tap, c_in * maps.source_weight).ravel()
        weight_order[a, : depth[a]] = weight_taps[a, : depth[a]].argsort()

    tap_runs_at, tap_runs, products = _tap_runs(phases, orders, maps, band, bands, unit[0])
    pixel_runs_at, pixel_runs = _pixel_runs(rows[0], columns[0], maps, band, bands, images)
    h, w = np.indices((min(buffer_rows, SH), SW))
    # A packed vector takes the time of some forty products, most of it waiting for memory.
    packs = 40 * bands * buffer_rows * WB * pitch // L
    return Plan(
        depthwise=depthwise,
        images=images,
        whole=whole,
        cost=(products * ROWS * int(panel_width.sum()) // L + packs) // images,
        source_channels=SC,
        source_rows=SH,
        source_columns=SW,
        source_image=SC * SH * SW,
        target_rows=TH,
        target_columns=TW,
        target_image=TC * TH * TW,
        source_planes=source_channel * (SH * SW),
        target_planes=np.where(channel < 0, -1, channel * (TH * TW)),
        target_from=np.maximum(channel, 0) * (TH * TW),
        bands=bands,
        band_rows=band * step,
        band_step=band * scale,
        first_row=first_row,
        buffer_rows=buffer_rows,
        buffer_columns=WB,
        first_column=first_column,
        source_pixels=((h * WB + w - first_column) * pitch).ravel().astype(np.int32),
        target_pixels=np.arange(band * step * TW, dtype=np.int32) * width,
        lattice_rows=np.array([r.places for r, _ in phases]),
        lattice_columns=np.array([c.places for _, c in phases]),
        band_lattice=band,
        pixels=pixels,
        targets=targets,
        depth=depth,
        cols=cols,
        weight_taps=weight_taps,
        weight_order=weight_order,
        weight_slots=np.where(channel < 0, -1, maps.target_weight[channel]),
        weight_start=np.cumsum([0, *depth]) * len(channel),
        panel_slot=panel_slot,
        panel_width=panel_width,
        panel_source=panel_source,
        tap_runs_at=tap_runs_at,
        tap_runs=tap_runs,
        pixel_runs_at=pixel_runs_at,
        pixel_runs=pixel_runs,
    )


def _order(rows: int, columns: int, images: int, pool: Pair) -> tuple[np.ndarray, ...]:
    """Return row, column and image of the pixels of a band, window by window of a pool."""
    shape = rows // pool[0], columns // pool[1], *pool, images
    i, j, p, q, k = (a.ravel() for a in np.indices(shape))
    return i * pool[0] + p, j * pool[1] + q, k


def _tap_runs(
    phases: list[tuple[Phase, Phase]],
    orders: list[tuple[np.ndarray, ...]],
    maps: Maps,
    band: int,
    bands: int,
    unit: int,
) -> tuple[np.ndarray, np.ndarray, int]:
    """List, for every tile of pixels, the runs of k in which a pixel of it meets a pixel.

    Bands have a multiple of `unit` rows. Also return how many k the tiles of all bands take.
    """
    tiles = -(-max(i.size for i, _, _ in orders) // ROWS)
    counts, runs = np.zeros((len(phases), bands, tiles), np.int64), []
    for a, ((r, c), (i_in, j_in, _)) in enumerate(zip(phases, orders)):
        rows, columns = _span(r.meets(maps.source[1])), _span(c.meets(maps.source[2]))
        for b in range(bands):
            pixels = int(np.count_nonzero(i_in < (r.places - b * band) // unit * unit))
            tile = np.minimum(np.arange(round_up(pixels, ROWS)), pixels - 1).reshape(-1, ROWS)
            i, j = b * band + i_in[tile], j_in[tile]
            p = rows[0][i].min(axis=1), rows[1][i].max(axis=1)
            q = columns[0][j].min(axis=1), columns[1][j].max(axis=1)
            counts[a, b, : len(tile)], new = _runs(p, q, len(c.taps), maps.source_group)
            runs.append(new)
    flat = np.concatenate(runs)
    return _starts(counts), flat, int((flat[:, 1] - flat[:, 0]).sum())


def _pixel_runs(
    r: Phase, c: Phase, maps: Maps, band: int, bands: int, images: int
) -> tuple[np.ndarray, np.ndarray]:
    """List, for every tile of k, the runs of pixels that a tap of it meets."""
    rows, columns = _span(r.meets(maps.source[1]).T), _span(c.meets(maps.source[2]).T)
    depth = len(r.taps) * len(c.taps) * maps.source_group
    tap = (
        np.minimum(np.arange(round_up(depth, ROWS)), depth - 1).reshape(-1, ROWS)
        // maps.source_group
    )
    p, q = tap // len(c.taps), tap % len(c.taps)
    i = np.stack([rows[0][p].min(axis=1), rows[1][p].max(axis=1)])
    j = columns[0][q].min(axis=1), columns[1][q].max(axis=1)
    counts, runs = np.zeros((bands, len(tap)), np.int64), []
    for b in range(bands):
        inside = np.clip(i - b * band, 0, band)
        counts[b], new = _runs(inside, j, c.places, images)
        runs.append(new)
    return _starts(counts), np.concatenate(runs)


def _span(inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the run of True in every row begins and ends."""
    first = inside.argmax(axis=1) if inside.size else np.zeros(len(inside), int)
    return first, first + inside.sum(axis=1)


def _runs(rows: Any, columns: Any, Q: int, unit: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut rectangles (first, end of rows; first, end of columns) out of rows of Q*unit numbers.

    Returns how many runs of numbers each takes, and the runs (first, end). Rows too short for a
    loop are taken whole.
    """
    (r0, r1), (q0, q1) = rows, columns
    some = (r1 > r0) & (q1 > q0)
    whole = (q1 - q0) * unit < min(SHORT, Q * unit)
    q0, q1 = np.where(whole, 0, q0), np.where(whole, Q, q1)
    joined = q1 - q0 == Q
    counts = np.where(some, np.where(joined, 1, r1 - r0), 0)
    of = np.repeat(np.arange(len(counts)), counts)
    row = r0[of] + np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
    first = (row * Q + q0[of]) * unit
    end = np.where(joined[of], r1[of] * Q * unit, first + (q1 - q0)[of] * unit)
    return counts, np.stack([first, end], axis=1)


def _starts(counts: np.ndarray) -> np.ndarray:
    """Return where the runs of every tile start, and after the last of a row where they end."""
    ends = np.cumsum(counts).reshape(counts.shape)
    starts = ends - counts
    return np.concatenate([starts, ends[..., -1:]], axis=-1)


# ---------------------------------------------------------------- packing


@kernel()
def pack(image, start, planes, pixels, first, count, out, shift):
    """Copy pixels first .. first + count of an image's planes to ``out[shift + pixels + slot]``."""
    L = lane_count(image)
    slots = planes.size
    if slots % L == 0 and count >= L:
        for s in range(0, slots, L):
            rows = lane_offsets(planes, s, image)
            for i in range(0, count, L):
                p = min(i, count - L)  # the last block overlaps the one before
                block = transpose(load_rows(image, start + first + p, rows))
                tile_store(block, out, shift + s, lane_offsets(pixels, p, image))
    else:
        for p in range(count):
            for s in range(slots):
                out[shift + pixels[p] + s] = image[start + planes[s] + first + p]


@kernel()
def pack_last(image, start, slots, P, pixels, first, count, out, shift):
    """Copy pixels first .. first + count of an image in layout LAST: see `pack`."""
    L = lane_count(image)
    for p in range(count):
        at = start + (first + p) * P
        if slots % L == 0:
            for s in range(0, slots, L):
                store(out, shift + pixels[p] + s, load(image, at + s))
        else:
            for s in range(slots):
                out[shift + pixels[p] + s] = image[at + s]


@kernel()
def unpack(packed, shift, pixels, planes, count, image, start):
    """Copy packed pixels 0 .. count from ``packed[shift + pixels + slot]`` to an image's planes."""
    L = lane_count(image)
    slots = planes.size
    if count >= L:
        for s in range(0, slots, L):
            rows = lane_offsets(planes, s, image)
            for i in range(0, count, L):
                p = min(i, count - L)
                block = load_rows(packed, shift + s, lane_offsets(pixels, p, image))
                store_rows(image, start + p, rows, transpose(block))
    else:
        for s in range(slots):
            if planes[s] >= 0:
                for p in range(count):
                    image[start + planes[s] + p] = packed[shift + pixels[p] + s]


@kernel(inline=True)
def _pack_source(x, x_last, n, images, band, plan, out):
    """Pack the source rows of a band of some images from n on, with the zeros around them."""
    slots = plan.source_planes.size
    pitch = slots * plan.images
    row, width = plan.buffer_columns * pitch, plan.source_columns * pitch
    left = -plan.first_column * pitch
    top = band * plan.band_step + plan.first_row  # rows head .. tail of the buffer hold pixels
    head = min(plan.buffer_rows, max(0, -top))
    tail = min(plan.buffer_rows, max(head, plan.source_rows - top))
    if images < plan.images:
        out[:] = 0
    out[: head * row] = 0
    out[tail * row :] = 0
    for i in range(head, tail):
        out[i * row : i * row + left] = 0
        out[i * row + left + width : (i + 1) * row] = 0
    P = (plan.source_channels + lane_count(x) - 1) // lane_count(x) * lane_count(x)
    if pitch == (P if x_last else 1):  # a row of the source is one of the buffer
        for i in range(head, tail):
            at = (n * plan.source_rows + top + i) * width
            copy(x, at, width, out, i * row + left)
        return
    first, count = (top + head) * plan.source_columns, (tail - head) * plan.source_columns
    for m in range(images):
        shift = head * row + m * slots
        if x_last:
            start = (n + m) * plan.source_rows * plan.source_columns * P
            pack_last(x, start, slots, P, plan.source_pixels, first, count, out, shift)
        else:
            start = (n + m) * plan.source_image
            pack(x, start, plan.source_planes, plan.source_pixels, first, count, out, shift)


@kernel()
def _pack_weights(w, plan, phase, panel, out):
    """Gather the taps of one panel: out[k, slot] for every k, zero where a slot is empty.

    Where L taps of L slots lie side by side, they are loaded as vectors and transposed.
    """
    L, first = lane_count(w), plan.panel_slot[panel]
    depth, width = plan.depth[phase], plan.panel_width[panel]
    taps, order = plan.weight_taps[phase], plan.weight_order[phase]
    at = plan.weight_start[phase] + first * depth
    i = 0
    while i < depth:
        start = taps[order[i]]
        side = i + L <= depth and taps[order[i + L - 1]] == start + L - 1
        for s in range(0, width, L):
            if side and plan.weight_slots[first + s + L - 1] >= 0:
                slots = lane_offsets(plan.weight_slots, first + s, w)
                places = scaled(lane_offsets(order, i, w), width)
                tile_store(transpose(load_rows(w, start, slots)), out, at + s, places)
            else:
                for k in order[i : i + L] if side else order[i : i + 1]:
                    for r in range(s, s + L):
                        # Unsigned: no index is tried for being negative.
                        slot = plan.weight_slots[np.uint64(first + r)]
                        value = w[np.uint64(slot + taps[k])] if slot >= 0 else 0
                        out[np.uint64(at + k * width + r)] = value
        i += L if side else 1


# ---------------------------------------------------------------- products, packed to packed


@kernel()
def tile_products(
    acc, area, depthwise, x, x0, pixels, count, cols, runs_at, runs, w, w0, bias, b0,
    y, y0, targets, more, relu, winner,
):  # fmt: skip
    """``y[targets[p] + y0] = bias[b0] + sum over k of x[pixels[p] + x0 + cols[k]] * w[w0][k]``.

    For p < count, on a panel as wide as a row of `acc`, a block of zeros. Tile t of pixels takes
    the k in ``runs[runs_at[t]] .. runs[runs_at[t + 1]]``. With `area`, every len(area) pixels are a
    window, and y gets their maxima, through ReLU if asked for (or one pixel each, added if `more`).
    """
    width = lane_count(w) * (len(acc) // ROWS)
    for t in range((count + ROWS - 1) // ROWS):
        rows = offsets(pixels, t * ROWS, count - 1, ROWS)  # past the end: the last pixel again
        sums = tile_repeat(acc, bias, b0, ROWS)
        a, b = runs_at[t], runs_at[t + 1]
        # One short run is added to the bias: a sum of its own would cost a tenth of its time.
        if b - a == 1 and runs[a, 1] - runs[a, 0] <= BLOCK and not depthwise:
            first = runs[a, 0]
            n, wk = runs[a, 1] - first, w0 + first * width
            sums = outer_tile(sums, x, x0, rows, cols, first, n, w, wk, width)
            a = b
        for r in range(a, b):
            first, end = runs[r, 0], runs[r, 1]
            for k in range(first, end, BLOCK):
                n, wk = min(BLOCK, end - k), w0 + k * width
                if depthwise:
                    block = lane_tile(acc, x, x0, rows, cols, k, n, w, wk, width)
                else:
                    block = outer_tile(acc, x, x0, rows, cols, k, n, w, wk, width)
                sums = tile_add(sums, block)
        if len(area) == 0:
            tile_store(sums, y, y0, offsets(targets, t * ROWS, count - 1, ROWS))
        else:
            first, end = t * (ROWS // len(area)), count // len(area)
            tile_pool(sums, area, more, relu, OFF, y, y0, targets, first, end, winner)


@kernel()
def tile_gradients(
    acc, depthwise, x, x0, pixels, cols, depth, runs_at, runs, dy, dy0, pitch, dw, w0, more
):
    """``dw[w0][k] = sum over p of x[cols[k] + x0 + pixels[p]] * dy[p * pitch + dy0]``.

    For k < depth, added to what is there if `more`. Tile t of k takes the p in
    ``runs[runs_at[t]] .. runs[runs_at[t + 1]]``.
    """
    width = lane_count(dw) * (len(acc) // ROWS)
    for t in range((depth + ROWS - 1) // ROWS):
        rows = offsets(cols, t * ROWS, depth - 1, ROWS)
        places = multiples(t * ROWS, depth - 1, width, ROWS)
        sums = tile_load(acc, dw, w0, places) if more else acc
        for r in range(runs_at[t], runs_at[t + 1]):
            first, end = runs[r, 0], runs[r, 1]
            for p in range(first, end, BLOCK):
                n, at = min(BLOCK, end - p), p * pitch + dy0
                if depthwise:
                    block = lane_tile(acc, x, x0, rows, pixels, p, n, dy, at, pitch)
                else:
                    block = outer_tile(acc, x, x0, rows, pixels, p, n, dy, at, pitch)
                sums = tile_add(sums, block)
        tile_store(sums, dw, w0, places)  # all rows were loaded before: repeated ones agree


@kernel()
def add_pixels(dy, at, count, pitch, db, s):
    """``db[s] += sum over p of dy[at + p * pitch]``, one vector, block by block."""
    total = load(db, s)
    for p in range(0, count, BLOCK):
        block = zero(dy)
        for i in range(p, min(count, p + BLOCK)):
            block = add(block, load(dy, at + i * pitch))
        total = add(total, block)
    store(db, s, total)


# ---------------------------------------------------------------- work of one thread


@kernel(inline=True)
def _correlate_band(x, w, bias, y, winner, n, images, band, panels, plan, area, to, source, target):
    _pack_source(x, to.x_last, n, images, band, plan, source)
    first, y0 = band * plan.band_rows, 0
    if len(area):
        columns = plan.target_columns // to.pool_columns
        y0 = n * (plan.target_rows // to.pool_rows) + first // to.pool_rows
        y0 *= columns * plan.target_planes.size
    for a in range(plan.depth.size):
        rows = min(plan.band_lattice, plan.lattice_rows[a] - band * plan.band_lattice)
        count = rows * plan.lattice_columns[a] * plan.images
        if len(area):
            count = rows // to.pool_rows * (plan.lattice_columns[a] // to.pool_columns) * len(area)
        pixels, targets, cols = plan.pixels[a], plan.targets[a], plan.cols[a]
        runs_at = plan.tap_runs_at[a, band]
        for panel in range(*panels):
            slot, x0 = plan.panel_slot[panel], plan.panel_source[panel]
            w0 = plan.weight_start[a] + slot * plan.depth[a]
            args = area, plan.depthwise, source, x0, pixels, count, cols, runs_at, plan.tap_runs
            rest = w, w0, bias, slot, target, y0 + slot, targets, to.more, to.relu, winner
            if plan.panel_width[panel] == lane_count(w):
                tile_products(zeros(w, NARROW), *args, *rest)
            else:
                tile_products(zeros(w, WIDE), *args, *rest)
    if len(area):
        return
    rows = min(plan.target_rows, first + plan.band_rows) - first
    planes, pixels = plan.target_planes, plan.target_pixels
    for m in range(images):
        if to.y_last:
            P, pitch = planes.size, planes.size * plan.images
            finish(
                target, m * P, pitch, P, n + m, first, rows, plan.target_rows,
                plan.target_columns, to.pool_rows, to.pool_columns, to.relu, to.more, y, winner,
            )  # fmt: skip
        else:
            start = (n + m) * plan.target_image + first * plan.target_columns
            unpack(target, m * planes.size, pixels, planes, rows * plan.target_columns, y, start)


@kernel(inline=True)
def _gradient_band(x, dy, to, n, images, band, plan, source, target, dw, db, more):
    _pack_source(x, to.x_last, n, images, band, plan, source)
    slots, columns = plan.target_planes.size, plan.target_columns
    first = band * plan.band_rows
    count = (min(plan.target_rows, first + plan.band_rows) - first) * columns
    if images < plan.images:
        target[:] = 0
    for m in range(images):
        shift, at = m * slots, first * columns
        if to.y_last:
            start = (n + m) * plan.target_rows * columns * slots
            pack_last(dy, start, slots, slots, plan.target_pixels, at, count, target, shift)
        else:
            start = (n + m) * plan.target_image
            pack(dy, start, plan.target_from, plan.target_pixels, at, count, target, shift)
    depth = plan.depth[0]
    runs_at = plan.pixel_runs_at[band]
    for panel in range(plan.panel_slot.size):
        slot, x0 = plan.panel_slot[panel], plan.panel_source[panel]
        args = (plan.depthwise, source, x0, plan.pixels[0], plan.cols[0], depth, runs_at)
        rest = (plan.pixel_runs, target, slot, slots, dw, slot * depth, more)
        if plan.panel_width[panel] == lane_count(dw):
            tile_gradients(zeros(dw, NARROW), *args, *rest)
        else:
            tile_gradients(zeros(dw, WIDE), *args, *rest)
    for s in range(0, slots, lane_count(db)):
        add_pixels(target, s, count * plan.images, slots, db, s)


@kernel()
def _reduce_panel(parts, panel, plan, dw):
    """Add the partial sums of one panel in order and lay them out as w is."""
    depth, width = plan.depth[0], plan.panel_width[panel]
    at = plan.panel_slot[panel] * depth
    for i in range(at, at + depth * width, lane_count(dw)):
        total = load(parts[0], i)
        for part in range(1, len(parts)):
            total = add(total, load(parts[part], i))
        store(parts[0], i, total)
    for s in range(width):
        slot = plan.weight_slots[plan.panel_slot[panel] + s]
        if slot >= 0:
            for k in range(depth):
                to = np.uint64(slot + plan.weight_taps[0, np.uint64(k)])
                dw[to] = parts[0, np.uint64(at + k * width + s)]


@kernel()
def _reduce_bias(parts, plan, db):
    f = 0
    for slot in range(plan.target_planes.size):
        if plan.target_planes[slot] >= 0:
            db[f] = 0
            for part in range(len(parts)):
                db[f] += parts[part, slot]
            f += 1


# ---------------------------------------------------------------- whole batches


@kernel(parallel=True)
def _correlate(x, w, bias, y, winner, N, table, area, to, taken, packed, sources, targets):
    shape = _unpack(table)
    for i in numba.prange(shape.depth.size * shape.panel_slot.size):
        plan = _unpack(table)
        panels = plan.panel_slot.size
        _pack_weights(w, plan, i // panels, i % panels, packed)
    taken[:] = 0
    for t in numba.prange(len(sources)):
        plan, groups = _unpack(table), len(taken)
        panels = plan.panel_slot.size
        items = (N + plan.images - 1) // plan.images * plan.bands
        source, target = sources[t], y if len(area) else targets[t]
        for g in range(t, t + groups):  # each begins with the panels that it has packed
            group = g % groups
            own = (group * panels // groups, (group + 1) * panels // groups), plan, area, to
            i = take(taken, group)
            while i < items:
                n, band = i // plan.bands * plan.images, i % plan.bands
                images = min(plan.images, N - n)
                _correlate_band(x, packed, bias, y, winner, n, images, band, *own, source, target)
                i = take(taken, group)


@kernel(parallel=True)
def _gradient(x, dy, dw, db, N, table, to, taken, sources, targets, dws, dbs):
    shape = _unpack(table)
    taken[0] = 0
    for t in numba.prange(len(sources)):
        plan = _unpack(table)
        items, parts = (N + plan.images - 1) // plan.images * plan.bands, len(dws)
        source, target = sources[t], targets[t]
        part = take(taken, 0)
        while part < parts:
            dw_, db_ = dws[part], dbs[part]
            first = part * items // parts
            db_[:] = 0
            for i in range(first, (part + 1) * items // parts):
                n, band = i // plan.bands * plan.images, i % plan.bands
                images = min(plan.images, N - n)
                own = source, target, dw_, db_
                _gradient_band(x, dy, to, n, images, band, plan, *own, i > first)
            part = take(taken, 0)
    for panel in numba.prange(shape.panel_slot.size):
        _reduce_panel(dws, panel, _unpack(table), dw)
    _reduce_bias(dbs, shape, db)


# ---------------------------------------------------------------- called from conv2d_numba


class Layouts(NamedTuple):
    """How x and y lie in memory, and what is done to y on the way out (only in layout LAST)."""

    x_last: bool = False
    y_last: bool = False
    relu: bool = False
    pool_rows: int = 1
    pool_columns: int = 1
    more: bool = False  # y is added to


FIRST = Layouts()


def correlate(
    geometry: Geometry,
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    to: Layouts = FIRST,
    winner: Array | None = None,
) -> None:
    """Write the correlation of x with w to y or, for the adjoint, of dy (as x) to dx (as y)."""
    correlation(geometry, x, w, b, y, to, winner)()


def correlation(
    geometry: Geometry,
    x: Array,
    w: Array,
    b: Array | None,
    y: Array,
    to: Layouts = FIRST,
    winner: Array | None = None,
) -> Call:
    """Return what `correlate` runs."""
    pool = to.pool_rows, to.pool_columns
    plan, table = _plan(geometry, max(1, len(x)), lanes(x.dtype), pool, to.y_last)
    there = plan.target_planes >= 0
    bias = np.zeros(there.size, x.dtype)

    def refresh() -> None:
        bias[there] = b

    threads = numba.get_num_threads()
    # One image takes so little time that each thread had better keep to its own weights.
    alone = plan.whole and len(x) == 1
    groups = min(threads, len(plan.panel_slot)) if alone else 1
    source, target = _band_sizes(plan)
    return Call(
        _correlate,
        (
            flat(x),
            flat(w),
            bias,
            y.reshape(-1),
            np.empty(0, np.uint8) if winner is None else winner.reshape(-1),
            len(x),
            table,
            (0,) * (pool[0] * pool[1] if plan.whole else 0),
            to,
            np.zeros(groups, np.int64),
        ),
        x.dtype,
        ((1, int(plan.weight_start[-1])), (threads, source), (threads, target)),
        lambda packed, *own: (packed[0], *own),
        None if b is None else refresh,
    )


def weight_gradient(
    geometry: Geometry, x: Array, dy: Array, dw: Array, db: Array, to: Layouts = FIRST
) -> None:
    """Write the gradients of w and b to dw and db; the geometry is the forward's."""
    weight_gradients(geometry, x, dy, dw, db, to)()


def weight_gradients(
    geometry: Geometry, x: Array, dy: Array, dw: Array, db: Array, to: Layouts = FIRST
) -> Call:
    """Return what `weight_gradient` runs."""
    plan, table = _plan(geometry, max(1, len(x)), lanes(x.dtype))
    slots, size = plan.target_planes.size, int(plan.weight_start[-1])
    threads = numba.get_num_threads()
    items = -(-len(x) // plan.images) * plan.bands
    parts = number_of_parts(items, size * x.itemsize)
    source, target = _band_sizes(plan)
    return Call(
        _gradient,
        (flat(x), flat(dy), dw.reshape(-1), db, len(x), table, to, np.zeros(1, np.int64)),
        x.dtype,
        ((threads, source), (threads, target), (parts, size), (parts, slots)),
    )


def _band_sizes(plan: Plan) -> tuple[int, int]:
    source = plan.buffer_rows * plan.buffer_columns * plan.source_planes.size * plan.images
    target = (
        0
        if plan.whole
        else plan.band_rows * plan.target_columns * plan.target_planes.size * plan.images
    )
    return source, target
