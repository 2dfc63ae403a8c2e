"""From bytes to the `Dataset` that models take."""

import numpy as np
import pytest

from minicnn.data.dataset import Dataset, from_bytes

IMAGES = np.array([[[0, 255, 51]], [[102, 1, 2]]], np.uint8)
LABELS = np.array([1, 0], np.uint8)


def test_values_and_types():
    data = from_bytes(IMAGES, LABELS, ("no", "yes"), "here")
    assert isinstance(data, Dataset)
    assert data.x.shape == (2, 1, 1, 3)
    assert data.x.dtype == np.float32
    assert data.x.flags.c_contiguous
    np.testing.assert_array_equal(data.x[0, 0, 0], np.float32([0, 1, 0.2]))
    assert data.y.dtype == np.int64
    assert data.y.tolist() == [1, 0]
    assert data.classes == ("no", "yes")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[0], LABELS, r"here: images: expected 3-d uint8, got shape \(1, 3\) uint8"),
        (IMAGES.astype(int), LABELS, "here: images: expected 3-d uint8, got .* int64"),
        (IMAGES, LABELS[:, None], "here: labels: expected 1-d uint8, got shape"),
        (IMAGES, LABELS.astype(float), "here: labels: expected 1-d uint8, got .* float64"),
        (IMAGES, LABELS[:1], "here: labels: expected 2, one for each image, got 1"),
        (IMAGES, LABELS + 1, "here: labels: expected 0 to 1, got 2 at position 0"),
    ],
)
def test_what_does_not_fit_is_named(images, labels, message):
    with pytest.raises(ValueError, match=message):
        from_bytes(images, labels, ("no", "yes"), "here")
