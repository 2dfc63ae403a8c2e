"""nll_loss and cross_entropy: labels, probabilities and every way to weigh them."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops import cross_entropy as module
from minicnn.ops.cross_entropy import VERSIONS, cross_entropy_backward, cross_entropy_forward
from minicnn.ops.losses import REDUCTIONS
from opchecks import (
    assert_any_threads,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
    both_ways,
)
from strategies import LAYOUTS, dtypes, laid_out, layouts, normal, seeds

INF, NAN = np.inf, np.nan
ops = pytest.mark.parametrize("op", VERSIONS)
versions = pytest.mark.parametrize(
    ("op", "version"), [(op, v) for op, named in VERSIONS.items() for v in named]
)
only_cross_entropy = pytest.mark.parametrize("version", VERSIONS["cross_entropy"])


def pair(op):
    return getattr(module, f"{op}_forward"), getattr(module, f"{op}_backward")


def run(op, version, x, target, dloss=1.0, **kwargs):
    forward, backward = pair(op)
    with use(version):
        loss, cache = forward(x, target, **kwargs)
        return loss, backward(dloss, cache)


@st.composite
def cases(draw, op, dtype=np.float64):
    """Return the scores (one label counts at least) and the other arguments."""
    C, places = draw(st.integers(1, 4)), draw(st.lists(st.integers(1, 3), max_size=2))
    rng = np.random.default_rng(draw(seeds))
    shape = draw(st.integers(1, 3)), *places
    kwargs = {"reduction": draw(st.sampled_from(REDUCTIONS))}
    if draw(st.booleans()):
        kwargs["weight"] = rng.uniform(0.5, 2, C).astype(dtype)
    if op == "cross_entropy":
        kwargs["label_smoothing"] = draw(st.sampled_from([0.0, 0.1, 0.75, 1.0]))
    if op == "cross_entropy" and draw(st.booleans()):
        target = rng.dirichlet(np.ones(C), shape).astype(dtype)  # (N, D1, ..., C)
        kwargs["target"] = np.moveaxis(target, -1, 1)  # (N, C, D1, ...)
    else:
        target = rng.integers(C, size=shape)
        if draw(st.booleans()):
            ignored = kwargs["ignore_index"] = draw(st.sampled_from([-100, -1, 255, 0]))
            target[rng.random(shape) < 0.5] = ignored
            if C > 1 or ignored != 0:
                target.flat[0] = C - 1  # a mean over nothing is NaN, and tested on its own
            else:
                kwargs["reduction"] = "sum"
        kwargs["target"] = target
    return normal(rng, (shape[0], C, *places), dtype), kwargs


def test_hand_computed_numbers():
    log_p = np.log([[0.25, 0.75], [0.5, 0.5], [0.1, 0.9]])
    target = np.array([1, 0, -100])
    weight = np.array([3.0, 1.0])
    elements = [-math.log(0.75), -3 * math.log(0.5), 0]
    for reduction, dloss, loss, g in [
        ("none", np.array([1.0, 2.0, 5.0]), elements, [1, 2, 5]),
        ("sum", 2.0, sum(elements), [2, 2, 2]),
        ("mean", 2.0, sum(elements) / 4, [0.5, 0.5, 0.5]),
    ]:
        for version in VERSIONS["nll_loss"]:
            got, dx = run(
                "nll_loss", version, log_p, target, dloss, weight=weight, reduction=reduction
            )
            np.testing.assert_allclose(got, loss, rtol=1e-15)
            np.testing.assert_allclose(dx, [[0, -g[0]], [-3 * g[1], 0], [0, 0]], rtol=1e-15)


@only_cross_entropy
def test_gradient_of_plain_labels_is_softmax_minus_one_hot(version):
    x = np.log([[1.0, 3.0], [1.0, 1.0]])
    loss, dx = run("cross_entropy", version, x, np.array([1, 0]))
    np.testing.assert_allclose(loss, -(math.log(3 / 4) + math.log(1 / 2)) / 2, rtol=1e-15)
    np.testing.assert_allclose(dx, [[0.25 / 2, -0.25 / 2], [-0.5 / 2, 0.5 / 2]], rtol=1e-15)


@only_cross_entropy
def test_hand_computed_label_smoothing(version):
    x, target, weight = np.log([[1.0, 2.0, 5.0]]), np.array([2]), np.array([1.0, 3.0, 2.0])
    # 0.7 on the label and 0.1 on each class; the mean divides by the label's weight, 2.
    a = np.array([0.1 * 1, 0.1 * 3, 0.8 * 2])
    p = np.array([1, 2, 5]) / 8
    loss, dx = run("cross_entropy", version, x, target, weight=weight, label_smoothing=0.3)
    np.testing.assert_allclose(loss, -a @ np.log(p) / 2, rtol=1e-14)
    np.testing.assert_allclose(dx, [(a.sum() * p - a) / 2], rtol=1e-14)
    # An ignored label is not smoothed either.
    two, two_dx = run(
        *("cross_entropy", version, np.repeat(x, 2, axis=0), np.array([2, -100])),
        weight=weight,
        label_smoothing=0.3,
    )
    assert two == loss
    np.testing.assert_array_equal(two_dx, [dx[0], np.zeros(3)])
    # Of class probabilities the mean divides by the number of rows, 1.
    loss, dx = run(
        *("cross_entropy", version, x, np.array([[0.0, 0.0, 1.0]])),
        weight=weight,
        label_smoothing=0.3,
    )
    np.testing.assert_allclose(loss, -a @ np.log(p), rtol=1e-14)
    np.testing.assert_allclose(dx, [a.sum() * p - a], rtol=1e-14)


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
    arrays = {k: a for k, a in kwargs.items() if isinstance(a, np.ndarray)}
    before = {k: a.tobytes() for k, a in arrays.items()}
    assert_layout_free(version, *pair(op), (x,), seed, layout, **kwargs)
    with use(version):
        loss, _ = pair(op)[0](x, **kwargs)
        moved = {k: laid_out(a, layout) for k, a in arrays.items()}
        again, _ = pair(op)[0](x, **{**kwargs, **moved})
    assert loss.tobytes() == again.tobytes()
    assert {k: a.tobytes() for k, a in arrays.items()} == before, "an input was modified"


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("op", "smoothing"),
    [("nll_loss", {}), *(("cross_entropy", {"label_smoothing": e}) for e in (0.0, 0.1, 1.0))],
)
@pytest.mark.parametrize("ignored", [None, -100, 1])
def test_labels_equal_pytorch(torch, shape, reduction, weighted, op, smoothing, ignored):
    rng = np.random.default_rng(0)
    N, C, *places = shape
    kwargs = {"target": rng.integers(C, size=(N, *places)), "reduction": reduction, **smoothing}
    if weighted:
        kwargs["weight"] = rng.uniform(0.5, 2, C)
    if ignored is not None:
        kwargs["ignore_index"] = kwargs["target"][::2] = ignored
    assert_equals_torch_function(torch, op, normal(rng, shape), kwargs)


@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 2, 3)])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_probabilities_equal_pytorch(torch, shape, reduction, weighted, smoothing):
    rng = np.random.default_rng(0)
    N, C, *places = shape
    target = rng.dirichlet(np.ones(C), (N, *places))  # (N, D1, ..., C)
    target = np.moveaxis(target, -1, 1)  # (N, C, D1, ...)
    kwargs = {"target": target, "reduction": reduction, "label_smoothing": smoothing}
    if weighted:
        kwargs["weight"] = rng.uniform(0.5, 2, C)
    assert_equals_torch_function(torch, "cross_entropy", normal(rng, shape), kwargs)


def assert_equals_torch_function(torch, op, x, kwargs):
    tensors = {k: torch.tensor(a) if isinstance(a, np.ndarray) else a for k, a in kwargs.items()}
    assert_equals_torch(
        *(torch, *pair(op), (x,), 0),
        lambda x: getattr(torch.nn.functional, op)(x, **tensors),
        **kwargs,
    )


@versions
@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.int64, np.uint64, ">i4", ">i8"])
def test_labels_of_any_integer_type(op, version, dtype):
    rng = np.random.default_rng(0)
    x, weight = normal(rng, (8, 4, 7, 9)), rng.uniform(0.5, 2, 4)
    target = rng.integers(4, size=(8, 7, 9))
    expected, dx = run(op, version, x, target, weight=weight)
    for layout in LAYOUTS:
        moved = laid_out(target.astype(dtype), layout)
        got, got_dx = run(op, version, x, moved, weight=weight)
        assert got == expected, layout  # to the last bit: the sums keep their order
        np.testing.assert_array_equal(got_dx, dx)


# ---------------------------------------------------------------- nothing, infinity and NaN


@versions
@pytest.mark.parametrize("rows", [0, 2])
def test_a_mean_over_no_labels_is_nan_and_its_gradient_zero(op, version, rows):
    x, target = np.ones((rows, 3), np.float32), np.full(rows, -100)
    loss, dx = run(op, version, x, target)
    assert loss.dtype == np.float32
    assert np.isnan(loss)
    np.testing.assert_array_equal(dx, np.zeros((rows, 3)))
    loss, dx = run(op, version, x, target, reduction="sum")
    assert loss == 0
    np.testing.assert_array_equal(dx, np.zeros((rows, 3)))
    loss, dx = run(op, version, x, target, np.ones(rows, "f4"), reduction="none")
    np.testing.assert_array_equal(loss, np.zeros(rows))
    np.testing.assert_array_equal(dx, np.zeros((rows, 3)))


@only_cross_entropy
def test_no_class_probabilities(version):
    loss, dx = run("cross_entropy", version, np.ones((0, 3)), np.ones((0, 3)))
    assert np.isnan(loss)
    assert dx.shape == (0, 3)


@only_cross_entropy
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_scores_cost_what_they_miss_by(version, dtype):
    x = np.array([[1e4, -1e4], [1e4, -1e4]], dtype)
    loss, dx = run(
        *("cross_entropy", version, x, np.array([0, 1]), np.ones(2, dtype)), reduction="none"
    )
    np.testing.assert_array_equal(loss, [0, 2e4])
    np.testing.assert_array_equal(dx, [[0, 0], [1, -1]])


@only_cross_entropy
def test_a_score_of_minus_infinity_rules_a_class_out(version):
    x = np.array([[0.0, -INF, math.log(3)]])
    loss, dx = run("cross_entropy", version, x, np.array([0]))
    np.testing.assert_allclose(loss, math.log(4))
    np.testing.assert_allclose(dx, [[-0.75, 0, 0.75]])
    loss, dx = run("cross_entropy", version, x, np.array([[1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(loss, math.log(4))
    loss, dx = run("cross_entropy", version, x, np.array([1]))
    assert loss == INF
    np.testing.assert_allclose(dx, [[0.25, -1, 0.75]])


@versions
def test_nan_passes_and_stays_in_its_row(op, version):
    x = np.zeros((2, 2))
    x[0, 1] = NAN
    loss, dx = run(op, version, x, np.array([1, 1]), np.ones(2), reduction="none")
    np.testing.assert_array_equal(np.isnan(loss), [True, False])
    assert np.isfinite(dx[1]).all()
    assert np.isnan(run(op, version, x, np.array([1, 1]))[0])
    assert np.isnan(run(op, version, np.ones((2, 2)), np.array([1, 1]), NAN)[1]).any()


def test_a_long_float32_mean_keeps_its_digits():
    x = np.zeros((1, 2, 300, 1000), np.float32)
    x[0, 0, 0, 0] = 1e7  # its loss swallows the small ones in a float32 sum
    loss, _ = run("cross_entropy", "numpy", x, np.ones((1, 300, 1000), int), reduction="sum")
    assert loss.dtype == np.float32
    np.testing.assert_allclose(loss, 1e7 + (300_000 - 1) * math.log(2), rtol=1e-7)


# ---------------------------------------------------------------- bad input

X, T = np.zeros((4, 10)), np.arange(4)


@ops
@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (
            (X, np.array([0, 1, 2, 12])),
            {},
            ValueError,
            r"target: expected labels in 0\.\.9, got 12 at position \(3,\)$",
        ),
        (
            (np.zeros((1, 2, 2, 2)), np.array([[[0, 1], [-3, 0]]])),
            {},
            ValueError,
            r"target: expected labels in 0\.\.1, got -3 at position \(0, 1, 0\)$",
        ),
        ((X, T + 7), {}, ValueError, r"got 10 at position \(3,\)"),
        ((X, T - 100), {"ignore_index": 0}, ValueError, r"got -100 at position \(0,\)"),
        ((X, T.astype(float)), {}, TypeError, r"target: expected integer labels, got float64"),
        ((X, T > 1), {}, TypeError, r"target: expected integer labels, got bool"),
        ((X, [0, 1, 2, 3]), {}, TypeError, r"target: expected an array of labels, got list"),
        ((X, T[:3]), {}, ValueError, r"target: expected shape \(4,\) .*, got \(3,\)"),
        ((X, X.astype(int)), {}, ValueError, r"target: expected shape \(4,\) .*, got \(4, 10\)"),
        ((X[0], T), {}, ValueError, r"expected shape \(N, C\) or .*, got \(10,\)"),
        ((X[:, :0], T), {}, ValueError, r"with a class or more, got \(4, 0\)"),
        ((X.astype(int), T), {}, TypeError, r"expected float32 or float64, got int64"),
        ((X, T, np.ones(9)), {}, ValueError, r"weight: expected shape \(10,\) .*got \(9,\)"),
        ((X, T, np.ones(10, "f4")), {}, TypeError, r"weight: expected float64 like"),
        ((X, T), {"ignore_index": 1.5}, TypeError, r"ignore_index: expected an integer"),
        ((X, T), {"reduction": "avg"}, ValueError, r"reduction: expected one of .*, got 'avg'"),
    ],
)
def test_bad_input_is_named(op, args, kwargs, error, message):
    with pytest.raises(error, match=f"{op}: .*{message}"):
        pair(op)[0](*args, **kwargs)


@pytest.mark.parametrize(
    ("target", "kwargs", "error", "message"),
    [
        (T, {"label_smoothing": 1.5}, ValueError, "label_smoothing: expected .*, got 1.5"),
        (T, {"label_smoothing": -0.1}, ValueError, "label_smoothing: expected .*, got -0.1"),
        (T, {"label_smoothing": "0.1"}, TypeError, "label_smoothing: expected .*, got '0.1'"),
        (X, {"ignore_index": 3}, ValueError, "ignore_index: expected none with class prob"),
        (X[:, :9], {}, ValueError, r"target: expected shape \(4, 10\) \(class probabilities"),
        (X.astype("f4"), {}, TypeError, "target: expected float64 like x, got float32"),
    ],
)
def test_bad_smoothing_and_probabilities_are_named(target, kwargs, error, message):
    with pytest.raises(error, match=f"cross_entropy: {message}"):
        cross_entropy_forward(X, target, **kwargs)


def test_probabilities_are_no_labels_for_nll_loss():
    with pytest.raises(TypeError, match="nll_loss: target: expected integer labels, got float64"):
        module.nll_loss_forward(X, X)


@ops
def test_bad_upstream_gradient_is_named(op):
    forward, backward = pair(op)
    _, cache = forward(X, T)
    with pytest.raises(ValueError, match=rf"{op}_backward: dloss: expected shape \(\) \(like loss"):
        backward(np.ones(4), cache)
    _, cache = forward(X, T, reduction="none")
    with pytest.raises(ValueError, match=rf"{op}_backward: dloss: expected shape \(4,\)"):
        backward(1.0, cache)
    with pytest.raises(TypeError, match=rf"{op}_backward: dloss: expected float64 like x"):
        backward(np.ones(4, "f4"), cache)


def test_another_version_can_run_the_backward():
    x = normal(np.random.default_rng(0), (4, 10))
    with use("reference"):
        _, cache = cross_entropy_forward(x, T)
        expected = cross_entropy_backward(1.0, cache)
    np.testing.assert_allclose(cross_entropy_backward(1.0, cache), expected, rtol=1e-13)


@pytest.mark.parametrize("version", ["reference", "numpy"])
def test_another_version_can_take_over_from_numba(version):
    pytest.importorskip("numba", reason="Numba is not installed")
    rng = np.random.default_rng(0)
    x, target, weight = normal(rng, (4, 3, 5)), rng.integers(-1, 3, (4, 5)), rng.uniform(1, 2, 3)
    with use("numba"):
        _, cache = cross_entropy_forward(x, target, weight, ignore_index=-1)
        expected = cross_entropy_backward(2.0, cache)
    with use(version):
        np.testing.assert_allclose(cross_entropy_backward(2.0, cache), expected, atol=1e-15)


@pytest.mark.parametrize("shape", [(700, 67), (9, 5, 40, 41), (3, 20_001)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_many_labels(shape, dtype):
    """Work for several threads, and rows that no vectors fill."""
    pytest.importorskip("numba", reason="Numba is not installed")
    rng = np.random.default_rng(0)
    x, weight = 3 * normal(rng, shape, dtype), rng.uniform(0.5, 2, shape[1]).astype(dtype)
    target = rng.integers(shape[1], size=(shape[0], *shape[2:]))
    target.flat[::5] = -100
    for reduction in ("mean", "none"):
        kwargs = {"target": target, "weight": weight, "reduction": reduction}
        assert_any_threads(
            "numba", cross_entropy_forward, cross_entropy_backward, (x,), 1, **kwargs
        )
        y, _, (dx,) = both_ways(
            "numba", cross_entropy_forward, cross_entropy_backward, (x,), 1, **kwargs
        )
        kwargs["weight"] = weight.astype(float)
        want, _, (wanted,) = both_ways(
            "numpy", cross_entropy_forward, cross_entropy_backward, (x.astype(float),), 1, **kwargs
        )
        u = np.finfo(dtype).eps
        np.testing.assert_allclose(y, want, rtol=4 * u, atol=4 * u)
        np.testing.assert_allclose(dx, wanted, rtol=0, atol=4 * u * abs(wanted).max())
