"""Derive one number of a trace: the terms it is the sum of, and the finite difference beside it.

Every number here is ``scale * (start + sum of terms)``; what differs from op to op is which terms.
Each rule below lists them for one op from the arrays of the trace, apart from the code that
computed the number, and the sum is held against it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minicnn.trace.derivation import Explanation, Index, Term
from minicnn.trace.value_rules import (
    dropout,
    elementwise,
    flatten,
    loss,
    norm,
    residual,
    softmax,
)
from minicnn.trace.window_rules import (
    adaptive,
    avg_pool,
    conv,
    conv_transpose,
    linear,
    max_pool,
)

if TYPE_CHECKING:
    from minicnn.trace.steps import Step, Trace

__all__ = ["RULES", "Explanation", "Term", "explain"]


def explain(trace: Trace, name: str, what: str, index: Any) -> Explanation:
    """Derive one number of `trace`; see `Trace.explain`."""
    forward, backward = trace.forward(name), trace.backward(name)
    arrays = {"y": forward.outputs["y"]} | backward.outputs | backward.grads
    if what not in arrays:
        raise ValueError(
            f"explain: what: expected one of {', '.join(arrays)} for {forward.op} {name!r}, "
            f"got {what!r}"
        )
    a = arrays[what]
    index = tuple(index) if isinstance(index, tuple | list) else (index,)
    if len(index) != a.ndim or any(not -n <= i < n for i, n in zip(index, a.shape)):
        raise IndexError(
            f"explain: index: expected {a.ndim} integers within {tuple(a.shape)}, got {index}"
        )
    index = tuple(int(i) % n for i, n in zip(index, a.shape))
    rule = _rule(forward.op)
    title = f"{what}{list(index)} of {forward.op} {name!r}"
    result = rule(forward, backward, what, index)
    result.title = title
    result.value = float(a[index])
    result.gradient = float(backward.inputs["dy"][index]) if what == "y" else result.value
    result.numeric = trace.finite_difference(name, what, index)
    return result


RULES: dict[str, Callable[[Step, Step, str, Index], Explanation]] = {
    "Conv2d": conv,
    "ConvTranspose2d": conv_transpose,
    "Linear": linear,
    "MaxPool2d": max_pool,
    "AvgPool2d": avg_pool,
    "AdaptiveAvgPool2d": adaptive,
    **dict.fromkeys(("BatchNorm2d", "LayerNorm", "GroupNorm"), norm),
    **dict.fromkeys(("Softmax", "LogSoftmax"), softmax),
    **dict.fromkeys(("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "bce_with_logits"), loss),
    **dict.fromkeys(
        ("ReLU", "LeakyReLU", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Softplus"), elementwise
    ),
    "Dropout": dropout,
    "Flatten": flatten,
    "Residual": residual,
}


def _rule(op: str) -> Callable[[Step, Step, str, Index], Explanation]:
    if op not in RULES:
        raise ValueError(f"explain: name: expected a layer of minicnn, got {op}")
    return RULES[op]
