"""``minicnn predict``."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from minicnn import ops
from minicnn.data import load_digits
from minicnn.runs import Run

# Positions of well-written test digits.
CLEAR = range(40)


@pytest.fixture
def sheet(tmp_path):
    """Write a test digit as dark ink on a large light sheet, away from the middle."""

    def sheet(position, name):
        x = load_digits("test").x[position, 0]
        ink = Image.fromarray((x * 220).astype(np.uint8)).resize((280, 280), Image.BICUBIC)
        paper = Image.new("L", (900, 640), 240)
        paper.paste(Image.eval(ink, lambda v: 240 - v), (520, 60))
        paper.save(tmp_path / name)
        return tmp_path / name

    return sheet


def shares(out):
    """The listed classes and probabilities."""
    pairs = (line.split() for line in out.splitlines() if line.startswith("  "))
    return {pair[0]: float(pair[-1].rstrip("%")) / 100 for pair in pairs}


def test_dark_ink_on_a_large_sheet_is_read(trained, sheet, cli):
    y = load_digits("test").y[CLEAR]
    paths = [sheet(i, f"{i}.png") for i in CLEAR]
    status, out, err = cli("predict", *paths, "--top", 1, "--run", trained)
    assert (status, err) == (0, "")
    answers = [line.rpartition(": ") for line in out.splitlines() if not line.startswith("  ")]
    assert [path for path, _, _ in answers] == [str(path) for path in paths]
    as_is = Run(trained).load_model()(load_digits("test").x[CLEAR]).argmax(axis=1)
    right = (as_is == y).sum()
    assert right > 30  # of the 28x28 digits themselves
    assert sum(answer == str(label) for (_, _, answer), label in zip(answers, y)) >= right - 5


def test_the_probabilities_are_the_networks(trained, tmp_path, cli):
    x = load_digits("test").x[:1]
    Image.fromarray((x[0, 0] * 255).round().astype(np.uint8)).save(tmp_path / "d.png")
    expected = ops.softmax_forward(Run(trained).load_model()(x))[0][0]
    out = cli("predict", "d.png", "--run", trained, "--top", 99)[1]
    found = shares(out)
    assert list(found) == [str(i) for i in np.argsort(-expected, kind="stable")]
    assert out.startswith(f"d.png: {expected.argmax()}\n")
    for name, share in found.items():
        assert share == pytest.approx(expected[int(name)], abs=6e-4)
    for line in out.splitlines()[1:]:
        assert line.count("█") == round(30 * expected[int(line.split()[0])])


def test_three_classes_are_listed_unless_told(trained, sheet, cli):
    path = sheet(0, "a.png")
    assert len(shares(cli("predict", path, "--run", trained)[1])) == 3
    assert len(shares(cli("predict", path, "--run", trained, "--top", 1)[1])) == 1


def test_what_cannot_be_read_is_named_and_the_rest_is_done(trained, sheet, tmp_path, cli):
    (tmp_path / "text.png").write_text("no picture")
    a, b = sheet(0, "a.png"), sheet(1, "b.png")
    status, out, err = cli("predict", a, "none.png", "text.png", b, "--run", trained)
    assert status == 1
    assert f"{a}: " in out
    assert f"{b}: " in out
    missing, broken = err.splitlines()
    assert missing == "minicnn: error: none.png: No such file or directory"
    assert broken.startswith("minicnn: error: text.png: expected a whole picture")


def test_show_draws_what_the_network_sees(trained, tmp_path, cli):
    x = np.zeros((28, 28), np.uint8)
    x[10:20, 5:8] = 255
    x[10:20, 8] = 128
    Image.fromarray(x).save(tmp_path / "bar.png")
    lines = cli("predict", "bar.png", "--show", "--run", trained)[1].splitlines()
    drawn = lines[:28]
    assert {len(line) for line in drawn} == {56}
    assert [line.strip() for line in drawn] == [""] * 10 + ["██████▒▒"] * 10 + [""] * 8
    assert drawn[10].index("█") == 10
    assert lines[28].startswith("bar.png: ")


def test_a_terminal_without_blocks_gets_ascii(trained, tmp_path, cli, monkeypatch):
    Image.new("L", (28, 28)).save(tmp_path / "a.png")
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    status = cli("predict", "a.png", "--show", "--run", trained)[0]
    assert status == 0
    assert b"@" in stdout.buffer.getvalue()


def test_the_newest_run_is_the_default(trained, tmp_path, sheet, cli):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained)
    assert cli("predict", sheet(0, "a.png"))[0] == 0


def test_on_the_gpu_it_says_the_same(cupy, trained, sheet, cli):
    path = sheet(0, "0.png")
    on_gpu = cli("predict", path, "--run", trained, "--device", "cuda")
    assert on_gpu[0] == 0
    assert on_gpu == cli("predict", path, "--run", trained, "--device", "cpu")
