"""conv_block: equal to the composition of its ops, and the sparse backward to the dense one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import ops, use
from minicnn.ops.conv_block import OFF, VERSIONS, conv_block_backward, conv_block_forward
from opchecks import assert_equals_reference, assert_gradients, assert_layout_free, both_ways
from strategies import conv_cases, distinct, dtypes, layouts, normal, pairs, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = conv_block_forward, conv_block_backward


@st.composite
def cases(draw):
    """A convolution, and a pool that fits on it: (x_shape, w_shape, kwargs)."""
    x_shape, w_shape, kwargs = draw(conv_cases())
    z, _ = ops.conv2d_forward(np.zeros(x_shape), np.zeros(w_shape), **kwargs)
    pool = tuple(min(k, size) for k, size in zip(draw(pairs), z.shape[2:]))
    return x_shape, w_shape, {**kwargs, "pool": pool, "relu": draw(st.booleans())}


def draw_arrays(seed, x_shape, w_shape, dtype=np.float64, bias=True):
    rng = np.random.default_rng((seed, 1))
    x, w = normal(rng, x_shape, dtype), normal(rng, w_shape, dtype)
    return x, w, normal(rng, w_shape[:1], dtype) if bias else None


@versions
def test_hand_computed_numbers(version):
    # Windows: the maximum is a tie, the ReLU is off, the last of the window wins; a column is left.
    x = np.array([[3.0, 3, -1, -2, 0, 1, 9], [2, 3, -3, -1, 2, 4, 9]]).reshape(1, 1, 2, 7)
    with use(version):
        y, cache = conv_block_forward(x, np.ones((1, 1, 1, 1)), np.zeros(1), pool=2)
        dx, dw, db = conv_block_backward(np.array([10.0, 20, 30]).reshape(1, 1, 1, 3), cache)
    np.testing.assert_array_equal(y.ravel(), [3, 0, 4])
    np.testing.assert_array_equal(cache.winner.ravel(), [0, OFF, 3])
    expected = np.zeros_like(x)
    expected[0, 0, 0, 0], expected[0, 0, 1, 5] = 10, 30
    np.testing.assert_array_equal(dx, expected)
    assert dw.item() == 10 * 3 + 30 * 4
    assert db.item() == 40


@given(case=cases(), seed=seeds)
def test_equals_the_plain_ops(case, seed):
    x_shape, w_shape, kwargs = case
    pool, relu = kwargs.pop("pool"), kwargs.pop("relu")
    x, w, b = draw_arrays(seed, x_shape, w_shape)
    z, conv = ops.conv2d_forward(x, w, b, **kwargs)
    u, activation = ops.relu_forward(z)
    y, pooling = ops.max_pool2d_forward(u if relu else z, pool)
    got, dy, grads = both_ways("numpy", *PAIR, (x, w, b), seed, pool=pool, relu=relu, **kwargs)
    dz = ops.max_pool2d_backward(dy, pooling)
    expected = ops.conv2d_backward(ops.relu_backward(dz, activation) if relu else dz, conv)
    np.testing.assert_array_equal(got, y)
    for a, e in zip(grads, expected):
        np.testing.assert_allclose(a, e, rtol=1e-12, atol=1e-12)


@versions
@given(case=cases(), seed=seeds, dtype=dtypes, bias=st.booleans())
def test_versions_equal_the_reference(version, case, seed, dtype, bias):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, dtype, bias)
    assert_equals_reference(version, *PAIR, arrays, seed, **kwargs)


@versions
@settings(max_examples=10)
@given(seed=seeds, relu=st.booleans(), pool=st.sampled_from([1, 2, (2, 1)]))
def test_gradients_equal_finite_differences(version, seed, relu, pool):
    rng = np.random.default_rng(seed)
    x = distinct(rng, (2, 1, 4, 4))  # sums of two are apart as well: 1 and 100 times a pixel
    w = np.array([[1.0, 100.0], [-100.0, 1.0]]).reshape(2, 1, 1, 2)
    assert_gradients(version, *PAIR, (x, w, np.array([0.003, -0.003])), seed, relu=relu, pool=pool)


@versions
@settings(max_examples=20)
@given(case=cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, dtype)
    assert_layout_free(version, *PAIR, arrays, seed, layout, **kwargs)


@versions
def test_empty_batch(version):
    with use(version):
        y, cache = conv_block_forward(np.zeros((0, 2, 6, 6)), np.ones((3, 2, 3, 3)), pool=2)
        dx, dw, db = conv_block_backward(y, cache)
    assert y.shape == (0, 3, 2, 2)
    assert dx.shape == (0, 2, 6, 6)
    np.testing.assert_array_equal(dw, np.zeros((3, 2, 3, 3)))
    assert db is None


@versions
def test_nan_wins_and_gets_the_gradient(version):
    x = np.ones((1, 1, 2, 4))
    x[0, 0, 1, 2] = np.nan
    with use(version):
        y, cache = conv_block_forward(x, np.ones((1, 1, 1, 1)), pool=2)
        dx, dw, _ = conv_block_backward(np.array([2.0, 3.0]).reshape(y.shape), cache)
    np.testing.assert_array_equal(y.ravel(), [1, np.nan])
    np.testing.assert_array_equal(cache.winner.ravel(), [0, 2])
    np.testing.assert_array_equal(dx.reshape(2, 4), [[2, 0, 0, 0], [0, 0, 3, 0]])
    assert np.isnan(dw).all()


@versions
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_infinity_spreads_as_in_the_reference(version, where):
    x, w, _ = draw_arrays(0, (2, 3, 6, 6), (4, 3, 3, 3))
    dy = normal(np.random.default_rng(1), (2, 4, 2, 2))
    {"x": x, "w": w, "dy": dy}[where][0, 1, 0, 0] = -np.inf
    results = []
    for name in (version, "reference"):
        with use(name), np.errstate(invalid="ignore"):
            y, cache = conv_block_forward(x, w, pool=2)
            results.append((y, *conv_block_backward(dy, cache)[:2]))
    for got, want in zip(*results):
        if (
            version == "cupy"
        ):  # multiplies with zeros where a tap meets no window: more of dx is NaN
            assert not np.isfinite(got[~np.isfinite(want)]).any()
        else:
            np.testing.assert_array_equal(np.isfinite(got), np.isfinite(want))


X, W = np.zeros((2, 4, 6, 6)), np.zeros((6, 4, 3, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], W), {}, ValueError, r"conv_block: x: expected 4 axes \(N, C, H, W\)"),
        ((X, W[0]), {}, ValueError, r"conv_block: w: expected 4 axes"),
        ((X[:, :3], W), {}, ValueError, r"w: expected shape \(F, 3 / groups, KH, KW\)"),
        ((X, W), {"groups": 3}, ValueError, r"got \(6, 4, 3, 3\) with groups 3"),
        ((X, W[:0]), {}, ValueError, r"w: expected shape"),
        ((X, W, np.zeros(5)), {}, ValueError, r"b: expected shape \(6,\) \(one per filter\)"),
        ((X, W), {"pool": 5}, ValueError, r"pool: expected less than 255 pixels, .* the 4x4 of"),
        ((np.zeros((1, 4, 20, 20)), W), {"pool": (17, 15)}, ValueError, r"pool: .* \(17, 15\)"),
        ((X, W), {"pool": 0}, ValueError, r"pool: expected an integer >= 1, got 0"),
        ((X, np.zeros((6, 4, 7, 3))), {}, ValueError, r"conv_block: kernel_size: expected at most"),
        ((X.astype("f4"), W), {}, TypeError, r"conv_block: w: expected float32 like x"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        conv_block_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = conv_block_forward(X, W, pool=2)
    with pytest.raises(ValueError, match=r"conv_block_backward: dy: expected shape \(2, 6, 2, 2\)"):
        conv_block_backward(y[:1], cache)
