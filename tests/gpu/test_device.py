"""What only a GPU can show; the other tests of this folder run there too."""

import numpy as np
import pytest

import bridge
from minicnn import Trainer, data, models, optim, to_gpu


@pytest.fixture
def device():
    cupy, why_not = bridge.device()
    return cupy or pytest.skip(why_not)


@pytest.mark.gpu
def test_the_reference_network_learns_in_recorded_steps(device):
    train, test = data.load("digits", "train"), data.load("digits", "test")
    model = models.mnist_cnn(rng=0)
    trainer = to_gpu(Trainer(model, optim.Adam(model, lr=1e-3)))
    trainer.fit(to_gpu(train), to_gpu(test), epochs=3, progress=False)
    assert "steps recorded as CUDA graphs for batches of 64x1x28x28" in str(trainer.plan())
    assert trainer.history[-1]["test_accuracy"] > 0.9


@pytest.mark.gpu
def test_a_step_that_fits_only_in_parts(device):
    """With real memory: its pool is limited to less than the step wants."""
    rng = np.random.default_rng(0)
    x, y = rng.random((512, 1, 28, 28), np.float32), rng.integers(0, 10, 512)
    losses = []
    for room in (0, 24 << 20):
        model = models.mnist_cnn(rng=0)
        trainer = to_gpu(Trainer(model, optim.SGD(model, lr=0.01)))
        far = to_gpu((x, y))
        pool = device.get_default_memory_pool()
        pool.free_all_blocks()
        pool.set_limit(size=pool.total_bytes() + room if room else 0)
        try:
            losses.append([trainer.step(*far) for _ in range(4)])
        finally:
            pool.set_limit(size=0)
    assert 0 < trainer.part < 512
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)
