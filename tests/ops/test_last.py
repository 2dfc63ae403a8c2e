"""The kernels on maps with their channels in the lanes do what the plain ops do."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn import ops
from strategies import seeds

pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import last
from ops_last import numbers, to_first, to_last


@st.composite
def maps(draw):
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 40))]
    shape += [draw(st.integers(1, 6)), draw(st.integers(1, 6))]
    dtype = draw(st.sampled_from([np.float32, np.float64]))
    return numbers(draw(seeds), shape).astype(dtype), draw(seeds)


def tolerance(dtype):
    return {"rtol": 0, "atol": 2e-4 if dtype == np.float32 else 1e-10}


@given(maps())
def test_there_and_back(case):
    x, _ = case
    y = to_last(x)
    np.testing.assert_array_equal(y[..., : x.shape[1]], x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(to_first(y, x.shape[1]), x)


@given(maps(), st.booleans())
def test_batch_norm(case, relu):
    x, seed = case
    N, C, H, W = x.shape
    if N * H * W < 2:
        return
    x = x + 100  # a mean far from zero must not cost digits
    w, b = numbers(seed, (2, C)).astype(x.dtype)
    y, cache = ops.batch_norm_forward(x, w, b)
    mean, var = last.moments(to_last(x), C)
    np.testing.assert_allclose(mean, cache.mean, rtol=1e-5)
    np.testing.assert_allclose(var + 1e-5, cache.rstd**-2.0, rtol=1e-3)
    got, atol = np.empty_like(to_last(x)), 2e-2 if x.itemsize == 4 else 1e-7
    by = last.factors(to_last(x), mean, w / np.sqrt(var + 1e-5), b)
    other = numbers(seed + 1, x.shape).astype(x.dtype)
    other_by = numbers(seed + 2, (3, C)).astype(x.dtype)
    m, a, d = other_by[:, :, None, None]
    for plus, more in (
        (0, ()),
        (other, (to_last(other),)),
        ((other - m) * a + d, (to_last(other), last.factors(got, *other_by))),
    ):
        last.normalise(to_last(x), by, got, relu, *more)
        want = np.maximum(y + plus, 0) if relu else y + plus
        np.testing.assert_allclose(to_first(got, C), want, rtol=0, atol=atol)


@given(maps(), st.booleans())
def test_batch_norm_gradient(case, relu):
    x, seed = case
    N, C, H, W = x.shape
    if N * H * W < 4:  # two pixels differ by nothing but a sign
        return
    w, b = numbers(seed, (2, C)).astype(x.dtype)
    dy = numbers(seed + 1, x.shape).astype(x.dtype)
    y, cache = ops.batch_norm_forward(x, w, b)
    d = dy
    if relu:
        y, relu_cache = ops.relu_forward(y)
        d = ops.relu_backward(dy, relu_cache)
    xl, var = to_last(x), cache.rstd**-2.0 - 1e-5
    by = last.factors(xl, cache.mean, w * cache.rstd, b)
    got = np.empty_like(xl)
    last.normalise(xl, by, got, relu)
    d[(to_first(got, C) > 0) != (y > 0)] = 0  # rounding may switch a ReLU
    dy[(to_first(got, C) > 0) != (y > 0)] = 0
    dx, dw, db = ops.batch_norm_backward(d, cache)
    got_dw, got_db = last.normalise_gradient(xl, to_last(dy), by, relu, var, 1e-5, w, got)
    scale = max(1, np.abs(dx).max())
    np.testing.assert_allclose(to_first(got, C) / scale, dx / scale, **tolerance(x.dtype))
    np.testing.assert_allclose(got_dw, dw, **tolerance(x.dtype))
    np.testing.assert_allclose(got_db, db, **tolerance(x.dtype))


@given(
    maps(),
    st.sampled_from([(1, 1, 0), (2, 2, 0), (2, 1, 1), (3, 2, 1), ((1, 2), (2, 1), (0, 1))]),
    st.sampled_from([None, np.nan, np.inf, -np.inf]),
)
def test_max_pool(case, geometry, special):
    x, seed = case
    rng = np.random.default_rng(seed)
    x = np.round(x)  # ties: the first wins
    if special is not None:
        x[rng.random(x.shape) < 0.3] = special
    kernel = np.broadcast_to(geometry[0], 2)
    padding = np.broadcast_to(geometry[2], 2)
    if any(size + 2 * p < k for size, p, k in zip(x.shape[2:], padding, kernel)):
        return
    y, cache = ops.max_pool2d_forward(x, *geometry)
    C, P = x.shape[1], last.padded(x.shape[1], x.dtype)
    got = np.empty((len(x), *y.shape[2:], P), x.dtype)
    winner = np.empty(got.shape, np.uint8)
    last.max_pool(to_last(x), cache.window, got, winner)
    np.testing.assert_array_equal(to_first(got, C), y)
    dy = numbers(seed, y.shape).astype(x.dtype)
    dx = np.empty((len(x), *x.shape[2:], P), x.dtype)
    last.max_pool_gradient(to_last(dy), winner, cache.window, dx)
    np.testing.assert_allclose(
        to_first(dx, C), ops.max_pool2d_backward(dy, cache), **tolerance(x.dtype)
    )


@given(maps())
def test_mean_and_sums(case):
    x, seed = case
    y, cache = ops.adaptive_avg_pool2d_forward(x, 1)
    xl = to_last(x)
    got = np.empty((len(x), 1, 1, xl.shape[3]), x.dtype)
    last.mean(xl, got)
    np.testing.assert_allclose(to_first(got, x.shape[1]), y, **tolerance(x.dtype))
    dy = numbers(seed, y.shape).astype(x.dtype)
    dx = np.empty_like(xl)
    last.mean_gradient(to_last(dy), dx)
    want = ops.adaptive_avg_pool2d_backward(dy, cache)
    np.testing.assert_allclose(to_first(dx, x.shape[1]), want, **tolerance(x.dtype))
    sums = last.channel_sums(xl, x.shape[1])
    np.testing.assert_allclose(sums, x.sum(axis=(0, 2, 3), dtype=np.float64), atol=1e-3)


@given(st.integers(1, 70), seeds, st.sampled_from([np.float32, np.float64]))
def test_relu_of_any_size(n, seed, dtype):
    x, dy = numbers(seed, (2, n)).astype(dtype)
    x[np.random.default_rng(seed).random(n) < 0.2] = np.nan
    y, _cache = ops.relu_forward(x)
    got, dx = np.empty_like(x), np.empty_like(x)
    last.relu(x, got)
    last.relu_gradient(dy, y, dx)
    np.testing.assert_array_equal(got, y)
    np.testing.assert_array_equal(dx, np.where(x > 0, dy, 0))


@given(maps(), st.booleans())
def test_adding_maps(case, relu):
    a, seed = case
    b = numbers(seed, a.shape).astype(a.dtype)
    y = np.empty_like(to_last(a))
    last.add_maps(to_last(a), to_last(b), y, relu)
    want = np.maximum(a + b, 0) if relu else a + b
    np.testing.assert_array_equal(to_first(y, a.shape[1]), want)


@given(maps(), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.booleans())
def test_some_of_the_pixels(case, stride, more):
    x, seed = case
    some = np.ascontiguousarray(x[:, :, :: stride[0], :: stride[1]])
    y = np.full_like(to_last(some), 7)
    last.take_every(to_last(x), stride, y)
    np.testing.assert_array_equal(to_first(y, x.shape[1]), some)
    there = numbers(seed, x.shape).astype(x.dtype)
    dx = to_last(there)
    last.spread(y, stride, dx, more)
    want = there if more else np.zeros_like(x)
    want[:, :, :: stride[0], :: stride[1]] += some
    np.testing.assert_array_equal(to_first(dx, x.shape[1]), want)
