"""The sparse gradients in their own layouts: channels in the lanes, and images of few channels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops.conv_block import OFF, conv_block_backward, conv_block_forward
from minicnn.shapes import window
from strategies import normal, paddings, pairs, seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import (  # noqa: E402  (needs Numba)
    conv_block_lanes,
    conv_block_lists,
    conv_block_numba,
    conv_block_patches,
)
from minicnn.ops.conv_block_numba import channels_last  # noqa: E402
from minicnn.ops.vector import lanes  # noqa: E402

NAMES = ("dx", "dw", "db")


@st.composite
def cases(draw):
    """Sizes around those of a vector and a tile, and several images: (x_shape, w_shape, kwargs)."""
    N, C, F = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(st.sampled_from([1, 1, (2, 3)]))
    pool = draw(pairs)
    reach = window("test", kernel, stride, 0, dilation).extent
    H, W = (e + s * (k - 1) + draw(st.integers(0, 9)) for e, s, k in zip(reach, stride, pool))
    kwargs = {"stride": stride, "dilation": dilation, "padding": draw(paddings), "pool": pool}
    return (N, C, H, W), (F, C, *kernel), kwargs


def draw_arrays(seed, x_shape, w_shape, dtype, whole=False):
    rng = np.random.default_rng(seed)
    if whole:
        return tuple(rng.integers(-3, 4, s).astype(dtype) for s in (x_shape, w_shape))
    return normal(rng, x_shape, dtype), normal(rng, w_shape, dtype)


LAYOUTS = "last", "planes", "patches"


def gradients(x, w, dy, cache, layout, accumulate=None):
    """Run the entry point, on scratch that must not shine through.

    Of two ways for images in planes, "patches" takes the one for geometries that are too large for
    the other.
    """
    x_last = layout == "last"
    P = channels_last(x).shape
    dx = np.full(P, np.nan, x.dtype) if x_last else None
    dw, db = (np.full(s, np.nan, x.dtype) for s in (w.shape, w.shape[:1]))
    if accumulate is not None:
        dw, db = (a.copy() for a in accumulate)
    win, pool = cache.window, cache.pool
    maps = channels_last(dy), channels_last(cache.winner, x.dtype)
    add = accumulate is not None
    if layout == "patches":
        conv_block_patches.weight_gradient(x, *maps, dw, db, win, pool, add)()
    else:
        x = channels_last(x) if x_last else x
        conv_block_numba.backward(x, *maps, w, dw, db, dx, win, pool, x_last=x_last, accumulate=add)
    return dx, dw, db


def forward(x, w, seed, whole=False, **kwargs):
    with use("numpy"):
        y, cache = conv_block_forward(x, w, np.zeros(len(w), w.dtype), **kwargs)
    dy = draw_arrays([seed, 1], y.shape, (1,), x.dtype, whole)[0]
    return dy, cache


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=25)
@given(case=cases(), seed=seeds, dtype=st.sampled_from([np.float32, np.float64]))
def test_whole_numbers_are_exact(layout, case, seed, dtype):
    x_shape, w_shape, kwargs = case
    x, w = draw_arrays(seed, x_shape, w_shape, dtype, whole=True)
    dy, cache = forward(x, w, seed, whole=True, **kwargs)
    with use("numpy"):
        expected = conv_block_backward(dy, cache)
    dx, dw, db = gradients(x, w, dy, cache, layout)
    np.testing.assert_array_equal(dw, expected[1])
    np.testing.assert_array_equal(db, expected[2])
    if layout == "last":
        np.testing.assert_array_equal(dx, channels_last(expected[0]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_added_on_request(layout):
    x, w = draw_arrays(0, (3, 5, 9, 9), (6, 5, 3, 3), np.float64)
    dy, cache = forward(x, w, 0, pool=2)
    _, dw, db = gradients(x, w, dy, cache, layout)
    before = np.full_like(dw, 2), np.full_like(db, 3)
    _, dw2, db2 = gradients(x, w, dy, cache, layout, accumulate=before)
    np.testing.assert_allclose(dw2, 2 + dw, rtol=1e-14)
    np.testing.assert_allclose(db2, 3 + db, rtol=1e-14)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("N", [1, 5])
def test_number_of_threads_changes_no_bit(N, layout):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    x, w = draw_arrays(0, (N, 20, 13, 13), (40, 20, 3, 3), np.float32)
    dy, cache = forward(x, w, 0, pool=2, padding=1)
    before, results = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            results.append(gradients(x, w, dy, cache, layout))
    finally:
        numba.set_num_threads(before)
    for one, two in zip(*results):
        assert one is None or one.tobytes() == two.tobytes()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_float32_error_is_small_for_long_sums(layout, positive):
    x, w = draw_arrays(0, (16, 32, 34, 34), (64, 32, 3, 3), np.float32)
    if positive:  # no cancellation: partial sums grow with their length
        x, w = abs(x), abs(w)
    dy, cache = forward(x, w, 0, pool=2)
    dy = abs(dy) if positive else dy
    got = gradients(x, w, dy, cache, layout)
    exact, terms = [], []
    for results, take in ((exact, np.asarray), (terms, np.abs)):
        wide = cache._replace(x=take(x.astype(np.float64)), w=take(w.astype(np.float64)))
        results += conv_block_backward(take(dy.astype(np.float64)), wide)
    if layout == "last":
        got = (got[0][..., :32].transpose(0, 3, 1, 2), *got[1:])
    for name, a, e, t in zip(NAMES, got, exact, terms):
        if a is not None:
            error = (abs(a - e) / np.maximum(t, 1e-30)).max() * 2**24
            assert error < 8, name


@pytest.mark.parametrize("pool", [(1, 1), (2, 2), (15, 16), (127, 2)])
def test_winners_of_any_pool(pool):
    x, w = draw_arrays(0, (2, 2, pool[0] * 2, pool[1]), (3, 2, 1, 1), np.float64, whole=True)
    dy, cache = forward(x, w, 0, whole=True, pool=pool)
    assert cache.winner[cache.winner != OFF].max(initial=0) < pool[0] * pool[1]
    with use("numpy"):
        expected = conv_block_backward(dy, cache)
    for layout in LAYOUTS:
        _, dw, db = gradients(x, w, dy, cache, layout)
        np.testing.assert_array_equal(dw, expected[1])
        np.testing.assert_array_equal(db, expected[2])


def test_every_tile_is_chosen_and_right():
    L, shapes = lanes(np.float64), {}
    for C in (1, L, 2 * L, 4 * L):
        for K in range(1, 6):
            *_, R, V = conv_block_lists.plan_of(C, 9, 9, 5, window("test", (K, K)), (2, 2), 2, L)
            shapes[len(R), len(V)] = C, K
    assert set(shapes) == set(conv_block_lists.TILES)
    for C, K in shapes.values():
        x, w = draw_arrays(0, (2, C, 9, 9), (5, C, K, K), np.float64, whole=True)
        dy, cache = forward(x, w, 0, whole=True, pool=2)
        with use("numpy"):
            expected = conv_block_backward(dy, cache)
        got = gradients(x, w, dy, cache, "last")
        for a, e in zip(got, (channels_last(expected[0]), *expected[1:])):
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("pool", [(1, 1), (1, 3), (2, 1), (2, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("dilation", [1, 2])
def test_every_geometry_that_fits_the_lanes(pool, dilation, dtype):
    """And the first that does not; bands of several images' rows, blocks that end in a window."""
    L, fitted = lanes(dtype), []
    for K in range(1, 8):
        x, w = draw_arrays(K, (3, 2, 33, 37), (L + 1, 2, 3, K), dtype, whole=True)
        kwargs = {"stride": (2, 1), "padding": (1, 2), "dilation": dilation, "pool": pool}
        dy, cache = forward(x, w, 0, whole=True, **kwargs)
        fitted.append(conv_block_lanes.fits(cache.window, pool, L))
        with use("numpy"):
            expected = conv_block_backward(dy, cache)
        _, dw, db = gradients(x, w, dy, cache, "planes")
        np.testing.assert_array_equal(dw, expected[1])
        np.testing.assert_array_equal(db, expected[2])
    assert fitted == sorted(fitted, reverse=True)
    assert any(fitted) == (pool[0] < 3 and max(pool) <= L // pool[0])


def test_no_gradient_of_an_image_in_planes():
    x, w = draw_arrays(0, (1, 1, 5, 5), (2, 1, 3, 3), np.float64)
    dy, cache = forward(x, w, 0)
    with pytest.raises(ValueError, match=r"conv_block: dx: expected None for x of shape"):
        conv_block_numba.backward(
            x, dy, cache.winner, w, w.copy(), np.zeros(2), x, cache.window, (1, 1), x_last=False
        )
