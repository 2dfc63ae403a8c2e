"""A trace once more in float64, for finite differences of its loss."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array, use
from minicnn.layers import Dropout, Layer, Residual
from minicnn.train import LOSSES

if TYPE_CHECKING:
    from minicnn.trace.steps import Trace


class Double:
    """The layers of a trace and the outputs of its nodes, in float64."""

    def __init__(self, trace: Trace) -> None:
        self.trace, self.nodes = trace, trace.nodes
        # One deepcopy of the list, so that a layer in two places stays one layer.
        self.layers = copy.deepcopy([node.layer for node in self.nodes])
        for layer in self.layers:
            if layer is not None:
                layer.astype(np.float64)
        self.values: dict[int, Array] = {-1: trace.x.astype(np.float64)}
        for i, node in enumerate(self.nodes):
            inputs = [self.values[s] for s in node.sources]
            self.values[i] = self._call(i, self.layers[i], inputs)

    def difference(self, at: int, what: str, index: Any, step: float) -> float:
        """Return the central difference of the loss in one number of node `at`."""
        eps, layers, values = step, self.layers, self.values
        node, layer = self.nodes[at], layers[at]
        losses = []
        for sign in (1, -1):
            if what == "y":
                y = values[at].copy()
                y[index] += sign * eps
            elif what == "dx":
                x = values[node.sources[0]].copy()
                x[index] += sign * eps
                others = [values[s] for s in node.sources[1:]]
                y = self._call(at, layer, [x, *others])
            else:
                assert layer is not None
                p = layer.params["weight" if what == "dw" else "bias"]
                old = p[index]
                p[index] = old + sign * eps
                y = self._call(at, layer, [values[s] for s in node.sources])
                p[index] = old
            losses.append(self._loss_from(at, y))
        return float((losses[0] - losses[1]) / (2 * eps))

    def _call(self, at: int, layer: Layer | None, inputs: list[Array]) -> Array:
        """Run node `at` in float64; dropout keeps the mask of the traced pass."""
        with use("numpy"):
            if layer is None:
                target = self.trace.target
                target = target.astype(np.float64) if target.dtype.kind == "f" else target
                return np.asarray(LOSSES[self.trace.loss_name][0](inputs[0], target)[0])
            if isinstance(layer, Residual):
                return inputs[0] + inputs[1]
            if isinstance(layer, Dropout):
                mask = self.trace.caches[at].mask
                return inputs[0] if mask is None else inputs[0] * mask
            return layer.forward(inputs[0])[0]

    def _loss_from(self, at: int, y: Array) -> float:
        layers, values = self.layers, self.values
        changed = {at: y}
        for i in range(at + 1, len(self.nodes)):
            sources = self.nodes[i].sources
            if any(s in changed for s in sources):
                inputs = [changed.get(s, values[s]) for s in sources]
                changed[i] = self._call(i, layers[i], inputs)
        return float(changed[len(self.nodes) - 1])
