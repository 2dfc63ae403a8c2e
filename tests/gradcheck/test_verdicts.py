"""Each verdict where it belongs, and a bug that hides at a kink is still a bug."""

from functools import partial

import numpy as np
import pytest

from minicnn import gradcheck, ops
from minicnn.gradcheck.differences import STEPS, sweep
from minicnn.gradcheck.verdicts import FACTOR, SHORT, judge, rounding

X = np.random.default_rng(0).standard_normal((3, 4))


def abs_pair(at_zero):
    return lambda x: (np.abs(x), x), lambda dy, x: dy * np.where(x == 0, at_zero, np.sign(x))


@pytest.mark.parametrize(
    ("at_zero", "verdict"), [(-1, "kink"), (-0.3, "kink"), (1, "kink"), (1.5, "bug"), (-3, "bug")]
)
def test_at_a_kink_any_slope_in_between_will_do(at_zero, verdict):
    x = X.copy()
    x[1, 2] = 0
    report = gradcheck(abs_pair(at_zero), x)
    if at_zero:
        assert not report
        assert report.verdict == verdict
        assert report.checks[0].where == (1, 2)


@pytest.mark.parametrize("distance", [1e-7, -3e-7])
def test_beside_a_kink_only_one_slope_is_right(distance):
    x = X.copy()
    x[0, 0] = distance
    right = gradcheck((ops.relu_forward, ops.relu_backward), x)
    assert right.verdict == "kink"

    def backward(dy, cache):
        dx = ops.relu_backward(dy, cache)
        dx[0, 0] = dy[0, 0] / 2  # between both slopes, as would do at the kink itself
        return dx

    wrong = gradcheck((ops.relu_forward, backward), x)
    assert wrong.verdict == "bug"
    assert wrong.checks[0].where == (0, 0)


def test_a_tie_is_told_from_a_kink():
    x = np.array([[[[1.0, 3.0, -2.0, 0.5], [3.0, 2.0, 0.1, -1.0]]]])
    pair = partial(ops.max_pool2d_forward, kernel_size=2), ops.max_pool2d_backward
    assert gradcheck(pair, x).verdict == "tie"
    zeros = np.array([[0.0, 0.0, 1.0]])
    assert gradcheck((ops.relu_forward, ops.relu_backward), zeros).verdict == "kink"


def test_a_bug_among_kinks_is_the_verdict():
    x = X.copy()
    x[0] = 0
    report = gradcheck((ops.relu_forward, lambda dy, c: 1.5 * ops.relu_backward(dy, c)), x)
    assert report.verdict == "bug"


def test_a_step_that_is_too_long_is_precision():
    pair = lambda x: (np.sin(300 * x), x), lambda dy, x: dy * 300 * np.cos(300 * x)
    assert gradcheck(pair, X)
    report = gradcheck(pair, X, step=1e-3)
    assert report.verdict == "precision"
    assert "no bug" in str(report)


def test_a_forward_in_float32_is_precision_and_a_bug_behind_it_a_bug():
    forward = lambda x: (np.tanh(x.astype("f4")), x)  # noqa: E731
    assert gradcheck((forward, lambda dy, x: dy / np.cosh(x) ** 2), X).verdict == "precision"
    assert gradcheck((forward, lambda dy, x: 1.2 * dy / np.cosh(x) ** 2), X).verdict == "bug"


def test_a_gradient_that_is_not_finite_is_a_bug():
    x, dy = X.copy(), np.ones_like(X)
    assert judge(lambda: x * x, x, dy, (0, 0), np.nan, 1e-6) == "bug"
    assert judge(lambda: x * x, x, dy, (0, 0), 2 * x[0, 0], 1e-6) == "precision"


@pytest.mark.parametrize("name", SHORT)
def test_rounding_falls_otherwise_for_another_gradient(name):
    rng = np.random.default_rng(1)
    exact = rng.standard_normal(200)
    unit = SHORT[name]

    def rounded(a):
        mantissa, exponent = np.frexp(a)
        return np.ldexp(np.round(mantissa / unit) * unit, exponent)

    residual = rounded(exact) - exact
    again = rounded(exact * FACTOR) / FACTOR - exact
    scale = np.abs(exact).max()
    assert rounding(residual, again, scale) == name
    if name != "float32":
        assert rounding(residual, residual, scale) is None, "a bug comes back the same"
        assert rounding(residual, None, scale) is None
        assert rounding(residual, None, scale, known=name) == name
    assert rounding(residual + 0.1 * scale, again, scale) is None


def test_the_error_against_step_size_is_a_valley_for_a_right_gradient():
    x, dy = X.copy(), np.ones_like(X)
    right = sweep(lambda: np.exp(x), x, dy, (1, 1), float(np.exp(x[1, 1])))
    assert [step.step for step in right] == list(STEPS)
    errors = [step.error for step in right]
    assert min(errors) < 1e-9
    assert errors[0] > 1e6 * min(errors)
    assert errors[-1] > 1e3 * min(errors)
    wrong = sweep(lambda: np.exp(x), x, dy, (1, 1), 1.1 * float(np.exp(x[1, 1])))
    assert min(step.error for step in wrong) > 0.01
    np.testing.assert_array_equal(x, X)
