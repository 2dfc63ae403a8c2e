"""``minicnn summary``: a network layer by layer."""

from __future__ import annotations

import argparse
from typing import Any

from minicnn.cli.options import add_command, count
from minicnn.models import mnist_cnn
from minicnn.runs import Run

EPILOG = """\
examples:
  minicnn summary
  minicnn summary --input-shape 3 32 32 --classes 100
  minicnn summary --run runs/digits-20260131-120000
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    text = "show a network layer by layer: shapes, parameters, multiply-adds, memory"
    parser = add_command(commands, "summary", run, text, EPILOG)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--run", metavar="FOLDER", help="the network of this run")
    what.add_argument(
        "--input-shape",
        nargs=3,
        type=count,
        default=(1, 28, 28),
        metavar=("C", "H", "W"),
        help="the reference network on such pictures (default: 1 28 28)",
    )
    parser.add_argument(
        "--classes", type=count, default=10, help="classes of the reference network (default: 10)"
    )
    parser.add_argument(
        "--batch-size", type=count, default=1, help="pictures in a batch (default: 1)"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    if args.run is not None:
        config = Run(args.run).config
        model, shape = config.build(), (config.channels, *config.image_size)
    else:
        C, *size = args.input_shape
        model, shape = mnist_cnn(0, C, args.classes, tuple(size)), (C, *size)
    print(model.summary(shape, args.batch_size))
    return 0
