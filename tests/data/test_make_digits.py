"""The subset that comes along is what its README says."""

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn.data import make_digits
from minicnn.data.idx import read_idx
from minicnn.data.make_digits import first_of_each, main
from minicnn.data.mnist import DIGITS_FOLDER, FILES, NAMES, read_split


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(0, 3))
def test_first_of_each_against_a_loop(labels, count):
    seen, expected = dict.fromkeys(labels, 0), []
    for i, label in enumerate(labels):
        if seen[label] < count:
            expected.append(i)
        seen[label] += 1
    if min(seen.values()) < count:
        with pytest.raises(ValueError, match=r"count: expected at most \d of label"):
            first_of_each(np.array(labels), count)
    else:
        assert first_of_each(np.array(labels), count).tolist() == expected


@pytest.mark.parametrize(("split", "count"), [("train", 500), ("test", 100)])
def test_embedded_files_are_the_first_of_the_full_set(full_mnist, split, count):
    full = read_split("mnist", split)
    chosen = first_of_each(full[1], count)
    for name, array in zip(FILES[split], full, strict=True):
        np.testing.assert_array_equal(read_idx(DIGITS_FOLDER / name), array[chosen])


def test_embedded_files_are_small_and_licensed():
    assert sorted(p.name for p in DIGITS_FOLDER.iterdir()) == sorted(["README.md", *NAMES])
    assert sum(p.stat().st_size for p in DIGITS_FOLDER.iterdir()) <= 1_500_000
    assert "CC BY-SA 3.0" in (DIGITS_FOLDER / "README.md").read_text()


def test_main_writes_the_four_files(tmp_path, monkeypatch, capsys):
    labels = np.tile(np.arange(10, dtype=np.uint8), 4)
    images = np.arange(40 * 4, dtype=np.uint8).reshape(40, 2, 2)
    monkeypatch.setattr(make_digits, "read_split", lambda name, split: (images, labels))
    main(["--out", str(tmp_path / "new"), "--train", "3", "--test", "1"])
    for name, count in zip(NAMES, (30, 30, 10, 10), strict=True):
        expected = (images if "images" in name else labels)[:count]
        np.testing.assert_array_equal(read_idx(tmp_path / "new" / name), expected)
    assert "30 of 40" in capsys.readouterr().out


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "minicnn.data.make_digits", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "MINICNN_DATA_DIR" in done.stdout
