"""The math: one op (family) a file, all its versions in that file."""

from minicnn.ops.activations import (
    elu_backward,
    elu_forward,
    gelu_backward,
    gelu_forward,
    leaky_relu_backward,
    leaky_relu_forward,
    relu_backward,
    relu_forward,
    sigmoid_backward,
    sigmoid_forward,
    silu_backward,
    silu_forward,
    softplus_backward,
    softplus_forward,
    tanh_backward,
    tanh_forward,
)
from minicnn.ops.adaptive_avg_pool2d import (
    adaptive_avg_pool2d_backward,
    adaptive_avg_pool2d_forward,
)
from minicnn.ops.avg_pool2d import avg_pool2d_backward, avg_pool2d_forward
from minicnn.ops.batch_norm import batch_norm_backward, batch_norm_forward
from minicnn.ops.conv2d import conv2d_backward, conv2d_forward
from minicnn.ops.conv_block import conv_block_backward, conv_block_forward
from minicnn.ops.conv_transpose2d import conv_transpose2d_backward, conv_transpose2d_forward
from minicnn.ops.cross_entropy import (
    cross_entropy_backward,
    cross_entropy_forward,
    nll_loss_backward,
    nll_loss_forward,
)
from minicnn.ops.dropout import dropout_backward, dropout_forward
from minicnn.ops.flatten import flatten_backward, flatten_forward
from minicnn.ops.group_norm import group_norm_backward, group_norm_forward
from minicnn.ops.im2col import col2im, im2col
from minicnn.ops.layer_norm import layer_norm_backward, layer_norm_forward
from minicnn.ops.linear import linear_backward, linear_forward
from minicnn.ops.losses import (
    bce_with_logits_backward,
    bce_with_logits_forward,
    l1_loss_backward,
    l1_loss_forward,
    mse_loss_backward,
    mse_loss_forward,
)
from minicnn.ops.max_pool2d import max_pool2d_backward, max_pool2d_forward
from minicnn.ops.softmax import (
    log_softmax_backward,
    log_softmax_forward,
    softmax_backward,
    softmax_forward,
)

__all__ = [
    "adaptive_avg_pool2d_backward",
    "adaptive_avg_pool2d_forward",
    "avg_pool2d_backward",
    "avg_pool2d_forward",
    "batch_norm_backward",
    "batch_norm_forward",
    "bce_with_logits_backward",
    "bce_with_logits_forward",
    "col2im",
    "conv2d_backward",
    "conv2d_forward",
    "conv_block_backward",
    "conv_block_forward",
    "conv_transpose2d_backward",
    "conv_transpose2d_forward",
    "cross_entropy_backward",
    "cross_entropy_forward",
    "dropout_backward",
    "dropout_forward",
    "elu_backward",
    "elu_forward",
    "flatten_backward",
    "flatten_forward",
    "gelu_backward",
    "gelu_forward",
    "group_norm_backward",
    "group_norm_forward",
    "im2col",
    "l1_loss_backward",
    "l1_loss_forward",
    "layer_norm_backward",
    "layer_norm_forward",
    "leaky_relu_backward",
    "leaky_relu_forward",
    "linear_backward",
    "linear_forward",
    "log_softmax_backward",
    "log_softmax_forward",
    "max_pool2d_backward",
    "max_pool2d_forward",
    "mse_loss_backward",
    "mse_loss_forward",
    "nll_loss_backward",
    "nll_loss_forward",
    "relu_backward",
    "relu_forward",
    "sigmoid_backward",
    "sigmoid_forward",
    "silu_backward",
    "silu_forward",
    "softmax_backward",
    "softmax_forward",
    "softplus_backward",
    "softplus_forward",
    "tanh_backward",
    "tanh_forward",
]
