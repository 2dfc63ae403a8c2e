"""The same seed gives the same bits: again, with more threads, and in another process."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

# Two steps of each kind of layer that the fast path has kernels for, in a network whose gradients
# are sums over many terms, so that another order of summing would show.
TRAIN = """
import hashlib, json, sys
import numpy as np, numba, threadpoolctl
from minicnn import (AvgPool2d, BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU,
    Sequential, Trainer, optim)
threads = int(sys.argv[1])
numba.set_num_threads(threads)
rng = np.random.default_rng(1)
model = Sequential(Conv2d(1, 20, 5, rng=rng), ReLU(), MaxPool2d(2), Conv2d(20, 9, 3, rng=rng),
    BatchNorm2d(9), ReLU(), AvgPool2d(2), Dropout(0.2, rng=rng), Flatten(),
    Linear(9 * 5 * 5, 40, rng=rng), ReLU(), Linear(40, 10, rng=rng))
trainer = Trainer(model, optim.AdamW(model, lr=1e-2), clip_norm=1.0)
x, y = rng.random((37, 1, 28, 28), np.float32), rng.integers(0, 10, 37)
with threadpoolctl.threadpool_limits(threads, "blas"):
    trainer.fit((x, y), (x, y), epochs=3, batch_size=16, seed=2, progress=False)
state = {**model.state_dict(), **trainer.optimizer.state_dict()}
history = [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history]
print(json.dumps([numba.get_num_threads(), history, {name: hashlib.sha256(a.tobytes()).hexdigest()
    for name, a in state.items()}]))
"""


def trained(threads):
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(threads)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    used, history, digests = json.loads(done.stdout)
    assert used == threads
    return history, digests


@pytest.fixture(scope="module")
def once():
    return trained(threads=1)


@pytest.mark.parametrize("threads", [1, 2])
def test_one_seed_one_result(threads, once):
    history, digests = trained(threads)
    assert history == once[0]
    assert digests == once[1]
    assert np.isfinite([record["train_loss"] for record in history]).all()
