"""Activations: functions of one number, applied to every element of an array.

    op          y                                   dx, for an upstream gradient dy of 1
    relu        max(x, 0)                           1 if y > 0 else 0
    leaky_relu  x if x > 0 else slope * x           1 if x > 0 else slope
    elu         x if x > 0 else alpha (e^x - 1)     1 if x > 0 else alpha e^x
    sigmoid     s(x) = 1 / (1 + e^-x)               y (1 - y)
    tanh        tanh(x)                             (1 - y) (1 + y)
    gelu        x P(x)                              P(x) + x P'(x)
    gelu_tanh   x s(u(x))                           s(u) (1 + x s(-u) u'(x))
    silu        x s(x)                              s(x) (1 + x s(-x))
    softplus    log(1 + e^(beta x)) / beta          s(beta x)

P(x) is the probability that a standard normal number lies below x, and P' its bell curve.
gelu_tanh is ``gelu(approximate="tanh")``: P(x) is nearly (1 + tanh(u / 2)) / 2 = s(u) with
u(x) = sqrt(8 / pi) (x + 0.044715 x^3). At a kink the derivative is the one on the left, so
relu'(0) = 0. ``1 - s(x)`` is written s(-x), which does not cancel for large x.

The cache keeps y where dx follows from it: the next layer keeps y too, so that costs no memory.
Infinities and NaN go where the formulas send them, as in PyTorch, without a warning.

References
----------
V. Nair, G. Hinton, "Rectified Linear Units Improve Restricted Boltzmann Machines", 2010 (relu).
A. Maas, A. Hannun, A. Ng, "Rectifier Nonlinearities Improve Neural Network Acoustic Models",
2013 (leaky_relu). D. Clevert, T. Unterthiner, S. Hochreiter, arXiv:1511.07289 (elu).
D. Hendrycks, K. Gimpel, arXiv:1606.08415 (gelu, silu). C. Dugas et al., "Incorporating
Second-Order Functional Knowledge for Better Option Pricing", 2000 (softplus).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.shapes import check_shape, number

KEEPS_Y = ("relu", "sigmoid", "tanh")  # the others keep x
BELL = 1 / math.sqrt(2 * math.pi)  # P'(0)


class ActivationCache(NamedTuple):
    """What the backward of an activation needs from its forward."""

    formula: str  # key of VERSIONS
    kept: Array  # x, or y for the formulas in KEEPS_Y
    params: tuple[float, ...]


def _u(x: Any) -> Any:
    """u of gelu_tanh, for a number or an array."""
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)


def _du(x: Any) -> Any:
    return math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)


# ---------------------------------------------------------------- reference: one number at a time


def sigmoid_number(x: float) -> float:
    """1 / (1 + e^-x); math.exp raises where it overflows, so it gets no large argument."""
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def softplus_number(x: float) -> float:
    """log(1 + e^x), with the larger of the two terms taken out of the logarithm."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def _below(x: float) -> float:
    return math.erfc(-x / math.sqrt(2)) / 2


# formula: (x, parameters -> y), (dy, x or y, parameters -> dx)
_REFERENCE: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "relu": (
        lambda x: 0.0 if x <= 0 else x,  # NaN is not <= 0 and passes
        lambda dy, y: dy if y > 0 else 0.0,
    ),
    "leaky_relu": (
        lambda x, slope: x if x > 0 else slope * x,
        lambda dy, x, slope: dy if x > 0 else dy * slope,
    ),
    "elu": (
        lambda x, alpha: x if x > 0 else alpha * math.expm1(x),
        lambda dy, x, alpha: dy if x > 0 else dy * alpha * math.exp(x),
    ),
    "sigmoid": (
        sigmoid_number,
        lambda dy, y: dy * y * (1 - y),
    ),
    "tanh": (
        math.tanh,
        lambda dy, y: dy * (1 - y) * (1 + y),
    ),
    "gelu": (
        lambda x: x * _below(x),
        lambda dy, x: dy * (_below(x) + x * BELL * math.exp(-x * x / 2)),
    ),
    "gelu_tanh": (
        lambda x: x * sigmoid_number(_u(x)),
        lambda dy, x: dy * sigmoid_number(_u(x)) * (1 + x * sigmoid_number(-_u(x)) * _du(x)),
    ),
    "silu": (
        lambda x: x * sigmoid_number(x),
        lambda dy, x: dy * sigmoid_number(x) * (1 + x * sigmoid_number(-x)),
    ),
    "softplus": (
        lambda x, beta, threshold: x if beta * x > threshold else softplus_number(beta * x) / beta,
        lambda dy, x, beta, threshold: (
            dy if beta * x > threshold else dy * sigmoid_number(beta * x)
        ),
    ),
}


def elementwise(formula: Callable[..., float]) -> Callable[..., Array]:
    """Make a function of arrays from one of numbers: a loop over the elements.

    The arguments are broadcast against each other, and the first one sets the dtype.
    """

    def loop(*args: Any) -> Array:
        arrays = np.broadcast_arrays(*args)
        out = np.empty(arrays[0].shape, arrays[0].dtype)
        for i in np.ndindex(out.shape):
            out[i] = formula(*(float(a[i]) for a in arrays))
        return out

    return loop


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def sigmoid_array(x: Array) -> Array:
    """1 / (1 + e^-x); where e^-x overflows, 1 / inf is the 0 that it should be."""
    return 1 / (1 + array_module(x).exp(-x))


def softplus_array(x: Array) -> Array:
    """log(1 + e^x), with the larger of the two terms taken out of the logarithm."""
    xp = array_module(x)
    return xp.maximum(x, 0) + xp.log1p(xp.exp(-abs(x)))


# (a + 5) e^(a a / 2) P(-a) in ascending powers of t = (a - 5) / (a + 5), which takes all a >= 0
# to -1 <= t < 1, as in J. Schonfelder, "Chebyshev Expansions for the Error and Related
# Functions", Math. Comp. 32, 1978. The first 23 terms of the Chebyshev series, computed in 50
# digits at 60 points and expanded; those left out add up to less than 1e-16.
TAIL = (
    *(0.769193049750063, -0.6653825028900576, 0.4953056159699805, -0.3135331566712172),
    *(0.16502036617019517, -0.06911863870874183, 0.02079506680323404, -0.0029933767389359726),
    *(-0.0007978694277475297, 0.0005448988347568596, -5.937558833377767e-05),
    *(-4.976178374018789e-05, 1.6680852719925394e-05, 3.977938262343427e-06),
    *(-2.7688787836720915e-06, -3.311028544331811e-07, 4.3347664285137567e-07),
    *(3.5844546560871596e-08, -6.741689051823604e-08, -5.027231930966982e-09),
    *(9.275082241537343e-09, 5.059297487966696e-10, -7.854458583247658e-10),
)


def _normal(x: Array) -> tuple[Array, Array]:
    """P(x) and P'(x) to a few units in the last place, in both tails (NumPy has no erf)."""
    xp = array_module(x)
    a = xp.minimum(abs(x), 40)  # P(-40) is 0 even in float64
    # Far out, the rounding of a a alone would cost e^(-a a / 2) three digits. h h is exact, and
    # the rest of a a, (a - h) (a + h), is small.
    h = xp.rint(16 * a) / 16
    bell = xp.exp(-h * h / 2) * xp.exp((h - a) * (h + a) / 2)
    t = (a - 5) / (a + 5)
    tail = xp.zeros_like(t)
    for coefficient in reversed(TAIL):
        tail *= t
        tail += coefficient
    tail *= bell / (a + 5)
    return xp.where(x > 0, 1 - tail, tail), BELL * bell


def _gelu_backward(xp: ModuleType, dy: Array, x: Array) -> Array:
    below, bell = _normal(x)
    return dy * (below + x * bell)


def _masked(dy: Array, mask: Array) -> Array:
    """Return dy where the mask is set, else 0, also for a dy that is NaN or infinite."""
    bits = f"i{dy.itemsize}"
    return (dy.view(bits) & -mask.astype(bits)).view(dy.dtype)


# Masks multiply rather than choose: numpy.where takes ten times as long on signs at random.
_NUMPY: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "relu": (
        lambda xp, x: xp.maximum(x, 0),
        lambda xp, dy, y: _masked(dy, y > 0),
    ),
    "leaky_relu": (
        lambda xp, x, slope: xp.maximum(x, 0) + slope * xp.minimum(x, 0),
        lambda xp, dy, x, slope: dy * (x > 0) + slope * dy * ~(x > 0),
    ),
    "elu": (
        lambda xp, x, alpha: xp.maximum(x, 0) + alpha * xp.expm1(xp.minimum(x, 0)),
        lambda xp, dy, x, alpha: dy * ((x > 0) + alpha * xp.exp(xp.minimum(x, 0)) * ~(x > 0)),
    ),
    "sigmoid": (
        lambda xp, x: sigmoid_array(x),
        lambda xp, dy, y: dy * y * (1 - y),
    ),
    "tanh": (
        lambda xp, x: xp.tanh(x),
        lambda xp, dy, y: dy * (1 - y) * (1 + y),
    ),
    "gelu": (
        lambda xp, x: x * _normal(x)[0],
        _gelu_backward,
    ),
    "gelu_tanh": (
        lambda xp, x: x * sigmoid_array(_u(x)),
        lambda xp, dy, x: dy * sigmoid_array(_u(x)) * (1 + x * sigmoid_array(-_u(x)) * _du(x)),
    ),
    "silu": (
        lambda xp, x: x * sigmoid_array(x),
        lambda xp, dy, x: dy * sigmoid_array(x) * (1 + x * sigmoid_array(-x)),
    ),
    "softplus": (
        lambda xp, x, beta, threshold: xp.where(
            beta * x > threshold, x, softplus_array(beta * x) / beta
        ),
        lambda xp, dy, x, beta, threshold: xp.where(
            beta * x > threshold, dy, dy * sigmoid_array(beta * x)
        ),
    ),
}


def _whole(formula: Callable[..., Array]) -> Callable[..., Array]:
    """Give `formula` the array module, and its result the first array's dtype."""

    def run(first: Array, *rest: Any) -> Array:
        xp = array_module(first)
        return xp.asarray(formula(xp, first, *rest), dtype=first.dtype)

    return run


# ---------------------------------------------------------------- numba (see elementwise_numba.py)


def _numba(formula: str) -> Version:
    def forward(x: Array, *params: float) -> Array:
        from minicnn.ops import elementwise_numba  # imports Numba: only when asked for

        return elementwise_numba.map_one(formula, x, *params)

    def backward(dy: Array, kept: Array, *params: float) -> Array:
        from minicnn.ops import elementwise_numba

        return elementwise_numba.map_two(formula, dy, kept, *params)

    return Version(forward, backward)


# ---------------------------------------------------------------- cupy (see elementwise.cu)


def _cupy(formula: str) -> Version:
    from minicnn.ops import cuda

    def run(kernel: str, *arrays: Array, params: tuple[float, ...]) -> Array:
        out = array_module(arrays[0]).empty_like(arrays[0])
        a, b = (*map(float, params), 0.0, 0.0)[:2]
        cuda.each("elementwise", kernel, out, *arrays, out, a, b)
        return out

    def forward(x: Array, *params: float) -> Array:
        return run(f"{formula}_forward", x, params=params)

    def backward(dy: Array, kept: Array, *params: float) -> Array:
        return run(f"{formula}_backward", dy, kept, params=params)

    return Version(forward, backward)


# ---------------------------------------------------------------- versions, public pairs

VERSIONS = {
    formula: {
        "reference": Version(*map(elementwise, _REFERENCE[formula])),
        "numpy": Version(*map(_whole, _NUMPY[formula])),
        "numba": _numba(formula),
        "cupy": _cupy(formula),
    }
    for formula in _REFERENCE
}


def _forward(
    op: str, x: Array, *params: float, formula: str | None = None
) -> tuple[Array, ActivationCache]:
    (x,) = as_arrays(op, x=x)
    formula = formula or op
    with np.errstate(all="ignore"):
        y = pick(op, VERSIONS[formula], x).forward(x, *params)
    return y, ActivationCache(formula, y if formula in KEEPS_Y else x, params)


def _backward(op: str, dy: Array, cache: ActivationCache) -> Array:
    kept, dy = as_arrays(f"{op}_backward", x=cache.kept, dy=dy)
    check_shape(f"{op}_backward", "dy", dy, kept.shape, "like x")
    with np.errstate(all="ignore"):
        return pick(op, VERSIONS[cache.formula], dy).backward(dy, kept, *cache.params)


def relu_forward(x: Array) -> tuple[Array, ActivationCache]:
    """``y = max(x, 0)``, the rectifier.

    Parameters
    ----------
    x : array of any shape, float32 or float64

    Returns
    -------
    y : array
        Of x's shape, dtype and device, as for all activations.
    cache : ActivationCache
        For `relu_backward`.

    Raises
    ------
    TypeError
        If `x` is no float array, as for all activations.

    Examples
    --------
    >>> import numpy as np
    >>> y, cache = relu_forward(np.array([-2.0, 0.0, 3.0]))
    >>> y
    array([0., 0., 3.])
    >>> relu_backward(np.array([5.0, 6.0, 7.0]), cache)
    array([0., 0., 7.])
    """
    return _forward("relu", x)


def relu_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `relu_forward`: ``dx = dy`` where ``y > 0``, else 0.

    Parameters
    ----------
    dy : array
        Gradient of the loss to y, of its shape, dtype and device.
    cache : ActivationCache
        From the forward.

    Returns
    -------
    dx : array
        Gradient of the loss to x.

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, dtype or device.
    """
    return _backward("relu", dy, cache)


def leaky_relu_forward(x: Array, negative_slope: float = 0.01) -> tuple[Array, ActivationCache]:
    """``y = x`` where positive, else ``negative_slope * x``.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    negative_slope : float

    Returns
    -------
    y : array
    cache : ActivationCache

    Examples
    --------
    >>> import numpy as np
    >>> leaky_relu_forward(np.array([-2.0, 3.0]), 0.1)[0]
    array([-0.2,  3. ])
    """
    return _forward("leaky_relu", x, number("leaky_relu", "negative_slope", negative_slope))


def leaky_relu_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `leaky_relu_forward`; the arguments are those of `relu_backward`."""
    return _backward("leaky_relu", dy, cache)


def elu_forward(x: Array, alpha: float = 1.0) -> tuple[Array, ActivationCache]:
    """``y = x`` where positive, else ``alpha * (exp(x) - 1)``.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    alpha : float
        y approaches -alpha for negative x.

    Returns
    -------
    y : array
    cache : ActivationCache
    """
    return _forward("elu", x, number("elu", "alpha", alpha))


def elu_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `elu_forward`; the arguments are those of `relu_backward`."""
    return _backward("elu", dy, cache)


def sigmoid_forward(x: Array) -> tuple[Array, ActivationCache]:
    """``y = 1 / (1 + exp(-x))``, in (0, 1).

    Parameters
    ----------
    x : array of any shape, float32 or float64

    Returns
    -------
    y : array
    cache : ActivationCache
    """
    return _forward("sigmoid", x)


def sigmoid_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `sigmoid_forward`; the arguments are those of `relu_backward`."""
    return _backward("sigmoid", dy, cache)


def tanh_forward(x: Array) -> tuple[Array, ActivationCache]:
    """``y = tanh(x)``, in (-1, 1).

    Parameters
    ----------
    x : array of any shape, float32 or float64

    Returns
    -------
    y : array
    cache : ActivationCache
    """
    return _forward("tanh", x)


def tanh_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `tanh_forward`; the arguments are those of `relu_backward`."""
    return _backward("tanh", dy, cache)


def gelu_forward(x: Array, approximate: str = "none") -> tuple[Array, ActivationCache]:
    """``y = x * P(x)``, P the distribution function of the standard normal distribution.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    approximate : {"none", "tanh"}
        Whether P is exact or the tanh formula of the paper, up to 5e-4 from it.

    Returns
    -------
    y : array
    cache : ActivationCache

    Raises
    ------
    ValueError
        If `approximate` is neither.

    Examples
    --------
    >>> import numpy as np
    >>> gelu_forward(np.array([-1.0, 0.0, 1.0]))[0].round(4)
    array([-0.1587,  0.    ,  0.8413])
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"gelu: approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _forward("gelu", x, formula="gelu" if approximate == "none" else "gelu_tanh")


def gelu_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `gelu_forward`; the arguments are those of `relu_backward`."""
    return _backward("gelu", dy, cache)


def silu_forward(x: Array) -> tuple[Array, ActivationCache]:
    """``y = x / (1 + exp(-x))``, also called swish.

    Parameters
    ----------
    x : array of any shape, float32 or float64

    Returns
    -------
    y : array
    cache : ActivationCache
    """
    return _forward("silu", x)


def silu_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `silu_forward`; the arguments are those of `relu_backward`."""
    return _backward("silu", dy, cache)


def softplus_forward(
    x: Array, beta: float = 1.0, threshold: float = 20.0
) -> tuple[Array, ActivationCache]:
    """``y = log(1 + exp(beta * x)) / beta``, a smooth relu.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    beta : float
        Positive; the larger, the nearer to relu.
    threshold : float
        Where ``beta * x`` lies above, y is x, as in PyTorch.

    Returns
    -------
    y : array
    cache : ActivationCache

    Raises
    ------
    ValueError
        If `beta` is not positive.
    """
    beta = number("softplus", "beta", beta, gt=0)
    return _forward("softplus", x, beta, number("softplus", "threshold", threshold))


def softplus_backward(dy: Array, cache: ActivationCache) -> Array:
    """Gradient of `softplus_forward`; the arguments are those of `relu_backward`."""
    return _backward("softplus", dy, cache)
