"""ONNX's operators that no network learns anything in: arithmetic and shapes, by NumPy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minicnn.backend import FLOATS, Array
from minicnn.onnx.nodes import Node, package
from minicnn.shapes import size

LARGEST = 1 << 31  # elements of one output: a bound on what a small file can ask for


def floats(node: Node, **arrays: Array | None) -> None:
    """Refuse arrays that are neither float32 nor float64."""
    for name, a in arrays.items():
        if a is not None and a.dtype.name not in FLOATS:
            node.fail(f"{name}: expected float32 or float64, got {a.dtype}")


def elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """A NumPy function of any number of arrays of one dtype, which it keeps."""

    def run(node: Node, *inputs: Array) -> Array:
        if node.opset < 7 and node.take("broadcast", 0):
            axis, (a, b) = node.take("axis"), inputs
            if axis is not None:  # where b's axes begin among a's
                b = b.reshape(*b.shape, *[1] * (a.ndim - axis % a.ndim - b.ndim))
            inputs = a, b
        largest = size(np.broadcast_shapes(*(a.shape for a in inputs)))
        if largest > LARGEST:
            node.fail(f"inputs: expected at most {LARGEST} elements of output, got {largest}")
        with np.errstate(all="ignore"):
            return np.asarray(function(*inputs), inputs[0].dtype)

    return run


def fold(function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Array) -> Array:
        y = inputs[0]
        for a in inputs[1:]:
            y = function(y, a)
        return y

    return run


def divide(a: Array, b: Array) -> Array:
    """Integers are cut towards zero."""
    if a.dtype.kind == "f":
        return np.true_divide(a, b)
    quotient = np.floor_divide(a, b)
    return quotient + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0)))


def clip(node: Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    if node.opset < 11:
        low, high = (None if v is None else x.dtype.type(v)
                     for v in (node.take("min"), node.take("max")))  # fmt: skip
    y = x if low is None else np.maximum(x, low)
    return np.asarray(y if high is None else np.minimum(y, high), x.dtype)


def constant(node: Node) -> Array:
    for name, dtype in (("value", None), ("value_float", "f4"), ("value_floats", "f4"),
                        ("value_int", "i8"), ("value_ints", "i8")):  # fmt: skip
        value = node.take(name)
        if value is not None:
            return np.asarray(value, dtype)
    return node.fail("value: expected numbers, got none")


def reshape(node: Node, x: Array, shape: Array) -> Array:
    wanted = shape.tolist()
    if not node.take("allowzero", 0):
        wanted = [x.shape[i] if n == 0 and i < x.ndim else n for i, n in enumerate(wanted)]
    return x.reshape(wanted)


def flatten(node: Node, x: Array) -> Array:
    axis = node.take("axis", 1)
    if not -x.ndim <= axis <= x.ndim:
        node.wrong(f"axis: expected {-x.ndim} to {x.ndim}, got {axis}")
    axis += x.ndim if axis < 0 else 0
    return x.reshape(size(x.shape[:axis]), size(x.shape[axis:]))


def transpose(node: Node, x: Array) -> Array:
    return np.ascontiguousarray(x.transpose(node.take("perm", list(range(x.ndim))[::-1])))


def axes_of(node: Node, axes: Array | None, changed: int = 13) -> list[int] | None:
    """Axes come as an attribute before opset `changed`, as an input since."""
    if axes is not None:
        return [int(i) for i in axes.ravel()]
    found = node.take("axes") if node.opset < changed else None
    return None if found is None else [int(i) for i in found]


def squeeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    found = axes_of(node, axes)
    return np.squeeze(x, None if found is None else tuple(found))


def unsqueeze(node: Node, x: Array, axes: Array | None = None) -> Array:
    found = axes_of(node, axes)
    if not found:
        node.wrong("axes: expected one or more, got none")
    return np.expand_dims(x, tuple(found))


def concat(node: Node, *inputs: Array) -> Array:
    return np.concatenate(inputs, node.take("axis", 1 if node.opset < 4 else 0))


def split(node: Node, x: Array, sizes: Array | None = None) -> tuple[Array, ...]:
    axis, parts = node.take("axis", 0), node.take("num_outputs", len(node.outputs))
    found = node.take("split") if node.opset < 13 else sizes
    n = x.shape[axis]
    each = -(-n // parts)
    lengths = [each] * (n // each if each else 0) if found is None else [int(v) for v in found]
    if found is None and len(lengths) < parts:
        lengths += [n - sum(lengths)] + [0] * (parts - len(lengths) - 1)
    if sum(lengths) != n or min(lengths) < 0 or len(lengths) != len(node.outputs):
        node.wrong(f"split: expected {len(node.outputs)} sizes that add up to {n}, got {lengths}")
    return tuple(np.split(x, np.cumsum(lengths)[:-1].tolist(), axis))


def slice_(node: Node, x: Array, starts: Array = None, ends: Array = None,
           axes: Array | None = None, steps: Array | None = None) -> Array:  # fmt: skip
    if node.opset < 10:
        first, last, along = node.take("starts", []), node.take("ends", []), node.take("axes")
    else:
        if starts is None or ends is None:
            node.wrong("starts, ends: expected arrays, got none")
        first, last = starts.tolist(), ends.tolist()
        along = None if axes is None else axes.tolist()
    step = [1] * len(first) if steps is None else steps.tolist()
    cut: list[Any] = [slice(None)] * x.ndim
    for i, axis in enumerate(along or range(len(first))):
        if not step[i]:
            node.wrong("steps: expected numbers other than 0, got 0")
        if not -x.ndim <= axis < x.ndim:
            node.wrong(f"axes: expected {-x.ndim} to {x.ndim - 1}, got {axis}")
        start, end, n = first[i], last[i], x.shape[axis]
        if step[i] < 0 and end < -n:
            end = None
        cut[axis] = slice(start, end, step[i])
    return np.ascontiguousarray(x[tuple(cut)])


def gather(node: Node, x: Array, indices: Array) -> Array:
    axis = node.take("axis", 0)
    if not -x.ndim <= axis < x.ndim:
        node.wrong(f"axis: expected {-x.ndim} to {x.ndim - 1}, got {axis}")
    if size((*x.shape, *indices.shape)) > LARGEST:
        node.fail(f"indices: expected at most {LARGEST} elements of output, got more")
    return np.take(x, indices, axis)


def shape(node: Node, x: Array) -> Array:
    start, end = node.take("start", 0), node.take("end")
    return np.array(x.shape[start:end], np.int64)


def cast(node: Node, x: Array) -> Array:
    kind = node.take("to", 0)
    node.take("saturate"), node.take("round_mode")  # for 8-bit floats, which are refused
    onnx = package()
    proto = onnx.TensorProto
    plain = {proto.FLOAT: "f4", proto.DOUBLE: "f8", proto.INT32: "i4", proto.INT64: "i8",
             proto.BOOL: "?"}  # fmt: skip
    if kind not in plain or x.dtype.kind not in "fiub" or x.dtype.itemsize == 2:
        node.fail(f"to: expected float, double, int32, int64 or bool from such, got type {kind} "
                  f"from {x.dtype}")  # fmt: skip
    with np.errstate(all="ignore"):
        return x.astype(plain[kind])


def pad(node: Node, x: Array, pads: Array = None, value: Array | None = None,
        axes: Array | None = None) -> Array:  # fmt: skip
    mode = node.take("mode", "constant")
    if node.opset < 11:
        widths, fill = node.take("pads", []), node.take("value", 0.0)
    else:
        if pads is None:
            node.wrong("pads: expected an array, got none")
        widths, fill = pads.tolist(), 0 if value is None else value.item()
    along = list(range(x.ndim)) if axes is None else axes.tolist()
    if len(widths) != 2 * len(along):
        node.wrong(f"pads: expected {2 * len(along)} numbers, got {len(widths)}")
    before, after = [0] * x.ndim, [0] * x.ndim
    for i, axis in enumerate(along):
        before[axis], after[axis] = widths[i], widths[len(along) + i]
    if size([n + max(0, b) + max(0, a) for n, b, a in zip(x.shape, before, after)]) > LARGEST:
        node.fail(f"pads: expected at most {LARGEST} elements of output, got {widths}")
    modes = {"constant": "constant", "reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    if mode not in modes:
        node.wrong(f"mode: expected one of {', '.join(modes)}, got {mode!r}")
    # Negative numbers cut; whatever a mode repeats is what is left.
    x = x[tuple(slice(max(0, -b), n - max(0, -a)) for n, b, a in zip(x.shape, before, after))]
    width = [(max(0, b), max(0, a)) for b, a in zip(before, after)]
    options = {"constant_values": fill} if mode == "constant" else {}
    return np.pad(x, width, mode=mode, **options)


def reduce(function: Callable[..., Any], changed: int) -> Callable[..., Any]:
    def run(node: Node, x: Array, axes: Array | None = None) -> Array:
        keep = bool(node.take("keepdims", 1))
        nothing = node.take("noop_with_empty_axes", 0)
        found = axes_of(node, axes, changed)
        if not found and nothing:
            return x
        return np.asarray(function(x, axis=tuple(found) if found else None, keepdims=keep), x.dtype)

    return run


def identity(node: Node, x: Array) -> Array:
    return x


def constant_of_shape(node: Node, shape: Array) -> Array:
    value = node.take("value")
    value = np.zeros(1, np.float32) if value is None else value
    sizes = [int(n) for n in shape]
    if min(sizes, default=0) < 0 or value.size != 1:
        node.wrong(f"input: expected sizes >= 0 and one value, got {sizes} of {value.size} values")
    if size([n for n in sizes if n]) > LARGEST:
        node.fail(f"input: expected at most {LARGEST} elements, got shape {sizes}")
    return np.full(sizes, value.ravel()[0], value.dtype)


def hard_sigmoid(node: Node, x: Array) -> Array:
    floats(node, X=x)
    alpha, beta = node.take("alpha", 0.2), node.take("beta", 0.5)
    return (x * x.dtype.type(alpha) + x.dtype.type(beta)).clip(0, 1)


def hard_swish(node: Node, x: Array) -> Array:
    floats(node, X=x)
    return x * (x / x.dtype.type(6) + x.dtype.type(0.5)).clip(0, 1)


def greater(node: Node, a: Array, b: Array) -> Array:
    return np.greater(a, b)


def where(node: Node, condition: Array, a: Array, b: Array) -> Array:
    return np.where(condition, a, b)


def prelu(node: Node, x: Array, slope: Array) -> Array:
    floats(node, X=x, slope=slope)
    if node.opset < 7 and slope.size > 1:  # one for each channel
        slope = slope.reshape(-1, *[1] * (x.ndim - 2))
    return np.where(x > 0, x, np.asarray(x * slope, x.dtype))


PLUMBING: dict[str, Callable[..., Any]] = {
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "PRelu": prelu,
    "Add": elementwise(np.add),
    "Sub": elementwise(np.subtract),
    "Mul": elementwise(np.multiply),
    "Div": elementwise(divide),
    "Neg": elementwise(np.negative),
    "Abs": elementwise(np.abs),
    "Exp": elementwise(np.exp),
    "Sqrt": elementwise(np.sqrt),
    "Pow": elementwise(np.power),
    "Sum": elementwise(fold(np.add)),
    "Max": elementwise(fold(np.maximum)),
    "Min": elementwise(fold(np.minimum)),
    "Clip": clip,
    "Greater": greater,
    "Where": where,
    "Constant": constant,
    "ConstantOfShape": constant_of_shape,
    "Identity": identity,
    "Reshape": reshape,
    "Flatten": flatten,
    "Transpose": transpose,
    "Squeeze": squeeze,
    "Unsqueeze": unsqueeze,
    "Concat": concat,
    "Split": split,
    "Slice": slice_,
    "Gather": gather,
    "Shape": shape,
    "Cast": cast,
    "Pad": pad,
    "ReduceMean": reduce(np.mean, 18),
    "ReduceSum": reduce(np.sum, 13),
}
