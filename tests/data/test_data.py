"""The front door of minicnn.data."""

import subprocess
import sys

import numpy as np
import pytest

from minicnn import data


def test_load_by_name(full_mnist):
    for name in ("digits", "mnist"):
        expected = getattr(data, f"load_{name}")("test")
        for got, want in zip(data.load(name, "test"), expected, strict=True):
            np.testing.assert_array_equal(got, want)


def test_load_digits_by_name():
    assert data.DATASETS == ("digits", "mnist", "fashion-mnist")
    np.testing.assert_array_equal(data.load("digits", "test").y, data.load_digits("test").y)


def test_unknown_name():
    with pytest.raises(ValueError, match=r"name: expected one of digits, mnist, .* got 'cats'"):
        data.load("cats", "train")


def test_public_names_exist():
    assert all(hasattr(data, name) for name in data.__all__)


def test_import_brings_in_numpy_only():
    script = (
        "import sys, minicnn.data\n"
        "heavy = {'PIL', 'pooch', 'tqdm', 'matplotlib', 'numba', 'requests', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)
