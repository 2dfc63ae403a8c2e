"""The smallest case that still fails, found by making one size after the other smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_SHOWN = 16  # elements of an array that is printed in full


class Smallest(NamedTuple):
    """The smallest failing case, and there the gradient that is worst."""

    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any]
    name: str
    analytic: np.ndarray
    numeric: np.ndarray
    labels: tuple[str, str] = ("analytic", "numeric")

    def __str__(self) -> str:
        what = [f"{name} {shape}" for name, shape in self.shapes.items()]
        what += [f"{name}={value}" for name, value in self.options.items()]
        lines = [f"smallest failing case: {', '.join(what)}"]
        if max(self.analytic.size, self.numeric.size) <= MAX_SHOWN:
            for label, a in zip(self.labels, (self.analytic, self.numeric)):
                text = np.array2string(a, precision=4, suppress_small=True, separator=" ")
                lines.append(f"  {label} {self.name} = {' '.join(text.split())}")
        return "\n".join(lines)


def shrink(
    state: Mapping[str, Any],
    simpler: Callable[[str, Any], Iterable[Any]],
    fails: Callable[[dict[str, Any]], bool],
    tries: int = 60,
) -> dict[str, Any]:
    """Make one entry of `state` after the other simpler as long as the case still fails.

    Parameters
    ----------
    state : mapping
        Sizes and options of a failing case.
    simpler : callable
        Gives simpler values for an entry, the simplest first.
    fails : callable
        Whether a case fails. One that cannot be built raises ValueError, TypeError or IndexError
        and counts as one that does not.
    tries : int
        How many cases are tried at most.
    """
    now = dict(state)
    seen: list[dict[str, Any]] = []
    progress = True
    while progress:
        progress = False
        for key in now:
            for value in simpler(key, now[key]):
                trial = {**now, key: value}
                if trial in seen:
                    continue
                if len(seen) >= tries:
                    return now
                seen.append(trial)
                if _fails(fails, trial):
                    now, progress = trial, True
                    break
    return now


def _fails(fails: Callable[[dict[str, Any]], bool], trial: dict[str, Any]) -> bool:
    try:
        with np.errstate(all="ignore"):
            return fails(trial)
    except Exception:  # a smaller case may be none at all, and a kernel may say so in any way
        return False


def lengths(name: str, n: int) -> list[int]:
    """Smaller lengths to try for one of n."""
    return sorted({1, n // 2, n - 1} & set(range(1, n)))


def axes_of(arrays: Sequence[np.ndarray]) -> dict[str, int]:
    """The lengths that an array list has, as the state for `shrink`: equal ones move together."""
    return {str(n): n for a in arrays for n in a.shape if n > 1}


def cropped(arrays: Sequence[np.ndarray], state: Mapping[str, int]) -> list[np.ndarray]:
    """Cut every axis to the length that `state` gives for it."""
    return [np.array(a[tuple(slice(state.get(str(n), n)) for n in a.shape)]) for a in arrays]
