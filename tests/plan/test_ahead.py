"""The helper that compiles the backward while the first forward runs."""

import os
import subprocess
import sys

import numpy as np
import pytest

from minicnn import layers
from minicnn.plan import Plan, ahead
from minicnn.plan.buffers import Maps

SCRIPT = """
import numpy as np
from minicnn import Trainer, layers, optim
from minicnn.ops import linear_numba
model = layers.Sequential(layers.Linear(5, 3, rng=0))
trainer = Trainer(model, optim.SGD(model, lr=0.1))
trainer.step(np.ones((4, 5), np.float32), np.arange(4) % 3)
for kernel in linear_numba._forward, linear_numba._backward:
    print(sum(kernel.stats.cache_hits.values()), sum(kernel.stats.cache_misses.values()))
"""


def run(tmp_path, code=SCRIPT):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr
    return done.stdout.split("\n")[:2]


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs a second core")
def test_the_first_step_finds_the_kernels_of_its_backward(tmp_path):
    assert run(tmp_path) == ["0 1", "1 0"]
    assert run(tmp_path) == ["1 0", "1 0"]


def test_a_helper_that_fails_costs_nothing_but_time(tmp_path):
    broken = SCRIPT.replace(
        "model = ", "from minicnn.plan import ahead\nahead._CODE = '1/0'\nmodel = "
    )
    assert run(tmp_path, broken) == ["0 1", "0 1"]


def test_rehearsing_changes_no_parameter_and_writes_every_gradient():
    model = layers.Sequential(
        layers.Conv2d(2, 3, 3, rng=0), layers.BatchNorm2d(3), layers.ReLU(), layers.MaxPool2d(2),
        layers.Flatten(), layers.Linear(12, 4, rng=1),
    )  # fmt: skip
    params = [p.copy() for _, p, _ in model.named_params()]
    for _, _, g in model.named_params():
        g[...] = np.nan
    ahead.rehearse(Plan(model).stages, Maps(np.zeros((2, 2, 6, 6), np.float32)))
    for before, (name, p, g) in zip(params, model.named_params()):
        assert np.array_equal(before, p), name
        assert np.isfinite(g).all(), name
