"""2-D transposed convolution: the adjoint of a convolution, which enlarges its input.

    y[n, f, i, j] = b[f] + sum over c, r, s, p, q of x[n, c, r, s] * w[c, f, p, q]
                    where r*SH + p*DH - top = i and s*SW + q*DW - left = j

Every pixel of x paints the kernel, scaled by its value, on a canvas; strokes that overlap add
up. The padding is then cut from the canvas, and output_padding gives rows and columns back at
the bottom and the right. This is conv2d's backward with x for dy and y for dx, and the backward
is a convolution of dy:

    db[f]          = sum over n, i, j of dy[n, f, i, j]
    dw[c, f, p, q] = sum over n, r, s of x[n, c, r, s] * dy[n, f, r*SH + p*DH - top, s*SW + ...]
    dx[n, c, r, s] = sum over f, p, q of w[c, f, p, q] * dy[n, f, r*SH + p*DH - top, s*SW + ...]

With G groups, channel c paints only the F/G filters of its own group.

Letters: N images, C channels, H W rows and columns, F filters, G groups, KH KW kernel,
OH OW output, S stride, D dilation.

References
----------
V. Dumoulin, F. Visin, "A guide to convolution arithmetic for deep learning", 2016,
arXiv:1603.07285, chapter 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.conv2d import bias_gradient, blocks, by_group
from minicnn.ops.im2col import col2im_numpy, im2col_numpy
from minicnn.shapes import Pair, Window, check_ndim, check_pixels, check_shape, integer, pads, pair


class ConvTranspose2dCache(NamedTuple):
    """What `conv_transpose2d_backward` needs from `conv_transpose2d_forward`."""

    x: Array  # (N, C, H, W)
    w: Array  # (C, F/G, KH, KW)
    has_bias: bool
    window: Window
    groups: int
    y_shape: tuple[int, ...]  # (N, F, OH, OW)


def _canvas_size(win: Window, H: int, W: int) -> Pair:
    """What an (H, W) map paints: the map on which `win` takes (H, W) places."""
    (EH, EW), (SH, SW) = win.extent, win.stride
    return (H - 1) * SH + EH, (W - 1) * SW + EW


# ---------------------------------------------------------------- reference


def _forward_reference(
    x: Array, w: Array, b: Array | None, win: Window, groups: int, y_size: Pair
) -> Array:
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    C, FG, KH, KW = w.shape
    OH, OW = y_size
    y = np.zeros((x.shape[0], FG * groups, OH, OW))
    if b is not None:
        y += b[:, None, None]
    for n, c, r, s in np.ndindex(x.shape):
        first = c // (C // groups) * FG  # the first filter of this channel's group
        for f, p, q in np.ndindex(FG, KH, KW):
            i, j = r * SH + p * DH - top, s * SW + q * DW - left
            if 0 <= i < OH and 0 <= j < OW:
                y[n, first + f, i, j] += float(x[n, c, r, s]) * float(w[c, f, p, q])
    return y.astype(x.dtype)


def _backward_reference(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    C, FG, KH, KW = w.shape
    OH, OW = dy.shape[2:]
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(FG * groups)
    for n, c, r, s in np.ndindex(x.shape):
        first = c // (C // groups) * FG
        for f, p, q in np.ndindex(FG, KH, KW):
            i, j = r * SH + p * DH - top, s * SW + q * DW - left
            if 0 <= i < OH and 0 <= j < OW:
                g = float(dy[n, first + f, i, j])
                dx[n, c, r, s] += g * float(w[c, f, p, q])
                dw[c, f, p, q] += g * float(x[n, c, r, s])
    for n, f, i, j in np.ndindex(dy.shape):
        db[f] += float(dy[n, f, i, j])
    return dx.astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(
    x: Array, w: Array, b: Array | None, win: Window, groups: int, y_size: Pair
) -> Array:
    N, _, H, W = x.shape
    F, size = w.shape[1] * groups, _canvas_size(win, H, W)
    y = array_module(x).zeros((N, F, *y_size), x.dtype)
    wg = by_group(w, groups).swapaxes(1, 2)  # (G, K, C/G) with K = F/G*KH*KW
    for block in blocks(y, win, H * W):
        xg = by_group(x[block].swapaxes(0, 1), groups)  # (G, C/G, n*H*W)
        canvas = col2im_numpy(wg @ xg, (x[block].shape[0], F, *size), _unpadded(win))
        kept = _kept(canvas, win, y_size)
        y[block, :, : kept.shape[2], : kept.shape[3]] = kept
    if b is not None:
        y += b[:, None, None]
    return y


def _backward_numpy(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    xp = array_module(x)
    C, H, W = x.shape[1:]
    F, OH, OW = dy.shape[1:]
    size = _canvas_size(win, H, W)
    wg = by_group(w, groups)  # (G, C/G, K) with K = F/G*KH*KW
    dx, dw = xp.empty_like(x), xp.zeros_like(wg)
    for block in blocks(dy, win, H * W):
        canvas = xp.zeros((x[block].shape[0], F, *size), dy.dtype)
        kept = _kept(canvas, win, (OH, OW))
        kept[...] = dy[block, :, : kept.shape[2], : kept.shape[3]]
        cols = by_group(im2col_numpy(canvas, _unpadded(win)), groups)  # (G, K, n*H*W)
        xg = by_group(x[block].swapaxes(0, 1), groups)  # (G, C/G, n*H*W)
        dw += xg @ cols.swapaxes(1, 2)
        dx[block] = (wg @ cols).reshape(C, -1, H, W).swapaxes(0, 1)  # (n, C, H, W)
    return dx, dw.reshape(w.shape), bias_gradient(dy)


def _unpadded(win: Window) -> Window:
    return win._replace(padding=((0, 0), (0, 0)))


def _kept(canvas: Array, win: Window, y_size: Pair) -> Array:
    """View what y keeps of the canvas: less than `y_size` if output_padding goes past its end."""
    (top, _), (left, _) = win.padding
    return canvas[:, :, top : top + y_size[0], left : left + y_size[1]]


# ---------------------------------------------------------------- numba (see conv2d_numba.py)


# The forward is conv2d's input gradient, dx its forward and dw its weight gradient. The kernels
# leave padding out of the sums, so all the numbers have to be finite, as in conv2d.


def _forward_numba(
    x: Array, w: Array, b: Array | None, win: Window, groups: int, y_size: Pair
) -> Array:
    from minicnn.ops import conv2d_numba  # imports Numba: only when asked for

    fitted = _fitted(win, x, y_size)
    if fitted is None or not (np.isfinite(w).all() and np.isfinite(x).all()):
        return _forward_numpy(x, w, b, win, groups, y_size)
    y = np.empty((len(x), w.shape[1] * groups, *y_size), x.dtype)
    y = conv2d_numba.input_gradient(x, y, w, fitted, groups)
    if b is not None:
        y += b[:, None, None]
    return y


def _backward_numba(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv2d_numba

    db = bias_gradient(dy)  # adds up all of dy
    fitted = _fitted(win, x, dy.shape[2:])
    if fitted is None or not all(np.isfinite(a).all() for a in (db, w, x)):
        return _backward_numpy(dy, x, w, win, groups)
    dx = conv2d_numba.forward(dy, w, None, fitted, groups)
    dw, _ = conv2d_numba.weight_gradient(x, dy, w, fitted, groups)
    return dx, dw, db


def _fitted(win: Window, x: Array, y_size: Pair) -> Window | None:
    """Set the bottom and right padding so that the window takes (H, W) places on y.

    None if it takes more, where y goes past the canvas by a stride or more.
    """
    (top, _), (left, _) = win.padding
    HP, WP = _canvas_size(win, *x.shape[2:])
    bottom, right = HP - top - y_size[0], WP - left - y_size[1]
    fitted = win._replace(padding=((top, max(bottom, 0)), (left, max(right, 0))))
    return fitted if fitted.output_size("conv_transpose2d", *y_size) == x.shape[2:] else None


# ---------------------------------------------------------------- cupy (see conv2d_cupy.py)


def _forward_cupy(
    x: Array, w: Array, b: Array | None, win: Window, groups: int, y_size: Pair
) -> Array:
    from minicnn.ops import conv2d_cupy

    fitted, y_shape = _fitted(win, x, y_size), (len(x), w.shape[1] * groups, *y_size)
    if fitted is None or not conv2d_cupy.applies(y_shape, w, x.shape, groups):
        return _forward_numpy(x, w, b, win, groups, y_size)
    return conv2d_cupy.input_gradient(x, w, y_shape, fitted, groups, b)


def _backward_cupy(
    dy: Array, x: Array, w: Array, win: Window, groups: int
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv2d_cupy

    fitted = _fitted(win, x, dy.shape[2:])
    if fitted is None or not conv2d_cupy.applies(dy.shape, w, x.shape, groups):
        return _backward_numpy(dy, x, w, win, groups)
    dx = conv2d_cupy.forward(dy, w, None, fitted, groups)
    dw, _ = conv2d_cupy.weight_gradient(x, dy, w.shape, fitted, groups)
    return dx, dw, bias_gradient(dy)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def conv_transpose2d_forward(
    x: Array,
    w: Array,
    b: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Array, ConvTranspose2dCache]:
    """Paint F filters over an enlarged batch of images.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        Images; N may be 0.
    w : array, shape (C, F/groups, KH, KW)
        Kernels, of x's dtype. The filters of a `conv2d_forward` from F to C channels fit as
        they are.
    b : array, shape (F,), optional
        Bias, of x's dtype.
    stride, dilation : int or pair of int
        Vertical and horizontal; at least 1.
    padding : int, pair, or ((top, bottom), (left, right))
        Rows and columns taken away from the output.
    output_padding : int or pair of int
        Rows and columns given back at the bottom and the right; less than stride or dilation.
        With a stride above 1, several sizes of y have the same size of x: this chooses one.
    groups : int
        Divides C; channel c paints the filters of group ``c // (C / groups)``.

    Returns
    -------
    y : array, shape (N, F, OH, OW)
        With ``OH = (H - 1) * stride + dilation * (KH - 1) + 1 - top - bottom + output_padding``.
    cache : ConvTranspose2dCache
        For `conv_transpose2d_backward`.

    Raises
    ------
    ValueError
        For a wrong rank, channel count or geometry, or an output with no pixel.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[[[1.0, 2], [3, 4]]]])
    >>> y, cache = conv_transpose2d_forward(x, np.ones((1, 1, 3, 3)), stride=2)
    >>> y[0, 0]
    array([[ 1.,  1.,  3.,  2.,  2.],
           [ 1.,  1.,  3.,  2.,  2.],
           [ 4.,  4., 10.,  6.,  6.],
           [ 3.,  3.,  7.,  4.,  4.],
           [ 3.,  3.,  7.,  4.,  4.]])
    >>> dx, dw, db = conv_transpose2d_backward(y, cache)
    >>> dx[0, 0]
    array([[28., 36.],
           [44., 52.]])
    """
    x, w, b = as_arrays("conv_transpose2d", ("b",), x=x, w=w, b=b)
    check_ndim("conv_transpose2d", "x", x, "(N, C, H, W)")
    check_ndim("conv_transpose2d", "w", w, "(C, F/groups, KH, KW)")
    groups = integer("conv_transpose2d", "groups", groups, 1)
    H, W = x.shape[2:]
    C, FG, KH, KW = w.shape
    if not w.size:
        raise ValueError(f"conv_transpose2d: w: expected no axis of length 0, got shape {w.shape}")
    if x.shape[1] != C:
        raise ValueError(
            f"conv_transpose2d: x: expected {C} channels (w.shape[0]), got {x.shape[1]}"
        )
    if not (H and W):
        raise ValueError(f"conv_transpose2d: x: expected at least one pixel, got {H}x{W}")
    if C % groups:
        raise ValueError(
            f"conv_transpose2d: groups: expected a divisor of the {C} channels, got {groups}"
        )
    if b is not None:
        check_shape("conv_transpose2d", "b", b, (FG * groups,), "one per filter")
    win = Window(
        (KH, KW),
        pair("conv_transpose2d", "stride", stride, 1),
        pads("conv_transpose2d", padding),
        pair("conv_transpose2d", "dilation", dilation, 1),
    )
    y_size = _output_size(win, H, W, pair("conv_transpose2d", "output_padding", output_padding, 0))
    y = pick("conv_transpose2d", VERSIONS, x).forward(x, w, b, win, groups, y_size)
    return y, ConvTranspose2dCache(x, w, b is not None, win, groups, y.shape)


def _output_size(win: Window, H: int, W: int, output_padding: Pair) -> Pair:
    if any(o >= max(s, d) for o, s, d in zip(output_padding, win.stride, win.dilation)):
        raise ValueError(
            f"conv_transpose2d: output_padding: expected less than stride {win.stride} or "
            f"dilation {win.dilation}, got {output_padding}"
        )
    (top, bottom), (left, right) = win.padding
    CH, CW = _canvas_size(win, H, W)
    OH, OW = CH - top - bottom + output_padding[0], CW - left - right + output_padding[1]
    if OH < 1 or OW < 1:
        raise ValueError(
            f"conv_transpose2d: padding: expected an output of at least 1x1, got {OH}x{OW} "
            f"({CH}x{CW} less padding {win.padding} plus output_padding {output_padding})"
        )
    check_pixels("conv_transpose2d", "stride", CH + output_padding[0], CW + output_padding[1])
    return OH, OW


def conv_transpose2d_backward(
    dy: Array, cache: ConvTranspose2dCache
) -> tuple[Array, Array, Array | None]:
    """Gradients of `conv_transpose2d_forward`.

    Parameters
    ----------
    dy : array, shape (N, F, OH, OW)
        Gradient of the loss to y.
    cache : ConvTranspose2dCache
        From `conv_transpose2d_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)
    dw : array, shape (C, F/groups, KH, KW)
    db : array, shape (F,), or None without a bias

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("conv_transpose2d_backward", x=cache.x, dy=dy)
    check_shape("conv_transpose2d_backward", "dy", dy, cache.y_shape, "like y")
    version = pick("conv_transpose2d", VERSIONS, x)
    dx, dw, db = version.backward(dy, x, cache.w, cache.window, cache.groups)
    return dx, dw, db if cache.has_bias else None
