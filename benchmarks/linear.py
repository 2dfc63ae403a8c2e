"""Time linear layers, from one row to large ones: forward, and dx, dw, db together.

python benchmarks/linear.py --only "batch 64"
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import harness

from minicnn import ops

CASES = {  # rows, inputs, outputs
    "1024 to 128, batch 1": (1, 1024, 128),
    "1024 to 128, batch 64": (64, 1024, 128),
    "128 to 10, batch 64": (64, 128, 10),
    "1024 to 1024, batch 256": (256, 1024, 1024),
}


def make(case: tuple[int, int, int], args: argparse.Namespace) -> contest.Contest:
    N, inputs, outputs = case
    shapes = (N, inputs), (outputs, inputs), (outputs,)
    x, w, b = (contest.draw(i, s) for i, s in enumerate(shapes))

    torch = harness.optional("torch")

    def torch_function(x: Any, w: Any, b: Any) -> Any:
        return torch.nn.functional.linear(x, w, b)

    op = contest.Op(
        ops.linear_forward,
        ops.linear_backward,
        (x, w, b),
        {},
        torch_function,
        lambda x, w, b: x @ w.T + b,
    )
    flop, y = 2.0 * N * inputs * outputs, (N, outputs)
    return contest.Contest(
        contest.contenders(op, args),
        {"forward": flop, "backward": 2 * flop},
        {"forward": contest.bytes_of(x, w, b, y), "backward": contest.bytes_of(x, w, x, w, y)},
    )


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
