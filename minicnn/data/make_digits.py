"""Make the subset of MNIST that comes with this package: ``python -m minicnn.data.make_digits``.

For every digit it takes the first images of the full file and keeps the file's order, so the
subset is balanced, needs no random numbers, and can be compared with the full set at any time.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minicnn.data.idx import write_idx
from minicnn.data.mnist import DIGITS_FOLDER, read_split, split_files

PER_CLASS = {"train": 500, "test": 100}


def first_of_each(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of the first `count` of each label, in ascending order.

    Parameters
    ----------
    labels
        (N,) integers.
    count
        How many of each.

    Returns
    -------
    ndarray
        (classes * count,) int64.

    Raises
    ------
    ValueError
        A label occurs less than `count` times.

    Examples
    --------
    >>> first_of_each(np.array([7, 7, 1, 7, 1]), 2).tolist()
    [0, 1, 2, 4]
    """
    chosen = []
    for label in np.unique(labels):
        positions = np.flatnonzero(labels == label)
        if len(positions) < count:
            raise ValueError(
                f"first_of_each: count: expected at most {len(positions)} of label {label}, "
                f"got {count}"
            )
        chosen.append(positions[:count])
    return np.sort(np.concatenate(chosen))


def main(argv: Sequence[str] | None = None) -> None:
    """Write the four files of the subset."""
    parser = argparse.ArgumentParser(
        prog="python -m minicnn.data.make_digits",
        description="Make the digits subset from the full MNIST files, which are downloaded "
        "unless $MINICNN_DATA_DIR holds them.",
    )
    parser.add_argument("--out", type=Path, default=DIGITS_FOLDER, help="folder to write to")
    for split, count in PER_CLASS.items():
        parser.add_argument(
            f"--{split}", type=int, default=count, metavar="N", help="images of each digit"
        )
    args = parser.parse_args(argv)

    args.out.mkdir(parents=True, exist_ok=True)
    for split in PER_CLASS:
        images, labels = read_split("mnist", split)
        chosen = first_of_each(labels, getattr(args, split))
        for file, array in zip(split_files("mnist", split), (images, labels), strict=True):
            write_idx(args.out / file, array[chosen])
            print(f"{args.out / file}: {len(chosen)} of {len(array)}")


if __name__ == "__main__":
    main()
