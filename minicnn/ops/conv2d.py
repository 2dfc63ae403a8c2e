"""2-D convolution (cross-correlation, as in every deep-learning library).

    y[n, f, i, j] = b[f] + sum over c, p, q of w[f, c, p, q] * x[n, c, i*SH + p*DH, j*SW + q*DW]

with x padded by zeros. Backward, each from the line above by the chain rule:

    db[f]          = sum over n, i, j of dy[n, f, i, j]
    dw[f, c, p, q] = sum over n, i, j of dy[n, f, i, j] * x[n, c, i*SH + p*DH, j*SW + q*DW]
    dx[n, c, h, w] = sum over the windows (i, j) and taps (p, q) that meet at (h, w)
                     and over f of dy[n, f, i, j] * w[f, c, p, q]

With G groups, filter f sees only the C/G channels of its own group.

Letters: N images, C channels, H W rows and columns, F filters, G groups, KH KW kernel,
OH OW output, S stride, D dilation.

References
----------
V. Dumoulin, F. Visin, "A guide to convolution arithmetic for deep learning", 2016,
arXiv:1603.07285.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.im2col import col2im_numpy, crop, im2col_numpy, pad
from minicnn.shapes import Window, check_ndim, check_shape, integer, window

COLS_BYTES = 4 << 20  # im2col works through the batch in blocks: this fits the cache, all may not


class Conv2dCache(NamedTuple):
    """What `conv2d_backward` needs from `conv2d_forward`."""

    x: Array  # (N, C, H, W)
    w: Array  # (F, C/G, KH, KW)
    has_bias: bool
    window: Window
    groups: int
    y_shape: tuple[int, ...]  # (N, F, OH, OW)


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    (SH, SW), (DH, DW) = win.stride, win.dilation
    F, CG = w.shape[:2]
    y = np.zeros((x.shape[0], F, *win.output_size("conv2d", *x.shape[2:])), x.dtype)
    x = pad(x, win)
    for n, f, i, j in np.ndindex(y.shape):
        first = f // (F // groups) * CG  # the first channel of this filter's group
        total = 0.0 if b is None else float(b[f])
        for c, p, q in np.ndindex(w.shape[1:]):
            total += float(w[f, c, p, q]) * float(x[n, first + c, i * SH + p * DH, j * SW + q * DW])
        y[n, f, i, j] = total
    return y


def _backward_reference(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    (SH, SW), (DH, DW) = win.stride, win.dilation
    F, CG = w.shape[:2]
    x = pad(x, win)
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(F)
    for n, f, i, j in np.ndindex(dy.shape):
        first = f // (F // groups) * CG
        g = float(dy[n, f, i, j])
        db[f] += g
        for c, p, q in np.ndindex(w.shape[1:]):
            pixel = n, first + c, i * SH + p * DH, j * SW + q * DW
            dw[f, c, p, q] += g * float(x[pixel])
            dx[pixel] += g * float(w[f, c, p, q])
    return crop(dx, win).astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    N, F = x.shape[0], w.shape[0]
    OH, OW = win.output_size("conv2d", *x.shape[2:])
    y = array_module(x).empty((N, F, OH, OW), x.dtype)
    wg = by_group(w, groups)  # (G, F/G, K) with K = C/G*KH*KW
    for block in blocks(x, win, OH * OW):
        cols = by_group(im2col_numpy(x[block], win), groups)  # (G, K, n*OH*OW)
        y[block] = (wg @ cols).reshape(F, -1, OH, OW).swapaxes(0, 1)  # (n, F, OH, OW)
    if b is not None:
        y += b[:, None, None]
    return y


def _backward_numpy(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    xp = array_module(x)
    OH, OW = dy.shape[2:]
    wg = by_group(w, groups)  # (G, F/G, K)
    dx, dw = xp.empty_like(x), xp.zeros_like(wg)
    for block in blocks(x, win, OH * OW):
        dyg = by_group(dy[block].swapaxes(0, 1), groups)  # (G, F/G, n*OH*OW)
        cols = by_group(im2col_numpy(x[block], win), groups)  # (G, K, n*OH*OW)
        dw += dyg @ cols.swapaxes(1, 2)
        dcols = wg.swapaxes(1, 2) @ dyg  # (G, K, n*OH*OW)
        dx[block] = col2im_numpy(dcols, x[block].shape, win)
    return dx, dw.reshape(w.shape), bias_gradient(dy)


def bias_gradient(dy: Array) -> Array:
    """Sum (N, F, OH, OW) to (F,): a map in dy's type (NumPy adds pairwise), the rest in float64."""
    N, F, OH, OW = dy.shape
    maps = dy.reshape(N, F, OH * OW).sum(axis=2)  # (N, F)
    return maps.sum(axis=0, dtype=np.float64).astype(dy.dtype)


def by_group(a: Array, groups: int) -> Array:
    """Split the first axis into groups and flatten the rest: (G*A, ...) to (G, A, ...)."""
    rows = a.shape[0] // groups
    return a.reshape(groups, rows, a.size // (groups * rows))


def blocks(x: Array, win: Window, places: int) -> Iterator[slice]:
    """Yield slices of the batch whose column matrices stay below COLS_BYTES."""
    N, C = x.shape[:2]
    image = C * win.kernel[0] * win.kernel[1] * places * x.itemsize
    step = max(1, COLS_BYTES // image)
    return (slice(n, n + step) for n in range(0, N, step))


# ---------------------------------------------------------------- numba (see conv2d_numba.py)


# The kernels leave some products with padding out and add some zeros to dw, which is the same as
# long as 0 times a number is 0. Where one is not finite, the numpy version decides what is NaN.


def _forward_numba(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    from minicnn.ops import conv2d_numba  # imports Numba: only when asked for

    if not np.isfinite(w).all():
        return _forward_numpy(x, w, b, win, groups)
    return conv2d_numba.forward(x, w, b, win, groups)


def _backward_numba(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv2d_numba

    dx, dw, db = conv2d_numba.backward(dy, x, w, win, groups)
    # db adds up all of dy, and dw what it needs of x.
    if not all(np.isfinite(a).all() for a in (w, dw, db)):
        return _backward_numpy(dy, x, w, win, groups)
    return dx, dw, db


# ---------------------------------------------------------------- winograd (see conv2d_winograd.py)


# Where there are no transforms, or a number is not finite (a NaN would spread over a whole tile),
# the numba version takes over.


def _forward_winograd(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    from minicnn.ops import conv2d_winograd

    if conv2d_winograd.applies(w, win, groups):
        y = conv2d_winograd.forward_first(x, w, b, win)
        if np.isfinite(y).all():
            return y
    return _forward_numba(x, w, b, win, groups)


def _backward_winograd(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv2d_winograd

    if len(x) and conv2d_winograd.applies(w, win, groups):
        dx, dw = conv2d_winograd.backward_first(dy, x, w, win)
        if np.isfinite(dx).all() and np.isfinite(dw).all():
            return dx, dw, bias_gradient(dy)
    return _backward_numba(dy, x, w, win, groups)


# ---------------------------------------------------------------- cupy (see conv2d_cupy.py)


# Where an image or a filter bank outgrows 32-bit offsets, the numpy version runs on CuPy's arrays.
# Taps outside are multiplied as zeros, so an infinite w makes more of dx NaN than it has to.


def _forward_cupy(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    from minicnn.ops import conv2d_cupy

    y_shape = (x.shape[0], w.shape[0], *win.output_size("conv2d", *x.shape[2:]))
    if not conv2d_cupy.applies(x.shape, w, y_shape, groups):
        return _forward_numpy(x, w, b, win, groups)
    return conv2d_cupy.forward(x, w, b, win, groups)


def _backward_cupy(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv2d_cupy

    if not conv2d_cupy.applies(x.shape, w, dy.shape, groups):
        return _backward_numpy(dy, x, w, win, groups)
    return conv2d_cupy.backward(dy, x, w, win, groups)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "winograd": Version(_forward_winograd, _backward_winograd),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def conv2d_forward(
    x: Array,
    w: Array,
    b: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> tuple[Array, Conv2dCache]:
    """Slide F filters over a batch of images.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        Images; N may be 0.
    w : array, shape (F, C/groups, KH, KW)
        Filters, of x's dtype.
    b : array, shape (F,), optional
        Bias, of x's dtype.
    stride, dilation : int or pair of int
        Vertical and horizontal; at least 1.
    padding : int, pair, or ((top, bottom), (left, right))
        Zeros around each map; also ``"valid"``, or ``"same"`` with stride 1.
    groups : int
        Divides C and F; filter f sees the channels of group ``f // (F / groups)``.

    Returns
    -------
    y : array, shape (N, F, OH, OW)
        With ``OH = (H + top + bottom - dilation * (KH - 1) - 1) // stride + 1``.
    cache : Conv2dCache
        For `conv2d_backward`.

    Raises
    ------
    ValueError
        For a wrong rank, channel count or geometry, or a kernel larger than the padded input.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(16.0).reshape(1, 1, 4, 4)
    >>> y, cache = conv2d_forward(x, np.ones((1, 1, 3, 3)))
    >>> y[0, 0]
    array([[45., 54.],
           [81., 90.]])
    >>> dx, dw, db = conv2d_backward(np.ones_like(y), cache)
    >>> dw[0, 0]
    array([[10., 14., 18.],
           [26., 30., 34.],
           [42., 46., 50.]])
    """
    x, w, b = as_arrays("conv2d", ("b",), x=x, w=w, b=b)
    check_ndim("conv2d", "x", x, "(N, C, H, W)")
    check_ndim("conv2d", "w", w, "(F, C/groups, KH, KW)")
    groups = integer("conv2d", "groups", groups, 1)
    F, CG, *kernel = w.shape
    if not w.size:
        raise ValueError(f"conv2d: w: expected no axis of length 0, got shape {w.shape}")
    if x.shape[1] != CG * groups:
        raise ValueError(
            f"conv2d: x: expected {CG * groups} channels (w.shape[1] * groups), got {x.shape[1]}"
        )
    if F % groups:
        raise ValueError(f"conv2d: groups: expected a divisor of the {F} filters, got {groups}")
    if b is not None:
        check_shape("conv2d", "b", b, (F,), "one per filter")
    win = window("conv2d", tuple(kernel), stride, padding, dilation)
    y_shape = (x.shape[0], F, *win.output_size("conv2d", *x.shape[2:]))
    y = pick("conv2d", VERSIONS, x).forward(x, w, b, win, groups)
    return y, Conv2dCache(x, w, b is not None, win, groups, y_shape)


def conv2d_backward(dy: Array, cache: Conv2dCache) -> tuple[Array, Array, Array | None]:
    """Gradients of `conv2d_forward`.

    Parameters
    ----------
    dy : array, shape (N, F, OH, OW)
        Gradient of the loss to y.
    cache : Conv2dCache
        From `conv2d_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)
    dw : array, shape (F, C/groups, KH, KW)
    db : array, shape (F,), or None without a bias

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("conv2d_backward", x=cache.x, dy=dy)
    check_shape("conv2d_backward", "dy", dy, cache.y_shape, "like y")
    dx, dw, db = pick("conv2d", VERSIONS, x).backward(dy, x, cache.w, cache.window, cache.groups)
    return dx, dw, db if cache.has_bias else None
