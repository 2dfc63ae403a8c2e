"""What is done when the GPU's memory does not suffice."""

from __future__ import annotations

import gc
import sys

from minicnn.backend import cupy_or_error


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether CuPy found no memory on the device."""
    return isinstance(error, MemoryError) and type(error).__name__ == "OutOfMemoryError"


def free() -> None:
    """Give back what CuPy's pool holds and nobody uses."""
    gc.collect()  # recorded steps and what they belong to know each other
    cupy = cupy_or_error()
    cupy.get_default_memory_pool().free_all_blocks()


def smaller(op: str, samples: int, size: int, fix: str, error: BaseException) -> int:
    """Return with how many of `samples` at a time to try again after `size` did not fit.

    Raises
    ------
    MemoryError
        If it was one already.
    """
    if size == 1:
        raise MemoryError(
            f"{op}: x: {_samples(samples)}: the GPU's memory does not suffice for a single one at "
            f"a time ({_state(error)}; fix: {fix})"
        ) from error
    return -(-size // 2)


def refusal(op: str, samples: int, why: str, error: BaseException) -> MemoryError:
    """Return the error for a batch that does not fit and cannot be taken in parts."""
    return MemoryError(
        f"{op}: x: {_samples(samples)}: the GPU's memory does not suffice, and they cannot be "
        f"taken in parts: {why} ({_state(error)}; fix: a smaller batch_size)"
    )


def _samples(n: int) -> str:
    return f"{n} sample{'' if n == 1 else 's'}"


def _state(error: BaseException) -> str:
    """What the device says, as far as it still says anything."""
    said = str(error).strip().partition("\n")[0]
    try:
        available, total = sys.modules["cupy"].cuda.Device().mem_info
    except Exception:  # the error at hand matters more
        return said
    return f"{said} {available >> 20} MiB of {total >> 20} are free"
