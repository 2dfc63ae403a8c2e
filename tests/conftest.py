"""Settings that hold for every test."""

import os

import matplotlib
import pytest
from hypothesis import HealthCheck, settings

import devices

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


def _runs_cupy(item):
    callspec = getattr(item, "callspec", None)
    return callspec is not None and callspec.params.get("version") == "cupy"


@pytest.fixture(autouse=True)
def _cupy_versions(request, monkeypatch):
    """Let the cases with version "cupy" run on a device or in the emulator."""
    if not _runs_cupy(request.node):
        yield
        return
    with devices.on_device(monkeypatch):
        yield


def pytest_collection_modifyitems(items):
    """Mark what compares with PyTorch and what runs `cupy` versions, for ``pytest -m``."""
    for item in items:
        if "torch" in item.fixturenames:
            item.add_marker("torch")
        if _runs_cupy(item):
            item.add_marker("gpu")
