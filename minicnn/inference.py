"""Inference over many samples, and where and how a model runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from minicnn import plan
from minicnn.backend import Array, array_module, is_cupy
from minicnn.layers import Layer
from minicnn.layers.contents import Contents, contents_of
from minicnn.shapes import integer


def predict(
    model: Layer, x: Array, batch_size: int = 256, fused: bool = True, winograd: bool = True
) -> Array:
    """Run a model over many samples, in batches.

    Parameters
    ----------
    model : Layer
    x : array, shape (N, ...)
    batch_size : int
    fused, winograd : bool
        As for `Trainer`.

    Returns
    -------
    array, shape (N, ...)
        Outputs in evaluation mode: logits for the reference network.

    Raises
    ------
    TypeError
        If `model` is no layer or `x` no array.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"predict: model: expected a Layer, got {type(model).__name__}")
    check_arrays("predict", x=x)
    step = integer("predict", "batch_size", batch_size, 1)
    y: Array = None
    with np.errstate(all="ignore"):
        for i in range(0, max(len(x), 1), step):
            some = x[i : i + step]
            with running(contents_of(model), some, fused, winograd) as plan:
                part = plan.forward(some, training=False)
                if y is None:
                    y = array_module(part).empty((len(x), *part.shape[1:]), part.dtype)
                y[i : i + step] = part
    return y


def check_arrays(op: str, **arrays: Any) -> None:
    """Raise TypeError for what is no array with a first axis."""
    for name, a in arrays.items():
        if not getattr(a, "shape", ()):
            raise TypeError(f"{op}: {name}: expected an array of samples, got {type(a).__name__}")


def running(
    contents: Contents, x: Array, fused: bool, winograd: bool
) -> AbstractContextManager[Any]:
    """Lend the plan that runs a model on `x`: the GPU's if either is there, else the CPU's."""
    if contents.on_gpu or is_cupy(x):
        from minicnn.gpu.plan import GpuPlan

        return nullcontext(GpuPlan(contents.model, fused))
    return plan.running(contents, x, fused, winograd)
