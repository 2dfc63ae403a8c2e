"""The fused loss of a training step equals the public pair."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn import ops, use
from strategies import normal, seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops.cross_entropy_numba import loss_and_gradient  # noqa: E402  (needs Numba)


def plain(x, labels):
    with use("numpy"):
        loss, cache = ops.cross_entropy_forward(x, labels)
        return loss, ops.cross_entropy_backward(1.0, cache)


@given(
    N=st.sampled_from([1, 2, 63, 150]),
    C=st.integers(1, 12),
    seed=seeds,
    dtype=st.sampled_from([np.float32, np.float64]),
    scale=st.sampled_from([1.0, 300.0]),
)
def test_equals_the_public_pair(N, C, seed, dtype, scale):
    rng = np.random.default_rng(seed)
    x, labels = normal(rng, (N, C), dtype) * dtype(scale), rng.integers(0, C, N)
    dx = np.full_like(x, np.nan)
    loss = loss_and_gradient(x, labels, dx)
    expected, gradient = plain(x.astype(np.float64), labels)
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    assert loss == pytest.approx(expected, rel=tolerance, abs=tolerance)
    np.testing.assert_allclose(dx, gradient, rtol=0, atol=tolerance / N)


def test_number_of_threads_changes_no_bit():
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    rng = np.random.default_rng(0)
    x, labels = normal(rng, (300, 10), np.float32), rng.integers(0, 10, 300)
    before, results = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            dx = np.empty_like(x)
            results.append((loss_and_gradient(x, labels, dx), dx.tobytes()))
    finally:
        numba.set_num_threads(before)
    assert results[0] == results[1]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_what_is_not_finite_spreads_as_in_the_public_pair(bad, at):
    x = np.array([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    x[0, at] = bad
    labels, dx = np.array([1, 0]), np.empty_like(x)
    loss = loss_and_gradient(x, labels, dx)
    expected, gradient = plain(x, labels)
    np.testing.assert_allclose(loss, expected, rtol=1e-14)
    np.testing.assert_allclose(dx, gradient, rtol=1e-14)
