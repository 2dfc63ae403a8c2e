"""Runs of numbers in kernels: what is copied, and that nothing else is touched."""

import numpy as np
import pytest

pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import copy_numba

counts = pytest.mark.parametrize("count", [0, 1, 7, 16, 33])
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@both
@counts
def test_copy_and_clear(count, dtype):
    a, out = np.arange(60, dtype=dtype), np.full(60, -1, dtype)
    wanted = out.copy()
    wanted[5 : 5 + count] = a[3 : 3 + count]
    copy_numba.copy(a, 3, count, out, 5)
    np.testing.assert_array_equal(out, wanted)
    copy_numba.clear(out, 5, count)
    wanted[5 : 5 + count] = 0
    np.testing.assert_array_equal(out, wanted)


@both
@counts
def test_spread_and_collect(count, dtype):
    a, out = np.arange(60, dtype=dtype), np.full(200, -1, dtype)
    wanted = out.copy()
    wanted[5 : 5 + 3 * count : 3] = a[2 : 2 + count]
    copy_numba.spread(a, 2, count, out, 5, 3)
    np.testing.assert_array_equal(out, wanted)
    back = np.full(60, -1, dtype)
    copy_numba.collect(out, 5, 3, count, back, 2)
    np.testing.assert_array_equal(back[2 : 2 + count], a[2 : 2 + count])
    assert (back[:2] == -1).all()
    assert (back[2 + count :] == -1).all()
