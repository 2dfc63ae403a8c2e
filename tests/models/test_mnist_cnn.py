"""The reference network."""

import numpy as np
import pytest

from minicnn import Linear
from minicnn.models import mnist_cnn


def test_shapes_seed_and_initial_loss():
    model = mnist_cnn(rng=0)
    x = np.random.default_rng(0).random((8, 1, 28, 28), np.float32)
    logits = model(x)
    assert logits.shape == (8, 10)
    assert logits.dtype == np.float32
    assert np.abs(logits).max() < 1, "the first loss must be near log 10"
    np.testing.assert_array_equal(mnist_cnn(rng=0)(x), logits)
    assert (mnist_cnn(rng=1)(x) != logits).any()


def test_other_pictures():
    model = mnist_cnn(in_channels=3, num_classes=4, image_size=(32, 20))
    assert model(np.zeros((2, 3, 32, 20), np.float32)).shape == (2, 4)
    assert isinstance(model[7], Linear)
    assert model[7].in_features == 64 * 5 * 2
    with pytest.raises(ValueError, match="kernel_size: expected at most the padded input"):
        mnist_cnn(image_size=(10, 10))
