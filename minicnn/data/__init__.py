"""Data sets, batches and augmentation."""

from minicnn.data.augment import AUGMENTATIONS, Augment, parse_augment, warp
from minicnn.data.batches import Batches
from minicnn.data.dataset import Dataset
from minicnn.data.folder import load_folder, read_picture
from minicnn.data.idx import read_idx, write_idx
from minicnn.data.mnist import load_digits, load_fashion_mnist, load_mnist

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "Augment",
    "Batches",
    "Dataset",
    "load",
    "load_digits",
    "load_fashion_mnist",
    "load_folder",
    "load_mnist",
    "parse_augment",
    "read_idx",
    "read_picture",
    "warp",
    "write_idx",
]

_LOADERS = {
    "digits": load_digits,
    "mnist": load_mnist,
    "fashion-mnist": load_fashion_mnist,
}
DATASETS = tuple(_LOADERS)


def load(name: str, split: str) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name
        One of `DATASETS`.
    split
        "train" or "test".

    Raises
    ------
    ValueError
        Unknown `name` or `split`.
    OSError
        The files are neither at hand nor to be downloaded.
    """
    if name not in _LOADERS:
        raise ValueError(f"load: name: expected one of {', '.join(DATASETS)}, got {name!r}")
    return _LOADERS[name](split)
