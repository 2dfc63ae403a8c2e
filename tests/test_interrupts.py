"""Signals wait for a moment that suits, and none is lost."""

import signal
import threading

import numpy as np
import pytest

from minicnn import Linear, Trainer
from minicnn.interrupts import caught, deferred
from minicnn.optim import SGD


class Interrupted(SGD):
    """Gets a Ctrl-C when the first of its parameters has been updated, and not the second."""

    def _update(self, p, g, state, t):
        super()._update(p, g, state, t)
        if p.ndim == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def default_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_in_an_update_leaves_no_half_of_it():
    x, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])
    models = [Linear(3, 2, rng=0) for _ in range(2)]
    calm, hasty = (
        Trainer(models[0], SGD(models[0], 0.1)),
        Trainer(models[1], Interrupted(models[1], 0.1)),
    )
    calm.step(x, y)
    with pytest.raises(KeyboardInterrupt):
        hasty.step(x, y)
    for name, a in models[0].state_dict().items():
        np.testing.assert_array_equal(models[1].state_dict()[name], a)

    for model in models:
        model.load_state_dict(Linear(3, 2, rng=1).state_dict())
    calm.fit((x, y), epochs=1, batch_size=2, progress=False)
    for _ in range(2):  # two updates, each ends in a Ctrl-C, and no other is lost or made twice
        with pytest.raises(KeyboardInterrupt):
            hasty.fit((x, y), epochs=1, batch_size=2, progress=False)
    hasty.fit((x, y), epochs=1 - hasty.position.epoch, batch_size=2, progress=False)
    for name, a in models[0].state_dict().items():
        np.testing.assert_array_equal(models[1].state_dict()[name], a)
    assert hasty.history[0]["train_loss"] == calm.history[0]["train_loss"]


def test_deferred_signals_come_after_the_block():
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with deferred():
        signal.raise_signal(signal.SIGTERM)
        assert came == []
    assert came == [signal.SIGTERM]
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done


def test_a_second_signal_interrupts_what_catches_the_first():
    with pytest.raises(KeyboardInterrupt), caught() as received:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


def test_signals_that_are_ignored_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with caught() as received, deferred():
        signal.raise_signal(signal.SIGINT)
    assert received == []


def test_a_thread_may_train():
    entered = []

    def work():
        with deferred(), caught() as received:
            entered.append(received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [[]]
