"""Training on the GPU: the CPU's numbers, queued without waiting, and errors where they belong."""

import math
from functools import partial

import numpy as np
import pytest

from gpu_networks import (
    F64,
    OPTIMIZERS,
    assert_alike,
    both,
    convolutional,
    data,
    dense,
    fit,
    norms,
    reading_loss,
    recorded,
    residual,
    shared,
    trainers,
)
from minicnn import (
    BatchNorm2d,
    Flatten,
    Linear,
    Sequential,
    Trainer,
    checkpoint,
    ops,
    to_cpu,
    to_gpu,
    use,
)
from minicnn.backend import is_cupy
from minicnn.gpu import training
from minicnn.ops import softmax_cupy
from minicnn.optim import Adam, Optimizer
from minicnn.schedules import CosineLR
from minicnn.train import LOSSES, Callback, NonFiniteError, predict

# ---------------------------------------------------------------- the same numbers


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fit_equals_the_cpu(cupy, optimizer):
    here, there = trainers(optimizer=optimizer, schedule=CosineLR(0.05, 15), clip_norm=0.5)
    both(here, there, (data(70), data(30, 1)))  # 4 batches of 16 and one of 6
    assert_alike(here, there)
    assert recorded(there), there.plan()
    assert "16x2x6x6, 6x2x6x6" in str(there.plan())


@pytest.mark.parametrize("make", [norms, residual, convolutional, shared])
def test_networks(cupy, make):
    here, there = trainers(make)
    both(here, there, (data(), data(30, 1)))
    assert_alike(here, there)
    assert recorded(there), there.plan()


def test_parameters_of_two_dtypes(cupy):
    """A layer may cast what passes through it: such steps run one op after the other."""

    class Half(Flatten):
        def forward(self, x):
            return super().forward(x.astype(np.float32))

        def backward(self, dy, cache):
            return super().backward(dy, cache).astype(np.float64)

    here, there = trainers(
        lambda: Sequential(BatchNorm2d(2, dtype=np.float64), Half(), Linear(72, 3, rng=0))
    )
    both(here, there, (data(),))
    assert_alike(here, there, 1e-5)
    assert "parameters of several dtypes" in str(there.plan())


def test_float32(cupy):
    here, there = trainers(lambda: dense(np.float32))
    both(here, there, (data(dtype=np.float32), data(30, 1, np.float32)))
    assert_alike(here, there, 1e-5)
    assert recorded(there)


@pytest.mark.parametrize("loss", ["mse_loss", "l1_loss", "bce_with_logits"])
def test_losses_without_classes(cupy, loss):
    x, _ = data()
    y = np.random.default_rng(2).random((64, 3))
    here, there = trainers(residual, loss=loss)
    both(here, there, ((x, y), (x, y)))
    assert_alike(here, there)
    assert recorded(there)
    assert math.isnan(there.history[-1]["train_accuracy"])


@pytest.mark.parametrize(("smoothing", "fused"), [(None, True), (0.0, True), (0.1, False)])
def test_smoothed_labels(cupy, monkeypatch, smoothing, fused):
    """Cross-entropy in one kernel takes no smoothing; `minicnn train` binds one of 0 as well."""
    calls = []
    monkeypatch.setattr(
        training, "labelled", lambda *args: calls.append(1) or softmax_cupy.labelled(*args)
    )
    forward, backward = LOSSES["cross_entropy"]
    if smoothing is not None:
        forward = partial(forward, label_smoothing=smoothing)
    here, there = trainers(loss=(forward, backward))
    both(here, there, (data(), data(30, 1)))
    assert_alike(here, there)
    assert recorded(there)
    assert bool(calls) == fused


def test_ignored_labels_count_nothing(cupy):
    x, y = data()
    y[::3] = -100
    here, there = trainers()
    both(here, there, ((x, y), (x, y)))
    assert_alike(here, there)


def test_single_steps(cupy):
    here, there = trainers()
    x, y = data(16)
    losses = []
    for trainer, batch in ((here, (x, y)), (there, to_gpu((x, y)))):
        with use("numpy" if trainer is here else None):
            losses.append([trainer.step(*batch) for _ in range(6)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-9)
    assert all(isinstance(loss, float) for loss in losses[1])
    assert recorded(there)
    assert_alike(here, there)
    assert there.position.samples == 0  # of an epoch, which these steps are no part of


def test_what_changes_between_steps_is_noticed(cupy):
    """Settings, weights and places: a recorded step is not replayed with stale ones."""
    here, there = trainers()
    x, y = data(16)
    far = to_gpu((x, y))

    def steps(n):
        for _ in range(n):
            with use("numpy"):
                here.step(x, y)
            there.step(*far)
        assert_alike(here, there)

    steps(4)
    for trainer in (here, there):
        trainer.optimizer.lr = 0.2
    steps(1)
    for trainer in (here, there):
        trainer.optimizer.betas, trainer.clip_norm = (0.5, 0.5), 0.1
    steps(4)
    for trainer in (here, there):
        trainer.model.load_state_dict(dense().state_dict())
    steps(1)
    assert recorded(there)
    to_gpu(to_cpu(there))
    steps(4)
    assert recorded(there)
    for trainer in (here, there):
        trainer.model.layers[-1] = (
            to_gpu(Linear(7, 3, rng=9, **F64)) if trainer is there else (Linear(7, 3, rng=9, **F64))
        )
    steps(4)


def test_predictions_and_evaluation(cupy):
    here, there = trainers(convolutional)
    x, y = data(50)
    outputs = there.predict(to_gpu(x), batch_size=16)
    assert is_cupy(outputs)
    with use("numpy"):
        expected, metrics = predict(here.model, x), here.evaluate((x, y), 16)
    np.testing.assert_allclose(to_cpu(outputs), expected, rtol=1e-9)
    assert predict(there.model, to_gpu(x[:0])).shape == (0, 3)
    assert there.evaluate(to_gpu((x, y)), 16) == pytest.approx(metrics, rel=1e-9)


# ---------------------------------------------------------------- nobody waits


def test_steps_are_queued_without_reading(imitated, cupy, monkeypatch):
    _, there = trainers()
    far = to_gpu(data(16 * 20))
    fit(there, [far], epochs=1)
    before = imitated.reads, imitated.launches
    fit(there, [far], epochs=1)
    # The state of each dropout mask goes up; what comes down is the tally, once.
    assert imitated.launches - before[1] == 20
    assert imitated.reads - before[0] <= 2
    monkeypatch.setattr(training, "READ_EVERY", 5)
    before = imitated.reads
    fit(there, [far], epochs=1)
    assert 4 <= imitated.reads - before <= 6


def test_callbacks_get_the_loss_if_they_want_it(cupy):
    class Watch(Callback):
        def __init__(self, needs_loss):
            self.needs_loss, self.seen, self.steps = needs_loss, [], []

        def on_step(self, trainer, loss):
            self.seen.append(loss)
            self.steps.append(trainer.optimizer.step_count)

    here, there = trainers()
    wants, does_not, expected = Watch(True), Watch(False), Watch(True)
    sets = (data(),)
    fit(here, sets, callbacks=[expected])
    fit(there, [to_gpu(sets[0])], callbacks=[wants])
    np.testing.assert_allclose(wants.seen, expected.seen, rtol=1e-9)
    fit(there, [to_gpu(sets[0])], callbacks=[does_not], epochs=1)
    assert np.isnan(does_not.seen).all()
    assert does_not.steps == [13, 14, 15, 16]


def test_a_checkpoint_amid_an_epoch_goes_on_alike(cupy, tmp_path):
    class Save(Callback):
        needs_loss = False

        def on_step(self, trainer, loss):
            if trainer.optimizer.step_count == 11:
                checkpoint.save_training(trainer, tmp_path / "c.safetensors")

    _, there = trainers()
    far = to_gpu(data(80))
    fit(there, [far], callbacks=[Save()])
    _, again = trainers()
    checkpoint.load_training(again, tmp_path / "c.safetensors")
    assert (again.position.epoch, again.position.batch) == (2, 1)
    fit(again, [far], epochs=1)
    assert_alike(to_cpu(there), to_cpu(again))


# ---------------------------------------------------------------- errors


def poison_pixel(x, y):
    x[[10, 50, 100], 0, 0, 0] = np.nan  # in three batches: the first counts


def poison_label(x, y):
    y[100] = 7


def ignore_all(x, y):
    y[:] = -100


def smoothed():
    """A loss that has no kernel of its own."""
    return partial(ops.cross_entropy_forward, label_smoothing=0.1), ops.cross_entropy_backward


@pytest.mark.parametrize("loss", ["cross_entropy", smoothed()], ids=["plain", "smoothed"])
@pytest.mark.parametrize("read_every", [1, 3, 64])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize(
    ("poison", "error", "message"),
    [
        (poison_pixel, NonFiniteError, r"step \d+: the loss is nan; first in the input"),
        (poison_label, ValueError, r"cross_entropy: target: expected labels in 0..2, got 7"),
    ],
)
def test_a_bad_batch_stops_training_where_it_came(
    cupy, monkeypatch, poison, error, message, epoch, read_every, loss
):
    """However late the host reads, model and position are as the bad step found them."""
    monkeypatch.setattr(training, "READ_EVERY", read_every)
    here, there = trainers(schedule=CosineLR(0.05, 60), loss=loss)
    x, y = data(128)
    both(here, there, ((x, y),), epochs=epoch)
    poison(x, y)
    messages = []
    for trainer, pair in ((here, (x, y)), (there, to_gpu((x, y)))):
        with pytest.raises(error, match=message) as caught:
            fit(trainer, [pair], epochs=1)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert here.position.samples == there.position.samples
    assert here.position.loss == pytest.approx(there.position.loss, rel=1e-9)
    assert_alike(here, there)
    with pytest.raises(error, match=message):  # once more, from there
        fit(there, [to_gpu((x, y))], epochs=1)
    good = data(128)
    both(here, there, (good,), epochs=1)
    assert_alike(here, there)


def test_a_gradient_that_is_not_finite(cupy):
    x, y = data(16)
    off = {False: np.zeros(()), True: cupy.zeros(())}

    def backward(dloss, cache):
        dx = ops.cross_entropy_backward(dloss, cache)
        return dx / (1 - off[is_cupy(dx)])

    here, there = trainers(loss=(ops.cross_entropy_forward, backward))
    batches = (here, (x, y)), (there, to_gpu((x, y)))
    for turn in range(5):
        for trainer, batch in batches:
            off[trainer is there].fill(turn == 4)
            with use("numpy" if trainer is here else None):
                if turn < 4:
                    trainer.step(*batch)
                    continue
                with pytest.raises(NonFiniteError, match=r"step 4: the gradient of 0.weight is"):
                    trainer.step(*batch)
    assert_alike(here, there)
    assert recorded(there)


def test_arrays_on_two_devices_are_refused(cupy):
    here, there = trainers(convolutional)
    x, y = data(16)
    with pytest.raises(TypeError, match=r"conv_block: w: expected a NumPy array .* got a CuPy"):
        there.step(x, y)
    with pytest.raises(TypeError, match=r"w: expected a CuPy array .* got a NumPy array"):
        here.step(to_gpu(x), to_gpu(y))
    with pytest.raises(TypeError, match=r"target: expected the labels on the device of the scores"):
        there.step(to_gpu(x), y)
    with pytest.raises(TypeError, match=r"conv_block: w: expected a NumPy array .* got a CuPy"):
        there.fit((x, y), progress=False)
    with pytest.raises(TypeError, match=r"conv_block: w: expected a NumPy array .* got a CuPy"):
        there.predict(x)
    to_cpu(there.model)
    with (
        use("numpy"),
        pytest.raises(ValueError, match=r"Adam: 0.0.weight: expected cupy .* got n"),
    ):
        there.step(x, y)


# ---------------------------------------------------------------- when it cannot be recorded


class Plain(Optimizer):
    def __init__(self, model):
        super().__init__(model, 0.1, [])

    def _update(self, p, g, state, t):
        p -= self.lr * g


@pytest.mark.parametrize(
    ("kwargs", "why"),
    [
        ({"optimizer": Plain}, "Plain has no recorded update"),
        ({"fused": False}, "fused=False"),
        ({"loss": reading_loss()}, "a layer or the loss looks at numbers on the host"),
    ],
)
def test_it_falls_back_and_says_why(imitated, cupy, kwargs, why):
    pair = []
    for _ in range(2):
        model = dense()
        options = dict(kwargs)
        pair.append(Trainer(model, options.pop("optimizer", Adam)(model), **options))
    here, there = pair[0], to_gpu(pair[1])
    both(here, there, (data(), data(30, 1)))
    assert_alike(here, there)
    assert f"steps are not recorded: {why}" in str(there.plan())
    assert not there._gpu._steps


def test_without_cublas_it_falls_back(imitated, cupy, monkeypatch):
    def library():
        raise training.CannotCapture("no cuBLAS")

    monkeypatch.setattr("minicnn.gpu.blas.library", library)
    monkeypatch.setattr("minicnn.ops.linear_cupy.MOST_TERMS", 0)  # small products do without
    here, there = trainers()
    both(here, there, (data(), data(30, 1)))
    assert_alike(here, there)
    assert "steps are not recorded: no cuBLAS" in str(there.plan())
