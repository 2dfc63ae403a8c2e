"""Networks built from layers."""

from minicnn.models.mnist_cnn import mnist_cnn

__all__ = ["mnist_cnn"]
