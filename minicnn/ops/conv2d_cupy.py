"""Convolutions on the GPU: the host's side of conv2d.cu and conv2d_depthwise.cu.

What is decided here: which tile a product is cut into, into how many parts the long sum of the
weight gradient is, and whether the tensor cores multiply (`minicnn.use_tf32`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda
from minicnn.shapes import Pair, Window, size

LONGEST = 1024  # terms that one thread adds up in a weight gradient: bounds the rounding
MOST_GROUPS = 1023  # so that the weight gradient's sum can be cut into 64 parts
SHORTEST = 64  # terms that are worth a part of their own
FIXED = {1, 3, 5, 7}  # kernel sizes that are compiled in
POOLS = (1, 2, 4)  # pixels of a pool window that one thread holds


class Tile(NamedTuple):
    """How tile.cuh cuts a product; `team` is the number of threads that cover a tile."""

    macros: tuple[tuple[str, int], ...]
    threads: int
    shared: int  # values
    rate: float  # of the arithmetic, estimated: a large tile reads each value less often

    @property
    def area(self) -> Pair:
        """Rows and columns."""
        sizes = dict(self.macros)
        return sizes["TI"], sizes["TJ"]


def plain_tile(
    TI: int, TJ: int, RI: int, RJ: int, slices: int, depth: int, rate: float = 1.0
) -> Tile:
    """Return a TI x TJ tile of which a thread owns RI x RJ; `slices` teams share each stage."""
    macros = {"TI": TI, "TJ": TJ, "RI": RI, "RJ": RJ, "SLICES": slices, "DEPTH": depth}
    shared = max(2 * depth * (TI + TJ + 8), TI * TJ if slices > 1 else 0)
    return Tile(tuple(macros.items()), slices * (TI // RI) * (TJ // RJ), shared, rate)


def tensor_tile(TI: int, TJ: int, WI: int, WJ: int, depth: int, rate: float = 1.0) -> Tile:
    """Return a TI x TJ tile of which a warp owns WI x WJ, on the tensor cores."""
    macros = {"TF32": 1, "TI": TI, "TJ": TJ, "WI": WI, "WJ": WJ, "DEPTH": depth}
    return Tile(
        tuple(macros.items()), 32 * (TI // WI) * (TJ // WJ), 2 * depth * (TI + TJ + 16), rate
    )


TILES = {
    "float32": (
        plain_tile(128, 128, 8, 8, 1, 16, 1.0),
        plain_tile(64, 128, 8, 8, 2, 16, 0.9),
        plain_tile(64, 64, 8, 8, 4, 32, 0.85),
        plain_tile(32, 128, 4, 8, 2, 16, 0.7),
        plain_tile(32, 64, 4, 4, 2, 32, 0.6),
        plain_tile(32, 32, 4, 4, 4, 32, 0.5),
    ),
    "float64": (plain_tile(64, 64, 4, 4, 1, 16, 0.9), plain_tile(32, 32, 4, 4, 2, 16, 0.6)),
}
TENSOR_TILES = (tensor_tile(128, 128, 64, 32, 16, 1.0), tensor_tile(64, 64, 32, 32, 16, 0.6))

_tf32 = False


def use_tf32(on: bool = True) -> None:
    """Let float32 convolutions on the GPU multiply by TF32 tensor cores; off by default.

    Products then take 10 bits of mantissa instead of 23: a relative error of up to 1e-3 a term.
    Sums stay float32. Steps that have been recorded go on as they were.

    Examples
    --------
    >>> import minicnn
    >>> minicnn.use_tf32(False)  # the default
    """
    global _tf32
    _tf32 = bool(on)


def tf32() -> bool:
    """Tell whether `use_tf32` is on."""
    return _tf32


def choose(dtype: Any, rows: int, columns: int, products: int, parts: int = 1) -> Tile:
    """Return the tile that should be fastest for products of `rows` x `columns`.

    Time is taken to be the elements of a tile over its rate, times the tiles that a
    multiprocessor works through, of which it has at least one. The sum of each may be cut into up
    to `parts`.
    """
    name = np.dtype(dtype).name
    tiles = TENSOR_TILES if _tf32 and name == "float32" else TILES[name]

    def time(tile: Tile) -> float:
        TI, TJ = tile.area
        blocks = -(-rows // TI) * -(-columns // TJ) * products * parts
        return max(1, blocks / cuda.multiprocessors()) / parts * TI * TJ / tile.rate

    return min(tiles, key=time)


def _fixed(win: Window) -> dict[str, int]:
    """Geometry that is worth compiling in: the usual square kernels."""
    (KH, KW), (SH, SW) = win.kernel, win.stride
    square = KH == KW and SH == SW and win.dilation == (1, 1)
    return {"FIXED_K": KH, "FIXED_S": SH} if square and KH in FIXED and SH <= 2 else {}


def _shape(x: Any, F: int, groups: int, OH: int, OW: int, win: Window) -> tuple[int, ...]:
    (top, _), (left, _) = win.padding
    return (*x, F, groups, OH, OW, top, left, *win.kernel, *win.stride, *win.dilation)


def applies(x_shape: tuple[int, ...], w: Array, y_shape: tuple[int, ...], groups: int) -> bool:
    """Tell whether the kernels' 32-bit offsets reach over an image and all filters."""
    images = (size(x_shape[1:]), size(y_shape[1:]))
    return cuda.fits(*images, w.size) and groups <= MOST_GROUPS


def _product(
    kernel: str,
    tile: Tile,
    grid: tuple[int, int, int],
    dtype: Any,
    args: tuple[Any, ...],
    win: Window,
) -> None:
    cuda.launch(
        "conv2d",
        kernel,
        dtype,
        grid,
        tile.threads,
        *args,
        shared=tile.shared * np.dtype(dtype).itemsize,
        macros={"ONLY": f"ONLY_{kernel}", **dict(tile.macros), **_fixed(win)},
    )


def forward(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    """Return y (N, F, OH, OW)."""
    y, _ = block_forward(x, w, b, win, groups, False, None)
    return y


def block_forward(
    x: Array,
    w: Array,
    b: Array | None,
    win: Window,
    groups: int,
    relu: bool,
    pool: Pair | None,
) -> tuple[Array, Array | None]:
    """Return y, or with a `pool` (of POOLS pixels) what ReLU and pool make of it and winners."""
    xp, (N, _, H, W), F = array_module(x), x.shape, w.shape[0]
    OH, OW = win.output_size("conv2d", H, W)
    PH, PW = pool or (0, 0)
    rows, columns = (OH // PH, OW // PW) if pool else (OH, OW)
    y = xp.empty((N, F, rows, columns), x.dtype)
    winner = xp.empty(y.shape, np.uint8) if pool else None
    bias = cuda.NULL if b is None else b
    if not y.size:
        return y, winner
    if pool is None and _depthwise(w.shape, groups):
        shape = _shape(x.shape, F, groups, OH, OW, win)
        cuda.each("conv2d_depthwise", "depthwise_forward", y, x, w, bias, y, *shape)
        return y, winner
    places = N * rows * columns * (PH * PW or 1)
    tile = choose(x.dtype, F // groups, places, groups)
    TI, TJ = tile.area
    args = (x, w, bias, y, cuda.NULL if winner is None else winner, PH, PW, int(relu))
    grid = (-(-places // TJ), -(-(F // groups) // TI), groups)
    shape = _shape(x.shape, F, groups, OH, OW, win)
    _product("conv2d_forward", tile, grid, x.dtype, (*args, *shape), win)
    return y, winner


def input_gradient(
    dy: Array, w: Array, x_shape: tuple[int, ...], win: Window, groups: int, b: Array | None = None
) -> Array:
    """Return dx (N, C, H, W), plus `b` (C,) where there is one."""
    (N, C, H, W), (F, OH, OW) = x_shape, dy.shape[1:]
    dx = array_module(dy).empty(x_shape, dy.dtype)
    if not dx.size:
        return dx
    shape, bias = _shape(x_shape, F, groups, OH, OW, win), cuda.NULL if b is None else b
    if _depthwise(w.shape, groups):
        cuda.each("conv2d_depthwise", "depthwise_input_gradient", dx, dy, w, bias, dx, *shape)
        return dx
    tile = choose(dy.dtype, C // groups, N * H * W, groups)
    TI, TJ = tile.area
    grid = (-(-N * H * W // TJ), -(-(C // groups) // TI), groups)
    _product("conv2d_input_gradient", tile, grid, dy.dtype, (dy, w, bias, dx, *shape), win)
    return dx


def weight_gradient(
    dy: Array, x: Array, w_shape: tuple[int, ...], win: Window, groups: int
) -> tuple[Array, Array]:
    """Return dw (F, C/G, KH, KW) and db (F,)."""
    xp, (N, F, OH, OW) = array_module(dy), dy.shape
    if not dy.size or not x.size:
        return xp.zeros(w_shape, dy.dtype), xp.zeros(F, dy.dtype)
    dw, db = xp.empty(w_shape, dy.dtype), xp.empty(F, dy.dtype)
    shape = _shape(x.shape, F, groups, OH, OW, win)
    if _depthwise(w_shape, groups):
        taps = w_shape[2] * w_shape[3]
        kernel = "depthwise_weight_gradient"
        cuda.launch("conv2d_depthwise", kernel, dy.dtype, (taps + 1, F), 256, dy, x, dw, db, *shape)
        return dw, db
    columns, places = w_shape[1] * w_shape[2] * w_shape[3] + 1, N * OH * OW
    tile = choose(dy.dtype, F // groups, columns, groups, parts=-(-places // SHORTEST))
    TI, TJ = tile.area
    parts, length = cut(places, -(-(F // groups) // TI) * -(-columns // TJ) * groups, groups)
    part = xp.empty((parts, F, columns), dy.dtype)
    grid = (-(-columns // TJ), -(-(F // groups) // TI), parts * groups)
    _product("conv2d_weight_gradient", tile, grid, dy.dtype, (dy, x, part, length, *shape), win)
    args = (part, dw, db, parts, columns)
    cuda.each("conv2d_parts", "conv2d_add", dw, *args, size=F * columns)
    return dw, db


def cut(places: int, blocks: int, groups: int) -> tuple[int, int]:
    """Cut a sum over `places` into parts: return how many, and the length of one.

    Short enough for the rounding, enough of them for three blocks a multiprocessor where one part
    has `blocks`, and no more than a grid can have.
    """
    busy = min(-(-places // SHORTEST), -(-3 * cuda.multiprocessors() // blocks))
    count = min(max(-(-places // LONGEST), busy), cuda.MOST_BLOCKS // groups)
    length = -(-places // count)
    return -(-places // length), length


def backward(dy: Array, x: Array, w: Array, win: Window, groups: int) -> tuple[Array, Array, Array]:
    """Return dx, dw and db."""
    dw, db = weight_gradient(dy, x, w.shape, win, groups)
    return input_gradient(dy, w, x.shape, win, groups), dw, db


def block_backward(
    dy: Array,
    winner: Array,
    x: Array,
    w: Array,
    win: Window,
    groups: int,
    pool: Pair,
    need_dx: bool = True,
) -> tuple[Array | None, Array, Array]:
    """Return dx (None unless `need_dx`: a network's first layer does without), dw and db."""
    dz = spread(dy, winner, pool, *win.output_size("conv_block", *x.shape[2:]))
    dw, db = weight_gradient(dz, x, w.shape, win, groups)
    return input_gradient(dz, w, x.shape, win, groups) if need_dx else None, dw, db


def spread(dy: Array, winner: Array, pool: Pair, OH: int, OW: int) -> Array:
    """Return dz (N, F, OH, OW): every dy at its window's winner."""
    dz = array_module(dy).empty((*dy.shape[:2], OH, OW), dy.dtype)
    cuda.each("conv2d_parts", "conv2d_spread", dz, dy, winner, dz, OH, OW, *pool)
    return dz


def _depthwise(w_shape: tuple[int, ...], groups: int) -> bool:
    """Tell whether each filter sees one channel of its own."""
    return w_shape[:2] == (groups, 1)
