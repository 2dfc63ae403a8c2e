"""Check a hand-written backward pass against the forward pass it belongs to.

Finite differences: with a random upstream gradient `dy`, the scalar ``sum(y * dy)`` has the
gradient that ``backward(dy)`` must return, and its slope along each element follows from two
forward passes, ``(f(x + h) - f(x - h)) / 2h``, with an error of order h**2 plus rounding / h.

Adjoint: where y is linear in x, ``<A x, dy> = <x, A* dy>`` holds to rounding for any x and dy.

The upstream gradient is never all ones: behind a softmax or a normalisation that gradient is
identically zero, and a backward that returns zeros would pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array

STREAM = 0x6472  # sets the draws of dy apart from the caller's
STEP = 1e-6  # near the cube root of the rounding unit: truncation and rounding errors balance


class Check(NamedTuple):
    """The comparison of one gradient with finite differences."""

    name: str
    ok: bool
    error: float  # largest |analytic - numeric| / (atol + rtol * scale); above 1 fails
    where: tuple[int, ...]  # position of the worst element
    analytic: float
    numeric: float

    def __str__(self) -> str:
        verdict = "ok  " if self.ok else "FAIL"
        return (
            f"{verdict} {self.name}: worst element {self.where}: "
            f"analytic {self.analytic:.8g}, numeric {self.numeric:.8g}, error/tolerance "
            f"{self.error:.2g}"
        )


class GradcheckReport(NamedTuple):
    """All the comparisons of one `gradcheck`; true when every one holds."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every gradient agrees."""
        return all(check.ok for check in self.checks)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))


def numerical_gradient(
    f: Callable[[], Array], x: np.ndarray, dy: np.ndarray, step: float = STEP
) -> np.ndarray:
    """Central differences of ``sum(f() * dy)`` along every element of `x`.

    Parameters
    ----------
    f : callable
        Returns y, computed from `x`, which is changed in place for each evaluation and put back.
    x : numpy.ndarray, float64
    dy : numpy.ndarray
        Upstream gradient, of y's shape.
    step : float
        Half the distance of the two evaluations, relative to ``max(1, |x|)``.

    Returns
    -------
    numpy.ndarray, shape of x

    Raises
    ------
    TypeError
        If `x` is not float64: differences in float32 drown in rounding.
    """
    if x.dtype != np.float64:
        raise TypeError(f"numerical_gradient: x: expected float64, got {x.dtype}")
    dx = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        value = float(x[index])
        h = step * max(1.0, abs(value))
        try:
            x[index] = high = value + h
            above = np.array(f())  # a copy: an op may return a view of x
            x[index] = low = value - h
            # Subtract before summing: both sums are large and nearly equal.
            dx[index] = np.sum((above - f()) * dy) / (high - low)
        finally:
            x[index] = value
    return dx


def gradcheck(
    target: Any,
    *inputs: np.ndarray,
    names: Sequence[str] = (),
    rng: int | np.random.Generator = 0,
    step: float = STEP,
    rtol: float = 1e-6,
    atol: float = 1e-7,
) -> GradcheckReport:
    """Compare a backward pass with finite differences, element by element.

    Parameters
    ----------
    target : (forward, backward) or Layer
        A pair of functions ``forward(*inputs) -> (y, cache)`` and ``backward(dy, cache) ->
        gradients``, one for each input (fix other arguments with `functools.partial`); or a
        layer or model of float64 parameters, whose input and parameters are checked. It is
        checked in the mode it is in, every forward pass with the same draws and statistics,
        and left as it was.
    *inputs : numpy.ndarray, float64
        Where to check. Keep away from kinks (ReLU at 0) and ties (max-pool).
    names : sequence of str, optional
        Names for the report; ``input 0`` and so on otherwise.
    rng : int or numpy.random.Generator
        Draws the upstream gradient.
    step, rtol, atol : float
        Half the distance of the two evaluations, and what counts as equal: at most
        ``atol + rtol * (largest |numeric| of that gradient)``.

    Returns
    -------
    GradcheckReport
        True if all agree; prints one line a gradient with its worst element.

    Raises
    ------
    TypeError
        If an input is not a float64 array.
    ValueError
        If the backward does not return a gradient for each input.

    Examples
    --------
    >>> import numpy as np
    >>> from minicnn import ops
    >>> x = np.random.default_rng(0).standard_normal((2, 3))
    >>> bool(gradcheck((ops.tanh_forward, ops.tanh_backward), x))
    True
    """
    for i, x in enumerate(inputs):
        if not isinstance(x, np.ndarray) or x.dtype != np.float64:
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"gradcheck: input {i}: expected a float64 array, got {kind}")
    points = [np.array(x, order="C") for x in inputs]  # own copies: differences move them
    if isinstance(rng, int | np.integer):
        # Not the stream of default_rng(rng): if x came from that, dy would equal x, and where the
        # gradient is zero along x (as behind a normalisation) the check would be hollow.
        rng = np.random.default_rng([rng, STREAM])
    named = [(names[i] if i < len(names) else f"input {i}", x) for i, x in enumerate(points)]
    if hasattr(target, "named_params"):
        return _check_layer(target, points, named, rng, step, rtol, atol)
    forward, backward = target
    y, cache = forward(*points)
    dy = np.random.default_rng(rng).standard_normal(np.shape(y))
    grads = backward(dy, cache)
    grads = grads if isinstance(grads, tuple | list) else (grads,)
    if len(grads) < len(points) or any(g is None for g in grads[: len(points)]):
        returned = sum(g is not None for g in grads)
        raise ValueError(
            f"gradcheck: backward: expected a gradient for each of {len(points)} inputs, got "
            f"{returned} (fix inputs that have none with functools.partial)"
        )
    return _report(lambda: forward(*points)[0], named, grads, dy, step, rtol, atol)


def _check_layer(
    layer: Any,
    points: list[np.ndarray],
    named: list[tuple[str, np.ndarray]],
    rng: Any,
    *tolerances: float,
) -> GradcheckReport:
    if len(points) != 1:
        raise ValueError(f"gradcheck: inputs: expected one for a layer, got {len(points)}")
    (x,) = points
    params = list(layer.named_params())
    # What a forward pass moves on: put back before each, so that all see the same function.
    buffers = [a for _, part in layer.modules() for a in part.buffers.values()]
    draws = [part.rng.bit_generator for _, part in layer.modules() if hasattr(part, "rng")]
    held = [a.copy() for a in buffers], [source.state for source in draws]
    grads = [g.copy() for _, _, g in params]

    def put_back() -> None:
        for a, value in zip(buffers, held[0]):
            a[...] = value
        for source, state in zip(draws, held[1]):
            source.state = state

    def forward() -> tuple[Any, Any]:
        put_back()
        return layer.forward(x)

    try:
        y, cache = forward()
        dy = np.random.default_rng(rng).standard_normal(np.shape(y))
        for _, _, g in params:
            g[...] = 0  # a layer's backward adds
        analytic = [layer.backward(dy, cache), *(g.copy() for _, _, g in params)]
        named = named + [(name, p) for name, p, _ in params]
        return _report(lambda: forward()[0], named, analytic, dy, *tolerances)
    finally:
        put_back()
        for (_, _, g), value in zip(params, grads):
            g[...] = value


def _report(
    f: Callable[[], Array],
    named: Sequence[tuple[str, np.ndarray]],
    grads: Sequence[Array],
    dy: np.ndarray,
    step: float,
    rtol: float,
    atol: float,
) -> GradcheckReport:
    return GradcheckReport(
        tuple(
            compare(name, np.asarray(grad), numerical_gradient(f, x, dy, step), rtol, atol)
            for (name, x), grad in zip(named, grads)
        )
    )


def compare(
    name: str, analytic: np.ndarray, numeric: np.ndarray, rtol: float, atol: float
) -> Check:
    """Compare two gradients of one array and find the worst element."""
    if analytic.shape != numeric.shape:
        raise ValueError(
            f"gradcheck: {name}: expected a gradient of shape {numeric.shape}, got {analytic.shape}"
        )
    if not numeric.size:
        return Check(name, True, 0.0, (), 0.0, 0.0)
    scale = np.max(np.abs(numeric))
    error = np.abs(analytic - numeric) / (atol + rtol * scale)
    # argmax stops at a NaN, and a NaN is not <= 1.
    where = tuple(int(i) for i in np.unravel_index(np.argmax(error), error.shape))
    worst = float(error[where])
    return Check(name, worst <= 1, worst, where, float(analytic[where]), float(numeric[where]))


def adjoint_gap(y: np.ndarray, dy: np.ndarray, x: np.ndarray, dx: np.ndarray) -> float:
    """How far ``<y, dy>`` and ``<x, dx>`` differ, relative to the sum of |terms|.

    For an op that is linear in `x` (``y = A x``, no bias) and its backward ``dx = A* dy`` this
    is of the order of the rounding unit.
    """
    left, right = np.vdot(y, dy), np.vdot(x, dx)
    terms = np.vdot(np.abs(y), np.abs(dy)) + np.vdot(np.abs(x), np.abs(dx))
    return float(abs(left - right) / terms) if terms else 0.0
