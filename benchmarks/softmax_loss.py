"""Time softmax, log_softmax and the losses: forward and backward.

python benchmarks/softmax_loss.py --only cross_entropy
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import harness
import numpy as np

from minicnn import ops

ELEMENTWISE = ("mse_loss", "l1_loss", "bce_with_logits")
CASES = {
    "softmax, 64x10": ("softmax", (64, 10)),
    "softmax, 256x1000": ("softmax", (256, 1000)),
    "log_softmax, 256x1000": ("log_softmax", (256, 1000)),
    "log_softmax, 16x21x64x64": ("log_softmax", (16, 21, 64, 64)),
    "cross_entropy, 64x10": ("cross_entropy", (64, 10)),
    "cross_entropy, 256x1000": ("cross_entropy", (256, 1000)),
    **{f"{name}, 256x1000": (name, (256, 1000)) for name in ELEMENTWISE},
}


def make(case: tuple[str, tuple[int, ...]], args: argparse.Namespace) -> contest.Contest:
    name, shape = case
    rng = np.random.default_rng(1)
    x, target = contest.draw(0, shape), rng.random(shape, dtype=np.float32)
    labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
    wanted = {"cross_entropy": (labels,)} | dict.fromkeys(ELEMENTWISE, (target,))
    targets = wanted.get(name, ())

    torch, jax = harness.optional("torch"), harness.optional("jax")

    def torch_function(x: Any, *targets: Any) -> Any:
        functional = torch.nn.functional
        if not targets:
            return getattr(functional, name)(x, dim=1)
        full = "binary_cross_entropy_with_logits" if name == "bce_with_logits" else name
        return getattr(functional, full)(x, *targets)

    def jax_function(x: Any, target: Any = None) -> Any:
        jnp = jax.numpy
        if name == "mse_loss":
            return ((x - target) ** 2).mean()
        if name == "l1_loss":
            return abs(x - target).mean()
        if name == "bce_with_logits":
            return (target * jnp.logaddexp(0, -x) + (1 - target) * jnp.logaddexp(0, x)).mean()
        if name == "cross_entropy":
            picked = jnp.take_along_axis(jax.nn.log_softmax(x, 1), target[:, None], 1)
            return -picked.mean()
        return getattr(jax.nn, name)(x, 1)

    op = contest.Op(
        getattr(ops, f"{name}_forward"),
        getattr(ops, f"{name}_backward"),
        (x,),
        {},
        torch_function,
        jax_function,
        targets=targets,
    )
    y = 1 if targets else x.size
    traffic = {
        "forward": contest.bytes_of(x, *targets, (y,)),
        "backward": contest.bytes_of(x, x, (y,)),
    }
    return contest.Contest(contest.contenders(op, args), {}, traffic)


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
