"""Rules that no single number shows: inputs stay as they are, and a second call gives the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minicnn.backend import Array
from minicnn.gradcheck.hints import Hint

REPEAT = 1e-5  # how far two calls may differ, relative to the largest number (parallel sums)


def written(
    who: str, names: Sequence[str], given: Sequence[Array], held: Sequence[Array]
) -> list[Hint]:
    """Name the arrays that a call has written to."""
    return [
        Hint("writes input", f"{who}: {name}: it was written to; work on a copy")
        for name, a, b in zip(names, given, held)
        if not np.array_equal(a, b, equal_nan=True)
    ]


def not_repeatable(
    names: Sequence[str], first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> list[Hint]:
    """Name the gradients that a second call of backward gave otherwise."""
    return [
        Hint(
            "not repeatable",
            f"backward: {name}: a second call gave other numbers: it adds to what an earlier call "
            "left, or writes into its cache",
        )
        for name, a, b in zip(names, first, second)
        if a.shape == b.shape and not alike(a, b)
    ]


def alike(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays are equal but for the order of parallel sums."""
    limit = REPEAT * np.max(np.abs(a), initial=0.0, where=np.isfinite(a))
    return bool(np.allclose(a, b, rtol=0, atol=limit, equal_nan=True))


def refuse_other_numbers(y: np.ndarray, y2: Array) -> None:
    """Raise ValueError if a second forward pass gave other numbers."""
    if y.shape == np.shape(y2) and not alike(y, np.asarray(y2)):
        raise ValueError(
            "gradcheck: forward: expected the same numbers from a second call, got others (fix "
            "what it draws: pass a seed, not a generator)"
        )


def not_added(
    names: Sequence[str], first: Sequence[np.ndarray], second: Sequence[np.ndarray]
) -> list[Hint]:
    """Name the parameters whose gradient backward put in place of what was there."""
    return [
        Hint(
            "does not add",
            f"backward: {name}: expected to be added to what grads held, but it was overwritten "
            "(+=, or add_grads)",
        )
        for name, a, b in zip(names[1:], first[1:], second[1:])
        if not alike(a, b) and np.allclose(a - 1, b, rtol=1e-9, atol=1e-9)
    ]
