"""Compile the kernels of the backward pass in a second process while the first runs the forward.

Numba compiles one function at a time in a process. So when the first training step of a process
finds a kernel missing in the disk cache, a helper is started. It gets the stages of the plan, runs
their backward on made-up numbers, and so puts the kernels into the cache, where the step finds
them. If anything goes wrong there, the step compiles them itself.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from minicnn.plan.buffers import Maps
from minicnn.plan.stages import Stage

SECONDS = 120  # to wait for the helper at most
_CODE = "import sys; sys.path[:] = {path!r}; from minicnn.plan import ahead; ahead.main()"

_helper: subprocess.Popen[bytes] | None = None
_started = False  # one helper a process: later plans find most kernels in place


@contextmanager
def helped(stages: Sequence[Stage], x: Maps) -> Iterator[None]:
    """Start the helper when a kernel is missing inside the block."""
    from minicnn.ops.compiler import when_missing

    if _started:
        yield
        return
    with when_missing(lambda: _start(stages, x)):
        yield


def wait() -> None:
    """Wait until the helper is done, if there is one."""
    global _helper
    helper, _helper = _helper, None
    if helper is not None:
        try:
            helper.wait(SECONDS)
        except subprocess.TimeoutExpired:
            helper.kill()
            helper.wait()


def _start(stages: Sequence[Stage], x: Maps) -> None:
    global _helper, _started
    _started = True
    if (os.cpu_count() or 1) < 2 or not sys.executable:
        return
    try:
        work = pickle.dumps((stages, x.data.shape, x.data.dtype, x.channels))
        _helper = subprocess.Popen(
            [sys.executable, "-c", _CODE.format(path=sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert _helper.stdin is not None
        with _helper.stdin as pipe:
            pipe.write(work)
    except Exception:  # what cannot be pickled, started or written to: nothing is lost
        wait()


def main() -> None:
    """Run the backward of the stages that come through standard input."""
    stages, shape, dtype, channels = pickle.load(sys.stdin.buffer)
    rehearse(stages, Maps(np.zeros(shape, dtype), channels))


def rehearse(stages: Sequence[Stage], x: Maps) -> None:
    """Run the backward of all stages for an input of this shape, whatever the numbers."""
    from minicnn import backend

    maps = x
    with backend.prefer("numba"), np.errstate(all="ignore"):
        for stage in stages:
            maps = stage.prepare(maps, training=True)
        dy: Any = Maps(np.zeros_like(maps.data), maps.channels)
        for i in reversed(range(len(stages))):
            dy = stages[i].backward(dy, need_dx=i > 0)
