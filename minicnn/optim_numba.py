# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""The updates of the optimisers in Numba: every array is read and written once.

Number by number they do what the functions of `minicnn.optim` do array by array, in the same
order, so that the result is the same to the last bit. Hyper-parameters come as an array of the
parameter's dtype.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import flat, kernel
from minicnn.ops.vector import (
    add,
    broadcast,
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
    zero,
)

CHUNK = 1 << 13  # numbers: a piece of work; smaller parameters are not worth a second thread


# ---------------------------------------------------------------- one vector


# These take vectors and no arrays: an array that is handed on is counted, by both threads in one
# place, which would take longer than the update.


@kernel(inline=True)
def _sgd_vector(p, g, b, h, decay, momentum, nesterov):
    lr, keep, undamped, rate, look_ahead = h
    if decay:
        g = add(g, mul(p, rate))
    if not momentum:
        return sub(p, mul(g, lr)), b
    b = add(mul(b, keep), mul(g, undamped))
    if nesterov:
        return sub(sub(p, mul(g, lr)), mul(b, look_ahead)), b
    return sub(p, mul(b, lr)), b


@kernel(inline=True)
def _adam_vector(p, g, m, v, v_max, h, decay, decoupled, amsgrad):
    keep, rate, beta1, rest1, beta2, rest2, root, eps, step = h
    if decoupled:
        p = mul(p, keep)
    elif decay:
        g = add(g, mul(rate, p))
    m = add(mul(m, beta1), mul(g, rest1))
    v = add(mul(v, beta2), mul(mul(g, g), rest2))
    v_max = maximum(v_max, v) if amsgrad else v
    d = div(m, add(div(sqrt(v_max), root), eps))
    return sub(p, mul(d, step)), m, v, v_max


@kernel(inline=True)
def _rmsprop_vector(p, g, v, m, b, h, decay, centered, momentum):
    lr, alpha, rest, eps, rate, keep, nothing = h
    if decay:
        g = add(g, mul(rate, p))
    v = add(mul(v, alpha), mul(mul(g, g), rest))
    square = v
    if centered:
        m = add(mul(m, alpha), mul(g, rest))
        square = maximum(nothing, sub(v, mul(m, m)))
    d = div(g, add(sqrt(square), eps))
    if momentum:
        d = b = add(mul(b, keep), d)
    return sub(p, mul(d, lr)), v, m, b


# ---------------------------------------------------------------- whole parameters


# What an optimiser does not keep comes as an empty array; the loops over vectors end with one over
# single numbers, for the last of a parameter.


@kernel(parallel=True)
def _sgd(p, g, b, h, decay, nesterov):
    L, momentum = lane_count(p), b.size > 0
    for k in numba.prange(p.size // CHUNK + 1):
        hs = (
            broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
        )  # fmt: skip
        end = min(p.size, (k + 1) * CHUNK)
        for i in range(k * CHUNK, end - L + 1, L):
            buffer = load(b, i) if momentum else zero(p)
            q, c = _sgd_vector(load(p, i), load(g, i), buffer, hs, decay, momentum, nesterov)
            store(p, i, q)
            if momentum:
                store(b, i, c)
        for i in range(end - end % L, end):
            buffer = broadcast(b, i) if momentum else zero(p)
            one = broadcast(p, i), broadcast(g, i), buffer
            q, c = _sgd_vector(*one, hs, decay, momentum, nesterov)
            p[i] = lane(q)
            if momentum:
                b[i] = lane(c)


@kernel(parallel=True)
def _adam(p, g, m, v, v_max, h, decay, decoupled):
    L, amsgrad = lane_count(p), v_max.size > 0
    for k in numba.prange(p.size // CHUNK + 1):
        hs = (
            broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
            broadcast(h, 5), broadcast(h, 6), broadcast(h, 7), broadcast(h, 8),
        )  # fmt: skip
        end = min(p.size, (k + 1) * CHUNK)
        for i in range(k * CHUNK, end - L + 1, L):
            largest = load(v_max, i) if amsgrad else zero(p)
            four = load(p, i), load(g, i), load(m, i), load(v, i)
            q, mean, square, largest = _adam_vector(*four, largest, hs, decay, decoupled, amsgrad)
            store(p, i, q)
            store(m, i, mean)
            store(v, i, square)
            if amsgrad:
                store(v_max, i, largest)
        for i in range(end - end % L, end):
            largest = broadcast(v_max, i) if amsgrad else zero(p)
            four = broadcast(p, i), broadcast(g, i), broadcast(m, i), broadcast(v, i)
            q, mean, square, largest = _adam_vector(*four, largest, hs, decay, decoupled, amsgrad)
            p[i], m[i], v[i] = lane(q), lane(mean), lane(square)
            if amsgrad:
                v_max[i] = lane(largest)


@kernel(parallel=True)
def _rmsprop(p, g, v, m, b, h, decay):
    L, centered, momentum = lane_count(p), m.size > 0, b.size > 0
    for k in numba.prange(p.size // CHUNK + 1):
        hs = (
            broadcast(h, 0), broadcast(h, 1), broadcast(h, 2), broadcast(h, 3), broadcast(h, 4),
            broadcast(h, 5), zero(h),
        )  # fmt: skip
        end = min(p.size, (k + 1) * CHUNK)
        for i in range(k * CHUNK, end - L + 1, L):
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
        for i in range(end - end % L, end):
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


@kernel(parallel=True)
def _all_finite(a, bad):
    for k in numba.prange(bad.size):
        L = lane_count(a)
        end = min(a.size, (k + 1) * CHUNK)
        total = zero(a)
        for i in range(k * CHUNK, end - L + 1, L):
            v = load(a, i)
            total = add(total, sub(v, v))  # NaN where v is not finite
        sum_ = horizontal_sum(total)
        for i in range(end - end % L, end):
            sum_ += a[i] - a[i]
        bad[k] = sum_ != 0  # NaN differs from all numbers


def all_finite(a: Array) -> bool:
    """Tell whether no number of `a` is NaN or infinite."""
    if a.size <= CHUNK:  # sooner done than handed to threads
        return bool(np.isfinite(a).all())
    bad = np.empty(-(-a.size // CHUNK), np.bool_)
    _all_finite(flat(a), bad)
    return not bad.any()


def sgd_update(
    p: Array, g: Array, b: Array | None, t: Array, *, lr: float, momentum: float,
    dampening: float, weight_decay: float, nesterov: bool,
) -> None:  # fmt: skip
    """Like `minicnn.optim.sgd_update`."""
    h = lr, momentum, 1 - dampening, weight_decay, lr * momentum
    _sgd(p.reshape(-1), flat(g), _or_none(b, p), _numbers(h, p), weight_decay != 0, nesterov)


def adam_update(
    p: Array, g: Array, m: Array, v: Array, v_max: Array | None, t: Array, *, lr: float,
    betas: tuple[float, float], eps: float, weight_decay: float, decoupled: bool, n: int,
) -> None:  # fmt: skip
    """Like `minicnn.optim.adam_update`."""
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
    arrays = p.reshape(-1), flat(g), m.reshape(-1), v.reshape(-1), _or_none(v_max, p)
    _adam(*arrays, _numbers(h, p), weight_decay != 0, decoupled)


def rmsprop_update(
    p: Array, g: Array, v: Array, m: Array | None, b: Array | None, t: Array, *, lr: float,
    alpha: float, eps: float, weight_decay: float, momentum: float,
) -> None:  # fmt: skip
    """Like `minicnn.optim.rmsprop_update`."""
    h = lr, alpha, 1 - alpha, eps, weight_decay, momentum
    arrays = p.reshape(-1), flat(g), v.reshape(-1), _or_none(m, p), _or_none(b, p)
    _rmsprop(*arrays, _numbers(h, p), weight_decay != 0)


def _or_none(a: Array | None, p: Array) -> Array:
    return np.empty(0, p.dtype) if a is None else a.reshape(-1)


def _numbers(h: tuple[float, ...], p: Array) -> Any:
    return np.array(h, p.dtype)
