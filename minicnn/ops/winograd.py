# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""Winograd's minimal filtering: its matrices, and code that applies them to vectors.

A correlation of a tile of T = M + R - 1 numbers d with a filter g of R taps has M outputs. Seen
as a product of polynomials, it is known from T of its values, and so takes T products, not M * R:

    y = A' [(G g) * (B' d)]            F(M, R), in two dimensions  A' [(G g G') * (B' d B)] A

The values are taken at the points 0, 1, -1, 2, -2 and infinity (T = 6), and for T = 8 at 1/2 and
-1/2 too. That gives F(4, 3) and F(4, 5), and for the gradient of the filter F(3, 4) and F(5, 4). In
two dimensions 36 products of a tile do the work of 144, and 64 that of 400.

With stride 2, taps 0 and 2 of a filter of 3 meet every other number of d, and tap 1 the rest. That
is F(4, 2) with T = 5 and another 4 products: 81 in two dimensions for 144. The gradient of d has
them in the same way, of 5 numbers for 8, and the gradient of the filter has F(2, 4).

    transform_input(d)                D*D vectors to T*T                    B' d B
    transform_filter(g, side)         R*R vectors to T*T, T = len(side)     G g G'
    transform_output(m, grid)         T*T vectors to M*M, M = len(grid)     A' m A
    lengths(patch, corner)          tuples of R*R, T and T*T zeros, D = len(patch), R = len(corner):
                                    they say to the others how long their tuples are
    load_grid(a, at, rows, columns, zeros)    vectors at a[at + row + column]; zeros[: L] where
                                              that sum is negative

References
----------
A. Lavin, S. Gray, "Fast algorithms for convolutional neural networks", CVPR 2016,
arXiv:1509.09308.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from math import isqrt, prod
from typing import Any, NamedTuple

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minicnn.ops.vector_emit import emits, vector_of

OUTPUTS = 4  # M of the convolutions: rows and columns of a tile of y
POINTS = [Fraction(p) for p in (0, 1, -1, 2, -2, "1/2", "-1/2")]
Matrix = list[list[Fraction]]


class Form(NamedTuple):
    """How large the tiles of one kind of convolution are, along an axis."""

    patch: int  # D: numbers that are read
    outputs: int  # M: numbers that are written
    values: int  # T: products
    step: int  # from one patch to the next


STRIDED = Form(9, OUTPUTS, 9, 2 * OUTPUTS)  # stride 2 and 3 taps
STRIDED_ADJOINT = Form(5, 2 * OUTPUTS, 9, OUTPUTS)  # and the gradient of what it reads


def form_of(R: int, stride: int, adjoint: bool = False) -> Form:
    """Return the form for so many taps."""
    if stride == 2:
        return STRIDED_ADJOINT if adjoint else STRIDED
    return Form(OUTPUTS + R - 1, OUTPUTS, OUTPUTS + R - 1, OUTPUTS)


def input_matrix(T: int) -> Matrix:
    """Return B' (T, T): the coefficients of the Lagrange polynomials without their divisors."""
    points = POINTS[: T - 1]
    rows = [_with_roots([p for p in points if p != point]) for point in points]
    return [[*row, Fraction(0)] for row in rows] + [_with_roots(points)]


def filter_matrix(T: int, R: int) -> Matrix:
    """Return G (T, R): the values of the filter, each over the divisor of its polynomial."""
    points = POINTS[: T - 1]
    divisors = [prod(point - p for p in points if p != point) for point in points]
    rows = [[point**k / d for k in range(R)] for point, d in zip(points, divisors)]
    return [*rows, [Fraction(k == R - 1) for k in range(R)]]


def output_matrix(T: int, M: int) -> Matrix:
    """Return A' (M, T): powers of the points."""
    return [[*(point**i for point in POINTS[: T - 1]), Fraction(i == M - 1)] for i in range(M)]


def _with_roots(roots: list[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of (x - root), constant first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted, scaled = [Fraction(0), *coefficients], [root * c for c in coefficients]
        coefficients = [a - b for a, b in zip(shifted, [*scaled, Fraction(0)])]
    return coefficients


# With stride 2: even and odd numbers apart, in 5 and 4 of the 9 values.


def strided_input_matrix(patch: int) -> Matrix:
    """Return B' (9, patch) for the patch of a convolution, or of its adjoint."""
    even, odd = input_matrix(5), _identity(4)
    if patch == STRIDED_ADJOINT.patch:
        return [*even, *_at(odd, 0, 1, patch)]
    return [*_at(even, 0, 2, patch), *_at(odd, 1, 2, patch)]


def strided_filter_matrix(taps: int) -> Matrix:
    """Return G (9, taps) for a filter of 3 taps, or for 4 numbers of dy in the gradient of it."""
    if taps == OUTPUTS:
        return [*filter_matrix(5, taps), *_identity(4)]
    return [*_at(filter_matrix(5, 2), 0, 2, taps), *_at([[Fraction(1)]] * 4, 1, 1, taps)]


def strided_output_matrix(outputs: int) -> Matrix:
    """Return A' (outputs, 9): 4 outputs, the 3 taps of a gradient, or 8 numbers of the adjoint.

    Those 8 begin with one that tap 1 makes, so that the padding has to be odd.
    """
    even, odd = output_matrix(5, OUTPUTS), _identity(4)
    if outputs == OUTPUTS:
        return [a + b for a, b in zip(even, odd)]
    if outputs == STRIDED_ADJOINT.outputs:
        pairs = zip(_at(odd, 5, 1, 9), _at(even, 0, 1, 9))
        return [row for pair in pairs for row in pair]
    first, last = _at(output_matrix(5, 2), 0, 1, 9)
    return [first, *_at([[Fraction(1)] * 4], 5, 1, 9), last]


def _identity(n: int) -> Matrix:
    return [[Fraction(i == j) for j in range(n)] for i in range(n)]


def _at(matrix: Matrix, start: int, step: int, width: int) -> Matrix:
    """Return rows of so many numbers: the matrix in every `step`-th place from `start`, or 0."""
    out = [[Fraction(0)] * width for _ in matrix]
    for wide, row in zip(out, matrix):
        wide[start : start + step * len(row) : step] = row
    return out


# ---------------------------------------------------------------- emitting the products


class _Product:
    """Emits ``matrix @ vectors`` with no product by 0 or 1."""

    def __init__(self, e: Any, v: Any) -> None:
        self.e, self.v = e, v
        self.scalar = ir.FloatType() if v.dtype.bitwidth == 32 else ir.DoubleType()

    def left(self, matrix: Matrix, x: list[Any]) -> list[Any]:
        """Return matrix @ x. Rows that differ in signs alone share their sums."""
        out: list[Any] = [None] * len(matrix)
        for i, row in enumerate(matrix):
            if out[i] is not None:
                continue
            j = i + 1
            twins = j < len(matrix) and [abs(c) for c in row] == [abs(c) for c in matrix[j]]
            if twins and row != matrix[j]:
                same = [c == d for c, d in zip(row, matrix[j])]
                even = self.sum([(c, v) for c, v, s in zip(row, x, same) if s])
                odd = self.sum([(c, v) for c, v, s in zip(row, x, same) if not s])
                out[i], out[j] = self.e.b.fadd(even, odd), self.e.b.fsub(even, odd)
            else:
                out[i] = self.sum(list(zip(row, x)))
        return out

    def sum(self, terms: list[tuple[Fraction, Any]]) -> Any:
        """Return the sum of c * v, beginning with a term that needs no product if there is one."""
        terms = sorted((t for t in terms if t[0]), key=lambda t: (t[0] != 1, abs(t[0]) != 1))
        (c, total), *rest = terms
        if c != 1:
            total = self.e.b.fmul(self.constant(c), total)
        for c, v in rest:
            if c == 1:
                total = self.e.b.fadd(total, v)
            elif c == -1:
                total = self.e.b.fsub(total, v)
            else:
                total = self.e.fma(self.v, self.constant(c), v, total)
        return total

    def constant(self, c: Fraction) -> Any:
        vt = ir.VectorType(self.scalar, self.v.count)
        return ir.Constant(vt, [float(c)] * self.v.count)

    def both(self, matrix: Matrix, x: list[Any]) -> list[Any]:
        """Return matrix @ x @ matrix', for x row by row."""
        n = len(matrix[0])
        columns = [self.left(matrix, x[j::n]) for j in range(n)]  # (n, rows of the matrix)
        rows = [self.left(matrix, list(row)) for row in zip(*columns)]
        return [value for row in rows for value in row]


def _transform(vs: Any, matrix: Matrix, signature: Callable[[Any], Any]) -> Any:
    v, n = vs.dtype, len(matrix)
    result = types.UniTuple(v, n * n)

    def body(e: Any, ty: Any, args: Any) -> Any:
        return e.tuple(result, _Product(e, v).both(matrix, e.items(args[0])))

    return emits(signature(result), body)


# Sizes tell the forms apart: strided ones have a D and a T of their own.


@intrinsic
def lengths(typingctx, patch, corner):
    R, side = corner.count, patch.count  # T, but for the adjoint
    if side == STRIDED_ADJOINT.patch:
        side = STRIDED_ADJOINT.values
    parts = [types.UniTuple(types.intp, n) for n in (R * R, side, side * side)]
    result = types.Tuple(parts)

    def body(e: Any, ty: Any, args: Any) -> Any:
        zeros = [e.tuple(part, [e.number(0)] * part.count) for part in parts]
        return e.tuple(result, zeros)

    return emits(result(patch, corner), body)


@intrinsic
def transform_input(typingctx, vs):
    side = isqrt(vs.count)
    strided = side in (STRIDED.patch, STRIDED_ADJOINT.patch)
    matrix = strided_input_matrix(side) if strided else input_matrix(side)
    return _transform(vs, matrix, lambda result: result(vs))


@intrinsic
def transform_filter(typingctx, vs, side):
    values, taps = side.count, isqrt(vs.count)
    strided = values == STRIDED.values
    matrix = strided_filter_matrix(taps) if strided else filter_matrix(values, taps)
    return _transform(vs, matrix, lambda result: result(vs, side))


@intrinsic
def transform_output(typingctx, vs, grid):
    values, outputs = isqrt(vs.count), grid.count
    strided = values == STRIDED.values
    matrix = strided_output_matrix(outputs) if strided else output_matrix(values, outputs)
    return _transform(vs, matrix, lambda result: result(vs, grid))


@intrinsic
def load_grid(typingctx, a, at, rows, columns, zeros):
    def body(e: Any, ty: Any, args: Any) -> Any:
        a_, at_, rows_, columns_, zeros_ = args
        nothing = e.array(zeros, zeros_).data
        vs = []
        for row in e.items(rows_):
            for column in e.items(columns_):
                offset = e.b.add(row, column)
                inside = e.b.icmp_signed(">=", offset, e.number(0))
                start = e.b.select(inside, e.b.add(at_, offset), e.number(0))
                there = e.at(a, a_, start, count=v.count)
                vs.append(e.load(v, e.b.select(inside, there, nothing)))
        return e.tuple(result, vs)

    v = vector_of(a)
    result = types.UniTuple(v, rows.count * columns.count)
    return emits(result(a, types.intp, rows, columns, zeros), body)
