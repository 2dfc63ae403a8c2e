"""Group normalisation: each group of channels of each image gets mean 0 and variance 1.

Image n and group g (channels g*C/G to (g + 1)*C/G), with the sums over their M = C/G*L values:

    mean[n, g] = sum of x / M,   var[n, g] = sum of (x - mean[n, g])^2 / M
    xhat       = (x - mean[n, g]) / sqrt(var[n, g] + eps)
    y          = w[c] * xhat + b[c]

Backward, with h = w[c] * dy the gradient to xhat (the last line is derived in `normalize`):

    db[c] = sum over n and places of dy
    dw[c] = sum over n and places of dy * xhat
    dx    = rstd[n, g] * (h - mean of h - xhat * mean of h * xhat)

with the means over the group. One group normalises a whole image, C groups each map on its own
(instance normalisation). No image sees another, so training and evaluation are the same.

Letters: N images, C channels, G groups, L places in a map (H*W), rstd = 1 / sqrt(var + eps).

References
----------
Y. Wu, K. He, "Group Normalization", 2018, arXiv:1803.08494.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.normalize import (
    center,
    check_channels,
    moments,
    normalize_backward,
    too_short,
    total,
)
from minicnn.shapes import check_shape, integer, number, size

AXES = (2, 3)  # of (N, G, C/G, L): what shares a mean and a variance


class GroupNormCache(NamedTuple):
    """What `group_norm_backward` needs from `group_norm_forward`."""

    x: Array  # (N, G, C/G, L)
    w: Array  # (G, C/G, 1); ones if there was none
    mean: Array  # (N, G) float64
    rstd: Array  # (N, G) float64
    has_weight: bool
    has_bias: bool
    y_shape: tuple[int, ...]  # (N, C, ...)


# ---------------------------------------------------------------- reference


def _forward_reference(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    N, G, CG, L = x.shape
    y, mean, rstd = np.zeros_like(x), np.zeros((N, G)), np.zeros((N, G))
    for n, g in np.ndindex(N, G):
        for c, i in np.ndindex(CG, L):
            mean[n, g] += float(x[n, g, c, i]) / (CG * L)
        var = 0.0
        for c, i in np.ndindex(CG, L):
            var += (float(x[n, g, c, i]) - mean[n, g]) ** 2 / (CG * L)
        rstd[n, g] = 1 / np.sqrt(var + eps)
        for c, i in np.ndindex(CG, L):
            xhat = (float(x[n, g, c, i]) - mean[n, g]) * rstd[n, g]
            y[n, g, c, i] = float(w[g, c, 0]) * xhat + float(b[g, c, 0])
    return y, mean, rstd


def _backward_reference(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    N, G, CG, L = x.shape
    dx, dw, db = np.zeros(x.shape), np.zeros(w.shape), np.zeros(w.shape)
    for n, g in np.ndindex(N, G):
        r, dmean, dvar = rstd[n, g], 0.0, 0.0
        for c, i in np.ndindex(CG, L):
            d, centred = float(dy[n, g, c, i]), float(x[n, g, c, i]) - mean[n, g]
            db[g, c, 0] += d
            dw[g, c, 0] += d * centred * r
            dmean -= d * float(w[g, c, 0]) * r
            dvar -= d * float(w[g, c, 0]) * centred * r**3 / 2
        for c, i in np.ndindex(CG, L):
            d, centred = float(dy[n, g, c, i]), float(x[n, g, c, i]) - mean[n, g]
            dx[n, g, c, i] = d * float(w[g, c, 0]) * r + (dmean + dvar * 2 * centred) / (CG * L)
    return dx.astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    y, mean, var = moments(x, AXES)  # (N, G, C/G, L), (N, G, 1, 1), (N, G, 1, 1)
    rstd = (var + eps) ** -0.5
    y *= (w * rstd).astype(x.dtype)  # (N, G, C/G, 1)
    y += b
    return y, mean[:, :, 0, 0], rstd[:, :, 0, 0]


def _backward_numpy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    scale = rstd[:, :, None, None].astype(x.dtype)  # (N, G, 1, 1)
    xhat = center(x, mean[:, :, None, None])
    xhat *= scale
    dx, _, _ = normalize_backward(dy * w, xhat, scale, AXES)
    dw, db = total(dy * xhat, (0, 3))[0], total(dy, (0, 3))[0]  # (G, C/G, 1)
    return dx, dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numba (see norm_numba.py)


def _forward_numba(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _forward_numpy(x, w, b, eps)
    from minicnn.ops import norm_numba  # imports Numba: only when asked for

    return norm_numba.group_norm_forward(x, w, b, eps)


def _backward_numba(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _backward_numpy(dy, x, w, mean, rstd)
    from minicnn.ops import norm_numba

    return norm_numba.group_norm_backward(dy, x, w, mean, rstd)


# ---------------------------------------------------------------- cupy (see norm_cupy.py)


def _forward_cupy(x: Array, w: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    from minicnn.ops import norm_cupy

    return norm_cupy.rows_forward(x, w, b, eps) if x.size else _forward_numpy(x, w, b, eps)


def _backward_cupy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array
) -> tuple[Array, Array, Array]:
    from minicnn.ops import norm_cupy

    if not x.size:
        return _backward_numpy(dy, x, w, mean, rstd)
    return norm_cupy.rows_backward(dy, x, w, mean, rstd)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def group_norm_forward(
    x: Array,
    num_groups: int,
    w: Array | None = None,
    b: Array | None = None,
    eps: float = 1e-5,
) -> tuple[Array, GroupNormCache]:
    """Normalise each image over groups of neighbouring channels.

    Parameters
    ----------
    x : array, shape (N, C, ...), float32 or float64
        At least 2 axes; N may be 0.
    num_groups : int
        G; divides C.
    w, b : array, shape (C,), optional
        Scale and shift, of x's dtype; 1 and 0 otherwise.
    eps : float
        Added to the variance, above 0.

    Returns
    -------
    y : array, shape of x
    cache : GroupNormCache
        For `group_norm_backward`.

    Raises
    ------
    ValueError
        For a wrong shape or number.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = group_norm_forward(np.array([[1.0, 3.0, 20.0, 60.0]]), 2)
    >>> y.round(3)
    array([[-1.,  1., -1.,  1.]])
    """
    x, w, b = as_arrays("group_norm", ("w", "b"), x=x, w=w, b=b)
    check_channels("group_norm", x)
    N, C, *places = x.shape
    G = integer("group_norm", "num_groups", num_groups, 1)
    eps = number("group_norm", "eps", eps, gt=0)
    if not C * size(places):
        raise ValueError(
            f"group_norm: x: expected no axis of length 0 but the first, got shape {x.shape}"
        )
    if C % G:
        raise ValueError(f"group_norm: num_groups: expected a divisor of the {C} channels, got {G}")
    for name, a in (("w", w), ("b", b)):
        if a is not None:
            check_shape("group_norm", name, a, (C,), "one per channel")

    xp = array_module(x)
    scale = (xp.ones(C, x.dtype) if w is None else w).reshape(G, C // G, 1)
    shift = (xp.zeros(C, x.dtype) if b is None else b).reshape(G, C // G, 1)
    grouped = x.reshape(N, G, C // G, size(places))  # (N, G, C/G, L)
    y, mean, rstd = pick("group_norm", VERSIONS, x).forward(grouped, scale, shift, eps)
    return y.reshape(x.shape), GroupNormCache(
        grouped, scale, mean, rstd, w is not None, b is not None, x.shape
    )


def group_norm_backward(
    dy: Array, cache: GroupNormCache
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `group_norm_forward`.

    Parameters
    ----------
    dy : array, shape (N, C, ...)
        Gradient of the loss to y.
    cache : GroupNormCache
        From `group_norm_forward`.

    Returns
    -------
    dx : array, shape (N, C, ...)
    dw, db : array, shape (C,), or None without that parameter

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("group_norm_backward", x=cache.x, dy=dy)
    check_shape("group_norm_backward", "dy", dy, cache.y_shape, "like y")
    dx, dw, db = pick("group_norm", VERSIONS, x).backward(
        dy.reshape(x.shape), x, cache.w, cache.mean, cache.rstd
    )
    return (
        dx.reshape(cache.y_shape),
        dw.ravel() if cache.has_weight else None,
        db.ravel() if cache.has_bias else None,
    )
