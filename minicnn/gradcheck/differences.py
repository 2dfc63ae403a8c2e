"""Finite differences, and how far a gradient is from them.

With a random upstream gradient `dy`, the scalar ``sum(y * dy)`` has the gradient that
``backward(dy)`` must return, and its slope along each element follows from two forward passes,
``(f(x + h) - f(x - h)) / 2h``, with an error of order h**2 plus rounding / h.

Adjoint: where y is linear in x, ``<A x, dy> = <x, A* dy>`` holds to rounding for any x and dy.

The upstream gradient is never all ones: behind a softmax or a normalisation that gradient is
identically zero, and a backward that returns zeros would pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array

STREAM = 0x6472  # sets the draws of dy apart from the caller's
STEP = 1e-6  # near the cube root of the rounding unit: truncation and rounding errors balance
STEPS = tuple(10.0**-k for k in range(1, 12))  # of a sweep

Forward = Callable[[], Array]


class Step(NamedTuple):
    """One line of a sweep: the difference of two evaluations `step` to each side."""

    step: float
    numeric: float
    error: float  # |analytic - numeric|


def numerical_gradient(
    f: Forward,
    x: np.ndarray,
    dy: np.ndarray,
    step: float = STEP,
    at: np.ndarray | None = None,
) -> np.ndarray:
    """Central differences of ``sum(f() * dy)`` along every element of `x`.

    Parameters
    ----------
    f : callable
        Returns y, computed from `x`, which is changed in place for each evaluation and put back.
    x : numpy.ndarray, float64
    dy : numpy.ndarray
        Upstream gradient, of y's shape.
    step : float
        Half the distance of the two evaluations, relative to ``max(1, |x|)``.
    at : numpy.ndarray of bool, shape of x, optional
        Where to look; the gradient is NaN elsewhere.

    Returns
    -------
    numpy.ndarray, shape of x

    Raises
    ------
    TypeError
        If `x` is not float64: differences in float32 drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(f"numerical_gradient: x: expected float64, got {x.dtype}")
    dx = np.full(x.shape, np.nan)
    for index in np.ndindex(x.shape):
        if at is None or at[index]:
            dx[index] = np.sum(slope(f, x, index, step * max(1.0, abs(float(x[index])))) * dy)
    return dx


def jacobian(f: Forward, x: np.ndarray, step: float = STEP) -> np.ndarray:
    """Central differences of every element of y along every element of `x`: (x.size, y.size)."""
    return np.array(
        [
            slope(f, x, index, step * max(1.0, abs(float(x[index])))).ravel()
            for index in np.ndindex(x.shape)
        ]
    )


def slope(f: Forward, x: np.ndarray, index: tuple[int, ...], h: float) -> np.ndarray:
    """Return ``(f(x + h) - f(x - h)) / 2h`` along one element, an array like y."""
    value = float(x[index])
    try:
        x[index] = high = value + h
        above = np.array(f(), np.float64)  # a copy: an op may return a view of x
        x[index] = low = value - h
        # Subtract before summing: both sums are large and nearly equal.
        return (above - f()) / (high - low)
    finally:
        x[index] = value


def sweep(
    f: Forward, x: np.ndarray, dy: np.ndarray, where: tuple[int, ...], analytic: float
) -> tuple[Step, ...]:
    """Central differences of ``sum(f() * dy)`` along ``x[where]`` for steps from 0.1 to 1e-11.

    The error first falls, as the square of the step, and then rises again, as rounding divided
    by the step. A right gradient shows as a deep valley in between, a wrong one as a plain.
    """
    scale = max(1.0, abs(float(x[where])))
    numeric = [(h, float(np.sum(slope(f, x, where, h * scale) * dy))) for h in STEPS]
    return tuple(Step(h, value, abs(analytic - value)) for h, value in numeric)


class Check(NamedTuple):
    """The comparison of one gradient with finite differences."""

    name: str
    ok: bool
    error: float  # largest |analytic - numeric| / (atol + rtol * scale); above 1 fails
    where: tuple[int, ...]  # position of the worst element
    analytic: float
    numeric: float
    bad: int = 0  # elements that fail
    size: int = 0  # elements that were compared
    verdict: str = "ok"  # or "bug", "precision", "kink", "tie": see `minicnn.gradcheck.verdicts`
    hints: tuple[Any, ...] = ()  # of `minicnn.gradcheck.hints.Hint`, the surest first
    steps: tuple[Step, ...] = ()  # error against step size at the worst element
    labels: tuple[str, str] = ("analytic", "numeric")
    arrays: tuple[np.ndarray, np.ndarray] | None = None  # all of both gradients

    def __str__(self) -> str:
        mine, theirs = self.labels
        line = (
            f"{'ok  ' if self.ok else 'FAIL'} {self.name}: worst element {self.where}: "
            f"{mine} {self.analytic:.8g}, {theirs} {self.numeric:.8g}, error/tolerance "
            f"{self.error:.2g}"
        )
        if self.ok:
            return line
        return "\n".join([line, *self._details()])

    def _details(self) -> list[str]:
        from minicnn.gradcheck.verdicts import MEANING

        meaning = MEANING[self.verdict]
        if self.verdict == "bug" and self.labels[1] == "reference":
            meaning = "the reference gives other numbers"
        count = f" ({self.bad:,} of {self.size:,} elements differ)" if self.size else ""
        return [
            f"     {self.verdict}: {meaning}{count}",
            *(f"     hint: {hint.text}" for hint in self.hints),
        ]


def compare(
    name: str,
    analytic: np.ndarray,
    numeric: np.ndarray,
    rtol: float,
    atol: float,
    at: np.ndarray | None = None,
) -> Check:
    """Compare two gradients of one array, where `at` is true, and find the worst element."""
    if analytic.shape != numeric.shape:
        raise ValueError(
            f"gradcheck: {name}: expected a gradient of shape {numeric.shape}, got {analytic.shape}"
        )
    if at is None:
        at = np.ones(numeric.shape, bool)
    if not at.any():
        return Check(name, True, 0.0, (), 0.0, 0.0)
    error = np.asarray(np.abs(analytic - numeric) / tolerance(numeric[at], rtol, atol))
    error[~at] = 0
    # argmax stops at a NaN, and a NaN is not <= 1.
    where = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    worst, bad = float(error[where]), int(np.sum(~(error <= 1)))
    values = float(analytic[where]), float(numeric[where])
    arrays = analytic, numeric
    return Check(name, worst <= 1, worst, where, *values, bad, int(at.sum()), arrays=arrays)


def tolerance(numeric: np.ndarray, rtol: float, atol: float) -> float:
    """What counts as equal: ``atol + rtol * (largest |numeric|)``."""
    return float(atol + rtol * np.max(np.abs(numeric), initial=0.0))


def adjoint_gap(y: np.ndarray, dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> float:
    """How far ``<y, dy>`` and ``<x, dx>`` differ, relative to the sum of |terms|.

    For an op that is linear in `x` (``y = A x``, no bias) and its backward ``dx = A* dy`` this
    is of the order of the rounding unit.
    """
    left, right = np.vdot(y, dy), np.vdot(x, dx)
    terms = np.vdot(np.abs(y), np.abs(dy)) + np.vdot(np.abs(x), np.abs(dx))
    return float(abs(left - right) / terms) if terms else 0.0
