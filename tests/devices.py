"""Where tests launch kernels: on a CUDA device, or else in the emulator, on NumPy arrays.

(Tests of whole ops and of training run version "cupy" through bridge.py instead.)
"""

from functools import cache
from types import SimpleNamespace

import numpy as np

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


def _map(values, convert):
    if type(values) is tuple:
        return tuple(_map(v, convert) for v in values)
    return convert(values)


def _there(a):
    return device().asarray(a) if isinstance(a, np.ndarray) else a


def _back(a):
    return a.get() if backend.is_cupy(a) else a


def use(monkeypatch):
    """Let kernels run on a device or in the emulator for the rest of the test."""
    if device() is None:
        monkeypatch.setattr(cuda, "runtime", lambda: Emulator)


def there(a):
    """Return an array where kernels take it; emulated, it is the same one."""
    return _map(a, _there if device() else lambda a: a)


def back(a):
    """Return an array, or a tuple of them, as NumPy's."""
    return _map(a, _back)
