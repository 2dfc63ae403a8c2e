"""What `minicnn train` does where the command line says nothing."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

from minicnn.cli.options import UsageError
from minicnn.data import DATASETS
from minicnn.data.folder import Switch
from minicnn.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from minicnn.runs import RUNS


class Recipe(NamedTuple):
    """What holds for a data set where the command line says nothing."""

    epochs: int = 10
    batch_size: int = 64
    optimizer: str = "adamw"
    lr: float = 3e-3  # for this optimizer
    schedule: str = "onecycle"
    augment: str = "none"
    label_smoothing: float = 0.0
    channels: int = 1
    image_size: tuple[int, ...] = (28, 28)
    invert: Switch = False  # how `predict` reads a picture, see `read_picture`
    crop: Switch = False


FOLDER = "a folder"
RECIPES = {
    "digits": Recipe(epochs=12, augment="digits", invert="auto", crop="auto"),
    "mnist": Recipe(batch_size=128, invert="auto", crop="auto"),
    "fashion-mnist": Recipe(invert="auto"),
    FOLDER: Recipe(channels=3),
}

# The class, and the settings it gets where neither command line nor recipe says anything.
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, float]]] = {
    "sgd": (SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.0}),
    "adam": (Adam, {"lr": 3e-3, "weight_decay": 0.0}),
    "adamw": (AdamW, {"lr": 3e-3, "weight_decay": 0.01}),
    "rmsprop": (RMSprop, {"lr": 1e-3, "momentum": 0.0, "weight_decay": 0.0}),
}


def by_data_set() -> str:
    """The recipes as a table for the help text."""
    names = ("epochs", "batch_size", "optimizer", "lr", "schedule", "augment", "label_smoothing")
    table = [["", *(name.replace("_", "-") for name in names)]]
    table += [[key, *(str(getattr(r, name)) for name in names)] for key, r in RECIPES.items()]
    widths = [max(map(len, column)) for column in zip(*table)]
    return "\n".join(
        "  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        for row in table
    )


def by_optimizer() -> str:
    """The optimizers' settings for the help text."""
    return "\n".join(
        f"  {name:<13}  {settings_text(settings)}" for name, (_, settings) in OPTIMIZERS.items()
    )


def settings_text(settings: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in settings.items())


def settle(args: argparse.Namespace) -> None:
    """Refuse options that do not fit together, and fill in those that were left out."""
    named = args.dataset in DATASETS
    recipe = RECIPES[args.dataset if named else FOLDER]
    optimizer = args.optimizer or recipe.optimizer
    _, settings = OPTIMIZERS[optimizer]

    for name in ("image_size", "channels"):
        if named and getattr(args, name) is not None:
            _refuse(name, f"--dataset {args.dataset}, whose pictures are gray and 28x28")
    for name in ("momentum", "weight_decay"):
        if name not in settings and getattr(args, name) is not None:
            _refuse(name, f"--optimizer {optimizer}")
    if args.warmup and (args.schedule or recipe.schedule) == "onecycle":
        _refuse("warmup", "--schedule onecycle, which has its own")
    if len(args.image_size or ()) > 2:
        raise UsageError(
            f"argument --image-size: expected one or two numbers, got {len(args.image_size)}"
        )

    lr = recipe.lr if optimizer == recipe.optimizer else settings["lr"]
    for name, value in (settings | recipe._asdict() | {"lr": lr}).items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)
    args.image_size = (args.image_size[0], args.image_size[-1])
    if not named:
        args.dataset = os.path.abspath(args.dataset)
    if args.out is None:
        args.out = RUNS / f"{Path(args.dataset).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def _refuse(name: str, why: str) -> NoReturn:
    raise UsageError(f"argument --{name.replace('_', '-')}: expected none with {why}")
