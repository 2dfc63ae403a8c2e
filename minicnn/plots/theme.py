"""What all pictures share: colours, sizes, frames."""

from __future__ import annotations

from typing import Any, NamedTuple

# Matplotlib is imported where a picture is drawn, so its types are not at hand.
Figure = Any
Axes = Any


class Theme(NamedTuple):
    """Colours of a picture."""

    paper: str
    ink: str
    faint: str  # grid, frames and gaps
    blue: str  # test, and what is right
    orange: str  # train, and what is wrong


THEMES = {
    "light": Theme("#ffffff", "#222222", "#dddddd", "#0072b2", "#d55e00"),
    "dark": Theme("#1b1e23", "#e8e8e8", "#4a4f58", "#56b4e9", "#e69f00"),
}

SMALL, MEDIUM, LARGE = 8, 9, 11  # font sizes in points
MAX_NAME = 14  # characters of a class's name


def choose(op: str, theme: str) -> Theme:
    """Return the theme of that name, or raise an error that begins with `op`."""
    if theme not in THEMES:
        raise ValueError(f"{op}: theme: expected one of {', '.join(THEMES)}, got {theme!r}")
    return THEMES[theme]


def empty_figure(width: float, height: float, colours: Theme) -> Figure:
    """An empty figure, sizes in inches."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=130, facecolor=colours.paper, layout="constrained")


def frame(ax: Axes, title: str, colours: Theme) -> None:
    """Give axes a title and the theme's colours."""
    ax.set_facecolor(colours.paper)
    ax.set_title(title, color=colours.ink, fontsize=MEDIUM, parse_math=False)
    ax.tick_params(which="both", color=colours.faint, labelcolor=colours.ink, labelsize=SMALL)
    ax.spines[:].set_color(colours.faint)


def graph(ax: Axes, title: str, x: str, y: str, colours: Theme) -> None:
    """Prepare axes for curves: labels, a grid behind, and no frame above and on the right."""
    frame(ax, title, colours)
    ax.set_xlabel(x, color=colours.ink, fontsize=MEDIUM, parse_math=False)
    ax.set_ylabel(y, color=colours.ink, fontsize=MEDIUM, parse_math=False)
    ax.grid(color=colours.faint, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def sequential(colours: Theme) -> Any:
    """A map from paper to ink by way of blue: its lightness alone tells the value."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "sequential", [colours.paper, colours.blue, colours.ink]
    )


def diverging(colours: Theme) -> Any:
    """A map from blue (negative) through paper to orange (positive)."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list(
        "diverging", [colours.blue, colours.paper, colours.orange]
    )


def colour_bar(figure: Figure, image: Any, ax: Any, colours: Theme, label: str = "") -> None:
    """A bar with the values beside a picture."""
    bar = figure.colorbar(image, ax=ax, pad=0.02, aspect=18)
    bar.outline.set_edgecolor(colours.faint)
    bar.ax.tick_params(color=colours.faint, labelcolor=colours.ink, labelsize=SMALL)
    bar.set_label(label, color=colours.ink, fontsize=MEDIUM)


def short(name: str) -> str:
    """Cut a long name."""
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
