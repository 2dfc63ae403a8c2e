"""conv2d: the reference is the equation, and everything else equals it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import ops, use
from minicnn.ops import conv2d
from minicnn.shapes import window
from opchecks import (
    assert_adjoint,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import conv_cases, dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", conv2d.VERSIONS)
PAIR = ops.conv2d_forward, ops.conv2d_backward


def draw_arrays(seed, x_shape, w_shape, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple(normal(rng, s, dtype) for s in (x_shape, w_shape, w_shape[:1]))


def test_hand_computed_numbers():
    x = np.array([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    w = np.array([[[[1.0, 0], [0, -1]]]])
    y, cache = ops.conv2d_forward(x, w, np.array([0.5]))
    np.testing.assert_array_equal(y, [[[[-3.5, -3.5], [-3.5, -3.5]]]])
    dx, dw, db = ops.conv2d_backward(np.array([[[[1.0, 2], [3, 4]]]]), cache)
    np.testing.assert_array_equal(dx, [[[[1, 2, 0], [3, 3, -2], [0, -3, -4]]]])
    np.testing.assert_array_equal(dw, [[[[37, 47], [67, 77]]]])
    np.testing.assert_array_equal(db, [10])


@versions
@given(case=conv_cases(), seed=seeds, dtype=dtypes, bias=st.booleans())
def test_versions_equal_the_reference(version, case, seed, dtype, bias):
    x_shape, w_shape, kwargs = case
    x, w, b = draw_arrays(seed, x_shape, w_shape, dtype)
    assert_equals_reference(version, *PAIR, (x, w, b if bias else None), seed, **kwargs)


@versions
@settings(max_examples=15)
@given(case=conv_cases(), seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    x_shape, w_shape, kwargs = case
    assert_gradients(version, *PAIR, draw_arrays(seed, x_shape, w_shape), seed, **kwargs)


@versions
@given(case=conv_cases(), seed=seeds)
def test_backward_is_the_adjoint(version, case, seed):
    x_shape, w_shape, kwargs = case
    x, w, _ = draw_arrays(seed, x_shape, w_shape)
    assert_adjoint(version, *PAIR, (x, w), seed, **kwargs)


@versions
@given(case=conv_cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, dtype)
    assert_layout_free(version, *PAIR, arrays, seed, layout, **kwargs)


@versions
def test_empty_batch(version):
    with use(version):
        y, cache = ops.conv2d_forward(np.zeros((0, 2, 5, 5)), np.ones((4, 2, 3, 3)), np.ones(4))
        dx, dw, db = ops.conv2d_backward(y, cache)
    assert y.shape == (0, 4, 3, 3)
    assert dx.shape == (0, 2, 5, 5)
    assert not dw.any()
    assert not db.any()


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_reach_the_output(version, bad):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 1, 1] = bad
    with use(version):
        y, _ = ops.conv2d_forward(x, np.ones((1, 1, 2, 2)))
    assert np.isfinite(y).sum() == 9 - 4


def test_blocks_of_the_batch_give_the_whole_batch(monkeypatch):
    x, w, b = draw_arrays(0, (5, 2, 6, 6), (3, 2, 3, 3))
    with use("reference"):
        whole, cache = ops.conv2d_forward(x, w, b)
        grads = ops.conv2d_backward(whole, cache)
    monkeypatch.setattr(conv2d, "COLS_BYTES", 2 * 18 * 16 * 8)  # two images a block, one left
    y, cache = ops.conv2d_forward(x, w, b)
    np.testing.assert_allclose(y, whole, rtol=1e-12)
    for a, e in zip(ops.conv2d_backward(whole, cache), grads):
        np.testing.assert_allclose(a, e, rtol=1e-12)


def test_no_bias_has_no_gradient():
    y, cache = ops.conv2d_forward(X, W)
    assert ops.conv2d_backward(y, cache)[2] is None


@given(case=conv_cases(), seed=seeds)
def test_equals_pytorch(torch, case, seed):
    x_shape, w_shape, kwargs = case
    (top, bottom), (left, right) = window("", 1, padding=kwargs["padding"]).padding

    def torch_conv2d(x, w, b):
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        return torch.nn.functional.conv2d(x, w, b, **{**kwargs, "padding": 0})

    arrays = draw_arrays(seed, x_shape, w_shape)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch_conv2d, **kwargs)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("kernel", [1, 2, 3, (2, 5)])
def test_same_padding_keeps_the_size(kernel, torch):
    x = normal(np.random.default_rng(0), (1, 1, 7, 6))
    w = normal(np.random.default_rng(1), (1, 1, *np.broadcast_to(kernel, 2)))
    y, _ = ops.conv2d_forward(x, w, padding="same", dilation=1)
    expected = torch.nn.functional.conv2d(torch.tensor(x), torch.tensor(w), padding="same")
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12, atol=1e-14)


X, W = np.zeros((2, 4, 5, 5)), np.zeros((6, 4, 3, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], W), {}, ValueError, r"conv2d: x: expected 4 axes .* got shape \(4, 5, 5\)"),
        ((X, W[0]), {}, ValueError, r"conv2d: w: expected 4 axes"),
        (
            (X[:, :3], W),
            {},
            ValueError,
            r"x: expected 4 channels \(w.shape\[1\] .*got 3",
        ),
        ((X, W), {"groups": 2}, ValueError, r"x: expected 8 channels"),
        ((X, W[:5, :2]), {"groups": 2}, ValueError, r"groups: expected a divisor of the 5 filters"),
        ((X, W), {"groups": 0}, ValueError, r"groups: expected an integer >= 1, got 0"),
        ((X, W, np.zeros(5)), {}, ValueError, r"b: expected shape \(6,\) .* got \(5,\)"),
        ((X, W[:0]), {}, ValueError, r"w: expected no axis of length 0"),
        ((X, W), {"stride": 0}, ValueError, r"stride: expected an integer >= 1, got 0"),
        ((X, W), {"stride": (1, -1)}, ValueError, r"stride: expected an integer >= 1, got -1"),
        ((X, W), {"stride": 1.5}, TypeError, r"stride: expected an integer >= 1, got 1.5"),
        ((X, W), {"stride": (1, 2, 3)}, ValueError, r"stride: expected an int or a pair"),
        ((X, W), {"dilation": 0}, ValueError, r"dilation: expected an integer >= 1, got 0"),
        ((X, W), {"padding": -1}, ValueError, r"padding: expected an integer >= 0, got -1"),
        ((X, W), {"padding": ((0, -2), 0)}, ValueError, r"padding: .* got -2"),
        ((X, W), {"padding": "full"}, ValueError, r"padding: expected .* got 'full'"),
        ((X, W), {"padding": "same", "stride": 2}, ValueError, r"padding: .* got 'same'"),
        ((X, W), {"dilation": 3}, ValueError, r"kernel_size: .* padded input 5x5, got 7x7"),
        ((X.astype("f4"), W), {}, TypeError, r"w: expected float32 like x, got float64"),
        ((X.astype("f2"), W), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), W), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), W), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        ops.conv2d_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = ops.conv2d_forward(X, W)
    with pytest.raises(ValueError, match=r"conv2d_backward: dy: expected shape .*like y"):
        ops.conv2d_backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        ops.conv2d_backward(y.astype("f4"), cache)
