"""adaptive_avg_pool2d: means over bins that cover the map, whatever its size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.adaptive_avg_pool2d import (
    VERSIONS,
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
)
from minicnn.ops.avg_pool2d import avg_pool2d_backward, avg_pool2d_forward
from opchecks import (
    assert_adjoint,
    assert_any_threads,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward
x_shapes = st.tuples(*[st.integers(1, 2)] * 2, *[st.integers(1, 9)] * 2)
_size = st.one_of(st.none(), st.integers(1, 6))
output_sizes = st.one_of(st.integers(1, 6), st.tuples(_size, _size))


def draw_x(seed, x_shape, dtype=np.float64):
    return normal(np.random.default_rng(seed), x_shape, dtype)


@versions
def test_hand_computed_numbers(version):
    x = np.array([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    with use(version):
        y, cache = adaptive_avg_pool2d_forward(x, (1, 2))  # columns 0-1 and 1-2 share column 1
        dx = adaptive_avg_pool2d_backward(np.array([[[[6.0, 12]]]]), cache)
    np.testing.assert_allclose(y, [[[[4.5, 5.5]]]], rtol=1e-15)
    np.testing.assert_allclose(dx, [[[[1, 3, 2]] * 3]], rtol=1e-15)


@versions
def test_bins_may_be_finer_than_the_map(version):
    with use(version):
        y, _ = adaptive_avg_pool2d_forward(np.array([[[[0.0, 6.0]]]]), (2, 3))
    np.testing.assert_array_equal(y, [[[[0, 3, 6], [0, 3, 6]]]])


@pytest.mark.parametrize(
    ("output_size", "expected"),
    [
        (3, (3, 3)),
        ((2, 3), (2, 3)),
        ([2, 3], (2, 3)),
        ((None, 3), (5, 3)),
        ((3, None), (3, 7)),
        ((None, None), (5, 7)),
        (None, (5, 7)),
    ],
)
def test_none_keeps_the_size(output_size, expected):
    y, _ = adaptive_avg_pool2d_forward(np.zeros((1, 1, 5, 7)), output_size)
    assert y.shape == (1, 1, *expected)


@versions
def test_the_same_size_is_a_copy(version):
    x = draw_x(0, (1, 2, 3, 4))
    with use(version):
        y, _ = adaptive_avg_pool2d_forward(x, None)
    np.testing.assert_array_equal(y, x)
    assert not np.shares_memory(x, y)


@versions
@given(x_shape=x_shapes, output_size=output_sizes, seed=seeds, dtype=dtypes)
def test_versions_equal_the_reference(version, x_shape, output_size, seed, dtype):
    x = draw_x(seed, x_shape, dtype)
    assert_equals_reference(version, *PAIR, (x,), seed, output_size=output_size)


@versions
@settings(max_examples=15)
@given(x_shape=x_shapes, output_size=output_sizes, seed=seeds)
def test_gradients_equal_finite_differences(version, x_shape, output_size, seed):
    assert_gradients(version, *PAIR, (draw_x(seed, x_shape),), seed, output_size=output_size)


@versions
@given(x_shape=x_shapes, output_size=output_sizes, seed=seeds)
def test_backward_is_the_adjoint(version, x_shape, output_size, seed):
    assert_adjoint(version, *PAIR, (draw_x(seed, x_shape),), seed, output_size=output_size)


@versions
@given(x_shape=x_shapes, output_size=output_sizes, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, x_shape, output_size, seed, layout, dtype):
    x = draw_x(seed, x_shape, dtype)
    assert_layout_free(version, *PAIR, (x,), seed, layout, output_size=output_size)


@versions
def test_where_the_sizes_divide_it_is_average_pooling(version):
    x = draw_x(0, (2, 3, 6, 8))
    with use(version):
        y, cache = adaptive_avg_pool2d_forward(x, (3, 2))
        expected, plain = avg_pool2d_forward(x, (2, 4))
        dx, dx_expected = adaptive_avg_pool2d_backward(y, cache), avg_pool2d_backward(y, plain)
    np.testing.assert_allclose(y, expected, rtol=1e-12)
    np.testing.assert_allclose(dx, dx_expected, rtol=1e-12)


@versions
def test_empty_batch(version):
    with use(version):
        y, cache = adaptive_avg_pool2d_forward(np.zeros((0, 2, 5, 5)), 3)
        dx = adaptive_avg_pool2d_backward(y, cache)
    assert y.shape == (0, 2, 3, 3)
    assert dx.shape == (0, 2, 5, 5)


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_bins(version, bad):
    x = np.zeros((1, 1, 3, 3))
    x[0, 0, 0, 1] = bad
    with use(version):
        y, cache = adaptive_avg_pool2d_forward(x, 2)
        dx = adaptive_avg_pool2d_backward(y, cache)
    np.testing.assert_array_equal(y, [[[[bad, bad], [0, 0]]]])
    np.testing.assert_array_equal(dx[0, 0, 2], [0, 0, 0])


@given(x_shape=x_shapes, output_size=output_sizes, seed=seeds)
def test_equals_pytorch(torch, x_shape, output_size, seed):
    def torch_adaptive(x):
        return torch.nn.functional.adaptive_avg_pool2d(x, output_size)

    arrays = (draw_x(seed, x_shape),)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch_adaptive, output_size=output_size)


X = np.zeros((2, 3, 5, 6))


@pytest.mark.parametrize(
    ("x", "output_size", "error", "message"),
    [
        (X[0], 2, ValueError, r"adaptive_avg_pool2d: x: expected 4 axes .* got shape \(3, 5, 6\)"),
        (X[:, :, :0], 2, ValueError, r"x: expected at least one pixel, got 0x6"),
        (X[..., :0], None, ValueError, r"x: expected at least one pixel, got 5x0"),
        (X, 0, ValueError, r"output_size: expected an integer >= 1, got 0"),
        (X, (None, -1), ValueError, r"output_size: expected an integer >= 1, got -1"),
        (X, (2,), ValueError, r"output_size: expected an int or a pair, got \(2,\)"),
        (X, (2, 2, None), ValueError, r"output_size: expected an int or a pair"),
        (X, 2.0, TypeError, r"output_size: expected an integer >= 1, got 2.0"),
        (X, "2x2", TypeError, r"output_size: expected an integer >= 1, got '2x2'"),
        (X.astype("f2"), 2, TypeError, r"x: expected float32 or float64, got float16"),
        (X.astype(int), 2, TypeError, r"x: expected float32 or float64, got int64"),
        (X.tolist(), 2, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(x, output_size, error, message):
    with pytest.raises(error, match=message):
        adaptive_avg_pool2d_forward(x, output_size)


def test_bad_upstream_gradient_is_named():
    y, cache = adaptive_avg_pool2d_forward(X, 2)
    with pytest.raises(ValueError, match=r"adaptive_avg_pool2d_backward: dy: expected shape"):
        adaptive_avg_pool2d_backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        adaptive_avg_pool2d_backward(y.astype("f4"), cache)


@pytest.mark.parametrize("maps", [1, 19, 33])
@pytest.mark.parametrize("output_size", [1, (3, 5), (71, 1), (100, 80)])
def test_numba_takes_any_number_of_maps_of_many_bands(maps, output_size):
    pytest.importorskip("numba", reason="Numba is not installed")
    rng, results = np.random.default_rng(0), []
    x = normal(rng, (1, maps, 71, 61))
    for version in ("numpy", "numba"):
        with use(version):
            y, cache = adaptive_avg_pool2d_forward(x, output_size)
            dy = normal(np.random.default_rng(1), y.shape)
            results.append((y, adaptive_avg_pool2d_backward(dy, cache)))
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_number_of_threads_changes_no_bit():
    x = normal(np.random.default_rng(0), (7, 5, 33, 35), np.float32)
    assert_any_threads(
        "numba", adaptive_avg_pool2d_forward, adaptive_avg_pool2d_backward, (x,), 0, output_size=4
    )
