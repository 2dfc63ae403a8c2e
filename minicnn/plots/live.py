"""A picture that follows training in a notebook."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.plots.theme import SMALL, Figure, choose, empty_figure, graph
from minicnn.shapes import number
from minicnn.train import Callback, Trainer


class LivePlot(Callback):
    """Draws loss and accuracy while `Trainer.fit` runs, in the output of the notebook's cell.

    Parameters
    ----------
    seconds : float
        At most one picture in that time; the last one is drawn when an epoch ends.
    theme : {"light", "dark"}

    Examples
    --------
    ::

        trainer.fit(train, test, epochs=5, callbacks=[LivePlot()], progress=False)

    Outside of a notebook nothing is shown; `figure` draws what was seen so far.
    """

    def __init__(self, seconds: float = 1.0, *, theme: str = "light") -> None:
        self.seconds = number("LivePlot", "seconds", seconds, ge=0)
        self.colours = choose("LivePlot", theme)
        self.losses: list[float] = []
        self.epochs: list[tuple[int, dict[str, float]]] = []  # step at its end, record
        self._drawn = -np.inf
        self._display: Any = None

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Keep the loss, and draw if it is time."""
        self.losses.append(loss)
        if time.monotonic() - self._drawn > self.seconds:
            self._show()

    def on_epoch(self, trainer: Trainer, record: dict[str, float]) -> None:
        """Keep the record, and draw."""
        self.epochs.append((len(self.losses), dict(record)))
        self._show()

    def figure(self) -> Figure:
        """Draw the loss of every step with its mean, and the accuracies by epoch."""
        from matplotlib.ticker import MaxNLocator, PercentFormatter

        figure = empty_figure(7.6, 2.9, self.colours)
        left, right = figure.subplots(1, 2)
        graph(left, "loss", "step", "", self.colours)
        graph(right, "accuracy", "epoch", "", self.colours)
        steps = np.arange(1, len(self.losses) + 1)
        left.plot(steps, self.losses, color=self.colours.orange, linewidth=0.6, alpha=0.45)
        left.plot(steps, _smoothed(self.losses), color=self.colours.orange, label="train, smoothed")
        ends = [step for step, _ in self.epochs]
        left.plot(ends, self._record("test_loss"), color=self.colours.blue, marker="o", ms=4,
                  label="test")  # fmt: skip
        numbers = [record["epoch"] for _, record in self.epochs]
        for part, colour in (("train", self.colours.orange), ("test", self.colours.blue)):
            values = self._record(f"{part}_accuracy")
            last = f" {values[-1]:.1%}" if values and np.isfinite(values[-1]) else ""
            right.plot(numbers, values, color=colour, marker="o", ms=4, label=f"{part}{last}")
        right.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        right.yaxis.set_major_formatter(PercentFormatter(1))
        for ax in (left, right):
            ax.legend(fontsize=SMALL, labelcolor=self.colours.ink, frameon=False)
        return figure

    def _record(self, key: str) -> list[float]:
        return [float(record.get(key) or np.nan) for _, record in self.epochs]

    def _show(self) -> None:
        self._drawn = time.monotonic()
        picture = _png(self.figure())
        if picture is None:
            return
        if self._display is None:
            from IPython.display import display

            self._display = display(picture, display_id=True)
        else:
            self._display.update(picture)


def _png(figure: Figure) -> Any:
    """The figure as a picture for a notebook; None elsewhere."""
    import io
    import sys

    if "ipykernel" not in sys.modules:
        return None
    from IPython.display import Image

    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=90)
    return Image(data.getvalue())


def _smoothed(values: Sequence[float]) -> np.ndarray:
    """An average that forgets over about twenty values, right from the start on."""
    out, total, weight = np.empty(len(values)), 0.0, 0.0
    for i, value in enumerate(values):
        total, weight = 0.95 * total + 0.05 * value, 0.95 * weight + 0.05
        out[i] = total / weight
    return out
