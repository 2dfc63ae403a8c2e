"""The VGG-like network."""

import numpy as np
import pytest

from minicnn import Conv2d, Linear
from minicnn.models import vgg_small


def test_shapes_and_seed():
    model = vgg_small(rng=0, widths=(4, 8, 16))
    x = np.random.default_rng(0).random((2, 3, 32, 32), np.float32)
    logits = model(x)
    assert logits.shape == (2, 10)
    np.testing.assert_array_equal(vgg_small(rng=0, widths=(4, 8, 16))(x), logits)
    assert (vgg_small(rng=1, widths=(4, 8, 16))(x) != logits).any()
    convs = [layer for layer in model if isinstance(layer, Conv2d)]
    assert [conv.weight.shape[:2] for conv in convs] == [
        (4, 3), (4, 4), (8, 4), (8, 8), (16, 8), (16, 16),
    ]  # fmt: skip


def test_other_pictures():
    model = vgg_small(in_channels=1, num_classes=3, image_size=(9, 20), widths=(2, 3))
    assert model(np.zeros((2, 1, 9, 20), np.float32)).shape == (2, 3)
    assert isinstance(model[-1], Linear)
    assert model[-1].in_features == 3 * 2 * 5
    with pytest.raises(ValueError, match="kernel_size: expected at most the padded input"):
        vgg_small(image_size=(4, 4))
