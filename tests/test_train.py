"""Training: one step by hand, epochs, evaluation, and what stops it."""

import math

import numpy as np
import pytest

import minicnn as mc
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
    ops,
)
from minicnn.data import Batches
from minicnn.optim import SGD, Adam
from minicnn.schedules import CosineLR
from minicnn.train import Callback, NonFiniteError, predict


def toy(n=60, seed=0):
    """Pictures of two classes: bright on the left, bright on the right."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 2, n)
    x = rng.random((n, 1, 4, 4), np.float32) * 0.5
    for i, label in enumerate(y):
        x[i, 0, :, 2 * label : 2 * label + 2] += 0.5
    return x, y


def network(rng=0, **kwargs):
    rng = np.random.default_rng(rng)
    return Sequential(
        Conv2d(1, 3, 3, padding=1, rng=rng, **kwargs),
        ReLU(),
        Flatten(),
        Linear(48, 2, rng=rng, **kwargs),
    )


def trainer_for(model, lr=0.1, **kwargs):
    return Trainer(model, SGD(model, lr=lr), **kwargs)


def test_one_step_is_forward_loss_backward_update():
    x, y = toy(8)
    model, twin = network(), network()
    out, caches = twin.forward(x)
    loss, cache = ops.cross_entropy_forward(out, y)
    twin.backward(ops.cross_entropy_backward(np.float32(1), cache), caches)
    for _, p, g in twin.named_params():
        p -= np.float32(0.1) * g
    assert trainer_for(model).step(x, y) == pytest.approx(float(loss), rel=1e-6)
    for (name, p, _), (_, expected, _) in zip(model.named_params(), twin.named_params()):
        np.testing.assert_allclose(p, expected, rtol=1e-5, atol=1e-7, err_msg=name)


def test_steps_do_not_accumulate_gradients():
    x, y = toy(8)
    model = network()
    trainer = trainer_for(model, lr=0.0)
    trainer.step(x, y)
    once = [g.copy() for _, _, g in model.named_params()]
    trainer.step(x, y)
    for (_, _, g), expected in zip(model.named_params(), once):
        np.testing.assert_array_equal(g, expected)


def test_fit_learns_and_records():
    train, test = toy(100), toy(50, seed=1)
    model = network()
    history = Trainer(model, Adam(model, lr=0.02)).fit(
        train, test, epochs=5, batch_size=16, progress=False
    )
    assert [record["epoch"] for record in history] == [1, 2, 3, 4, 5]
    assert [record["step"] for record in history] == [7, 14, 21, 28, 35]
    last = history[-1]
    assert last["train_loss"] < history[0]["train_loss"]
    assert last["train_accuracy"] > 0.95
    assert last["test_accuracy"] > 0.95
    assert last["seconds"] > 0


def test_recorded_means_weigh_the_short_last_batch():
    """With a learning rate of 0 the running mean is the mean over the whole set."""
    train = toy(50)
    trainer = trainer_for(network(), lr=0.0)
    (record,) = trainer.fit(train, train, batch_size=16, progress=False)
    assert record["train_loss"] == pytest.approx(record["test_loss"], rel=1e-6)
    assert record["train_accuracy"] == record["test_accuracy"]
    outputs = trainer.predict(train[0], batch_size=7)
    loss, _ = ops.cross_entropy_forward(outputs, train[1])
    assert record["test_loss"] == pytest.approx(float(loss), rel=1e-6)
    assert record["test_accuracy"] == np.mean(outputs.argmax(axis=1) == train[1])


def test_fit_in_parts_equals_fit_at_once():
    class StopAt(Callback):
        def __init__(self, step):
            self.at = step

        def on_step(self, trainer, loss):
            if trainer.optimizer.step_count == self.at:
                trainer.stop = True

    train, test = toy(50), toy(20, seed=1)
    runs = []
    for stop_at in (None, 4, 6, 8):
        model = network()
        trainer = Trainer(model, Adam(model), schedule=CosineLR(0.01, 12))
        kwargs = {"batch_size": 16, "progress": False, "seed": 3}
        if stop_at:
            trainer.fit(train, test, epochs=3, callbacks=[StopAt(stop_at)], **kwargs)
            assert trainer.optimizer.step_count == stop_at
        trainer.fit(train, test, epochs=3 - trainer.position.epoch, **kwargs)
        history = [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history]
        runs.append((history, [p.tobytes() for _, p, _ in model.named_params()]))
    assert all(run == runs[0] for run in runs)


def test_schedule_sets_the_rate_of_each_step():
    rates = []

    class Watch(Callback):
        def on_step(self, trainer, loss):
            rates.append(trainer.optimizer.lr)

    schedule = CosineLR(0.01, 8)
    trainer_for(network(), schedule=schedule).fit(
        toy(32), epochs=2, batch_size=8, callbacks=[Watch()], progress=False
    )
    assert rates == [schedule(i) for i in range(8)]


def test_modes_dropout_in_steps_and_not_in_evaluation():
    model = Sequential(Flatten(), Dropout(0.5, rng=0), Linear(16, 2, rng=0))
    model.eval()
    trainer = trainer_for(model)
    x, y = toy(20)
    first = trainer.evaluate((x, y))
    trainer.step(x, y)
    assert model.training
    assert first == trainer_for(Sequential(Flatten(), Linear(16, 2, rng=0))).evaluate((x, y))


def test_evaluation_leaves_the_running_statistics():
    model = Sequential(BatchNorm2d(1), Flatten(), Linear(16, 2, rng=0))
    before = model.state_dict()
    trainer_for(model).evaluate(toy(10))
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_clip_norm_bounds_the_update():
    x, y = toy(8)
    model = network()
    before = model.state_dict()
    trainer_for(model, lr=1.0, clip_norm=1e-3).step(x, y)
    moved = sum(((a - before[name]) ** 2).sum() for name, a in model.state_dict().items())
    assert math.sqrt(moved) == pytest.approx(1e-3, rel=0.01)


def test_regression_has_no_accuracy():
    model = Sequential(Flatten(), Linear(16, 1, rng=0))
    x, _ = toy(40)
    y = x.reshape(40, -1).sum(axis=1, keepdims=True)  # (N, 1)
    trainer = trainer_for(model, lr=0.01, loss="mse_loss")
    first = trainer.step(x, y)
    for _ in range(20):
        last = trainer.step(x, y)
    assert last < first
    (record,) = trainer.fit((x, y), (x, y), progress=False)
    assert math.isnan(record["train_accuracy"])
    assert math.isnan(record["test_accuracy"])
    assert record["test_loss"] < first


def test_losses_by_name_and_by_pair():
    x, y = toy(8)
    by_pair = (ops.cross_entropy_forward, ops.cross_entropy_backward)
    losses = [trainer_for(network(), loss=loss).step(x, y) for loss in ("cross_entropy", by_pair)]
    assert losses[0] == losses[1]
    with pytest.raises(ValueError, match=r"Trainer: loss: expected one of .* got 'hinge'"):
        trainer_for(network(), loss="hinge")


def poison_input(model, x):
    x[1, 0, 2, 2] = np.nan


def poison_weight(model, x):
    model[3].weight[0, 0] = np.inf


def poison_middle(model, x):
    model[0].weight[...] = 3e38  # finite, but its products are not


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        (poison_input, "the input"),
        (poison_weight, "parameter 3.weight"),
        (poison_middle, r"the output of layer 0 \(Conv2d\)"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_non_finite_loss_names_step_and_layer(poison, where):
    model = network()
    trainer = trainer_for(model)
    x, y = toy(8)
    trainer.step(x, y)
    poison(model, x)
    before = [p.tobytes() for _, p, _ in model.named_params()]
    with pytest.raises(NonFiniteError, match=rf"step 1: the loss is (nan|inf); first in {where}"):
        trainer.step(x, y)
    assert [p.tobytes() for _, p, _ in model.named_params()] == before, "it was updated"


def test_a_non_finite_gradient_names_step_and_parameter():
    model = network()

    def backward(dy, cache):
        dx = ops.cross_entropy_backward(dy, cache)
        dx[0, 0] = np.nan
        return dx

    trainer = trainer_for(model, loss=(ops.cross_entropy_forward, backward))
    with pytest.raises(NonFiniteError, match=r"step 0: the gradient of 0.weight is not finite"):
        trainer.step(*toy(8))


def test_an_error_leaves_the_running_statistics_too():
    model = Sequential(Conv2d(1, 2, 3, rng=0), BatchNorm2d(2), Flatten(), Linear(8, 2, rng=0))
    trainer = trainer_for(model)
    x, y = toy(8)
    trainer.step(x, y)
    before = model.state_dict()
    bad = x.copy()
    bad[0, 0, 0, 0] = np.nan
    for inputs, targets in ((bad, y), (x, y + 5)):
        with pytest.raises((NonFiniteError, ValueError)):
            trainer.step(inputs, targets)
        for name, a in model.state_dict().items():
            np.testing.assert_array_equal(a, before[name])


def test_an_error_leaves_the_random_generators_too():
    model = Sequential(Flatten(), Dropout(0.5, rng=0), Linear(16, 2, rng=0))
    trainer, (x, y) = trainer_for(model), toy(8)
    before = model[1].rng.bit_generator.state
    with pytest.raises(NonFiniteError):
        trainer.step(np.full_like(x, np.nan), y)
    assert model[1].rng.bit_generator.state == before


def test_a_non_finite_output_is_found_inside_a_residual_block():
    rng = np.random.default_rng(0)
    body = Sequential(ReLU(), Conv2d(1, 1, 3, padding=1, rng=rng))
    model = Sequential(Residual(body), Flatten(), Linear(16, 2, rng=rng))
    body[1].weight[...] = 3e38
    with pytest.raises(NonFiniteError, match=r"the output of layer 0.body.1 \(Conv2d\)"):
        trainer_for(model).step(*toy(8))


def test_dense_labels_and_ignored_ones():
    """One label a pixel: each counts once, and those of ignore_index not at all."""
    model = Sequential(Conv2d(1, 2, 1, rng=0))
    x, _ = toy(6)
    y = np.random.default_rng(0).integers(0, 2, (6, 4, 4))
    y[:3] = -100
    metrics = trainer_for(model).evaluate((x, y), batch_size=3)
    outputs = model(x[3:])
    loss, _ = ops.cross_entropy_forward(outputs, y[3:])
    assert metrics.loss == pytest.approx(float(loss), rel=1e-6)
    assert metrics.accuracy == np.mean(outputs.argmax(axis=1) == y[3:])
    with pytest.raises(ValueError, match=r"Trainer.step: y: expected a label that counts"):
        trainer_for(model).step(x[:3], y[:3])


def test_a_line_an_epoch_where_there_is_no_terminal(capsys):
    trainer_for(network()).fit(toy(32), toy(10), epochs=2, batch_size=16)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert "test" in lines[0]
    assert "%" in lines[0]
    trainer_for(network()).fit(toy(32), epochs=1, progress=False)
    assert capsys.readouterr().err == ""


def test_a_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trainer_for(network()).fit(toy(32), epochs=1, batch_size=16)
    err = capsys.readouterr().err
    assert "epoch 1/1" in err
    assert "2/2" in err


def test_predict_in_batches_and_of_nothing():
    model = network()
    x, _ = toy(10)
    whole = model(x)
    np.testing.assert_allclose(predict(model, x, batch_size=3), whole, rtol=1e-5, atol=1e-6)
    assert predict(model, x[:0]).shape == (0, 2)
    with pytest.raises(ValueError, match="predict: batch_size: expected an integer >= 1, got 0"):
        predict(model, x, batch_size=0)


def test_batches_may_be_given_ready_made():
    model = network()
    trainer = trainer_for(model)
    (record,) = trainer.fit(Batches(toy(40), 10, drop_last=True), progress=False)
    assert record["step"] == 4


def test_bad_arguments_are_named():
    model = network()
    with pytest.raises(ValueError, match="Trainer: optimizer: expected one built on this model"):
        Trainer(network(), SGD(model, lr=0.1))
    with pytest.raises(ValueError, match="Trainer: clip_norm: expected a number > 0, got 0"):
        trainer_for(model, clip_norm=0)
    with pytest.raises(TypeError, match="Trainer: loss: expected a name or a pair"):
        trainer_for(model, loss=ops.cross_entropy_forward)
    with pytest.raises(TypeError, match="Trainer: schedule: expected a function of the step"):
        trainer_for(model, schedule=0.1)
    with pytest.raises(ValueError, match="fit: train: expected at least one sample"):
        trainer_for(model).fit((np.zeros((0, 1, 4, 4), "f4"), np.zeros(0, int)))
    with pytest.raises(TypeError, match=r"Batches: data: expected a Dataset or a pair"):
        trainer_for(model).fit(toy(8), toy(8)[0])
    with pytest.raises(ValueError, match="epochs: expected an integer >= 0, got -1"):
        trainer_for(model).fit(toy(8), epochs=-1)
    with pytest.raises(ValueError, match="evaluate: data: expected at least one sample"):
        trainer_for(model).evaluate((np.zeros((0, 1, 4, 4), "f4"), np.zeros(0, int)))
    with pytest.raises(ValueError, match=r"cross_entropy: target: expected labels in 0..1, got 7"):
        trainer_for(model).step(toy(4)[0], np.array([0, 1, 7, 0]))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda t, x, y: t.step(x, y.tolist()), "Trainer.step: y: expected an array .*, got list"),
        (lambda t, x, y: t.step(None, y), "Trainer.step: x: expected an array .*, got NoneType"),
        (lambda t, x, y: t.fit((x, y), callbacks=[3]), "callbacks: expected .*, got .3."),
        (lambda t, x, y: t.fit((x, y), callbacks=3), "callbacks: expected .*, got 3"),
        (lambda t, x, y: t.fit((x, y), augment="flip"), "augment: expected a function.*'flip'"),
        (lambda t, x, y: t.evaluate(3), "data: expected a Dataset or a pair .*, got int"),
        (lambda t, x, y: t.predict(x.tolist()), "predict: x: expected an array .*, got list"),
        (lambda t, x, y: mc.predict(3, x), "predict: model: expected a Layer, got int"),
    ],
)
def test_arguments_of_the_wrong_kind_are_named(call, words):
    model = mc.Sequential(mc.Flatten(), mc.Linear(4, 3, rng=0))
    before = model.state_dict()
    trainer = mc.Trainer(model, mc.optim.SGD(model, lr=0.1))
    with pytest.raises(TypeError, match=words):
        call(trainer, np.ones((2, 1, 2, 2), np.float32), np.array([0, 1]))
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
