"""optim.cu: all parameters in one launch, equal to NumPy's steps to the last bit."""

import numpy as np
import pytest

import devices
from minicnn import optim_cupy
from minicnn.optim import SGD, Adam, AdamW, RMSprop, adam_update, rmsprop_update, sgd_update
from strategies import normal

SHAPES = {"w": (40, 60), "b": (1,), "k": (3, 5, 2, 2)}  # more than two pieces, and one element
CASES = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (Adam, {}),
    (Adam, {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95), "amsgrad": True}),
    (AdamW, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
    (RMSprop, {}),
    (RMSprop, {"momentum": 0.9, "weight_decay": 0.1, "centered": True}),
]


class Model:
    def __init__(self, dtype):
        rng = np.random.default_rng(0)
        self.params = {
            name: (normal(rng, shape, dtype), normal(rng, shape, dtype))
            for name, shape in SHAPES.items()
        }

    def named_params(self):
        for name, (p, g) in self.params.items():
            yield name, p, g


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    devices.use(monkeypatch)


def rates_of(o):
    n = o.step_count + 1
    if isinstance(o, Adam):
        beta1, beta2 = o.betas
        return o.lr / (1 - beta1**n), np.sqrt(1 - beta2**n), 1 - o.lr * o.weight_decay
    if isinstance(o, SGD):
        return o.lr, 1 - (o.dampening if n > 1 else 0), o.lr * o.momentum
    return o.lr, 0, 0


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("kind", "kwargs"), CASES, ids=[f"{k.__name__}-{n}" for n, (k, _) in enumerate(CASES)]
)
def test_equals_numpy_to_the_last_bit(kind, kwargs, dtype):
    model, copy = Model(dtype), Model(dtype)
    plain, other = kind(model, **kwargs), kind(copy, **kwargs)
    arrays = {
        name: (
            devices.there(p),
            devices.there(g),
            {s: devices.there(a) for s, a in other._state[name].items()},
        )
        for name, p, g in copy.named_params()
    }
    update = optim_cupy.Update(other, list(arrays.values()))
    for step in range(5):
        rng = np.random.default_rng(step)
        for name, _, g in model.named_params():
            g[...] = normal(rng, g.shape, dtype)
            if step < 3:  # means and buffers that begin denormal, and then do not
                g *= np.finfo(dtype).tiny
            arrays[name][1][...] = devices.there(g)
        rates = devices.there(np.array([1, *rates_of(plain)], dtype))
        plain.step()
        update(rates)
        for name, p, _ in model.named_params():
            np.testing.assert_array_equal(devices.back(arrays[name][0]), p)
            for slot, a in plain._state[name].items():
                np.testing.assert_array_equal(devices.back(arrays[name][2][slot]), a)


def test_a_step_that_must_change_nothing():
    model = Model("float32")
    o = Adam(model)
    arrays = [
        (
            devices.there(p),
            devices.there(g),
            {s: devices.there(a) for s, a in o._state[name].items()},
        )
        for name, p, g in model.named_params()
    ]
    before = [devices.back(p).copy() for p, _, _ in arrays]
    update = optim_cupy.Update(o, arrays)
    update(devices.there(np.array([0, 1, 1, 1], "f4")))
    for (p, _, state), old in zip(arrays, before):
        np.testing.assert_array_equal(devices.back(p), old)
        assert not devices.back(state["exp_avg"]).any()
    update(devices.there(np.array([1, 1, 1, 1], "f4")))
    assert all((devices.back(p) != old).any() for (p, _, _), old in zip(arrays, before))


TALLY = [
    2.5,
    10,
    7,
    -1,
    3,
    0.25,
]  # sums of loss, samples and hits; first bad step; steps; last loss


def finished(gradients, loss, tally):
    arrays = np.array(loss, "f4"), np.array(8), np.array(5), np.full(4, 9, "f4"), np.array(tally)
    loss, kept, correct, rates, tally = map(devices.there, arrays)
    optim_cupy.finish_step(devices.there(gradients), loss, kept, correct, rates, tally)
    return devices.back(rates), devices.back(tally)


@pytest.mark.parametrize("size", [1, 1000, 5000])
def test_a_good_step_is_counted(size):
    for _ in range(2):  # the counters are 0 again
        rates, tally = finished(np.ones(size, "f4"), 0.5, TALLY)
        np.testing.assert_array_equal(rates, [1, 9, 9, 9])
        np.testing.assert_array_equal(tally, [2.5 + 8 * 0.5, 18, 12, -1, 4, 0.5])


@pytest.mark.parametrize("where", [0, 1023, 1024, 4999])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite(where, value):
    gradients = np.ones(5000, "f4")
    gradients[where] = value
    rates, tally = finished(gradients, 0.5, TALLY)
    np.testing.assert_array_equal(rates, [0, 9, 9, 9])
    np.testing.assert_array_equal(tally, [2.5, 10, 7, 3, 4, 0.5])


def test_a_loss_that_is_not_finite_and_the_steps_behind():
    rates, tally = finished(np.ones(5, "f4"), np.inf, TALLY)
    assert (rates[0], tally[3], tally[4]) == (0, 3, 4)
    rates, tally = finished(np.ones(5, "f4"), 1.0, tally)  # queued behind a bad step
    assert (rates[0], tally[3], tally[4]) == (0, 3, 5)
    np.testing.assert_array_equal(tally[:3], TALLY[:3])


def test_every_update_function_has_a_kernel():
    names = {sgd_update.__name__, adam_update.__name__, rmsprop_update.__name__}
    assert names == {f"{n}_update" for n in ("sgd", "adam", "rmsprop")}
    assert set(optim_cupy.SLOTS) == {SGD, Adam, AdamW, RMSprop}
