"""Flatten: join neighbouring axes into one; the elements keep their row-major order.

    y[n, (c*H + h)*W + w] = x[n, c, h, w]      (start_dim=1, end_dim=-1)

Backward puts each element of dy back to where it came from: dx has x's shape.

Letters: N images, C channels, H W rows and columns.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minicnn.backend import Array, Version, as_arrays, pick
from minicnn.shapes import check_shape, integer, size


class FlattenCache(NamedTuple):
    """What `flatten_backward` needs from `flatten_forward`."""

    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]


# ---------------------------------------------------------------- reference


def _reshape_reference(a: Array, shape: tuple[int, ...]) -> Array:
    out = np.zeros(shape, a.dtype)
    for source, target in zip(np.ndindex(a.shape), np.ndindex(shape)):  # both row by row
        out[target] = a[source]
    return out


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _reshape_numpy(a: Array, shape: tuple[int, ...]) -> Array:
    return a.reshape(shape)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_reshape_reference, _reshape_reference),
    "numpy": Version(_reshape_numpy, _reshape_numpy),
}


def flatten_forward(x: Array, start_dim: int = 1, end_dim: int = -1) -> tuple[Array, FlattenCache]:
    """Join the axes `start_dim` to `end_dim`, both included, into one.

    Parameters
    ----------
    x : array, float32 or float64
        Of any shape; one without axes counts as one of shape (1,).
    start_dim, end_dim : int
        Axes of x; negative ones count from the end.

    Returns
    -------
    y : array
        A view of `x` where that is C-contiguous.
    cache : FlattenCache
        For `flatten_backward`.

    Raises
    ------
    ValueError
        If x has no such axis, or `start_dim` comes after `end_dim`.
    TypeError
        If `x` is no float array or an axis no integer.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = flatten_forward(np.zeros((2, 3, 4, 5)))
    >>> y.shape
    (2, 60)
    >>> flatten_backward(y, cache).shape
    (2, 3, 4, 5)
    """
    (x,) = as_arrays("flatten", x=x)
    ndim = max(x.ndim, 1)
    start, end = _axis("start_dim", start_dim, ndim), _axis("end_dim", end_dim, ndim)
    if start > end:
        raise ValueError(
            f"flatten: start_dim: expected at most end_dim {end_dim}, got {start_dim} "
            f"for shape {x.shape}"
        )
    y_shape = (*x.shape[:start], size(x.shape[start : end + 1]), *x.shape[end + 1 :])
    return pick("flatten", VERSIONS, x).forward(x, y_shape), FlattenCache(x.shape, y_shape)


def flatten_backward(dy: Array, cache: FlattenCache) -> Array:
    """Gradient of `flatten_forward`.

    Parameters
    ----------
    dy : array, shape of y
        Gradient of the loss to y.
    cache : FlattenCache
        From `flatten_forward`.

    Returns
    -------
    dx : array, shape of x
        A view of `dy` where that is C-contiguous.

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape or is no float array.
    """
    (dy,) = as_arrays("flatten_backward", dy=dy)
    check_shape("flatten_backward", "dy", dy, cache.y_shape, "like y")
    return pick("flatten", VERSIONS, dy).backward(dy, cache.x_shape)


def _axis(name: str, value: int, ndim: int) -> int:
    axis = integer("flatten", name, value, -ndim)
    if axis >= ndim:
        raise ValueError(
            f"flatten: {name}: expected an axis from {-ndim} to {ndim - 1}, got {axis}"
        )
    return axis % ndim
