# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""conv2d by Winograd's method: 3x3 and 5x5 kernels, with far fewer products.

The output is cut into tiles of M x M. All maps are in layout LAST, (N, H, W, P) with channels in
the lanes (see `minicnn.ops.last`), so every step works on whole vectors:

    V = B' x B        of the T x T patch under each tile, for each channel     (T*T, tiles, C)
    U = G w G'        of each pair of channel and filter                       (T*T, C, F)
    m[k] = V[k] U[k]  T*T matrix products                                      (T*T, tiles, F)
    y = A' m A        M x M outputs, then bias, ReLU and max-pool              (tiles, M, M, F)

F(4x4, 3x3) does with 36 products what takes 144, F(4x4, 5x5) with 64 what takes 400. The gradient
of x is the same with w turned round and its channels and filters swapped. That of w is a
correlation too, of a patch of x with a tile of dy: F(3x3, 4x4), or F(5x5, 4x4). A 3x3 kernel of
stride 2 takes 81 products for 144 (see `minicnn.ops.winograd`), with tiles of 8 x 8 for dx.

It costs accuracy: the points 2 and -2 make the sums some ten times as sensitive to rounding. In
float32 the error is up to about 3e-5 of the largest output, where the direct kernels have 1e-6.
Numbers near the largest float may overflow inside.

An item of work is a number of tiles whose arrays stay in the cache of a core. For dw, whose sums
go through the cache once an item, it has more tiles if the sums are large. They are taken in parts
that depend on the shapes alone, so any number of threads gives the same bits; nothing passes from
core to core until the parts are added up.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.conv2d_maps import number_of_parts, round_up
from minicnn.ops.conv_block import OFF
from minicnn.ops.jit import Call, flat, kernel
from minicnn.ops.last import padded, to_first, to_last
from minicnn.ops.packed import pack, unpacker
from minicnn.ops.share import take
from minicnn.ops.vector import (
    BLOCK,
    ROWS,
    VECTOR_BYTES,
    add,
    lane_count,
    lanes,
    load,
    maximum,
    multiples,
    offsets,
    outer_tile,
    relu_winner,
    store,
    take_larger,
    tile_add,
    tile_load,
    tile_store,
    winner_of,
    zero,
    zeros,
)
from minicnn.ops.winograd import (
    OUTPUTS,
    Form,
    form_of,
    lengths,
    load_grid,
    transform_filter,
    transform_input,
    transform_output,
)
from minicnn.shapes import Window

WIDE = 2 * ROWS  # vectors of a block of products, on panels of two vectors
OUTSIDE = -(1 << 40)  # the offset of a row or column of padding
L2_BYTES = 1 << 20
ITEM_BYTES = 640 << 10  # of an item's transformed tiles: most of an L2 cache
SIZES = 3, 5  # R


class Plan(NamedTuple):
    """Sizes and tables of one geometry; "source" is what is read, "target" what is written."""

    source_image: int
    target_image: int
    C: int  # channels of the source
    P: int  # and as they lie in memory
    F: int  # filters of the target
    Q: int
    tile_rows: int
    tile_columns: int
    target_rows: int
    target_columns: int
    rows: np.ndarray  # (tile_rows * D,) where the rows of a tile's patch begin in an image
    columns: np.ndarray  # (tile_columns * D,)
    dy_rows: np.ndarray  # (tile_rows * M,) where those of the tile begin in the target
    dy_columns: np.ndarray  # (tile_columns * M,)
    channels: np.ndarray  # (C,) where a channel is in a matrix of the transformed source, from ...
    tiles: np.ndarray  # (item,) ... where the tile begins
    products: int  # of a tile
    item: int  # tiles of an item of work
    parts: int  # of the sums of dw
    source_step: int  # from one of its T*T matrices to the next
    target_step: int
    pool_rows: int
    pool_columns: int


_unpack = unpacker(
    Plan, {"int64 1": "rows columns dy_rows dy_columns", "int32 1": "channels tiles"}
)


@lru_cache(maxsize=256)
def _plan(
    N: int, C: int, H: int, W: int, F: int, OH: int, OW: int, top: int, left: int,
    form: Form, pool: tuple[int, int], L: int, forward: bool,
) -> tuple[Plan, np.ndarray]:  # fmt: skip
    """Return the plan, and the plan as kernels get it."""
    D, M, T, _ = form
    P, Q = round_up(C, L), round_up(F, L)
    # Tiles that a floor-mode pool drops are not computed.
    used_rows, used_columns = OH // pool[0] * pool[0], OW // pool[1] * pool[1]
    tile_rows, tile_columns = -(-used_rows // M), -(-used_columns // M)

    parts, tile_bytes = 1, T * T * (P + Q) * (VECTOR_BYTES // L)
    item = max(ROWS, min(32, ITEM_BYTES // tile_bytes) // ROWS * ROWS)
    channels, tiles = np.arange(C), np.arange(item) * P  # (tile, channel)
    if not forward:
        # The products of the gradient run along the tiles: they lie next to each other, in panels
        # of a vector of channels (of two in the target, see `_products`).
        sums = T * T * C * Q * (VECTOR_BYTES // L)
        if sums <= ITEM_BYTES:  # they stay in the L2 cache with the tiles
            most = max(16, (L2_BYTES - sums) // tile_bytes)
        else:  # the tiles outweigh them
            most = max(BLOCK, 2 * sums // tile_bytes)
        count = max(1, N * tile_rows * tile_columns)
        parts = number_of_parts(-(-count // ROWS), sums)
        each = -(-count // parts)
        item = round_up(-(-each // -(-each // most)), ROWS)
        channels, tiles = channels // L * (item * L) + channels % L, np.arange(item) * L

    def patch(tiles: int, step: int, before: int, width: int, size: int, unit: int) -> np.ndarray:
        at = (np.arange(tiles)[:, None] * step - before + np.arange(width)).ravel()
        return np.where((at >= 0) & (at < size), at * unit, OUTSIDE)

    plan = Plan(
        source_image=H * W * P,
        target_image=OH * OW * Q,
        C=C,
        P=P,
        F=F,
        Q=Q,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        target_rows=OH,
        target_columns=OW,
        rows=patch(tile_rows, form.step, top, D, H, W * P),
        columns=patch(tile_columns, form.step, left, D, W, P),
        dy_rows=patch(tile_rows, M, 0, M, OH, OW * Q),
        dy_columns=patch(tile_columns, M, 0, M, OW, Q),
        channels=channels.astype(np.int32),
        tiles=tiles.astype(np.int32),
        products=T * T,
        item=item,
        parts=parts,
        source_step=item * P + L,  # a multiple of 4 KiB would throw T*T lines on one cache set
        target_step=item * Q + L,
        pool_rows=pool[0],
        pool_columns=pool[1],
    )
    return plan, pack(plan)


# ---------------------------------------------------------------- transforms of an item


@kernel()
def _transform_source(x, first, count, plan, patch, square, none, out):
    """Write V of some tiles, the item's."""
    L, D = lane_count(x), len(patch)
    each = plan.tile_rows * plan.tile_columns
    places = multiples(0, len(square) - 1, plan.source_step, square)
    for g in range(count):
        n, q = (first + g) // each, (first + g) % each
        i, j = q // plan.tile_columns, q % plan.tile_columns
        rows = offsets(plan.rows, i * D, i * D + D - 1, patch)
        columns = offsets(plan.columns, j * D, j * D + D - 1, patch)
        for c in range(0, plan.P, L):
            read = load_grid(x, n * plan.source_image + c, rows, columns, none)
            at = plan.tiles[g] + plan.channels[c]
            tile_store(transform_input(read), out, at, places)


@kernel()
def _transform_gradient(dy, first, count, plan, grid, side, square, none, out):
    """Write the transforms of some tiles of dy, panel by panel: ``out[k, panel, tile, f]``."""
    L, M = lane_count(dy), len(grid)
    each = plan.tile_rows * plan.tile_columns
    places = multiples(0, len(square) - 1, plan.target_step, square)
    for g in range(count):
        n, q = (first + g) // each, (first + g) % each
        i, j = q // plan.tile_columns, q % plan.tile_columns
        rows = offsets(plan.dy_rows, i * M, i * M + M - 1, grid)
        columns = offsets(plan.dy_columns, j * M, j * M + M - 1, grid)
        for f in range(0, plan.Q, L):
            tile = load_grid(dy, n * plan.target_image + f, rows, columns, none)
            panel = f // (2 * L) * (2 * L)
            at = panel * plan.item + g * min(2 * L, plan.Q - panel) + f - panel
            tile_store(transform_filter(tile, side), out, at, places)


@kernel()
def _transform_target(
    products, first, count, plan, grid, square, bias, relu, more, scratch, y, winner
):
    """Write y of some tiles, or add to it if `more`; or the pooled y and who won."""
    L, M = lane_count(y), len(grid)
    each = plan.tile_rows * plan.tile_columns
    places = multiples(0, len(square) - 1, plan.target_step, square)
    acc = zeros(y, square)
    line = multiples(0, 0, 0, 1)
    KH, KW = plan.pool_rows, plan.pool_columns
    PH, PW = plan.target_rows // KH, plan.target_columns // KW
    for g in range(count):
        n, q = (first + g) // each, (first + g) % each
        i, j = q // plan.tile_columns * M, q % plan.tile_columns * M
        height, width = min(M, plan.target_rows - i), min(M, plan.target_columns - j)
        for f in range(0, plan.Q, L):
            product = tile_load(acc, products, g * plan.Q + f, places)
            tile_store(transform_output(product, grid), scratch, 0, line)
            b = load(bias, f)
            if KH * KW == 1:
                for r in range(height):
                    to = n * plan.target_image + ((i + r) * plan.target_columns + j) * plan.Q + f
                    for s in range(width):
                        v = add(load(scratch, (r * M + s) * L), b)
                        if more:
                            v = add(load(y, to + s * plan.Q), v)
                        store(y, to + s * plan.Q, maximum(zero(y), v) if relu else v)
            else:  # the windows lie within the tiles
                for r in range(0, height - KH + 1, KH):
                    for s in range(0, width - KW + 1, KW):
                        best = add(load(scratch, (r * M + s) * L), b)
                        who = winner_of(0, y)
                        for p in range(KH):
                            for t in range(KW):
                                v = add(load(scratch, ((r + p) * M + s + t) * L), b)
                                best, who = take_larger(best, who, v, p * KW + t)
                        to = ((n * PH + (i + r) // KH) * PW + (j + s) // KW) * plan.Q + f
                        if relu:
                            best, who = relu_winner(best, who, OFF)
                        store(y, to, best)
                        if winner.size:
                            store(winner, to, who)


# ---------------------------------------------------------------- products of an item


@kernel(inline=True)
def _panel_products(acc, v, u, f, k, count, plan, out):
    """``out[k, tile, f ...] = sum over c of v[k, tile, c] * u[k, c, f ...]``, on one panel."""
    width = lane_count(u) * (len(acc) // ROWS)
    v0, u0, out0 = k * plan.source_step, (k * plan.Q + f) * plan.C, k * plan.target_step + f
    for t in range(0, count, ROWS):
        rows = offsets(plan.tiles, t, count - 1, ROWS)  # past the end: the last tile again
        sums = outer_tile(acc, v, v0, rows, plan.channels, 0, min(BLOCK, plan.C), u, u0, width)
        for c in range(BLOCK, plan.C, BLOCK):
            n, at = min(BLOCK, plan.C - c), u0 + c * width
            block = outer_tile(acc, v, v0, rows, plan.channels, c, n, u, at, width)
            sums = tile_add(sums, block)
        tile_store(sums, out, out0, multiples(t, count - 1, plan.Q, ROWS))


@kernel()
def _products(v, u, count, plan, out):
    L = lane_count(u)
    for k in range(plan.products):
        for f in range(0, plan.Q, 2 * L):
            if f + L < plan.Q:
                _panel_products(zeros(u, WIDE), v, u, f, k, count, plan, out)
            else:
                _panel_products(zeros(u, ROWS), v, u, f, k, count, plan, out)


@kernel(inline=True)
def _panel_gradients(acc, v, d, f, k, count, plan, du, more):
    """``du[k, c, f ...] = sum over tiles of v[k, tile, c] * d[k, tile, f ...]``, on one panel.

    Added to what is there if `more`.
    """
    width = lane_count(d) * (len(acc) // ROWS)
    v0, d0 = k * plan.source_step, k * plan.target_step + f * plan.item
    at = k * plan.C * plan.Q + f
    for c in range(0, plan.C, ROWS):
        rows = offsets(plan.channels, c, plan.C - 1, ROWS)
        places = multiples(c, plan.C - 1, plan.Q, ROWS)
        for g in range(0, count, BLOCK):
            n = min(BLOCK, count - g)
            sums = outer_tile(acc, v, v0, rows, plan.tiles, g, n, d, d0 + g * width, width)
            if more or g > 0:  # loaded now: there are registers for one block alone
                sums = tile_add(tile_load(acc, du, at, places), sums)
            tile_store(sums, du, at, places)


@kernel()
def _gradients(v, d, count, plan, du, more):
    L = lane_count(d)
    for k in range(plan.products):
        for f in range(0, plan.Q, 2 * L):
            if f + L < plan.Q:
                _panel_gradients(zeros(d, WIDE), v, d, f, k, count, plan, du, more)
            else:
                _panel_gradients(zeros(d, ROWS), v, d, f, k, count, plan, du, more)


# ---------------------------------------------------------------- filters


@kernel()
def _transform_filter(w, first, turned, plan, taps, side, square, scratch, u):
    """Write U of a vector of channels of the source, panel by panel: ``u[k, panel, c, f]``.

    Filter f of source channel c is ``w[f, c]``, or of the adjoint ``w[c, f]`` turned round.
    """
    L, K = lane_count(w), len(taps)
    places = multiples(0, len(square) - 1, plan.C * plan.Q, square)
    for f in range(0, plan.Q, L):
        panel = f // (2 * L) * (2 * L)
        width = min(2 * L, plan.Q - panel)
        for c in range(first, min(first + L, plan.C)):  # lanes a whole filter apart share lines
            at, step = (c * plan.F * K, K) if turned else (c * K, plan.C * K)
            for lane in range(L):
                there, start = f + lane < plan.F, at + (f + lane) * step
                for k in range(K):
                    # Unsigned: no index is tried for being negative.
                    tap = np.uint64(start + (K - 1 - k if turned else k))
                    scratch[np.uint64(k * L + lane)] = w[tap] if there else 0
            g = tile_load(zeros(w, taps), scratch, 0, multiples(0, K - 1, L, taps))
            to = panel * plan.C + c * width + f - panel
            tile_store(transform_filter(g, side), u, to, places)


@kernel()
def _write_filter(du, first, plan, taps, grid, square, scratch, dw):
    """Write dw of a vector of channels, (F, C, K) flat, from the sums ``du[k, c, f]``."""
    L, K = lane_count(du), len(taps)
    acc = zeros(du, square)
    places = multiples(0, len(square) - 1, plan.C * plan.Q, square)
    for f in range(0, plan.Q, L):
        for c in range(first, min(first + L, plan.C)):
            product = tile_load(acc, du, c * plan.Q + f, places)
            tile_store(transform_output(product, grid), scratch, 0, multiples(0, 0, 0, 1))
            for lane in range(min(L, plan.F - f)):
                at = ((f + lane) * plan.C + c) * K
                for k in range(K):
                    dw[at + k] = scratch[k * L + lane]


# ---------------------------------------------------------------- whole batches


@kernel(parallel=True)
def _correlate(
    x, w, turned, bias, relu, more, y, winner, N, table, patch, grid, corner, none, taken,
    u, vs, ms, scratch,
):  # fmt: skip
    taken[:] = 0
    for t in numba.prange(len(vs)):
        plan, mine = _unpack(table), scratch[t]
        taps, side, square = lengths(patch, corner)
        c = take(taken, 0) * lane_count(w)
        while c < plan.C:
            _transform_filter(w, c, turned, plan, taps, side, square, mine, u)
            c = take(taken, 0) * lane_count(w)
    for t in numba.prange(len(vs)):
        plan, v, m, mine = _unpack(table), vs[t], ms[t], scratch[t]
        _, _, square = lengths(patch, corner)
        tiles = N * plan.tile_rows * plan.tile_columns
        first = take(taken, 1) * plan.item
        while first < tiles:
            count = min(plan.item, tiles - first)
            _transform_source(x, first, count, plan, patch, square, none, v)
            _products(v, u, count, plan, m)
            _transform_target(
                m, first, count, plan, grid, square, bias, relu, more, mine, y, winner
            )
            first = take(taken, 1) * plan.item


@kernel(parallel=True)
def _gradient(x, dy, dw, N, table, patch, grid, corner, none, taken, vs, ds, dus, scratch):
    taken[:] = 0
    for t in numba.prange(len(vs)):
        plan, v, d = _unpack(table), vs[t], ds[t]
        _, side, square = lengths(patch, corner)
        tiles, parts = N * plan.tile_rows * plan.tile_columns, len(dus)
        part = take(taken, 0)
        while part < parts:
            start, end = part * tiles // parts, (part + 1) * tiles // parts
            for first in range(start, end, plan.item):
                count = min(plan.item, end - first)
                _transform_source(x, first, count, plan, patch, square, none, v)
                _transform_gradient(dy, first, count, plan, grid, side, square, none, d)
                _gradients(v, d, count, plan, dus[part], first > start)
            part = take(taken, 0)
    for k in numba.prange(_unpack(table).products):
        shape = _unpack(table)
        size = shape.C * shape.Q
        for i in range(k * size, (k + 1) * size, lane_count(dw)):
            total = load(dus[0], i)
            for part in range(1, len(dus)):
                total = add(total, load(dus[part], i))
            store(dus[0], i, total)
    for t in numba.prange(len(scratch)):
        plan, mine, du = _unpack(table), scratch[t], dus[0]
        taps, _, square = lengths(patch, corner)
        c = take(taken, 1) * lane_count(dw)
        while c < plan.C:
            _write_filter(du, c, plan, taps, corner, square, mine, dw)
            c = take(taken, 1) * lane_count(dw)


# ---------------------------------------------------------------- entry points


def applies(w: Array, win: Window, groups: int) -> bool:
    """Tell whether these kernels run it: 3x3 or 5x5, stride and dilation 1, one group.

    Also 3x3 with stride 2 and an odd padding, as is usual.
    """
    (KH, KW), ((top, _), (left, _)) = win.kernel, win.padding
    strided = KH == 3 and win.stride == (2, 2) and top % 2 == left % 2 == 1
    fits = KH == KW and KH in SIZES and (win.stride == (1, 1) or strided)
    return fits and win.dilation == (1, 1) and groups == 1


def takes_pool(pool: tuple[int, int]) -> bool:
    """Tell whether whole windows of a pool lie in the tiles."""
    return OUTPUTS % pool[0] == OUTPUTS % pool[1] == 0


def forward(
    x: Array,
    w: Array,
    b: Array | None,
    win: Window,
    y: Array,
    *,
    relu: bool = False,
    pool: tuple[int, int] = (1, 1),
    winner: Array | None = None,
) -> None:
    """Write y (N, OH, OW, Q), or the pooled y and who won, from x (N, H, W, P) and w."""
    correlation(x, w, b, win, y, relu=relu, pool=pool, winner=winner)()


def correlation(
    x: Array,
    w: Array,
    b: Array | None,
    win: Window,
    y: Array,
    *,
    relu: bool = False,
    pool: tuple[int, int] = (1, 1),
    winner: Array | None = None,
) -> Call:
    """Return what `forward` runs."""
    F, C, R, _ = w.shape
    H, W = x.shape[1:3]
    (top, _), (left, _) = win.padding
    sizes = len(x), C, H, W, F, *win.output_size("conv2d", H, W), top, left
    return _call(sizes, form_of(R, win.stride[0]), x, w, False, b, relu, False, pool, y, winner)


def input_gradient(dy: Array, w: Array, win: Window, dx: Array, *, more: bool = False) -> None:
    """Write dx (N, H, W, P) from dy (N, OH, OW, Q), or add to it if `more`.

    It is the forward with w turned round.
    """
    input_gradients(dy, w, win, dx, more=more)()


def input_gradients(x: Array, w: Array, win: Window, dx: Array, *, more: bool = False) -> Call:
    """Return what `input_gradient` runs; x is dy, which is its input."""
    F, C, R, _ = w.shape
    (top, _), (left, _) = win.padding
    before = -(top // 2), -(left // 2)
    if win.stride == (1, 1):
        before = R - 1 - top, R - 1 - left
    sizes = len(x), F, *x.shape[1:3], C, *dx.shape[1:3], *before
    return _call(
        sizes, form_of(R, win.stride[0], True), x, w, True, None, False, more, (1, 1), dx, None
    )


def _call(
    sizes: tuple[int, ...], form: Form, x: Array, w: Array, turned: bool, b: Array | None,
    relu: bool, more: bool, pool: tuple[int, int], y: Array, winner: Array | None,
) -> Call:  # fmt: skip
    L, R = lanes(x.dtype), w.shape[2]
    plan, table = _plan(*sizes, form, pool, L, True)
    bias = np.zeros(plan.Q, x.dtype)

    def refresh() -> None:
        bias[: plan.F] = b

    threads = numba.get_num_threads()
    return Call(
        _correlate,
        (
            flat(x),
            flat(w),
            turned,
            bias,
            relu,
            more,
            y.reshape(-1),
            np.empty(0, np.uint8) if winner is None else winner.reshape(-1),
            len(x),
            table,
            (0,) * form.patch,  # the lengths choose the kernel
            (0,) * form.outputs,
            (0,) * R,
            np.zeros(L, x.dtype),
            np.zeros(2, np.int64),
        ),
        x.dtype,
        (
            (1, plan.products * plan.C * plan.Q),
            (threads, plan.products * plan.source_step),
            (threads, plan.products * plan.target_step),
            (threads, max(form.outputs, R) ** 2 * L),
        ),
        lambda u, *own: (u[0], *own),
        None if b is None else refresh,
    )


def weight_gradient(x: Array, dy: Array, win: Window, dw: Array) -> None:
    """Write dw (F, C, R, R) from x (N, H, W, P) and dy (N, OH, OW, Q)."""
    weight_gradients(x, dy, win, dw)()


def weight_gradients(x: Array, dy: Array, win: Window, dw: Array) -> Call:
    """Return what `weight_gradient` runs."""
    F, C, R, _ = dw.shape
    L = lanes(x.dtype)
    (top, _), (left, _) = win.padding
    sizes = len(x), C, *x.shape[1:3], F, *dy.shape[1:3], top, left
    form = form_of(R, win.stride[0])
    plan, table = _plan(*sizes, form, (1, 1), L, False)
    threads = numba.get_num_threads()
    own = min(threads, plan.parts)
    return Call(
        _gradient,
        (
            flat(x),
            flat(dy),
            dw.reshape(-1),
            len(x),
            table,
            (0,) * form.patch,
            (0,) * form.outputs,
            (0,) * R,
            np.zeros(L, x.dtype),
            np.zeros(2, np.int64),
        ),
        x.dtype,
        (
            (own, plan.products * plan.source_step),
            (own, plan.products * plan.target_step),
            (plan.parts, plan.products * C * plan.Q),
            (threads, R * R * L),
        ),
    )


# ---------------------------------------------------------------- arrays in layout FIRST


def forward_first(x: Array, w: Array, b: Array | None, win: Window) -> Array:
    """Return y (N, F, OH, OW) of x (N, C, H, W)."""
    OH, OW = win.output_size("conv2d", *x.shape[2:])
    y_last = np.empty((len(x), OH, OW, padded(len(w), w.dtype)), w.dtype)
    forward(_last(x), w, b, win, y_last)
    return _first(y_last, len(w))


def backward_first(dy: Array, x: Array, w: Array, win: Window) -> tuple[Array, Array]:
    """Return dx (N, C, H, W) and dw of dy (N, F, OH, OW) and x."""
    x_last, dy_last, dw = _last(x), _last(dy), np.empty_like(w)
    weight_gradient(x_last, dy_last, win, dw)
    input_gradient(dy_last, w, win, x_last)  # dx in the place of x
    return _first(x_last, x.shape[1]), dw


def _last(a: Array) -> Array:
    N, C, H, W = a.shape
    out = np.empty((N, H, W, padded(C, a.dtype)), a.dtype)
    to_last(a, out)
    return out


def _first(a: Array, channels: int) -> Array:
    out = np.empty((len(a), channels, *a.shape[1:3]), a.dtype)
    to_first(a, out)
    return out
