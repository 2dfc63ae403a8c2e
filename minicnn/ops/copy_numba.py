# mypy: disallow-untyped-defs=False
# (the compiled functions get their types from Numba)
"""Runs of numbers in kernels, by vectors: slices would take Numba seconds to compile."""

import numpy as np

from minicnn.ops.jit import kernel
from minicnn.ops.vector import lane_count, load, load_part, store, store_part, zero


@kernel()
def copy(a, start, count, out, to):
    """``out[to : to + count] = a[start : start + count]``."""
    L = lane_count(a)
    whole = count // L * L
    for i in range(0, whole, L):
        store(out, to + i, load(a, start + i))
    for i in range(whole, count):
        out[to + i] = a[start + i]


@kernel()
def clear(out, to, count):
    """``out[to : to + count] = 0``."""
    L = lane_count(out)
    whole = count // L * L
    for i in range(0, whole, L):
        store(out, to + i, zero(out))
    for i in range(whole, count):
        out[to + i] = 0


@kernel()
def spread(a, start, count, out, to, step):
    """``out[to + i * step] = a[start + i]`` for i < count."""
    for i in range(start, start + count):
        out[np.uint64(to)] = a[np.uint64(i)]  # unsigned: not to be tried for a negative index
        to += step


@kernel()
def collect(a, start, step, count, out, to):
    """``out[to + i] = a[start + i * step]`` for i < count."""
    for i in range(to, to + count):
        out[np.uint64(i)] = a[np.uint64(start)]
        start += step


@kernel(inline=True)
def load_some(a, i, n, v):
    """Do what `load_part` does, faster where a whole vector is left."""
    return load(a, i) if n >= lane_count(a) else load_part(a, i, n, v)


@kernel(inline=True)
def store_some(a, i, n, v):
    """Do what `store_part` does, faster where a whole vector is left."""
    if n >= lane_count(a):
        store(a, i, v)
    else:
        store_part(a, i, n, v)
