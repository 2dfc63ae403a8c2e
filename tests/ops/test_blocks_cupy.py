"""Sizes that take the `cupy` versions several blocks: equal to the numpy versions in float64."""

import numpy as np
import pytest

from minicnn import ops, use
from minicnn.ops import norm_cupy
from opchecks import both_ways
from strategies import distinct, normal

cupy_version = pytest.mark.parametrize("version", ["cupy"])
MAPS = (3, 5, 17, 13)


def pair(name):
    return getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward")


def drawn(*shapes):
    rng = np.random.default_rng(0)
    return tuple(normal(rng, shape) for shape in shapes)


def assert_alike(version, name, arrays, **kwargs):
    y, _, grads = both_ways(version, *pair(name), arrays, 0, **kwargs)
    want, _, expected = both_ways("numpy", *pair(name), arrays, 0, **kwargs)
    for got, e in zip((y, *grads), (want, *expected), strict=True):
        if e is not None:
            np.testing.assert_allclose(got, e, rtol=1e-11, atol=1e-11)


@cupy_version
@pytest.mark.parametrize(
    "name",
    ["relu", "leaky_relu", "elu", "sigmoid", "tanh", "gelu", "silu", "softplus"],
)
def test_activations(version, name):
    assert_alike(version, name, drawn(MAPS))


@cupy_version
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("max_pool2d", {"kernel_size": 3, "stride": 2, "padding": 1}),
        ("avg_pool2d", {"kernel_size": (2, 3), "stride": (1, 2), "padding": (0, 1)}),
        ("adaptive_avg_pool2d", {"output_size": (5, 4)}),
    ],
)
def test_pools(version, name, kwargs):
    x = distinct(np.random.default_rng(0), MAPS)
    assert_alike(version, name, (x,), **kwargs)


@cupy_version
def test_columns(version):
    (x,) = drawn(MAPS)
    options = {"kernel_size": (3, 2), "stride": 2, "padding": ((1, 0), (2, 1))}
    with use("numpy"):
        cols = ops.im2col(x, **options)
        want = ops.col2im(cols, MAPS, **options)
    with use(version):
        np.testing.assert_array_equal(ops.im2col(x, **options), cols)
        np.testing.assert_allclose(ops.col2im(cols, MAPS, **options), want, rtol=1e-13)


@cupy_version
@pytest.mark.parametrize("kwargs", [{"padding": 1}, {"stride": 2, "dilation": 2}])
def test_depthwise_convolution(version, kwargs):
    assert_alike(version, "conv2d", drawn(MAPS, (5, 1, 3, 3), (5,)), groups=5, **kwargs)


@cupy_version
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", [(70, 3, 5, 3), (1100, 2), (2, 1, 33, 35)])
def test_batch_norm_in_parts(version, training, shape, monkeypatch):
    monkeypatch.setattr(norm_cupy, "SHORTEST", 100)
    C = shape[1]
    x, w, b = drawn(shape, (C,), (C,))
    statistics = {"running_mean": np.full(C, 99.0), "running_var": np.full(C, 2.0)}
    assert_alike(version, "batch_norm", (x + 100, w, b), training=training, **statistics)


@cupy_version
@pytest.mark.parametrize("groups", [1, 2, 40])
@pytest.mark.parametrize("shape", [(11, 40), (3, 40, 7, 3)])
def test_group_norm(version, groups, shape):
    x, w, b = drawn(shape, (40,), (40,))

    def forward(x, w, b):
        return ops.group_norm_forward(x, groups, w, b)

    results = [
        both_ways(v, forward, ops.group_norm_backward, (x + 10, w, b), 0)
        for v in (version, "numpy")
    ]
    for got, want in zip((results[0][0], *results[0][2]), (results[1][0], *results[1][2])):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@cupy_version
def test_layer_norm(version):
    x, w, b = drawn((21, 300), (300,), (300,))

    def forward(x, w, b):
        return ops.layer_norm_forward(x, 300, w, b)

    results = [
        both_ways(v, forward, ops.layer_norm_backward, (x, w, b), 0) for v in (version, "numpy")
    ]
    for got, want in zip((results[0][0], *results[0][2]), (results[1][0], *results[1][2])):
        np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-10)


@cupy_version
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_softmax(version, name, dim):
    assert_alike(version, name, drawn((9, 40, 7)), dim=dim)


@cupy_version
def test_cross_entropy(version):
    x, labels = drawn((9, 40, 7))[0], np.random.default_rng(1).integers(0, 40, (9, 7))
    labels[3, :4] = -100
    assert_alike(version, "cross_entropy", (x,), target=labels, reduction="none")
    assert_alike(version, "cross_entropy", (x,), target=labels, label_smoothing=0.1)
