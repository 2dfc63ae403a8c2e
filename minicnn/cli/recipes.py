"""What `minicnn train` does where the command line says nothing."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from minicnn.cli.options import UsageError
from minicnn.config import Config
from minicnn.data import DATASETS
from minicnn.data.folder import Switch
from minicnn.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from minicnn.runs import RUNS

# What holds for every data set, and what another part of a run may be done with.
GENERAL = {"dataset": "digits", "warmup": 0, "seed": 0, "device": "auto"}
FREE = {"device": "auto", "checkpoint_every": 100, "keep": 2}


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
    "mnist": Recipe(batch_size=128, lr=5e-3, invert="auto", crop="auto"),
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
    _fill(args, GENERAL | FREE)
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
    _fill(args, settings | recipe._asdict() | {"lr": lr})
    args.image_size = (args.image_size[0], args.image_size[-1])
    if not named:
        args.dataset = os.path.abspath(args.dataset)
    if args.out is None:
        args.out = RUNS / f"{Path(args.dataset).name}-{time.strftime('%Y%m%d-%H%M%S')}"


def recall(args: argparse.Namespace, config: Config) -> None:
    """Fill in the options of a run that goes on, and refuse others than it began with.

    Raises
    ------
    UsageError
        If an option was given another value.
    ValueError
        If the run's ``config.json`` lacks an option or has one that cannot be.
    """
    if args.out is not None:
        _refuse("out", "--resume, which goes on in the folder of the run")
    given = dict(vars(args), out=args.resume)
    if given["image_size"]:
        given["image_size"] = [given["image_size"][0], given["image_size"][-1]]
    if given["dataset"] and given["dataset"] not in DATASETS:
        given["dataset"] = os.path.abspath(given["dataset"])
    for name, value in given.items():
        if name in ("command", "resume", "debug", "quiet", "out"):
            continue
        if name not in config.options:
            raise ValueError(
                f"{args.resume / 'config.json'}: options: expected {name}, got none; "
                "start a new run"
            )
        own = config.options[name]
        if value is None:
            setattr(args, name, own)
        elif name not in FREE and value != own:
            raise UsageError(
                f"argument --{name.replace('_', '-')}: expected {own}, with which the run in "
                f"{args.resume} began, got {value} (fix: leave it out)"
            )
    args.out = args.resume
    if args.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"{args.resume / 'config.json'}: options: optimizer: expected one of "
            f"{', '.join(OPTIMIZERS)}, got {args.optimizer!r}"
        )
    # These two stand beside the options too, where they have been checked.
    args.image_size, args.channels = config.image_size, config.channels


def _fill(args: argparse.Namespace, values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if getattr(args, name, None) is None:
            setattr(args, name, value)


def _refuse(name: str, why: str) -> NoReturn:
    raise UsageError(f"argument --{name.replace('_', '-')}: expected none with {why}")
