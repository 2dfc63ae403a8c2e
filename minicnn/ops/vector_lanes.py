# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""One vector at a time: see `minicnn.ops.vector`, which says what each function does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minicnn.ops.vector_emit import (
    I32,
    I64,
    VECTOR_BYTES,
    Emit,
    Vector,
    emits,
    lane_mask,
    vector_of,
)

# ---------------------------------------------------------------- one vector


@intrinsic
def load(typingctx, a, i):
    v = vector_of(a)
    return emits(
        v(a, types.intp),
        lambda e, ty, args: e.load(v, e.at(a, args[0], args[1], count=v.count)),
    )


@intrinsic
def store(typingctx, a, i, v):
    # v may be narrower than VECTOR_BYTES: the winners of take_larger are bytes, one a lane.
    return emits(
        types.void(a, types.intp, v),
        lambda e, ty, args: e.store(v, args[2], e.at(a, args[0], args[1], count=v.count)),
    )


@intrinsic
def lane_count(typingctx, a):
    return emits(types.intp(a), lambda e, ty, args: e.number(vector_of(a).count))


@intrinsic
def broadcast(typingctx, a, i):
    v = vector_of(a)
    return emits(
        v(a, types.intp),
        lambda e, ty, args: e.splat(e.b.load(e.at(a, args[0], args[1])), v.count),
    )


@intrinsic
def splat(typingctx, s):
    v = Vector(s, 8 * VECTOR_BYTES // s.bitwidth)
    return emits(v(s), lambda e, ty, args: e.splat(args[0], v.count))


@intrinsic
def constant(typingctx, s, v):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        return e.splat(e.context.cast(e.b, args[0], s, v.dtype), v.count)

    return emits(v(s, v), body)


@intrinsic
def lane(typingctx, v):
    """Return the number in the first lane."""
    return emits(v.dtype(v), lambda e, ty, args: e.b.extract_element(args[0], ir.Constant(I32, 0)))


@intrinsic
def zero(typingctx, a):
    v = vector_of(a)
    return emits(v(a), lambda e, ty, args: e.zero(v))


@intrinsic
def add(typingctx, x, y):
    return emits(x(x, x), lambda e, ty, args: e.b.fadd(*args))


@intrinsic
def sub(typingctx, x, y):
    return emits(x(x, x), lambda e, ty, args: e.b.fsub(*args))


@intrinsic
def mul(typingctx, x, y):
    return emits(x(x, x), lambda e, ty, args: e.b.fmul(*args))


@intrinsic
def div(typingctx, x, y):
    return emits(x(x, x), lambda e, ty, args: e.b.fdiv(*args))


@intrinsic
def fma(typingctx, x, y, z):
    return emits(x(x, x, x), lambda e, ty, args: e.fma(x, *args))


def _larger(e: Emit, x: Any, y: Any) -> Any:
    """Lanes in which y takes x's place: y is larger, or is NaN."""
    return e.b.or_(e.b.fcmp_ordered(">", y, x), e.b.fcmp_unordered("uno", y, y))


@intrinsic
def maximum(typingctx, x, y):
    return emits(x(x, x), lambda e, ty, args: e.b.select(_larger(e, *args), args[1], args[0]))


@intrinsic
def winner_of(typingctx, k, a):
    """Winner k in every lane of a vector of a's type."""
    winner = Vector(types.uint8, vector_of(a).count)
    return emits(
        winner(types.intp, a),
        lambda e, ty, args: e.splat(e.b.trunc(args[0], ir.IntType(8)), winner.count),
    )


def replaces(e: Emit, v: Any, best: Any) -> Any:
    """Lanes in which v is larger, or NaN; a NaN that is already there keeps its place."""
    return e.b.and_(e.b.fcmp_unordered(">", v, best), e.b.fcmp_ordered("ord", best, best))


@intrinsic
def take_larger(typingctx, best, winner, v, k):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        best_, winner_, v_, k_ = args
        larger = replaces(e, v_, best_)
        new = e.splat(e.context.cast(e.b, k_, types.intp, winner.dtype), winner.count)
        return e.tuple(result, [e.b.select(larger, v_, best_), e.b.select(larger, new, winner_)])

    result = types.Tuple((best, winner))
    return emits(result(best, winner, best, types.intp), body)


def sum_lanes(e: Emit, v: Vector, value: Any) -> Any:
    scalar = value.type.element
    function = ir.FunctionType(scalar, [scalar, value.type])
    name = f"llvm.vector.reduce.fadd.v{v.count}f{v.dtype.bitwidth}"
    reduce = cgutils.get_or_insert_function(e.b.module, function, name)
    # reassoc alone: the lanes are added pairwise, and NaN and infinities still count.
    return e.b.call(reduce, [ir.Constant(scalar, -0.0), value], fastmath=("reassoc",))


@intrinsic
def relu_winner(typingctx, best, winner, off):
    """ReLU of a maximum, and its winner, or `off` where it is not above zero (NaN stays)."""

    def body(e: Emit, ty: Any, args: Any) -> Any:
        best_, winner_, off_ = args
        on = e.b.fcmp_unordered(">", best_, e.zero(best))
        none = e.splat(e.b.trunc(off_, ir.IntType(8)), winner.count)
        return e.tuple(result, [e.b.select(on, best_, e.zero(best)), e.b.select(on, winner_, none)])

    result = types.Tuple((best, winner))
    return emits(result(best, winner, types.intp), body)


@intrinsic
def load_winner(typingctx, winner, i, a):
    """Load the winners that were stored for a vector of a's type."""
    ty = Vector(types.uint8, vector_of(a).count)
    return emits(
        ty(winner, types.intp, a),
        lambda e, _, args: e.load(ty, e.at(winner, args[0], args[1], count=ty.count)),
    )


@intrinsic
def where_winner(typingctx, winner, k, v):
    """Keep v in the lanes whose winner is k; zero in the others."""

    def body(e: Emit, ty: Any, args: Any) -> Any:
        winner_, k_, v_ = args
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(k_, ir.IntType(8)), winner.count))
        return e.b.select(same, v_, e.zero(v))

    return emits(v(winner, types.intp, v), body)


@intrinsic
def winner_bits(typingctx, winner, i, k, a):
    ty = Vector(types.uint8, vector_of(a).count)

    def body(e: Emit, _: Any, args: Any) -> Any:
        who = e.load(ty, e.at(winner, args[0], args[1], count=ty.count))
        same = e.b.icmp_unsigned("==", who, e.splat(e.b.trunc(args[2], ir.IntType(8)), ty.count))
        return e.b.zext(e.b.bitcast(same, ir.IntType(ty.count)), I64)

    return emits(types.int64(winner, types.intp, types.intp, a), body)


@intrinsic
def first_bit(typingctx, bits):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        function = ir.FunctionType(I64, [I64, ir.IntType(1)])
        count = cgutils.get_or_insert_function(e.b.module, function, "llvm.cttz.i64")
        return e.b.call(count, [args[0], ir.Constant(ir.IntType(1), 1)])

    return emits(types.int64(types.int64), body)


@intrinsic
def unless_winner(typingctx, winner, k, v):
    """Keep v in the lanes whose winner is not k; zero in the others."""

    def body(e: Emit, ty: Any, args: Any) -> Any:
        winner_, k_, v_ = args
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(k_, ir.IntType(8)), winner.count))
        return e.b.select(same, e.zero(v), v_)

    return emits(v(winner, types.intp, v), body)


@intrinsic
def place_winners(typingctx, winner, off, base, columns, step, skip):
    """Return ``base + k * step + k // columns * skip`` as int32 for winner k, and base for `off`.

    k and columns are less than 256.
    """
    count = winner.count
    result = Vector(types.int32, count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        wide = ir.VectorType(I32, count)
        winner_, off_, *numbers = args
        base_, columns_, step_, skip_ = (e.b.trunc(n, I32) for n in numbers)
        same = e.b.icmp_unsigned("==", winner_, e.splat(e.b.trunc(off_, ir.IntType(8)), count))
        k = e.b.zext(e.b.select(same, ir.Constant(winner_.type, None), winner_), wide)
        # k // columns without a division, exact for numbers below 256.
        inverse = e.b.add(e.b.udiv(ir.Constant(I32, 1 << 16), columns_), ir.Constant(I32, 1))
        row = e.b.lshr(e.b.mul(k, e.splat(inverse, count)), ir.Constant(wide, [16] * count))
        at = e.b.add(e.b.mul(k, e.splat(step_, count)), e.b.mul(row, e.splat(skip_, count)))
        return e.b.add(at, e.splat(base_, count))

    i = types.intp
    return emits(result(winner, i, i, i, i, i), body)


@intrinsic
def where_positive(typingctx, x, v):
    """Keep v in the lanes where x > 0; zero in the others, where x is NaN too."""
    return emits(
        x(x, x),
        lambda e, ty, args: e.b.select(
            e.b.fcmp_ordered(">", args[0], e.zero(x)), args[1], e.zero(x)
        ),
    )


@intrinsic
def horizontal_sum(typingctx, v):
    return emits(v.dtype(v), lambda e, ty, args: sum_lanes(e, v, args[0]))


@intrinsic
def horizontal_max(typingctx, v):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        (value,), L = args, v.count
        for d in (1 << s for s in range(L.bit_length() - 1)):
            other = e.b.shuffle_vector(value, value, lane_mask([(i + d) % L for i in range(L)]))
            value = e.b.select(_larger(e, value, other), other, value)
        return e.b.extract_element(value, ir.Constant(I32, 0))

    return emits(v.dtype(v), body)


# ---------------------------------------------------------------- part of a vector, and shuffles


def _first_lanes(e: Emit, v: Vector, n: Any) -> Any:
    """Return the mask of the lanes below n."""
    # Integers as wide as a lane: the comparison is one instruction then.
    width = ir.IntType(v.dtype.bitwidth)
    if v.dtype.bitwidth < 64:
        n = e.b.select(e.b.icmp_signed("<", n, e.number(v.count)), n, e.number(v.count))
        n = e.b.trunc(n, width)
    number = ir.Constant(ir.VectorType(width, v.count), list(range(v.count)))
    return e.b.icmp_signed("<", number, e.splat(n, v.count))


def _part(e: Emit, v: Vector, a: Any, a_: Any, i: Any, n: Any) -> Any:
    """Return a pointer to a[i : i + n] as a vector."""
    e.check(e.array(a, a_), (i,), n)
    pointer = e.at(a, a_, i, count=0)
    return e.b.bitcast(pointer, e.context.get_value_type(v).as_pointer())


@intrinsic
def load_part(typingctx, a, i, n, v):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        a_, i_, n_, other = args
        pointer, mask = _part(e, v, a, a_, i_, n_), _first_lanes(e, v, n_)
        function = ir.FunctionType(other.type, [pointer.type, I32, mask.type, other.type])
        name = f"llvm.masked.load.v{v.count}f{v.dtype.bitwidth}.p0"
        load = cgutils.get_or_insert_function(e.b.module, function, name)
        align = ir.Constant(I32, v.dtype.bitwidth // 8)
        return e.b.call(load, [pointer, align, mask, other])

    return emits(v(a, types.intp, types.intp, v), body)


@intrinsic
def store_part(typingctx, a, i, n, v):
    def body(e: Emit, ty: Any, args: Any) -> None:
        a_, i_, n_, value = args
        pointer, mask = _part(e, v, a, a_, i_, n_), _first_lanes(e, v, n_)
        types_ = [value.type, pointer.type, I32, mask.type]
        function = ir.FunctionType(ir.VoidType(), types_)
        name = f"llvm.masked.store.v{v.count}f{v.dtype.bitwidth}.p0"
        store = cgutils.get_or_insert_function(e.b.module, function, name)
        align = ir.Constant(I32, v.dtype.bitwidth // 8)
        e.b.call(store, [value, pointer, align, mask])

    return emits(types.void(a, types.intp, types.intp, v), body)


@intrinsic
def to_boundary(typingctx, a, i):
    v = vector_of(a)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        address = e.b.ptrtoint(e.at(a, *args, count=0), I64)
        beyond = e.b.and_(address, e.number(VECTOR_BYTES - 1))
        numbers = e.b.udiv(beyond, e.number(VECTOR_BYTES // v.count))
        return e.b.sub(e.number(v.count), numbers)

    return emits(types.intp(a, types.intp), body)


def _two_of(v: Vector, low: Sequence[int], high: Sequence[int]) -> Any:
    """Emit a pair of vectors, each of these lanes of x followed by y."""
    result = types.UniTuple(v, 2)
    return emits(
        result(v, v),
        lambda e, ty, args: e.tuple(
            result, [e.b.shuffle_vector(*args, lane_mask(lanes_)) for lanes_ in (low, high)]
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
