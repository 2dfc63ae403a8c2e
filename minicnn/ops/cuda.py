"""Compiles the CUDA sources beside the ops and launches their kernels, by way of CuPy.

A source is a ``.cu`` file; ``#include "name.cuh"`` takes in a file of this folder. Options are
macros: REAL is the element type, and kernels with tiles take their sizes as well. CuPy compiles
for the device at hand (NVRTC) when a kernel is first needed and keeps the result on disk.
``--use_fast_math`` is never set: NaN and infinities have to survive.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from minicnn.backend import Array

Macros = Mapping[str, Any]
REAL = {"float32": "float", "float64": "double"}
GRANTED = 48 << 10  # bytes of shared memory that a block gets without asking
MOST_BLOCKS = 65535  # in the second and third axis of a grid
NULL = np.uint64(0)  # for a pointer that a kernel does not use
_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)


def source(name: str, package: str = "minicnn.ops") -> str:
    """Return the CUDA source `name` with what it includes."""
    return _with_includes(files(package).joinpath(f"{name}.cu").read_text())


def _with_includes(text: str) -> str:
    here = files("minicnn.ops")
    return _INCLUDE.sub(lambda m: _with_includes(here.joinpath(m[1]).read_text()), text)


def options(dtype: Any, macros: Macros | None = None, exact: bool = False) -> tuple[str, ...]:
    """Return what the compiler is told; `exact` forbids it to fuse a product with a sum."""
    defines = {"REAL": REAL[np.dtype(dtype).name], **(macros or {})}
    return (
        "-std=c++17",
        *(("--fmad=false",) if exact else ()),
        *(f"-D{key}={value}" for key, value in sorted(defines.items())),
    )


def runtime() -> Any:
    """Return the module whose RawModule compiles and launches: CuPy (tests put an emulator)."""
    import cupy

    return cupy


@cache
def _function(runtime: Any, device: int, package: str, name: str, kernel: str, flags: Any) -> Any:
    module = runtime.RawModule(code=source(name, package), options=flags)
    return module.get_function(kernel)


@cache
def _multiprocessors(runtime: Any, device: int) -> int:
    return runtime.cuda.runtime.getDeviceProperties(device)["multiProcessorCount"]


def multiprocessors() -> int:
    """Return how many multiprocessors the current device has (132 on an H100)."""
    cupy = runtime()
    return _multiprocessors(cupy, cupy.cuda.runtime.getDevice())


def launch(
    name: str,
    kernel: str,
    dtype: Any,
    grid: Sequence[int],
    block: int,
    *args: Any,
    shared: int = 0,
    package: str = "minicnn.ops",
    exact: bool = False,
    macros: Macros | None = None,
) -> None:
    """Run a kernel of the source `name` on the current stream.

    Python integers are passed as 32-bit ones, floats as REAL; wrap what should be wider
    (``numpy.int64``). A grid with an axis of 0 runs nothing.
    """
    if not all(grid):
        return
    cupy, real = runtime(), np.dtype(dtype).type
    flags = options(dtype, macros, exact)
    function = _function(cupy, cupy.cuda.runtime.getDevice(), package, name, kernel, flags)
    if shared > GRANTED and function.max_dynamic_shared_size_bytes < shared:
        function.max_dynamic_shared_size_bytes = shared
    function(
        tuple(grid),
        (block,),
        tuple(np.int32(a) if type(a) is int else real(a) if type(a) is float else a for a in args),
        shared_mem=shared,
    )


def each(name: str, kernel: str, out: Array, *args: Any, block: int = 256, size: int = -1) -> None:
    """Launch a kernel with one thread for each of `size` elements, by default those of `out`.

    The kernel's first parameter is that number, as ``long long``.
    """
    n = out.size if size < 0 else size
    launch(name, kernel, out.dtype, (-(-n // block),), block, np.int64(n), *args)


def counters(xp: Any) -> Array:
    """Return two counters (uint32) of the device, 0 between launches.

    The last block of a kernel that counts its blocks sets them back. Kernels that use them have to
    follow each other on one stream.
    """
    return _counters(xp, runtime().cuda.runtime.getDevice())


@cache
def _counters(xp: Any, device: int) -> Array:
    return xp.zeros(2, np.uint32)


def grid_fits(*sizes: int) -> bool:
    """Tell whether all sizes may be axes of a grid other than the first."""
    return all(size <= MOST_BLOCKS for size in sizes)


def fits(*sizes: int) -> bool:
    """Tell whether all sizes may be passed as 32-bit integers and be added up without overflow."""
    return all(size < 2**30 for size in sizes)
