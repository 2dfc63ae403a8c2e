"""How a model runs on the GPU: its layers, some of them in one kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

from minicnn import ops
from minicnn.backend import Array, array_module
from minicnn.layers import Conv2d, Layer, Linear, MaxPool2d, ReLU, Sequential
from minicnn.ops import conv2d_cupy, linear_cupy
from minicnn.ops.activations import ActivationCache
from minicnn.ops.conv_block import OFF
from minicnn.ops.linear import LinearCache

Named = tuple[str, Any]  # a layer and its name in the model


class LayerStage:
    """One layer as it is."""

    how = "one op at a time"

    def __init__(self, named: list[Named]) -> None:
        self.named = named
        self._layer = named[-1][1]

    @property
    def what(self) -> str:
        """The kinds of the layers, in order."""
        return " + ".join(type(layer).__name__ for _, layer in self.named)

    def forward(self, x: Array) -> tuple[Array, Any]:
        """Return the output and the cache."""
        return self._layer.forward(x)

    def backward(self, dy: Array, cache: Any) -> Array:
        """Add to the layers' gradients, and return that of the input."""
        return self._layer.backward(dy, cache)

    def backward_last(self, dy: Array, cache: Any) -> None:
        """Add to the layers' gradients, where nobody wants that of the input."""
        self.backward(dy, cache)

    def infer(self, x: Array) -> Array:
        """Return the output in evaluation."""
        return self._layer(x)


class ConvStage(LayerStage):
    """Conv2d with the ReLU and the max-pool behind it, in one kernel; see `ops.conv_block`."""

    how = "cupy, one kernel"

    def __init__(self, named: list[Named]) -> None:
        super().__init__(named)
        self._conv, *rest = (layer for _, layer in named)
        self._options: dict[str, Any] = {
            "relu": any(type(layer) is ReLU for layer in rest),
            "pool": rest[-1].window().kernel if type(rest[-1]) is MaxPool2d else 1,
        }

    def forward(self, x: Array) -> tuple[Array, Any]:
        conv = self._conv
        return ops.conv_block_forward(x, conv.weight, conv.bias, **conv.options, **self._options)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.conv_block_backward(dy, cache)
        self._conv.add_grads(weight=dw, bias=db)
        return dx

    def backward_last(self, dy: Array, cache: Any) -> None:
        x, w, _, win, groups, pool, winner = cache
        y_shape = (len(x), len(w), *win.output_size("conv_block", *x.shape[2:]))
        if not conv2d_cupy.applies(x.shape, w, y_shape, groups):
            self.backward(dy, cache)
            return
        dy = array_module(dy).ascontiguousarray(dy)
        args = (dy, winner, x, w, win, groups, pool)
        _, dw, db = conv2d_cupy.block_backward(*args, need_dx=False)
        self._conv.add_grads(weight=dw, bias=db)

    def infer(self, x: Array) -> Array:
        return self.forward(x)[0]


class LinearStage(LayerStage):
    """Linear with the ReLU behind it, in one kernel where that is small enough."""

    how = "cupy, one kernel"

    def __init__(self, named: list[Named]) -> None:
        super().__init__(named)
        self._linear, self._relu = (layer for _, layer in named)

    def forward(self, x: Array) -> tuple[Array, Any]:
        w, b = self._linear.params["weight"], self._linear.params.get("bias")
        fits = x.ndim == 2 and x.dtype == w.dtype and x.shape[1] == w.shape[1]
        if not (fits and x.flags.c_contiguous and linear_cupy.applies(len(x), w)):
            z, linear = self._linear.forward(x)  # refuses what does not fit
            y, relu = self._relu.forward(z)
            return y, (linear, relu)
        y = linear_cupy.forward(x, w, b, relu=True)
        return y, (LinearCache(x, w, b is not None), ActivationCache("relu", y, ()))

    def backward(self, dy: Array, cache: Any) -> Array:
        linear, relu = cache
        return self._linear.backward(self._relu.backward(dy, relu), linear)

    def infer(self, x: Array) -> Array:
        return self.forward(x)[0]


class GpuPlan:
    """The stages of a model on the GPU; quickly made, and not kept, as it holds the model.

    Parameters
    ----------
    model : Layer
    fused : bool
        Run several layers in one kernel where there is one.
    """

    fused = False  # not by the kernels of minicnn.plan, which are the CPU's

    def __init__(self, model: Layer, fused: bool = True) -> None:
        self.stages = _stages(model) if fused else [LayerStage([("", model)])]
        self.note = ""  # on how steps are launched
        self._model = model
        self._caches: list[Any] = []

    def forward(self, x: Array, training: bool) -> Array:
        """Return the model's output, and keep what `backward` needs if `training`."""
        self.drop()
        if not training:
            return self._infer(x)
        for stage in self.stages:
            x, cache = stage.forward(x)
            self._caches.append(cache)
        return x

    def _infer(self, x: Array) -> Array:
        """Return the output in evaluation, in as many parts as the memory calls for."""
        from minicnn.gpu.parts import within_memory

        def run(size: int) -> Array:
            parts = []
            for i in range(0, max(len(x), 1), size):
                part = x[i : i + size]
                for stage in self.stages:
                    part = stage.infer(part)
                parts.append(part)
            return parts[0] if len(parts) == 1 else array_module(x).concatenate(parts)

        fix = "smaller pictures or a smaller network"
        return within_memory("predict", len(x), run, max(len(x), 1), fix)

    def drop(self) -> None:
        """Forget what was kept for `backward`."""
        self._caches = []

    def backward(self, dy: Array) -> None:
        """Write the gradients of all parameters, in place of what was there."""
        self._model.zero_grad()
        self.accumulate(dy)

    def accumulate(self, dy: Array) -> None:
        """Add to the gradients of all parameters."""
        caches, self._caches = self._caches, []
        for stage in reversed(self.stages[1:]):
            dy = stage.backward(dy, caches.pop())
        self.stages[0].backward_last(dy, caches.pop())

    def __str__(self) -> str:
        rows = [("layers", "runs", "with")]
        for stage in self.stages:
            names = ", ".join(name or "(model)" for name, _ in stage.named)
            rows.append((names, stage.what, stage.how))
        wide = [max(len(row[i]) for row in rows) for i in (0, 1)]
        lines = [f"{a:{wide[0]}}  {b:{wide[1]}}  {c}" for a, b, c in rows]
        return "\n".join([*lines, self.note] if self.note else lines)


def _stages(model: Layer) -> list[LayerStage]:
    if max(Counter(id(layer) for _, layer in model.modules()).values()) > 1:
        return [LayerStage([("", model)])]  # a layer in two places: as it is
    rest, stages = _inline("", model), []
    while rest:
        taken = _together(rest)
        fused = ConvStage if type(rest[0][1]) is Conv2d else LinearStage
        stages.append(fused(rest[:taken]) if taken > 1 else LayerStage(rest[:1]))
        del rest[:taken]
    return stages


def _inline(name: str, layer: Any) -> list[Named]:
    """List the layers that run one after the other, those of inner Sequentials in their place."""
    if type(layer) is not Sequential:
        return [(name, layer)]
    return [
        inner
        for key, child in layer.children().items()
        for inner in _inline(f"{name}.{key}" if name else key, child)
    ]


def _together(rest: list[Named]) -> int:
    """How many layers at the front of the list run in one kernel."""
    # The exact types count: a subclass may have a forward of its own.
    layers = [layer for _, layer in rest[:3]]
    relu = len(layers) > 1 and type(layers[1]) is ReLU
    if type(layers[0]) is Linear:
        return 1 + relu
    if type(layers[0]) is not Conv2d:
        return 1
    pool = layers[1 + relu : 2 + relu]
    return 1 + relu + (bool(pool) and _side_by_side(pool[0]))


def _side_by_side(layer: Any) -> bool:
    """Tell whether this is a max-pool whose windows lie side by side."""
    if type(layer) is not MaxPool2d or layer.options["ceil_mode"]:
        return False
    win = layer.window()
    return (
        win.stride == win.kernel
        and win.padding == ((0, 0), (0, 0))
        and win.dilation == (1, 1)
        and win.kernel[0] * win.kernel[1] < OFF
    )
