"""Convolution layers: PyTorch's initial weights, names and printed form."""

import numpy as np
import pytest

from minicnn import Conv2d, ConvTranspose2d


@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
def test_initial_weights_are_pytorchs_uniform(kind, torch):
    ours = kind(8, 64, 5, groups=2, rng=0)
    theirs = getattr(torch.nn, kind.__name__)(8, 64, 5, groups=2)
    for a, t in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        t = t.detach().numpy()
        assert a.shape == t.shape
        assert a.dtype == np.float32
        np.testing.assert_allclose(np.abs(a).max(), np.abs(t).max(), rtol=0.1)
        np.testing.assert_allclose(a.std(), t.std(), rtol=0.1 if a.ndim > 1 else 0.4)


def test_seed_fixes_the_weights():
    np.testing.assert_array_equal(Conv2d(1, 2, 3, rng=5).weight, Conv2d(1, 2, 3, rng=5).weight)
    rng = np.random.default_rng(5)
    first, second = Conv2d(1, 2, 3, rng=rng), Conv2d(1, 2, 3, rng=rng)
    assert (first.weight != second.weight).all()


def test_printed_form():
    assert repr(Conv2d(1, 2, 3)) == "Conv2d(1, 2, kernel_size=(3, 3), stride=(1, 1))"
    assert "groups=2, bias=False" in repr(Conv2d(2, 4, 3, padding=1, groups=2, bias=False))


@pytest.mark.parametrize("kind", [Conv2d, ConvTranspose2d])
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_channels": 0}, "in_channels: expected an integer >= 1, got 0"),
        ({"out_channels": -1}, "out_channels: expected an integer >= 1, got -1"),
        ({"kernel_size": 0}, "kernel_size: expected an integer >= 1, got 0"),
        ({"stride": 0}, "stride: expected an integer >= 1, got 0"),
        ({"padding": -1}, "padding: expected an integer >= 0, got -1"),
        ({"dilation": 0}, "dilation: expected an integer >= 1, got 0"),
        ({"groups": 0}, "groups: expected an integer >= 1, got 0"),
        ({"groups": 3}, "in_channels: expected a multiple of groups=3, got 4"),
    ],
)
def test_bad_arguments_are_named_at_construction(kind, kwargs, message):
    with pytest.raises(ValueError, match=f"{kind.__name__}: {message}"):
        kind(**{"in_channels": 4, "out_channels": 6, "kernel_size": 3, **kwargs})
