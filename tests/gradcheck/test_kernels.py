"""Kernels of one's own: right ones are never called wrong, whatever they are made of."""

import ctypes
import shutil
import subprocess
from functools import partial

import numpy as np
import pytest

import student
from minicnn import gradcheck, ops, use
from minicnn import gradcheck as gradcheck_function
from minicnn.gradcheck import (
    OPS,
    check_batch_norm,
    check_conv2d,
    check_cross_entropy,
    check_kernel,
    check_linear,
    check_max_pool2d,
    check_relu,
)
from minicnn.gradcheck.kernels import own_kernel

DTYPES = ("float64", "float64", "float32")


def random_options(op, rng):
    """Options of an op that fit together."""
    two = [int(n) for n in rng.integers(1, 4, 2)]
    choices = {
        "stride": (1, 2, tuple(two)),
        "padding": (0, 1, (1, 0), ((1, 0), (0, 1))),
        "dilation": (1, 2, (1, 2)),
        "groups": (1, 1, 2, 3),
        "kernel_size": (2, 3, (3, 2)),
        "ceil_mode": (False, True),
        "count_include_pad": (False, True),
        "output_size": (1, 2, (3, 2), (2, 5)),
        "num_groups": (1, 2, 4),
        "dim": (0, 1),
        "p": (0.1, 0.5),
        "eps": (1e-5, 1e-2),
        "reduction": ("mean", "sum", "none"),
        "label_smoothing": (0.0, 0.2),
        "negative_slope": (0.01, 0.3),
        "alpha": (1.0, 0.5),
        "approximate": ("none", "tanh"),
        "start_dim": (0, 1, 2),
    }
    names = [name for name in OPS[op].options if name in choices and rng.random() < 0.7]
    return {name: choices[name][rng.integers(len(choices[name]))] for name in names}


def one_of_ours(rng):
    """An op of the package, as NumPy or as loops, on random sizes and options."""
    op = list(OPS)[rng.integers(len(OPS))]
    options = random_options(op, rng)
    size = {name: int(rng.integers(1, 4)) for name in ("N", "L") if rng.random() < 0.5}
    known = OPS[op].sizes({**OPS[op].options, **options})
    size = {name: n + 1 for name, n in size.items() if name in known}
    dtype = DTYPES[rng.integers(3)]
    seed = int(rng.integers(1000))
    with use("numpy" if rng.random() < 0.8 else "reference"):
        return check_kernel(op, *own_kernel(op), size=size, dtype=dtype, seed=seed, **options)


def at_a_corner(rng):
    """Right pairs where finite differences are wrong: kinks, ties, and right beside them."""
    x = rng.standard_normal((2, 2, 4, 4))
    kind = rng.integers(4)
    if kind == 0:
        x[rng.random(x.shape) < 0.3] = 0
        return gradcheck((ops.relu_forward, ops.relu_backward), x)
    if kind == 1:
        x = np.round(x)
        forward = partial(ops.max_pool2d_forward, kernel_size=2)
        return gradcheck((forward, ops.max_pool2d_backward), x)
    if kind == 2:
        x *= 10.0 ** rng.integers(-8, -5)
        return gradcheck((ops.leaky_relu_forward, ops.leaky_relu_backward), x)
    target = np.where(rng.random(x.shape) < 0.3, x, rng.standard_normal(x.shape))
    forward = partial(ops.l1_loss_forward, target=target, reduction="sum")
    return gradcheck((forward, ops.l1_loss_backward), x)


def with_little_precision(rng):
    """Right pairs that compute in float32, or whose curvature is large for the step."""
    x = rng.standard_normal((3, 4))
    kind = rng.integers(3)
    if kind == 0:
        forward = lambda x: (np.tanh(x.astype("f4")).astype("f8"), x)  # noqa: E731
        return gradcheck((forward, lambda dy, x: dy / np.cosh(x) ** 2), x)
    if kind == 1:
        f4 = lambda a: a.astype("f4")  # noqa: E731
        return gradcheck((lambda x: (np.exp(x), x), lambda dy, x: f4(dy) * np.exp(f4(x))), x)
    forward = lambda x: (np.sin(3e3 * x), x)  # noqa: E731
    return gradcheck((forward, lambda dy, x: dy * 3e3 * np.cos(3e3 * x)), x)


@pytest.mark.parametrize("start", range(0, 240, 20))
def test_no_right_case_is_called_a_bug(start):
    for seed in range(start, start + 20):
        rng = np.random.default_rng(seed)
        make = (one_of_ours, one_of_ours, at_a_corner, with_little_precision)[seed % 4]
        report = make(rng)
        assert report.verdict != "bug", (seed, str(report))
        if make is one_of_ours:
            assert report, (seed, str(report))


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_its_own_check(op):
    check = getattr(__import__("minicnn.gradcheck.kernels", fromlist=[""]), f"check_{op}")
    assert check.__name__ == f"check_{op}"
    for text in (f"{op}_forward", "-> y", "backward(dy, ", "Default shapes: "):
        assert text in check.__doc__
    forward, backward = own_kernel(op)
    report = check(forward, backward)
    assert report
    assert [c.name for c in report.checks] == ["y", *(f"d{name}" for name in OPS[op].inputs)]


def test_plain_functions_and_those_with_a_cache():
    plain = check_conv2d(student.conv2d_forward, student.conv2d_backward, stride=2, padding=1)
    cached = check_conv2d(ops.conv2d_forward, ops.conv2d_backward, stride=2, padding=1)
    assert plain
    assert cached
    for a, b in zip(plain.checks, cached.checks):
        np.testing.assert_allclose(a.arrays[1], b.arrays[1], rtol=1e-12)


def test_the_backward_or_the_forward_alone():
    assert [c.name for c in check_relu(None, lambda dy, x: dy * (x > 0)).checks] == ["dx"]
    assert [c.name for c in check_relu(lambda x: np.maximum(x, 0)).checks] == ["y"]


def test_a_wrong_forward_is_named():
    def turned(x, w, b, **options):
        return student.conv2d_forward(x, w[..., ::-1, ::-1], b, **options)

    report = check_conv2d(turned, student.conv2d_backward)
    assert [check.ok for check in report.checks] == [False, True, True, True]
    assert report.checks[0].hints[0].kind == "flipped kernel"
    assert "yours" in str(report)
    report = check_conv2d(lambda x, w, b: student.conv2d_forward(x, w, 0 * b))
    assert report.checks[0].hints[0].kind == "bias"
    report = check_linear(lambda x, w, b: (x @ w.T + b).T)
    assert report.checks[0].hints[0].kind == "shape"


def test_a_pooling_may_choose_another_of_equal_maxima():
    backward = partial(student.max_pool_backward, bug="last tie")
    report = check_max_pool2d(student.max_pool_forward, backward)
    assert report
    assert report.verdict == "tie"
    assert "another of the equal maxima" in str(report.checks[-1].hints[0].text)


def test_the_smallest_case_and_what_it_hangs_on():
    backward = partial(student.conv2d_backward, bug="dilation")
    report = check_conv2d(student.conv2d_forward, backward, dilation=2, padding=1)
    assert not report
    assert report.smallest.options == {"dilation": 2}, "padding has nothing to do with it"
    assert max(report.smallest.shapes["x"]) <= 3
    assert "needs dilation" in [hint.kind for hint in report.notes]
    assert "smallest failing case: x (1, 1, " in str(report)


def test_shrinking_does_not_run_into_another_failure():
    """With fewer filters this bias gradient has a wrong shape, but the wrong number is wanted."""

    def backward(dy, x, w, b):
        dx, dw, db = student.conv2d_backward(dy, x, w, b)
        return dx, dw, np.repeat(db[:1], 3)

    smallest = check_conv2d(None, backward).smallest
    assert smallest.name == "db"
    assert smallest.shapes["b"] == (3,)
    assert smallest.shapes["x"] == (1, 1, 1, 1)


def test_rounding_of_a_short_format_is_no_bug():
    def half(dy, x, w, b):
        as_half = [a.astype("f2").astype("f4") for a in (dy, x, w)]
        return tuple(g.astype("f2") for g in student.conv2d_backward(*as_half, b))

    report = check_conv2d(None, half, dtype="float32", size={"H": 12, "W": 12})
    assert report.verdict == "precision", report
    assert "float16" in str(report)
    slightly_wrong = lambda *a: tuple(g * 1.002 for g in student.conv2d_backward(*a))  # noqa: E731
    report = check_conv2d(None, slightly_wrong, dtype="float32")
    assert report.verdict == "bug", report
    assert report.checks[0].hints[0].kind == "factor"


def test_a_forward_in_a_short_format_is_precision_too():
    def half(x, w, b):
        x, w = (a.astype("f2").astype("f4") for a in (x, w))
        return student.conv2d_forward(x, w, b)

    def slightly_wrong(x, w, b):
        return student.conv2d_forward(x, w * 1.002, b)

    size = {"H": 12, "W": 12}
    report = check_conv2d(half, dtype="float32", size=size)
    assert not report
    assert report.verdict == "precision", report
    assert check_conv2d(slightly_wrong, dtype="float32", size=size).verdict == "bug"


def test_kernels_of_cupy():
    """A stand-in for an array on a GPU: no function of NumPy takes it, and `get` copies it back."""

    class Device:
        __array__ = None

        def __init__(self, a):
            self.a = a

        def get(self):
            return self.a

    Device.__module__ = "cupy._core.core"

    def forward(*arrays):
        return Device(student.conv2d_forward(*(a.a for a in arrays)))

    def backward(*arrays):
        return tuple(map(Device, student.conv2d_backward(*(a.a for a in arrays))))

    assert check_conv2d(forward, backward, convert=Device)


def test_kernels_in_c(tmp_path):
    """The way from a C function through ctypes to a verdict."""
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    source = """
    void forward(const float *x, float *y, long n) {
        for (long i = 0; i < n; i++) y[i] = x[i] > 0 ? x[i] : 0;
    }
    void backward(const float *dy, const float *x, float *dx, long n) {
        for (long i = 0; i < n; i++) dx[i] = x[i] > 0 ? dy[i] : MISTAKE;
    }
    """
    (tmp_path / "relu.c").write_text(source)
    for mistake, right in (("0", True), ("dy[i]", False)):
        library = tmp_path / f"relu{right}.so"
        command = [compiler, "-shared", "-fPIC", f"-DMISTAKE={mistake}", "-o", str(library)]
        subprocess.run([*command, str(tmp_path / "relu.c")], check=True)
        c = ctypes.CDLL(str(library))

        def call(name, *arrays, c=c):
            out = np.empty_like(arrays[-1])
            pointers = [a.ctypes.data_as(ctypes.c_void_p) for a in (*arrays, out)]
            getattr(c, name)(*pointers, ctypes.c_long(out.size))
            return out

        report = check_relu(partial(call, "forward"), partial(call, "backward"), dtype="float32")
        assert bool(report) is right, report
        if not right:
            assert report.checks[1].hints[0].kind == "dy unchanged"


def test_kernels_of_pytorch(torch):
    def forward(x, w, b, **options):
        return torch.nn.functional.conv2d(x, w, b, **options)

    def backward(dy, x, w, b, **options):
        x, w, b = (a.requires_grad_() for a in (x, w, b))
        return torch.autograd.grad(forward(x, w, b, **options), (x, w, b), dy)

    for dtype in ("float32", "float64"):
        report = check_conv2d(
            forward, backward, dtype=dtype, convert=torch.from_numpy, stride=2, padding=1
        )
        assert report, report


def test_options_not_named_are_not_passed_on():
    seen = []

    def forward(x, w, b, **options):
        seen.append(options)
        return student.conv2d_forward(x, w, b, **options)

    check_conv2d(forward)
    check_conv2d(forward, stride=2)
    assert seen[0] == {}
    assert seen[-1] == {"stride": 2}


def test_without_bias():
    report = check_conv2d(
        lambda x, w: ops.conv2d_forward(x, w),
        lambda dy, cache: ops.conv2d_backward(dy, cache)[:2],
        bias=False,
    )
    assert report
    assert [check.name for check in report.checks] == ["y", "dx", "dw"]


def test_the_numbers_of_a_check_depend_on_the_seed_alone():
    same = [check_batch_norm(*own_kernel("batch_norm"), seed=3) for _ in range(2)]
    other = check_batch_norm(*own_kernel("batch_norm"), seed=4)
    assert same[0].checks[1].numeric == same[1].checks[1].numeric
    assert same[0].checks[1].numeric != other.checks[1].numeric


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_kernel("conv3d", len), ValueError, "gradcheck: op: expected one of conv2d"),
        (lambda: check_conv2d(None), TypeError, "check_conv2d: forward, backward: expected a fun"),
        (lambda: check_conv2d(len, dtype="int8"), ValueError, "check_conv2d: dtype: expected one"),
        (
            lambda: check_conv2d(len, strides=2),
            ValueError,
            "check_conv2d: strides: expected one of the options stride, padding, dilation, groups",
        ),
        (
            lambda: check_conv2d(len, size={"K": 3}),
            ValueError,
            "check_conv2d: K: expected one of the sizes N, C",
        ),
        (
            lambda: check_linear(None, lambda dy, x, w, b: dy @ w),
            ValueError,
            "check_linear: backward: expected 3 gradients, to x, w, b, got 1",
        ),
        (
            lambda: check_cross_entropy(None, lambda g, x, t: None),
            ValueError,
            "check_cross_entropy: backward: expected 1 gradients, to x, got 0",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_function_keeps_its_name():
    assert gradcheck_function is gradcheck
    assert callable(gradcheck)
