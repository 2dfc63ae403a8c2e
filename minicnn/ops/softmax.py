"""Softmax and its logarithm along one axis.

    softmax:      y[c] = e^(x[c] - m) / S          dx[c] = y[c] (dy[c] - sum over k of dy[k] y[k])
    log_softmax:  y[c] = x[c] - m - log S          dx[c] = dy[c] - e^y[c] sum over k of dy[k]

with S the sum over k of e^(x[k] - m). The maximum m of the row cancels in both, and makes every
exponent at most 0, so that nothing overflows and S is at least 1. -inf is a class that cannot
occur; a row with nothing else, like one with a NaN or +inf, gives NaN.

References
----------
I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning", 2016, sections 4.1 and 6.2.2.3.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.shapes import check_shape, integer


class SoftmaxCache(NamedTuple):
    """What the backward of softmax or log_softmax needs from its forward."""

    y: Array
    dim: int


# ---------------------------------------------------------------- reference: one row at a time


def _softmax_row(x: Sequence[float]) -> list[float]:
    m = max(x)
    e = [math.exp(v - m) for v in x]
    total = sum(e)
    return [v / total for v in e]


def _softmax_row_backward(dy: Sequence[float], y: Sequence[float]) -> list[float]:
    mean = sum(g * p for g, p in zip(dy, y))
    return [p * (g - mean) for g, p in zip(dy, y)]


def _log_softmax_row(x: Sequence[float]) -> list[float]:
    m = max(x)
    log_sum = math.log(sum(math.exp(v - m) for v in x))
    return [v - m - log_sum for v in x]


def _log_softmax_row_backward(dy: Sequence[float], y: Sequence[float]) -> list[float]:
    total = sum(dy)
    return [g - math.exp(v) * total for g, v in zip(dy, y)]


def _row_by_row(formula: Callable[..., list[float]]) -> Callable[..., Array]:
    """Make a function of arrays and an axis from one of rows: a loop over the rows."""

    def loop(*args: Any) -> Array:
        *arrays, dim = args
        arrays = [np.moveaxis(a, dim, -1) for a in arrays]  # (..., C)
        out = np.empty_like(args[0])
        rows = np.moveaxis(out, dim, -1)  # (..., C), a view
        for i in np.ndindex(rows.shape[:-1]):
            rows[i] = formula(*(a[i].tolist() for a in arrays))
        return out

    return loop


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _softmax_numpy(x: Array, dim: int) -> Array:
    y = array_module(x).exp(x - x.max(axis=dim, keepdims=True))
    y /= y.sum(axis=dim, keepdims=True)
    return y


def _softmax_backward_numpy(dy: Array, y: Array, dim: int) -> Array:
    return y * (dy - (dy * y).sum(axis=dim, keepdims=True))


def _log_softmax_numpy(x: Array, dim: int) -> Array:
    xp = array_module(x)
    y = x - x.max(axis=dim, keepdims=True)
    y -= xp.log(xp.exp(y).sum(axis=dim, keepdims=True))
    return y


def _log_softmax_backward_numpy(dy: Array, y: Array, dim: int) -> Array:
    return dy - array_module(y).exp(y) * dy.sum(axis=dim, keepdims=True)


# ---------------------------------------------------------------- numba (see softmax_numba.py)


def _numba(log: bool) -> Version:
    def forward(x: Array, dim: int) -> Array:
        from minicnn.ops import softmax_numba  # imports Numba: only when asked for

        return softmax_numba.forward(x, dim, log)

    def backward(dy: Array, y: Array, dim: int) -> Array:
        from minicnn.ops import softmax_numba

        return softmax_numba.backward(dy, y, dim, log)

    return Version(forward, backward)


# ---------------------------------------------------------------- cupy (see softmax_cupy.py)


def _cupy(logarithm: bool) -> Version:
    def forward(x: Array, dim: int) -> Array:
        from minicnn.ops import softmax_cupy

        return softmax_cupy.forward(x, dim, logarithm)

    def backward(dy: Array, y: Array, dim: int) -> Array:
        from minicnn.ops import softmax_cupy

        return softmax_cupy.backward(dy, y, dim, logarithm)

    return Version(forward, backward)


# ---------------------------------------------------------------- versions, public pairs

VERSIONS = {
    "softmax": {
        "reference": Version(_row_by_row(_softmax_row), _row_by_row(_softmax_row_backward)),
        "numpy": Version(_softmax_numpy, _softmax_backward_numpy),
        "numba": _numba(log=False),
        "cupy": _cupy(logarithm=False),
    },
    "log_softmax": {
        "reference": Version(_row_by_row(_log_softmax_row), _row_by_row(_log_softmax_row_backward)),
        "numpy": Version(_log_softmax_numpy, _log_softmax_backward_numpy),
        "numba": _numba(log=True),
        "cupy": _cupy(logarithm=True),
    },
}


def _forward(op: str, x: Array, dim: int) -> tuple[Array, SoftmaxCache]:
    (x,) = as_arrays(op, x=x)
    dim = integer(op, "dim", dim, -x.ndim)
    if dim >= x.ndim:
        raise ValueError(f"{op}: dim: expected an axis of x with shape {x.shape}, got {dim}")
    if not x.shape[dim]:
        raise ValueError(f"{op}: x: expected an entry or more along axis {dim}, got {x.shape}")
    with np.errstate(all="ignore"):  # NaN says it all
        y = pick(op, VERSIONS[op], x).forward(x, dim)
    return y, SoftmaxCache(y, dim)


def _backward(op: str, dy: Array, cache: SoftmaxCache) -> Array:
    y, dy = as_arrays(f"{op}_backward", y=cache.y, dy=dy)
    check_shape(f"{op}_backward", "dy", dy, y.shape, "like y")
    with np.errstate(all="ignore"):
        return pick(op, VERSIONS[op], dy).backward(dy, y, cache.dim)


def softmax_forward(x: Array, dim: int = 1) -> tuple[Array, SoftmaxCache]:
    """Turn scores into probabilities: ``exp(x)`` divided by its sum along an axis.

    Parameters
    ----------
    x : array of one axis or more, float32 or float64
        Scores; (N, C) or (N, C, H, W) with the default axis.
    dim : int
        The axis of the classes, from ``-x.ndim`` to ``x.ndim - 1``.

    Returns
    -------
    y : array, shape of x
        In [0, 1], with a sum of 1 along `dim`.
    cache : SoftmaxCache
        For `softmax_backward`.

    Raises
    ------
    ValueError
        If `x` has no axis `dim`, or no entries along it.
    TypeError
        If `x` is no float array or `dim` no integer.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = softmax_forward(np.log([[1.0, 2.0, 5.0]]))
    >>> y.round(3)
    array([[0.125, 0.25 , 0.625]])
    >>> softmax_backward(np.array([[8.0, 0.0, 0.0]]), cache).round(3)
    array([[ 0.875, -0.25 , -0.625]])
    """
    return _forward("softmax", x, dim)


def softmax_backward(dy: Array, cache: SoftmaxCache) -> Array:
    """Gradient of `softmax_forward`.

    Parameters
    ----------
    dy : array, shape of x
        Gradient of the loss to y.
    cache : SoftmaxCache
        From the forward.

    Returns
    -------
    dx : array, shape of x
        Its sum along the axis is 0.

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, dtype or device.
    """
    return _backward("softmax", dy, cache)


def log_softmax_forward(x: Array, dim: int = 1) -> tuple[Array, SoftmaxCache]:
    """Logarithm of `softmax_forward`, exact where a probability is too small for a float.

    Parameters and errors are those of `softmax_forward`.

    Returns
    -------
    y : array, shape of x
        At most 0.
    cache : SoftmaxCache
        For `log_softmax_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> log_softmax_forward(np.array([[0.0, 1000.0]]))[0]
    array([[-1000.,     0.]])
    """
    return _forward("log_softmax", x, dim)


def log_softmax_backward(dy: Array, cache: SoftmaxCache) -> Array:
    """Gradient of `log_softmax_forward`; arguments and errors are those of `softmax_backward`."""
    return _backward("log_softmax", dy, cache)
