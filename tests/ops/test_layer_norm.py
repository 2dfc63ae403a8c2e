"""layer_norm: the reference is the equation, and everything else equals it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.layer_norm import VERSIONS, layer_norm_backward, layer_norm_forward
from opchecks import (
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
epsilons = st.sampled_from([1e-5, 1e-2, 1.0])
lengths = st.integers(1, 3)
cases = st.tuples(  # (leading axes, normalized_shape)
    st.lists(lengths, max_size=2).map(tuple), st.lists(lengths, min_size=1, max_size=2).map(tuple)
)


def pair(normalized_shape):
    """The op with its arrays in front, as the checks call it."""

    def forward(x, w, b, **kwargs):
        return layer_norm_forward(x, normalized_shape, w, b, **kwargs)

    return forward, layer_norm_backward


def draw_arrays(seed, case, dtype=np.float64):
    leading, shape = case
    rng = np.random.default_rng((seed, 1))  # not the stream that dy is drawn from
    x = (normal(rng, (*leading, *shape)) + 2).astype(dtype)
    return x, normal(rng, shape, dtype), normal(rng, shape, dtype)


# With eps = 15, rstd is 1/4 for values 1 from their mean and 1/8 for values 7 from it.
X = np.array([[-1.0, 1], [3, 17]])
W, B = np.array([2.0, 8]), np.array([1.0, 0])


@versions
def test_hand_computed_numbers(version):
    with use(version):
        y, cache = layer_norm_forward(X, 2, W, B, eps=15)
        dx, dw, db = layer_norm_backward(np.array([[2.0, 1], [4, -1]]), cache)
    np.testing.assert_allclose(y, [[0.5, 2], [-0.75, 7]], rtol=1e-14)
    # Row 0: g = w * dy = (4, 8), mean 6, mean of g * xhat 1/2; row 1: g = (8, -8), 0 and -7.
    np.testing.assert_allclose(dx, [[-15 / 32, 15 / 32], [15 / 64, -15 / 64]], rtol=1e-14)
    np.testing.assert_allclose(dw, [-4, -5 / 8], rtol=1e-14)
    np.testing.assert_allclose(db, [6, 0], rtol=1e-14)


@versions
@given(case=cases, seed=seeds, dtype=dtypes, weight=st.booleans(), bias=st.booleans(), eps=epsilons)
def test_versions_equal_the_reference(version, case, seed, dtype, weight, bias, eps):
    x, w, b = draw_arrays(seed, case, dtype)
    arrays = (x, w if weight else None, b if bias else None)
    assert_equals_reference(version, *pair(case[1]), arrays, seed, eps=eps)


@versions
@given(case=cases, seed=seeds)
def test_any_forward_serves_any_backward(version, case, seed):
    x, w, b = draw_arrays(seed, case)
    dy = normal(np.random.default_rng(seed), x.shape)
    with use("reference"):
        expected = layer_norm_backward(dy, layer_norm_forward(x, case[1], w, b)[1])
    for first, second in ((version, "reference"), ("reference", version)):
        with use(first):
            _, cache = layer_norm_forward(x, case[1], w, b)
        with use(second):
            grads = layer_norm_backward(dy, cache)
        for got, want in zip(grads, expected):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@versions
@settings(max_examples=20)
@given(case=cases, seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    # eps = 1: two values that nearly meet would bend the function within a finite difference.
    assert_gradients(version, *pair(case[1]), draw_arrays(seed, case), seed, eps=1.0)


@versions
@given(case=cases, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    assert_layout_free(version, *pair(case[1]), draw_arrays(seed, case, dtype), seed, layout)


@versions
def test_every_row_has_its_own_statistics(version):
    rng = np.random.default_rng(0)
    x = normal(rng, (2, 3, 4, 5)) * 10 ** rng.uniform(0, 2, (2, 3, 1, 1)) + 7
    with use(version):
        y, _ = layer_norm_forward(x, (4, 5))
        alone, _ = layer_norm_forward(x[1, 2], (4, 5))
    np.testing.assert_allclose(y.mean(axis=(2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(2, 3)), 1, rtol=1e-3)
    np.testing.assert_array_equal(y[1, 2], alone)


@versions
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_row_of_equal_values_becomes_the_shift(version, dtype):
    x, b = np.full((3, 7), 0.1, dtype), np.arange(7, dtype=dtype)
    dy = normal(np.random.default_rng(0), x.shape, dtype)
    with use(version):
        y, cache = layer_norm_forward(x, 7, np.ones(7, dtype), b)
        dx, _, _ = layer_norm_backward(dy, cache)
    np.testing.assert_allclose(y, np.broadcast_to(b, y.shape), atol=1e-12)
    expected = (dy - dy.mean(axis=1, keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-3)


@versions
def test_float32_far_from_zero_keeps_its_digits(version):
    rng = np.random.default_rng(0)
    x, dy = (1e4 + normal(rng, (4, 50))).astype(np.float32), normal(rng, (4, 50), np.float32)
    with use(version):
        y, cache = layer_norm_forward(x, 50)
        dx, _, _ = layer_norm_backward(dy, cache)
    with use("reference"):
        exact, exact_cache = layer_norm_forward(x.astype(np.float64), 50)
        exact_dx, _, _ = layer_norm_backward(dy.astype(np.float64), exact_cache)
    np.testing.assert_allclose(y, exact, atol=1e-6)
    np.testing.assert_allclose(dx, exact_dx, atol=1e-6)


def test_long_sums_are_exact():
    x = np.full((2**20, 2), 0.1, np.float32)  # a float32 running sum is off by 1%
    w = b = np.ones(2, np.float32)
    _, cache = layer_norm_forward(x + np.arange(2, dtype="f4"), 2, w, b)
    _, dw, db = layer_norm_backward(x, cache)
    np.testing.assert_allclose(db, 2**20 * np.float64(x[0]), rtol=1e-7)
    np.testing.assert_allclose(dw, [-db[0], db[1]], rtol=1e-4)


def test_absent_parameters_have_no_gradient():
    y, cache = layer_norm_forward(X, 2)
    _, dw, db = layer_norm_backward(y, cache)
    assert dw is None
    assert db is None


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_row(version, bad):
    x = normal(np.random.default_rng(0), (3, 4))
    x[1, 2] = bad
    with use(version), np.errstate(invalid="ignore"):
        y, cache = layer_norm_forward(x, 4)
        dx, _, _ = layer_norm_backward(np.ones_like(x), cache)
    for a in (y, dx):
        assert not np.isfinite(a[1]).any()
        assert np.isfinite(a[[0, 2]]).all()


@versions
@pytest.mark.parametrize("leading", [(0,), (2, 0)])
def test_empty_batch(version, leading):
    x, ones = np.zeros((*leading, 2, 3)), np.ones((2, 3))
    with use(version):
        y, cache = layer_norm_forward(x, (2, 3), ones, ones)
        dx, dw, db = layer_norm_backward(y, cache)
    assert y.shape == dx.shape == x.shape
    np.testing.assert_array_equal(dw, np.zeros((2, 3)))
    np.testing.assert_array_equal(db, np.zeros((2, 3)))


@given(case=cases, seed=seeds, weight=st.booleans(), bias=st.booleans(), eps=epsilons)
def test_equals_pytorch(torch, case, seed, weight, bias, eps):
    x, w, b = draw_arrays(seed, case)
    arrays = (x, w if weight else None, b if bias else None)

    def torch_layer_norm(x, w, b):
        return torch.nn.functional.layer_norm(x, case[1], w, b, eps)

    assert_equals_torch(torch, *pair(case[1]), arrays, seed, torch_layer_norm, eps=eps)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (
            (X, 3),
            {},
            ValueError,
            r"layer_norm: x: expected normalized_shape \(3,\) as its last axes, got \(2, 2\)",
        ),
        ((X, (1, 2, 2)), {}, ValueError, r"x: expected normalized_shape \(1, 2, 2\)"),
        ((X, ()), {}, ValueError, r"normalized_shape: expected at least one axis"),
        ((X, 0), {}, ValueError, r"normalized_shape: expected an integer >= 1, got 0"),
        ((X, (2, -1)), {}, ValueError, r"normalized_shape: expected an integer >= 1, got -1"),
        ((X, 2.0), {}, TypeError, r"normalized_shape: expected an integer >= 1, got 2.0"),
        ((X, "2"), {}, TypeError, r"normalized_shape: expected an integer >= 1, got '2'"),
        ((X, 2, W[:1]), {}, ValueError, r"w: expected shape \(2,\) \(norm.*\), got \(1,\)"),
        ((X, (2, 2), W), {}, ValueError, r"w: expected shape \(2, 2\) .* got \(2,\)"),
        ((X, 2, W, np.ones(3)), {}, ValueError, r"b: expected shape \(2,\) .* got \(3,\)"),
        ((X, 2), {"eps": -1}, ValueError, r"eps: expected a number > 0, got -1"),
        ((X, 2, W.astype("f4")), {}, TypeError, r"w: expected float64 like x, got float32"),
        ((X.astype("f2"), 2), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), 2), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), 2), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        layer_norm_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = layer_norm_forward(X, 2)
    with pytest.raises(ValueError, match=r"layer_norm_backward: dy: expected shape \(2, 2\)"):
        layer_norm_backward(y[0], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        layer_norm_backward(y.astype("f4"), cache)
