"""Networks: layers one after the other, and a shortcut around some of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, overload

from minicnn.backend import Array
from minicnn.layers.base import Layer, Shape
from minicnn.layers.summary import Field, Row


class Sequential(Layer):
    """Layers one after the other; a layer may be a `Sequential` again.

    Parameters
    ----------
    *layers : Layer

    Examples
    --------
    >>> import numpy as np
    >>> from minicnn import Linear, ReLU
    >>> model = Sequential(Linear(4, 8, rng=0), ReLU(), Linear(8, 2, rng=1))
    >>> y, caches = model.forward(np.ones((3, 4), "f4"))
    >>> dx = model.backward(np.ones_like(y), caches)
    >>> [name for name, p, g in model.named_params()]
    ['0.weight', '0.bias', '2.weight', '2.bias']
    >>> model[1]
    ReLU()
    """

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            if not isinstance(layer, Layer):
                raise TypeError(
                    f"Sequential: layer {i}: expected a Layer, got {type(layer).__name__}"
                )
        self.layers = list(layers)

    def forward(self, x: Array) -> tuple[Array, list[Any]]:
        """Return the last layer's output and the list of all caches."""
        caches = []
        for i, layer in enumerate(self.layers):
            with _located(i, layer):
                x, cache = layer.forward(x)
            caches.append(cache)
        return x, caches

    def backward(self, dy: Array, cache: list[Any]) -> Array:
        """Go back through the layers with their caches; return the gradient to the input."""
        if len(cache) != len(self.layers):
            raise ValueError(
                f"Sequential.backward: cache: expected the {len(self.layers)} caches of this "
                f"model's forward, got {len(cache)}"
            )
        for i in reversed(range(len(self.layers))):
            with _located(i, self.layers[i]):
                dy = self.layers[i].backward(dy, cache[i])
        return dy

    def __call__(self, x: Array) -> Array:
        for i, layer in enumerate(self.layers):
            with _located(i, layer):
                x = layer(x)
        return x

    def children(self) -> dict[str, Layer]:
        return {str(i): layer for i, layer in enumerate(self.layers)}

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    @overload
    def __getitem__(self, index: int) -> Layer: ...
    @overload
    def __getitem__(self, index: slice) -> Sequential: ...
    def __getitem__(self, index: int | slice) -> Layer:
        """A layer, or for a slice a `Sequential` of the same layers (nothing is copied)."""
        if isinstance(index, slice):
            return Sequential(*self.layers[index])
        return self.layers[index]

    def append(self, layer: Layer) -> Sequential:
        """Add a layer at the end; returns the model."""
        self.layers += Sequential(layer).layers
        return self

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        rows: list[Row] = []
        for i, layer in enumerate(self.layers):
            with _located(i, layer):
                more, x_shape, field = layer.rows(f"{name}.{i}" if name else str(i), x_shape, field)
            rows += more
        return rows, x_shape, field

    def output_shape(self, x_shape: Shape) -> Shape:
        return self.rows("", x_shape, Field())[1]

    def __repr__(self) -> str:
        return _tree(self)


class Residual(Layer):
    """``body(x) + shortcut(x)``.

    Parameters
    ----------
    body : Layer
    shortcut : Layer, optional
        The identity if left out; else for instance a 1x1 `Conv2d` with stride, to make the
        shapes meet.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, body: Layer, shortcut: Layer | None = None) -> None:
        super().__init__()
        for name, layer in (("body", body), ("shortcut", shortcut)):
            if not (isinstance(layer, Layer) or (layer is None and name == "shortcut")):
                raise TypeError(f"Residual: {name}: expected a Layer, got {type(layer).__name__}")
        self.body, self.shortcut = body, shortcut

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, body_cache = self.body.forward(x)
        other, cache = (x, None) if self.shortcut is None else self.shortcut.forward(x)
        self._check_meet(y.shape, other.shape)
        return y + other, (body_cache, cache)

    def backward(self, dy: Array, cache: Any) -> Array:
        body_cache, shortcut_cache = cache
        dx = self.body.backward(dy, body_cache)
        if self.shortcut is None:
            return dx + dy
        return dx + self.shortcut.backward(dy, shortcut_cache)

    def __call__(self, x: Array) -> Array:
        y = self.body(x)
        other = x if self.shortcut is None else self.shortcut(x)
        self._check_meet(y.shape, other.shape)
        return y + other

    def _check_meet(self, body: Shape, shortcut: Shape) -> None:
        # Never broadcast: the backward pass would have to sum.
        if tuple(body) != tuple(shortcut):
            raise ValueError(
                f"Residual: body: expected the shortcut's shape {tuple(shortcut)}, got "
                f"{tuple(body)} (a 1x1 Conv2d as shortcut can make them meet)"
            )

    def children(self) -> dict[str, Layer]:
        both = {"body": self.body, "shortcut": self.shortcut}
        return {name: layer for name, layer in both.items() if layer is not None}

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        prefix = f"{name}." if name else ""
        rows, y_shape, y_field = self.body.rows(f"{prefix}body", x_shape, field)
        other = x_shape
        if self.shortcut is not None:
            more, other, field = self.shortcut.rows(f"{prefix}shortcut", x_shape, field)
            rows += more
        y_field = y_field.union(field)
        self._check_meet(y_shape, other)
        total = self._row(name, "Residual: body + shortcut", x_shape, y_shape, y_field)
        return [*rows, total], y_shape, y_field

    def output_shape(self, x_shape: Shape) -> Shape:
        return self.rows("", x_shape, Field())[1]

    def __repr__(self) -> str:
        return _tree(self)


class _located:
    """Note on an error that passes through in which layer it arose."""

    def __init__(self, index: int, layer: Layer) -> None:
        self.index, self.layer = index, layer

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if isinstance(error, Exception):  # Ctrl-C is nobody's fault
            error.add_note(f"in layer {self.index}: {type(self.layer).__name__}")


def _tree(layer: Layer) -> str:
    lines = [f"{type(layer).__name__}("]
    for name, child in layer.children().items():
        lines.append(f"  ({name}): " + repr(child).replace("\n", "\n  "))
    return "\n".join([*lines, ")"])
