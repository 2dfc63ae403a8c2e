"""Pictures of a training run: curves, confusion matrix, filters and the worst mistakes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array, as_numpy
from minicnn.plots.theme import (
    MEDIUM,
    SMALL,
    Axes,
    Figure,
    Theme,
    choose,
    colour_bar,
    diverging,
    empty_figure,
    frame,
    graph,
    short,
)
from minicnn.shapes import check_ndim, check_shape, integer

LINE = 13  # points from one label to the next
MAX_COUNTED = 30  # up to so many classes the confusion matrix has room for numbers
ZOOM = 8  # elements to a weight, so that gaps between filters can be narrower than a weight


def plot_history(history: Sequence[Mapping[str, Any]], *, theme: str = "light") -> Figure:
    """Draw loss and accuracy by epoch, with the last value beside each curve.

    Training values are means over the epoch while the network learns, with dropout and
    augmentation where used, so the test curve may well be the better one.

    Parameters
    ----------
    history : sequence of mappings
        As `Trainer.history`: epoch, train_loss, train_accuracy, test_loss, test_accuracy. A
        curve of which every value is NaN or missing is left out.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If the history is empty.
    """
    from matplotlib.ticker import PercentFormatter

    if not history:
        raise ValueError("plot_history: history: expected at least one record, got none")
    colours = choose("plot_history", theme)
    figure = empty_figure(9, 3.4, colours)
    left, right = figure.subplots(1, 2)
    curves = {
        (part, name): np.array([_value(record, f"{part}_{name}") for record in history])
        for part in ("train", "test")
        for name in ("loss", "accuracy")
    }
    if all((values[np.isfinite(values)] > 0).all() for values in curves.values()):
        _set_log_scale(left)
    right.yaxis.set_major_formatter(PercentFormatter(1))

    epochs = [record["epoch"] for record in history]
    for ax, name, form in ((left, "loss", ".4f"), (right, "accuracy", ".2%")):
        _prepare_curves(ax, name, colours)
        ax.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        ends = []
        for part, colour in (("train", colours.orange), ("test", colours.blue)):
            values = curves[part, name]
            ax.plot(epochs, values, color=colour, marker="o" if len(epochs) <= 20 else "", ms=4)
            finite = np.flatnonzero(np.isfinite(values))
            if finite.size:
                value = float(values[finite[-1]])
                ends.append((epochs[finite[-1]], value, f"{part} {value:{form}}", colour))
        _label_ends(ax, ends)
    return figure


def plot_confusion(
    y: Array, predicted: Array, classes: Sequence[str], *, theme: str = "light"
) -> Figure:
    """Draw how often each class was taken for each other one.

    A row is a true class, a column a predicted one. The diagonal is blue and the mistakes are
    orange, both by the logarithm of the count and up to their own largest, so that a single
    mistake among thousands is seen. On the right stands the share of each class that was
    recognised.

    Parameters
    ----------
    y, predicted : array of int, shape (N,)
        True and predicted labels, 0 to ``len(classes) - 1``.
    classes : sequence of str
        Up to 30 of them are drawn with the counts, more with the colours alone.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure

    Raises
    ------
    ValueError
        If the lengths differ or a label is out of range.
    """
    op, n = "plot_confusion", len(classes)
    counts = confusion_matrix(y, predicted, n)
    hits, total = int(np.trace(counts)), int(counts.sum())

    colours = choose(op, theme)
    names = [short(name) for name in classes]
    side = 0.42 * n if n <= MAX_COUNTED else 8.0
    margin = 0.5 + 0.08 * max(map(len, names))
    figure = empty_figure(max(side + margin + 0.7, 3.6), max(side + margin + 0.4, 3), colours)
    ax = figure.subplots()
    share = f" ({hits / total:.2%})" if total else ""
    frame(ax, f"{hits:,} of {total:,} right{share}", colours)
    cells = _confusion_cells(counts, colours)
    ax.imshow(cells, interpolation="none")
    for axis, what in ((ax.xaxis, "predicted"), (ax.yaxis, "true")):
        axis.set_label_text(what, color=colours.ink, fontsize=MEDIUM)
        step = -(-n // MAX_COUNTED)
        axis.set_ticks(range(0, n, step), names[::step], parse_math=False)
    if max(map(len, names)) > 3:
        ax.tick_params(axis="x", labelrotation=90)
    if n <= MAX_COUNTED:
        _write_counts(ax, counts, cells, colours)
    return figure


def confusion_matrix(y: Array, predicted: Array, n: int) -> np.ndarray:
    """Count how often each of `n` classes was taken for each: (true, predicted) int64."""
    op = "confusion_matrix"
    y, predicted = _labels(op, "y", y, n), _labels(op, "predicted", predicted, n)
    check_shape(op, "predicted", predicted, y.shape, "one for each of y")
    return np.bincount(y * n + predicted, minlength=n * n).reshape(n, n)


def plot_filters(weight: Array, *, theme: str = "light") -> Figure:
    """Draw the filters of a convolution in a grid, all on one signed scale.

    Parameters
    ----------
    weight : array, shape (F, C, KH, KW)
        With several channels, the C planes of a filter stand side by side.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
        Blue is negative and orange positive; what is not finite is gray.

    Raises
    ------
    ValueError
        If `weight` has not four axes, or no element.
    """
    weight = np.asarray(as_numpy(weight), np.float64)
    check_ndim("plot_filters", "weight", weight, "(F, C, KH, KW)")
    if not weight.size:
        raise ValueError(f"plot_filters: weight: expected filters, got shape {weight.shape}")
    F, C, KH, KW = weight.shape
    columns = min(F, max(1, round(math.sqrt(2 * F * KH / (C * KW)))))  # about 2:1 in all
    limit = float(np.abs(weight[np.isfinite(weight)]).max(initial=0)) or 1.0
    sheet = _sheet(weight, columns, empty=-2 * limit)

    colours = choose("plot_filters", theme)
    width = min(8.0, 0.13 * sheet.shape[1] / ZOOM)
    height = width * sheet.shape[0] / sheet.shape[1]
    figure = empty_figure(max(width + 1, 3.6), max(height + 0.5, 1.6), colours)
    ax = figure.subplots()
    planes = {1: "", 3: ": red, green, blue"}.get(C, f" on {C} channels")
    frame(ax, f"{F} filters of {KH}x{KW}{planes}", colours)
    ax.set_axis_off()
    signed = diverging(colours).with_extremes(bad=colours.faint, under=colours.paper)
    image = ax.imshow(sheet, cmap=signed, vmin=-limit, vmax=limit, interpolation="none")
    colour_bar(figure, image, ax, colours)
    return figure


def plot_mistakes(
    x: Array,
    y: Array,
    probabilities: Array,
    classes: Sequence[str],
    n: int = 24,
    *,
    theme: str = "light",
) -> Figure:
    """Draw the pictures of which the network was most sure and wrong.

    Parameters
    ----------
    x : array, shape (N, C, H, W)
        Pictures in [0, 1], one channel (gray) or three (RGB).
    y : array of int, shape (N,)
        True labels.
    probabilities : array, shape (N, K)
        Probability of each class.
    classes : sequence of str, length K
    n : int
        How many to draw at most.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
        The surest mistake first, with the true class above the picture, and the predicted one
        and its probability below; or a line that says that there is no mistake.

    Raises
    ------
    ValueError
        If shapes do not fit together, a label is out of range, or there are neither 1 nor 3
        channels.
    """
    op = "plot_mistakes"
    n = integer(op, "n", n, 1)
    check_ndim(op, "x", x, "(N, C, H, W)")
    N, C, H, W = x.shape
    if C not in (1, 3):
        raise ValueError(f"{op}: x: expected 1 or 3 channels, got {C}")
    y, probabilities = _labels(op, "y", y, len(classes)), as_numpy(probabilities)
    check_shape(op, "y", y, (N,), "one for each of x")
    check_shape(op, "probabilities", probabilities, (N, len(classes)), "one for each class")

    predicted = probabilities.argmax(axis=1)
    wrong = np.flatnonzero(predicted != y)
    worst = wrong[np.argsort(-probabilities[wrong, predicted[wrong]], kind="stable")][:n]
    columns = min(len(worst), 8) or 1
    rows = -(-len(worst) // columns)
    side = 0.65 + 0.06 * max(map(len, map(short, classes)))

    colours = choose(op, theme)
    figure = empty_figure(max(side * columns, 4), (side * H / W + 0.4) * rows + 0.5, colours)
    figure.suptitle(_count_mistakes(len(worst), len(wrong), N), color=colours.ink, fontsize=MEDIUM)
    for place, i in enumerate(worst):
        ax = figure.add_subplot(rows, columns, place + 1)
        frame(ax, short(classes[y[i]]), colours)
        ax.set_xticks([])
        ax.set_yticks([])
        picture = as_numpy(x[i]).transpose(1, 2, 0).clip(0, 1)  # (H, W, C)
        ax.imshow(picture, cmap="gray", vmin=0, vmax=1, interpolation="none")
        text = f"{short(classes[predicted[i]])}  {probabilities[i, predicted[i]]:.0%}"
        ax.set_xlabel(text, color=colours.orange, fontsize=MEDIUM, parse_math=False)
    return figure


def _labels(op: str, name: str, y: Array, n: int) -> np.ndarray:
    """Labels on the CPU, once they are known to be integers from 0 to n - 1."""
    y = as_numpy(y)
    check_ndim(op, name, y, "(N)")
    if y.dtype.kind not in "iu":
        raise TypeError(f"{op}: {name}: expected integer labels, got {y.dtype}")
    bad = np.flatnonzero((y < 0) | (y >= n))
    if bad.size:
        raise ValueError(
            f"{op}: {name}: expected labels 0 to {n - 1}, got {y[bad[0]]} at position {bad[0]}"
        )
    return y.astype(np.int64)


# ------------------------------------------------------------ curves


def _value(record: Mapping[str, Any], key: str) -> float:
    value = record.get(key)
    return math.nan if value is None else float(value)


def _prepare_curves(ax: Axes, name: str, colours: Theme) -> None:
    from matplotlib.ticker import MaxNLocator

    graph(ax, name, "epoch", "", colours)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _set_log_scale(ax: Axes) -> None:
    from matplotlib.ticker import LogFormatter

    class PlainLogFormatter(LogFormatter):
        """Labels the ticks that Matplotlib would label, with 0.02 instead of 2e-02."""

        def __call__(self, x: float, pos: int | None = None) -> str:
            return f"{x:g}" if super().__call__(x, pos) else ""

    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(PlainLogFormatter())
    ax.yaxis.set_minor_formatter(PlainLogFormatter(minor_thresholds=(2, 0.5)))


def _label_ends(ax: Axes, ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Write (x, y, text, colour) beside the ends of two lines, apart if they would overlap."""
    ax.figure.draw_without_rendering()  # from now on the height of the axes is known
    ends = sorted(ends, key=lambda end: end[1])
    heights = [ax.transData.transform(end[:2])[1] * 72 / ax.figure.dpi for end in ends]
    missing = max(LINE - np.ptp(heights), 0) if len(ends) == 2 else 0.0
    for (x, y, text, colour), shift in zip(ends, (-missing / 2, missing / 2)):
        ax.annotate(
            text,
            (x, y),
            xytext=(8, shift),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=MEDIUM,
        )


# ------------------------------------------------------------ confusion matrix


def _confusion_cells(counts: np.ndarray, colours: Theme) -> np.ndarray:
    """Colours (n, n, 3): blue on the diagonal, orange beside it, paper where the count is 0."""
    from matplotlib.colors import to_rgb

    diagonal = np.eye(len(counts), dtype=bool)
    cells = np.empty((*counts.shape, 3))
    for where, colour in ((diagonal, colours.blue), (~diagonal, colours.orange)):
        strength = np.log1p(counts[where]) / np.log1p(counts[where].max(initial=1))
        paper, full = np.array(to_rgb(colours.paper)), np.array(to_rgb(colour))
        cells[where] = paper + strength[:, None] * (full - paper)
    return cells


def _write_counts(ax: Axes, counts: np.ndarray, cells: np.ndarray, colours: Theme) -> None:
    """Write each count into its cell and the share of each row that is right beside it."""
    n = len(counts)
    ax.set_xticks(np.arange(n - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(n - 1) + 0.5, minor=True)
    ax.grid(which="minor", color=colours.faint, linewidth=0.5)
    ax.tick_params(which="minor", length=0)
    luminance = cells @ (0.299, 0.587, 0.114)
    for i, j in np.argwhere(counts):
        count = counts[i, j]
        text = f"{count}" if count < 10_000 else f"{count / 1000:.0f}k"
        colour = "#000000" if luminance[i, j] > 0.4 else "#ffffff"
        ax.text(j, i, text, ha="center", va="center", color=colour, fontsize=SMALL)
    for i, total in enumerate(counts.sum(axis=1)):
        text = f"{counts[i, i] / total:.1%}" if total else "none"
        ax.text(n - 0.35, i, text, va="center", color=colours.ink, fontsize=SMALL)


# ------------------------------------------------------------ mistakes


def _count_mistakes(shown: int, wrong: int, total: int) -> str:
    if not wrong:
        return f"No mistake in {total:,} pictures"
    mistakes = f"{wrong:,} mistake{'s' if wrong > 1 else ''} in {total:,} pictures"
    some = f"The {shown} surest of " if shown < wrong else ""
    return f"{some}{mistakes}\n(true class above, predicted class below)"


# ------------------------------------------------------------ filters


def _sheet(weight: np.ndarray, columns: int, empty: float) -> np.ndarray:
    """Lay (F, C, KH, KW) out on one map, with gaps of NaN, and `empty` where no filter is left.

    A weight takes ZOOM x ZOOM elements, the gap between planes one and that around filters two.
    """
    F = len(weight)
    rows = -(-F // columns)
    planes = np.kron(weight, np.ones((ZOOM, ZOOM)))
    planes = np.pad(planes, ((0, 0), (0, 0), (2, 2), (0, 1)), constant_values=np.nan)
    _, C, H, W = planes.shape
    filters = planes.transpose(0, 2, 1, 3).reshape(F, H, C * W)
    filters = np.pad(filters, ((0, 0), (0, 0), (2, 1)), constant_values=np.nan)
    unused = ((0, rows * columns - F), (0, 0), (0, 0))
    cells = np.pad(filters, unused, constant_values=empty)
    sheet = cells.reshape(rows, columns, H, -1).transpose(0, 2, 1, 3)  # (rows, H, columns, W)
    return sheet.reshape(rows * H, -1)
