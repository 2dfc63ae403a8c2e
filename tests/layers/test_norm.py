"""Normalisation layers: running statistics and modes equal PyTorch's."""

import numpy as np
import pytest

from minicnn import BatchNorm2d, GroupNorm, LayerNorm
from strategies import normal


@pytest.mark.parametrize("momentum", [0.1, 0.7, None])
def test_running_statistics_follow_pytorchs(momentum, torch):
    ours = BatchNorm2d(3, momentum=momentum, dtype=np.float64)
    theirs = torch.nn.BatchNorm2d(3, momentum=momentum, dtype=torch.float64)
    rng = np.random.default_rng(0)
    for _ in range(4):
        x = 3 * normal(rng, (5, 3, 2, 4)) + 1
        y, _ = ours.forward(x)
        np.testing.assert_allclose(y, theirs(torch.tensor(x)).detach().numpy(), atol=1e-12)
    for name, a in ours.state_dict().items():
        np.testing.assert_allclose(a, theirs.state_dict()[name].numpy(), rtol=1e-12)
    theirs.eval()
    np.testing.assert_allclose(ours(x), theirs(torch.tensor(x)).detach().numpy(), atol=1e-12)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
    layer = BatchNorm2d(2, dtype=np.float64)
    x = 3 * normal(np.random.default_rng(0), (4, 2, 3, 3)) + 5
    layer.forward(x)
    held = {name: a.copy() for name, a in layer.buffers.items()}
    layer.eval()
    y, cache = layer.forward(x)
    assert abs(y.mean()) > 1, "the batch's own mean was used"
    layer.backward(y, cache)
    for name, a in layer.buffers.items():
        np.testing.assert_array_equal(a, held[name])


def test_without_running_statistics_evaluation_uses_the_batch():
    layer = BatchNorm2d(2, track_running_stats=False, dtype=np.float64)
    x = normal(np.random.default_rng(0), (4, 2, 3, 3)) + 5
    assert not layer.buffers
    np.testing.assert_allclose(layer(x).mean(axis=(0, 2, 3)), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BatchNorm2d(0), "BatchNorm2d: num_features: expected an integer >= 1, got 0"),
        (lambda: BatchNorm2d(2)(np.zeros((3, 2), "f4")), "BatchNorm2d: x: expected 4 axes"),
        (lambda: BatchNorm2d(2).forward(np.zeros((0, 2, 3, 3), "f4")), "x: expected more than 1"),
        (lambda: LayerNorm((2, 0)), "LayerNorm: normalized_shape: expected an integer >= 1, got 0"),
        (lambda: GroupNorm(3, 4), "GroupNorm: num_groups: expected a divisor of num_channels=4"),
        (lambda: BatchNorm2d(2).summary((3, 4, 4)), r"expected \(N, 2, H, W\), got \(1, 3, 4, 4\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
