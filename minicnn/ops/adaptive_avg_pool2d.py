"""2-D average pooling to a given output size, whatever the input's.

    y[n, c, i, j] = mean of x[n, c, h, w] over h in bin i of the rows and w in bin j of the columns

where bin i runs from floor(i*H / OH) up to, not including, ceil((i + 1)*H / OH): neighbours
share a pixel where the sizes do not divide. Backward, each pixel gets its share:

    dx[n, c, h, w] = sum of dy[n, c, i, j] / |bin i| / |bin j| over the bins that hold (h, w)

Letters: N images, C channels, H W rows and columns, OH OW output.

References
----------
K. He, X. Zhang, S. Ren, J. Sun, "Spatial Pyramid Pooling in Deep Convolutional Networks for
Visual Recognition", 2014, arXiv:1406.4729.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.shapes import Pair, check_ndim, check_pixels, check_shape, pair

MOST_BINS = 1 << 16  # rows or columns


class AdaptiveAvgPool2dCache(NamedTuple):
    """What `adaptive_avg_pool2d_backward` needs from `adaptive_avg_pool2d_forward`."""

    x_shape: tuple[int, ...]  # (N, C, H, W)
    y_shape: tuple[int, ...]  # (N, C, OH, OW)
    x_like: Array  # (0,): x's dtype and device


def _bins(size: int, places: int) -> list[slice]:
    return [slice(i * size // places, -(-(i + 1) * size // places)) for i in range(places)]


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, output_size: Pair) -> Array:
    N, C, H, W = x.shape
    OH, OW = output_size
    y = np.zeros((N, C, OH, OW), x.dtype)
    for n, c, i, j in np.ndindex(y.shape):
        pixels = [float(v) for v in x[n, c, _bins(H, OH)[i], _bins(W, OW)[j]].flat]
        y[n, c, i, j] = sum(pixels) / len(pixels)
    return y


def _backward_reference(dy: Array, input_size: Pair) -> Array:
    N, C, OH, OW = dy.shape
    H, W = input_size
    dx = np.zeros((N, C, H, W))
    for n, c, i, j in np.ndindex(dy.shape):
        pixels = dx[n, c, _bins(H, OH)[i], _bins(W, OW)[j]]
        pixels += float(dy[n, c, i, j]) / pixels.size
    return dx.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, output_size: Pair) -> Array:
    # The mean of a rectangle is the mean of its rows' means.
    rows = _average(x, 2, output_size[0])  # (N, C, OH, W)
    return _average(rows, 3, output_size[1])  # (N, C, OH, OW)


def _backward_numpy(dy: Array, input_size: Pair) -> Array:
    drows = _share(dy, 3, input_size[1])  # (N, C, OH, W)
    return _share(drows, 2, input_size[0])  # (N, C, H, W)


def _average(x: Array, axis: int, places: int) -> Array:
    """Replace one axis by the means of its bins."""
    bins = _bins(x.shape[axis], places)
    means = [x[_at(axis, chosen)].mean(axis=axis) for chosen in bins]
    return array_module(x).stack(means, axis=axis)


def _share(dy: Array, axis: int, size: int) -> Array:
    """Share each entry of one axis out over its bin: the adjoint of `_average`."""
    shape = list(dy.shape)
    shape[axis] = size
    dx = array_module(dy).zeros(shape, dy.dtype)
    for i, chosen in enumerate(_bins(size, dy.shape[axis])):
        dx[_at(axis, chosen)] += dy[_at(axis, slice(i, i + 1))] / (chosen.stop - chosen.start)
    return dx


def _at(axis: int, chosen: slice) -> tuple[slice, ...]:
    return (*[slice(None)] * axis, chosen)


# ---------------------------------------------------------------- numba (see pool_numba.py)


def _forward_numba(x: Array, output_size: Pair) -> Array:
    from minicnn.ops import pool_numba  # imports Numba: only when asked for

    return pool_numba.adaptive_forward(x, output_size)


def _backward_numba(dy: Array, input_size: Pair) -> Array:
    from minicnn.ops import pool_numba

    return pool_numba.adaptive_backward(dy, input_size)


# ---------------------------------------------------------------- cupy (see pool_cupy.py)


def _forward_cupy(x: Array, output_size: Pair) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.adaptive_forward(x, output_size)


def _backward_cupy(dy: Array, input_size: Pair) -> Array:
    from minicnn.ops import pool_cupy

    return pool_cupy.adaptive_backward(dy, input_size)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def adaptive_avg_pool2d_forward(x: Array, output_size: Any) -> tuple[Array, AdaptiveAvgPool2dCache]:
    """Average over a grid of OH x OW bins that cover the map.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        N may be 0; H and W may not.
    output_size : int, None, or pair of (int or None)
        OH and OW, 1 to 65,536; None keeps the input's size.

    Returns
    -------
    y : array, shape (N, C, OH, OW)
    cache : AdaptiveAvgPool2dCache
        For `adaptive_avg_pool2d_backward`.

    Raises
    ------
    ValueError
        For a wrong rank or size.
    TypeError
        If `x` is no float array or a size no integer.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.arange(10.0).reshape(1, 1, 2, 5)
    >>> adaptive_avg_pool2d_forward(x, (None, 2))[0][0, 0]
    array([[1., 3.],
           [6., 8.]])
    >>> adaptive_avg_pool2d_forward(x, 1)[0][0, 0]
    array([[4.5]])
    """
    (x,) = as_arrays("adaptive_avg_pool2d", x=x)
    check_ndim("adaptive_avg_pool2d", "x", x, "(N, C, H, W)")
    H, W = x.shape[2:]
    if not (H and W):
        raise ValueError(f"adaptive_avg_pool2d: x: expected at least one pixel, got {H}x{W}")
    y_size = grid("adaptive_avg_pool2d", output_size, (H, W))
    y = pick("adaptive_avg_pool2d", VERSIONS, x).forward(x, y_size)
    return y, AdaptiveAvgPool2dCache(x.shape, y.shape, array_module(x).empty(0, x.dtype))


def grid(op: str, output_size: Any, size: Pair) -> Pair:
    """Return (OH, OW) from `output_size`, in which None keeps the map's `size`."""
    wanted = (None, None) if output_size is None else output_size
    if isinstance(wanted, Sequence) and len(wanted) == 2:
        wanted = tuple(given if w is None else w for w, given in zip(wanted, size))
    places = pair(op, "output_size", wanted, 1)
    if max(places) > max(MOST_BINS, *size):
        raise ValueError(
            f"{op}: output_size: expected at most {MOST_BINS:,} rows and columns, got {places}"
        )
    check_pixels(op, "output_size", *places)
    return places


def adaptive_avg_pool2d_backward(dy: Array, cache: AdaptiveAvgPool2dCache) -> Array:
    """Gradient of `adaptive_avg_pool2d_forward`: every dy is shared out evenly over its bin.

    Parameters
    ----------
    dy : array, shape (N, C, OH, OW)
        Gradient of the loss to y.
    cache : AdaptiveAvgPool2dCache
        From `adaptive_avg_pool2d_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    _, dy = as_arrays("adaptive_avg_pool2d_backward", x=cache.x_like, dy=dy)
    check_shape("adaptive_avg_pool2d_backward", "dy", dy, cache.y_shape, "like y")
    H, W = cache.x_shape[2:]
    return pick("adaptive_avg_pool2d", VERSIONS, dy).backward(dy, (H, W))
