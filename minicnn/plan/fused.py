"""The stages that run fused kernels, with layout LAST between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array
from minicnn.layers import Flatten, Linear, MaxPool2d, ReLU
from minicnn.ops import conv2d_channels, conv2d_winograd, conv_block_numba, last, linear_numba
from minicnn.ops.conv2d_channels import Layouts
from minicnn.ops.conv2d_maps import Geometry, round_up
from minicnn.ops.vector import lanes
from minicnn.plan.buffers import Maps
from minicnn.plan.stages import Named, Stage
from minicnn.shapes import window

WINOGRAD_PIXELS = 1024  # of the output, from which transforming the filters pays


class ReLUStage(Stage):
    """ReLU by itself, in any layout."""

    def prepare(self, x: Maps, training: bool) -> Maps:
        y = self.buffer("y", x.data.shape, x.data.dtype)
        self._x, self._y = x.data, y
        return Maps(y, x.channels)

    def compute(self, training: bool) -> None:
        last.relu(self._x, self._y)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        dx = self.buffer("dx", dy.data.shape, dy.data.dtype)
        last.relu_gradient(dy.data, self._y, dx)
        return Maps(dx, dy.channels)


class NormStage(Stage):
    """Batch-norm, and the ReLU after it in the same pass."""

    def prepare(self, x: Maps, training: bool) -> Maps:
        self._came, x = x, self.last(x)
        N, H, W, _ = x.data.shape
        if training and N * H * W < 2:
            self.layers[0].forward(self.first(x, "refused"))  # says why one pixel has no variance
        self._x, self._y = x, self.buffer("y", x.data.shape, x.data.dtype)
        self._by, self._var = last.factors(x.data, [], [], []), np.ones(x.channels)
        return Maps(self._y, x.channels)

    @property
    def relu(self) -> bool:
        return len(self.layers) == 2

    @property
    def x(self) -> Array:
        return self._x.data

    def compute(self, training: bool) -> None:
        last.normalise(self._x.data, self.factors(training), self._y, self.relu)

    def factors(self, training: bool) -> Array:
        """Return mean, scale and bias of each channel, for `last.normalise`."""
        layer, x = self.layers[0], self._x
        C, (N, H, W, _) = x.channels, x.data.shape
        if training or not layer.buffers:
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
        self._by, self._var = last.factors(x.data, mean, scale, bias), var
        return self._by

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        layer = self.layers[0]
        dx = self.buffer("dx", dy.data.shape, dy.data.dtype) if need_dx else None
        dw, db = last.normalise_gradient(
            self._x.data, dy.data, self._by, self.relu, self._var, layer.eps, layer.weight, dx
        )
        for name, g in (("weight", dw), ("bias", db)):
            if name in layer.grads:
                layer.grads[name][...] = g
        return None if dx is None else self.like(self._came, Maps(dx, dy.channels))


class PoolStage(Stage):
    """Max-pool by itself."""

    @staticmethod
    def takes(layer: Any) -> bool:
        """Tell whether the kernels run this layer: the number of the winning tap is one byte."""
        win = layer.window()
        return (
            win.dilation == (1, 1)
            and not layer.options["ceil_mode"]
            and win.kernel[0] * win.kernel[1] <= 255
        )

    def prepare(self, x: Maps, training: bool) -> Maps:
        self._came, x = x, self.last(x)
        N, H, W, P = x.data.shape
        shape = (N, *self.layers[0].window().output_size("max_pool2d", H, W), P)
        self._x, self._y = x.data, self.buffer("y", shape, x.data.dtype)
        self._winner = self.buffer("winner", shape, np.uint8) if training else None
        return Maps(self._y, x.channels)

    def compute(self, training: bool) -> None:
        last.max_pool(self._x, self.layers[0].window(), self._y, self._winner)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        if not need_dx:
            return None
        dx = self.buffer("dx", self._x.shape, dy.data.dtype)
        last.max_pool_gradient(dy.data, self._winner, self.layers[0].window(), dx)
        return self.like(self._came, Maps(dx, dy.channels))


class MeanStage(Stage):
    """The mean over each map: AdaptiveAvgPool2d(1)."""

    def prepare(self, x: Maps, training: bool) -> Maps:
        self._came, x = x, self.last(x)
        N, _, _, P = x.data.shape
        self._x, self._y = x.data, self.buffer("y", (N, 1, 1, P), x.data.dtype)
        return Maps(self._y, x.channels)

    def compute(self, training: bool) -> None:
        last.mean(self._x, self._y)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        if not need_dx:
            return None
        dx = self.buffer("dx", self._x.shape, dy.data.dtype)
        last.mean_gradient(dy.data, dx)
        return self.like(self._came, Maps(dx, dy.channels))


class ResidualStage(Stage):
    """``body(x) + shortcut(x)``, and the ReLU after it in the same pass."""

    def __init__(self, named: Sequence[Named], body: list[Stage], shortcut: list[Stage]) -> None:
        super().__init__(named)
        self.body, self.shortcut = body, shortcut
        self._relu = len(self.layers) == 2
        # A batch-norm at the end of the body runs in the same pass, and then the shortcut's too.
        self._norm, self._other = _norm_at_end(body), _norm_at_end(shortcut)
        if self._norm is None:
            self._other = None

    def walk(self) -> Iterator[Stage]:
        for stage in (*self.body, *self.shortcut):
            yield from stage.walk()
        yield self

    def prepare(self, x: Maps, training: bool) -> Maps:
        self._came = x
        a = b = self.last(x)
        for stage in self.body:
            a = stage.prepare(a, training)
        for stage in self.shortcut:
            b = stage.prepare(b, training)
        self._sum = a.data, b.data
        self._y = a.data if self._norm else self.buffer("y", a.data.shape, a.data.dtype)
        return Maps(self._y, a.channels)

    def compute(self, training: bool) -> None:
        for stage in (*self.body, *self.shortcut):
            if stage is not self._norm and stage is not self._other:
                stage.compute(training)
        if self._norm is None:
            last.add_maps(*self._sum, self._y, self._relu)
            return
        other, factors = self._sum[1], None
        if self._other is not None:
            other, factors = self._other.x, self._other.factors(training)
        own = self._norm.factors(training)
        last.normalise(self._norm.x, own, self._y, self._relu, other, factors)

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        masked = None
        if self._relu:
            masked = self.buffer("dy", dy.data.shape, dy.data.dtype)
            last.relu_gradient(dy.data, self._y, masked)
            dy = Maps(masked, dy.channels)
        if self.shortcut:
            dx = self._back(self.body, dy, need_dx)
            dx = self._back(self.shortcut, dy, need_dx, dx, ours=bool(self.body))
        else:
            dx = self._back(self.body, dy, need_dx, dy, ours=masked is not None)
        return self.like(self._came, dx) if need_dx else None

    def _back(
        self, stages: list[Stage], dy: Any, need_dx: bool, other: Any = None, ours: bool = False
    ) -> Any:
        """Run the backward of a branch, and add `other` to its dx: in its place if it is `ours`."""
        for i in reversed(range(len(stages))):
            stage, in_place = stages[i], i == 0 and need_dx and ours and dy is not other
            if in_place and isinstance(stage, ConvStage) and stage.adds:
                return stage.backward(dy, True, other)
            dy = stage.backward(dy, need_dx or i > 0)
        if other is None or not need_dx:
            return dy
        y = other.data if ours else self.buffer("dx", dy.data.shape, dy.data.dtype)
        last.add_maps(dy.data, other.data, y)
        return Maps(y, dy.channels)


def _norm_at_end(stages: list[Stage]) -> NormStage | None:
    """Return the last stage if it is a batch-norm without a ReLU."""
    stage = stages[-1] if stages else None
    return stage if isinstance(stage, NormStage) and not stage.relu else None


class ConvStage(Stage):
    """Convolution, and in the same pass over its output the ReLU and max-pool after it."""

    def __init__(self, named: Sequence[Named], winograd: bool) -> None:
        super().__init__(named)
        conv, *rest = self.layers
        self.relu = any(type(layer) is ReLU for layer in rest)
        pools = [layer.window() for layer in rest if type(layer) is MaxPool2d]
        self.pool_window = pools[0] if pools else window("", (1, 1))
        self.winograd = winograd and conv2d_winograd.applies(
            conv.weight, conv.window(), conv.groups
        )

    @staticmethod
    def takes(layer: Any) -> bool:
        """Tell whether the kernels run this layer: one group, depthwise, or whole vectors."""
        inside, out = layer.weight.shape[1], layer.weight.shape[0] // layer.groups
        L = lanes(layer.weight.dtype)
        return layer.groups == 1 or inside == out == 1 or inside % L == out % L == 0

    @staticmethod
    def takes_pool(layer: Any) -> bool:
        """Tell whether this pool can follow in the same pass: windows side by side."""
        win = layer.window()
        return (
            PoolStage.takes(layer) and win.stride == win.kernel and win.padding == ((0, 0), (0, 0))
        )

    def prepare(self, x: Maps, training: bool) -> Maps:
        conv, pool = self.layers[0], self.pool_window.kernel
        w, win = conv.weight, conv.window()
        F, L = len(w), lanes(w.dtype)
        self._came = x
        if x.last or conv.in_channels >= L:
            x = self.last(x)
        self._x = x
        N = len(x.data)
        H, W = x.data.shape[1:3] if x.last else x.data.shape[2:]
        sizes = win.output_size("conv2d", H, W)
        self._window, self._stride = win, (1, 1)
        if x.last and win.kernel == (1, 1) and win.padding == ((0, 0), (0, 0)):
            # A stride of a 1x1 kernel leaves pixels out, and then it is the kernel of stride 1.
            self._window, self._stride = window("", (1, 1)), win.stride
        if self._stride != (1, 1):
            taken = self.buffer("taken", (N, *sizes, x.data.shape[3]), w.dtype)
            self._x = Maps(taken, x.channels)
        self._source = x.data
        self._map = (N, *sizes, round_up(F, L))  # before the pool
        shape = (N, sizes[0] // pool[0], sizes[1] // pool[1], round_up(F, L))
        self._y = self.buffer("y", shape, w.dtype)
        self._winner = None
        if training and pool != (1, 1):
            self._winner = self.buffer("winner", shape, np.uint8)
        fast = self.winograd and x.last and N * sizes[0] * sizes[1] >= WINOGRAD_PIXELS
        self._fast = fast and conv2d_winograd.takes_pool(pool)
        whole = pool == (1, 1) or (w.shape[2] == 3 and win.stride == (1, 1))
        self._fast_back = fast and whole  # else few enough pixels have won
        self.how = "numba, winograd" if self._fast else "numba"
        return Maps(self._y, F)

    def compute(self, training: bool) -> None:
        conv, pool, x = self.layers[0], self.pool_window.kernel, self._x
        w, b = conv.weight, conv.bias
        if self._stride != (1, 1):
            last.take_every(self._source, self._stride, x.data)
        if self._fast:
            self.run(
                "forward, winograd", conv2d_winograd.correlation, x.data, w=w, b=b,
                win=conv.window(), y=self._y, relu=self.relu, pool=pool, winner=self._winner,
            )  # fmt: skip
        else:
            to = Layouts(x.last, True, self.relu, *pool)
            self.run(
                "forward", conv2d_channels.correlation, x.data, geometry=self._geometry(False),
                w=w, b=b, y=self._y, to=to, winner=self._winner,
            )  # fmt: skip

    @property
    def _sparse(self) -> bool:
        """The backward visits only the winners of the pool; Winograd of a 3x3 kernel is faster."""
        pooled = self.pool_window.kernel != (1, 1) and self._stride == (1, 1)
        return pooled and self.layers[0].groups == 1 and not self._fast_back

    @property
    def one_kernel(self) -> bool:
        return self._stride == (1, 1) and self._x is self._came

    @property
    def one_kernel_back(self) -> bool:
        return self._sparse and self._x is self._came

    @property
    def adds(self) -> bool:
        """The backward can add dx to what is there."""
        return self._came.last and not self._sparse

    def backward(self, dy: Maps, need_dx: bool, other: Maps | None = None) -> Maps | None:
        """See `Stage`; dx is added to `other`, if that is given, in its place."""
        conv, pool = self.layers[0], self.pool_window.kernel
        w, win, x, more = conv.weight, self._window, self._x, other is not None
        dw, db = conv.grads["weight"], conv.grads.get("bias")
        if db is None:
            db = self.buffer("db", (len(w),), w.dtype)
        strided, dx = self._stride != (1, 1), None
        if need_dx and other is not None and not strided:
            dx = other.data
        elif need_dx:
            dx = self.buffer("dx of taken" if strided else "dx", x.data.shape, w.dtype)
        if self._sparse and (x.last or dx is None):
            self.run(
                "backward", conv_block_numba.gradients, x.data, dy=dy.data, winner=self._winner,
                w=w, dw=dw, db=db, dx=dx, win=win, pool=pool, x_last=x.last,
            )  # fmt: skip
            return None if dx is None else self.like(self._came, Maps(dx, x.channels))
        d = dy.data
        if pool != (1, 1):
            d = self.buffer("dy", self._map, w.dtype)
            last.max_pool_gradient(dy.data, self._winner, self.pool_window, d)
        elif self.relu:
            d = self.buffer("dy", self._map, w.dtype)
            last.relu_gradient(dy.data, self._y, d)
        if self._fast_back:
            self.run("dw", conv2d_winograd.weight_gradients, x.data, dy=d, win=win, dw=dw)
            if "bias" in conv.grads:
                db[...] = last.channel_sums(d, len(w))
            if dx is not None:
                self.run(
                    "dx", conv2d_winograd.input_gradients, d, w=w, win=win, dx=dx, more=more
                )  # fmt: skip
        else:
            self.run(
                "dw, direct", conv2d_channels.weight_gradients, x.data, dy=d, dw=dw, db=db,
                geometry=self._geometry(False), to=Layouts(x.last, True),
            )  # fmt: skip
            if dx is not None:
                to = Layouts(True, x.last, more=more and not strided)
                self.run(
                    "dx, direct", conv2d_channels.correlation, d, w=w, b=None, y=dx,
                    geometry=self._geometry(True), to=to,
                )  # fmt: skip
        if dx is not None and strided:
            taken, shape = dx, self._source.shape
            dx = self.buffer("dx", shape, w.dtype) if other is None else other.data
            last.spread(taken, self._stride, dx, more)
        return None if dx is None else self.like(self._came, Maps(dx, x.channels))

    def _geometry(self, adjoint: bool) -> Geometry:
        conv, x = self.layers[0], self._x
        H, W = x.data.shape[1:3] if x.last else x.data.shape[2:]
        return Geometry(
            adjoint, conv.in_channels, H, W, conv.out_channels, self._window, conv.groups
        )


class LinearStage(Stage):
    """Linear, with a Flatten before it and a ReLU after it."""

    one_kernel = one_kernel_back = True

    @staticmethod
    def takes_flatten(layer: Any) -> bool:
        return (layer.options["start_dim"], layer.options["end_dim"]) == (1, -1)

    def __init__(self, named: Sequence[Named]) -> None:
        super().__init__(named)
        (self.linear,) = (layer for layer in self.layers if type(layer) is Linear)
        self.relu = type(self.layers[-1]) is ReLU

    def prepare(self, x: Maps, training: bool) -> Maps:
        w = self.linear.weight
        self._came = x
        # Maps with channels in the lanes are read as they lie.
        in_order = x.last or x.data.ndim == 2
        self._x = x.data if in_order else x.data.reshape(-1, w.shape[1])
        self._y = y = self.buffer("y", (len(self._x), len(w)), w.dtype)
        flat = x.last or type(self.layers[0]) is Flatten
        return Maps(y if flat else self.buffer("y", (*x.data.shape[:-1], len(w)), w.dtype))

    def compute(self, training: bool) -> None:
        linear = self.linear
        self.run(
            "forward", linear_numba.outputs, self._x, w=linear.weight, b=linear.bias, y=self._y,
            relu=self.relu,
        )  # fmt: skip

    def backward(self, dy: Maps, need_dx: bool) -> Maps | None:
        w, grads = self.linear.weight, self.linear.grads
        d = dy.data if dy.data.shape == self._y.shape else dy.data.reshape(self._y.shape)
        dx = self.buffer("dx", self._x.shape, w.dtype) if need_dx else None
        y = self._y if self.relu else None
        self.run(
            "backward", linear_numba.gradients, self._x, dy=d, w=w, dw=grads["weight"],
            db=grads.get("bias"), dx=dx, y=y,
        )  # fmt: skip
        if dx is None:
            return None
        # The same memory in the input's shape, and the same array each time: see `run`.
        came = self._came
        return Maps(self.buffer("dx", came.data.shape, w.dtype), came.channels)
