# mypy: disallow-untyped-defs=False
# (intrinsics get their types from Numba)
"""Tuples of offsets and of vectors: see `minicnn.ops.vector`, which says what each does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minicnn.ops.vector_emit import (
    I32,
    I64,
    ROWS,
    Emit,
    Vector,
    emits,
    lane_mask,
    vector_of,
)
from minicnn.ops.vector_lanes import replaces, sum_lanes

# ---------------------------------------------------------------- tuples of offsets


def _count(n: Any) -> int:
    """Return the number that `n` stands for: a literal, or a tuple of that length."""
    return len(n) if isinstance(n, types.BaseTuple) else n.literal_value


@intrinsic(prefer_literal=True)
def offsets(typingctx, table, i, last, n):
    count = _count(n)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        table_, i_, last_, _ = args
        rows = []
        for r in range(count):
            k = e.b.add(i_, e.number(r))
            k = e.b.select(e.b.icmp_signed("<", k, last_), k, last_)
            rows.append(e.b.sext(e.b.load(e.at(table, table_, k)), I64))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, count)
    return emits(result(table, types.intp, types.intp, n), body)


@intrinsic(prefer_literal=True)
def multiples(typingctx, i, last, step, n):
    count = _count(n)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        i_, last_, step_, _ = args
        rows = []
        for r in range(count):
            k = e.b.add(i_, e.number(r))
            k = e.b.select(e.b.icmp_signed("<", k, last_), k, last_)
            rows.append(e.b.mul(k, step_))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, count)
    return emits(result(types.intp, types.intp, types.intp, n), body)


@intrinsic
def lane_offsets(typingctx, table, i, a):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        at = [e.at(table, args[0], args[1], e.number(r)) for r in range(result.count)]
        return e.tuple(result, [e.b.sext(e.b.load(p), I64) for p in at])

    result = types.UniTuple(types.intp, vector_of(a).count)
    return emits(result(table, types.intp, a), body)


@intrinsic
def scaled(typingctx, rows, step):
    return emits(
        rows(rows, types.intp),
        lambda e, ty, args: e.tuple(rows, [e.b.mul(row, args[1]) for row in e.items(args[0])]),
    )


@intrinsic
def lane_multiples(typingctx, n, step, beyond, a):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        n_, step_, beyond_, _ = args
        rows = []
        for r in map(e.number, range(result.count)):
            inside = e.b.icmp_signed("<", r, n_)
            rows.append(e.b.select(inside, e.b.mul(r, step_), beyond_))
        return e.tuple(result, rows)

    result = types.UniTuple(types.intp, vector_of(a).count)
    return emits(result(types.intp, types.intp, types.intp, a), body)


# ---------------------------------------------------------------- tuples of vectors


@intrinsic(prefer_literal=True)
def zeros(typingctx, a, n):
    v = vector_of(a)
    result = types.UniTuple(v, _count(n))
    return emits(result(a, n), lambda e, ty, args: e.tuple(result, [e.zero(v)] * result.count))


@intrinsic
def load_rows(typingctx, a, at, rows):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        a_, at_, rows_ = args
        return e.tuple(
            result, [e.load(v, e.at(a, a_, at_, r, count=v.count)) for r in e.items(rows_)]
        )

    v = vector_of(a)
    result = types.UniTuple(v, rows.count)
    return emits(result(a, types.intp, rows), body)


@intrinsic
def store_rows(typingctx, a, at, rows, vs):
    def body(e: Emit, ty: Any, args: Any) -> None:
        a_, at_, rows_, vs_ = args
        for row, value in zip(e.items(rows_), e.items(vs_)):
            with e.b.if_then(e.b.icmp_signed(">=", row, e.number(0)), likely=True):
                e.store(v, value, e.at(a, a_, at_, row, count=v.count))

    v = vs.dtype
    return emits(types.void(a, types.intp, rows, vs), body)


@intrinsic
def transpose(typingctx, vs):
    """Swap blocks of 1, 2, 4, ... lanes between pairs of vectors as far apart."""

    def body(e: Emit, ty: Any, args: Any) -> Any:
        vs_, L = e.items(args[0]), vs.count
        for d in (1 << s for s in range(L.bit_length() - 1)):
            # Lanes of x followed by y: x keeps its even blocks and takes y's, and the reverse.
            low = [i if not i & d else i - d + L for i in range(L)]
            high = [i + d if not i & d else i + L for i in range(L)]
            swapped = list(vs_)
            for r in (r for r in range(L) if not r & d):
                x, y = vs_[r], vs_[r + d]
                swapped[r] = e.b.shuffle_vector(x, y, lane_mask(low))
                swapped[r + d] = e.b.shuffle_vector(x, y, lane_mask(high))
            vs_ = swapped
        return e.tuple(vs, vs_)

    return emits(vs(vs), body)


@intrinsic
def widen(typingctx, vs, a):
    result = types.UniTuple(Vector(a.dtype, vs.dtype.count), vs.count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        if a.dtype == vs.dtype.dtype:
            return args[0]
        wide = e.context.get_value_type(result.dtype)
        return e.tuple(result, [e.b.sext(v, wide) for v in e.items(args[0])])

    return emits(result(vs, a), body)


# ---------------------------------------------------------------- register blocks


def _tile_pointers(e: Emit, a: Any, args: Sequence[Any], vectors: int, count: int) -> list[Any]:
    """Return where each vector of a tile lies: row after row, `vectors` in each."""
    a_, at_, rows_ = args
    return [
        e.at(a, a_, at_, row, e.number(v * count), count=count)
        for row in e.items(rows_)
        for v in range(vectors)
    ]


@intrinsic
def tile_load(typingctx, acc, a, at, rows):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        pointers = _tile_pointers(e, a, args[1:], acc.count // rows.count, v.count)
        return e.tuple(acc, [e.load(v, p) for p in pointers])

    v = acc.dtype
    return emits(acc(acc, a, types.intp, rows), body)


@intrinsic
def tile_store(typingctx, acc, a, at, rows):
    def body(e: Emit, ty: Any, args: Any) -> None:
        pointers = _tile_pointers(e, a, args[1:], acc.count // rows.count, v.count)
        for pointer, value in zip(pointers, e.items(args[0])):
            e.store(v, value, pointer)

    v = acc.dtype
    return emits(types.void(acc, a, types.intp, rows), body)


@intrinsic(prefer_literal=True)
def tile_repeat(typingctx, acc, a, at, n):
    def body(e: Emit, ty: Any, args: Any) -> Any:
        steps = range(acc.count // n.literal_value)
        at_ = [e.at(a, args[1], args[2], e.number(s * v.count), count=v.count) for s in steps]
        return e.tuple(acc, [e.load(v, p) for p in at_] * n.literal_value)

    v = acc.dtype
    return emits(acc(acc, a, types.intp, n), body)


@intrinsic
def tile_pool(typingctx, acc, area, more, relu, off, a, at, table, i, end, winner):
    """With `more`, windows of one row add to what is there. With `relu`, a maximum not above zero
    becomes zero, and its winner `off` (NaN stays)."""
    size, v = area.count, acc.dtype
    who = Vector(types.uint8, v.count)
    vectors = acc.count // ROWS

    def one(e: Emit, values: Sequence[Any], relu_: Any, off_: Any) -> tuple[Any, Any]:
        best = values[0]
        k_best = ir.Constant(ir.VectorType(ir.IntType(8), v.count), None)
        for k, value in enumerate(values[1:], 1):
            larger = replaces(e, value, best)
            best = e.b.select(larger, value, best)
            k_best = e.b.select(larger, e.splat(ir.Constant(ir.IntType(8), k), v.count), k_best)
        on = e.b.fcmp_unordered(">", best, e.zero(v))
        on = e.b.or_(on, e.splat(e.b.not_(relu_), v.count))
        none = e.splat(e.b.trunc(off_, ir.IntType(8)), v.count)
        return e.b.select(on, best, e.zero(v)), e.b.select(on, k_best, none)

    def body(e: Emit, ty: Any, args: Any) -> None:
        acc_, _, more_, relu_, off_, a_, at_, table_, i_, end_, winner_ = args
        values = e.items(acc_)
        wanted = e.b.icmp_signed(">", e.array(winner, winner_).nitems, e.number(0))
        for w in range(ROWS // size):
            window = values[w * size * vectors : (w + 1) * size * vectors]
            number = e.b.add(i_, e.number(w))
            with e.b.if_then(e.b.icmp_signed("<", number, end_), likely=True):
                row = e.b.sext(e.b.load(e.at(table, table_, number)), I64)
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
    return emits(types.void(acc, area, more, relu, k, a, k, table, k, k, winner), body)


@intrinsic
def tile_add(typingctx, x, y):
    return emits(
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
    e: Emit,
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
    at = [e.b.phi(I64) for _ in counters]
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

    def body(e: Emit, ty: Any, args: Any) -> Any:
        acc_, a_, at_, rows_, cols_, k_, n_, b_, bi_, step_ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]

        def terms(sums: Sequence[Any], j: Any, bj: Any) -> list[Any]:
            col = e.b.sext(e.b.load(e.at(cols, cols_, k_, j)), I64)
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
    return emits(acc(acc, a, i, rows, cols, i, i, b, i, i), body)


@intrinsic
def outer_tile(typingctx, acc, a, at, rows, cols, k, n, b, bi, step):
    return _tile(True, acc, a, rows, cols, b)


@intrinsic
def lane_tile(typingctx, acc, a, at, rows, cols, k, n, b, bi, step):
    return _tile(False, acc, a, rows, cols, b)


@intrinsic
def list_tile(typingctx, g, i, n, at_of, a, at, rows, v):
    vector = vector_of(a)
    acc = types.UniTuple(vector, rows.count * v.count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, at_of_, a_, at_, rows_, _ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]

        def terms(sums: Sequence[Any], j: Any) -> list[Any]:
            scale = e.splat(e.b.load(e.at(g, g_, i_, j)), vector.count)
            of = e.b.sext(e.b.load(e.at(at_of, at_of_, i_, j)), I64)
            return _add_scaled(e, vector, sums, [(scale, (row, of)) for row in a_rows], a, a_)

        return e.tuple(acc, _sum_loop(e, n_, [e.zero(vector)] * acc.count, [], terms))

    k = types.intp
    return emits(acc(g, k, k, at_of, a, k, rows, v), body)


@intrinsic
def lists_tile(typingctx, g, i, n, step, at_of, a, at, r, v):
    vector = vector_of(a)
    acc = types.UniTuple(vector, r.count * v.count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, step_, at_of_, a_, at_, *_ = args

        def terms(sums: Sequence[Any], j: Any, k: Any) -> list[Any]:
            rows = []
            for row in range(r.count):
                scale = e.splat(e.b.load(e.at(g, g_, k, e.number(row))), vector.count)
                of = e.b.sext(e.b.load(e.at(at_of, at_of_, k, e.number(row))), I64)
                rows.append((scale, (at_, of)))
            return _add_scaled(e, vector, sums, rows, a, a_)

        start = [e.zero(vector)] * acc.count
        return e.tuple(acc, _sum_loop(e, n_, start, [(i_, step_)], terms))

    k = types.intp
    return emits(acc(g, k, k, k, at_of, a, k, r, v), body)


def _add_scaled(
    e: Emit, v: Vector, sums: Sequence[Any], rows: Sequence[Any], a: Any, a_: Any
) -> list[Any]:
    """Return the sums plus, for every row (scale, offsets), scale times its vectors of a."""
    vectors = len(sums) // len(rows)
    new = []
    for r, (scale, at) in enumerate(rows):
        for s in range(vectors):
            x = e.load(v, e.at(a, a_, *at, e.number(s * v.count), count=v.count))
            new.append(e.fma(v, scale, x, sums[r * vectors + s]))
    return new


def _pick(e: Emit, v: Vector, x: Any, lanes_: Any) -> Any:
    """Return x[lanes_]. LLVM knows what this means: one instruction, where there is one."""
    out = ir.Constant(x.type, ir.Undefined)
    for r in (ir.Constant(I32, r) for r in range(v.count)):
        number = e.b.extract_element(x, e.b.extract_element(lanes_, r))
        out = e.b.insert_element(out, number, r)
    return out


@intrinsic
def pick_tile(typingctx, g, i, n, step, at_of, a, at, rows, taps, move):
    v = vector_of(a)
    lane_numbers = Vector(types.int32, v.count)
    acc = types.UniTuple(v, rows.count * taps.count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
        g_, i_, n_, step_, at_of_, a_, at_, rows_, _, move_ = args
        a_rows = [e.sum((at_, row)) for row in e.items(rows_)]
        moves = [e.b.mul(e.b.trunc(move_, I32), ir.Constant(I32, s)) for s in range(taps.count)]

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
    return emits(acc(g, k, k, k, at_of, a, k, rows, taps, k), body)


@intrinsic
def dot_tile(typingctx, a, at, rows, b, bt, others, n):
    v = vector_of(a)
    acc = types.UniTuple(v, rows.count * others.count)

    def body(e: Emit, ty: Any, args: Any) -> Any:
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
    return emits(acc(a, k, rows, b, k, others, k), body)


@intrinsic
def horizontal_sums(typingctx, acc):
    v = acc.dtype
    result = types.UniTuple(v.dtype, acc.count)
    return emits(
        result(acc),
        lambda e, ty, args: e.tuple(result, [sum_lanes(e, v, x) for x in e.items(args[0])]),
    )
