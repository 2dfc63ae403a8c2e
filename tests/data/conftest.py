"""Fixtures of the data tests."""

import os
from pathlib import Path

import pytest

from minicnn.data.mnist import NAMES

BESIDE = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def full_mnist(monkeypatch):
    """Let the loaders find the full MNIST, or skip the test."""
    for root in filter(None, (os.environ.get("MINICNN_DATA_DIR"), BESIDE)):
        for folder in (Path(root) / "mnist", Path(root)):
            if all((folder / name).exists() for name in NAMES):
                monkeypatch.setenv("MINICNN_DATA_DIR", str(root))
                return
    pytest.skip(f"the full MNIST is neither in $MINICNN_DATA_DIR nor in {BESIDE}")
