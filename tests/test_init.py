"""Initialisers: PyTorch's bounds and standard deviations."""

import numpy as np
import pytest

import minicnn as mc
from minicnn import init

SHAPE = (60, 50, 3, 4)  # fan_in 600, fan_out 720


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("kaiming_uniform", {"a": 0.5}),
        ("kaiming_uniform", {"mode": "fan_out", "nonlinearity": "relu"}),
        ("kaiming_normal", {"nonlinearity": "tanh"}),
        ("xavier_uniform", {"gain": 2.0}),
        ("xavier_normal", {}),
    ],
)
def test_distribution_is_pytorchs(name, kwargs, torch):
    ours = getattr(init, name)(SHAPE, rng=0, **kwargs)
    theirs = getattr(torch.nn.init, f"{name}_")(torch.empty(SHAPE), **kwargs).numpy()
    assert ours.dtype == np.float32
    assert ours.shape == SHAPE
    np.testing.assert_allclose(ours.std(), theirs.std(), rtol=0.02)
    np.testing.assert_allclose(np.abs(ours).max(), np.abs(theirs).max(), rtol=0.2)
    assert abs(ours.mean()) < 0.02 * ours.std()


def test_bounds_by_hand():
    a = init.kaiming_uniform(SHAPE, rng=0)
    assert 0.99 * np.sqrt(6 / 600) < np.abs(a).max() <= np.sqrt(6 / 600)
    assert np.abs(init.xavier_uniform(SHAPE, rng=0)).max() <= np.sqrt(6 / 1320)
    np.testing.assert_allclose(init.kaiming_normal(SHAPE, rng=0).std(), np.sqrt(2 / 600), rtol=0.01)
    np.testing.assert_allclose(init.xavier_normal(SHAPE, rng=0).std(), np.sqrt(2 / 1320), rtol=0.01)


def test_same_seed_same_weights():
    for f in (init.kaiming_uniform, init.kaiming_normal, init.xavier_uniform, init.xavier_normal):
        np.testing.assert_array_equal(f((3, 4), rng=1), f((3, 4), rng=1))
        assert (f((3, 4), rng=1) != f((3, 4), rng=2)).all()


def test_gains(torch):
    for name in (*init.GAINS, "leaky_relu"):
        assert init.calculate_gain(name) == torch.nn.init.calculate_gain(name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: init.fans((3,)), r"init: shape: expected at least 2 axes .* got \(3,\)"),
        (lambda: init.kaiming_normal((2, 2), mode="fan"), "init: mode: expected 'fan_in' or"),
        (lambda: init.calculate_gain("swish"), "nonlinearity: expected one of .* got 'swish'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_weights_are_refused_that_no_memory_holds():
    with pytest.raises(ValueError, match=r"init: shape: expected at most .* bytes of weights, got"):
        init.uniform((2**32, 2**32), 1.0)
    with init.limited(40):
        init.uniform((2, 3), 1.0, 0)  # 24 bytes
        with pytest.raises(ValueError, match="at most 16 bytes"):
            init.normal((5,), 1.0, 0)
    assert init.uniform((5, 5), 1.0, 0).shape == (5, 5)


@pytest.mark.parametrize(
    ("make", "op"),
    [
        (lambda rng: mc.Conv2d(1, 1, 1, rng=rng), "Conv2d"),
        (lambda rng: mc.Linear(1, 1, rng=rng), "Linear"),
        (lambda rng: mc.Dropout(0.5, rng), "Dropout"),
        (mc.models.mnist_cnn, "mnist_cnn"),
    ],
    ids=["Conv2d", "Linear", "Dropout", "mnist_cnn"],
)
@pytest.mark.parametrize(("rng", "error"), [("a", TypeError), (-1, ValueError)])
def test_a_bad_generator_is_named(make, op, rng, error):
    with pytest.raises(error, match=f"{op}: rng: expected a .*Generator, .* got {rng!r}"):
        make(rng)
