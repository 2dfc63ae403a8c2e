"""The fully connected layer on the GPU: the host's side of linear.cu.

One launch forward and two backward where the product is small; the ReLU behind a layer and the
mask of the ReLU before it cost no launch of their own. Larger products are cuBLAS's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda
from minicnn.ops.conv2d_cupy import LONGEST, Tile, plain_tile

MOST_TERMS = 1 << 28  # products of more are cuBLAS's
TILES = {
    "float32": (plain_tile(64, 64, 8, 8, 4, 32), plain_tile(32, 32, 4, 4, 8, 64)),
    "float64": (plain_tile(32, 32, 4, 4, 2, 16),),
}


def applies(M: int, w: Array) -> bool:
    """Tell whether linear.cu takes M rows by the weights w (O, I); its sums over M stay short."""
    return M <= LONGEST and M * w.size <= MOST_TERMS


def forward(x: Array, w: Array, b: Array | None, relu: bool = False) -> Array:
    """Return ``x @ w.T + b`` (M, O), cut off below 0 with `relu`."""
    (M, size_in), size_out = x.shape, w.shape[0]
    y = array_module(x).empty((M, size_out), x.dtype)
    strides = (size_in, 1, 1, size_in)
    _product(x, w, y, (M, size_out, size_in), strides, bias=b, relu=relu)
    return y


def backward(dy: Array, x: Array, w: Array, after_relu: bool = False) -> tuple[Array, Array, Array]:
    """Return dx (M, I), dw (O, I) and db (O,).

    With `after_relu`, x is the output of a ReLU and dx the gradient to that ReLU's input.
    """
    xp, (M, size_in), size_out = array_module(x), x.shape, w.shape[0]
    dx, dw, db = xp.empty_like(x), xp.empty_like(w), xp.empty(size_out, x.dtype)
    mask = x if after_relu else None
    _product(dy, w, dx, (M, size_in, size_out), (size_out, 1, size_in, 1), mask=mask)
    _product(dy, x, dw, (size_out, size_in, M), (1, size_out, size_in, 1), sums=db)
    return dx, dw, db


def _tile(dtype: Any, rows: int, columns: int) -> Tile:
    *large, small = TILES[np.dtype(dtype).name]
    for tile in large:
        TI, TJ = tile.area
        if -(-rows // TI) * -(-columns // TJ) >= cuda.multiprocessors():
            return tile
    return small


def _product(
    a: Array,
    b: Array,
    c: Array,
    sizes: tuple[int, int, int],
    strides: tuple[int, int, int, int],
    bias: Array | None = None,
    relu: bool = False,
    mask: Array | None = None,
    sums: Array | None = None,
) -> None:
    (rows, columns, _), (_, sk, tk, _) = sizes, strides
    tile = _tile(c.dtype, rows, columns)
    TI, TJ = tile.area
    width = columns + (sums is not None)
    bias, mask, sums = (cuda.NULL if v is None else v for v in (bias, mask, sums))
    cuda.launch(
        "linear",
        "linear_product",
        c.dtype,
        (-(-width // TJ), -(-rows // TI)),
        tile.threads,
        *(a, b, bias, mask, c, sums, *sizes, *strides, int(relu)),
        shared=tile.shared * c.itemsize,
        macros={"A_ALONG_K": int(sk == 1), "B_ALONG_K": int(tk == 1), **dict(tile.macros)},
    )
