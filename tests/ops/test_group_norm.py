"""group_norm: the reference is the equation, and everything else equals it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.group_norm import VERSIONS, group_norm_backward, group_norm_forward
from minicnn.ops.layer_norm import layer_norm_forward
from opchecks import (
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import channel_shapes, dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
epsilons = st.sampled_from([1e-5, 1e-2, 1.0])
# (shape, groups): channel_shapes counts the channels of one group
cases = st.tuples(channel_shapes, st.integers(1, 3)).map(
    lambda c: ((c[0][0], c[0][1] * c[1], *c[0][2:]), c[1])
)


def pair(groups):
    """The op with its arrays in front, as the checks call it."""

    def forward(x, w, b, **kwargs):
        return group_norm_forward(x, groups, w, b, **kwargs)

    return forward, group_norm_backward


def draw_arrays(seed, shape, dtype=np.float64):
    rng = np.random.default_rng((seed, 1))  # not the stream that dy is drawn from
    x = (normal(rng, shape) + 2).astype(dtype)
    return x, normal(rng, shape[1], dtype), normal(rng, shape[1], dtype)


# With eps = 15, rstd is 1/4 for values 1 from their mean and 1/8 for values 7 from it.
X = np.array([[[-1.0], [1], [3], [17]]])
W, B = np.array([2.0, 8, 2, 8]), np.array([1.0, 0, 0, 5])


@versions
def test_hand_computed_numbers(version):
    with use(version):
        y, cache = group_norm_forward(X, 2, W, B, eps=15)
        dx, dw, db = group_norm_backward(np.array([[[2.0], [1], [4], [-1]]]), cache)
    np.testing.assert_allclose(y[0, :, 0], [0.5, 2, -1.75, 12], rtol=1e-14)
    # Group 0: h = w * dy = (4, 8), mean 6, mean of h * xhat 1/2; group 1: h = (8, -8), 0 and -7.
    np.testing.assert_allclose(dx[0, :, 0], np.array([-30, 30, 15, -15]) / 64, rtol=1e-14)
    np.testing.assert_allclose(dw, [-0.5, 0.25, -3.5, -0.875], rtol=1e-14)
    np.testing.assert_allclose(db, [2, 1, 4, -1], rtol=1e-14)


@versions
@given(case=cases, seed=seeds, dtype=dtypes, weight=st.booleans(), bias=st.booleans(), eps=epsilons)
def test_versions_equal_the_reference(version, case, seed, dtype, weight, bias, eps):
    shape, groups = case
    x, w, b = draw_arrays(seed, shape, dtype)
    arrays = (x, w if weight else None, b if bias else None)
    assert_equals_reference(version, *pair(groups), arrays, seed, eps=eps)


@versions
@given(case=cases, seed=seeds)
def test_any_forward_serves_any_backward(version, case, seed):
    shape, groups = case
    x, w, b = draw_arrays(seed, shape)
    dy = normal(np.random.default_rng(seed), shape)
    with use("reference"):
        expected = group_norm_backward(dy, group_norm_forward(x, groups, w, b)[1])
    for first, second in ((version, "reference"), ("reference", version)):
        with use(first):
            _, cache = group_norm_forward(x, groups, w, b)
        with use(second):
            grads = group_norm_backward(dy, cache)
        for got, want in zip(grads, expected):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@versions
@settings(max_examples=20)
@given(case=cases, seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    shape, groups = case
    # eps = 1: two values that nearly meet would bend the function within a finite difference.
    assert_gradients(version, *pair(groups), draw_arrays(seed, shape), seed, eps=1.0)


@versions
@given(case=cases, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    shape, groups = case
    assert_layout_free(version, *pair(groups), draw_arrays(seed, shape, dtype), seed, layout)


@versions
def test_every_group_of_neighbouring_channels_has_its_own_statistics(version):
    rng = np.random.default_rng(0)
    x = normal(rng, (2, 6, 4, 5)) * 10 ** rng.uniform(0, 2, (2, 6, 1, 1)) + 7
    with use(version):
        y, _ = group_norm_forward(x, 3)
        alone, _ = group_norm_forward(x[1:, 2:4], 1)
    np.testing.assert_allclose(y.reshape(2, 3, 40).mean(axis=2), 0, atol=1e-12)
    np.testing.assert_allclose(y.reshape(2, 3, 40).var(axis=2), 1, rtol=1e-3)
    np.testing.assert_array_equal(y[1:, 2:4], alone)


@versions
def test_one_group_is_layer_norm_without_the_affine_part(version):
    x = normal(np.random.default_rng(0), (3, 4, 2, 2))
    with use(version):
        y, _ = group_norm_forward(x, 1)
        expected, _ = layer_norm_forward(x, x.shape[1:])
    np.testing.assert_allclose(y, expected, rtol=1e-13, atol=1e-15)


@versions
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_group_of_equal_values_becomes_the_shift(version, dtype):
    x, b = np.full((2, 4, 3, 3), 0.1, dtype), np.arange(4, dtype=dtype)
    dy = normal(np.random.default_rng(0), x.shape, dtype)
    with use(version):
        y, cache = group_norm_forward(x, 2, np.ones(4, dtype), b)
        dx, _, _ = group_norm_backward(dy, cache)
    np.testing.assert_allclose(y, np.broadcast_to(b[:, None, None], y.shape), atol=1e-12)
    grouped = dy.reshape(2, 2, 18)
    expected = (grouped - grouped.mean(axis=2, keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(dx.reshape(2, 2, 18), expected, rtol=1e-4, atol=1e-3)


@versions
def test_float32_far_from_zero_keeps_its_digits(version):
    rng = np.random.default_rng(0)
    x = (1e4 + normal(rng, (2, 4, 4, 4))).astype(np.float32)
    dy = normal(rng, x.shape, np.float32)
    with use(version):
        y, cache = group_norm_forward(x, 2)
        dx, _, _ = group_norm_backward(dy, cache)
    with use("reference"):
        exact, exact_cache = group_norm_forward(x.astype(np.float64), 2)
        exact_dx, _, _ = group_norm_backward(dy.astype(np.float64), exact_cache)
    np.testing.assert_allclose(y, exact, atol=1e-6)
    np.testing.assert_allclose(dx, exact_dx, atol=1e-6)


def test_long_sums_are_exact():
    x = np.full((2**20, 2), 0.1, np.float32)  # a float32 running sum is off by 1%
    w = b = np.ones(2, np.float32)
    _, cache = group_norm_forward(x + np.arange(2, dtype="f4"), 1, w, b)
    _, dw, db = group_norm_backward(x, cache)
    np.testing.assert_allclose(db, 2**20 * np.float64(x[0]), rtol=1e-7)
    np.testing.assert_allclose(dw, [-db[0], db[1]], rtol=1e-4)


def test_absent_parameters_have_no_gradient():
    y, cache = group_norm_forward(X, 2)
    _, dw, db = group_norm_backward(y, cache)
    assert dw is None
    assert db is None


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_group(version, bad):
    x = normal(np.random.default_rng(0), (2, 4, 3))
    x[1, 2, 0] = bad
    with use(version), np.errstate(invalid="ignore"):
        y, cache = group_norm_forward(x, 2)
        dx, _, _ = group_norm_backward(np.ones_like(x), cache)
    for a in (y, dx):
        assert not np.isfinite(a[1, 2:]).any()
        assert np.isfinite(a[0]).all()
        assert np.isfinite(a[1, :2]).all()


@versions
def test_empty_batch(version):
    x, ones = np.zeros((0, 4, 3, 3)), np.ones(4)
    with use(version):
        y, cache = group_norm_forward(x, 2, ones, ones)
        dx, dw, db = group_norm_backward(y, cache)
    assert y.shape == dx.shape == x.shape
    np.testing.assert_array_equal(dw, np.zeros(4))
    np.testing.assert_array_equal(db, np.zeros(4))


def torch_refuses(shape, groups):
    """PyTorch takes one value a group in any batch but a batch of 1."""
    return shape[0] * np.prod(shape[1:]) == groups


@given(
    case=cases.filter(lambda c: not torch_refuses(*c)),
    seed=seeds,
    affine=st.booleans(),
    eps=epsilons,
)
def test_equals_pytorch(torch, case, seed, affine, eps):
    shape, groups = case
    x, w, b = draw_arrays(seed, shape)
    arrays = (x, w, b) if affine else (x, None, None)

    def torch_group_norm(x, w, b):
        return torch.nn.functional.group_norm(x, groups, w, b, eps)

    assert_equals_torch(torch, *pair(groups), arrays, seed, torch_group_norm, eps=eps)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((W, 2), {}, ValueError, r"group_norm: x: expected at least 2 axes .* got shape \(4,\)"),
        ((X, 3), {}, ValueError, r"num_groups: expected a divisor of the 4 channels, got 3"),
        ((X, 8), {}, ValueError, r"num_groups: expected a divisor of the 4 channels, got 8"),
        ((X, 0), {}, ValueError, r"num_groups: expected an integer >= 1, got 0"),
        ((X, -2), {}, ValueError, r"num_groups: expected an integer >= 1, got -2"),
        ((X, 2.0), {}, TypeError, r"num_groups: expected an integer >= 1, got 2.0"),
        ((X[:, :0], 1), {}, ValueError, r"x: expected no axis of length 0 but the first"),
        ((X[:, :, :0], 2), {}, ValueError, r"x: expected no axis of length 0 but the first"),
        ((X, 2, W[:2]), {}, ValueError, r"w: expected shape \(4,\) \(one per .*\), got \(2,\)"),
        ((X, 2, W, B[:, None]), {}, ValueError, r"b: expected shape \(4,\) .* got \(4, 1\)"),
        ((X, 2), {"eps": 0.0}, ValueError, r"eps: expected a number > 0, got 0.0"),
        ((X, 2, W.astype("f4")), {}, TypeError, r"w: expected float64 like x, got float32"),
        ((X.astype("f2"), 2), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), 2), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), 2), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        group_norm_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = group_norm_forward(X, 2)
    with pytest.raises(ValueError, match=r"group_norm_backward: dy: expected shape \(1, 4, 1\)"):
        group_norm_backward(y[0], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        group_norm_backward(y.astype("f4"), cache)
