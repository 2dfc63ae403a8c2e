"""Layer normalisation: each example gets mean 0 and variance 1 over its last axes, then w and b.

For row r, with the sums over its D values:

    mean[r]    = sum of x[r] / D,   var[r] = sum of (x[r] - mean[r])^2 / D
    xhat[r, d] = (x[r, d] - mean[r]) / sqrt(var[r] + eps)
    y[r, d]    = w[d] * xhat[r, d] + b[d]

Backward, with g = w * dy the gradient to xhat (the last line is derived in `normalize`):

    db[d] = sum over r of dy[r, d]
    dw[d] = sum over r of dy[r, d] * xhat[r, d]
    dx[r] = rstd[r] * (g[r] - mean of g[r] - xhat[r] * mean of g[r] * xhat[r])

No row sees another, so training and evaluation are the same.

Letters: R rows (all axes of x but the normalised ones, as one), D values in a row (the
normalised axes, as one), rstd = 1 / sqrt(var + eps).

References
----------
J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.normalize import center, moments, normalize_backward, too_short
from minicnn.shapes import check_shape, integer, number, size


class LayerNormCache(NamedTuple):
    """What `layer_norm_backward` needs from `layer_norm_forward`."""

    x: Array  # (R, D)
    w: Array  # (D,); ones if there was none
    mean: Array  # (R,) float64
    rstd: Array  # (R,) float64
    has_weight: bool
    has_bias: bool
    normalized_shape: tuple[int, ...]
    y_shape: tuple[int, ...]


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    R, D = x.shape
    y, mean, rstd = np.zeros_like(x), np.zeros(R), np.zeros(R)
    for r in range(R):
        for d in range(D):
            mean[r] += float(x[r, d]) / D
        var = 0.0
        for d in range(D):
            var += (float(x[r, d]) - mean[r]) ** 2 / D
        rstd[r] = 1 / np.sqrt(var + eps)
        for d in range(D):
            y[r, d] = float(w[d]) * (float(x[r, d]) - mean[r]) * rstd[r] + float(b[d])
    return y, mean, rstd


def _backward_reference(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    R, D = x.shape
    dx, dw, db = np.zeros(x.shape), np.zeros(D), np.zeros(D)
    for r in range(R):
        dmean = dvar = 0.0
        for d in range(D):
            centred = float(x[r, d]) - mean[r]
            db[d] += float(dy[r, d])
            dw[d] += float(dy[r, d]) * centred * rstd[r]
            dmean -= float(dy[r, d]) * float(w[d]) * rstd[r]
            dvar -= float(dy[r, d]) * float(w[d]) * centred * rstd[r] ** 3 / 2
        for d in range(D):
            centred = float(x[r, d]) - mean[r]
            dx[r, d] = float(dy[r, d]) * float(w[d]) * rstd[r] + (dmean + dvar * 2 * centred) / D
    return dx.astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    y, mean, var = moments(x, (1,))  # (R, D), (R, 1), (R, 1)
    rstd = (var + eps) ** -0.5
    y *= rstd.astype(x.dtype)
    y *= w
    y += b
    return y, mean.ravel(), rstd.ravel()


def _backward_numpy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    scale = rstd[:, None].astype(x.dtype)  # (R, 1)
    xhat = center(x, mean[:, None])
    xhat *= scale
    dx, _, _ = normalize_backward(dy * w, xhat, scale, (1,))
    dw = (dy * xhat).sum(axis=0, dtype=np.float64)
    db = dy.sum(axis=0, dtype=np.float64)
    return dx, dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numba (see norm_numba.py)


def _forward_numba(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _forward_numpy(x, w, b, eps)
    from minicnn.ops import norm_numba  # imports Numba: only when asked for

    return norm_numba.layer_norm_forward(x, w, b, eps)


def _backward_numba(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _backward_numpy(dy, x, w, mean, rstd)
    from minicnn.ops import norm_numba

    return norm_numba.layer_norm_backward(dy, x, w, mean, rstd)


# ---------------------------------------------------------------- cupy (see norm_cupy.py)


def _forward_cupy(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    from minicnn.ops import norm_cupy

    if not x.size:
        return _forward_numpy(x, w, b, eps)
    y, mean, rstd = norm_cupy.rows_forward(x[:, None, :, None], w, b, eps)  # (R, 1, D, 1)
    return y.reshape(x.shape), mean.ravel(), rstd.ravel()


def _backward_cupy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    from minicnn.ops import norm_cupy

    if not x.size:
        return _backward_numpy(dy, x, w, mean, rstd)
    dx, dw, db = norm_cupy.rows_backward(dy, x[:, None, :, None], w, mean, rstd)
    return dx.reshape(x.shape), dw, db


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def layer_norm_forward(
    x: Array,
    normalized_shape: int | Sequence[int],
    w: Array | None = None,
    b: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, LayerNormCache]:
    """Normalise over the last axes, those of `normalized_shape`.

    Parameters
    ----------
    x : array, shape (..., *normalized_shape), float32 or float64
        The leading axes may have any length.
    normalized_shape : int or sequence of int
        Lengths of the axes to normalise over.
    w, b : array, shape normalized_shape, optional
        Scale and shift, of x's dtype; 1 and 0 otherwise.
    eps : float
        Added to the variance, above 0.

    Returns
    -------
    y : array, shape of x
    cache : LayerNormCache
        For `layer_norm_backward`.

    Raises
    ------
    ValueError
        For a wrong shape or number.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = layer_norm_forward(np.array([[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]]), 3)
    >>> y.round(3)
    array([[-1.225,  0.   ,  1.225],
           [ 0.   ,  0.   ,  0.   ]])
    """
    x, w, b = as_arrays("layer_norm", ("w", "b"), x=x, w=w, b=b)
    shape = _shape(normalized_shape)
    eps = number("layer_norm", "eps", eps, gt=0)
    if x.shape[-len(shape) :] != shape:
        raise ValueError(
            f"layer_norm: x: expected normalized_shape {shape} as its last axes, got {x.shape}"
        )
    for name, a in (("w", w), ("b", b)):
        if a is not None:
            check_shape("layer_norm", name, a, shape, "normalized_shape")

    xp, D = array_module(x), size(shape)
    scale = xp.ones(D, x.dtype) if w is None else w.reshape(D)
    shift = xp.zeros(D, x.dtype) if b is None else b.reshape(D)
    rows = x.reshape(size(x.shape[: -len(shape)]), D)  # (R, D)
    y, mean, rstd = pick("layer_norm", VERSIONS, x).forward(rows, scale, shift, eps)
    return y.reshape(x.shape), LayerNormCache(
        rows, scale, mean, rstd, w is not None, b is not None, shape, x.shape
    )


def layer_norm_backward(
    dy: Array, cache: LayerNormCache
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `layer_norm_forward`.

    Parameters
    ----------
    dy : array, shape of y
        Gradient of the loss to y.
    cache : LayerNormCache
        From `layer_norm_forward`.

    Returns
    -------
    dx : array, shape of x
    dw, db : array, shape normalized_shape, or None without that parameter

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("layer_norm_backward", x=cache.x, dy=dy)
    check_shape("layer_norm_backward", "dy", dy, cache.y_shape, "like y")
    dx, dw, db = pick("layer_norm", VERSIONS, x).backward(
        dy.reshape(x.shape), x, cache.w, cache.mean, cache.rstd
    )
    return (
        dx.reshape(cache.y_shape),
        dw.reshape(cache.normalized_shape) if cache.has_weight else None,
        db.reshape(cache.normalized_shape) if cache.has_bias else None,
    )


def _shape(value: Any) -> tuple[int, ...]:
    lengths = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    if not lengths:
        raise ValueError("layer_norm: normalized_shape: expected at least one axis, got none")
    return tuple(integer("layer_norm", "normalized_shape", length, 1) for length in lengths)
