"""The math: one op (family) a file, all its versions in that file."""

from minicnn.ops.conv2d import conv2d_backward, conv2d_forward
from minicnn.ops.im2col import col2im, im2col

__all__ = ["col2im", "conv2d_backward", "conv2d_forward", "im2col"]
