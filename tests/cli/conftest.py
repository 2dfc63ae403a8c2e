"""A small data set and a small network, so that a whole run takes a second."""

import json
import sys

import numpy as np
import pytest

from minicnn.cli import main
from minicnn.config import MODELS
from minicnn.data import Dataset, load_digits
from minicnn.layers import Conv2d, Flatten, Linear, MaxPool2d, ReLU, Sequential
from minicnn.shapes import size

SAMPLES = {"train": 600, "test": 200}


def small_cnn(rng, in_channels, num_classes, image_size):
    """A network with the form of the reference network and a hundredth of its work."""
    rng = np.random.default_rng(rng)
    features = [Conv2d(in_channels, 4, 5, stride=2, rng=rng), ReLU(), MaxPool2d(2), Flatten()]
    shape = Sequential(*features).output_shape((1, in_channels, *image_size))
    return Sequential(*features, Linear(size(shape), num_classes, rng=rng))


def first_digits(name, split):
    """The first pictures of the digits; no other data set is at hand."""
    assert name == "digits"
    x, y, classes = load_digits(split)
    return Dataset(x[: SAMPLES[split]], y[: SAMPLES[split]], classes)


def patch(monkeypatch):
    monkeypatch.setattr("minicnn.config.load", first_digits)
    monkeypatch.setitem(MODELS, "mnist_cnn", small_cnn)
    monkeypatch.setitem(sys.modules, "cupy", None)  # --device auto is the CPU on every machine


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """Train small networks, in a folder of its own."""
    patch(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out what takes most of the time of such a small run."""
    monkeypatch.setattr("minicnn.cli.train._draw", lambda *args: [])


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Folder of a run that reads digits fairly well; not to be written to."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        patch(monkeypatch)
        assert (
            main(["train", "--epochs", "6", "--lr", "0.01", "--quiet", "--out", str(folder)]) == 0
        )
    return folder


@pytest.fixture
def cli(capsys):
    """Run a command line: its exit status and what it wrote on stdout and stderr."""

    def run(*argv):
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as end:
            status = end.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture
def records():
    """Read the history of a run, as strictly as JSON wants it."""

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    def read(folder):
        lines = (folder / "history.jsonl").read_text().splitlines()
        return [json.loads(line, parse_constant=refuse) for line in lines]

    return read
