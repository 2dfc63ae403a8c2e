"""A network whose layers form any graph without a cycle, as foreign ONNX files have it.

Each step is a layer with the values it reads. Backward goes through the steps in reverse and adds
up the gradients of a value that several steps read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.layers.base import Layer, OpLayer, Shape
from minicnn.ops.im2col import crop, pad
from minicnn.shapes import Padding, Window, check_rank
from minicnn.shapes import size as count


class Step(NamedTuple):
    """A layer and the values it reads: 0 is the network's input, i + 1 the output of step i."""

    layer: Layer
    reads: tuple[int, ...]


class Graph(Layer):
    """Layers that read one or several earlier values; the last one is the output.

    Parameters
    ----------
    steps : sequence of (layer, indices)
        In an order in which every value exists before it is read. A layer that reads several
        values (`Add`, `Concat`, ...) gets them as a tuple.

    Raises
    ------
    ValueError
        If a step reads a value that does not exist yet.

    Examples
    --------
    >>> from minicnn import Conv2d, ReLU
    >>> branch = Conv2d(2, 2, 3, padding=1, rng=0)
    >>> graph = Graph([(branch, (0,)), (Add(), (1, 0)), (ReLU(), (2,))])
    >>> graph(np.ones((1, 2, 4, 4), "f4")).shape
    (1, 2, 4, 4)
    """

    def __init__(self, steps: Sequence[tuple[Layer, Sequence[int]]]) -> None:
        super().__init__()
        self.steps = [Step(layer, tuple(reads)) for layer, reads in steps]
        for i, (layer, reads) in enumerate(self.steps):
            if not reads or any(not 0 <= r <= i for r in reads):
                raise ValueError(
                    f"Graph: steps: expected step {i} ({type(layer).__name__}) to read values "
                    f"0 to {i}, got {reads}"
                )
        self._last = {r: i for i, (_, reads) in enumerate(self.steps) for r in reads}

    def forward(self, x: Array) -> tuple[Array, Any]:
        values, caches = [x], []
        for layer, reads in self.steps:
            y, cache = layer.forward(_inputs(values, reads))
            values.append(y)
            caches.append(cache)
        return values[-1], caches

    def __call__(self, x: Array) -> Array:
        values: list[Any] = [x]
        for i, (layer, reads) in enumerate(self.steps):
            values.append(layer(_inputs(values, reads)))
            for r in reads:  # keep nothing longer than it is read
                if self._last[r] == i:
                    values[r] = None
        return values[-1]

    def backward(self, dy: Array, cache: Any) -> Array:
        grads: list[Any] = [None] * len(self.steps) + [dy]
        for i in reversed(range(len(self.steps))):
            layer, reads = self.steps[i]
            if grads[i + 1] is None:  # nothing that leads to the output reads it
                continue
            dxs = layer.backward(grads[i + 1], cache[i])
            grads[i + 1] = None
            for r, dx in zip(reads, dxs if isinstance(dxs, tuple) else (dxs,)):
                grads[r] = dx if grads[r] is None else grads[r] + dx
        return grads[0]

    def children(self) -> dict[str, Layer]:
        return {str(i): layer for i, (layer, _) in enumerate(self.steps)}

    def output_shape(self, x_shape: Shape) -> Shape:
        shapes: list[Any] = [x_shape]
        for layer, reads in self.steps:
            shapes.append(layer.output_shape(_inputs(shapes, reads)))
        return shapes[-1]

    def __repr__(self) -> str:
        lines = ["Graph("]
        for i, (layer, reads) in enumerate(self.steps):
            text = repr(layer).replace("\n", "\n  ")
            lines.append(f"  ({i}) of {', '.join('x' if r == 0 else str(r - 1) for r in reads)}: "
                         f"{text}")  # fmt: skip
        return "\n".join([*lines, ")"])


def _inputs(values: Sequence[Any], reads: tuple[int, ...]) -> Any:
    return values[reads[0]] if len(reads) == 1 else tuple(values[r] for r in reads)


# ---------------------------------------------------------------- layers of several inputs


class _Pairwise(Layer):
    """Two inputs, element by element, broadcast as in NumPy."""

    def output_shape(self, x_shape: Any) -> Shape:
        return tuple(np.broadcast_shapes(*x_shape))


class Add(_Pairwise):
    """``a + b``."""

    def forward(self, x: Any) -> tuple[Array, Any]:
        a, b = x
        return a + b, (a.shape, b.shape)

    def backward(self, dy: Array, cache: Any) -> Any:
        return tuple(_sum_to(dy, shape) for shape in cache)


class Mul(_Pairwise):
    """``a * b``."""

    def forward(self, x: Any) -> tuple[Array, Any]:
        a, b = x
        return a * b, (a, b)

    def backward(self, dy: Array, cache: Any) -> Any:
        a, b = cache
        return _sum_to(dy * b, a.shape), _sum_to(dy * a, b.shape)


class Concat(Layer):
    """Inputs one after the other along axis `dim`."""

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Any) -> tuple[Array, Any]:
        xs = x if isinstance(x, tuple) else (x,)
        return array_module(xs[0]).concatenate(xs, self.dim), [a.shape[self.dim] for a in xs]

    def backward(self, dy: Array, cache: Any) -> Any:
        ends = np.cumsum(cache)[:-1].tolist()
        parts = array_module(dy).split(dy, ends, self.dim)
        return tuple(array_module(dy).ascontiguousarray(part) for part in parts)

    def output_shape(self, x_shape: Any) -> Shape:
        shapes = x_shape if isinstance(x_shape[0], tuple) else (x_shape,)
        y_shape = list(shapes[0])
        y_shape[self.dim] = sum(shape[self.dim] for shape in shapes)
        return tuple(y_shape)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


def _sum_to(dy: Array, shape: Shape) -> Array:
    """Sum over the axes along which an input of `shape` was broadcast."""
    extra = dy.ndim - len(shape)
    axes = [i for i in range(dy.ndim) if i < extra or (shape[i - extra] == 1 != dy.shape[i])]
    return dy.sum(axis=tuple(axes), keepdims=True).reshape(shape) if axes else dy


# ---------------------------------------------------------------- layers of one input


class Scale(Layer):
    """``x * scale + shift`` with constants that broadcast; saved, but not trained."""

    def __init__(self, scale: Array | None = None, shift: Array | None = None) -> None:
        super().__init__()
        for name, a in (("scale", scale), ("shift", shift)):
            if a is not None:
                self.buffers[name] = a

    def forward(self, x: Array) -> tuple[Array, Any]:
        y = x * self.buffers["scale"] if "scale" in self.buffers else x
        return (y + self.buffers["shift"] if "shift" in self.buffers else y), x.shape

    def backward(self, dy: Array, cache: Any) -> Array:
        return _sum_to(dy * self.buffers["scale"] if "scale" in self.buffers else dy, cache)

    def output_shape(self, x_shape: Shape) -> Shape:
        return tuple(np.broadcast_shapes(x_shape, *(a.shape for a in self.buffers.values())))


def _clip_forward(x: Array, low: float, high: float) -> tuple[Array, Any]:
    return x.clip(low, high), (x >= low) & (x <= high)


class Clip(OpLayer):
    """``min(max(x, low), high)``, such as ReLU6; the gradient passes where x is within."""

    op = _clip_forward, lambda dy, inside: dy * inside

    def __init__(self, low: float = 0.0, high: float = 6.0) -> None:
        super().__init__(low=low, high=high)


def _pad_forward(x: Array, padding: Padding, value: float) -> tuple[Array, Any]:
    win = Window((1, 1), (1, 1), padding, (1, 1))
    return pad(x, win, value), win


class Pad(OpLayer):
    """Rows and columns of `value` around each map; `padding` is ((top, bottom), (left, right))."""

    op = _pad_forward, crop

    def __init__(self, padding: Padding, value: float = 0.0) -> None:
        super().__init__(padding=padding, value=value)

    def output_shape(self, x_shape: Shape) -> Shape:
        N, C, H, W = check_rank("Pad", x_shape, "(N, C, H, W)")
        (top, bottom), (left, right) = self.options["padding"]
        return N, C, top + H + bottom, left + W + right


def _reshape_forward(x: Array, shape: Shape) -> tuple[Array, Any]:
    return x.reshape(len(x), *shape), x.shape


class Reshape(OpLayer):
    """Give each example the axes `shape`; the batch axis stays."""

    op = _reshape_forward, lambda dy, x_shape: dy.reshape(x_shape)

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape=tuple(shape))

    def output_shape(self, x_shape: Shape) -> Shape:
        if count(x_shape[1:]) != count(self.options["shape"]):
            raise ValueError(
                f"Reshape: input_shape: expected as many elements as {self.options['shape']}, "
                f"got {x_shape[1:]}"
            )
        return x_shape[0], *self.options["shape"]
