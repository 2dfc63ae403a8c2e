"""A trace holds what the model's own passes compute, and leaves the model as it was."""

import numpy as np
import pytest

import minicnn as m
from minicnn import ops


@pytest.fixture
def net():
    return m.Sequential(
        m.Conv2d(1, 4, 3, rng=0),
        m.BatchNorm2d(4),
        m.Residual(m.Sequential(m.Conv2d(4, 4, 3, padding=1, rng=1), m.ReLU())),
        m.Dropout(0.3, rng=7),
        m.Flatten(),
        m.Linear(4 * 36, 3, rng=2),
    )


X = np.random.default_rng(3).normal(size=(2, 1, 8, 8)).astype("f4")
Y = np.array([2, 0])


def test_equals_the_models_own_passes(net):
    t = m.trace(net, X, Y)  # first: dropout draws the same mask again below
    y, caches = net.forward(X)
    loss, cache = ops.cross_entropy_forward(y, Y)
    net.zero_grad()
    dx = net.backward(ops.cross_entropy_backward(np.float32(1), cache), caches)
    assert t.loss == loss
    np.testing.assert_array_equal(t.forward("5").outputs["y"], y)
    np.testing.assert_allclose(t.backward("0").outputs["dx"], dx, rtol=1e-5, atol=1e-7)
    letters = {"weight": "dw", "bias": "db"}
    for name, _, g in net.named_params():
        layer, _, key = name.rpartition(".")
        np.testing.assert_allclose(t.backward(layer).grads[letters[key]], g, rtol=1e-5, atol=1e-7)


def test_leaves_the_model_alone(net):
    before = net.state_dict()
    state = net[3].rng.bit_generator.state
    m.trace(net, X, Y).explain("5", "dw", (0, 0))
    assert all(np.array_equal(a, net.state_dict()[k]) for k, a in before.items())
    assert not any(g.any() for _, _, g in net.named_params())
    assert net[3].rng.bit_generator.state == state


def test_walks(net):
    t = m.trace(net, X, Y)
    names = [s.name for s in t]
    n = len(names) // 2
    assert names[:n] == ["0", "1", "2.body.0", "2.body.1", "2", "3", "4", "5", "loss"]
    assert names[n:] == names[:n][::-1]
    assert t.back() is t[0]
    assert t.next() is t[1]
    assert t.back() is t[0]
    for _ in range(2 * len(t)):
        t.next()
    assert t.next() is t[-1]
    assert len(t) == len(names)


def test_a_layer_used_twice_has_the_gradient_of_each_use():
    layer = m.Linear(3, 3, rng=0)
    x = np.random.default_rng(0).normal(size=(2, 3)).astype("f4")
    t = m.trace(m.Sequential(layer, m.Tanh(), layer), x, [0, 1])
    for name in ("0", "2"):
        b = t.backward(name)
        np.testing.assert_allclose(
            b.grads["dw"], b.inputs["dy"].T @ t.forward(name).inputs["x"], rtol=1e-5
        )


def test_prints_sizes_and_statistics(net):
    t = m.trace(net, X, Y)
    text = str(t.forward("0"))
    assert "1*3*3 products" in text
    assert "(2, 1, 8, 8) -> (2, 4, 6, 6)" in text
    a = t.forward("2.body.1").outputs["y"]
    s = t.forward("2.body.1").statistics()["y"]
    assert s == {"min": a.min(), "mean": a.mean(), "max": a.max(), "zeros": (a == 0).mean()}
    assert s["zeros"] > 0
    assert "cross_entropy" in str(t)
    assert "[17] backward 0 " in str(t)


def test_refuses_what_it_cannot_trace():
    with pytest.raises(TypeError, match="trace: model: expected a Layer, got function"):
        m.trace(lambda x: x, X, Y)
    with pytest.raises(ValueError, match="trace: loss: expected one of cross_entropy"):
        m.trace(m.Flatten(), X, Y, loss="hinge")
