"""How training is going: gradients, updates, dead units, the loss around the weights.

Each picture has a function that gives its numbers, so that they can be used without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module, as_numpy, prefer
from minicnn.layers import Layer, ReLU
from minicnn.plots.attribution import layer_outputs, undisturbed
from minicnn.plots.theme import (
    MEDIUM,
    SMALL,
    Figure,
    Theme,
    choose,
    colour_bar,
    empty_figure,
    graph,
    sequential,
)
from minicnn.shapes import integer
from minicnn.train import LOSSES, Callback, Loss, Trainer

# ------------------------------------------------------------ gradients by layer


def gradient_flow(
    model: Layer, x: Array, y: Array, loss: str | Loss = "cross_entropy"
) -> dict[str, float]:
    """Root mean square of the gradient to each weight, for one batch, in training mode.

    Biases and what else has one axis are left out: their gradients are sums over all places.

    The model is left as it was; running statistics too.
    """
    forward, backward = LOSSES[loss] if isinstance(loss, str) else loss
    buffers = [(a, a.copy()) for _, layer in model.modules() for a in layer.buffers.values()]
    with undisturbed(model), prefer("numba"):
        model.train()
        model.zero_grad()
        outputs, caches = model.forward(x)
        value, cache = forward(outputs, y)
        model.backward(backward(array_module(value).ones_like(value), cache), caches)
        found = {name: _rms(g) for name, _, g in model.named_params() if g.ndim > 1}
    for a, held in buffers:
        a[...] = held
    return found


def plot_gradient_flow(
    model: Layer, x: Array, y: Array, loss: str | Loss = "cross_entropy", *, theme: str = "light"
) -> Figure:
    """Draw the size of the gradient to each weight, first layer at the top.

    Bars that shrink towards the top by orders of magnitude are a vanishing gradient, bars that
    grow are an exploding one.

    Parameters
    ----------
    model : Layer
    x, y : array
        One batch.
    loss : str or (forward, backward)
        As for `Trainer`.
    theme : {"light", "dark"}
    """
    colours = choose("plot_gradient_flow", theme)
    found = gradient_flow(model, x, y, loss)
    return _bars(
        list(found), list(found.values()), "root mean square of the gradient", colours, log=True
    )


# ------------------------------------------------------------ updates


class UpdateRatio(Callback):
    """Follows how far each step moves each weight: ``|update| / |weight|``, in norms.

    Attributes
    ----------
    ratios : dict of str to list of float
        One number a step for every parameter with two axes or more.
    """

    def __init__(self) -> None:
        self.ratios: dict[str, list[float]] = {}
        self._before: dict[str, Array] = {}

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Compare the weights with those of the step before."""
        for name, p, _ in trainer.model.named_params():
            if p.ndim < 2:
                continue
            if name in self._before:
                ratio = _rms(p - self._before[name]) / (_rms(self._before[name]) or np.nan)
                self.ratios.setdefault(name, []).append(ratio)
            self._before[name] = p.copy()


def plot_update_ratio(ratios: Mapping[str, Sequence[float]], *, theme: str = "light") -> Figure:
    """Draw the ratios that `UpdateRatio` kept, on a logarithmic scale.

    About 0.001 is usual; far above it training is rough, far below it is slow. The band is a
    factor of ten to each side.
    """
    if not any(map(len, ratios.values())):
        raise ValueError("plot_update_ratio: ratios: expected at least one step, got none")
    colours = choose("plot_update_ratio", theme)
    figure = empty_figure(6.4, 3.2, colours)
    ax = figure.subplots()
    graph(ax, "size of a step, relative to the weight", "step", "", colours)
    ax.set_yscale("log")
    ax.axhspan(1e-4, 1e-2, color=colours.faint, alpha=0.35, linewidth=0)
    styles = ("-", "--", ":", "-.")
    for i, (name, values) in enumerate(ratios.items()):
        colour = (colours.blue, colours.orange, colours.ink)[i % 3]
        style = styles[i // 3 % 4]
        steps = np.arange(1, len(values) + 1)
        ax.plot(steps, values, color=colour, linestyle=style, linewidth=1.2, label=name)
    _legend(ax, colours)
    return figure


# ------------------------------------------------------------ dead units


def dead_relus(model: Layer, x: Array) -> dict[str, float]:
    """Share of the units (channels, or features) of each ReLU that are zero for all of `x`."""
    found = {}
    for name, layer, y in layer_outputs(model, x):
        if isinstance(layer, ReLU):
            axes = (0, *range(2, y.ndim))
            found[name] = float((as_numpy(y) <= 0).all(axis=axes).mean())
    return found


def plot_dead_relus(model: Layer, x: Array, *, theme: str = "light") -> Figure:
    """Draw the share of dead units of each ReLU over the batch `x`; see `dead_relus`."""
    colours = choose("plot_dead_relus", theme)
    found = dead_relus(model, x)
    if not found:
        raise ValueError("plot_dead_relus: model: expected a ReLU, got none")
    names = [f"{name}  ReLU" for name in found]
    return _bars(names, list(found.values()), f"dead over {len(x):,} pictures", colours)


# ------------------------------------------------------------ the loss around the weights


def loss_landscape(
    model: Layer,
    x: Array,
    y: Array,
    loss: str | Loss = "cross_entropy",
    *,
    span: float = 1.0,
    points: int = 13,
    rng: int | np.random.Generator = 0,
) -> np.ndarray:
    """The loss on a slice through the weights, in two random directions.

    Each filter of a direction has the length of the filter of the weights, so that slices of
    different networks can be compared; biases and what is one-dimensional stay.

    Parameters
    ----------
    span : float
        How far to go to each side, 1 being as far as the weights are long.
    points : int
        Along each direction; an odd number has the weights themselves in the middle.
    rng : int or numpy.random.Generator
        Draws the directions.

    Returns
    -------
    numpy.ndarray, shape (points, points)

    References
    ----------
    H. Li et al., "Visualizing the Loss Landscape of Neural Nets", NeurIPS 2018.
    """
    points = integer("loss_landscape", "points", points, 2)
    rng = np.random.default_rng(rng)
    forward, _ = LOSSES[loss] if isinstance(loss, str) else loss
    params = [p for _, p, _ in model.named_params() if p.ndim > 1]
    held = [p.copy() for p in params]
    directions = [[_like(p, rng) for p in params] for _ in range(2)]
    steps = np.linspace(-span, span, points)
    found = np.empty((points, points))
    try:
        with prefer("numba"):
            for i, j in np.ndindex(found.shape):
                for p, value, a, b in zip(params, held, *directions):
                    p[...] = value + steps[j] * a + steps[i] * b
                found[i, j] = float(forward(model(x), y)[0])
    finally:
        for p, value in zip(params, held):
            p[...] = value
    return found


def plot_loss_landscape(
    model: Layer,
    x: Array,
    y: Array,
    loss: str | Loss = "cross_entropy",
    *,
    span: float = 1.0,
    points: int = 13,
    rng: int | np.random.Generator = 0,
    theme: str = "light",
) -> Figure:
    """Draw the slice of `loss_landscape`, dark where the loss is high, with the weights at 0."""
    colours = choose("plot_loss_landscape", theme)
    found = loss_landscape(model, x, y, loss, span=span, points=points, rng=rng)
    figure = empty_figure(4.6, 3.8, colours)
    ax = figure.subplots()
    graph(ax, "loss around the weights", "random direction 1", "random direction 2", colours)
    ax.grid(False)
    steps = np.linspace(-span, span, points)
    # The loss grows fast away from the weights: levels of equal ratio show the valley.
    low, high = max(float(np.nanmin(found)), 1e-6), float(np.nanmax(found))
    levels = np.geomspace(low, max(high, 1.01 * low), 15)
    filled = ax.contourf(steps, steps, found, levels, cmap=sequential(colours), extend="both")
    ax.contour(steps, steps, found, levels, colors=[colours.faint], linewidths=0.4)
    ax.plot(0, 0, marker="o", color=colours.orange, markeredgecolor=colours.paper)
    ax.set_aspect("equal")
    bar_ticks = levels[:: max(1, len(levels) // 5)]
    colour_bar(figure, filled, ax, colours, "loss")
    bar = figure.axes[-1]
    bar.set_yticks(bar_ticks, [f"{value:.2g}" for value in bar_ticks])
    return figure


# ------------------------------------------------------------ error against step size


def plot_steps(report: Any, *, theme: str = "light") -> Figure:
    """Draw the error of a gradient check against the step size, both logarithmic.

    A right gradient gives a valley: curvature on the right, rounding on the left. A wrong one
    stays up, at the size of the mistake.

    Parameters
    ----------
    report : GradcheckReport
        With ``steps=True``, or of gradients that fail.
    theme : {"light", "dark"}
    """
    checks = [check for check in report.checks if check.steps]
    if not checks:
        raise ValueError("plot_steps: report: expected one with steps (gradcheck(steps=True))")
    colours = choose("plot_steps", theme)
    figure = empty_figure(5.6, 3.4, colours)
    ax = figure.subplots()
    graph(ax, "error of finite differences", "step", "|analytic - numeric|", colours)
    ax.set_xscale("log")
    ax.set_yscale("log")
    markers = "os^Dv"
    for i, check in enumerate(checks):
        steps = [step.step for step in check.steps]
        errors = [max(step.error, 1e-17) for step in check.steps]  # a logarithm has no 0
        ax.plot(
            steps,
            errors,
            color=colours.blue if check.ok else colours.orange,
            marker=markers[i % len(markers)],
            markersize=4,
            linewidth=1.2,
            label=f"{check.name}: {'ok' if check.ok else check.verdict}",
        )
    _legend(ax, colours)
    return figure


# ------------------------------------------------------------ shared


def _rms(a: Array) -> float:
    a = np.asarray(as_numpy(a), np.float64)
    return float(np.sqrt(np.mean(a * a))) if a.size else 0.0


def _like(p: Array, rng: np.random.Generator) -> Array:
    """A random direction each filter of which is as long as that of `p`."""
    direction = rng.standard_normal(p.shape).reshape(len(p), -1)
    lengths = np.linalg.norm(np.asarray(as_numpy(p), np.float64).reshape(len(p), -1), axis=1)
    direction *= (lengths / np.linalg.norm(direction, axis=1))[:, None]
    return array_module(p).asarray(direction.reshape(p.shape).astype(p.dtype))


def _bars(
    names: Sequence[str], values: Sequence[float], title: str, colours: Theme, log: bool = False
) -> Figure:
    """A bar for each name, the first at the top, with its number beside it: shares, or `log`."""
    figure = empty_figure(5.6, 0.3 * len(names) + 1.0, colours)
    ax = figure.subplots()
    graph(ax, title, "", "", colours)
    ax.grid(axis="y", visible=False)
    ax.barh(range(len(names)), values, color=colours.blue, height=0.65)
    ax.set_yticks(range(len(names)), names, parse_math=False)
    ax.invert_yaxis()
    shown = [v for v in values if np.isfinite(v) and v > 0]
    if log and shown:
        from matplotlib.ticker import NullFormatter

        ax.set_xscale("log")
        ax.set_xlim(min(shown) / 3, max(shown) * 8)  # a power of ten is in it, and has a label
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        from matplotlib.ticker import PercentFormatter

        ax.set_xlim(0, 1.15)
        ax.set_xticks([0, 0.25, 0.5, 0.75, 1])
        ax.xaxis.set_major_formatter(PercentFormatter(1))
    form: Callable[[float], str] = (lambda v: f"{v:.1e}") if log else (lambda v: f"{v:.1%}")
    for i, value in enumerate(values):
        ax.annotate(
            form(value),
            (max(value, ax.get_xlim()[0]), i),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colours.ink,
            fontsize=SMALL,
        )
    return figure


def _legend(ax: Any, colours: Theme) -> None:
    ax.legend(
        fontsize=SMALL,
        labelcolor=colours.ink,
        facecolor=colours.paper,
        edgecolor=colours.faint,
        framealpha=1.0,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        borderaxespad=0.0,
    ).set_title("", prop={"size": MEDIUM})
