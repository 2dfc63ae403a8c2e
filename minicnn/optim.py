"""Optimisers: SGD, Adam, AdamW and RMSprop, equal to PyTorch's step by step.

An optimiser sees a model only through ``model.named_params()``, which yields a name, a parameter
and its gradient. The mathematics is in three functions on arrays, `sgd_update`, `adam_update` and
`rmsprop_update`; the classes keep what a parameter needs from one step to the next.

Letters: p parameter, g gradient, m running mean of g, v running mean of g**2, b momentum buffer,
t scratch array of p's shape and dtype, so that a step allocates (almost) nothing. All arithmetic
is in p's dtype: the hyper-parameters are Python floats, which leave float32 arrays float32.

m and b of a parameter whose gradient stays zero, such as a weight of a dead unit, shrink by a
factor a step until they are denormal, and stay there: 0.9 times the smallest number rounds to
itself. A processor takes many times longer over such numbers (a step on MNIST took a third longer
after the first epoch), so all versions set them to zero: see `flush`. It moves no parameter by
more than that, except where a step divides by something as small. v is left alone: it shrinks so
slowly that this takes some 10,000 steps or more, and p may be divided by its root with eps of 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from minicnn.backend import Array, array_module, pick, same, to_cpu
from minicnn.shapes import check_shape, number

if TYPE_CHECKING:
    from minicnn.optim_numba import Together

Params = Sequence[tuple[str, Array, Array]]  # name, parameter, gradient

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Optimizer",
    "RMSprop",
    "adam_update",
    "all_finite",
    "clip_grad_norm",
    "clip_grad_value",
    "rmsprop_update",
    "sgd_update",
]


def all_finite(*arrays: Array) -> bool:
    """Tell whether no number of the arrays is NaN or infinite."""
    return all(bool(array_module(a).isfinite(a).all()) for a in arrays)


class HasParams(Protocol):
    """Anything with parameters to train: a layer or a model."""

    def named_params(self) -> Iterable[tuple[str, Array, Array]]:
        """Yield (name, parameter, gradient)."""


class Optimizer:
    """What all optimisers share: the loop over parameters and the state that goes with it.

    A subclass names its slots, the arrays it keeps for each parameter, and writes `_update`. Those
    of this module name a rule instead, which Numba applies to all parameters in one go.

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``. Build the optimiser after moving or changing the model.
    lr : float
        Learning rate, at least 0.
    slots : sequence of str
        Names of the arrays kept for each parameter; they start at zero.

    Attributes
    ----------
    lr : float
        Learning rate of the next step. May be set at any time, by a schedule for example.
    step_count : int
        Steps taken so far.
    """

    _rule: ClassVar[str]  # a function here, and in `optim_numba.RULES`
    _slots: ClassVar[tuple[str, ...]]  # in the order in which it takes them, after p and g

    def __init__(self, model: HasParams, lr: float, slots: Sequence[str]) -> None:
        if not hasattr(model, "named_params"):
            raise TypeError(
                f"{self._name}: model: expected a layer or a model, got {type(model).__name__}"
            )
        self.model = model
        self.lr = lr
        self.step_count = 0
        self._state: dict[str, dict[str, Array]] = {}
        self._scratch: dict[str, Array] = {}
        self._together: Together | None = None
        for name, p, _ in model.named_params():
            xp = array_module(p)
            self._state[name] = {slot: xp.zeros_like(p) for slot in slots}
            self._scratch[name] = xp.empty_like(p)

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def lr(self) -> float:
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        self._lr = number(self._name, "lr", lr, ge=0)

    def step(self) -> None:
        """Update every parameter in place from its gradient.

        Raises
        ------
        ValueError
            If the model has a parameter that the optimiser was not built with, or one whose
            shape, dtype or device has changed. Nothing is updated then.
        """
        self._step(list(self.model.named_params()), if_finite=False)

    def step_if_finite(self, params: Params) -> bool:
        """Make a step unless a gradient is NaN or infinite, and tell whether it was made.

        Parameters
        ----------
        params : sequence of (str, array, array)
            What ``model.named_params()`` yields now.

        Raises
        ------
        ValueError
            As `step`.
        """
        if type(self).step is Optimizer.step:
            return self._step(params, if_finite=True)
        finite = all_finite(*(g for _, _, g in params))
        if finite:
            self.step()
        return finite

    def _step(self, params: Params, if_finite: bool) -> bool:
        together = self._by_kernel(params)
        rest = params if together is None else [params[i] for i in together.left]
        if if_finite:
            if together is not None and not together.finite():
                return False
            if not all_finite(*(g for _, _, g in rest)):
                return False
        self.step_count += 1
        if together is not None:
            together(**self._options())
        for name, p, g in rest:
            self._update(p, g, self._state[name], self._scratch[name])
        return True

    def _by_kernel(self, params: Params) -> Together | None:
        """Return what updates parameters by one kernel, where it is Numba that does."""
        by_numba: Mapping[str, Any] = {"numba": True, "numpy": False}
        by_rule = type(self)._update is Optimizer._update
        if not (by_rule and params and pick("step", by_numba, params[0][1])):
            self.check(params)
            return None
        arrays = [a for _, p, g in params for a in (p, g)]
        if self._together is None or not same(arrays, self._together.arrays):
            from minicnn.optim_numba import Together  # imports Numba: only when asked for

            self.check(params)
            rows = [(p, g, *map(self._state[name].get, self._slots)) for name, p, g in params]
            self._together = Together(self._rule, arrays, rows)
        return self._together

    def check(self, params: Iterable[tuple[str, Array, Array]]) -> None:
        """Raise ValueError for a parameter that is not as it was when the optimiser was built."""
        for name, p, _ in params:
            t = self._scratch.get(name)
            if t is None or (type(t), t.dtype, t.shape) != (type(p), p.dtype, p.shape):
                raise ValueError(
                    f"{self._name}: {name}: expected {_describe(t)} as when the optimiser was "
                    f"built, got {_describe(p)} (fix: build it after changing or moving the "
                    "model, or move both)"
                )

    def _update(self, p: Array, g: Array, state: dict[str, Array], t: Array) -> None:
        """Change `p` and the arrays in `state` in place; `g` is left alone, `t` is scratch."""
        globals()[self._rule](p, g, *map(state.get, self._slots), t, **self._options())

    def _options(self) -> dict[str, Any]:
        """Return what the rule takes beside arrays, in the step that has been counted."""
        raise NotImplementedError

    def state_of(self, name: str) -> dict[str, Array]:
        """The arrays kept for the parameter `name`, by slot."""
        return self._state[name]

    def scratch_of(self, name: str) -> Array:
        """An array of that parameter's shape and dtype, of no lasting content."""
        return self._scratch[name]

    def zero_grad(self) -> None:
        """Set every gradient to zero, in place."""
        for _, _, g in self.model.named_params():
            g.fill(0)

    def map_arrays(self, convert: Callable[[Array], Array]) -> None:
        """Replace every array kept by ``convert(array)``; `to_gpu` and `to_cpu` call it."""
        self._together = None
        self._scratch = {name: convert(t) for name, t in self._scratch.items()}
        self._state = {
            name: {slot: convert(a) for slot, a in state.items()}
            for name, state in self._state.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_together": None}  # it knows the addresses of these arrays

    def state_dict(self) -> dict[str, np.ndarray]:
        """Copy what the next step depends on, apart from the arguments of the constructor.

        Returns
        -------
        dict of str to numpy.ndarray
            ``"step"`` (int64, no axes) and ``"<parameter>.<slot>"``, such as
            ``"0.weight.exp_avg"``, in C order.
        """
        state = {"step": np.array(self.step_count, dtype=np.int64)}
        for key, a in self._named_slots().items():
            state[key] = np.array(to_cpu(a), order="C")
        return state

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take over the values of a `state_dict`. Nothing changes if anything is wrong with it.

        Parameters
        ----------
        state : mapping of str to numpy.ndarray
            Exactly the keys and shapes of ``self.state_dict()``.

        Raises
        ------
        ValueError
            For a missing or unexpected key, a wrong shape, or a negative step.
        TypeError
            If the step is not an integer or another array is not float32 or float64.
        """
        op = f"{self._name}.load_state_dict"
        targets = self._named_slots()
        missing = sorted({"step", *targets} - state.keys())
        unexpected = sorted(state.keys() - {"step", *targets})
        if missing or unexpected:
            raise ValueError(
                f"{op}: state: expected the keys of state_dict(), got missing {missing} and "
                f"unexpected {unexpected} (fix: same model and same options as when it was saved)"
            )
        values = {key: np.asarray(value) for key, value in state.items()}
        step = values.pop("step")
        check_shape(op, "step", step, ())
        if step.dtype.kind not in "iu":
            raise TypeError(f"{op}: step: expected an integer, got {step.dtype}")
        if step < 0:
            raise ValueError(f"{op}: step: expected an integer >= 0, got {step}")
        for key, value in values.items():
            check_shape(op, key, value, targets[key].shape)
            if value.dtype.kind != "f":
                raise TypeError(f"{op}: {key}: expected a float array, got {value.dtype}")
        self.step_count = int(step)
        for key, a in targets.items():
            a[...] = array_module(a).asarray(values[key], dtype=a.dtype)

    def _named_slots(self) -> dict[str, Array]:
        return {
            f"{name}.{slot}": a for name, state in self._state.items() for slot, a in state.items()
        }


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if asked for.

    With ``g = grad + weight_decay * p``::

        b = momentum * b + (1 - dampening) * g      (the first step is not damped)
        p = p - lr * b                              (without momentum: p - lr * g)
        p = p - lr * (g + momentum * b)             (with nesterov, instead)

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``.
    lr : float
        Learning rate, at least 0.
    momentum : float
        Share of the buffer b that a step keeps, at least 0.
    dampening : float
        Share of the gradient that the buffer does not take in, in [0, 1].
    weight_decay : float
        L2 penalty, added to the gradient, at least 0.
    nesterov : bool
        Look ahead along the buffer; needs ``momentum > 0`` and ``dampening == 0``.

    References
    ----------
    Sutskever, Martens, Dahl and Hinton, "On the importance of initialization and momentum in deep
    learning", ICML 2013. As in PyTorch, lr multiplies b instead of entering it.
    """

    _rule = "sgd_update"
    _slots = ("momentum_buffer",)

    def __init__(
        self,
        model: HasParams,
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ) -> None:
        self.momentum = number("SGD", "momentum", momentum, ge=0)
        self.dampening = number("SGD", "dampening", dampening, ge=0, le=1)
        self.weight_decay = number("SGD", "weight_decay", weight_decay, ge=0)
        self.nesterov = nesterov
        if nesterov and (self.momentum == 0 or self.dampening > 0):
            raise ValueError(
                "SGD: nesterov: expected momentum > 0 and dampening == 0 with it, "
                f"got momentum={momentum} and dampening={dampening}"
            )
        super().__init__(model, lr, ["momentum_buffer"] if momentum else [])

    def _options(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "momentum": self.momentum,
            "dampening": self.dampening if self.step_count > 1 else 0.0,
            "weight_decay": self.weight_decay,
            "nesterov": self.nesterov,
        }


def sgd_update(
    p: Array,
    g: Array,
    b: Array | None,
    t: Array,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Change `p` and `b` in place by one step of `SGD`; `b` is None without momentum."""
    rates = sgd_rates(lr, momentum, dampening)
    sgd_move(p, g, b, t, rates, momentum, bool(dampening), weight_decay, nesterov)


# What changes from step to step is computed first, and then enters as numbers or, in a step that
# is recorded on the GPU (see minicnn.gpu), as arrays without axes.
Rates = Sequence[Any]


def sgd_rates(lr: float, momentum: float, dampening: float) -> tuple[float, float, float]:
    """Return the learning rate, the share of g that b takes in, and nesterov's rate of b."""
    return lr, 1 - dampening, lr * momentum


def sgd_move(
    p: Array,
    g: Array,
    b: Array | None,
    t: Array,
    rates: Rates,
    momentum: float,
    damped: bool,
    weight_decay: float,
    nesterov: bool,
) -> None:
    """Change `p` and `b` as `sgd_update` does, by the numbers of `sgd_rates`."""
    xp, (lr, share, ahead) = array_module(p), rates
    if weight_decay:
        g = xp.add(g, xp.multiply(p, weight_decay, out=t), out=t)
    if b is not None:
        b *= momentum
        b += share * g if damped else g
    # With nesterov the two terms of g + momentum * b come off one after the other: g may be t.
    if b is None or nesterov:
        p -= xp.multiply(g, lr, out=t)
    if b is not None:
        flush(b, t)
        p -= xp.multiply(b, ahead if nesterov else lr, out=t)


class Adam(Optimizer):
    """Adam: steps of about `lr` in every coordinate, whatever the scale of the gradient.

    With ``g = grad + weight_decay * p`` and n the number of the step, counted from 1::

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        p = p - lr * (m / (1 - beta1**n)) / (sqrt(v / (1 - beta2**n)) + eps)

    m and v start at zero, and the two divisions take the pull towards that zero out again. With
    `amsgrad` the largest v so far takes the place of v in the last line.

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``.
    lr : float
        Learning rate, at least 0.
    betas : tuple of two floats
        Decay of m and of v, each in [0, 1).
    eps : float
        Keeps the division finite where v is 0, at least 0.
    weight_decay : float
        L2 penalty, added to the gradient, at least 0.
    amsgrad : bool
        Never let the denominator shrink.

    References
    ----------
    Kingma and Ba, "Adam: A Method for Stochastic Optimization", ICLR 2015, algorithm 1.
    Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018 (amsgrad).
    """

    _rule = "adam_update"
    _slots = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
    _decoupled = False

    def __init__(
        self,
        model: HasParams,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
    ) -> None:
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ValueError(f"{self._name}: betas: expected two numbers, got {betas!r}")
        self.betas = (
            number(self._name, "betas[0]", betas[0], ge=0, lt=1),
            number(self._name, "betas[1]", betas[1], ge=0, lt=1),
        )
        self.eps = number(self._name, "eps", eps, ge=0)
        self.weight_decay = number(self._name, "weight_decay", weight_decay, ge=0)
        super().__init__(model, lr, self._slots if amsgrad else self._slots[:2])

    def _options(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "decoupled": self._decoupled,
            "n": self.step_count,
        }


class AdamW(Adam):
    """Adam whose weight decay acts on the parameter itself, not through m and v.

    ``p = p * (1 - lr * weight_decay)``, then the step of `Adam` on the plain gradient. Parameters
    as for `Adam`; `weight_decay` is 0.01 unless given.

    References
    ----------
    Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2.
    """

    _decoupled = True

    def __init__(
        self,
        model: HasParams,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
    ) -> None:
        super().__init__(model, lr, betas, eps, weight_decay, amsgrad)


def adam_update(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    v_max: Array | None,
    t: Array,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
    n: int,
) -> None:
    """Change `p`, `m`, `v` and `v_max` in place by step number `n` (from 1) of `Adam` or `AdamW`.

    `v_max` is None without amsgrad; `decoupled` tells AdamW's weight decay from Adam's.
    """
    rates = adam_rates(lr, betas, weight_decay, n)
    adam_move(p, g, m, v, v_max, t, rates, betas, eps, weight_decay, decoupled)


def adam_rates(
    lr: float, betas: tuple[float, float], weight_decay: float, n: int
) -> tuple[float, float, float]:
    """Return the rate of m, what the root of v is divided by, and AdamW's factor of p."""
    beta1, beta2 = betas
    return lr / (1 - beta1**n), math.sqrt(1 - beta2**n), 1 - lr * weight_decay


def adam_move(
    p: Array,
    g: Array,
    m: Array,
    v: Array,
    v_max: Array | None,
    t: Array,
    rates: Rates,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> None:
    """Change the arrays as `adam_update` does, by the numbers of `adam_rates`."""
    xp, (beta1, beta2), (rate, root, keep) = array_module(p), betas, rates
    if decoupled:
        p *= keep
    elif weight_decay:
        g = g + weight_decay * p
    m *= beta1
    m += xp.multiply(g, 1 - beta1, out=t)
    flush(m, t)
    v *= beta2
    v += xp.multiply(xp.square(g, out=t), 1 - beta2, out=t)
    if v_max is not None:
        v = xp.maximum(v_max, v, out=v_max)
    xp.sqrt(v, out=t)
    t /= root
    t += eps
    xp.divide(m, t, out=t)
    p -= xp.multiply(t, rate, out=t)


class RMSprop(Optimizer):
    """RMSprop: divide the gradient by the root of its running mean square.

    With ``g = grad + weight_decay * p``::

        v = alpha * v + (1 - alpha) * g**2
        m = alpha * m + (1 - alpha) * g             (centered only)
        d = g / (sqrt(v) + eps)                     (centered: sqrt(v - m**2), the variance)
        p = p - lr * d                              (with momentum: b = momentum * b + d;
                                                     p = p - lr * b)

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``.
    lr : float
        Learning rate, at least 0.
    alpha : float
        Decay of v and m, in [0, 1).
    eps : float
        Keeps the division finite where v is 0, at least 0.
    weight_decay : float
        L2 penalty, added to the gradient, at least 0.
    momentum : float
        Share of the buffer b that a step keeps, at least 0.
    centered : bool
        Divide by the standard deviation of the gradient instead of its root mean square.

    Notes
    -----
    Rounding can leave ``v - m**2`` below zero when a gradient hardly changes. It is taken as zero
    then, where PyTorch gives NaN; everywhere else the two agree.

    References
    ----------
    Tieleman and Hinton, "Lecture 6.5: rmsprop", Neural Networks for Machine Learning, 2012.
    Graves, "Generating Sequences With Recurrent Neural Networks", 2013, arXiv:1308.0850, equations
    38 to 45 (centered).
    """

    _rule = "rmsprop_update"
    _slots = ("square_avg", "grad_avg", "momentum_buffer")

    def __init__(
        self,
        model: HasParams,
        lr: float = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.0,
        centered: bool = False,
    ) -> None:
        self.alpha = number("RMSprop", "alpha", alpha, ge=0, lt=1)
        self.eps = number("RMSprop", "eps", eps, ge=0)
        self.weight_decay = number("RMSprop", "weight_decay", weight_decay, ge=0)
        self.momentum = number("RMSprop", "momentum", momentum, ge=0)
        slots = ["square_avg"]
        slots += ["grad_avg"] if centered else []
        slots += ["momentum_buffer"] if momentum else []
        super().__init__(model, lr, slots)

    def _options(self) -> dict[str, Any]:
        return {
            "lr": self.lr,
            "alpha": self.alpha,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "momentum": self.momentum,
        }


def rmsprop_update(
    p: Array,
    g: Array,
    v: Array,
    m: Array | None,
    b: Array | None,
    t: Array,
    *,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
) -> None:
    """Change `p`, `v`, `m` and `b` in place by one step of `RMSprop`.

    `m` is None unless centered, `b` is None without momentum.
    """
    xp = array_module(p)
    if weight_decay:
        g = g + weight_decay * p
    v *= alpha
    v += xp.multiply(xp.square(g, out=t), 1 - alpha, out=t)
    if m is None:
        xp.sqrt(v, out=t)
    else:
        m *= alpha
        m += xp.multiply(g, 1 - alpha, out=t)
        flush(m, t)
        xp.subtract(v, xp.square(m, out=t), out=t)
        xp.sqrt(xp.maximum(t, 0, out=t), out=t)
    t += eps
    d = xp.divide(g, t, out=t)
    if b is not None:
        b *= momentum
        b += d
        flush(b, t)
        d = b
    p -= xp.multiply(d, lr, out=t)


def flush(a: Array, t: Array) -> None:
    """Set the denormal numbers of `a` to zero, in place; `t` is scratch."""
    xp = array_module(a)
    xp.copyto(a, 0, where=xp.abs(a, out=t) < np.finfo(a.dtype).tiny)


def clip_grad_norm(model: HasParams, max_norm: float) -> float:
    """Scale all gradients together, in place, so that their joint L2 norm is at most `max_norm`.

    The factor is ``min(1, max_norm / (norm + 1e-6))``, as in PyTorch.

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``.
    max_norm : float
        Largest norm allowed, above 0.

    Returns
    -------
    float
        The norm before clipping, summed in float64. If it is NaN or infinite the gradients are
        left as they are, for the caller to look at: scaling would only spread the NaN.

    References
    ----------
    Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks",
    ICML 2013, algorithm 1.
    """
    max_norm = number("clip_grad_norm", "max_norm", max_norm, gt=0)
    grads = [g for _, _, g in model.named_params()]
    # One transfer from the GPU, at the end: the sum stays on the device of the gradients.
    norm = math.sqrt(sum_of_squares(grads))
    scale = max_norm / (norm + 1e-6)
    if math.isfinite(norm) and scale < 1:
        for g in grads:
            g *= scale
    return norm


def sum_of_squares(arrays: Iterable[Array]) -> Any:
    """Return the sum of the squares of all elements, in float64, on the arrays' device."""
    return sum(array_module(a).square(a, dtype=np.float64).sum() for a in arrays)


def clip_grad_value(model: HasParams, clip_value: float) -> None:
    """Limit every element of every gradient to [-clip_value, clip_value], in place; NaN stays.

    Parameters
    ----------
    model : layer or model
        Has ``named_params()``.
    clip_value : float
        Largest magnitude allowed, above 0.
    """
    clip_value = number("clip_grad_value", "clip_value", clip_value, gt=0)
    for _, _, g in model.named_params():
        array_module(g).clip(g, -clip_value, clip_value, out=g)


def _describe(a: Array | None) -> str:
    if a is None:
        return "no such parameter"
    return f"{array_module(a).__name__} {a.dtype} {tuple(a.shape)}"
