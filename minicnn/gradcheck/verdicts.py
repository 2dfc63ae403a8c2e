"""Why a gradient and its finite difference differ: a bug, precision, a kink or a tie.

Finite differences are wrong too, in three ways that can be told from a bug by looking closer:

* at a *kink* (ReLU at 0) the slopes to the left and to the right are two numbers that stay apart
  however small the step, and any number between them is a fair answer;
* at a *tie* (two equal maxima in a window) it is the same, until the equal elements are moved
  together: then the kink is gone;
* with a step that is too long (curvature) or too short (rounding) they lack *precision*, which
  shows as another answer at another step.

What stays is a bug. On the side of the analytic gradient, rounding to a short format is told
from a bug by linearity: ``backward(c * dy)`` is ``c * backward(dy)``, bug or no bug, but not for
what rounding adds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minicnn.gradcheck.differences import Forward

MEANING = {
    "ok": "the gradients agree",
    "bug": "finite differences settle on another number at every step",
    "precision": "no bug: the difference is within what rounding explains",
    "kink": "no bug: the slopes to the left and to the right differ here; move the input",
    "tie": "no bug: equal elements compete here, and any of them may win; move the input",
}
ORDER = ("bug", "tie", "kink", "precision", "ok")  # what is reported for several elements
LOOKED_AT = 16  # elements that are examined one by one
ENOUGH = 4  # bugs among them that settle it

Away = Callable[[tuple[int, ...]], bool]

SHORT = {"float32": 2.0**-24, "float16, bfloat16 or TF32": 2.0**-8}
FACTOR = 1.37  # not a power of 2, which would scale the rounding errors exactly


class Sides(NamedTuple):
    """Slopes of ``sum(f() * dy)`` along one element for several steps, longest first."""

    steps: np.ndarray
    left: np.ndarray
    right: np.ndarray

    @property
    def central(self) -> np.ndarray:
        """The mean of both sides."""
        return (self.left + self.right) / 2

    @property
    def gap(self) -> np.ndarray:
        """How far the sides are apart."""
        return self.right - self.left


def sides(f: Forward, x: np.ndarray, dy: np.ndarray, indices: list[tuple[int, ...]]) -> Sides:
    """Move all elements in `indices` together, to each side, by steps from 1e-2 to 1e-10."""
    held = [float(x[i]) for i in indices]
    scale = max(1.0, *map(abs, held))
    steps = scale * 10.0 ** np.arange(-2.0, -10.5, -0.5)

    def at(h: float) -> np.ndarray:
        try:
            for i, value in zip(indices, held):
                x[i] = value + h
            return np.array(f(), np.float64)
        finally:
            for i, value in zip(indices, held):
                x[i] = value

    y = at(0.0)
    left = np.array([np.sum((y - at(-h)) * dy) / h for h in steps])
    right = np.array([np.sum((at(h) - y) * dy) / h for h in steps])
    # Where x or y is rounded to a short format, steps below its resolution change nothing.
    moves = (left != 0) | (right != 0)
    if left.any() and right.any():
        used = int(np.flatnonzero(moves)[-1]) + 1
        return Sides(steps[:used], left[:used], right[:used])
    return Sides(steps, left, right)


def judge(
    f: Forward,
    x: np.ndarray,
    dy: np.ndarray,
    where: tuple[int, ...],
    analytic: float,
    tolerance: float,
    away: Away | None = None,
) -> str:
    """Say what explains the difference at one element: "bug", "precision", "kink" or "tie".

    In a network many windows can be tied at once, and what each of them chooses adds up with
    other signs: the sum need not lie between the two slopes. There `away` decides, which says
    whether the gradient to this element is right once the input is moved a little.
    """
    if not np.isfinite(analytic):
        return "bug"
    seen = sides(f, x, dy, [where])
    noise = _noise(seen)
    corner = _corner(seen, noise, tolerance)
    if corner is not None:
        low, high = sorted((seen.left[corner], seen.right[corner]))
        slack = tolerance + 4 * noise[corner]
        if low - slack <= analytic <= high + slack:
            return "tie" if _is_tie(f, x, dy, where, seen, corner) else "kink"
        return "kink" if away is not None and away(where) else "bug"
    if len(seen.steps) < 3:
        return "precision"
    # No corner here: take the differences that agree best with their neighbours.
    spread = np.abs(np.diff(seen.central, n=1))
    best = int(np.argmin(spread[:-1] + spread[1:])) + 1
    slack = max(tolerance, 4 * (spread[best - 1] + spread[best] + noise[best]))
    if abs(analytic - seen.central[best]) > slack:
        return "bug"
    # A corner close by shows in longer steps as one that no longer closes.
    return "kink" if _stable(seen, noise, tolerance, decades=2) else "precision"


def _noise(seen: Sides) -> np.ndarray:
    """Estimate what rounding does to each slope, from the shortest steps, where it is most."""
    ends = seen.central[-5:], seen.gap[-5:]
    last = sum(np.abs(np.diff(end)).max(initial=0.0) for end in ends)
    return last * seen.steps[-1] / seen.steps


def _corner(seen: Sides, noise: np.ndarray, tolerance: float) -> int | None:
    """The shortest step that still shows two slopes, if no shorter one shows that they meet."""
    gap = np.abs(seen.gap)
    for k in _stable(seen, noise, tolerance, decades=3):
        met = (gap[k + 1 :] < 0.1 * gap[k]) & (noise[k + 1 :] < 0.1 * gap[k])
        return None if met.any() else k
    return None


def _stable(seen: Sides, noise: np.ndarray, tolerance: float, decades: int) -> list[int]:
    """Where the gap has stayed as it is over some decades of steps; the shortest step first.

    Curvature closes the gap with the step, and rounding opens it: only at a corner it stays.
    """
    gap, n = np.abs(seen.gap), 2 * decades
    clear = gap > np.maximum(10 * noise, tolerance)
    return [
        k
        for k in range(len(gap) - 1, n - 1, -1)
        if clear[k - n : k + 1].all() and gap[k - n : k + 1].max() < 1.2 * gap[k - n : k + 1].min()
    ]


def _is_tie(
    f: Forward, x: np.ndarray, dy: np.ndarray, where: tuple[int, ...], seen: Sides, corner: int
) -> bool:
    """Whether the corner goes away when all elements equal to this one move with it."""
    near = np.abs(x - x[where]) <= seen.steps[corner]
    if near.sum() < 2:
        return False
    together = sides(f, x, dy, [tuple(map(int, i)) for i in np.argwhere(near)])
    return bool(abs(together.gap[corner]) < 0.1 * abs(seen.gap[corner]))


def rounding(
    residual: np.ndarray, again: np.ndarray | None, scale: float, known: str | None = None
) -> str | None:
    """Name the number format whose rounding explains `residual`, or None.

    Parameters
    ----------
    residual : array
        Analytic minus numeric gradient.
    again : array, optional
        The same for an upstream gradient of ``FACTOR * dy``, divided by FACTOR.
    scale : float
        Largest element of the gradient.
    known : str, optional
        A format that the computation is known to use; otherwise the shorter ones need proof.
    """
    largest = float(np.max(np.abs(residual), initial=0.0))
    for name, unit in SHORT.items():
        if largest > 4 * unit * scale:
            continue
        if name in ("float32", known):
            return name
        if again is None or not np.all(np.isfinite(again)):
            return None
        # A bug comes back the same; rounding falls otherwise.
        moved = float(np.sqrt(np.mean((again - residual) ** 2)))
        return name if moved > 0.2 * float(np.sqrt(np.mean(residual**2))) else None
    return None


def several(
    f: Forward,
    x: np.ndarray,
    dy: np.ndarray,
    analytic: np.ndarray,
    numeric: np.ndarray,
    tolerance: float,
    away: Away | None = None,
) -> tuple[str, np.ndarray]:
    """Judge the worst elements that fail: the gravest verdict, and where that is "bug"."""
    error = np.abs(analytic - numeric)
    error[np.isnan(numeric) & np.isfinite(analytic)] = 0  # not looked at
    bad = np.argwhere(~(error <= tolerance))
    order = np.argsort(-np.nan_to_num(error[tuple(bad.T)], nan=np.inf), kind="stable")
    mask = np.zeros(x.shape, bool)
    mask[tuple(bad.T)] = True
    found: list[str] = []
    for i in order[:LOOKED_AT]:
        where = tuple(int(n) for n in bad[i])
        found.append(judge(f, x, dy, where, float(analytic[where]), tolerance, away))
        mask[where] = found[-1] == "bug"
        if found.count("bug") == ENOUGH:
            break
    verdict = next(v for v in ORDER if v in found or v == "ok")
    return verdict, mask if verdict == "bug" else np.zeros_like(mask)
