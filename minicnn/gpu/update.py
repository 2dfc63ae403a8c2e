"""The optimisers' updates in a recorded step.

A recorded step does the same work each time, so the numbers that change from step to step (the
learning rate, Adam's bias corrections) are computed on the host and lie in a small array on the
device, `rates`. Its first number is 0 for a step that must change nothing, because the loss or a
gradient was not finite: the host learns of it later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from minicnn.backend import Array
from minicnn.optim import SGD, Adam, AdamW, Optimizer, RMSprop, adam_rates, sgd_rates
from minicnn.optim_cupy import Update

RATES = 4  # numbers: whether to go on, and up to three of the optimiser's


def _sgd_rates(o: SGD) -> tuple[float, float, float]:
    return sgd_rates(o.lr, o.momentum, o.dampening if o.step_count > 1 else 0.0)


def _adam_rates(o: Adam) -> tuple[float, float, float]:
    return adam_rates(o.lr, o.betas, o.weight_decay, o.step_count)


def _rmsprop_rates(o: RMSprop) -> tuple[float, float, float]:
    return o.lr, 0.0, 0.0


# What changes from step to step, of the step that has been counted. By the exact type: a subclass
# may have an update of its own.
RULES: dict[type, Callable[[Any], tuple[float, float, float]]] = {
    SGD: _sgd_rates,
    Adam: _adam_rates,
    AdamW: _adam_rates,
    RMSprop: _rmsprop_rates,
}


def moves(optimizer: Optimizer, grads: Sequence[Array]) -> dict[Any, Update]:
    """Prepare the change of all parameters and of the optimiser's state, one launch a dtype.

    Parameters
    ----------
    optimizer : Optimizer
        Of a type in RULES.
    grads : sequence of array
        As they are to be used, in the order of the parameters.

    Returns
    -------
    dict of dtype to Update
        To be called with the dtype's rates, an array of shape (RATES,).
    """
    params: dict[Any, list[Any]] = {}
    for (name, p, _), g in zip(optimizer.model.named_params(), grads):
        params.setdefault(p.dtype, []).append((p, g, optimizer.state_of(name)))
    return {dtype: Update(optimizer, some) for dtype, some in params.items()}
