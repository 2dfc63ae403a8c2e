"""Training: one step, many epochs, evaluation and prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn import ops
from minicnn.backend import Array, array_module
from minicnn.data import Batches, Dataset
from minicnn.inference import check_arrays, predict, running
from minicnn.interrupts import deferred
from minicnn.layers import Layer, Sequential
from minicnn.layers.contents import Contents, contents_of
from minicnn.optim import Optimizer, all_finite, clip_grad_norm
from minicnn.plan import Plan, plan_of
from minicnn.progress import EpochBar, Metrics, Position, correct, count_labels, counted
from minicnn.schedules import Schedule
from minicnn.shapes import integer, number

if TYPE_CHECKING:
    from minicnn.gpu.plan import GpuPlan
    from minicnn.gpu.training import GpuSteps

__all__ = ["LOSSES", "Callback", "Metrics", "NonFiniteError", "Position", "Trainer", "predict"]

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


class Callback:
    """What `Trainer.fit` calls; override what you need. Set ``trainer.stop = True`` to end.

    Attributes
    ----------
    needs_loss : bool
        Whether `on_step` looks at the loss. If nobody does, steps on the GPU are queued without
        waiting for it, and it is NaN where it is not known yet.
    """

    needs_loss = True

    def on_step(self, trainer: Trainer, loss: float) -> None:
        """Called after each update."""

    def on_epoch(self, trainer: Trainer, record: dict[str, float]) -> None:
        """Called after each epoch with its line of the history."""


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
        Let fused kernels run several layers in one go where they can, and on the GPU record whole
        steps as CUDA graphs; `plan` shows which. The result is the same up to rounding.
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
        self.stop = False
        self.part = 0  # samples at a time, where the GPU's memory takes no whole batch
        self._position = Position()
        self._gpu: GpuSteps | None = None

    @property
    def position(self) -> Position:
        """Where training stands, with all steps on the GPU counted."""
        if self._gpu is not None:
            self._gpu.read()
        return self._position

    @position.setter
    def position(self, position: Position) -> None:
        self._position = position

    def map_arrays(self, convert: Callable[[Array], Array]) -> None:
        """Replace all arrays of model and optimiser; `to_gpu` and `to_cpu` call it."""
        if self._gpu is not None:
            self._gpu.read()
            self._gpu = None
        self.model.map_arrays(convert)
        self.optimizer.map_arrays(convert)

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
            contents = contents_of(self.model)
            gpu = self._gpu_steps(contents)
            if gpu is None:
                return self._step(x, y, contents)[0]
            loss = gpu.step(x, y, Position(), lambda _: (x, y))
            last = gpu.read()
            return last if loss is None and last is not None else float(loss)  # type: ignore

    def _gpu_steps(self, contents: Contents) -> GpuSteps | None:
        if not contents.on_gpu:
            return None
        if self._gpu is None:
            from minicnn.gpu.training import GpuSteps

            self._gpu = GpuSteps(self)
        return self._gpu

    def step_now(
        self, x: Array, y: Array, position: Position, contents: Contents | None = None
    ) -> float:
        """Make an update as `step`, without queueing it, and count it in `position`."""
        loss, outputs = self._step(x, y, contents or contents_of(self.model))
        position.add(loss, int(correct(outputs, y)), count_labels(y))
        return loss

    def begin_step(self, contents: Contents) -> None:
        """Set the learning rate of the next step, and the layers to training."""
        if self.schedule is not None:
            self.optimizer.lr = self.schedule(self.optimizer.step_count)
        if not contents.training:
            self.model.train()

    def _step(self, x: Array, y: Array, contents: Contents) -> tuple[float, Array]:
        check_arrays("Trainer.step", x=x, y=y)
        if not count_labels(y):
            raise ValueError(
                f"Trainer.step: y: expected a label that counts, got none in shape {y.shape}"
            )
        before = [a.copy() for a in contents.buffers]
        generators = [rng.bit_generator for rng in contents.generators]
        states = [generator.state for generator in generators]
        try:
            return self._update(x, y, contents)
        except BaseException:
            for a, value in zip(contents.buffers, before):
                a[...] = value
            for generator, state in zip(generators, states):
                generator.state = state
            raise

    def _update(self, x: Array, y: Array, contents: Contents) -> tuple[float, Array]:
        self.begin_step(contents)
        # Overflow warnings would say less, and earlier, than the check of loss and gradients.
        with running(contents, x, self.fused, self.winograd) as plan, np.errstate(all="ignore"):
            loss, outputs = self._gradients(x, y, plan, contents)
            if not math.isfinite(loss):
                self._refuse(f"the loss is {loss}", x)
            if self.clip_norm is not None:
                clip_grad_norm(self.model, self.clip_norm)
            if not self.optimizer.step_if_finite(contents.params):
                name = next(name for name, _, g in contents.params if not all_finite(g))
                self._refuse(f"the gradient of {name} is not finite (the loss is {loss:g})", x)
        return loss, outputs

    def _gradients(self, x: Array, y: Array, plan: Any, contents: Contents) -> tuple[float, Array]:
        """Return the loss and the outputs, and leave the gradients with the model."""
        if contents.on_gpu:
            from minicnn.gpu.parts import gradients

            return gradients(self, plan, x, y)
        outputs = plan.forward(x, training=True)
        loss, gradient = self._loss_and_gradient(outputs, y, plan)
        if math.isfinite(loss):
            plan.backward(gradient())
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
        wanted = any(c.needs_loss and type(c).on_step is not Callback.on_step for c in callbacks)
        with EpochBar(f"epoch {at.epoch + 1}/{last}", len(batches), at.batch, progress) as bar:
            for x, y in batches.epoch(at.epoch, start=at.batch):
                with deferred():  # the parameters and the position go together
                    loss = self._fit_step(x, y, at, batches, wanted)
                    at.seconds = time.perf_counter() - began
                bar.advance(at.metrics(classes))
                for callback in callbacks:
                    callback.on_step(self, loss)
                if self.stop and at.batch < len(batches):
                    return
            trained = self.position.metrics(classes)
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

    def _fit_step(self, x: Array, y: Array, at: Position, batches: Batches, wanted: bool) -> float:
        """Make one step and count it; return its loss, or NaN if nobody waits for it."""
        contents = contents_of(self.model)
        gpu = self._gpu_steps(contents)
        if gpu is None:
            return self.step_now(x, y, at, contents)
        loss = gpu.step(x, y, at, lambda i: next(batches.epoch(at.epoch, start=i)))
        if loss is None and wanted:
            loss = gpu.read()
        return math.nan if loss is None else loss

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
        total, parts = Position(), []
        classes = batches.y.dtype.kind in "iu"
        with np.errstate(all="ignore"):
            for x, y in batches:
                contents = contents_of(self.model)
                with running(contents, x, self.fused, self.winograd) as plan:
                    outputs = plan.forward(x, training=False)
                    loss, _ = self.loss[0](outputs, y)
                parts.append((loss, correct(outputs, y), counted(y)))
        for loss, right, count in parts:  # from the GPU now, when all has been queued
            if int(count):
                total.add(float(loss), int(right), int(count))
        return total.metrics(classes)

    def predict(self, x: Array, batch_size: int = 256) -> Array:
        """Return the model's outputs for `x`; see `predict`."""
        return predict(self.model, x, batch_size, self.fused, self.winograd)

    def plan(self) -> Plan | GpuPlan:
        """Return how the model runs: which layers in one go and by which kernels; print it.

        On the GPU it also says whether steps are recorded, and if not, why.
        """
        gpu = self._gpu_steps(contents_of(self.model))
        if gpu is None:
            return plan_of(self.model, self.fused, self.winograd)
        from minicnn.gpu.plan import GpuPlan

        plan = GpuPlan(self.model, self.fused)
        plan.note = str(gpu)
        return plan


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
