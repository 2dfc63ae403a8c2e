"""Where arrays live and which version of an op runs.

An op comes in several versions (``reference`` loops, ``numpy``, ``numba``, ``cupy``), listed in
a dict in the op's own file. Convolutions have one more, ``winograd``, which is faster than
``numba`` with 3x3 and 5x5 kernels and rounds more: `minicnn.ops.conv2d_winograd` says how much.

By default the arrays decide: a CuPy array runs ``cupy``, a NumPy array runs ``numpy``. Training
and bulk prediction prefer ``numba`` (see `prefer`), and `use` overrides both.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from operator import is_
from types import ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

V = TypeVar("V")
Array = Any  # numpy.ndarray or cupy.ndarray: dtype and device follow the input

VERSIONS = ("reference", "numpy", "numba", "winograd", "cupy")
ON_NUMBA = ("numba", "winograd")  # an op without the second runs the first
FLOATS = ("float32", "float64")


class Version(NamedTuple):
    """One way to compute an op: a forward and a backward that map arrays to arrays."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]


_chosen: str | None = None  # set by use(); None: the arrays decide
_preferred = "numpy"  # what NumPy arrays run while nothing is chosen


class use:
    """Choose the version that every op runs, for good or within a ``with`` block.

    An op that lacks the chosen version runs its ``numpy`` one, and for ``winograd`` its ``numba``
    one. All versions give the same result to rounding; ``winograd`` rounds more in float32.

    Parameters
    ----------
    version : {"reference", "numpy", "numba", "winograd", "cupy"} or None
        None gives the choice back to the arrays.

    Raises
    ------
    ValueError
        If there is no such version.

    Examples
    --------
    >>> import minicnn
    >>> with minicnn.use("reference"):
    ...     pass  # every op in here runs its nested loops
    """

    def __init__(self, version: str | None) -> None:
        global _chosen
        if version is not None and version not in VERSIONS:
            raise ValueError(f"use: version: expected one of {VERSIONS} or None, got {version!r}")
        self._previous = _chosen
        _chosen = version

    def __enter__(self) -> use:
        return self  # __init__ has chosen, so that use("numba") works as a plain call too

    def __exit__(self, *exc: object) -> None:
        global _chosen
        _chosen = self._previous


def chosen() -> str | None:
    """Return the version set with `use`, or None."""
    return _chosen


class prefer:
    """Let NumPy arrays run `version` inside the ``with`` block unless `use` has chosen another.

    Where that means Numba, BLAS is held to one thread: its threads would wait for work on the
    cores that Numba's threads need, which made a training step twice as long. A block that does
    not call BLAS saves a microsecond by saying so.
    """

    def __init__(self, version: str, blas: bool = True) -> None:
        self._version, self._blas = version, blas
        self._limited: list[tuple[Any, int]] = []

    def __enter__(self) -> None:
        global _preferred
        outermost = _preferred != self._version
        self._previous, _preferred = _preferred, self._version
        if self._blas and outermost and (_chosen or self._version) in ON_NUMBA:
            for library in _blas():
                if (threads := library.num_threads) != 1:
                    self._limited.append((library, threads))
                    library.set_num_threads(1)

    def __exit__(self, *exc: object) -> None:
        global _preferred
        for library, threads in self._limited:
            library.set_num_threads(threads)
        _preferred = self._previous


@cache
def _blas() -> list[Any]:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(user_api="blas").lib_controllers


def pick(op: str, versions: Mapping[str, V], x: Array) -> V:
    """Return the version of `op` that runs on the array `x`.

    Raises
    ------
    TypeError
        If the chosen version cannot run on the device that holds `x`.
    """
    on_gpu = is_cupy(x)
    name = _chosen or ("cupy" if on_gpu else _preferred)
    if on_gpu and name in ("reference", *ON_NUMBA):
        raise TypeError(f"{op}: x: expected a NumPy array for version {name!r}, got a CuPy array")
    if not on_gpu and name == "cupy":
        raise TypeError(
            f"{op}: x: expected a CuPy array for version 'cupy', got a NumPy array (see to_gpu)"
        )
    if name in ON_NUMBA and name not in versions:
        name = "numba"
    return versions.get(name) or versions["numpy"]


def is_cupy(a: object) -> bool:
    """Tell whether `a` is a CuPy array, without importing CuPy."""
    return type(a).__module__.partition(".")[0] == "cupy"


def array_module(a: object) -> ModuleType:
    """Return the module (numpy or cupy) that `a` belongs to."""
    if is_cupy(a):
        import cupy

        return cupy
    return np


def same(a: Sequence[object], b: Sequence[object]) -> bool:
    """Tell whether two lists hold the same objects, in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


# ---------------------------------------------------------------- steps that are recorded


class Recorder(Protocol):
    """What keeps the work of a training step on the GPU, to do it again with other numbers."""

    def matmul(self, a: Array, b: Array) -> Array:
        """Return ``a @ b`` by means that can be recorded."""

    def from_host(self, make: Callable[[], np.ndarray]) -> Array:
        """Return an array that holds ``make()``, made anew before each repetition."""


_recorder: Recorder | None = None


def recording() -> bool:
    """Tell whether the work of a training step on the GPU is being recorded.

    Then nobody may look at numbers on the device: there are none yet, and later ones may differ.
    Where an op would raise because of a value, it makes its result NaN instead.
    """
    return _recorder is not None


@contextmanager
def recorded(recorder: Recorder) -> Iterator[None]:
    """Let `recorder` keep what runs inside the block."""
    global _recorder
    before, _recorder = _recorder, recorder
    try:
        yield
    finally:
        _recorder = before


def matmul(a: Array, b: Array) -> Array:
    """Return ``a @ b`` for matrices or stacks of matrices, in a recorded step too."""
    return a @ b if _recorder is None else _recorder.matmul(a, b)


def from_host(x: Array, make: Callable[[], np.ndarray]) -> Array:
    """Return the array that `make` draws on the host, on the device of `x`."""
    return array_module(x).asarray(make()) if _recorder is None else _recorder.from_host(make)


# ---------------------------------------------------------------- arguments


def as_arrays(op: str, /, optional: Container[str] = (), **arrays: Array) -> list[Array]:
    """Check the float arrays of a call and return them in native byte order and C order.

    The first array sets the dtype and the device, and the rest have to agree. C order makes the
    result independent of the memory layout to the last bit. None passes through where the name is
    among the `optional` ones.

    Raises
    ------
    TypeError
        If one is no array, is neither float32 nor float64, or differs from the first in dtype
        or device. The message names it.
    """
    leader = ""
    out: list[Array] = []
    for name, a in arrays.items():
        if a is not None or name not in optional:
            a = _as_float(op, name, a)
            if not leader:
                leader, first = name, a
            elif is_cupy(a) != is_cupy(first):
                raise TypeError(
                    f"{op}: {name}: expected {_device(first)} like {leader}, got {_device(a)} "
                    "(move one with to_gpu or to_cpu)"
                )
            elif a.dtype != first.dtype:
                raise TypeError(
                    f"{op}: {name}: expected {first.dtype} like {leader}, got {a.dtype} "
                    f"(fix: {leader}.astype('{a.dtype}'), or {name}.astype('{first.dtype}'); "
                    "model.astype converts a whole network)"
                )
        out.append(a)
    return out


def _as_float(op: str, name: str, a: Array) -> Array:
    if not _is_array(a):
        raise TypeError(
            f"{op}: {name}: expected a NumPy or CuPy array, got {type(a).__name__} "
            f"(fix: numpy.asarray({name}, dtype='float32'))"
        )
    if a.dtype.newbyteorder("=").name not in FLOATS:
        raise TypeError(
            f"{op}: {name}: expected float32 or float64, got {a.dtype} "
            f"(fix: {name}.astype('float32'))"
        )
    # asarray, not ascontiguousarray: the latter turns 0-d arrays into 1-d ones.
    return array_module(a).asarray(a, dtype=a.dtype.newbyteorder("="), order="C")


def _device(a: Array) -> str:
    return "a CuPy array" if is_cupy(a) else "a NumPy array"


# ---------------------------------------------------------------- from one device to another


def to_gpu(obj: Any) -> Any:
    """Move an array, or a layer with all it holds, to the GPU.

    Parameters
    ----------
    obj : array, tuple, Layer, Optimizer or Trainer
        A layer, an optimiser and a trainer (its model and its optimiser) are moved in place.
        Arrays are copied, and one already there comes back as it is. Of a tuple, such as a
        `Dataset`, the arrays are moved.

    Returns
    -------
    cupy.ndarray, tuple, Layer, Optimizer or Trainer

    Raises
    ------
    RuntimeError
        If CuPy or a CUDA device is missing. The message says what to install.
    TypeError
        If `obj` is nothing that can be moved.
    """
    return _move("to_gpu", obj, _sent(cupy_or_error()))


def to_cpu(obj: Any) -> Any:
    """Move an array, or whatever holds arrays, to NumPy; the inverse of `to_gpu`."""
    return _move("to_cpu", obj, lambda a: a.get() if is_cupy(a) else np.asarray(a))


def _sent(cupy: ModuleType) -> Callable[[Array], Array]:
    def convert(a: Array) -> Array:
        # CuPy has no other byte orders.
        return cupy.asarray(a if is_cupy(a) else a.astype(a.dtype.newbyteorder("="), copy=False))

    return convert


def as_numpy(a: Any) -> np.ndarray:
    """Return a number, a list or an array, wherever it is, as a NumPy array."""
    return to_cpu(a) if is_cupy(a) else np.asarray(a)


def _move(op: str, obj: Any, convert: Callable[[Array], Array]) -> Any:
    if hasattr(obj, "map_arrays"):
        obj.map_arrays(convert)
        return obj
    if isinstance(obj, tuple):
        parts = [convert(a) if _is_array(a) else a for a in obj]
        return obj._make(parts) if hasattr(obj, "_make") else tuple(parts)
    if not _is_array(obj):
        raise TypeError(
            f"{op}: obj: expected an array, a tuple, a layer, an optimizer or a trainer, "
            f"got {type(obj).__name__}"
        )
    return convert(obj)


def _is_array(a: object) -> bool:
    return isinstance(a, np.ndarray | np.generic) or is_cupy(a)


def cupy_or_error() -> ModuleType:
    """Return the cupy module once a device answers; else say what is missing."""
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(
            "CuPy is not installed (fix: pip install '.[cuda13]', or '.[cuda12]' for a "
            "CUDA 12 driver)"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise RuntimeError(f"CuPy finds no CUDA device ({error})") from error
    if not count:
        raise RuntimeError("CuPy finds no CUDA device (check nvidia-smi and the driver)")
    return cupy
