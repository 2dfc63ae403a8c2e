"""The reference network: two convolutions, two pools, two fully connected layers."""

from __future__ import annotations

from typing import Any

import numpy as np

from minicnn.init import Rng, generator
from minicnn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from minicnn.shapes import Pair, size


def mnist_cnn(
    rng: Rng = 0,
    in_channels: int = 1,
    num_classes: int = 10,
    image_size: Pair = (28, 28),
    dtype: Any = np.float32,
) -> Sequential:
    """Build the reference network, 184,586 parameters for 28x28 digits.

    Parameters
    ----------
    rng : int or numpy.random.Generator
        Draws the initial weights.
    in_channels, num_classes : int
    image_size : pair of int
        Rows and columns, at least 16.
    dtype : float32 or float64

    Returns
    -------
    Sequential
        Maps (N, in_channels, *image_size) to (N, num_classes) logits.

    Raises
    ------
    ValueError
        If the images are too small for the two convolutions and pools.

    References
    ----------
    After Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to
    document recognition", Proc. IEEE 1998.
    """
    rng = generator("mnist_cnn", rng)
    features = [
        Conv2d(in_channels, 32, 5, rng=rng, dtype=dtype),
        ReLU(),
        MaxPool2d(2),
        Conv2d(32, 64, 5, rng=rng, dtype=dtype),
        ReLU(),
        MaxPool2d(2),
        Flatten(),
    ]
    shape = Sequential(*features).output_shape((1, in_channels, *image_size))
    return Sequential(
        *features,
        Linear(size(shape), 128, rng=rng, dtype=dtype),
        ReLU(),
        Linear(128, num_classes, rng=rng, dtype=dtype),
    )
