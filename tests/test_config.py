"""What is known about a run: read, checked, and what is made of it."""

import json
import math

import numpy as np
import pytest

from minicnn.config import Config
from minicnn.data import Dataset
from minicnn.runs import Run


def config(**changes):
    settings = {"dataset": "digits", "classes": ("a", "b"), "channels": 1, "image_size": (16, 16)}
    return Config(**(settings | changes))


def test_what_a_later_version_added_is_passed_over(tmp_path):
    run = Run(tmp_path)
    run.write_config(config())
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tomorrow": 1}))
    assert Run(tmp_path).config == config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "Expecting"),
        ("[]", "expected a JSON object, got list"),
        ({"classes": None}, "classes: expected a list of names, got None"),
        ({"classes": [1, 2]}, "classes: expected a list of names"),
        ({"channels": "1"}, "channels: expected an integer >= 1, got '1'"),
        ({"channels": 0}, "channels: expected an integer >= 1, got 0"),
        ({"image_size": [28]}, "image_size: expected an int or a pair"),
        ({"model": "os.system"}, "model: expected one of mnist_cnn, got 'os.system'"),
        ({"dataset": ...}, "dataset"),
    ],
    ids=str,
)
def test_a_damaged_config_is_named(change, message, tmp_path):
    run = Run(tmp_path)
    run.write_config(config())
    path = tmp_path / "config.json"
    if isinstance(change, str):
        path.write_text(change)
    else:
        found = json.loads(path.read_text()) | change
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))
    with pytest.raises(ValueError, match=message) as caught:
        _ = Run(tmp_path).config
    assert str(caught.value).startswith(f"{path}: ")


def test_the_network_has_the_shape_of_the_data():
    model = config(channels=3, image_size=(20, 24), classes=tuple("abcde")).build()
    assert model.output_shape((7, 3, 20, 24)) == (7, 5)


def test_the_loss_smooths_the_labels():
    forward, backward = config(label_smoothing=1.0).loss()
    loss, cache = forward(np.zeros((1, 4)), np.array([2]))
    assert float(loss) == pytest.approx(math.log(4))
    np.testing.assert_allclose(backward(1.0, cache), 0, atol=1e-12)


@pytest.mark.parametrize(
    ("shape", "classes", "message"),
    [
        (
            (3, 1, 16, 16),
            ("a", "c"),
            r"digits \(test\): classes: expected 2 \(a, b\), got 2 \(a, c\)",
        ),
        ((3, 1, 16, 16), tuple("abcdefghijkl"), r"got 12 \(a, b, c, d, e, f, g, h, i, j, ...\)"),
        (
            (3, 1, 28, 28),
            ("a", "b"),
            r"expected pictures of shape \(1, 16, 16\), got \(1, 28, 28\)",
        ),
    ],
)
def test_data_that_does_not_fit_the_run(shape, classes, message, monkeypatch):
    data = Dataset(np.zeros(shape, np.float32), np.zeros(3, int), classes)
    monkeypatch.setattr("minicnn.config.load", lambda name, split: data)
    with pytest.raises(ValueError, match=message):
        config().load("test")


# ------------------------------------------------------------ checkpoints
