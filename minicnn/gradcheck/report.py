"""What a gradient check found."""

from __future__ import annotations

from typing import NamedTuple

from minicnn.gradcheck import verdicts
from minicnn.gradcheck.differences import Check
from minicnn.gradcheck.hints import Hint
from minicnn.gradcheck.shrink import Smallest


class GradcheckReport(NamedTuple):
    """All the comparisons of one check; true when every one holds.

    Attributes
    ----------
    checks : tuple of Check
        One for each gradient: worst element, verdict, hints, error against step size.
    faults : tuple of Hint
        Broken rules that no single number shows, such as an input that was written to.
    smallest : Smallest or None
        The smallest failing case that was found.
    notes : tuple of Hint
        Which layer of a model fails alone.
    """

    checks: tuple[Check, ...]
    faults: tuple[Hint, ...] = ()
    smallest: Smallest | None = None
    notes: tuple[Hint, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether every gradient agrees, and no rule was broken."""
        return not self.faults and all(check.ok for check in self.checks)

    @property
    def verdict(self) -> str:
        """The gravest verdict: "bug", "tie", "kink", "precision" or "ok"."""
        found = {check.verdict for check in self.checks} | ({"bug"} if self.faults else set())
        return next(v for v in verdicts.ORDER if v in found or v == "ok")

    @property
    def hints(self) -> tuple[Hint, ...]:
        """The hints of all gradients and the faults."""
        found = tuple(hint for check in self.checks for hint in check.hints)
        return self.faults + self.notes + found

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        lines = [str(check) for check in self.checks]
        lines += [f"FAIL {hint.text}" for hint in self.faults]
        lines += [f"     {hint.text}" for hint in self.notes]
        if self.smallest is not None:
            lines += [f"     {line}" for line in str(self.smallest).splitlines()]
        return "\n".join(lines)

    def table(self) -> str:
        """Error against step size, at the worst element of every gradient that has it."""
        blocks = []
        for check in self.checks:
            if check.steps:
                rows = [f"{s.step:>8.0e}  {s.numeric:>15.8g}  {s.error:>9.2g}" for s in check.steps]
                head = f"{check.name} at {check.where}: analytic {check.analytic:.8g}"
                blocks.append("\n".join([head, "    step          numeric      error", *rows]))
        return "\n\n".join(blocks)
