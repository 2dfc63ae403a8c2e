"""minicnn: convolutional networks from scratch, every forward and backward pass by hand."""

from minicnn.backend import to_cpu, to_gpu, use
from minicnn.gradcheck import gradcheck

__version__ = "0.1.0"
__all__ = ["gradcheck", "to_cpu", "to_gpu", "use"]
