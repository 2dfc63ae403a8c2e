"""What a network sees: its feature maps, and the pixels that it goes by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array, as_numpy
from minicnn.layers import Layer
from minicnn.plots.attribution import grad_cam, last_maps, layer_outputs, occlusion, saliency
from minicnn.plots.theme import (
    MEDIUM,
    Axes,
    Figure,
    Theme,
    choose,
    colour_bar,
    diverging,
    empty_figure,
    frame,
    sequential,
    short,
)
from minicnn.shapes import check_ndim, integer


def plot_feature_maps(model: Layer, x: Array, n: int = 8, *, theme: str = "light") -> Figure:
    """Draw what each layer makes of one picture.

    Parameters
    ----------
    model : Layer
    x : array, shape (C, H, W) or (1, C, H, W)
        One picture.
    n : int
        Maps of a layer that are drawn at most: those that vary most, in their order.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
        A row for each layer whose output has maps. Blue is negative, orange positive, on a scale
        of its own for each row.
    """
    op = "plot_feature_maps"
    n = integer(op, "n", n, 1)
    x = x[None] if x.ndim == 3 else x
    check_ndim(op, "x", x, "(1, C, H, W)")
    colours = choose(op, theme)
    rows = [("input", np.asarray(as_numpy(x[0]), np.float64))]
    rows += [
        (f"{name}  {type(layer).__name__}", np.asarray(as_numpy(y[0]), np.float64))
        for name, layer, y in layer_outputs(model, x[:1])
        if y.ndim == 4
    ]
    columns = min(n, max(len(maps) for _, maps in rows))
    figure = empty_figure(1.0 * columns + 1.6, 1.12 * len(rows) + 0.2, colours)
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for axes, (name, maps) in zip(grid, rows):
        chosen = sorted(np.argsort(-maps.var(axis=(1, 2)), kind="stable")[:columns])
        limit = float(np.abs(maps).max(initial=0, where=np.isfinite(maps))) or 1.0
        for ax, index in zip(axes, chosen):
            _bare(ax, "" if name == "input" else f"{index}", colours)
            ax.imshow(
                maps[index], cmap=diverging(colours), vmin=-limit, vmax=limit, interpolation="none"
            )
        for ax in axes[len(chosen) :]:
            ax.set_axis_off()
        H, W = maps.shape[1:]
        axes[0].set_ylabel(
            f"{name}\n{len(maps)} of {H}x{W}",
            rotation=0,
            ha="right",
            va="center",
            color=colours.ink,
            fontsize=MEDIUM,
            parse_math=False,
        )
    return figure


def plot_saliency(
    model: Layer,
    x: Array,
    target: Any = None,
    classes: Sequence[str] | None = None,
    *,
    theme: str = "light",
) -> Figure:
    """Draw which pixels would move the score of a class most; see `saliency`.

    Parameters
    ----------
    model : Layer
    x : array, shape (N, C, H, W)
        A few pictures in [0, 1], one channel or three.
    target : int or array of int, optional
        The class; the predicted one if left out.
    classes : sequence of str, optional
        Names of the classes.
    theme : {"light", "dark"}

    Returns
    -------
    matplotlib.figure.Figure
        The pictures, and below each the gradient's size at every pixel.
    """
    return _below("plot_saliency", model, x, target, classes, saliency(model, x, target), theme)


def plot_grad_cam(
    model: Any,
    x: Array,
    target: Any = None,
    classes: Sequence[str] | None = None,
    layer: int | None = None,
    *,
    theme: str = "light",
) -> Figure:
    """Draw where the last maps speak for a class; see `grad_cam`.

    Every cell of the maps stands over the middle of the pixels that it sees. Other arguments as
    `plot_saliency`.
    """
    layer = last_maps(model) if layer is None else layer
    maps = grad_cam(model, x, target, layer)
    place = _place(model[: layer + 1], x, maps.shape[1:])
    return _below("plot_grad_cam", model, x, target, classes, maps, theme, place=place)


def plot_occlusion(
    model: Layer,
    x: Array,
    target: Any = None,
    classes: Sequence[str] | None = None,
    patch: int = 5,
    *,
    theme: str = "light",
) -> Figure:
    """Draw how far the probability falls when a place is covered; see `occlusion`.

    Orange is where it falls: the class needs that place. Blue is where it rises. Other arguments
    as `plot_saliency`.
    """
    maps = occlusion(model, x, target, patch)
    return _below("plot_occlusion", model, x, target, classes, maps, theme, signed=True)


def _below(
    op: str,
    model: Layer,
    x: Array,
    target: Any,
    classes: Sequence[str] | None,
    maps: np.ndarray,
    theme: str,
    signed: bool = False,
    place: tuple[float, float, float, float] | None = None,
) -> Figure:
    """The pictures in one row, and a map for each in the row below."""
    N, C = x.shape[:2]
    if C not in (1, 3):
        raise ValueError(f"{op}: x: expected 1 or 3 channels, got {C}")
    if not N:
        raise ValueError(f"{op}: x: expected at least one picture, got none")
    colours = choose(op, theme)
    scores = np.asarray(as_numpy(model(x)))
    asked = scores.argmax(axis=1) if target is None else np.broadcast_to(as_numpy(target), (N,))
    figure = empty_figure(max(1.15 * N + 0.9, 3.2), 2.9, colours)
    grid = figure.subplots(2, N, squeeze=False)
    limit = float(np.nanmax(np.abs(maps), initial=0)) or 1.0
    image = None
    for top, bottom, picture, found, k in zip(*grid, x, maps, asked):
        name = str(k) if classes is None else short(classes[k])
        _bare(top, name, colours)
        shown = as_numpy(picture).transpose(1, 2, 0).clip(0, 1)  # (H, W, C)
        top.imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="none")
        _bare(bottom, "", colours)
        height, width = shown.shape[:2]
        image = bottom.imshow(
            found,
            cmap=diverging(colours) if signed else sequential(colours),
            vmin=-limit if signed else 0,
            vmax=limit,
            extent=place or (-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="bilinear" if place else "none",
        )
        bottom.set_xlim(-0.5, width - 0.5)
        bottom.set_ylim(height - 0.5, -0.5)
        outline = shown.mean(axis=2)
        if outline.min() < 0.5 < outline.max():
            bottom.contour(outline, levels=[0.5], colors=[colours.ink], linewidths=0.5, alpha=0.6)
    colour_bar(figure, image, grid[1].tolist(), colours)
    return figure


def _place(model: Layer, x: Array, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top edge, in pixels, of the maps that `model` makes of x."""
    first, jump = np.zeros(2), np.ones(2)  # middle of the first cell, and from cell to cell
    for _, layer, _ in layer_outputs(model, x[:1]):
        win = layer.window()
        if win is not None:
            before = np.array([side[0] for side in win.padding])
            first += ((np.array(win.extent) - 1) / 2 - before) * jump
            jump *= win.stride
    top, left = first - jump / 2
    bottom, right = first + (np.array(size) - 0.5) * jump
    return left, right, bottom, top


def _bare(ax: Axes, title: str, colours: Theme) -> None:
    frame(ax, title, colours)
    ax.set_xticks([])
    ax.set_yticks([])
