"""avg_pool2d: the mean under the window, and PyTorch's rules for what counts in it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.avg_pool2d import VERSIONS, avg_pool2d_backward, avg_pool2d_forward
from opchecks import (
    assert_adjoint,
    assert_any_threads,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, pool_cases, seeds, wide_pool_cases

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = avg_pool2d_forward, avg_pool2d_backward
divisors = st.fixed_dictionaries(
    {"count_include_pad": st.booleans(), "divisor_override": st.sampled_from([None, None, 1, 5])}
)


def draw_x(seed, x_shape, dtype=np.float64):
    return normal(np.random.default_rng(seed), x_shape, dtype)


@versions
def test_hand_computed_numbers(version):
    x = np.array([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
    with use(version):
        y, cache = avg_pool2d_forward(x, 2, stride=1)
        dx = avg_pool2d_backward(np.array([[[[4.0, 8], [12, 16]]]]), cache)
    np.testing.assert_array_equal(y, [[[[3, 4], [6, 7]]]])
    np.testing.assert_array_equal(dx, [[[[1, 3, 2], [4, 10, 6], [3, 7, 4]]]])


@versions
@pytest.mark.parametrize(
    ("kwargs", "corner_counts"),
    [
        # A 4x4 map, padded by 1, under 3x3 windows two apart: the last ones reach past the padding.
        ({}, [[9, 9, 6], [9, 9, 6], [6, 6, 4]]),
        ({"count_include_pad": False}, [[4, 6, 2], [6, 9, 3], [2, 3, 1]]),
        ({"divisor_override": 5}, np.full((3, 3), 5)),
        ({"divisor_override": 5, "count_include_pad": False}, np.full((3, 3), 5)),
    ],
)
def test_what_counts_in_the_mean(version, kwargs, corner_counts):
    with use(version):
        y, _ = avg_pool2d_forward(np.ones((1, 1, 4, 4)), 3, 2, 1, ceil_mode=True, **kwargs)
    pixels = np.array([[4, 6, 2], [6, 9, 3], [2, 3, 1]])
    np.testing.assert_array_equal(y[0, 0], pixels / corner_counts)


@versions
@given(case=pool_cases(), seed=seeds, dtype=dtypes, divisor=divisors)
def test_versions_equal_the_reference(version, case, seed, dtype, divisor):
    x_shape, kwargs = case
    x = draw_x(seed, x_shape, dtype)
    assert_equals_reference(version, *PAIR, (x,), seed, **kwargs, **divisor)


@versions
@settings(max_examples=15)
@given(case=pool_cases(), seed=seeds, divisor=divisors)
def test_gradients_equal_finite_differences(version, case, seed, divisor):
    x_shape, kwargs = case
    assert_gradients(version, *PAIR, (draw_x(seed, x_shape),), seed, **kwargs, **divisor)


@versions
@given(case=pool_cases(), seed=seeds, divisor=divisors)
def test_backward_is_the_adjoint(version, case, seed, divisor):
    x_shape, kwargs = case
    assert_adjoint(version, *PAIR, (draw_x(seed, x_shape),), seed, **kwargs, **divisor)


@versions
@given(case=pool_cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    x_shape, kwargs = case
    assert_layout_free(version, *PAIR, (draw_x(seed, x_shape, dtype),), seed, layout, **kwargs)


@versions
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5)])
def test_empty_batch(version, shape):
    with use(version):
        y, cache = avg_pool2d_forward(np.zeros(shape), 3, stride=2, padding=1)
        dx = avg_pool2d_backward(y, cache)
    assert y.shape == (*shape[:2], 3, 3)
    assert dx.shape == shape


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_in_their_windows(version, bad):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 1, 1] = bad
    with use(version):
        y, cache = avg_pool2d_forward(x, 2, stride=1)
        dx = avg_pool2d_backward(y, cache)
    expected = np.zeros((3, 3))
    expected[:2, :2] = bad
    np.testing.assert_array_equal(y[0, 0], expected)
    assert np.isfinite(dx).sum() == 16 - 9


def test_a_large_float32_map_keeps_its_mean():
    x = np.full((1, 1, 2000, 2000), 0.1, np.float32)
    y, _ = avg_pool2d_forward(x, 2000)
    np.testing.assert_allclose(y, 0.1, rtol=1e-4)


@given(case=pool_cases(equal_sides=True), seed=seeds, divisor=divisors)
def test_equals_pytorch(torch, case, seed, divisor):
    x_shape, kwargs = case

    def torch_avg_pool2d(x):
        return torch.nn.functional.avg_pool2d(x, **kwargs, **divisor)

    arrays = (draw_x(seed, x_shape),)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch_avg_pool2d, **kwargs, **divisor)


@given(case=pool_cases(), seed=seeds, include_pad=st.booleans())
def test_unequal_sides_equal_pytorch_on_a_padded_map(torch, case, seed, include_pad):
    x_shape, kwargs = case
    (top, bottom), (left, right) = kwargs.pop("padding")
    kwargs["ceil_mode"] = False  # its rule looks at the padding, which PyTorch would not see

    def padded_mean(x):
        x = torch.nn.functional.pad(x, (left, right, top, bottom))
        return torch.nn.functional.avg_pool2d(x, **kwargs)

    def torch_avg_pool2d(x):
        return padded_mean(x) / (1 if include_pad else padded_mean(torch.ones_like(x)))

    ours = {**kwargs, "padding": ((top, bottom), (left, right)), "count_include_pad": include_pad}
    x = draw_x(seed, x_shape)
    assert_equals_torch(torch, *PAIR, (x,), seed, torch_avg_pool2d, **ours)


X = np.zeros((2, 3, 5, 6))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], 2), {}, ValueError, r"avg_pool2d: x: expected 4 axes .* got shape \(3, 5, 6\)"),
        ((X, 6), {}, ValueError, r"avg_pool2d: kernel_size: .* the padded input 5x6, got 6x6"),
        ((X, 0), {}, ValueError, r"kernel_size: expected an integer >= 1, got 0"),
        ((X, (2, -1)), {}, ValueError, r"kernel_size: expected an integer >= 1, got -1"),
        ((X, 2), {"stride": 0}, ValueError, r"stride: expected an integer >= 1, got 0"),
        ((X, 2), {"stride": 1.5}, TypeError, r"stride: expected an integer >= 1, got 1.5"),
        ((X, 2), {"padding": -1}, ValueError, r"padding: expected an integer >= 0, got -1"),
        ((X, 2), {"padding": "same"}, TypeError, r"padding: expected an integer .* got 'same'"),
        ((X, 3), {"padding": 2}, ValueError, r"avg_pool2d: padding: expected at most half"),
        ((X[:, :, :0], 2), {"padding": 1}, ValueError, r"avg_pool2d: x: .*, got 0x6"),
        ((X, 2), {"divisor_override": 0}, ValueError, r"divisor_override: .* >= 1, got 0"),
        ((X, 2), {"divisor_override": 2.0}, TypeError, r"divisor_override: .* got 2.0"),
        ((X.astype("f2"), 2), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), 2), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), 2), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        avg_pool2d_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = avg_pool2d_forward(X, 2)
    with pytest.raises(ValueError, match=r"avg_pool2d_backward: dy: expected shape .*like y"):
        avg_pool2d_backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        avg_pool2d_backward(y.astype("f4"), cache)


@given(case=wide_pool_cases(), seed=seeds, dtype=dtypes, divisor=divisors)
def test_numba_takes_maps_wider_than_a_vector(case, seed, dtype, divisor):
    x_shape, kwargs = case
    results = []
    for version in ("numpy", "numba"):
        with use(version):
            y, cache = avg_pool2d_forward(draw_x(seed, x_shape, dtype), **kwargs, **divisor)
            dy = draw_x(seed, y.shape, dtype)
            results.append((y, avg_pool2d_backward(dy, cache)))
    for a, b in zip(*results):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("maps", [1, 19, 33])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 2, "stride": (5, 3)},  # some pixels lie under no window
        {"kernel_size": (70, 61), "stride": 1},  # more rows than are added up in one go
        {"kernel_size": (4, 2), "stride": (3, 1), "padding": (2, 1), "ceil_mode": True},
    ],
)
def test_numba_takes_any_number_of_maps_of_many_bands(maps, kwargs):
    x, results = draw_x(0, (1, maps, 71, 61), np.float64), []
    for version in ("numpy", "numba"):
        with use(version):
            y, cache = avg_pool2d_forward(x, **kwargs)
            results.append((y, avg_pool2d_backward(draw_x(1, y.shape, np.float64), cache)))
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


def test_number_of_threads_changes_no_bit():
    x = draw_x(0, (7, 5, 33, 35), np.float32)
    assert_any_threads("numba", *PAIR, (x,), 0, kernel_size=3, stride=2, padding=1)
