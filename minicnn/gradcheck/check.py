"""Check a pair of functions, a layer or a model against finite differences."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from minicnn.gradcheck import verdicts
from minicnn.gradcheck.differences import (
    STEP,
    STREAM,
    Check,
    Forward,
    compare,
    jacobian,
    numerical_gradient,
    slope,
    sweep,
    tolerance,
)
from minicnn.gradcheck.hints import MAX_JACOBIAN, Evidence, Hint, Suspect, guess
from minicnn.gradcheck.report import GradcheckReport
from minicnn.gradcheck.rules import not_added, not_repeatable, refuse_other_numbers, written
from minicnn.gradcheck.shrink import Smallest, axes_of, cropped, lengths, shrink


def gradcheck(
    target: Any,
    *inputs: np.ndarray,
    names: Sequence[str] = (),
    rng: int | np.random.Generator = 0,
    step: float = STEP,
    rtol: float = 1e-6,
    atol: float = 1e-7,
    samples: int | None = None,
    steps: bool = False,
) -> GradcheckReport:
    """Compare a backward pass with finite differences, element by element.

    Where they differ, the report says why: a bug, with hints at what it may be and the smallest
    input that still shows it; or the precision of the differences, a kink or a tie.

    Parameters
    ----------
    target : (forward, backward) or Layer
        A pair of functions ``forward(*inputs) -> (y, cache)`` and ``backward(dy, cache) ->
        gradients``, one for each input (fix other arguments with `functools.partial`); or a
        layer or model of float64 parameters, whose input and parameters are checked. It is
        checked in the mode it is in, every forward pass with the same draws and statistics,
        and left as it was. For an op of this package use its own check, such as
        `check_conv2d`: it knows more mistakes.
    *inputs : numpy.ndarray, float64
        Where to check. Keep away from kinks (ReLU at 0) and ties (max-pool).
    names : sequence of str, optional
        Names for the report; ``input 0`` and so on otherwise.
    rng : int or numpy.random.Generator
        Draws the upstream gradient.
    step, rtol, atol : float
        Half the distance of the two evaluations, and what counts as equal: at most
        ``atol + rtol * (largest |numeric| of that gradient)``.
    samples : int, optional
        Elements of each array to look at, drawn at random: for large models. All if left out.
    steps : bool
        Also follow the error over step sizes where a gradient is right.

    Returns
    -------
    GradcheckReport
        True if all agree; prints one line a gradient with its worst element, and what is wrong.

    Raises
    ------
    TypeError
        If an input is not a float64 array.
    ValueError
        If the backward does not return a gradient for each input, or the forward pass gives
        other numbers when it is called again.

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
    labels = [names[i] if i < len(names) else f"input {i}" for i in range(len(points))]
    rng = np.random.default_rng(rng)
    how = Settings(step, rtol, atol, samples, steps, copy.deepcopy(rng))
    rng.random()  # a generator moves on
    run = _run_layer if hasattr(target, "named_params") else _run_pair
    report = run(target, points, labels, how)
    if report.verdict == "bug" and not report.faults and not samples:
        report = report._replace(smallest=_smallest(run, target, points, labels, how))
    return report


class Settings(NamedTuple):
    """How a check is done."""

    step: float
    rtol: float
    atol: float
    samples: int | None
    steps: bool
    draws: np.random.Generator
    diagnose: bool = True

    def rng(self) -> np.random.Generator:
        """A generator that starts at the same place for every case."""
        return copy.deepcopy(self.draws)


class Case(NamedTuple):
    """One gradient to compare: the function, where, and what the backward pass returned."""

    name: str
    f: Forward
    x: np.ndarray
    dy: np.ndarray
    analytic: np.ndarray
    again: np.ndarray | None = None  # of FACTOR * dy, divided by FACTOR
    suspects: Callable[[], Iterable[Suspect]] = tuple
    known: str | None = None  # a short format that the backward pass computes in
    away: verdicts.Away | None = None  # whether it is right for inputs close by


def examine(case: Case, how: Settings, numeric: np.ndarray | None = None) -> Check:
    """Compare one gradient and, if it differs, find out why."""
    name, f, x, dy, analytic = case[:5]
    at: np.ndarray | None = None
    if how.samples is not None and how.samples < x.size:
        chosen = how.rng().choice(x.size, how.samples, replace=False)
        at = np.isin(np.arange(x.size), chosen).reshape(x.shape)
    if numeric is None:
        numeric = numerical_gradient(f, x, dy, how.step, at)
    if analytic.shape != x.shape:
        nothing = Check(name, False, np.inf, (), np.nan, np.nan, verdict="bug")
        nothing = nothing._replace(arrays=(analytic, numeric))
        e = Evidence(name, analytic, numeric, how.atol, np.ones(x.shape, bool), dy, None, x, x)
        return nothing._replace(hints=guess(e))
    check = compare(name, analytic, numeric, how.rtol, how.atol, at)
    if (how.steps or not check.ok) and how.diagnose and check.size:
        check = check._replace(steps=sweep(f, x, dy, check.where, check.analytic))
    if check.ok or not how.diagnose:
        return check if check.ok else check._replace(verdict="bug")
    slack = tolerance(numeric[~np.isnan(numeric)], how.rtol, how.atol)
    verdict, bad = verdicts.several(f, x, dy, analytic, numeric, slack, case.away)
    if verdict != "bug":
        return check._replace(verdict=verdict)
    small = x.size * dy.size <= MAX_JACOBIAN and at is None
    e = Evidence(
        name,
        analytic,
        numeric,
        slack,
        bad,
        dy,
        jacobian(f, x, how.step) if small else None,
        x,
        np.asarray(f()),
    )
    hints = guess(e, case.suspects())
    if not any(hint.exact for hint in hints):
        residual = analytic - numeric
        again = None if case.again is None else case.again - numeric
        scale = float(np.nanmax(np.abs(numeric)))
        kind = verdicts.rounding(
            residual[~np.isnan(numeric)],
            None if again is None else again[~np.isnan(numeric)],
            scale,
            case.known,
        )
        if kind is not None:
            text = f"the differences are those of computing in {kind}"
            return check._replace(verdict="precision", hints=(Hint("rounding", text),))
    return check._replace(verdict="bug", hints=hints)


# ------------------------------------------------------------ a pair of functions


def _run_pair(
    target: Any, points: list[np.ndarray], names: Sequence[str], how: Settings
) -> GradcheckReport:
    forward, backward = target
    given = [x.copy() for x in points]
    y, cache = forward(*given)
    y = np.array(y)
    faults = list(written("forward", names, given, points))
    dy = how.rng().standard_normal(np.shape(y))

    def pull(dy: np.ndarray) -> list[np.ndarray]:
        grads = backward(dy, cache)
        grads = grads if isinstance(grads, tuple | list) else (grads,)
        if len(grads) < len(points) or any(g is None for g in grads[: len(points)]):
            returned = sum(g is not None for g in grads)
            raise ValueError(
                f"gradcheck: backward: expected a gradient for each of {len(points)} inputs, got "
                f"{returned} (fix inputs that have none with functools.partial)"
            )
        return [np.array(g) for g in grads[: len(points)]]

    handed = np.array(dy)
    grads = pull(handed)
    faults += written("backward", ["dy"], [handed], [dy])
    if how.diagnose:
        refuse_other_numbers(y, forward(*(x.copy() for x in points))[0])
        faults += not_repeatable(names, grads, pull(np.array(dy)))
        again = [g / verdicts.FACTOR for g in pull(verdicts.FACTOR * dy)]
    else:
        again = grads
    f = _plain(forward, points) if not faults else _copying(forward, points)
    cases = [
        Case(name, f, x, dy, g, g2 if g2.shape == g.shape else None)
        for name, x, g, g2 in zip(names, points, grads, again)
    ]
    return GradcheckReport(tuple(examine(case, how) for case in cases), tuple(faults))


def _plain(forward: Callable[..., Any], points: list[np.ndarray]) -> Forward:
    return lambda: forward(*points)[0]


def _copying(forward: Callable[..., Any], points: list[np.ndarray]) -> Forward:
    return lambda: forward(*(x.copy() for x in points))[0]


# ------------------------------------------------------------ a layer or a model


def _run_layer(
    layer: Any, points: list[np.ndarray], names: Sequence[str], how: Settings
) -> GradcheckReport:
    if len(points) != 1:
        raise ValueError(f"gradcheck: inputs: expected one for a layer, got {len(points)}")
    (x,) = points
    params = list(layer.named_params())
    # What a forward pass moves on: put back before each, so that all see the same function.
    buffers = [a for _, part in layer.modules() for a in part.buffers.values()]
    draws = [part.rng.bit_generator for _, part in layer.modules() if hasattr(part, "rng")]
    held = [a.copy() for a in buffers], [source.state for source in draws]
    kept = [g.copy() for _, _, g in params]

    def put_back() -> None:
        for a, value in zip(buffers, held[0]):
            a[...] = value
        for source, state in zip(draws, held[1]):
            source.state = state

    def forward() -> tuple[Any, Any]:
        put_back()
        return layer.forward(x)

    def pull(dy: np.ndarray, cache: Any, start: float = 0) -> list[np.ndarray]:
        for _, _, g in params:
            g[...] = start  # a layer's backward adds
        dx = layer.backward(dy, cache)
        return [np.array(dx), *(g - start for _, _, g in params)]

    def right_away(index: int, where: tuple[int, ...]) -> bool:
        """Whether the gradient to one element is right at inputs close to x.

        One in two is enough: another kink may be close by, but a bug is wrong at all of them.
        """
        held, rng, right = x.copy(), how.rng(), 0
        try:
            for _ in range(4):
                x[...] = _moved(held, rng)
                analytic = float(pull(dy, forward()[1])[index][where])
                a = arrays[index]
                h = how.step * max(1.0, abs(float(a[where])))
                numeric = float(np.sum(slope(lambda: forward()[0], a, where, h) * dy))
                gap = abs(analytic - numeric)
                right += gap <= how.atol + 10 * how.rtol * max(1.0, abs(numeric))
            return right >= 2
        finally:
            x[...] = held

    try:
        given = x.copy()
        y, cache = forward()
        faults = written("forward", names, [x], [given])
        x[...] = given
        dy = how.rng().standard_normal(np.shape(y))
        grads = pull(dy, cache)
        arrays = [x, *(p for _, p, _ in params)]
        labels = [*names, *(name for name, _, _ in params)]
        if how.diagnose:
            faults += not_added(labels, grads, pull(dy, cache, start=1.0))
        composite = bool(layer.children())
        cases = [
            Case(
                name,
                lambda: forward()[0],
                a,
                dy,
                g,
                away=partial(right_away, i) if composite else None,
            )
            for i, (name, a, g) in enumerate(zip(labels, arrays, grads))
        ]
        report = GradcheckReport(tuple(examine(case, how) for case in cases), tuple(faults))
        if report.verdict == "bug" and how.diagnose:
            put_back()
            report = report._replace(notes=tuple(_guilty(layer, x, how)))
        return report
    finally:
        put_back()
        for (_, _, g), value in zip(params, kept):
            g[...] = value


def _guilty(model: Any, x: np.ndarray, how: Settings) -> list[Hint]:
    """Check each layer of a sequence alone, and name those that fail."""
    parts = getattr(model, "layers", None)
    if not parts or len(parts) < 2:
        return []
    hints = []
    for i, layer in enumerate(parts):
        here = _moved(x, how.rng())  # ReLU leaves ties behind, which would look like mistakes
        alone = _run_layer(layer, [here], ["dx"], how._replace(diagnose=False))
        if not alone.ok:
            wrong = ", ".join(check.name for check in alone.checks if not check.ok)
            text = f"layer {i}, {layer!r}, fails alone: look at its {wrong}"
            hints.append(Hint("layer", text))
        x = layer.forward(x)[0]
    if not hints:
        hints.append(Hint("layer", "each layer alone is right: look at what joins them"))
    return hints


def _moved(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """An input close to x, away from kinks and ties."""
    return x + 1e-2 * (float(x.std()) or 1.0) * rng.standard_normal(x.shape)


# ------------------------------------------------------------ the smallest case


def _smallest(
    run: Callable[..., GradcheckReport],
    target: Any,
    points: list[np.ndarray],
    names: Sequence[str],
    how: Settings,
) -> Smallest | None:
    quick = how._replace(diagnose=False, steps=False)

    def smaller(state: dict[str, int]) -> list[np.ndarray]:
        return cropped(points, state)

    def fails(state: dict[str, int]) -> bool:
        return not run(target, smaller(state), names, quick).ok

    state = shrink(axes_of(points), lengths, fails, tries=25)
    arrays = smaller(state)
    report = run(target, arrays, names, quick)
    bad = [i for i, check in enumerate(report.checks) if not check.ok]
    if not bad:
        return None
    worst = report.checks[bad[0]]
    assert worst.arrays is not None
    shapes = {name: a.shape for name, a in zip(names, arrays)}
    return Smallest(shapes, {}, worst.name, *worst.arrays)
