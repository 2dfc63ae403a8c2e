"""MNIST and Fashion-MNIST, downloaded when first asked for, and the subset that comes along.

A downloaded file is used only if its sha256 is the published one. Files that are in the folder
already are used without any network, whichever way they were compressed.

References
----------
Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied to document
recognition", Proceedings of the IEEE 86 (11), 1998.
H. Xiao, K. Rasul, R. Vollgraf, "Fashion-MNIST: a novel image dataset for benchmarking machine
learning algorithms", arXiv:1708.07747, 2017.
"""

from __future__ import annotations

import hashlib
import os
from io import BufferedIOBase
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minicnn.data.dataset import Dataset, from_bytes
from minicnn.data.idx import idx_header, read_idx, read_idx_stream
from minicnn.files import replacing

# The files of a split, by the names under which both data sets have always been published.
FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}
NAMES = FILES["train"] + FILES["test"]
DIGITS = tuple("0123456789")
DIGITS_FOLDER = Path(__file__).parent / "digits"


class Source(NamedTuple):
    """Where a data set comes from, and how to know its files."""

    classes: tuple[str, ...]
    mirrors: tuple[str, ...]  # tried in this order
    sha256: tuple[str, ...]  # by NAMES; of the files as published, or of their content


SOURCES = {
    "mnist": Source(
        DIGITS,
        (
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ),
        (  # of the uncompressed content
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
    ),
    "fashion-mnist": Source(
        (
            "T-shirt/top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        (
            "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        ),
        (  # of the .gz files
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ),
    ),
}


def load_mnist(split: str) -> Dataset:
    """Load MNIST: 60,000 ("train") or 10,000 ("test") handwritten digits of 28 x 28 pixels.

    The files are looked for in ``$MINICNN_DATA_DIR/mnist`` and ``$MINICNN_DATA_DIR`` or, where
    that variable is not set, in the user's cache folder; what is missing is downloaded there.

    Parameters
    ----------
    split
        "train" or "test".

    Raises
    ------
    ValueError
        Unknown `split`.
    OSError
        No whole file there and no mirror that gives one. The message names the addresses, the
        folder, and the file to put there by hand. An old file stays as it was.

    Notes
    -----
    Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0.
    """
    return _load("mnist", split)


def load_fashion_mnist(split: str) -> Dataset:
    """Load Fashion-MNIST: pictures of clothes in the sizes and files of MNIST.

    Everything is as in `load_mnist`, with the folder name ``fashion-mnist``.

    Parameters
    ----------
    split
        "train" or "test".

    Notes
    -----
    Zalando SE; MIT licence.
    """
    return _load("fashion-mnist", split)


def load_digits(split: str) -> Dataset:
    """Load the subset of MNIST that comes with this package: 5,000 or 1,000 digits.

    It holds the first 500 ("train") or 100 ("test") images of each digit, in the order of the
    full files, and needs no network.

    Parameters
    ----------
    split
        "train" or "test".

    Notes
    -----
    Y. LeCun, C. Cortes, C. J. C. Burges; CC BY-SA 3.0.
    """
    images, labels = (read_idx(DIGITS_FOLDER / name) for name in split_files("digits", split))
    return from_bytes(images, labels, DIGITS, f"digits ({split})")


def split_files(name: str, split: str) -> tuple[str, str]:
    """File names of the images and labels of a split."""
    if split not in FILES:
        raise ValueError(f"{name}: split: expected 'train' or 'test', got {split!r}")
    return FILES[split]


def read_split(name: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels of "mnist" or "fashion-mnist" as uint8, downloaded if need be."""
    images, labels = (_find_or_download(name, file) for file in split_files(name, split))
    return images, labels


def _load(name: str, split: str) -> Dataset:
    images, labels = read_split(name, split)
    return from_bytes(images, labels, SOURCES[name].classes, f"{name} ({split})")


def _find_or_download(name: str, file: str) -> np.ndarray:
    sha256 = SOURCES[name].sha256[NAMES.index(file)]
    folders = data_folders(name)
    problems = []
    for folder in folders:
        for path in (folder / file, (folder / file).with_suffix("")):
            if path.is_file():
                try:
                    with open(path, "rb") as stream:
                        return _read_known(stream, str(path), path.suffix == ".gz", sha256)
                except (OSError, ValueError) as error:
                    problems.append(str(error))

    for mirror in SOURCES[name].mirrors:
        try:
            return _download(mirror + file, folders[0] / file, sha256)
        except (OSError, ValueError) as error:  # requests' errors are OSErrors
            problems.append(f"{mirror + file}: {error}")
    raise OSError(
        f"{name}: cannot get {file}; put it into {folders[0]} by hand"
        + "".join(f"\n  {problem}" for problem in problems)
    )


def data_folders(name: str) -> list[Path]:
    """Where the files of a data set may lie; downloads go into the first."""
    root = os.environ.get("MINICNN_DATA_DIR")
    if root:
        return [Path(root) / name, Path(root)]
    import pooch

    return [Path(pooch.os_cache("minicnn")) / name]


def _read_known(file: BufferedIOBase, name: str, compressed: bool, sha256: str) -> np.ndarray:
    """Read uint8 IDX data and refuse it unless it or the file has the given sha256."""
    array = read_idx_stream(file, name, compressed)
    content = hashlib.sha256(idx_header(array))
    content.update(array.data)
    file.seek(0)
    whole = hashlib.file_digest(file, "sha256")
    if sha256 not in (content.hexdigest(), whole.hexdigest()):
        raise ValueError(
            f"{name}: sha256: expected {sha256}, got {whole.hexdigest()} "
            f"(uncompressed {content.hexdigest()})"
        )
    return array


def _download(url: str, path: Path, sha256: str) -> np.ndarray:
    from pooch import HTTPDownloader

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        HTTPDownloader(progressbar=True, chunk_size=1 << 16)(url, file, None)
        file.seek(0)
        return _read_known(file, "download", True, sha256)
