# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""linear in Numba: three matrix products that read w, and write dw, as they lie in memory.

    y[m, o]  = sum over i of x[m, i] * w[o, i]      both run along i: vectors of products, added up
    dw[o, i] = sum over m of dy[m, o] * x[m, i]     lanes are inputs i, dy is spread over them
    dx[m, i] = sum over o of dy[m, o] * w[o, i]     the same

so w needs no transposition, and one row, which has to read all of w for a single product with each
weight, runs as fast as memory. x may be a map with its channels in the lanes, (N, H, W, P): input
i of its flattening stands at channel i // (H*W) and pixel i % (H*W). It is brought into that order
in pieces that stay in the cache.

Threads share out rows or outputs in the forward, and inputs in the backward. Each number is added
up by one thread, in an order that depends on the shapes alone.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import round_up
from minicnn.ops.copy_numba import clear, collect, copy
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.packed import pack, unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    VECTOR_BYTES,
    add,
    dot_tile,
    horizontal_sums,
    lane_count,
    lanes,
    load_part,
    multiples,
    outer_tile,
    store_part,
    tile_add,
    tile_load,
    tile_store,
    where_positive,
    zero,
    zeros,
)

WIDE = 2 * ROWS  # vectors of a tile
CHUNK = 256  # rows of x that are brought into order at a time
BLOCKS = 8  # of inputs, for the threads to share


class Shape(NamedTuple):
    """x's rows, and where its numbers lie: input i of row m at ``m*row + i % places * pitch +
    i // places``."""

    M: int
    inputs: int
    outputs: int
    row: int
    places: int  # pixels of a map
    pitch: int


class Plan(NamedTuple):
    """Sizes of the backward and the tables of offsets of its products."""

    block: int  # inputs of an item of work ...
    width: int  # ... rounded up to whole panels
    chunk: int  # rows at a time
    row_at: np.ndarray  # (M,) multiples of the outputs
    output_at: np.ndarray  # (outputs,) 0, 1, 2 ...


_unpack_shape = unpacker(Shape, {})
_unpack = unpacker(Plan, {"int32 1": "row_at output_at"})


@lru_cache(maxsize=256)
def _plan(shape: Shape, panel: int, L: int) -> tuple[Plan, np.ndarray]:
    """Return the plan, and the plan as kernels get it."""
    channels = shape.inputs // shape.places
    least = -(-2 * L // shape.places)
    block = max(least, min(max(1, 16 * L // shape.places), -(-channels // BLOCKS))) * shape.places
    plan = Plan(
        block=block,
        width=round_up(min(block, shape.inputs), panel),
        chunk=min(CHUNK, max(1, shape.M)),
        row_at=(np.arange(shape.M) * shape.outputs).astype(np.int32),
        output_at=np.arange(shape.outputs, dtype=np.int32),
    )
    return plan, pack(plan)


def shape_of(x: Array, w: Array) -> Shape:
    outputs, inputs = w.shape
    if x.ndim == 2:
        return Shape(len(x), inputs, outputs, inputs, 1, inputs)
    N, H, W, P = x.shape
    return Shape(N, inputs, outputs, H * W * P, H * W, P)


@kernel()
def _gather(x, first, count, begin, end, shape, out, width):
    """Copy inputs begin .. end of some rows in order, followed by zeros up to `width`."""
    places = shape.places
    for m in range(count):
        row, to = (first + m) * shape.row, m * width
        if places == 1:
            copy(x, row + begin, end - begin, out, to)
        else:
            for c in range(begin // places, end // places):
                collect(x, row + c, shape.pitch, places, out, to + c * places - begin)
        clear(out, to + end - begin, width - end + begin)


# ---------------------------------------------------------------- forward


@kernel()
def _multiply(x, w, tails, b, y, rows, outs, shape, width, R, S, relu):
    """Compute the outputs in a range of rows and outputs; x's rows are `width` apart."""
    L = lane_count(w)
    inputs, outputs = shape.inputs, shape.outputs
    whole = inputs // L
    for o in range(outs[0], outs[1], len(S)):
        others = multiples(o, outs[1] - 1, inputs, S)  # past the end: the last output again
        tail = multiples(o, outs[1] - 1, L, S)
        for m in range(rows[0], rows[1], len(R)):
            mine = multiples(m, rows[1] - 1, width, R)
            total = dot_tile(x, whole * L, mine, tails, 0, tail, 1 if whole * L < inputs else 0)
            for k in range(0, whole, BLOCK):
                n = min(BLOCK, whole - k)
                total = tile_add(total, dot_tile(x, k * L, mine, w, k * L, others, n))
            sums, i = horizontal_sums(total), 0
            for r in range(len(R)):
                for s in range(len(S)):
                    if m + r < rows[1] and o + s < outs[1]:
                        value = sums[i] + b[o + s] if b.size else sums[i]
                        y[(m + r) * outputs + o + s] = 0.0 if relu and value <= 0 else value
                    i += 1


@kernel(parallel=True)
def _forward(x, w, b, y, table, R, S, relu, threads, packed, packed_read, tails, tails_read):
    L = lane_count(w)
    shape = _unpack_shape(table)
    inputs, outputs = shape.inputs, shape.outputs
    whole = inputs // L * L
    if whole < inputs:
        for o in range(outputs):
            copy(w, o * inputs + whole, inputs - whole, tails, o * L)
            clear(tails, o * L + inputs - whole, L - inputs + whole)
    width = packed.size // max(1, shape.M)
    by_rows = threads * len(R) <= shape.M
    if width and not by_rows:
        _gather(x, 0, shape.M, 0, inputs, shape, packed, width)
    for t in numba.prange(threads):
        shape = _unpack_shape(table)
        inputs, outputs = shape.inputs, shape.outputs
        rows, outs = (0, shape.M), (0, outputs)
        if by_rows:
            rows = t * shape.M // threads, (t + 1) * shape.M // threads
        else:
            outs = t * outputs // threads, (t + 1) * outputs // threads
        if width:
            if by_rows:
                count = rows[1] - rows[0]
                _gather(x, rows[0], count, 0, inputs, shape, packed[rows[0] * width :], width)
            _multiply(packed_read, w, tails_read, b, y, rows, outs, shape, width, R, S, relu)
        else:
            _multiply(x, w, tails_read, b, y, rows, outs, shape, inputs, R, S, relu)


def forward(x: Array, w: Array, b: Array | None, y: Array, *, relu: bool = False) -> None:
    """Write ``x w.T + b`` to y, or the larger of that and 0 with `relu`.

    x is (M, I), or (N, H, W, P) with channels in the lanes; w is (O, I) and y (M, O).
    """
    outputs(x, w, b, y, relu=relu)()


def outputs(x: Array, w: Array, b: Array | None, y: Array, *, relu: bool = False) -> Call:
    """Return what `forward` runs."""
    shape, L = shape_of(x, w), lanes(x.dtype)
    R, S = ((0,), (0,) * 8) if shape.M == 1 else ((0,) * 4, (0,) * (2 if VECTOR_BYTES == 32 else 4))
    in_order = shape.places == 1 and shape.inputs % L == 0
    packed = 0 if in_order else shape.M * round_up(shape.inputs, L)
    tails = 0 if shape.inputs % L == 0 else shape.outputs * L
    bias = flat(w[0, :0] if b is None else b)
    return Call(
        _forward,
        (
            flat(x),
            flat(w),
            bias,
            y.reshape(-1),
            pack(shape),
            R,
            S,
            relu,
            numba.get_num_threads(),
        ),
        x.dtype,
        ((1, packed), (1, tails)),
        lambda packs, ends: (packs[0], flat(packs), ends[0], flat(ends)),
    )


# ---------------------------------------------------------------- backward


@kernel()
def _weight_block(dy, first, count, begin, end, shape, plan, more, x, piece, dw):
    """Write dw of some inputs for some rows, or add it; x's rows are plan.width apart."""
    L = lane_count(x)
    panel, outputs = 2 * L, shape.outputs
    tile = multiples(0, ROWS - 1, panel, ROWS)
    for j in range(0, end - begin, panel):
        n = min(panel, end - begin - j)
        for o in range(0, outputs, ROWS):
            rows = multiples(o, outputs - 1, 1, ROWS)
            total = zeros(x, WIDE)
            for m in range(0, count, BLOCK):
                c, at = min(BLOCK, count - m), m * plan.width + j
                block = zeros(x, WIDE)
                block = outer_tile(block, dy, 0, rows, plan.row_at, first + m, c, x, at, plan.width)
                total = tile_add(total, block)
            if n == panel:
                places = multiples(o, outputs - 1, shape.inputs, ROWS)
                if more:
                    total = tile_add(tile_load(total, dw, begin + j, places), total)
                tile_store(total, dw, begin + j, places)
            else:
                tile_store(total, piece, 0, tile)
                for r in range(min(ROWS, outputs - o)):
                    at = (o + r) * shape.inputs + begin + j
                    for i in range(n):
                        value = piece[r * panel + i]
                        dw[at + i] = dw[at + i] + value if more else value


@kernel()
def _input_block(dy, w, first, count, begin, end, shape, plan, R, RV, masked, x, weights, out, dx):
    """Write dx of some inputs for some rows; w's rows are plan.width apart."""
    vectors = len(RV) // len(R)
    panel, outputs, width = vectors * lane_count(w), shape.outputs, plan.width
    for j in range(0, end - begin, panel):
        # Few rows: w where it lies.
        direct = count <= len(R) and j + panel <= end - begin
        b, bj, step = (w, begin + j, shape.inputs) if direct else (weights, j, width)
        for m in range(0, count, len(R)):
            rows = multiples(first + m, first + count - 1, outputs, R)
            total = zeros(w, RV)
            for o in range(0, outputs, BLOCK):
                c = min(BLOCK, outputs - o)
                block = zeros(w, RV)
                block = outer_tile(block, dy, 0, rows, plan.output_at, o, c, b, bj + o * step, step)
                total = tile_add(total, block)
            tile_store(total, out, j, multiples(m, count - 1, width, R))
    places = shape.places
    for m in range(count):
        row, at = (first + m) * shape.row, m * width
        if masked:
            for i in range(at, at + end - begin):
                out[i] = out[i] if x[i] > 0 else 0
        if places == 1:
            copy(out, at, end - begin, dx, row + begin)
        else:
            for s in range(places):
                to = row + s * shape.pitch + begin // places
                collect(out, at + s, places, (end - begin) // places, dx, to)


@kernel()
def _mask(y, dy):
    """Set dy to zero where y is not positive."""
    L = lane_count(y)
    for i in range(0, y.size, L):
        n = y.size - i
        part = where_positive(load_part(y, i, n, zero(y)), load_part(dy, i, n, zero(y)))
        store_part(dy, i, n, part)


@kernel()
def _bias_gradient(dy, M, accumulate, db):
    """Add up dy over its M rows, block by block."""
    L, outputs = lane_count(dy), db.size
    for o in range(0, outputs, L):
        n = outputs - o
        total = load_part(db, o, n, zero(dy)) if accumulate else zero(dy)
        for first in range(0, M, BLOCK):
            block = zero(dy)
            for m in range(first, min(M, first + BLOCK)):
                block = add(block, load_part(dy, m * outputs + o, n, zero(dy)))
            total = add(total, block)
        store_part(db, o, n, total)


@kernel(parallel=True)
def _backward(
    x,
    dy,
    w,
    y,
    masked_dy,
    dw,
    db,
    dx,
    shape_table,
    table,
    R,
    RV,
    accumulate,
    masked,
    taken,
    xs,
    weights,
    weights_read,
    out,
):
    _mask(y, masked_dy)  # which is dy itself: the same memory
    taken[0] = 0
    for t in numba.prange(len(xs)):
        shape, plan = _unpack_shape(shape_table), _unpack(table)
        outputs, M = shape.outputs, shape.M
        mine, panel, panel_read, rows = xs[t], weights[t], weights_read[t], out[t]
        items = (shape.inputs + plan.block - 1) // plan.block
        item = take(taken, 0)
        while item < items:
            begin = item * plan.block
            end = min(shape.inputs, begin + plan.block)
            if dx.size and (len(R) < M or (end - begin) % plan.width):
                for o in range(outputs):
                    at, row = o * plan.width, o * shape.inputs
                    copy(w, row + begin, end - begin, panel, at)
                    clear(panel, at + end - begin, plan.width - end + begin)
            for m in range(0, M, plan.chunk):
                c = min(plan.chunk, M - m)
                _gather(x, m, c, begin, end, shape, mine, plan.width)
                more = accumulate or m > 0
                _weight_block(dy, m, c, begin, end, shape, plan, more, mine, rows, dw)
                if dx.size:
                    _input_block(
                        dy, w, m, c, begin, end, shape, plan, R, RV, masked, mine, panel_read,
                        rows, dx,
                    )  # fmt: skip
            channels = shape.inputs // shape.places
            if channels < shape.pitch and dx.size and item == items - 1:
                for i in range(M * shape.places):
                    at = i // shape.places * shape.row + i % shape.places * shape.pitch
                    clear(dx, at + channels, shape.pitch - channels)
            item = take(taken, 0)
        if t == 0 and db.size:
            _bias_gradient(dy, M, accumulate, db)


def backward(
    dy: Array,
    x: Array,
    w: Array,
    dw: Array,
    db: Array | None,
    dx: Array | None = None,
    *,
    y: Array | None = None,
    masked: bool = False,
    accumulate: bool = False,
) -> None:
    """Write the gradients of `forward`, or add dw and db to what is there with `accumulate`.

    Shapes are those of `forward`, dx's is x's. Two ways take a ReLU along: with its output `y`,
    where that followed (dy is set to 0, in place, where y is not positive), and with `masked`
    where x itself is a ReLU's output (then dx is the gradient before that ReLU).
    """
    gradients(dy, x, w, dw, db, dx, y=y, masked=masked, accumulate=accumulate)()


def gradients(
    dy: Array,
    x: Array,
    w: Array,
    dw: Array,
    db: Array | None,
    dx: Array | None = None,
    *,
    y: Array | None = None,
    masked: bool = False,
    accumulate: bool = False,
) -> Call:
    """Return what `backward` runs."""
    shape, L = shape_of(x, w), lanes(x.dtype)
    R, RV = ((0,), (0,) * 8) if shape.M == 1 else ((0,) * ROWS, (0,) * (2 * ROWS))
    plan, table = _plan(shape, len(RV) // len(R) * L if shape.M == 1 else 2 * L, L)
    threads = numba.get_num_threads()
    rows = plan.chunk * plan.width
    piece = max(rows, 2 * ROWS * L)
    weights = plan.width * shape.outputs
    empty = dw.reshape(-1)[:0]

    def shaped(xs: Array, ws: Array, out: Array) -> tuple[Array, ...]:
        return xs, ws, flat(ws).reshape(threads, -1), out

    return Call(
        _backward,
        (
            flat(x),
            flat(dy),
            flat(w),
            flat(empty if y is None else y),
            empty if y is None else dy.reshape(-1),
            dw.reshape(-1),
            empty if db is None else db,
            empty if dx is None else dx.reshape(-1),
            pack(shape),
            table,
            R,
            RV,
            accumulate,
            masked,
            np.zeros(1, np.int64),
        ),
        x.dtype,
        ((threads, rows), (threads, weights), (threads, piece)),
        shaped,
    )
