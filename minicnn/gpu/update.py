"""The optimisers' updates in a recorded step.

A recorded step does the same work each time, so the numbers that change from step to step (the
learning rate, Adam's bias corrections) are computed on the host and lie in a small array on the
device, `rates`. Its first number is 0 for a step that must change nothing, because the loss or a
gradient was not finite: the host learns of it later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from minicnn.backend import Array, array_module
from minicnn.optim import (
    SGD,
    Adam,
    AdamW,
    Optimizer,
    Rates,
    RMSprop,
    adam_move,
    adam_rates,
    rmsprop_update,
    sgd_move,
    sgd_rates,
)

RATES = 4  # numbers: whether to go on, and up to three of the optimiser's

State = dict[str, Array]


class Rule(NamedTuple):
    """How one kind of optimiser is recorded."""

    rates: Callable[[Any], tuple[float, float, float]]  # of the step that has been counted
    move: Callable[[Any, Array, Array, State, Array, Rates], None]


def _sgd_rates(o: SGD) -> tuple[float, float, float]:
    return sgd_rates(o.lr, o.momentum, o.dampening if o.step_count > 1 else 0.0)


def _sgd(o: SGD, p: Array, g: Array, state: State, t: Array, rates: Rates) -> None:
    b, damped = state.get("momentum_buffer"), o.dampening > 0
    sgd_move(p, g, b, t, rates, o.momentum, damped, o.weight_decay, o.nesterov)


def _adam_rates(o: Adam) -> tuple[float, float, float]:
    return adam_rates(o.lr, o.betas, o.weight_decay, o.step_count)


def _adam(o: Adam, p: Array, g: Array, state: State, t: Array, rates: Rates) -> None:
    m, v, v_max = state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq")
    decoupled = isinstance(o, AdamW)
    adam_move(p, g, m, v, v_max, t, rates, o.betas, o.eps, o.weight_decay, decoupled)


def _rmsprop_rates(o: RMSprop) -> tuple[float, float, float]:
    return o.lr, 0.0, 0.0


def _rmsprop(o: RMSprop, p: Array, g: Array, state: State, t: Array, rates: Rates) -> None:
    v, m, b = state["square_avg"], state.get("grad_avg"), state.get("momentum_buffer")
    settings = {name: getattr(o, name) for name in ("alpha", "eps", "weight_decay", "momentum")}
    rmsprop_update(p, g, v, m, b, t, lr=rates[0], **settings)


# By the exact type: a subclass may have an update of its own.
RULES: dict[type, Rule] = {
    SGD: Rule(_sgd_rates, _sgd),
    Adam: Rule(_adam_rates, _adam),
    AdamW: Rule(_adam_rates, _adam),
    RMSprop: Rule(_rmsprop_rates, _rmsprop),
}


def move(optimizer: Optimizer, grads: Sequence[Array], rates: dict[Any, Array]) -> None:
    """Change all parameters and the optimiser's state, unless this is a step to leave out.

    Parameters
    ----------
    optimizer : Optimizer
        Of a type in RULES.
    grads : sequence of array
        As they are to be used, in the order of the parameters.
    rates : dict of dtype to array, shape (RATES,)
        For the parameters of each dtype.
    """
    rule = RULES[type(optimizer)]
    for (name, p, _), g in zip(optimizer.model.named_params(), grads):
        state, t, r = optimizer.state_of(name), optimizer.scratch_of(name), rates[p.dtype]
        kept = {key: a.copy() for key, a in state.items()}
        before = p.copy()
        rule.move(optimizer, p, g, state, t, [r[i] for i in range(1, RATES)])
        stop, xp = r[0] == 0, array_module(p)
        for a, old in ((p, before), *((state[key], old) for key, old in kept.items())):
            xp.copyto(a, old, where=stop)
