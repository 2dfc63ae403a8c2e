"""Depthwise convolution on the lanes of a row: which geometries it takes, and that it is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import ops
from minicnn.shapes import window
from opchecks import assert_adjoint, assert_any_threads, both_ways
from strategies import dtypes, normal, paddings, pairs, seeds

pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import conv2d_depthwise, conv2d_numba
from minicnn.ops.conv2d_maps import Geometry
from minicnn.ops.vector import lanes

PAIR = ops.conv2d_forward, ops.conv2d_backward
F4 = np.zeros(1, np.float32)


@st.composite
def cases(draw):
    """Depthwise convolutions of stride 1 whose rows fill a vector, with and without a rest."""
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    dilation = draw(pairs)
    H, W = (d * (k - 1) + 1 + draw(st.integers(0, 5)) for k, d in zip(kernel, dilation))
    N, C = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    kwargs = {"padding": draw(paddings), "dilation": dilation, "groups": C}
    return (N, C, H, W + lanes(np.float32) + draw(st.integers(0, 20))), (C, 1, *kernel), kwargs


def draw_arrays(seed, x_shape, w_shape, dtype):
    rng = np.random.default_rng(seed)
    return [normal(rng, shape, dtype) for shape in (x_shape, w_shape, w_shape[:1])]


@given(case=cases(), seed=seeds, dtype=dtypes)
def test_equals_numpy(case, seed, dtype):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, dtype)
    (_, _, H, W), C = x_shape, w_shape[0]
    win = window("test", w_shape[2:], 1, kwargs["padding"], kwargs["dilation"])
    for adjoint in (False, True):
        geometry = Geometry(adjoint, C, H, W, C, win, C)
        wide = W if adjoint else win.output_size("test", H, W)[1]
        takes = conv2d_depthwise.applies(geometry, lanes(dtype))
        assert takes == (wide >= lanes(dtype))
        assert not takes or conv2d_numba._kernels(geometry, arrays[0]) is conv2d_depthwise
    tolerance = 2e-5 if dtype == np.float32 else 1e-13
    y, _, grads = both_ways("numba", *PAIR, arrays, seed, **kwargs)
    wanted, _, expected = both_ways("numpy", *PAIR, arrays, seed, **kwargs)
    for got, want in zip((y, *grads), (wanted, *expected)):
        np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * abs(want).max(initial=1))


@settings(max_examples=20)
@given(case=cases(), seed=seeds)
def test_backward_is_the_adjoint(case, seed):
    x_shape, w_shape, kwargs = case
    x, w, _ = draw_arrays(seed, x_shape, w_shape, np.float64)

    def forward(x, **kwargs):
        return ops.conv2d_forward(x, w, **kwargs)

    assert_adjoint("numba", forward, ops.conv2d_backward, (x,), seed, **kwargs)


def test_whole_numbers_are_exact():
    rng = np.random.default_rng(0)
    x, w, b = (
        rng.integers(-9, 9, s).astype(np.float32) for s in ((3, 4, 19, 41), (4, 1, 3, 3), (4,))
    )
    both = [
        both_ways(version, *PAIR, (x, w, b), 0, padding=1, groups=4)[0]
        for version in ("numba", "numpy")
    ]
    np.testing.assert_array_equal(*both)


@pytest.mark.parametrize(
    ("C", "F", "groups", "stride", "width", "takes"),
    [
        (8, 8, 8, 1, 16, True),
        (8, 8, 8, 2, 40, False),  # stride
        (8, 16, 8, 1, 16, False),  # two filters a channel
        (8, 8, 4, 1, 16, False),
        (8, 8, 8, 1, 3, False),  # a row fills no vector
    ],
)
def test_what_it_takes(C, F, groups, stride, width, takes):
    geometry = Geometry(False, C, 9, width, F, window("test", 3, stride, 1), groups)
    assert conv2d_depthwise.applies(geometry, 16) == takes
    if not takes:
        assert conv2d_numba._kernels(geometry, F4) is not conv2d_depthwise


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_goes_where_numpy_sends_it(bad):
    x, w, b = draw_arrays(0, (2, 3, 9, 20), (3, 1, 3, 3), np.float32)
    x[1, 2, 4, 19] = bad
    y, _, grads = both_ways("numba", *PAIR, (x, w, b), 0, padding=1, groups=3)
    wanted, _, expected = both_ways("numpy", *PAIR, (x, w, b), 0, padding=1, groups=3)
    for got, want in zip((y, *grads), (wanted, *expected)):
        np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


def test_number_of_threads_changes_no_bit():
    arrays = draw_arrays(0, (5, 7, 20, 33), (7, 1, 3, 3), np.float32)
    assert_any_threads("numba", *PAIR, arrays, 0, padding=1, groups=7)


def test_empty_batch():
    x, w, b = draw_arrays(0, (0, 3, 9, 20), (3, 1, 3, 3), np.float32)
    y, _, (dx, dw, db) = both_ways("numba", *PAIR, (x, w, b), 0, padding=1, groups=3)
    assert y.shape == dx.shape == (0, 3, 9, 20)
    assert not dw.any()
    assert not db.any()
