"""Lets tests that were written for NumPy arrays run version "cupy".

`install` wraps the public op functions. Under ``use("cupy")`` they take NumPy arrays too, and a
cache of them, where otherwise they would refuse, and move everything to the GPU and back. And
each op lists a version "cupy", as itself or, where it has no kernels of its own, as the NumPy
source that runs on CuPy arrays, so that tests over ``VERSIONS`` visit it.
"""

import os
import shutil
import sys
from contextlib import contextmanager
from functools import cache, wraps

import numpy as np
import pytest

from emulator import fake_cupy
from emulator.cublas import CuBlas
from minicnn import backend, ops, to_cpu, to_gpu
from minicnn.gpu import blas


@cache
def device():
    """CuPy where it finds a device, and None, or why there is none."""
    try:
        return backend.cupy_or_error(), ""
    except RuntimeError as error:
        return None, str(error)


@cache
def imitation():
    """The one imitated CuPy of this process: kernels that were compiled for it stay valid."""
    return fake_cupy.make()


@contextmanager
def standing_in():
    """Put the imitated CuPy in the place of the real one, where that has no device."""
    if device()[0]:
        yield
        return
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip(f"{device()[1]}, and no C++ compiler (g++) to run its kernels on the CPU")
    real, library = sys.modules.get("cupy"), blas.library
    sys.modules["cupy"] = imitation()
    blas.library = lambda: CuBlas(imitation().machine)
    try:
        yield
    finally:
        blas.library = library
        del sys.modules["cupy"]
        if real is not None:
            sys.modules["cupy"] = real


def install():
    """Wrap the ops and complete their lists; tests may import them after that."""
    for name in ops.__all__:
        function = getattr(ops, name)
        if not hasattr(function, "__wrapped__"):
            wrapped = _bridged(function)
            setattr(ops, name, wrapped)
            setattr(sys.modules[function.__module__], name, wrapped)
    for module in [m for name, m in sys.modules.items() if name.startswith("minicnn.ops.")]:
        _complete(getattr(module, "VERSIONS", {}))


def _complete(table):
    for value in table.values():
        if isinstance(value, dict):
            _complete(value)
    if "numpy" in table:
        table.setdefault("cupy", table["numpy"])


def _bridged(function):
    @wraps(function)
    def call(*args, **kwargs):
        if backend.chosen() != "cupy":
            return function(*args, **kwargs)
        with standing_in():
            kwargs = {name: _there(a) for name, a in kwargs.items()}
            return _back(function(*map(_there, args), **kwargs))

    return call


def _there(a):
    if isinstance(a, tuple):
        return _rebuilt(a, _there)
    return to_gpu(a) if isinstance(a, np.ndarray | np.generic) else a


def _back(a):
    if isinstance(a, tuple):
        return _rebuilt(a, _back)
    return to_cpu(a) if backend.is_cupy(a) else a


def _rebuilt(a, move):
    parts = map(move, a)
    return a._make(parts) if hasattr(a, "_make") else tuple(parts)
