"""``minicnn evaluate``: loss and accuracy of a run."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np

from minicnn.backend import to_cpu, to_gpu
from minicnn.cli.options import (
    DATASET_HELP,
    add_command,
    add_device,
    add_run,
    choose_device,
    dataset,
    open_run,
)
from minicnn.plots import confusion_matrix
from minicnn.train import predict

EPILOG = """\
examples:
  minicnn evaluate
  minicnn evaluate --run runs/digits-20260131-120000 --dataset mnist
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    text = "measure loss and accuracy of a run, in all and by class"
    parser = add_command(commands, "evaluate", run, text, EPILOG)
    add_run(parser)
    parser.add_argument(
        "--dataset", type=dataset, help=f"{DATASET_HELP} (default: the one of the run)"
    )
    parser.add_argument(
        "--split", choices=("train", "test"), default="test", help="(default: test)"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print loss, accuracy and the table by class."""
    folder = open_run(args)
    model, config = folder.load_model(), folder.config
    x, y, classes = config.load(args.split, args.dataset)
    if choose_device(args.device) == "cuda":
        model, x = to_gpu(model), to_gpu(x)
    outputs = to_cpu(predict(model, x))
    loss, _ = config.loss()[0](outputs, y)
    counts = confusion_matrix(y, outputs.argmax(axis=1), len(classes))
    right, total = int(np.trace(counts)), len(y)
    print(f"run       {folder.folder}")
    print(f"data      {args.dataset or config.dataset} ({args.split}), {total:,} pictures")
    print(f"loss      {float(loss):.4f}")
    print(f"accuracy  {right / total:.2%} ({right:,} of {total:,})")
    print("\n".join(_table(counts, classes)))
    return 0


def _table(counts: np.ndarray, classes: tuple[str, ...]) -> Iterator[str]:
    """A line for each class: how many of it were recognised, and what the others were taken for."""
    width = max(5, *map(len, classes))
    yield f"\n{'class':<{width}}  {'right':>7}  {'of':>7}  accuracy  most often taken for"
    for i, (name, row) in enumerate(zip(classes, counts)):
        right, total = int(row[i]), int(row.sum())
        others = row.copy()
        others[i] = 0
        worst = others.argmax()
        taken_for = f"{classes[worst]} ({others[worst]})" if others[worst] else ""
        share = f"{right / total:.2%}" if total else "none"
        yield f"{name:<{width}}  {right:>7}  {total:>7}  {share:>8}  {taken_for}".rstrip()
