"""``minicnn export``."""

import numpy as np
import pytest

import minicnn as mc
from minicnn.onnx import load
from minicnn.runs import Run

pytest.importorskip("onnx.checker", reason="the package onnx is not installed")


def test_a_run_is_exported(trained, cli, tmp_path):
    status, out, err = cli("export", trained, tmp_path / "m.onnx")
    assert (status, err) == (0, "")
    assert "m.onnx: opset 21, input (N, 1, 28, 28), output (N, 10), " in out
    x = np.random.default_rng(0).random((3, 1, 28, 28), np.float32)
    expected = Run(trained).load_model()(x)
    again = load(tmp_path / "m.onnx")
    np.testing.assert_allclose(again(x), expected, rtol=1e-5, atol=1e-5)


def test_a_weight_file_is_exported(cli, tmp_path, monkeypatch):
    monkeypatch.setattr("minicnn.cli.export.mnist_cnn", mc.models.mnist_cnn)
    mc.save(mc.models.mnist_cnn(0, 3, 7, (20, 24)), tmp_path / "w.safetensors")
    status, out, err = cli(
        "export", tmp_path / "w.safetensors", tmp_path / "m.onnx", "--input-shape", "3", "20", "24"
    )
    assert (status, err) == (0, "")
    assert "input (N, 3, 20, 24), output (N, 7), " in out


def test_weights_of_another_network_are_refused(cli, tmp_path):
    mc.save(mc.Linear(3, 2, rng=0), tmp_path / "w.safetensors")
    status, out, err = cli("export", tmp_path / "w.safetensors", tmp_path / "m.onnx")
    assert (status, out) == (1, "")
    assert "expected the keys of this model" in err
    assert not (tmp_path / "m.onnx").exists()


def test_a_missing_source_and_a_wrong_opset_are_named(trained, cli, tmp_path):
    assert "none: expected a weight file, got none" in cli("export", "none", "m.onnx")[2]
    status, _, err = cli("export", trained, tmp_path / "m.onnx", "--opset", "3")
    assert status == 1
    assert "opset: expected 21 to" in err
