"""Initial weights, after `torch.nn.init`, as new arrays.

Weights have shape (out, in, ...): ``fan_in = in * taps``, ``fan_out = out * taps`` where taps
is the product of the kernel axes.

References
----------
X. Glorot, Y. Bengio, "Understanding the difficulty of training deep feedforward neural
networks", AISTATS 2010 (Xavier).
K. He, X. Zhang, S. Ren, J. Sun, "Delving deep into rectifiers", ICCV 2015 (Kaiming).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np

from minicnn.backend import Array
from minicnn.shapes import size

Rng = int | np.random.Generator | None  # None: unpredictable, from the operating system

MOST_BYTES = 1 << 40  # of a weight, beyond any use
_room: ContextVar[int] = ContextVar("room for initial weights", default=MOST_BYTES)

GAINS = {
    "linear": 1.0,
    "conv2d": 1.0,
    "sigmoid": 1.0,
    "tanh": 5 / 3,
    "relu": math.sqrt(2),
    "selu": 3 / 4,
}


def calculate_gain(nonlinearity: str, param: float = 0.01) -> float:
    """Return the factor that keeps the variance through `nonlinearity`.

    Parameters
    ----------
    nonlinearity : {"linear", "conv2d", "sigmoid", "tanh", "relu", "selu", "leaky_relu"}
    param : float
        Negative slope of "leaky_relu".

    Raises
    ------
    ValueError
        For any other name.
    """
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + param**2))
    if nonlinearity not in GAINS:
        raise ValueError(
            f"calculate_gain: nonlinearity: expected one of {(*GAINS, 'leaky_relu')}, "
            f"got {nonlinearity!r}"
        )
    return GAINS[nonlinearity]


def fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return (fan_in, fan_out) of a weight of `shape` (out, in, ...)."""
    if len(shape) < 2:
        raise ValueError(f"init: shape: expected at least 2 axes (out, in, ...), got {shape}")
    if not size(shape):
        raise ValueError(f"init: shape: expected no axis of length 0, got {shape}")
    taps = size(shape[2:])
    return shape[1] * taps, shape[0] * taps


def generator(op: str, rng: Rng) -> np.random.Generator:
    """Return the generator that `rng` is or seeds, or raise an error that names the argument."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise type(error)(
            f"{op}: rng: expected a numpy.random.Generator, an integer >= 0 or None, got {rng!r}"
        ) from None


@contextmanager
def limited(nbytes: int) -> Iterator[None]:
    """Refuse to draw more than `nbytes` of weights inside the block: ValueError, and no memory."""
    token = _room.set(nbytes)
    try:
        yield
    finally:
        _room.reset(token)


def _take_room(shape: tuple[int, ...], dtype: Any) -> None:
    nbytes, room = size(shape) * np.dtype(dtype).itemsize, _room.get()
    if nbytes > room:
        raise ValueError(f"init: shape: expected at most {room:,} bytes of weights, got {shape}")
    if room < MOST_BYTES:
        _room.set(room - nbytes)


def uniform(shape: tuple[int, ...], bound: float, rng: Rng = None, dtype: Any = "f4") -> Array:
    """Draw from the uniform distribution on ``[-bound, bound)``."""
    _take_room(shape, dtype)
    return np.random.default_rng(rng).uniform(-bound, bound, shape).astype(dtype)


def normal(shape: tuple[int, ...], std: float, rng: Rng = None, dtype: Any = "f4") -> Array:
    """Draw from the normal distribution of mean 0 and standard deviation `std`."""
    _take_room(shape, dtype)
    return (np.random.default_rng(rng).standard_normal(shape) * std).astype(dtype)


def kaiming_uniform(
    shape: tuple[int, ...],
    rng: Rng = None,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = "f4",
) -> Array:
    """Uniform on ``+-gain * sqrt(3 / fan)``; `a` is the slope of "leaky_relu" (0: plain ReLU)."""
    return uniform(shape, math.sqrt(3) * _kaiming_std(shape, a, mode, nonlinearity), rng, dtype)


def kaiming_normal(
    shape: tuple[int, ...],
    rng: Rng = None,
    a: float = 0.0,
    mode: str = "fan_in",
    nonlinearity: str = "leaky_relu",
    dtype: Any = "f4",
) -> Array:
    """Normal with standard deviation ``gain / sqrt(fan)``."""
    return normal(shape, _kaiming_std(shape, a, mode, nonlinearity), rng, dtype)


def xavier_uniform(
    shape: tuple[int, ...], rng: Rng = None, gain: float = 1.0, dtype: Any = "f4"
) -> Array:
    """Uniform on ``+-gain * sqrt(6 / (fan_in + fan_out))``."""
    return uniform(shape, gain * math.sqrt(6 / sum(fans(shape))), rng, dtype)


def xavier_normal(
    shape: tuple[int, ...], rng: Rng = None, gain: float = 1.0, dtype: Any = "f4"
) -> Array:
    """Normal with standard deviation ``gain * sqrt(2 / (fan_in + fan_out))``."""
    return normal(shape, gain * math.sqrt(2 / sum(fans(shape))), rng, dtype)


def _kaiming_std(shape: tuple[int, ...], a: float, mode: str, nonlinearity: str) -> float:
    if mode not in ("fan_in", "fan_out"):
        raise ValueError(f"init: mode: expected 'fan_in' or 'fan_out', got {mode!r}")
    fan = fans(shape)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)
