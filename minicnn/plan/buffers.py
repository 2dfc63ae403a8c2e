"""Memory that a plan keeps between steps, and what flows between its stages."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array
from minicnn.shapes import size

ALIGN = 64  # bytes: a cache line, and the widest vector


class Maps(NamedTuple):
    """An activation, or its gradient, on the way from one stage to the next.

    In the layout FIRST, `data` is the array that the plain layers see, of any shape. In LAST, it
    is (N, H, W, P) and holds `channels` maps, the channels next to each other: P is their number
    rounded up to whole vectors, and the numbers beyond are zero.
    """

    data: Array
    channels: int = 0  # 0: layout FIRST

    @property
    def last(self) -> bool:
        return self.channels > 0


class Buffers:
    """Arrays by name, kept as long as the demand does not grow.

    A fresh large array costs a page fault every 4 KiB, which takes as long as a memory-bound
    kernel does.
    """

    def __init__(self) -> None:
        self._memory: dict[str, np.ndarray] = {}
        self._views: dict[tuple[str, tuple[int, ...], Any], np.ndarray] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """Return the array `name` with this shape; its contents are those of the last use."""
        view = self._views.get((name, shape, dtype))
        return self._make(name, shape, dtype) if view is None else view

    def _make(self, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        need = size(shape) * np.dtype(dtype).itemsize
        memory = self._memory.get(name)
        if memory is None or memory.size < need + ALIGN:
            self._memory[name] = memory = np.zeros(need + ALIGN, np.uint8)
            self._views = {key: a for key, a in self._views.items() if key[0] != name}
        start = -memory.ctypes.data % ALIGN
        view = memory[start : start + need].view(dtype).reshape(shape)
        self._views[name, shape, dtype] = view
        return view

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return sum(memory.size for memory in self._memory.values())
