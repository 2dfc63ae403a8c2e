"""ONNX operators on arrays: networks' operators by minicnn's ops, the plumbing by NumPy.

Each entry of `OPERATORS` maps a `Node` and its inputs (None where one is left out) to its output,
or to a tuple of outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.backend import Array
from minicnn.onnx.nodes import Node, window
from minicnn.onnx.plumbing import LARGEST, PLUMBING, floats
from minicnn.shapes import Window, size


def images(node: Node, x: Array) -> None:
    """Refuse what is no float batch of 2-D maps."""
    floats(node, X=x)
    if x.ndim != 4:
        node.fail(f"X: expected 4 axes (N, C, H, W), got shape {x.shape}")


# ---------------------------------------------------------------- convolution


def conv(node: Node, x: Array, w: Array, b: Array | None = None) -> Array:
    images(node, x)
    win = window(node, x.shape[2:], w.shape[2:])
    return ops.conv2d_forward(
        x, w, b, win.stride, win.padding, win.dilation, node.take("group", 1)
    )[0]


def conv_transpose(node: Node, x: Array, w: Array, b: Array | None = None) -> Array:
    images(node, x)
    win, extra = transposed_window(node, x.shape[2:], w.shape[2:])
    return ops.conv_transpose2d_forward(
        x, w, b, win.stride, win.padding, extra, node.take("group", 1), win.dilation
    )[0]


def transposed_window(node: Node, spatial: Any, kernel: Any) -> tuple[Window, tuple[int, int]]:
    """Take window and output_padding; a wanted output size is turned into padding."""
    auto, wanted = node.take("auto_pad", "NOTSET"), node.take("output_shape", [])
    extra = node.take("output_padding", [0, 0])
    win = window(node, spatial, kernel)
    if len(extra) != 2:
        node.wrong(f"output_padding: expected 2 numbers, got {extra}")
    if not wanted and auto.startswith("SAME"):
        wanted = [n * s for n, s in zip(spatial, win.stride)]
    if wanted:
        if len(wanted) != 2:
            node.wrong(f"output_shape: expected 2 sizes, got {wanted}")
        sides = []
        for i in range(2):
            whole = (spatial[i] - 1) * win.stride[i] + win.extent[i] + extra[i]
            total = whole - wanted[i]
            half = total // 2
            sides.append((half, total - half) if auto == "SAME_UPPER" else (total - half, half))
        # What would have to be added is output_padding, which ours adds at the end.
        extra = [e - min(0, *pair) for e, pair in zip(extra, sides)]
        rows, columns = ((max(0, a), max(0, b)) for a, b in sides)
        win = win._replace(padding=(rows, columns))
        if any(a < 0 for a, _ in sides):
            node.fail(f"output_shape: expected at most what the kernels paint, got {wanted}")
    return win, (extra[0], extra[1])


# ---------------------------------------------------------------- pooling


def _pooled(node: Node, x: Array) -> tuple[Window, tuple[int, int], tuple[int, ...]]:
    """Window, output size, and the padding (top, left, bottom, right) that the windows reach."""
    images(node, x)
    H, W = x.shape[2:]
    win = window(node, (H, W), None)
    ceil = node.take("ceil_mode", 0)
    OH, OW = win.output_size(node.label, H, W, bool(ceil))
    (top, _), (left, _) = win.padding
    reach = [
        (n - 1) * s + e - before - m
        for n, s, e, before, m in zip((OH, OW), win.stride, win.extent, (top, left), (H, W))
    ]
    if size((*x.shape[:2], top + H + max(0, reach[0]), left + W + max(0, reach[1]))) > LARGEST:
        node.fail(f"pads: expected a padded input of at most {LARGEST} elements, got {win.padding}")
    return win, (OH, OW), (top, left, *reach)


def _padded(x: Array, sides: tuple[int, ...], value: float) -> Array:
    """Pad by (top, left, bottom, right); where no window reaches, the map is cut."""
    top, left, bottom, right = sides
    x = x[:, :, : x.shape[2] + min(0, bottom), : x.shape[3] + min(0, right)]
    width = ((0, 0), (0, 0), (top, max(0, bottom)), (left, max(0, right)))
    return np.pad(x, width, constant_values=value)


def max_pool(node: Node, x: Array) -> tuple[Array, ...]:
    columns_first = node.take("storage_order", 0)
    win, _, sides = _pooled(node, x)
    H, W = x.shape[2:]
    # ONNX sets no limit to the padding, so it is laid on here.
    padded = _padded(x, sides, -np.inf)
    y, cache = ops.max_pool2d_forward(padded, win.kernel, win.stride, 0, win.dilation)
    if len(node.outputs) < 2:
        return (y,)
    h, w = np.divmod(cache.winner, padded.shape[3])
    h, w = h - sides[0], w - sides[1]
    plane = np.arange(size(x.shape[:2]), dtype=np.int64).reshape(*x.shape[:2], 1, 1) * (H * W)
    return y, plane + (w * H + h if columns_first else h * W + w)


def average_pool(node: Node, x: Array) -> Array:
    count_pad = node.take("count_include_pad", 0)
    win, _, sides = _pooled(node, x)
    counted = np.ones((1, 1, *x.shape[2:]), x.dtype)
    if count_pad:  # what ceil_mode reaches past the padding still does not count
        counted = _padded(counted, _sides(win), 1.0)
        counted = _padded(counted, (0, 0, *_rest(x, win, sides)), 0.0)
    else:
        counted = _padded(counted, sides, 0.0)
    return _window_sums(_padded(x, sides, 0.0), win) / _window_sums(counted, win)


def _sides(win: Window) -> tuple[int, int, int, int]:
    (top, bottom), (left, right) = win.padding
    return top, left, bottom, right


def _rest(x: Array, win: Window, sides: tuple[int, ...]) -> tuple[int, int]:
    """How far the windows reach past the padding at the bottom and the right; may be negative."""
    return sides[2] - win.padding[0][1], sides[3] - win.padding[1][1]


def _window_sums(x: Array, win: Window) -> Array:
    """Sum under each place of the window, by our own pooling or, dilated, our convolution."""
    if win.dilation == (1, 1):
        return ops.avg_pool2d_forward(x, win.kernel, win.stride, divisor_override=1)[0]
    C = x.shape[1]
    ones = np.ones((C, 1, *win.kernel), x.dtype)
    return ops.conv2d_forward(x, ones, None, win.stride, 0, win.dilation, C)[0]


def global_average_pool(node: Node, x: Array) -> Array:
    images(node, x)
    return ops.adaptive_avg_pool2d_forward(x, 1)[0]


def global_max_pool(node: Node, x: Array) -> Array:
    images(node, x)
    return ops.max_pool2d_forward(x, x.shape[2:])[0]


# ---------------------------------------------------------------- normalisation


def batch_norm(
    node: Node, x: Array, w: Array, b: Array, mean: Array, var: Array
) -> Array | tuple[Array, ...]:
    floats(node, X=x)
    momentum, eps = node.take("momentum", 0.9), node.take("epsilon", 1e-5)
    if node.opset < 9 and not node.take("spatial", 1):
        node.fail("spatial: expected 1, got 0")
    if node.opset < 7 and not node.take("is_test", 0):
        node.fail("is_test: expected 1, got 0")
    if not node.take("training_mode", 0):
        if len(node.outputs) > 1:
            node.fail(f"outputs: expected one in evaluation, got {len(node.outputs)}")
        return ops.batch_norm_forward(x, w, b, mean, var, False, eps=eps)[0]
    y, cache = ops.batch_norm_forward(x, w, b, training=True, eps=eps)
    # ONNX moves by 1 - momentum, towards the variance around the batch's own mean.
    batch_mean, batch_var = cache.mean, cache.rstd**-2.0 - eps
    moved = [
        (old * momentum + new * (1 - momentum)).astype(old.dtype)
        for old, new in ((mean, batch_mean), (var, batch_var))
    ]
    return (y, *moved)[: len(node.outputs)]


def layer_norm(node: Node, x: Array, w: Array, b: Array | None = None) -> Any:
    floats(node, X=x)
    axis, eps = node.take("axis", -1), node.take("epsilon", 1e-5)
    if node.take("stash_type", 1) != 1:
        node.fail("stash_type: expected 1 (statistics in float), got another type")
    shape = x.shape[axis:]
    w = np.broadcast_to(w, shape)
    b = None if b is None else np.broadcast_to(b, shape)
    y, cache = ops.layer_norm_forward(x, shape, w, b, eps)
    kept = (*x.shape[: x.ndim - len(shape)], *[1] * len(shape))
    statistics = (np.asarray(a, x.dtype).reshape(kept) for a in (cache.mean, cache.rstd))
    return (y, *statistics)[: len(node.outputs)]


def group_norm(node: Node, x: Array, w: Array, b: Array) -> Array:
    floats(node, X=x)
    groups, eps = node.take("num_groups", 0), node.take("epsilon", 1e-5)
    if node.take("stash_type", 1) != 1:
        node.fail("stash_type: expected 1 (statistics in float), got another type")
    if node.opset < 21:  # the scale was one number a group
        w, b = (np.repeat(a, x.shape[1] // max(1, groups)) for a in (w, b))
    return ops.group_norm_forward(x, groups, w, b, eps)[0]


def instance_norm(node: Node, x: Array, w: Array, b: Array) -> Array:
    floats(node, X=x)
    return ops.group_norm_forward(x, x.shape[1], w, b, node.take("epsilon", 1e-5))[0]


# ---------------------------------------------------------------- linear


def gemm(node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    floats(node, A=a, B=b, C=c)
    if node.opset < 7:
        node.take("broadcast")  # C is broadcast wherever it has to be
    alpha, beta = node.take("alpha", 1.0), node.take("beta", 1.0)
    a = a.T if node.take("transA", 0) else a
    w = b if node.take("transB", 0) else b.T  # (O, I)
    if a.ndim != 2 or w.ndim != 2:
        node.wrong(f"A, B: expected 2 axes each, got shapes {a.shape} and {b.shape}")
    bias = c is not None and alpha == beta == 1 and c.shape == w.shape[:1]
    y = ops.linear_forward(a, w, c if bias else None)[0]
    if alpha != 1:
        y = y * y.dtype.type(alpha)
    if c is not None and not bias:
        y = y + c * c.dtype.type(beta)
    return y


def matmul(node: Node, a: Array, b: Array) -> Array:
    floats(node, A=a, B=b)
    left, right = a.ndim == 1, b.ndim == 1
    a = a[None] if left else a
    b = b[:, None] if right else b
    if a.shape[-1] != b.shape[-2]:
        node.wrong(f"B: expected {a.shape[-1]} rows like A's columns, got shape {b.shape}")
    if b.ndim == 2:
        y = ops.linear_forward(a, b.T)[0]
    else:
        batch = np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
        a = np.broadcast_to(a, (*batch, *a.shape[-2:]))
        b = np.broadcast_to(b, (*batch, *b.shape[-2:]))
        y = np.empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
        for i in np.ndindex(*batch):
            y[i] = ops.linear_forward(a[i], b[i].T)[0]
    y = y[..., 0, :] if left else y
    return y[..., 0] if right else y


# ---------------------------------------------------------------- activations, losses


def _activation(forward: Callable[..., Any], **defaults: Any) -> Callable[..., Any]:
    """One of our activations, with its ONNX attributes as (our name) = (their name, default)."""

    def run(node: Node, x: Array) -> Array:
        floats(node, X=x)
        options = {ours: node.take(*theirs) for ours, theirs in defaults.items()}
        return forward(x, **options)[0]

    return run


def _along(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(node: Node, x: Array) -> Array:
        floats(node, X=x)
        if node.opset >= 13:
            return forward(x, node.take("axis", -1))[0]
        # Before opset 13 all axes from this one on counted as one.
        axis = node.take("axis", 1)
        axis += x.ndim if axis < 0 else 0
        return forward(x.reshape(size(x.shape[:axis]), -1), 1)[0].reshape(x.shape)

    return run


def swish(node: Node, x: Array) -> Array:
    floats(node, X=x)
    alpha = x.dtype.type(node.take("alpha", 1.0))
    return ops.silu_forward(x)[0] if alpha == 1 else ops.silu_forward(x * alpha)[0] / alpha


def dropout(node: Node, x: Array, ratio: Array | None = None, training: Array | None = None) -> Any:
    floats(node, X=x)
    seed = node.take("seed")
    if node.opset < 7 and not node.take("is_test", 0):
        node.fail("is_test: expected 1, got 0")
    p = node.take("ratio", 0.5) if ratio is None else float(ratio)
    on = training is not None and bool(training)
    if on and p:
        given = "the operator's own generator" if seed is None else f"seed {seed}"
        node.fail(f"training_mode: expected false (random numbers are not standard), got {given}")
    y, _ = ops.dropout_forward(x, p if not on else 0.0, training=False)
    return (y, np.ones(x.shape, bool))[: len(node.outputs)]


def nll_loss(node: Node, log_p: Array, target: Array, weight: Array | None = None) -> Array:
    floats(node, input=log_p)
    options = _loss_options(node)
    return ops.nll_loss_forward(log_p, target, weight, **options)[0]


def cross_entropy(node: Node, x: Array, target: Array, weight: Array | None = None) -> Any:
    floats(node, scores=x)
    options = _loss_options(node)
    loss = ops.cross_entropy_forward(x, target, weight, **options)[0]
    return (loss, ops.log_softmax_forward(x, 1)[0]) if len(node.outputs) > 1 else loss


def _loss_options(node: Node) -> dict[str, Any]:
    ignore = node.take("ignore_index")
    options: dict[str, Any] = {"reduction": node.take("reduction", "mean")}
    return options if ignore is None else options | {"ignore_index": ignore}


def col2im(node: Node, cols: Array, image: Array, block: Array) -> Array:
    floats(node, input=cols)
    if len(block) != 2 or len(image) != 2:
        node.fail(f"block_shape: expected 2 sizes (images are 2-D), got {block.tolist()}")
    pads = node.take("pads", [0, 0, 0, 0])
    if len(pads) != 4:
        node.wrong(f"pads: expected 4 numbers, got {pads}")
    stride, dilation = node.take("strides", [1, 1]), node.take("dilations", [1, 1])
    kernel, image = block.tolist(), image.tolist()
    N = len(cols)
    C = cols.shape[1] // max(1, math.prod(kernel))
    flat = np.moveaxis(cols, 0, 1).reshape(cols.shape[1], -1)  # (C*KH*KW, N*L)
    padding = ((pads[0], pads[2]), (pads[1], pads[3]))
    return ops.col2im(flat, (N, C, *image), kernel, stride, padding, dilation)


def lrn(node: Node, x: Array) -> Array:
    """Divide each value by a power of the squares of its neighbours among the channels."""
    images(node, x)
    alpha, beta = node.take("alpha", 1e-4), node.take("beta", 0.75)
    bias, n = node.take("bias", 1.0), node.take("size", 1)
    before = (n - 1) // 2
    N, C, H, W = x.shape
    # The channels as rows of one tall map: a sum under a window of n rows and one column.
    width = ((0, 0), (0, 0), (before, n - 1 - before), (0, 0))
    rows = np.pad((x * x).reshape(N, 1, C, H * W), width)
    total = ops.avg_pool2d_forward(rows, (n, 1), 1, divisor_override=1)[0].reshape(x.shape)
    return (x / (bias + alpha / n * total) ** beta).astype(x.dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "Conv": conv,
    "ConvTranspose": conv_transpose,
    "MaxPool": max_pool,
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalMaxPool": global_max_pool,
    "BatchNormalization": batch_norm,
    "LayerNormalization": layer_norm,
    "GroupNormalization": group_norm,
    "InstanceNormalization": instance_norm,
    "LRN": lrn,
    "Gemm": gemm,
    "MatMul": matmul,
    "Relu": _activation(ops.relu_forward),
    "LeakyRelu": _activation(ops.leaky_relu_forward, negative_slope=("alpha", 0.01)),
    "Elu": _activation(ops.elu_forward, alpha=("alpha", 1.0)),
    "Sigmoid": _activation(ops.sigmoid_forward),
    "Tanh": _activation(ops.tanh_forward),
    "Gelu": _activation(ops.gelu_forward, approximate=("approximate", "none")),
    "Softplus": _activation(ops.softplus_forward),
    "Swish": swish,
    "Softmax": _along(ops.softmax_forward),
    "LogSoftmax": _along(ops.log_softmax_forward),
    "Dropout": dropout,
    "NegativeLogLikelihoodLoss": nll_loss,
    "SoftmaxCrossEntropyLoss": cross_entropy,
    "Col2Im": col2im,
    **PLUMBING,
}
