"""Foreign networks: they open, predict the same, can be trained, and bad files are refused."""

import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import minicnn as mc
from minicnn import Conv2d, Flatten, Linear, ReLU, Residual, Sequential
from strategies import normal

pytest.importorskip("onnx.checker", reason="the package onnx is not installed")
from minicnn.onnx import Graph, Unsupported, export, load
from minicnn.onnx.importer import from_proto
from onnx import TensorProto, helper, numpy_helper
from onnx_networks import NETWORKS


def graph(nodes, arrays=(), x=("N", 2, 4, 4), opset=21, **options):
    """A model with input "x" and output "y"."""
    info = helper.make_tensor_value_info
    return helper.make_model(
        helper.make_graph(
            nodes, "test", [info("x", options.pop("kind", TensorProto.FLOAT), x)],
            [info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(a), name) for name, a in dict(arrays).items()],
        ),
        opset_imports=[helper.make_opsetid("", opset)], ir_version=10,
    )  # fmt: skip


def node(op, *inputs, y="y", **attributes):
    return helper.make_node(op, list(inputs), [y], name=f"the {op}", **attributes)


def ones(*shape):
    return np.ones(shape, np.float32)


# What export writes in operators that have no layer: it can be run, but not opened.
ONE_WAY = {
    "BatchNorm2d without running statistics": "ReduceMean",
    "Softplus(beta=2.0, threshold=3.0)": "Greater",
    "AdaptiveAvgPool2d((2, 3))": "MatMul",
    "AdaptiveAvgPool2d((4, 7))": "MatMul",
    "AdaptiveAvgPool2d((3, None))": "MatMul",
    "AdaptiveAvgPool2d((5, 9))": "MatMul",
    "Flatten the batch, too": "Reshape",
}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_exported_comes_back(name, tmp_path):
    model, shape = NETWORKS[name]
    export(model, tmp_path / "net.onnx", shape)
    if name in ONE_WAY:
        with pytest.raises(Unsupported, match=rf"net.onnx: onnx: node .* \({ONE_WAY[name]}\)"):
            load(tmp_path / "net.onnx")
        return
    again = load(tmp_path / "net.onnx")
    x = 3 * normal(np.random.default_rng(0), (3, *shape), np.float32)
    np.testing.assert_allclose(again(x), model(x), rtol=1e-5, atol=1e-5)
    y, caches = again.forward(x)
    assert again.backward(np.ones_like(y), caches).shape == x.shape


def test_a_chain_becomes_a_sequential_with_the_same_keys(tmp_path):
    model = Sequential(Conv2d(1, 2, 3, rng=0), ReLU(), Flatten(), Linear(8, 3, rng=0))
    export(model, tmp_path / "net.onnx", (1, 4, 4))
    again = load(tmp_path / "net.onnx")
    assert isinstance(again, Sequential)
    assert repr(again) == repr(model)
    for name, a in again.state_dict().items():
        np.testing.assert_array_equal(a, model.state_dict()[name])


def test_an_imported_residual_block_has_the_gradients_of_ours(tmp_path):
    model = Sequential(
        Residual(Sequential(Conv2d(2, 2, 3, padding=1, rng=0), ReLU())), Flatten(),
        Linear(32, 3, rng=1),
    )  # fmt: skip
    export(model, tmp_path / "net.onnx", (2, 4, 4))
    again = load(tmp_path / "net.onnx")
    assert isinstance(again, Graph)
    rng = np.random.default_rng(0)
    x, dy = normal(rng, (5, 2, 4, 4), np.float32), normal(rng, (5, 3), np.float32)
    dx = again.backward(dy, again.forward(x)[1])
    expected = model.backward(dy, model.forward(x)[1])
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-6)
    grads = [g for _, _, g in again.named_params()]
    for g, (_, _, want) in zip(grads, model.named_params(), strict=True):
        np.testing.assert_allclose(g, want, rtol=1e-5, atol=1e-5)


def test_a_network_from_pytorch(tmp_path, torch):
    """Residual blocks, concatenation, ReLU6, depthwise, SiLU, a view that keeps the batch."""
    nn = torch.nn
    torch.manual_seed(0)

    class Block(nn.Module):
        def __init__(self, i, o, stride):
            super().__init__()
            self.a, self.b = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.Conv2d(o, o, 3, 1, 1)
            self.n, self.s = nn.BatchNorm2d(o), nn.Conv2d(i, o, 1, stride)

        def forward(self, x):
            return torch.relu(self.b(torch.relu(self.n(self.a(x)))) + self.s(x))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
            self.blocks = nn.Sequential(Block(8, 8, 1), Block(8, 16, 2))
            self.depthwise, self.six = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6()
            self.drop, self.fc = nn.Dropout(), nn.Linear(32, 5)

        def forward(self, x):
            x = self.blocks(self.stem(x))
            x = torch.cat([self.six(self.depthwise(x)), nn.functional.silu(x)], 1)
            x = nn.functional.adaptive_avg_pool2d(x, 1)
            return torch.log_softmax(self.fc(self.drop(x.view(x.size(0), -1))), 1)

    theirs, x = Net().eval(), torch.randn(2, 3, 32, 40)
    path = tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch would rather be asked for its newer exporter
        torch.onnx.export(
            theirs, (x,), path, dynamo=False, opset_version=17, input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )  # fmt: skip
    ours = load(path)
    np.testing.assert_allclose(ours(x.numpy()), theirs(x).detach().numpy(), rtol=1e-5, atol=1e-5)
    before = [p.copy() for _, p, _ in ours.named_params()]
    y, caches = ours.forward(x.numpy())
    ours.backward(y - 1, caches)
    mc.optim.SGD(ours, lr=0.1).step()
    assert all((p != q).any() for (_, p, _), q in zip(ours.named_params(), before))


W = ones(3, 2, 3, 3)


@pytest.mark.parametrize(
    ("nodes", "arrays", "words"),
    [
        ([node("Sin", "x")], {}, r"node 'the Sin' \(Sin\): expected an operator that minicnn"),
        ([node("Conv", "x", "w")], {"w": ones(3, 2, 3)}, r"\(Conv\): W: expected 4 axes"),
        ([node("Conv", "x", "w", pads=[-1, 0, 0, 0])], {"w": W}, "pads: expected numbers >= 0"),
        ([node("Conv", "x", "w")], {"w": W.astype(np.float16)}, "W: expected float32 or float64"),
        ([node("MaxPool", "x", kernel_shape=[2, 2], storage_order=1)], {},
         "storage_order: expected 0"),
        ([node("MaxPool", "x", kernel_shape=[2, 2], pads=[1, 1, 2, 2], ceil_mode=1)], {},
         "pads: expected at most half the kernel"),
        ([node("AveragePool", "x", kernel_shape=[2, 2], dilations=[2, 2])], {},
         "dilations: expected 1"),
        ([node("Gemm", "x", "w", transA=1)], {"w": ones(4, 4)}, "transA: expected 0, got 1"),
        ([node("Flatten", "x", axis=2)], {},
         "axis: expected 1, which keeps the batch apart, got 2"),
        ([node("Reshape", "x", "s")], {"s": [4, -1]}, r"shape: expected one that keeps the batch"),
        ([node("Concat", "x", "x", axis=0)], {}, "axis: expected one that keeps the batch apart"),
        ([node("Sub", "x", "x")], {}, "expected stored numbers as one of them, got two values"),
    ],
)  # fmt: skip
def test_what_has_no_layer_is_refused_by_node_operator_and_attribute(nodes, arrays, words):
    model = graph(nodes, arrays)
    with pytest.raises(Unsupported, match=words):
        from_proto(model)


def test_an_attribute_without_a_meaning_is_refused():
    model = graph([node("Relu", "x", magic=3)])
    with pytest.raises(Unsupported, match="attribute magic: expected none"):
        from_proto(model)


def test_softmax_before_opset_13_joined_axes():
    with pytest.raises(Unsupported, match="axis: expected the last one"):
        from_proto(graph([node("Softmax", "x", axis=1)], opset=11))


@pytest.mark.parametrize(
    ("nodes", "arrays", "words"),
    [
        ([node("Conv", "x", "w")], {"w": ones(3, 5, 3, 3)}, "with C = 5, got"),
        ([node("Conv", "x", "w", kernel_shape=[5, 5])], {"w": W},
         r"kernel_shape: expected \[3, 3\]"),
        ([node("MaxPool", "x", kernel_shape=[9, 9])], {}, "kernel_size: expected at most"),
        ([node("Reshape", "x", "s")], {"s": [0, 5, 5]}, "expected 32 elements an example"),
        ([node("BatchNormalization", "x", "a", "a", "a", "b")], {"a": ones(2), "b": ones(3)},
         r"expected shape \(2,\) like scale"),
        ([node("Add", "x", "a")], {"a": ones(3, 3)}, "the Add"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(nodes, arrays, words):
    with pytest.raises(ValueError, match=words):
        from_proto(graph(nodes, arrays))


def test_weights_in_other_files_are_refused(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(ones(3, 2, 3, 3).tobytes())
    for location in ("secret", "../../../../etc/passwd", str(secret)):
        model = graph([node("Conv", "x", "w")], {"w": W})
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)
        (tmp_path / "net.onnx").write_bytes(model.SerializeToString())
        with pytest.raises(
            ValueError, match=r"net.onnx: onnx: w: expected weights inside the file"
        ):
            load(tmp_path / "net.onnx")


def test_a_pickle_is_not_executed(tmp_path):
    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / "net.onnx").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"net.onnx: .*expected"):
        load(tmp_path / "net.onnx")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0" * 100, b"\x08\x0a"])
def test_what_is_no_model_is_refused(content, tmp_path):
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ValueError, match=r"net.onnx: .*expected"):
        load(tmp_path / "net.onnx")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.onnx: expected an ONNX file, got none"):
        load(tmp_path / "none.onnx")


def test_constants_cannot_grow_without_end(tmp_path):
    """Forty doublings of a few numbers would be terabytes."""
    nodes = [node("Concat", f"c{i}", f"c{i}", y=f"c{i + 1}", axis=0) for i in range(40)]
    model = graph([*nodes, node("Add", "x", "c40")], {"c0": ones(1000)})
    with pytest.raises(Unsupported, match="expected constants no larger than the file"):
        from_proto(model)


def test_sizes_that_overflow_are_refused():
    model = graph([node("Conv", "x", "w")], {"w": W})
    tensor = model.graph.initializer[0]
    tensor.dims[:] = [0, 2**31, 2**31, 2**31]
    tensor.raw_data = b""
    with pytest.raises(ValueError, match="expected an array that fits memory"):
        from_proto(model)


def test_an_old_file_is_read_by_the_rules_of_its_time():
    """Opset 6 aligned a broadcast operand by an axis, and knew dropout's training by a flag."""
    model = graph(
        [node("Add", "x", "b", y="a", broadcast=1, axis=1), node("Dropout", "a", is_test=1)],
        {"b": np.arange(2, dtype=np.float32)}, opset=6,
    )  # fmt: skip
    x = normal(np.random.default_rng(0), (3, 2, 4, 4), np.float32)
    expected = x + np.arange(2, dtype=np.float32)[:, None, None]
    np.testing.assert_array_equal(from_proto(model)(x), expected)


def test_import_minicnn_needs_no_onnx():
    code = "import sys, minicnn, minicnn.onnx; sys.exit('onnx' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ, cwd=os.getcwd())
