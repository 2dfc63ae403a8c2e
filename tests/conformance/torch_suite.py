"""PyTorch's own samples, run through our ops, layers and optimisers.

PyTorch tests itself with sample inputs and error inputs for each operator, module and optimiser
(``torch.testing._internal``). A sample passes if values and all gradients equal PyTorch's in
float64; an error input passes if it is refused by an error that names the argument, what was
expected and what came.

PyTorch also takes one picture without the batch axis and tuples of one number; what is compared
here is the same call with the batch axis added and the number itself.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import minicnn as mc
from conformance.torch_layers import (
    HOW,
    LOSS_MODULES,
    build,
    check_module,
    check_optimizer,
    constructor_options,
    loss,
    modules,
    optimizers,
)
from conformance.torch_ops import (
    SEED,
    Op,
    Unsupported,
    arguments,
    array,
    check_op,
    op_samples,
    run_ours,
)

ERROR_FORM = re.compile(r"^[\w.]+: .*expected .+, got .+", re.DOTALL)
# What is refused on purpose, though PyTorch takes it: (words of our message, reason).
REFUSED_ON_PURPOSE = [
    (r"momentum: expected a number >= 0", "a momentum below 0 in batch norm"),
    (r"eps: expected a number > 0", "an eps below 0"),
    (r"divisor_override: expected an integer >= 1", "a divisor below 0 in average pooling"),
    (r"expected (at least 2 axes|shape \(N, C\))", "losses and norms without batch axis"),
    (r"expected an entry or more along axis", "a softmax over no entries"),
    (r"expected an axis of x with shape \(\)", "a softmax of a single number without axes"),
    (r"flatten: .*expected an axis from 0 to -1", "flattening a single number without axes"),
    (r"expected more than 1 value per channel", "batch norm of an empty batch in training"),
]  # fmt: skip


class Outcome(NamedTuple):
    """What became of a sample."""

    kind: str  # "op", "layer" or "optimizer"
    name: str
    error: bool  # whether it has to be refused
    result: str  # "passed", "failed" or "refused"
    detail: str


def attempt(kind: str, name: str, error: bool, function: Callable[[], None]) -> Outcome:
    """Run one sample and say what became of it."""
    try:
        function()
    except AssertionError as wrong:
        return Outcome(kind, name, error, "failed", " ".join(str(wrong).split())[:300])
    except Unsupported as reason:
        return Outcome(kind, name, error, "refused", str(reason))
    except Exception as refusal:
        text = f"{type(refusal).__name__}: {refusal}"
        form = isinstance(refusal, ValueError | TypeError) and ERROR_FORM.match(str(refusal))
        if error:
            return Outcome(kind, name, error, "passed" if form else "failed", text[:300])
        for words, reason in REFUSED_ON_PURPOSE:
            if form and re.search(words, str(refusal)):
                return Outcome(kind, name, error, "refused", reason)
        return Outcome(kind, name, error, "failed", text[:300])
    return Outcome(kind, name, error, "failed" if error else "passed", "accepted" * error)


@cache
def outcomes() -> list[Outcome]:
    """Run every sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_op_outcomes(), *_module_outcomes(), *_optimizer_outcomes()]


def _op_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in op_samples():
        torch.manual_seed(SEED)
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
            yield attempt("op", name, False, lambda s=sample, i=info, n=name: check_op(n, i, s))
        if info.error_inputs_func is None or name == "nn.functional.unfold":
            continue
        for bad in info.error_inputs("cpu"):
            op, given = arguments(name, bad.sample_input)

            def refuse(op: Op = op, given: dict[str, Any] = given) -> None:
                run_ours(op, given, np.random.default_rng(SEED))

            yield attempt("op", name, True, refuse)


def _module_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in modules():
        for training in (True, False):
            torch.manual_seed(SEED)
            options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
            for inputs in info.module_inputs_func(info, training=training, **options):
                yield attempt(
                    "layer", name, False,
                    lambda i=inputs, f=info, n=name, t=training: check_module(n, f, i, t),
                )  # fmt: skip
            if info.module_error_inputs_func is None:
                continue
            for bad in info.module_error_inputs_func(info, training=training, **options):
                yield attempt(
                    "layer", name, True, lambda b=bad, f=info, n=name: refused_module(n, f, b)
                )


def refused_module(name: str, info: Any, bad: Any) -> None:
    """Build and run what PyTorch refuses; returns only if we do not."""
    inputs = bad.module_error_input
    call = inputs.forward_input
    if name in LOSS_MODULES:
        op = loss(name)
        x, target = call.args
        given = {"x": x, "target": target, **constructor_options(info, inputs)}
        run_ours(op, given, np.random.default_rng(SEED))
        return
    layer = build(name, inputs.constructor_input)
    if call is not None:
        layer.astype(np.float64)
        layer.forward(array(call.args[0]))


def _optimizer_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in optimizers():
        for inputs in info.optim_inputs_func(device="cpu"):
            yield attempt(
                "optimizer", name, False,
                lambda k=inputs.kwargs, f=info, n=name: check_optimizer(n, f, k),
            )  # fmt: skip
        for bad in info.optim_error_inputs_func(device="cpu", dtype=torch.float64):
            options = bad.optimizer_error_input.kwargs
            if how_only(options) or bad.optimizer_error_input.params is not None:
                # Parameter groups, or ways to compute: we take a model, and compute in one way.
                if not isinstance(bad.optimizer_error_input.params, torch.nn.Parameter):
                    reason = "error inputs about parameter groups, or tensors as numbers"
                    yield Outcome("optimizer", name, True, "refused", reason)
                    continue
                yield attempt(
                    "optimizer", name, True,
                    lambda n=name: getattr(mc.optim, n)(np.zeros((1, 1)), lr=0.1),
                )  # fmt: skip
                continue

            def refuse(name: str = name, options: dict[str, Any] = options) -> None:
                kind = getattr(mc.optim, name)
                values = {k: array(v) for k, v in options.items()}
                kind(mc.Linear(3, 2, rng=0), **values)

            yield attempt("optimizer", name, True, refuse)


def how_only(options: dict[str, Any]) -> bool:
    """Whether an error is about how PyTorch computes: tensors as numbers, foreach."""
    tensors = [v for v in options.values() if hasattr(v, "detach") and v.numel() == 1]
    betas = options.get("betas", ())
    return (
        bool(tensors) or any(hasattr(b, "detach") for b in betas) or bool(set(options) & set(HOW))
    )


def table() -> str:
    """The outcome as Markdown."""
    lines = ["| PyTorch | samples | passed | failed | refused | bad inputs | refused by name |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind, title in (("op", "operators"), ("layer", "layers and losses, both modes"),
                        ("optimizer", "optimisers, 10 steps each")):  # fmt: skip
        some = [o for o in outcomes() if o.kind == kind]
        good, bad = [o for o in some if not o.error], [o for o in some if o.error]
        count = Counter(o.result for o in good)
        names = len({o.name for o in some})
        lines.append(
            f"| {names} {title} | {len(good)} | {count['passed']} | {count['failed']} | "
            f"{count['refused']} | {sum(o.result != 'refused' for o in bad)} | "
            f"{sum(o.result == 'passed' for o in bad)} |"
        )
    lines += ["", "| not supported because of | samples |", "| --- | --- |"]
    reasons = Counter(o.detail for o in outcomes() if o.result == "refused")
    lines += [f"| {reason} | {n} |" for reason, n in reasons.most_common()]
    return "\n".join(lines)
