"""How a model runs in `Trainer` and `predict`: a list of stages.

On the fast path a stage is one or more layers that fused Numba kernels run in one go, with the
channels next to each other in memory and in buffers kept from call to call. It computes what the
layers compute one after the other, up to rounding; tests hold it to them. Off the fast path there
is one stage, the model as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from threading import RLock
from typing import Any

import numpy as np

from minicnn import backend
from minicnn.backend import Array
from minicnn.layers import Layer
from minicnn.layers.contents import Contents, contents_of
from minicnn.plan import ahead
from minicnn.plan.buffers import Maps
from minicnn.plan.stages import PlainStage, Stage


class Plan:
    """The stages of a model; print it to see what was fused and which kernels run.

    Parameters
    ----------
    model : Layer
    fused, winograd : bool
        See `Trainer`.

    Attributes
    ----------
    stages : list of Stage
    lock : threading.RLock
        A plan holds buffers: one thread at a time runs it, and what a call returns is valid until
        the next one. Parameters and gradients are the model's own arrays.

    Examples
    --------
    >>> from minicnn import models
    >>> print(Plan(models.mnist_cnn(rng=0), fused=False))
    layers   runs        with
    (model)  Sequential  one op at a time
    """

    def __init__(self, model: Layer, fused: bool = True, winograd: bool = True) -> None:
        self.stages: list[Stage] = [PlainStage([("", model)])]
        if fused:
            from minicnn.plan.build import stages_of  # imports Numba

            self.stages = stages_of(model, winograd)
        self.fused, self.lock = fused, RLock()
        self._model = model
        self._loss = Stage([])
        self._seen: set[tuple[Any, ...]] = set()
        # Layers without kernels of their own are there: they may call BLAS.
        self.plain = any(isinstance(stage, PlainStage) for stage in self._walk())
        self.contents: Contents | None = None  # that of the model, while `running` lends the plan

    def forward(self, x: Array, training: bool) -> Array:
        """Return the model's output, and keep what `backward` needs if `training`.

        Raises
        ------
        ValueError, TypeError
            As the layers do for an input that does not fit them.
        """
        if not self.fused or (training, x.shape[1:]) in self._seen:
            return self._forward(x, training)
        with backend.prefer("numpy"):  # without compiling
            self._model(x[:1])  # the layers' own checks and messages
        with ahead.helped(self.stages, Maps(x)) if training else nullcontext():
            outputs = self._forward(x, training)
        self._seen.add((training, x.shape[1:]))
        return outputs

    def _forward(self, x: Array, training: bool) -> Array:
        maps = Maps(x)
        for stage in self.stages:
            maps = stage.forward(maps, training, self.contents)
        return self.stages[-1].first(maps)

    def backward(self, dy: Array) -> None:
        """Write the gradients of all parameters, in place of what was there."""
        ahead.wait()
        maps: Any = Maps(dy)
        for i in reversed(range(len(self.stages))):
            maps = self.stages[i].backward_again(maps, i > 0, self.contents)

    def cross_entropy(self, outputs: Array, labels: Array) -> tuple[float, Callable[[], Array]]:
        """Return the mean cross-entropy of scores (N, C), and a function that gives its gradient.

        `labels` are (N,) int64 from 0 to C - 1, and N is not 0.
        """
        from minicnn.ops import cross_entropy_numba

        gradient = self._loss.buffer("gradient", outputs.shape, outputs.dtype)
        kept = self._loss.buffer("labels", labels.shape, labels.dtype)
        kept[...] = labels
        make = cross_entropy_numba.loss_with_gradient
        loss = self._loss.run("loss", make, outputs, labels=kept, dx=gradient)
        return float(outputs.dtype.type(loss)), lambda: gradient

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers held."""
        return sum(stage.buffers.nbytes for stage in self._walk())

    def _walk(self) -> Iterator[Stage]:
        for stage in self.stages:
            yield from stage.walk()

    def __str__(self) -> str:
        rows = [("layers", "runs", "with")]
        for stage in self._walk():
            names = ", ".join(name or "(model)" for name, _ in stage.named)
            rows.append((names, stage.what, stage.how))
        wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
        return "\n".join(f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows)


def plan_of(model: Layer, fused: bool = True, winograd: bool = True) -> Plan:
    """Return the plan of a model: the one made before, unless its layers have changed."""
    return _plan(model, contents_of(model).ids, fused, winograd)


@lru_cache(maxsize=4)  # a plan keeps its model and its buffers alive
def _plan(model: Layer, layers: tuple[int, ...], fused: bool, winograd: bool) -> Plan:
    return Plan(model, fused, winograd)


@contextmanager
def running(contents: Contents, x: Array, fused: bool, winograd: bool) -> Iterator[Plan]:
    """Lend the plan that runs a model on `x`, to one thread at a time.

    The fast path takes NumPy arrays of the parameters' dtype, unless `use` has chosen a version
    other than those of its kernels. It runs the layers without kernels of their own as if
    ``prefer("numba")`` had been said.
    """
    version = backend.chosen()
    fused = fused and version in (None, "numba", "winograd") and _fits(contents, x)
    plan = _plan(contents.model, contents.ids, fused, winograd and version != "numba")
    preferred = backend.prefer("numba", blas=plan.plain)
    with plan.lock, _kernels() if fused else nullcontext(), preferred:
        before, plan.contents = plan.contents, contents
        try:
            yield plan
        finally:
            plan.contents = before


def _kernels() -> Any:
    """Return the lock of all kernels: not every threading layer of Numba takes two callers."""
    from minicnn.ops.jit import lock

    return lock


def _fits(contents: Contents, x: Array) -> bool:
    return (
        contents.dtype is not None
        and isinstance(x, np.ndarray)
        and x.dtype == contents.dtype
        and x.flags.c_contiguous
        and x.size > 0
    )
