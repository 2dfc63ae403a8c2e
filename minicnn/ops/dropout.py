"""Dropout: in training, each element is zeroed with probability p, apart from the others.

    y = x * mask,   mask = 0 with probability p, else 1 / (1 - p)

The factor keeps the expected value of y at x, so evaluation leaves x alone ("inverted"
dropout: the paper scales the weights at evaluation). Backward, with the same mask:

    dx = dy * mask

References
----------
N. Srivastava, G. Hinton, A. Krizhevsky, I. Sutskever, R. Salakhutdinov, "Dropout: A Simple Way
to Prevent Neural Networks from Overfitting", JMLR 15, 2014.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, from_host, pick
from minicnn.ops import cuda
from minicnn.shapes import check_shape, integer, number


class DropoutCache(NamedTuple):
    """What `dropout_backward` needs from `dropout_forward`."""

    mask: Array | None  # of y's shape, entries 0 and 1 / (1 - p); None: y equals x
    y_shape: tuple[int, ...]


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, keep: Array, scale: float) -> tuple[Array, Array]:
    mask = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        mask[index] = scale if keep[index] else 0.0
    return _masked_reference(x, mask), mask


def _masked_reference(a: Array, mask: Array) -> Array:
    out = np.zeros_like(a)
    for index in np.ndindex(a.shape):
        out[index] = float(a[index]) * float(mask[index])
    return out


# ---------------------------------------------------------------- numpy


def _forward_numpy(x: Array, keep: Array, scale: float) -> tuple[Array, Array]:
    mask = keep * x.dtype.type(scale)
    return x * mask, mask


def _masked_numpy(a: Array, mask: Array) -> Array:
    return a * mask


# ---------------------------------------------------------------- numba (see elementwise_numba.py)


def _forward_numba(x: Array, keep: Array, scale: float) -> tuple[Array, Array]:
    mask = keep * x.dtype.type(scale)
    return _masked_numba(x, mask), mask


def _masked_numba(a: Array, mask: Array) -> Array:
    from minicnn.ops import elementwise_numba  # imports Numba: only when asked for

    return elementwise_numba.map_two("product", a, mask)


# ---------------------------------------------------------------- cupy (see elementwise.cu)


def _forward_cupy(x: Array, keep: Array, scale: float) -> tuple[Array, Array]:
    xp = array_module(x)
    y, mask = xp.empty_like(x), xp.empty_like(x)
    cuda.each("elementwise", "dropout_forward", y, x, keep, y, mask, scale)
    return y, mask


def _masked_cupy(a: Array, mask: Array) -> Array:
    out = array_module(a).empty_like(a)
    cuda.each("elementwise", "dropout_backward", out, a, mask, out)
    return out


# ---------------------------------------------------------------- versions, public pair

# What is kept (bool) is drawn before, so that all versions share it; forward returns y and mask.
VERSIONS = {
    "reference": Version(_forward_reference, _masked_reference),
    "numpy": Version(_forward_numpy, _masked_numpy),
    "numba": Version(_forward_numba, _masked_numba),
    "cupy": Version(_forward_cupy, _masked_cupy),
}


def dropout_forward(
    x: Array,
    p: float = 0.5,
    training: bool = True,
    rng: int | np.random.Generator | None = None,
) -> tuple[Array, DropoutCache]:
    """Zero each element with probability `p` and scale the others by ``1 / (1 - p)``.

    Parameters
    ----------
    x : array, any shape, float32 or float64
    p : float
        From 0 to 1.
    training : bool
        False leaves x as it is.
    rng : numpy.random.Generator or int
        Draws the mask, for CuPy arrays too. A Generator moves on, an int is a seed and gives the
        same mask each time, and so do float32 and float64. Needed in training unless p is 0 or
        1, where nothing is drawn.

    Returns
    -------
    y : array, shape of x
        In evaluation and for p = 0 a copy of x.
    cache : DropoutCache
        For `dropout_backward`.

    Raises
    ------
    ValueError
        If `p` is not from 0 to 1, or a seed is negative.
    TypeError
        If `x` is no float array, or `rng` is missing or of another type.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = dropout_forward(np.ones(8), p=0.5, rng=np.random.default_rng(0))
    >>> y
    array([2., 2., 2., 0., 0., 0., 0., 0.])
    >>> bool((dropout_backward(np.ones(8), cache) == y).all())
    True
    """
    (x,) = as_arrays("dropout", x=x)
    p = number("dropout", "p", p, ge=0, le=1)
    if not training or p == 0:
        return x.copy(), DropoutCache(None, x.shape)
    keep = _draw(x, p, rng)
    scale = 1 / (1 - p) if p < 1 else 0.0
    y, mask = pick("dropout", VERSIONS, x).forward(x, keep, scale)
    return y, DropoutCache(mask, x.shape)


def dropout_backward(dy: Array, cache: DropoutCache) -> Array:
    """Gradient of `dropout_forward`.

    Parameters
    ----------
    dy : array, shape of y
        Gradient of the loss to y.
    cache : DropoutCache
        From `dropout_forward`.

    Returns
    -------
    dx : array, shape of x

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from the mask in dtype or device.
    """
    mask, dy = as_arrays("dropout_backward", ("mask",), mask=cache.mask, dy=dy)
    check_shape("dropout_backward", "dy", dy, cache.y_shape, "like y")
    return dy.copy() if mask is None else pick("dropout", VERSIONS, dy).backward(dy, mask)


def _draw(x: Array, p: float, rng: Any) -> Array:
    if p == 1:
        return array_module(x).zeros(x.shape, np.bool_)
    if rng is None:
        raise TypeError(
            "dropout: rng: expected a numpy.random.Generator or a seed in training, got None "
            "(fix: pass a Generator, rng=numpy.random.default_rng(0))"
        )
    seed = rng if isinstance(rng, np.random.Generator) else integer("dropout", "rng", rng, 0)
    return from_host(x, lambda: np.random.default_rng(seed).random(x.shape, np.float32) >= p)
