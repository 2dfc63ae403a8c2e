# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Functions of one number in Numba: the activations, and dropout's product.

There are two loops, over one array (`_map`) and over two (`_map2`). A formula is a type, a
NamedTuple of its parameters, and Numba compiles a loop for the formulas that are used and no
others. All arithmetic is in float64, whatever the arrays hold: reading memory takes as long.

`exp` and its kin are written out in additions and multiplications, as LLVM makes vectors of those
but not of calls. They are within a few units in the last place of float64.

sigmoid, tanh and silu are formulas of whole vectors, in the arrays' own type: float64 made them
slower than NumPy, whose exponential function is of vectors too. They have the same loops again,
`_map_vectors` and `_map2_vectors`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np
from numba.extending import overload, register_jitable

from minicnn.backend import Array
from minicnn.ops import vector
from minicnn.ops.activations import BELL, TAIL
from minicnn.ops.jit import buffers, flat, kernel
from minicnn.ops.vector import constant, lane_count, load, load_part, store, store_part, zero

INLINE: Any = {"forceinline": True}  # LLVM makes no vectors of a loop that calls
inlined = register_jitable(**INLINE)
CHUNK = 1 << 13  # numbers: a piece of work; less is not worth a second thread

# ---------------------------------------------------------------- functions of one number

_MAGIC = 1.5 * 2.0**52  # adding it rounds to an integer, which the last bits of the sum then hold
_LOG2_E = 1 / math.log(2)
_LOG_2 = 0.693147180369123816490  # its last 21 bits are zero: times an exponent it is exact
_LOG_2_REST = 1.90821492927058770002e-10


def _polynomial(*coefficients: float) -> Any:
    """Return the function ``sum of coefficients[k] t^k``: written out, as LLVM keeps a loop."""
    first = coefficients[0]
    if len(coefficients) == 1:
        return inlined(lambda t: first)
    rest = _polynomial(*coefficients[1:])
    return inlined(lambda t: first + t * rest(t))


_exp_tail = _polynomial(*(1 / math.factorial(k) for k in range(2, 14)))  # e^r = 1 + r + r^2 (...)
_artanh_tail = _polynomial(*(1 / (2 * k + 1) for k in range(1, 17)))  # artanh s = s + s^3 (...)
_normal_tail = _polynomial(*TAIL)


@inlined
def _exponent(x):
    """Return ``(n, r)`` with ``x = n log 2 + r``: n as a float whose last bits are n."""
    x = 710.0 if x > 710 else x
    x = -746.0 if x < -746 else x
    n = x * _LOG2_E + _MAGIC
    return n, x - (n - _MAGIC) * _LOG_2 - (n - _MAGIC) * _LOG_2_REST


@inlined
def _power(n):
    """Return 2^n for n + _MAGIC, in the normal range: the bits of n become the exponent."""
    return np.int64((np.float64(n).view(np.int64) + 1023) << 52).view(np.float64)


@inlined
def _expm1_small(r):
    """Return ``e^r - 1`` for |r| <= log(2) / 2."""
    return _exp_tail(r) * r * r + r


@inlined
def exp(x):
    """Return e^x."""
    n, r = _exponent(x)
    # Two steps: 2^n itself may lie beyond the numbers, or between 0 and the normal ones.
    half = (n - _MAGIC) * 0.5 + _MAGIC
    rest = (n - half) + _MAGIC
    return (_expm1_small(r) + 1) * _power(half) * _power(rest)


@inlined
def expm1(x):
    """Return ``e^x - 1`` for x <= 0, without cancellation near 0."""
    n, r = _exponent(-60.0 if x < -60 else x)
    return _power(n) * _expm1_small(r) + (_power(n) - 1)


@inlined
def log1p_of_exp(x):
    """Return ``log(1 + e^x)`` for x <= 0: 2 artanh(z / (2 + z)) of z = e^x, a power series."""
    z = exp(x)
    s = z / (2 + z)
    t = s * s
    return 2 * (_artanh_tail(t) * t * s + s)


@inlined
def sigmoid(x):
    return 1 / (1 + exp(-x))


@inlined
def softplus(x):
    return (x if not x < 0 else 0.0) + log1p_of_exp(-abs(x))


@inlined
def normal(x):
    """Return P(x) and P'(x) of the normal distribution, by the series in `activations`."""
    a = abs(x)
    a = 40.0 if a > 40 else a
    h = ((16 * a + _MAGIC) - _MAGIC) / 16
    bell = exp(-h * h / 2) * exp((h - a) * (h + a) / 2)
    p = _normal_tail((a - 5) / (a + 5)) * bell / (a + 5)
    return (1 - p if x > 0 else p), BELL * bell


# ---------------------------------------------------------------- functions of one vector


@inlined
def _vector_sigmoid(x):
    one = constant(1, x)
    return vector.div(one, vector.add(one, vector.exp(vector.sub(constant(0, x), x))))


@inlined
def _vector_tanh(x):
    t = vector.expm1(vector.mul(constant(-2, x), vector.absolute(x)))
    return vector.copysign(vector.div(t, vector.add(constant(2, x), t)), x)


@inlined
def _vector_silu(x):
    return vector.mul(x, _vector_sigmoid(x))


@inlined
def _sigmoid_gradient(dy, y):
    return vector.mul(vector.mul(dy, y), vector.sub(constant(1, y), y))


@inlined
def _tanh_gradient(dy, y):
    one = constant(1, y)
    return vector.mul(vector.mul(dy, vector.sub(one, y)), vector.add(one, y))


@inlined
def _silu_gradient(dy, x):
    rest = _vector_sigmoid(vector.sub(constant(0, x), x))  # 1 - s(x), without cancellation
    slope = vector.fma(x, rest, constant(1, x))
    return vector.mul(vector.mul(dy, _vector_sigmoid(x)), slope)


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


@inlined
def _u(x):
    return math.sqrt(8 / math.pi) * (x + 0.044715 * x * x * x)


@inlined
def _du(x):
    return math.sqrt(8 / math.pi) * (1 + 3 * 0.044715 * x * x)


@inlined
def _gelu_slope(x):
    below, bell = normal(x)
    return below + x * bell


# Formula: y of x. At a NaN every comparison is false, and the value of x passes.
_VALUES: dict[type, Callable[..., Any]] = {
    Relu: lambda f, x: 0.0 if x <= 0 else x,
    LeakyRelu: lambda f, x: x if x > 0 else f.slope * x,
    Elu: lambda f, x: x if x > 0 else f.alpha * expm1(x),
    Sigmoid: lambda f, x: _vector_sigmoid(x),
    Tanh: lambda f, x: _vector_tanh(x),
    Gelu: lambda f, x: x * normal(x)[0],
    GeluTanh: lambda f, x: x * sigmoid(_u(x)),
    Silu: lambda f, x: _vector_silu(x),
    Softplus: lambda f, x: x if f.beta * x > f.threshold else softplus(f.beta * x) / f.beta,
}

# Formula: dx of dy and of what the forward kept (x, or y), or any function of two numbers.
_VALUES_OF_TWO: dict[type, Callable[..., Any]] = {
    Relu: lambda f, dy, y: dy if y > 0 else 0.0,
    LeakyRelu: lambda f, dy, x: dy if x > 0 else dy * f.slope,
    Elu: lambda f, dy, x: dy if x > 0 else dy * f.alpha * exp(x),
    Sigmoid: lambda f, dy, y: _sigmoid_gradient(dy, y),
    Tanh: lambda f, dy, y: _tanh_gradient(dy, y),
    Gelu: lambda f, dy, x: dy * _gelu_slope(x),
    GeluTanh: lambda f, dy, x: dy * sigmoid(_u(x)) * (1 + x * sigmoid(-_u(x)) * _du(x)),
    Silu: lambda f, dy, x: _silu_gradient(dy, x),
    Softplus: lambda f, dy, x: dy if f.beta * x > f.threshold else dy * sigmoid(f.beta * x),
    Product: lambda f, a, b: a * b,
}


OF_VECTORS = Sigmoid, Tanh, Silu  # the other formulas are of numbers


def _value(f, x):
    """The formula's function of one number or vector; compiled code only."""


def _value_of_two(f, a, b):
    """The formula's function of two numbers or vectors; compiled code only."""


@overload(_value, jit_options=INLINE)
def _choose(f, x):
    return _VALUES[f.instance_class]


@overload(_value_of_two, jit_options=INLINE)
def _choose_of_two(f, a, b):
    value = inlined(_VALUES_OF_TWO[f.instance_class])
    return lambda f, a, b: value(f, a, b)  # Numba wants the names of `_value_of_two`


# ---------------------------------------------------------------- the loops


# Slices, as a loop from 0 makes vectors: from elsewhere, an index might be negative.
# One piece alone runs where it is: waking the threads takes longer.


@kernel()
def _map_piece(f, x, y, k):
    x_, y_ = x[k * CHUNK : (k + 1) * CHUNK], y[k * CHUNK : (k + 1) * CHUNK]
    for i in range(x_.size):
        y_[i] = _value(f, np.float64(x_[i]))


@kernel()
def _map2_piece(f, a, b, y, k):
    a_, b_ = a[k * CHUNK : (k + 1) * CHUNK], b[k * CHUNK : (k + 1) * CHUNK]
    y_ = y[k * CHUNK : (k + 1) * CHUNK]
    for i in range(a_.size):
        y_[i] = _value_of_two(f, np.float64(a_[i]), np.float64(b_[i]))


@kernel()
def _map_vectors_piece(f, x, y, k):
    L, end = lane_count(x), min(x.size, (k + 1) * CHUNK)
    whole = end - end % L
    for i in range(k * CHUNK, whole, L):
        store(y, i, _value(f, load(x, i)))
    if whole < end:
        n = end - whole
        store_part(y, whole, n, _value(f, load_part(x, whole, n, zero(x))))


@kernel()
def _map2_vectors_piece(f, a, b, y, k):
    L, end = lane_count(a), min(a.size, (k + 1) * CHUNK)
    whole = end - end % L
    for i in range(k * CHUNK, whole, L):
        store(y, i, _value_of_two(f, load(a, i), load(b, i)))
    if whole < end:
        n = end - whole
        u, v = load_part(a, whole, n, zero(a)), load_part(b, whole, n, zero(b))
        store_part(y, whole, n, _value_of_two(f, u, v))


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


@kernel(parallel=True)
def _map_vectors(f, x, y):
    if x.size <= CHUNK:
        _map_vectors_piece(f, x, y, 0)
    else:
        for k in numba.prange((x.size + CHUNK - 1) // CHUNK):
            _map_vectors_piece(f, x, y, k)


@kernel(parallel=True)
def _map2_vectors(f, a, b, y):
    if a.size <= CHUNK:
        _map2_vectors_piece(f, a, b, y, 0)
    else:
        for k in numba.prange((a.size + CHUNK - 1) // CHUNK):
            _map2_vectors_piece(f, a, b, y, k)


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
}


def map_one(formula: str, x: Array, *params: float) -> Array:
    """Return the value of the formula for every number of x, in x's shape and dtype."""
    y, f = np.empty_like(x), FORMULAS[formula](*params)
    with buffers(x.dtype):
        (_map_vectors if isinstance(f, OF_VECTORS) else _map)(f, flat(x), y.reshape(-1))
    return y


def map_two(formula: str, a: Array, b: Array, *params: float) -> Array:
    """Return the value of the formula for all pairs of numbers, of a and b of one shape."""
    y, f = np.empty_like(a), FORMULAS[formula](*params)
    with buffers(a.dtype):
        run = _map2_vectors if isinstance(f, OF_VECTORS) else _map2
        run(f, flat(a), flat(b), y.reshape(-1))
    return y
