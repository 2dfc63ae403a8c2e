"""``minicnn summary``."""

import pytest

from minicnn.models import mnist_cnn


@pytest.mark.parametrize(
    ("argv", "model", "shape", "batch"),
    [
        ([], mnist_cnn(), (1, 28, 28), 1),
        (["--batch-size", "64"], mnist_cnn(), (1, 28, 28), 64),
        (
            ["--input-shape", "3", "32", "40", "--classes", "7"],
            mnist_cnn(0, 3, 7, (32, 40)),
            (3, 32, 40),
            1,
        ),
    ],
)
def test_the_reference_network(argv, model, shape, batch, cli):
    assert cli("summary", *argv) == (0, f"{model.summary(shape, batch)}\n", "")


def test_the_network_of_a_run(trained, cli):
    status, out, _ = cli("summary", "--run", trained)
    assert status == 0
    assert "Conv2d(1, 4, " in out  # the small network of these tests
    assert "input 1x1x28x28" in out


def test_pictures_that_are_too_small(cli):
    status, out, err = cli("summary", "--input-shape", "1", "8", "8")
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert "in layer 3: Conv2d" in err
