"""Activation layers call the op of their name with their options."""

import numpy as np
import pytest

from minicnn import layers
from strategies import normal

X = normal(np.random.default_rng(0), (4, 5))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ReLU", {}),
        ("LeakyReLU", {"negative_slope": 0.3}),
        ("ELU", {"alpha": 0.7}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("GELU", {}),
        ("GELU", {"approximate": "tanh"}),
        ("SiLU", {}),
        ("Softplus", {"beta": 2.0, "threshold": 1.0}),
        ("Softmax", {"dim": 1}),
        ("LogSoftmax", {"dim": 0}),
    ],
)
def test_equals_pytorch(name, options, torch):
    layer = getattr(layers, name)(**options)
    x = torch.tensor(X, requires_grad=True)
    expected = getattr(torch.nn, name)(**options)(x)
    y, cache = layer.forward(X)
    np.testing.assert_allclose(y, expected.detach().numpy(), rtol=1e-12, atol=1e-14)
    dy = normal(np.random.default_rng(1), X.shape)
    expected.backward(torch.tensor(dy))
    np.testing.assert_allclose(layer.backward(dy, cache), x.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_printed_form():
    assert repr(layers.ReLU()) == "ReLU()"
    assert repr(layers.LeakyReLU(0.2)) == "LeakyReLU(negative_slope=0.2)"
