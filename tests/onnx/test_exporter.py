"""Exported networks: the checker passes them, and ONNX Runtime gives the same results."""

import sys

import numpy as np
import pytest

import minicnn as mc
from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Softplus,
)
from minicnn.onnx import OPSET, Backend, export, load
from minicnn.onnx.exporter import WRITERS, to_proto
from onnx_networks import NETWORKS
from strategies import normal

# The submodule: this folder, too, would pass for a package named onnx.
pytest.importorskip("onnx.checker", reason="the package onnx is not installed")
import onnx


def runtime(path):
    """A session of ONNX Runtime."""
    ort = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(path, options)


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_runtime_gives_the_same(name, tmp_path):
    model, shape = NETWORKS[name]
    path = tmp_path / "net.onnx"
    export(model, path, shape)
    onnx.checker.check_model(path, full_check=True)
    session = runtime(path)
    for batch in (1, 3):
        x = 3 * normal(np.random.default_rng(batch), (batch, *shape), np.float32)
        expected = model(x)
        (y,) = session.run(["output"], {"input": x})
        assert y.dtype == np.float32
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
        (z,) = Backend.run_model(onnx.load(path), [x])
        np.testing.assert_allclose(z, expected, rtol=1e-5, atol=1e-5)


def test_every_layer_is_exported_and_tested():
    kinds = {type(layer) for model, _ in NETWORKS.values() for _, layer in model.modules()}
    ours = {
        kind for name in mc.layers.__all__
        if isinstance(kind := getattr(mc.layers, name), type) and name not in ("Layer", "OpLayer")
    }  # fmt: skip
    assert ours <= kinds
    assert ours <= WRITERS.keys() | {Sequential, Residual}


def test_a_trained_network_predicts_the_same(tmp_path):
    train = mc.data.load("digits", "train")
    model = Sequential(
        Conv2d(1, 8, 5, 2, rng=0), BatchNorm2d(8), ReLU(), MaxPool2d(2), Flatten(),
        Dropout(0.1, rng=0), Linear(288, 10, rng=1),
    )  # fmt: skip
    trainer = mc.Trainer(model, mc.optim.Adam(model, lr=5e-3))
    for i in range(0, 1280, 64):
        trainer.step(train.x[i : i + 64], train.y[i : i + 64])
    export(model, tmp_path / "net.onnx", (1, 28, 28))
    x = train.x[2000:2200]
    (y,) = runtime(tmp_path / "net.onnx").run(None, {"input": x})
    assert np.abs(y - model(x)).max() < 1e-5
    assert (y.argmax(1) == train.y[2000:2200]).mean() > 0.6  # it has learned something
    again = load(tmp_path / "net.onnx")
    assert isinstance(again, Sequential)
    assert np.abs(again(x) - model(x)).max() < 1e-5


def test_the_file_says_what_it_is(tmp_path):
    model = Sequential(Conv2d(1, 2, 3, rng=0), Flatten(), Linear(8, 3, rng=0))
    proto = to_proto(model, (1, 4, 4))
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert proto.producer_name == "minicnn"
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["N", 1, 4, 4]
    assert {t.name for t in proto.graph.initializer} == set(model.state_dict())


def test_float64_stays_float64():
    model = Sequential(Conv2d(1, 2, 3, rng=0), Softplus(2.0, 1.0)).astype(np.float64)
    x = normal(np.random.default_rng(0), (2, 1, 5, 5))
    (y,) = Backend.run_model(to_proto(model, (1, 5, 5)), [x])
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, model(x), rtol=1e-12)


def test_a_newer_opset():
    newest = onnx.defs.onnx_opset_version()
    model, shape = NETWORKS["residual blocks in nested Sequentials"]
    proto = to_proto(model, shape, newest)
    assert proto.opset_import[0].version == newest
    x = normal(np.random.default_rng(0), (2, *shape), np.float32)
    np.testing.assert_allclose(Backend.run_model(proto, [x])[0], model(x), rtol=1e-5, atol=1e-5)


class Squared(mc.Layer):
    def forward(self, x):
        return x * x, x

    def backward(self, dy, cache):
        return 2 * dy * cache


@pytest.mark.parametrize(
    ("model", "shape", "options", "error", "words"),
    [
        (Sequential(ReLU(), Sequential(Squared())), (2, 3), {}, TypeError,
         r"export: layer 1\.0: expected one of Sequential, .*Conv2d.*, got Squared"),
        (ReLU(), (2,), {"opset": 20}, ValueError, r"export: opset: expected 21 to \d+, got 20"),
        (ReLU(), (2,), {"opset": 999}, ValueError,
         r"export: opset: expected 21 to \d+, got 999"),
        (ReLU(), (0,), {}, ValueError, "export: input_shape: expected an integer >= 1, got 0"),
        (Linear(4, 2, rng=0), (3,), {}, ValueError,
         "Linear: input_shape: expected 4 features, got 3"),
        (Sequential(Linear(2, 2, rng=0), Linear(2, 2, rng=0, dtype=np.float64)), (2,), {},
         TypeError,
         r"export: model: expected one dtype, got .*float32.*float64"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_leaves_the_old_file(model, shape, options, error, words, tmp_path):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")
    with pytest.raises(error, match=words):
        export(model, path, shape, **options)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ImportError, match=r"pip install '\.\[onnx\]'"):
        export(ReLU(), tmp_path / "net.onnx", (2,))
    assert not list(tmp_path.iterdir())
