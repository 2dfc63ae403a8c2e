"""2-D average pooling.

    y[n, c, i, j] = 1 / d[i, j] * sum over p, q of x[n, c, i*SH + p - top, j*SW + q - left]

with x padded by zeros. The divisor d counts the places under the window: those on the padded
map, or only those on the map itself (count_include_pad=False). Places past the padding, where
ceil_mode lets the last windows reach, never count. Backward, each pixel gets its share:

    dx[n, c, h, w] = sum of dy[n, c, i, j] / d[i, j] over the windows (i, j) that cover (h, w)

Letters: N images, C channels, H W rows and columns, KH KW kernel, OH OW output, S stride.

References
----------
Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-Based Learning Applied to Document
Recognition", 1998 (there called sub-sampling).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.im2col import crop, pad, taps
from minicnn.ops.max_pool2d import pool_window, reach
from minicnn.shapes import Window, check_ndim, check_shape, integer


class AvgPool2dCache(NamedTuple):
    """What `avg_pool2d_backward` needs from `avg_pool2d_forward`."""

    divisor: Array  # (OH, OW), of x's dtype
    x_shape: tuple[int, ...]  # (N, C, H, W)
    window: Window


def _divisor(x: Array, win: Window, places: tuple[int, int], include_pad: bool) -> Array:
    """Count what each window covers: (OH, OW)."""
    counts = []
    for size, n, k, s, (before, after) in zip(
        x.shape[2:], places, win.kernel, win.stride, win.padding
    ):
        low, high = (-before, size + after) if include_pad else (0, size)
        starts = range(-before, n * s - before, s)
        counts.append([min(start + k, high) - max(start, low) for start in starts])
    rows, columns = (array_module(x).asarray(count, x.dtype) for count in counts)
    return rows[:, None] * columns


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, divisor: Array, win: Window) -> Array:
    SH, SW = win.stride
    y = np.zeros((*x.shape[:2], *divisor.shape), x.dtype)
    x = pad(x, win)
    for n, c, i, j in np.ndindex(y.shape):
        total = 0.0
        for p, q in np.ndindex(win.kernel):
            total += float(x[n, c, i * SH + p, j * SW + q])
        y[n, c, i, j] = total / float(divisor[i, j])
    return y


def _backward_reference(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    N, C, H, W = x_shape
    SH, SW = win.stride
    dx = np.zeros((N, C, *win.padded(H, W)))
    for n, c, i, j in np.ndindex(dy.shape):
        share = float(dy[n, c, i, j]) / float(divisor[i, j])
        for p, q in np.ndindex(win.kernel):
            dx[n, c, i * SH + p, j * SW + q] += share
    return crop(dx, win).astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, divisor: Array, win: Window) -> Array:
    OH, OW = divisor.shape
    x = pad(x, win)
    tall, wide = _split(win)
    rows = _gather(x, tall, OH, x.shape[3])  # (N, C, OH, W)
    y = _gather(rows, wide, OH, OW)  # (N, C, OH, OW)
    y /= divisor
    return y


def _backward_numpy(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    HP, WP = win.padded(*x_shape[2:])
    tall, wide = _split(win)
    drows = _spread(dy / divisor, wide, dy.shape[2], WP)  # (N, C, OH, W)
    return crop(_spread(drows, tall, HP, WP), win)


def _split(win: Window) -> tuple[Window, Window]:
    """A window down the rows and one along the columns: KH + KW steps instead of KH * KW."""
    (KH, KW), (SH, SW) = win.kernel, win.stride
    return (
        win._replace(kernel=(KH, 1), stride=(SH, 1)),
        win._replace(kernel=(1, KW), stride=(1, SW)),
    )


def _gather(x: Array, win: Window, OH: int, OW: int) -> Array:
    """Sum the (N, C, OH, OW) slabs under the window's taps."""
    (_, _, rows, columns), *others = taps(win, OH, OW)
    y = x[:, :, rows, columns].copy()
    for _, _, rows, columns in others:
        y += x[:, :, rows, columns]
    return y


def _spread(dy: Array, win: Window, H: int, W: int) -> Array:
    """Add `dy` to the slab under each tap of an (N, C, H, W) map: the adjoint of `_gather`."""
    N, C, OH, OW = dy.shape
    dx = array_module(dy).zeros((N, C, H, W), dy.dtype)
    for _, _, rows, columns in taps(win, OH, OW):
        dx[:, :, rows, columns] += dy
    return dx


# ---------------------------------------------------------------- numba (see pool_numba.py)


def _forward_numba(x: Array, divisor: Array, win: Window) -> Array:
    from minicnn.ops import pool_numba  # imports Numba: only when asked for

    return pool_numba.average_forward(x, divisor, win)


def _backward_numba(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import pool_numba

    return pool_numba.average_backward(dy, divisor, (x_shape[2], x_shape[3]), win)


# ---------------------------------------------------------------- cupy (see pool_cupy.py)


def _forward_cupy(x: Array, divisor: Array, win: Window) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.avg_forward(x, divisor, win)


def _backward_cupy(dy: Array, divisor: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.avg_backward(dy, divisor, x_shape, win)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def avg_pool2d_forward(
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> tuple[Array, AvgPool2dCache]:
    """Average the values under each place of a sliding window.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        N may be 0.
    kernel_size : int or pair of int
        Vertical and horizontal; at least 1.
    stride : int or pair of int, optional
        The kernel size by default: windows side by side.
    padding : int, pair, or ((top, bottom), (left, right))
        Zeros around each map, at most half the kernel on each side.
    ceil_mode : bool
        Round the output size up: the last windows may reach past the padding, but none starts
        beyond the map.
    count_include_pad : bool
        Whether the padding counts in the mean.
    divisor_override : int, optional
        Divide by this number (at least 1) instead of the count.

    Returns
    -------
    y : array, shape (N, C, OH, OW)
        With ``OH = (H + top + bottom - KH) // stride + 1``.
    cache : AvgPool2dCache
        For `avg_pool2d_backward`.

    Raises
    ------
    ValueError
        For a wrong rank or geometry, a kernel larger than the padded input, or padding above
        half the kernel.
    TypeError
        If `x` is no float array or an argument no integer.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(9.0).reshape(1, 1, 3, 3)
    >>> avg_pool2d_forward(x, 2, stride=1)[0][0, 0]
    array([[2., 3.],
           [5., 6.]])
    >>> avg_pool2d_forward(x, 2, ceil_mode=True)[0][0, 0]
    array([[2. , 3.5],
           [6.5, 8. ]])
    """
    (x,) = as_arrays("avg_pool2d", x=x)
    check_ndim("avg_pool2d", "x", x, "(N, C, H, W)")
    win = pool_window("avg_pool2d", x, kernel_size, stride, padding)
    H, W = x.shape[2:]
    places = win.output_size("avg_pool2d", H, W, ceil_mode)
    divisor = _divisor(x, win, places, count_include_pad)
    if divisor_override is not None:
        divisor[...] = integer("avg_pool2d", "divisor_override", divisor_override, 1)
    win = reach("avg_pool2d", x, win, ceil_mode)
    y = pick("avg_pool2d", VERSIONS, x).forward(x, divisor, win)
    return y, AvgPool2dCache(divisor, x.shape, win)


def avg_pool2d_backward(dy: Array, cache: AvgPool2dCache) -> Array:
    """Gradient of `avg_pool2d_forward`: every dy is shared out evenly over its window.

    Parameters
    ----------
    dy : array, shape (N, C, OH, OW)
        Gradient of the loss to y.
    cache : AvgPool2dCache
        From `avg_pool2d_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    divisor, dy = as_arrays("avg_pool2d_backward", x=cache.divisor, dy=dy)
    check_shape("avg_pool2d_backward", "dy", dy, (*cache.x_shape[:2], *divisor.shape), "like y")
    version = pick("avg_pool2d", VERSIONS, dy)
    return version.backward(dy, divisor, cache.x_shape, cache.window)
