"""Networks built from layers."""

from minicnn.models.mnist_cnn import mnist_cnn
from minicnn.models.resnet import resnet_small
from minicnn.models.vgg import vgg_small

__all__ = ["mnist_cnn", "resnet_small", "vgg_small"]
