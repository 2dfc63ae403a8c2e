# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Functions of one or two numbers in Numba: activations, dropout's product, elementwise losses.

There are two loops, over one array (`_map`) and over two (`_map2`). A formula is a type, a
NamedTuple of its parameters, and Numba compiles a loop for the formulas that are used and no
others. Formulas are of whole vectors, in the arrays' own type.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import overload, register_jitable

from minicnn.backend import Array
from minicnn.ops.activations import BELL, TAIL
from minicnn.ops.copy_numba import load_some, store_some
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import (
    absolute,
    add,
    constant,
    copysign,
    div,
    exp,
    expm1,
    fma,
    lane_count,
    maximum,
    mul,
    polynomial,
    sub,
    to_boundary,
    where_greater,
    where_positive,
    zero,
)

INLINE: Any = {"forceinline": True}
inlined = register_jitable(**INLINE)
CHUNK = 1 << 13  # numbers: a piece of work; less is not worth a second thread

# ---------------------------------------------------------------- functions of one vector


@inlined
def negative(x):
    return sub(constant(-0.0, x), x)


@inlined
def at_most(limit, x):
    """Return x, or the limit where x is larger; a NaN stays."""
    limit = constant(limit, x)
    return where_greater(x, limit, limit, x)


@inlined
def sigmoid(x):
    one = constant(1, x)
    return div(one, add(one, exp(negative(x))))


@inlined
def sigmoids(x):
    """Return s(x) and s(-x), neither of which cancels."""
    one, none = constant(1, x), constant(0, x)
    z = exp(negative(absolute(x)))
    large = div(one, add(one, z))
    small = mul(z, large)
    return where_greater(x, none, large, small), where_greater(x, none, small, large)


_ARTANH = tuple(1 / (2 * k + 1) for k in range(17))  # artanh s = s * sum of _ARTANH[k] s^2k
_ARTANH_SINGLE = _ARTANH[:8]


@inlined
def softpluses(x):
    """Return log(1 + e^x) = max(x, 0) + log(1 + z) with z = e^-|x|, and log(1 + e^-x).

    log(1 + z) is 2 artanh(z / (2 + z)), of 1/3 at most.
    """
    none, z = constant(0, x), exp(negative(absolute(x)))
    s = div(z, add(constant(2, x), z))
    half = mul(s, polynomial(mul(s, s), _ARTANH_SINGLE, _ARTANH))
    log1p = add(half, half)
    return add(maximum(none, x), log1p), add(maximum(none, negative(x)), log1p)


# The first 12 terms of the series that TAIL has 23 of: those left out add up to less than 6e-9.
_TAIL_SINGLE = (
    *(0.7691930449, -0.6653825125, 0.4953059705, -0.3135328843, 0.1650161412, -0.06912084033),
    *(0.02081367797, -0.002985708855, -0.0008357310594, 0.0005317770928, -2.196782734e-5),
    -3.869156012e-5,
)


@inlined
def normal(x):
    """Return P(x) and P'(x) of the normal distribution, by the series in `activations`."""
    one, five, minus_half = constant(1, x), constant(5, x), constant(-0.5, x)
    a = at_most(40, absolute(x))  # P(-40) is 0 even in float64
    # Far out, the rounding of a a alone would cost e^(-a a / 2) digits: fma knows what it was.
    square = mul(a, a)
    rest = fma(a, a, negative(square))
    bell = exp(mul(minus_half, square))
    bell = fma(mul(minus_half, rest), bell, bell)
    scale = div(one, add(a, five))
    p = polynomial(mul(sub(a, five), scale), _TAIL_SINGLE, TAIL)
    p = mul(mul(p, bell), scale)
    below = where_greater(x, constant(0, x), sub(one, p), p)
    return below, mul(constant(BELL, x), bell)


_U = math.sqrt(8 / math.pi)
_U3 = _U * 0.044715


@inlined
def u_and_slope(x):
    """Return u(x) of gelu_tanh and u'(x), for x that is not too large to be cubed."""
    square = mul(x, x)
    u = mul(x, fma(constant(_U3, x), square, constant(_U, x)))
    return u, fma(constant(3 * _U3, x), square, constant(_U, x))


@inlined
def within_forty(x):
    """Return x, or 40 of its sign where it is larger: there u is so large that s(u) is 0 or 1."""
    return copysign(at_most(40, absolute(x)), x)


# ---------------------------------------------------------------- formulas


class Relu(NamedTuple):
    """max(x, 0)."""


class LeakyRelu(NamedTuple):
    """x, or slope * x where negative."""

    slope: float


class Elu(NamedTuple):
    """x, or alpha (e^x - 1) where negative."""

    alpha: float


class Sigmoid(NamedTuple):
    """1 / (1 + e^-x)."""


class Tanh(NamedTuple):
    """tanh(x)."""


class Gelu(NamedTuple):
    """x P(x)."""


class GeluTanh(NamedTuple):
    """x s(u(x))."""


class Silu(NamedTuple):
    """x s(x)."""


class Softplus(NamedTuple):
    """log(1 + e^(beta x)) / beta."""

    beta: float
    threshold: float


class Product(NamedTuple):
    """a * b."""


class MseLoss(NamedTuple):
    """(x - t)^2."""


class MseLossBackward(NamedTuple):
    """2 g (x - t)."""

    g: float


class L1Loss(NamedTuple):
    """|x - t|."""


class L1LossBackward(NamedTuple):
    """g sign(x - t)."""

    g: float


class Bce(NamedTuple):
    """w (p t log(1 + e^-x) + (1 - t) log(1 + e^x))."""

    w: float
    p: float


class BceBackward(NamedTuple):
    """g w ((1 - t) s(x) - p t s(-x))."""

    g: float
    w: float
    p: float


@inlined
def _relu(f, x):
    return maximum(constant(0, x), x)


@inlined
def _relu_gradient(f, dy, y):
    return where_positive(y, dy)


@inlined
def _leaky_relu(f, x):
    return where_greater(x, constant(0, x), x, mul(constant(f.slope, x), x))


@inlined
def _leaky_relu_gradient(f, dy, x):
    return mul(dy, where_greater(x, constant(0, x), constant(1, x), constant(f.slope, x)))


@inlined
def _elu(f, x):
    return where_greater(x, constant(0, x), x, mul(constant(f.alpha, x), expm1(x)))


@inlined
def _elu_gradient(f, dy, x):
    slope = mul(constant(f.alpha, x), exp(x))
    return mul(dy, where_greater(x, constant(0, x), constant(1, x), slope))


@inlined
def _sigmoid(f, x):
    return sigmoid(x)


@inlined
def _sigmoid_gradient(f, dy, y):
    return mul(mul(dy, y), sub(constant(1, y), y))


@inlined
def _tanh(f, x):
    t = expm1(mul(constant(-2, x), absolute(x)))
    return copysign(div(t, add(constant(2, x), t)), x)


@inlined
def _tanh_gradient(f, dy, y):
    one = constant(1, y)
    return mul(mul(dy, sub(one, y)), add(one, y))


@inlined
def _gelu(f, x):
    return mul(x, normal(x)[0])


@inlined
def _gelu_gradient(f, dy, x):
    below, bell = normal(x)
    return mul(dy, fma(x, bell, below))


@inlined
def _gelu_tanh(f, x):
    return mul(x, sigmoid(u_and_slope(within_forty(x))[0]))


@inlined
def _gelu_tanh_gradient(f, dy, x):
    u, slope = u_and_slope(within_forty(x))
    s, rest = sigmoids(u)
    # s is 0 or the rest is, where x is so large that the other order would overflow.
    return mul(dy, fma(mul(s, x), mul(rest, slope), s))


@inlined
def _silu(f, x):
    return mul(x, sigmoid(x))


@inlined
def _silu_gradient(f, dy, x):
    s, rest = sigmoids(x)
    return mul(mul(dy, s), fma(x, rest, constant(1, x)))


@inlined
def _softplus(f, x):
    beta = constant(f.beta, x)
    v = mul(beta, x)
    return where_greater(v, constant(f.threshold, x), x, div(softpluses(v)[0], beta))


@inlined
def _softplus_gradient(f, dy, x):
    v = mul(constant(f.beta, x), x)
    return where_greater(v, constant(f.threshold, x), dy, mul(dy, sigmoid(v)))


@inlined
def _product(f, a, b):
    return mul(a, b)


@inlined
def _mse_loss(f, x, t):
    d = sub(x, t)
    return mul(d, d)


@inlined
def _mse_loss_gradient(f, x, t):
    return mul(constant(2 * f.g, x), sub(x, t))


@inlined
def _l1_loss(f, x, t):
    return absolute(sub(x, t))


@inlined
def _l1_loss_gradient(f, x, t):
    d, none, one = sub(x, t), constant(0, x), constant(1, x)
    sign = where_greater(d, none, one, where_greater(none, d, negative(one), d))
    return mul(constant(f.g, x), sign)


@inlined
def _bce(f, x, t):
    above, below = softpluses(x)
    wrong = mul(sub(constant(1, t), t), above)
    return mul(constant(f.w, x), fma(mul(constant(f.p, x), t), below, wrong))


@inlined
def _bce_gradient(f, x, t):
    s, rest = sigmoids(x)
    right = mul(mul(constant(f.p, x), t), rest)
    return mul(constant(f.g * f.w, x), sub(mul(sub(constant(1, t), t), s), right))


# Formula: y of x. At a NaN every comparison is false, and the value of x passes.
_VALUES: dict[type, Callable[..., Any]] = {
    Relu: _relu,
    LeakyRelu: _leaky_relu,
    Elu: _elu,
    Sigmoid: _sigmoid,
    Tanh: _tanh,
    Gelu: _gelu,
    GeluTanh: _gelu_tanh,
    Silu: _silu,
    Softplus: _softplus,
}

# Formula: dx of dy and of what the forward kept (x, or y), or any function of two numbers.
_VALUES_OF_TWO: dict[type, Callable[..., Any]] = {
    Relu: _relu_gradient,
    LeakyRelu: _leaky_relu_gradient,
    Elu: _elu_gradient,
    Sigmoid: _sigmoid_gradient,
    Tanh: _tanh_gradient,
    Gelu: _gelu_gradient,
    GeluTanh: _gelu_tanh_gradient,
    Silu: _silu_gradient,
    Softplus: _softplus_gradient,
    Product: _product,
    MseLoss: _mse_loss,
    MseLossBackward: _mse_loss_gradient,
    L1Loss: _l1_loss,
    L1LossBackward: _l1_loss_gradient,
    Bce: _bce,
    BceBackward: _bce_gradient,
}


def _value(f, x):
    """The formula's function of one vector; compiled code only."""


def _value_of_two(f, a, b):
    """The formula's function of two vectors; compiled code only."""


@overload(_value, jit_options=INLINE)
def _choose(f, x):
    return _VALUES[f.instance_class]


@overload(_value_of_two, jit_options=INLINE)
def _choose_of_two(f, a, b):
    value = _VALUES_OF_TWO[f.instance_class]
    return lambda f, a, b: value(f, a, b)  # Numba wants the names of `_value_of_two`


# ---------------------------------------------------------------- the loops


# A formula stands once in a loop, as it may be long: whole vectors and parts of one take turns.
# What is stored begins where a cache line does: two halves of a vector take two stores.
# One piece alone runs where it is: waking the threads takes longer.


@kernel()
def _map_piece(f, x, y, k):
    at, end = k * CHUNK, min(x.size, (k + 1) * CHUNK)
    n = min(to_boundary(y, at), end - at)
    while at < end:
        store_some(y, at, n, _value(f, load_some(x, at, n, zero(x))))
        at += n
        n = min(lane_count(y), end - at)


@kernel()
def _map2_piece(f, a, b, y, k):
    at, end = k * CHUNK, min(a.size, (k + 1) * CHUNK)
    n = min(to_boundary(y, at), end - at)
    while at < end:
        v = _value_of_two(f, load_some(a, at, n, zero(a)), load_some(b, at, n, zero(b)))
        store_some(y, at, n, v)
        at += n
        n = min(lane_count(y), end - at)


@kernel(parallel=True)
def _map(f, x, y):
    if x.size <= CHUNK:
        _map_piece(f, x, y, 0)
    else:
        for k in numba.prange((x.size + CHUNK - 1) // CHUNK):
            _map_piece(f, x, y, k)


@kernel(parallel=True)
def _map2(f, a, b, y):
    if a.size <= CHUNK:
        _map2_piece(f, a, b, y, 0)
    else:
        for k in numba.prange((a.size + CHUNK - 1) // CHUNK):
            _map2_piece(f, a, b, y, k)


FORMULAS: dict[str, Callable[..., Any]] = {
    "relu": Relu,
    "leaky_relu": LeakyRelu,
    "elu": Elu,
    "sigmoid": Sigmoid,
    "tanh": Tanh,
    "gelu": Gelu,
    "gelu_tanh": GeluTanh,
    "silu": Silu,
    "softplus": Softplus,
    "product": Product,
    "mse_loss": MseLoss,
    "mse_loss_backward": MseLossBackward,
    "l1_loss": L1Loss,
    "l1_loss_backward": L1LossBackward,
    "bce_with_logits": Bce,
    "bce_with_logits_backward": BceBackward,
}


def map_one(formula: str, x: Array, *params: float) -> Array:
    """Return the value of the formula for every number of x, in x's shape and dtype."""
    y, f = np.empty_like(x), FORMULAS[formula](*params)
    with buffers(x.dtype):
        _map(f, flat(x), y.reshape(-1))
    return y


def map_two(formula: str, a: Array, b: Array, *params: float) -> Array:
    """Return the value of the formula for all pairs of numbers, of a and b of one shape."""
    y, f = np.empty_like(a), FORMULAS[formula](*params)
    with buffers(a.dtype):
        _map2(f, flat(a), flat(b), y.reshape(-1))
    return y
