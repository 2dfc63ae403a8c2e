"""What every loader returns: pictures, labels and the names of the classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Dataset(NamedTuple):
    """Labelled pictures in memory.

    Attributes
    ----------
    x
        (N, C, H, W) float32 in [0, 1], C-contiguous.
    y
        (N,) int64 in [0, len(classes)).
    classes
        Name of each label.

    Examples
    --------
    >>> from minicnn.data import load_digits
    >>> x, y, classes = load_digits("test")
    >>> x.shape, y.shape, classes[y[0]]
    ((1000, 1, 28, 28), (1000,), '7')
    """

    x: np.ndarray
    y: np.ndarray
    classes: tuple[str, ...]


def from_bytes(
    images: np.ndarray, labels: np.ndarray, classes: tuple[str, ...], name: str
) -> Dataset:
    """Make a `Dataset` of (N, H, W) uint8 pictures and (N,) uint8 labels.

    Raises
    ------
    ValueError
        Wrong rank or dtype, counts that differ, or a label out of range; `name` is what the
        message calls the data.
    """
    for what, array, ndim in (("images", images, 3), ("labels", labels, 1)):
        if array.ndim != ndim or array.dtype != np.uint8:
            raise ValueError(
                f"{name}: {what}: expected {ndim}-d uint8, got shape {array.shape} {array.dtype}"
            )
    if len(images) != len(labels):
        raise ValueError(
            f"{name}: labels: expected {len(images)}, one for each image, got {len(labels)}"
        )
    bad = np.flatnonzero(labels >= len(classes))
    if bad.size:
        raise ValueError(
            f"{name}: labels: expected 0 to {len(classes) - 1}, "
            f"got {labels[bad[0]]} at position {bad[0]}"
        )
    x = np.divide(images[:, None], 255, dtype=np.float32)  # (N, 1, H, W)
    return Dataset(x, labels.astype(np.int64), classes)
