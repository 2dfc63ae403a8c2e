"""Cross-entropy: how improbable the right classes are under the predicted probabilities.

With log p = log_softmax(x) over the classes c, and one number a per image, class and place,

    nll_loss:       l[n] = - sum over c of a[n, c] log p[n, c]      dlog_p = -g a
    cross_entropy:  l[n] = nll_loss(log_softmax(x))                 dx = g (p sum over c of a - a)

for an upstream gradient g to each l. All the options are in a:

    label y:                a[c] = w[c] [c == y], and 0 for all c where y is ignore_index
    class probabilities q:  a[c] = w[c] q[c]
    smoothing by eps:       [c == y] or q[c] becomes (1 - eps) [c == y] + eps / C

For plain labels dx is the well-known p - onehot(y). A class with a = 0 counts nothing even where
log p is -inf (0 log 0 = 0), so a logit of -inf may rule a class out.

The reduction "mean" divides the sum by the labels' total weight, sum of w[y], and for class
probabilities by the number of rows. As in PyTorch, the mean of no labels is NaN; all its gradients
are 0. Only the gradient to x is computed.

Letters: N images, C classes, D1 ... further axes (places in an image).

References
----------
C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2016,
arXiv:1512.00567, section 7 (label smoothing).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, is_cupy, pick, recording
from minicnn.ops.losses import check_reduction, reduce, upstream
from minicnn.ops.softmax import VERSIONS as SOFTMAX
from minicnn.shapes import check_shape, integer, number

IGNORE_INDEX = -100


class NllLossCache(NamedTuple):
    """What `nll_loss_backward` needs from `nll_loss_forward`."""

    a: Array  # (N, C, D1, ...)
    share: Any  # see `minicnn.ops.losses.reduce`
    loss_shape: tuple[int, ...]


class Picks(NamedTuple):
    """`a` with one entry for each label, and zeros: what version ``numba`` takes instead of it."""

    label: Array  # (N, D1, ...), int64; any class where the weight is 0
    weight: Array  # (N, D1, ...), w[label], or 0 where the label is to be ignored

    def spread_out(self, like: Array) -> Array:
        """Return `a` in the shape of `like`."""
        classes = _per_class(like, np.arange(like.shape[1]))
        return self.weight[:, None] * (self.label[:, None] == classes)


class CrossEntropyCache(NamedTuple):
    """What `cross_entropy_backward` needs from `cross_entropy_forward`."""

    log_p: Array  # (N, C, D1, ...)
    a: Array | Picks  # (N, C, D1, ...)
    share: Any  # see `minicnn.ops.losses.reduce`
    loss_shape: tuple[int, ...]


# ---------------------------------------------------------------- a, and what the mean divides by


def _a_of_labels(
    op: str, x: Array, target: Array, weight: Array | None, ignore_index: int, smoothing: float
) -> tuple[Array, Any]:
    """Return `a` (N, C, D1, ...) and the labels' total weight."""
    C = x.shape[1]
    xp, ignore_index = array_module(x), integer(op, "ignore_index", ignore_index, -(2**63))
    target, kept, bad = _labels(op, x, target, ignore_index)
    w = _per_class(x, weight)
    classes = _per_class(x, xp.arange(C))
    a = w * ((target[:, None] == classes) & kept[:, None])  # (N, C, D1, ...)
    if bad is not None:
        a = xp.where(bad[:, None], np.nan, a)
    total = a.sum(dtype=np.float64)
    if smoothing:
        a = (1 - smoothing) * a + smoothing / C * w * kept[:, None]
    return a, total


def _picks(
    op: str, x: Array, target: Array, weight: Array | None, ignore_index: int
) -> tuple[Picks, Any]:
    """Return what `_a_of_labels` does without smoothing, for NumPy arrays."""
    ignore_index = integer(op, "ignore_index", ignore_index, -(2**63))
    target, kept, _ = _labels(op, x, target, ignore_index)
    if not kept.all():
        target = np.where(kept, target, 0)
    w = kept.astype(x.dtype) if weight is None else np.where(kept, weight[target], 0)
    return Picks(target, w), w.sum(dtype=np.float64)


def _a_of_probabilities(
    op: str, x: Array, target: Array, weight: Array | None, ignore_index: int, smoothing: float
) -> tuple[Array, int]:
    """Return `a` (N, C, D1, ...) and the number of rows."""
    x, target = as_arrays(op, x=x, target=target)
    check_shape(op, "target", target, x.shape, "class probabilities, like x")
    if ignore_index != IGNORE_INDEX:
        raise ValueError(
            f"{op}: ignore_index: expected none with class probabilities, got {ignore_index}"
        )
    if smoothing:
        target = (1 - smoothing) * target + smoothing / x.shape[1]
    return _per_class(x, weight) * target, x.size // x.shape[1]


def _per_class(x: Array, values: Array | None) -> Array:
    """Return (C,) values in the shape (C, 1, ...) that broadcasts with x; ones for None."""
    if values is None:
        values = array_module(x).ones(x.shape[1], x.dtype)
    return values.reshape(-1, *(1 for _ in x.shape[2:]))


# ---------------------------------------------------------------- reference


def _nll_forward_reference(log_p: Array, a: Array) -> Array:
    N, C, *D = log_p.shape
    losses = np.zeros((N, *D), log_p.dtype)
    for n, *place in np.ndindex(losses.shape):
        total = 0.0
        for c in range(C):
            at = (n, c, *place)
            if a[at] != 0:
                total -= float(a[at]) * float(log_p[at])
        losses[(n, *place)] = total
    return losses


def _nll_backward_reference(g: Array, a: Array) -> Array:
    dlog_p = np.zeros_like(a)
    g = np.broadcast_to(g, (a.shape[0], *a.shape[2:]))
    for n, c, *place in np.ndindex(a.shape):
        dlog_p[(n, c, *place)] = -float(g[(n, *place)]) * float(a[(n, c, *place)])
    return dlog_p


# ---------------------------------------------------------------- numpy (CuPy runs it too)


def _nll_forward_numpy(log_p: Array, a: Array) -> Array:
    return array_module(a).where(a == 0, 0, -a * log_p).sum(axis=1)


def _nll_backward_numpy(g: Array, a: Array) -> Array:
    return a * (-g[:, None] if g.ndim else -g)  # g: one for each loss, (N, D1, ...), or for all


def _after_log_softmax(log_softmax: Version, nll_loss: Version) -> Version:
    """Cross-entropy: the negative log-likelihood of the logarithm of the softmax."""

    def forward(x: Array, a: Array) -> tuple[Array, Array]:
        log_p = log_softmax.forward(x, 1)
        return nll_loss.forward(log_p, a), log_p

    def backward(g: Array, log_p: Array, a: Array) -> Array:
        return log_softmax.backward(nll_loss.backward(g, a), log_p, 1)

    return Version(forward, backward)


_NLL = {
    "reference": Version(_nll_forward_reference, _nll_backward_reference),
    "numpy": Version(_nll_forward_numpy, _nll_backward_numpy),
}
_AFTER_LOG_SOFTMAX = {
    name: _after_log_softmax(version, _NLL.get(name, _NLL["numpy"]))
    for name, version in SOFTMAX["log_softmax"].items()
}


# ------------------------------------------------------------- numba (see cross_entropy_numba.py)


def _forward_numba(x: Array, a: Array | Picks) -> tuple[Array, Array]:
    if not isinstance(a, Picks):
        return _AFTER_LOG_SOFTMAX["numba"].forward(x, a)
    from minicnn.ops import cross_entropy_numba  # imports Numba: only when asked for

    return cross_entropy_numba.forward(x, a.label, a.weight)


def _backward_numba(g: Array, log_p: Array, a: Array | Picks) -> Array:
    if not isinstance(a, Picks):
        return _AFTER_LOG_SOFTMAX["numba"].backward(g, log_p, a)
    from minicnn.ops import cross_entropy_numba

    return cross_entropy_numba.backward(g, log_p, a.label, a.weight)


# ---------------------------------------------------------------- cupy (see softmax_cupy.py)


def _cross_entropy_forward_cupy(x: Array, a: Array) -> tuple[Array, Array]:
    from minicnn.ops import softmax_cupy

    return softmax_cupy.cross_entropy_forward(x, a)


def _cross_entropy_backward_cupy(g: Array, log_p: Array, a: Array) -> Array:
    from minicnn.ops import softmax_cupy

    return softmax_cupy.cross_entropy_backward(g, log_p, a)


# ---------------------------------------------------------------- versions, public pairs

VERSIONS = {
    "nll_loss": _NLL,
    "cross_entropy": _AFTER_LOG_SOFTMAX
    | {
        "numba": Version(_forward_numba, _backward_numba),
        "cupy": Version(_cross_entropy_forward_cupy, _cross_entropy_backward_cupy),
    },
}


def nll_loss_forward(
    log_p: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
) -> tuple[Array, NllLossCache]:
    """Negative log-likelihood of the labels under log-probabilities (from `log_softmax_forward`).

    Parameters
    ----------
    log_p : array, shape (N, C) or (N, C, D1, ...), float32 or float64
        Log-probabilities; N may be 0.
    target : integer array, shape (N,) or (N, D1, ...)
        Labels in 0..C-1, or `ignore_index`.
    weight : array, shape (C,), optional
        Of each class, of log_p's dtype.
    ignore_index : int
        A label that counts nothing.
    reduction : {"mean", "sum", "none"}
        Of the labels' losses, added up in float64; "mean" divides by the labels' total weight.

    Returns
    -------
    loss : number of log_p's dtype, or array of target's shape for "none"
        NaN for the mean of no labels.
    cache : NllLossCache
        For `nll_loss_backward`.

    Raises
    ------
    ValueError
        For a wrong shape, a label out of range (the message names it and its position) or an
        unknown reduction.
    TypeError
        For labels that are no integers, or float arrays of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> log_p = np.log([[0.25, 0.75], [0.5, 0.5]])
    >>> loss, cache = nll_loss_forward(log_p, np.array([1, 0]), reduction="none")
    >>> loss.round(4)
    array([0.2877, 0.6931])
    """
    op = "nll_loss"
    log_p, weight = as_arrays(op, ("weight",), log_p=log_p, weight=weight)
    _check(op, "log_p", log_p, weight, reduction)
    a, total = _a_of_labels(op, log_p, target, weight, ignore_index, 0.0)
    with np.errstate(all="ignore"):
        losses = pick(op, VERSIONS[op], log_p).forward(log_p, a)
        loss, share = reduce(losses, reduction, total)
    return loss, NllLossCache(a, share, loss.shape)


def nll_loss_backward(dloss: Any, cache: NllLossCache) -> Array:
    """Gradient of `nll_loss_forward` to log_p.

    Parameters
    ----------
    dloss : float, or array of the loss's shape for the reduction "none"
        Gradient to the loss: 1.0 where the loss is what is minimised.
    cache : NllLossCache
        From the forward.

    Returns
    -------
    dlog_p : array, shape of log_p

    Raises
    ------
    ValueError, TypeError
        If `dloss` differs from the loss in shape, or from log_p in dtype or device.
    """
    a, share, shape = cache
    with np.errstate(all="ignore"):
        g = upstream("nll_loss_backward", dloss, a, shape, share)
        return pick("nll_loss", VERSIONS["nll_loss"], a).backward(g, a)


def cross_entropy_forward(
    x: Array,
    target: Array,
    weight: Array | None = None,
    ignore_index: int = IGNORE_INDEX,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> tuple[Array, CrossEntropyCache]:
    """Cross-entropy of labels, or of class probabilities, and the softmax of scores.

    Parameters
    ----------
    x : array, shape (N, C) or (N, C, D1, ...), float32 or float64
        Scores (logits); N may be 0.
    target : array
        Integer labels in 0..C-1 or `ignore_index`, shape (N,) or (N, D1, ...); or class
        probabilities of x's shape and dtype.
    weight : array, shape (C,), optional
        Of each class, of x's dtype.
    ignore_index : int
        A label that counts nothing; not with class probabilities.
    reduction : {"mean", "sum", "none"}
        Of the losses, added up in float64; "mean" divides by the labels' total weight, or for
        class probabilities by their number of rows.
    label_smoothing : float
        In [0, 1]: the part of every target that is spread evenly over all classes.

    Returns
    -------
    loss : number of x's dtype, or array of shape (N,) or (N, D1, ...) for "none"
        NaN for the mean of no labels.
    cache : CrossEntropyCache
        For `cross_entropy_backward`.

    Raises
    ------
    ValueError
        For a wrong shape, a label out of range (the message names it and its position), an
        unknown reduction or smoothing outside of [0, 1].
    TypeError
        For labels that are no integers, or float arrays of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.log([[1.0, 3.0], [2.0, 2.0]])
    >>> loss, cache = cross_entropy_forward(x, np.array([1, 0]), reduction="sum")
    >>> round(float(loss), 4)  # -log(3/4) - log(1/2)
    0.9808
    >>> cross_entropy_backward(1.0, cache).round(4)
    array([[ 0.25, -0.25],
           [-0.5 ,  0.5 ]])
    """
    op = "cross_entropy"
    x, weight = as_arrays(op, ("weight",), x=x, weight=weight)
    _check(op, "x", x, weight, reduction)
    smoothing = number(op, "label_smoothing", label_smoothing, ge=0, le=1)
    version = pick(op, VERSIONS[op], x)
    a: Array | Picks
    if _holds_floats(target) and target.ndim == x.ndim:
        a, total = _a_of_probabilities(op, x, target, weight, ignore_index, smoothing)
    elif version is VERSIONS[op]["numba"] and not smoothing:
        a, total = _picks(op, x, target, weight, ignore_index)
    else:
        a, total = _a_of_labels(op, x, target, weight, ignore_index, smoothing)
    with np.errstate(all="ignore"):
        losses, log_p = version.forward(x, a)
        loss, share = reduce(losses, reduction, total)
    return loss, CrossEntropyCache(log_p, a, share, loss.shape)


def cross_entropy_backward(dloss: Any, cache: CrossEntropyCache) -> Array:
    """Gradient of `cross_entropy_forward` to x.

    Parameters
    ----------
    dloss : float, or array of the loss's shape for the reduction "none"
        Gradient to the loss: 1.0 where the loss is what is minimised.
    cache : CrossEntropyCache
        From the forward.

    Returns
    -------
    dx : array, shape of x

    Raises
    ------
    ValueError, TypeError
        If `dloss` differs from the loss in shape, or from x in dtype or device.
    """
    log_p, a, share, shape = cache
    with np.errstate(all="ignore"):
        g = upstream("cross_entropy_backward", dloss, log_p, shape, share)
        version = pick("cross_entropy", VERSIONS["cross_entropy"], log_p)
        if isinstance(a, Picks) and version is not VERSIONS["cross_entropy"]["numba"]:
            a = a.spread_out(log_p)
        return version.backward(g, log_p, a)


# ---------------------------------------------------------------- checks


def _check(op: str, name: str, x: Array, weight: Array | None, reduction: str) -> None:
    if x.ndim < 2 or not x.shape[1]:
        raise ValueError(
            f"{op}: {name}: expected shape (N, C) or (N, C, D1, ...) with a class or more, "
            f"got {x.shape}"
        )
    if weight is not None:
        check_shape(op, "weight", weight, x.shape[1:2], "one per class")
    check_reduction(op, reduction)


def _holds_floats(target: Any) -> bool:
    return getattr(getattr(target, "dtype", None), "kind", "") == "f"


def _labels(op: str, x: Array, target: Any, ignore_index: int) -> tuple[Array, Array, Array | None]:
    """Return the labels as int64 in C order, which of them count, and in a recorded step, where
    nobody can look at them, which are wrong.
    """
    xp, C = array_module(x), x.shape[1]
    if not isinstance(target, np.ndarray) and not is_cupy(target):
        raise TypeError(
            f"{op}: target: expected an array of labels, got {type(target).__name__} "
            "(fix: numpy.asarray(target))"
        )
    if target.dtype.kind not in "iu":
        raise TypeError(
            f"{op}: target: expected integer labels, got {target.dtype} "
            "(fix: target.astype('int64'))"
        )
    if is_cupy(target) != is_cupy(x):
        raise TypeError(
            f"{op}: target: expected the labels on the device of the scores "
            "(move one with to_gpu or to_cpu)"
        )
    check_shape(op, "target", target, (x.shape[0], *x.shape[2:]), "one label for each row")
    target = xp.asarray(target, dtype=np.int64, order="C")
    kept = target != ignore_index
    bad = kept & ((target < 0) | (target >= C))
    if recording():
        return target, kept, bad
    if bad.any():
        position = tuple(int(i[0]) for i in xp.nonzero(bad))
        raise ValueError(
            f"{op}: target: expected labels in 0..{C - 1}, got {int(target[position])} "
            f"at position {position}"
        )
    return target, kept, None
