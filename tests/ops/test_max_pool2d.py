"""max_pool2d: the winner takes all, and every version agrees on who it is."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.max_pool2d import VERSIONS, max_pool2d_backward, max_pool2d_forward
from opchecks import (
    assert_any_threads,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import (
    distinct,
    dtypes,
    layouts,
    normal,
    pool_cases,
    seeds,
    wide_pool_cases,
)

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = max_pool2d_forward, max_pool2d_backward
cases = pool_cases(dilated=True)
NAN, INF = np.nan, np.inf


def ties(rng, shape, dtype=np.float64):
    """Few different values, so that most windows have several maxima; -inf among them."""
    return rng.choice([-INF, 0.0, 1.0, 2.0], shape).astype(dtype)


@versions
def test_hand_computed_numbers(version):
    x = np.array([[[[1.0, 5, 3, 0], [4, 2, 6, 7], [9, 8, -1, -2], [0, 9, -4, -3]]]])
    with use(version):
        y, cache = max_pool2d_forward(x, 2)
        dx = max_pool2d_backward(np.array([[[[1.0, 2], [3, 4]]]]), cache)
    np.testing.assert_array_equal(y, [[[[5, 7], [9, -1]]]])
    np.testing.assert_array_equal(cache.winner, [[[[1, 7], [8, 10]]]])
    np.testing.assert_array_equal(dx, [[[[0, 1, 0, 0], [0, 0, 0, 2], [3, 0, 4, 0], [0, 0, 0, 0]]]])


@versions
def test_one_pixel_can_win_several_windows(version):
    x = np.array([[[[0.0, 0, 0], [0, 9, 0], [0, 0, 0]]]])
    with use(version):
        y, cache = max_pool2d_forward(x, 2, stride=1)
        dx = max_pool2d_backward(np.array([[[[1.0, 2], [3, 4]]]]), cache)
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), 9))
    np.testing.assert_array_equal(dx, [[[[0, 0, 0], [0, 10, 0], [0, 0, 0]]]])


@versions
def test_the_first_of_equal_maxima_wins_in_row_major_order(version):
    x = np.array([[[[0.0, 1, 1, 0], [1, 0, 1, 1]]]])  # an earlier column loses to an earlier row
    with use(version):
        _, cache = max_pool2d_forward(x, 2)
        _, zeros = max_pool2d_forward(np.array([[[[-0.0, 0.0], [0.0, -0.0]]]]), 2)
    np.testing.assert_array_equal(cache.winner, [[[[1, 2]]]])
    np.testing.assert_array_equal(zeros.winner, [[[[0]]]])


@versions
def test_a_nan_wins_and_the_first_nan_before_the_others(version):
    x = np.array([[[[1.0, NAN, INF, NAN], [NAN, 2, NAN, 0]]]])
    with use(version):
        y, cache = max_pool2d_forward(x, 2)
        dx = max_pool2d_backward(np.array([[[[5.0, 7.0]]]]), cache)
    assert np.isnan(y).all()
    np.testing.assert_array_equal(cache.winner, [[[[1, 3]]]])
    np.testing.assert_array_equal(dx, [[[[0, 5, 0, 7], [0, 0, 0, 0]]]])


@versions
def test_a_nan_stays_in_its_windows_and_beats_infinity(version):
    x = np.zeros((1, 1, 4, 4))
    x[0, 0, 1, 1], x[0, 0, 1, 2] = NAN, INF
    with use(version):
        y, _ = max_pool2d_forward(x, 2, stride=1)
    expected = np.zeros((3, 3))
    expected[:2, 2], expected[:2, :2] = INF, NAN
    np.testing.assert_array_equal(y[0, 0], expected)


@versions
def test_padding_never_wins(version):
    low = np.full((1, 1, 3, 3), -INF)
    with use(version):
        y, cache = max_pool2d_forward(low, 3, stride=2, padding=1)
        dx = max_pool2d_backward(np.array([[[[1.0, 2], [3, 4]]]]), cache)
        _, over = max_pool2d_forward(low, 2, ceil_mode=True)  # windows reach past the edge
    np.testing.assert_array_equal(y, np.full((1, 1, 2, 2), -INF))
    np.testing.assert_array_equal(cache.winner, [[[[0, 1], [3, 4]]]])
    np.testing.assert_array_equal(dx, [[[[1, 2, 0], [3, 4, 0], [0, 0, 0]]]])
    np.testing.assert_array_equal(over.winner, [[[[0, 2], [6, 8]]]])


@versions
@pytest.mark.parametrize("kernel", [(1, 257), (16, 17)])  # more taps than a byte counts
def test_large_kernels(version, kernel):
    x = distinct(np.random.default_rng(0), (1, 2, *kernel))
    with use(version):
        y, cache = max_pool2d_forward(x, kernel)
    flat = x.reshape(2, -1)
    np.testing.assert_array_equal(y.ravel(), flat.max(axis=1))
    np.testing.assert_array_equal(cache.winner.ravel(), flat.argmax(axis=1))
    x[..., -1, -1] = 1e9
    with use(version):
        assert (max_pool2d_forward(x, kernel)[1].winner == flat.shape[1] - 1).all()


@versions
@given(case=cases, seed=seeds, dtype=dtypes, values=st.sampled_from([normal, ties]))
def test_versions_equal_the_reference(version, case, seed, dtype, values):
    x_shape, kwargs = case
    x = values(np.random.default_rng(seed), x_shape, dtype)
    assert_equals_reference(version, *PAIR, (x,), seed, **kwargs)
    with use("reference"):
        expected = max_pool2d_forward(x, **kwargs)[1].winner
    with use(version):
        winner = max_pool2d_forward(x, **kwargs)[1].winner
    assert winner.dtype == np.int64
    np.testing.assert_array_equal(winner, expected)


@given(case=cases, seed=seeds, nans=st.integers(1, 4))
def test_versions_agree_on_nan(case, seed, nans):
    x_shape, kwargs = case
    rng = np.random.default_rng(seed)
    x = ties(rng, x_shape)
    x.flat[rng.integers(0, x.size, nans)] = NAN
    results = []
    for version in VERSIONS:
        with use(version):
            y, cache = max_pool2d_forward(x, **kwargs)
        results.append((y, cache.winner))
    for y, winner in results[1:]:
        np.testing.assert_array_equal(y, results[0][0])
        np.testing.assert_array_equal(winner, results[0][1])


@versions
@settings(max_examples=15)
@given(case=cases, seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    x_shape, kwargs = case
    x = distinct(np.random.default_rng(seed), x_shape)
    assert_gradients(version, *PAIR, (x,), seed, **kwargs)


@versions
@given(case=cases, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    x_shape, kwargs = case
    x = normal(np.random.default_rng(seed), x_shape, dtype)
    assert_layout_free(version, *PAIR, (x,), seed, layout, **kwargs)


@versions
@pytest.mark.parametrize("shape", [(0, 2, 5, 5), (2, 0, 5, 5)])
def test_empty_batch(version, shape):
    with use(version):
        y, cache = max_pool2d_forward(np.zeros(shape), 3, stride=2, padding=1)
        dx = max_pool2d_backward(y, cache)
    assert y.shape == (*shape[:2], 3, 3)
    assert dx.shape == shape


@versions
def test_a_nan_gradient_reaches_its_winner_only(version):
    x = np.arange(16.0).reshape(1, 1, 4, 4)
    with use(version):
        y, cache = max_pool2d_forward(x, 2, stride=1)
        dy = np.zeros_like(y)
        dy[0, 0, 1, 1] = NAN
        dx = max_pool2d_backward(dy, cache)
    assert np.isnan(dx).sum() == 1
    assert np.isnan(dx[0, 0, 2, 2])


@given(
    case=pool_cases(dilated=True, equal_sides=True),
    seed=seeds,
    values=st.sampled_from([distinct, ties]),
)
def test_equals_pytorch(torch, case, seed, values):
    x_shape, kwargs = case
    x = values(np.random.default_rng(seed), x_shape)
    assert_equals_torch(
        torch, *PAIR, (x,), seed, lambda t: torch.nn.functional.max_pool2d(t, **kwargs), **kwargs
    )
    _, winner = torch.nn.functional.max_pool2d(torch.tensor(x), return_indices=True, **kwargs)
    np.testing.assert_array_equal(max_pool2d_forward(x, **kwargs)[1].winner, winner.numpy())


@given(case=cases, seed=seeds)
def test_unequal_sides_equal_pytorch_on_a_padded_map(torch, case, seed):
    x_shape, kwargs = case
    (top, bottom), (left, right) = kwargs["padding"]
    kwargs["ceil_mode"] = False  # its rule looks at the padding, which PyTorch would not see

    def torch_max_pool2d(x):
        x = torch.nn.functional.pad(x, (left, right, top, bottom), value=-INF)
        return torch.nn.functional.max_pool2d(x, **{**kwargs, "padding": 0})

    x = distinct(np.random.default_rng(seed), x_shape)
    assert_equals_torch(torch, *PAIR, (x,), seed, torch_max_pool2d, **kwargs)


X = np.zeros((2, 3, 5, 6))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        ((X[0], 2), {}, ValueError, r"max_pool2d: x: expected 4 axes .* got shape \(3, 5, 6\)"),
        ((X, 6), {}, ValueError, r"kernel_size: expected at most the padded input 5x6, got 6x6"),
        ((X, 2), {"dilation": 5}, ValueError, r"kernel_size: .* padded input 5x6, got 6x6"),
        ((X, 0), {}, ValueError, r"kernel_size: expected an integer >= 1, got 0"),
        ((X, -1), {}, ValueError, r"kernel_size: expected an integer >= 1, got -1"),
        ((X, (2, 2, 2)), {}, ValueError, r"kernel_size: expected an int or a pair"),
        ((X, 2.0), {}, TypeError, r"kernel_size: expected an integer >= 1, got 2.0"),
        ((X, 2), {"stride": 0}, ValueError, r"stride: expected an integer >= 1, got 0"),
        ((X, 2), {"stride": (1, -1)}, ValueError, r"stride: expected an integer >= 1, got -1"),
        ((X, 2), {"dilation": 0}, ValueError, r"dilation: expected an integer >= 1, got 0"),
        ((X, 2), {"padding": -1}, ValueError, r"padding: expected an integer >= 0, got -1"),
        ((X, 2), {"padding": "same"}, TypeError, r"padding: expected an integer .* got 'same'"),
        (
            (X, (3, 2)),
            {"padding": 2},
            ValueError,
            r"max_pool2d: padding: expected at most half the kernel \(3, 2\) .*, got \(\(2, 2\)",
        ),
        ((X, 3), {"padding": ((0, 0), (0, 2))}, ValueError, r"padding: expected at most half"),
        ((X, 3), {"padding": 2, "dilation": 2}, ValueError, r"padding: expected at most half"),
        ((X, (1, 2)), {"padding": (1, 0)}, ValueError, r"padding: expected at most half"),
        (
            (X[:, :, :2, :2], 2),
            {"padding": 1, "dilation": 3},
            ValueError,
            r"max_pool2d: x: expected a map that every window meets, got 2x2",
        ),
        ((X[:, :, :0], 2), {"padding": 1}, ValueError, r"x: expected a map .*, got 0x6"),
        ((X[:, :, :0], 2), {}, ValueError, r"kernel_size: expected at most the padded input 0x6"),
        ((X.astype("f2"), 2), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), 2), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), 2), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        max_pool2d_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = max_pool2d_forward(X, 2)
    with pytest.raises(ValueError, match=r"max_pool2d_backward: dy: expected shape .*like y"):
        max_pool2d_backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        max_pool2d_backward(y.astype("f4"), cache)


@given(case=wide_pool_cases(dilated=True), seed=seeds, dtype=dtypes)
def test_numba_takes_maps_wider_than_a_vector(case, seed, dtype):
    x_shape, kwargs = case
    rng = np.random.default_rng(seed)
    for x in (normal(rng, x_shape, dtype), ties(rng, x_shape, dtype)):
        with use("numpy"):
            expected, wanted = max_pool2d_forward(x, **kwargs)
        with use("numba"):
            y, cache = max_pool2d_forward(x, **kwargs)
        np.testing.assert_array_equal(y, expected)
        np.testing.assert_array_equal(cache.winner, wanted.winner)


def test_numba_counts_more_taps_than_fit_a_byte():
    x = normal(np.random.default_rng(0), (1, 2, 17, 20))
    x[0, 1] = -np.inf
    for kernel in ((16, 16), (16, 17)):  # 256 taps, and more
        with use("numpy"):
            y, cache = max_pool2d_forward(x, kernel, stride=1)
        with use("numba"):
            same, other = max_pool2d_forward(x, kernel, stride=1)
        np.testing.assert_array_equal(same, y)
        np.testing.assert_array_equal(other.winner, cache.winner)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("maps", [1, 19, 33])
def test_numba_takes_any_number_of_maps_of_many_bands(maps, dtype):
    x = ties(np.random.default_rng(0), (1, maps, 71, 61), dtype)
    x[0, -1, 30:40, 5:50], x[0, 0, 3, 4], x[0, 0, 3, 5] = -np.inf, np.nan, np.inf
    for kwargs in (
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": (2, 5), "stride": (3, 1), "dilation": (9, 2), "ceil_mode": True},
        {"kernel_size": (71, 61)},
    ):
        results = []
        for version in ("numpy", "numba"):
            with use(version):
                y, cache = max_pool2d_forward(x, **kwargs)
                dx = max_pool2d_backward(np.ones_like(y), cache)
            results.append((y, cache.winner, dx))
        for a, b in zip(*results):
            np.testing.assert_array_equal(a, b)


def test_number_of_threads_changes_no_bit():
    assert_any_threads("numba", *PAIR, (normal(np.random.default_rng(0), (7, 5, 33, 35), "f4"),), 0,
                       kernel_size=3, stride=2, padding=1)  # fmt: skip
