"""Where the `cupy` versions run in tests: on a CUDA device, or else in the emulator.

A test with ``version == "cupy"`` has the same body as for the other versions and works on NumPy
arrays. `on_device` puts the version between a copy to the device and a copy back.
"""

import sys
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from emulator import cuda as emulated
from minicnn import backend
from minicnn.ops import cuda


@cache
def device():
    """Return CuPy if it finds a device, else None."""
    try:
        return backend.cupy_or_error()
    except RuntimeError:
        return None


class Emulator:
    """The part of CuPy's interface that `minicnn.ops.cuda` uses."""

    RawModule = emulated.RawModule
    cuda = SimpleNamespace(
        runtime=SimpleNamespace(
            getDevice=lambda: 0, getDeviceProperties=lambda _: {"multiProcessorCount": 132}
        )
    )


def missing():
    """Return why `cupy` versions cannot run here, or None."""
    if device() is None and emulated.compiler() is None:
        return "no CUDA device, and no C++ compiler (g++) for the emulator"
    return None


def _map(values, convert):
    if type(values) is tuple:
        return tuple(_map(v, convert) for v in values)
    return convert(values)


def _there(a):
    return device().asarray(a) if isinstance(a, np.ndarray) else a


def _back(a):
    return a.get() if backend.is_cupy(a) else a


def moved(function):
    """Make a function of device arrays one of NumPy arrays."""
    if device() is None:
        return function

    def run(*args, **kwargs):
        return _map(function(*map(_there, args), **kwargs), _back)

    return run


def _pick(op, versions, x):
    version = versions.get("cupy") or versions["numpy"]
    if isinstance(version, backend.Version):
        return backend.Version(*map(moved, version))
    return moved(version)


def use(monkeypatch):
    """Let kernels run on a device or in the emulator for the rest of the test, or skip it."""
    if reason := missing():
        pytest.skip(reason)
    if device() is None:
        monkeypatch.setattr(cuda, "runtime", lambda: Emulator)


def there(a):
    """Return an array where kernels take it; emulated, it is the same one."""
    return _map(a, _there if device() else lambda a: a)


def back(a):
    """Return an array, or a tuple of them, as NumPy's."""
    return _map(a, _back)


@contextmanager
def on_device(monkeypatch):
    """Let ops called with NumPy arrays run their `cupy` versions."""
    use(monkeypatch)
    original = backend.pick

    def pick(op, versions, x):
        return (_pick if backend.chosen() == "cupy" else original)(op, versions, x)

    for name, module in list(sys.modules.items()):
        if name.startswith("minicnn") and getattr(module, "pick", None) is original:
            monkeypatch.setattr(module, "pick", pick)
    yield
