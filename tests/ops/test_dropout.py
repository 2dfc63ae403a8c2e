"""dropout: given its mask it is a multiplication; the mask is drawn as asked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emulator.cuda import Function
from minicnn import to_cpu, to_gpu, use
from minicnn.ops.dropout import VERSIONS, DropoutCache, dropout_backward, dropout_forward
from opchecks import (
    assert_adjoint,
    assert_equals_reference,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = dropout_forward, dropout_backward
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4)
rates = st.sampled_from([0, 0.1, 0.5, 0.8, 1])


def draw_x(seed, shape, dtype=np.float64):
    return normal(np.random.default_rng((seed, 1)), shape, dtype)  # dy has the stream of seed


@versions
def test_hand_computed_numbers(version):
    x = np.array([[1.0, -2, 3], [4, 5, -6]])
    with use(version):
        y, cache = dropout_forward(x, p=0.75, rng=5)
        cache = cache._replace(mask=np.array([[4.0, 0, 4], [0, 0, 4]]))
        dx = dropout_backward(np.array([[1.0, 2, 3], [4, 5, 6]]), cache)
    np.testing.assert_array_equal(dx, [[4, 0, 12], [0, 0, 24]])
    kept = np.random.default_rng(5).random((2, 3), np.float32) >= 0.75
    assert 0 < kept.sum() < 6
    np.testing.assert_array_equal(y, np.where(kept, 4 * x, 0))


@versions
@given(shape=shapes, seed=seeds, dtype=dtypes, p=rates, training=st.booleans())
def test_versions_equal_the_reference(version, shape, seed, dtype, p, training):
    x = draw_x(seed, shape, dtype)
    assert_equals_reference(version, *PAIR, (x,), seed, p=p, training=training, rng=seed)


@versions
@settings(max_examples=20)
@given(shape=shapes, seed=seeds, p=rates, training=st.booleans())
def test_gradients_equal_finite_differences(version, shape, seed, p, training):
    assert_gradients(version, *PAIR, (draw_x(seed, shape),), seed, p=p, training=training, rng=seed)


@versions
@given(shape=shapes, seed=seeds, p=rates)
def test_backward_is_the_adjoint(version, shape, seed, p):
    assert_adjoint(version, *PAIR, (draw_x(seed, shape),), seed, p=p, rng=seed)


@versions
@given(shape=shapes, seed=seeds, layout=layouts, dtype=dtypes, p=rates)
def test_memory_layout_changes_no_bit(version, shape, seed, layout, dtype, p):
    x = draw_x(seed, shape, dtype)
    assert_layout_free(version, *PAIR, (x,), seed, layout, p=p, rng=seed)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_share_of_zeros_is_p_everywhere_and_the_mean_is_kept(p, dtype):
    n = 400
    y, _ = dropout_forward(np.ones((n, n), dtype), p, rng=np.random.default_rng(1))
    assert y.dtype == dtype
    np.testing.assert_allclose(np.unique(y), [0, 1 / (1 - p)], rtol=1e-6)
    dropped, sigma = y == 0, np.sqrt(p * (1 - p))
    assert abs(dropped.mean() - p) < 4 * sigma / n
    assert abs(y.mean() - 1) < 4 * sigma / n / (1 - p)
    for axis in (0, 1):  # each row and each column on its own, with the spread of n free draws
        rates = dropped.mean(axis=axis)
        assert np.abs(rates - p).max() < 5 * sigma / np.sqrt(n)
        assert 0.8 < rates.std() * np.sqrt(n) / sigma < 1.2


def test_a_generator_moves_on_and_a_seed_repeats():
    x = np.ones((20, 20))
    rng = np.random.default_rng(7)
    first, _ = dropout_forward(x, rng=rng)
    second, _ = dropout_forward(x, rng=rng)
    assert (first != second).any()
    for seed in (7, np.int64(7), np.random.default_rng(7)):
        np.testing.assert_array_equal(dropout_forward(x, rng=seed)[0], first)
    assert (dropout_forward(x, rng=8)[0] != first).any()
    np.testing.assert_array_equal(dropout_forward(x.astype("f4"), rng=7)[0], first)


@versions
def test_every_version_draws_the_same_mask(version):
    x = np.ones((5, 7))
    with use(version):
        y, _ = dropout_forward(x, p=0.3, rng=np.random.default_rng(3))
    np.testing.assert_array_equal(y, dropout_forward(x, p=0.3, rng=np.random.default_rng(3))[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_one_launch_a_pass_with_the_masks_of_the_cpu(cupy, imitated, monkeypatch, dtype):
    x = draw_x(0, (3, 5, 7), dtype)
    expected, _ = dropout_forward(x, 0.3, rng=np.random.default_rng(3))
    there = to_gpu(x)
    monkeypatch.setattr(Function, "launches", 0)
    with monkeypatch.context() as m:
        m.setattr(cupy.ndarray, "__mul__", None)  # the kernels do all of it
        y, cache = dropout_forward(there, 0.3, rng=np.random.default_rng(3))
        dx = dropout_backward(there, cache)
    assert Function.launches == 2
    assert to_cpu(y).tobytes() == to_cpu(dx).tobytes() == expected.tobytes()


@versions
@pytest.mark.parametrize("kwargs", [{"p": 0}, {"p": 0.0}, {"training": False}])
def test_p_0_and_evaluation_leave_x_alone_and_draw_nothing(version, kwargs):
    x, rng = draw_x(0, (3, 4)), np.random.default_rng(0)
    with use(version):
        for generator in (None, rng):
            y, cache = dropout_forward(x, rng=generator, **kwargs)
            np.testing.assert_array_equal(y, x)
            assert not np.shares_memory(y, x)
            np.testing.assert_array_equal(dropout_backward(2 * x, cache), 2 * x)
    assert rng.bit_generator.state == np.random.default_rng(0).bit_generator.state


@versions
def test_p_1_gives_zeros_and_draws_nothing(version):
    x = draw_x(0, (3, 4))
    with use(version):
        y, cache = dropout_forward(x, p=1)
        dx = dropout_backward(x, cache)
    np.testing.assert_array_equal(y, np.zeros((3, 4)))
    np.testing.assert_array_equal(dx, np.zeros((3, 4)))


@versions
@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_empty_batch(version, p):
    with use(version):
        y, cache = dropout_forward(np.zeros((0, 3)), p, rng=0)
        dx = dropout_backward(y, cache)
    assert y.shape == dx.shape == (0, 3)


@versions
@pytest.mark.parametrize("p", [0, 0.5, 1])
def test_nan_survives_even_where_dropped(version, p):
    with use(version):
        y, _ = dropout_forward(np.full((4, 4), np.nan), p, rng=0)
    assert np.isnan(y).all()


@versions
def test_inf_stays_where_kept(version):
    x = np.full((4, 4), np.inf)
    with use(version), np.errstate(invalid="ignore"):
        y, cache = dropout_forward(x, 0.5, rng=0)
    np.testing.assert_array_equal(np.isinf(y), cache.mask == 2)
    np.testing.assert_array_equal(np.isnan(y), cache.mask == 0)


@versions
@pytest.mark.parametrize("p", [0, 0.3, 1])
def test_equals_pytorch_given_its_mask(torch, version, p):
    x, ones = torch.tensor(draw_x(0, (6, 7))), torch.ones((6, 7), dtype=torch.float64)
    dropout = torch.nn.functional.dropout
    with torch.random.fork_rng():
        torch.manual_seed(0)
        mask = dropout(ones, p)
        torch.manual_seed(0)
        expected = dropout(x, p)
    with use(version):
        y, cache = dropout_forward(x.numpy(), p, rng=0)
        given = DropoutCache(mask.numpy(), x.shape)
        masked = dropout_backward(x.numpy(), given)  # forward and backward are the same map
    np.testing.assert_allclose(masked, expected.numpy(), rtol=1e-15)
    if p:
        assert set(np.unique(cache.mask)) == set(np.unique(mask.numpy()))
        np.testing.assert_array_equal(y, x.numpy() * cache.mask)


X = np.zeros((2, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X, 1.5), {"rng": 0}, ValueError, r"dropout: p: .* >= 0 and <= 1, got 1.5"),
        ((X, -0.1), {"rng": 0}, ValueError, r"p: .* >= 0 and <= 1, got -0.1"),
        ((X, -0.1), {"training": False}, ValueError, r"p: .* >= 0 and <= 1, got -0.1"),
        ((X, np.nan), {"rng": 0}, ValueError, r"p: .* >= 0 and <= 1, got nan"),
        ((X, "0.5"), {"rng": 0}, TypeError, r"p: expected a number .* got '0.5'"),
        ((X, None), {"rng": 0}, TypeError, r"p: expected a number .* got None"),
        ((X,), {}, TypeError, r"dropout: rng: expected .* got None \(fix: pass a Generator"),
        ((X,), {"rng": "seed"}, TypeError, r"dropout: rng: expected .* got 'seed'"),
        ((X,), {"rng": np.random}, TypeError, r"dropout: rng: expected .* got <module"),
        ((X,), {"rng": -1}, ValueError, r"dropout: rng: expected .* got -1"),
        ((X.astype("f2"),), {"rng": 0}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int),), {"rng": 0}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(),), {"rng": 0}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        dropout_forward(*args, **kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_bad_upstream_gradient_is_named(training):
    y, cache = dropout_forward(X, training=training, rng=0)
    with pytest.raises(ValueError, match=r"dropout_backward: dy: expected shape \(2, 3\) \(like y"):
        dropout_backward(y[:1], cache)
    with pytest.raises(TypeError, match=r"dropout_backward: dy: expected .* got list"):
        dropout_backward(y.tolist(), cache)
    if training:
        with pytest.raises(TypeError, match=r"dy: expected float64 like mask, got float32"):
            dropout_backward(y.astype("f4"), cache)
