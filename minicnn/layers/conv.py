"""Convolution layers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.backend import Array
from minicnn.init import Rng, fans, generator, uniform
from minicnn.layers.base import Layer, Param, Shape
from minicnn.layers.summary import Field, Row
from minicnn.shapes import Window, check_rank, integer, pads, pair, size, window


class _Conv(Layer):
    """What both convolutions share: arguments, parameters and printed form."""

    weight = Param()
    bias = Param()

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        self.in_channels = integer(name, "in_channels", in_channels, 1)
        self.out_channels = integer(name, "out_channels", out_channels, 1)
        self.groups = integer(name, "groups", groups, 1)
        for label, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            if channels % self.groups:
                raise ValueError(
                    f"{name}: {label}: expected a multiple of groups={groups}, got {channels}"
                )
        self.options = {
            "stride": stride,
            "padding": padding,
            "dilation": dilation,
            "groups": self.groups,
        }
        self._window = window(name, kernel_size, stride, padding, dilation)

    def _init_params(self, shape: Shape, bias: bool, rng: Rng, dtype: Any) -> None:
        rng = generator(type(self).__name__, rng)
        bound = 1 / math.sqrt(fans(shape)[0])  # PyTorch's default: Kaiming-uniform with a = sqrt(5)
        self.add_param("weight", uniform(shape, bound, rng, dtype))
        if bias:
            self.add_param("bias", uniform((self.out_channels,), bound, rng, dtype))

    def extra_repr(self) -> str:
        kernel, stride, padding, dilation = self._window
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={kernel}, stride={stride}"
        if padding != ((0, 0), (0, 0)):
            text += f", padding={padding}"
        if dilation != (1, 1):
            text += f", dilation={dilation}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text if "bias" in self.params else f"{text}, bias=False"


class Conv2d(_Conv):
    """2-D convolution (cross-correlation) with F filters; see `ops.conv2d_forward`.

    Parameters
    ----------
    in_channels, out_channels : int
        C and F.
    kernel_size, stride, dilation : int or pair of int
        Vertical and horizontal.
    padding : int, pair, ((top, bottom), (left, right)), "same" or "valid"
    groups : int
        Divides both channel counts.
    bias : bool
    rng : int or numpy.random.Generator, optional
        Draws the initial weights, uniform on ``+-1 / sqrt(C/groups * KH * KW)`` as in PyTorch.
    dtype : float32 or float64

    Attributes
    ----------
    weight : array, shape (F, C/groups, KH, KW)
    bias : array, shape (F,), or None

    Raises
    ------
    ValueError, TypeError
        For arguments out of range; the message names them.

    Examples
    --------
    >>> import numpy as np
    >>> layer = Conv2d(3, 8, 3, padding=1, rng=0)
    >>> y, cache = layer.forward(np.zeros((2, 3, 32, 32), "f4"))
    >>> y.shape
    (2, 8, 32, 32)
    >>> layer.backward(y, cache).shape
    (2, 3, 32, 32)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
        bias: bool = True,
        rng: Rng = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        shape = (out_channels, in_channels // groups, *self._window.kernel)
        self._init_params(shape, bias, rng, dtype)

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.conv2d_forward(x, self.weight, self.bias, **self.options)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.conv2d_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def window(self) -> Window:
        return self._window

    def output_shape(self, x_shape: Shape) -> Shape:
        N, _, H, W = check_rank("Conv2d", x_shape, "(N, C, H, W)", self.in_channels)
        return (N, self.out_channels, *self._window.output_size("Conv2d", H, W))

    def formula(self, x_shape: Shape) -> str:
        _, _, H, W = x_shape
        return self._window.formula(H, W)

    def macs(self, x_shape: Shape) -> int:
        return size(self.output_shape(x_shape)) * size(self.weight.shape[1:])

    def im2col_size(self, x_shape: Shape) -> int:
        N, _, OH, OW = self.output_shape(x_shape)
        return self.in_channels * size(self._window.kernel) * N * OH * OW


class ConvTranspose2d(_Conv):
    """Transposed convolution: the adjoint of `Conv2d`, which enlarges; see
    `ops.conv_transpose2d_forward`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, groups, bias, dilation, rng, dtype
        As for `Conv2d`; here `padding` takes rows and columns away from the output.
    output_padding : int or pair of int
        Extra rows and columns at the bottom and the right; below stride or dilation.

    Attributes
    ----------
    weight : array, shape (C, F/groups, KH, KW)
    bias : array, shape (F,), or None

    Examples
    --------
    >>> import numpy as np
    >>> layer = ConvTranspose2d(8, 3, 4, stride=2, padding=1, rng=0)
    >>> layer(np.zeros((2, 8, 16, 16), "f4")).shape
    (2, 3, 32, 32)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Any,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Any = 1,
        rng: Rng = None,
        dtype: Any = np.float32,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        pads("ConvTranspose2d", padding)  # "same" and "valid" have no meaning here
        self.options["output_padding"] = pair(
            "ConvTranspose2d", "output_padding", output_padding, 0
        )
        shape = (in_channels, out_channels // groups, *self._window.kernel)
        self._init_params(shape, bias, rng, dtype)

    def forward(self, x: Array) -> tuple[Array, Any]:
        return ops.conv_transpose2d_forward(x, self.weight, self.bias, **self.options)

    def backward(self, dy: Array, cache: Any) -> Array:
        dx, dw, db = ops.conv_transpose2d_backward(dy, cache)
        self.add_grads(weight=dw, bias=db)
        return dx

    def output_shape(self, x_shape: Shape) -> Shape:
        check_rank("ConvTranspose2d", x_shape, "(N, C, H, W)", self.in_channels)
        OH, OW = (self._axis(axis, x_shape)[-1] for axis in (0, 1))
        if OH < 1 or OW < 1:
            raise ValueError(
                f"ConvTranspose2d: padding: expected to leave some output, got {OH}x{OW}"
            )
        return x_shape[0], self.out_channels, OH, OW

    def formula(self, x_shape: Shape) -> str:
        steps, stride, extent, before, after, extra, OH = self._axis(0, x_shape)
        return f"{steps}*{stride}+{extent}-{before}-{after}+{extra} = {OH}"

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        y_shape, field = self.output_shape(x_shape), field.through_transposed(self._window)
        return [self._row(name, str(self), x_shape, y_shape, field)], y_shape, field

    def im2col_size(self, x_shape: Shape) -> int:
        N, _, H, W = x_shape
        return self.out_channels * size(self._window.kernel) * N * H * W

    def _axis(self, axis: int, x_shape: Shape) -> tuple[int, ...]:
        """The numbers of the output size along the rows (0) or the columns (1), and the size."""
        steps, stride = x_shape[2 + axis] - 1, self._window.stride[axis]
        extent, (before, after) = self._window.extent[axis], self._window.padding[axis]
        extra = self.options["output_padding"][axis]
        total = steps * stride + extent - before - after + extra
        return steps, stride, extent, before, after, extra, total

    def macs(self, x_shape: Shape) -> int:
        return size(x_shape) * size(self.weight.shape[1:])
