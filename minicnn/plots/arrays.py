"""Small arrays with their numbers, side by side."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from minicnn.backend import Array, as_numpy
from minicnn.plots.theme import SMALL, Axes, Figure, choose, diverging, empty_figure, frame

MAX_SIDE = 40  # rows or columns; more would be too small to read
CELL = 0.42  # inches
LETTER = 0.19  # cells that a letter of a title takes


def plot_arrays(
    arrays: Mapping[str, Array],
    *,
    form: str = ".2g",
    mark: Mapping[str, Array] | None = None,
    theme: str = "light",
) -> Figure:
    """Draw matrices beside each other, each number in its cell.

    Parameters
    ----------
    arrays : mapping of str to array
        Titles, and matrices or vectors; leading axes of length 1 are dropped.
    form : str
        Format of a number.
    mark : mapping of str to array of bool, optional
        Cells to frame, for some of the arrays.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
        Blue is negative, orange positive, each array on a scale of its own; NaN is empty.

    Raises
    ------
    ValueError
        For an array with more than two axes, or too many numbers to read.
    """
    op = "plot_arrays"
    colours = choose(op, theme)
    if not arrays:
        raise ValueError(f"{op}: arrays: expected at least one, got none")
    shown = {name: _matrix(op, name, a) for name, a in arrays.items()}
    titles = [f"{name}  {a.shape[0]}x{a.shape[1]}" for name, a in shown.items()]
    widths = [max(a.shape[1], LETTER * len(t)) for a, t in zip(shown.values(), titles)]
    height = max(len(a) for a in shown.values())
    figure = empty_figure(
        CELL * sum(widths) + 0.35 * len(widths) + 0.2, CELL * height + 0.55, colours
    )
    grid = figure.subplots(1, len(shown), squeeze=False, width_ratios=widths)[0]
    for ax, title, (name, a) in zip(grid, titles, shown.items()):
        frame(ax, title, colours)
        limit = float(np.abs(a).max(initial=0, where=np.isfinite(a))) or 1.0
        # Half the colours, so that the numbers stay legible on them.
        image = ax.imshow(a, cmap=diverging(colours), vmin=-limit, vmax=limit, alpha=0.55)
        image.set_interpolation("none")
        ax.set_xticks(np.arange(a.shape[1] - 1) + 0.5, minor=True)
        ax.set_yticks(np.arange(a.shape[0] - 1) + 0.5, minor=True)
        ax.set_xticks([])
        ax.set_yticks([])
        ax.grid(which="minor", color=colours.faint, linewidth=0.5)
        ax.tick_params(which="minor", length=0)
        ax.set_anchor("N")
        for i, j in np.argwhere(np.isfinite(a)):
            text = f"{a[i, j] + 0.0:{form}}"  # no -0
            ax.text(j, i, text, ha="center", va="center", color=colours.ink, fontsize=SMALL)
        for i, j in np.argwhere(np.asarray(_marks(mark, name, a))):
            _outline(ax, i, j, colours.ink)
    return figure


def _matrix(op: str, name: str, a: Array) -> np.ndarray:
    a = np.asarray(as_numpy(a), np.float64)
    while a.ndim > 2 and len(a) == 1:
        a = a[0]
    if a.ndim > 2:
        raise ValueError(f"{op}: {name}: expected a matrix, got shape {a.shape}")
    a = np.atleast_2d(a)
    if max(a.shape) > MAX_SIDE:
        raise ValueError(
            f"{op}: {name}: expected at most {MAX_SIDE} rows and columns, got {a.shape}"
        )
    return a


def _marks(mark: Mapping[str, Array] | None, name: str, a: np.ndarray) -> np.ndarray:
    found = None if mark is None else mark.get(name)
    return np.zeros(a.shape, bool) if found is None else np.asarray(found).reshape(a.shape)


def _outline(ax: Axes, i: int, j: int, colour: str) -> None:
    from matplotlib.patches import Rectangle

    ax.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=1.5))
