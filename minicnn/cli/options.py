"""What the commands' arguments have in common."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from minicnn.backend import cupy_or_error
from minicnn.data import DATASETS
from minicnn.runs import RUNS, Run, latest

T = TypeVar("T")


class UsageError(ValueError):
    """Arguments that do not fit together."""


class Parser(argparse.ArgumentParser):
    """A parser that takes no abbreviations and reports a mistake in one line."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"minicnn: error: {message} (see {self.prog} --help)\n")


def add_command(
    commands: Any,
    name: str,
    command: Callable[[argparse.Namespace], int],
    text: str,
    epilog: str,
) -> Parser:
    """Add a sub-command whose description begins with the short `text` of the overview."""
    parser: Parser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=command)
    return parser


def option(kind: Callable[[str], T], expected: str, fits: Callable[[T], bool]) -> Callable[..., T]:
    """Make an argument's ``type``: convert by `kind`, and refuse what does not fit."""

    def convert(text: str) -> T:
        with suppress(ValueError):
            value = kind(text)
            if fits(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")

    return convert


count = option(int, "a whole number above 0", lambda n: n > 0)
index = option(int, "a whole number, 0 or more", lambda n: n >= 0)
positive = option(float, "a number above 0", lambda v: 0 < v < math.inf)
not_negative = option(float, "a number, 0 or more", lambda v: 0 <= v < math.inf)
share = option(float, "a number from 0 to 1", lambda v: 0 <= v <= 1)


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add ``--run``; `open_run` opens it."""
    parser.add_argument(
        "--run", metavar="FOLDER", help=f"folder of a training run (default: the newest in {RUNS})"
    )


def open_run(args: argparse.Namespace) -> Run:
    """The run that ``--run`` names, or the newest one."""
    return latest() if args.run is None else Run(args.run)


def add_device(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add ``--device``; `choose_device` looks what is there."""
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to compute (default: auto, which is cuda where CuPy finds a device)",
    )


def choose_device(name: str) -> str:
    """Turn "auto" into "cpu" or "cuda"; raise RuntimeError if "cuda" is asked for in vain."""
    if name != "cpu":
        try:
            cupy_or_error()
            return "cuda"
        except RuntimeError:
            if name == "cuda":
                raise
    return "cpu"


DATASET_HELP = (
    f"{', '.join(DATASETS)}, or a folder in which train/ and test/ hold a folder of pictures for "
    "each class"
)
dataset = option(
    str,
    f"{', '.join(DATASETS)} or a folder with train/ and test/ in it",
    lambda name: name in DATASETS or all((Path(name) / s).is_dir() for s in ("train", "test")),
)
