# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""The updates of the optimisers in Numba: every array is read and written once.

Number by number they do what the functions of `minicnn.optim` do array by array, in the same
order, so that the result is the same to the last bit. Hyper-parameters come as an array of the
parameter's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numba.np.arrayobj import populate_array

from minicnn.backend import Array
from minicnn.ops.jit import Call, kernel
from minicnn.ops.share import take
from minicnn.ops.vector import (
    absolute,
    add,
    broadcast,
    constant,
    div,
    horizontal_sum,
    lane,
    lane_count,
    load,
    maximum,
    mul,
    sqrt,
    store,
    sub,
    where_greater,
    zero,
)

Rows = Sequence[tuple[Any, ...]]  # arrays, or None
Numbers = tuple[tuple[float, ...], tuple[bool, ...]]  # read by a kernel; how it is compiled

# ---------------------------------------------------------------- one vector


@kernel(inline=True)
def _flush(x, tiny):
    return where_greater(tiny, absolute(x), constant(0, x), x)


@kernel(inline=True)
def _sgd_vector(p, g, b, h, decay, momentum, nesterov):
    lr, keep, undamped, rate, look_ahead, tiny = h
    if decay:
        g = add(g, mul(p, rate))
    if not momentum:
        return sub(p, mul(g, lr)), b
    b = _flush(add(mul(b, keep), mul(g, undamped)), tiny)
    if nesterov:
        return sub(sub(p, mul(g, lr)), mul(b, look_ahead)), b
    return sub(p, mul(b, lr)), b


@kernel(inline=True)
def _adam_vector(p, g, m, v, v_max, h, decay, decoupled, amsgrad):
    keep, rate, beta1, rest1, beta2, rest2, root, eps, step, tiny = h
    if decoupled:
        p = mul(p, keep)
    elif decay:
        g = add(g, mul(rate, p))
    m = _flush(add(mul(m, beta1), mul(g, rest1)), tiny)
    v = add(mul(v, beta2), mul(mul(g, g), rest2))
    v_max = maximum(v_max, v) if amsgrad else v
    d = div(m, add(div(sqrt(v_max), root), eps))
    return sub(p, mul(d, step)), m, v, v_max


@kernel(inline=True)
def _rmsprop_vector(p, g, v, m, b, h, decay, centered, momentum):
    lr, alpha, rest, eps, rate, keep, tiny = h
    if decay:
        g = add(g, mul(rate, p))
    v = add(mul(v, alpha), mul(mul(g, g), rest))
    square = v
    if centered:
        m = _flush(add(mul(m, alpha), mul(g, rest)), tiny)
        square = maximum(constant(0, v), sub(v, mul(m, m)))
    d = div(g, add(sqrt(square), eps))
    if momentum:
        d = b = _flush(add(mul(b, keep), d), tiny)
    return sub(p, mul(d, lr)), v, m, b


# ---------------------------------------------------------------- all parameters


# A kernel gets a table of pieces of all parameters: how many numbers, and where in memory those of
# the parameter, of its gradient and of what the optimiser keeps begin; zero for what it does not.
# The loops over vectors end with one over single numbers, for the last of a parameter.

PIECE = 1 << 13  # numbers at most
TINY = 9  # behind the numbers that a rule has beside arrays: the smallest normal number


@intrinsic
def _at(typingctx, address, size, like):
    """Return the array of `size` numbers at an address, of the type of `like`."""

    def codegen(context, builder, signature, args):
        pointer = context.get_data_type(like.dtype).as_pointer()
        width = ir.Constant(ir.IntType(64), like.dtype.bitwidth // 8)
        array = context.make_array(like)(context, builder)
        data = builder.inttoptr(args[0], pointer)
        populate_array(array, data, [args[1]], [width], width, None)
        return array._getvalue()

    return like(types.intp, types.intp, like), codegen


@kernel()
def _sgd_piece(p, g, b, h, decay, nesterov):
    L, momentum = lane_count(p), b.size > 0
    hs = (
        broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
        broadcast(h, TINY),
    )  # fmt: skip
    whole = p.size - p.size % L
    for i in range(0, whole, L):
        buffer = load(b, i) if momentum else zero(p)
        q, c = _sgd_vector(load(p, i), load(g, i), buffer, hs, decay, momentum, nesterov)
        store(p, i, q)
        if momentum:
            store(b, i, c)
    for i in range(whole, p.size):
        buffer = broadcast(b, i) if momentum else zero(p)
        one = broadcast(p, i), broadcast(g, i), buffer
        q, c = _sgd_vector(*one, hs, decay, momentum, nesterov)
        p[i] = lane(q)
        if momentum:
            b[i] = lane(c)


@kernel()
def _adam_piece(p, g, m, v, v_max, h, decay, decoupled):
    L, amsgrad = lane_count(p), v_max.size > 0
    hs = (
        broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
        broadcast(h, 5), broadcast(h, 6), broadcast(h, 7), broadcast(h, 8), broadcast(h, TINY),
    )  # fmt: skip
    whole = p.size - p.size % L
    for i in range(0, whole, L):
        largest = load(v_max, i) if amsgrad else zero(p)
        four = load(p, i), load(g, i), load(m, i), load(v, i)
        q, mean, square, largest = _adam_vector(*four, largest, hs, decay, decoupled, amsgrad)
        store(p, i, q)
        store(m, i, mean)
        store(v, i, square)
        if amsgrad:
            store(v_max, i, largest)
    for i in range(whole, p.size):
        largest = broadcast(v_max, i) if amsgrad else zero(p)
        four = broadcast(p, i), broadcast(g, i), broadcast(m, i), broadcast(v, i)
        q, mean, square, largest = _adam_vector(*four, largest, hs, decay, decoupled, amsgrad)
        p[i], m[i], v[i] = lane(q), lane(mean), lane(square)
        if amsgrad:
            v_max[i] = lane(largest)


@kernel()
def _rmsprop_piece(p, g, v, m, b, h, decay):
    L, centered, momentum = lane_count(p), m.size > 0, b.size > 0
    hs = (
        broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
        broadcast(h, 5), broadcast(h, TINY),
    )  # fmt: skip
    whole = p.size - p.size % L
    for i in range(0, whole, L):
        mean = load(m, i) if centered else zero(p)
        buffer = load(b, i) if momentum else zero(p)
        three = load(p, i), load(g, i), load(v, i)
        q, square, mean, buffer = _rmsprop_vector(
            *three, mean, buffer, hs, decay, centered, momentum
        )
        store(p, i, q)
        store(v, i, square)
        if centered:
            store(m, i, mean)
        if momentum:
            store(b, i, buffer)
    for i in range(whole, p.size):
        mean = broadcast(m, i) if centered else zero(p)
        buffer = broadcast(b, i) if momentum else zero(p)
        three = broadcast(p, i), broadcast(g, i), broadcast(v, i)
        q, square, mean, buffer = _rmsprop_vector(
            *three, mean, buffer, hs, decay, centered, momentum
        )
        p[i], v[i] = lane(q), lane(square)
        if centered:
            m[i] = lane(mean)
        if momentum:
            b[i] = lane(buffer)


@kernel()
def _finite_piece(g):
    L, total = lane_count(g), zero(g)
    whole = g.size - g.size % L
    for k in range(0, whole, L):
        v = load(g, k)
        total = add(total, sub(v, v))  # NaN where v is not finite
    sum_ = horizontal_sum(total)
    for k in range(whole, g.size):
        sum_ += g[k] - g[k]
    return sum_ == 0  # NaN differs from all numbers


@kernel(inline=True)
def _row(pieces, i, like):
    """Return the arrays of one piece; one that is not kept has no numbers."""
    n = pieces[i, 0]
    b, c = pieces[i, 3], pieces[i, 4]
    d = pieces[i, 5]
    return (
        _at(pieces[i, 1], n, like), _at(pieces[i, 2], n, like), _at(b, n if b else 0, like),
        _at(c, n if c else 0, like), _at(d, n if d else 0, like),
    )  # fmt: skip


# Who is free takes the next piece, but each begins with those that it had the last time, which may
# still be in the cache of its core: `owner` tells.


@kernel(inline=True)
def _is_mine(i, turn, t, owner, taken):
    """Tell whether thread `t` takes piece `i`: in turn 0 of its own, in turn 1 what is left."""
    mine = (owner[i] == t) == (turn == 0) and take(taken, i) == 0
    if mine:
        owner[i] = t
    return mine


@kernel(parallel=True)
def _sgd(pieces, h, decay, nesterov, owner, taken, threads):
    taken[:] = 0
    for t in numba.prange(threads):
        for turn in range(2):
            for i in range(len(pieces)):
                if _is_mine(i, turn, t, owner, taken):
                    p, g, b, _m, _n = _row(pieces, i, h)
                    _sgd_piece(p, g, b, h, decay, nesterov)


@kernel(parallel=True)
def _adam(pieces, h, decay, decoupled, owner, taken, threads):
    taken[:] = 0
    for t in numba.prange(threads):
        for turn in range(2):
            for i in range(len(pieces)):
                if _is_mine(i, turn, t, owner, taken):
                    p, g, m, v, v_max = _row(pieces, i, h)
                    _adam_piece(p, g, m, v, v_max, h, decay, decoupled)


@kernel(parallel=True)
def _rmsprop(pieces, h, decay, owner, taken, threads):
    taken[:] = 0
    for t in numba.prange(threads):
        for turn in range(2):
            for i in range(len(pieces)):
                if _is_mine(i, turn, t, owner, taken):
                    p, g, v, m, b = _row(pieces, i, h)
                    _rmsprop_piece(p, g, v, m, b, h, decay)


@kernel(parallel=True)
def _finite(pieces, h, owner, taken, threads):
    """Tell whether all gradients are finite."""
    taken[:] = 0
    for t in numba.prange(threads):
        for turn in range(2):
            for i in range(len(pieces)):
                if _is_mine(i, turn, t, owner, taken):
                    g = _at(pieces[i, 2], pieces[i, 0], h)
                    if not _finite_piece(g):
                        take(taken, len(pieces))
    return taken[len(pieces)] == 0


def _pieces(rows: Rows) -> np.ndarray:
    """Return the table: of each piece its size and the addresses of up to five arrays."""
    lines = []
    for row in rows:
        size, step = row[0].size, row[0].itemsize
        starts = [0 if a is None else a.__array_interface__["data"][0] for a in row]
        starts += [0] * (5 - len(starts))
        for k in range(0, size, PIECE):
            lines.append([min(PIECE, size - k), *(start and start + k * step for start in starts)])
    return np.array(lines, np.int64).reshape(-1, 6)


def _in_order(arrays: Iterable[Array | None]) -> bool:
    """Tell whether these are NumPy arrays of one dtype and in C order, or None."""
    there = [a for a in arrays if a is not None]
    return all(
        isinstance(a, np.ndarray) and a.dtype == there[0].dtype and a.flags.c_contiguous
        for a in there
    )


# ---------------------------------------------------------------- called from minicnn.optim


class Together:
    """The step of an optimiser for many parameters, by one kernel for those of one dtype.

    Parameters
    ----------
    rule : str
        A key of RULES.
    arrays : sequence of array
        All parameters and gradients, for the caller to compare: it is to make another object when
        one of them is replaced.
    rows : sequence of (array or None, ...)
        For each parameter: itself, its gradient, and what the optimiser keeps for it.

    Attributes
    ----------
    left : list of int
        The numbers of the rows that the kernel does not take: it wants C order.
    """

    def __init__(self, rule: str, arrays: Sequence[Array], rows: Rows) -> None:
        self.arrays = arrays
        self.left = [i for i, row in enumerate(rows) if not _in_order(row)]
        taken = [row for i, row in enumerate(rows) if i not in self.left]
        self._kernel, self._numbers = RULES[rule]
        self._flags: tuple[bool, ...] = ()
        self._parts = [_Part(list(rows)) for _, rows in groupby(taken, lambda row: row[0].dtype)]

    def finite(self) -> bool:
        """Tell whether all gradients of the rows taken are finite."""
        return all(part.finite() for part in self._parts)

    def __call__(self, **options: Any) -> None:
        """Change parameters and state in place, by the options of the rule in `minicnn.optim`."""
        numbers, flags = self._numbers(**options)
        for part in self._parts:
            if flags != self._flags:
                part.prepare(self._kernel, flags)
            part.h[: len(numbers)] = numbers
            part.update()
        self._flags = flags


class _Part:
    """Rows of arrays of one dtype."""

    update: Call

    def __init__(self, rows: Rows) -> None:
        self._rows = rows  # kept alive, so that no other arrays come to their addresses
        self._pieces = _pieces(rows)
        pieces = len(self._pieces)
        self.h = np.zeros(TINY + 1, rows[0][0].dtype)
        self.h[TINY] = np.finfo(self.h.dtype).tiny
        threads = max(1, min(numba.get_num_threads(), pieces))
        owner = np.arange(pieces) * threads // max(1, pieces)
        taken = np.zeros(pieces + 1, np.int64)  # the last counts pieces that are not finite
        self._rest = owner, taken, threads
        self.finite = Call(_finite, (self._pieces, self.h, *self._rest))

    def prepare(self, kernel: Any, flags: tuple[bool, ...]) -> None:
        """Let `update` be a kernel with these flags."""
        self.update = Call(kernel, (self._pieces, self.h, *flags, *self._rest))


def _sgd_numbers(
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool
) -> Numbers:
    h = lr, momentum, 1 - dampening, weight_decay, lr * momentum
    return h, (weight_decay != 0, bool(nesterov))


def _adam_numbers(
    lr: float, betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, n: int
) -> Numbers:
    beta1, beta2 = betas
    h = (
        1 - lr * weight_decay,
        weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        math.sqrt(1 - beta2**n),
        eps,
        lr / (1 - beta1**n),
    )
    return h, (weight_decay != 0, decoupled)


def _rmsprop_numbers(
    lr: float, alpha: float, eps: float, weight_decay: float, momentum: float
) -> Numbers:
    return (lr, alpha, 1 - alpha, eps, weight_decay, momentum), (weight_decay != 0,)


# For each rule of `minicnn.optim`: the kernel, and what it reads and how it is compiled.
RULES: dict[str, tuple[Any, Callable[..., Numbers]]] = {
    "sgd_update": (_sgd, _sgd_numbers),
    "adam_update": (_adam, _adam_numbers),
    "rmsprop_update": (_rmsprop, _rmsprop_numbers),
}
