"""What a model holds, looked up once and kept until something in it is replaced."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np

from minicnn.backend import Array, is_cupy, same
from minicnn.layers.base import Layer

KEPT = 4  # models whose contents are remembered
_kept: list[Contents] = []


class Contents:
    """What a model holds at one moment: its layers, and their arrays and random generators.

    Parameters
    ----------
    model : Layer

    Attributes
    ----------
    layers : list of Layer
        The model and all inside it; one that stands in two places twice.
    ids : tuple of int
        The identities of the layers.
    objects : list
        All that was found. What a later walk finds is the same, object by object, unless layers,
        arrays or attributes have been replaced.
    training : bool
        Whether all layers behave as in training.
    buffers : list of array
    generators : list of numpy.random.Generator
    on_gpu : bool
        Whether the first parameter is there.
    dtype : numpy.dtype or None
        That of all parameters, if they are NumPy arrays in C order and of one dtype.
    """

    def __init__(self, model: Layer) -> None:
        self.model = model
        self.layers, self.objects = _walk(model)
        self.ids = tuple(map(id, self.layers))
        self.training = all(layer.training for layer in self.layers)
        self.buffers = [a for layer in self.layers for a in layer.buffers.values()]
        self.generators = [a for a in self.objects if isinstance(a, np.random.Generator)]
        params = [p for layer in self.layers for p in layer.params.values()]
        self.on_gpu = is_cupy(next(iter(params), None))
        in_order = all(isinstance(p, np.ndarray) and p.flags.c_contiguous for p in params)
        dtypes = {p.dtype for p in params} if in_order else set()
        self.dtype = dtypes.pop() if len(dtypes) == 1 else None

    @cached_property
    def params(self) -> list[tuple[str, Array, Array]]:
        """What `Layer.named_params` yields."""
        return list(self.model.named_params())


def contents_of(model: Layer) -> Contents:
    """Return what a model holds now: the same object as before if nothing has been replaced.

    Numbers in arrays may change, and states of generators.
    """
    for contents in _kept:
        if contents.model is model and same(_walk(model)[1], contents.objects):
            return contents
    contents = Contents(model)
    others = [other for other in _kept if other.model is not model]
    # What is kept keeps its model alive, and memory on the GPU is too dear for that.
    _kept[:] = others if contents.on_gpu else [contents, *others][:KEPT]
    return contents


def _walk(model: Layer) -> tuple[list[Layer], list[Any]]:
    """Return all layers, and with them all that they hold."""
    layers = [model]
    for layer in layers:  # the list grows
        layers += layer.children().values()
    objects: list[Any] = list(layers)
    for layer in layers:
        objects += vars(layer).values()
        if layer.params:
            objects += layer.params.values()
            objects += layer.grads.values()
        if layer.buffers:
            objects += layer.buffers.values()
    return layers, objects
