"""Activation layers: each applies the op of its name, element by element or along one axis."""

from minicnn import ops
from minicnn.layers.base import OpLayer


class ReLU(OpLayer):
    """``max(x, 0)``; its gradient at 0 is 0."""

    op = ops.relu_forward, ops.relu_backward


class LeakyReLU(OpLayer):
    """``x`` where positive, else ``negative_slope * x``."""

    op = ops.leaky_relu_forward, ops.leaky_relu_backward

    def __init__(self, negative_slope: float = 0.01) -> None:
        super().__init__(negative_slope=negative_slope)


class ELU(OpLayer):
    """``x`` where positive, else ``alpha * (exp(x) - 1)``."""

    op = ops.elu_forward, ops.elu_backward

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__(alpha=alpha)


class Sigmoid(OpLayer):
    """``1 / (1 + exp(-x))``."""

    op = ops.sigmoid_forward, ops.sigmoid_backward


class Tanh(OpLayer):
    """Hyperbolic tangent."""

    op = ops.tanh_forward, ops.tanh_backward


class GELU(OpLayer):
    """``x`` times the normal distribution function at ``x``; "tanh" approximates it."""

    op = ops.gelu_forward, ops.gelu_backward

    def __init__(self, approximate: str = "none") -> None:
        super().__init__(approximate=approximate)


class SiLU(OpLayer):
    """``x * sigmoid(x)``, also called swish."""

    op = ops.silu_forward, ops.silu_backward


class Softplus(OpLayer):
    """``log(1 + exp(beta * x)) / beta``; the identity where ``beta * x > threshold``."""

    op = ops.softplus_forward, ops.softplus_backward

    def __init__(self, beta: float = 1.0, threshold: float = 20.0) -> None:
        super().__init__(beta=beta, threshold=threshold)


class Softmax(OpLayer):
    """``exp(x)`` divided by its sum along axis `dim`."""

    op = ops.softmax_forward, ops.softmax_backward

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim=dim)


class LogSoftmax(OpLayer):
    """Logarithm of the softmax along axis `dim`, without the overflow."""

    op = ops.log_softmax_forward, ops.log_softmax_backward

    def __init__(self, dim: int = 1) -> None:
        super().__init__(dim=dim)
