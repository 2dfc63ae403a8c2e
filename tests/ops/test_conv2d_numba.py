"""The Numba convolution where its own decisions lie: packings, bands, parts, threads, rounding."""

import subprocess
import sys
import threading
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import ops, use
from minicnn.shapes import window
from opchecks import both_ways
from strategies import conv_cases, normal, paddings, pairs, seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import conv2d_channels, conv2d_numba, conv2d_planes  # noqa: E402  (needs Numba)
from minicnn.ops.conv2d_maps import Geometry  # noqa: E402
from minicnn.ops.vector import ROWS, lanes  # noqa: E402

PAIR = ops.conv2d_forward, ops.conv2d_backward
NAMES = ("y", "dx", "dw", "db")
both = pytest.mark.parametrize(
    "kernels", [conv2d_channels, conv2d_planes], ids=["channels", "planes"]
)


def draw(seed, x_shape, w_shape, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return [normal(rng, shape, dtype) for shape in (x_shape, w_shape, w_shape[:1])]


def run(version, arrays, seed=0, **kwargs):
    y, _, grads = both_ways(version, *PAIR, arrays, seed, **kwargs)
    return y, *grads


def assert_equals_numpy(arrays, **kwargs):
    for name, got, want in zip(
        NAMES, run("numba", arrays, **kwargs), run("numpy", arrays, **kwargs)
    ):
        scale = abs(want).max(initial=1)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * scale, err_msg=name)


@contextmanager
def only(kernels):
    """Let one of the two sets of kernels run, whatever the shapes."""
    choose, conv2d_numba._kernels = conv2d_numba._kernels, lambda geometry, x: kernels
    try:
        yield
    finally:
        conv2d_numba._kernels = choose


@st.composite
def large_cases(draw):
    """Like `strategies.conv_cases`, with more channels than a vector has lanes and more images."""
    groups = draw(st.sampled_from([1, 1, 2, 5]))
    N, CG, FG = draw(st.integers(1, 19)), draw(st.integers(1, 20)), draw(st.integers(1, 50))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    H, W = (d * (k - 1) + 1 + draw(st.integers(0, 6)) for k, d in zip(kernel, dilation))
    kwargs = {"stride": stride, "dilation": dilation, "padding": draw(paddings), "groups": groups}
    return (N, CG * groups, H, W), (FG * groups, CG, *kernel), kwargs


@st.composite
def depthwise_cases(draw):
    (N, _, H, W), (_, _, *kernel), kwargs = draw(large_cases())
    channels = draw(st.integers(2, 40))
    return (N, channels, H, W), (channels, 1, *kernel), {**kwargs, "groups": channels}


@both
@given(case=st.one_of(large_cases(), conv_cases(), depthwise_cases()), seed=seeds)
def test_either_kernels_take_any_shape(kernels, case, seed):
    x_shape, w_shape, kwargs = case
    with only(kernels):
        assert_equals_numpy(draw(seed, x_shape, w_shape), **kwargs)


@settings(max_examples=20)
@given(case=large_cases(), seed=seeds, band_bytes=st.sampled_from([1, 20_000]))
def test_bands_of_few_rows(case, seed, band_bytes):
    x_shape, w_shape, kwargs = case
    before = conv2d_channels.BAND_BYTES
    conv2d_channels.BAND_BYTES = band_bytes
    conv2d_channels._plan.cache_clear()
    try:
        with only(conv2d_channels):
            assert_equals_numpy(draw(seed, x_shape, w_shape), **kwargs)
    finally:
        conv2d_channels.BAND_BYTES = before
        conv2d_channels._plan.cache_clear()


@pytest.mark.parametrize("N", [ROWS, ROWS + 5, 2 * ROWS])
def test_images_side_by_side_where_that_pays(N):
    geometry = Geometry(False, 40, 8, 8, 300, window("test", 3, padding=1), 1)
    plan, _ = conv2d_channels._plan(geometry, N, lanes(np.float32))
    assert plan.images == (ROWS if N % ROWS == 0 else 1)
    assert_equals_numpy(draw(0, (N, 40, 8, 8), (300, 40, 3, 3)), padding=1)


@pytest.mark.parametrize(
    ("C", "F", "groups", "adjoint", "kernels"),
    [
        (64, 64, 1, False, conv2d_channels),
        (1, 64, 1, False, conv2d_channels),
        (1, 64, 1, True, conv2d_planes),
        (64, 1, 1, False, conv2d_planes),
        (64, 64, 64, True, conv2d_channels),
        (64, 64, 32, False, conv2d_planes),
        (2, 2, 2, False, conv2d_planes),
    ],
)
def test_the_lanes_are_full(C, F, groups, adjoint, kernels):
    geometry = Geometry(adjoint, C, 9, 9, F, window("test", 3), groups)
    assert conv2d_numba._kernels(geometry, np.zeros(1, np.float32)) is kernels


@both
@pytest.mark.parametrize("positive", [False, True])
def test_float32_error_is_small_for_long_sums(kernels, positive):
    # 16 * 32 * 32 terms in dw and db, 576 in y and dx.
    arrays = draw(0, (16, 64, 32, 32), (64, 64, 3, 3))
    if positive:  # no cancellation: partial sums grow with their length
        arrays = [abs(a) for a in arrays]
    with use("numba"), only(kernels):
        y, cache = ops.conv2d_forward(*arrays, padding=1)
        dy = normal(np.random.default_rng(1), y.shape, y.dtype)
        dy = abs(dy) if positive else dy
        got = y, *ops.conv2d_backward(dy, cache)
    with use("numpy"):
        exact, terms = [], []
        for results, take in ((exact, np.asarray), (terms, np.abs)):
            x, w, b = (take(a.astype(np.float64)) for a in arrays)
            y, cache = ops.conv2d_forward(x, w, b, padding=1)
            results += [y, *ops.conv2d_backward(take(dy.astype(np.float64)), cache)]
    for name, a, e, t in zip(NAMES, got, exact, terms):
        error = (abs(a - e) / t).max() * 2**24
        assert error < 8, name


@both
def test_whole_numbers_are_exact(kernels):
    rng = np.random.default_rng(0)
    shapes = (20, 18, 9, 9), (33, 18, 3, 3), (33,)
    arrays = [rng.integers(-8, 9, shape).astype(np.float32) for shape in shapes]
    results = []
    for version in ("numba", "numpy"):
        with use(version), only(kernels):
            y, cache = ops.conv2d_forward(*arrays, padding=1)
            dy = np.random.default_rng(1).integers(-8, 9, y.shape).astype(np.float32)
            results.append((y, *ops.conv2d_backward(dy, cache)))
    for got, want in zip(*results):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("groups", [1, 32])
def test_number_of_threads_changes_no_bit(groups):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    arrays = draw(0, (9, 32, 14, 14), (32, 32 // groups, 3, 3))
    before, results = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            results.append(run("numba", arrays, padding=1, groups=groups))
    finally:
        numba.set_num_threads(before)
    for one, two in zip(*results):
        assert one.tobytes() == two.tobytes()


def test_two_python_threads_get_right_results():
    arrays = draw(0, (6, 16, 12, 12), (32, 16, 3, 3))
    expected = run("numba", arrays)
    wrong = []  # one truth value a call

    def work():
        for _ in range(20):
            y = conv2d_numba.forward(*arrays, window("test", 3), 1)
            wrong.append(y.tobytes() != expected[0].tobytes())

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wrong) == 60
    assert not any(wrong)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["x", "w", "dy"])
def test_what_is_not_finite_spreads_as_in_the_reference(kernels, where, bad):
    x, w, b = draw(0, (8, 3, 5, 5), (4, 3, 3, 3))
    dy = normal(np.random.default_rng(1), (8, 4, 5, 5), np.float32)
    {"x": x, "w": w, "dy": dy}[where][0, 1, 0, 0] = bad  # a tap or pixel that meets padding
    results = []
    for version in ("numba", "reference"):
        with use(version), only(kernels), np.errstate(invalid="ignore"):
            y, cache = ops.conv2d_forward(x, w, b, padding=1)
            results.append((y, *ops.conv2d_backward(dy, cache)))
    for name, got, want in zip(NAMES, *results):
        np.testing.assert_array_equal(np.isnan(got), np.isnan(want), err_msg=name)
        np.testing.assert_array_equal(np.isposinf(got), np.isposinf(want), err_msg=name)


@both
def test_nan_that_meets_only_padding_counts(kernels):
    x, w = np.ones((1, 1, 2, 2), np.float32), np.ones((1, 1, 1, 1), np.float32)
    with use("numba"), only(kernels):
        y, cache = ops.conv2d_forward(x, w, padding=1)
        dy = np.zeros_like(y)
        dy[0, 0, 0, 0] = np.nan
        dx, dw, _ = ops.conv2d_backward(dy, cache)
    assert np.isnan(dw).all()
    assert not dx.any()


def test_results_are_fresh():
    arrays = draw(0, (2, 3, 6, 6), (4, 3, 3, 3))
    first = run("numba", arrays)
    copies = [a.copy() for a in first]
    run("numba", draw(1, (2, 3, 6, 6), (4, 3, 3, 3)))
    for a, copy in zip(first, copies):
        np.testing.assert_array_equal(a, copy)


def test_numba_is_imported_at_the_first_call_only():
    script = """
import sys
import numpy as np
import minicnn.ops
assert "numba" not in sys.modules
with minicnn.use("numba"):
    minicnn.ops.conv2d_forward(np.ones((1, 1, 3, 3)), np.ones((1, 1, 3, 3)))
assert "numba" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)
