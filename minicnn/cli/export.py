"""``minicnn export``: a trained network as an ONNX file."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from minicnn import checkpoint
from minicnn.cli.options import add_command, count
from minicnn.layers import Layer
from minicnn.models import mnist_cnn
from minicnn.runs import Run

_BIAS = re.compile(r"\d{1,3}\.bias$")

EPILOG = """\
The file takes batches of any length. It needs the extra: pip install '.[onnx]'

examples:
  minicnn export runs/digits-20260131-120000 digits.onnx
  minicnn export weights.safetensors model.onnx --input-shape 3 32 32
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    text = "write a trained network as an ONNX file, which other programs run"
    parser = add_command(commands, "export", run, text, EPILOG)
    parser.add_argument(
        "source",
        metavar="RUN_OR_WEIGHTS",
        help="folder of a training run, or a weight file of the reference network",
    )
    parser.add_argument("target", metavar="MODEL.onnx", help="file to write")
    parser.add_argument(
        "--input-shape",
        nargs=3,
        type=count,
        metavar=("C", "H", "W"),
        help="the pictures' shape, for a weight file (default: 1 28 28)",
    )
    parser.add_argument(
        "--opset", type=count, metavar="N", help="version of ONNX's operators (default: 21)"
    )


def run(args: argparse.Namespace) -> int:
    """Write the file and say what is in it."""
    from minicnn.onnx import OPSET, export

    model, shape = _open(Path(args.source), args.input_shape)
    opset = args.opset or OPSET
    export(model, args.target, shape, opset)
    classes = model.output_shape((1, *shape))[1]
    print(
        f"{args.target}: opset {opset}, input (N, {', '.join(map(str, shape))}), "
        f"output (N, {classes}), {Path(args.target).stat().st_size:,} bytes"
    )
    return 0


def _open(source: Path, input_shape: list[int] | None) -> tuple[Layer, tuple[int, ...]]:
    """The network and the shape of a picture."""
    if source.is_dir():
        folder = Run(source)
        return folder.load_model(), (folder.config.channels, *folder.config.image_size)
    state = checkpoint.load_arrays(source)
    shape = tuple(input_shape or (1, 28, 28))
    # The last layer has one bias a class; a file of another network is refused below.
    biases = {int(name.split(".")[0]): a.size for name, a in state.items() if _BIAS.match(name)}
    classes = biases[max(biases)] if biases else 10
    model = mnist_cnn(0, shape[0], max(1, classes), (shape[1], shape[2]))
    model.load_state_dict(state)
    return model, shape
