"""linear.cu: a product with bias, ReLU, mask and row sums, in one launch."""

import numpy as np
import pytest

import devices
from minicnn.ops import cuda, linear, linear_cupy
from strategies import normal

NUMPY = linear.VERSIONS["numpy"]
SIZES = [(1, 1, 1), (3, 10, 7), (33, 65, 35), (70, 40, 129)]  # M, I, O


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    devices.use(monkeypatch)


def integers(rng, shape, dtype):
    return rng.integers(-4, 5, shape).astype(dtype)


def draw(make, M, size_in, size_out, dtype):
    rng = np.random.default_rng(0)
    shapes = (M, size_in), (size_out, size_in), (size_out,), (M, size_out)
    return tuple(make(rng, shape, dtype) for shape in shapes)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", SIZES)
def test_integers_are_exact(dtype, sizes):
    x, w, b, dy = draw(integers, *sizes, dtype)
    there = devices.there((x, w, b, dy))
    y = devices.back(linear_cupy.forward(*there[:3]))
    np.testing.assert_array_equal(y, NUMPY.forward(x, w, b))
    assert y.dtype == dtype
    np.testing.assert_array_equal(devices.back(linear_cupy.forward(*there[:2], None)), x @ w.T)
    grads = devices.back(linear_cupy.backward(there[3], *there[:2]))
    for a, e in zip(grads, NUMPY.backward(dy, x, w)):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("tile", linear_cupy.TILES["float32"], ids=lambda tile: str(tile.area))
def test_every_tile(monkeypatch, tile):
    monkeypatch.setattr(linear_cupy, "_tile", lambda *_: tile)
    test_integers_are_exact("float32", SIZES[-1])


def test_relu_behind_and_before():
    x, w, b, dy = draw(normal, 20, 30, 12, "float32")
    x[3, 4], x[5, 6] = np.nan, 0
    there = devices.there((x, w, b, dy))
    y = devices.back(linear_cupy.forward(*there[:3], relu=True))
    z = NUMPY.forward(x, w, b)
    np.testing.assert_allclose(y, np.where(z <= 0, 0, z), rtol=1e-5, atol=1e-6)
    assert np.isnan(y[3]).all()
    dx, dw, _ = devices.back(linear_cupy.backward(there[3], *there[:2], after_relu=True))
    want_dx, want_dw, _ = NUMPY.backward(dy, x, w)
    np.testing.assert_allclose(dx, np.where(x > 0, want_dx, 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, want_dw, rtol=1e-5, atol=1e-5)


def test_no_rows():
    x, w, b, dy = devices.there(draw(normal, 0, 4, 3, "float32"))
    assert linear_cupy.forward(x, w, b).shape == (0, 3)
    dx, dw, db = devices.back(linear_cupy.backward(dy, x, w))
    assert dx.shape == (0, 4)
    np.testing.assert_array_equal(dw, np.zeros((3, 4)))
    np.testing.assert_array_equal(db, np.zeros(3))


def test_launches(monkeypatch):
    names = []
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a, **k: (names.append(a[1]), launch(*a, **k))[1])
    x, w, b, dy = devices.there(draw(normal, 8, 16, 10, "float32"))
    linear_cupy.forward(x, w, b, relu=True)
    linear_cupy.backward(dy, x, w, after_relu=True)
    assert names == ["linear_product"] * 3


def test_large_products_are_left_to_cublas():
    assert linear_cupy.applies(64, np.zeros((128, 1024)))
    assert not linear_cupy.applies(1024, np.zeros((1024, 1024)))
    assert not linear_cupy.applies(1025, np.zeros((1, 1)))  # a longer sum would round more
