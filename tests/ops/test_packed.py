"""A kernel's plan in one array."""

from typing import NamedTuple

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops.jit import kernel  # noqa: E402  (need Numba)
from minicnn.ops.packed import pack, unpacker  # noqa: E402


class Plan(NamedTuple):
    deep: bool
    rows: int
    table: np.ndarray
    places: np.ndarray
    empty: np.ndarray
    last: int


PLAN = Plan(
    True,
    -3,
    np.arange(24, dtype=np.int32).reshape(2, 3, 4),
    np.array([1 << 40, -1]),
    np.zeros((0, 5), np.int32),
    7,
)
unpack = unpacker(Plan, {"int32 3": "table", "int64 1": "places", "int32 2": "empty"})


@kernel(parallel=True)
def read(packed, numbers, table, places):
    for _t in numba.prange(1):
        plan = unpack(packed)
        numbers[0] = 1 if plan.deep else 0
        numbers[1], numbers[2] = plan.rows, plan.last
        numbers[3], numbers[4] = plan.empty.shape[0], plan.empty.shape[1]
        for i in range(plan.table.shape[0]):
            for j in range(plan.table.shape[1]):
                for k in range(plan.table.shape[2]):
                    table[i, j, k] = plan.table[i, j, k]
        places[: plan.places.size] = plan.places


@pytest.mark.parametrize("plan", [PLAN, PLAN._replace(deep=False, table=PLAN.table[:, :, ::2])])
def test_a_kernel_reads_what_was_packed(plan):
    numbers, table = np.zeros(5, np.int64), np.full((2, 3, 4), -1, np.int32)
    places = np.zeros(2, np.int64)
    read(pack(plan), numbers, table, places)
    assert numbers.tolist() == [plan.deep, plan.rows, plan.last, 0, 5]
    assert np.array_equal(table[:, :, : plan.table.shape[2]], plan.table)
    assert np.array_equal(places, plan.places)


def test_tables_lie_behind_the_numbers_each_at_a_multiple_of_eight():
    packed = pack(Plan(False, 2, np.ones((1, 1, 3), np.int32), np.array([5]), PLAN.empty, 9))
    head = [0, 2, 8 * 12, 1, 1, 3, 8 * 14, 1, 8 * 15, 0, 5, 9]
    assert packed[:12].tolist() == head
    assert packed[12:14].view(np.int32)[:3].tolist() == [1, 1, 1]
    assert packed[14] == 5
