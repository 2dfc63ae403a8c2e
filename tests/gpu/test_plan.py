"""Which layers run in one kernel on the GPU."""

import numpy as np
import pytest

from gpu_networks import convolutional, trainers
from minicnn import Conv2d, Dropout, MaxPool2d, ReLU, Residual, Sequential, Trainer, models, to_gpu
from minicnn.gpu.plan import GpuPlan
from minicnn.ops import cuda
from minicnn.optim import Adam

CONV = {"in_channels": 1, "out_channels": 1, "kernel_size": 3}


class Mine(Conv2d):
    """Might have a forward of its own."""


@pytest.mark.parametrize(
    ("layers", "kinds"),
    [
        ([Conv2d(**CONV), ReLU(), MaxPool2d(2)], ["Conv2d + ReLU + MaxPool2d"]),
        ([Conv2d(**CONV), MaxPool2d((2, 3))], ["Conv2d + MaxPool2d"]),
        ([Conv2d(**CONV)], ["Conv2d"]),
        ([Sequential(Conv2d(**CONV), Sequential()), ReLU()], ["Conv2d + ReLU"]),
        (
            [Conv2d(**CONV), ReLU(), Dropout(), MaxPool2d(2)],
            ["Conv2d + ReLU", "Dropout", "MaxPool2d"],
        ),
        ([Conv2d(**CONV), MaxPool2d(2, stride=1)], ["Conv2d", "MaxPool2d"]),
        ([Conv2d(**CONV), MaxPool2d(2, padding=1)], ["Conv2d", "MaxPool2d"]),
        ([Conv2d(**CONV), MaxPool2d(2, ceil_mode=True)], ["Conv2d", "MaxPool2d"]),
        ([Conv2d(**CONV), MaxPool2d(2, dilation=2)], ["Conv2d", "MaxPool2d"]),
        ([Conv2d(**CONV), MaxPool2d(16)], ["Conv2d", "MaxPool2d"]),  # winners take one byte
        ([Mine(**CONV), ReLU()], ["Mine", "ReLU"]),
        ([Residual(Conv2d(**CONV, padding=1)), ReLU()], ["Residual", "ReLU"]),
    ],
)
def test_layers_that_run_together(layers, kinds):
    assert [stage.what for stage in GpuPlan(Sequential(*layers)).stages] == kinds


def test_a_layer_in_two_places_runs_as_it_is():
    conv = Conv2d(**CONV)
    assert len(GpuPlan(Sequential(conv, ReLU(), conv, ReLU())).stages) == 1


def test_the_plan_tells_what_runs(cupy):
    _, there = trainers(convolutional)
    lines = str(there.plan()).splitlines()
    assert lines[1].split("  ")[0] == "0.0, 0.1, 0.2"
    assert "Conv2d + ReLU + MaxPool2d" in lines[1]
    assert "Conv2d + ReLU" in lines[2]
    assert "steps will be recorded" in lines[-1]
    there.fused = False
    assert "(model)" in str(there.plan())


def test_what_a_step_of_the_reference_network_launches(cupy, monkeypatch):
    names = []
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a, **k: (names.append(a[1]), launch(*a, **k))[1])
    model = to_gpu(models.mnist_cnn(rng=0))
    trainer = Trainer(model, Adam(model))
    x, y = to_gpu((np.zeros((2, 1, 28, 28), "f4"), np.arange(2)))
    trainer.step(x, y)  # op by op
    names.clear()
    trainer.step(x, y)  # as it will be recorded
    linear, block = (
        ["linear_product"] * 2,
        ["conv2d_spread", "conv2d_weight_gradient", "conv2d_add"],
    )
    assert names == [
        *["conv2d_forward"] * 2,
        *linear,
        "softmax_cross_entropy",
        *linear,
        "relu_backward",
        *linear,
        *block,
        "conv2d_input_gradient",
        *block,  # nobody wants the gradient to the input
        "finish_step",
        "adam",
    ]
