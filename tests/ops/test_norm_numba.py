"""The Numba versions of batch, layer and group norm on runs that are long enough for them."""

import numpy as np
import pytest

pytest.importorskip("numba", reason="the kernels are compiled by Numba")

from minicnn import ops, use
from minicnn.ops.normalize import SHORT
from opchecks import assert_equals_reference, assert_gradients, both_ways
from strategies import normal

LENGTHS = (SHORT, 2 * SHORT + 5, 131)  # whole vectors, and some numbers left over


def cases(shape, dtype):
    rng = np.random.default_rng(7)
    C = shape[1]
    x, w, b = (normal(rng, s, dtype) for s in (shape, (C,), (C,)))
    run = shape[-1]
    yield ops.batch_norm_forward, ops.batch_norm_backward, (x, w, b), {}
    stats = {"running_mean": normal(rng, C, dtype), "running_var": abs(normal(rng, C, dtype))}
    yield ops.batch_norm_forward, ops.batch_norm_backward, (x, w, b), {**stats, "training": False}
    yield ops.group_norm_forward, ops.group_norm_backward, (x, w, b), {"num_groups": 2}
    wide = normal(rng, run, dtype), normal(rng, run, dtype)
    yield ops.layer_norm_forward, ops.layer_norm_backward, (x, *wide), {"normalized_shape": run}


def in_order(forward):
    """Take the arrays first, as `opchecks` gives them."""

    def call(x, w, b, **kwargs):
        return forward(x, w=w, b=b, **kwargs)

    return call


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_equals_reference(length, dtype):
    for forward, backward, arrays, kwargs in cases((2, 4, length), dtype):
        assert_equals_reference("numba", in_order(forward), backward, arrays, 3, **kwargs)


def test_gradients():
    for forward, backward, arrays, kwargs in cases((2, 2, SHORT + 3), np.float64):
        assert_gradients("numba", in_order(forward), backward, arrays, 5, **kwargs)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_from_zero(dtype):
    """A large mean cancels nothing: neither in the variance nor in the differences."""
    for forward, backward, (x, w, b), kwargs in cases((3, 4, 67), dtype):
        if "training" in kwargs:
            continue
        x = (x + 10_000).astype(dtype)
        x[:, :, :SHORT] += 3  # the first numbers are no sample of the others
        y, _, grads = both_ways("numba", in_order(forward), backward, (x, w, b), 1, **kwargs)
        want = both_ways("reference", in_order(forward), backward, (x, w, b), 1, **kwargs)
        tolerance = 2e-5 if dtype == np.float32 else 1e-10
        for got, expected in zip((y, *grads), (want[0], *want[2]), strict=True):
            np.testing.assert_allclose(got, expected, rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite(bad):
    """NaN and infinities reach what the NumPy version lets them reach, and nothing else."""
    for forward, backward, (x, w, b), kwargs in cases((2, 4, 40), np.float32):
        x[1, 2, 17] = bad
        with np.errstate(invalid="ignore"):
            got, want = (
                both_ways(version, in_order(forward), backward, (x, w, b), 2, **kwargs)
                for version in ("numba", "numpy")
            )
        for a, e in zip((got[0], *got[2]), (want[0], *want[2]), strict=True):
            np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
            np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)


def test_same_bits_for_any_number_of_threads():
    import numba

    most = numba.get_num_threads()
    for forward, backward, arrays, kwargs in cases((5, 4, 67), np.float32):
        bits = []
        for threads in {1, most}:
            numba.set_num_threads(threads)
            y, _, grads = both_ways("numba", in_order(forward), backward, arrays, 3, **kwargs)
            bits.append([a.tobytes() for a in (y, *grads)])
        numba.set_num_threads(most)
        assert bits[0] == bits[-1]


def test_short_runs_are_numpys(monkeypatch):
    from minicnn.ops import norm_numba

    monkeypatch.setattr(norm_numba, "run_moments", None)
    with use("numba"):
        y, _ = ops.batch_norm_forward(normal(np.random.default_rng(0), (4, 3, 2)))
    assert np.isfinite(y).all()
