"""The stages that run fused kernels, with layout LAST between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array
from minicnn.layers import BatchNorm2d, Layer, MaxPool2d, ReLU
from minicnn.ops import last
from minicnn.plan.buffers import Maps
from minicnn.plan.stages import Named, Stage


class ReLUStage(Stage):
    """ReLU by itself, in any layout."""

    def forward(self, x: Maps, training: bool) -> Maps:
        y = self.buffer("y", x.data.shape, x.data.dtype)
        last.relu(x.data, y)
        self._y = Maps(y, x.channels)
        return self._y

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        dx = self.buffer("dx", dy.data.shape, dy.data.dtype)
        last.relu_gradient(dy.data, self._y.data, dx)
        return Maps(dx, dy.channels)


class NormStage(Stage):
    """Batch-norm, and the ReLU after it in the same pass."""

    def forward(self, x: Maps, training: bool) -> Maps:
        layer = self.layers[0]
        self._came, x = x, self.last(x)
        relu = len(self.layers) == 2
        C, (N, H, W, _) = x.channels, x.data.shape
        if training or not layer.buffers:
            if N * H * W < 2 and training:
                layer.forward(self.first(x, "refused"))  # says why one pixel has no variance
            mean, var = last.moments(x.data, C)
            if training:
                layer.track(mean, var, N * H * W)
        else:
            mean, var = (
                layer.buffers[name].astype(np.float64) for name in ("running_mean", "running_var")
            )
        scale = 1 / np.sqrt(var + layer.eps)
        if layer.weight is not None:
            scale = scale * layer.weight
        bias = np.zeros(C) if layer.bias is None else layer.bias
        y = self.buffer("y", x.data.shape, x.data.dtype)
        last.normalise(x.data, mean, scale, bias, y, relu)
        self._x, self._y, self._moments = x, y if relu else None, (mean, var)
        return Maps(y, C)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        layer = self.layers[0]
        dx = self.buffer("dx", dy.data.shape, dy.data.dtype) if need_dx else None
        dw, db = last.normalise_gradient(
            self._x.data, dy.data, self._y, *self._moments, layer.eps, layer.weight, dx
        )
        for name, g in (("weight", dw), ("bias", db)):
            if name in layer.grads:
                layer.grads[name][...] = g
        return None if dx is None else self.like(self._came, Maps(dx, dy.channels))


class PoolStage(Stage):
    """Max-pool by itself."""

    @staticmethod
    def takes(layer: Layer) -> bool:
        """Tell whether the kernels run this layer: the number of the winning tap is one byte."""
        win = layer.window()
        return (
            win.dilation == (1, 1)
            and not layer.options["ceil_mode"]
            and win.kernel[0] * win.kernel[1] <= 255
        )

    def forward(self, x: Maps, training: bool) -> Maps:
        self._came, x = x, self.last(x)
        win = self.layers[0].window()
        N, H, W, P = x.data.shape
        shape = (N, *win.output_size("max_pool2d", H, W), P)
        y = self.buffer("y", shape, x.data.dtype)
        self._winner = self.buffer("winner", shape, np.uint8) if training else None
        self._x_shape = x.data.shape
        last.max_pool(x.data, win, y, self._winner)
        return Maps(y, x.channels)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        if not need_dx:
            return None
        dx = self.buffer("dx", self._x_shape, dy.data.dtype)
        last.max_pool_gradient(dy.data, self._winner, self.layers[0].window(), dx)
        return self.like(self._came, Maps(dx, dy.channels))


class MeanStage(Stage):
    """The mean over each map: AdaptiveAvgPool2d(1)."""

    def forward(self, x: Maps, training: bool) -> Maps:
        self._came, x = x, self.last(x)
        N, _, _, P = self._x_shape = x.data.shape
        y = self.buffer("y", (N, 1, 1, P), x.data.dtype)
        last.mean(x.data, y)
        return Maps(y, x.channels)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        if not need_dx:
            return None
        dx = self.buffer("dx", self._x_shape, dy.data.dtype)
        last.mean_gradient(dy.data, dx)
        return self.like(self._came, Maps(dx, dy.channels))


class ResidualStage(Stage):
    """``body(x) + shortcut(x)``, and the ReLU after it in the same pass."""

    def __init__(self, named: Sequence[Named], body: list[Stage], shortcut: list[Stage]) -> None:
        super().__init__(named)
        self.body, self.shortcut = body, shortcut

    def walk(self) -> Iterator[Stage]:
        for stage in (*self.body, *self.shortcut):
            yield from stage.walk()
        yield self

    def forward(self, x: Maps, training: bool) -> Maps:
        self._came = x
        a, b = self.last(x), x
        for stage in self.body:
            a = stage.forward(a, training)
        b = self.last(x)
        for stage in self.shortcut:
            b = stage.forward(b, training)
        a, b = self.last(a, "body"), self.last(b, "shortcut")
        y = self.buffer("y", a.data.shape, a.data.dtype)
        relu = len(self.layers) == 2
        last.add_maps(a.data, b.data, y, relu)
        self._y = y if relu else None
        return Maps(y, a.channels)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        if self._y is not None:
            masked = self.buffer("dy", dy.data.shape, dy.data.dtype)
            last.relu_gradient(dy.data, self._y, masked)
            dy = Maps(masked, dy.channels)
        dx = self._back(self.body, dy, need_dx)
        other = self._back(self.shortcut, dy, need_dx) if self.shortcut else dy
        if not need_dx:
            return None
        last.add_maps(dx.data, other.data, dx.data)
        return self.like(self._came, dx)

    def _back(self, stages: list[Stage], dy: Maps, need_dx: bool) -> Maps | None:
        for i in reversed(range(len(stages))):
            dy = stages[i].backward(dy, need_dx or i > 0)
        return dy


class ConvStage(Stage):
    """Convolution, and in the same pass over its output the ReLU and max-pool after it."""

    def __init__(self, named: Sequence[Named], winograd: bool) -> None:
        super().__init__(named)
        self.winograd = winograd

    def forward(self, x: Maps, training: bool) -> Maps:
        layer, rest = self.layers[0], self.layers[1:]
        self._came = x
        self._caches = []
        data = self.first(x)
        for layer in self.layers:
            data, cache = layer.forward(data)
            self._caches.append(cache)
        return self.last(Maps(data))

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        data = self.first(dy, "dy")
        self.layers[0].zero_grad()
        for layer, cache in zip(reversed(self.layers), reversed(self._caches)):
            data = layer.backward(data, cache)
        return self.like(self._came, Maps(data))

    @staticmethod
    def takes(layer: Layer) -> bool:
        return True

    @staticmethod
    def takes_pool(layer: Layer) -> bool:
        win = layer.window()
        return (
            PoolStage.takes(layer) and win.stride == win.kernel and win.padding == ((0, 0), (0, 0))
        )


class LinearStage(Stage):
    """Linear, with a Flatten before it and a ReLU after it."""

    @staticmethod
    def takes_flatten(layer: Layer) -> bool:
        return (layer.options["start_dim"], layer.options["end_dim"]) == (1, -1)

    def forward(self, x: Maps, training: bool) -> Maps:
        self._came, self._caches = x, []
        data = self.first(x)
        for layer in self.layers:
            data, cache = layer.forward(data)
            self._caches.append(cache)
        return Maps(data)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        data = dy.data
        for layer in self.layers:
            layer.zero_grad()
        for layer, cache in zip(reversed(self.layers), reversed(self._caches)):
            data = layer.backward(data, cache)
        return self.like(self._came, Maps(data))
