"""softmax and log_softmax: rows are distributions, whatever the scores and the axis."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from minicnn import use
from minicnn.ops import softmax
from minicnn.ops.softmax import VERSIONS
from opchecks import (
    assert_any_threads,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, seeds

INF = np.inf
ops = pytest.mark.parametrize("op", VERSIONS)
versions = pytest.mark.parametrize(
    ("op", "version"), [(op, v) for op, named in VERSIONS.items() for v in named]
)


def pair(op):
    return getattr(softmax, f"{op}_forward"), getattr(softmax, f"{op}_backward")


def run(op, version, x, **kwargs):
    with use(version):
        return pair(op)[0](x, **kwargs)[0]


@st.composite
def cases(draw):
    """A shape and one of its axes."""
    shape = draw(array_shapes(max_dims=4, max_side=4))
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@pytest.mark.parametrize("version", VERSIONS["softmax"])
def test_hand_computed_numbers(version):
    x = np.log([[1.0, 2, 5], [3, 3, 2]])
    dy = np.array([[8.0, 0, 0], [1, 2, 3]])
    with use(version):
        y, cache = softmax.softmax_forward(x)
        dx = softmax.softmax_backward(dy, cache)
        log_y, log_cache = softmax.log_softmax_forward(x)
        log_dx = softmax.log_softmax_backward(dy, log_cache)
    expected = np.array([[1, 2, 5], [3, 3, 2]]) / 8
    np.testing.assert_allclose(y, expected, rtol=1e-15)
    np.testing.assert_allclose(log_y, np.log(expected), rtol=1e-15)
    # sum of dy y is 1 in the first row and (3 + 6 + 6) / 8 in the second
    np.testing.assert_allclose(
        dx, [[7 / 8, -2 / 8, -5 / 8], [-21 / 64, 3 / 64, 18 / 64]], rtol=1e-14
    )
    np.testing.assert_allclose(
        log_dx, [[7, -2, -5], [1 - 18 / 8, 2 - 18 / 8, 3 - 12 / 8]], rtol=1e-14
    )


def test_the_classes_are_axis_1_unless_told_otherwise():
    x = normal(np.random.default_rng(0), (2, 3, 4))
    np.testing.assert_allclose(run("softmax", "numpy", x).sum(axis=1), 1)
    np.testing.assert_allclose(run("softmax", "numpy", x, dim=-1).sum(axis=2), 1)
    np.testing.assert_allclose(np.exp(run("log_softmax", "numpy", x)).sum(axis=1), 1)


@versions
@given(case=cases(), seed=seeds, dtype=dtypes)
def test_versions_equal_the_reference(op, version, case, seed, dtype):
    shape, dim = case
    x = 3 * normal(np.random.default_rng(seed), shape, dtype)
    assert_equals_reference(version, *pair(op), (x,), seed, dim=dim)


@versions
@given(case=cases(), seed=seeds)
def test_gradients_equal_finite_differences(op, version, case, seed):
    shape, dim = case
    assert_gradients(
        version, *pair(op), (normal(np.random.default_rng(seed), shape),), seed, dim=dim
    )


@versions
@given(case=cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(op, version, case, seed, layout, dtype):
    shape, dim = case
    x = normal(np.random.default_rng(seed), shape, dtype)
    assert_layout_free(version, *pair(op), (x,), seed, layout, dim=dim)


@ops
@given(case=cases(), seed=seeds)
def test_equals_pytorch(torch, op, case, seed):
    shape, dim = case
    x = 10 * normal(np.random.default_rng(seed), shape)
    function = getattr(torch.nn.functional, op)
    assert_equals_torch(torch, *pair(op), (x,), seed, lambda x: function(x, dim=dim), dim=dim)


@versions
def test_empty_batch(op, version):
    forward, backward = pair(op)
    with use(version):
        y, cache = forward(np.zeros((0, 3, 2), np.float32))
        dx = backward(y, cache)
    assert y.shape == dx.shape == (0, 3, 2)
    assert dx.dtype == np.float32


@pytest.mark.parametrize("version", VERSIONS["softmax"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_large_scores_do_not_overflow(version, dtype):
    x = np.array([[1e4, 1e4, -1e4], [-1e4, -1e4, -1e4]], dtype)
    third = np.full(3, 1 / 3)
    np.testing.assert_allclose(run("softmax", version, x), [[0.5, 0.5, 0], third], rtol=1e-6)
    np.testing.assert_allclose(
        run("log_softmax", version, x),
        [[np.log(0.5), np.log(0.5), np.log(0.5) - 2e4], np.log(third)],
        rtol=1e-6,
    )


@pytest.mark.parametrize("version", VERSIONS["softmax"])
def test_a_score_of_minus_infinity_rules_a_class_out(version):
    x, dy = np.array([[0.0, -INF, np.log(3)]]), np.array([[4.0, 5.0, 8.0]])
    with use(version):
        y, cache = softmax.softmax_forward(x)
        np.testing.assert_allclose(y, [[0.25, 0, 0.75]])
        # sum of dy y is 7
        np.testing.assert_allclose(softmax.softmax_backward(dy, cache), [[-0.75, 0, 0.75]])
        log_y, cache = softmax.log_softmax_forward(x)
        np.testing.assert_allclose(log_y, [[np.log(0.25), -INF, np.log(0.75)]])
        np.testing.assert_allclose(
            softmax.log_softmax_backward(dy, cache), [[4 - 17 / 4, 5, 8 - 51 / 4]]
        )


@versions
@pytest.mark.parametrize("row", [[-INF, -INF], [INF, 0.0], [np.nan, 0.0], [0.0, np.nan]])
def test_a_row_without_a_distribution_is_nan_and_leaves_the_others_alone(op, version, row):
    y = run(op, version, np.array([row, [0.0, 0.0]]))
    assert np.isnan(y[0]).all()
    assert np.isfinite(y[1]).all()


X = np.zeros((2, 3))


@ops
@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((X, 2), ValueError, r"dim: expected an axis of x with shape \(2, 3\), got 2"),
        ((X, -3), ValueError, r"dim: expected an integer >= -2, got -3"),
        ((X, 1.0), TypeError, r"dim: expected an integer >= -2, got 1.0"),
        ((X[0],), ValueError, r"dim: expected an axis of x with shape \(3,\), got 1"),
        ((X[0, 0], 0), ValueError, r"dim: expected an axis of x with shape \(\), got 0"),
        ((X[:, :0],), ValueError, r"x: expected an entry or more along axis 1, got .*\(2, 0\)"),
        ((X.astype(int),), TypeError, r"x: expected float32 or float64, got int64"),
    ],
)
def test_bad_input_is_named(op, args, error, message):
    with pytest.raises(error, match=f"{op}: {message}"):
        pair(op)[0](*args)


@ops
def test_bad_upstream_gradient_is_named(op):
    forward, backward = pair(op)
    y, cache = forward(X)
    with pytest.raises(ValueError, match=rf"{op}_backward: dy: expected shape \(2, 3\) \(like y"):
        backward(y[:1], cache)
    with pytest.raises(TypeError, match=rf"{op}_backward: dy: expected float64 like y"):
        backward(y.astype("f4"), cache)


@pytest.mark.parametrize("op", VERSIONS)
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 2500), 1), ((2, 150, 37), 1), ((2500, 3), 0), ((1, 4097, 2), -2)]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numba_takes_long_rows_and_many_columns(op, shape, dim, dtype):
    """Sums of several blocks, and vectors with a rest."""
    x = 5 * normal(np.random.default_rng(0), shape, dtype)
    x.flat[7] = -INF
    dy, results = normal(np.random.default_rng(1), shape, dtype), []
    for version in ("numpy", "numba"):
        with use(version):
            y, cache = pair(op)[0](x, dim=dim)
            results.append((y, pair(op)[1](dy, cache)))
    tolerance = 1e-4 if dtype == np.float32 else 1e-12
    for a, b in zip(*results):
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("op", VERSIONS)
@pytest.mark.parametrize("shape", [(300, 101), (3, 101, 99)])
def test_number_of_threads_changes_no_bit(op, shape):
    assert_any_threads("numba", *pair(op), (normal(np.random.default_rng(0), shape, "f4"),), 0)
