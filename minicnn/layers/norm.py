"""Normalisation layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from minicnn import ops
from minicnn.backend import Array
from minicnn.layers.base import Layer, Param, Shape
from minicnn.ops.batch_norm import blend
from minicnn.shapes import integer, number


class _Norm(Layer):
    """What the normalisations share: an optional scale and shift of one shape."""

    weight = Param()
    bias = Param()

    def __init__(self, shape: Shape, affine: bool, bias: bool, dtype: Any) -> None:
        super().__init__()
        if affine:
            self.add_param("weight", np.ones(shape, dtype))
        if affine and bias:
            self.add_param("bias", np.zeros(shape, dtype))


class BatchNorm2d(_Norm):
    """Normalise each channel over the batch; see `ops.batch_norm_forward`.

    Parameters
    ----------
    num_features : int
        C.
    eps : float
    momentum : float or None
        Share of the new batch in the running statistics; None keeps their plain mean.
    affine, bias : bool
        Whether to learn a scale, and with it a shift.
    track_running_stats : bool
        Whether to keep running statistics, which evaluation uses in place of the batch's.
    dtype : float32 or float64

    Attributes
    ----------
    weight, bias : array, shape (C,), or None
    buffers : dict
        ``running_mean`` and ``running_var`` of shape (C,), and ``num_batches_tracked``.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        dtype: Any = np.float32,
        bias: bool = True,
    ) -> None:
        self.num_features = integer("BatchNorm2d", "num_features", num_features, 1)
        super().__init__((num_features,), affine, bias, dtype)
        self.eps = number("BatchNorm2d", "eps", eps, gt=0)
        self.momentum = momentum
        if momentum is not None:
            number("BatchNorm2d", "momentum", momentum, ge=0, le=1)
        if track_running_stats:
            self.buffers["running_mean"] = np.zeros(num_features, dtype)
            self.buffers["running_var"] = np.ones(num_features, dtype)
            self.buffers["num_batches_tracked"] = np.zeros((), np.int64)

    def _normalise(self, x: Array, training: bool) -> tuple[Array, Any]:
        if x.ndim != 4:
            raise ValueError(
                f"BatchNorm2d: x: expected 4 axes (N, C, H, W), got shape {tuple(x.shape)}"
            )
        mean, var = self.buffers.get("running_mean"), self.buffers.get("running_var")
        return ops.batch_norm_forward(
            x,
            self.weight,
            self.bias,
            mean,
            var,
            training or mean is None,
            self._momentum(),
            self.eps,
        )

    def forward(self, x: Array) -> tuple[Array, Any]:
        y, cache = self._normalise(x, self.training)
        if self.training and self.buffers:
            self._keep(cache.running_mean, cache.running_var)
        return y, cache

    def track(self, mean: Array, var: Array, count: int) -> None:
        """Move the running statistics, if kept, towards those of a batch of `count` pixels."""
        if self.buffers:
            unbiased = var * (count / (count - 1))
            new = zip(("running_mean", "running_var"), (mean, unbiased))
            self._keep(*(blend(self.buffers[name], a, self._momentum()) for name, a in new))

    def _keep(self, mean: Array, var: Array) -> None:
        self.buffers["running_mean"][...] = mean
        self.buffers["running_var"][...] = var
        self.buffers["num_batches_tracked"] += 1

    def _momentum(self) -> float:
        if self.momentum is None:
            return 1 / (int(self.buffers.get("num_batches_tracked", 0)) + 1)
        return self.momentum

    def __call__(self, x: Array) -> Array:
        return self._normalise(x, training=False)[0]

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.batch_norm_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def output_shape(self, x_shape: Shape) -> Shape:
        if len(x_shape) != 4 or x_shape[1] != self.num_features:
            raise ValueError(
                f"BatchNorm2d: input_shape: expected (N, {self.num_features}, H, W), got {x_shape}"
            )
        return x_shape

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"


class LayerNorm(_Norm):
    """Normalise each example over its last axes; see `ops.layer_norm_forward`.

    Parameters
    ----------
    normalized_shape : int or tuple of int
        Sizes of the axes to normalise over, which are the last ones.
    eps : float
    elementwise_affine, bias : bool
        Whether to learn a scale, and with it a shift, for each element.
    dtype : float32 or float64
    """

    def __init__(
        self,
        normalized_shape: Any,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        dtype: Any = np.float32,
    ) -> None:
        shape = (
            normalized_shape if isinstance(normalized_shape, tuple | list) else (normalized_shape,)
        )
        self.normalized_shape = tuple(integer("LayerNorm", "normalized_shape", n, 1) for n in shape)
        super().__init__(self.normalized_shape, elementwise_affine, bias, dtype)
        self.eps = number("LayerNorm", "eps", eps, gt=0)

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.layer_norm_forward(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.layer_norm_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def extra_repr(self) -> str:
        return f"{self.normalized_shape}, eps={self.eps}"


class GroupNorm(_Norm):
    """Normalise each example over groups of channels; see `ops.group_norm_forward`.

    Parameters
    ----------
    num_groups : int
        Divides `num_channels`.
    num_channels : int
        C.
    eps : float
    affine, bias : bool
        Whether to learn a scale, and with it a shift, for each channel.
    dtype : float32 or float64
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        dtype: Any = np.float32,
        bias: bool = True,
    ) -> None:
        self.num_groups = integer("GroupNorm", "num_groups", num_groups, 1)
        self.num_channels = integer("GroupNorm", "num_channels", num_channels, 1)
        if num_channels % num_groups:
            raise ValueError(
                f"GroupNorm: num_groups: expected a divisor of num_channels={num_channels}, "
                f"got {num_groups}"
            )
        super().__init__((num_channels,), affine, bias, dtype)
        self.eps = number("GroupNorm", "eps", eps, gt=0)

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.group_norm_forward(x, self.num_groups, self.weight, self.bias, self.eps)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.group_norm_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}"
