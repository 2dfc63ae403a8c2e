"""Settings that hold for every test."""

import os
import sys

import matplotlib
import pytest
from hypothesis import HealthCheck, settings

import bridge

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


bridge.install()


def pytest_collection_modifyitems(items):
    """Mark what compares with PyTorch, and what runs on a GPU, for ``pytest -m``."""
    for item in items:
        if "torch" in item.fixturenames:
            item.add_marker("torch")
        if _on_gpu(item) and bridge.device()[0]:
            item.add_marker("gpu")


def _on_gpu(item):
    """Whether the test is for CuPy: it asks for the module, or runs version "cupy" of an op."""
    versions = getattr(item, "callspec", None) and item.callspec.params.get("version")
    return "cupy" in item.fixturenames or versions == "cupy"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Put the imitated CuPy where the real one has no device, for the tests that use it."""
    if not _on_gpu(item) or bridge.device()[0]:
        return (yield)
    real = sys.modules.get("cupy")
    sys.modules["cupy"] = bridge.imitation()
    try:
        return (yield)
    finally:
        del sys.modules["cupy"]
        if real is not None:
            sys.modules["cupy"] = real


@pytest.fixture
def cupy():
    """The module: CuPy on a machine with a GPU, else its imitation on the CPU."""
    return bridge.device()[0] or bridge.imitation()


@pytest.fixture
def imitated(cupy):
    """The imitated GPU itself, to look at what was done; without its limits afterwards."""
    if bridge.device()[0]:
        pytest.skip("looks inside the imitated GPU, and here is a real one")
    yield cupy.machine
    cupy.machine.default_pool.set_limit()
