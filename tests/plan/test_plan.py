"""A plan computes what the layers compute one after the other."""

import copy
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import minicnn as mc
from minicnn import Sequential, Trainer, models, optim, predict, use
from minicnn.plan import Plan, plan_of
from strategies import seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")


def twins(model, **options):
    """Return two trainers of equal models: on the fast path, and layer by layer."""
    pair = []
    for fused in (True, False):
        twin = copy.deepcopy(model)
        pair.append(Trainer(twin, optim.SGD(twin, lr=1e-2), fused=fused, **options))
    return pair


def assert_learn_alike(model, x, y, rtol, steps=2, **options):
    fast, plain = twins(model, **options)
    for _ in range(steps):
        assert fast.step(x, y) == pytest.approx(plain.step(x, y), rel=rtol)
    pairs = list(zip(fast.model.named_params(), plain.model.named_params()))
    largest = max(np.abs(h).max() for _, (_, _, h) in pairs)
    for (name, p, g), (_, q, h) in pairs:
        for got, want in ((g, h), (p, q)):
            # The gradient of a bias ahead of a batch-norm is nothing but rounding errors.
            scale = max(np.abs(want).max(), 1e-3 * largest)
            np.testing.assert_allclose(got, want, rtol=0, atol=rtol * scale, err_msg=name)
    state, want = fast.model.state_dict(), plain.model.state_dict()
    for name, a in state.items():
        np.testing.assert_allclose(a, want[name], rtol=rtol, atol=rtol, err_msg=name)
    np.testing.assert_allclose(
        predict(fast.model, x), predict(plain.model, x, fused=False), rtol=0, atol=rtol * 10
    )


def batch(shape, classes, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape).astype(dtype), rng.integers(0, classes, shape[0])


# Layers that keep maps maps; None stands for "not here".
BLOCKS = {
    "conv": lambda c, rng: [mc.Conv2d(c, 5, 3, padding=1, rng=rng, dtype="f8")],
    "conv relu": lambda c, rng: [mc.Conv2d(c, 5, 3, rng=rng, dtype="f8"), mc.ReLU()],
    "conv relu pool": lambda c, rng: [
        mc.Conv2d(c, 5, 3, padding=1, rng=rng, dtype="f8"),
        mc.ReLU(),
        mc.MaxPool2d(2),
    ],
    "conv pool": lambda c, rng: [
        mc.Conv2d(c, 5, 5, padding=2, rng=rng, dtype="f8"),
        mc.MaxPool2d((1, 2)),
    ],
    "strided": lambda c, rng: [
        mc.Conv2d(c, 5, 3, stride=2, padding=2, bias=False, rng=rng, dtype="f8")
    ],
    "dilated": lambda c, rng: [mc.Conv2d(c, 5, 3, dilation=2, padding=2, rng=rng, dtype="f8")],
    "uneven": lambda c, rng: [
        mc.Conv2d(c, 5, (2, 3), padding=((1, 0), (2, 1)), rng=rng, dtype="f8"),
        mc.ReLU(),
    ],
    "depthwise": lambda c, rng: [
        mc.Conv2d(c, c, 3, padding=1, groups=c, rng=rng, dtype="f8"),
        mc.Conv2d(c, 5, 1, rng=rng, dtype="f8"),
    ],
    "norm relu": lambda c, rng: [mc.BatchNorm2d(c, dtype="f8"), mc.ReLU()],
    "norm": lambda c, rng: [mc.BatchNorm2d(c, affine=False, dtype="f8")],
    "untracked": lambda c, rng: [mc.BatchNorm2d(c, track_running_stats=False, dtype="f8")],
    "relu": lambda c, rng: [mc.ReLU()],
    "tanh": lambda c, rng: [mc.Tanh()],
    "pool": lambda c, rng: [mc.MaxPool2d(3, stride=1, padding=1)],
    "average": lambda c, rng: [mc.AvgPool2d(2, stride=1, padding=1)],
    "residual": lambda c, rng: [
        mc.Residual(
            Sequential(
                mc.Conv2d(c, c, 3, padding=1, rng=rng, dtype="f8"), mc.BatchNorm2d(c, dtype="f8")
            )
        ),
        mc.ReLU(),
    ],
    "shortcut": lambda c, rng: [
        mc.Residual(
            Sequential(mc.Conv2d(c, 4, 3, padding=1, rng=rng, dtype="f8"), mc.ReLU()),
            mc.Conv2d(c, 4, 1, rng=rng, dtype="f8"),
        )
    ],
    "nested": lambda c, rng: [Sequential(mc.ReLU(), Sequential(mc.MaxPool2d(2, 1)))],
}
HEADS = {
    "flatten": lambda shape, rng: [
        mc.Flatten(),
        mc.Linear(int(np.prod(shape[1:])), 6, rng=rng, dtype="f8"),
        mc.ReLU(),
        mc.Linear(6, 4, rng=rng, dtype="f8"),
    ],
    "mean": lambda shape, rng: [
        mc.AdaptiveAvgPool2d(1),
        mc.Flatten(),
        mc.Linear(shape[1], 4, bias=False, rng=rng, dtype="f8"),
    ],
}


@st.composite
def networks(draw):
    rng = np.random.default_rng(draw(seeds))
    shape = (draw(st.integers(2, 4)), draw(st.sampled_from([1, 2, 3, 9])), 9, 8)
    layers = []
    for name in draw(st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=4)):
        new = BLOCKS[name](Sequential(*layers).output_shape(shape)[1], rng)
        if min(shape_of([*layers, *new], shape)[2:]) < 3:
            break
        layers += new
    layers += HEADS[draw(st.sampled_from(sorted(HEADS)))](shape_of(layers, shape), rng)
    return Sequential(*layers), shape, draw(seeds)


def shape_of(layers, shape):
    try:
        return Sequential(*layers).output_shape(shape)
    except ValueError:
        return (0, 0, 0, 0)


@settings(max_examples=40)
@given(networks())
def test_a_plan_equals_its_layers(case):
    model, shape, seed = case
    x, y = batch(shape, 4, seed)
    for winograd in (True, False):
        assert_learn_alike(model, x, y, rtol=1e-7, winograd=winograd)


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (models.mnist_cnn, (5, 1, 28, 28)),
        (lambda **k: models.vgg_small(widths=(16, 24), **k), (4, 3, 32, 32)),
        (lambda **k: models.resnet_small(widths=(16, 24), **k), (4, 3, 17, 18)),
    ],
    ids=["reference", "vgg", "resnet"],
)
def test_whole_networks(build, shape):
    x, y = batch(shape, 10)
    assert_learn_alike(build(dtype="f8"), x, y, rtol=1e-8)
    # In float32 a ReLU or a pool decides the other way at a near-tie: no gradient is compared.
    fast, plain = twins(build())
    assert fast.step(x.astype("f4"), y) == pytest.approx(plain.step(x.astype("f4"), y), rel=1e-5)


def test_what_a_plan_says():
    text = str(Plan(models.mnist_cnn()))
    assert "0, 1, 2  Conv2d + ReLU + MaxPool2d" in text
    assert "6, 7, 8  Flatten + Linear + ReLU" in text
    trainer, plain = twins(models.mnist_cnn())
    x, y = batch((64, 1, 28, 28), 10, dtype="f4")
    trainer.step(x, y)
    assert "winograd" in str(trainer.plan())
    assert trainer.plan() is plan_of(trainer.model), "a plan is made once"
    assert "one op at a time" in str(plain.plan())


def test_changing_the_layers_makes_a_new_plan():
    model = Sequential(mc.Linear(3, 3, rng=0), mc.ReLU())
    before = plan_of(model)
    model.append(mc.Linear(3, 2, rng=1))
    assert plan_of(model) is not before
    assert predict(model, np.ones((2, 3), "f4")).shape == (2, 2)


def other_parameter(model):
    model[0].params["weight"] = 2 * model[0].weight


def other_gradients(model):
    for layer in (model[0], model[5]):
        layer.grads = {name: np.full_like(g, 7) for name, g in layer.grads.items()}


def other_layer(model):
    model.layers[2] = mc.Tanh()


def freeze(model):
    model[0].params.pop("bias")


def turn(model):
    model[5].params["weight"] = np.asfortranarray(model[5].weight)


def change_statistics(model):
    model[1].buffers = {name: a.copy() for name, a in model[1].buffers.items()}
    model[1].momentum = 0.5


@pytest.mark.parametrize(
    "change",
    [other_parameter, other_gradients, other_layer, freeze, turn, change_statistics],
)
def test_what_is_replaced_between_steps_is_seen(change):
    model = Sequential(
        mc.Conv2d(1, 3, 3, rng=0, dtype="f8"),
        mc.BatchNorm2d(3, dtype="f8"),
        mc.ReLU(),
        mc.MaxPool2d(2),
        mc.Flatten(),
        mc.Linear(12, 4, rng=1, dtype="f8"),
    )
    x, y = batch((6, 1, 6, 6), 4)
    trainers = twins(model)
    before = model.state_dict()
    losses = []
    for trainer in trainers:
        trainer.step(x, y)
        trainer.predict(x)
        old = arrays_of(trainer.model)
        change(trainer.model)
        held = {id(a) for a in arrays_of(trainer.model)}
        for a in old:
            if id(a) not in held:
                a[...] = np.nan
        losses.append([trainer.step(x, y), trainer.step(x, y), trainer.evaluate((x, y)).loss])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-9)
    fast, plain = (trainer.model.state_dict() for trainer in trainers)
    for name, a in plain.items():
        np.testing.assert_allclose(fast[name], a, rtol=1e-9, atol=1e-12, err_msg=name)
    for name in ("0.weight", "5.weight"):
        assert (fast[name] != before[name]).any()


def test_any_order_of_calls_gives_what_the_layers_give():
    """A stage that sees again what it saw before runs its kernel alone: nothing else may differ."""
    model = Sequential(
        mc.Conv2d(1, 4, 3, rng=0, dtype="f8"), mc.ReLU(), mc.MaxPool2d(2),
        mc.Conv2d(4, 6, 3, rng=1, dtype="f8"), mc.ReLU(), mc.MaxPool2d(2),
        mc.Flatten(), mc.Linear(24, 8, rng=2, dtype="f8"), mc.ReLU(),
        mc.Linear(8, 4, rng=3, dtype="f8"),
    )  # fmt: skip
    trainers = twins(model)
    x, y = batch((3, 1, 14, 14), 4)
    rng = np.random.default_rng(0)

    def new_array(trainer, layer):
        layer.params["weight"] = 1.01 * layer.weight

    def other_numbers(trainer, layer):
        layer.weight[...] *= 0.99

    def new_gradient(trainer, layer):
        layer.grads["weight"] = np.full_like(layer.weight, np.nan)

    def slower(trainer, layer):
        trainer.optimizer.lr *= 0.9

    def other_pool(trainer, layer):
        at = int(rng.integers(2)) * 3 + 2
        for each in trainers:
            each.model.layers[at] = mc.MaxPool2d(2)

    changes = [new_array, other_numbers, new_gradient, slower, other_pool]
    for k in range(120):
        what, n, at = rng.integers(4), int(rng.choice([1, 3])), int(rng.choice([0, 3, 7, 9]))
        state = rng.bit_generator.state
        results = []
        for trainer in trainers:
            rng.bit_generator.state = state
            if what in (1, 2):
                x = np.random.default_rng(k).standard_normal(x.shape)
                results += [trainer.step(x[:n], y[:n]) for _ in range(what)]
            elif what == 0:
                results.append(trainer.predict(x[:n]))
            else:
                changes[k % len(changes)](trainer, trainer.model[at])
        if results:
            half = len(results) // 2
            np.testing.assert_allclose(
                results[:half], results[half:], rtol=1e-9, atol=1e-12, err_msg=str(k)
            )
    fast, plain = (trainer.model.state_dict() for trainer in trainers)
    for name, a in plain.items():
        np.testing.assert_allclose(fast[name], a, rtol=1e-8, atol=1e-11, err_msg=name)


def arrays_of(model):
    return [a for layer in model for a in (*layer.params.values(), *layer.grads.values())]


class Doubled(mc.Linear):
    """A layer of the user's own, with a forward of its own."""

    def forward(self, x):
        y, cache = super().forward(x)
        return 2 * y, cache

    def backward(self, dy, cache):
        return super().backward(2 * dy, cache)


def test_layers_of_ones_own_and_layers_used_twice_run_as_they_are():
    x, y = batch((4, 6), 6)
    shared = mc.Linear(6, 6, rng=0, dtype="f8")
    for model in (
        Sequential(Doubled(6, 6, rng=0, dtype="f8"), mc.ReLU(), mc.Linear(6, 6, rng=1, dtype="f8")),
        Sequential(shared, mc.ReLU(), shared),
        mc.Linear(6, 6, rng=0, dtype="f8"),
    ):
        assert_learn_alike(model, x, y, rtol=1e-9)


def test_use_overrides_the_plan():
    model = models.mnist_cnn()
    x = batch((3, 1, 28, 28), 10, dtype="f4")[0]
    with use("numpy"):
        want = model(x)
        np.testing.assert_array_equal(predict(model, x), want)
    with use("numba"):
        direct = predict(model, np.repeat(x, 30, axis=0))
    assert "winograd" not in str(plan_of(model, winograd=False))
    np.testing.assert_allclose(direct[::30], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((2, 3, 28, 28), "f4"), "expected 1 channels"),
        (np.zeros((2, 1, 5, 5), "f4"), "kernel_size"),
        (np.zeros((2, 28, 28), "f4"), "expected 4 axes"),
        (np.zeros((2, 1, 28, 36), "f4"), "1024"),
    ],
)
def test_bad_input_is_refused_as_the_layers_refuse_it(x, match):
    model = models.mnist_cnn()
    trainer, _ = twins(model)
    for run in (
        lambda: predict(model, x),
        lambda: trainer.step(x, np.zeros(2, int)),
    ):
        with pytest.raises(ValueError, match=match):
            run()
    with pytest.raises(TypeError, match="float64"):
        predict(model, np.zeros((2, 1, 28, 28)))


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize("build", [models.mnist_cnn, lambda: models.vgg_small(widths=(16, 32))])
def test_one_and_two_threads_give_the_same_bits(build):
    model = build()
    shape = (20, 1, 28, 28) if model[0].in_channels == 1 else (6, 3, 32, 32)
    x, y = batch(shape, 10, dtype="f4")
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        trainer, _ = twins(model)
        losses = [trainer.step(x, y) for _ in range(2)]
        results.append((losses, trainer.model.state_dict(), predict(trainer.model, x)))
    (losses, state, logits), (losses2, state2, logits2) = results
    assert losses == losses2
    np.testing.assert_array_equal(logits, logits2)
    for name, a in state.items():
        np.testing.assert_array_equal(a, state2[name], err_msg=name)


def test_a_steady_step_allocates_nothing_large():
    x, y = batch((64, 1, 28, 28), 10, dtype="f4")
    trainer, _ = twins(models.mnist_cnn())
    for _ in range(3):
        trainer.step(x, y)
    tracemalloc.start()
    try:
        trainer.step(x, y)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 300_000, "an activation of the first block alone has 1.2 MB"


def test_two_threads_of_python_predict_with_one_model():
    model = models.mnist_cnn()
    xs = [batch((40, 1, 28, 28), 10, seed, "f4")[0] for seed in range(4)]
    want = [predict(model, x) for x in xs]
    got = [None] * len(xs)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda i=i: got.__setitem__(i, predict(model, xs[i])))
            for i in range(len(xs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for a, b in zip(got, want):
        np.testing.assert_array_equal(a, b)
