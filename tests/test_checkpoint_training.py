"""Checkpoints of a training: what goes on from one is, bit for bit, what would have been."""

import json
import math
import struct

import numpy as np
import pytest
from safetensors.numpy import save as to_bytes

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    ReLU,
    Residual,
    Sequential,
    Trainer,
    save,
)
from minicnn.checkpoint import (
    DIGESTS,
    TRAINING,
    DamagedError,
    load_arrays,
    load_training,
    save_training,
)
from minicnn.layers import Layer
from minicnn.optim import SGD, Adam, AdamW, RMSprop
from minicnn.schedules import CosineLR, Warmup
from minicnn.train import Callback

OPTIMIZERS = {
    "sgd": lambda m: SGD(m, lr=0.05, momentum=0.9, weight_decay=1e-3, nesterov=True),
    "plain sgd": lambda m: SGD(m, lr=0.05),
    "adam": lambda m: Adam(m, lr=0.01, amsgrad=True),
    "adamw": lambda m: AdamW(m, lr=0.01),
    "rmsprop": lambda m: RMSprop(m, lr=0.01, momentum=0.5, centered=True),
}


class Noise(Layer):
    """A layer as a user might write one, with a generator of another kind."""

    def __init__(self, seed):
        super().__init__()
        self.source = np.random.Generator(np.random.MT19937(seed))

    def forward(self, x):
        return x + self.source.normal(0, 0.1, x.shape).astype(x.dtype), None

    def backward(self, dy, cache):
        return dy

    def __call__(self, x):
        return x


def trainer(optimizer="adamw", seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    model = Sequential(
        Conv2d(1, 2, 3, padding=1, rng=rng),
        BatchNorm2d(2),
        ReLU(),
        Residual(Sequential(Dropout(0.3, rng=seed), Conv2d(2, 2, 1, rng=rng))),
        Noise(seed),
        Flatten(),
        Dropout(0.5, rng=rng),
        Linear(32, 3, rng=rng),
    )
    kwargs = {"schedule": Warmup(3, CosineLR(0.05, 12)), "clip_norm": 1.0} | kwargs
    return Trainer(model, OPTIMIZERS[optimizer](model), **kwargs)


def data(n=22, seed=7):
    rng = np.random.default_rng(seed)
    return rng.random((n, 1, 4, 4), np.float32), rng.integers(0, 3, n)


def jitter(x, rng):
    return x + rng.normal(0, 0.05, x.shape).astype(np.float32)


EPOCHS, BATCHES = 2, 6  # 22 samples in batches of 4


def fit(trainer, *callbacks, epochs=EPOCHS):
    trainer.fit(
        data(), data(9, 8), epochs=epochs, batch_size=4, seed=3, augment=jitter,
        callbacks=callbacks, progress=False,
    )  # fmt: skip
    return trainer


def everything(trainer):
    """All state in bytes; the seconds of an epoch alone are of no account."""
    arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return (
        {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()},
        trainer.optimizer.lr,
        [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history],
        repr([rng.bit_generator.state for _, rng in trainer.model.named_generators()]),
        vars(trainer.position) | {"seconds": 0},
    )


class StopAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_step(self, trainer, loss):
        trainer.stop = trainer.optimizer.step_count == self.step


@pytest.fixture(scope="module")
def undisturbed():
    return everything(fit(trainer()))


@pytest.mark.parametrize("step", range(EPOCHS * BATCHES))
def test_from_any_step(step, tmp_path, undisturbed):
    first = trainer()
    fit(first, StopAfter(step)) if step else None
    assert first.optimizer.step_count == step
    save_training(first, tmp_path / "c")
    other = trainer(seed=9)
    assert load_training(other, tmp_path / "c") is other
    assert everything(other) == everything(first)
    assert everything(fit(other, epochs=EPOCHS - other.position.epoch)) == undisturbed


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_with_any_optimizer(optimizer, tmp_path):
    save_training(fit(trainer(optimizer), StopAfter(8)), tmp_path / "c")
    other = load_training(trainer(optimizer, seed=9), tmp_path / "c")
    assert everything(fit(other, epochs=1)) == everything(fit(trainer(optimizer)))


@pytest.mark.parametrize(
    "kind",
    [
        np.random.PCG64,
        np.random.PCG64DXSM,
        np.random.MT19937,
        np.random.Philox,
        np.random.SFC64,
    ],
)
def test_with_any_generator(kind, tmp_path):
    def dropping(seed):
        model = Sequential(Dropout(0.5, rng=np.random.Generator(kind(seed))), Linear(2, 2, rng=0))
        return Trainer(model, SGD(model, lr=0.1))

    first, other = dropping(1), dropping(2)
    rng = first.model[0].rng
    rng.random(3, np.float32)  # uses half of a word, so that the other half is part of the state
    save_training(first, tmp_path / "c")
    load_training(other, tmp_path / "c")
    assert (
        rng.random(1000, np.float32).tobytes()
        == other.model[0].rng.random(1000, np.float32).tobytes()
    )


def test_a_history_with_nan_and_a_rate_set_by_hand_come_back(tmp_path):
    first = trainer(schedule=None)
    first.history.append({"epoch": 1, "test_loss": math.nan, "train_loss": 0.1 + 0.2})
    first.optimizer.lr = 1 / 3
    save_training(first, tmp_path / "c")
    other = load_training(trainer(schedule=None), tmp_path / "c")
    assert other.optimizer.lr == 1 / 3
    assert math.isnan(other.history[0].pop("test_loss"))
    assert other.history == [{"epoch": 1, "train_loss": 0.1 + 0.2}]


def test_arrays_stand_in_the_file_under_names_that_say_what_they_are(tmp_path):
    save_training(fit(trainer()), tmp_path / "c")
    names = set(load_arrays(tmp_path / "c"))
    expected = {"model.0.weight", "model.1.running_mean", "optimizer.step"}
    assert expected | {"optimizer.0.weight.exp_avg"} <= names
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "optimizer: expected a trainer with AdamW, got one with Adam"),
        ({"optimizer": "sgd"}, "expected a trainer with"),
        ({"clip_norm": None}, "clip_norm: expected a trainer with 1.0, got one with None"),
        ({"schedule": None}, "schedule: expected a trainer with Warmup.* got one with None"),
        ({"schedule": CosineLR(0.05, 12)}, "schedule: expected"),
    ],
    ids=str,
)
def test_another_trainer_is_refused_and_left_alone(changes, message, tmp_path):
    save_training(fit(trainer()), tmp_path / "c")
    other = trainer(seed=9, **changes)
    before = everything(other)
    with pytest.raises(ValueError, match=message):
        load_training(other, tmp_path / "c")
    assert everything(other) == before


def test_settings_are_compared_to_the_last(tmp_path):
    def other(**settings):
        model = Linear(2, 2, rng=0)
        return Trainer(model, Adam(model, **settings))

    save_training(other(betas=(0.5, 0.6)), tmp_path / "c")
    load_training(other(betas=(0.5, 0.6), lr=5.0), tmp_path / "c")
    with pytest.raises(ValueError, match=r"betas: expected a trainer with \[0.5, 0.6\], got"):
        load_training(other(), tmp_path / "c")


def test_schedules_that_are_functions_are_equal_by_name(tmp_path):
    save_training(trainer(schedule=lambda step: 0.1), tmp_path / "c")
    load_training(trainer(schedule=lambda step: 0.1), tmp_path / "c")


@pytest.mark.parametrize(
    "other",
    [
        lambda: Sequential(Linear(2, 3, rng=0)),
        lambda: Sequential(Linear(2, 2, rng=0), Linear(2, 2, rng=0)),
        lambda: Sequential(Linear(2, 2, rng=0), Dropout(0.5, rng=0)),
        lambda: Sequential(Linear(2, 2, rng=0), BatchNorm2d(1)),
    ],
)
def test_another_model_is_refused_and_left_alone(other, tmp_path):
    model, another = Sequential(Linear(2, 2, rng=1)), other()
    save_training(Trainer(model, SGD(model, lr=0.1, momentum=0.5)), tmp_path / "c")
    second = Trainer(another, SGD(another, lr=0.1, momentum=0.5))
    before = everything(second)
    with pytest.raises(ValueError, match=r"c: .*expected"):
        load_training(second, tmp_path / "c")
    assert everything(second) == before


def test_what_fails_after_the_model_was_loaded_gives_it_back(tmp_path):
    save_training(fit(trainer()), tmp_path / "c")
    edited = edit(tmp_path / "c", lambda state: state["generators"].update({"4.source": {}}))
    other = trainer(seed=9)
    before = everything(other)
    with pytest.raises(ValueError, match="c: "):
        load_training(other, edited)
    assert everything(other) == before


def edit(path, change):
    """Change the part of a checkpoint that is no array, and give it the right sha256."""
    import hashlib

    raw = path.read_bytes()
    (n,) = struct.unpack("<Q", raw[:8])
    metadata = json.loads(raw[8 : 8 + n])["__metadata__"]
    state, digests = json.loads(metadata[TRAINING]), json.loads(metadata[DIGESTS])
    change(state)
    metadata[TRAINING] = json.dumps(state)
    digests[TRAINING] = hashlib.sha256(metadata[TRAINING].encode()).hexdigest()
    metadata[DIGESTS] = json.dumps(digests)
    path.write_bytes(to_bytes(load_arrays(path), metadata))
    return path


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("position"),
        lambda state: state.update(history=[1]),
        lambda state: state.update(history=5),
        lambda state: state.update(lr="fast"),
        lambda state: state.update(lr=-1),
        lambda state: state["position"].update(batch=-1),
        lambda state: state["position"].update(epoch=1.5),
        lambda state: state["position"].update(loss=None),
        lambda state: state["position"].update(more=1),
        lambda state: state.update(generators=[1, 2]),
        lambda state: state.update(settings=None),
    ],
)
def test_a_state_that_cannot_be_is_named(change, tmp_path):
    save_training(trainer(), tmp_path / "c")
    other = trainer(seed=9)
    before = everything(other)
    with pytest.raises(DamagedError, match=f"c: {TRAINING}: expected the state of a training"):
        load_training(other, edit(tmp_path / "c", change))
    assert everything(other) == before


def test_weights_alone_are_no_checkpoint(tmp_path):
    save(trainer().model, tmp_path / "w")
    with pytest.raises(ValueError, match=r"w: expected the checkpoint .* \(fix: minicnn.load\)"):
        load_training(trainer(), tmp_path / "w")
    with pytest.raises(FileNotFoundError, match="none: expected a weight file, got none"):
        load_training(trainer(), tmp_path / "none")


def test_a_flipped_bit_anywhere_changes_nothing(tmp_path):
    """In every tensor, and in every eighth byte of the header with the rest of the state."""
    model = Sequential(Dropout(0.5, rng=0), Linear(2, 2, rng=0))
    first = Trainer(model, SGD(model, lr=0.1, momentum=0.9))
    first.step(np.ones((2, 2), np.float32), np.array([0, 1]))
    path = tmp_path / "c"
    save_training(first, path)
    expected, whole = everything(first), path.read_bytes()
    (header,) = struct.unpack("<Q", whole[:8])
    places = [*range(0, header, 8), *range(8 + header, len(whole))]
    for k, place in enumerate(places):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << k % 8
        path.write_bytes(damaged)
        other = Sequential(Dropout(0.5, rng=1), Linear(2, 2, rng=1))
        second = Trainer(other, SGD(other, lr=0.1, momentum=0.9))
        before = everything(second)
        try:
            load_training(second, path)
        except ValueError:
            assert everything(second) == before
        else:  # a bit in a blank, or in the name of an entry that is not read
            assert everything(second) == expected


def test_a_cut_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c"
    save_training(trainer(), path)
    whole = path.read_bytes()
    for keep in (*range(0, len(whole), 97), len(whole) - 1):
        path.write_bytes(whole[:keep])
        with pytest.raises(DamagedError, match="expected a whole safetensors file"):
            load_training(trainer(), path)
