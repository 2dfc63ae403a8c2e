"""Window arithmetic against brute force and PyTorch, and the errors everybody raises."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from minicnn.shapes import Window, check_shape, pads, pair, size, window

small = st.integers(1, 4)


def brute_force_places(length, before, after, kernel, stride, dilation):
    """Count the starts at which the whole window lies within the padded line."""
    starts = range(0, length + before + after, stride)
    return sum(s + dilation * (kernel - 1) < length + before + after for s in starts)


@given(
    st.integers(1, 12), st.integers(1, 12), st.tuples(*[st.integers(0, 3)] * 4), small, small, small
)
def test_output_size_counts_the_places(H, W, padding, kernel, stride, dilation):
    top, bottom, left, right = padding
    win = window("op", kernel, stride, ((top, bottom), (left, right)), dilation)
    expected = (
        brute_force_places(H, top, bottom, kernel, stride, dilation),
        brute_force_places(W, left, right, kernel, stride, dilation),
    )
    if 0 in expected:
        with pytest.raises(ValueError, match="op: kernel_size: expected at most the padded input"):
            win.output_size("op", H, W)
    else:
        assert win.output_size("op", H, W) == expected
        assert win.formula(H, W).endswith(f"= {expected[0]}")


@given(st.integers(1, 12), small, small, st.integers(0, 2), st.integers(1, 2))
def test_ceil_mode_is_pytorchs(torch, H, kernel, stride, padding, dilation):
    assume(padding <= kernel // 2 and dilation * (kernel - 1) < H + 2 * padding)
    x = torch.zeros(1, 1, H, H)
    y = torch.nn.functional.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode=True)
    win = window("op", kernel, stride, padding, dilation)
    assert win.output_size("op", H, H, ceil_mode=True) == tuple(y.shape[2:])


def test_sizes_are_python_integers_that_do_not_wrap():
    win = window("op", 3, 1, 2**62)
    assert win.padded(2**62, 1) == (3 * 2**62, 2**63 + 1)
    with pytest.raises(ValueError, match=f"op: x: expected a map of at most .* got {3 * 2**62}x"):
        win.output_size("op", 2**62, 1)
    assert window("op", 3, 2**40).output_size("op", 2**20, 2**16) == (1, 1)
    assert size((2**31, 2**31, 2**31)) == 2**93


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (1, ((1, 1), (1, 1))),
        ((1, 2), ((1, 1), (2, 2))),
        (((1, 2), (3, 4)), ((1, 2), (3, 4))),
        ([1, (0, 3)], ((1, 1), (0, 3))),
        (np.int64(2), ((2, 2), (2, 2))),
    ],
)
def test_forms_of_padding(padding, expected):
    assert pads("op", padding) == expected


@pytest.mark.parametrize(("kernel", "total"), [(3, 2), (4, 3), (1, 0)])
def test_same_padding_puts_the_larger_part_last(kernel, total):
    padding = window("op", kernel, padding="same").padding
    assert padding == ((total // 2, total - total // 2),) * 2
    assert window("op", kernel, padding="valid").padding == ((0, 0), (0, 0))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "op: k: expected an integer >= 1, got 0"),
        ((2, 0), ValueError, "op: k: expected an integer >= 1, got 0"),
        ((1, 2, 3), ValueError, r"op: k: expected an int or a pair, got \(1, 2, 3\)"),
        (1.0, TypeError, "op: k: expected an integer >= 1, got 1.0"),
        (True, TypeError, "op: k: expected an integer >= 1, got True"),
        ("3", TypeError, "op: k: expected an integer >= 1, got '3'"),
        (None, TypeError, "op: k: expected an integer >= 1, got None"),
    ],
)
def test_bad_pairs_are_named(value, error, message):
    with pytest.raises(error, match=message):
        pair("op", "k", value, 1)


def test_windows_compare_and_check_shape_says_why():
    assert window("op", 2) == Window((2, 2), (1, 1), ((0, 0), (0, 0)), (1, 1))
    with pytest.raises(ValueError, match=r"op: b: expected shape \(2,\) \(one a row\), got \(3,\)"):
        check_shape("op", "b", np.zeros(3), (2,), "one a row")
