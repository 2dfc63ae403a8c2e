"""``minicnn gradcheck``: check an op, a kernel of your own, a layer or a model."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from minicnn.backend import use
from minicnn.cli.options import UsageError, add_command, count, index
from minicnn.gradcheck import OPS, GradcheckReport, check_kernel, gradcheck
from minicnn.gradcheck.kernels import own_kernel
from minicnn.gradcheck.question import PRECISIONS

EPILOG = """\
what to check:
  conv2d                   an op of this package, every version of it
  kernels:forward,backward functions of kernels.py here, as --op OP: plain arrays in and out
  my/kernels.py:backward   the backward pass alone
  models:net               a layer or model, or a pair (forward, backward) with a cache: --input

A kernel of an op is called as forward(*arrays, **options) and backward(dy, *arrays, **options),
or as backward(dy, cache) if forward returns (y, cache); it is given the options that you name.
Its arrays and default shapes: python -c "from minicnn.gradcheck import *; help(check_conv2d)"

verdicts:
  bug         with hints at what it may be, and the smallest case that shows it
  precision   no bug: rounding, or a step that does not suit
  kink, tie   no bug: the gradient is not unique there

examples:
  minicnn gradcheck conv2d --stride 2 --padding 1
  minicnn gradcheck batch_norm --dtype float32 --steps
  minicnn gradcheck kernels:forward,backward --op conv2d --stride 2 --size KH=5
  minicnn gradcheck models:net --input 4 1 8 8 --samples 50

The exit status is 1 if there is a bug.
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    text = "check backward passes against finite differences, and say what is wrong"
    parser = add_command(commands, "gradcheck", run, text, EPILOG)
    parser.add_argument("target", metavar="WHAT", help="an op, or MODULE:NAMES, see below")
    parser.add_argument("--op", choices=OPS, metavar="OP", help="the op that the kernel is for")
    parser.add_argument(
        "--input", nargs="+", type=count, metavar="N", help="shape of the input of a layer"
    )
    parser.add_argument(
        "--samples", type=count, help="elements of each array to look at (default: all)"
    )
    parser.add_argument(
        "--dtype",
        choices=PRECISIONS,
        default="float64",
        help="what a kernel is given (default: float64)",
    )
    parser.add_argument("--seed", type=index, default=0, help="draws the numbers (default: 0)")
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        type=_size,
        metavar="NAME=N",
        help="a size other than the default one, such as KH=5; may be repeated",
    )
    parser.add_argument("--no-bias", action="store_true", help="leave the bias out")
    parser.add_argument("--steps", action="store_true", help="show the error against step size")
    parser.add_argument("--plot", metavar="FILE", help="draw the error against step size")
    group = parser.add_argument_group("options of the ops")
    for name, ops in sorted(_options().items()):
        some = ", ".join(ops[:3]) + (", ..." if len(ops) > 3 else "")
        group.add_argument(
            f"--{name.replace('_', '-')}", type=_literal, metavar="VALUE", help=f"of {some}"
        )


def run(args: argparse.Namespace) -> int:
    """Print a report for each version."""
    options = {name: value for name in _options() if (value := getattr(args, name)) is not None}
    bugs = 0
    for title, report in _reports(args, options):
        print(f"{title}: {'ok' if report else report.verdict}")
        print(report)
        if args.steps or not report:
            print(*filter(None, ["", report.table()]), sep="\n")
        if args.plot:
            from minicnn.plots import plot_steps

            plot_steps(report).savefig(args.plot)
            print(f"  {args.plot}")
        bugs += report.verdict == "bug"
    return 1 if bugs else 0


def _reports(
    args: argparse.Namespace, options: dict[str, Any]
) -> Iterator[tuple[str, GradcheckReport]]:
    steps = args.steps or bool(args.plot)
    if ":" not in args.target and args.target not in OPS:
        raise UsageError(f"gradcheck: expected MODULE:NAMES or one of {', '.join(OPS)}, "
                         f"got {args.target}")  # fmt: skip
    if ":" not in args.target:
        forward, backward = own_kernel(args.target)
        for version in _versions(args.target):
            with use(version):
                yield f"{args.target}, {version}", _check(
                    args, args.target, forward, backward, options
                )  # fmt: skip
        return
    found = _imported(args.target)
    if args.op:
        names = args.target.rpartition(":")[2].split(",")
        if len(found) == 1:
            found = [None, *found] if "backward" in names[0] else [*found, None]
        if len(found) != 2:
            raise UsageError(f"gradcheck: expected FORWARD,BACKWARD, got {args.target}")
        forward, backward = found
        yield f"{args.target} as {args.op}", _check(args, args.op, forward, backward, options)
        return
    if options:
        raise UsageError(f"gradcheck: --{next(iter(options))}: expected --op OP with it")
    if args.input is None:
        raise UsageError("gradcheck: expected --op OP for a kernel, or --input SHAPE for a layer")
    target = found[0] if len(found) == 1 else tuple(found)
    if hasattr(target, "astype"):
        target = target.astype(np.float64)
    x = np.random.default_rng(args.seed).standard_normal(args.input)
    report = gradcheck(target, x, rng=args.seed, samples=args.samples, steps=steps)
    yield args.target, report


def _check(
    args: argparse.Namespace, op: str, forward: Any, backward: Any, options: dict[str, Any]
) -> GradcheckReport:
    return check_kernel(
        op,
        forward,
        backward,
        size=dict(args.size),
        dtype=args.dtype,
        seed=args.seed,
        bias=not args.no_bias,
        steps=args.steps or bool(args.plot),
        **options,
    )


def _versions(op: str) -> list[str]:
    """Versions of an op that run here, in the order of its file."""
    forward = OPS[op].pair or __import__("minicnn.ops", fromlist=["ops"])
    if isinstance(forward, tuple):
        return ["numpy"]
    module = sys.modules[getattr(forward, f"{op}_forward").__module__]
    table = module.VERSIONS
    if any(isinstance(value, dict) for value in table.values()):  # a family: by op
        table = table[op]
    return [name for name in table if name != "cupy"]


def _imported(target: str) -> list[Any]:
    """The objects of ``module:name,name`` or ``path/to/file.py:name,name``."""
    where, _, names = target.rpartition(":")
    if where.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(where).stem, where)
        if spec is None or spec.loader is None or not Path(where).is_file():
            raise FileNotFoundError(f"gradcheck: {where}: expected a Python file, found none")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(where)
        finally:
            sys.path.remove("")
    try:
        return [getattr(module, name) for name in names.split(",")]
    except AttributeError as error:
        raise UsageError(f"gradcheck: {error}") from None


def _options() -> dict[str, list[str]]:
    """Names of the options of all ops, and whose they are."""
    owners: dict[str, list[str]] = {}
    for op, spec in OPS.items():
        for name in spec.options:
            owners.setdefault(name, []).append(op)
    return owners


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False}.get(text.lower(), text)


def _size(text: str) -> tuple[str, int]:
    name, _, value = text.partition("=")
    return name, count(value)
