"""Learning-rate schedules: plain functions from the step to the learning rate.

A schedule is a small frozen dataclass which is called with the number of updates made so far and
returns the learning rate of the next one::

    for step in range(total_steps):
        optimizer.lr = schedule(step)
        ...
        optimizer.step()

It remembers nothing, so a run resumed at step k continues with exactly the rates of an
uninterrupted one. Past its last step a schedule holds its final rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from minicnn.shapes import integer, number

__all__ = [
    "SCHEDULES",
    "ConstantLR",
    "CosineLR",
    "OneCycleLR",
    "Schedule",
    "StepLR",
    "Warmup",
    "make_schedule",
]

Schedule = Callable[[int], float]
"""Any function ``schedule(step) -> lr`` with ``step`` counted from 0."""

SCHEDULES = ("constant", "step", "cosine", "onecycle")
"""Names known to `make_schedule`."""


@dataclass(frozen=True)
class ConstantLR:
    """The same learning rate at every step.

    Parameters
    ----------
    lr : float
        Learning rate, at least 0.
    """

    lr: float

    def __post_init__(self) -> None:
        number("ConstantLR", "lr", self.lr, ge=0)

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        integer("ConstantLR", "step", step, 0)
        return self.lr


@dataclass(frozen=True)
class StepLR:
    """Multiply the learning rate by `gamma` every `step_size` steps.

    ``lr(t) = lr * gamma ** (t // step_size)``

    Parameters
    ----------
    lr : float
        Learning rate of the first `step_size` steps, at least 0.
    step_size : int
        Length of one stair, at least 1.
    gamma : float
        Factor from one stair to the next, in [0, 1].

    Examples
    --------
    >>> schedule = StepLR(1.0, step_size=2, gamma=0.5)
    >>> [schedule(step) for step in range(6)]
    [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    """

    lr: float
    step_size: int
    gamma: float = 0.1

    def __post_init__(self) -> None:
        number("StepLR", "lr", self.lr, ge=0)
        integer("StepLR", "step_size", self.step_size, 1)
        number("StepLR", "gamma", self.gamma, ge=0, le=1)

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        integer("StepLR", "step", step, 0)
        return self.lr * self.gamma ** (step // self.step_size)


@dataclass(frozen=True)
class CosineLR:
    """Half a cosine from `lr` at step 0 down to `min_lr` at step `total_steps` (SGDR, no restart).

    ``lr(t) = min_lr + (lr - min_lr) * (1 + cos(pi * t / total_steps)) / 2``

    Parameters
    ----------
    lr : float
        Learning rate at step 0, at least 0.
    total_steps : int
        Step at which `min_lr` is reached, at least 1.
    min_lr : float
        Final learning rate, in [0, lr].

    References
    ----------
    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", ICLR 2017,
    equation 5.
    """

    lr: float
    total_steps: int
    min_lr: float = 0.0

    def __post_init__(self) -> None:
        number("CosineLR", "lr", self.lr, ge=0)
        integer("CosineLR", "total_steps", self.total_steps, 1)
        number("CosineLR", "min_lr", self.min_lr, ge=0, le=self.lr)

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        integer("CosineLR", "step", step, 0)
        return _cosine(self.lr, self.min_lr, min(step / self.total_steps, 1.0))


@dataclass(frozen=True)
class OneCycleLR:
    """Up to `max_lr` and down far below the start, both along half a cosine.

    The rate starts at ``max_lr / div_factor``, peaks at step ``pct_start * total_steps - 1`` and
    ends at step ``total_steps - 1`` with ``max_lr / div_factor / final_div_factor``. These are the
    rates of ``torch.optim.lr_scheduler.OneCycleLR`` at the steps ``0 .. total_steps - 1``.

    Parameters
    ----------
    max_lr : float
        Peak learning rate, at least 0.
    total_steps : int
        Number of steps in the cycle, at least 1.
    pct_start : float
        Share of the cycle spent rising, in [0, 1].
    div_factor : float
        Peak over first learning rate, above 0.
    final_div_factor : float
        First over last learning rate, above 0.

    References
    ----------
    Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning
    Rates", 2018, arXiv:1708.07120.
    """

    max_lr: float
    total_steps: int
    pct_start: float = 0.3
    div_factor: float = 25.0
    final_div_factor: float = 1e4

    def __post_init__(self) -> None:
        number("OneCycleLR", "max_lr", self.max_lr, ge=0)
        integer("OneCycleLR", "total_steps", self.total_steps, 1)
        number("OneCycleLR", "pct_start", self.pct_start, ge=0, le=1)
        number("OneCycleLR", "div_factor", self.div_factor, gt=0)
        number("OneCycleLR", "final_div_factor", self.final_div_factor, gt=0)

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        integer("OneCycleLR", "step", step, 0)
        first_lr = self.max_lr / self.div_factor
        last_lr = first_lr / self.final_div_factor
        last = self.total_steps - 1
        peak = self.pct_start * self.total_steps - 1
        step = min(step, last)
        if step < peak:
            return _cosine(first_lr, self.max_lr, step / peak)
        if peak < last:
            return _cosine(self.max_lr, last_lr, (step - peak) / (last - peak))
        return self.max_lr


@dataclass(frozen=True)
class Warmup:
    """Rise linearly to the first rate of another schedule, then follow it from its step 0.

    ``lr(t) = then(0) * (t + 1) / (steps + 1)`` for ``t < steps``, else ``then(t - steps)``: the
    first update is not wasted on a rate of 0, and the peak is used once.

    Parameters
    ----------
    steps : int
        Length of the rise, at least 0.
    then : callable
        Schedule to follow; it sees ``step - steps``.

    References
    ----------
    Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour", 2017,
    arXiv:1706.02677, section 2.2.

    Examples
    --------
    >>> schedule = Warmup(3, ConstantLR(1.0))
    >>> [schedule(step) for step in range(5)]
    [0.25, 0.5, 0.75, 1.0, 1.0]
    """

    steps: int
    then: Schedule

    def __post_init__(self) -> None:
        integer("Warmup", "steps", self.steps, 0)
        if not callable(self.then):
            raise TypeError(f"Warmup: then: expected a schedule, got {self.then!r}")

    def __call__(self, step: int) -> float:
        """Learning rate at `step`."""
        integer("Warmup", "step", step, 0)
        if step < self.steps:
            return self.then(0) * (step + 1) / (self.steps + 1)
        return self.then(step - self.steps)


def make_schedule(name: str, lr: float, total_steps: int, warmup: int = 0) -> Schedule:
    """Schedule by name, for the command line.

    Parameters
    ----------
    name : {"constant", "step", "cosine", "onecycle"}
        "step" divides the rate by 10 after each third of the run.
    lr : float
        Highest learning rate, at least 0.
    total_steps : int
        Updates in the whole run, the warm-up included.
    warmup : int
        Length of a linear warm-up, less than `total_steps`; 0 for "onecycle", which has its own.

    Returns
    -------
    callable
        ``schedule(step) -> lr``.

    Raises
    ------
    ValueError
        For an unknown name or a value outside its range.

    Examples
    --------
    >>> make_schedule("constant", lr=0.1, total_steps=100)
    ConstantLR(lr=0.1)
    """
    if name not in SCHEDULES:
        raise ValueError(
            f"make_schedule: name: expected one of {', '.join(SCHEDULES)}, got {name!r}"
        )
    number("make_schedule", "lr", lr, ge=0)
    integer("make_schedule", "total_steps", total_steps, 1)
    integer("make_schedule", "warmup", warmup, 0)
    if warmup >= total_steps:
        raise ValueError(
            f"make_schedule: warmup: expected fewer than total_steps={total_steps}, got {warmup}"
        )
    if name == "onecycle":
        if warmup:
            raise ValueError(
                f"make_schedule: warmup: expected 0 with 'onecycle', got {warmup}; "
                "this schedule has a warm-up of its own"
            )
        return OneCycleLR(lr, total_steps)
    steps = total_steps - warmup
    then: Schedule
    if name == "constant":
        then = ConstantLR(lr)
    elif name == "step":
        then = StepLR(lr, step_size=math.ceil(steps / 3), gamma=0.1)
    else:
        then = CosineLR(lr, steps)
    return Warmup(warmup, then) if warmup else then


def _cosine(start: float, end: float, part: float) -> float:
    """Value at `part` in [0, 1] of the half cosine that falls (or rises) from `start` to `end`."""
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2
