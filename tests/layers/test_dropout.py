"""Dropout: drops in training only, and what it drops follows from the seed."""

import numpy as np
import pytest

from minicnn import Dropout


def test_training_drops_and_evaluation_does_not():
    x = np.ones((1000,), np.float32)
    layer = Dropout(0.25, rng=0)
    y, cache = layer.forward(x)
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    np.testing.assert_array_equal(layer.backward(x, cache), y)
    np.testing.assert_array_equal(layer(x), x)
    np.testing.assert_array_equal(layer.eval().forward(x)[0], x)


def test_seed_fixes_the_sequence_of_masks():
    x = np.ones((100,))
    one, two = Dropout(rng=3), Dropout(rng=3)
    first, second = one.forward(x)[0], one.forward(x)[0]
    assert (first != second).any()
    np.testing.assert_array_equal(two.forward(x)[0], first)
    np.testing.assert_array_equal(two.forward(x)[0], second)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_bad_probability_is_named(p):
    with pytest.raises(ValueError, match="Dropout: p: expected a"):
        Dropout(p)
