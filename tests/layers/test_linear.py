"""Linear and Flatten as layers."""

import numpy as np
import pytest

from minicnn import Flatten, Linear


def test_initial_weights_are_pytorchs_uniform(torch):
    ours, theirs = Linear(100, 300, rng=0), torch.nn.Linear(100, 300)
    assert ours.weight.shape == tuple(theirs.weight.shape)
    for a in (ours.weight, ours.bias):
        assert np.abs(a).max() <= 0.1
        np.testing.assert_allclose(a.std(), 0.1 / np.sqrt(3), rtol=0.1)


def test_flatten_shapes():
    assert Flatten().output_shape((2, 3, 4, 5)) == (2, 60)
    assert Flatten(2, 3).output_shape((2, 3, 4, 5)) == (2, 3, 20)
    assert Flatten()(np.zeros((0, 3, 2))).shape == (0, 6)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="Linear: in_features: expected an integer >= 1, got 0"):
        Linear(0, 1)
    with pytest.raises(TypeError, match=r"Linear: out_features: expected an integer >= 1, got 1.5"):
        Linear(1, 1.5)
    with pytest.raises(ValueError, match="Linear: input_shape: expected 3 features, got 4"):
        Linear(3, 1).summary((4,))
