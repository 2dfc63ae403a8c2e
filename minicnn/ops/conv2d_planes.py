# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""conv2d in Numba with pixels in the lanes, for groups that write few channels.

Each channel of an image stays a plane. Padded to rows of P numbers, it lies in a buffer such
that place t = i*P + j of the output reads

    x[t + cols[k]]          for tap k = (c, p, q),  cols[c, p, q] = c*plane + p*DH*P + q*DW

so L places in a row read L numbers in a row, whatever the tap, and

    y[t ...]   = sum over k of x[t + cols[k] ...] * w[k]
    dw[k]      = sum over t of x[t + cols[k] ...] * dy[t ...],  then over the lanes

are `vector.lane_tile` with the weight in all lanes. The P - OW last places of a row are computed
and thrown away (dy is zero there). With stride S, the rows and columns of x are sorted by their
remainder modulo S into S*S planes, and every tap reads in one of them.

An item of work is one group of one image. Weight gradients are summed as in `conv2d_channels`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_channels import add_pixels
from minicnn.ops.conv2d_maps import Geometry, maps_of, number_of_parts, round_up
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    add,
    horizontal_sum,
    lane_count,
    lane_tile,
    lanes,
    load,
    multiples,
    offsets,
    splat,
    store,
    tile_add,
    tile_load,
    tile_repeat,
    tile_store,
    zeros,
)


class Plan(NamedTuple):
    """All that the kernels need to know of one geometry (source and target as in `Maps`)."""

    groups: int
    source_group: int  # channels
    # The buffer: planes of sub-planes of rows; a sub-plane for each remainder modulo the scale
    row_at: np.ndarray  # (rows,) where each source row starts in a plane
    column_at: np.ndarray  # (columns,) and its columns from there
    dense: bool  # nothing to sort: a source row stays a row
    pitch: int  # P
    plane: int
    source_size: int
    # One group of the target, and its buffer: for every channel the places of all phases
    target_group: int
    target_rows: int
    target_columns: int
    target_plane: int
    # Phases: where their places go in the target, and how many
    row_start: np.ndarray  # (phases,)
    row_step: int
    rows: np.ndarray  # (phases,)
    column_start: np.ndarray  # (phases,)
    column_step: int
    columns: np.ndarray  # (phases,)
    vectors: np.ndarray  # (phases,) of L places
    target_at: np.ndarray  # (phases,) first place in the buffer
    places: np.ndarray  # (vectors,) the first of each vector
    # Taps
    depth: np.ndarray  # (phases,) number of k
    taps_at: np.ndarray  # (phases,) where its taps begin in the two tables that follow
    cols: np.ndarray  # (taps,)
    weight_taps: np.ndarray  # (taps,) where tap k lies in w, from ...
    weight_channels: np.ndarray  # (target channels,) ... the filter (or channel)
    weight_start: np.ndarray  # (phases + 1,) where the packed weights of each phase start


@lru_cache(maxsize=256)
def _plan(geometry: Geometry, L: int) -> Plan:
    maps = maps_of(geometry)
    (SC, SH, SW), (TC, TH, TW) = maps.source, maps.target
    SG, KW = maps.source_group, geometry.window.kernel[1]
    row_scale, column_scale = maps.rows[0].scale, maps.columns[0].scale
    corner, ends = [], []  # of the buffer, unsorted: rows, columns
    for axis, size in ((maps.rows, SH), (maps.columns, SW)):
        reads = [(i, (a.places - 1) * a.scale + i + 1) for a in axis for i in a.offsets]
        corner.append(min([0, *(first for first, _ in reads)]))
        ends.append(max([size, *(end for _, end in reads)]))
    sub_rows = -(-(ends[0] - corner[0]) // row_scale)
    pitch = -(-(ends[1] - corner[1]) // column_scale)
    sub_plane = sub_rows * pitch
    plane = row_scale * column_scale * sub_plane

    phases = [(r, c) for r in maps.rows for c in maps.columns]
    depth = np.array([SG * len(r.taps) * len(c.taps) for r, c in phases])
    cols, weight_taps = [], []
    vectors = np.array([-(-((r.places - 1) * pitch + c.places) // L) for r, c in phases])
    for r, c in phases:
        at_row, at_column = np.array(r.offsets, int), np.array(c.offsets, int)
        row, row_rest = np.divmod(at_row - corner[0], row_scale)
        column, column_rest = np.divmod(at_column - corner[1], column_scale)
        at = np.add.outer(
            row_rest * column_scale * sub_plane + row * pitch, column_rest * sub_plane + column
        )
        tap = np.add.outer(np.array(r.taps, int) * KW, np.array(c.taps, int))
        channel = np.arange(SG)
        cols.append(np.add.outer(channel * plane, at).ravel())
        weight_taps.append(np.add.outer(channel * maps.source_weight, tap).ravel())
    h, h_rest = np.divmod(np.arange(SH) - corner[0], row_scale)
    w, w_rest = np.divmod(np.arange(SW) - corner[1], column_scale)
    # Beyond the last row, some lanes read on.
    reach = max(at.max(initial=0) + n * L for at, n in zip(cols, vectors))
    return Plan(
        groups=SC // SG,
        source_group=SG,
        row_at=h_rest * column_scale * sub_plane + h * pitch,
        column_at=w_rest * sub_plane + w,
        dense=row_scale == column_scale == 1,
        pitch=pitch,
        plane=plane,
        source_size=round_up(max(SG * plane, int(reach)), L),
        target_group=maps.target_group,
        target_rows=TH,
        target_columns=TW,
        target_plane=int(vectors.sum()) * L,
        row_start=np.array([r.start for r, _ in phases]),
        row_step=maps.rows[0].step,
        rows=np.array([r.places for r, _ in phases]),
        column_start=np.array([c.start for _, c in phases]),
        column_step=maps.columns[0].step,
        columns=np.array([c.places for _, c in phases]),
        vectors=vectors,
        target_at=(np.cumsum(vectors) - vectors) * L,
        places=np.arange(vectors.max(), dtype=np.int32) * L,
        depth=depth,
        taps_at=np.cumsum(depth) - depth,
        cols=np.concatenate(cols).astype(np.int32),
        weight_taps=np.concatenate(weight_taps),
        weight_channels=maps.target_weight,
        weight_start=np.cumsum([0, *depth]) * (TC * L),
    )


# ---------------------------------------------------------------- packing


@kernel(inline=True)
def _copy_rows(a, i, a_row, out, o, out_row, rows, n):
    """Copy `rows` rows of n numbers: from a[i], a_row apart, to out[o], out_row apart."""
    L = lane_count(a)
    for _ in range(rows):
        if n >= L:
            for k in range(0, n, L):
                k = min(k, n - L)  # the last vector overlaps the one before
                store(out, o + k, load(a, i + k))
        else:
            for k in range(n):
                out[o + k] = a[i + k]
        i += a_row
        o += out_row


@kernel(inline=True)
def _pack_source(x, item, plan, out):
    """Lay the planes of one group of one image out, with zeros around and between the rows."""
    out[:] = 0
    H, W = plan.row_at.size, plan.column_at.size
    for c in range(plan.source_group):
        at, to = (item * plan.source_group + c) * H * W, c * plan.plane
        if plan.dense:
            to += plan.row_at[0] + plan.column_at[0]
            _copy_rows(x, at, W, out, to, plan.pitch, H, W)
        else:
            for h in range(H):
                for j in range(W):
                    out[to + plan.row_at[h] + plan.column_at[j]] = x[at + h * W + j]


@kernel(inline=True)
def _unpack(target, item, plan, y):
    """Bring the places of all phases to the target planes of one group of one image."""
    TH, TW, P = plan.target_rows, plan.target_columns, plan.pitch
    for t in range(plan.target_group):
        for a in range(plan.depth.size):
            at = t * plan.target_plane + plan.target_at[a]
            to = (item * plan.target_group + t) * TH * TW
            to += plan.row_start[a] * TW + plan.column_start[a]
            rows, columns, row = plan.rows[a], plan.columns[a], plan.row_step * TW
            if plan.column_step == 1:
                _copy_rows(target, at, P, y, to, row, rows, columns)
            else:
                for i in range(rows):
                    for j in range(columns):
                        y[to + i * row + j * plan.column_step] = target[at + i * P + j]


@kernel(inline=True)
def _pack_target(dy, item, plan, target):
    """Lay the planes of dy out as places, with zeros where the forward threw places away."""
    target[:] = 0
    OH, OW = plan.target_rows, plan.target_columns
    for t in range(plan.target_group):
        at = (item * plan.target_group + t) * OH * OW
        _copy_rows(dy, at, OW, target, t * plan.target_plane, plan.pitch, OH, OW)


@kernel()
def _pack_weights(w, plan, channel, out):
    """Write every weight of one target channel to all lanes of a vector."""
    for a in range(plan.depth.size):
        depth = plan.depth[a]
        at = plan.weight_start[a] + channel * depth * lane_count(w)
        for k in range(depth):
            tap = w[plan.weight_channels[channel] + plan.weight_taps[plan.taps_at[a] + k]]
            store(out, at + k * lane_count(w), splat(tap))


# ---------------------------------------------------------------- products


@kernel(inline=True)
def plane_products(x, cols, first, depth, vectors, w, w0, bias, b0, y, y0):
    """``y[y0 + t] = bias[b0] + sum over k of x[t + cols[first + k]] * w[w0][k]``."""
    L, acc = lane_count(w), zeros(w, ROWS)
    for v in range(0, vectors, ROWS):
        rows = multiples(v, vectors - 1, L, ROWS)  # past the end: the last vector again
        sums = tile_repeat(acc, bias, b0, ROWS)
        for k in range(0, depth, BLOCK):
            n = min(BLOCK, depth - k)
            sums = tile_add(sums, lane_tile(acc, x, 0, rows, cols, first + k, n, w, w0 + k * L, L))
        tile_store(sums, y, y0, rows)


@kernel(inline=True)
def plane_gradients(x, cols, depth, places, vectors, dy, dy0, dw, w0):
    """``dw[w0][k] += sum over places t of x[t + cols[k]] * dy[dy0 + t]``, lane by lane."""
    L, acc = lane_count(dw), zeros(dw, ROWS)
    for k in range(0, depth, ROWS):
        rows = offsets(cols, k, depth - 1, ROWS)
        to = multiples(k, depth - 1, L, ROWS)
        sums = tile_load(acc, dw, w0, to)
        for v in range(0, vectors, BLOCK):
            n = min(BLOCK, vectors - v)
            sums = tile_add(sums, lane_tile(acc, x, 0, rows, places, v, n, dy, dy0 + v * L, L))
        tile_store(sums, dw, w0, to)


# ---------------------------------------------------------------- whole batches


@kernel(inline=True)
def _correlate_item(x, w, bias, y, item, plan, source, target):
    L = lane_count(w)
    _pack_source(x, item, plan, source)
    for t in range(plan.target_group):
        channel = item % plan.groups * plan.target_group + t
        for a in range(plan.depth.size):
            depth = plan.depth[a]
            w0, y0 = plan.weight_start[a] + channel * depth * L, plan.target_at[a]
            args = (
                source,
                plan.cols,
                plan.taps_at[a],
                depth,
                plan.vectors[a],
                w,
                w0,
                bias,
                channel * L,
            )
            plane_products(*args, target, t * plan.target_plane + y0)
    _unpack(target, item, plan, y)


@kernel(inline=True)
def _gradient_item(x, dy, item, plan, source, target, dw, db):
    L = lane_count(dw)
    _pack_source(x, item, plan, source)
    _pack_target(dy, item, plan, target)
    depth, vectors = plan.depth[0], plan.vectors[0]
    for t in range(plan.target_group):
        channel = item % plan.groups * plan.target_group + t
        at = t * plan.target_plane
        args = (source, plan.cols, depth, plan.places, vectors, target, at)
        plane_gradients(*args, dw, channel * depth * L)
        add_pixels(target, at, vectors, L, db, channel * L)


@kernel()
def _reduce_channel(dws, dbs, channel, plan, dw, db):
    """Add the partial sums of one channel in order, then their lanes."""
    L, depth = lane_count(dw), plan.depth[0]
    for k in range(depth + 1):  # the last one is the bias
        parts, at = (dws, (channel * depth + k) * L) if k < depth else (dbs, channel * L)
        total = load(parts[0], at)
        for part in range(1, len(parts)):
            total = add(total, load(parts[part], at))
        if k < depth:
            dw[plan.weight_channels[channel] + plan.weight_taps[k]] = horizontal_sum(total)
        else:
            db[channel] = horizontal_sum(total)


@kernel(parallel=True)
def _correlate(x, w, bias, y, items, plan, packed, sources, targets):
    for channel in numba.prange(plan.weight_channels.size):
        _pack_weights(w, plan, channel, packed)
    threads = len(sources)
    for t in numba.prange(threads):
        source, target = sources[t], targets[t]
        for item in range(t * items // threads, (t + 1) * items // threads):
            _correlate_item(x, packed, bias, y, item, plan, source, target)


@kernel(parallel=True)
def _gradient(x, dy, dw, db, items, plan, sources, targets, dws, dbs):
    threads, parts = len(sources), len(dws)
    for t in numba.prange(threads):
        for part in range(t * parts // threads, (t + 1) * parts // threads):
            source, target, dw_, db_ = sources[t], targets[t], dws[part], dbs[part]
            dw_[:] = 0
            db_[:] = 0
            for item in range(part * items // parts, (part + 1) * items // parts):
                _gradient_item(x, dy, item, plan, source, target, dw_, db_)
    for channel in numba.prange(db.size):
        _reduce_channel(dws, dbs, channel, plan, dw, db)


# ---------------------------------------------------------------- called from conv2d_numba


def correlate(geometry: Geometry, x: Array, w: Array, b: Array | None, y: Array) -> None:
    """Write the correlation of x with w to y or, for the adjoint, of dy (as x) to dx (as y)."""
    L = lanes(x.dtype)
    plan = _plan(geometry, L)
    channels = plan.weight_channels.size
    bias = np.repeat(np.zeros(channels, x.dtype) if b is None else b, L)
    threads = numba.get_num_threads()
    target = plan.target_group * plan.target_plane
    Call(
        _correlate,
        (flat(x), flat(w), bias, y.reshape(-1), len(x) * plan.groups, plan),
        x.dtype,
        ((1, int(plan.weight_start[-1])), (threads, plan.source_size), (threads, target)),
        lambda packed, *own: (packed[0], *own),
    )()


def weight_gradient(geometry: Geometry, x: Array, dy: Array, dw: Array, db: Array) -> None:
    """Write the gradients of w and b to dw and db; the geometry is the forward's."""
    L = lanes(x.dtype)
    plan = _plan(geometry, L)
    items, size = len(x) * plan.groups, int(plan.weight_start[-1])
    parts = number_of_parts(items, size * x.itemsize)
    threads = numba.get_num_threads()
    target = plan.target_group * plan.target_plane
    Call(
        _gradient,
        (flat(x), flat(dy), dw.reshape(-1), db, items, plan),
        x.dtype,
        ((threads, plan.source_size), (threads, target), (parts, size), (parts, db.size * L)),
    )()
