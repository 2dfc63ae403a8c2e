"""Saliency, Grad-CAM and occlusion: on networks whose answer is known by hand."""

import numpy as np
import pytest

from minicnn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU, Sequential
from minicnn.plots import grad_cam, layer_outputs, occlusion, saliency
from minicnn.plots.attribution import last_maps


def pictures(n=2, size=6, seed=0):
    return np.random.default_rng(seed).random((n, 1, size, size))


def linear(weight):
    """A network whose score of class k is the sum of weight[k] * x."""
    weight = np.asarray(weight, float)
    layer = Linear(weight[0].size, len(weight), bias=False, dtype=np.float64)
    layer.weight = weight.reshape(len(weight), -1)
    return Sequential(Flatten(), layer)


def test_saliency_of_a_linear_network_is_its_weight():
    weight = np.random.default_rng(1).standard_normal((3, 1, 6, 6))
    model = linear(weight)
    x = pictures()
    for k in range(3):
        np.testing.assert_allclose(saliency(model, x, k), abs(weight[k, 0])[None].repeat(2, 0))
    asked = np.array([2, 0])
    np.testing.assert_allclose(saliency(model, x, asked), abs(weight[asked, 0]))
    predicted = model(x).argmax(axis=1)
    np.testing.assert_allclose(saliency(model, x), abs(weight[predicted, 0]))


def test_saliency_takes_the_largest_channel():
    weight = np.zeros((1, 3, 2, 2))
    weight[0, :, 0, 0] = 1, -5, 2
    assert saliency(linear(weight), np.ones((1, 3, 2, 2)))[0, 0, 0] == 5


def test_the_model_is_left_as_it_was():
    model = Sequential(
        Conv2d(1, 2, 3, rng=0, dtype="f8"),
        BatchNorm2d(2, dtype="f8"),
        ReLU(),
        Dropout(0.5, rng=0),
        Flatten(),
        Linear(32, 3, rng=0, dtype="f8"),
    )
    model[1].eval()
    for _, _, g in model.named_params():
        g[...] = 7
    before = model.state_dict()
    x = pictures()
    for ask in (saliency, grad_cam, occlusion):
        first = ask(model, x)
        np.testing.assert_array_equal(ask(model, x), first, "as in evaluation: nothing is drawn")
    assert [layer.training for layer in model] == [True, False, True, True, True, True]
    assert all((g == 7).all() for _, _, g in model.named_params())
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_grad_cam_weighs_maps_with_their_mean_gradient():
    """Map 0 speaks for the class with weight 3, map 1 against it with weight 1."""
    conv = Conv2d(1, 2, 1, bias=False, dtype="f8")
    conv.weight = np.array([1.0, 2.0]).reshape(2, 1, 1, 1)
    head = Linear(18, 1, bias=False, dtype="f8")
    head.weight = np.repeat([3.0, -1.0], 9)[None]
    model = Sequential(conv, ReLU(), Flatten(), head)
    x = np.arange(-4.0, 5.0).reshape(1, 1, 3, 3)
    expected = np.maximum(3 * np.maximum(x, 0) - np.maximum(2 * x, 0), 0)[0]
    np.testing.assert_allclose(grad_cam(model, x), expected)
    passes = 4 / 9  # before ReLU, the mean gradient is that of the cells that pass
    before = np.maximum(passes * (3 * x - 2 * x), 0)[0]
    np.testing.assert_allclose(grad_cam(model, x, layer=0), before)


def test_the_last_maps():
    model = Sequential(Conv2d(1, 2, 1), ReLU(), MaxPool2d(2), Conv2d(2, 2, 1), MaxPool2d(1))
    assert last_maps(model) == 3
    assert last_maps(model[:3]) == 1
    with pytest.raises(ValueError, match="grad_cam: model: expected a Conv2d"):
        last_maps(Sequential(Flatten()))
    with pytest.raises(ValueError, match=r"grad_cam: layer: expected one with maps .* layer 1"):
        grad_cam(Sequential(Conv2d(1, 2, 1, dtype="f8"), Flatten()), pictures(), layer=1)


def test_occlusion_is_how_far_the_probability_falls():
    """One pixel decides: only patches over it matter, and each of them equally."""
    weight = np.zeros((2, 1, 6, 6))
    weight[1, 0, 2, 3] = 4
    model, x = linear(weight), np.ones((1, 1, 6, 6))
    fall = 1 / (1 + np.exp(-4)) - 0.5
    found = occlusion(model, x, patch=1)[0]
    expected = np.zeros((6, 6))
    expected[2, 3] = fall
    np.testing.assert_allclose(found, expected, atol=1e-12)
    found = occlusion(model, x, patch=2)[0]
    assert (found[1:4, 2:5] > 0).all()
    np.testing.assert_allclose(found[2, 3], fall)
    np.testing.assert_allclose(found[1, 2], fall / 4)
    np.testing.assert_allclose(occlusion(model, x, 0, patch=1)[0, 2, 3], -fall)
    np.testing.assert_allclose(occlusion(model, x, patch=1, value=1.0), 0, atol=1e-12)


def test_pixels_that_no_patch_covers_are_nan():
    found = occlusion(linear(np.ones((2, 1, 5, 5))), np.ones((1, 1, 5, 5)), patch=2, stride=2)[0]
    assert np.isnan(found[4]).all()
    assert np.isnan(found[:, 4]).all()
    assert np.isfinite(found[:4, :4]).all()


def test_layer_outputs_go_into_sequences():
    inner = Sequential(Conv2d(1, 2, 3, rng=0, dtype="f8"), ReLU())
    model = Sequential(inner, Flatten())
    x = pictures()
    found = list(layer_outputs(model, x))
    assert [name for name, _, _ in found] == ["0.0", "0.1", "1"]
    np.testing.assert_array_equal(found[-1][2], model(x))
    np.testing.assert_array_equal(found[1][2], inner(x))


@pytest.mark.parametrize("ask", [saliency, grad_cam, occlusion])
def test_bad_questions(ask):
    model = Sequential(Conv2d(1, 2, 3, rng=0, dtype="f8"), Flatten(), Linear(32, 3, dtype="f8"))
    with pytest.raises(ValueError, match=f"{ask.__name__}: target: expected classes 0 to 2"):
        ask(model, pictures(), 3)
    with pytest.raises(ValueError, match=f"{ask.__name__}: x: expected 4 axes"):
        ask(model, pictures()[0])
