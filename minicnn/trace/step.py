"""One op of a pass with all its numbers, and its formula with the sizes filled in."""

from __future__ import annotations

from typing import Any, NamedTuple

from minicnn.backend import Array
from minicnn.layers import Layer


class Node(NamedTuple):
    """One call of a layer: its name, the layer and the nodes before it (-1: the input x)."""

    name: str
    layer: Layer | None  # None: the loss
    sources: tuple[int, ...]


class Step:
    """One op of a pass, with all its numbers.

    Attributes
    ----------
    name : str
        The layer's dotted name as in `named_params`, or ``"loss"``.
    direction : {"forward", "backward"}
    op : str
        The layer's class, or the loss.
    formula : str
        With the sizes filled in.
    inputs, outputs, params, grads : dict of str to array
        Forward: x to y. Backward: dy to dx, and the gradients dw and db.
    cache : object
        What the forward kept for the backward.
    """

    def __init__(
        self,
        node: Node,
        direction: str,
        op: str,
        formula: str,
        inputs: dict[str, Array],
        outputs: dict[str, Array],
        params: dict[str, Array],
        grads: dict[str, Array],
        cache: Any,
    ) -> None:
        self.name, self.layer, self.direction = node.name, node.layer, direction
        self.op, self.formula = op, formula
        self.inputs, self.outputs, self.params, self.grads = inputs, outputs, params, grads
        self.cache = cache

    @property
    def arrays(self) -> dict[str, Array]:
        """All arrays of the step by their letters."""
        params = {"w" if k == "weight" else "b": p for k, p in self.params.items()}
        return self.inputs | params | self.outputs | self.grads

    def statistics(self) -> dict[str, dict[str, float]]:
        """Return min, mean, max and the share of zeros of each array."""
        return {name: _statistics(a) for name, a in self.arrays.items()}

    def __repr__(self) -> str:
        label = repr(self.layer) if self.layer is not None else self.op
        if label.count("\n"):
            label = self.op
        lines = [f"{self.direction} {self.name}: {label}", f"    {self.formula}"]
        for name, a in self.arrays.items():
            s = _statistics(a)
            lines.append(
                f"    {name:<9} {tuple(a.shape)!s:<18} min {s['min']:>10.4g}  "
                f"mean {s['mean']:>10.4g}  max {s['max']:>10.4g}  zeros {s['zeros']:>6.1%}"
            )
        return "\n".join(lines)


def _statistics(a: Array) -> dict[str, float]:
    if not a.size:
        return dict.fromkeys(("min", "mean", "max", "zeros"), float("nan"))
    return {
        "min": float(a.min()),
        "mean": float(a.mean()),
        "max": float(a.max()),
        "zeros": float((a == 0).mean()),
    }


def formula_forward(step: Step) -> str:
    x, y = step.inputs["x"], step.outputs["y"]
    size = f"{tuple(x.shape)} -> {tuple(y.shape)}"
    w = step.params.get("weight")
    match step.op:
        case "Conv2d":
            C, KH, KW = w.shape[1:]  # type: ignore[union-attr]
            rows = step.layer.formula(x.shape) if step.layer else ""
            text = f"y[n,f,i,j] = b[f] + sum of {C}*{KH}*{KW} products x*w; rows {rows}"
        case "Linear":
            text = f"y[n,o] = b[o] + sum over {w.shape[1]} i of x[n,i] w[o,i]"  # type: ignore[union-attr]
        case "MaxPool2d":
            text = f"y = max of each window; rows {step.layer.formula(x.shape)}"  # type: ignore[union-attr]
        case "AvgPool2d" | "AdaptiveAvgPool2d":
            text = "y = mean of each window"
        case "BatchNorm2d" | "LayerNorm" | "GroupNorm":
            text = "y = w (x - mean) / sqrt(var + eps) + b"
        case "Softmax":
            text = "y[c] = e^x[c] / sum over k of e^x[k]"
        case "cross_entropy":
            text = f"loss = mean over {x.shape[0]} n of -log softmax(x[n])[target[n]]"
        case "Residual":
            text = "y = body + shortcut"
        case _:
            text = f"y = {step.op}(x)"
    return f"{text};  {size}"


def formula_backward(step: Step) -> str:
    x = step.inputs["x"]
    match step.op:
        case "Conv2d" | "ConvTranspose2d":
            text = (
                "dx = sum over the windows that cover x of dy*w; dw = sum of dy*x; db = sum of dy"
            )
        case "Linear":
            text = "dx = dy w; dw = dy^T x; db = sum over n of dy"
        case "MaxPool2d":
            text = "dx = sum of the dy of the windows that the pixel won"
        case "AvgPool2d" | "AdaptiveAvgPool2d":
            text = "dx = sum of dy / divisor over the windows that cover the pixel"
        case "BatchNorm2d" | "LayerNorm" | "GroupNorm":
            text = "dx = rstd (g - mean(g) - xhat mean(g xhat)) with g = dy w"
        case "cross_entropy":
            text = f"dx = (p - y) / {x.shape[0]} with p = softmax(x)"
        case "Residual":
            text = "dbody = dshortcut = dy"
        case "Dropout":
            text = "dx = dy * mask"
        case "Flatten":
            text = "dx = dy in the shape of x"
        case "Softmax":
            text = "dx[c] = y[c] (dy[c] - sum over k of dy[k] y[k])"
        case _:
            text = f"dx = dy * {step.op}'(x)"
    return f"{text};  dx {tuple(x.shape)}"
