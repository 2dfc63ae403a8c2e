"""Training: one step, many epochs, evaluation and prediction."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.backend import Array, array_module
from minicnn.data import Batches, Dataset
from minicnn.interrupts import deferred
from minicnn.layers import Layer, Sequential
from minicnn.optim import Optimizer, all_finite, clip_grad_norm
from minicnn.plan import Plan, plan_of, running
from minicnn.schedules import Schedule
from minicnn.shapes import integer, number

Data = Dataset | tuple[Array, Array]
Loss = tuple[Callable[..., Any], Callable[..., Any]]

LOSSES: dict[str, Loss] = {
    "cross_entropy": (ops.cross_entropy_forward, ops.cross_entropy_backward),
    "nll_loss": (ops.nll_loss_forward, ops.nll_loss_backward),
    "mse_loss": (ops.mse_loss_forward, ops.mse_loss_backward),
    "l1_loss": (ops.l1_loss_forward, ops.l1_loss_backward),
    "bce_with_logits": (ops.bce_with_logits_forward, ops.bce_with_logits_backward),
}


class NonFiniteError(ArithmeticError):
    """The loss or a gradient became NaN or infinite; the message names the step and the layer."""


class Metrics(NamedTuple):
    """Mean loss, and the share of right answers (NaN where the targets are not classes)."""

    loss: float
    accuracy: float


class Callback:
    """What `Trainer.fit` calls; override what you need. Set ``trainer.stop = True`` to end."""

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Called after each update."""

    def on_epoch(self, trainer: Trainer, record: dict[str, float]) -> None:
        """Called after each epoch with its line of the history."""


@dataclass
class Position:
    """Where training stands: epochs done, and the sums over the batches of the one begun."""

    epoch: int = 0
    batch: int = 0
    samples: int = 0  # labels that count, or samples where the targets are not classes
    loss: float = 0.0  # sum over them
    correct: int = 0
    seconds: float = 0.0

    def add(self, loss: float, correct: int, samples: int) -> None:
        """Count one more batch."""
        self.batch += 1
        self.samples += samples
        self.loss += loss * samples
        self.correct += correct

    def metrics(self, classes: bool) -> Metrics:
        """Means over the samples so far."""
        n = self.samples or math.nan
        return Metrics(self.loss / n, self.correct / n if classes else math.nan)


class Trainer:
    """Trains a model with an optimiser.

    Parameters
    ----------
    model : Layer
    optimizer : Optimizer
        Built on the same model.
    loss : str or (forward, backward)
        "cross_entropy", "nll_loss", "mse_loss", "l1_loss" or "bce_with_logits"; or a pair
        ``forward(outputs, targets) -> (loss, cache)``, ``backward(dloss, cache) -> doutputs``.
    schedule : callable, optional
        Learning rate by number of updates made, see `minicnn.schedules`; else the optimiser's.
    clip_norm : float, optional
        Largest norm of all gradients together.
    fused : bool
        Let fused CPU kernels run several layers in one go where they can; `plan` shows which.
        The result is the same up to rounding.
    winograd : bool
        Let them multiply convolutions out by Winograd's method where it is faster. Its rounding
        errors are some ten times as large, see `minicnn.ops.conv2d_winograd`.

    Attributes
    ----------
    history : list of dict
        A record an epoch: epoch, step, lr, train_loss, train_accuracy, test_loss,
        test_accuracy, seconds.
    position : Position
        Where training stands; with the model's and the optimiser's state all that `fit` needs
        to go on. `checkpoint.save_training` keeps them together.
    stop : bool
        Set by a callback to end `fit` after the batch at hand.

    Examples
    --------
    >>> from minicnn import Trainer, models, optim
    >>> from minicnn.data import load
    >>> model = models.mnist_cnn(rng=0)
    >>> trainer = Trainer(model, optim.Adam(model, lr=1e-3))
    >>> x, y, _ = load("digits", "train")
    >>> losses = [trainer.step(x[:32], y[:32]) for _ in range(5)]
    >>> losses[-1] < losses[0]
    True
    """

    def __init__(
        self,
        model: Layer,
        optimizer: Optimizer,
        loss: str | Loss = "cross_entropy",
        schedule: Schedule | None = None,
        clip_norm: float | None = None,
        fused: bool = True,
        winograd: bool = True,
    ) -> None:
        if isinstance(loss, str):
            if loss not in LOSSES:
                raise ValueError(
                    f"Trainer: loss: expected one of {', '.join(LOSSES)} or a pair of functions, "
                    f"got {loss!r}"
                )
            loss = LOSSES[loss]
        if getattr(optimizer, "model", None) is not model:
            raise ValueError("Trainer: optimizer: expected one built on this model, got another's")
        if not (isinstance(loss, tuple) and len(loss) == 2 and all(map(callable, loss))):
            raise TypeError(f"Trainer: loss: expected a name or a pair of functions, got {loss!r}")
        if not (schedule is None or callable(schedule)):
            raise TypeError(f"Trainer: schedule: expected a function of the step, got {schedule!r}")
        if clip_norm is not None:
            number("Trainer", "clip_norm", clip_norm, gt=0)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.schedule, self.clip_norm = schedule, clip_norm
        self.fused, self.winograd = fused, winograd
        self.history: list[dict[str, float]] = []
        self.position = Position()
        self.stop = False

    def step(self, x: Array, y: Array) -> float:
        """Make one update: zero gradients, forward, loss, backward, optimiser.

        Parameters
        ----------
        x : array, shape (N, ...)
        y : array
            Targets of the loss.

        Returns
        -------
        float
            Loss on this batch before the update.

        Raises
        ------
        NonFiniteError
            If the loss or a gradient is NaN or infinite.
        ValueError
            If there is no sample, or no label that counts.

        After an error the parameters, the running statistics and the layers' random generators
        are as they were. Ctrl-C waits until the update is whole.
        """
        with deferred():
            return self._step(x, y)[0]

    def _step(self, x: Array, y: Array) -> tuple[float, Array]:
        _arrays("Trainer.step", x=x, y=y)
        if not _count(y):
            raise ValueError(
                f"Trainer.step: y: expected a label that counts, got none in shape {y.shape}"
            )
        buffers = [a for _, layer in self.model.modules() for a in layer.buffers.values()]
        before = [a.copy() for a in buffers]
        generators = [rng.bit_generator for _, rng in self.model.named_generators()]
        states = [generator.state for generator in generators]
        try:
            return self._update(x, y)
        except BaseException:
            for a, value in zip(buffers, before):
                a[...] = value
            for generator, state in zip(generators, states):
                generator.state = state
            raise

    def _update(self, x: Array, y: Array) -> tuple[float, Array]:
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.optimizer.step_count)
        self.model.train()
        # Overflow warnings would say less, and earlier, than the check of loss and gradients.
        with running(self.model, x, self.fused, self.winograd) as plan, np.errstate(all="ignore"):
            outputs = plan.forward(x, training=True)
            loss, gradient = self._loss_and_gradient(outputs, y, plan)
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss}", x)
            plan.backward(gradient())
            for name, _, g in self.model.named_params():
                if not all_finite(g):
                    self._refuse(f"the gradient of {name} is not finite (the loss is {loss:g})", x)
            if self.clip_norm is not None:
                clip_grad_norm(self.model, self.clip_norm)
            self.optimizer.step()
        return loss, outputs

    def _loss_and_gradient(
        self, outputs: Array, y: Array, plan: Plan
    ) -> tuple[float, Callable[[], Array]]:
        """Return the loss and a function that gives its gradient to the outputs."""
        if plan.fused and self.loss is LOSSES["cross_entropy"] and _plain_labels(outputs, y):
            return plan.cross_entropy(outputs, y)
        forward, backward = self.loss
        value, cache = forward(outputs, y)
        return float(value), lambda: backward(array_module(value).ones_like(value), cache)

    def _refuse(self, what: str, x: Array) -> None:
        raise NonFiniteError(
            f"Trainer.step: step {self.optimizer.step_count}: {what}; first in "
            f"{_first_non_finite(self.model, x)}. The parameters were not updated. "
            "(A lower learning rate or clip_norm often helps; check the input for NaN.)"
        )

    def fit(
        self,
        train: Data | Batches,
        test: Data | None = None,
        *,
        epochs: int = 1,
        batch_size: int = 64,
        seed: int = 0,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
        callbacks: Sequence[Callback] = (),
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Train for some epochs and record each.

        A later call goes on where this one ended, an unfinished epoch first.

        Parameters
        ----------
        train : Dataset, (x, y) or Batches
        test : Dataset or (x, y), optional
            Evaluated after each epoch.
        epochs : int
        batch_size, seed, augment
            For `Batches`, unless `train` is one.
        callbacks : sequence of Callback
        progress : bool
            Show a bar for each epoch, or a line where the output is no terminal.

        Returns
        -------
        list of dict
            `history`.

        Raises
        ------
        NonFiniteError
            As for `step`.
        """
        integer("Trainer.fit", "epochs", epochs, 0)
        for callback in callbacks if isinstance(callbacks, Iterable) else (callbacks,):
            if not (hasattr(callback, "on_step") and hasattr(callback, "on_epoch")):
                raise TypeError(
                    f"Trainer.fit: callbacks: expected a list of Callback, got {callbacks!r}"
                )
        if not isinstance(train, Batches):
            train = Batches(train, batch_size, seed=seed, augment=augment)
        if not len(train):
            raise ValueError("Trainer.fit: train: expected at least one sample, got none")
        if test is not None:
            Batches(test)  # refuse bad data now and not after an epoch
        self.stop = False
        last = self.position.epoch + epochs
        while self.position.epoch < last and not self.stop:
            self._fit_epoch(train, test, last, callbacks, progress)
        return self.history

    def _fit_epoch(
        self,
        batches: Batches,
        test: Data | None,
        last: int,
        callbacks: Sequence[Callback],
        progress: bool,
    ) -> None:
        at = self.position
        began = time.perf_counter() - at.seconds
        classes = batches.y.dtype.kind in "iu"
        with _EpochBar(f"epoch {at.epoch + 1}/{last}", len(batches), at.batch, progress) as bar:
            for x, y in batches.epoch(at.epoch, start=at.batch):
                with deferred():  # the parameters and the position go together
                    loss, outputs = self._step(x, y)
                    at.add(loss, _count_correct(outputs, y), _count(y))
                    at.seconds = time.perf_counter() - began
                bar.advance(at.metrics(classes))
                for callback in callbacks:
                    callback.on_step(self, loss)
                if self.stop and at.batch < len(batches):
                    return
            trained = at.metrics(classes)
            tested = Metrics(math.nan, math.nan) if test is None else self.evaluate(test)
            bar.finish(trained, tested)
        record = {
            "epoch": at.epoch + 1,
            "step": self.optimizer.step_count,
            "lr": self.optimizer.lr,
            "train_loss": trained.loss,
            "train_accuracy": trained.accuracy,
            "test_loss": tested.loss,
            "test_accuracy": tested.accuracy,
            "seconds": round(time.perf_counter() - began, 3),
        }
        with deferred():
            self.history.append(record)
            self.position = Position(at.epoch + 1)
        for callback in callbacks:
            callback.on_epoch(self, record)

    def evaluate(self, data: Data, batch_size: int = 256) -> Metrics:
        """Return the mean loss and the accuracy in evaluation mode; nothing is changed.

        Parameters
        ----------
        data : Dataset or (x, y)
        batch_size : int

        Raises
        ------
        ValueError
            If there is no sample.
        """
        batches = Batches(data, batch_size, shuffle=False)
        if not len(batches):
            raise ValueError("Trainer.evaluate: data: expected at least one sample, got none")
        total = Position()
        classes = batches.y.dtype.kind in "iu"
        with np.errstate(all="ignore"):
            for x, y in batches:
                if _count(y):
                    with running(self.model, x, self.fused, self.winograd) as plan:
                        outputs = plan.forward(x, training=False)
                        loss, _ = self.loss[0](outputs, y)
                    total.add(float(loss), _count_correct(outputs, y), _count(y))
        return total.metrics(classes)

    def predict(self, x: Array, batch_size: int = 256) -> Array:
        """Return the model's outputs for `x`; see `predict`."""
        return predict(self.model, x, batch_size, self.fused, self.winograd)

    def plan(self) -> Plan:
        """Return how the model runs: which layers in one go and by which kernels; print it."""
        return plan_of(self.model, self.fused, self.winograd)


def predict(
    model: Layer, x: Array, batch_size: int = 256, fused: bool = True, winograd: bool = True
) -> Array:
    """Run a model over many samples, in batches.

    Parameters
    ----------
    model : Layer
    x : array, shape (N, ...)
    batch_size : int
    fused, winograd : bool
        As for `Trainer`.

    Returns
    -------
    array, shape (N, ...)
        Outputs in evaluation mode: logits for the reference network.

    Raises
    ------
    TypeError
        If `model` is no layer or `x` no array.
    """
    if not isinstance(model, Layer):
        raise TypeError(f"predict: model: expected a Layer, got {type(model).__name__}")
    _arrays("predict", x=x)
    step = integer("predict", "batch_size", batch_size, 1)
    y: Array = None
    with np.errstate(all="ignore"):
        for i in range(0, max(len(x), 1), step):
            with running(model, x[i : i + step], fused, winograd) as plan:
                part = plan.forward(x[i : i + step], training=False)
                if y is None:
                    y = array_module(part).empty((len(x), *part.shape[1:]), part.dtype)
                y[i : i + step] = part
    return y


def _arrays(op: str, **arrays: Any) -> None:
    for name, a in arrays.items():
        if not getattr(a, "shape", ()):
            raise TypeError(f"{op}: {name}: expected an array of samples, got {type(a).__name__}")


def _plain_labels(outputs: Array, y: Array) -> bool:
    """Tell whether there is one valid class for each row: nothing to ignore or to refuse."""
    return bool(
        outputs.ndim == 2
        and isinstance(y, np.ndarray)
        and y.dtype == np.int64
        and y.shape == outputs.shape[:1]
        and y.min() >= 0
        and y.max() < outputs.shape[1]
    )


def _count(y: Array) -> int:
    """How many terms the mean loss has: labels that are not ignored, or samples."""
    return int((y >= 0).sum()) if y.dtype.kind in "iu" else len(y)


def _count_correct(outputs: Array, y: Array) -> int:
    return int((outputs.argmax(axis=1) == y).sum()) if y.dtype.kind in "iu" else 0


def _first_non_finite(model: Layer, x: Array) -> str:
    """Name the first place on the way forward where a number is NaN or infinite."""

    def bad(a: Array) -> bool:
        return not array_module(a).isfinite(a).all()

    if bad(x):
        return "the input"
    for name, p, _ in model.named_params():
        if bad(p):
            return f"parameter {name}"

    def visit(layer: Layer, x: Array, name: str) -> str:
        for key, part in layer.children().items():
            y = part(x)
            if bad(y):
                return visit(part, x, f"{name}.{key}" if name else key)
            if isinstance(layer, Sequential):
                x = y  # the parts of any other layer stand side by side
        return f"the output of layer {name or '(the model)'} ({type(layer).__name__})"

    with np.errstate(all="ignore"):
        if bad(model(x)):
            return visit(model, x, "")
    return "the loss or the backward pass: all outputs are finite"


class _EpochBar:
    """A progress bar on a terminal or in a notebook; elsewhere one line when the epoch ends."""

    def __init__(self, label: str, total: int, done: int, progress: bool) -> None:
        from tqdm.auto import tqdm

        live = sys.stderr.isatty() or "ipykernel" in sys.modules
        self.label, self.line = label, progress and not live
        self.bar = tqdm(
            desc=label, total=total, initial=done, unit="batch", disable=not (progress and live)
        )

    def advance(self, so_far: Metrics) -> None:
        if not self.bar.disable:
            self.bar.set_postfix_str(_text("train", so_far), refresh=False)
        self.bar.update()

    def finish(self, trained: Metrics, tested: Metrics) -> None:
        text = f"{_text('train', trained)}  {_text('test', tested)}"
        self.bar.set_postfix_str(text)
        if self.line:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def __enter__(self) -> _EpochBar:
        return self

    def __exit__(self, *exc: object) -> None:
        self.bar.close()


def _text(name: str, metrics: Metrics) -> str:
    if math.isnan(metrics.loss):
        return ""
    accuracy = "" if math.isnan(metrics.accuracy) else f" {metrics.accuracy:.2%}"
    return f"{name} {metrics.loss:.4f}{accuracy}"
