"""What batch, layer and group normalisation share. They differ in which values they take together.

M values that are normalised together become

    mean = sum of x / M
    var  = sum of (x - mean)^2 / M
    rstd = 1 / sqrt(var + eps)
    xhat = (x - mean) * rstd

Backward: x reaches xhat directly, through mean and through var. With g the gradient to xhat,

    directly:     g * rstd
    through mean: dmean / M                     with dmean = -rstd * sum of g
    through var:  dvar * 2 * (x - mean) / M     with dvar = -rstd^3 / 2 * sum of g * (x - mean)

(mean also moves var, but by the sum of x - mean, which is zero). The three together are

    dx = rstd * (g - mean of g - xhat * mean of g * xhat)

The references add up the three paths; the NumPy versions use the last line.
"""

from __future__ import annotations

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.shapes import size

SHORT = 32  # numbers


def moments(x: Array, axes: tuple[int, ...]) -> tuple[Array, Array, Array]:
    """Return ``x - mean``, and mean and variance over `axes` (kept) in float64."""
    M = size([x.shape[axis] for axis in axes])
    mean = total(x, axes) / M
    centred = center(x, mean)
    return centred, mean, total(centred * centred, axes) / M


def center(x: Array, mean: Array) -> Array:
    """Return ``x - mean`` for a float64 mean, rounded to x's type only after the subtraction.

    Around 10,000 a float32 mean is off by up to 5e-4, and so would be every difference.
    """
    return array_module(x).subtract(x, mean, out=array_module(x).empty_like(x))


def normalize_backward(
    g: Array, xhat: Array, scale: Array, axes: tuple[int, ...]
) -> tuple[Array, Array, Array]:
    """Return ``scale * (g - mean of g - xhat * mean of g * xhat)`` and the sums behind the means.

    The sums over `axes` (kept, float64) are those of g and of g * xhat.
    """
    M = size([g.shape[axis] for axis in axes])
    dx = g * xhat
    sum_g, sum_gx = total(g, axes), total(dx, axes)
    # The formula in place: a new large array a term would cost more than the arithmetic.
    array_module(g).multiply(xhat, (sum_gx / -M).astype(g.dtype), out=dx)
    dx += g
    dx -= (sum_g / M).astype(g.dtype)
    dx *= scale
    return dx, sum_g, sum_gx


def total(a: Array, axes: tuple[int, ...]) -> Array:
    """Sum over `axes` in float64, keeping them with length 1."""
    return a.sum(axis=axes, dtype=np.float64, keepdims=True)


def too_short(x: Array) -> bool:
    """Tell whether the runs along x's last axis are too short for `minicnn.ops.norm_numba`.

    A run costs it more than a few numbers do: the NumPy version takes over.
    """
    return x.size == 0 or x.shape[-1] < SHORT


def check_channels(op: str, x: Array) -> None:
    """Raise ValueError unless `x` is (N, C) or (N, C, ...)."""
    if x.ndim < 2:
        raise ValueError(f"{op}: x: expected at least 2 axes (N, C, ...), got shape {x.shape}")
