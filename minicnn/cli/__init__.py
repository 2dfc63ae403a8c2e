"""The command line: ``minicnn`` and ``python -m minicnn``.

Every command is a module with `add`, which describes its arguments, and `run`, which does the
work and returns the exit status: 0, or 1 if something failed, or 2 for arguments that do not fit.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence

import minicnn
from minicnn.cli import evaluate, export, gradcheck, info, predict, summary, train
from minicnn.cli.options import Parser, UsageError
from minicnn.cli.text import complain

__all__ = ["main"]

COMMANDS = (train, evaluate, predict, summary, export, gradcheck, info)

EPILOG = """\
examples:
  minicnn train --dataset digits          train on the digits that come along, no download
  minicnn predict seven.png --show        read a picture of a digit with the newest run
  minicnn train --help                    all options of a command
"""

# What a wrong file, a wrong value, a full disk or a missing package raises. Anything else is a
# fault of minicnn itself, and its traceback is wanted.
EXPECTED = (
    ArithmeticError,
    ImportError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; those of the process if left out.

    Raises
    ------
    SystemExit
        From the parser: status 0 after ``--help``, 2 for arguments that do not fit.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = args.command(args)
            sys.stdout.flush()
            return status
    except UsageError as error:
        complain(error)
        return 2
    except BrokenPipeError:  # the reader has gone, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        print("; ".join(["minicnn: stopped", *getattr(stop, "__notes__", ())]), file=sys.stderr)
        return 130
    except EXPECTED as error:
        if args.debug:
            raise
        complain(error)
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="minicnn",
        description="Convolutional networks from scratch: train, evaluate and look inside.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"minicnn {minicnn.__version__}")
    parser.set_defaults(command=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return parser


def _warn(message: Warning | str, *where: object, **more: object) -> None:
    """Print a warning in one line, without the place in the code."""
    print(f"minicnn: warning: {' '.join(str(message).split())}", file=sys.stderr)
