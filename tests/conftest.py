"""Settings that hold for every test."""

import os
import signal

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
SETTINGS = "_hypothesis_internal_use_settings"  # where Hypothesis keeps a test's own
EXAMPLES = 12

# A shell's background job ignores Ctrl-C, and so do its children: the tests of signals send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
        # "_kernels": tests that launch kernels themselves
        if (_on_gpu(item) or "_kernels" in item.fixturenames) and bridge.device()[0]:
            item.add_marker("gpu")


def _on_gpu(item):
    """Whether the test is for CuPy: it asks for the module, or runs version "cupy" of an op."""
    versions = getattr(item, "callspec", None) and item.callspec.params.get("version")
    return "cupy" in item.fixturenames or versions == "cupy"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Draw fewer examples where CUDA C is run on the CPU: each takes longer, and the bodies are
    those of the other versions.
    """
    function = getattr(item, "function", None)
    if not (_on_gpu(item) and hasattr(function, "hypothesis")) or bridge.device()[0]:
        return (yield)
    own = getattr(function, SETTINGS)
    setattr(function, SETTINGS, settings(own, max_examples=min(own.max_examples, EXAMPLES)))
    try:
        return (yield)
    finally:
        setattr(function, SETTINGS, own)


@pytest.fixture
def cupy():
    """The module: CuPy on a machine with a GPU, else its imitation on the CPU."""
    with bridge.standing_in():
        yield bridge.device()[0] or bridge.imitation()


@pytest.fixture
def imitated(cupy):
    """The imitated GPU itself, to look at what was done; without its limits afterwards."""
    if bridge.device()[0]:
        pytest.skip("looks inside the imitated GPU, and here is a real one")
    yield cupy.machine
    cupy.machine.default_pool.set_limit()
