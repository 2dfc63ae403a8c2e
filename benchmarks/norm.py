"""Time batch, layer and group normalisation in training: forward, and dx, dw, db together.

Operations are counted as 8 a number forward (two sums, a square, the formula) and 12 backward.

    python benchmarks/norm.py --only batch
"""

from __future__ import annotations

import argparse
from typing import Any, NamedTuple

import contest
import harness

from minicnn import ops


class Case(NamedTuple):
    op: str
    shape: tuple[int, ...]
    groups: int = 0


CASES = {
    "batch_norm 64 maps 32x32": Case("batch_norm", (64, 64, 32, 32)),
    "batch_norm 256 maps 8x8": Case("batch_norm", (64, 256, 8, 8)),
    "layer_norm rows of 512": Case("layer_norm", (2048, 512)),
    "group_norm 8 groups, 64 maps 32x32": Case("group_norm", (64, 64, 32, 32), 8),
}


def make(case: Case, args: argparse.Namespace) -> contest.Contest:
    name, shape, groups = case
    parameters = shape[-1] if name == "layer_norm" else shape[1]
    x, w, b = (contest.draw(i, s) for i, s in enumerate((shape, (parameters,), (parameters,))))

    torch = harness.optional("torch")

    def torch_function(x: Any, w: Any, b: Any) -> Any:
        functional = torch.nn.functional
        if name == "batch_norm":
            return functional.batch_norm(x, None, None, w, b, training=True)
        if name == "layer_norm":
            return functional.layer_norm(x, (parameters,), w, b)
        return functional.group_norm(x, groups, w, b)

    def jax_function(x: Any, w: Any, b: Any) -> Any:
        whole = x.shape
        if name == "layer_norm":
            axes: tuple[int, ...] = (1,)
        else:
            axes, w, b = (0, 2, 3), w[:, None, None], b[:, None, None]
        if groups:
            axes, x = (2, 3, 4), x.reshape(len(x), groups, -1, *x.shape[2:])
        rest = x - x.mean(axes, keepdims=True)
        xhat = rest / (((rest * rest).mean(axes, keepdims=True) + 1e-5) ** 0.5)
        return xhat.reshape(whole) * w + b

    def forward(x: Any, w: Any, b: Any) -> Any:
        if name == "layer_norm":
            return ops.layer_norm_forward(x, (parameters,), w, b)
        if name == "group_norm":
            return ops.group_norm_forward(x, groups, w, b)
        return ops.batch_norm_forward(x, w, b)

    backward = getattr(ops, f"{name}_backward")
    op = contest.Op(forward, backward, (x, w, b), {}, torch_function, jax_function)
    return contest.Contest(
        contest.contenders(op, args),
        {"forward": 8.0 * x.size, "backward": 12.0 * x.size},
        {"forward": contest.bytes_of(x, x), "backward": contest.bytes_of(x, x, x)},
    )


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
