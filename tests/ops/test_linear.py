"""linear: the reference is the equation, and everything else equals it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.linear import VERSIONS, linear_backward, linear_forward
from opchecks import (
    assert_adjoint,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = linear_forward, linear_backward

# (leading axes of x, inputs, outputs)
cases = st.tuples(
    st.lists(st.integers(1, 3), max_size=3).map(tuple), st.integers(1, 4), st.integers(1, 4)
)


def draw_arrays(seed, case, dtype=np.float64):
    leading, inputs, outputs = case
    rng = np.random.default_rng((seed, 1))  # not the stream that dy is drawn from
    return tuple(normal(rng, s, dtype) for s in ((*leading, inputs), (outputs, inputs), (outputs,)))


@versions
def test_hand_computed_numbers(version):
    x, w = np.array([[1.0, 2], [3, 4], [5, 6]]), np.array([[1.0, -1], [0, 2]])
    with use(version):
        y, cache = linear_forward(x, w, np.array([10.0, 20]))
        dx, dw, db = linear_backward(np.array([[1.0, 0], [2, 1], [0, 3]]), cache)
    np.testing.assert_array_equal(y, [[9, 24], [9, 28], [9, 32]])
    np.testing.assert_array_equal(dx, [[1, -1], [2, 0], [0, 6]])
    np.testing.assert_array_equal(dw, [[7, 10], [18, 22]])
    np.testing.assert_array_equal(db, [3, 4])


@versions
@given(case=cases, seed=seeds, dtype=dtypes, bias=st.booleans())
def test_versions_equal_the_reference(version, case, seed, dtype, bias):
    x, w, b = draw_arrays(seed, case, dtype)
    assert_equals_reference(version, *PAIR, (x, w, b if bias else None), seed)


@versions
@settings(max_examples=20)
@given(case=cases, seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    assert_gradients(version, *PAIR, draw_arrays(seed, case), seed)


@versions
@given(case=cases, seed=seeds)
def test_backward_is_the_adjoint(version, case, seed):
    x, w, _ = draw_arrays(seed, case)
    assert_adjoint(version, *PAIR, (x, w), seed)


@versions
@given(case=cases, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    assert_layout_free(version, *PAIR, draw_arrays(seed, case, dtype), seed, layout)


@versions
@pytest.mark.parametrize("leading", [(0,), (0, 3), (2, 0)])
def test_empty_batch(version, leading):
    with use(version):
        y, cache = linear_forward(np.zeros((*leading, 3)), np.ones((2, 3)), np.ones(2))
        dx, dw, db = linear_backward(y, cache)
    assert y.shape == (*leading, 2)
    assert dx.shape == (*leading, 3)
    np.testing.assert_array_equal(dw, np.zeros((2, 3)))
    np.testing.assert_array_equal(db, np.zeros(2))


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(version, bad):
    x = np.ones((3, 4))
    x[1, 2] = bad
    with use(version), np.errstate(invalid="ignore"):  # BLAS may compute inf * 0 in its padding
        y, cache = linear_forward(x, np.ones((2, 4)))
        _, dw, _ = linear_backward(np.ones((3, 2)), cache)
    np.testing.assert_array_equal(np.isfinite(y), [[True] * 2, [False] * 2, [True] * 2])
    np.testing.assert_array_equal(np.isfinite(dw), [[True, True, False, True]] * 2)


def test_no_bias_has_no_gradient():
    y, cache = linear_forward(np.ones((2, 3)), np.ones((4, 3)))
    assert linear_backward(y, cache)[2] is None


def test_the_bias_gradient_of_a_long_batch_is_exact():
    x = np.zeros((2**20, 1), np.float32)
    _, cache = linear_forward(x, np.ones((2, 1), np.float32), np.zeros(2, np.float32))
    dy = np.full((2**20, 2), 0.1, np.float32)  # a float32 running sum is off by 1%
    _, _, db = linear_backward(dy, cache)
    np.testing.assert_allclose(db, 2**20 * np.float64(dy[0]), rtol=1e-7)


@given(case=cases, seed=seeds, bias=st.booleans())
def test_equals_pytorch(torch, case, seed, bias):
    x, w, b = draw_arrays(seed, case)
    arrays = (x, w, b if bias else None)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch.nn.functional.linear)


X, W, B = np.zeros((2, 3)), np.zeros((4, 3)), np.zeros(4)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, W[:, :2]), ValueError, r"linear: x: expected shape \(..., 2\) .* got \(2, 3\)"),
        (
            (np.zeros((2, 3, 4, 4)), np.zeros((4, 48))),
            ValueError,
            r"x: expected shape \(..., 48\) .* got \(2, 3, 4, 4\) \(fix: flatten x first\)",
        ),
        ((np.array(1.0), W), ValueError, r"x: expected shape \(..., 3\) .* got \(\)"),
        ((X, W[0]), ValueError, r"linear: w: expected 2 axes \(O, I\), got shape \(3,\)"),
        ((X, W[:0]), ValueError, r"w: expected no axis of length 0, got shape \(0, 3\)"),
        ((X[:, :0], W[:, :0]), ValueError, r"w: expected no axis of length 0"),
        ((X, W, B[:3]), ValueError, r"b: expected shape \(4,\) \(one per output\), got \(3,\)"),
        ((X, W, B[:, None]), ValueError, r"b: expected shape \(4,\) .* got \(4, 1\)"),
        ((X.astype("f4"), W), TypeError, r"w: expected float32 like x, got float64"),
        ((X, W, B.astype("f4")), TypeError, r"b: expected float64 like x, got float32"),
        ((X.astype("f2"), W), TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), W), TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), W), TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, error, message):
    with pytest.raises(error, match=message):
        linear_forward(*args)


def test_bad_upstream_gradient_is_named():
    y, cache = linear_forward(X, W)
    with pytest.raises(ValueError, match=r"linear_backward: dy: expected shape \(2, 4\) \(like y"):
        linear_backward(y[:1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        linear_backward(y.astype("f4"), cache)
