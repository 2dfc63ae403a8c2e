"""Settings that hold for every test."""

import os

import matplotlib
import pytest
from hypothesis import HealthCheck, settings

matplotlib.use("Agg")

settings.register_profile(
    "minicnn",
    deadline=None,  # a first call may compile or page in a library
    max_examples=50,
    # A failure in CI must fail again at home, so the draws there depend on the test alone.
    derandomize="CI" in os.environ,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("minicnn")


@pytest.fixture(scope="session")
def torch():
    """PyTorch as oracle, where it is installed."""
    return pytest.importorskip("torch", reason="PyTorch, the oracle, is not installed")


def pytest_collection_modifyitems(items):
    """Mark what compares with PyTorch, so that ``pytest -m torch`` runs just that."""
    for item in items:
        if "torch" in item.fixturenames:
            item.add_marker("torch")
