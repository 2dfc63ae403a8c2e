"""Pooling layers: options reach the op, and the described sizes are right."""

import numpy as np
import pytest

from minicnn import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from strategies import normal

X = normal(np.random.default_rng(0), (2, 3, 7, 6))


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (MaxPool2d, {"kernel_size": 2}),
        (MaxPool2d, {"kernel_size": (3, 2), "stride": 2, "padding": 1, "ceil_mode": True}),
        (MaxPool2d, {"kernel_size": 2, "stride": 1, "dilation": 2}),
        (AvgPool2d, {"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}),
        (AvgPool2d, {"kernel_size": 2, "ceil_mode": True, "divisor_override": 3}),
        (AdaptiveAvgPool2d, {"output_size": (3, None)}),
        (AdaptiveAvgPool2d, {"output_size": 1}),
    ],
)
def test_equals_pytorch_and_its_own_description(kind, kwargs, torch):
    layer = kind(**kwargs)
    y = layer(X)
    expected = getattr(torch.nn, kind.__name__)(**kwargs)(torch.tensor(X))
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-12, atol=1e-14)
    assert layer.output_shape(X.shape) == y.shape


@pytest.mark.parametrize("kind", [MaxPool2d, AvgPool2d])
def test_bad_arguments_are_named_at_construction(kind):
    with pytest.raises(ValueError, match=f"{kind.__name__}: stride: expected an integer >= 1"):
        kind(2, stride=0)
    with pytest.raises(
        ValueError, match=f"{kind.__name__}: kernel_size: expected at most the padded"
    ):
        kind(8).summary((3, 7, 6))
    with pytest.raises(TypeError, match=f"{kind.__name__}: padding: .* got 'same'"):
        kind(3, padding="same")


def test_bad_output_size_is_named_at_construction():
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d: output_size: .* got \(1, 2, 3\)"):
        AdaptiveAvgPool2d((1, 2, 3))
    with pytest.raises(ValueError, match=r"AdaptiveAvgPool2d: output_size: .*>= 1, got 0"):
        AdaptiveAvgPool2d(0)
