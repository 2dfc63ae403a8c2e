"""2-D max pooling.

    y[n, c, i, j] = max over p, q of x[n, c, i*SH + p*DH - top, j*SW + q*DW - left]

over the taps inside the map: padding never wins. The first maximum in row-major order (p, then
q) is the winner, and a NaN beats every number. Backward, the gradient goes to the winners:

    dx[n, c, h, w] = sum of dy[n, c, i, j] over the windows (i, j) whose winner is (h, w)

Letters: N images, C channels, H W rows and columns, KH KW kernel, OH OW output, S stride,
D dilation.

References
----------
D. Scherer, A. Müller, S. Behnke, "Evaluation of Pooling Operations in Convolutional
Architectures for Object Recognition", 2010.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick, recording
from minicnn.ops.im2col import pad, taps
from minicnn.shapes import Window, check_ndim, check_shape, pads, pair


class MaxPool2dCache(NamedTuple):
    """What `max_pool2d_backward` needs from `max_pool2d_forward`."""

    winner: Array  # (N, C, OH, OW) int64: h*W + w of each window's maximum in the unpadded map
    x_shape: tuple[int, ...]  # (N, C, H, W)
    window: Window
    x_like: Array  # (0,): x's dtype and device


def pool_window(
    op: str, x: Array, kernel_size: Any, stride: Any, padding: Any, dilation: Any = 1
) -> Window:
    """Check the arguments of a pooling window; a `stride` of None is the kernel's.

    Raises
    ------
    ValueError
        If a side has more padding than half the kernel, or the taps step over the whole map.
    """
    kernel = pair(op, "kernel_size", kernel_size, 1)
    stride = kernel if stride is None else pair(op, "stride", stride, 1)
    win = Window(kernel, stride, pads(op, padding), pair(op, "dilation", dilation, 1))
    if any(max(sides) > k // 2 for k, sides in zip(kernel, win.padding)):
        raise ValueError(
            f"{op}: padding: expected at most half the kernel {kernel} on each side, "
            f"got {win.padding}"
        )
    H, W = x.shape[2:]
    win.output_size(op, H, W)
    # The first window starts `before` ahead of the map: its first tap that is not in that padding
    # lands on pixel -before % d. Should that be past the end, there is no pixel to win.
    if any(-before % d >= size for size, d, (before, _) in zip((H, W), win.dilation, win.padding)):
        raise ValueError(
            f"{op}: x: expected a map that every window meets, got {H}x{W} between the taps of "
            f"the first (dilation {win.dilation}, padding {win.padding})"
        )
    return win


def reach(op: str, x: Array, win: Window, ceil_mode: bool) -> Window:
    """Set the bottom and right padding to what the last windows reach, which `ceil_mode` moves."""
    H, W = x.shape[2:]
    (top, _), (left, _) = win.padding
    (OH, OW), (SH, SW) = win.output_size(op, H, W, ceil_mode), win.stride
    bottom = max(0, (OH - 1) * SH + win.extent[0] - top - H)
    right = max(0, (OW - 1) * SW + win.extent[1] - left - W)
    return win._replace(padding=((top, bottom), (left, right)))


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, win: Window) -> tuple[Array, Array]:
    N, C, H, W = x.shape
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    y = np.zeros((N, C, *win.output_size("max_pool2d", H, W)), x.dtype)
    winner = np.zeros(y.shape, np.int64)
    for n, c, i, j in np.ndindex(y.shape):
        best, at = -math.inf, -1
        for p, q in np.ndindex(win.kernel):
            h, w = i * SH + p * DH - top, j * SW + q * DW - left
            if 0 <= h < H and 0 <= w < W:
                value = float(x[n, c, h, w])
                first_nan = math.isnan(value) and not math.isnan(best)
                if at < 0 or value > best or first_nan:
                    best, at = value, h * W + w
        y[n, c, i, j], winner[n, c, i, j] = best, at
    return y, winner


def _backward_reference(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    dx = np.zeros(x_shape)
    for n, c, i, j in np.ndindex(dy.shape):
        h, w = divmod(int(winner[n, c, i, j]), x_shape[3])
        dx[n, c, h, w] += float(dy[n, c, i, j])
    return dx.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, win: Window) -> tuple[Array, Array]:
    xp = array_module(x)
    H, W = x.shape[2:]
    (SH, SW), (DH, DW) = win.stride, win.dilation
    (top, _), (left, _) = win.padding
    OH, OW = win.output_size("max_pool2d", H, W)
    places = list(taps(win, OH, OW))
    padded = pad(x, win, -np.inf)
    slabs = [padded[:, :, rows, columns] for _, _, rows, columns in places]  # (N, C, OH, OW) each
    y = slabs[0].copy()
    for slab in slabs[1:]:
        xp.maximum(y, slab, out=y)  # a NaN stays

    # The winner is the first tap that equals y, so it is enough to count the taps passed before.
    has_nan = recording() or bool(xp.isnan(y).any())  # a NaN equals nothing
    inside = None if padded is x else pad(xp.ones((1, 1, H, W), bool), win, False)
    count = xp.zeros(y.shape, np.min_scalar_type(len(slabs)))  # small, so that it stays in cache
    passed = xp.ones(y.shape, bool)
    for slab, (_, _, rows, columns) in zip(slabs[:-1], places):
        hit = slab == y
        if has_nan:
            hit |= slab != slab
        if inside is not None:  # in a window of -inf the padding would hit
            hit &= inside[:, :, rows, columns]
        passed &= ~hit
        count += passed
    KH, KW = win.kernel
    offsets = xp.arange(KH)[:, None] * DH * W + xp.arange(KW) * DW  # (KH, KW)
    winner = xp.take(offsets, count)  # (N, C, OH, OW), from the window's first tap
    winner += (xp.arange(OH)[:, None] * SH - top) * W + xp.arange(OW) * SW - left
    return y, winner


def _backward_numpy(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    xp = array_module(dy)
    N, C, H, W = x_shape
    dx = xp.zeros(N * C * H * W, dy.dtype)
    plane = xp.arange(N * C, dtype=np.int64).reshape(N, C, 1, 1)
    at = winner + plane * (H * W)  # (N, C, OH, OW), into flat dx
    # Windows this many places apart share no pixel, so += meets no index twice.
    apart = [-(-extent // stride) for extent, stride in zip(win.extent, win.stride)]
    for i, j in np.ndindex(*apart):
        some = np.s_[:, :, i :: apart[0], j :: apart[1]]
        dx[at[some]] += dy[some]
    return dx.reshape(x_shape)


# ---------------------------------------------------------------- numba (see pool_numba.py)


def _forward_numba(x: Array, win: Window) -> tuple[Array, Array]:
    from minicnn.ops import pool_numba  # imports Numba: only when asked for

    return pool_numba.max_forward(x, win)


def _backward_numba(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import pool_numba

    return pool_numba.max_backward(dy, winner, x_shape)


# ---------------------------------------------------------------- cupy (see pool_cupy.py)


def _forward_cupy(x: Array, win: Window) -> tuple[Array, Array]:
    from minicnn.ops import pool_cupy

    return pool_cupy.max_forward(x, win)


def _backward_cupy(dy: Array, winner: Array, x_shape: tuple[int, ...], win: Window) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.max_backward(dy, winner, x_shape, win)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def max_pool2d_forward(
    x: Array,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> tuple[Array, MaxPool2dCache]:
    """Keep the largest value under each place of a sliding window.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        N may be 0.
    kernel_size, dilation : int or pair of int
        Vertical and horizontal; at least 1.
    stride : int or pair of int, optional
        The kernel size by default: windows side by side.
    padding : int, pair, or ((top, bottom), (left, right))
        At most half the kernel on each side. It never wins.
    ceil_mode : bool
        Round the output size up: the last windows may reach past the padding, but none starts
        beyond the map.

    Returns
    -------
    y : array, shape (N, C, OH, OW)
        With ``OH = (H + top + bottom - dilation * (KH - 1) - 1) // stride + 1``.
    cache : MaxPool2dCache
        For `max_pool2d_backward`; its `winner` says where each maximum was: ``h*W + w``, as
        PyTorch's ``return_indices``. The first of equal maxima wins, and the first NaN.

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
    >>> x = np.array([[1.0, 5, 2, 2], [4, 3, 2, 0]]).reshape(1, 1, 2, 4)
    >>> y, cache = max_pool2d_forward(x, 2)
    >>> y
    array([[[[5., 2.]]]])
    >>> cache.winner
    array([[[[1, 2]]]])
    >>> max_pool2d_backward(np.array([[[[10.0, 20.0]]]]), cache)
    array([[[[ 0., 10., 20.,  0.],
             [ 0.,  0.,  0.,  0.]]]])
    """
    (x,) = as_arrays("max_pool2d", x=x)
    check_ndim("max_pool2d", "x", x, "(N, C, H, W)")
    win = pool_window("max_pool2d", x, kernel_size, stride, padding, dilation)
    win = reach("max_pool2d", x, win, ceil_mode)
    y, winner = pick("max_pool2d", VERSIONS, x).forward(x, win)
    return y, MaxPool2dCache(winner, x.shape, win, array_module(x).empty(0, x.dtype))


def max_pool2d_backward(dy: Array, cache: MaxPool2dCache) -> Array:
    """Gradient of `max_pool2d_forward`: every dy goes to its window's winner.

    Parameters
    ----------
    dy : array, shape (N, C, OH, OW)
        Gradient of the loss to y.
    cache : MaxPool2dCache
        From `max_pool2d_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    _, dy = as_arrays("max_pool2d_backward", x=cache.x_like, dy=dy)
    check_shape("max_pool2d_backward", "dy", dy, cache.winner.shape, "like y")
    version = pick("max_pool2d", VERSIONS, dy)
    return version.backward(dy, cache.winner, cache.x_shape, cache.window)
