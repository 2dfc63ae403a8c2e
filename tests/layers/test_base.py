"""What every layer promises: parameters, state and gradients that add up."""

import copy

import numpy as np
import pytest

from minicnn import (
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    Softmax,
    Tanh,
    gradcheck,
    to_cpu,
    to_gpu,
)
from minicnn.backend import is_cupy
from minicnn.layers import ELU, GELU, AdaptiveAvgPool2d, LeakyReLU, LogSoftmax, SiLU, Softplus
from strategies import distinct, normal

F64 = {"rng": 0, "dtype": np.float64}
LAYERS = {
    "Conv2d": lambda: Conv2d(2, 4, 3, stride=2, padding=1, groups=2, **F64),
    "Conv2d without bias": lambda: Conv2d(2, 3, (1, 2), bias=False, **F64),
    "ConvTranspose2d": lambda: ConvTranspose2d(2, 3, 3, stride=2, output_padding=1, **F64),
    "MaxPool2d": lambda: MaxPool2d(2, stride=1),
    "AvgPool2d": lambda: AvgPool2d(3, padding=1, count_include_pad=False),
    "AdaptiveAvgPool2d": lambda: AdaptiveAvgPool2d((2, None)),
    "BatchNorm2d": lambda: BatchNorm2d(2, dtype=np.float64),
    "BatchNorm2d without affine": lambda: BatchNorm2d(2, affine=False, dtype=np.float64),
    "LayerNorm": lambda: LayerNorm((2, 5, 4), dtype=np.float64),
    "LayerNorm without bias": lambda: LayerNorm(4, bias=False, dtype=np.float64),
    "GroupNorm": lambda: GroupNorm(2, 2, dtype=np.float64),
    "Flatten and Linear": lambda: Sequential(Flatten(), Linear(40, 3, **F64)),
    "Linear without bias": lambda: Linear(4, 2, bias=False, **F64),
    "ReLU": ReLU,
    "LeakyReLU": lambda: LeakyReLU(0.2),
    "ELU": ELU,
    "Sigmoid": Sigmoid,
    "Tanh": Tanh,
    "GELU": lambda: GELU("tanh"),
    "SiLU": SiLU,
    "Softplus": Softplus,
    "Softmax": Softmax,
    "LogSoftmax": lambda: LogSoftmax(dim=-1),
    "Residual": lambda: Residual(Conv2d(2, 2, 3, padding=1, **F64)),
    "Residual with shortcut": lambda: Residual(
        Conv2d(2, 3, 3, padding=1, stride=2, **F64), Conv2d(2, 3, 1, stride=2, **F64)
    ),
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def example(seed=0):
    return distinct(np.random.default_rng(seed), (3, 2, 5, 4)) * 5


def shuffle_params(layer, seed=0):
    """Leave no parameter at ones or zeros, where wrong gradients can look right."""
    rng = np.random.default_rng(seed)
    for _, p, _ in layer.named_params():
        p[...] = normal(rng, p.shape)
    return layer


@layers
def test_on_the_gpu_it_computes_the_same(make, cupy):
    here, there = (shuffle_params(make()) for _ in range(2))
    assert to_gpu(there) is there
    x = example()
    y, cache = here.forward(x)
    y2, cache2 = there.forward(to_gpu(x))
    assert is_cupy(y2)
    dy = normal(np.random.default_rng(1), y.shape)
    dx, dx2 = here.backward(dy, cache), there.backward(to_gpu(dy), cache2)
    close = {"rtol": 1e-10, "atol": 1e-12}
    np.testing.assert_allclose(to_cpu(y2), y, **close)
    np.testing.assert_allclose(to_cpu(dx2), dx, **close)
    np.testing.assert_allclose(to_cpu(there(to_gpu(x))), here(x), **close)
    for (name, _, g), (_, _, g2) in zip(here.named_params(), there.named_params()):
        np.testing.assert_allclose(to_cpu(g2), g, **close, err_msg=name)
    state = {name: to_cpu(a) for name, a in there.state_dict().items()}
    for name, a in here.state_dict().items():
        np.testing.assert_allclose(state[name], a, **close, err_msg=name)
    there.load_state_dict(here.state_dict())  # from the CPU
    assert all(is_cupy(a) for a in there.state_dict().values())
    to_cpu(there).zero_grad()
    assert not any(g.any() for _, _, g in there.named_params())


@layers
def test_arrays_on_two_devices_are_refused(make, cupy):
    layer = make()
    if layer.params or any(part.params for _, part in layer.modules()):
        with pytest.raises(TypeError, match=r"got a CuPy array|got a NumPy array"):
            layer.forward(to_gpu(example()))
    y, cache = layer.forward(example())
    with pytest.raises(TypeError, match=r"expected a NumPy array.*, got a CuPy array"):
        layer.backward(to_gpu(np.ones_like(y)), cache)


@layers
def test_gradients_equal_finite_differences(make):
    report = gradcheck(shuffle_params(make()), example(), rtol=1e-5)
    assert report, report


@layers
def test_backward_adds_to_the_gradients(make):
    layer = shuffle_params(make())
    y, cache = layer.forward(example())
    dy = normal(np.random.default_rng(1), y.shape)
    layer.backward(dy, cache)
    once = [g.copy() for _, _, g in layer.named_params()]
    layer.backward(dy, cache)
    for (_, _, twice), g in zip(layer.named_params(), once):
        np.testing.assert_allclose(twice, 2 * g, rtol=1e-12)
    layer.zero_grad()
    assert not any(g.any() for _, _, g in layer.named_params())


@layers
def test_one_layer_twice_needs_two_caches(make):
    """Caches are values: the second forward does not disturb the first one's backward."""
    layer = shuffle_params(make())
    y, cache = layer.forward(example(0))
    dy = normal(np.random.default_rng(1), y.shape)
    expected = layer.backward(dy, cache)
    _, first = layer.forward(example(0))
    layer.forward(example(7))
    np.testing.assert_allclose(layer.backward(dy, first), expected, rtol=1e-12)


@layers
def test_call_is_evaluation_and_changes_nothing(make):
    layer = shuffle_params(make())
    before = layer.state_dict()
    y = layer(example())
    assert layer.training
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
    np.testing.assert_array_equal(layer.eval().forward(example())[0], y)


@layers
def test_output_shape_tells_the_truth(make):
    layer, x = make(), example()
    assert layer.output_shape(x.shape) == layer(x).shape
    row = layer.summary(x.shape[1:], batch_size=len(x)).layers[-1]
    assert row.output_shape == layer(x).shape


def test_state_dict_copies_and_loads_back():
    model = Sequential(Conv2d(1, 2, 3, rng=0), BatchNorm2d(2), ReLU())
    state = model.state_dict()
    assert list(state) == [
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    ]
    original = {name: a.copy() for name, a in state.items()}
    model.forward(normal(np.random.default_rng(0), (4, 1, 5, 5), np.float32))
    model[0].weight += 1
    np.testing.assert_array_equal(state["0.weight"], original["0.weight"])
    np.testing.assert_array_equal(state["1.running_mean"], original["1.running_mean"])
    weight = model[0].weight
    model.load_state_dict(state)
    assert model[0].weight is weight, "an optimiser must keep hold of the array"
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, original[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("bias"), r"1 missing \['bias'\]"),
        (lambda s: s.update(more=np.zeros(1)), r"1 unexpected \['more'\]"),
        (
            lambda s: s.update(weight=np.zeros((2, 3))),
            r"weight: expected shape \(3, 2\), got \(2, 3\)",
        ),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    layer = Linear(2, 3, rng=0)
    before = layer.state_dict()
    state = {name: a + 1 for name, a in before.items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        layer.load_state_dict(state)
    for name, a in layer.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


@pytest.mark.parametrize("bad", [np.array(["a"] * 3), np.zeros(3, complex), np.zeros(3, object)])
def test_a_value_that_is_no_number_changes_nothing(bad):
    layer = Linear(2, 3, rng=0)
    before = layer.state_dict()
    state = {"weight": before["weight"] + 1, "bias": bad}
    with pytest.raises(TypeError, match="load_state_dict: bias: expected an array of numbers"):
        layer.load_state_dict(state)
    np.testing.assert_array_equal(layer.weight, before["weight"])


def test_one_array_in_two_layers_is_refused():
    model = Sequential(Linear(2, 2), Linear(2, 2))
    model[1].params["weight"] = model[0].weight
    with pytest.raises(ValueError, match=r"1.weight: expected an array of its own, got .*0.weight"):
        list(model.named_params())


def test_parameters_are_float32_or_float64():
    with pytest.raises(TypeError, match="Linear: dtype: expected float32 or float64, got int64"):
        Linear(2, 2, dtype=np.int64)


def test_parameters_are_attributes():
    layer = Linear(2, 3, rng=0)
    held = layer.weight
    layer.weight = np.ones((3, 2))
    assert layer.weight is held
    assert (held == 1).all()
    assert held.dtype == np.float32
    with pytest.raises(ValueError, match=r"Linear.weight: expected shape \(3, 2\), got \(2, 3\)"):
        layer.weight = np.ones((2, 3))
    bare = Linear(2, 3, bias=False)
    assert bare.bias is None
    with pytest.raises(AttributeError, match=r"Linear.bias: the layer was built without it"):
        bare.bias = np.zeros(3)


def test_a_shared_layer_is_one_parameter_with_the_sum_of_both_gradients():
    shared = Linear(3, 3, **F64)
    model = Sequential(shared, Tanh(), shared)
    assert [name for name, _, _ in model.named_params()] == ["0.weight", "0.bias"]
    assert gradcheck(model, normal(np.random.default_rng(0), (4, 3)))


def test_train_and_eval_reach_every_layer():
    model = Sequential(Sequential(Dropout()), Residual(ReLU(), BatchNorm2d(2)))
    assert model.eval() is model
    assert not any(layer.training for _, layer in model.modules())
    model.train()
    assert all(layer.training for _, layer in model.modules())


def test_astype_converts_floats_only():
    model = Sequential(Conv2d(1, 2, 3), BatchNorm2d(2)).astype(np.float64)
    assert model[0].weight.dtype == model[0].grads["weight"].dtype == np.float64
    assert model[1].buffers["running_mean"].dtype == np.float64
    assert model[1].buffers["num_batches_tracked"].dtype == np.int64
    with pytest.raises(TypeError, match="astype: dtype: expected float32 or float64, got int64"):
        model.astype(np.int64)


def test_a_deep_copy_is_independent():
    layer = Linear(2, 2, rng=0)
    other = copy.deepcopy(layer)
    other.weight += 1
    assert not (layer.weight == other.weight).any()
