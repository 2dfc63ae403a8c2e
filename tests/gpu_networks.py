"""Networks and trainers in pairs: one on the CPU, and one that starts alike on the GPU."""

import numpy as np
import pytest

from minicnn import (
    BatchNorm2d,
    Conv2d,
    Dropout,
    Flatten,
    GroupNorm,
    LayerNorm,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Trainer,
    ops,
    to_cpu,
    to_gpu,
    use,
)
from minicnn.backend import is_cupy
from minicnn.optim import SGD, Adam, AdamW, RMSprop

F64 = {"dtype": np.float64}


def data(n=64, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2, 6, 6)).astype(dtype), rng.integers(0, 3, n)


def dense(dtype=np.float64):
    rng, d = np.random.default_rng(0), {"dtype": dtype}
    return Sequential(
        BatchNorm2d(2, **d),
        MaxPool2d(2),
        Flatten(),
        Linear(18, 7, rng=rng, **d),
        ReLU(),
        Dropout(0.3, rng=5),
        Linear(7, 3, rng=rng, **d),
    )


def norms():
    return Sequential(
        GroupNorm(2, 2, **F64), Flatten(), LayerNorm(72, **F64), Linear(72, 3, rng=0, **F64)
    )


def residual():
    body = Sequential(Linear(72, 72, rng=1, **F64), ReLU())
    return Sequential(Flatten(), Residual(body), Linear(72, 3, rng=0, **F64))


def convolutional():
    rng = np.random.default_rng(0)
    return Sequential(
        Sequential(Conv2d(2, 4, 3, padding=1, rng=rng, **F64), ReLU(), MaxPool2d(2)),
        Conv2d(4, 5, 2, bias=False, rng=rng, **F64),
        ReLU(),
        Flatten(),
        Linear(20, 3, rng=rng, **F64),
    )


def shared():
    layer = Linear(72, 72, rng=1, **F64)
    return Sequential(Flatten(), layer, ReLU(), layer, Linear(72, 3, rng=0, **F64))


OPTIMIZERS = {
    "SGD": lambda m: SGD(m, lr=0.1),
    "SGD, everything": lambda m: SGD(m, 0.05, momentum=0.9, dampening=0.2, weight_decay=0.01),
    "SGD, nesterov": lambda m: SGD(m, 0.05, momentum=0.9, nesterov=True),
    "Adam": lambda m: Adam(m, lr=0.01),
    "Adam, everything": lambda m: Adam(m, lr=0.01, weight_decay=0.1, amsgrad=True),
    "AdamW": lambda m: AdamW(m, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda m: RMSprop(m, lr=0.01, momentum=0.5, centered=True, weight_decay=0.1),
}


def trainers(make=dense, optimizer="Adam", **kwargs):
    """Two trainers that start alike, the second on the GPU."""
    pair = []
    for _ in range(2):
        model = make()
        pair.append(Trainer(model, OPTIMIZERS[optimizer](model), **kwargs))
    return pair[0], to_gpu(pair[1])


def fit(trainer, sets, **kwargs):
    with use("numpy" if not is_cupy(sets[0][0]) else None):
        return trainer.fit(*sets, **{"batch_size": 16, "progress": False, "epochs": 3} | kwargs)


def both(here, there, sets, **kwargs):
    fit(here, sets, **kwargs)
    fit(there, [to_gpu(pair) for pair in sets], **kwargs)


def assert_alike(here, there, tolerance=1e-9):
    for name, a in here.model.state_dict().items():
        b = to_cpu(there.model.state_dict()[name])
        np.testing.assert_allclose(b, a, rtol=tolerance, atol=tolerance, err_msg=name)
    state = there.optimizer.state_dict()
    for name, a in here.optimizer.state_dict().items():
        np.testing.assert_allclose(state[name], a, rtol=tolerance, atol=tolerance, err_msg=name)
    assert here.position.batch == there.position.batch
    assert here.position.epoch == there.position.epoch
    assert len(here.history) == len(there.history)
    for a, b in zip(here.history, there.history):
        assert a.keys() == b.keys()
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=tolerance, nan_ok=True), name
    for (_, a), (_, b) in zip(here.model.named_generators(), there.model.named_generators()):
        assert a.bit_generator.state == b.bit_generator.state


def recorded(trainer):
    return "steps recorded as CUDA graphs" in str(trainer.plan())


def reading_loss():
    def forward(x, y):
        loss, cache = ops.cross_entropy_forward(x, y)
        assert float(loss) >= 0
        return loss, cache

    return forward, ops.cross_entropy_backward
