"""A number and the terms that it is the sum of, printed as a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

Index = tuple[int, ...]


class Term(NamedTuple):
    """One summand: where it comes from, and the factors that it is the product of."""

    label: str
    factors: tuple[float, ...]

    @property
    def value(self) -> float:
        return math.prod(self.factors)


@dataclass
class Explanation:
    """The derivation of one number; prints as a table.

    Attributes
    ----------
    title, formula : str
    terms : list of Term
    start, scale : float
        The derived number is ``scale * (start + sum of terms)``.
    value : float
        What the array holds.
    numeric : float
        The finite difference of the loss: in y for "y", where it is dy beside which it stands.
    gradient : float
        What `numeric` should equal.
    note : str
    """

    title: str
    formula: str
    terms: list[Term]
    start: float = 0.0
    scale: float = 1.0
    note: str = ""
    start_name: str = "b"
    final: Callable[[float], float] | None = field(default=None, repr=False)
    value: float = 0.0
    numeric: float = 0.0
    gradient: float = 0.0

    @property
    def total(self) -> float:
        """The number as the terms give it, in float64."""
        total = self.scale * (self.start + math.fsum(t.value for t in self.terms))
        return total if self.final is None else self.final(total)

    def __repr__(self) -> str:
        return self.text()

    def text(self, rows: int = 30) -> str:
        """The table with at most `rows` terms; the sum is over all of them."""
        lines = [self.title, f"  {self.formula}"]
        width = max((len(t.label) for t in self.terms), default=0)
        running = self.start
        if self.start:
            lines.append(f"  {self.start_name:<{width}}  {'':>26} {'':>12}  sum {running:>11.5g}")
        shown = self.terms if len(self.terms) <= rows else self.terms[:rows]
        for t in shown:
            running += t.value
            factors = " * ".join(f"{f:.5g}" for f in t.factors)
            lines.append(
                f"  {t.label:<{width}}  {factors:>26} = {t.value:>10.5g}  sum {running:>11.5g}"
            )
        if len(self.terms) > len(shown):
            rest = len(self.terms) - len(shown)
            lines.append(f"  ... and {rest} terms more, which the sum below holds too")
        if self.scale != 1:
            lines.append(f"  times {self.scale:.6g}")
        if self.note:
            lines.append(f"  {self.note}")
        lines.append(f"  derived {self.total:.6g}, in the array {self.value:.6g}")
        lines.append(
            f"  gradient of the loss {self.gradient:.6g}, finite difference {self.numeric:.6g}"
        )
        return "\n".join(lines)


def made(formula: str, terms: Any, **more: Any) -> Explanation:
    made = [Term(label, tuple(float(f) for f in factors)) for label, *factors in terms]
    return Explanation("", formula, made, **more)
