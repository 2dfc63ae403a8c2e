# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Cross-entropy of labels, whose `a` (see `cross_entropy`) has one entry for each.

`forward` and `backward` are the op's. `loss_and_gradient` is what a training step needs, in one
pass over the scores:

    loss = mean over n of log(sum over c of exp(x[n, c])) - x[n, label[n]]
    dx[n, c] = (softmax(x[n])[c] - [c == label[n]]) / N

for scores (N, C) of few classes. Each row subtracts its
maximum first, as `log_softmax` does, and adds in float64. The rows' losses are added in float64
in order, so the number of threads changes no bit.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops import softmax_numba
from minicnn.ops.copy_numba import load_some, store_some
from minicnn.ops.jit import Call, buffers, flat, kernel
from minicnn.ops.vector import constant, exp, lane_count, mul, zero
from minicnn.shapes import size

ROWS_EACH = 64  # rows that are worth a thread


# ---------------------------------------------------------------- the op


# log_p is (N, C, B), label and weight are (N, B). Each of these does the rows n of a thread.


@kernel()
def _some_losses(x, log_p, label, weight, losses, first, last, C, B):
    """Write the losses and, where x is (N, C), log p; elsewhere that is there already."""
    if B == 1:
        softmax_numba.some_rows(x, log_p, first, last, C, True)
    for i in range(first * B, last * B):
        losses[i] = 0
        if weight[i] != 0:  # or else log p may be infinite
            losses[i] = -weight[i] * log_p[(i // B * C + label[i]) * B + i % B]


@kernel()
def _some_gradients(g, log_p, label, dx, first, last, C, B):
    """Write ``g p``, and subtract g at the label."""
    L, none = lane_count(dx), zero(dx)
    for n in range(first, last):
        if B == 1:
            scale = constant(g[n], none)
            for at in range(n * C, (n + 1) * C, L):
                k = (n + 1) * C - at
                store_some(dx, at, k, mul(exp(load_some(log_p, at, k, none)), scale))
        else:
            for row in range(n * C, (n + 1) * C):
                for b in range(0, B, L):
                    p = exp(load_some(log_p, row * B + b, B - b, none))
                    v = mul(p, load_some(g, n * B + b, B - b, none))
                    store_some(dx, row * B + b, B - b, v)
        for i in range(n * B, (n + 1) * B):
            dx[(n * C + label[i]) * B + i - n * B] -= g[i]


@kernel(parallel=True)
def _losses(x, log_p, label, weight, losses, N, C, B, threads):
    if threads == 1:
        _some_losses(x, log_p, label, weight, losses, 0, N, C, B)
    else:
        for t in numba.prange(threads):
            first, last = t * N // threads, (t + 1) * N // threads
            _some_losses(x, log_p, label, weight, losses, first, last, C, B)


@kernel(parallel=True)
def _gradients(g, log_p, label, dx, N, C, B, threads):
    if threads == 1:
        _some_gradients(g, log_p, label, dx, 0, N, C, B)
    else:
        for t in numba.prange(threads):
            first, last = t * N // threads, (t + 1) * N // threads
            _some_gradients(g, log_p, label, dx, first, last, C, B)


def forward(x: Array, label: Array, weight: Array) -> tuple[Array, Array]:
    """Return ``-weight * log_p[label]``, (N, D1, ...), and log_p, the log_softmax of x."""
    N, C, B = _sizes(x)
    log_p = np.empty_like(x) if B == 1 else softmax_numba.forward(x, 1, log=True)
    losses = np.empty_like(weight)
    with buffers(x.dtype):
        arrays = flat(x), log_p.reshape(-1), flat(label), flat(weight), losses.reshape(-1)
        _losses(*arrays, N, C, B, softmax_numba.threads_for(x))
    return losses, log_p


def backward(g: Array, log_p: Array, label: Array, weight: Array) -> Array:
    """Return the gradient to x; g is one number, or one for each loss."""
    dx = np.empty_like(log_p)
    with buffers(dx.dtype):
        arrays = flat(g * weight), flat(log_p), flat(label), dx.reshape(-1)
        _gradients(*arrays, *_sizes(dx), softmax_numba.threads_for(dx))
    return dx


def _sizes(x: Array) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], size(x.shape[2:])


# ---------------------------------------------------------------- with the gradient, in one pass


@kernel()
def _row(x, label, start, C, scale, dx):
    """Return the loss of one row and write its gradient."""
    most = x[start]
    for c in range(1, C):
        most = max(most, x[start + c])
    total = 0.0
    for c in range(C):
        e = math.exp(x[start + c] - most)
        dx[start + c] = e
        total += e
    for c in range(C):
        p = dx[start + c] / total
        dx[start + c] = (p - 1.0 if c == label else p) * scale
    return math.log(total) - (np.float64(x[start + label]) - most)


@kernel(parallel=True)
def _loss_and_gradient(x, labels, losses, dx, N, C, threads):
    for t in numba.prange(threads):
        for n in range(t * N // threads, (t + 1) * N // threads):
            losses[n] = _row(x, labels[n], n * C, C, 1.0 / N, dx)
    total = 0.0
    for n in range(N):
        total += losses[n]
    return total / N


def loss_and_gradient(x: Array, labels: Array, dx: Array) -> float:
    """Return the mean cross-entropy of scores x (N, C) and write its gradient to dx.

    `labels` is (N,) int64 in 0 .. C-1: the caller has checked that, and that N is not 0.
    """
    return float(x.dtype.type(loss_with_gradient(x, labels, dx)()))


def loss_with_gradient(x: Array, labels: Array, dx: Array) -> Call:
    """Return what `loss_and_gradient` runs; the loss comes in float64."""
    N, C = x.shape
    threads = max(1, min(numba.get_num_threads(), N // ROWS_EACH))
    args = flat(x), flat(labels), np.empty(N), dx.reshape(-1), N, C, threads
    return Call(_loss_and_gradient, args)
