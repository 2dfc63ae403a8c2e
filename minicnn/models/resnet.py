"""A small residual network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.init import Rng, generator
from minicnn.layers import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    Flatten,
    Layer,
    Linear,
    ReLU,
    Residual,
    Sequential,
)


def resnet_small(
    rng: Rng = 0,
    in_channels: int = 3,
    num_classes: int = 10,
    widths: Sequence[int] = (64, 128, 256),
    blocks: int = 1,
    dtype: Any = np.float32,
) -> Sequential:
    """Build a stem, `blocks` residual blocks for each width, a global mean and one Linear.

    A block is two 3x3 convolutions with batch-norm. The first of each width but the first halves
    the rows and columns, and a 1x1 convolution makes its shortcut meet.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Draws the initial weights.
    in_channels, num_classes : int
    widths : sequence of int
        Channels of each group of blocks.
    blocks : int
        In a group.
    dtype : float32 or float64

    Returns
    -------
    Sequential
        Maps (N, in_channels, H, W) to (N, num_classes) logits.

    References
    ----------
    K. He, X. Zhang, S. Ren, J. Sun, "Deep residual learning for image recognition", CVPR 2016,
    arXiv:1512.03385.
    """
    rng = generator("resnet", rng)

    def conv(inside: int, out: int, kernel: int, stride: int = 1) -> list[Layer]:
        # Batch-norm takes any constant out again, so that a bias would do nothing.
        layer = Conv2d(inside, out, kernel, stride, kernel // 2, bias=False, rng=rng, dtype=dtype)
        return [layer, BatchNorm2d(out, dtype=dtype)]

    layers: list[Layer] = [*conv(in_channels, widths[0], 3), ReLU()]
    channels = widths[0]
    for width in widths:
        for _ in range(blocks):
            stride = 1 if width == channels else 2
            body = Sequential(*conv(channels, width, 3, stride), ReLU(), *conv(width, width, 3))
            meets = width == channels
            shortcut = None if meets else Sequential(*conv(channels, width, 1, stride))
            layers += [Residual(body, shortcut), ReLU()]
            channels = width
    layers += [AdaptiveAvgPool2d(1), Flatten(), Linear(channels, num_classes, rng=rng, dtype=dtype)]
    return Sequential(*layers)
