# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""SIMD vectors for Numba kernels: what the compiler's auto-vectoriser would have to guess, said.

Numba compiles scalar code and leaves vectors to LLVM's guess. The functions here are the missing
words: a kernel loads a vector, multiplies and adds it, and stores it, and LLVM keeps it in a
register. They work inside ``@njit`` functions on C-contiguous 1-d arrays of float32 or float64
and take element offsets, so that one flat array holds any layout:

    v = load(a, i)                  a[i : i + L] as one vector of L lanes
    store(a, i, v)
    broadcast(a, i), splat(s)       one number in every lane
    constant(s, v)                  the number s, of any type, in every lane of a vector like v
    lane(v)                         the number in the first lane
    zero(a)                         a vector of zeros of a's type
    lane_count(a)                   L, the lanes of a vector of a's type
    load_part(a, i, n, v)           a[i : i + n] in the first n lanes (all if n > L), else v's
    store_part(a, i, n, v)          the first n lanes alone; memory beyond is not touched
    to_boundary(a, i)               1 to L: how far from a[i] the memory of a whole vector begins
    add, sub, mul, div, sqrt(x), fma(x, y, z)    lane by lane; fma is x * y + z, rounded once
    exp(x), expm1(x), log(x)        within 2 units in the last place
    absolute(x), copysign(x, y)     as in NumPy
    polynomial(x, single, double)   sum of c[k] x^k, c being `single` for float32, else `double`
    where_greater(x, y, a, b)       a where x > y, else b (where x or y is NaN, too)
    maximum(x, y)                   NaN wins, as in numpy.maximum
    best, winner = take_larger(best, winner, v, k)   the running maximum and who won (first wins):
                                    winners are bytes, or integers as wide as a lane
    load_winner(winner, i, a), where_winner(winner, k, v)    v where k has won, else zero
    unless_winner(winner, k, v)     v where another than k has won, else zero
    place_winners(winner, off, base, columns, step, skip)    int32 offsets of the winners
    where_positive(x, v)            v where x > 0, else zero
    winner_bits(winner, i, k, a)    an integer whose bit r tells whether winner[i + r] is k, r < L
    first_bit(bits)                 the number of the lowest bit that is set, of bits != 0
    horizontal_sum(v)               the lanes added pairwise
    horizontal_max(v)               the largest lane, or NaN
    halves(x, y)                    the even and the odd numbers of x followed by y
    zip_halves(x, y)                its inverse: x[0], y[0], x[1], y[1], ...

A register block is a tuple of vectors. Tuples of offsets say where its rows are in memory:

    rows = offsets(table, i, last, n)    table[min(i + r, last)] for r < n
    rows = multiples(i, last, step, n)   min(i + r, last) * step for r < n
    rows = lane_offsets(table, i, a)     table[i + r] for r < L
    rows = scaled(rows, step)            each of them times step
    rows = lane_multiples(n, step, k, a) r * step for r < n, and k for the others up to L
    vs = load_rows(a, at, rows)          one vector at every at + rows[r]
    store_rows(a, at, rows, vs)          rows[r] < 0 stores nothing
    vs = transpose(vs)                   L vectors of L lanes
    vs = widen(vs, a)                    integers as wide as a's; other vectors as they are

and `outer_tile` is the inner loop of every matrix product: a block of R rows times V vectors
stays in registers while k runs.

    acc = zeros(a, R * V)
    acc = outer_tile(acc, a, at, rows, cols, k, n, b, bi, step)
        acc[r][v] += a[at + rows[r] + cols[k]] * b[bi + v*L :][: L], bi += step    (n values of k)
    acc = lane_tile(...)       the same with the vector a[at + rows[r] + cols[k] + v*L :][: L]
    acc = tile_load(acc, a, at, rows), tile_store(acc, a, at, rows), tile_add(x, y)
    acc = tile_repeat(acc, a, at)        every row is a[at : at + V*L]
    tile_pool(acc, area, more, relu, off, a, at, table, i, end, winner)
        each len(area) rows are a window w: its maximum goes to a[at + table[i + w]:], and who won
        (see `take_larger`) to the same place of winner; where i + w < end

Where most products would be with zero, lists say which are not (`n` entries of g and of offsets):

    acc = list_tile(g, i, n, at_of, a, at, rows, v)
        acc[r][v] = sum over k of g[i + k] * a[at + rows[r] + at_of[i + k] + v*L :][: L]
    acc = lists_tile(g, i, n, step, at_of, a, at, r, v)        R lists side by side
        acc[r][v] = sum over k of g[i + k*step + r] * a[at + at_of[i + k*step + r] + v*L :][: L]

Where each lane of a sum reads a table at a place of its own (`at_of` holds n vectors of lanes):

    acc = pick_tile(g, i, n, step, at_of, a, at, rows, taps, move)
        acc[r][s] = sum over k of g[i + k*step :][: L] * row[at_of[i + k*step :][: L] + s*move]
        with row = a[at + rows[r] + k*L :][: L]; what is read beyond the last lane is undefined

Rows times rows, for what lies in memory along the sum:

    acc = dot_tile(a, at, rows, b, bt, others, n)
        acc[r][s] = sum over k < n of a[at + rows[r] + k*L :][: L] * b[bt + others[s] + k*L :][: L]
    sums = horizontal_sums(acc)          a tuple of numbers

The numbers of rows and of vectors are literals, or the lengths of tuples given in their place: a
tuple that is an argument makes a kernel for each length.

A vector is as wide as the machine's registers: 64 bytes with AVX-512, 32 with AVX, else 16
(NEON, SSE). Nothing is read or written outside [offset, offset + lanes), and nobody checks that
this lies inside the array, except under NUMBA_BOUNDSCHECK=1: then every access is checked.

Numbers are IEEE: NaN and infinities propagate, and only `horizontal_sum(s)` reorder a sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core import config as _numba_config
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

# As Numba sees the machine (NUMBA_CPU_NAME and NUMBA_CPU_FEATURES included).
_FEATURES = cpu_target.target_context.codegen().magic_tuple()[2].split(",")
VECTOR_BYTES = 64 if "+avx512f" in _FEATURES else 32 if "+avx" in _FEATURES else 16
# Rows of a tile of two vectors. AVX-512 and NEON have 32 registers: 16 accumulators, two vectors
# of b and one of a leave room, and eight row pointers still fit the integer registers. AVX has 16.
ROWS = 6 if VECTOR_BYTES == 32 else 8

BLOCK = 64  # terms that a kernel adds in one go: longer sums are sums of blocks, to round less
CHECKED = bool(getattr(_numba_config, "BOUNDSCHECK", None))  # NUMBA_BOUNDSCHECK=1

_I32, _I64 = ir.IntType(32), ir.IntType(64)


def lanes(dtype: Any) -> int:
    """Return how many numbers of a NumPy float type one vector holds."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


class Vector(types.Type):
    """The Numba type of one vector."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"vector({count} x {dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, fe_type: Vector) -> None:
        scalar = manager.lookup(fe_type.dtype).get_value_type()
        super().__init__(manager, fe_type, ir.VectorType(scalar, fe_type.count))


def _vector(array: Any) -> Vector:
    """Return the type of a vector loaded from `array`; winners of `take_larger` are uint8."""
    if array.ndim != 1 or array.layout != "C":
        raise TypeError(f"vector: expected a C-contiguous 1-d array, got {array}")
    width = 8 * VECTOR_BYTES // array.dtype.bitwidth
    return Vector(array.dtype, width)


# ---------------------------------------------------------------- emitting LLVM instructions


class _Emit:
    """An IR builder that knows Numba's arrays, tuples and vectors."""

    def __init__(self, context: Any, builder: ir.IRBuilder) -> None:
        self.context, self.b = context, builder

    def number(self, value: int) -> ir.Constant:
        return ir.Constant(_I64, value)

    def array(self, ty: types.Array, value: Any) -> Any:
        return self.context.make_array(ty)(self.context, self.b, value)

    def at(self, ty: types.Array, value: Any, *indices: Any, count: int = 1) -> Any:
        """Return a pointer to the element whose index is the sum of `indices`.

        One step an index, so that LLVM keeps the pointer after the steps that a loop repeats.
        """
        array = self.array(ty, value)
        self.check(array, indices, count)
        pointer = array.data
        for index in indices:
            pointer = self.b.gep(pointer, [index])
        return pointer

    def sum(self, terms: Sequence[Any]) -> Any:
        total = terms[0]
        for term in terms[1:]:
            total = self.b.add(total, term)
        return total

    def check(self, array: Any, indices: Sequence[Any], count: Any) -> None:
        """Under NUMBA_BOUNDSCHECK, raise unless `count` elements from there lie in the array."""
        if not CHECKED:
            return
        index = self.sum(indices)
        below = self.b.icmp_signed("<", index, self.number(0))
        last = self.b.add(index, self.number(count) if isinstance(count, int) else count)
        above = self.b.icmp_signed(">", last, array.nitems)
        with cgutils.if_unlikely(self.b, self.b.or_(below, above)):
            message = "vector: offset outside the array"
            self.context.call_conv.return_user_exc(self.b, IndexError, (message,))

    def load(self, ty: Vector, pointer: Any) -> Any:
        vt = self.context.get_value_type(ty)
        value = self.b.load(self.b.bitcast(pointer, vt.as_pointer()))
        value.align = ty.dtype.bitwidth // 8  # arrays are aligned to their elements only
        return value

    def store(self, ty: Vector, value: Any, pointer: Any) -> None:
        instruction = self.b.store(value, self.b.bitcast(pointer, value.type.as_pointer()))
        instruction.align = ty.dtype.bitwidth // 8

    def splat(self, scalar: Any, count: int) -> Any:
        vt = ir.VectorType(scalar.type, count)
        first = self.b.insert_element(ir.Constant(vt, ir.Undefined), scalar, ir.Constant(_I32, 0))
        zeros = ir.Constant(ir.VectorType(_I32, count), [0] * count)
        return self.b.shuffle_vector(first, ir.Constant(vt, ir.Undefined), zeros)

    def zero(self, ty: Vector) -> Any:
        return ir.Constant(self.context.get_value_type(ty), [0.0] * ty.count)

    def fma(self, ty: Vector, x: Any, y: Any, z: Any) -> Any:
        name = f"llvm.fma.v{ty.count}f{ty.dtype.bitwidth}"
        vt = self.context.get_value_type(ty)
        function = ir.FunctionType(vt, [vt] * 3)
        return self.b.call(cgutils.get_or_insert_function(self.b.module, function, name), [x, y, z])

    def items(self, value: Any) -> list[Any]:
        return [self.b.extract_value(value, i) for i in range(len(value.type.elements))]

    def tuple(self, ty: types.UniTuple, values: Sequence[Any]) -> Any:
        return self.context.make_tuple(self.b, ty, values)


def _emits(signature: Any, body: Callable[[_Emit, Any, Any], Any]) -> Any:
    """Pair a signature with code that gets the emitter, the argument types and the arguments."""

    def codegen(context: Any, builder: ir.IRBuilder, sig: Any, args: Any) -> Any:
        result = body(_Emit(context, builder), sig.args, args)
        return context.get_dummy_value() if result is None else result

    return signature, codegen


# ---------------------------------------------------------------- one vector


@intrinsic
def load(typingctx, a, i):
    v = _vector(a)
    return _emits(
        v(a, types.intp),
        lambda e, ty, args: e.load(v, e.at(a, args[0], args[1], count=v.count)),
    )


@intrinsic
def store(typingctx, a, i, v):
    # v may be narrower than VECTOR_BYTES: the winners of take_larger are bytes, one a lane.
    return _emits(
        types.void(a, types.intp, v),
        lambda e, ty, args: e.store(v, args[2], e.at(a, args[0], args[1], count=v.count)),
    )


@intrinsic
def lane_count(typingctx, a):
    return _emits(types.intp(a), lambda e, ty, args: e.number(_vector(a).count))


@intrinsic
def broadcast(typingctx, a, i):
    v = _vector(a)
    return _emits(
        v(a, types.intp),
        lambda e, ty, args: e.splat(e.b.load(e.at(a, args[0], args[1])), v.count),
    )


@intrinsic
def splat(typingctx, s):
    v = Vector(s, 8 * VECTOR_BYTES // s.bitwidth)
    return _emits(v(s), lambda e, ty, args: e.splat(args[0], v.count))


@intrinsic
def constant(typingctx, s, v):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        return e.splat(e.context.cast(e.b, args[0], s, v.dtype), v.count)

    return _emits(v(s, v), body)


@intrinsic
def lane(typingctx, v):
    """Return the number in the first lane."""
    return _emits(
        v.dtype(v), lambda e, ty, args: e.b.extract_element(args[0], ir.Constant(_I32, 0))
    )


@intrinsic
def zero(typingctx, a):
    v = _vector(a)
    return _emits(v(a), lambda e, ty, args: e.zero(v))


@intrinsic
def add(typingctx, x, y):
    return _emits(x(x, x), lambda e, ty, args: e.b.fadd(*args))


@intrinsic
def sub(typingctx, x, y):
    return _emits(x(x, x), lambda e, ty, args: e.b.fsub(*args))


@intrinsic
def mul(typingctx, x, y):
    return _emits(x(x, x), lambda e, ty, args: e.b.fmul(*args))


@intrinsic
def div(typingctx, x, y):
    return _emits(x(x, x), lambda e, ty, args: e.b.fdiv(*args))


@intrinsic
def sqrt(typingctx, x):
    return _math("sqrt", x)


@intrinsic
def fma(typingctx, x, y, z):
    return _emits(x(x, x, x), lambda e, ty, args: e.fma(x, *args))


def _larger(e: _Emit, x: Any, y: Any) -> Any:
    """Lanes in which y takes x's place: y is larger, or is NaN."""
    return e.b.or_(e.b.fcmp_ordered(">", y, x), e.b.fcmp_unordered("uno", y, y))


@intrinsic
def maximum(typingctx, x, y):
    return _emits(x(x, x), lambda e, ty, args: e.b.select(_larger(e, *args), args[1], args[0]))


@intrinsic
def winner_of(typingctx, k, a):
    """Winner k in every lane of a vector of a's type."""
    winner = Vector(types.uint8, _vector(a).count)
    return _emits(
        winner(types.intp, a),
        lambda e, ty, args: e.splat(e.b.trunc(args[0], ir.IntType(8)), winner.count),
    )


def _replaces(e: _Emit, v: Any, best: Any) -> Any:
    """Lanes in which v is larger, or NaN; a NaN that is already there keeps its place."""
    return e.b.and_(e.b.fcmp_unordered(">", v, best), e.b.fcmp_ordered("ord", best, best))


@intrinsic
def take_larger(typingctx, best, winner, v, k):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        best_, winner_, v_, k_ = args
        larger = _replaces(e, v_, best_)
        new = e.splat(e.context.cast(e.b, k_, types.intp, winner.dtype), winner.count)
        return e.tuple(result, [e.b.select(larger, v_, best_), e.b.select(larger, new, winner_)])

    result = types.Tuple((best, winner))
    return _emits(result(best, winner, best, types.intp), body)


def _sum_lanes(e: _Emit, v: Vector, value: Any) -> Any:
    scalar = value.type.element
    function = ir.FunctionType(scalar, [scalar, value.type])
    name = f"llvm.vector.reduce.fadd.v{v.count}f{v.dtype.bitwidth}"
    reduce = cgutils.get_or_insert_function(e.b.module, function, name)
    # reassoc alone: the lanes are added pairwise, and NaN and infinities still count.
    return e.b.call(reduce, [ir.Constant(scalar, -0.0), value], fastmath=("reassoc",))


@intrinsic
def relu_winner(typingctx, best, winner, off):
    """ReLU of a maximum, and its winner, or `off` where it is not above zero (NaN stays)."""

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        best_, winner_, off_ = args
        on = e.b.fcmp_unordered(">", best_, e.zero(best))
        none = e.splat(e.b.trunc(off_, ir.IntType(8)), winner.count)
        return e.tuple(result, [e.b.select(on, best_, e.zero(best)), e.b.select(on, winner_, none)])

    result = types.Tuple((best, winner))
    return _emits(result(best, winner, types.intp), body)


@intrinsic
def load_winner(typingctx, winner, i, a):
    """Load the winners that were stored for a vector of a's type."""
    ty = Vector(types.uint8, _vector(a).count)
    return _emits(
        ty(winner, types.intp, a),
        lambda e, _, args: e.load(ty, e.at(winner, args[0], args[1], count=ty.count)),
    )


@intrinsic
def where_winner(typingctx, winner, k, v):
    """Keep v in the lanes whose winner is k; zero in the others."""

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        winner_, k_, v_ = args
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(k_, ir.IntType(8)), winner.count))
        return e.b.select(same, v_, e.zero(v))

    return _emits(v(winner, types.intp, v), body)


@intrinsic
def winner_bits(typingctx, winner, i, k, a):
    ty = Vector(types.uint8, _vector(a).count)

    def body(e: _Emit, _: Any, args: Any) -> Any:
        who = e.load(ty, e.at(winner, args[0], args[1], count=ty.count))
        same = e.b.icmp_unsigned("==", who, e.splat(e.b.trunc(args[2], ir.IntType(8)), ty.count))
        return e.b.zext(e.b.bitcast(same, ir.IntType(ty.count)), _I64)

    return _emits(types.int64(winner, types.intp, types.intp, a), body)


@intrinsic
def first_bit(typingctx, bits):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        function = ir.FunctionType(_I64, [_I64, ir.IntType(1)])
        count = cgutils.get_or_insert_function(e.b.module, function, "llvm.cttz.i64")
        return e.b.call(count, [args[0], ir.Constant(ir.IntType(1), 1)])

    return _emits(types.int64(types.int64), body)


@intrinsic
def unless_winner(typingctx, winner, k, v):
    """Keep v in the lanes whose winner is not k; zero in the others."""

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        winner_, k_, v_ = args
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(k_, ir.IntType(8)), winner.count))
        return e.b.select(same, e.zero(v), v_)

    return _emits(v(winner, types.intp, v), body)


@intrinsic
def place_winners(typingctx, winner, off, base, columns, step, skip):
    """Return ``base + k * step + k // columns * skip`` as int32 for winner k, and base for `off`.

    k and columns are less than 256.
    """
    count = winner.count
    result = Vector(types.int32, count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        wide = ir.VectorType(_I32, count)
        winner_, off_, *numbers = args
        base_, columns_, step_, skip_ = (e.b.trunc(n, _I32) for n in numbers)
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(off_, ir.IntType(8)), count))
        k = e.b.zext(e.b.select(same, ir.Constant(winner_.type, None), winner_), wide)
        # k // columns without a division, exact for numbers below 256.
        inverse = e.b.add(e.b.udiv(ir.Constant(_I32, 1 << 16), columns_), ir.Constant(_I32, 1))
        row = e.b.lshr(e.b.mul(k, e.splat(inverse, count)), ir.Constant(wide, [16] * count))
        at = e.b.add(e.b.mul(k, e.splat(step_, count)), e.b.mul(row, e.splat(skip_, count)))
        return e.b.add(at, e.splat(base_, count))

    i = types.intp
    return _emits(result(winner, i, i, i, i, i), body)


@intrinsic
def where_positive(typingctx, x, v):
    """Keep v in the lanes where x > 0; zero in the others, where x is NaN too."""
    return _emits(
        x(x, x),
        lambda e, ty, args: e.b.select(
            e.b.fcmp_ordered(">", args[0], e.zero(x)), args[1], e.zero(x)
        ),
    )


@intrinsic
def horizontal_sum(typingctx, v):
    return _emits(v.dtype(v), lambda e, ty, args: _sum_lanes(e, v, args[0]))


@intrinsic
def horizontal_max(typingctx, v):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        (value,), L = args, v.count
        for d in (1 << s for s in range(L.bit_length() - 1)):
            other = e.b.shuffle_vector(value, value, _mask([(i + d) % L for i in range(L)]))
            value = e.b.select(_larger(e, value, other), other, value)
        return e.b.extract_element(value, ir.Constant(_I32, 0))

    return _emits(v.dtype(v), body)


# ---------------------------------------------------------------- part of a vector, and shuffles


def _first_lanes(e: _Emit, v: Vector, n: Any) -> Any:
    """Return the mask of the lanes below n."""
    # Integers as wide as a lane: the comparison is one instruction then.
    width = ir.IntType(v.dtype.bitwidth)
    if v.dtype.bitwidth < 64:
        n = e.b.select(e.b.icmp_signed("<", n, e.number(v.count)), n, e.number(v.count))
        n = e.b.trunc(n, width)
    number = ir.Constant(ir.VectorType(width, v.count), list(range(v.count)))
    return e.b.icmp_signed("<", number, e.splat(n, v.count))


def _part(e: _Emit, v: Vector, a: Any, a_: Any, i: Any, n: Any) -> Any:
    """Return a pointer to a[i : i + n] as a vector."""
    e.check(e.array(a, a_), (i,), n)
    pointer = e.at(a, a_, i, count=0)
    return e.b.bitcast(pointer, e.context.get_value_type(v).as_pointer())


@intrinsic
def load_part(typingctx, a, i, n, v):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        a_, i_, n_, other = args
        pointer, mask = _part(e, v, a, a_, i_, n_), _first_lanes(e, v, n_)
        function = ir.FunctionType(other.type, [pointer.type, _I32, mask.type, other.type])
        name = f"llvm.masked.load.v{v.count}f{v.dtype.bitwidth}.p0"
        load = cgutils.get_or_insert_function(e.b.module, function, name)
        align = ir.Constant(_I32, v.dtype.bitwidth // 8)
        return e.b.call(load, [pointer, align, mask, other])

    return _emits(v(a, types.intp, types.intp, v), body)


@intrinsic
def store_part(typingctx, a, i, n, v):
    def body(e: _Emit, ty: Any, args: Any) -> None:
        a_, i_, n_, value = args
        pointer, mask = _part(e, v, a, a_, i_, n_), _first_lanes(e, v, n_)
        types_ = [value.type, pointer.type, _I32, mask.type]
        function = ir.FunctionType(ir.VoidType(), types_)
        name = f"llvm.masked.store.v{v.count}f{v.dtype.bitwidth}.p0"
        store = cgutils.get_or_insert_function(e.b.module, function, name)
        align = ir.Constant(_I32, v.dtype.bitwidth // 8)
        e.b.call(store, [value, pointer, align, mask])

    return _emits(types.void(a, types.intp, types.intp, v), body)


@intrinsic
def to_boundary(typingctx, a, i):
    v = _vector(a)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        address = e.b.ptrtoint(e.at(a, *args, count=0), _I64)
        beyond = e.b.and_(address, e.number(VECTOR_BYTES - 1))
        numbers = e.b.udiv(beyond, e.number(VECTOR_BYTES // v.count))
        return e.b.sub(e.number(v.count), numbers)

    return _emits(types.intp(a, types.intp), body)


def _two_of(v: Vector, low: Sequence[int], high: Sequence[int]) -> Any:
    """Emit a pair of vectors, each of these lanes of x followed by y."""
    result = types.UniTuple(v, 2)
    return _emits(
        result(v, v),
        lambda e, ty, args: e.tuple(
            result, [e.b.shuffle_vector(*args, _mask(lanes_)) for lanes_ in (low, high)]
        ),
    )


@intrinsic
def halves(typingctx, x, y):
    return _two_of(x, range(0, 2 * x.count, 2), range(1, 2 * x.count, 2))


@intrinsic
def zip_halves(typingctx, x, y):
    L = x.count
    order = [i // 2 + L * (i % 2) for i in range(2 * L)]
    return _two_of(x, order[:L], order[L:])


# ---------------------------------------------------------------- functions of one number

# e^x = 2^n e^r with n = round(x / log 2) and |r| <= log(2) / 2; e^r by its power series up to
# r^degree, whose rest is a tenth of a unit in the last place.
_LOG_2 = 0.6931471805599453, 2.3190468138462996e-17  # the sum is log 2 to 107 bits
_DEGREE = {32: 7, 64: 13}
_LOWEST = {32: -105.0, 64: -747.0}  # e^x is 0 from there down
_HIGHEST = {32: 89.0, 64: 710.0}  # and infinite from here up, where n is still at most 128 or 1024


class _Exponential:
    """The parts of e^x for a vector of one type."""

    def __init__(self, e: _Emit, v: Vector, x: Any) -> None:
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
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        parts = _Exponential(e, x, *args)
        # Two steps: 2^n itself may lie beyond the numbers, or between 0 and the normal ones.
        half = e.b.ashr(parts.n, parts.integer(1))
        value = e.b.fadd(parts.rest, parts.number(1.0))
        value = e.b.fmul(value, parts.power(half))
        return e.b.fmul(value, parts.power(e.b.sub(parts.n, half)))

    return _emits(x(x), body)


@intrinsic
def expm1(typingctx, x):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        # Below -50 the result is -1, and 2^n stays a normal number.
        parts = _Exponential(e, x, *args)
        n = parts.n
        lowest = parts.integer(-80)
        n = e.b.select(e.b.icmp_signed("<", n, lowest), lowest, n)
        half = parts.power(e.b.sub(n, parts.integer(1)))  # of 2^n, which may be infinite
        value = e.fma(x, half, parts.rest, e.b.fsub(half, parts.number(0.5)))
        return e.b.fadd(value, value)

    return _emits(x(x), body)


def _math(name: str, x: Vector, arguments: int = 1) -> Any:
    """Emit LLVM's own function of one or two vectors."""

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        vt = e.context.get_value_type(x)
        full = f"llvm.{name}.v{x.count}f{x.dtype.bitwidth}"
        function = ir.FunctionType(vt, [vt] * arguments)
        return e.b.call(cgutils.get_or_insert_function(e.b.module, function, full), args)

    return _emits(x(*[x] * arguments), body)


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

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        items = e.items(args[1] if coefficients is single else args[2])
        *lower, value = (
            e.splat(e.context.cast(e.b, c, coefficients.dtype, x.dtype), x.count) for c in items
        )
        for c in reversed(lower):
            value = e.fma(x, value, args[0], c)
        return value

    return _emits(x(x, single, double), body)


@intrinsic
def where_greater(typingctx, x, y, a, b):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        x_, y_, a_, b_ = args
        return e.b.select(e.b.fcmp_ordered(">", x_, y_), a_, b_)

    return _emits(a(x, x, a, a), body)


# ---------------------------------------------------------------- tuples of offsets


def _count(n: Any) -> int:
    """Return the number that `n` stands for: a literal, or a tuple of that length."""
    return len(n) if isinstance(n, types.BaseTuple) else n.literal_value


@intrinsic(prefer_literal=True)
def offsets(typingctx, table, i, last, n):
    count = _count(n)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        table_, i_, last_, _ = args
        rows = []
        for r in range(count):
            k = e.b.add(i_, e.number(r))
            k = e.b.select(e.b.icmp_signed("<", k, last_), k, last_)
            rows.append(e.b.sext(e.b.load(e.at(table, table_, k)), _I64))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, count)
    return _emits(result(table, types.intp, types.intp, n), body)


@intrinsic(prefer_literal=True)
def multiples(typingctx, i, last, step, n):
    count = _count(n)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        i_, last_, step_, _ = args
        rows = []
        for r in range(count):
            k = e.b.add(i_, e.number(r))
            k = e.b.select(e.b.icmp_signed("<", k, last_), k, last_)
            rows.append(e.b.mul(k, step_))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, count)
    return _emits(result(types.intp, types.intp, types.intp, n), body)


@intrinsic
def lane_offsets(typingctx, table, i, a):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        at = [e.at(table, args[0], args[1], e.number(r)) for r in range(result.count)]
        return e.tuple(result, [e.b.sext(e.b.load(p), _I64) for p in at])

    result = types.UniTuple(types.intp, _vector(a).count)
    return _emits(result(table, types.intp, a), body)


@intrinsic
def scaled(typingctx, rows, step):
    return _emits(
        rows(rows, types.intp),
        lambda e, ty, args: e.tuple(rows, [e.b.mul(row, args[1]) for row in e.items(args[0])]),
    )


@intrinsic
def lane_multiples(typingctx, n, step, beyond, a):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        n_, step_, beyond_, _ = args
        rows = []
        for r in map(e.number, range(result.count)):
            inside = e.b.icmp_signed("<", r, n_)
            rows.append(e.b.select(inside, e.b.mul(r, step_), beyond_))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, _vector(a).count)
    return _emits(result(types.intp, types.intp, types.intp, a), body)


# ---------------------------------------------------------------- tuples of vectors


@intrinsic(prefer_literal=True)
def zeros(typingctx, a, n):
    v = _vector(a)
    result = types.UniTuple(v, _count(n))
    return _emits(result(a, n), lambda e, ty, args: e.tuple(result, [e.zero(v)] * result.count))


@intrinsic
def load_rows(typingctx, a, at, rows):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        a_, at_, rows_ = args
        return e.tuple(
            result, [e.load(v, e.at(a, a_, at_, r, count=v.count)) for r in e.items(rows_)]
        )

    v = _vector(a)
    result = types.UniTuple(v, rows.count)
    return _emits(result(a, types.intp, rows), body)


@intrinsic
def store_rows(typingctx, a, at, rows, vs):
    def body(e: _Emit, ty: Any, args: Any) -> None:
        a_, at_, rows_, vs_ = args
        for row, value in zip(e.items(rows_), e.items(vs_)):
            with e.b.if_then(e.b.icmp_signed(">=", row, e.number(0)), likely=True):
                e.store(v, value, e.at(a, a_, at_, row, count=v.count))

    v = vs.dtype
    return _emits(types.void(a, types.intp, rows, vs), body)


@intrinsic
def transpose(typingctx, vs):
    """Swap blocks of 1, 2, 4, ... lanes between pairs of vectors as far apart."""

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        vs_, L = e.items(args[0]), vs.count
        for d in (1 << s for s in range(L.bit_length() - 1)):
            # Lanes of x followed by y: x keeps its even blocks and takes y's, and the reverse.
            low = [i if not i & d else i - d + L for i in range(L)]
            high = [i + d if not i & d else i + L for i in range(L)]
            swapped = list(vs_)
            for r in (r for r in range(L) if not r & d):
                x, y = vs_[r], vs_[r + d]
                swapped[r] = e.b.shuffle_vector(x, y, _mask(low))
                swapped[r + d] = e.b.shuffle_vector(x, y, _mask(high))
            vs_ = swapped
        return e.tuple(vs, vs_)

    return _emits(vs(vs), body)


@intrinsic
def widen(typingctx, vs, a):
    result = types.UniTuple(Vector(a.dtype, vs.dtype.count), vs.count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        if a.dtype == vs.dtype.dtype:
            return args[0]
        wide = e.context.get_value_type(result.dtype)
        return e.tuple(result, [e.b.sext(v, wide) for v in e.items(args[0])])

    return _emits(result(vs, a), body)


def _mask(indices: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(_I32, len(indices)), list(indices))


# ---------------------------------------------------------------- register blocks


def _tile_pointers(e: _Emit, a: Any, args: Sequence[Any], vectors: int, count: int) -> list[Any]:
    """Return where each vector of a tile lies: row after row, `vectors` in each."""
    a_, at_, rows_ = args
    return [
        e.at(a, a_, at_, row, e.number(v * count), count=count)
        for row in e.items(rows_)
        for v in range(vectors)
    ]


@intrinsic
def tile_load(typingctx, acc, a, at, rows):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        pointers = _tile_pointers(e, a, args[1:], acc.count // rows.count, v.count)
        return e.tuple(acc, [e.load(v, p) for p in pointers])

    v = acc.dtype
    return _emits(acc(acc, a, types.intp, rows), body)


@intrinsic
def tile_store(typingctx, acc, a, at, rows):
    def body(e: _Emit, ty: Any, args: Any) -> None:
        pointers = _tile_pointers(e, a, args[1:], acc.count // rows.count, v.count)
        for pointer, value in zip(pointers, e.items(args[0])):
            e.store(v, value, pointer)

    v = acc.dtype
    return _emits(types.void(acc, a, types.intp, rows), body)


@intrinsic(prefer_literal=True)
def tile_repeat(typingctx, acc, a, at, n):
    def body(e: _Emit, ty: Any, args: Any) -> Any:
        steps = range(acc.count // n.literal_value)
        at_ = [e.at(a, args[1], args[2], e.number(s * v.count), count=v.count) for s in steps]
        return e.tuple(acc, [e.load(v, p) for p in at_] * n.literal_value)

    v = acc.dtype
    return _emits(acc(acc, a, types.intp, n), body)


@intrinsic
def tile_pool(typingctx, acc, area, more, relu, off, a, at, table, i, end, winner):
    """With `more`, windows of one row add to what is there. With `relu`, a maximum not above zero
    becomes zero, and its winner `off` (NaN stays)."""
    size, v = area.count, acc.dtype
    who = Vector(types.uint8, v.count)
    vectors = acc.count // ROWS

    def one(e: _Emit, values: Sequence[Any], relu_: Any, off_: Any) -> tuple[Any, Any]:
        best = values[0]
        k_best = ir.Constant(ir.VectorType(ir.IntType(8), v.count), None)
        for k, value in enumerate(values[1:], 1):
            larger = _replaces(e, value, best)
            best = e.b.select(larger, value, best)
            k_best = e.b.select(larger, e.splat(ir.Constant(ir.IntType(8), k), v.count), k_best)
        on = e.b.fcmp_unordered(">", best, e.zero(v))
        on = e.b.or_(on, e.splat(e.b.not_(relu_), v.count))
        none = e.splat(e.b.trunc(off_, ir.IntType(8)), v.count)
        return e.b.select(on, best, e.zero(v)), e.b.select(on, k_best, none)

    def body(e: _Emit, ty: Any, args: Any) -> None:
        acc_, _, more_, relu_, off_, a_, at_, table_, i_, end_, winner_ = args
        values = e.items(acc_)
        wanted = e.b.icmp_signed(">", e.array(winner, winner_).nitems, e.number(0))
        for w in range(ROWS // size):
            window = values[w * size * vectors : (w + 1) * size * vectors]
            number = e.b.add(i_, e.number(w))
            with e.b.if_then(e.b.icmp_signed("<", number, end_), likely=True):
                row = e.b.sext(e.b.load(e.at(table, table_, number)), _I64)
                for s in range(vectors):
                    place = at_, row, e.number(s * v.count)
                    values_ = window[s::vectors]
                    if size == 1:
                        old = e.load(v, e.at(a, a_, *place, count=v.count))
                        values_ = [e.b.select(more_, e.b.fadd(values_[0], old), values_[0])]
                    best, k_best = one(e, values_, relu_, off_)
                    e.store(v, best, e.at(a, a_, *place, count=v.count))
                    if size > 1:
                        with e.b.if_then(wanted):
                            e.store(who, k_best, e.at(winner, winner_, *place, count=v.count))

    k = types.intp
    return _emits(types.void(acc, area, more, relu, k, a, k, table, k, k, winner), body)


@intrinsic
def tile_add(typingctx, x, y):
    return _emits(
        x(x, x),
        lambda e, ty, args: e.tuple(
            x, [e.b.fadd(a, b) for a, b in zip(e.items(args[0]), e.items(args[1]))]
        ),
    )


def _as_written(module: ir.Module) -> ir.MDValue:
    """Return loop metadata that keeps LLVM from unrolling: two steps at once spill registers."""
    disable = module.add_metadata([ir.MetaDataString(module, "llvm.loop.unroll.disable")])
    loop = ir.MDValue(module, [], name=str(len(module.metadata)))
    loop.operands = (loop, disable)  # a loop's metadata names itself first
    return loop


def _sum_loop(
    e: _Emit,
    n: Any,
    start: Sequence[Any],
    counters: Sequence[tuple[Any, Any]],
    terms: Callable[..., Sequence[Any]],
) -> list[Any]:
    """Emit ``for j in range(n): sums = terms(sums, j, *counters)`` and return the last sums.

    Sums begin as `start`; counters are pairs of a first value and a step.
    """
    counters = [(e.number(0), e.number(1)), *counters]
    before = e.b.block
    loop, after = e.b.append_basic_block("tile.k"), e.b.append_basic_block("tile.end")
    e.b.cbranch(e.b.icmp_signed(">", n, e.number(0)), loop, after)

    e.b.position_at_end(loop)
    at = [e.b.phi(_I64) for _ in counters]
    sums = [e.b.phi(value.type) for value in start]
    new = terms(sums, *at)
    following = [e.b.add(phi, step) for phi, (_, step) in zip(at, counters)]
    end = e.b.block
    repeat = e.b.cbranch(e.b.icmp_signed("<", following[0], n), loop, after)
    repeat.set_metadata("llvm.loop", _as_written(e.b.module))

    for phi, (first, _), value in zip(at, counters, following):
        phi.add_incoming(first, before)
        phi.add_incoming(value, end)
    e.b.position_at_end(after)
    out = []
    for phi, old, value in zip(sums, start, new):
        phi.add_incoming(old, before)
        phi.add_incoming(value, end)
        result = e.b.phi(value.type)
        result.add_incoming(old, before)
        result.add_incoming(value, end)
        out.append(result)
    return out


def _tile(spread: bool, acc: Any, a: Any, rows: Any, cols: Any, b: Any) -> Any:
    """Emit the loop over k of `outer_tile` (spread) or `lane_tile`."""
    v = acc.dtype
    vectors = acc.count // rows.count

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        acc_, a_, at_, rows_, cols_, k_, n_, b_, bi_, step_ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]

        def terms(sums: Sequence[Any], j: Any, bj: Any) -> list[Any]:
            col = e.b.sext(e.b.load(e.at(cols, cols_, k_, j)), _I64)
            bs = [
                e.load(v, e.at(b, b_, bj, e.number(s * v.count), count=v.count))
                for s in range(vectors)
            ]
            new = []
            for r, row in enumerate(a_rows):
                if spread:
                    scalar = e.b.load(e.at(a, a_, row, col))
                    xs = [e.splat(scalar, v.count)] * vectors
                else:
                    at = [
                        e.at(a, a_, row, col, e.number(s * v.count), count=v.count)
                        for s in range(vectors)
                    ]
                    xs = [e.load(v, pointer) for pointer in at]
                for s in range(vectors):
                    new.append(e.fma(v, xs[s], bs[s], sums[r * vectors + s]))
            return new

        return e.tuple(acc, _sum_loop(e, n_, e.items(acc_), [(bi_, step_)], terms))

    i = types.intp
    return _emits(acc(acc, a, i, rows, cols, i, i, b, i, i), body)


@intrinsic
def outer_tile(typingctx, acc, a, at, rows, cols, k, n, b, bi, step):
    return _tile(True, acc, a, rows, cols, b)


@intrinsic
def lane_tile(typingctx, acc, a, at, rows, cols, k, n, b, bi, step):
    return _tile(False, acc, a, rows, cols, b)


@intrinsic
def list_tile(typingctx, g, i, n, at_of, a, at, rows, v):
    vector = _vector(a)
    acc = types.UniTuple(vector, rows.count * v.count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, at_of_, a_, at_, rows_, _ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]

        def terms(sums: Sequence[Any], j: Any) -> list[Any]:
            scale = e.splat(e.b.load(e.at(g, g_, i_, j)), vector.count)
            of = e.b.sext(e.b.load(e.at(at_of, at_of_, i_, j)), _I64)
            return _add_scaled(e, vector, sums, [(scale, (row, of)) for row in a_rows], a, a_)

        return e.tuple(acc, _sum_loop(e, n_, [e.zero(vector)] * acc.count, [], terms))

    k = types.intp
    return _emits(acc(g, k, k, at_of, a, k, rows, v), body)


@intrinsic
def lists_tile(typingctx, g, i, n, step, at_of, a, at, r, v):
    vector = _vector(a)
    acc = types.UniTuple(vector, r.count * v.count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, step_, at_of_, a_, at_, *_ = args

        def terms(sums: Sequence[Any], j: Any, k: Any) -> list[Any]:
            rows = []
            for row in range(r.count):
                scale = e.splat(e.b.load(e.at(g, g_, k, e.number(row))), vector.count)
                of = e.b.sext(e.b.load(e.at(at_of, at_of_, k, e.number(row))), _I64)
                rows.append((scale, (at_, of)))
            return _add_scaled(e, vector, sums, rows, a, a_)

        start = [e.zero(vector)] * acc.count
        return e.tuple(acc, _sum_loop(e, n_, start, [(i_, step_)], terms))

    k = types.intp
    return _emits(acc(g, k, k, k, at_of, a, k, r, v), body)


def _add_scaled(
    e: _Emit, v: Vector, sums: Sequence[Any], rows: Sequence[Any], a: Any, a_: Any
) -> list[Any]:
    """Return the sums plus, for every row (scale, offsets), scale times its vectors of a."""
    vectors = len(sums) // len(rows)
    new = []
    for r, (scale, at) in enumerate(rows):
        for s in range(vectors):
            x = e.load(v, e.at(a, a_, *at, e.number(s * v.count), count=v.count))
            new.append(e.fma(v, scale, x, sums[r * vectors + s]))
    return new


def _pick(e: _Emit, v: Vector, x: Any, lanes_: Any) -> Any:
    """Return x[lanes_]. LLVM knows what this means: one instruction, where there is one."""
    out = ir.Constant(x.type, ir.Undefined)
    for r in (ir.Constant(_I32, r) for r in range(v.count)):
        number = e.b.extract_element(x, e.b.extract_element(lanes_, r))
        out = e.b.insert_element(out, number, r)
    return out


@intrinsic
def pick_tile(typingctx, g, i, n, step, at_of, a, at, rows, taps, move):
    v = _vector(a)
    lane_numbers = Vector(types.int32, v.count)
    acc = types.UniTuple(v, rows.count * taps.count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, step_, at_of_, a_, at_, rows_, _, move_ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]
        moves = [e.b.mul(e.b.trunc(move_, _I32), ir.Constant(_I32, s)) for s in range(taps.count)]

        def terms(sums: Sequence[Any], j: Any, gj: Any, aj: Any) -> list[Any]:
            scale = e.load(v, e.at(g, g_, gj, count=v.count))
            first = e.load(lane_numbers, e.at(at_of, at_of_, gj, count=v.count))
            picks = [e.b.add(first, e.splat(m, v.count)) for m in moves]
            tables = [e.load(v, e.at(a, a_, row, aj, count=v.count)) for row in a_rows]
            terms_ = ((table, lanes_) for table in tables for lanes_ in picks)
            return [e.fma(v, scale, _pick(e, v, *t), sum_) for t, sum_ in zip(terms_, sums)]

        start = [e.zero(v)] * acc.count
        counters = [(i_, step_), (e.number(0), e.number(v.count))]
        return e.tuple(acc, _sum_loop(e, n_, start, counters, terms))

    k = types.intp
    return _emits(acc(g, k, k, k, at_of, a, k, rows, taps, k), body)


@intrinsic
def dot_tile(typingctx, a, at, rows, b, bt, others, n):
    v = _vector(a)
    acc = types.UniTuple(v, rows.count * others.count)

    def body(e: _Emit, ty: Any, args: Any) -> Any:
        a_, at_, rows_, b_, bt_, others_, n_ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]
        b_rows = [e.sum((bt_, row)) for row in e.items(others_)]

        def terms(sums: Sequence[Any], j: Any, k: Any) -> list[Any]:
            xs = [e.load(v, e.at(a, a_, row, k, count=v.count)) for row in a_rows]
            ws = [e.load(v, e.at(b, b_, row, k, count=v.count)) for row in b_rows]
            pairs = ((x, w) for x in xs for w in ws)
            return [e.fma(v, x, w, total) for (x, w), total in zip(pairs, sums)]

        start = [e.zero(v)] * acc.count
        return e.tuple(acc, _sum_loop(e, n_, start, [(e.number(0), e.number(v.count))], terms))

    k = types.intp
    return _emits(acc(a, k, rows, b, k, others, k), body)


@intrinsic
def horizontal_sums(typingctx, acc):
    v = acc.dtype
    result = types.UniTuple(v.dtype, acc.count)
    return _emits(
        result(acc),
        lambda e, ty, args: e.tuple(result, [_sum_lanes(e, v, x) for x in e.items(args[0])]),
    )
