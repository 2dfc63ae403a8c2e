"""Training on the GPU: the CPU's numbers, queued without waiting, and errors where they belong."""

import gc
import math

import numpy as np
import pytest

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
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
from minicnn.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from minicnn.schedules import CosineLR
from minicnn.train import Callback, NonFiniteError, predict

F64 = {"dtype": np.float64}


def data(n=64, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2, 6, 6)).astype(dtype), rng.integers(0, 3, n)


def dense(dtype=np.float64):
    rng, d = np.random.default_rng(0), {"dtype": dtype}
    return Sequential(
        BatchNorm2d(2, **d),
        MaxPool2d(2),
        Flatten(),
        Linear(18, 7, rng=rng, **d),
        ReLU(),
        Dropout(0.3, rng=5),
        Linear(7, 3, rng=rng, **d),
    )


def norms():
    return Sequential(
        GroupNorm(2, 2, **F64), Flatten(), LayerNorm(72, **F64), Linear(72, 3, rng=0, **F64)
    )


def residual():
    body = Sequential(Linear(72, 72, rng=1, **F64), ReLU())
    return Sequential(Flatten(), Residual(body), Linear(72, 3, rng=0, **F64))


def convolutional():
    rng = np.random.default_rng(0)
    return Sequential(
        Sequential(Conv2d(2, 4, 3, padding=1, rng=rng, **F64), ReLU(), MaxPool2d(2)),
        Conv2d(4, 5, 2, bias=False, rng=rng, **F64),
        ReLU(),
        Flatten(),
        Linear(20, 3, rng=rng, **F64),
    )


def shared():
    layer = Linear(72, 72, rng=1, **F64)
    return Sequential(Flatten(), layer, ReLU(), layer, Linear(72, 3, rng=0, **F64))


OPTIMIZERS = {
    "SGD": lambda m: SGD(m, lr=0.1),
    "SGD, everything": lambda m: SGD(m, 0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "SGD, nesterov": lambda m: SGD(m, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda m: Adam(m, lr=0.01),
    "Adam, everything": lambda m: Adam(m, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda m: AdamW(m, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda m: RMSprop(m, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
}


def trainers(make=dense, optimizer="Adam", **kwargs):
    """Two trainers that start alike, the second on the GPU."""
    pair = []
    for _ in range(2):
        model = make()
        pair.append(Trainer(model, OPTIMIZERS[optimizer](model), **kwargs))
    return pair[0], to_gpu(pair[1])


def fit(trainer, sets, **kwargs):
    with use("numpy" if not is_cupy(sets[0][0]) else None):
        return trainer.fit(*sets, **{"batch_size": 16, "progress": False, "epochs": 3} | kwargs)


def both(here, there, sets, **kwargs):
    fit(here, sets, **kwargs)
    fit(there, [to_gpu(pair) for pair in sets], **kwargs)


def assert_alike(here, there, tolerance=1e-9):
    for name, a in here.model.state_dict().items():
        b = to_cpu(there.model.state_dict()[name])
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance, err_msg=name)
    state = there.optimizer.state_dict()
    for name, a in here.optimizer.state_dict().items():
        np.testing.assert_allclose(state[name], a, rtol=tolerance, atol=tolerance, err_msg=name)
    assert here.position.batch == there.position.batch
    assert here.position.epoch == there.position.epoch
    assert len(here.history) == len(there.history)
    for a, b in zip(here.history, there.history):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=tolerance, nan_ok=True), name
    for (_, a), (_, b) in zip(here.model.named_generators(), there.model.named_generators()):
        assert a.bit_generator.state == b.bit_generator.state


def recorded(trainer):
    return "steps recorded as CUDA graphs" in str(trainer.plan())


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
    if make is not convolutional:  # that depends on the kernels
        assert recorded(there), there.plan()


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
        trainer.loss = "mse", "mse"
        trainer.loss = ops.cross_entropy_forward, ops.cross_entropy_backward
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
    x[100, 0, 0, 0] = np.nan


def poison_label(x, y):
    y[100] = 7


def ignore_all(x, y):
    y[:] = -100


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
    cupy, monkeypatch, poison, error, message, epoch, read_every
):
    """However late the host reads, model and position are as the bad step found them."""
    monkeypatch.setattr(training, "READ_EVERY", read_every)
    here, there = trainers(schedule=CosineLR(0.05, 60))
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


def reading_loss():
    def forward(x, y):
        loss, cache = ops.cross_entropy_forward(x, y)
        assert float(loss) >= 0
        return loss, cache

    return forward, ops.cross_entropy_backward


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
    here, there = trainers()
    both(here, there, (data(), data(30, 1)))
    assert_alike(here, there)
    assert "steps are not recorded: no cuBLAS" in str(there.plan())


def test_the_plan_tells_what_runs(cupy):
    _, there = trainers(convolutional)
    lines = str(there.plan()).splitlines()
    assert lines[1].split("  ")[0] == "0.0, 0.1, 0.2"
    assert "Conv2d + ReLU + MaxPool2d" in lines[1]
    assert "Conv2d + ReLU" in lines[2]
    assert "steps will be recorded" in lines[-1]
    there.fused = False
    assert "(model)" in str(there.plan())


# ---------------------------------------------------------------- memory


def wide(*extra):
    rng = np.random.default_rng(0)
    return Sequential(
        Flatten(), Linear(72, 500, rng=rng, **F64), ReLU(), *extra, Linear(500, 3, rng=rng, **F64)
    )


def limit(cupy, room):
    gc.collect()
    pool = cupy.get_default_memory_pool()
    pool.set_limit(size=pool.used_bytes() + room)


def test_a_batch_that_is_too_large_is_taken_in_parts(imitated, cupy):
    x, y = data(256)
    y[5:90] = -100  # the parts do not count alike
    here, there = trainers(lambda: wide(Dropout(0.5, rng=1)))
    far = to_gpu((x, y))
    limit(cupy, 3 << 20)
    for _ in range(4):
        with use("numpy"):
            expected = here.step(x, y)
        assert there.step(*far) == pytest.approx(expected, rel=1e-9)
    assert 0 < there.part < 256
    assert_alike(here, there)
    assert "not enough memory for the arrays of a recorded step" in str(there.plan())
    with use("numpy"):
        expected, metrics = predict(here.model, x), here.evaluate((x, y))
    assert there.evaluate(far) == pytest.approx(metrics, rel=1e-9)
    np.testing.assert_allclose(to_cpu(there.predict(far[0])), expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "loss", "why"),
    [
        (lambda: Sequential(BatchNorm2d(2, **F64), wide()), "cross_entropy", "BatchNorm2d needs"),
        (wide, reading_loss(), "the loss is not known to be a mean"),
    ],
)
def test_what_cannot_be_taken_in_parts_is_refused(imitated, cupy, make, loss, why):
    _, there = trainers(make, loss=loss)
    far = to_gpu(data(256))
    before = {name: to_cpu(a) for name, a in there.model.state_dict().items()}
    limit(cupy, 1 << 20)
    with pytest.raises(MemoryError, match=rf"Trainer.step: x: 256 samples: .* {why}.* batch_size"):
        there.step(*far)
    cupy.get_default_memory_pool().set_limit()
    for name, a in there.model.state_dict().items():
        np.testing.assert_array_equal(to_cpu(a), before[name])
    there.step(*far)  # with room again


@pytest.mark.parametrize(
    ("room", "message"), [(20_000, "for a single one at a time"), (0, "no room for the update")]
)
def test_not_even_one_sample_fits(imitated, cupy, room, message):
    _, there = trainers(wide)
    far = to_gpu(data(256))
    limit(cupy, room)
    with pytest.raises(MemoryError, match=rf"Trainer.step: x: 256 samples: .*{message}"):
        there.step(*far)


def test_predictions_of_not_even_one_sample_fit(imitated, cupy):
    _, there = trainers(wide)
    far = to_gpu(data(256))
    cupy.get_default_memory_pool().set_limit(size=1)
    with pytest.raises(MemoryError, match=r"predict: x: 256 samples: .*Out of memory allocating"):
        there.predict(far[0])


def test_memory_is_given_back_before_parts_are_tried(imitated, cupy, monkeypatch):
    freed = []
    pool = cupy.get_default_memory_pool()
    monkeypatch.setattr(pool, "free_all_blocks", lambda: freed.append(pool.used_bytes()))
    _, there = trainers(wide)
    far = to_gpu(data(256))
    used = pool.used_bytes()
    limit(cupy, 3 << 20)
    there.predict(far[0])
    assert not freed
    limit(cupy, 1 << 20)
    there.predict(far[0])
    assert freed
    assert max(freed) <= used  # what the failed try held is gone
