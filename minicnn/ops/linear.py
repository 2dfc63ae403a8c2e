"""The fully connected layer: every output sees every input.

    y[m, o] = b[o] + sum over i of w[o, i] * x[m, i]

Backward, each from the line above by the chain rule:

    db[o]    = sum over m of dy[m, o]
    dw[o, i] = sum over m of dy[m, o] * x[m, i]
    dx[m, i] = sum over o of dy[m, o] * w[o, i]

Letters: M rows (all axes of x but the last, as one), I inputs, O outputs.

References
----------
D. E. Rumelhart, G. E. Hinton, R. J. Williams, "Learning representations by back-propagating
errors", Nature 323, 1986.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minicnn.backend import Array, Version, as_arrays, matmul, pick
from minicnn.shapes import check_ndim, check_shape, size


class LinearCache(NamedTuple):
    """What `linear_backward` needs from `linear_forward`."""

    x: Array  # (..., I)
    w: Array  # (O, I)
    has_bias: bool


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, w: Array, b: Array | None) -> Array:
    y = np.zeros((x.shape[0], w.shape[0]), x.dtype)
    for m, o in np.ndindex(y.shape):
        total = 0.0 if b is None else float(b[o])
        for i in range(w.shape[1]):
            total += float(w[o, i]) * float(x[m, i])
        y[m, o] = total
    return y


def _backward_reference(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape[0])
    for m, o in np.ndindex(dy.shape):
        g = float(dy[m, o])
        db[o] += g
        for i in range(w.shape[1]):
            dw[o, i] += g * float(x[m, i])
            dx[m, i] += g * float(w[o, i])
    return dx.astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, w: Array, b: Array | None) -> Array:
    y = x @ w.T  # (M, O)
    if b is not None:
        y += b
    return y


def _backward_numpy(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    return dy @ w, dy.T @ x, dy.sum(axis=0, dtype=np.float64).astype(dy.dtype)


# ---------------------------------------------------------------- cupy (see linear_cupy.py)


# Large products are cuBLAS's, called so that a CUDA graph can hold them: CuPy's own refuse.


def _forward_cupy(x: Array, w: Array, b: Array | None) -> Array:
    from minicnn.ops import linear_cupy

    if linear_cupy.applies(len(x), w):
        return linear_cupy.forward(x, w, b)
    y = matmul(x, w.T)  # (M, O)
    if b is not None:
        y += b
    return y


def _backward_cupy(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    from minicnn.ops import linear_cupy

    if linear_cupy.applies(len(x), w):
        return linear_cupy.backward(dy, x, w)
    db = dy.sum(axis=0, dtype=np.float64).astype(dy.dtype)
    return matmul(dy, w), matmul(dy.T, x), db


# ---------------------------------------------------------------- numba (see linear_numba.py)


def _forward_numba(x: Array, w: Array, b: Array | None) -> Array:
    from minicnn.ops import linear_numba  # imports Numba: only when asked for

    y = np.empty((x.shape[0], w.shape[0]), x.dtype)
    linear_numba.forward(x, w, b, y)
    return y


def _backward_numba(dy: Array, x: Array, w: Array) -> tuple[Array, Array, Array]:
    from minicnn.ops import linear_numba

    dx, dw, db = np.empty_like(x), np.zeros_like(w), np.zeros(w.shape[0], w.dtype)
    linear_numba.backward(dy, x, w, dw, db, dx)
    return dx, dw, db


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def linear_forward(x: Array, w: Array, b: Array | None = None) -> tuple[Array, LinearCache]:
    """Map the last axis of `x` from I inputs to O outputs.

    Parameters
    ----------
    x : array, shape (..., I), float32 or float64
        Any number of leading axes, of any length.
    w : array, shape (O, I)
        Weights, of x's dtype.
    b : array, shape (O,), optional
        Bias, of x's dtype.

    Returns
    -------
    y : array, shape (..., O)
    cache : LinearCache
        For `linear_backward`.

    Raises
    ------
    ValueError
        For a wrong rank, or sizes that do not fit together.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> x, w = np.array([[1.0, 2.0, 3.0]]), np.array([[1.0, 0.0, -1.0], [0.5, 0.5, 0.5]])
    >>> y, cache = linear_forward(x, w, np.array([0.0, 1.0]))
    >>> y
    array([[-2.,  4.]])
    >>> dx, dw, db = linear_backward(np.array([[1.0, 2.0]]), cache)
    >>> dx
    array([[2., 1., 0.]])
    """
    x, w, b = as_arrays("linear", ("b",), x=x, w=w, b=b)
    check_ndim("linear", "w", w, "(O, I)")
    if not w.size:
        raise ValueError(f"linear: w: expected no axis of length 0, got shape {w.shape}")
    outputs, inputs = w.shape
    if x.ndim < 1 or x.shape[-1] != inputs:
        fix = " (fix: flatten x first)" if x.ndim > 2 and size(x.shape[1:]) == inputs else ""
        raise ValueError(
            f"linear: x: expected shape (..., {inputs}) (w.shape[1]), got {x.shape}{fix}"
        )
    if b is not None:
        check_shape("linear", "b", b, (outputs,), "one per output")
    y = pick("linear", VERSIONS, x).forward(_rows(x), w, b)
    return y.reshape(*x.shape[:-1], outputs), LinearCache(x, w, b is not None)


def linear_backward(dy: Array, cache: LinearCache) -> tuple[Array, Array, Array | None]:
    """Gradients of `linear_forward`.

    Parameters
    ----------
    dy : array, shape (..., O)
        Gradient of the loss to y.
    cache : LinearCache
        From `linear_forward`.

    Returns
    -------
    dx : array, shape (..., I)
    dw : array, shape (O, I)
    db : array, shape (O,), or None without a bias

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("linear_backward", x=cache.x, dy=dy)
    check_shape("linear_backward", "dy", dy, (*x.shape[:-1], cache.w.shape[0]), "like y")
    dx, dw, db = pick("linear", VERSIONS, x).backward(_rows(dy), _rows(x), cache.w)
    return dx.reshape(x.shape), dw, db if cache.has_bias else None


def _rows(a: Array) -> Array:
    return a.reshape(size(a.shape[:-1]), a.shape[-1])  # (M, last)
