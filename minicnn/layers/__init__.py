"""The state: layers hold parameters, gradients and hyper-parameters, and call ops."""

from minicnn.layers.activation import (
    ELU,
    GELU,
    LeakyReLU,
    LogSoftmax,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Softplus,
    Tanh,
)
from minicnn.layers.base import Layer
from minicnn.layers.conv import Conv2d, ConvTranspose2d
from minicnn.layers.dropout import Dropout
from minicnn.layers.linear import Flatten, Linear
from minicnn.layers.norm import BatchNorm2d, GroupNorm, LayerNorm
from minicnn.layers.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from minicnn.layers.sequential import Residual, Sequential

__all__ = [
    "ELU",
    "GELU",
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvTranspose2d",
    "Dropout",
    "Flatten",
    "GroupNorm",
    "Layer",
    "LayerNorm",
    "LeakyReLU",
    "Linear",
    "LogSoftmax",
    "MaxPool2d",
    "ReLU",
    "Residual",
    "Sequential",
    "SiLU",
    "Sigmoid",
    "Softmax",
    "Softplus",
    "Tanh",
]
