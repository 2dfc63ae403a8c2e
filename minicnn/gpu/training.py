"""Training steps on the GPU that are queued now and read later.

A step is recorded (see `minicnn.gpu.graph`) when a batch of its shape comes for the second time.
Loss, accuracy and the check for NaN stay on the device: the host queues steps without waiting and
reads what became of them every so often. A step whose loss or gradient is not finite changes
nothing, and nor do those queued behind it. When the host learns of it, it goes back to where that
step began and makes it again the plain way, which raises the error that it deserves.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array, array_module, cupy_or_error, is_cupy
from minicnn.gpu import memory, update
from minicnn.gpu.blas import Blas
from minicnn.gpu.graph import CannotCapture, Recording
from minicnn.gpu.parts import is_plain_cross_entropy
from minicnn.gpu.plan import GpuPlan
from minicnn.layers.contents import contents_of
from minicnn.ops.softmax_cupy import labelled, labelled_applies
from minicnn.optim import sum_of_squares
from minicnn.optim_cupy import Update, finish_step
from minicnn.progress import Position, correct, counted

if TYPE_CHECKING:
    from minicnn.train import Trainer

MOST = 4  # shapes of batches that are kept recorded
READ_EVERY = 64  # steps: how far the host may run ahead

# What the device keeps count of, in float64.
LOSS, SAMPLES, CORRECT = 0, 1, 2  # sums over the steps that counted
BAD, STEPS, LAST = 3, 4, 5  # first bad step or -1; steps so far; loss of the last one
TALLY = 6

Key = tuple[Any, ...]
Batch = tuple[Array, Array]


class _Step:
    """The recorded step for one shape of batch."""

    def __init__(self, steps: GpuSteps, x: Array, y: Array) -> None:
        xp = array_module(x)
        self.x, self.y = xp.empty_like(x), xp.empty_like(y)
        self._steps, self._trainer = steps, steps.trainer
        self.recording = Recording(self._work, steps.stream, steps.blas)

    def _work(self) -> None:
        trainer, steps = self._trainer, self._steps
        model, optimizer, tally = trainer.model, trainer.optimizer, steps.tally
        xp = array_module(tally)
        params = list(model.named_params())
        running = [a for _, layer in model.modules() for a in layer.buffers.values()]
        before = [a.copy() for a in running]
        for flat in steps.flat.values():
            flat.fill(0)
        plan = GpuPlan(model, trainer.fused)
        outputs = plan.forward(self.x, training=True)
        loss, gradient, samples, hits = self._loss(outputs)
        plan.accumulate(gradient)

        grads = [g for _, _, g in params]
        ((dtype, flat),) = steps.flat.items()
        finish_step(flat, loss.astype(dtype, copy=False), samples, hits, steps.rates[dtype], tally)
        if trainer.clip_norm is not None:
            grads = _clipped(grads, trainer.clip_norm)
        if not steps.moves:
            steps.moves = update.moves(optimizer, grads)
        for dtype, move in steps.moves.items():
            move(steps.rates[dtype])
        for a, old in zip(running, before):
            xp.copyto(a, old, where=tally[BAD] >= 0)

    def _loss(self, outputs: Array) -> tuple[Array, Array, Array, Array]:
        """Return the loss, its gradient, the samples that count, and how many are right."""
        xp, y, (forward, backward) = array_module(outputs), self.y, self._trainer.loss
        if is_plain_cross_entropy(self._trainer.loss) and labelled_applies(outputs, y):
            return labelled(outputs, y)
        loss, cache = forward(outputs, y)
        numbers = (xp.asarray(n, dtype=np.int64) for n in (counted(y), correct(outputs, y)))
        return loss, backward(xp.ones_like(loss), cache), *numbers


def _clipped(grads: list[Array], max_norm: float) -> list[Array]:
    """Scale gradients as `clip_grad_norm` does, without looking at the norm."""
    norm = sum_of_squares(grads) ** 0.5
    xp = array_module(norm)
    scale = max_norm / (norm + 1e-6)
    scale = xp.where(xp.isfinite(norm) & (scale < 1), scale, 1)
    for g in grads:
        g *= scale.astype(g.dtype)
    return grads


class GpuSteps:
    """The steps of a trainer whose model is on the GPU.

    Parameters
    ----------
    trainer : Trainer

    Attributes
    ----------
    why : str
        Why steps are not recorded; empty if they are, or may be.
    """

    def __init__(self, trainer: Trainer) -> None:
        cupy = cupy_or_error()
        self.trainer = trainer
        self.why = ""
        self.stream = cupy.cuda.Stream()
        self._cupy = cupy
        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(2)]
        self.blas = Blas(self.stream)
        self.tally: Array = None  # made with the rest, where memory is known to suffice
        self.rates: dict[Any, Array] = {}
        self.moves: dict[Any, Update] = {}  # of the parameters of each dtype
        self.flat: dict[Any, Array] = {}  # the gradients of each dtype, one behind the other
        self._steps: OrderedDict[Key, _Step] = OrderedDict()
        self._seen: set[Key] = set()
        self._signature: Key = ()
        self._arrays: list[Array] = []
        self._position: Position | None = None  # whose sums the tally continues
        self._again: Callable[[int], Batch] | None = None
        self._start = 0  # number of the batch that the tally began with
        self._queued = 0  # steps since the tally began
        self._unread = 0  # of them, those that the host knows nothing of
        self._states: list[list[Any]] = []  # of the generators, before each unread step

    # ------------------------------------------------------------ one step

    def step(
        self, x: Array, y: Array, position: Position, again: Callable[[int], Batch]
    ) -> float | None:
        """Make or queue a step, and count it in `position`, at the latest when that is read.

        Parameters
        ----------
        x, y : array
        position : Position
        again : callable
            Returns the batch with the number ``position.batch`` once more, should it be needed.

        Returns
        -------
        float or None
            The loss on the batch; None if it has not been read.

        Raises
        ------
        NonFiniteError, ValueError, TypeError, MemoryError
            As `Trainer.step`, for this step or an earlier one that has been queued. What the
            position says is then where that step began.
        """
        if position is not self._position:
            self.read()
            self._position, self._queued = position, 0
        self._again = again
        try:
            step = self._ready(x, y)
        except MemoryError as error:
            self._no_memory(error)
            step = None
        if step is None or not self._queue(step, x, y):
            self.read()
            self._queued = 0
            return self._plain(x, y, position)
        if self._unread >= READ_EVERY:
            self.read()
        return None

    def _plain(self, x: Array, y: Array, position: Position) -> float:
        try:
            return self.trainer.step_now(x, y, position)
        except MemoryError as error:
            if not memory.is_out_of_memory(error):
                raise
            why = "there is no room for the update either"
            raise memory.refusal("Trainer.step", len(x), why, error) from error

    def _ready(self, x: Array, y: Array) -> _Step | None:
        """Return the recorded step that takes this batch, if there is one or it is time."""
        if not (is_cupy(x) and is_cupy(y)) or not len(x):
            return None
        self._compare()
        key = x.shape, x.dtype, y.shape, y.dtype
        if self.why:
            return None
        if key not in self._seen:  # its checks are made, and mistakes found, the plain way
            self._seen.add(key)
            return None
        if key not in self._steps:
            if len(self._steps) == MOST:
                self.read()
                self._steps.popitem(last=False)
            self._steps[key] = _Step(self, x, y)
        self._steps.move_to_end(key)
        return self._steps[key]

    def _compare(self) -> None:
        """Begin anew if the model, the optimiser or a setting is not what was recorded."""
        trainer, optimizer = self.trainer, self.trainer.optimizer
        params = list(trainer.model.named_params())
        arrays = [a for _, p, g in params for a in (p, g)]
        settings = {k: v for k, v in vars(optimizer).items() if isinstance(v, int | float | tuple)}
        settings = {k: v for k, v in settings.items() if k not in ("step_count", "_lr")}
        signature = repr(settings), trainer.clip_norm, trainer.loss, trainer.fused
        same = len(arrays) == len(self._arrays) and all(map(_is, arrays, self._arrays))
        if same and signature == self._signature:
            return
        self.read()
        self.forget()
        self._signature, self.why = signature, ""
        if not trainer.fused:
            self.why = "fused=False"
        elif type(optimizer) not in update.RULES:
            self.why = f"{type(optimizer).__name__} has no recorded update"
        elif not all(map(is_cupy, arrays)):
            self.why = "the model is not on the GPU"
        elif len({p.dtype for _, p, _ in params}) != 1:
            self.why = "there are parameters of several dtypes, or none"
        else:
            self._flatten()
        self._arrays = [a for _, p, g in trainer.model.named_params() for a in (p, g)]

    def _flatten(self) -> None:
        """Let the gradients lie one behind the other, so that one kernel reaches them all."""
        xp, layers = self._cupy, {}
        self.tally = xp.zeros(TALLY)
        for _, layer in self.trainer.model.modules():
            layers[id(layer)] = layer
        parts = [(layer, key, g) for layer in layers.values() for key, g in layer.grads.items()]
        self.flat = {
            dtype: xp.zeros(sum(g.size for _, _, g in parts if g.dtype == dtype), dtype)
            for dtype in {g.dtype for _, _, g in parts}
        }
        self.rates = {dtype: xp.zeros(update.RATES, dtype) for dtype in self.flat}
        at = dict.fromkeys(self.flat, 0)
        for layer, key, g in parts:
            start = at[g.dtype]
            at[g.dtype] += g.size
            view = self.flat[g.dtype][start : at[g.dtype]].reshape(g.shape)
            view[...] = g
            layer.grads[key] = view

    def _queue(self, step: _Step, x: Array, y: Array) -> bool:
        """Queue the step; tell whether that was possible."""
        trainer, optimizer = self.trainer, self.trainer.optimizer
        optimizer.check(trainer.model.named_params())
        generators = [rng.bit_generator for _, rng in trainer.model.named_generators()]
        states, lr = [generator.state for generator in generators], optimizer.lr
        if not self._queued:
            self._load()
        trainer.begin_step(contents_of(trainer.model))
        optimizer.step_count += 1
        numbers = update.RULES[type(optimizer)](optimizer)
        running = [a for _, layer in trainer.model.modules() for a in layer.buffers.values()]
        before = [] if step.recording.rehearsed else [a.copy() for a in running]
        done = False
        try:
            with self._in_turn():
                step.x[...], step.y[...] = x, y
                for dtype, rates in self.rates.items():
                    rates.set(np.array([0, *numbers], dtype))
                step.recording.run()
            done = True
        except CannotCapture as error:
            self._give_up(str(error))
        except MemoryError as error:
            self._no_memory(error)
        finally:
            if not done:
                optimizer.step_count -= 1
                optimizer.lr = lr
                for a, old in zip(running, before):
                    a[...] = old
                for generator, state in zip(generators, states):
                    generator.state = state
        if done:
            self._states.append(states)
            self._queued += 1
            self._unread += 1
            if self._position is not None:
                self._position.batch += 1
        return done

    @contextmanager
    def _in_turn(self) -> Iterator[None]:
        """Work on the stream of the recorded steps, between what the caller's stream does."""
        outside, (before, after) = self._cupy.cuda.get_current_stream(), self._events
        before.record(outside)
        self.stream.wait_event(before)
        with self.stream:
            yield
        after.record(self.stream)
        outside.wait_event(after)

    def _give_up(self, why: str) -> None:
        if "StreamCapture" in why:
            why = f"a layer or the loss looks at numbers on the host ({why})"
        self.forget()
        self.why = why

    def _no_memory(self, error: MemoryError) -> None:
        if not memory.is_out_of_memory(error):
            raise error
        self._give_up("there is not enough memory for the arrays of a recorded step")

    def forget(self) -> None:
        """Drop all that was recorded, and its memory."""
        self._steps.clear()
        self.moves.clear()
        self._seen.clear()

    # ------------------------------------------------------------ what became of them

    def _load(self) -> None:
        """Let the device go on counting from where the position stands."""
        at = self._position
        if at is None:
            raise RuntimeError("a step is queued before there is a position to count it in")
        self._start = at.batch
        with self._in_turn():
            self.tally.set(np.array([at.loss, at.samples, at.correct, -1, 0, 0], np.float64))

    def read(self) -> float | None:
        """Wait for all steps queued, and count them in their position.

        Returns
        -------
        float or None
            The loss of the last one; None if there was none.

        Raises
        ------
        NonFiniteError, ValueError
            If one of them was bad. Model, optimiser and position are then as that step found
            them.
        """
        if not self._unread or self._position is None:
            return None
        at, unread, states = self._position, self._unread, self._states
        self._unread, self._states = 0, []
        with self.stream:
            tally = self.tally.get()
        at.loss, at.samples, at.correct = (
            float(tally[LOSS]),
            int(tally[SAMPLES]),
            int(tally[CORRECT]),
        )
        if tally[BAD] < 0:
            return float(tally[LAST])
        undone = self._queued - int(tally[BAD])  # among those that have just been read
        at.batch = self._start + int(tally[BAD])
        self.trainer.optimizer.step_count -= undone
        generators = [rng.bit_generator for _, rng in self.trainer.model.named_generators()]
        for generator, state in zip(generators, states[unread - undone]):
            generator.state = state
        self._queued = 0
        return self._make_again(at)

    def _make_again(self, at: Position) -> float:
        from minicnn.train import NonFiniteError

        if self._again is None:
            raise RuntimeError("a step was queued without its batch")
        x, y = self._again(at.batch)
        self.trainer.step_now(x, y, at)  # raises
        raise NonFiniteError(
            f"Trainer.step: step {self.trainer.optimizer.step_count - 1}: the loss or a gradient "
            "was not finite in the recorded step, but is now that it was made again: it must be "
            "at the edge of overflow (a lower learning rate or clip_norm often helps)"
        )

    # ------------------------------------------------------------ what to tell

    @property
    def nbytes(self) -> int:
        """Bytes that the recorded steps keep for their intermediate arrays."""
        return sum(step.recording.nbytes for step in self._steps.values())

    def __str__(self) -> str:
        if self.why:
            return f"steps are not recorded: {self.why}"
        shapes = [
            "x".join(map(str, step.x.shape))
            for step in self._steps.values()
            if step.recording.captured
        ]
        if not shapes:
            return "steps will be recorded when a batch of the same shape comes again"
        return f"steps recorded as CUDA graphs for batches of {', '.join(shapes)}"


def _is(a: Any, b: Any) -> bool:
    return a is b
