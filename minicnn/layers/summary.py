"""The table that `Layer.summary` returns."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from minicnn.shapes import Window


class Field(NamedTuple):
    """Receptive field: the input pixels that one output depends on."""

    size: tuple[float, float] | None = (1, 1)  # rows and columns; None: the whole input
    jump: tuple[float, float] = (1, 1)  # input pixels between neighbouring outputs

    def through(self, win: Window | None) -> Field:
        """Return the field of the outputs of a window that slides over these outputs."""
        if win is None or self.size is None:
            return self
        (h, w), (jh, jw) = self.size, self.jump
        (EH, EW), (SH, SW) = win.extent, win.stride
        return Field((h + (EH - 1) * jh, w + (EW - 1) * jw), (jh * SH, jw * SW))

    def through_transposed(self, win: Window) -> Field:
        """Return the field of the outputs that `win` paints, as a transposed convolution does."""
        if self.size is None:
            return self
        (h, w), (jh, jw) = self.size, self.jump
        (EH, EW), (SH, SW) = win.extent, win.stride
        seen = h + (-(-EH // SH) - 1) * jh, w + (-(-EW // SW) - 1) * jw
        return Field(seen, (jh / SH, jw / SW))

    def union(self, other: Field) -> Field:
        """Return the field of a sum of outputs with these two fields."""
        if self.size is None or other.size is None:
            return Field(None)
        (h, w), (oh, ow) = self.size, other.size
        return self._replace(size=(max(h, oh), max(w, ow)))

    def __str__(self) -> str:
        return "all" if self.size is None else "x".join(str(math.ceil(n)) for n in self.size)


WHOLE = Field(None)


class Row(NamedTuple):
    """One layer in a `Summary`; sizes are numbers of elements for the whole batch."""

    name: str
    layer: str
    output_shape: tuple[int, ...]
    formula: str
    params: int
    macs: int
    activation: int
    im2col: int
    field: Field


class Summary(NamedTuple):
    """A network layer by layer; ``print`` it, or let a notebook show it as a table."""

    layers: Sequence[Row]
    input_shape: tuple[int, ...]
    itemsize: int
    params: int  # each once, where a layer stands in several places

    @property
    def macs(self) -> int:
        """Multiply-adds of one forward pass."""
        return sum(row.macs for row in self.layers)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all outputs, which training keeps for the backward pass."""
        return self.itemsize * sum(row.activation for row in self.layers)

    @property
    def im2col_bytes(self) -> int:
        """Bytes of the largest column matrix; the NumPy version works through it in blocks."""
        return self.itemsize * max((row.im2col for row in self.layers), default=0)

    @property
    def training_bytes(self) -> int:
        """Bytes at the peak of a training step, one op at a time, about; without the optimiser.

        When the backward pass begins, parameters and gradients, the input and all outputs are
        there, and the gradients to the output and the input of the layer at work come on top.
        """
        sizes = [math.prod(self.input_shape), *(row.activation for row in self.layers)]
        at_work = max((a + b for a, b in pairwise(sizes)), default=0)
        return self.itemsize * (2 * self.params + sum(sizes) + at_work)

    def _table(self) -> list[list[str]]:
        head = ["", "layer", "output", "rows", "params", "MACs", "output", "im2col", "sees"]
        body = [
            [
                row.name,
                row.layer,
                "x".join(map(str, row.output_shape)),
                row.formula,
                f"{row.params:,}",
                _count(row.macs),
                _bytes(row.activation * self.itemsize),
                _bytes(row.im2col * self.itemsize) if row.im2col else "",
                str(row.field),
            ]
            for row in self.layers
        ]
        return [head, *body]

    def _totals(self) -> str:
        return (
            f"input {'x'.join(map(str, self.input_shape))}; {self.params:,} parameters; "
            f"{_count(self.macs)} multiply-adds forward; outputs {_bytes(self.activation_bytes)}; "
            f"largest im2col matrix {_bytes(self.im2col_bytes)}; a training step takes about "
            f"{_bytes(self.training_bytes)}, and what the optimizer keeps"
        )

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table)]
        left = (0, 1, 2, 3)
        lines = [
            "  ".join(
                cell.ljust(width) if i in left else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths))
            ).rstrip()
            for row in table
        ]
        rule = "-" * max(map(len, lines))
        return "\n".join([lines[0], rule, *lines[1:], rule, self._totals()])

    def _repr_html_(self) -> str:
        head, *body = self._table()
        cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
        lines = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in body
        )
        return f"<table><tr>{cells}</tr>{lines}</table><p>{html.escape(self._totals())}</p>"


def _count(n: int) -> str:
    return next((f"{n / s:.3g} {unit}" for s, unit in ((1e9, "G"), (1e6, "M")) if n >= s), f"{n:,}")


def _bytes(n: int) -> str:
    for scale, unit in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if n >= scale:
            return f"{n / scale:.3g} {unit}"
    return f"{n} B"
