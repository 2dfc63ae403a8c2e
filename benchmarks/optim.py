"""Time one update of all parameters by each optimiser, on networks of two sizes.

PyTorch's modes: a loop, foreach (all tensors in one call) and, where it has one, its fused kernel.
What is compared before the timing are all parameters after two updates. On the GPU "one launch" is
what a recorded step of Trainer runs, and the plain line the optimiser's own step.

    python benchmarks/optim.py --only Adam
"""

from __future__ import annotations

import argparse
from typing import Any

import contest
import harness
import numpy as np

import minicnn as mc
from minicnn import models, optim

OPTIONS: dict[str, dict[str, float]] = {
    "SGD": {"lr": 1e-3, "momentum": 0.9},
    "Adam": {"lr": 1e-3},
    "AdamW": {"lr": 1e-3, "weight_decay": 0.01},
    "RMSprop": {"lr": 1e-3},
}
NETWORKS = {"reference network": "mnist_cnn", "VGG-like": "vgg_small"}
CASES = {
    f"{name}, {title}": (name, network) for title, network in NETWORKS.items() for name in OPTIONS
}
FUSED = ("SGD", "Adam", "AdamW")


def make(case: tuple[str, str], args: argparse.Namespace) -> contest.Contest:
    name, network = case
    calls: dict[str, contest.Passes] = {}
    size = 0

    def prepared(version: str) -> tuple[Any, Any]:
        model = getattr(models, network)(rng=0)
        for i, (_, _, g) in enumerate(model.named_params()):
            g[...] = contest.draw(i, g.shape)
        model = contest.placed(version, model)
        return model, getattr(optim, name)(model, **OPTIONS[name])

    for version in contest.versions_on(args, ("numpy", "numba")):
        model, optimizer = prepared(version)
        size = sum(p.size for _, p, _ in model.named_params())

        def update(optimizer: Any = optimizer, model: Any = model, version: str = version) -> Any:
            with contest.using(version):
                optimizer.step()
            return [p for _, p, _ in model.named_params()]

        calls[f"{contest.OURS} {version}"] = {"step": update}
    if args.device == "cuda":
        calls[f"{contest.OURS} cupy, one launch"] = {"step": one_launch(*prepared("cupy"))}
    torch = harness.torch_on(args.device) if contest.asked(args, "PyTorch") else None
    if torch is not None:
        for mode in ("for-loop", "foreach", "fused")[: 3 if name in FUSED else 2]:
            model = getattr(models, network)(rng=0)
            params = [torch.from_numpy(p).to(args.device) for _, p, _ in model.named_params()]
            for i, p in enumerate(params):
                p.requires_grad_().grad = torch.from_numpy(contest.draw(i, p.shape)).to(args.device)
            how = {"foreach": False} if mode == "for-loop" else {mode: True}
            optimizer = getattr(torch.optim, name)(params, **OPTIONS[name], **how)

            def torch_update(optimizer: Any = optimizer, params: Any = params) -> Any:
                optimizer.step()
                return params

            calls[f"PyTorch {mode}"] = {"step": torch_update}
    arrays = {"SGD": 5, "RMSprop": 5}.get(name, 7)  # read or written: p, g and the moments
    return contest.Contest(calls, {}, {"step": 4.0 * arrays * np.float64(size)})


def one_launch(model: Any, optimizer: Any) -> harness.Call:
    """Return the update as a recorded step of Trainer does it: by one kernel."""
    from minicnn.gpu.update import RULES, moves

    params, grads = zip(*((p, g) for _, p, g in model.named_params()))
    ((dtype, update),) = moves(optimizer, grads).items()
    rates = mc.to_gpu(np.zeros(4, dtype))

    def step() -> Any:
        optimizer.step_count += 1
        rates.set(np.array([1, *RULES[type(optimizer)](optimizer)], dtype))
        update(rates)
        return list(params)

    return step


if __name__ == "__main__":
    contest.run(__doc__, CASES, make)
