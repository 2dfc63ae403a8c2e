"""Networks that export and import are tested on: every layer, with every argument."""

import numpy as np

import minicnn as mc
from minicnn import (
    ELU,
    GELU,
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvTranspose2d,
    Dropout,
    Flatten,
    GroupNorm,
    LayerNorm,
    LeakyReLU,
    Linear,
    LogSoftmax,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)


def settled(layer, seed=0):
    """Parameters and statistics other than ones and zeros."""
    rng = np.random.default_rng(seed)
    for _, inner in layer.modules():
        for a in (*inner.params.values(), *inner.buffers.values()):
            if a.dtype.kind == "f":
                a[...] = rng.uniform(0.5, 1.5, a.shape)
    return layer


def bn(channels, **options):
    return settled(BatchNorm2d(channels, **options), channels)


NETWORKS = {
    "the reference network": (mc.models.mnist_cnn(0), (1, 28, 28)),
    "every argument of Conv2d": (
        Conv2d(4, 6, (3, 2), (2, 1), ((1, 2), (0, 1)), (1, 2), 2, rng=0), (4, 9, 8)),
    "Conv2d 'same' without bias": (
        Conv2d(4, 6, (4, 3), padding="same", bias=False, rng=0), (4, 9, 8)),
    "every argument of ConvTranspose2d": (
        ConvTranspose2d(2, 4, (3, 2), (2, 3), ((1, 0), (0, 1)), (1, 2), 2, rng=0), (2, 5, 6)),
    "output_padding above the stride, within the padding": (
        ConvTranspose2d(2, 4, 3, 1, 1, 1, dilation=2, rng=0), (2, 5, 6)),
    "output_padding past what was painted": (
        ConvTranspose2d(2, 4, 3, 1, 0, 1, dilation=2, rng=0), (2, 5, 6)),
    "the same without bias": (
        ConvTranspose2d(2, 4, 3, 1, 0, 1, dilation=2, bias=False, rng=0), (2, 5, 6)),
    "residual blocks in nested Sequentials": (
        Sequential(
            Residual(Sequential(Conv2d(3, 3, 3, padding=1, rng=0), bn(3), ReLU())),
            Sequential(
                Residual(Conv2d(3, 5, 3, 2, 1, rng=0),
                         Sequential(Conv2d(3, 5, 1, 2, bias=False, rng=1), bn(5))),
                ReLU(),
            ),
            AdaptiveAvgPool2d(1), Flatten(), Linear(5, 4, rng=2),
        ), (3, 7, 7)),
    "a layer that stands in two places": (
        (lambda shared: Sequential(shared, ReLU(), shared))(Conv2d(2, 2, 1, rng=0)), (2, 3, 3)),
    "LayerNorm and Linear on more than 2 axes": (
        settled(Sequential(LayerNorm((4, 5)), Linear(5, 7, rng=0), LayerNorm(7, bias=False),
                           Linear(7, 2, bias=False, rng=0),
                           LayerNorm(2, elementwise_affine=False))), (3, 4, 5)),
    "GroupNorm": (settled(Sequential(GroupNorm(2, 4), GroupNorm(4, 4, affine=False),
                                     GroupNorm(1, 4, bias=False))), (4, 3, 3)),
    "BatchNorm2d": (bn(3), (3, 4, 4)),
    "BatchNorm2d without scale and shift": (bn(3, affine=False), (3, 4, 4)),
    "BatchNorm2d without running statistics": (bn(3, track_running_stats=False), (3, 4, 4)),
    "Softmax and LogSoftmax": (Sequential(Softmax(1), LogSoftmax(-1)), (3, 4, 4)),
    "Flatten some axes": (Sequential(Flatten(2, 3), Flatten(1, 2)), (3, 4, 4)),
    "Flatten the batch, too": (Flatten(0, 1), (3, 4)),
    "Dropout": (Sequential(Dropout(0.5), SiLU()), (3, 4, 4)),
    "dilated MaxPool2d": (MaxPool2d(3, 2, 1, (2, 1), ceil_mode=True), (2, 8, 7)),
    **{
        repr(layer): (layer, (3, 4, 5))
        for layer in (ReLU(), LeakyReLU(0.2), ELU(0.7), Sigmoid(), Tanh(), GELU(), GELU("tanh"),
                      SiLU(), Softplus(), Softplus(2.0, 3.0))
    },
    **{f"AdaptiveAvgPool2d({size})": (AdaptiveAvgPool2d(size), (2, 8, 7))
       for size in (1, (2, 3), (4, 7), (3, None), (5, 9))},
}  # fmt: skip
for kernel, stride, padding, ceil in [
    (3, 2, 1, False), (3, 2, 1, True), ((3, 2), None, 0, True),
    ((3, 2), (2, 1), ((0, 1), (1, 0)), True),
    (2, 3, 1, True), (2, 3, ((0, 1), (1, 0)), False),
]:  # fmt: skip
    options = {"kernel_size": kernel, "stride": stride, "padding": padding, "ceil_mode": ceil}
    NETWORKS[f"MaxPool2d {options}"] = MaxPool2d(**options), (2, 8, 7)
    for more in ({}, {"count_include_pad": False}, {"divisor_override": 5}):
        NETWORKS[f"AvgPool2d {options | more}"] = AvgPool2d(**options, **more), (2, 8, 7)
