"""Shrinking: the smallest case that still fails, and no other failure than that one."""

import numpy as np

from minicnn.gradcheck.shrink import Smallest, axes_of, cropped, lengths, shrink


def test_every_size_is_made_as_small_as_it_can_be():
    seen = []

    def fails(state):
        seen.append(state)
        return state["H"] >= 3 and state["N"] >= 1 and state["stride"] == 2

    simpler = lambda name, value: [1] if name == "stride" and value > 1 else lengths(name, value)  # noqa: E731
    small = shrink({"N": 8, "H": 11, "stride": 2}, simpler, fails)
    assert small == {"N": 1, "H": 3, "stride": 2}
    assert len(seen) < 25
    assert all(seen.count(state) == 1 for state in seen), "no case is tried twice"


def test_a_case_that_cannot_be_built_does_not_fail():
    def fails(state):
        if state["N"] < 4:
            raise ValueError("too small")
        return True

    assert shrink({"N": 9}, lengths, fails) == {"N": 4}


def test_tries_are_limited():
    seen = []
    shrink({"N": 10**6}, lengths, lambda state: not seen.append(state), tries=7)
    assert len(seen) <= 7


def test_axes_of_one_length_are_cropped_together():
    x, w = np.ones((4, 5)), np.ones((3, 5))
    assert axes_of([x, w]) == {"4": 4, "5": 5, "3": 3}
    assert [a.shape for a in cropped([x, w], {"5": 2})] == [(4, 2), (3, 2)]


def test_small_arrays_are_printed_and_large_ones_are_not():
    a = np.arange(4.0).reshape(2, 2)
    text = str(Smallest({"x": (2, 2)}, {"stride": 2}, "dx", a, a + 1))
    assert text.splitlines() == [
        "smallest failing case: x (2, 2), stride=2",
        "  analytic dx = [[0. 1.] [2. 3.]]",
        "  numeric dx = [[1. 2.] [3. 4.]]",
    ]
    assert "analytic" not in str(Smallest({"x": (9, 9)}, {}, "dx", np.ones((9, 9)), a))
