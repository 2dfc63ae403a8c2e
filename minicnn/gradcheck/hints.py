"""Guesses at a bug from the numbers it leaves behind.

A wrong gradient is rarely any number: it is the right one with the other sign, transposed, from
one image only, or right but for the border. Each suspect here says which array a mistake would
give; the one that gives the array at hand, in every element, is named. Where none does, the
positions of the bad elements say something weaker: where, but not what.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

MAX_JACOBIAN = 2_000_000  # elements
SURE, LIKELY = "explains every element", "fits the places"


class Hint(NamedTuple):
    """A guess: a short `kind` for programs and a sentence for people."""

    kind: str
    text: str
    exact: bool = True  # explains every element; otherwise only where they are


class Suspect(NamedTuple):
    """What a mistake would make of the gradient."""

    kind: str
    text: str
    gradient: np.ndarray


class Evidence(NamedTuple):
    """What is known about one gradient that failed."""

    name: str
    analytic: np.ndarray
    numeric: np.ndarray  # NaN where it was not looked at
    tolerance: float
    bad: np.ndarray  # bool: where it is wrong
    dy: np.ndarray | None  # None: these are outputs, not gradients
    jacobian: np.ndarray | None  # (x.size, y.size)
    x: np.ndarray
    y: np.ndarray

    @property
    def whole(self) -> bool:
        """Whether every element was looked at."""
        return not np.isnan(self.numeric).any()

    def equals(self, gradient: np.ndarray) -> bool:
        """Whether `gradient` explains the analytic one, which the right one does not."""
        if gradient.shape != self.analytic.shape:
            return False
        seen = ~np.isnan(self.numeric)
        slack = 10 * self.tolerance
        slack = max(slack, slack * _largest(gradient) / max(_largest(self.numeric), 1e-300))
        close = np.abs(self.analytic - gradient)[seen] <= slack
        return bool(close.all()) and _largest((gradient - self.numeric)[seen]) > slack


def _largest(a: np.ndarray) -> float:
    return float(np.max(np.abs(a), initial=0.0, where=np.isfinite(a)))


def guess(e: Evidence, suspects: Iterable[Suspect] = ()) -> tuple[Hint, ...]:
    """Name what may be wrong, the surest first.

    Parameters
    ----------
    e : Evidence
    suspects : iterable of Suspect
        What is known of the op: tried before the general ones.

    Returns
    -------
    tuple of Hint
        At most three; those that explain every element, else those that fit the positions.
    """
    if e.analytic.shape != e.numeric.shape:
        return tuple(_wrong_shape(e))
    if not np.isfinite(e.analytic).all():
        where = tuple(int(i) for i in np.argwhere(~np.isfinite(e.analytic))[0])
        return (Hint("nan", f"not a finite number at {where}: a division by 0, or memory that was "
                            "never written"),)  # fmt: skip
    exact = list(_factor(e))
    tried = itertools.chain(suspects, _same_shape(e), _bias(e), _from_jacobian(e), _moved(e))
    for kind, text, gradient in () if exact else tried:
        if e.equals(gradient):
            exact.append(Hint(kind, text))
    if exact:
        return tuple({hint.kind: hint for hint in reversed(exact)}.values())[::-1][:3]
    return tuple(_overwritten(e)) or tuple(_places(e))[:3]


# ------------------------------------------------------------ one factor for all


def _factor(e: Evidence) -> Iterator[Hint]:
    seen = ~np.isnan(e.numeric)
    a, n = e.analytic[seen], e.numeric[seen]
    if not a.any():
        yield Hint("zero", "it is zero everywhere: never computed, or written to a copy")
        return
    if not n.any() or n.size < 2:
        return
    k = float(np.vdot(a, n) / np.vdot(n, n))
    if abs(k - 1) * _largest(n) <= e.tolerance or not e.equals(k * e.numeric):
        return
    if abs(k + 1) < 1e-4:
        yield Hint("sign", "the sign is wrong everywhere (analytic = -numeric)")
        return
    sign = "the sign is wrong, and it" if k < 0 else "it"
    reason = _name_factor(abs(k), e.dy.shape if e.dy is not None else (), e.x.shape)
    meant = ": mean or sum?" if reason else ": a constant is wrong"
    yield Hint("factor", f"{sign} is {abs(k):.6g} times the right one everywhere{reason}{meant}")


def _name_factor(k: float, *shapes: tuple[int, ...]) -> str:
    """Find k or 1/k among the sizes at hand, their products, and 2."""
    names = {2.0: "2"}
    for shape, label in zip(shapes, ("y", "the input")):
        # One axis first, then all but the channels, then what is less likely.
        every = sorted(_subsets(len(shape)), key=lambda axes: (len(axes) > 1, 1 in axes, axes))
        for axes in every:
            n = math.prod(shape[axis] for axis in axes)
            names.setdefault(float(n), f"{n}, the size of {label} along {_axes(axes)}")
    for whole, text in names.items():
        if whole > 1:
            for value, form in ((whole, "{}"), (1 / whole, "1 / {}")):
                if math.isclose(k, value, rel_tol=1e-4):
                    return f" ({form.format(text)})"
    return ""


# ------------------------------------------------------------ what is made of dy and y


def _same_shape(e: Evidence) -> Iterator[Suspect]:
    """Elementwise mistakes, where the input and the output have one shape."""
    if e.dy is None or e.dy.shape != e.x.shape:
        return
    dy = e.dy
    yield Suspect(
        "dy unchanged",
        "it is dy, unchanged: the derivative (a mask, a factor) was forgotten",
        dy,
    )
    yield Suspect(
        "mask of dy", "dy is let through where dy is positive; the mask is of x", dy * (dy > 0)
    )
    yield Suspect("mask of y", "it is dy where y > 0, as for ReLU", dy * (e.y > 0))
    if e.jacobian is not None:
        own = np.diagonal(e.jacobian).reshape(dy.shape)
        yield Suspect(
            "diagonal only",
            "only the way from each input to its own output is counted; here every input moves "
            "the other outputs too (the sum, the mean or the variance)",
            own * dy,
        )
        yield Suspect("upstream forgotten", "it does not depend on dy: multiply by dy", own)


def _bias(e: Evidence) -> Iterator[Suspect]:
    """Sums of dy over axes that were not meant."""
    if e.dy is None:
        return
    dims = range(e.dy.ndim)
    for keep in dims:
        total = e.dy.sum(tuple(axis for axis in dims if axis != keep))
        yield Suspect(
            "wrong axis", f"it is dy summed over all axes but {keep}: the wrong ones", total
        )


def _from_jacobian(e: Evidence) -> Iterator[Suspect]:
    """Gradients of another upstream gradient than the one that was handed in."""
    if e.jacobian is None or e.dy is None:
        return

    def back(dy: np.ndarray) -> np.ndarray:
        assert e.jacobian is not None
        return (e.jacobian @ np.ravel(dy)).reshape(e.x.shape)

    yield Suspect(
        "upstream forgotten", "it does not depend on dy: multiply by dy", back(np.ones_like(e.dy))
    )
    for axis, what in ((0, "image"), (1, "channel")):
        if e.dy.ndim > axis and e.dy.shape[axis] > 1:
            for index, name in ((-1, "last"), (0, "first")):
                only = np.zeros_like(e.dy)
                part = (slice(None),) * axis + (index,)
                only[part] = e.dy[part]
                yield Suspect(
                    f"{name} {what} only",
                    f"only the {name} {what} counts (axis {axis} of y): = in place of +=, or a "
                    "loop that stops short",
                    back(only),
                )
    if e.dy.ndim > 1:
        swapped = e.dy.swapaxes(0, 1)
        yield Suspect(
            "reshape for transpose",
            "dy was reshaped where its first two axes have to be transposed",
            back(e.dy.reshape(swapped.shape).swapaxes(0, 1)),
        )
        yield Suspect(
            "reshape for transpose",
            "dy was reshaped where its first two axes have to be transposed",
            back(swapped.reshape(e.dy.shape)),
        )
    for axes in _subsets(e.dy.ndim):
        yield Suspect(
            "flipped dy", f"dy is read backwards along {_axes(axes)}", back(np.flip(e.dy, axes))
        )


# ------------------------------------------------------------ the right numbers, moved


def _moved(e: Evidence) -> Iterator[Suspect]:
    """The right gradient, transposed, flipped or shifted, whatever its sign."""
    if not e.whole or e.numeric.size < 2:
        return
    n, ndim = e.numeric, e.numeric.ndim
    for order in itertools.permutations(range(ndim)):
        moved = n.transpose(order)
        if order != tuple(range(ndim)) and moved.shape == n.shape:
            yield Suspect("transposed", f"the axes are swapped: right as transpose{order}", moved)
        elif order != tuple(range(ndim)):
            text = f"its numbers lie as in transpose{order}: reshape in place of transpose"
            yield Suspect("reshape for transpose", text, moved.reshape(n.shape))
    for axes in sorted(_subsets(ndim), key=len, reverse=True):
        yield Suspect("flipped", f"it is turned round along {_axes(axes)}", np.flip(n, axes))
    # Where it was shifted in, an edge holds other numbers: those are taken as they are.
    for shift in itertools.product((-2, -1, 0, 1, 2), repeat=min(ndim, 2)):
        axes = tuple(range(ndim - len(shift), ndim))
        inside = [slice(None)] * (ndim - len(shift)) + [
            slice(max(s, 0), size + min(s, 0)) for s, size in zip(shift, n.shape[-len(shift) :])
        ]
        moved = e.analytic.copy()
        moved[tuple(inside)] = np.roll(n, shift, axes)[tuple(inside)]
        overlap = moved[tuple(inside)].size
        if any(shift) and 2 * overlap >= n.size and overlap > 1:
            text = f"it is the right one, shifted by {shift if ndim > 1 else shift[0]} along " + (
                f"{_axes(axes)}: off by one, or the padding on the wrong side"
            )
            yield Suspect("shifted", text, moved)


def _subsets(ndim: int) -> list[tuple[int, ...]]:
    return [
        axes for size in range(1, ndim + 1) for axes in itertools.combinations(range(ndim), size)
    ]


def _axes(axes: Sequence[int]) -> str:
    return f"axis {axes[0]}" if len(axes) == 1 else f"axes {', '.join(map(str, axes))}"


# ------------------------------------------------------------ sums that lost their terms


def _overwritten(e: Evidence) -> Iterator[Hint]:
    """Every bad element is one of the terms that should have been added up."""
    if e.jacobian is None or e.dy is None or not e.whole:
        return
    terms = (e.jacobian * e.dy.ravel()).reshape(e.x.size, *e.dy.shape)
    if e.dy.ndim > 2:  # the filters of a place are summed by a matrix product: one term a place
        terms = terms.sum(axis=2)
    terms = terms.reshape(e.x.size, -1)
    value = e.analytic.ravel()[:, None]
    live = np.abs(terms) > e.tolerance
    hit = (np.abs(terms - value) <= 10 * e.tolerance) & live
    nothing = (np.abs(value[:, 0]) <= 10 * e.tolerance) & ~live.any(axis=1)
    if live.sum(axis=1).max() > 1 and (hit.any(axis=1) | nothing).all():
        yield Hint(
            "overwritten",
            "each element is one of its terms and not their sum: = in place of += where windows "
            "overlap",
        )


# ------------------------------------------------------------ where it is wrong


def _places(e: Evidence) -> Iterator[Hint]:
    """What the positions of the bad elements have in common."""
    bad = e.bad
    count = int(bad.sum())
    if not count:
        return
    if count == 1 and bad.size > 2:
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        yield Hint("one element", f"wrong at {where} only: a special case, or a race", False)
    if bad.ndim > 2:
        yield from _border(np.asarray(bad.any(axis=tuple(range(bad.ndim - 2)))))
    for axis in range(bad.ndim):
        along = np.asarray(bad.any(axis=tuple(i for i in range(bad.ndim) if i != axis)))
        yield from _lattice(along, axis)
    if count == bad.size and bad.size > 1:
        yield Hint("everywhere", "wrong in every element: the formula itself, or its inputs", False)


def _border(bad: np.ndarray) -> Iterator[Hint]:
    H, W = bad.shape
    rows, columns = np.indices(bad.shape)
    depth = np.minimum(np.minimum(rows, H - 1 - rows), np.minimum(columns, W - 1 - columns))
    width = int(depth[bad].max()) + 1
    if depth.max() < width:  # no interior that is right
        return
    edges = {"top": rows, "bottom": H - 1 - rows, "left": columns, "right": W - 1 - columns}
    # The fewest edges whose margins hold all bad places.
    for n in range(1, 5):
        for names in itertools.combinations(edges, n):
            if (np.min([edges[name] for name in names], axis=0)[bad] < width).all():
                where = "all around" if n == 4 else " and ".join(names)
                text = f"wrong only at the border ({where}, {width} wide): look at the padding"
                yield Hint("border", text, False)
                return


def _lattice(bad: np.ndarray, axis: int) -> Iterator[Hint]:
    n, count = bad.size, int(bad.sum())
    if count in (0, n):
        return
    if count == 1:
        yield Hint("one index", f"wrong only at index {int(np.argmax(bad))} of axis {axis}", False)
    elif count == n - 1 and n > 2:
        good = int(np.argmin(bad))
        yield Hint("one index", f"right only at index {good} of axis {axis}", False)
    places, misses = np.flatnonzero(bad), np.flatnonzero(~bad)
    for step in range(2, n // 2 + 1):
        for chosen, word in ((places, "wrong"), (misses, "right")):
            lattice = np.arange(chosen[0], n, step)
            if chosen[0] < step and len(chosen) > 1 and np.array_equal(chosen, lattice):
                text = f"{word} at every {_ordinal(step)} index of axis {axis}: look at the stride"
                yield Hint("stride", text, False)
                return


def _ordinal(n: int) -> str:
    return {2: "second", 3: "third", 4: "fourth"}.get(n, f"{n}th")


# ------------------------------------------------------------ wrong shapes


def _wrong_shape(e: Evidence) -> Iterator[Hint]:
    got, expected = e.analytic.shape, e.numeric.shape
    begin = f"expected shape {expected} like the input, got {got}"
    assert e.dy is not None
    dims = range(e.dy.ndim)
    for axes in _subsets(e.dy.ndim):
        total = e.dy.sum(axes)
        if total.shape == got and np.allclose(total, e.analytic, rtol=1e-4, atol=1e-6):
            kept = [axis for axis in dims if axis not in axes]
            keeps = f"and keeps {_axes(kept)}" if kept else "and keeps nothing"
            yield Hint("wrong axis", f"{begin}: dy was summed over {_axes(axes)} {keeps}")
            return
    if sorted(got) == sorted(expected):
        yield Hint("transposed", f"{begin}: transposed")
    elif math.prod(got) == math.prod(expected):
        yield Hint("shape", f"{begin}: reshape it")
    elif len(got) == len(expected) + 1 and got[1:] == expected:
        yield Hint("not summed", f"{begin}: axis 0 (the images) has to be summed")
    else:
        yield Hint("shape", begin)
