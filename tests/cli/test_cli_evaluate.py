"""``minicnn evaluate``."""

import re

import numpy as np
import pytest
from PIL import Image

from minicnn.backend import is_cupy
from minicnn.runs import Run
from minicnn.train import predict


def test_it_finds_the_numbers_of_the_history(trained, cli, records):
    last = records(trained)[-1]
    status, out, err = cli("evaluate", "--run", trained)
    assert (status, err) == (0, "")
    assert f"loss      {last['test_loss']:.4f}\n" in out
    right = round(200 * last["test_accuracy"])
    assert f"accuracy  {last['test_accuracy']:.2%} ({right} of 200)\n" in out


def test_every_class_has_its_line(trained, cli):
    out = cli("evaluate", "--run", trained)[1]
    run = Run(trained)
    x, y, classes = run.config.load("test")
    predicted = run.load_model()(x).argmax(axis=1)
    lines = out.split("\n\n")[1].splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(classes)
    for label, line in enumerate(lines):
        of_class = predicted[y == label]
        right, total = int((of_class == label).sum()), len(of_class)
        assert line.split()[1:4] == [str(right), str(total), f"{right / total:.2%}"]
        others = np.bincount(of_class[of_class != label], minlength=10)
        taken_for = re.search(r"(\d) \((\d+)\)$", line)
        if others.any():
            assert others[int(taken_for[1])] == int(taken_for[2]) == others.max()
        else:
            assert taken_for is None


def test_other_split(trained, cli):
    out = cli("evaluate", "--run", trained, "--split", "train")[1]
    assert "digits (train), 600 pictures" in out


def test_the_newest_run_is_the_default(trained, cli, tmp_path):
    status, _, err = cli("evaluate")
    assert status == 1
    assert "runs: expected a folder with runs, got none (fix: minicnn train" in err
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained)
    assert cli("evaluate")[1].startswith("run       runs/mine\n")


@pytest.mark.parametrize("names", ["ab", "0123456789"])
def test_a_data_set_that_does_not_fit(names, trained, cli, tmp_path):
    for split in ("train", "test"):
        for name in names:
            (tmp_path / "d" / split / name).mkdir(parents=True)
            Image.new("L", (28, 28)).save(tmp_path / "d" / split / name / "1.png")
    status, out, err = cli("evaluate", "--run", trained, "--dataset", "d")
    if names == "ab":
        assert (status, out) == (1, "")
        assert "d (test): classes: expected 10 (0, 1, 2, 3, 4, 5, 6, 7, 8, 9), got 2 (a, b)" in err
    else:
        assert status == 0
        assert "d (test), 10 pictures" in out
        assert "(1 of 10)" in out


def test_label_smoothing_is_in_the_loss_as_in_training(cli, tmp_path, records, no_pictures):
    assert cli("train", "--epochs", 1, "--label-smoothing", 0.3, "--quiet", "--out", "r")[0] == 0
    out = cli("evaluate", "--run", "r")[1]
    assert f"loss      {records(tmp_path / 'r')[-1]['test_loss']:.4f}\n" in out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "config.json").unlink(), "got no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: "),
        (lambda folder: (folder / "weights.safetensors").unlink(), "expected a weight file"),
        (lambda folder: (folder / "weights.safetensors").write_bytes(b"x"), "safetensors"),
    ],
)
def test_a_damaged_run_is_one_line(spoil, message, trained, cli, tmp_path):
    for name in ("config.json", "weights.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    spoil(tmp_path)
    status, out, err = cli("evaluate", "--run", tmp_path)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert message in err


def test_on_the_gpu_it_says_the_same(cupy, trained, cli, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minicnn.cli.evaluate.predict", lambda m, x: seen.append(is_cupy(x)) or predict(m, x)
    )
    on_gpu = cli("evaluate", "--run", trained, "--device", "cuda")
    assert on_gpu == cli("evaluate", "--run", trained, "--device", "cpu")
    assert on_gpu[0] == 0
    assert seen == [True, False]
