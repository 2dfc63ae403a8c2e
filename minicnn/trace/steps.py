"""Run a model once by the plain path and keep every step, forward and backward.

The model is flattened into a graph: each leaf layer, each join of a `Residual` and the loss is a
node, which names the nodes whose outputs it takes. A finite difference then runs only the nodes
that come after the number it changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array, use
from minicnn.layers import Layer, Residual, Sequential
from minicnn.trace.double import Double
from minicnn.trace.step import Node, Step, formula_backward, formula_forward
from minicnn.train import LOSSES

if TYPE_CHECKING:
    from minicnn.trace.explain import Explanation

GRADS = {"weight": "dw", "bias": "db"}


class Trace:
    """A list of steps, forward and then backward, that can be walked; made by `trace`.

    Attributes
    ----------
    steps : list of Step
    loss : float
    position : int
        Of the step that `next` and `back` move.
    """

    def __init__(self, model: Layer, x: Array, y: Any, loss: str) -> None:
        if not isinstance(model, Layer):
            raise TypeError(f"trace: model: expected a Layer, got {type(model).__name__}")
        if loss not in LOSSES:
            raise ValueError(f"trace: loss: expected one of {', '.join(LOSSES)}, got {loss!r}")
        self.model = copy.deepcopy(model)  # a trace leaves gradients, statistics and rng alone
        self.before = copy.deepcopy(model)  # with the draws of dropout still to come
        self.x, self.target, self.loss_name = np.asarray(x), np.asarray(y), loss
        self.nodes: list[Node] = []
        self.caches: list[Any] = []
        self.values: dict[int, Array] = {-1: self.x}
        self.steps: list[Step] = []
        self.position = -1
        self._double: Double | None = None
        with use("numpy"):
            self._run()

    def _run(self) -> None:
        last = self._forward(self.model, "", -1)
        forward_loss, backward_loss = LOSSES[self.loss_name]
        value, cache = forward_loss(self.values[last], self.target)
        self._add(Node("loss", None, (last,)), np.asarray(value), cache)
        self.loss = float(value)

        gradients: dict[int, Array] = {}
        for i in reversed(range(len(self.nodes))):
            node, cache, grads = self.nodes[i], self.caches[i], {}
            if node.layer is None:
                dy = np.ones_like(self.values[i])
                dx = backward_loss(dy.dtype.type(1), cache)
            else:
                dy = gradients[i]
                if isinstance(node.layer, Residual):
                    dx = dy  # a sum hands its gradient on to both
                else:
                    node.layer.zero_grad()
                    dx = node.layer.backward(dy, cache)
                    own = node.layer.named_params()
                    grads = {GRADS.get(k, f"d{k}"): g.copy() for k, _, g in own}
            for source in node.sources:
                old = gradients.get(source)
                gradients[source] = dx if old is None else old + dx
            step = self.steps[i]
            self.steps.append(
                Step(
                    node,
                    "backward",
                    step.op,
                    formula_backward(step),
                    {"dy": dy},
                    {"dx": dx},
                    step.params,
                    grads,
                    cache,
                )
            )

    def _forward(self, layer: Layer, name: str, source: int) -> int:
        """Run `layer` on the output of node `source`; return the number of the last node."""
        prefix = f"{name}." if name else ""
        if isinstance(layer, Sequential):
            for i, child in enumerate(layer):
                source = self._forward(child, f"{prefix}{i}", source)
            return source
        if isinstance(layer, Residual):
            body = self._forward(layer.body, f"{prefix}body", source)
            if layer.shortcut is not None:
                source = self._forward(layer.shortcut, f"{prefix}shortcut", source)
            layer._check_meet(self.values[body].shape, self.values[source].shape)
            y, cache = self.values[body] + self.values[source], None
            return self._add(Node(name or "residual", layer, (body, source)), y, cache)
        y, cache = layer.forward(self.values[source])
        return self._add(Node(name or "0", layer, (source,)), y, cache)

    def _add(self, node: Node, y: Array, cache: Any) -> int:
        number = len(self.nodes)
        inputs = {"x": self.values[node.sources[0]]}
        if len(node.sources) == 2:
            inputs["shortcut"] = self.values[node.sources[1]]
        if node.layer is None:
            op = self.loss_name
            inputs["target"] = self.target
            params = {}
        else:
            op = type(node.layer).__name__
            params = node.layer.params
        step = Step(node, "forward", op, "", inputs, {"y": y}, params, {}, cache)
        step.formula = formula_forward(step)
        self.nodes.append(node)
        self.caches.append(cache)
        self.values[number] = y
        self.steps.append(step)
        return number

    # ------------------------------------------------------------ walking

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __getitem__(self, index: int) -> Step:
        return self.steps[index]

    def forward(self, name: str) -> Step:
        """Return the forward step of the layer `name` (``"loss"``: of the loss)."""
        return self.steps[self.number(name)]

    def backward(self, name: str) -> Step:
        """Return the backward step of the layer `name`."""
        return self.steps[2 * len(self.nodes) - 1 - self.number(name)]

    def number(self, name: str) -> int:
        """Return the place of the layer `name` among the forward steps, or raise KeyError."""
        names = [node.name for node in self.nodes]
        if str(name) not in names:
            raise KeyError(f"trace: name: expected one of {', '.join(names)}, got {name!r}")
        return names.index(str(name))

    def next(self) -> Step:
        """Go one step on and return it; at the end the last step again."""
        self.position = min(self.position + 1, len(self.steps) - 1)
        return self.steps[self.position]

    def back(self) -> Step:
        """Go one step back and return it; at the start the first step again."""
        self.position = max(self.position - 1, 0)
        return self.steps[self.position]

    def __repr__(self) -> str:
        n = len(self.nodes)
        lines = [f"Trace of {n} steps forward and {n} back, {self.loss_name} {self.loss:.6g}"]
        for i, s in enumerate(self.steps):
            out = next(iter(s.outputs.values()))
            lines.append(
                f"  [{i:>2}] {s.direction:<8} {s.name:<10} {s.op:<18} "
                f"{next(iter(s.outputs))} {tuple(out.shape)}"
            )
        return "\n".join(lines)

    # ------------------------------------------------------------ derivations

    def explain(self, name: str, what: str, index: Any = ()) -> Explanation:
        """Derive one number: its terms, their sum, and the finite difference beside it.

        Parameters
        ----------
        name : str
            Of the layer, or ``"loss"``.
        what : {"y", "dx", "dw", "db"}
        index : int or tuple of int
            Of the element in that array.

        Returns
        -------
        Explanation
            Prints as a table.

        Raises
        ------
        KeyError
            For a layer that is not there.
        ValueError
            For an array that the layer lacks.
        IndexError
            For an index outside the array.
        """
        from minicnn.trace.explain import explain

        return explain(self, name, what, index)

    def finite_difference(self, name: str, what: str, index: Any, step: float = 1e-5) -> float:
        """Return the central difference of the loss in one number, computed in float64.

        For "y", "dx", "dw" and "db" the number that changes is one of y, x, w and b.
        """
        if self._double is None:
            self._double = Double(self)
        return self._double.difference(self.number(name), what, index, step)

    # ------------------------------------------------------------ pictures

    def to_html(self, path: str | Path | None = None) -> str:
        """Return the picture as one self-contained HTML page, and write it to `path` if given."""
        from minicnn.trace.page import page

        text = page(self)
        if path is not None:
            Path(path).write_text(text, encoding="utf-8")
        return text

    def _repr_html_(self) -> str:
        from minicnn.trace.page import frame

        return frame(self)

    def widget(self) -> Any:
        """Return the picture as a live widget with what-if editing; needs anywidget."""
        from minicnn.trace.widget import widget

        return widget(self)


def trace(model: Layer, x: Array, y: Any, loss: str = "cross_entropy") -> Trace:
    """Run `model` on a batch and keep every step, forward and backward, with the loss.

    Parameters
    ----------
    model : Layer
        Stays as it is: the trace works on a copy. It runs as in training unless ``model.eval()``.
    x : array, shape (N, ...), float32 or float64
    y : array
        Targets of the loss, such as N labels.
    loss : {"cross_entropy", "nll_loss", "mse_loss", "l1_loss", "bce_with_logits"}

    Returns
    -------
    Trace

    Raises
    ------
    TypeError, ValueError
        If the model or the loss cannot take these arrays.

    Examples
    --------
    >>> import numpy as np
    >>> from minicnn import Linear, ReLU, Sequential
    >>> t = trace(Sequential(Linear(3, 2, rng=0), ReLU()), np.ones((1, 3), "f4"), [1])
    >>> [step.name for step in t]
    ['0', '1', 'loss', 'loss', '1', '0']
    >>> t.backward("0").grads["dw"].shape
    (2, 3)
    """
    return Trace(model, x, y, loss)
