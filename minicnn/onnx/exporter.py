"""Networks as ONNX files.

Parameters keep their names from `state_dict`. Each layer becomes the ONNX operator of the same
meaning, or a few where ONNX has none (SiLU, uneven adaptive pooling, ...).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from minicnn import layers as L
from minicnn.backend import to_cpu
from minicnn.files import replacing
from minicnn.layers.base import Layer, Shape
from minicnn.onnx import graph as G
from minicnn.onnx.nodes import package
from minicnn.ops.adaptive_avg_pool2d import grid
from minicnn.ops.avg_pool2d import avg_pool2d_forward
from minicnn.ops.max_pool2d import reach
from minicnn.shapes import Window, integer, size

OPSET = 21  # the first whose GroupNormalization has a scale for each channel
IR_VERSION = 10  # the file format that goes with it


def export(
    model: Layer, path: str | os.PathLike[str], input_shape: Shape, opset: int = OPSET
) -> None:
    """Write a network as an ONNX file for inference, with a batch axis of any length.

    Parameters
    ----------
    model : Layer
        Any layer of minicnn, alone or in `Sequential`, `Residual` and `Graph`. It is exported as
        in evaluation.
    path : path-like
        Usually named ``*.onnx``. An older file stays until the new one is whole.
    input_shape : tuple of int
        One example without the batch axis, such as ``(1, 28, 28)``.
    opset : int
        Version of the operator set, from 21 to the newest that the package ``onnx`` knows.

    Raises
    ------
    ImportError
        If the package ``onnx`` is missing.
    TypeError
        If a layer has no form in ONNX; the message names it.
    ValueError
        If a layer cannot take the shape that reaches it, or for an unknown opset.
    OSError
        If the file cannot be written.
    """
    proto = to_proto(model, input_shape, opset)
    with replacing(Path(path)) as file:
        file.write(proto.SerializeToString())


def to_proto(model: Layer, input_shape: Shape, opset: int = OPSET) -> Any:
    """Return a network as an ``onnx.ModelProto`` that ``onnx.checker`` has passed."""
    import minicnn

    onnx = package()
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= integer("export", "opset", opset, 1) <= newest:
        raise ValueError(f"export: opset: expected {OPSET} to {newest}, got {opset}")
    shape = tuple(integer("export", "input_shape", n, 1) for n in input_shape)
    dtypes = {p.dtype for _, p, _ in model.named_params()} or {np.dtype(np.float32)}
    if len(dtypes) > 1:
        raise TypeError(
            f"export: model: expected one dtype, got {sorted(map(str, dtypes))} "
            "(fix: model.astype('float32'))"
        )
    dtype = dtypes.pop()
    builder = _Builder(onnx, dtype)
    y, one = builder.layer(model, "", "input", (1, *shape))
    builder.nodes.append(onnx.helper.make_node("Identity", [y], ["output"], name="output"))
    two = model.output_shape((2, *shape))
    kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
    batch = "N" if (one[0], two[0]) == (1, 2) else "M"
    info = onnx.helper.make_tensor_value_info
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            builder.nodes,
            type(model).__name__,
            [info("input", kind, ["N", *shape])],
            [info("output", kind, [batch, *one[1:]])],
            [onnx.numpy_helper.from_array(a, name) for name, a in builder.arrays.items()],
        ),
        producer_name="minicnn",
        producer_version=minicnn.__version__,
        opset_imports=[onnx.helper.make_opsetid("", opset)],
        ir_version=max(IR_VERSION, onnx.helper.find_min_ir_version_for(
            [onnx.helper.make_opsetid("", opset)])),
    )  # fmt: skip
    onnx.checker.check_model(proto, full_check=True)
    return proto


class _Builder:
    """Nodes and stored arrays, while they are collected."""

    def __init__(self, onnx: Any, dtype: Any) -> None:
        self.onnx, self.dtype = onnx, dtype
        self.nodes: list[Any] = []
        self.arrays: dict[str, np.ndarray] = {}
        self.seen: dict[int, str] = {}  # a layer that stands in two places is stored once

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Add a node of one output; returns the output's name."""
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(
            self.onnx.helper.make_node(op, list(inputs), [name], name=name, **attributes)
        )
        return name

    def array(self, a: Any, name: str = "") -> str:
        """Store an array; returns its name."""
        name = name or f"constant_{len(self.arrays)}"
        self.arrays[name] = np.array(to_cpu(a), order="C")
        return name

    def number(self, value: float) -> str:
        return self.array(np.array(value, self.dtype))

    def ints(self, *values: int) -> str:
        return self.array(np.array(values, np.int64))

    def param(self, layer: Layer, name: str, key: str) -> str:
        """Store a parameter or buffer under its key in `state_dict`; "" if there is none."""
        a = (layer.params | layer.buffers).get(key)
        if a is None:
            return ""
        first = self.seen.setdefault(id(layer), name)
        full = f"{first}.{key}" if first else key
        return full if full in self.arrays else self.array(a, full)

    def scale_and_shift(self, layer: Layer, name: str, shape: Shape) -> tuple[str, str]:
        """Weight and bias, ones and zeros where the layer has none."""
        weight, bias = (self.param(layer, name, key) for key in ("weight", "bias"))
        return (
            weight or self.array(np.ones(shape, self.dtype)),
            bias or self.array(np.zeros(shape, self.dtype)),
        )

    def layer(self, layer: Layer, name: str, x: str, x_shape: Shape) -> tuple[str, Shape]:
        """Add a layer; returns the name and the shape of its output."""
        prefix = f"{name}." if name else ""
        if isinstance(layer, L.Sequential):
            for i, inner in enumerate(layer):
                x, x_shape = self.layer(inner, f"{prefix}{i}", x, x_shape)
            return x, x_shape
        if isinstance(layer, L.Residual):
            y, y_shape = self.layer(layer.body, f"{prefix}body", x, x_shape)
            if layer.shortcut is not None:
                x, x_shape = self.layer(layer.shortcut, f"{prefix}shortcut", x, x_shape)
            if y_shape != x_shape:
                layer.output_shape(x_shape)  # says how the two differ
            return self.node("Add", y, x), y_shape
        if isinstance(layer, G.Graph):
            values, shapes = [x], [x_shape]
            for i, (inner, reads) in enumerate(layer.steps):
                args, arg_shapes = [values[r] for r in reads], [shapes[r] for r in reads]
                if isinstance(inner, G.Add | G.Mul | G.Concat):
                    options = {"axis": inner.dim} if isinstance(inner, G.Concat) else {}
                    y = self.node(type(inner).__name__, *args, **options)
                    y_shape = inner.output_shape(tuple(arg_shapes))
                else:
                    y, y_shape = self.layer(inner, f"{prefix}{i}", args[0], arg_shapes[0])
                values.append(y)
                shapes.append(y_shape)
            return values[-1], shapes[-1]
        write = WRITERS.get(type(layer))
        if write is None:
            place = f"layer {name}" if name else "model"
            known = ", ".join(sorted(kind.__name__ for kind in WRITERS))
            raise TypeError(
                f"export: {place}: expected one of Sequential, Residual, Graph, {known}, "
                f"got {type(layer).__name__}"
            )
        try:
            y_shape = tuple(layer.output_shape(x_shape))
        except ValueError as error:
            error.add_note(f"in layer {name}")
            raise
        return write(self, layer, name, x, x_shape), y_shape


# ---------------------------------------------------------------- one writer a layer


def _geometry(win: Window, padding: Any = None) -> dict[str, Any]:
    (top, bottom), (left, right) = padding or win.padding
    return {
        "kernel_shape": win.kernel,
        "strides": win.stride,
        "pads": (top, left, bottom, right),
        "dilations": win.dilation,
    }


def _conv(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    inputs = [b.param(layer, name, key) for key in ("weight", "bias")]
    extra = {}
    if isinstance(layer, L.ConvTranspose2d):
        op, extra["output_padding"] = "ConvTranspose", layer.options["output_padding"]
        if any(o >= s for o, s in zip(extra["output_padding"], layer._window.stride)):
            # ONNX allows output_padding below the stride only: take less away instead.
            (top, bottom), (left, right) = layer._window.padding
            more = extra.pop("output_padding")
            padding = ((top, bottom - more[0]), (left, right - more[1]))
            if min(bottom - more[0], right - more[1]) < 0:
                return _conv_transpose_padded(b, layer, inputs, x, more)
            return b.node(op, x, *filter(None, inputs), group=layer.groups,
                          **_geometry(layer._window, padding))  # fmt: skip
    else:
        op = "Conv"
    return b.node(
        op, x, *filter(None, inputs), group=layer.groups, **_geometry(layer._window), **extra
    )


def _conv_transpose_padded(b: _Builder, layer: Any, inputs: list[str], x: str, more: Any) -> str:
    """Rows beyond the canvas hold the bias alone: paint without bias, pad by zeros, add it."""
    (top, bottom), (left, right) = layer._window.padding
    y = b.node("ConvTranspose", x, inputs[0], group=layer.groups,
               **_geometry(layer._window, ((top, 0), (left, 0))))  # fmt: skip
    y = b.node("Pad", y, b.ints(0, 0, 0, 0, 0, 0, more[0] - bottom, more[1] - right))
    if not inputs[1]:
        return y
    return b.node("Add", y, b.node("Unsqueeze", inputs[1], b.ints(1, 2)))


def _linear(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    weight, bias = (b.param(layer, name, key) for key in ("weight", "bias"))
    if len(x_shape) == 2:
        return b.node("Gemm", x, weight, *filter(None, [bias]), transB=1)
    y = b.node("MatMul", x, b.node("Transpose", weight, perm=(1, 0)))
    return b.node("Add", y, bias) if bias else y


def _flatten(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    start, end = (layer.options[key] % len(x_shape) for key in ("start_dim", "end_dim"))
    if (start, end) == (1, len(x_shape) - 1):
        return b.node("Flatten", x, axis=1)
    return b.node("Reshape", x, b.ints(*[0] * start, -1, *x_shape[end + 1 :]))


def _max_pool(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    win = layer.window()
    if layer.options["ceil_mode"]:  # shape inference and runtimes disagree on it
        win = reach("MaxPool2d", np.empty(x_shape, np.int8), win, True)
    return b.node("MaxPool", x, **_geometry(win))


def _avg_pool(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    """Runtimes disagree on ceil_mode: the last windows get their padding and divisor here."""
    win, options = layer.window(), layer.options
    if not options["ceil_mode"] and options["divisor_override"] is None:
        geometry = _geometry(win)
        del geometry["dilations"]
        count = int(options["count_include_pad"])
        return b.node("AveragePool", x, count_include_pad=count, **geometry)
    # Sums of padded windows, over the divisors, which our own op knows.
    H, W = x_shape[2:]
    _, cache = avg_pool2d_forward(np.zeros((1, 1, H, W)), **options)
    (top, bottom), (left, right) = cache.window.padding
    x = b.node("Pad", x, b.ints(0, 0, top, left, 0, 0, bottom, right))
    # A floored output leaves rows over, which no window reaches.
    means = b.node("AveragePool", x, kernel_shape=win.kernel, strides=win.stride)
    factor = size(win.kernel) / cache.divisor  # (OH, OW)
    return b.node("Mul", means, b.array(factor.astype(b.dtype)))


def _adaptive_avg_pool(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    H, W = x_shape[2:]
    places = grid("AdaptiveAvgPool2d", layer.options["output_size"], (H, W))
    if places == (1, 1):
        return b.node("GlobalAveragePool", x)
    # Bins may be of different sizes and overlap: a matrix of shares along each axis.
    rows, columns = (_shares(n, m).astype(b.dtype) for n, m in zip((H, W), places))
    y = b.node("MatMul", x, b.array(columns.T.copy()))  # (N, C, H, OW)
    return b.node("MatMul", b.array(rows), y)  # (N, C, OH, OW)


def _shares(size: int, bins: int) -> np.ndarray:
    """Share of each pixel in each bin: (bins, size)."""
    shares = np.zeros((bins, size))
    for i in range(bins):
        first, end = i * size // bins, -(-(i + 1) * size // bins)
        shares[i, first:end] = 1 / (end - first)
    return shares


def _batch_norm(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    weight, bias = b.scale_and_shift(layer, name, (layer.num_features,))
    if layer.buffers:
        mean, var = (b.param(layer, name, key) for key in ("running_mean", "running_var"))
        return b.node("BatchNormalization", x, weight, bias, mean, var, epsilon=layer.eps)
    # Without running statistics evaluation, too, takes those of the batch.
    axes = b.ints(0, 2, 3)
    centred = b.node("Sub", x, b.node("ReduceMean", x, axes, keepdims=1))
    var = b.node("ReduceMean", b.node("Mul", centred, centred), axes, keepdims=1)
    std = b.node("Sqrt", b.node("Add", var, b.number(layer.eps)))
    weight, bias = (b.node("Unsqueeze", a, b.ints(1, 2)) for a in (weight, bias))
    return b.node("Add", b.node("Mul", b.node("Div", centred, std), weight), bias)


def _layer_norm(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    shape = layer.normalized_shape
    weight, bias = b.scale_and_shift(layer, name, shape)
    return b.node("LayerNormalization", x, weight, bias, axis=-len(shape), epsilon=layer.eps)


def _group_norm(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    weight, bias = b.scale_and_shift(layer, name, (layer.num_channels,))
    return b.node(
        "GroupNormalization", x, weight, bias, num_groups=layer.num_groups, epsilon=layer.eps
    )


def _softplus(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    beta, threshold = layer.options["beta"], layer.options["threshold"]
    scaled = x if beta == 1 else b.node("Mul", x, b.number(beta))
    y = b.node("Softplus", scaled)
    y = y if beta == 1 else b.node("Div", y, b.number(beta))
    if threshold >= 15:  # from there on the two branches differ by less than exp(-15) = 3e-7
        return y
    return b.node("Where", b.node("Greater", scaled, b.number(threshold)), x, y)


def _silu(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    return b.node("Mul", x, b.node("Sigmoid", x))


def _scale(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    for op, key in (("Mul", "scale"), ("Add", "shift")):
        if key in layer.buffers:
            x = b.node(op, x, b.param(layer, name, key))
    return x


def _clip(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    low, high = layer.options["low"], layer.options["high"]
    return b.node(
        "Clip",
        x,
        b.number(low) if low > -math.inf else "",
        *([b.number(high)] if high < math.inf else []),
    )


def _pad(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    (top, bottom), (left, right) = layer.options["padding"]
    pads = b.ints(0, 0, top, left, 0, 0, bottom, right)
    return b.node("Pad", x, pads, b.number(layer.options["value"]))


def _reshape(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    return b.node("Reshape", x, b.ints(0, *layer.output_shape(x_shape)[1:]))


def _op(op: str, **names: str) -> Callable[..., str]:
    """A writer for one operator, whose attributes are options of the layer."""

    def write(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
        return b.node(op, x, **{there: layer.options[here] for there, here in names.items()})

    return write


def _nothing(b: _Builder, layer: Any, name: str, x: str, x_shape: Shape) -> str:
    return x


WRITERS: dict[type, Callable[..., str]] = {
    L.Conv2d: _conv,
    L.ConvTranspose2d: _conv,
    L.Linear: _linear,
    L.Flatten: _flatten,
    L.MaxPool2d: _max_pool,
    L.AvgPool2d: _avg_pool,
    L.AdaptiveAvgPool2d: _adaptive_avg_pool,
    L.BatchNorm2d: _batch_norm,
    L.LayerNorm: _layer_norm,
    L.GroupNorm: _group_norm,
    L.Dropout: _nothing,
    L.ReLU: _op("Relu"),
    L.LeakyReLU: _op("LeakyRelu", alpha="negative_slope"),
    L.ELU: _op("Elu", alpha="alpha"),
    L.Sigmoid: _op("Sigmoid"),
    L.Tanh: _op("Tanh"),
    L.GELU: _op("Gelu", approximate="approximate"),
    L.SiLU: _silu,
    L.Softplus: _softplus,
    L.Softmax: _op("Softmax", axis="dim"),
    L.LogSoftmax: _op("LogSoftmax", axis="dim"),
    G.Scale: _scale,
    G.Clip: _clip,
    G.Pad: _pad,
    G.Reshape: _reshape,
}
