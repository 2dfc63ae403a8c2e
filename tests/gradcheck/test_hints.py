"""Bugs of many kinds are planted by hand, and each is found and called by its name."""

from functools import partial

import numpy as np
import pytest

import student
from minicnn.gradcheck import check_kernel


def conv(bug):
    return student.conv2d_forward, partial(student.conv2d_backward, bug=bug)


def linear(dx="dy @ w", dw="dy.T @ x", db="dy.sum(0)"):
    names = {"np": np}
    source = f"lambda dy, x, w, b: ({dx}, {dw}, {db})"
    return student.linear_forward, eval(source, names)


def backward_only(source):
    return None, eval(source, {"np": np, "softmax": student.softmax})


def from_an_empty_buffer(dy, x):
    """Uses memory that was never written."""
    dx = dy * (1 - np.tanh(x) ** 2)
    dx.ravel()[3] = np.nan
    return dx


class Buffered:
    """Keeps its sum between the calls."""

    def __init__(self):
        self.dw = 0

    def __call__(self, dy, x, w, b):
        self.dw = self.dw + dy.T @ x
        return dy @ w, self.dw, dy.sum(0)


def relu_in_place(x):
    x[x < 0] = 0
    return x


def one_wrong(dy, x):
    dx = dy.copy() * (x > 0)
    dx[0, 1, 2, 1] += 0.5
    return dx


PADDED = {"stride": 2, "padding": 1}
SQUARE = {"size": {"N": 4, "I": 4, "O": 4}}

# what: (op, kernel, options, the gradient that is wrong, kind of the hint)
PLANTED = {
    "sign": ("linear", lambda: linear(dx="-(dy @ w)"), {}, "dx", "sign"),
    "zero": ("linear", lambda: linear(dw="0 * w"), {}, "dw", "zero"),
    "mean for sum": ("conv2d", lambda: conv("dw mean"), {}, "dw", "factor"),
    "sum for mean": (
        "cross_entropy",
        lambda: backward_only("lambda g, x, t: g * (softmax(x) - np.eye(x.shape[1])[t])"),
        {},
        "dx",
        "factor",
    ),
    "factor 2": (
        "mse_loss",
        lambda: backward_only("lambda g, x, t: g * (x - t) / x.size"),
        {},
        "dx",
        "factor",
    ),
    "w not transposed": ("linear", lambda: linear(dx="dy @ w.T"), SQUARE, "dx", "transposed"),
    "dw transposed": ("linear", lambda: linear(dw="x.T @ dy"), SQUARE, "dw", "transposed"),
    "dw transposed, other shape": ("linear", lambda: linear(dw="x.T @ dy"), {}, "dw", "transposed"),
    "flipped kernel": ("conv2d", lambda: conv("flip"), {}, "dx", "flipped kernel"),
    "dw flipped": ("conv2d", lambda: conv("dw flip"), PADDED, "dw", "flipped"),
    "missing +=": ("conv2d", lambda: conv("overwrite"), {}, "dx", "overwritten"),
    "missing += of max-pool": (
        "max_pool2d",
        lambda: (student.max_pool_forward, partial(student.max_pool_backward, bug="overwrite")),
        {"kernel_size": 3, "stride": 1},
        "dx",
        "overwritten",
    ),
    "last image only": ("conv2d", lambda: conv("last image"), {}, "dw", "last image only"),
    "bias over the wrong axes": ("conv2d", lambda: conv("bias axis"), {}, "db", "wrong axis"),
    "bias over the wrong axes, same shape": (
        "linear",
        lambda: linear(db="dy.sum(1)"),
        SQUARE,
        "db",
        "wrong axis",
    ),
    "shifted by one": (
        "sigmoid",
        lambda: backward_only("lambda dy, x: np.roll(dy / (2 + 2 * np.cosh(x)), 1, 3)"),
        {},
        "dx",
        "shifted",
    ),
    "mask forgotten": ("relu", lambda: backward_only("lambda dy, x: dy"), {}, "dx", "dy unchanged"),
    "mask of dy": (
        "relu",
        lambda: backward_only("lambda dy, x: dy * (dy > 0)"),
        {},
        "dx",
        "mask of dy",
    ),
    "dropout's mask forgotten": (
        "dropout",
        lambda: backward_only("lambda dy, x, keep, p: dy / (1 - p)"),
        {"p": 0.4},
        "dx",
        "mask forgotten",
    ),
    "dropout's scale forgotten": (
        "dropout",
        lambda: backward_only("lambda dy, x, keep, p: dy * keep"),
        {"p": 0.4},
        "dx",
        "factor",
    ),
    "every pixel of a window": (
        "max_pool2d",
        lambda: (None, partial(student.max_pool_backward, bug="all")),
        {},
        "dx",
        "mask forgotten",
    ),
    "every maximum at a tie": (
        "max_pool2d",
        lambda: (student.max_pool_forward, partial(student.max_pool_backward, bug="ties")),
        {},
        "dx at ties",
        "ties",
    ),
    "padding cut off on the wrong side": ("conv2d", lambda: conv("crop"), PADDED, "dx", "padding"),
    "border left out": ("conv2d", lambda: conv("border"), {"padding": 1}, "dx", "border"),
    "stride ignored": ("conv2d", lambda: conv("stride"), {"stride": 2}, "dx", "stride"),
    "dilation ignored": ("conv2d", lambda: conv("dilation"), {"dilation": 2}, "dx", "dilation"),
    "groups interleaved": ("conv2d", lambda: conv("groups"), {"groups": 3}, "dx", "groups"),
    "reshape for transpose": (
        "conv2d",
        lambda: conv("reshape"),
        {},
        "dw",
        "reshape for transpose",
    ),
    "statistics as constants": (
        "batch_norm",
        lambda: (student.batch_norm_forward, partial(student.batch_norm_backward, bug="constant")),
        {},
        "dx",
        "statistics constant",
    ),
    "way through the variance": (
        "batch_norm",
        lambda: (student.batch_norm_forward, partial(student.batch_norm_backward, bug="variance")),
        {},
        "dx",
        "variance path",
    ),
    "way through the mean": (
        "batch_norm",
        lambda: (None, partial(student.batch_norm_backward, bug="mean")),
        {},
        "dx",
        "mean path",
    ),
    "weight of batch-norm": (
        "batch_norm",
        lambda: (None, partial(student.batch_norm_backward, bug="weight")),
        {},
        "dx",
        "weight forgotten",
    ),
    "raw x for dw": (
        "batch_norm",
        lambda: (None, partial(student.batch_norm_backward, bug="raw")),
        {},
        "dw",
        "not normalised",
    ),
    "softmax like a sigmoid": (
        "softmax",
        lambda: backward_only("lambda dy, x: dy * softmax(x) * (1 - softmax(x))"),
        {},
        "dx",
        "diagonal only",
    ),
    "one-hot not taken off": (
        "cross_entropy",
        lambda: backward_only("lambda g, x, t: g * softmax(x) / len(x)"),
        {},
        "dx",
        "one-hot missing",
    ),
    "derivative at y": (
        "tanh",
        lambda: backward_only("lambda dy, x: dy * (1 - np.tanh(np.tanh(x))**2)"),
        {},
        "dx",
        "derivative of y",
    ),
    "formula of y at x": (
        "sigmoid",
        lambda: backward_only("lambda dy, x: dy * x * (1 - x)"),
        {},
        "dx",
        "formula of y",
    ),
    "upstream gradient forgotten": (
        "silu",
        lambda: backward_only("lambda dy, x: 1/(1+np.exp(-x)) * (1 + x * (1 - 1/(1+np.exp(-x))))"),
        {},
        "dx",
        "upstream forgotten",
    ),
    "not a number": ("tanh", lambda: (None, from_an_empty_buffer), {}, "dx", "nan"),
    "one element": ("relu", lambda: (None, one_wrong), {}, "dx", "one element"),
}
FAULTY = {
    "adds to an old buffer": (
        "linear",
        lambda: (student.linear_forward, Buffered()),
        "not repeatable",
    ),
    "writes into x": (
        "relu",
        lambda: (relu_in_place, lambda dy, x: dy * (x > 0)),
        "writes input",
    ),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_bug_is_found_and_named(what, seed):
    op, kernel, options, where, kind = PLANTED[what]
    report = check_kernel(op, *kernel(), seed=seed, **options)
    assert not report
    assert report.verdict == "bug", report
    wrong = [check for check in report.checks if not check.ok]
    assert where in [check.name for check in wrong], report
    (check,) = [check for check in wrong if check.name == where]
    assert check.verdict == "bug"
    assert check.hints, report
    assert check.hints[0].kind == kind, report
    assert check.hints[0].text in str(report)


def test_there_are_more_than_twenty_kinds():
    kinds = {kind for *_, kind in PLANTED.values()} | {kind for *_, kind in FAULTY.values()}
    assert len(kinds) > 20


@pytest.mark.parametrize("what", FAULTY)
def test_a_broken_rule_is_named(what):
    op, kernel, kind = FAULTY[what]
    report = check_kernel(op, *kernel())
    assert not report
    assert [hint.kind for hint in report.faults] == [kind], report
    assert "FAIL" in str(report)
