"""im2col and col2im: a convolution as one matrix product.

im2col copies every place that the window takes into a column:

    cols[(c, p, q), (n, i, j)] = x[n, c, i*SH + p*DH - top, j*SW + q*DW - left]

and reads zeros in the padding. col2im is its adjoint: it adds every column entry back to the
pixel it was read from, so a pixel that k windows cover receives k terms.

Letters: N images, C channels, H W rows and columns, KH KW kernel, OH OW output,
S stride, D dilation.

References
----------
K. Chellapilla, S. Puri, P. Simard, "High Performance Convolutional Neural Networks for
Document Processing", 2006.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.shapes import Window, check_ndim, check_shape, integer, window

# ---------------------------------------------------------------- reference


def im2col_reference(x: Array, win: Window) -> Array:
    """Fill `cols` one entry at a time."""
    N, C, H, W = x.shape
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    OH, OW = win.output_size("im2col", H, W)
    cols = np.zeros((C, *win.kernel, N, OH, OW), x.dtype)
    for c, p, q, n, i, j in np.ndindex(cols.shape):
        h, w = i * SH + p * DH - top, j * SW + q * DW - left
        if 0 <= h < H and 0 <= w < W:
            cols[c, p, q, n, i, j] = x[n, c, h, w]
    return cols.reshape(-1, N * OH * OW)  # (C*KH*KW, N*OH*OW)


def col2im_reference(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Add one entry of `cols` at a time to the pixel it came from."""
    N, C, H, W = x_shape
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    OH, OW = win.output_size("col2im", H, W)
    cols = cols.reshape(C, *win.kernel, N, OH, OW)
    x = np.zeros(x_shape, np.float64)
    for c, p, q, n, i, j in np.ndindex(cols.shape):
        h, w = i * SH + p * DH - top, j * SW + q * DW - left
        if 0 <= h < H and 0 <= w < W:
            x[n, c, h, w] += cols[c, p, q, n, i, j]
    return x.astype(cols.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def im2col_numpy(x: Array, win: Window) -> Array:
    """Copy one (N, OH, OW) slab of the padded map for each channel and tap."""
    N, C, H, W = x.shape
    OH, OW = win.output_size("im2col", H, W)
    x = pad(x, win)
    cols = array_module(x).empty((C, *win.kernel, N, OH, OW), x.dtype)
    for p, q, rows, columns in taps(win, OH, OW):
        cols[:, p, q] = x[:, :, rows, columns].transpose(1, 0, 2, 3)  # (C, N, OH, OW)
    return cols.reshape(C * win.kernel[0] * win.kernel[1], N * OH * OW)  # (C*KH*KW, N*OH*OW)


def col2im_numpy(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    """Add one (N, OH, OW) slab for each channel and tap."""
    N, C, H, W = x_shape
    OH, OW = win.output_size("col2im", H, W)
    cols = cols.reshape(C, *win.kernel, N, OH, OW)
    x = array_module(cols).zeros((N, C, *win.padded(H, W)), cols.dtype)
    for p, q, rows, columns in taps(win, OH, OW):
        # += on a slice is safe: one tap reads no pixel twice. Taps overlap, so = would be wrong.
        x[:, :, rows, columns] += cols[:, p, q].transpose(1, 0, 2, 3)  # (N, C, OH, OW)
    return crop(x, win)


def pad(x: Array, win: Window, value: float = 0.0) -> Array:
    """Return `x` (N, C, H, W) with the window's padding around each map."""
    if win.padding == ((0, 0), (0, 0)):
        return x
    return array_module(x).pad(x, ((0, 0), (0, 0), *win.padding), constant_values=value)


def crop(x: Array, win: Window) -> Array:
    """Undo `pad`: drop the padding's rows and columns."""
    if win.padding == ((0, 0), (0, 0)):
        return x
    (top, bottom), (left, right) = win.padding
    HP, WP = x.shape[2:]
    return array_module(x).ascontiguousarray(x[:, :, top : HP - bottom, left : WP - right])


def taps(win: Window, OH: int, OW: int) -> Iterator[tuple[int, int, slice, slice]]:
    """Yield ``p, q, rows, columns``: the padded pixels that tap (p, q) reads, as two slices."""
    (KH, KW), (SH, SW), (DH, DW) = win.kernel, win.stride, win.dilation
    for p in range(KH):
        rows = slice(p * DH, p * DH + (OH - 1) * SH + 1, SH)
        for q in range(KW):
            yield p, q, rows, slice(q * DW, q * DW + (OW - 1) * SW + 1, SW)


# ---------------------------------------------------------------- numba (see im2col_numba.py)


def _im2col_numba(x: Array, win: Window) -> Array:
    from minicnn.ops import im2col_numba  # imports Numba: only when asked for

    return im2col_numba.im2col(x, win)


def _col2im_numba(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import im2col_numba

    return im2col_numba.col2im(cols, x_shape, win)


# ---------------------------------------------------------------- cupy (see pool_cupy.py)


def _im2col_cupy(x: Array, win: Window) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.im2col(x, win)


def _col2im_cupy(cols: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.col2im(cols, x_shape, win)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(im2col_reference, col2im_reference),
    "numpy": Version(im2col_numpy, col2im_numpy),
    "numba": Version(_im2col_numba, _col2im_numba),
    "cupy": Version(_im2col_cupy, _col2im_cupy),
}


def im2col(
    x: Array, kernel_size: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1
) -> Array:
    """Lay the pixels under every place of a sliding window out as columns.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
    kernel_size, stride, dilation : int or pair of int
        Vertical and horizontal; at least 1.
    padding : int, pair, or ((top, bottom), (left, right))
        Zeros around each map; also ``"same"`` or ``"valid"``.

    Returns
    -------
    array, shape (C*KH*KW, N*OH*OW)
        Row (c, p, q) holds tap (p, q) of channel c; column (n, i, j) one place of the window.

    Raises
    ------
    ValueError
        For a wrong rank or geometry, or a window larger than the padded input.
    TypeError
        If `x` is no float array or an argument no integer.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> im2col(x, 2)
    array([[0., 1., 3., 4.],
           [1., 2., 4., 5.],
           [3., 4., 6., 7.],
           [4., 5., 7., 8.]])
    """
    (x,) = as_arrays("im2col", x=x)
    check_ndim("im2col", "x", x, "(N, C, H, W)")
    win = window("im2col", kernel_size, stride, padding, dilation)
    win.output_size("im2col", *x.shape[2:])
    return pick("im2col", VERSIONS, x).forward(x, win)


def col2im(
    cols: Array,
    x_shape: tuple[int, int, int, int],
    kernel_size: Any,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
) -> Array:
    """Add columns back to the pixels they were read from: the adjoint of `im2col`.

    Parameters
    ----------
    cols : array, shape (C*KH*KW, N*OH*OW), float32 or float64
    x_shape : tuple (N, C, H, W)
        Shape of the result.
    kernel_size, stride, padding, dilation
        As for `im2col`.

    Returns
    -------
    array, shape (N, C, H, W)
        Each pixel is the sum of all the entries that `im2col` would have read from it.

    Raises
    ------
    ValueError, TypeError
        As for `im2col`, and if `cols` has another shape than the geometry gives.

    Examples
    --------
    How many 2x2 windows cover each pixel of a 3x3 map:

    >>> import numpy as np
    >>> col2im(np.ones((4, 4)), (1, 1, 3, 3), 2)[0, 0]
    array([[1., 2., 1.],
           [2., 4., 2.],
           [1., 2., 1.]])
    """
    (cols,) = as_arrays("col2im", cols=cols)
    win = window("col2im", kernel_size, stride, padding, dilation)
    if len(x_shape) != 4:
        raise ValueError(f"col2im: x_shape: expected (N, C, H, W), got {tuple(x_shape)}")
    N, C, H, W = (integer("col2im", "x_shape", n, 0) for n in x_shape)
    OH, OW = win.output_size("col2im", H, W)
    check_shape("col2im", "cols", cols, (C * win.kernel[0] * win.kernel[1], N * OH * OW))
    return pick("col2im", VERSIONS, cols).backward(cols, (N, C, H, W), win)
