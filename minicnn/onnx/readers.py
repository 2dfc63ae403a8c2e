"""How each operator of an ONNX file becomes a layer of ours."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn import layers as L
from minicnn.layers.base import Layer
from minicnn.onnx import graph as G
from minicnn.onnx.nodes import Node, window
from minicnn.onnx.operators import transposed_window
from minicnn.onnx.plumbing import axes_of
from minicnn.shapes import size

if TYPE_CHECKING:
    from minicnn.onnx.importer import GraphReader


def _fill(layer: Any, **values: Any) -> Any:
    for name, value in values.items():
        if value is not None:
            setattr(layer, name, value)
    return layer


def _conv(r: GraphReader, node: Node) -> None:
    w, b = r.weights(node, 1, "W"), r.constant(node, 2, "B")
    shape, group = r.shape(node), node.take("group", 1)
    if w.ndim != 4:
        node.fail(f"W: expected 4 axes (images are 2-D), got shape {w.shape}")
    transposed = node.op == "ConvTranspose"
    spatial = shape[2:] if shape else None
    extra: dict[str, Any] = {}
    if transposed:
        if spatial is None and not _plain(node):
            node.fail("auto_pad, output_shape: expected an input of known size, got none")
        win, extra["output_padding"] = transposed_window(node, spatial, w.shape[2:])
    else:
        win = window(node, spatial, w.shape[2:])
    kind, channels = (
        (L.ConvTranspose2d, (w.shape[0], w.shape[1] * group))
        if transposed
        else (L.Conv2d, (w.shape[1] * group, w.shape[0]))
    )
    layer: Any = kind(
        *channels, win.kernel, win.stride, win.padding, groups=group, bias=b is not None,
        dilation=win.dilation, rng=0, dtype=w.dtype, **extra,
    )  # fmt: skip
    r.add(node, _fill(layer, weight=w, bias=b))


def _plain(node: Node) -> bool:
    return not {"auto_pad", "output_shape"} & set(node._attributes)


def _max_pool(r: GraphReader, node: Node) -> None:
    if node.take("storage_order", 0):
        node.fail("storage_order: expected 0, got 1")
    win, ceil, wide = _pool_window(r, node)
    padding: Any = 0 if wide else win.padding
    layer: Layer = L.MaxPool2d(win.kernel, win.stride, padding, win.dilation, ceil)
    r.add(node, L.Sequential(G.Pad(win.padding, -math.inf), layer) if wide else layer)


def _average_pool(r: GraphReader, node: Node) -> None:
    count = bool(node.take("count_include_pad", 0))
    win, ceil, wide = _pool_window(r, node)
    if win.dilation != (1, 1):
        node.fail(f"dilations: expected 1, got {list(win.dilation)}")
    if wide and not count:
        node.fail(f"pads: expected at most half the kernel {win.kernel}, got {win.padding}")
    padding: Any = 0 if wide else win.padding
    layer: Layer = L.AvgPool2d(win.kernel, win.stride, padding, ceil, count)
    r.add(node, L.Sequential(G.Pad(win.padding), layer) if wide else layer)


def _pool_window(r: GraphReader, node: Node) -> Any:
    """Window, ceil_mode, and whether the padding is wider than the pooling layers take."""
    shape = r.shape(node)
    win = window(node, shape[2:] if shape else None, None)
    ceil = bool(node.take("ceil_mode", 0))
    wide = any(max(sides) > k // 2 for k, sides in zip(win.kernel, win.padding))
    if wide and ceil:  # which of the last windows count depends on what is padding
        node.fail(f"pads: expected at most half the kernel {win.kernel}, got {win.padding}")
    return win, ceil, wide


def _pad(r: GraphReader, node: Node) -> None:
    mode, shape = node.take("mode", "constant"), r.shape(node)
    if node.opset < 11:
        pads, value = list(node.take("pads", [])), node.take("value", 0.0)
    else:
        found, fill = r.constant(node, 1, "pads"), r.constant(node, 2, "constant_value")
        pads = [] if found is None else [int(n) for n in found]
        value = 0.0 if fill is None else float(fill)
    if mode != "constant":
        node.fail(f"mode: expected 'constant', got {mode!r}")
    axes = axes_of(node, r.constant(node, 3, "axes"), 0) or list(range(len(pads) // 2))
    if len(pads) != 2 * len(axes):
        node.wrong(f"pads: expected {2 * len(axes)} numbers, got {len(pads)}")
    sides = {a % 4: (pads[i], pads[len(axes) + i]) for i, a in enumerate(axes)}
    if (shape and len(shape) != 4) or min(pads, default=0) < 0 or any(
        sides.get(a, (0, 0)) != (0, 0) for a in (0, 1)
    ):  # fmt: skip
        node.fail(f"pads: expected numbers >= 0 for rows and columns, got {pads}")
    r.add(node, G.Pad((sides.get(2, (0, 0)), sides.get(3, (0, 0))), value))


def _global_average_pool(r: GraphReader, node: Node) -> None:
    r.add(node, L.AdaptiveAvgPool2d(1))


def _batch_norm(r: GraphReader, node: Node) -> None:
    w, b, mean, var = (
        r.weights(node, i, name) for i, name in enumerate(("scale", "B", "mean", "var"), 1)
    )
    if node.take("training_mode", 0):
        node.fail("training_mode: expected 0, got 1")
    if node.opset < 7 and not node.take("is_test", 0):
        node.fail("is_test: expected 1, got 0")
    if node.opset < 9 and not node.take("spatial", 1):
        node.fail("spatial: expected 1, got 0")
    layer = L.BatchNorm2d(
        w.size, node.take("epsilon", 1e-5), 1 - node.take("momentum", 0.9), dtype=w.dtype
    )
    if any(a.shape != w.shape for a in (b, mean, var)):
        node.wrong(f"B, mean, var: expected shape {w.shape} like scale, got {b.shape}, "
                   f"{mean.shape}, {var.shape}")  # fmt: skip
    layer.buffers["running_mean"][...] = mean
    layer.buffers["running_var"][...] = var
    r.add(node, _fill(layer, weight=w, bias=b))


def _layer_norm(r: GraphReader, node: Node) -> None:
    w, b = r.weights(node, 1, "Scale"), r.constant(node, 2, "B")
    shape, axis = r.shape(node), node.take("axis", -1)
    if axis >= 0:
        if shape is None:
            node.fail("axis: expected a negative one for an input of unknown rank, got another")
        axis -= len(shape)
    if w.ndim != -axis:
        node.fail(f"Scale: expected {-axis} axes, as many as are normalised, got shape {w.shape}")
    if node.take("stash_type", 1) != 1:
        node.fail("stash_type: expected 1, got another")
    layer = L.LayerNorm(w.shape, node.take("epsilon", 1e-5), bias=b is not None, dtype=w.dtype)
    r.add(node, _fill(layer, weight=w, bias=b))


def _group_norm(r: GraphReader, node: Node) -> None:
    w, b = r.weights(node, 1, "scale"), r.weights(node, 2, "bias")
    groups = w.size
    if node.op == "GroupNormalization":
        groups = node.take("num_groups", 0)
        if node.opset < 21:
            node.fail("scale: expected one number a channel (opset 21), got one a group")
        if node.take("stash_type", 1) != 1:
            node.fail("stash_type: expected 1, got another")
    layer = L.GroupNorm(groups, w.size, node.take("epsilon", 1e-5), dtype=w.dtype)
    r.add(node, _fill(layer, weight=w, bias=b))


def _gemm(r: GraphReader, node: Node) -> None:
    w, b = r.weights(node, 1, "B"), r.constant(node, 2, "C")
    alpha, beta = node.take("alpha", 1.0), node.take("beta", 1.0)
    if node.opset < 7:
        node.take("broadcast")
    if node.take("transA", 0):
        node.fail("transA: expected 0, got 1")
    w = w if node.take("transB", 0) else w.T  # (O, I)
    if w.ndim != 2:
        node.wrong(f"B: expected 2 axes, got shape {w.shape}")
    if b is not None:
        if b.ndim == 2 and len(b) == 1:
            b = b[0]
        b = np.broadcast_to(b * b.dtype.type(beta), w.shape[:1])
    _linear(r, node, w * w.dtype.type(alpha), b)


def _matmul(r: GraphReader, node: Node) -> None:
    w = r.weights(node, 1, "B")
    if w.ndim != 2:
        node.fail(f"B: expected 2 axes, got shape {w.shape}")
    _linear(r, node, w.T, None)


def _linear(r: GraphReader, node: Node, w: Any, b: Any) -> None:
    layer = L.Linear(w.shape[1], w.shape[0], b is not None, 0, w.dtype)
    r.add(node, _fill(layer, weight=w, bias=b))


def _flatten(r: GraphReader, node: Node) -> None:
    axis, shape = node.take("axis", 1), r.shape(node)
    if axis < 0 and shape is not None:
        axis += len(shape)
    if axis != 1:
        node.fail(f"axis: expected 1, which keeps the batch apart, got {axis}")
    r.add(node, L.Flatten())


def _reshape(r: GraphReader, node: Node) -> None:
    target = r.constant(node, 1, "shape")
    shape = r.shape(node)
    if node.take("allowzero", 0) or target is None or target.ndim != 1 or not target.size:
        node.fail("shape: expected a list of sizes in which 0 keeps one, got another")
    sizes = [int(n) for n in target]
    if node.inputs[1] in r.of_batch and 0 in sizes[1:]:
        node.fail(f"shape: expected the batch first, got {sizes}")
    first, rest = sizes[0], sizes[1:]
    rest = [shape[i] if n == 0 and shape and i < len(shape) else n for i, n in enumerate(rest, 1)]
    if first not in (0, r.batch) and not (first == -1 and shape and size(rest) == size(shape[1:])):
        node.fail(f"shape: expected one that keeps the batch apart, got {sizes}")
    if rest == [-1]:
        r.add(node, L.Flatten())
        return
    if shape is None or rest.count(-1) > 1 or min(rest, default=1) < -1:
        node.fail(f"shape: expected sizes that can be worked out, got {sizes}")
    if -1 in rest:
        known = -size(rest)
        rest[rest.index(-1)] = size(shape[1:]) // known if known > 0 else 0
    if size(rest) != size(shape[1:]) or 0 in rest:
        node.wrong(f"shape: expected {size(shape[1:])} elements an example, got {sizes}")
    r.add(node, L.Flatten() if len(rest) == 1 else G.Reshape(tuple(rest)))


def _squeeze(r: GraphReader, node: Node) -> None:
    shape = r.shape(node)
    axes = axes_of(node, r.constant(node, 1, "axes"))
    if shape is None or axes is None:
        node.fail("axes: expected axes of an input of known shape, got none")
    ndim = len(shape)
    dropped = {a % ndim for a in axes}
    if 0 in dropped or any(shape[a] != 1 for a in dropped):
        node.wrong(f"axes: expected axes of length 1 but the batch's, got {axes} of {shape}")
    r.add(node, G.Reshape(tuple(n for i, n in enumerate(shape) if i and i not in dropped)))


def _reduce_mean(r: GraphReader, node: Node) -> None:
    axes = axes_of(node, r.constant(node, 1, "axes"), 18)
    keep = node.take("keepdims", 1)
    node.take("noop_with_empty_axes")
    shape = r.shape(node)
    if axes is None or sorted(a % 4 for a in axes) != [2, 3] or (shape and len(shape) != 4):
        node.fail(f"axes: expected rows and columns [2, 3] of 4 axes, got {axes}")
    layer: Layer = L.AdaptiveAvgPool2d(1)
    r.add(node, layer if keep else L.Sequential(layer, L.Flatten()))


def _binary(r: GraphReader, node: Node) -> None:
    """Add, Sub, Mul or Div of two values, or of a value and stored numbers."""
    axis = node.take("axis") if node.opset < 7 and node.take("broadcast", 0) else None
    if all(name in r.values for name in node.inputs):
        if node.op in ("Sub", "Div"):
            node.fail("inputs: expected stored numbers as one of them, got two values")
        layer = G.Add() if node.op == "Add" else G.Mul()
        r.add(node, layer, (r.value(node, 0), r.value(node, 1)))
        return
    at = 1 if node.inputs[0] in r.values else 0
    a = r.weights(node, at, f"input {at}")
    if axis is not None:  # where a's axes begin among the value's
        shape = r.shapes[r.value(node, 1 - at)]
        if shape is None:
            node.fail("axis: expected an input of known shape, got none")
        a = a.reshape(*a.shape, *[1] * (len(shape) - axis % len(shape) - a.ndim))
    if at == 0 and node.op in ("Sub", "Div"):
        node.fail("input 0: expected a value that depends on the input, got stored numbers")
    read = r.value(node, 1 - at)
    # Bias after a MatMul: how linear layers on more than 2 axes are exported.
    if node.op == "Add" and read and a.ndim == 1 and _used_once(r, node.inputs[1 - at]):
        linear, reads = r.steps[read - 1]
        if (
            isinstance(linear, L.Linear)
            and linear.bias is None
            and a.shape == (linear.out_features,)
        ):
            whole = L.Linear(linear.in_features, linear.out_features, True, 0, a.dtype)
            r.steps[read - 1] = (_fill(whole, weight=linear.weight, bias=a), reads)
            r.values[node.outputs[0]] = read
            return
    scale = {"Mul": lambda: a, "Div": lambda: 1 / a}.get(node.op)
    shift = {"Add": lambda: a, "Sub": lambda: -a}.get(node.op)
    r.add(node, G.Scale(scale and scale(), shift and shift()), (read,))


def _used_once(r: GraphReader, name: str) -> bool:
    uses = sum(list(n.input).count(name) for n in r.graph.node)
    return uses == 1 and name not in [o.name for o in r.graph.output]


def _sum(r: GraphReader, node: Node) -> None:
    if len(node.inputs) != 2:
        node.fail(f"inputs: expected 2, got {len(node.inputs)}")
    node.op = "Add"
    _binary(r, node)


def _concat(r: GraphReader, node: Node) -> None:
    axis, reads = node.take("axis", 0), tuple(r.value(node, i) for i in range(len(node.inputs)))
    shape = r.shapes[reads[0]]
    if axis < 0 and shape is not None:
        axis += len(shape)
    if axis == 0:
        node.fail("axis: expected one that keeps the batch apart, got 0")
    r.add(node, G.Concat(axis), reads)


def _clip(r: GraphReader, node: Node) -> None:
    if node.opset < 11:
        low, high = node.take("min", -math.inf), node.take("max", math.inf)
    else:
        found = (r.constant(node, i, name) for i, name in ((1, "min"), (2, "max")))
        low, high = (
            default if a is None else float(a) for a, default in zip(found, (-math.inf, math.inf))
        )
    r.add(node, G.Clip(low, high))


def _dropout(r: GraphReader, node: Node) -> None:
    ratio, training = r.constant(node, 1, "ratio"), r.constant(node, 2, "training_mode")
    node.take("seed"), node.take("is_test")
    if training is not None and bool(training):
        node.fail("training_mode: expected false, got true")
    p = node.take("ratio", 0.5) if ratio is None else float(ratio)
    node.outputs = node.outputs[:1] if not _read_anywhere(r, node.outputs[1:]) else node.outputs
    r.add(node, L.Dropout(p))


def _read_anywhere(r: GraphReader, names: list[str]) -> bool:
    read = {name for n in r.graph.node for name in n.input} | {o.name for o in r.graph.output}
    return bool(read.intersection(names))


def _identity(r: GraphReader, node: Node) -> None:
    r.values[node.outputs[0]] = r.value(node, 0)


def _along(make: Callable[[int], Layer]) -> Callable[[GraphReader, Node], None]:
    def read_node(r: GraphReader, node: Node) -> None:
        shape, new = r.shape(node), node.opset >= 13
        axis = node.take("axis", -1 if new else 1)
        if not new and (shape is None or axis % len(shape) != len(shape) - 1):
            node.fail(f"axis: expected the last one of a known shape before opset 13, got {axis}")
        r.add(node, make(axis))

    return read_node


def _activation(make: Callable[..., Layer], **names: Any) -> Callable[[GraphReader, Node], None]:
    def read_node(r: GraphReader, node: Node) -> None:
        r.add(node, make(**{ours: node.take(*theirs) for ours, theirs in names.items()}))

    return read_node


READERS: dict[str, Callable[[GraphReader, Node], None]] = {
    "Conv": _conv,
    "ConvTranspose": _conv,
    "MaxPool": _max_pool,
    "AveragePool": _average_pool,
    "GlobalAveragePool": _global_average_pool,
    "ReduceMean": _reduce_mean,
    "BatchNormalization": _batch_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _group_norm,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Add": _binary,
    "Sub": _binary,
    "Mul": _binary,
    "Div": _binary,
    "Sum": _sum,
    "Concat": _concat,
    "Clip": _clip,
    "Pad": _pad,
    "Dropout": _dropout,
    "Identity": _identity,
    "Relu": _activation(L.ReLU),
    "LeakyRelu": _activation(L.LeakyReLU, negative_slope=("alpha", 0.01)),
    "Elu": _activation(L.ELU, alpha=("alpha", 1.0)),
    "Sigmoid": _activation(L.Sigmoid),
    "Tanh": _activation(L.Tanh),
    "Gelu": _activation(L.GELU, approximate=("approximate", "none")),
    "Softplus": _activation(L.Softplus),
    "Softmax": _along(L.Softmax),
    "LogSoftmax": _along(L.LogSoftmax),
}
