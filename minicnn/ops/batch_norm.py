"""Batch normalisation: each channel gets mean 0 and variance 1 over the batch, then w and b.

In training, with the sums over all M = N*L values of channel c:

    mean[c] = sum of x / M,   var[c] = sum of (x - mean[c])^2 / M
    xhat    = (x - mean[c]) / sqrt(var[c] + eps)
    y       = w[c] * xhat + b[c]

Evaluation takes running means of the batches' statistics in their place. Training moves them:

    running_mean = (1 - momentum) * running_mean + momentum * mean
    running_var  = (1 - momentum) * running_var  + momentum * var * M / (M - 1)

where M / (M - 1) corrects for var being taken around the batch's own mean.

Backward:

    db[c] = sum of dy,   dw[c] = sum of dy * xhat
    dx    = w[c] * rstd[c] * (dy - db[c] / M - xhat * dw[c] / M)      training
    dx    = w[c] * rstd[c] * dy                                       evaluation

(derived in `normalize`: in training every x also moves mean and var).

Letters: N images, C channels, L places in a map (H*W), rstd = 1 / sqrt(var + eps).

References
----------
S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
Internal Covariate Shift", 2015, arXiv:1502.03167.
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
from minicnn.shapes import check_shape, number, size

AXES = (0, 2)  # of (N, C, L): what shares a mean and a variance


class BatchNormCache(NamedTuple):
    """What `batch_norm_backward` needs, and the new running statistics for the layer to keep."""

    x: Array  # (N, C, L)
    w: Array  # (C,); ones if there was none
    mean: Array  # (C,) float64
    rstd: Array  # (C,) float64
    running_mean: Array | None  # (C,)
    running_var: Array | None  # (C,)
    training: bool
    has_weight: bool
    has_bias: bool
    y_shape: tuple[int, ...]  # (N, C, ...)


# ---------------------------------------------------------------- reference


def _forward_reference(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None = None, var: Array | None = None
) -> tuple[Array, Array, Array]:
    if mean is None or var is None:
        mean, var = _statistics_reference(x)
    y = np.zeros_like(x)
    for n, c, i in np.ndindex(x.shape):
        xhat = (float(x[n, c, i]) - mean[c]) / np.sqrt(var[c] + eps)
        y[n, c, i] = float(w[c]) * xhat + float(b[c])
    return y, mean, var


def _statistics_reference(x: Array) -> tuple[Array, Array]:
    N, C, L = x.shape
    mean, var = np.zeros(C), np.zeros(C)
    for n, c, i in np.ndindex(x.shape):
        mean[c] += float(x[n, c, i]) / (N * L)
    for n, c, i in np.ndindex(x.shape):
        var[c] += (float(x[n, c, i]) - mean[c]) ** 2 / (N * L)
    return mean, var


def _backward_reference(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    N, C, L = x.shape
    dx, dw, db, dmean, dvar = np.zeros(x.shape), *np.zeros((4, C))
    for n, c, i in np.ndindex(x.shape):
        g, centred = float(dy[n, c, i]), float(x[n, c, i]) - mean[c]
        db[c] += g
        dw[c] += g * centred * rstd[c]
        dx[n, c, i] = g * float(w[c]) * rstd[c]
        if training:  # else mean and var do not depend on x
            dmean[c] -= g * float(w[c]) * rstd[c]
            dvar[c] -= g * float(w[c]) * centred * rstd[c] ** 3 / 2
    for n, c, i in np.ndindex(x.shape):
        centred = float(x[n, c, i]) - mean[c]
        dx[n, c, i] += (dmean[c] + dvar[c] * 2 * centred) / (N * L)
    return dx.astype(dy.dtype), dw.astype(dy.dtype), db.astype(dy.dtype)


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _forward_numpy(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None = None, var: Array | None = None
) -> tuple[Array, Array, Array]:
    if mean is None or var is None:
        y, mean, var = moments(x, AXES)  # (N, C, L), (1, C, 1), (1, C, 1)
    else:
        mean, var = mean[:, None], var[:, None]  # (C, 1)
        y = center(x, mean)
    y *= (w[:, None] * (var + eps) ** -0.5).astype(x.dtype)
    y += b[:, None]
    return y, mean.ravel(), var.ravel()


def _backward_numpy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    xhat = center(x, mean[:, None])
    xhat *= rstd[:, None].astype(x.dtype)
    scale = (w * rstd)[:, None].astype(x.dtype)  # (C, 1)
    if training:
        dx, db, dw = normalize_backward(dy, xhat, scale, AXES)
    else:
        dx, db, dw = scale * dy, total(dy, AXES), total(dy * xhat, AXES)
    return dx, dw.ravel().astype(dy.dtype), db.ravel().astype(dy.dtype)


# ---------------------------------------------------------------- numba (see norm_numba.py)


def _forward_numba(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None = None, var: Array | None = None
) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _forward_numpy(x, w, b, eps, mean, var)
    from minicnn.ops import norm_numba  # imports Numba: only when asked for

    return norm_numba.batch_norm_forward(x, w, b, eps, mean, var)


def _backward_numba(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    if too_short(x):
        return _backward_numpy(dy, x, w, mean, rstd, training)
    from minicnn.ops import norm_numba

    return norm_numba.batch_norm_backward(dy, x, w, mean, rstd, training)


# ---------------------------------------------------------------- cupy (see norm_cupy.py)


def _forward_cupy(
    x: Array, w: Array, b: Array, eps: float, mean: Array | None = None, var: Array | None = None
) -> tuple[Array, Array, Array]:
    from minicnn.ops import cuda, norm_cupy

    if not (x.size and cuda.grid_fits(x.shape[1])):
        return _forward_numpy(x, w, b, eps, mean, var)
    return norm_cupy.batch_norm_forward(x, w, b, eps, mean, var)


def _backward_cupy(
    dy: Array, x: Array, w: Array, mean: Array, rstd: Array, training: bool
) -> tuple[Array, Array, Array]:
    from minicnn.ops import cuda, norm_cupy

    if not (x.size and cuda.grid_fits(x.shape[1])):
        return _backward_numpy(dy, x, w, mean, rstd, training)
    return norm_cupy.batch_norm_backward(dy, x, w, mean, rstd, training)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": Version(_forward_reference, _backward_reference),
    "numpy": Version(_forward_numpy, _backward_numpy),
    "numba": Version(_forward_numba, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def batch_norm_forward(
    x: Array,
    w: Array | None = None,
    b: Array | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> tuple[Array, BatchNormCache]:
    """Normalise each channel over the batch and all places, or by the running statistics.

    Nothing that is passed in changes: the new running statistics are in the cache.

    Parameters
    ----------
    x : array, shape (N, C, ...), float32 or float64
        At least 2 axes. N may be 0 in evaluation.
    w, b : array, shape (C,), optional
        Scale and shift, of x's dtype; 1 and 0 otherwise.
    running_mean, running_var : array, shape (C,), optional
        Statistics of the batches so far, of x's dtype. Evaluation needs both.
    training : bool
        Whether to normalise by the batch's statistics and to move the running ones.
    momentum : float
        Share of this batch in the new running statistics, from 0 to 1.
    eps : float
        Added to the variance, above 0: a channel of equal values becomes b.

    Returns
    -------
    y : array, shape of x
    cache : BatchNormCache
        For `batch_norm_backward`. Its ``running_mean`` and ``running_var`` are the new ones in
        training (the variance unbiased), the given ones in evaluation, None where not given.

    Raises
    ------
    ValueError
        For a wrong shape or number, or fewer than 2 values per channel in training.
    TypeError
        For arrays that are not float, of several dtypes or on several devices, and for running
        statistics missing in evaluation.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 10.0], [3.0, 30.0]])
    >>> y, cache = batch_norm_forward(x, running_mean=np.zeros(2), running_var=np.ones(2))
    >>> y.round(3)
    array([[-1., -1.],
           [ 1.,  1.]])
    >>> cache.running_mean, cache.running_var
    (array([0.2, 2. ]), array([ 1.1, 20.9]))
    """
    x, w, b, running_mean, running_var = as_arrays(
        "batch_norm",
        ("w", "b", "running_mean", "running_var"),
        x=x,
        w=w,
        b=b,
        running_mean=running_mean,
        running_var=running_var,
    )
    check_channels("batch_norm", x)
    N, C, *places = x.shape
    named = {"w": w, "b": b, "running_mean": running_mean, "running_var": running_var}
    for name, a in named.items():
        if a is not None:
            check_shape("batch_norm", name, a, (C,), "one per channel")
    momentum = number("batch_norm", "momentum", momentum, ge=0, le=1)
    eps = number("batch_norm", "eps", eps, gt=0)
    M = N * size(places)
    if training and M < 2:
        raise ValueError(
            "batch_norm: x: expected more than 1 value per channel in training, got shape "
            f"{x.shape}"
        )
    if not training and (running_mean is None or running_var is None):
        raise TypeError(
            "batch_norm: running_mean, running_var: expected arrays in evaluation, got None "
            "(fix: training=True normalises by the batch)"
        )

    xp = array_module(x)
    has_weight, has_bias = w is not None, b is not None
    w = w if has_weight else xp.ones(C, x.dtype)
    b = b if has_bias else xp.zeros(C, x.dtype)
    forward, y_shape = pick("batch_norm", VERSIONS, x).forward, x.shape
    x = x.reshape(N, C, size(places))  # (N, C, L)
    if training:
        y, mean, var = forward(x, w, b, eps)
        running_mean = blend(running_mean, mean, momentum)
        running_var = blend(running_var, var * (M / (M - 1)), momentum)
    else:
        statistics = (a.astype(np.float64) for a in (running_mean, running_var))
        y, mean, var = forward(x, w, b, eps, *statistics)
    rstd = (var + eps) ** -0.5
    return y.reshape(y_shape), BatchNormCache(
        x, w, mean, rstd, running_mean, running_var, training, has_weight, has_bias, y_shape
    )


def batch_norm_backward(
    dy: Array, cache: BatchNormCache
) -> tuple[Array, Array | None, Array | None]:
    """Gradients of `batch_norm_forward`, of the mode that it ran in.

    Parameters
    ----------
    dy : array, shape (N, C, ...)
        Gradient of the loss to y.
    cache : BatchNormCache
        From `batch_norm_forward`.

    Returns
    -------
    dx : array, shape (N, C, ...)
    dw, db : array, shape (C,), or None without that parameter

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, dy = as_arrays("batch_norm_backward", x=cache.x, dy=dy)
    check_shape("batch_norm_backward", "dy", dy, cache.y_shape, "like y")
    dx, dw, db = pick("batch_norm", VERSIONS, x).backward(
        dy.reshape(x.shape), x, cache.w, cache.mean, cache.rstd, cache.training
    )
    return (
        dx.reshape(cache.y_shape),
        dw if cache.has_weight else None,
        db if cache.has_bias else None,
    )


def blend(running: Array | None, new: Array, momentum: float) -> Array | None:
    """Move running statistics towards those of a new batch."""
    if running is None:
        return None
    return ((1 - momentum) * running + momentum * new).astype(running.dtype)
