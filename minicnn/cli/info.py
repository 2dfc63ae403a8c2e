"""``minicnn info``: what minicnn runs on."""

from __future__ import annotations

import argparse
from typing import Any

from minicnn.cli.options import add_command
from minicnn.info import report

EPILOG = """\
Add this report to a bug report. It says for each missing part how to get it.

example:
  minicnn info
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    add_command(commands, "info", run, "report versions, processor, data sets and GPU", EPILOG)


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    print(report())
    return 0
