"""Which pixels a network looks at: saliency, Grad-CAM and occlusion, as arrays.

All three ask for one class, the predicted one if none is named, run the model as in evaluation,
and leave its gradients as they were.

References
----------
K. Simonyan, A. Vedaldi, A. Zisserman, "Deep Inside Convolutional Networks", 2013,
arXiv:1312.6034 (saliency). R. Selvaraju et al., "Grad-CAM", ICCV 2017. M. Zeiler, R. Fergus,
"Visualizing and Understanding Convolutional Networks", ECCV 2014 (occlusion).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from minicnn.backend import Array, as_numpy
from minicnn.layers import Conv2d, Layer, ReLU, Sequential
from minicnn.ops import softmax_forward
from minicnn.shapes import check_ndim, integer


def layer_outputs(model: Layer, x: Array, name: str = "") -> Iterator[tuple[str, Layer, Array]]:
    """Yield (name, layer, output) along a network as in evaluation; sequences are gone into."""
    if not isinstance(model, Sequential):
        yield name, model, model(x)
        return
    for key, layer in model.children().items():
        part = f"{name}.{key}" if name else key
        for found in layer_outputs(layer, x, part):
            yield found
            x = found[2]


def saliency(model: Layer, x: Array, target: Any = None) -> np.ndarray:
    """How much the score of a class moves with each pixel: ``max over channels |d score / dx|``.

    Parameters
    ----------
    model : Layer
        Maps (N, C, H, W) to scores (N, K).
    x : array, shape (N, C, H, W)
    target : int or array of int, shape (N,), optional
        The class; the predicted one if left out.

    Returns
    -------
    numpy.ndarray, shape (N, H, W)
    """
    check_ndim("saliency", "x", x, "(N, C, H, W)")
    with undisturbed(model):
        scores, caches = model.forward(x)
        dx = model.backward(_one_hot("saliency", scores, target), caches)
    return np.abs(as_numpy(dx)).max(axis=1)


def grad_cam(model: Sequential, x: Array, target: Any = None, layer: int | None = None) -> Array:
    """Where the maps of a layer speak for a class: ``relu(sum over k of a[k] * maps[k])``.

    The weight a[k] is the mean over the map of the score's gradient.

    Parameters
    ----------
    model : Sequential
        Maps (N, C, H, W) to scores (N, K).
    x : array, shape (N, C, H, W)
    target : int or array of int, shape (N,), optional
        The class; the predicted one if left out.
    layer : int, optional
        Index of a layer whose output has maps; the last convolution, with the ReLU behind it, if
        left out.

    Returns
    -------
    numpy.ndarray, shape (N, h, w)
        Of the size of that layer's maps, not negative.

    Raises
    ------
    ValueError
        If there is no convolution in the sequence, or the layer's output has no maps.
    """
    check_ndim("grad_cam", "x", x, "(N, C, H, W)")
    layer = last_maps(model) if layer is None else layer
    with undisturbed(model):
        maps = model[: layer + 1](x)
        if maps.ndim != 4:
            raise ValueError(
                f"grad_cam: layer: expected one with maps (N, C, H, W), got layer {layer} with "
                f"output {maps.shape}"
            )
        tail = model[layer + 1 :]
        scores, caches = tail.forward(maps)
        dmaps = tail.backward(_one_hot("grad_cam", scores, target), caches)
    weights = dmaps.mean(axis=(2, 3), keepdims=True)  # (N, C, 1, 1)
    return np.maximum(as_numpy((weights * maps).sum(axis=1)), 0)  # (N, h, w)


def occlusion(
    model: Layer, x: Array, target: Any = None, patch: int = 5, stride: int = 1, value: float = 0.0
) -> np.ndarray:
    """How far the probability of a class falls when a patch of the picture is covered.

    Parameters
    ----------
    model : Layer
        Maps (N, C, H, W) to scores (N, K).
    x : array, shape (N, C, H, W)
    target : int or array of int, shape (N,), optional
        The class; the predicted one if left out.
    patch, stride : int
        Side of the square, and how far it moves.
    value : float
        What it is filled with.

    Returns
    -------
    numpy.ndarray, shape (N, H, W)
        For each pixel the mean fall over the patches that cover it; NaN where there is none.
    """
    check_ndim("occlusion", "x", x, "(N, C, H, W)")
    patch, stride = (
        integer("occlusion", n, v, 1) for n, v in (("patch", patch), ("stride", stride))
    )
    N, _, H, W = x.shape
    scores = model(x)
    hot = np.asarray(as_numpy(_one_hot("occlusion", scores, target)))
    before = (_probabilities(scores) * hot).sum(axis=1)  # (N,)
    fall, count = np.zeros((N, H, W)), np.zeros((H, W))
    for i in range(0, max(H - patch, 0) + 1, stride):
        for j in range(0, max(W - patch, 0) + 1, stride):
            covered = x.copy()
            covered[:, :, i : i + patch, j : j + patch] = value
            after = (_probabilities(model(covered)) * hot).sum(axis=1)
            fall[:, i : i + patch, j : j + patch] += (before - after)[:, None, None]
            count[i : i + patch, j : j + patch] += 1
    with np.errstate(invalid="ignore"):
        return fall / count


@contextmanager
def undisturbed(model: Layer) -> Iterator[None]:
    """Run a model as in evaluation, and put modes and gradients back afterwards."""
    modes = [(layer, layer.training) for _, layer in model.modules()]
    grads = [(g, g.copy()) for _, _, g in model.named_params()]
    try:
        model.eval()
        yield
    finally:
        for layer, training in modes:
            layer.training = training
        for g, value in grads:
            g[...] = value


def _one_hot(op: str, scores: Array, target: Any) -> Array:
    """1 at the class of each row: the gradient of its score."""
    check_ndim(op, "model's output", scores, "(N, K)")
    N, K = scores.shape
    target = scores.argmax(axis=1) if target is None else target
    target = np.broadcast_to(as_numpy(target), (N,))
    if ((target < 0) | (target >= K)).any():
        raise ValueError(f"{op}: target: expected classes 0 to {K - 1}, got {target}")
    hot = scores * 0
    hot[np.arange(N), target] = 1
    return hot


def _probabilities(scores: Array) -> np.ndarray:
    return np.asarray(as_numpy(softmax_forward(scores)[0]), np.float64)


def last_maps(model: Sequential) -> int:
    """Index of the last convolution, or of the ReLU right behind it."""
    found = [i for i, layer in enumerate(model) if isinstance(layer, Conv2d)]
    if not found:
        raise ValueError("grad_cam: model: expected a Conv2d in the sequence (fix: name a layer)")
    follows = found[-1] + 1 < len(model) and isinstance(model[found[-1] + 1], ReLU)
    return found[-1] + follows
