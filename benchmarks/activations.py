"""Time the activations on the maps of a small network, and one on few numbers.

python benchmarks/activations.py --only gelu
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import harness

from minicnn import ops

MAPS, ROWS = (64, 32, 24, 24), (64, 128)
NAMES = ("relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "gelu tanh", "silu", "softplus")
CASES = {f"{name}, 64x32x24x24": (name, MAPS) for name in NAMES} | {
    f"{name}, 64x128": (name, ROWS) for name in ("relu", "sigmoid", "gelu")
}


def make(case: tuple[str, tuple[int, ...]], args: argparse.Namespace) -> contest.Contest:
    (name, *approximate), shape = case[0].split(), case[1]
    x, options = contest.draw(0, shape), dict(zip(["approximate"], approximate))

    torch, jax = harness.optional("torch"), harness.optional("jax")

    def torch_function(x: Any) -> Any:
        functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
        return functions.get(name, getattr(torch.nn.functional, name))(x, **options)

    def jax_function(x: Any) -> Any:
        nn = jax.nn
        if name == "gelu":
            return nn.gelu(x, approximate=bool(options))
        return jax.numpy.tanh(x) if name == "tanh" else getattr(nn, name)(x)

    op = contest.Op(
        getattr(ops, f"{name}_forward"),
        getattr(ops, f"{name}_backward"),
        (x,),
        options,
        torch_function,
        jax_function,
    )
    traffic = {"forward": contest.bytes_of(x, x), "backward": contest.bytes_of(x, x, x)}
    return contest.Contest(contest.contenders(op, args), {}, traffic)


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
