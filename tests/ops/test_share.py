"""Work shared out among threads."""

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops.jit import kernel  # noqa: E402  (need Numba)
from minicnn.ops.share import take  # noqa: E402


@kernel(parallel=True)
def work(taken, done, by):
    for t in numba.prange(by.size):
        i = take(taken, 1)
        while i < done.size:
            done[i] += 1
            by[t] += 1
            i = take(taken, 1)


def test_every_item_is_taken_once():
    for _ in range(20):
        taken, done = np.zeros(3, np.int64), np.zeros(1000, np.int64)
        by = np.zeros(4, np.int64)
        work(taken, done, by)
        assert (done == 1).all()
        assert by.sum() == 1000
        assert taken.tolist() == [0, 1000 + by.size, 0]
