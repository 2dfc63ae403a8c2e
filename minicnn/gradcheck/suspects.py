"""Mistakes that one knows of an op, as the gradients that they would give.

Most are made with the op's own backward pass on other arguments: a kernel turned round, a stride
left out. `minicnn.gradcheck.hints` names the one that equals the gradient at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minicnn.gradcheck.hints import Suspect

Pair = tuple[Callable[..., Any], Callable[..., Any]]


class Call(NamedTuple):
    """A call of an op: the pair of this package, its float64 arrays and all its options."""

    op: str
    pair: Pair
    arrays: dict[str, np.ndarray]
    options: dict[str, Any]
    dy: np.ndarray

    def gradient(self, name: str, dy: np.ndarray, **changes: Any) -> np.ndarray | None:
        """The gradient to input `name` with changed arrays or options; None if that cannot be."""
        arrays = {key: changes.get(key, a) for key, a in self.arrays.items()}
        options = {key: changes.get(key, value) for key, value in self.options.items()}
        try:
            y, cache = self.pair[0](**arrays, **options)
            if np.shape(y) != np.shape(dy):
                return None
            grads = self.pair[1](dy, cache)
        except (ValueError, TypeError):
            return None
        grads = grads if isinstance(grads, tuple) else (grads,)
        return grads[list(arrays).index(name)]


def of(call: Call, name: str) -> Iterator[Suspect]:
    """What the gradient to input `name` would be after each known mistake."""
    for kind, text, gradient in _SUSPECTS.get(call.op, lambda call, name: iter(()))(call, name):
        if gradient is not None:
            yield Suspect(kind, text, gradient)


def of_values(call: Call) -> Iterator[Suspect]:
    """What the output would be after each known mistake of the forward pass."""
    for name, text, changes in _values(call):
        try:
            y, _ = call.pair[0](**{**call.arrays, **changes.get("arrays", {})},
                                **{**call.options, **changes.get("options", {})})  # fmt: skip
        except (ValueError, TypeError):
            continue
        yield Suspect(name, text, np.asarray(y))


def _values(call: Call) -> Iterator[tuple[str, str, dict[str, Any]]]:
    if "w" in call.arrays and call.arrays["w"].ndim == 4:
        w = call.arrays["w"]
        text = "the kernel is turned round: this is convolution; deep learning correlates"
        yield "flipped kernel", text, {"arrays": {"w": w[..., ::-1, ::-1]}}
    if "b" in call.arrays:
        yield "bias", "the bias is missing", {"arrays": {"b": 0 * call.arrays["b"]}}
    for option, value in (("dilation", 1), ("padding", 0), ("stride", 1)):
        if option in call.options and call.options[option] not in (value, None):
            yield option, f"as with {option}={value}", {"options": {option: value}}


# ------------------------------------------------------------ windows

Found = Iterator[tuple[str, str, "np.ndarray | None"]]


def _convolution(call: Call, name: str) -> Found:
    w, x, dy = call.arrays["w"], call.arrays["x"], call.dy
    if name == "x":
        yield "flipped kernel", "dx uses the kernel turned round (rotated by 180 degrees)", (
            call.gradient("x", dy, w=w[..., ::-1, ::-1])
        )  # fmt: skip
        yield "swapped kernel", "dx uses the kernel with rows and columns swapped", (
            call.gradient("x", dy, w=w.swapaxes(2, 3))
        )  # fmt: skip
        if w.shape[0] == w.shape[1]:
            yield "transposed", "dx uses w with its first two axes swapped", (
                call.gradient("x", dy, w=w.swapaxes(0, 1))
            )  # fmt: skip
    if name == "w":
        yield "flipped input", "dw reads x turned round", (
            call.gradient("w", dy, x=x[..., ::-1, ::-1])
        )  # fmt: skip
    yield from _geometry(call, name)
    yield from _groups(call, name)


def _geometry(call: Call, name: str) -> Found:
    """Windows that lie elsewhere than those of the forward pass."""
    x, dy, given = call.arrays["x"], call.dy, call.options
    for option in ("stride", "dilation"):
        value = given.get(option)
        if isinstance(value, tuple | list) and value[0] != value[1]:
            text = f"the {option}'s rows and columns are swapped"
            yield option, text, _resized(call, name, dy, x, **{option: tuple(value)[::-1]})
        if value not in (1, None, (1, 1)):
            yield option, f"as with {option}=1", _resized(call, name, dy, x, **{option: 1})
    if given.get("padding"):
        yield "padding", "as if there were no padding: everything is shifted by it", (
            _resized(call, name, dy, x, padding=0)
        )  # fmt: skip


def _resized(
    call: Call, name: str, dy: np.ndarray, x: np.ndarray, **changes: Any
) -> np.ndarray | None:
    """Windows of another geometry over a larger map, cut back to the map that there is."""
    if call.op == "conv_transpose2d":
        return None
    H, W = x.shape[2:]
    grown = np.pad(x, ((0, 0), (0, 0), (0, 2 * H + 8), (0, 2 * W + 8)))
    options = {key: changes.get(key, value) for key, value in call.options.items()}
    arrays = {**call.arrays, "x": grown}
    try:
        y, cache = call.pair[0](**arrays, **options)
        if any(a < b for a, b in zip(y.shape, dy.shape)):
            return None
        full = np.zeros(y.shape)
        full[tuple(map(slice, dy.shape))] = dy
        grads = call.pair[1](full, cache)
    except (ValueError, TypeError):
        return None
    grads = grads if isinstance(grads, tuple) else (grads,)
    gradient = grads[list(arrays).index(name)]
    return gradient[:, :, :H, :W] if name == "x" else gradient


def _groups(call: Call, name: str) -> Found:
    G = call.options.get("groups", 1)
    if G == 1 or name == "b":
        return

    def dealt(a: np.ndarray, axis: int, back: bool = False) -> np.ndarray:
        """Put what was handed out in turn, as cards are, into blocks, one a group."""
        order = np.arange(a.shape[axis]).reshape(-1, G).T.ravel()
        return np.take(a, np.argsort(order) if back else order, axis)

    x, w, dy = call.arrays["x"], call.arrays["w"], call.dy
    for what, changes, upstream in (
        ("filters", {"w": dealt(w, 0)}, dealt(dy, 1)),
        ("channels", {"x": dealt(x, 1)}, dy),
    ):
        gradient = call.gradient(name, upstream, **changes)
        if gradient is not None and (name, what) in (("w", "filters"), ("x", "channels")):
            gradient = dealt(gradient, 0 if name == "w" else 1, back=True)
        text = f"the {what} are dealt out to the groups in turn; a group has neighbouring ones"
        yield "groups", text, gradient


def _max_pool(call: Call, name: str) -> Found:
    dy = call.dy
    spread = _spread(call, dy)
    if spread is not None:
        yield "mask forgotten", "every pixel of a window gets dy; only the maximum may", spread
        size = np.prod(np.broadcast_to(call.options["kernel_size"], 2))
        yield "mean for max", "dy is spread evenly, as for average pooling", spread / size
    yield from _geometry(call, name)


def _spread(call: Call, dy: np.ndarray) -> np.ndarray | None:
    from minicnn import ops

    options = {key: call.options[key] for key in ("kernel_size", "stride", "padding", "ceil_mode")}
    if call.options.get("dilation") not in (1, (1, 1)):
        return None
    _, cache = ops.avg_pool2d_forward(call.arrays["x"], **options, divisor_override=1)
    return ops.avg_pool2d_backward(dy, cache)


def _avg_pool(call: Call, name: str) -> Found:
    other = not call.options["count_include_pad"]
    yield "padding", f"as with count_include_pad={other}: divided by another count", (
        call.gradient(name, call.dy, count_include_pad=other)
    )  # fmt: skip
    yield from _geometry(call, name)


# ------------------------------------------------------------ the rest


def _linear(call: Call, name: str) -> Found:
    x, w, dy = call.arrays["x"], call.arrays["w"], call.dy
    if name == "x" and w.shape[0] == w.shape[1]:
        yield "transposed", "dx uses w where it needs w.T, or the other way", dy @ w.T
    if name == "w" and len(x) == x.shape[1]:
        yield "transposed", "dw uses x where it needs x.T, or the other way", dy.T @ x.T


def _norm(call: Call, name: str) -> Found:
    x, dy, w = call.arrays["x"], call.dy, call.arrays["w"]
    axes, view = _norm_axes(call)
    xs, eps = view(x), call.options["eps"]
    mean, var = xs.mean(axes, keepdims=True), xs.var(axes, keepdims=True)
    rstd = (var + eps) ** -0.5
    xhat = (xs - mean) * rstd
    shape = (-1,) if call.op == "layer_norm" else (-1, *(1,) * (x.ndim - 2))
    scaled = view(dy * w.reshape(shape))
    if name == "x":
        ways = scaled.mean(axes, keepdims=True), xhat * (scaled * xhat).mean(axes, keepdims=True)
        for kind, text, gradient in (
            ("statistics constant", "mean and variance are treated as constants", scaled),
            ("variance path", "the way through the variance is missing", scaled - ways[0]),
            ("mean path", "the way through the mean is missing", scaled - ways[1]),
        ):
            yield kind, text, (gradient * rstd).reshape(x.shape)
        yield "weight forgotten", "w is missing: dy has to be multiplied by it", (
            call.gradient("x", dy, w=np.ones_like(w))
        )  # fmt: skip
        right = call.gradient("x", dy)
        if right is not None:
            yield "eps", "1 / sqrt(var + eps) is missing", (view(right) / rstd).reshape(x.shape)
    if name == "w":
        over = tuple(i for i in range(x.ndim) if i != (x.ndim - 1 if shape == (-1,) else 1))
        raw = (dy * x).sum(over)
        yield "not normalised", "dw is summed over dy * x; it needs the normalised x", raw


def _norm_axes(call: Call) -> tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]:
    x = call.arrays["x"]
    if call.op == "batch_norm":
        return (0, *range(2, x.ndim)), lambda a: a
    if call.op == "layer_norm":
        return (x.ndim - 1,), lambda a: a
    G = call.options["num_groups"]
    return (2,), lambda a: a.reshape(len(a), G, -1)


def _activation(call: Call, name: str) -> Found:
    x, dy = call.arrays["x"], call.dy
    y, _ = call.pair[0](x, **call.options)
    yield "derivative of y", "the derivative is taken at y; it belongs at x", (
        call.gradient("x", dy, x=y)
    )  # fmt: skip
    if call.op in ("sigmoid", "tanh"):
        wrong = dy * (x * (1 - x) if call.op == "sigmoid" else 1 - x * x)
        yield "formula of y", "the formula is one of y, but it is given x", wrong
        if call.op == "tanh":
            yield "formula", "it is 1 - y where it should be 1 - y * y", dy * (1 - y)
    yield "not multiplied", "it is x * dy: the derivative is not x", dy * x
    if call.op != "relu":  # there that is the mask of dy
        text = "the forward pass is applied to dy"
        yield "forward for backward", text, call.pair[0](dy, **call.options)[0]


def _dropout(call: Call, name: str) -> Found:
    keep, dy, p = call.arrays["keep"], call.dy, call.options["p"]
    text = "the mask is missing: dropped elements get a gradient"
    yield "mask forgotten", text, dy
    yield "mask forgotten", text, dy / (1 - p)
    yield "scale", "1 / (1 - p) is missing", dy * keep
    yield "mask inverted", "the gradient goes to the dropped elements", dy * ~keep / (1 - p)


def _softmax(call: Call, name: str) -> Found:
    x, dy, dim = call.arrays["x"], call.dy, call.options["dim"]
    y, _ = call.pair[0](x, **call.options)
    if call.op == "softmax":
        text = "only y (1 - y) is counted, as for a sigmoid; every score moves all outputs"
        yield "diagonal only", text, dy * y * (1 - y)
        yield "sum missing", "the sum over dy * y is missing", dy * y
    else:
        p = np.exp(y)
        yield "sum missing", "the sum of dy along the row is missing", dy - p
        yield "sum missing", "dy of the row has to be summed before it meets p", dy - p * dy
    other = (dim + 1) % x.ndim
    yield "wrong axis", "taken along the other axis", call.gradient("x", dy, dim=other)


def _cross_entropy(call: Call, name: str) -> Found:
    x, target, dy = call.arrays["x"], call.arrays["target"], call.dy
    p = np.exp(x - x.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    hot = np.eye(x.shape[1])[target]
    N = len(x) if call.options["reduction"] == "mean" else 1
    share = np.reshape(dy, (-1, 1)) / N
    yield "one-hot missing", "it is the softmax: subtract 1 at the label", p * share
    yield "softmax missing", "only the label's entry is there: add the softmax", -hot * share
    yield "wrong axis", "the softmax is taken over the images", (
        (np.exp(x) / np.exp(x).sum(0) - hot) * share
    )  # fmt: skip
    if call.options["label_smoothing"]:
        yield "label smoothing", "label smoothing is missing", (p - hot) * share


_SUSPECTS: dict[str, Callable[[Call, str], Found]] = {
    "conv2d": _convolution,
    "conv_transpose2d": _convolution,
    "linear": _linear,
    "max_pool2d": _max_pool,
    "avg_pool2d": _avg_pool,
    "batch_norm": _norm,
    "layer_norm": _norm,
    "group_norm": _norm,
    "dropout": _dropout,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "cross_entropy": _cross_entropy,
    **dict.fromkeys(
        ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "silu", "softplus"), _activation
    ),
}
