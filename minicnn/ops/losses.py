"""Losses that compare x with a target of the same shape, element by element.

    op               loss of one element l(x, t)                        dl / dx
    mse_loss         (x - t)^2                                          2 (x - t)
    l1_loss          |x - t|                                            sign(x - t)
    bce_with_logits  -w (p t log s(x) + (1 - t) log(1 - s(x)))          w ((1 - t) s(x) - p t s(-x))

s(x) = 1 / (1 + e^-x) is the probability that the logit x stands for, t the probability wanted,
w the element's weight and p the extra weight of positive targets. -log s(x) is softplus(-x) and
-log(1 - s(x)) is softplus(x), which neither overflow nor cancel.

The reduction "sum" adds the elements up, "mean" divides that by their number, and "none" keeps
them. As in PyTorch, the mean of no elements is NaN; its gradient is as empty as x. Only the
gradient to x is computed.

References
----------
I. Goodfellow, Y. Bengio, A. Courville, "Deep Learning", 2016, section 6.2.2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.activations import (
    elementwise,
    sigmoid_array,
    sigmoid_number,
    softplus_array,
    softplus_number,
)
from minicnn.shapes import check_shape

REDUCTIONS = ("mean", "sum", "none")


class LossCache(NamedTuple):
    """What the backward of an elementwise loss needs from its forward."""

    arrays: tuple[Array, ...]  # x, the target and, for bce_with_logits, w and p
    share: Any  # see `reduce`
    loss_shape: tuple[int, ...]


# ---------------------------------------------------------------- the reduction


def check_reduction(op: str, reduction: str) -> None:
    """Raise ValueError unless `reduction` is one of REDUCTIONS."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"{op}: reduction: expected one of {REDUCTIONS}, got {reduction!r}")


def reduce(losses: Array, reduction: str, total: Any) -> tuple[Array, Any]:
    """Reduce the losses of the elements, in float64; "mean" divides by `total`.

    Returns
    -------
    loss : array of losses' dtype
        A number, or for "none" the losses as they are.
    share : float or 0-d float64 array
        What each of the losses counts for in `loss`; 0 in a mean over nothing, whose gradient is 0.
    """
    if reduction == "none":
        return losses, 1.0
    xp = array_module(losses)
    loss = losses.sum(dtype=np.float64)
    share = 1.0
    if reduction == "mean":
        total = xp.asarray(total, dtype=np.float64)
        loss, share = loss / total, xp.where(total == 0, 0, 1 / total)
    return loss.astype(losses.dtype), share


def upstream(op: str, dloss: Any, x: Array, shape: tuple[int, ...], share: Any) -> Array:
    """Check the gradient to a loss of `shape` and return the one to each of the losses."""
    if isinstance(dloss, int | float):
        dloss = array_module(x).asarray(dloss, dtype=x.dtype)
    _, dloss = as_arrays(op, x=x, dloss=dloss)
    check_shape(op, "dloss", dloss, shape, "like loss")
    return array_module(x).asarray(dloss * share, dtype=x.dtype)


# ---------------------------------------------------------------- reference: one number at a time

# op: (x, t, ... -> loss), (upstream gradient g, x, t, ... -> dx)
_REFERENCE: dict[str, tuple[Callable[..., float], Callable[..., float]]] = {
    "mse_loss": (
        lambda x, t: (x - t) * (x - t),
        lambda g, x, t: g * 2 * (x - t),
    ),
    "l1_loss": (
        lambda x, t: abs(x - t),
        lambda g, x, t: g * float(np.sign(x - t)),
    ),
    "bce_with_logits": (
        lambda x, t, w, p: w * (p * t * softplus_number(-x) + (1 - t) * softplus_number(x)),
        lambda g, x, t, w, p: g * w * ((1 - t) * sigmoid_number(x) - p * t * sigmoid_number(-x)),
    ),
}

# ---------------------------------------------------------------- numpy (CuPy runs it too)


_NUMPY: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "mse_loss": (
        lambda x, t: (x - t) * (x - t),
        lambda g, x, t: g * 2 * (x - t),
    ),
    "l1_loss": (
        lambda x, t: abs(x - t),
        lambda g, x, t: g * array_module(x).sign(x - t),
    ),
    "bce_with_logits": (
        lambda x, t, w, p: w * (p * t * softplus_array(-x) + (1 - t) * softplus_array(x)),
        lambda g, x, t, w, p: g * w * ((1 - t) * sigmoid_array(x) - p * t * sigmoid_array(-x)),
    ),
}

# ---------------------------------------------------------------- numba (see elementwise_numba.py)


def _numba(op: str) -> Version:
    """Kernels where the weights, and backward the upstream gradient, are single numbers."""

    def forward(x: Array, t: Array, *weights: Any) -> Array:
        from minicnn.ops import elementwise_numba  # imports Numba: only when asked for

        if any(map(np.ndim, weights)):
            return _NUMPY[op][0](x, t, *weights)
        return elementwise_numba.map_two(op, x, t, *map(float, weights))

    def backward(g: Array, x: Array, t: Array, *weights: Any) -> Array:
        from minicnn.ops import elementwise_numba

        if any(map(np.ndim, (g, *weights))):
            return _NUMPY[op][1](g, x, t, *weights)
        return elementwise_numba.map_two(f"{op}_backward", x, t, float(g), *map(float, weights))

    return Version(forward, backward)


# ---------------------------------------------------------------- versions, public pairs

VERSIONS = {
    op: {
        "reference": Version(*map(elementwise, _REFERENCE[op])),
        "numpy": Version(*_NUMPY[op]),
        "numba": _numba(op),
    }
    for op in _REFERENCE
}


def _forward(op: str, reduction: str, x: Array, target: Array, *weights: Any) -> tuple[Any, Any]:
    check_shape(op, "target", target, x.shape, "like x")
    check_reduction(op, reduction)
    with np.errstate(all="ignore"):
        losses = pick(op, VERSIONS[op], x).forward(x, target, *weights)
        loss, share = reduce(losses, reduction, x.size)
    return loss, LossCache((x, target, *weights), share, loss.shape)


def _backward(op: str, dloss: Any, cache: LossCache) -> Array:
    x = cache.arrays[0]
    with np.errstate(all="ignore"):
        g = upstream(f"{op}_backward", dloss, x, cache.loss_shape, cache.share)
        return pick(op, VERSIONS[op], x).backward(g, *cache.arrays)


def mse_loss_forward(x: Array, target: Array, reduction: str = "mean") -> tuple[Array, LossCache]:
    """Squared error ``(x - target)**2``.

    Parameters
    ----------
    x : array of any shape, float32 or float64
    target : array
        Of x's shape and dtype.
    reduction : {"mean", "sum", "none"}
        Of the elements' losses, added up in float64.

    Returns
    -------
    loss : number of x's dtype, or array of x's shape for "none"
        NaN for the mean of no elements.
    cache : LossCache
        For `mse_loss_backward`.

    Raises
    ------
    ValueError
        For a target of another shape, or an unknown reduction.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> loss, cache = mse_loss_forward(np.array([1.0, 5.0]), np.array([2.0, 2.0]))
    >>> float(loss)
    5.0
    >>> mse_loss_backward(1.0, cache)
    array([-1.,  3.])
    """
    x, target = as_arrays("mse_loss", x=x, target=target)
    return _forward("mse_loss", reduction, x, target)


def mse_loss_backward(dloss: Any, cache: LossCache) -> Array:
    """Gradient of `mse_loss_forward` to x.

    Parameters
    ----------
    dloss : float, or array for the reduction "none"
        Gradient to the loss, of its shape: 1.0 where the loss is what is minimised.
    cache : LossCache
        From the forward.

    Returns
    -------
    dx : array, shape of x

    Raises
    ------
    ValueError, TypeError
        If `dloss` differs from the loss in shape, or from x in dtype or device.
    """
    return _backward("mse_loss", dloss, cache)


def l1_loss_forward(x: Array, target: Array, reduction: str = "mean") -> tuple[Array, LossCache]:
    """Absolute error ``|x - target|``, whose derivative at 0 is 0.

    Parameters, returns and errors are those of `mse_loss_forward`.

    Examples
    --------
    >>> import numpy as np
    >>> float(l1_loss_forward(np.array([1.0, 5.0]), np.array([2.0, 2.0]))[0])
    2.0
    """
    x, target = as_arrays("l1_loss", x=x, target=target)
    return _forward("l1_loss", reduction, x, target)


def l1_loss_backward(dloss: Any, cache: LossCache) -> Array:
    """Gradient of `l1_loss_forward` to x; arguments and errors as for `mse_loss_backward`."""
    return _backward("l1_loss", dloss, cache)


def bce_with_logits_forward(
    x: Array,
    target: Array,
    weight: Array | None = None,
    pos_weight: Array | None = None,
    reduction: str = "mean",
) -> tuple[Array, LossCache]:
    """Binary cross-entropy of ``sigmoid(x)``, computed from x itself.

    Parameters
    ----------
    x : array of any shape, float32 or float64
        Logits.
    target : array
        Probabilities in [0, 1], of x's shape and dtype.
    weight : array, optional
        Factor of each loss; broadcast to x. The mean still divides by the number of elements.
    pos_weight : array, optional
        Factor of the part with ``target``; broadcast to x, so (C,) weighs the last axis.
    reduction : {"mean", "sum", "none"}
        Of the elements' losses, added up in float64.

    Returns
    -------
    loss : number of x's dtype, or array of x's shape for "none"
    cache : LossCache
        For `bce_with_logits_backward`.

    Raises
    ------
    ValueError
        For a target of another shape, a weight that does not broadcast to x, or an unknown
        reduction.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> loss, cache = bce_with_logits_forward(np.array([0.0, -1000.0]), np.array([1.0, 0.0]))
    >>> round(float(loss), 4)  # log(2) / 2
    0.3466
    >>> bce_with_logits_backward(1.0, cache)
    array([-0.25,  0.  ])
    """
    x, target, weight, pos_weight = as_arrays(
        "bce_with_logits",
        ("weight", "pos_weight"),
        x=x,
        target=target,
        weight=weight,
        pos_weight=pos_weight,
    )
    for name, a in (("weight", weight), ("pos_weight", pos_weight)):
        if a is not None and not _broadcasts(a.shape, x.shape):
            raise ValueError(
                f"bce_with_logits: {name}: expected a shape that broadcasts to {x.shape} like x, "
                f"got {a.shape}"
            )
    w = 1.0 if weight is None else weight
    p = 1.0 if pos_weight is None else pos_weight
    return _forward("bce_with_logits", reduction, x, target, w, p)


def bce_with_logits_backward(dloss: Any, cache: LossCache) -> Array:
    """Gradient of `bce_with_logits_forward` to x; the rest is as for `mse_loss_backward`."""
    return _backward("bce_with_logits", dloss, cache)


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    """Tell whether an array of `shape` can be repeated to `target`."""
    return len(shape) <= len(target) and all(
        a in (1, b) for a, b in zip(reversed(shape), reversed(target))
    )
