"""Elementwise losses: values, gradients to x, reductions and the numbers that break formulas."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from minicnn import use
from minicnn.ops import losses
from minicnn.ops.losses import REDUCTIONS, VERSIONS
from opchecks import (
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import distinct, dtypes, laid_out, layouts, seeds

INF, NAN = np.inf, np.nan
ops = pytest.mark.parametrize("op", VERSIONS)
versions = pytest.mark.parametrize(
    ("op", "version"), [(op, v) for op, named in VERSIONS.items() for v in named]
)
shapes = array_shapes(max_dims=3, max_side=4)
reductions = st.sampled_from(REDUCTIONS)


def pair(op):
    return getattr(losses, f"{op}_forward"), getattr(losses, f"{op}_backward")


def run(op, version, x, target, dloss=1.0, **kwargs):
    forward, backward = pair(op)
    with use(version):
        loss, cache = forward(x, target, **kwargs)
        return loss, backward(dloss, cache)


@st.composite
def cases(draw, op, dtype=np.float64):
    """Return x, 0.05 or more from the target, and the other arguments."""
    shape, seed = draw(shapes), draw(seeds)
    rng = np.random.default_rng(seed)
    kwargs = {"target": rng.uniform(size=shape).astype(dtype), "reduction": draw(reductions)}
    x = kwargs["target"] + (10 * distinct(rng, shape)).astype(dtype)
    if op == "bce_with_logits":
        for name in ("weight", "pos_weight"):
            axes = draw(st.integers(0, len(shape)))  # the last axes, one of them perhaps 1
            weight_shape = tuple(n if draw(st.booleans()) else 1 for n in shape[axes:])
            if draw(st.booleans()):
                kwargs[name] = rng.uniform(0.5, 2, weight_shape).astype(dtype)
    return x, kwargs


@pytest.mark.parametrize("version", VERSIONS["mse_loss"])
def test_hand_computed_numbers(version):
    x, t = np.array([[1.0, 5.0], [-2.0, 3.0]]), np.array([[2.0, 2.0], [-2.0, 1.0]])
    expected = {
        "mse_loss": ([[1, 9], [0, 4]], [[-2, 6], [0, 4]]),
        "l1_loss": ([[1, 3], [0, 2]], [[-1, 1], [0, 1]]),
    }
    dloss = np.array([[1.0, 2.0], [3.0, -1.0]])
    for op, (elements, slope) in expected.items():
        loss, dx = run(op, version, x, t, reduction="none", dloss=dloss)
        np.testing.assert_array_equal(loss, elements)
        np.testing.assert_array_equal(dx, dloss * slope)
        loss, dx = run(op, version, x, t, reduction="sum", dloss=3.0)
        assert loss == np.sum(elements)
        np.testing.assert_array_equal(dx, np.multiply(slope, 3))
        loss, dx = run(op, version, x, t, dloss=2.0)
        assert loss == np.sum(elements) / 4
        np.testing.assert_array_equal(dx, np.multiply(slope, 0.5))


@pytest.mark.parametrize("version", VERSIONS["bce_with_logits"])
def test_hand_computed_cross_entropy(version):
    x = np.log([3.0, 3.0, 3.0])  # a probability of 3/4
    t = np.array([1.0, 0.0, 0.5])
    loss, dx = run("bce_with_logits", version, x, t, reduction="none", dloss=np.ones(3))
    likely, unlikely = -math.log(3 / 4), -math.log(1 / 4)
    np.testing.assert_allclose(loss, [likely, unlikely, (likely + unlikely) / 2], rtol=1e-15)
    np.testing.assert_allclose(dx, 0.75 - t, rtol=1e-15)
    loss, dx = run(
        *("bce_with_logits", version, x, t),
        weight=np.array([2.0, 3.0, 1.0]),
        pos_weight=np.array([5.0]),
        reduction="sum",
    )
    expected = 2 * 5 * likely + 3 * unlikely + 5 * likely / 2 + unlikely / 2
    np.testing.assert_allclose(loss, expected, rtol=1e-15)
    np.testing.assert_allclose(dx, [-2 * 5 / 4, 3 * 3 / 4, 3 / 8 - 5 / 8], rtol=1e-15)


@versions
@given(data=st.data(), dtype=dtypes, seed=seeds)
def test_versions_equal_the_reference(op, version, data, dtype, seed):
    x, kwargs = data.draw(cases(op, dtype))
    assert_equals_reference(version, *pair(op), (x,), seed, **kwargs)


@versions
@given(data=st.data(), seed=seeds)
def test_gradients_equal_finite_differences(op, version, data, seed):
    x, kwargs = data.draw(cases(op))
    assert_gradients(version, *pair(op), (x,), seed, **kwargs)


@versions
@given(data=st.data(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(op, version, data, seed, layout, dtype):
    x, kwargs = data.draw(cases(op, dtype))
    arrays = {k: a for k, a in kwargs.items() if isinstance(a, np.ndarray) and a.ndim}
    before = {k: a.tobytes() for k, a in arrays.items()}
    assert_layout_free(version, *pair(op), (x,), seed, layout, **kwargs)
    loss, _ = run(op, version, x, dloss=np.ones_like(x), **{**kwargs, "reduction": "none"})
    moved = {k: laid_out(a, layout) for k, a in arrays.items()}
    again, _ = run(
        op, version, x, dloss=np.ones_like(x), **{**kwargs, **moved, "reduction": "none"}
    )
    assert loss.tobytes() == again.tobytes()
    assert {k: a.tobytes() for k, a in arrays.items()} == before, "an input was modified"


@ops
@given(data=st.data(), seed=seeds)
def test_equals_pytorch(torch, op, data, seed):
    x, kwargs = data.draw(cases(op))
    name = {"bce_with_logits": "binary_cross_entropy_with_logits"}.get(op, op)
    tensors = {k: torch.tensor(a) if k != "reduction" else a for k, a in kwargs.items()}
    assert_equals_torch(
        *(torch, *pair(op), (x,), seed),
        lambda x: getattr(torch.nn.functional, name)(x, **tensors),
        **kwargs,
    )


@versions
def test_empty_batch(op, version):
    empty = np.zeros((0, 3), np.float32)
    for reduction, expected in (("mean", NAN), ("sum", 0.0)):
        loss, dx = run(op, version, empty, empty, reduction=reduction)
        assert loss.dtype == np.float32
        np.testing.assert_equal(float(loss), expected)
        assert dx.shape == (0, 3)
    loss, dx = run(op, version, empty, empty, reduction="none", dloss=empty)
    assert loss.shape == dx.shape == (0, 3)


@pytest.mark.parametrize("version", VERSIONS["l1_loss"])
def test_derivative_of_l1_is_0_where_the_target_is_met(version):
    _, dx = run("l1_loss", version, np.array([1.0, 1.0]), np.array([1.0, 2.0]), reduction="sum")
    np.testing.assert_array_equal(dx, [0, -1])


@versions
@pytest.mark.parametrize("bad", ["x", "target", "dloss"])
def test_nan_passes(op, version, bad):
    arrays = {"x": np.ones(3), "target": np.zeros(3), "dloss": np.ones(3)}
    arrays[bad][1] = NAN
    loss, dx = run(op, version, reduction="none", **arrays)
    nan = [False, True, False]
    np.testing.assert_array_equal(np.isnan(dx), nan)
    np.testing.assert_array_equal(np.isnan(loss), nan if bad != "dloss" else [False] * 3)


@pytest.mark.parametrize("version", VERSIONS["bce_with_logits"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_logits_cost_what_they_miss_by(version, dtype):
    x = np.array([1e4, -1e4, 1e4, -1e4], dtype)
    t = np.array([1, 0, 0, 1], dtype)
    loss, dx = run("bce_with_logits", version, x, t, reduction="none", dloss=np.ones(4, dtype))
    np.testing.assert_allclose(loss, [0, 0, 1e4, 1e4])
    np.testing.assert_allclose(dx, [0, 0, 1, -1])


@pytest.mark.parametrize("version", VERSIONS["bce_with_logits"])
def test_nearly_right_logits_keep_their_digits(version):
    x, t = np.array([40.0, -40.0]), np.array([1.0, 0.0])
    loss, dx = run("bce_with_logits", version, x, t, reduction="none", dloss=np.ones(2))
    e = math.exp(-40)
    np.testing.assert_allclose(loss, [e, e], rtol=1e-13)
    np.testing.assert_allclose(dx, [-e, e], rtol=1e-13)


def test_a_long_float32_sum_keeps_its_digits():
    x = np.full(300_000, 0.1, np.float32)
    x[0] = 4096  # its square swallows the small ones in a float32 sum
    loss, _ = run("mse_loss", "numpy", x, np.zeros_like(x), reduction="sum")
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, np.sum(x.astype(float) ** 2), rtol=1e-7)


X = np.zeros((2, 3))


@ops
def test_bad_input_is_named(op):
    forward, backward = pair(op)
    for args, kwargs, error, message in [
        ((X, X[0]), {}, ValueError, r"target: expected shape \(2, 3\) \(like x\), got \(3,\)"),
        ((X, X.astype(int)), {}, TypeError, r"target: expected float32 or float64, got int64"),
        ((X, X.astype("f4")), {}, TypeError, r"target: expected float64 like x, got float32"),
        ((X, 0.0), {}, TypeError, r"target: expected a NumPy or CuPy array, got float"),
        ((X, X), {"reduction": "avg"}, ValueError, r"reduction: expected one of .*, got 'avg'"),
        ((X, X), {"reduction": None}, ValueError, r"reduction: expected one of .*, got None"),
    ]:
        with pytest.raises(error, match=f"{op}: {message}"):
            forward(*args, **kwargs)
    _, cache = forward(X, X)
    with pytest.raises(ValueError, match=rf"{op}_backward: dloss: expected shape \(\) \(like loss"):
        backward(X, cache)
    with pytest.raises(TypeError, match=rf"{op}_backward: dloss: expected float64 like x"):
        backward(np.float32(1), cache)
    _, cache = forward(X, X, reduction="none")
    with pytest.raises(ValueError, match=rf"{op}_backward: dloss: expected shape \(2, 3\)"):
        backward(1.0, cache)


@pytest.mark.parametrize("name", ["weight", "pos_weight"])
@pytest.mark.parametrize("shape", [(2,), (3, 2), (1, 2, 3), (2, 2, 3)])
def test_a_weight_that_does_not_broadcast_is_named(name, shape):
    with pytest.raises(ValueError, match=rf"{name}: expected a shape that broadcasts to \(2, 3\)"):
        losses.bce_with_logits_forward(X, X, **{name: np.ones(shape)})
