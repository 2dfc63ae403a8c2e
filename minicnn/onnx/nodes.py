"""Reading ONNX files and nodes, with nothing taken on trust.

Weights have to be in the file itself: external data is refused, since its paths could name any
file. Attributes are taken out of a node one by one, and what is left over is refused, so that
nothing which changes the result is passed over.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from minicnn.shapes import Padding, Pair, Window, size

MIN_OPSET = 6  # what PyTorch wrote in 2017; operators have kept their meaning since
MAX_RANK = 32


class Unsupported(NotImplementedError):
    """What the file asks for is valid ONNX, but minicnn does not have it."""


def package() -> Any:
    """Return the ``onnx`` package, or say how to get it."""
    try:
        import onnx.checker
        import onnx.helper
        import onnx.numpy_helper

        import onnx
    except ImportError as error:
        raise ImportError(
            "onnx: expected the package onnx, got none (fix: pip install '.[onnx]')"
        ) from error
    return onnx


class Node:
    """One node of a graph: its attributes as Python values, and errors that name it."""

    def __init__(self, proto: Any, opset: int, index: int) -> None:
        self.op: str = proto.op_type
        self.name: str = proto.name or f"#{index}"
        self.domain: str = proto.domain
        self.inputs: list[str] = list(proto.input)
        self.outputs: list[str] = list(proto.output)
        self.opset = opset
        self._attributes = {a.name: a for a in proto.attribute}

    @property
    def label(self) -> str:
        """The node in error messages."""
        return f"onnx: node {self.name!r} ({self.op})"

    def fail(self, what: str) -> NoReturn:
        """Raise `Unsupported` with the node's name in front."""
        raise Unsupported(f"{self.label}: {what}")

    def wrong(self, what: str) -> NoReturn:
        """Raise ValueError with the node's name in front."""
        raise ValueError(f"{self.label}: {what}")

    def take(self, name: str, default: Any = None) -> Any:
        """Return an attribute's value and cross it off.

        Its type is that of `default`: int, float, str, a list of ints or None for any type.
        """
        proto = self._attributes.pop(name, None)
        if proto is None:
            return default
        try:
            value = package().helper.get_attribute_value(proto)
        except (ValueError, TypeError) as error:
            self.wrong(f"{name}: expected an attribute that can be read, got: {error}")
        if isinstance(value, bytes):
            value = value.decode("utf-8", "replace")
        if hasattr(value, "extend"):
            value = list(value)
        if type(value).__name__ == "TensorProto":
            value = array(value, f"{self.label}: {name}")
        kind = type(default)
        if isinstance(default, list):
            fits = isinstance(value, list) and all(isinstance(v, int) for v in value)
        else:
            fits = default is None or isinstance(value, kind)
        if not fits:
            self.wrong(f"{name}: expected {kind.__name__}, got {type(value).__name__}")
        return value

    def finish(self) -> None:
        """Refuse attributes that nobody has taken."""
        if self._attributes:
            self.fail(f"attribute {sorted(self._attributes)[0]}: expected none, as it has no "
                      "meaning here")  # fmt: skip


def read(path: str | os.PathLike[str]) -> Any:
    """Parse a file and check it: a ModelProto.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no whole and valid ONNX model, or keeps weights in other files.
    """
    onnx, path = package(), Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected an ONNX file, got none")
    from google.protobuf.message import DecodeError, Error

    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, Error, ValueError) as error:
        raise ValueError(f"{path}: expected an ONNX model, got: {error}") from error
    try:
        check(model)
    except (ValueError, Unsupported) as error:
        raise type(error)(f"{path}: {error}") from error
    return model


def check(model: Any) -> int:
    """Refuse what is not valid, or not whole in itself; return the version of the operators."""
    onnx = package()
    if not model.graph.node:
        raise ValueError("onnx: graph: expected at least one node, got none")
    for tensor in _tensors(model.graph):
        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
            raise ValueError(
                f"onnx: {tensor.name}: expected weights inside the file, got external data "
                "(fix: onnx.save(onnx.load(path), other_path) puts them in)"
            )
    try:
        onnx.checker.check_model(model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError, MemoryError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"onnx: expected a valid model, got: {text:.300}") from error
    versions = {o.domain: o.version for o in model.opset_import}
    opset = versions.get("", versions.get("ai.onnx", 0))
    if opset < MIN_OPSET:
        raise Unsupported(f"onnx: opset: expected {MIN_OPSET} or newer, got {opset}")
    return opset


def _tensors(graph: Any, depth: int = 0) -> Iterator[Any]:
    """Every tensor that is stored in a graph or in a graph inside it."""
    if depth > 8:
        raise Unsupported("onnx: graph: expected at most 8 graphs inside each other, got more")
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for inner in ([attribute.g] if attribute.HasField("g") else []) + list(
                attribute.graphs
            ):
                yield from _tensors(inner, depth + 1)


def array(tensor: Any, label: str) -> np.ndarray:
    """The array in a TensorProto, in native byte order."""
    onnx = package()
    dims = list(tensor.dims)
    if len(dims) > MAX_RANK or any(n < 0 for n in dims):
        raise ValueError(f"{label}: dims: expected at most {MAX_RANK} sizes >= 0, got {dims}")
    # An empty axis hides any other size from the byte count, but NumPy multiplies them all.
    if size([n for n in dims if n]) >= 1 << 48:
        raise ValueError(f"{label}: dims: expected an array that fits memory, got {dims}")
    try:
        return np.asarray(onnx.numpy_helper.to_array(tensor))
    except (ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise ValueError(f"{label}: expected data for shape {dims}, got: {error}") from error


def initializers(graph: Any) -> dict[str, np.ndarray]:
    """The stored arrays of a graph, by name."""
    if graph.sparse_initializer:
        name = graph.sparse_initializer[0].values.name
        raise Unsupported(f"onnx: {name}: expected a dense array, got a sparse one")
    return {t.name: array(t, f"onnx: {t.name}") for t in graph.initializer}


# ---------------------------------------------------------------- windows


def window(node: Node, spatial: Sequence[int] | None, kernel: Sequence[int] | None) -> Window:
    """Take the geometry of a sliding window out of a node.

    `spatial` are the rows and columns of the input, which only ``auto_pad`` needs; `kernel` are
    those of the weights, if there are any.
    """
    found = node.take("kernel_shape", list(kernel or ()))
    if kernel is not None and list(found) != list(kernel):
        node.wrong(f"kernel_shape: expected {list(kernel)} like the weights, got {found}")
    if len(found) != 2:
        node.fail(f"kernel_shape: expected 2 sizes (images are 2-D), got {len(found)}: {found}")
    stride = _two(node, "strides", 1)
    dilation = _two(node, "dilations", 1)
    if min(found) < 1:
        node.wrong(f"kernel_shape: expected sizes >= 1, got {found}")
    pads = node.take("pads", [0, 0, 0, 0])
    if len(pads) != 4:
        node.wrong(f"pads: expected 4 numbers, got {pads}")
    if min(pads) < 0:
        node.fail(f"pads: expected numbers >= 0, got {pads}")
    top, left, bottom, right = pads
    win = Window((found[0], found[1]), stride, ((top, bottom), (left, right)), dilation)
    auto = node.take("auto_pad", "NOTSET")
    if auto == "NOTSET":
        return win
    if any(pads):
        node.wrong(f"pads: expected none with auto_pad {auto!r}, got {pads}")
    if auto == "VALID":
        return win
    return win._replace(padding=_same(node, auto, win, spatial))


def _two(node: Node, name: str, minimum: int) -> Pair:
    values = node.take(name, [1, 1])
    if len(values) != 2:
        node.wrong(f"{name}: expected 2 numbers, got {values}")
    if min(values) < minimum:
        node.wrong(f"{name}: expected numbers >= {minimum}, got {values}")
    return values[0], values[1]


def _same(node: Node, auto: str, win: Window, spatial: Sequence[int] | None) -> Padding:
    """Padding for an output of ``ceil(input / stride)`` places."""
    if auto not in ("SAME_UPPER", "SAME_LOWER"):
        node.wrong(f"auto_pad: expected NOTSET, VALID, SAME_UPPER or SAME_LOWER, got {auto!r}")
    if spatial is None:
        if win.stride != (1, 1):
            node.fail("auto_pad: expected an input of known size, got none")
        spatial = (1, 1)  # with stride 1 every size gets the same padding
    sides = []
    for n, extent, stride in zip(spatial, win.extent, win.stride):
        total = max((-(-n // stride) - 1) * stride + extent - n, 0)
        less = total // 2
        sides.append((less, total - less) if auto == "SAME_UPPER" else (total - less, less))
    return sides[0], sides[1]
