"""What a model holds is looked up once, and anew when something in it is replaced."""

import gc
import weakref

import numpy as np
import pytest

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    Linear,
    ReLU,
    Residual,
    Sequential,
)
from minicnn.layers.contents import contents_of


def network():
    return Sequential(
        Conv2d(1, 2, 3, padding=1, rng=0),
        BatchNorm2d(2),
        Residual(Sequential(ReLU(), Dropout(0.5, rng=1))),
        Flatten(),
        Linear(18, 2, rng=2),
    )


def test_it_holds_what_the_walks_of_the_model_yield():
    model = network()
    contents = contents_of(model)
    assert {id(layer) for layer in contents.layers} == {id(layer) for _, layer in model.modules()}
    for (name, *arrays), (want, *found) in zip(contents.params, model.named_params(), strict=True):
        assert name == want
        assert all(a is b for a, b in zip(arrays, found))
    assert all(a is b for a, b in zip(contents.buffers, model[1].buffers.values(), strict=True))
    assert contents.generators == [rng for _, rng in model.named_generators()]
    assert contents.training
    assert contents.dtype == np.float32
    assert not contents.on_gpu


def test_numbers_may_change():
    model = network()
    before = contents_of(model)
    x = np.random.default_rng(0).random((4, 1, 3, 3), np.float32)
    _, caches = model.forward(x)
    model.backward(np.ones((4, 2), np.float32), caches)
    model.zero_grad()
    model.load_state_dict(network().state_dict())
    model[0].weight = np.ones((2, 1, 3, 3))
    assert contents_of(model) is before


def new_generator(model):
    model[2].body[1].rng = np.random.default_rng(5)


def inner_layer(model):
    model[2].body.layers[0] = ReLU()


def frozen(model):
    del model[4].params["bias"]


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.append(ReLU()),
        lambda model: model.layers.reverse(),
        inner_layer,
        frozen,
        lambda model: model[0].params.update(weight=model[0].weight.copy()),
        lambda model: model[0].grads.update(weight=model[0].grads["weight"].copy()),
        lambda model: model[1].buffers.update(running_mean=np.ones(2)),
        lambda model: model[3].eval(),
        lambda model: setattr(model[1], "eps", 0.1),
        lambda model: model.astype("f8"),
        new_generator,
    ],
)
def test_what_is_replaced_is_noticed(change):
    model = network()
    before = contents_of(model)
    change(model)
    after = contents_of(model)
    assert after is not before
    assert contents_of(model) is after
    assert after.training == all(layer.training for _, layer in model.modules())
    assert [name for name, *_ in after.params] == [name for name, *_ in model.named_params()]


def test_parameters_that_are_not_alike_have_no_dtype():
    mixed = Sequential(Linear(2, 2, rng=0), Linear(2, 2, rng=0, dtype="f8"))
    assert contents_of(mixed).dtype is None
    turned = Sequential(Linear(2, 3, rng=0))
    turned[0].params["weight"] = np.asfortranarray(turned[0].weight)
    assert contents_of(turned).dtype is None
    assert contents_of(Sequential(ReLU())).dtype is None


def test_few_models_are_kept_alive():
    model = network()
    gone = weakref.ref(model)
    contents_of(model)
    del model
    for _ in range(4):
        contents_of(network())
    gc.collect()
    assert gone() is None
