"""flatten: joins axes and keeps the row-major order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.flatten import VERSIONS, flatten_backward, flatten_forward
from opchecks import (
    assert_adjoint,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = flatten_forward, flatten_backward


@st.composite
def cases(draw):
    """A shape and the axes to join: (shape, kwargs), negative axes included."""
    shape = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4)))
    start = draw(st.integers(0, len(shape) - 1))
    end = draw(st.integers(start, len(shape) - 1))
    start -= draw(st.sampled_from([0, len(shape)]))
    end -= draw(st.sampled_from([0, len(shape)]))
    return shape, {"start_dim": start, "end_dim": end}


@versions
def test_hand_computed_numbers(version):
    x = np.arange(24.0).reshape(2, 3, 2, 2)
    with use(version):
        y, cache = flatten_forward(x)
        middle, _ = flatten_forward(x, 1, 2)
        everything, _ = flatten_forward(x, 0)
        dx = flatten_backward(10 * y, cache)
    np.testing.assert_array_equal(y, [np.arange(12), np.arange(12, 24)])
    assert middle.shape == (2, 6, 2)
    np.testing.assert_array_equal(middle[1, 3], x[1, 1, 1])
    np.testing.assert_array_equal(everything, np.arange(24))
    np.testing.assert_array_equal(dx, 10 * x)


@versions
@given(case=cases(), seed=seeds, dtype=dtypes)
def test_versions_equal_the_reference(version, case, seed, dtype):
    shape, kwargs = case
    x = normal(np.random.default_rng((seed, 1)), shape, dtype)
    assert_equals_reference(version, *PAIR, (x,), seed, **kwargs)


@versions
@given(case=cases(), seed=seeds)
def test_backward_is_the_adjoint_and_the_slope(version, case, seed):
    shape, kwargs = case
    x = normal(np.random.default_rng((seed, 1)), shape)
    assert_adjoint(version, *PAIR, (x,), seed, **kwargs)
    assert_gradients(version, *PAIR, (x,), seed, **kwargs)


@versions
@given(case=cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    shape, kwargs = case
    x = normal(np.random.default_rng((seed, 1)), shape, dtype)
    assert_layout_free(version, *PAIR, (x,), seed, layout, **kwargs)


@given(case=cases(), seed=seeds)
def test_equals_pytorch(torch, case, seed):
    shape, kwargs = case
    x = normal(np.random.default_rng((seed, 1)), shape)
    assert_equals_torch(torch, *PAIR, (x,), seed, lambda x: torch.flatten(x, **kwargs), **kwargs)


@versions
@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4)])
def test_empty_axes(version, shape):
    with use(version):
        y, cache = flatten_forward(np.zeros(shape))
        dx = flatten_backward(y, cache)
    assert y.shape == (shape[0], shape[1] * 4)
    assert dx.shape == shape


@versions
def test_no_axes_become_one(version):
    with use(version):
        y, cache = flatten_forward(np.array(3.0), 0)
        dx = flatten_backward(np.array([2.0]), cache)
    np.testing.assert_array_equal(y, [3])
    assert dx.shape == ()
    assert dx == 2


@versions
def test_nan_and_inf_pass(version):
    x = np.array([[[np.nan, np.inf], [-np.inf, 0]]])
    with use(version):
        y, _ = flatten_forward(x)
    np.testing.assert_array_equal(y, [[np.nan, np.inf, -np.inf, 0]])


def test_contiguous_arrays_are_not_copied():
    x = np.zeros((2, 3, 4))
    y, cache = flatten_forward(x)
    assert np.shares_memory(y, x)
    assert np.shares_memory(flatten_backward(y, cache), x)


X = np.zeros((2, 3, 4))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, 3), ValueError, r"flatten: start_dim: expected an axis from -3 to 2, got 3"),
        ((X, -4), ValueError, r"flatten: start_dim: expected an integer >= -3, got -4"),
        ((X, 0, 3), ValueError, r"flatten: end_dim: expected an axis from -3 to 2, got 3"),
        ((X, 2, 1), ValueError, r"start_dim: expected at most end_dim 1, got 2 for shape"),
        ((X, -1, 1), ValueError, r"start_dim: expected at most end_dim 1, got -1"),
        ((X[0, 0],), ValueError, r"flatten: start_dim: expected an axis from -1 to 0, got 1"),
        ((np.array(1.0),), ValueError, r"flatten: start_dim: expected an axis from -1 to 0, got 1"),
        ((X, 1.0), TypeError, r"flatten: start_dim: expected an integer >= -3, got 1.0"),
        ((X, 0, None), TypeError, r"flatten: end_dim: expected an integer >= -3, got None"),
        ((X.astype("f2"),), TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int),), TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(),), TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, error, message):
    with pytest.raises(error, match=message):
        flatten_forward(*args)


def test_bad_upstream_gradient_is_named():
    y, cache = flatten_forward(X)
    with pytest.raises(ValueError, match=r"flatten_backward: dy: expected shape \(2, 12\) \(like"):
        flatten_backward(y.ravel(), cache)
    with pytest.raises(TypeError, match=r"dy: expected float32 or float64, got int64"):
        flatten_backward(y.astype(int), cache)
