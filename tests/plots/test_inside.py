"""Pictures of what a network sees: each map is where it belongs."""

import numpy as np
import pytest

from figures import assert_legible
from minicnn import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from minicnn.plots import (
    THEMES,
    grad_cam,
    layer_outputs,
    occlusion,
    plot_arrays,
    plot_feature_maps,
    plot_grad_cam,
    plot_occlusion,
    plot_saliency,
    saliency,
)


def network(channels=1):
    return Sequential(
        Conv2d(channels, 4, 3, padding=1, rng=0),
        ReLU(),
        MaxPool2d(2),
        Conv2d(4, 12, 3, stride=2, rng=1),
        ReLU(),
        Flatten(),
        Linear(108, 3, rng=2),
    )


def pictures(n=3, channels=1):
    x = np.zeros((n, channels, 16, 16), "f4")
    x[:, :, 4:12, 6:9] = np.random.default_rng(0).random((n, channels, 8, 3))
    return x


NAMES = ("one", "a very long name of a class", "three")
FIGURES = {
    "feature maps": lambda t: plot_feature_maps(network(), pictures()[0], theme=t),
    "RGB feature maps": lambda t: plot_feature_maps(network(3), pictures(1, 3), n=3, theme=t),
    "saliency": lambda t: plot_saliency(network(), pictures(), classes=NAMES, theme=t),
    "saliency of one": lambda t: plot_saliency(network(3), pictures(1, 3), 2, theme=t),
    "Grad-CAM": lambda t: plot_grad_cam(network(), pictures(), classes=NAMES, theme=t),
    "occlusion": lambda t: plot_occlusion(network(), pictures(), theme=t),
    "arrays": lambda t: plot_arrays(
        {"x": np.eye(5), "a long title": np.arange(3.0), "y": [[-1e-9, 1234.5]]}, theme=t
    ),
}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_inside_apart_and_legible(name, theme):
    assert_legible(FIGURES[name](theme), theme)


@pytest.mark.parametrize("name", FIGURES)
def test_an_unknown_theme_is_refused(name):
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'blue'"):
        FIGURES[name]("blue")


def images(figure):
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def test_feature_maps_are_those_that_vary_most():
    model, x = network(), pictures()[:1]
    figure = plot_feature_maps(model, x, n=3)
    shown = images(figure)
    outputs = [x, *(y for _, _, y in layer_outputs(model, x) if y.ndim == 4)]
    at = 0
    for y in outputs:
        count = min(3, y.shape[1])
        chosen = sorted(np.argsort(-y[0].astype("f8").var(axis=(1, 2)), kind="stable")[:count])
        for index in chosen:
            np.testing.assert_allclose(shown[at], y[0, index], rtol=1e-6)
            at += 1
    assert at == len(shown)
    labels = [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]
    assert labels[:3] == ["input\n1 of 16x16", "0  Conv2d\n4 of 16x16", "1  ReLU\n4 of 16x16"]


@pytest.mark.parametrize(
    ("plot", "numbers"),
    [(plot_saliency, saliency), (plot_grad_cam, grad_cam), (plot_occlusion, occlusion)],
)
def test_below_each_picture_is_its_map(plot, numbers):
    model, x = network(), pictures()
    figure = plot(model, x, classes=NAMES)
    shown, maps = images(figure), numbers(model, x)
    for i in range(3):
        np.testing.assert_array_equal(shown[i], x[i, 0])
        np.testing.assert_allclose(shown[3 + i], maps[i], rtol=1e-6)
    predicted = model(x).argmax(axis=1)
    expected = [NAMES[k] if k != 1 else "a very long n…" for k in predicted]
    assert [ax.get_title() for ax in figure.axes[:3]] == expected


def test_a_cell_of_grad_cam_stands_over_the_pixels_that_it_sees():
    """Cell (i, j) of the last maps sees 8x8 pixels that begin at (4 i - 1, 4 j - 1)."""
    model = network()
    figure = plot_grad_cam(model, pictures(1))
    image = figure.axes[1].images[0]
    left, right, bottom, top = image.get_extent()
    assert image.get_array().shape == (3, 3)
    centres = left + (np.arange(3) + 0.5) * (right - left) / 3
    seen = []
    for j in range(3):
        dy = np.zeros((1, 12, 3, 3), "f4")
        dy[0, :, 1, j] = 1
        x = np.random.default_rng(0).random((1, 1, 16, 16)).astype("f4")
        total = np.zeros((16, 16))
        for _ in range(30):  # max-pooling hides pixels that do not win
            x = np.random.default_rng(len(seen) + int(total.sum() * 1e6) % 997).random(
                x.shape, "f4"
            )
            _, caches = model[:4].forward(x)
            total += np.abs(model[:4].backward(dy, caches)[0, 0])
        columns = np.flatnonzero(total.any(axis=0))
        seen.append((columns[0] + columns[-1]) / 2)
    np.testing.assert_allclose(centres[1:], seen[1:], atol=0.51)  # the first looks past the edge
    np.testing.assert_allclose(np.diff(centres), 4)
    assert (top, bottom) == (left, right), "the network treats rows and columns alike"


def test_signed_maps_have_a_scale_around_zero():
    image = plot_occlusion(network(), pictures()).axes[3].images[0]
    low, high = image.get_clim()
    assert low == -high < 0
    image = plot_saliency(network(), pictures()).axes[3].images[0]
    assert image.get_clim()[0] == 0


def test_arrays_show_every_number_in_its_cell():
    a = np.array([[1.0, -2.5], [0.004, np.nan]])
    figure = plot_arrays({"a": a, "v": np.arange(3)}, mark={"a": [[True, False], [False, False]]})
    first, second = figure.axes
    assert {t.get_position(): t.get_text() for t in first.texts} == {
        (0, 0): "1",
        (1, 0): "-2.5",
        (0, 1): "0.004",
    }
    assert [p.get_xy() for p in first.patches] == [(-0.5, -0.5)]
    assert not second.patches
    assert [ax.get_title() for ax in figure.axes] == ["a  2x2", "v  1x3"]
    np.testing.assert_array_equal(first.images[0].get_array().filled(np.nan), a)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plot_arrays({}), "plot_arrays: arrays: expected at least one"),
        (lambda: plot_arrays({"x": np.ones((2, 2, 2))}), "x: expected a matrix, got shape"),
        (lambda: plot_arrays({"x": np.ones((1, 99))}), "x: expected at most 40 rows and columns"),
        (lambda: plot_saliency(network(2), pictures(1, 2)), "x: expected 1 or 3 channels, got 2"),
        (lambda: plot_saliency(network(), pictures(0)), "x: expected at least one picture"),
        (lambda: plot_feature_maps(network(), pictures()[0], n=0), "n: expected an integer >= 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
