"""Every element of every array of every layer is derived, and agrees with finite differences."""

import numpy as np
import pytest

import minicnn as m

D = np.float64


def image(*shape):
    return np.random.default_rng(1).normal(size=shape)


MAPS = {
    "conv": [m.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, rng=1, dtype=D)],
    "conv_odd": [m.Conv2d(4, 2, (3, 2), padding=((1, 0), (0, 2)), bias=False, rng=1, dtype=D)],
    "transpose": [
        m.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2, rng=1, dtype=D)
    ],
    "max_pool": [m.MaxPool2d(3, stride=2, padding=1)],
    "avg_pool": [m.AvgPool2d(3, stride=2, padding=1)],
    "avg_pool_inside": [m.AvgPool2d(3, stride=2, padding=1, count_include_pad=False)],
    "adaptive": [m.AdaptiveAvgPool2d(3)],
    "batch_norm": [m.BatchNorm2d(4, dtype=D)],
    "batch_norm_eval": [m.BatchNorm2d(4, dtype=D).eval()],
    "group_norm": [m.GroupNorm(2, 4, dtype=D)],
    "layer_norm": [m.LayerNorm((4, 7, 7), dtype=D)],
    "dropout": [m.Dropout(0.5, rng=3)],
    "softmax": [m.Softmax()],
    "log_softmax": [m.LogSoftmax()],
    "residual": [m.Residual(m.Conv2d(4, 4, 3, padding=1, rng=1, dtype=D))],
    "residual_shortcut": [
        m.Residual(m.Tanh(), m.Conv2d(4, 4, 1, rng=2, dtype=D)),
    ],
    "relu": [m.ReLU()],
    "leaky": [m.LeakyReLU()],
    "elu": [m.ELU(0.7)],
    "sigmoid": [m.Sigmoid()],
    "tanh": [m.Tanh()],
    "gelu": [m.GELU()],
    "gelu_tanh": [m.GELU("tanh")],
    "silu": [m.SiLU()],
    "softplus": [m.Softplus(2.0, 1.0)],
}


def traced(layers, loss="cross_entropy"):
    x = image(2, 4, 7, 7)
    rng = np.random.default_rng(5)
    for layer in layers:
        for _, p, _ in layer.named_params():
            p += 0.3 * rng.normal(size=p.shape)
    body = m.Sequential(*layers, m.Flatten())
    size = body.forward(x)[0].shape[1]
    model = m.Sequential(*body.layers, m.Linear(size, 3, rng=2, dtype=D))
    y = np.array([2, 0]) if loss in ("cross_entropy", "nll_loss") else rng.random((2, 3))
    return m.trace(model, x, y, loss)


def check(t, name, what, count=12):
    backward = t.backward(name)
    shape = (t.forward(name).outputs | backward.outputs | backward.grads)[what].shape
    places = list(np.ndindex(shape))
    rng = np.random.default_rng(0)
    for k in rng.permutation(len(places))[:count]:
        e = t.explain(name, what, places[k])
        assert e.total == pytest.approx(e.value, rel=1e-9, abs=1e-12), (name, what, places[k])
        assert e.gradient == pytest.approx(e.numeric, rel=1e-5, abs=1e-8), (name, what, places[k])
        assert f"{e.numeric:.6g}" in str(e).splitlines()[-1]


@pytest.mark.parametrize("case", MAPS)
def test_every_layer(case):
    t = traced(MAPS[case])
    for step in t.steps[: len(t.nodes)]:
        for what in ("y", "dx", *t.backward(step.name).grads):
            check(t, step.name, what)


@pytest.mark.parametrize(
    "loss", ["cross_entropy", "nll_loss", "mse_loss", "l1_loss", "bce_with_logits"]
)
def test_every_loss(loss):
    t = traced([m.Tanh()], loss)
    check(t, "loss", "y")
    check(t, "loss", "dx")


def test_max_pool_tie_goes_to_the_first():
    t = m.trace(m.Sequential(m.MaxPool2d(2), m.Flatten()), np.ones((1, 3, 2, 2)), [1])
    e = t.explain("0", "y", (0, 0, 0, 0))
    assert "winner x[0,0,0,0]" in str(e)
    assert "first in row-major" in str(e)
    assert t.explain("0", "dx", (0, 0, 0, 0)).total == t.backward("0").inputs["dy"][0, 0, 0, 0]
    assert t.explain("0", "dx", (0, 0, 0, 1)).total == 0


def test_softmax_and_loss_show_p_minus_y():
    x = image(2, 5)
    t = m.trace(m.Sequential(m.Flatten()), x, [3, 1])
    e = t.explain("loss", "dx", (0, 3))
    p = np.exp(x[0]) / np.exp(x[0]).sum()
    assert [term.value for term in e.terms] == pytest.approx([p[3], -1])
    assert e.total == pytest.approx((p[3] - 1) / 2)


def test_batch_norm_has_three_paths():
    t = traced([m.BatchNorm2d(4, dtype=D)])
    assert len(t.explain("0", "dx", (1, 2, 3, 4)).terms) == 3


@pytest.mark.parametrize(
    ("name", "what", "index", "error", "text"),
    [
        ("9", "y", (0,), KeyError, "expected one of 0, 1, 2, loss"),
        ("0", "dw", (0,), ValueError, "expected one of y, dx for ReLU"),
        ("0", "y", (0, 0, 7, 0), IndexError, "expected 4 integers within"),
    ],
)
def test_errors_say_what_there_is(name, what, index, error, text):
    with pytest.raises(error, match=text):
        traced([m.ReLU()]).explain(name, what, index)
