"""conv2d on the CPU: Numba kernels that keep a block of the output in vector registers.

A convolution is a matrix product whose left factor is never written down. With a map packed
channels-last into a flat buffer, pixel (i, j) of the output and tap k = (c, p, q) meet at

    x[pixels[i, j] + cols[k]]      pixels[i, j] = (i*SH*WB + j*SW) * pitch
                                   cols[c, p, q] = (p*DH*WB + q*DW) * pitch + c

with WB the columns of the buffer and `pitch` the numbers of a pixel. Two small tables of offsets
thus hold stride, dilation, padding and kernel, and three products remain:

    y[pixel, f]   = sum over k      of x[pixels + cols] * w[k, f]             forward
    dw[k, f]      = sum over pixels of x[cols + pixels] * dy[pixel, f]        same tables, swapped
    dx[pixel, c]  = sum over k      of dy[pixels' + cols'] * w'[k, c]         tables of the adjoint

`tile_products` and `tile_gradients` compute them from packed arrays to packed arrays; f runs over
the lanes of the vectors, and `vector.outer_tile` is the inner loop. With stride S the taps that
meet a pixel of dx depend on its remainder by S, so the adjoint has S*S phases, each a convolution
with stride 1 of its own taps. Groups with few filters (depthwise above all) would leave lanes
empty: there the lanes run over the filters of all groups, each with its own channel below it
(`lanewise`), and `vector.lane_tile` multiplies vector by vector.

Around the products, `pack` and `unpack` turn a band of an NCHW image into packed form and back in
the cache. A thread takes whole bands and owns what it writes. Weight gradients are summed in a
fixed number of parts, so the number of threads changes no bit. Sums longer than BLOCK are added
block by block, which keeps the rounding error of float32 near that of pairwise summation.

References
----------
M. Dukhan, "The Indirect Convolution Algorithm", 2019, arXiv:1907.02129.
E. Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
Architectures", SC 2018, arXiv:1808.05567.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import buffers, kernel
from minicnn.ops.vector import (
    ROWS,
    VECTOR_BYTES,
    add,
    lane_count,
    lane_multiples,
    lane_offsets,
    lane_tile,
    lanes,
    load,
    load_rows,
    multiples,
    offsets,
    outer_tile,
    store,
    store_rows,
    tile_add,
    tile_load,
    tile_repeat,
    tile_store,
    transpose,
    zero,
    zeros,
)
from minicnn.shapes import Window

NARROW, WIDE = ROWS, 2 * ROWS  # vectors of a tile on a panel of one and of two vectors
BLOCK = 64  # terms added in one go; longer sums are sums of blocks
BAND_BYTES = 512 << 10  # packed input and output of a band: they stay in the L2 cache
SHARES = 8  # a batch is cut into at least so many bands, if its images have the rows
PARTS_BYTES = 32 << 20  # partial weight gradients may take so much


# ---------------------------------------------------------------- geometry


class Phase(NamedTuple):
    """Along one axis: output ``start + i*step`` reads input ``i*scale + offset`` of each tap."""

    start: int
    step: int
    count: int
    scale: int
    taps: tuple[int, ...]
    offsets: tuple[int, ...]


def _forward_axis(places: int, kernel: int, stride: int, dilation: int, before: int) -> list[Phase]:
    taps = tuple(range(kernel))
    return [Phase(0, 1, places, stride, taps, tuple(p * dilation - before for p in taps))]


def _adjoint_axis(size: int, kernel: int, stride: int, dilation: int, before: int) -> list[Phase]:
    """Invert ``h = i*stride + p*dilation - before``: one phase for every remainder of h."""
    phases = []
    for h in range(min(stride, size)):
        met = [(p, h + before - p * dilation) for p in range(kernel)]
        met = [(p, d // stride) for p, d in met if d % stride == 0]
        taps, at = tuple(p for p, _ in met), tuple(i for _, i in met)
        phases.append(Phase(h, stride, -(-(size - h) // stride), 1, taps, at))
    return phases


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry: sizes and tables of offsets.

    "Source" is the map that is read (x, or dy in the adjoint), "target" the one that is written.
    A slot is a place in a packed pixel.
    """

    lanewise: bool
    # Maps: pixels and columns of an image's plane, elements of an image
    source_rows: int
    source_columns: int
    source_image: int
    target_rows: int
    target_columns: int
    target_image: int
    # Packed pixels: where the plane of each slot starts in its image (target: -1 for no plane)
    source_planes: np.ndarray  # (source slots,)
    target_planes: np.ndarray  # (target slots,)
    # A band: target rows from band*band_rows, and source rows from band*band_step + first_row
    bands: int
    band_rows: int
    band_step: int
    first_row: int
    buffer_rows: int
    buffer_columns: int
    first_column: int  # the source column at column 0 of the buffer; at most 0
    source_pixels: np.ndarray  # (pixels,) where each pixel of a band's source rows goes
    # Phases: tables of offsets into the packed source, the packed target and the weights
    lattice_rows: np.ndarray  # (phases,)
    lattice_columns: np.ndarray  # (phases,)
    band_lattice: int  # rows of each lattice in a band
    pixels: np.ndarray  # (phases, pixels)
    targets: np.ndarray  # (phases, pixels)
    depth: np.ndarray  # (phases,) number of taps k
    cols: np.ndarray  # (phases, depth)
    weight_taps: np.ndarray  # (phases, depth) where tap k lies in w, from ...
    weight_slots: np.ndarray  # (target slots,) ... the filter (or channel) of the slot
    weight_start: np.ndarray  # (phases + 1,) where the packed weights of each phase start
    # Panels of one or two vectors of slots
    panel_slot: np.ndarray  # (panels,) first slot
    panel_width: np.ndarray  # (panels,) slots
    panel_source: np.ndarray  # (panels,) offset to the group's channels in a packed source pixel


@lru_cache(maxsize=256)
def _plan(
    adjoint: bool, shares: int, L: int, C: int, H: int, W: int, F: int, win: Window, groups: int
) -> Plan:
    """Tabulate the forward of a geometry, or its adjoint; `shares` bands an image, if it can."""
    OH, OW = win.output_size("conv2d", H, W)
    CG, FG = C // groups, F // groups
    taps = win.kernel[0] * win.kernel[1]
    axis, sizes = (_adjoint_axis, (H, W)) if adjoint else (_forward_axis, (OH, OW))
    rows, columns = (
        axis(size, *geometry, before)
        for size, geometry, (before, _) in zip(
            sizes, zip(win.kernel, win.stride, win.dilation), win.padding
        )
    )
    if adjoint:
        (SC, SH, SW, SG), (TC, TH, TW, TG) = (F, OH, OW, FG), (C, H, W, CG)
        tap_of_source, c = CG * taps, np.arange(C)
        tap_of_target = c // CG * (FG * CG * taps) + c % CG * taps
    else:
        (SC, SH, SW, SG), (TC, TH, TW, TG) = (C, H, W, CG), (F, OH, OW, FG)
        tap_of_source, tap_of_target = taps, np.arange(F) * (CG * taps)

    # Slots. Lanewise, slot (m, t) of the source holds the m-th channel of t's group.
    lanewise = groups > 1 and 2 * TG < L
    runs = 1 if lanewise else groups  # the target's slots are runs of channels, padded to vectors
    run = _up(TC // runs, L)
    channel = np.full((runs, run), -1)
    channel[:, : TC // runs] = np.arange(TC).reshape(runs, -1)
    channel = channel.ravel()
    pitch = SC if SC < L else _up(SC, L)
    source_channel, slot_step = np.minimum(np.arange(pitch), SC - 1), 1
    if lanewise:
        below = np.maximum(channel, 0) // TG * SG
        source_channel, slot_step = np.add.outer(np.arange(SG), below).ravel(), run
        pitch = SG * run

    # Panels of two vectors; an odd last one of one vector.
    firsts = np.arange(0, run, 2 * L)
    panel_slot = np.add.outer(np.arange(runs) * run, firsts).ravel()
    panel_width = np.tile(np.minimum(2 * L, run - firsts), runs)
    panel_source = panel_slot if lanewise else np.repeat(np.arange(runs) * SG, len(firsts))

    # The buffer of a band.
    at_rows = [i for phase in rows for i in phase.offsets] or [0]
    at_columns = [i for phase in columns for i in phase.offsets] or [0]
    scale = rows[0].scale
    first_column = min([0, *at_columns])
    ends = [(phase.count - 1) * phase.scale + i + 1 for phase in columns for i in phase.offsets]
    WB = max([SW, *ends]) - first_column
    lattice = max(phase.count for phase in rows)
    step = rows[0].step
    per_row = scale * WB * pitch + step * TW * len(channel)
    halo = (max(at_rows) - min(at_rows)) * WB * pitch
    most = max(1, (BAND_BYTES * L // VECTOR_BYTES - halo) // per_row)
    bands = max(-(-lattice // most), min(shares, lattice))
    band = -(-lattice // bands)
    bands = -(-lattice // band)
    buffer_rows = (band - 1) * scale + max(at_rows) - min(at_rows) + 1
    h, w = np.indices((min(buffer_rows, SH), SW))

    phases = [(r, c) for r in rows for c in columns]
    widest = max(c.count for c in columns)
    deepest = max(len(r.taps) * len(c.taps) for r, c in phases) * SG
    pixels = np.zeros((len(phases), band * widest), np.int32)
    targets = np.zeros_like(pixels)
    cols = np.zeros((len(phases), deepest), np.int32)
    weight_taps = np.zeros((len(phases), deepest), np.int64)
    depth = []
    for a, (r, c) in enumerate(phases):
        i, j = (k.ravel() for k in np.indices((band, c.count)))
        pixels[a, : i.size] = (i * r.scale * WB + j * c.scale) * pitch
        targets[a, : i.size] = ((r.start + i * r.step) * TW + c.start + j * c.step) * len(channel)
        at = np.add.outer(
            (np.array(r.offsets, int) - min(at_rows)) * WB, np.array(c.offsets, int) - first_column
        )
        tap = np.add.outer(np.array(r.taps, int) * win.kernel[1], np.array(c.taps, int))
        depth.append(SG * at.size)
        cols[a, : depth[-1]] = np.add.outer(np.arange(SG) * slot_step, at * pitch).ravel()
        weight_taps[a, : depth[-1]] = np.add.outer(np.arange(SG) * tap_of_source, tap).ravel()

    return Plan(
        lanewise=lanewise,
        source_rows=SH,
        source_columns=SW,
        source_image=SC * SH * SW,
        target_rows=TH,
        target_columns=TW,
        target_image=TC * TH * TW,
        source_planes=source_channel * (SH * SW),
        target_planes=np.where(channel < 0, -1, channel * (TH * TW)),
        bands=bands,
        band_rows=band * step,
        band_step=band * scale,
        first_row=min(at_rows),
        buffer_rows=buffer_rows,
        buffer_columns=WB,
        first_column=first_column,
        source_pixels=((h * WB + w - first_column) * pitch).ravel().astype(np.int32),
        lattice_rows=np.array([r.count for r, _ in phases]),
        lattice_columns=np.array([c.count for _, c in phases]),
        band_lattice=band,
        pixels=pixels,
        targets=targets,
        depth=np.array(depth),
        cols=cols,
        weight_taps=weight_taps,
        weight_slots=np.where(channel < 0, -1, tap_of_target[channel]),
        weight_start=np.cumsum([0, *depth]) * len(channel),
        panel_slot=panel_slot,
        panel_width=panel_width,
        panel_source=panel_source,
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
def unpack(packed, planes, count, image, start):
    """Copy packed pixels 0 .. count to the planes of an image, from `start` on."""
    L = lane_count(image)
    slots = planes.size
    if count >= L:
        pixels = lane_multiples(slots, packed)
        for s in range(0, slots, L):
            rows = lane_offsets(planes, s, image)
            for i in range(0, count, L):
                p = min(i, count - L)
                block = load_rows(packed, p * slots + s, pixels)
                store_rows(image, start + p, rows, transpose(block))
    else:
        for s in range(slots):
            if planes[s] >= 0:
                for p in range(count):
                    image[start + planes[s] + p] = packed[p * slots + s]


@kernel()
def _pack_source(x, n, band, plan, out):
    """Pack the source rows of a band of image n, with the zeros around them."""
    pitch = out.size // (plan.buffer_rows * plan.buffer_columns)
    row, width = plan.buffer_columns * pitch, plan.source_columns * pitch
    left = -plan.first_column * pitch
    top = band * plan.band_step + plan.first_row  # rows head .. tail of the buffer hold pixels
    head = min(plan.buffer_rows, max(0, -top))
    tail = min(plan.buffer_rows, max(head, plan.source_rows - top))
    out[: head * row] = 0
    out[tail * row :] = 0
    for i in range(head, tail):
        out[i * row : i * row + left] = 0
        out[i * row + left + width : (i + 1) * row] = 0
    if head < tail:
        first, count = (top + head) * plan.source_columns, (tail - head) * plan.source_columns
        start = n * plan.source_image
        pack(x, start, plan.source_planes, plan.source_pixels, first, count, out, head * row)


@kernel()
def _pack_weights(w, plan, phase, panel, out):
    """Gather the taps of one panel: out[k, slot] for every k, zero where a slot is empty."""
    depth, width = plan.depth[phase], plan.panel_width[panel]
    at = plan.weight_start[phase] + plan.panel_slot[panel] * depth
    for k in range(depth):
        for s in range(width):
            slot = plan.weight_slots[plan.panel_slot[panel] + s]
            out[at + k * width + s] = w[slot + plan.weight_taps[phase, k]] if slot >= 0 else 0


# ---------------------------------------------------------------- products, packed to packed


@kernel()
def tile_products(
    acc, lanewise, x, x0, pixels, count, cols, depth, w, w0, bias, b0, y, y0, targets
):
    """``y[targets[p] + y0] = bias[b0] + sum over k of x[pixels[p] + x0 + cols[k]] * w[w0][k]``.

    For p < count and k < depth, on a panel as wide as a row of `acc`, a block of zeros.
    """
    width = lane_count(w) * (len(acc) // ROWS)
    for p in range(0, count, ROWS):
        rows = offsets(pixels, p, count - 1, ROWS)  # past the end: the last pixel again
        sums = tile_repeat(acc, bias, b0, ROWS)
        for k in range(0, depth, BLOCK):
            n, wk = min(BLOCK, depth - k), w0 + k * width
            if lanewise:
                block = lane_tile(acc, x, x0, rows, cols, k, n, w, wk, width)
            else:
                block = outer_tile(acc, x, x0, rows, cols, k, n, w, wk, width)
            sums = tile_add(sums, block)
        tile_store(sums, y, y0, offsets(targets, p, count - 1, ROWS))


@kernel()
def tile_gradients(acc, lanewise, x, x0, pixels, count, cols, depth, dy, dy0, pitch, dw, w0):
    """``dw[w0][k] += sum over p of x[cols[k] + x0 + pixels[p]] * dy[p * pitch + dy0]``."""
    width = lane_count(dw) * (len(acc) // ROWS)
    for k in range(0, depth, ROWS):
        rows = offsets(cols, k, depth - 1, ROWS)
        places = multiples(k, depth - 1, width, ROWS)
        sums = tile_load(acc, dw, w0, places)
        for p in range(0, count, BLOCK):
            n, at = min(BLOCK, count - p), p * pitch + dy0
            if lanewise:
                block = lane_tile(acc, x, x0, rows, pixels, p, n, dy, at, pitch)
            else:
                block = outer_tile(acc, x, x0, rows, pixels, p, n, dy, at, pitch)
            sums = tile_add(sums, block)
        tile_store(sums, dw, w0, places)  # all rows were loaded before: repeated ones agree


@kernel()
def add_pixels(dy, count, slots, db):
    """``db[s] += sum over p of dy[p, s]``, block by block."""
    for s in range(0, slots, lane_count(dy)):
        total = load(db, s)
        for p in range(0, count, BLOCK):
            block = zero(dy)
            for i in range(p, min(count, p + BLOCK)):
                block = add(block, load(dy, i * slots + s))
            total = add(total, block)
        store(db, s, total)


# ---------------------------------------------------------------- work of one thread


@kernel()
def _correlate_band(x, w, bias, y, n, band, plan, source, target):
    _pack_source(x, n, band, plan, source)
    for a in range(plan.depth.size):
        rows = min(plan.band_lattice, plan.lattice_rows[a] - band * plan.band_lattice)
        count = rows * plan.lattice_columns[a]
        depth, cols = plan.depth[a], plan.cols[a]
        pixels, targets = plan.pixels[a], plan.targets[a]
        for panel in range(plan.panel_slot.size):
            slot, x0 = plan.panel_slot[panel], plan.panel_source[panel]
            w0 = plan.weight_start[a] + slot * depth
            args = (plan.lanewise, source, x0, pixels, count, cols, depth, w, w0)
            if plan.panel_width[panel] == lane_count(w):
                tile_products(zeros(w, NARROW), *args, bias, slot, target, slot, targets)
            else:
                tile_products(zeros(w, WIDE), *args, bias, slot, target, slot, targets)
    first = band * plan.band_rows
    count = (min(plan.target_rows, first + plan.band_rows) - first) * plan.target_columns
    start = n * plan.target_image + first * plan.target_columns
    unpack(target, plan.target_planes, count, y, start)


@kernel()
def _gradient_band(x, dy, n, band, plan, dy_planes, source, target, dw, db):
    _pack_source(x, n, band, plan, source)
    first = band * plan.band_rows * plan.target_columns
    count = min(plan.band_rows * plan.target_columns, plan.target_rows * plan.target_columns - first)
    pack(dy, n * plan.target_image, dy_planes, plan.targets[0], first, count, target, 0)
    slots, depth = dy_planes.size, plan.depth[0]
    for panel in range(plan.panel_slot.size):
        slot, x0 = plan.panel_slot[panel], plan.panel_source[panel]
        args = (plan.lanewise, source, x0, plan.pixels[0], count, plan.cols[0], depth)
        if plan.panel_width[panel] == lane_count(dw):
            tile_gradients(zeros(dw, NARROW), *args, target, slot, slots, dw, slot * depth)
        else:
            tile_gradients(zeros(dw, WIDE), *args, target, slot, slots, dw, slot * depth)
    add_pixels(target, count, slots, db)


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
                dw[slot + plan.weight_taps[0, k]] = parts[0, at + k * width + s]


# ---------------------------------------------------------------- whole batches


@kernel(parallel=True)
def _correlate(x, w, bias, y, N, plan, packed, sources, targets):
    phases, panels = plan.depth.size, plan.panel_slot.size
    for i in numba.prange(phases * panels):
        _pack_weights(w, plan, i // panels, i % panels, packed)
    threads, items = len(sources), N * plan.bands
    for t in numba.prange(threads):
        for i in range(t * items // threads, (t + 1) * items // threads):
            _correlate_band(
                x, packed, bias, y, i // plan.bands, i % plan.bands, plan, sources[t], targets[t]
            )


@kernel(parallel=True)
def _gradient(x, dy, dw, db, N, plan, dy_planes, sources, targets, dws, dbs):
    threads, parts, items = len(sources), len(dws), N * plan.bands
    for t in numba.prange(threads):
        for part in range(t * parts // threads, (t + 1) * parts // threads):
            dws[part] = 0
            dbs[part] = 0
            for i in range(part * items // parts, (part + 1) * items // parts):
                _gradient_band(
                    x,
                    dy,
                    i // plan.bands,
                    i % plan.bands,
                    plan,
                    dy_planes,
                    sources[t],
                    targets[t],
                    dws[part],
                    dbs[part],
                )
    for panel in numba.prange(plan.panel_slot.size):
        _reduce_panel(dws, panel, plan, dw)
    slot = 0
    for f in range(db.size):
        while plan.weight_slots[slot] < 0:
            slot += 1
        db[f] = dbs[:, slot].sum()
        slot += 1


# ---------------------------------------------------------------- the version's pair


def forward(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    F = w.shape[0]
    y = np.empty((x.shape[0], F, *win.output_size("conv2d", *x.shape[2:])), x.dtype)
    plan = _plan_of(False, x, F, win, groups)
    _run_correlate(plan, x, w, b, y)
    return y


def backward(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    N, F = dy.shape[:2]
    dx, dw, db = np.empty(x.shape, x.dtype), np.zeros(w.shape, x.dtype), np.zeros(F, x.dtype)
    if N:
        _run_correlate(_plan_of(True, x, F, win, groups), dy, w, None, dx)
        _run_gradient(_plan_of(False, x, F, win, groups), x, dy, dw, db)
    return dx, dw, db


def _plan_of(adjoint: bool, x: Array, F: int, win: Window, groups: int) -> Plan:
    shares = -(-SHARES // max(1, x.shape[0]))
    return _plan(adjoint, shares, lanes(x.dtype), *x.shape[1:], F, win, groups)


def _run_correlate(plan: Plan, x: Array, w: Array, b: Array | None, y: Array) -> None:
    """Write the correlation of x with w to y; with the adjoint's plan, of dy to dx."""
    slots = plan.target_planes.size
    bias = np.zeros(slots, x.dtype)
    if b is not None:
        bias[plan.target_planes >= 0] = b
    threads = numba.get_num_threads()
    source, target = _band_sizes(plan)
    with buffers(x.dtype, plan.weight_start[-1], threads * source, threads * target) as lent:
        packed, sources, targets = lent
        _correlate(
            _flat(x),
            _flat(w),
            bias,
            y.reshape(-1),
            len(x),
            plan,
            packed,
            sources.reshape(threads, -1),
            targets.reshape(threads, -1),
        )


def _run_gradient(plan: Plan, x: Array, dy: Array, dw: Array, db: Array) -> None:
    slots, size = plan.target_planes.size, int(plan.weight_start[-1])
    threads = numba.get_num_threads()
    # The split depends on the shapes alone: the sum is the same for any number of threads.
    most = min(16, len(x) * plan.bands, max(2, PARTS_BYTES // (size * x.itemsize)))
    parts = 1 << most.bit_length() - 1
    source, target = _band_sizes(plan)
    sizes = threads * source, threads * target, parts * size, parts * slots
    with buffers(x.dtype, *sizes) as (sources, targets, dws, dbs):
        _gradient(
            _flat(x),
            _flat(dy),
            dw.reshape(-1),
            db,
            len(x),
            plan,
            np.maximum(plan.target_planes, 0),
            sources.reshape(threads, -1),
            targets.reshape(threads, -1),
            dws.reshape(parts, -1),
            dbs.reshape(parts, -1),
        )


def _band_sizes(plan: Plan) -> tuple[int, int]:
    source = plan.buffer_rows * plan.buffer_columns * plan.source_planes.size
    return source, plan.band_rows * plan.target_columns * plan.target_planes.size


def _flat(a: Array) -> Array:
    """Return a 1-d view that cannot be written: one type to compile for, whatever `a` is."""
    view = a.reshape(-1)
    view.flags.writeable = False
    return view
