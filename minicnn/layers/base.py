"""What every layer is: parameters, their gradients, buffers, and a forward and a backward.

Layers hold state and call ops; the math is in `minicnn.ops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import numpy as np

from minicnn.backend import FLOATS, Array, array_module
from minicnn.layers.summary import Field, Row, Summary
from minicnn.shapes import Window, integer, size

Shape = tuple[int, ...]


class Param:
    """A parameter read and set as an attribute: ``layer.weight`` is ``layer.params["weight"]``.

    Setting copies the values into the array that is there, so that an optimiser keeps hold of
    it. A layer without that parameter (``bias=False``) reads None.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, layer: Layer | None, owner: type) -> Any:
        return self if layer is None else layer.params.get(self.name)

    def __set__(self, layer: Layer, value: Array) -> None:
        label = f"{type(layer).__name__}.{self.name}"
        if self.name not in layer.params:
            raise AttributeError(f"{label}: the layer was built without it")
        layer.params[self.name][...] = _fitting(layer.params[self.name], value, label)


class Layer(ABC):
    """A step of a network, with the parameters it owns.

    Attributes
    ----------
    params, grads : dict of str to array
        Parameters, and their gradients of the same shapes, to which `backward` adds.
    buffers : dict of str to array
        State that is saved but not trained, such as running statistics.
    training : bool
        Whether `forward` behaves as in training (dropout drops, batch-norm uses the batch).
    """

    def __init__(self) -> None:
        self.params: dict[str, Array] = {}
        self.grads: dict[str, Array] = {}
        self.buffers: dict[str, Array] = {}
        self.training = True

    @abstractmethod
    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the output and the cache that `backward` needs; the layer keeps neither.

        The cache holds the arrays themselves and no copies: to write into x, y or a parameter
        before `backward` makes the gradient wrong.
        """

    @abstractmethod
    def backward(self, dy: Array, cache: Any) -> Array:
        """Add the parameters' gradients to `grads` and return the gradient to the input."""

    def __call__(self, x: Array) -> Array:
        """Inference: the output as in evaluation, whatever `training` says; keeps nothing."""
        return self.forward(x)[0]

    # ------------------------------------------------------------ parameters and state

    def add_param(self, name: str, value: Array) -> None:
        """Register a float32 or float64 parameter and a zero gradient beside it."""
        if value.dtype.name not in FLOATS:
            raise TypeError(
                f"{type(self).__name__}: dtype: expected float32 or float64, got {value.dtype}"
            )
        self.params[name] = value
        self.grads[name] = array_module(value).zeros_like(value)

    def add_grads(self, **grads: Array | None) -> None:
        """Add to the gradients of the parameters named; those the layer lacks are passed over."""
        for name, g in grads.items():
            if name in self.params:
                self.grads[name] += g

    def children(self) -> dict[str, Layer]:
        """The layers directly inside this one, by name."""
        return {}

    def modules(self, name: str = "") -> Iterator[tuple[str, Layer]]:
        """Yield (dotted name, layer) for this layer and all inside it, outer ones first."""
        rest: list[tuple[str, Layer]] = [(name, self)]
        while rest:  # no recursion: a training step asks a few times
            name, layer = rest.pop()
            yield name, layer
            if children := layer.children():
                rest += [(_join(name, key), child) for key, child in reversed(children.items())]

    def named_params(self) -> Iterator[tuple[str, Array, Array]]:
        """Yield (name, parameter, gradient), such as ``("0.weight", w, dw)``.

        A layer that stands in two places is yielded once: its gradient is the sum of both.

        Raises
        ------
        ValueError
            If two layers hold one array, which would have two gradients.
        """
        layers: set[int] = set()
        names: dict[int, str] = {}
        for prefix, layer in self.modules():
            if not layer.params or id(layer) in layers:
                continue
            layers.add(id(layer))
            for key, p in layer.params.items():
                name = _join(prefix, key)
                if id(p) in names:
                    raise ValueError(
                        f"named_params: {name}: expected an array of its own, got that of "
                        f"{names[id(p)]} (to share weights put one layer in both places)"
                    )
                names[id(p)] = name
                yield name, p, layer.grads[key]

    def named_generators(self) -> Iterator[tuple[str, np.random.Generator]]:
        """Yield (name, generator) for every random generator that a layer holds as an attribute.

        Their states are part of what training goes on from: ``("1.rng", generator)`` for a
        `Dropout` in second place.
        """
        for prefix, layer in self.modules():
            for key, value in vars(layer).items():
                if isinstance(value, np.random.Generator):
                    yield _join(prefix, key), value

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        for _, _, g in self.named_params():
            g[...] = 0

    def train(self, mode: bool = True) -> Layer:
        """Switch this layer and all inside it to training behaviour; returns the layer."""
        for _, layer in self.modules():
            layer.training = mode
        return self

    def eval(self) -> Layer:
        """Switch to evaluation behaviour; returns the layer."""
        return self.train(False)

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters and buffers under PyTorch's keys, such as ``"0.weight"``."""
        return {name: a.copy() for name, a in self._state().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy parameters and buffers in from a mapping with exactly this model's keys.

        Parameters
        ----------
        state : mapping of str to array
            As `state_dict` returns it; a ``torch.nn.Sequential``'s state works too. Values are
            converted to the model's dtypes.

        Raises
        ------
        ValueError
            For missing or unexpected keys or a wrong shape.
        TypeError
            For a value that is no array of numbers.

        Nothing is changed after an error.
        """
        own = self._state()
        missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or extra:
            raise ValueError(
                f"load_state_dict: state: expected the keys of this model, got "
                f"{len(missing)} missing {missing} and {len(extra)} unexpected {extra}"
            )
        values = {
            name: _fitting(a, state[name], f"load_state_dict: {name}") for name, a in own.items()
        }
        for name, a in own.items():
            a[...] = values[name]

    def _state(self) -> dict[str, Array]:
        return {
            _join(prefix, name): a
            for prefix, layer in self.modules()
            for name, a in (layer.params | layer.buffers).items()
        }

    def map_arrays(self, convert: Callable[[Array], Array]) -> None:
        """Replace every parameter, gradient and buffer `a` by ``convert(a)``."""
        for _, layer in self.modules():
            for arrays in (layer.params, layer.grads, layer.buffers):
                for name, a in arrays.items():
                    arrays[name] = convert(a)

    def astype(self, dtype: Any) -> Layer:
        """Convert the float parameters, gradients and buffers, in place; returns the layer."""
        if np.dtype(dtype).name not in FLOATS:
            raise TypeError(f"astype: dtype: expected float32 or float64, got {np.dtype(dtype)}")
        self.map_arrays(lambda a: a.astype(dtype) if a.dtype.kind == "f" else a)
        return self

    # ------------------------------------------------------------ description

    def output_shape(self, x_shape: Shape) -> Shape:
        """Shape of the output for an input of shape `x_shape`, both with the batch axis."""
        return x_shape

    def formula(self, x_shape: Shape) -> str:
        """How the output's rows follow from the input's, with the numbers filled in."""
        return ""

    def macs(self, x_shape: Shape) -> int:
        """Multiply-adds of the matrix products in one forward pass."""
        return 0

    def window(self) -> Window | None:
        """The sliding window through which an output sees the input, if there is one."""
        return None

    def im2col_size(self, x_shape: Shape) -> int:
        """Elements of the column matrix that the im2col version would fill for the batch."""
        return 0

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        """Return the summary rows of this layer, its output shape and its receptive field."""
        y_shape = self.output_shape(x_shape)
        field = field.through(self.window())
        return [self._row(name, str(self), x_shape, y_shape, field)], y_shape, field

    def _row(self, name: str, text: str, x_shape: Shape, y_shape: Shape, field: Field) -> Row:
        return Row(
            name,
            text,
            y_shape,
            self.formula(x_shape),
            sum(size(p.shape) for p in self.params.values()),
            self.macs(x_shape),
            size(y_shape),
            self.im2col_size(x_shape),
            field,
        )

    def summary(self, input_shape: Shape, batch_size: int = 1) -> Summary:
        """Describe the network for one input shape; print the result, or show it in a notebook.

        Parameters
        ----------
        input_shape : tuple of int
            One example without the batch axis, such as ``(1, 28, 28)``.
        batch_size : int
            For the multiply-adds and bytes.

        Returns
        -------
        Summary
            For each layer: output shape with the formula's numbers, parameters, multiply-adds,
            bytes of the output and of the im2col matrix, and the receptive field.

        Raises
        ------
        ValueError
            If a layer cannot take the shape that reaches it.
        """
        x_shape = tuple(
            integer("summary", name, n, 1)
            for name, n in (("batch_size", batch_size), *(("input_shape", n) for n in input_shape))
        )
        rows, _, _ = self.rows("", x_shape, Field())
        params = [p for _, p, _ in self.named_params()]
        itemsize = params[0].dtype.itemsize if params else 4
        total = sum(size(p.shape) for p in params)
        return Summary(rows, x_shape, itemsize, total)

    def extra_repr(self) -> str:
        """The arguments in this layer's printed form."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"


class OpLayer(Layer):
    """A layer without parameters: one op pair and the options it is called with."""

    op: ClassVar[tuple[Callable[..., Any], Callable[..., Any]]]

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Array) -> tuple[Array, Any]:
        return self.op[0](x, **self.options)

    def backward(self, dy: Array, cache: Any) -> Array:
        return self.op[1](dy, cache)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.options.items())


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _fitting(target: Array, value: Any, label: str) -> Array:
    """Return `value` as an array that can be copied into `target`, or raise."""
    try:
        value = array_module(target).asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # PyTorch raises all three
        raise TypeError(
            f"{label}: expected an array, got {type(value).__name__}: {error}"
        ) from None
    if value.dtype.kind not in "fiu":
        raise TypeError(f"{label}: expected an array of numbers, got {value.dtype}")
    if value.shape != target.shape:
        raise ValueError(f"{label}: expected shape {target.shape}, got {value.shape}")
    return value
