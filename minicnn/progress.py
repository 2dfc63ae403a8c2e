"""How training goes: what is counted over an epoch, and the bar or the line that shows it."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any, NamedTuple

from minicnn.backend import Array


class Metrics(NamedTuple):
    """Mean loss, and the share of right answers (NaN where the targets are not classes)."""

    loss: float
    accuracy: float


@dataclass
class Position:
    """Where training stands: epochs done, and the sums over the batches of the one begun."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0  # labels that count, or samples where the targets are not classes
    loss: float = 0.0  # sum over them
    correct: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, samples: int) -> None:
        """Count one more batch."""
        self.batch += 1
        self.samples += samples
        self.loss += loss * samples
        self.correct += correct

    def metrics(self, classes: bool) -> Metrics:
        """Means over the samples so far."""
        n = self.samples or math.nan
        return Metrics(self.loss / n, self.correct / n if classes else math.nan)


def count_labels(y: Array) -> int:
    """How many terms the mean loss has: labels that are not ignored, or samples."""
    return int(counted(y))


def counted(y: Array) -> Any:
    """`count_labels`, left on the device of `y`."""
    return (y >= 0).sum() if y.dtype.kind in "iu" else len(y)


def correct(outputs: Array, y: Array) -> Any:
    """How many classes are right, 0 where the targets are none; left on the device."""
    return (outputs.argmax(axis=1) == y).sum() if y.dtype.kind in "iu" else 0


class EpochBar:
    """A progress bar on a terminal or in a notebook; elsewhere one line when the epoch ends."""

    def __init__(self, label: str, total: int, done: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.label, self.line = label, progress and not live
        self.bar = tqdm(
            desc=label, total=total, initial=done, unit="batch", disable=not (progress and live)
        )

    def advance(self, so_far: Metrics) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(_text("train", so_far), refresh=False)
        self.bar.update()

    def finish(self, trained: Metrics, tested: Metrics) -> None:
        text = f"{_text('train', trained)}  {_text('test', tested)}"
        self.bar.set_postfix_str(text)
        if self.line:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> EpochBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()


def _text(name: str, metrics: Metrics) -> str:
    if math.isnan(metrics.loss):
        return ""
    accuracy = "" if math.isnan(metrics.accuracy) else f" {metrics.accuracy:.2%}"
    return f"{name} {metrics.loss:.4f}{accuracy}"
