# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Softmax and cross-entropy of plain labels in one pass over the scores, with the gradient.

    loss = mean over n of log(sum over c of exp(x[n, c])) - x[n, label[n]]
    dx[n, c] = (softmax(x[n])[c] - [c == label[n]]) / N

for scores (N, C) of few classes: what a training step needs and no more. Each row subtracts its
maximum first, as `log_softmax` does, and adds in float64. The rows' losses are added in float64
in order, so the number of threads changes no bit.
"""

from __future__ import annotations

import math

import numba
import numpy as np

from minicnn.backend import Array
from minicnn.ops.jit import Call, flat, kernel

ROWS_EACH = 64  # rows that are worth a thread


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
