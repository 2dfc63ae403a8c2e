"""The optimisers' steps on the GPU, all parameters in one launch: the host's side of optim.cu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array, array_module
from minicnn.ops import cuda
from minicnn.optim import SGD, Adam, AdamW, Optimizer, RMSprop

PIECE = 1024  # elements that a block takes
# In the order in which optim.cu takes them.
SLOTS: dict[type, tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    Adam: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    AdamW: ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    RMSprop: ("square_avg", "grad_avg", "momentum_buffer"),
}
MOST_SLOTS = 3


class Update:
    """The step of an optimiser of a type in SLOTS, for parameters of one dtype.

    Addresses are looked up once, here: build it before a graph is captured, and anew when an array
    has been replaced.

    Parameters
    ----------
    optimizer : Optimizer
    params : sequence of (p, g, state)
        Parameter, gradient and the optimiser's arrays for it by slot; all of one dtype, C order.
    """

    def __init__(
        self, optimizer: Optimizer, params: Sequence[tuple[Array, Array, dict[str, Array]]]
    ) -> None:
        self._optimizer = optimizer
        self._kept = [(p, g, dict(state)) for p, g, state in params]  # alive as long as addresses
        slots = SLOTS[type(optimizer)]
        xp, self.dtype = array_module(params[0][0]), params[0][0].dtype
        table, pieces = [], []
        for tensor, (p, g, state) in enumerate(params):
            arrays = [p, g, *(state.get(slot) for slot in slots)]
            addresses = [0 if a is None else address(a) for a in arrays]
            table.append(addresses + [0] * (2 + MOST_SLOTS - len(addresses)))
            pieces += [(tensor, first) for first in range(0, p.size, PIECE)]
        self._blocks = len(pieces)
        self._tables = [
            xp.asarray(np.array(rows, np.int64).reshape(-1))
            for rows in (pieces, [p.size for p, _, _ in params], table)
        ]

    def __call__(self, rates: Array) -> None:
        """Change parameters and state in place.

        Parameters
        ----------
        rates : array, shape (4,), of the parameters' dtype, on the device
            0 to change nothing, else 1; then what changes from step to step: see optim.cu.
        """
        o: Any = self._optimizer
        args: tuple[Any, ...]
        if isinstance(o, SGD):
            name = "sgd"
            args = (bool(o.momentum), o.nesterov, bool(o.weight_decay), o.momentum, o.weight_decay)
        elif isinstance(o, Adam):
            name, (beta1, beta2) = "adam", o.betas
            flags = "max_exp_avg_sq" in self._kept[0][2], isinstance(o, AdamW), bool(o.weight_decay)
            args = (*flags, beta1, 1 - beta1, beta2, 1 - beta2, o.eps, o.weight_decay)
        else:
            name, slots = "rmsprop", self._kept[0][2]
            flags = "grad_avg" in slots, bool(o.momentum), bool(o.weight_decay)
            args = (*flags, o.alpha, 1 - o.alpha, o.eps, o.weight_decay, o.momentum)
        args = tuple(int(a) if isinstance(a, bool) else float(a) for a in args)
        cuda.launch(
            "optim",
            name,
            self.dtype,
            (self._blocks,),
            256,
            *self._tables,
            rates,
            *args,
            package="minicnn",
            exact=True,
        )


def finish_step(
    gradients: Array, loss: Array, kept: Array, correct: Array, rates: Array, tally: Array
) -> None:
    """Check a step's gradients and loss for NaN and infinities and keep count, in one launch.

    Parameters
    ----------
    gradients : array, shape (n,)
        All of them, one behind the other.
    loss, kept, correct : arrays without axes
        From `minicnn.ops.softmax_cupy.labelled`.
    rates : array, shape (4,)
        The first number becomes 1 if all steps so far were good, else 0: see `Update`.
    tally : array, shape (6,), float64
        As `minicnn.gpu.training` keeps it.
    """
    args = (gradients, loss, kept, correct, rates, tally, cuda.counters(array_module(gradients)))
    cuda.launch(
        "optim",
        "finish_step",
        gradients.dtype,
        (max(1, -(-gradients.size // PIECE)),),
        256,
        np.int64(gradients.size),
        *args,
        package="minicnn",
        exact=True,
    )


def address(a: Array) -> int:
    """Return where an array lies."""
    return a.ctypes.data if isinstance(a, np.ndarray) else a.data.ptr
