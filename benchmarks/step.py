"""Time a training step and a prediction of whole networks, against other libraries.

A step is: gradients to zero, forward, cross-entropy, backward, Adam. Before anything is timed,
the contenders' logits and their losses after a few steps are compared.

    python benchmarks/step.py                       all networks and batch sizes
    python benchmarks/step.py --only "reference 64" one of them
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness

CASES = {  # network, batch size
    "reference 1": ("mnist_cnn", 1),
    "reference 64": ("mnist_cnn", 64),
    "reference 256": ("mnist_cnn", 256),
    "VGG-like 64": ("vgg_small", 64),
    "ResNet-like 64": ("resnet_small", 64),
}
STEPS = 3  # before the losses are compared


def main() -> None:
    args = harness.arguments(__doc__)
    threads = harness.use_threads(args.threads)
    if args.memory:
        name, contender = args.memory
        steps, _ = contend(*CASES[name], threads, only=contender)
        return harness.report_memory(steps[contender])
    harness.headline(threads)
    report = {}
    for name, case in CASES.items():
        if args.only in name:
            report[name] = bench(name, case, threads, args)
    harness.save(args, report)
    return None


def bench(name: str, case: tuple[str, int], threads: int, args: Any) -> dict[str, Any]:
    steps, predictions = contend(*case, threads)
    agree(predictions, steps)
    report = {"memory_mb": {c: harness.peak_memory(name, c) for c in steps}} if args.peak else {}
    for what, contenders in (("training step", steps), ("inference", predictions)):
        seconds = harness.measure(contenders, args.repeats, calls=10 if case[1] < 16 else 3)
        title = f"{name}, {what}"
        report[what] = harness.show(title, seconds, ours="minicnn", memory=report.get("memory_mb"))
    return report


def contend(
    network: str, batch: int, threads: int, only: str = ""
) -> tuple[dict[str, Callable[[], float]], dict[str, Callable[[], Any]]]:
    """Return the steps and the predictions of all contenders, on the same weights and batch."""
    import numpy as np
    import peers

    from minicnn import Trainer, models, optim

    rng = np.random.default_rng(0)
    model = getattr(models, network)(rng=0)
    shape = (1, 28, 28) if network == "mnist_cnn" else (3, 32, 32)
    x = rng.standard_normal((batch, *shape), dtype=np.float32)
    y = rng.integers(0, 10, batch)

    def ours(**options: bool) -> peers.Pair:
        twin = copy.deepcopy(model)
        trainer = Trainer(twin, optim.Adam(twin, lr=peers.LR), **options)
        return lambda: trainer.step(x, y), lambda: trainer.predict(x)

    pairs = {
        "minicnn": ours(),
        "minicnn, winograd=False": ours(winograd=False),
        "minicnn, fused=False": ours(fused=False),
        **peers.pytorch(copy.deepcopy(model), x, y),
        **peers.jax(model, x, y),
        **peers.dezero(model, x, y),
        **peers.cs231n(model, x, y),
    }
    if only:
        pairs = {only: pairs[only]}
    predictions = {name: pair[1] for name, pair in pairs.items()}
    return {name: pair[0] for name, pair in pairs.items()}, {
        **predictions,
        **peers.onnx_runtime(model, x, threads),
    }


def agree(predictions: dict[str, Callable[[], Any]], steps: dict[str, Callable[[], float]]) -> None:
    """Exit unless all contenders predict the same and learn alike; print their first seconds."""
    import numpy as np

    first = harness.warm_up(predictions)
    want = next(iter(predictions.values()))()
    for name, predict in predictions.items():
        gap = np.abs(predict() - want).max() / np.abs(want).max()
        if not gap < 1e-3:
            raise SystemExit(f"{name}: logits differ by {gap:.1e} of the largest")
    seconds = harness.warm_up(steps)
    losses = {name: [step() for _ in range(STEPS)][-1] for name, step in steps.items()}
    want = next(iter(losses.values()))
    for name, loss in losses.items():
        if not abs(loss - want) < 1e-2 * max(want, 0.1):
            raise SystemExit(f"{name}: loss {loss:.4f} after {STEPS} steps, expected {want:.4f}")
    print("\nfirst prediction and first step, with compilation where there is any:")
    for name, s in seconds.items():
        print(f"  {name:32} {first[name]:6.2f} s  {s:6.2f} s")


if __name__ == "__main__":
    main()
