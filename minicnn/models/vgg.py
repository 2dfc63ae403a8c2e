"""A small network after VGG: pairs of 3x3 convolutions, each pair followed by a pool."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.init import Rng, generator
from minicnn.layers import BatchNorm2d, Conv2d, Flatten, Layer, Linear, MaxPool2d, ReLU, Sequential
from minicnn.shapes import size


def vgg_small(
    rng: Rng = 0,
    in_channels: int = 3,
    num_classes: int = 10,
    image_size: tuple[int, int] = (32, 32),
    widths: Sequence[int] = (64, 128, 256),
    dtype: Any = np.float32,
) -> Sequential:
    """Build (conv, batch-norm, ReLU) twice and a 2x2 max-pool for each width, then one Linear.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Draws the initial weights.
    in_channels, num_classes : int
    image_size : pair of int
        Rows and columns; every pool halves them.
    widths : sequence of int
        Channels of each pair of convolutions.
    dtype : float32 or float64

    Returns
    -------
    Sequential
        Maps (N, in_channels, *image_size) to (N, num_classes) logits.

    Raises
    ------
    ValueError
        If the images are too small for the pools.

    References
    ----------
    K. Simonyan, A. Zisserman, "Very deep convolutional networks for large-scale image
    recognition", ICLR 2015, arXiv:1409.1556; with the batch-norm that came later.
    """
    rng = generator("vgg", rng)
    layers: list[Layer] = []
    channels = in_channels
    for width in widths:
        for _ in range(2):
            # Batch-norm takes any constant out again, so that a bias would do nothing.
            conv = Conv2d(channels, width, 3, padding=1, bias=False, rng=rng, dtype=dtype)
            layers += [conv, BatchNorm2d(width, dtype=dtype), ReLU()]
            channels = width
        layers.append(MaxPool2d(2))
    layers.append(Flatten())
    features = size(Sequential(*layers).output_shape((1, in_channels, *image_size)))
    return Sequential(*layers, Linear(features, num_classes, rng=rng, dtype=dtype))
