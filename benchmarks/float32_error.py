"""The worst float32 error of each op and version, as a Markdown table.

    python benchmarks/float32_error.py                # 20 random shapes an op
    python benchmarks/float32_error.py conv2d linear --shapes 100

An output that is a sum of terms cannot be more exact than its terms allow: the error is given in
units of u = 2^-24 (half the distance of float32 numbers at 1) times the sum of the terms' absolute
values, from float64. That sum is what the same op gives, in float64, on the absolute values of its
inputs, since these ops multiply and add. Elementwise functions, normalisations and losses are
measured in units of u times the result, or 1 if that is larger, their gradients by the largest of
them. Exits with 1 if an error is above 8 units. Winograd's method adds and subtracts more than the
terms; it stands in columns of its own, and may be above.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import minicnn as mc
from minicnn import ops

U = 2.0**-24
MOST = 8.0  # u


class Case(NamedTuple):
    """A call: arrays that are multiplied and added, and the other arguments."""

    arrays: tuple[np.ndarray, ...]
    options: dict[str, Any]


def shapes(rng: np.random.Generator) -> Case:
    """A convolution of random geometry."""
    groups = int(rng.choice([1, 1, 1, 2, 4]))
    C, F = (groups * int(rng.integers(1, 17)) for _ in range(2))
    KH, KW = (int(n) for n in rng.integers(1, 6, 2))
    N, H, W = int(rng.integers(1, 5)), *(int(n) for n in rng.integers(8, 25, 2))
    x = rng.standard_normal((N, C, H, W))
    w, b = rng.standard_normal((F, C // groups, KH, KW)), rng.standard_normal(F)
    stride, padding = (int(n) for n in (rng.integers(1, 3), rng.integers(0, 3)))
    return Case((x, w, b), {"stride": stride, "padding": padding, "groups": groups})


def transposed(rng: np.random.Generator) -> Case:
    (x, w, _), options = shapes(rng)
    groups = options["groups"]
    F = groups * int(rng.integers(1, 9))
    w = rng.standard_normal((x.shape[1], F // groups, *w.shape[2:]))
    options["padding"] = 0
    return Case((x, w, rng.standard_normal(F)), options)


def rows(rng: np.random.Generator) -> Case:
    N, I, O = (int(n) for n in rng.integers(1, 1025, 3))  # noqa: E741
    return Case(
        (rng.standard_normal((N, I)), rng.standard_normal((O, I)), rng.standard_normal(O)), {}
    )


def maps(rng: np.random.Generator, **options: Any) -> Case:
    N, C, H, W = (int(n) for n in rng.integers((1, 1, 8, 8), (9, 17, 33, 33)))
    return Case((rng.standard_normal((N, C, H, W)),), options)


def channels(rng: np.random.Generator, **options: Any) -> Case:
    (x,), _ = maps(rng)
    x = np.concatenate([x, x[:1]])
    return Case(
        (3 * x + 1, rng.standard_normal(x.shape[1]), rng.standard_normal(x.shape[1])), options
    )


def square(rng: np.random.Generator, K: int, stride: int = 1) -> Case:
    """A convolution that Winograd's method runs."""
    C, F = (int(n) for n in rng.integers(1, 65, 2))
    N, H, W = int(rng.integers(1, 5)), *(int(n) for n in rng.integers(8, 25, 2))
    w = rng.standard_normal((F, C, K, K))
    return Case((rng.standard_normal((N, C, H, W)), w), {"padding": K // 2, "stride": stride})


def block(rng: np.random.Generator) -> Case:
    case = shapes(rng)
    (x, w, b), options = case
    return Case((x, w, b), {**options, "relu": False})


def scores(rng: np.random.Generator) -> Case:
    N, C = (int(n) for n in rng.integers(1, 301, 2))
    return Case((3 * rng.standard_normal((N, C)),), {"target": rng.integers(0, C, N)})


def pairs(rng: np.random.Generator) -> Case:
    N, C = (int(n) for n in rng.integers(1, 301, 2))
    return Case((3 * rng.standard_normal((N, C)), rng.random((N, C))), {})


LINEAR: dict[str, Callable[[np.random.Generator], Case]] = {
    "conv2d": shapes,
    "conv2d 3x3": lambda rng: square(rng, 3),
    "conv2d 3x3 stride 2": lambda rng: square(rng, 3, 2),
    "conv2d 5x5": lambda rng: square(rng, 5),
    "conv_block": block,
    "conv_transpose2d": transposed,
    "linear": rows,
    "avg_pool2d": lambda rng: maps(rng, kernel_size=int(rng.integers(2, 6)), stride=2),
    "adaptive_avg_pool2d": lambda rng: maps(rng, output_size=int(rng.integers(1, 6))),
    "max_pool2d": lambda rng: maps(rng, kernel_size=int(rng.integers(2, 4)), stride=2),
}
LOSSES = "mse_loss", "l1_loss", "bce_with_logits"
ELEMENTWISE = (
    "relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "silu", "softplus", "softmax",
    "log_softmax",
)  # fmt: skip
OTHERS: dict[str, Callable[[np.random.Generator], Case]] = {
    **dict.fromkeys(ELEMENTWISE, maps),
    "batch_norm": channels,
    "layer_norm": lambda rng: (lambda case: Case(case.arrays[:1], {
        "normalized_shape": case.arrays[0].shape[2:]}))(maps(rng)),
    "group_norm": lambda rng: (lambda case: Case(case.arrays[:1], {"num_groups": 1}))(maps(rng)),
    "dropout": lambda rng: Case(maps(rng).arrays, {"p": 0.3, "rng": 0}),
    **dict.fromkeys(("cross_entropy", "nll_loss"), scores),
    **dict.fromkeys(LOSSES, pairs),
}  # fmt: skip


def run(name: str, version: str, arrays: Any, options: Any, dy: Any) -> tuple[Any, ...]:
    """Output and gradients."""
    name = name.split()[0]
    with mc.use(version):
        y, cache = getattr(ops, f"{name}_forward")(*arrays, **options)
        grads = getattr(ops, f"{name}_backward")(dy.astype(y.dtype), cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    return y, *(g for g in grads if g is not None)  # None for a parameter that was not passed


def output(name: str, case: Case) -> np.ndarray:
    with mc.use("numpy"):
        return np.asarray(
            getattr(ops, f"{name.split()[0]}_forward")(*case.arrays, **case.options)[0]
        )


def errors(name: str, version: str, case: Case, rng: np.random.Generator) -> Iterator[float]:
    """The worst error of the output and of each gradient, in units of u times the terms."""
    # Inputs that float32 holds, so that rounding them is no part of the error.
    small = [a.astype(np.float32) for a in case.arrays]
    large = [a.astype(np.float64) for a in small]
    dy = rng.standard_normal(output(name, case).shape).astype(np.float32)
    got = run(name, version, small, case.options, dy)
    exact = run(name, "numpy", large, case.options, dy.astype(np.float64))
    if name in LINEAR and name != "max_pool2d":
        absolute = run(name, "numpy", [abs(a) for a in large], case.options, abs(dy).astype(float))
    elif name == "max_pool2d":  # its backward adds up what overlapping windows give one pixel
        dx = mc.ops.max_pool2d_backward(
            abs(dy).astype(float), mc.ops.max_pool2d_forward(large[0], **case.options)[1]
        )
        absolute = (abs(exact[0]), dx)
    else:
        # The gradient of a mean over the batch is small: it is measured by itself.
        least = 0 if name.endswith(("_loss", "entropy", "logits")) else 1
        absolute = tuple(np.maximum(least, np.abs(e).max()) if i else np.maximum(1, abs(e))
                         for i, e in enumerate(exact))  # fmt: skip
    for g, e, terms in zip(got, exact, absolute):
        off = np.abs(np.asarray(g, np.float64) - e)
        scale = U * np.broadcast_to(terms, off.shape)
        yield float(np.max(np.divide(off, scale, out=np.where(off > 0, np.inf, 0), where=scale > 0),
                           initial=0))  # fmt: skip


def versions(name: str) -> list[str]:
    """The versions of an op that run on NumPy arrays."""
    import importlib

    if " " in name:
        return ["winograd"]
    module = importlib.import_module(getattr(ops, f"{name}_forward").__module__)
    table = getattr(module, "VERSIONS", None) or {}
    table = table.get(name, table) if "numpy" not in table else table
    return [v for v in ("numpy", "numba") if v in table or v == "numpy"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*LINEAR, *OTHERS]
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"{', '.join(known)}; default: all")
    parser.add_argument("--shapes", type=int, default=20, help="random shapes an op (20)")
    parser.add_argument("--seed", type=int, default=0, help="of shapes and values (0)")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(known)
    if unknown:
        parser.error(f"OP: expected {', '.join(known)}, got {sorted(unknown)[0]}")
    failed = False
    for table, unit in ((LINEAR, "u times the sum of all terms"), (OTHERS, "u times the result")):
        names = [name for name in arguments.ops or known if name in table]
        if names:
            print(f"| {unit}: output; gradients | numpy | numba | winograd |")
            print("| --- | --- | --- | --- |")
        for name in names:
            cells = dict.fromkeys(("numpy", "numba", "winograd"), "")
            for version in versions(name):
                worst: list[float] = []
                for i in range(arguments.shapes):
                    rng = np.random.default_rng([arguments.seed, i])
                    found = list(errors(name, version, table[name](rng), rng))
                    worst = [max(pair) for pair in zip(worst or found, found)]
                first, *rest = (f"{v:.2g}" for v in worst)
                cells[version] = f"{first}; {', '.join(rest)}"
                failed |= version != "winograd" and max(worst) > MOST
            print(f"| {name} | {' | '.join(cells.values())} |", flush=True)
        print()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
