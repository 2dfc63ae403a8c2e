"""Pooling layers."""

from __future__ import annotations

from typing import Any

from minicnn import ops
from minicnn.layers.base import OpLayer, Shape
from minicnn.layers.summary import WHOLE, Field, Row
from minicnn.ops.adaptive_avg_pool2d import grid
from minicnn.shapes import Window, check_rank, pads, window


class _Pool(OpLayer):
    """What max and average pooling share: a window whose stride defaults to its kernel."""

    def __init__(self, kernel_size: Any, stride: Any, padding: Any, **options: Any) -> None:
        stride = kernel_size if stride is None else stride
        super().__init__(kernel_size=kernel_size, stride=stride, padding=padding, **options)
        name, dilation = type(self).__name__, options.get("dilation", 1)
        self._window = window(name, kernel_size, stride, pads(name, padding), dilation)

    def window(self) -> Window:
        return self._window

    def output_shape(self, x_shape: Shape) -> Shape:
        name = type(self).__name__
        N, C, H, W = check_rank(name, x_shape, "(N, C, H, W)")
        return (N, C, *self._window.output_size(name, H, W, self.options["ceil_mode"]))

    def formula(self, x_shape: Shape) -> str:
        _, _, H, W = x_shape
        return self._window.formula(H, W, self.options["ceil_mode"])


class MaxPool2d(_Pool):
    """The largest value under each window; see `ops.max_pool2d_forward`.

    Parameters
    ----------
    kernel_size : int or pair of int
    stride : int or pair of int, optional
        The kernel size by default: windows side by side.
    padding : int, pair, or ((top, bottom), (left, right))
        At most half the kernel; never wins.
    dilation : int or pair of int
    ceil_mode : bool
        Round the output size up: the last windows may reach past the edge.
    """

    op = ops.max_pool2d_forward, ops.max_pool2d_backward

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation=dilation, ceil_mode=ceil_mode)


class AvgPool2d(_Pool):
    """The mean under each window; see `ops.avg_pool2d_forward`.

    Parameters
    ----------
    kernel_size, stride, padding, ceil_mode
        As for `MaxPool2d`.
    count_include_pad : bool
        Whether padding counts in the divisor.
    divisor_override : int, optional
        Divide by this instead.
    """

    op = ops.avg_pool2d_forward, ops.avg_pool2d_backward

    def __init__(
        self,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> None:
        super().__init__(
            kernel_size,
            stride,
            padding,
            ceil_mode=ceil_mode,
            count_include_pad=count_include_pad,
            divisor_override=divisor_override,
        )


class AdaptiveAvgPool2d(OpLayer):
    """Means over a grid of `output_size` cells; see `ops.adaptive_avg_pool2d_forward`.

    Parameters
    ----------
    output_size : int or pair of (int or None)
        None keeps the input's size.
    """

    op = ops.adaptive_avg_pool2d_forward, ops.adaptive_avg_pool2d_backward

    def __init__(self, output_size: Any) -> None:
        grid("AdaptiveAvgPool2d", output_size, (1, 1))  # refuse a bad size here and not in use
        super().__init__(output_size=output_size)

    def output_shape(self, x_shape: Shape) -> Shape:
        N, C, H, W = check_rank("AdaptiveAvgPool2d", x_shape, "(N, C, H, W)")
        return (N, C, *grid("AdaptiveAvgPool2d", self.options["output_size"], (H, W)))

    def rows(self, name: str, x_shape: Shape, field: Field) -> tuple[list[Row], Shape, Field]:
        places = self.output_shape(x_shape)[2:]
        if places == (1, 1):
            return super().rows(name, x_shape, WHOLE)
        # The largest bin of an axis has H / OH pixels, or if that is broken at most one more.
        pairs = list(zip(x_shape[2:], places))
        bins = tuple(-(-n // m) + (n % m > 0) for n, m in pairs)
        steps = tuple(max(1, n // m) for n, m in pairs)
        return super().rows(name, x_shape, field.through(window("", bins, steps)))
