"""Time a training step and a prediction of whole networks, against other libraries.

A step is: gradients to zero, forward, cross-entropy, backward, Adam. Before anything is timed,
the contenders' logits and their losses after a few steps are compared.

    python benchmarks/step.py                                 all networks and batch sizes
    python benchmarks/step.py --only "reference 64" --repeats 5
    python benchmarks/step.py --only like --peers PyTorch     VGG- and ResNet-like networks
    python benchmarks/step.py --device cuda                   everything on the GPU
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from typing import Any

import contest
import harness
import numpy as np
import peers

import minicnn as mc
from minicnn import Trainer, models, optim

CASES = {  # network, batch size
    "reference 1": ("mnist_cnn", 1),
    "reference 64": ("mnist_cnn", 64),
    "reference 256": ("mnist_cnn", 256),
    "VGG-like 64": ("vgg_small", 64),
    "ResNet-like 64": ("resnet_small", 64),
}
STEPS = 3  # before the losses are compared
Calls = dict[str, Callable[[], Any]]


def main(argv: Sequence[str] | None = None) -> None:
    args = harness.arguments(__doc__ or "", argv=argv)
    if args.memory:
        harness.use_threads(args.threads)
        name, contender = args.memory
        return harness.report_memory([contend(*CASES[name], args, only=contender)[0][contender]])
    report = harness.headline(args)
    chosen = {name: case for name, case in CASES.items() if args.only in name}
    if not chosen:
        raise SystemExit(f"--only: expected part of one of {', '.join(CASES)}, got {args.only!r}")
    report["cases"] = {name: bench(name, case, args, report) for name, case in chosen.items()}
    harness.save(args, report)
    return None


def bench(
    name: str, case: tuple[str, int], args: argparse.Namespace, limits: dict[str, Any]
) -> dict[str, Any]:
    steps, predictions = contend(*case, args)
    first = contest.on_device(agree(predictions, steps, args.device), args)
    passes = {"training step": steps, "inference": predictions}
    times = {
        p: harness.measure(contest.on_device(of_pass, args), args.repeats, args.device)
        for p, of_pass in passes.items()
    }
    seconds: dict[str, dict[str, float]] = {}
    for p, of_pass in times.items():
        for contender, s in of_pass.items():
            seconds.setdefault(contender, {})[p] = s
    # Ours as it comes: the other lines say what each choice costs.
    report = {
        "seconds": seconds,
        "first_call_seconds": first,
        "flop": {},
        "bytes": {},
        "ratios": {p: {"minicnn": harness.ratios(t, "minicnn")} for p, t in times.items()},
        "memory_mb": {},
    }
    print(f"\n{name}")
    if args.peak:
        memory = {c: harness.peak_memory(name, c) for c in steps}
        report["memory_mb"] = {c: memory.get(c, float("nan")) for c in seconds}
    print(contest.as_text(report, limits))
    return report


def contend(
    network: str, batch: int, args: argparse.Namespace, only: str = ""
) -> tuple[dict[str, Callable[[], float]], Calls]:
    """Return the steps and the predictions of all contenders, on the same weights and batch."""
    rng = np.random.default_rng(0)
    model = getattr(models, network)(rng=0)
    shape = (1, 28, 28) if network == "mnist_cnn" else (3, 32, 32)
    x = rng.standard_normal((batch, *shape), dtype=np.float32)
    y = rng.integers(0, 10, batch)

    def ours(version: str | None = None, **options: bool) -> peers.Pair:
        twin = copy.deepcopy(model)
        trainer = Trainer(twin, optim.Adam(twin, lr=peers.LR), **options)
        batch, labels = x, y
        if version == "cupy":
            trainer, (batch, labels) = mc.to_gpu(trainer), mc.to_gpu((x, y))

        def step() -> float:
            with contest.using(version):
                return trainer.step(batch, labels)

        def predict() -> Any:
            with contest.using(version):
                return trainer.predict(batch)

        return step, predict

    if args.device == "cuda":
        pairs = {
            "minicnn numpy": ours("numpy", fused=False),
            "minicnn": ours("cupy"),
            "minicnn, fused=False": ours("cupy", fused=False),
        }
    else:
        pairs = {
            "minicnn": ours(),
            "minicnn, winograd=False": ours(winograd=False),
            "minicnn, fused=False": ours(fused=False),
        }
    if contest.asked(args, "PyTorch"):
        pairs |= peers.pytorch(copy.deepcopy(model), x, y, not args.no_compile, args.device)
    for peer, make in (("JAX", peers.jax), ("DeZero", peers.dezero), ("CS231n", peers.cs231n)):
        if contest.asked(args, peer):
            pairs |= make(model, x, y)
    if only:
        pairs = {only: pairs[only]}
    predictions = {name: pair[1] for name, pair in pairs.items()}
    if contest.asked(args, "ONNX Runtime") and not only:
        predictions |= peers.onnx_runtime(model, x, harness.use_threads(args.threads))
    return {name: pair[0] for name, pair in pairs.items()}, predictions


def agree(
    predictions: Calls, steps: dict[str, Callable[[], float]], device: str
) -> dict[str, float]:
    """Exit unless all contenders predict the same and learn alike; return their first seconds."""
    first = harness.warm_up(predictions, device)
    want = contest.as_numpy(next(iter(predictions.values()))())
    for name, predict in predictions.items():
        gap = np.abs(contest.as_numpy(predict()) - want).max() / np.abs(want).max()
        if not gap < 1e-3:
            raise SystemExit(f"{name}: logits differ by {gap:.1e} of the largest")
    for name, s in harness.warm_up(steps, device).items():
        first[name] += s
    losses = {name: [step() for _ in range(STEPS)][-1] for name, step in steps.items()}
    want = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - want) < 1e-2 * max(want, 0.1):
            raise SystemExit(f"{name}: loss {loss:.4f} after {STEPS} steps, expected {want:.4f}")
    return first


if __name__ == "__main__":
    main()
