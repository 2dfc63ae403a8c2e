# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""Functions of the numbers in a vector: see `minicnn.ops.vector`, which says what each does."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from minicnn.ops.vector_emit import (
    Emit,
    Vector,
    emits,
)

# ---------------------------------------------------------------- functions of one number

# e^x = 2^n e^r with n = round(x / log 2) and |r| <= log(2) / 2; e^r by its power series up to
# r^degree, whose rest is a tenth of a unit in the last place.
_LOG_2 = 0.6931471805599453, 2.3190468138462996e-17  # the sum is log 2 to 107 bits
_DEGREE = {32: 7, 64: 13}
_LOWEST = {32: -105.0, 64: -747.0}  # e^x is 0 from there down
_HIGHEST = {32: 89.0, 64: 710.0}  # and infinite from here up, where n is still at most 128 or 1024


class _Exponential:
    """The parts of e^x for a vector of one type."""

    def __init__(self, e: Emit, v: Vector, x: Any) -> None:
        self.e, self.v = e, v
        bits = v.dtype.bitwidth
        self.mantissa = 23 if bits == 32 else 52
        self.integers = ir.VectorType(ir.IntType(bits), v.count)
        # A NaN compares false, stays, and makes the result one.
        x = self.bound(x, "<", _LOWEST[bits])
        x = self.bound(x, ">", _HIGHEST[bits])
        magic = 1.5 * 2.0**self.mantissa  # adding it rounds to an integer: n, in the last bits
        shifted = e.fma(v, x, self.number(1 / math.log(2)), self.number(magic))
        n = e.b.fsub(shifted, self.number(magic))
        dtype = np.float32 if bits == 32 else np.float64
        first = float(dtype(_LOG_2[0]))
        r = e.fma(v, n, self.number(-first), x)
        r = e.fma(v, n, self.number(first - _LOG_2[0] - _LOG_2[1]), r)
        self.n = e.b.sub(
            e.b.bitcast(shifted, self.integers), self.integer(int(_bits(dtype(magic))))
        )
        series = self.number(1 / math.factorial(_DEGREE[bits]))
        for k in range(_DEGREE[bits] - 1, 1, -1):
            series = e.fma(v, series, r, self.number(1 / math.factorial(k)))
        self.rest = e.fma(v, e.b.fmul(r, r), series, r)  # e^r - 1

    def number(self, value: float) -> ir.Constant:
        vt = self.e.context.get_value_type(self.v)
        return ir.Constant(vt, [value] * self.v.count)

    def integer(self, value: int) -> ir.Constant:
        return ir.Constant(self.integers, [value] * self.v.count)

    def bound(self, x: Any, relation: str, limit: float) -> Any:
        beyond = self.e.b.fcmp_ordered(relation, x, self.number(limit))
        return self.e.b.select(beyond, self.number(limit), x)

    def power(self, k: Any) -> Any:
        """Return 2^k, in the normal range: k becomes the bits of the exponent."""
        bias = self.integer((1 << self.v.dtype.bitwidth - self.mantissa - 2) - 1)
        bits = self.e.b.shl(self.e.b.add(k, bias), self.integer(self.mantissa))
        return self.e.b.bitcast(bits, self.e.context.get_value_type(self.v))


def _bits(number: np.floating[Any]) -> np.integer[Any]:
    return number.view(f"i{number.itemsize}")


@intrinsic
def exp(typingctx, x):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        parts = _Exponential(e, x, *args)
        # Two steps: 2^n itself may lie beyond the numbers, or between 0 and the normal ones.
        half = e.b.ashr(parts.n, parts.integer(1))
        value = e.b.fadd(parts.rest, parts.number(1.0))
        value = e.b.fmul(value, parts.power(half))
        return e.b.fmul(value, parts.power(e.b.sub(parts.n, half)))

    return emits(x(x), body)


@intrinsic
def expm1(typingctx, x):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        # Below -50 the result is -1, and 2^n stays a normal number.
        parts = _Exponential(e, x, *args)
        n = parts.n
        lowest = parts.integer(-80)
        n = e.b.select(e.b.icmp_signed("<", n, lowest), lowest, n)
        half = parts.power(e.b.sub(n, parts.integer(1)))  # of 2^n, which may be infinite
        value = e.fma(x, half, parts.rest, e.b.fsub(half, parts.number(0.5)))
        return e.b.fadd(value, value)

    return emits(x(x), body)


def _math(name: str, x: Vector, arguments: int = 1) -> Any:
    """Emit LLVM's own function of one or two vectors."""

    def body(e: Emit, ty: Any, args: Any) -> Any:
        vt = e.context.get_value_type(x)
        full = f"llvm.{name}.v{x.count}f{x.dtype.bitwidth}"
        function = ir.FunctionType(vt, [vt] * arguments)
        return e.b.call(cgutils.get_or_insert_function(e.b.module, function, full), args)

    return emits(x(*[x] * arguments), body)


@intrinsic
def sqrt(typingctx, x):
    return _math("sqrt", x)


@intrinsic
def log(typingctx, x):
    return _math("log", x)  # a call a lane


@intrinsic
def absolute(typingctx, x):
    return _math("fabs", x)


@intrinsic
def copysign(typingctx, x, y):
    return _math("copysign", x, 2)


@intrinsic
def polynomial(typingctx, x, single, double):
    coefficients = single if x.dtype.bitwidth == 32 else double

    def body(e: Emit, ty: Any, args: Any) -> Any:
        items = e.items(args[1] if coefficients is single else args[2])
        *lower, value = (
            e.splat(e.context.cast(e.b, c, coefficients.dtype, x.dtype), x.count) for c in items
        )
        for c in reversed(lower):
            value = e.fma(x, value, args[0], c)
        return value

    return emits(x(x, single, double), body)


@intrinsic
def where_greater(typingctx, x, y, a, b):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        x_, y_, a_, b_ = args
        return e.b.select(e.b.fcmp_ordered(">", x_, y_), a_, b_)

    return emits(a(x, x, a, a), body)
