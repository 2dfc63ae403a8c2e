"""What has to be known about a training run to use or repeat it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from minicnn import models, ops
from minicnn.data import DATASETS, Dataset, load, load_folder
from minicnn.data.folder import Switch
from minicnn.layers import Sequential
from minicnn.shapes import Pair, integer, number, pair
from minicnn.train import Loss

MODELS = {"mnist_cnn": models.mnist_cnn}


@dataclass(frozen=True)
class Config:
    """What has to be known about a run to use or repeat it.

    Attributes
    ----------
    dataset : str
        One of `minicnn.data.DATASETS`, or the folder that holds ``train`` and ``test``.
    classes : tuple of str
    channels : int
    image_size : pair of int
        Rows and columns.
    model : str
        One of `MODELS`.
    label_smoothing : float
        Of the loss.
    invert, crop : bool or "auto"
        How `read_picture` has to bring a new picture into the form of the data set.
    options, versions : dict
        The other settings of the training, which it is resumed with, and what it ran on.
    data_sha256 : str
        Of the training data, which must not change before the training is resumed.
    """

    dataset: str
    classes: tuple[str, ...]
    channels: int
    image_size: Pair
    model: str = "mnist_cnn"
    label_smoothing: float = 0.0
    invert: Switch = False
    crop: Switch = False
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    data_sha256: str = ""

    @classmethod
    def parse(cls, text: str) -> Config:
        """Read what `text` keeps; names that this version does not know are passed over.

        Raises
        ------
        ValueError, TypeError
            Not JSON, something missing, or a value of the wrong kind.
        """
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {type(found).__name__}")
        names = {f.name for f in fields(cls)}
        missing = {"dataset", "classes", "channels", "image_size"} - found.keys()
        if missing:
            raise ValueError(f"config: {min(missing)}: expected a value, got none")
        config = cls(**{name: value for name, value in found.items() if name in names})
        if config.model not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {config.model!r}")
        classes = config.classes
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes: expected a list of names, got {classes!r}")
        for name, kind in (("dataset", str), ("options", dict), ("versions", dict)):
            if not isinstance(getattr(config, name), kind):
                raise TypeError(
                    f"{name}: expected {kind.__name__}, got {type(getattr(config, name)).__name__}"
                )
        for name in ("invert", "crop"):
            value = getattr(config, name)
            if not (isinstance(value, bool) or value == "auto"):
                raise ValueError(f"{name}: expected true, false or 'auto', got {value!r}")
        checked = {
            "classes": tuple(classes),
            "channels": integer("config", "channels", config.channels, 1),
            "image_size": pair("config", "image_size", config.image_size, 1),
            "label_smoothing": number(
                "config", "label_smoothing", config.label_smoothing, ge=0, le=1
            ),
        }
        return cls(**(vars(config) | checked))

    def build(self, seed: int = 0) -> Sequential:
        """The network with fresh weights."""
        return MODELS[self.model](seed, self.channels, len(self.classes), self.image_size)

    def loss(self) -> Loss:
        """The loss that the network was trained with, as `Trainer` takes it."""
        forward = partial(ops.cross_entropy_forward, label_smoothing=self.label_smoothing)
        return forward, ops.cross_entropy_backward

    def load(self, split: str, dataset: str | None = None) -> Dataset:
        """Load "train" or "test" of this data set, or of another one with the same classes."""
        name = dataset or self.dataset
        data = load_split(name, split, self.image_size, self.channels)
        if data.classes != self.classes:
            raise ValueError(
                f"{name} ({split}): classes: expected {_listed(self.classes)}, "
                f"got {_listed(data.classes)}"
            )
        if data.x.shape[1:] != (self.channels, *self.image_size):
            raise ValueError(
                f"{name} ({split}): expected pictures of shape "
                f"{(self.channels, *self.image_size)}, got {data.x.shape[1:]}"
            )
        return data


def load_split(dataset: str, split: str, image_size: Pair, channels: int) -> Dataset:
    """Load a split of a data set by name, or of a folder with one sub-folder for each split."""
    if dataset in DATASETS:
        return load(dataset, split)
    return load_folder(Path(dataset) / split, image_size, channels)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{len(names)} ({shown}{', ...' if len(names) > 10 else ''})"
