"""A batch that is too large for the GPU's memory, taken in parts that add up to the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from minicnn.backend import Array, array_module
from minicnn.gpu import memory
from minicnn.gpu.plan import GpuPlan
from minicnn.layers import BatchNorm2d
from minicnn.progress import count_labels

if TYPE_CHECKING:
    from minicnn.train import Trainer

T = TypeVar("T")


def within_memory(op: str, samples: int, run: Callable[[int], T], start: int, fix: str) -> T:
    """Return ``run(size)`` for the largest size that fits, halved from `start` on.

    Raises
    ------
    MemoryError
        If even one sample at a time does not fit.
    """
    size, freed = start, False
    while True:
        try:
            return run(size)
        except MemoryError as error:
            if not memory.is_out_of_memory(error):
                raise
            # The frames that it came through hold arrays, which are to be freed.
            problem = error.with_traceback(None)
        memory.free()
        if freed:  # else the same once more: the pool may have been full of what nobody uses
            size = memory.smaller(op, samples, size, fix, problem)
        freed = True


def gradients(trainer: Trainer, plan: GpuPlan, x: Array, y: Array) -> tuple[float, Array]:
    """Run forward and backward of a step; return the loss and the outputs.

    If the batch does not fit into memory, it is taken in parts whose gradients add up to the
    gradient of the whole, where that is so.
    """
    generators = [rng.bit_generator for _, rng in trainer.model.named_generators()]
    states = [generator.state for generator in generators]
    why = _why_whole(trainer)

    def run(size: int) -> tuple[float, Array]:
        for generator, state in zip(generators, states):
            generator.state = state
        try:
            return _in_parts(trainer, plan, x, y, size)
        except MemoryError as error:
            plan.drop()
            if why and memory.is_out_of_memory(error):
                raise memory.refusal("Trainer.step", len(x), why, error) from error
            raise

    fix = "a smaller network or smaller pictures"
    return within_memory("Trainer.step", len(x), run, min(trainer.part or len(x), len(x)), fix)


def _in_parts(
    trainer: Trainer, plan: GpuPlan, x: Array, y: Array, size: int
) -> tuple[float, Array]:
    trainer.model.zero_grad()
    forward, backward = trainer.loss
    whole = len(x) <= size
    total = 1 if whole else count_labels(y)
    loss, outputs = 0.0, []
    for i in range(0, len(x), size):
        part, labels = x[i : i + size], y[i : i + size]
        out = plan.forward(part, training=True)
        share = 1.0 if whole else count_labels(labels) / total
        if share:
            value, cache = forward(out, labels)
            loss += share * float(value)
            plan.accumulate(backward(array_module(value).ones_like(value) * share, cache))
        outputs.append(out)
    plan.drop()
    if not whole:
        trainer.part = size  # later steps need not try in vain
    return loss, outputs[0] if whole else array_module(x).concatenate(outputs)


def _why_whole(trainer: Trainer) -> str:
    """Say why a batch cannot be taken in parts; "" if it can."""
    layers = [layer for _, layer in trainer.model.modules()]
    if any(isinstance(layer, BatchNorm2d) for layer in layers):
        return "BatchNorm2d needs the statistics of the whole batch"
    rngs = [id(rng) for _, rng in trainer.model.named_generators()]
    if len(set(rngs)) < len(rngs):
        return "two layers draw from one random generator, in turns"
    if not _is_mean(trainer.loss):
        return "the loss is not known to be a mean over the samples"
    return ""


def _is_mean(loss: tuple[Any, Any]) -> bool:
    from minicnn.train import LOSSES

    return _without(loss, "label_smoothing") in LOSSES.values()


def is_plain_cross_entropy(loss: tuple[Any, Any]) -> bool:
    """Tell whether a trainer's loss is the mean cross-entropy of labels, without smoothing."""
    from minicnn.train import LOSSES

    smoothing = getattr(loss[0], "keywords", {}).get("label_smoothing", 0)
    return smoothing == 0 and _without(loss, "label_smoothing") == LOSSES["cross_entropy"]


def _without(loss: tuple[Any, Any], option: str) -> tuple[Any, Any]:
    """Return the pair of functions that an `option` and no other has been given to, if one has."""
    forward, backward = loss
    bound = isinstance(forward, partial) and not forward.args and set(forward.keywords) <= {option}
    return forward.func if bound else forward, backward
