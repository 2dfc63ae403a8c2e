"""The stages of a plan: each runs one layer, or a few in one go, forward and backward.

A stage keeps what its backward needs from its latest forward, in buffers of its own. It adds
nothing to the mathematics: what it computes is what its layers compute one after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import numpy as np

from minicnn.backend import Array
from minicnn.plan.buffers import Buffers, Maps

Named = tuple[str, Any]  # a layer and its name; Any, as each stage knows which kind it takes


class Stage:
    """One step of a plan.

    Parameters
    ----------
    named : sequence of (str, Layer)
        The layers that it runs, with their names in the model.

    Attributes
    ----------
    how : str
        The kernels that run them.
    """

    how = "numba"

    def __init__(self, named: Sequence[Named]) -> None:
        self.named = list(named)
        self.layers = [layer for _, layer in named]
        self.buffers = Buffers()
        self._calls: dict[str, tuple[Array, dict[str, Any], Any]] = {}
        self._latest: Any = None  # of the calls: the one that ran last
        # The latest forward and backward: what they were given, their kernel and their result.
        self._forward: tuple[tuple[Any, ...], Any, Any] | None = None
        self._backward: tuple[tuple[Any, ...], Any, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Kernels cannot be pickled, and are made again.
        return {**vars(self), "_calls": {}, "_latest": None, "_forward": None, "_backward": None}

    @property
    def what(self) -> str:
        """The kinds of the layers, in order."""
        return " + ".join(type(layer).__name__ for layer in self.layers)

    def walk(self) -> Iterator[Stage]:
        """Yield the stages inside this one, and itself."""
        yield self

    def forward(self, x: Maps, training: bool, contents: object = None) -> Maps:
        """Return the output, which is valid until the next forward.

        With `contents`, an object that stays the same as long as nothing in the model is replaced,
        a forward like the one before is its kernel alone.
        """
        given = x.data, training, contents
        if (kept := self._forward) is not None and all(map(is_, kept[0], given)):
            kept[1]()
            return kept[2]
        self._forward = self._backward = None
        y = self.prepare(x, training)
        self.compute(training)
        if contents is not None and self.one_kernel:
            self._forward = given, self._latest, y
        return y

    def backward_again(self, dy: Maps, need_dx: bool, contents: object) -> Maps | None:
        """Do what `backward` does, by its kernel alone where all is as it was: see `forward`."""
        given = dy.data, need_dx, contents
        if (kept := self._backward) is not None and all(map(is_, kept[0], given)):
            kept[1]()
            return kept[2]
        dx = self.backward(dy, need_dx)
        if contents is not None and self.one_kernel_back:
            self._backward = given, self._latest, dx
        return dx

    @property
    def one_kernel(self) -> bool:
        """Whether all that the latest `compute` did was one `run`."""
        return False

    @property
    def one_kernel_back(self) -> bool:
        """Whether all that the latest `backward` did was one `run`."""
        return False

    def prepare(self, x: Maps, training: bool) -> Maps:
        """Take the input and return the output with its contents yet to be computed.

        `backward` can run after it, on whatever numbers are in the buffers: see `ahead`.
        """
        raise NotImplementedError

    def compute(self, training: bool) -> None:
        """Run the kernels of the forward."""
        raise NotImplementedError

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        """Write the gradients of the parameters; return that of the input if it is needed.

        `dy` has the layout of the output, and the result that of the input.
        """
        raise NotImplementedError

    def buffer(self, name: str, shape: tuple[int, ...], dtype: Any) -> Array:
        """Return an array of this stage, kept from call to call."""
        return self.buffers.get(name, shape, dtype)

    def run(self, name: str, make: Callable[..., Any], x: Array, **rest: Any) -> Any:
        """Return ``make(x=x, **rest)()``, and keep what was made for the next time.

        It is made anew if an array of the rest is another one, or anything else has changed. The
        input `x` may be another array of the same shape.
        """
        kept = self._calls.get(name)
        if kept is None or not _alike(kept[1], rest) or not _fits(x, kept[0]):
            call = make(x=x, **rest)
        else:
            call = kept[2]
            if x is not kept[0]:
                call.on(x)
        self._calls[name] = x, rest, call
        self._latest = call
        return call()

    def first(self, x: Maps, name: str = "first") -> Array:
        """Return the data in layout FIRST."""
        if not x.last:
            return x.data
        from minicnn.ops import last  # imports Numba: only on the fast path

        N, H, W, _ = x.data.shape
        out = self.buffer(name, (N, x.channels, H, W), x.data.dtype)
        last.to_first(x.data, out)
        return out

    def last(self, x: Maps, name: str = "last") -> Maps:
        """Return the data in layout LAST."""
        if x.last:
            return x
        from minicnn.ops import last

        N, C, H, W = x.data.shape
        out = self.buffer(name, (N, H, W, last.padded(C, x.data.dtype)), x.data.dtype)
        last.to_last(x.data, out)
        return Maps(out, C)

    def like(self, x: Maps, a: Maps) -> Maps:
        """Return `a` in the layout of `x`."""
        return self.last(a, "like") if x.last else Maps(self.first(a, "like"))


def _alike(these: dict[str, Any], those: dict[str, Any]) -> bool:
    """Tell whether all arrays are the same ones, and all else is equal."""
    if all(map(is_, these.values(), those.values())):
        return True
    for a, b in zip(these.values(), those.values()):
        if a is not b and (isinstance(a, np.ndarray) or isinstance(b, np.ndarray) or a != b):
            return False
    return True


def _fits(x: Array, then: Array) -> bool:
    return x is then or (x.shape == then.shape and x.dtype == then.dtype)


class PlainStage(Stage):
    """A layer as it is, op by op, in layout FIRST."""

    how = "one op at a time"

    def prepare(self, x: Maps, training: bool) -> Maps:
        (layer,) = self.layers
        data = self.first(x)
        if not training:
            return Maps(layer(data))
        y, self._cache = layer.forward(data)
        self._x = x
        return Maps(y)

    def compute(self, training: bool) -> None:
        """Nothing is left to do: a layer makes its own output."""

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        (layer,) = self.layers
        layer.zero_grad()
        dx = layer.backward(self.first(dy, "dy"), self._cache)
        self._cache = None
        return self.like(self._x, Maps(dx)) if need_dx else None
