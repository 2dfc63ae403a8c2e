"""When the GPU's memory runs out: parts that add up to the whole, or a clear error."""

import gc

import numpy as np
import pytest

from gpu_networks import (
    F64,
    assert_alike,
    data,
    reading_loss,
    trainers,
)
from minicnn import BatchNorm2d, Dropout, Flatten, Linear, ReLU, Sequential, to_cpu, to_gpu, use
from minicnn.ops import linear_cupy
from minicnn.train import predict


def wide(*extra):
    rng = np.random.default_rng(0)
    return Sequential(
        Flatten(), Linear(72, 500, rng=rng, **F64), ReLU(), *extra, Linear(500, 3, rng=rng, **F64)
    )


def limit(cupy, room):
    gc.collect()
    pool = cupy.get_default_memory_pool()
    pool.set_limit(size=pool.used_bytes() + room)


@pytest.fixture(autouse=True)
def cublas(monkeypatch):
    """Let cuBLAS multiply, in memory of its own, which takes less time on the CPU."""
    monkeypatch.setattr(linear_cupy, "MOST_TERMS", 0)


def test_a_batch_that_is_too_large_is_taken_in_parts(imitated, cupy):
    x, y = data(256)
    y[5:90] = -100  # the parts do not count alike
    here, there = trainers(lambda: wide(Dropout(0.5, rng=1)))
    far = to_gpu((x, y))
    limit(cupy, 3 << 20)
    for _ in range(4):
        with use("numpy"):
            expected = here.step(x, y)
        assert there.step(*far) == pytest.approx(expected, rel=1e-9)
    assert 0 < there.part < 256
    assert_alike(here, there)
    assert "not enough memory for the arrays of a recorded step" in str(there.plan())
    with use("numpy"):
        expected, metrics = predict(here.model, x), here.evaluate((x, y))
    assert there.evaluate(far) == pytest.approx(metrics, rel=1e-9)
    np.testing.assert_allclose(to_cpu(there.predict(far[0])), expected, rtol=1e-9)


def two_dropouts():
    rng = np.random.default_rng(0)
    return wide(Dropout(0.5, rng=rng), Dropout(0.5, rng=rng))


@pytest.mark.parametrize(
    ("make", "loss", "why"),
    [
        (two_dropouts, "cross_entropy", "two layers draw from one random generator"),
        (lambda: Sequential(BatchNorm2d(2, **F64), wide()), "cross_entropy", "BatchNorm2d needs"),
        (wide, reading_loss(), "the loss is not known to be a mean"),
    ],
)
def test_what_cannot_be_taken_in_parts_is_refused(imitated, cupy, make, loss, why):
    _, there = trainers(make, loss=loss)
    far = to_gpu(data(256))
    before = {name: to_cpu(a) for name, a in there.model.state_dict().items()}
    limit(cupy, 1 << 20)
    with pytest.raises(MemoryError, match=rf"Trainer.step: x: 256 samples: .* {why}.* batch_size"):
        there.step(*far)
    cupy.get_default_memory_pool().set_limit()
    for name, a in there.model.state_dict().items():
        np.testing.assert_array_equal(to_cpu(a), before[name])
    there.step(*far)  # with room again


@pytest.mark.parametrize(
    ("room", "message"), [(20_000, "for a single one at a time"), (0, "no room for the update")]
)
def test_not_even_one_sample_fits(imitated, cupy, room, message):
    _, there = trainers(wide)
    far = to_gpu(data(256))
    limit(cupy, room)
    with pytest.raises(MemoryError, match=rf"Trainer.step: x: 256 samples: .*{message}"):
        there.step(*far)


def test_predictions_of_not_even_one_sample_fit(imitated, cupy):
    _, there = trainers(wide)
    far = to_gpu(data(256))
    cupy.get_default_memory_pool().set_limit(size=1)
    with pytest.raises(MemoryError, match=r"predict: x: 256 samples: .*Out of memory allocating"):
        there.predict(far[0])


def test_memory_is_given_back_before_parts_are_tried(imitated, cupy, monkeypatch):
    freed = []
    pool = cupy.get_default_memory_pool()
    monkeypatch.setattr(pool, "free_all_blocks", lambda: freed.append(pool.used_bytes()))
    _, there = trainers(wide)
    far = to_gpu(data(256))
    limit(cupy, 3 << 20)
    there.predict(far[0])
    assert not freed
    limit(cupy, 1 << 19)
    used = pool.used_bytes()
    there.predict(far[0])
    assert freed
    assert max(freed) <= used  # what the failed try held is gone
