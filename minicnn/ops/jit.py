"""How Numba kernels are run and given memory; `minicnn.ops.compiler` compiles them.

`Call` is a kernel with its arguments, to be run many times. `buffers` lends scratch memory, to one
caller at a time, because a parallel kernel must not be entered by two Python threads at once
(Numba's workqueue layer aborts the process).

The environment variable MINICNN_NUM_THREADS sets how many threads a kernel uses; all cores if not
set. Results do not depend on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numba
import numpy as np

from minicnn.ops.compiler import kernel

__all__ = ["ALIGN", "Call", "buffers", "flat", "kernel", "lock"]

ALIGN = 64  # bytes: a vector in a buffer never straddles two cache lines
# Bytes from the end of one thread's row to the next thread's: a processor that sees a row being
# read in order fetches what comes next, and takes it away from the core that writes there. It
# stops at the end of a page. Without the gap, kernels in the L1 cache ran half as fast.
GAP = 4096

_THREADS = os.environ.get("MINICNN_NUM_THREADS", "")
if _THREADS:
    _most = numba.get_num_threads()
    if not _THREADS.isdecimal() or not 1 <= int(_THREADS) <= _most:
        raise ValueError(
            f"MINICNN_NUM_THREADS: expected a whole number from 1 to {_most} (Numba's "
            f"NUMBA_NUM_THREADS), got {_THREADS!r}"
        )
    numba.set_num_threads(int(_THREADS))

lock = threading.RLock()  # held by whoever runs kernels; see `buffers`
_arena = np.empty(0, np.uint8)
_used = False  # kernels have run in this process
_forked = False  # it is a copy of one in which they had


def _after_fork() -> None:
    global _forked
    _forked = _used


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def buffers(dtype: Any, *sizes: int) -> Iterator[list[np.ndarray]]:
    """Lend 1-d arrays of the given sizes, with arbitrary contents, and the right to run kernels.

    The memory is kept and grows to the largest demand, so that repeated calls touch no fresh
    pages. Another thread that asks meanwhile waits.

    Raises
    ------
    RuntimeError
        In a process that was forked after kernels had run: it lacks the threads that these
        started, and Numba would kill it or wait for them for ever.
    """
    with lock:
        _enter()
        yield _lend(dtype, *sizes)


def _enter() -> None:
    global _used
    if _forked:
        raise RuntimeError(
            "numba: expected a process that was started, got one forked after kernels had run, "
            "whose threads are missing (fix: multiprocessing.get_context('spawn'), or "
            "minicnn.use('numpy') in the child)"
        )
    _used = True


def _lend(dtype: Any, *sizes: int) -> list[np.ndarray]:
    return [rows[0, :size] for rows, size in zip(_lend_rows(dtype, [(1, s) for s in sizes]), sizes)]


def _lend_rows(dtype: Any, sizes: Sequence[tuple[Any, ...]]) -> list[np.ndarray]:
    """Lend arrays of (rows, numbers in each) or of (rows, numbers, dtype).

    Rows are far enough apart for no thread to disturb another.
    """
    global _arena
    shapes = []
    for rows, size, *other in sizes:
        kind = np.dtype(other[0] if other else dtype)
        length = -(-size * kind.itemsize // ALIGN) * ALIGN
        shapes.append((rows, length + GAP if rows > 1 else length, kind))
    need = sum(rows * length + GAP for rows, length, _ in shapes) + ALIGN
    if _arena.size < need:
        _arena = np.empty(0, np.uint8)  # free the old one first
        _arena = np.empty(need, np.uint8)
    start = -_arena.ctypes.data % ALIGN
    arrays = []
    for rows, length, kind in shapes:
        arrays.append(_arena[start : start + rows * length].view(kind).reshape(rows, -1))
        start += rows * length + GAP
    return arrays


class Call:
    """A kernel with its arguments, made once to be run many times.

    Parameters
    ----------
    kernel : dispatcher
    args : sequence
        The first is the input, see `on`.
    dtype : dtype
    scratch : sequence of (int, int) or (int, int, dtype)
        Rows and numbers in each of scratch arrays, which become the last arguments. Their rows may
        be longer, and their contents are arbitrary.
    shaped : callable, optional
        Makes the last arguments out of the scratch arrays.
    before : callable, optional
        Run each time before the kernel.
    """

    def __init__(
        self,
        kernel: Any,
        args: Sequence[Any],
        dtype: Any = np.float32,
        scratch: Sequence[tuple[Any, ...]] = (),
        shaped: Callable[..., Sequence[Any]] = lambda *arrays: arrays,
        before: Callable[[], None] | None = None,
    ) -> None:
        self._kernel, self._own, self._before = kernel, tuple(args), before
        self._scratch = dtype, scratch, shaped
        self._args: list[Any] = []  # own and scratch
        self._entry: Any = None
        self._again = False  # it has run before
        self._arena: Any = None

    def on(self, x: np.ndarray) -> Call:
        """Take another input of the same shape and dtype."""
        self._args[: len(self._own)] = self._own = (flat(x), *self._own[1:])
        if not x.flags.aligned:
            self._entry = None  # another type
        return self

    def __call__(self) -> Any:
        """Run the kernel and return what it returns; another thread's turn is waited for."""
        with lock:
            _enter()
            if self._arena is not _arena:
                dtype, scratch, shaped = self._scratch
                self._args = [*self._own, *shaped(*_lend_rows(dtype, scratch))]
                self._arena = _arena
            if self._before is not None:
                self._before()
            return self._run() if self._entry is None else self._entry(*self._args)

    def _run(self) -> Any:
        """Run the kernel, and the second time keep what it is compiled to for these arguments.

        Numba finds it by their types each time, which takes as long as to hand them over. To find
        it from here takes 0.1 ms, too much for a call that is made once.
        """
        result = self._kernel(*self._args)
        if not self._again:
            self._again = True
            return result
        try:
            types = tuple(map(self._kernel.typeof_pyval, self._args))
            self._entry = self._kernel.overloads[types].entry_point
        except (AttributeError, KeyError):  # no dispatcher of Numba, or a converted argument
            self._entry = self._kernel
        return result


def flat(a: np.ndarray) -> np.ndarray:
    """Return a 1-d view that cannot be written: one type to compile for, whatever `a` is."""
    view = a.reshape(-1)
    view.flags.writeable = False
    return view
