"""batch_norm: the reference is the equation, and everything else equals it."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.batch_norm import VERSIONS, batch_norm_backward, batch_norm_forward
from opchecks import (
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import channel_shapes, dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = batch_norm_forward, batch_norm_backward
shapes = channel_shapes.filter(lambda s: s[0] * np.prod(s[2:]) >= 2)  # training needs 2 values
epsilons = st.sampled_from([1e-5, 1e-2, 1.0])


def draw_case(seed, shape, training, dtype=np.float64):
    """Arrays x, w, b, and keyword arguments with running statistics that are not the batch's."""
    rng = np.random.default_rng((seed, 1))  # not the stream that dy is drawn from
    C = shape[1]
    x = (normal(rng, shape) + 2).astype(dtype)
    running_mean, running_var = normal(rng, C, dtype), rng.uniform(0.5, 2, C).astype(dtype)
    kwargs = {"running_mean": running_mean, "running_var": running_var, "training": training}
    return (x, normal(rng, C, dtype), normal(rng, C, dtype)), kwargs


# With eps = 15, rstd is 1/4 for values 1 from their mean and 1/8 for values 7 from it.
X = np.array([[-1.0, 3], [1, 17]])
W, B = np.array([2.0, 8]), np.array([1.0, 0])
DY = np.array([[1.0, 2], [3, -2]])


@versions
def test_hand_computed_numbers_in_training(version):
    with use(version):
        y, cache = batch_norm_forward(
            X, W, B, np.array([4.0, 0]), np.array([8.0, 0]), momentum=0.25, eps=15
        )
        dx, dw, db = batch_norm_backward(DY, cache)
    np.testing.assert_allclose(y, [[0.5, -7], [1.5, 7]], rtol=1e-14)
    np.testing.assert_allclose(dx, [[-15 / 32, 15 / 32], [15 / 32, -15 / 32]], rtol=1e-14)
    np.testing.assert_allclose(dw, [0.5, -3.5], rtol=1e-14)
    np.testing.assert_allclose(db, [4, 0], rtol=1e-14)
    # The batch's means are 0 and 10; its variances, divided by M - 1 = 1, are 2 and 98.
    np.testing.assert_allclose(cache.running_mean, [3, 2.5], rtol=1e-14)
    np.testing.assert_allclose(cache.running_var, [6.5, 24.5], rtol=1e-14)


@versions
def test_hand_computed_numbers_in_evaluation(version):
    running = np.array([1.0, 10]), np.array([1.0, 49])
    with use(version):
        y, cache = batch_norm_forward(X, W, B, *running, training=False, eps=15)
        dx, dw, db = batch_norm_backward(DY, cache)
    np.testing.assert_allclose(y, [[0, -7], [1, 7]], rtol=1e-14, atol=1e-15)
    np.testing.assert_allclose(dx, [[0.5, 2], [1.5, -2]], rtol=1e-14)  # dy * w * rstd
    np.testing.assert_allclose(dw, [-0.5, -3.5], rtol=1e-14)
    np.testing.assert_allclose(db, [4, 0], rtol=1e-14)
    np.testing.assert_array_equal(cache.running_mean, running[0])
    np.testing.assert_array_equal(cache.running_var, running[1])


@versions
@given(
    shape=shapes,
    seed=seeds,
    dtype=dtypes,
    training=st.booleans(),
    weight=st.booleans(),
    bias=st.booleans(),
    eps=epsilons,
)
def test_versions_equal_the_reference(version, shape, seed, dtype, training, weight, bias, eps):
    (x, w, b), kwargs = draw_case(seed, shape, training, dtype)
    arrays = (x, w if weight else None, b if bias else None)
    assert_equals_reference(version, *PAIR, arrays, seed, eps=eps, **kwargs)


@versions
@given(shape=shapes, seed=seeds, training=st.booleans())
def test_any_forward_serves_any_backward(version, shape, seed, training):
    (x, w, b), kwargs = draw_case(seed, shape, training)
    dy = normal(np.random.default_rng(seed), shape)
    with use("reference"):
        expected = batch_norm_backward(dy, batch_norm_forward(x, w, b, **kwargs)[1])
    for first, second in ((version, "reference"), ("reference", version)):
        with use(first):
            _, cache = batch_norm_forward(x, w, b, **kwargs)
        with use(second):
            grads = batch_norm_backward(dy, cache)
        for got, want in zip(grads, expected):
            np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)


@versions
@settings(max_examples=20)
@given(shape=shapes, seed=seeds, training=st.booleans(), eps=epsilons)
def test_gradients_equal_finite_differences(version, shape, seed, training, eps):
    arrays, kwargs = draw_case(seed, shape, training)
    # Two values a channel that nearly meet: the slope changes within a finite difference.
    assume(arrays[0].var(axis=(0, *range(2, len(shape)))).min() > 1e-3)
    assert_gradients(version, *PAIR, arrays, seed, eps=eps, **kwargs)


@versions
@given(shape=shapes, seed=seeds, layout=layouts, dtype=dtypes, training=st.booleans())
def test_memory_layout_changes_no_bit(version, shape, seed, layout, dtype, training):
    arrays, kwargs = draw_case(seed, shape, training, dtype)
    for running in (kwargs["running_mean"], kwargs["running_var"]):
        running.flags.writeable = False  # only the cache holds the new ones
    assert_layout_free(version, *PAIR, arrays, seed, layout, **kwargs)


@versions
def test_every_channel_has_its_own_statistics(version):
    rng = np.random.default_rng(0)
    x = normal(rng, (4, 3, 5, 5)) * [[[1]], [[10]], [[100]]] + [[[0]], [[-7]], [[1000]]]
    with use(version):
        y, cache = batch_norm_forward(x, running_mean=np.zeros(3), running_var=np.zeros(3))
    np.testing.assert_allclose(y.mean(axis=(0, 2, 3)), 0, atol=1e-12)
    np.testing.assert_allclose(y.var(axis=(0, 2, 3)), 1, rtol=1e-4)
    assert not np.allclose(y.mean(axis=(0, 2)), 0, atol=1e-2)  # a single column keeps its mean
    np.testing.assert_allclose(cache.running_mean, 0.1 * x.mean(axis=(0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(cache.running_var, 0.1 * x.var(axis=(0, 2, 3), ddof=1), rtol=1e-12)


@versions
def test_evaluation_uses_the_running_statistics_and_sees_one_example_at_a_time(version):
    (x, w, b), kwargs = draw_case(0, (4, 3, 2, 2), training=False)
    with use(version):
        whole, _ = batch_norm_forward(x, w, b, **kwargs)
        single, _ = batch_norm_forward(x[:1], w, b, **kwargs)
        trained, _ = batch_norm_forward(x, w, b)
    np.testing.assert_array_equal(whole[:1], single)
    assert np.abs(whole - trained).max() > 0.1


@versions
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_channel_of_equal_values_becomes_the_shift(version, dtype):
    x = np.full((4, 2, 3, 3), 0.1, dtype)
    w, b = np.ones(2, dtype), np.array([0.5, -2], dtype)
    dy = normal(np.random.default_rng(0), x.shape, dtype)
    with use(version):
        y, cache = batch_norm_forward(x, w, b)
        dx, dw, _ = batch_norm_backward(dy, cache)
    np.testing.assert_allclose(y, np.broadcast_to(b[:, None, None], y.shape), atol=1e-12)
    np.testing.assert_allclose(dw, 0, atol=1e-12)
    expected = (dy - dy.mean(axis=(0, 2, 3), keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(dx, expected, rtol=1e-4, atol=1e-3)


@versions
def test_float32_far_from_zero_keeps_its_digits(version):
    rng = np.random.default_rng(0)
    x = (1e4 + normal(rng, (8, 2, 4, 4))).astype(np.float32)
    dy = normal(rng, x.shape, np.float32)
    with use(version):
        y, cache = batch_norm_forward(
            x, running_mean=np.zeros(2, "f4"), running_var=np.zeros(2, "f4"), momentum=1
        )
        dx, _, _ = batch_norm_backward(dy, cache)
    with use("reference"):
        exact, exact_cache = batch_norm_forward(x.astype(np.float64))
        exact_dx, _, _ = batch_norm_backward(dy.astype(np.float64), exact_cache)
    np.testing.assert_allclose(y, exact, atol=1e-6)
    np.testing.assert_allclose(dx, exact_dx, atol=1e-6)
    unbiased = x.astype(np.float64).var(axis=(0, 2, 3), ddof=1)
    np.testing.assert_allclose(cache.running_var, unbiased, rtol=1e-6)


def test_long_sums_are_exact():
    x = np.full((2**20, 2), 0.1, np.float32)  # a float32 running sum is off by 1%
    y, cache = batch_norm_forward(x, b=np.zeros(2, np.float32))
    _, _, db = batch_norm_backward(x, cache)
    np.testing.assert_array_equal(y, 0)
    np.testing.assert_allclose(db, 2**20 * np.float64(x[0]), rtol=1e-7)


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_channel(version, bad):
    x = normal(np.random.default_rng(0), (2, 3, 2, 2))
    x[0, 1, 0, 0] = bad
    with use(version), np.errstate(invalid="ignore"):
        y, cache = batch_norm_forward(x, running_mean=np.zeros(3), running_var=np.ones(3))
        dx, _, _ = batch_norm_backward(np.ones_like(x), cache)
    for a in (y, dx):
        assert not np.isfinite(a[:, 1]).any()
        assert np.isfinite(a[:, [0, 2]]).all()
    for a in (cache.running_mean, cache.running_var):
        np.testing.assert_array_equal(np.isfinite(a), [True, False, True])


@versions
def test_empty_batch_in_evaluation(version):
    x, ones = np.zeros((0, 3, 2, 2)), np.ones(3)
    with use(version):
        y, cache = batch_norm_forward(x, ones, ones, ones, ones, training=False)
        dx, dw, db = batch_norm_backward(y, cache)
    assert y.shape == dx.shape == x.shape
    np.testing.assert_array_equal(dw, np.zeros(3))
    np.testing.assert_array_equal(db, np.zeros(3))


def test_what_was_not_given_stays_absent():
    y, cache = batch_norm_forward(X)
    assert cache.running_mean is None
    assert cache.running_var is None
    _, dw, db = batch_norm_backward(y, cache)
    assert dw is None
    assert db is None


@given(shape=shapes, seed=seeds, training=st.booleans(), affine=st.booleans(), eps=epsilons)
def test_equals_pytorch(torch, shape, seed, training, affine, eps):
    (x, w, b), kwargs = draw_case(seed, shape, training)

    def torch_batch_norm(x, w, b):
        running = [torch.tensor(kwargs[k]) for k in ("running_mean", "running_var")]
        return torch.nn.functional.batch_norm(x, *running, w, b, training, eps=eps)

    arrays = (x, w, b) if affine else (x, None, None)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch_batch_norm, eps=eps, **kwargs)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0])
def test_running_statistics_follow_pytorch_over_several_steps(torch, momentum):
    rng = np.random.default_rng(0)
    layer = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    mean, var = np.zeros(3), np.ones(3)
    for N in (4, 2, 5, 1):
        x = normal(rng, (N, 3, 2, 3)) * 3 + 1
        layer(torch.tensor(x))
        _, cache = batch_norm_forward(x, None, None, mean, var, momentum=momentum)
        mean, var = cache.running_mean, cache.running_var
        np.testing.assert_allclose(mean, layer.running_mean.numpy(), rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(var, layer.running_var.numpy(), rtol=1e-12)
    x = normal(rng, (2, 3, 2, 3))
    y, _ = batch_norm_forward(x, None, None, mean, var, training=False)
    expected = layer.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(y, expected, rtol=1e-10, atol=1e-12)


V = np.ones(2)


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((V,), {}, ValueError, r"batch_norm: x: expected at least 2 axes .* got shape \(2,\)"),
        (
            (np.zeros((1, 2, 1, 1)),),
            {},
            ValueError,
            r"batch_norm: x: expected more than 1 value per channel in training, got shape "
            r"\(1, 2, 1, 1\)",
        ),
        ((np.zeros((1, 2)),), {}, ValueError, r"more than 1 value .* got shape \(1, 2\)"),
        ((np.zeros((0, 2, 3)),), {}, ValueError, r"more than 1 value .* got shape \(0, 2, 3\)"),
        ((X, V[:1]), {}, ValueError, r"w: expected shape \(2,\) \(one per channel\), got \(1,\)"),
        ((X, None, np.ones(3)), {}, ValueError, r"b: expected shape \(2,\) .* got \(3,\)"),
        ((X, V, V, V[:1], V), {}, ValueError, r"running_mean: expected shape \(2,\)"),
        ((X, V, V, V, np.ones((2, 1))), {}, ValueError, r"running_var: expected shape \(2,\)"),
        ((X, V, V, V), {"training": False}, TypeError, r"running_var: .* in evaluation, got None"),
        ((X,), {"training": False}, TypeError, r"running_mean, running_var: .* got None"),
        ((X,), {"momentum": 1.5}, ValueError, r"momentum: .* >= 0 and <= 1, got 1.5"),
        ((X,), {"momentum": -0.1}, ValueError, r"momentum: .* >= 0 and <= 1, got -0.1"),
        ((X,), {"momentum": None}, TypeError, r"momentum: expected a number .* got None"),
        ((X,), {"eps": 0}, ValueError, r"eps: expected a number > 0, got 0"),
        ((X,), {"eps": np.nan}, ValueError, r"eps: expected a finite number > 0, got nan"),
        ((X,), {"eps": np.inf}, ValueError, r"eps: expected a finite number > 0, got inf"),
        ((X,), {"eps": "1"}, TypeError, r"eps: expected a number > 0, got '1'"),
        ((X.astype("f4"), V), {}, TypeError, r"w: expected float32 like x, got float64"),
        ((X, V, V, V.astype("f4")), {}, TypeError, r"running_mean: expected float64 like x"),
        ((X.astype("f2"),), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int),), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(),), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        batch_norm_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = batch_norm_forward(X)
    with pytest.raises(ValueError, match=r"batch_norm_backward: dy: expected shape \(2, 2\)"):
        batch_norm_backward(y.ravel(), cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        batch_norm_backward(y.astype("f4"), cache)
