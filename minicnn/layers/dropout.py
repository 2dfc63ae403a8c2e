"""Dropout."""

from __future__ import annotations

from typing import Any

from minicnn import ops
from minicnn.backend import Array
from minicnn.init import Rng, generator
from minicnn.layers.base import Layer
from minicnn.shapes import number


class Dropout(Layer):
    """Zero each element with probability `p` in training; see `ops.dropout_forward`.

    Parameters
    ----------
    p : float
        From 0 to 1. What stays is scaled by ``1 / (1 - p)``, so evaluation changes nothing.
    rng : int or numpy.random.Generator, optional
        Draws what is zeroed; a new draw for each forward pass.
    """

    def __init__(self, p: float = 0.5, rng: Rng = None) -> None:
        super().__init__()
        self.p = number("Dropout", "p", p, ge=0, le=1)
        self.rng = generator("Dropout", rng)

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.dropout_forward(x, self.p, self.training, self.rng)

    def backward(self, dy: Array, cache: Any) -> Array:
        return ops.dropout_backward(dy, cache)

    def __call__(self, x: Array) -> Array:
        return ops.dropout_forward(x, self.p, training=False)[0]

    def extra_repr(self) -> str:
        return f"p={self.p}"
