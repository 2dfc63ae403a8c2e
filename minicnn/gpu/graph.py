"""A piece of work on the GPU that is captured once as a CUDA graph and then launched as one.

A kernel takes the CPU some microseconds to launch, which for a small network is longer than it
runs. A graph launches all kernels of a training step at once. It does the same work on the same
memory each time, so that

- nothing in it may depend on numbers that the host would have to look at;
- what changes from step to step has to lie in arrays that are filled before the launch;
- the memory of all its intermediate arrays must be nobody else's, between launches too: it comes
  from a pool that belongs to the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from minicnn.backend import Array, cupy_or_error, recorded
from minicnn.gpu.blas import Blas, BlasError
from minicnn.gpu.memory import is_out_of_memory


class CannotCapture(Exception):
    """The work cannot be captured; the message says why."""


class Recording:
    """Work that is run as it is the first time, captured the second, and replayed from then on.

    The first run compiles kernels and fills the pool, so that little is allocated in the capture.

    Parameters
    ----------
    work : callable
        Queues the work; called twice.
    stream : cupy.cuda.Stream
        On which it runs, not the default one.
    blas : Blas
        Multiplies, on that stream.

    Attributes
    ----------
    rehearsed : bool
        Whether it has run once.
    """

    def __init__(self, work: Callable[[], None], stream: Any, blas: Blas) -> None:
        self._cupy = cupy_or_error()
        self._work, self._stream, self._blas = work, stream, blas
        self._pool = self._cupy.cuda.MemoryPool()
        self._graph: Any = None
        self._feeds: list[tuple[Callable[[], np.ndarray], Array]] = []
        self._next = 0  # of the feeds, while capturing
        self.rehearsed = False

    @property
    def captured(self) -> bool:
        """Whether there is a graph to launch."""
        return self._graph is not None

    @property
    def nbytes(self) -> int:
        """Bytes of its own memory."""
        return self._pool.total_bytes()

    def run(self) -> None:
        """Queue the work, in order with all other work of this thread.

        Raises
        ------
        CannotCapture
            If it cannot be captured. Then nothing has been done, except for what came before the
            error in the first run.
        """
        with self._stream:
            if not self.rehearsed:
                try:
                    self._record()
                except BlasError as error:
                    raise CannotCapture(str(error)) from error
                self.rehearsed = True
                return
            if self._graph is None:
                self._capture()
            for make, array in self._feeds:
                array.set(make())
            self._graph.launch(self._stream)

    def _capture(self) -> None:
        self._next, graph = 0, None
        self._stream.begin_capture()
        try:
            self._record()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise CannotCapture(_reason(error)) from error
        finally:
            try:
                graph = self._stream.end_capture()
            except self._cupy.cuda.runtime.CUDARuntimeError as error:
                spoilt = error  # by what was raised inside, if anything was
        if graph is None:
            raise CannotCapture(_reason(spoilt))
        self._graph = graph

    def _record(self) -> None:
        with self._cupy.cuda.using_allocator(self._pool.malloc), recorded(self):
            self._work()

    # ---- what ops ask for, see minicnn.backend.Recorder

    def matmul(self, a: Array, b: Array) -> Array:
        """Return ``a @ b`` through cuBLAS, called so that it can be captured."""
        return self._blas.matmul(a, b)

    def from_host(self, make: Callable[[], np.ndarray]) -> Array:
        """Return an array that is filled by ``make()`` before each launch."""
        if not self.rehearsed:
            self._feeds.append((make, self._cupy.asarray(make())))
            return self._feeds[-1][1]
        array = self._feeds[self._next][1]
        self._feeds[self._next] = make, array
        self._next += 1
        return array


def _reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
