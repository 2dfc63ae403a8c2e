"""``minicnn predict``: the class of picture files."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.backend import to_cpu, to_gpu
from minicnn.cli.options import (
    add_command,
    add_device,
    add_run,
    choose_device,
    count,
    open_run,
)
from minicnn.cli.text import bars, complain, picture
from minicnn.config import Config
from minicnn.data import read_picture
from minicnn.train import predict

EPILOG = """\
A picture may have any size. Runs on digits also read dark ink on light paper: it is inverted, cut
out and centred as in MNIST; --show prints the result.

examples:
  minicnn predict seven.png
  minicnn predict scans/*.png --top 1 --run runs/digits-20260131-120000
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    parser = add_command(commands, "predict", run, "say what pictures show", EPILOG)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture file")
    add_run(parser)
    parser.add_argument(
        "--top", type=count, default=3, metavar="N", help="how many classes to list (default: 3)"
    )
    parser.add_argument(
        "--show", action="store_true", help="print the picture as the network sees it"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    """Print the most probable classes of each picture; go on after one that cannot be read."""
    folder = open_run(args)
    model, status = folder.load_model(), 0
    cuda = choose_device(args.device) == "cuda"
    if cuda:
        to_gpu(model)
    for path in args.images:
        try:
            x = _read(path, folder.config)
        except (OSError, ValueError) as error:
            complain(error)
            status = 1
            continue
        if args.show:
            print("\n".join(picture(x)))
        outputs = to_cpu(predict(model, to_gpu(x[None]) if cuda else x[None]))  # (1, classes)
        print("\n".join(_answer(path, outputs, folder.config.classes, args.top)))
    return status


def _read(path: str, config: Config) -> np.ndarray:
    return read_picture(
        path, config.channels, config.image_size, invert=config.invert, crop=config.crop
    )


def _answer(path: str, outputs: np.ndarray, classes: tuple[str, ...], top: int) -> list[str]:
    """The lines for one picture, best class first."""
    probabilities = ops.softmax_forward(outputs)[0][0]  # (classes,)
    best = np.argsort(-probabilities, kind="stable")[:top]
    names = [classes[i] for i in best]
    lines = bars(names, probabilities[best])
    return [f"{path}: {names[0]}", *(f"  {line}" for line in lines)]
