"""Networks of layers: order, nesting, shortcuts, and a PyTorch network beside ours."""

import numpy as np
import pytest

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    gradcheck,
    ops,
)
from strategies import normal


def small_network(dtype=np.float64):
    rng = np.random.default_rng(0)
    kwargs = {"rng": rng, "dtype": dtype}
    return Sequential(
        Conv2d(1, 4, 3, padding=1, **kwargs),
        BatchNorm2d(4, dtype=dtype),
        ReLU(),
        Residual(Sequential(Conv2d(4, 4, 3, padding=1, **kwargs), ReLU())),
        MaxPool2d(2),
        Flatten(),
        Linear(4 * 3 * 3, 5, **kwargs),
    )


def test_gradients_of_a_whole_network():
    x = normal(np.random.default_rng(1), (2, 1, 6, 6))
    assert gradcheck(small_network(), x, rtol=1e-5)


def test_equals_a_pytorch_network_with_the_same_weights(torch):
    """Loss, gradient to the input and every parameter's gradient, through cross-entropy."""
    nn = torch.nn
    ours = Sequential(
        Conv2d(1, 4, 3, rng=0, dtype=np.float64),
        BatchNorm2d(4, dtype=np.float64),
        ReLU(),
        MaxPool2d(2),
        Sequential(Conv2d(4, 6, 2, rng=1, dtype=np.float64), ReLU()),
        Flatten(),
        Linear(24, 3, rng=2, dtype=np.float64),
    )
    theirs = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Sequential(nn.Conv2d(4, 6, 2), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(24, 3),
    ).double()
    ours.load_state_dict(theirs.state_dict())
    rng = np.random.default_rng(0)
    x, y = normal(rng, (5, 1, 8, 8)), rng.integers(0, 3, 5)

    out, caches = ours.forward(x)
    loss, cache = ops.cross_entropy_forward(out, y)
    dx = ours.backward(ops.cross_entropy_backward(1.0, cache), caches)
    tx = torch.tensor(x, requires_grad=True)
    t_loss = nn.functional.cross_entropy(theirs(tx), torch.tensor(y))
    t_loss.backward()

    np.testing.assert_allclose(loss, t_loss.item(), rtol=1e-12)
    np.testing.assert_allclose(dx, tx.grad.numpy(), rtol=1e-8, atol=1e-12)
    expected = dict(theirs.named_parameters())
    names = []
    for name, _, g in ours.named_params():
        names.append(name)
        np.testing.assert_allclose(g, expected[name].grad.numpy(), rtol=1e-8, atol=1e-12)
    assert names == list(expected)
    for name, a in ours.state_dict().items():
        np.testing.assert_allclose(a, theirs.state_dict()[name].numpy(), rtol=1e-12)


def test_indexing_slicing_and_appending():
    model = small_network()
    assert len(model) == 7
    assert isinstance(model[-1], Linear)
    assert [type(layer) for layer in model[:2]] == [Conv2d, BatchNorm2d]
    assert model[:2][0] is model[0]
    assert model.append(ReLU()) is model
    assert isinstance(model[7], ReLU)
    with pytest.raises(TypeError, match="layer 0: expected a Layer, got function"):
        model.append(lambda x: x)


def test_printed_form_nests():
    text = repr(Sequential(ReLU(), Residual(Sequential(ReLU()))))
    assert text == (
        "Sequential(\n"
        "  (0): ReLU()\n"
        "  (1): Residual(\n"
        "    (body): Sequential(\n"
        "      (0): ReLU()\n"
        "    )\n"
        "  )\n"
        ")"
    )


def test_an_error_says_in_which_layer():
    model = Sequential(ReLU(), Sequential(ReLU(), Linear(3, 2)))
    with pytest.raises(ValueError, match="linear: x: expected") as error:
        model(np.zeros((2, 4), np.float32))
    assert error.value.__notes__ == ["in layer 1: Linear", "in layer 1: Sequential"]


def test_residual_never_broadcasts():
    layer = Residual(Conv2d(2, 1, 3, padding=1, dtype=np.float64))
    with pytest.raises(ValueError, match=r"Residual: body: expected the shortcut's shape"):
        layer.forward(np.zeros((1, 2, 4, 4)))
    with pytest.raises(ValueError, match=r"Residual: body: expected the shortcut's shape"):
        layer.summary((2, 4, 4))


def test_caches_of_another_model_are_refused():
    x = np.ones((2, 3))
    _, caches = Sequential(ReLU(), ReLU()).forward(x)
    with pytest.raises(ValueError, match=r"backward: cache: expected the 1 caches .* got 2"):
        Sequential(ReLU()).backward(x, caches)


def test_residual_takes_layers():
    with pytest.raises(TypeError, match="Residual: body: expected a Layer, got int"):
        Residual(3)
    with pytest.raises(TypeError, match="Residual: shortcut: expected a Layer, got str"):
        Residual(ReLU(), "x")


def test_empty_network_and_empty_batch():
    x = np.ones((2, 3))
    y, caches = Sequential().forward(x)
    np.testing.assert_array_equal(y, x)
    np.testing.assert_array_equal(Sequential().backward(x, caches), x)
    model = small_network().eval()
    y, caches = model.forward(np.zeros((0, 1, 6, 6)))
    assert y.shape == (0, 5)
    assert model.backward(y, caches).shape == (0, 1, 6, 6)
    assert not any(g.any() for _, _, g in model.named_params())
