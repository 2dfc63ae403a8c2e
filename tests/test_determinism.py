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
from minicnn.train import Callback
from minicnn import (AvgPool2d, BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU,
    Sequential, Trainer, optim)
from minicnn.checkpoint import load_training, save_training
threads = [int(n) for n in sys.argv[1:3]]  # until the fourth update, and from there on

def trainer():
    rng = np.random.default_rng(1)
    model = Sequential(Conv2d(1, 20, 5, rng=rng), ReLU(), MaxPool2d(2), Conv2d(20, 9, 3, rng=rng),
        BatchNorm2d(9), ReLU(), AvgPool2d(2), Dropout(0.2, rng=rng), Flatten(),
        Linear(9 * 5 * 5, 40, rng=rng), ReLU(), Linear(40, 10, rng=rng))
    return Trainer(model, optim.AdamW(model, lr=1e-2), clip_norm=1.0)

class Stop(Callback):
    def on_step(self, trainer, loss):
        trainer.stop = trainer.optimizer.step_count == 4

def fit(trainer, threads, *callbacks):
    numba.set_num_threads(threads)
    rng = np.random.default_rng(3)
    x, y = rng.random((37, 1, 28, 28), np.float32), rng.integers(0, 10, 37)
    with threadpoolctl.threadpool_limits(threads, "blas"):
        trainer.fit((x, y), (x, y), epochs=3 - trainer.position.epoch, batch_size=16, seed=2,
            callbacks=callbacks, progress=False)

trainer_ = trainer()
if threads[0] == threads[1]:
    fit(trainer_, threads[0])
else:
    fit(trainer_, threads[0], Stop())
    assert trainer_.position.batch == 1
    save_training(trainer_, sys.argv[3])
    trainer_ = load_training(trainer(), sys.argv[3])
    fit(trainer_, threads[1])
trainer, model = trainer_, trainer_.model
state = {**model.state_dict(), **trainer.optimizer.state_dict()}
history = [{k: v for k, v in record.items() if k != "seconds"} for record in trainer.history]
print(json.dumps([numba.get_num_threads(), history, {name: hashlib.sha256(a.tobytes()).hexdigest()
    for name, a in state.items()}]))
"""


def trained(threads, later=None, folder=""):
    environment = {**os.environ, "NUMBA_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(threads), str(later or threads), folder],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    used, history, digests = json.loads(done.stdout)
    assert used == (later or threads)
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


def test_a_run_that_goes_on_with_other_threads(once, tmp_path):
    """Stopped in the midst of an epoch, and resumed with two threads in place of one."""
    assert trained(1, later=2, folder=str(tmp_path / "checkpoint")) == once
