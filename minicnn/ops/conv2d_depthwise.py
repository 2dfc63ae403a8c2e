# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""conv2d in Numba where every channel has one filter of its own (depthwise), with stride 1.

A map is copied into a padded buffer that fits the first cache, with rows of P numbers. L places in
a row of the output, from place (i, j), then read

    buffer[i*P + j + taps[k]]     for tap k = (p, q)

and ROWS such vectors are one `vector.lane_tile` with a weight in all lanes. Results go straight to
the output, row by row: the last vector of a row overlaps the one before, so a row must fill one.
The weight gradient adds the same reads times dy, in a tile of TAPS sums that are kept in lanes.

A 3x3 kernel slides down the rows instead: each row of the buffer is read once, for the three rows
of the output that it takes part in, which halves the time.

An item of work is one map. Weight gradients are summed as in `conv2d_channels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_channels import add_pixels
from minicnn.ops.conv2d_maps import Geometry, maps_of, number_of_parts, round_up
from minicnn.ops.copy_numba import clear
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    add,
    fma,
    horizontal_sum,
    lane_count,
    lane_tile,
    lanes,
    load,
    load_part,
    multiples,
    offsets,
    splat,
    store,
    store_part,
    tile_add,
    tile_load,
    tile_repeat,
    tile_store,
    zero,
    zeros,
)

TAPS = 9  # of a tile of the weight gradient: a 3x3 kernel in one go


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry (source and target as in `Maps`)."""

    channels: int
    rows: int  # of a source map
    columns: int
    corner: int  # where it begins in the buffer
    pitch: int  # P
    size: int  # of the buffer
    out_rows: int  # of a target map
    out_columns: int
    taps: np.ndarray  # (K,) where the taps read, in order
    weight_taps: np.ndarray  # (K,) where they lie in a filter
    slides: bool  # 3x3 taps, row by row
    # Vectors of the target
    each: int  # of a row
    reads: np.ndarray  # (vectors,) where each begins in the buffer
    writes: np.ndarray  # (vectors,) and in a target map
    places: np.ndarray  # (vectors,) in the buffer again, but without overlap


def applies(geometry: Geometry, L: int) -> bool:
    """Tell whether these kernels take the geometry, for vectors of L lanes."""
    depthwise = geometry.C == geometry.F == geometry.groups
    return depthwise and geometry.window.stride == (1, 1) and maps_of(geometry).target[2] >= L


@lru_cache(maxsize=256)
def _plan(geometry: Geometry, L: int) -> Plan:
    maps = maps_of(geometry)
    (C, SH, SW), (_, TH, TW) = maps.source, maps.target
    (rows,), (columns,) = maps.rows, maps.columns  # one phase: the stride is 1
    top, left = (-min(0, *axis.offsets) for axis in (rows, columns))
    pitch = left + max(SW, TW + max(columns.offsets))
    at_row, at_column = np.array(rows.offsets) + top, np.array(columns.offsets) + left
    each = -(-TW // L)  # vectors of a row
    starts = np.arange(each) * L
    overlapping = np.minimum(starts, TW - L)
    first = np.arange(TH)[:, None]
    taps = np.add.outer(at_row * pitch, at_column).ravel()
    order = np.argsort(taps)
    taps = taps[order]
    places = (first * pitch + starts).ravel()
    bottom = max(top + SH, TH + int(at_row.max()))
    return Plan(
        channels=C,
        rows=SH,
        columns=SW,
        corner=top * pitch + left,
        pitch=pitch,
        size=round_up(max(bottom * pitch, int(taps[-1] + places.max()) + L), L),
        out_rows=TH,
        out_columns=TW,
        taps=taps.astype(np.int32),
        weight_taps=np.add.outer(
            np.array(rows.taps) * geometry.window.kernel[1], np.array(columns.taps)
        ).ravel()[order],
        slides=geometry.window.kernel == (3, 3) and geometry.window.dilation[0] == 1,
        each=each,
        reads=(first * pitch + overlapping).ravel().astype(np.int32),
        writes=(first * TW + overlapping).ravel().astype(np.int32),
        places=places.astype(np.int32),
    )


# ---------------------------------------------------------------- one map


@kernel(inline=True)
def _pad(x, at, plan, out):
    """Copy one map into the buffer, whose padding stays zero."""
    L, n, none, o = lane_count(x), plan.columns, zero(x), plan.corner
    whole = n - n % L
    for _ in range(plan.rows):
        for w in range(0, whole, L):
            store(out, o + w, load(x, at + w))
        if whole < n:
            store_part(out, o + whole, n - whole, load_part(x, at + whole, n - whole, none))
        at += n
        o += plan.pitch


@kernel(inline=True)
def _correlate_map(source, plan, w, y, y0):
    """Write one target map, for weights and then the bias in all lanes of w."""
    L, acc, depth, last = lane_count(w), zeros(w, ROWS), plan.taps.size, plan.reads.size - 1
    for v in range(0, plan.reads.size, ROWS):
        rows = offsets(plan.reads, v, last, ROWS)  # past the end: the last vector again
        sums = tile_repeat(acc, w, depth * L, ROWS)
        for k in range(0, depth, BLOCK):
            n = min(BLOCK, depth - k)
            sums = tile_add(sums, lane_tile(acc, source, 0, rows, plan.taps, k, n, w, k * L, L))
        tile_store(sums, y, y0, offsets(plan.writes, v, last, ROWS))


@kernel(inline=True)
def _dot3(source, at, c0, c1, c2, w0, w1, w2, sums):
    """Add the products of three vectors of a row with their weights."""
    sums = fma(load(source, at + c0), w0, sums)
    return fma(load(source, at + c2), w2, fma(load(source, at + c1), w1, sums))


@kernel(inline=True)
def _slide_map(source, plan, w, y, y0):
    """`_correlate_map` for 3x3 taps."""
    L, pitch = lane_count(w), plan.pitch
    c0, c1, c2 = plan.taps[0], plan.taps[1], plan.taps[2]
    w0, w1, w2 = load(w, 0), load(w, L), load(w, 2 * L)
    w3, w4, w5 = load(w, 3 * L), load(w, 4 * L), load(w, 5 * L)
    w6, w7, w8, bias = load(w, 6 * L), load(w, 7 * L), load(w, 8 * L), load(w, 9 * L)
    for j in range(plan.each):
        at, to = plan.reads[j], y0 + plan.writes[j]
        # What the rows of the output have so far: `this` two of its rows of taps, `later` one.
        this = _dot3(source, at, c0, c1, c2, w0, w1, w2, bias)
        at += pitch
        this = _dot3(source, at, c0, c1, c2, w3, w4, w5, this)
        later = _dot3(source, at, c0, c1, c2, w0, w1, w2, bias)
        for _ in range(plan.out_rows):
            at += pitch
            store(y, to, _dot3(source, at, c0, c1, c2, w6, w7, w8, this))
            this = _dot3(source, at, c0, c1, c2, w3, w4, w5, later)
            later = _dot3(source, at, c0, c1, c2, w0, w1, w2, bias)
            to += plan.out_columns


@kernel(inline=True)
def _slide_gradient(source, plan, target, dw, w):
    """`_add_gradient` for 3x3 taps; two rows of zeros follow the target's."""
    L, none, step = lane_count(dw), zero(dw), plan.each * lane_count(dw)
    c0, c1, c2 = plan.taps[0], plan.taps[1], plan.taps[2]
    for j in range(plan.each):
        at, o = plan.places[j], j * L
        before, before_that = none, none  # dy of the two rows above
        for start in range(0, plan.out_rows + 2, BLOCK):
            s0, s1, s2, s3, s4, s5, s6, s7, s8 = zeros(dw, TAPS)
            for _ in range(start, min(plan.out_rows + 2, start + BLOCK)):
                x0, x1, x2 = load(source, at + c0), load(source, at + c1), load(source, at + c2)
                d = load(target, o)
                s0, s1, s2 = fma(x0, d, s0), fma(x1, d, s1), fma(x2, d, s2)
                s3, s4, s5 = fma(x0, before, s3), fma(x1, before, s4), fma(x2, before, s5)
                s6, s7 = fma(x0, before_that, s6), fma(x1, before_that, s7)
                s8 = fma(x2, before_that, s8)
                before_that, before = before, d
                at += plan.pitch
                o += step
            to = multiples(0, TAPS - 1, L, TAPS)
            sums = (s0, s1, s2, s3, s4, s5, s6, s7, s8)
            tile_store(tile_add(sums, tile_load(sums, dw, w, to)), dw, w, to)


@kernel(inline=True)
def _rows_in(dy, at, plan, out):
    """Copy the rows of a target map, each filled up to whole vectors with zeros."""
    L, none, o = lane_count(dy), zero(dy), 0
    for i in range(plan.out_rows):
        for j in range(0, plan.out_columns, L):
            n = plan.out_columns - j
            store(out, o, load_part(dy, at + i * plan.out_columns + j, n, none))
            o += L


@kernel(inline=True)
def _add_gradient(source, plan, target, dw, w0):
    """``dw[w0][k] += sum over places t of source[t + taps[k]] * target[t]``, lane by lane."""
    L, acc, depth, vectors = lane_count(dw), zeros(dw, TAPS), plan.taps.size, plan.places.size
    for k in range(0, depth, TAPS):
        rows = offsets(plan.taps, k, depth - 1, TAPS)
        to = multiples(k, depth - 1, L, TAPS)
        sums = tile_load(acc, dw, w0, to)
        for v in range(0, vectors, BLOCK):
            n = min(BLOCK, vectors - v)
            sums = tile_add(
                sums, lane_tile(acc, source, 0, rows, plan.places, v, n, target, v * L, L)
            )
        tile_store(sums, dw, w0, to)


# ---------------------------------------------------------------- whole batches


@kernel(parallel=True)
def _correlate(x, w, bias, y, items, plan, sources, weights):
    threads, depth = len(sources), plan.taps.size
    for t in numba.prange(threads):
        source, taps = sources[t], weights[t]
        L = lane_count(source)
        clear(source, 0, source.size)
        for item in range(t * items // threads, (t + 1) * items // threads):
            channel = item % plan.channels
            for k in range(depth):
                store(taps, k * L, splat(w[channel * depth + plan.weight_taps[k]]))
            store(taps, depth * L, splat(bias[channel]))
            _pad(x, item * plan.rows * plan.columns, plan, source)
            to = item * plan.out_rows * plan.out_columns
            if plan.slides:
                _slide_map(source, plan, taps, y, to)
            else:
                _correlate_map(source, plan, taps, y, to)


@kernel(parallel=True)
def _gradient(x, dy, dw, db, items, plan, sources, targets, dws, dbs):
    threads, parts, depth = len(sources), len(dws), plan.taps.size
    for t in numba.prange(threads):
        source, target = sources[t], targets[t]
        L = lane_count(source)
        clear(source, 0, source.size)
        clear(target, 0, target.size)
        for part in range(t * parts // threads, (t + 1) * parts // threads):
            clear(dws[part], 0, dws[part].size)
            clear(dbs[part], 0, dbs[part].size)
            for item in range(part * items // parts, (part + 1) * items // parts):
                channel = item % plan.channels
                _pad(x, item * plan.rows * plan.columns, plan, source)
                _rows_in(dy, item * plan.out_rows * plan.out_columns, plan, target)
                if plan.slides:
                    _slide_gradient(source, plan, target, dws[part], channel * depth * L)
                else:
                    _add_gradient(source, plan, target, dws[part], channel * depth * L)
                add_pixels(target, 0, plan.places.size, L, dbs[part], channel * L)
    for channel in numba.prange(plan.channels):
        _reduce(dws, dbs, channel, plan, dw, db)


@kernel()
def _reduce(dws, dbs, channel, plan, dw, db):
    """Add the partial sums of one channel in order, then their lanes."""
    L, depth = lane_count(dw), plan.taps.size
    for k in range(depth + 1):  # the last one is the bias
        parts, at = (dws, (channel * depth + k) * L) if k < depth else (dbs, channel * L)
        total = load(parts[0], at)
        for part in range(1, len(parts)):
            total = add(total, load(parts[part], at))
        if k < depth:
            dw[channel * depth + plan.weight_taps[k]] = horizontal_sum(total)
        else:
            db[channel] = horizontal_sum(total)


# ---------------------------------------------------------------- called from conv2d_numba


def correlate(geometry: Geometry, x: Array, w: Array, b: Array | None, y: Array) -> None:
    """Write the correlation of x with w to y or, for the adjoint, of dy (as x) to dx (as y)."""
    L = lanes(x.dtype)
    plan = _plan(geometry, L)
    bias = np.zeros(plan.channels, x.dtype) if b is None else b
    threads = numba.get_num_threads()
    Call(
        _correlate,
        (flat(x), flat(w), flat(bias), y.reshape(-1), len(x) * plan.channels, plan),
        x.dtype,
        ((threads, plan.size), (threads, (plan.taps.size + 1) * L)),
    )()


def weight_gradient(geometry: Geometry, x: Array, dy: Array, dw: Array, db: Array) -> None:
    """Write the gradients of w and b to dw and db; the geometry is the forward's."""
    L = lanes(x.dtype)
    plan = _plan(geometry, L)
    items, size = len(x) * plan.channels, dw.size * L
    parts = number_of_parts(items, size * x.itemsize)
    threads = numba.get_num_threads()
    target = (plan.out_rows + 2) * plan.each * L  # two more rows, for `_slide_gradient`
    Call(
        _gradient,
        (flat(x), flat(dy), dw.reshape(-1), db, items, plan),
        x.dtype,
        ((threads, plan.size), (threads, target), (parts, size), (parts, db.size * L)),
    )()
