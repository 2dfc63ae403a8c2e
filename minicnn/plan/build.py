"""Which layers run together: the stages of a model."""

from __future__ import annotations

from collections import Counter
from typing import Any

from minicnn.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from minicnn.plan.fused import (
    ConvStage,
    LinearStage,
    MeanStage,
    NormStage,
    PoolStage,
    ReLUStage,
    ResidualStage,
)
from minicnn.plan.stages import Named, PlainStage, Stage

MAPS = ConvStage, NormStage, ReLUStage, PoolStage, MeanStage, ResidualStage  # maps to maps


def stages_of(model: Any, winograd: bool) -> list[Stage]:
    """Return the stages of a model; one for all where a layer stands in two places."""
    if max(Counter(id(layer) for _, layer in model.modules()).values()) > 1:
        return [PlainStage([("", model)])]  # the others write gradients and do not add to them
    return _stages("", model, winograd)


def _stages(name: str, model: Any, winograd: bool) -> list[Stage]:
    rest, stages = _inline(name, model), []
    while rest:
        stage = _first_stage(rest, winograd)
        stages.append(stage)
        del rest[: len(stage.named)]
    return stages


def _inline(name: str, layer: Any) -> list[Named]:
    """List the layers that run one after the other, those of inner Sequentials in their place."""
    if type(layer) is not Sequential:
        return [(name, layer)]
    return [
        inner
        for key, child in layer.children().items()
        for inner in _inline(_join(name, key), child)
    ]


def _first_stage(rest: list[Named], winograd: bool) -> Stage:
    """Make the stage that takes the most layers from the front of the list."""
    # The exact types count: a subclass may have a forward of its own.
    first, second, third = ([type(layer) for _, layer in rest[:3]] + [None, None])[:3]
    layer, relu = rest[0][1], second is ReLU
    if first is Conv2d and ConvStage.takes(layer):
        pool = (third if relu else second) is MaxPool2d and ConvStage.takes_pool(rest[1 + relu][1])
        return ConvStage(rest[: 1 + relu + pool], winograd)
    if first is BatchNorm2d:
        return NormStage(rest[: 1 + relu])
    if first is Residual:
        name = rest[0][0]
        body, shortcut = (
            _stages(_join(name, key), child, winograd) if child else []
            for key, child in (("body", layer.body), ("shortcut", layer.shortcut))
        )
        if all(isinstance(stage, MAPS) for stage in (*body, *shortcut)):
            return ResidualStage(rest[: 1 + relu], body, shortcut)
    if first is Flatten and second is Linear and LinearStage.takes_flatten(layer):
        return LinearStage(rest[: 2 + (third is ReLU)])
    if first is Linear:
        return LinearStage(rest[: 1 + relu])
    if first is MaxPool2d and PoolStage.takes(layer):
        return PoolStage(rest[:1])
    if first is AdaptiveAvgPool2d and layer.options["output_size"] in (1, (1, 1)):
        return MeanStage(rest[:1])
    if first is ReLU:
        return ReLUStage(rest[:1])
    return PlainStage(rest[:1])


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
