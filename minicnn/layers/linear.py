"""The fully connected layer, and the flattening before it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.backend import Array
from minicnn.init import Rng, generator, uniform
from minicnn.layers.base import Layer, OpLayer, Param, Shape
from minicnn.layers.summary import WHOLE, Field, Row
from minicnn.shapes import integer, size


class Linear(Layer):
    """``y = x w.T + b``; see `ops.linear_forward`.

    Parameters
    ----------
    in_features, out_features : int
        I and O.
    bias : bool
    rng : int or numpy.random.Generator, optional
        Draws the initial weights, uniform on ``+-1 / sqrt(I)`` as in PyTorch.
    dtype : float32 or float64

    Attributes
    ----------
    weight : array, shape (O, I)
    bias : array, shape (O,), or None

    Examples
    --------
    >>> import numpy as np
    >>> Linear(4, 2, rng=0)(np.zeros((3, 4), "f4")).shape
    (3, 2)
    """

    weight = Param()
    bias = Param()

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rng: Rng = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__()
        self.in_features = integer("Linear", "in_features", in_features, 1)
        self.out_features = integer("Linear", "out_features", out_features, 1)
        rng = generator("Linear", rng)
        bound = 1 / math.sqrt(in_features)
        self.add_param("weight", uniform((out_features, in_features), bound, rng, dtype))
        if bias:
            self.add_param("bias", uniform((out_features,), bound, rng, dtype))

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.linear_forward(x, self.weight, self.bias)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.linear_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def output_shape(self, x_shape: Shape) -> Shape:
        if x_shape[-1] != self.in_features:
            raise ValueError(
                f"Linear: input_shape: expected {self.in_features} features, got {x_shape[-1]} "
                f"in shape {x_shape}"
            )
        return (*x_shape[:-1], self.out_features)

    def macs(self, x_shape: Shape) -> int:
        return size(self.output_shape(x_shape)) * self.in_features

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        return super().rows(name, x_shape, WHOLE)

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}"
        return text if "bias" in self.params else f"{text}, bias=False"


class Flatten(OpLayer):
    """Join the axes `start_dim` to `end_dim` into one; see `ops.flatten_forward`."""

    op = ops.flatten_forward, ops.flatten_backward

    def __init__(self, start_dim: int = 1, end_dim: int = -1) -> None:
        super().__init__(start_dim=start_dim, end_dim=end_dim)

    def output_shape(self, x_shape: Shape) -> Shape:
        ndim = len(x_shape)
        dims = self.options["start_dim"], self.options["end_dim"]
        start, end = (d + ndim if d < 0 else d for d in dims)
        if not 0 <= start <= end < ndim:
            raise ValueError(
                f"Flatten: start_dim, end_dim: expected axes in order of {x_shape}, got {dims}"
            )
        return (*x_shape[:start], size(x_shape[start : end + 1]), *x_shape[end + 1 :])
