"""The checker itself: right gradients pass, and each kind of wrong one fails."""

import numpy as np
import pytest

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    Sigmoid,
    gradcheck,
    ops,
)
from minicnn.gradcheck import adjoint_gap, compare, numerical_gradient
from strategies import normal


def cubic_forward(x, w):
    return x**3 * w, (x, w)


def cubic_backward(dy, cache):
    x, w = cache
    return dy * 3 * x**2 * w, dy * x**3


X, W = normal(np.random.default_rng(0), (2, 3)), normal(np.random.default_rng(1), (2, 3))


def test_right_gradients_pass_and_inputs_stay():
    x = X.copy()
    report = gradcheck((cubic_forward, cubic_backward), x, W, names=("x", "w"))
    assert report
    assert report.ok
    assert [check.name for check in report.checks] == ["x", "w"]
    np.testing.assert_array_equal(x, X)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda dx, dw: (-dx, dw),
        lambda dx, dw: (dx, 0 * dw),
        lambda dx, dw: (2 * dx, dw),
        lambda dx, dw: (dx[::-1], dw),
        lambda dx, dw: (dx * (1 + 1e-5), dw),
        lambda dx, dw: (np.where(np.arange(6).reshape(2, 3) == 4, np.nan, dx), dw),
        lambda dx, dw: (dx + np.eye(2, 3) * 1e-3, dw),
        lambda dx, dw: (dx - np.eye(2, 3) * 1e-3, dw),
    ],
)
def test_wrong_gradients_fail(wrong):
    report = gradcheck((cubic_forward, lambda dy, c: wrong(*cubic_backward(dy, c))), X, W)
    assert not report
    assert "FAIL" in str(report)


def test_the_worst_element_is_named():
    def backward(dy, cache):
        dx, dw = cubic_backward(dy, cache)
        dx[1, 2] += 1
        return dx, dw

    check = gradcheck((cubic_forward, backward), X, W).checks[0]
    assert check.where == (1, 2)
    np.testing.assert_allclose(check.analytic - check.numeric, 1, rtol=1e-6)
    assert "(1, 2)" in str(check)


def test_a_zero_backward_behind_softmax_fails():
    """With an upstream gradient of ones it would pass, for softmax adds up to one."""
    pair = ops.softmax_forward, lambda dy, cache: np.zeros_like(dy)
    assert not gradcheck(pair, X)
    assert gradcheck((ops.softmax_forward, ops.softmax_backward), X)


def test_models_are_checked_with_their_parameters():
    model = Sequential(
        Linear(3, 4, rng=0, dtype=np.float64), Sigmoid(), Linear(4, 2, rng=1, dtype=np.float64)
    )
    report = gradcheck(model, X)
    assert report
    names = ["input 0", "0.weight", "0.bias", "2.weight", "2.bias"]
    assert [check.name for check in report.checks] == names
    model[0].backward = lambda dy, cache: dy @ model[0].weight  # forgets dw and db
    assert [check.ok for check in gradcheck(model, X).checks] == [True, False, False, True, True]


def test_numerical_gradient_of_a_known_function():
    x = X.copy()
    dy = normal(np.random.default_rng(2), x.shape)
    numeric = numerical_gradient(lambda: np.sin(x), x, dy)
    np.testing.assert_allclose(numeric, np.cos(X) * dy, rtol=1e-8)
    np.testing.assert_array_equal(x, X)


def test_the_upstream_gradient_is_not_the_callers_x():
    seen = []
    x = normal(np.random.default_rng(5), (2, 3))
    gradcheck((lambda x: (x, None), lambda dy, cache: seen.append(dy) or dy), x, rng=5)
    assert not np.allclose(seen[0], x)


def test_an_op_that_returns_its_input():
    assert gradcheck((lambda x: (x, None), lambda dy, cache: dy), X)


def test_a_layer_is_left_as_it_was():
    """Running statistics, gradients and the draws of dropout; and dropout can be checked."""
    layer = Sequential(BatchNorm2d(3, dtype=np.float64), Dropout(0.5, rng=0))
    x = normal(np.random.default_rng(0), (4, 3, 1, 2))
    layer[0].grads["weight"][...] = 7
    before, draws = layer.state_dict(), layer[1].rng.bit_generator.state
    assert gradcheck(layer, x)
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
    assert (layer[0].grads["weight"] == 7).all()
    assert layer[1].rng.bit_generator.state == draws


@pytest.mark.parametrize("grads", [(), (None, X), (X,)])
def test_a_missing_gradient_is_no_pass(grads):
    with pytest.raises(ValueError, match="backward: expected a gradient for each of 2 inputs"):
        gradcheck((cubic_forward, lambda dy, cache: grads), X, W)


def test_an_error_on_the_way_puts_the_input_back():
    x = X.copy()
    with pytest.raises(ZeroDivisionError):
        numerical_gradient(lambda: 1 / 0, x, X)
    np.testing.assert_array_equal(x, X)


def test_empty_input():
    assert gradcheck((lambda x: (x, None), lambda dy, cache: dy), np.zeros((0, 3)))


def test_adjoint_gap():
    A = normal(np.random.default_rng(0), (4, 3))
    x, dy = normal(np.random.default_rng(1), 3), normal(np.random.default_rng(2), 4)
    assert adjoint_gap(A @ x, dy, x, A.T @ dy) < 1e-15
    assert adjoint_gap(A @ x, dy, x, -(A.T @ dy)) > 1e-3
    assert adjoint_gap(np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0)) == 0


def test_bad_input_is_named():
    with pytest.raises(TypeError, match="gradcheck: input 1: expected a float64 array, got float3"):
        gradcheck((cubic_forward, cubic_backward), X, W.astype(np.float32))
    with pytest.raises(TypeError, match="gradcheck: input 0: expected a float64 array, got list"):
        gradcheck((cubic_forward, cubic_backward), [1.0], W)
    with pytest.raises(ValueError, match=r"gradcheck: x: expected a gradient of shape \(2,\), got"):
        compare("x", np.zeros(3), np.zeros(2), 1e-6, 1e-6)
    with pytest.raises(TypeError, match="numerical_gradient: x: expected float64, got float32"):
        numerical_gradient(lambda: 0, X.astype(np.float32), X)


def test_the_layer_that_fails_alone_is_named():
    class Forgetful(ReLU):
        def backward(self, dy, cache):
            return dy

    f64 = {"dtype": np.float64}
    model = Sequential(Linear(3, 5, rng=0, **f64), Forgetful(), Linear(5, 2, rng=1, **f64))
    report = gradcheck(model, X)
    assert [check.ok for check in report.checks] == [False, False, False, True, True]
    assert [hint.kind for hint in report.notes] == ["layer"]
    assert "layer 1, Forgetful(), fails alone: look at its dx" in str(report)


def test_a_model_that_joins_right_layers_wrongly():
    class Backwards(Sequential):
        def backward(self, dy, cache):
            return 2 * super().backward(dy, cache)

    f64 = {"dtype": np.float64}
    model = Backwards(Linear(3, 3, rng=0, **f64), Linear(3, 3, rng=1, **f64))
    assert "each layer alone is right" in str(gradcheck(model, X))


def test_gradients_that_are_not_added_up_are_named():
    layer = Linear(3, 2, rng=0, dtype=np.float64)

    def backward(dy, cache):
        layer.grads["weight"][...] = dy.T @ cache.x
        layer.grads["bias"] += dy.sum(0)
        return dy @ cache.w

    layer.backward = backward
    report = gradcheck(layer, X)
    assert all(check.ok for check in report.checks)
    assert not report
    assert [hint.kind for hint in report.faults] == ["does not add"]
    assert "backward: weight: expected to be added" in str(report)


def test_only_some_elements_are_looked_at():
    model = Linear(3, 50, rng=0, dtype=np.float64)
    report = gradcheck(model, X, samples=4)
    assert report
    assert [check.size for check in report.checks] == [4, 4, 4]
    model.backward = lambda dy, cache: dy @ model.weight
    report = gradcheck(model, X, samples=4)
    assert [check.ok for check in report.checks] == [True, False, False]
    assert report.checks[1].bad <= 4


def test_a_forward_that_draws_anew_is_refused():
    rng = np.random.default_rng(0)
    pair = lambda x: ops.dropout_forward(x, 0.5, rng=rng), ops.dropout_backward
    with pytest.raises(ValueError, match="forward: expected the same numbers from a second call"):
        gradcheck(pair, X)


def test_broken_rules_of_a_pair():
    def in_place(x):
        x *= 2
        return x.copy(), None

    report = gradcheck((in_place, lambda dy, cache: 2 * dy), X)
    assert [hint.kind for hint in report.faults] == ["writes input"]

    def spoils(dy, cache):
        dy *= 3
        return dy

    report = gradcheck((lambda x: (3 * x, None), spoils), X)
    assert "backward: dy: it was written to" in str(report)
    total = [0.0]

    def adds(dy, cache):
        total[0] = total[0] + dy
        return total[0]

    report = gradcheck((lambda x: (x.copy(), None), adds), X)
    assert "not repeatable" in [hint.kind for hint in report.faults]


def test_the_smallest_input_of_a_pair():
    """Only the third row is wrong: three rows have to stay."""

    def backward(dy, cache):
        dx, dw = cubic_backward(dy, cache)
        dx[2:] *= 2
        return dx, dw

    x, w = normal(np.random.default_rng(3), (5, 4)), normal(np.random.default_rng(4), (5, 4))
    report = gradcheck((cubic_forward, backward), x, w, names=("x", "w"))
    assert report.smallest.shapes == {"x": (3, 1), "w": (3, 1)}
    assert report.smallest.name == "x"
    assert "smallest failing case: x (3, 1), w (3, 1)" in str(report)


def test_a_gradient_of_another_shape_is_a_bug_with_a_reason():
    report = gradcheck((cubic_forward, lambda dy, c: (cubic_backward(dy, c)[0].T, dy)), X, W)
    assert report.checks[0].hints[0].kind == "transposed"
    assert "expected shape (2, 3) like the input, got (3, 2)" in str(report)


def test_the_table_of_steps():
    report = gradcheck((cubic_forward, cubic_backward), X, W, steps=True)
    assert report
    table = report.table()
    assert table.count("error") == 2
    assert table.count("1e-05") >= 2
    assert gradcheck((cubic_forward, cubic_backward), X, W).table() == ""


def network_on_a_flat_background(wrong=False):
    """Where the picture is flat, all maxima of a window are tied, and so they are in every map."""
    f64 = {"dtype": np.float64}
    model = Sequential(
        Conv2d(1, 4, 3, rng=0, **f64),
        ReLU(),
        MaxPool2d(2),
        Conv2d(4, 4, 3, rng=1, **f64),
        ReLU(),
        Flatten(),
        Linear(36, 3, rng=2, **f64),
    )
    if wrong:
        model[3].backward = lambda dy, cache: 0.5 * Conv2d.backward(model[3], dy, cache)
    x = np.zeros((1, 1, 12, 12))
    x[0, 0, 4:7, 3:9] = normal(np.random.default_rng(1), (3, 6))
    return model, x


def test_ties_all_over_a_network_are_no_bug():
    report = gradcheck(*network_on_a_flat_background())
    assert not report.checks[0].ok
    assert report.verdict in ("kink", "tie"), report


def test_a_bug_among_those_ties_is_one():
    report = gradcheck(*network_on_a_flat_background(wrong=True))
    assert report.verdict == "bug"
    assert [hint.text for hint in report.notes] == [
        "layer 3, Conv2d(4, 4, kernel_size=(3, 3), stride=(1, 1)), fails alone: look at its dx"
    ]
