"""ONNX files as networks of minicnn's layers, which can be trained on."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from minicnn import layers as L
from minicnn.backend import FLOATS
from minicnn.layers.base import Layer, Shape
from minicnn.onnx import graph as G
from minicnn.onnx.backend import run
from minicnn.onnx.nodes import MIN_OPSET, Node, Unsupported, initializers, package, read
from minicnn.onnx.readers import READERS
from minicnn.shapes import size

# What may be computed while reading, where every input is stored.
FOLDED = {
    "Add", "Cast", "Concat", "Constant", "Div", "Gather", "Identity", "Mul", "Neg", "Reshape",
    "Slice", "Sqrt", "Squeeze", "Sub", "Transpose", "Unsqueeze",
}  # fmt: skip
SLACK = 1 << 20  # bytes of folded arrays that any file may have


def load(path: str | os.PathLike[str]) -> Layer:
    """Read an ONNX file as a network: a `Sequential` where it is a chain, else a `Graph`.

    Weights that several nodes share become a copy for each.

    Parameters
    ----------
    path : path-like
        A network of one input (N, C, H, W) and one output.

    Returns
    -------
    Sequential or Graph
        Ready for inference and for training.

    Raises
    ------
    ImportError
        If the package ``onnx`` is missing.
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no whole and valid ONNX model, keeps weights in other files, or shapes do not
        fit each other.
    Unsupported
        For what minicnn's layers do not have; the message names node, operator and attribute.
        (`Backend` runs more operators than there are layers.)
    """
    model = read(path)
    try:
        return from_proto(model)
    except (ValueError, Unsupported) as error:
        raise type(error)(f"{os.fspath(path)}: {error}") from error


def from_proto(model: Any) -> Layer:
    """Turn a checked ``onnx.ModelProto`` into a network."""
    versions = {o.domain: o.version for o in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", MIN_OPSET))
    reader = GraphReader(model.graph)
    for i, proto in enumerate(model.graph.node):
        reader.read(Node(proto, opset, i))
    return reader.finish()


class GraphReader:
    """The graph while it is read: stored arrays, and values that depend on the input."""

    def __init__(self, graph: Any) -> None:
        self.graph = graph
        self.stored = initializers(graph)
        self.room = SLACK + 2 * sum(a.nbytes for a in self.stored.values())
        self.of_batch: set[str] = set()  # sizes in which 0 stands for the batch's
        inputs = [i for i in graph.input if i.name not in self.stored]
        if len(inputs) != 1 or len(graph.output) != 1:
            raise Unsupported(
                f"onnx: graph: expected one input and one output, got {len(inputs)} and "
                f"{len(graph.output)}"
            )
        tensor = inputs[0].type.tensor_type
        onnx = package()
        if tensor.elem_type not in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE):
            name = onnx.TensorProto.DataType.Name(tensor.elem_type)
            raise Unsupported(f"onnx: {inputs[0].name}: expected float or double, got {name}")
        dims = [d.dim_value for d in tensor.shape.dim]
        known = len(dims) > 1 and all(n > 0 for n in dims[1:])
        self.batch = dims[0] if dims else 0
        self.steps: list[tuple[Layer, tuple[int, ...]]] = []
        self.values = {inputs[0].name: 0}
        self.shapes: list[Shape | None] = [(1, *dims[1:]) if known else None]

    def read(self, node: Node) -> None:
        """Add what a node does."""
        if node.domain not in ("", "ai.onnx"):
            node.fail(f"domain: expected ONNX's own, got {node.domain!r}")
        try:
            if all(name in self.stored for name in node.inputs if name) and node.op in FOLDED:
                self._fold(node)
            elif node.op == "Shape":
                self._shape(node)
            elif node.op in READERS:
                READERS[node.op](self, node)
                node.finish()
            else:
                node.fail("expected an operator that minicnn has a layer for, got another")
        except Unsupported:
            raise
        except (ValueError, TypeError, KeyError, IndexError, OverflowError) as error:
            text = str(error)
            raise ValueError(
                text if text.startswith(node.label) else f"{node.label}: {text}"
            ) from error

    def _fold(self, node: Node) -> None:
        arrays = [self.stored[name] if name else None for name in node.inputs]
        found = [a for a in arrays if a is not None]
        if node.op in ("Add", "Sub", "Mul", "Div"):
            cost = size(np.broadcast_shapes(*(a.shape for a in found))) * found[0].itemsize
        elif node.op == "Gather":
            cost = size((*found[0].shape, *found[1].shape)) * found[0].itemsize
        else:
            cost = sum(a.nbytes for a in found)
        self.room -= cost
        if self.room < 0:
            node.fail(f"inputs: expected constants no larger than the file, got {cost} bytes more")
        outputs = node.outputs
        self.stored.update(zip(outputs, run(node, arrays)))
        if self.of_batch.intersection(node.inputs):
            if node.op not in ("Cast", "Concat", "Gather", "Identity", "Slice", "Squeeze",
                               "Unsqueeze"):  # fmt: skip
                node.fail("inputs: expected no arithmetic on the size of the batch, got some")
            self.of_batch.update(outputs)

    def _shape(self, node: Node) -> None:
        shape = self.shapes[self.value(node, 0)]
        if shape is None:
            node.fail("input: expected a value of known shape, got none")
        start, end = node.take("start", 0), node.take("end")
        # In a Reshape, 0 as first size means as many as there are.
        self.stored[node.outputs[0]] = np.array((0, *shape[1:])[start:end], np.int64)
        self.of_batch.add(node.outputs[0])
        node.finish()

    def value(self, node: Node, i: int) -> int:
        """Number of the value that a node reads as input `i`."""
        name = node.inputs[i]
        if name not in self.values:
            node.fail(f"input {i}: expected a value that depends on the input, got a constant")
        return self.values[name]

    def constant(self, node: Node, i: int, name: str) -> np.ndarray | None:
        """Stored array that a node reads as input `i`, or None if it is left out."""
        if i >= len(node.inputs) or not node.inputs[i]:
            return None
        if node.inputs[i] not in self.stored:
            node.fail(f"{name}: expected stored numbers, got a value computed from the input")
        return self.stored[node.inputs[i]]

    def weights(self, node: Node, i: int, name: str) -> Any:
        """A stored array of floats; refuses to go without."""
        a = self.constant(node, i, name)
        if a is None:
            node.wrong(f"{name}: expected an array, got none")
        if a.dtype.name not in FLOATS:
            node.fail(f"{name}: expected float32 or float64, got {a.dtype}")
        return a

    def shape(self, node: Node) -> Shape | None:
        """Shape of a node's first input for a batch of one, where it is known."""
        return self.shapes[self.value(node, 0)]

    def add(self, node: Node, layer: Layer, reads: tuple[int, ...] | None = None) -> None:
        """Let a layer compute the node's output."""
        if len([name for name in node.outputs if name]) != 1:
            node.fail(f"outputs: expected one, got {len(node.outputs)}")
        reads = (self.value(node, 0),) if reads is None else reads
        shapes: list[Any] = [self.shapes[r] for r in reads]
        y_shape = None
        if all(shape is not None for shape in shapes):
            y_shape = tuple(layer.output_shape(shapes[0] if len(reads) == 1 else tuple(shapes)))
        self.steps.append((layer, reads))
        self.shapes.append(y_shape)
        self.values[node.outputs[0]] = len(self.steps)

    def finish(self) -> Layer:
        """The network, once every node is read."""
        last = self.values.get(self.graph.output[0].name)
        if last is None or not self.steps:
            raise Unsupported("onnx: graph: expected an output that depends on the input, got none")
        if last != len(self.steps):
            self.steps.append((G.Scale(), (last,)))
        if all(reads == (i,) for i, (_, reads) in enumerate(self.steps)):
            chain = [layer for layer, _ in self.steps]
            return L.Sequential(*chain)
        return G.Graph(self.steps)
