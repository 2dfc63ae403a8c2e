"""``minicnn gradcheck``."""

import sys

import pytest

from minicnn.gradcheck import OPS

KERNEL = """
import numpy as np
from minicnn import Flatten, Linear, ReLU, Sequential

def forward(x, w, b):
    return x @ w.T + b

def backward(dy, x, w, b):
    return dy @ w, dy.T @ x / len(x), dy.sum(0)

def right_backward(dy, x, w, b):
    return dy @ w, dy.T @ x, dy.sum(0)

pair = (lambda x: (np.tanh(x), x)), (lambda dy, x: dy / np.cosh(x) ** 2)
net = Sequential(Flatten(), Linear(12, 4, rng=0), ReLU(), Linear(4, 2, rng=1))
"""


@pytest.fixture(autouse=True)
def kernels(small, tmp_path):
    (tmp_path / "kernels.py").write_text(KERNEL)
    yield
    sys.modules.pop("kernels", None)


@pytest.mark.parametrize("op", [op for op in OPS if op not in ("conv2d", "batch_norm")])
def test_every_op_of_the_package(op, cli):
    status, out, err = cli("gradcheck", op)
    assert (status, err) == (0, "")
    assert "FAIL" not in out
    assert f"{op}, numpy: ok\nok   y: " in out


def test_every_version_with_options(cli):
    argv = ("conv2d", "--stride", "2,1", "--padding", "((1,0),(0,1))", "--size", "KH=2")
    status, out, _ = cli("gradcheck", *argv)
    assert status == 0
    for version in ("reference", "numpy", "numba"):
        assert f"conv2d, {version}: ok" in out


def test_a_kernel_with_a_bug(cli):
    status, out, _ = cli("gradcheck", "kernels:forward,backward", "--op", "linear")
    assert status == 1
    assert "kernels:forward,backward as linear: bug" in out
    assert "FAIL dw: " in out
    assert "hint: it is 0.25 times the right one everywhere (1 / 4, the size of y along" in out
    assert "smallest failing case: x (2, 1), w (1, 1), b (1,)" in out
    assert "    step          numeric      error" in out


def test_a_right_kernel_in_a_file_by_path(cli, tmp_path):
    for target in ("kernels:forward,right_backward", "kernels:right_backward"):
        assert cli("gradcheck", target, "--op", "linear", "--dtype", "float32")[0] == 0
    path = tmp_path / "kernels.py"
    assert cli("gradcheck", f"{path}:right_backward", "--op", "linear")[0] == 0


def test_layers_and_pairs(cli):
    status, out, _ = cli("gradcheck", "kernels:net", "--input", "2", "3", "2", "2")
    assert status == 0
    assert "ok   1.weight" in out
    out = cli("gradcheck", "kernels:pair", "--input", "2", "3", "--steps")[1]
    assert out.count("e-0") > 8
    out = cli("gradcheck", "kernels:net", "--input", "2", "12", "--samples", "3")[1]
    assert "ok   3.weight" in out


def test_the_error_against_step_size_as_a_picture(cli, tmp_path):
    status, out, _ = cli("gradcheck", "tanh", "--plot", tmp_path / "steps.png")
    assert status == 0
    assert (tmp_path / "steps.png").stat().st_size > 5000
    assert "steps.png" in out


@pytest.mark.parametrize(
    ("argv", "status", "message"),
    [
        (["conv3d"], 2, "expected MODULE:NAMES or one of conv2d, "),
        (["kernels:nothing", "--op", "linear"], 2, "no attribute 'nothing'"),
        (["kernels:net"], 2, "expected --op OP for a kernel, or --input SHAPE for a layer"),
        (["kernels:forward,backward,net", "--op", "linear"], 2, "expected FORWARD,BACKWARD"),
        (["nowhere:f,g", "--op", "linear"], 1, "No module named 'nowhere'"),
        (["nowhere.py:f,g", "--op", "linear"], 1, "nowhere.py: expected a Python file"),
        (["relu", "--stride", "2"], 1, "check_relu: stride: expected one of the options none"),
        (["relu", "--size", "N"], 2, "argument --size: expected a whole number above 0"),
    ],
)
def test_what_does_not_fit(argv, status, message, cli):
    got, _out, err = cli("gradcheck", *argv)
    assert got == status
    assert message in err
    assert err.count("\n") == 1
