"""The residual network."""

import numpy as np

from minicnn import Residual
from minicnn.models import resnet_small


def test_shapes_and_seed():
    model = resnet_small(rng=0, widths=(4, 8), blocks=2)
    x = np.random.default_rng(0).random((2, 3, 9, 12), np.float32)
    logits = model(x)
    assert logits.shape == (2, 10)
    np.testing.assert_array_equal(resnet_small(rng=0, widths=(4, 8), blocks=2)(x), logits)
    assert (resnet_small(rng=1, widths=(4, 8), blocks=2)(x) != logits).any()


def test_only_the_first_block_of_a_wider_group_has_a_shortcut_of_its_own():
    model = resnet_small(widths=(4, 8, 16), blocks=2)
    blocks = [layer for layer in model if isinstance(layer, Residual)]
    assert [block.shortcut is not None for block in blocks] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert [block.body[0].window().stride for block in blocks] == [
        (1, 1), (1, 1), (2, 2), (1, 1), (2, 2), (1, 1),
    ]  # fmt: skip
