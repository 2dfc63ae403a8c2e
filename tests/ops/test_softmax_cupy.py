"""softmax.cu's fused loss: softmax + cross-entropy of labels, its gradient and the hits."""

import numpy as np
import pytest

import devices
from minicnn import ops
from minicnn.ops import softmax_cupy
from strategies import normal


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    devices.use(monkeypatch)


def labelled(x, labels):
    return devices.back(softmax_cupy.labelled(*devices.there((x, labels))))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(("N", "C"), [(1, 1), (1, 10), (8, 10), (65, 10), (9, 33), (7, 100)])
def test_equals_the_plain_ops(N, C, dtype):
    rng = np.random.default_rng(N)
    x, labels = 3 * normal(rng, (N, C), dtype), rng.integers(0, C, N)
    for _ in range(2):  # the counter is 0 again
        loss, dx, kept, correct = labelled(x, labels)
        want, cache = ops.cross_entropy_forward(x, labels)
        tolerance = 1e-6 if dtype == "float32" else 1e-13
        np.testing.assert_allclose(loss, want, rtol=10 * tolerance)
        np.testing.assert_allclose(
            dx, ops.cross_entropy_backward(1.0, cache), rtol=10 * tolerance, atol=tolerance
        )
        assert correct == (x.argmax(axis=1) == labels).sum()
        assert kept == N
        assert (loss.dtype, dx.dtype, correct.dtype) == (dtype, dtype, np.int64)


def test_ties_nan_and_infinities():
    x = np.array([[2, 2, 1], [1, 2, 2], [-np.inf, 0, 1], [1000, 0, -1000]], "f4")
    labels = np.array([0, 2, 1, 0])
    loss, dx, _, correct = labelled(x, labels)
    want, cache = ops.cross_entropy_forward(x, labels)
    np.testing.assert_allclose(loss, want, rtol=1e-6)
    np.testing.assert_allclose(dx, ops.cross_entropy_backward(1.0, cache), rtol=1e-6, atol=1e-7)
    assert correct == 2
    x[1, 2] = np.nan
    loss, dx, _, correct = labelled(x, labels)
    assert np.isnan(loss)
    assert np.isnan(dx[1]).all()
    assert np.isfinite(dx[[0, 2, 3]]).all()
    assert correct == (x.argmax(axis=1) == labels).sum()


@pytest.mark.parametrize("label", [-1, 3, 2**40])
def test_a_label_out_of_range_makes_the_loss_nan(label):
    loss, dx, _, correct = labelled(np.zeros((2, 3), "f4"), np.array([0, label]))
    assert np.isnan(loss)
    assert np.isfinite(dx).all()
    assert correct == 1


def test_labels_that_count_nothing():
    rng = np.random.default_rng(0)
    x, labels = normal(rng, (70, 5)), rng.integers(0, 5, 70)
    labels[::3] = -100
    loss, dx, kept, correct = labelled(x, labels)
    want, cache = ops.cross_entropy_forward(x, labels)
    np.testing.assert_allclose(loss, want, rtol=1e-13)
    np.testing.assert_allclose(dx, ops.cross_entropy_backward(1.0, cache), rtol=1e-13, atol=1e-15)
    assert kept == (labels >= 0).sum()
    assert correct == (x.argmax(axis=1) == labels).sum()
