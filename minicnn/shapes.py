"""Numbers, shapes and windows: their arithmetic, and the errors that everybody raises.

All sizes are Python integers, which do not overflow.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any, NamedTuple

MOST_PIXELS = 1 << 36  # of a map: 256 GB in float32

Pair = tuple[int, int]
Padding = tuple[Pair, Pair]  # ((top, bottom), (left, right))


def integer(op: str, name: str, value: Any, minimum: int) -> int:
    """Return `value` as an int of at least `minimum`, or raise an error that names it."""
    try:
        if isinstance(value, bool):
            raise TypeError
        whole = operator.index(value)
    except TypeError:
        raise TypeError(f"{op}: {name}: expected an integer >= {minimum}, got {value!r}") from None
    if whole < minimum:
        raise ValueError(f"{op}: {name}: expected an integer >= {minimum}, got {whole}")
    return whole


_LIMITS = {
    "ge": (">=", operator.ge),
    "gt": (">", operator.gt),
    "le": ("<=", operator.le),
    "lt": ("<", operator.lt),
}


def number(op: str, name: str, value: Any, **limits: float) -> float:
    """Return `value` as a finite float within the limits ge, gt, le and lt, or raise.

    Examples
    --------
    >>> number("Adam", "lr", -1, ge=0)
    Traceback (most recent call last):
    ValueError: Adam: lr: expected a number >= 0, got -1
    """
    bounds = " and".join(f" {_LIMITS[key][0]} {limit:g}" for key, limit in limits.items())
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{op}: {name}: expected a number{bounds}, got {value!r}")
    result = float(value)
    if not math.isfinite(result):
        raise ValueError(f"{op}: {name}: expected a finite number{bounds}, got {value}")
    if not all(_LIMITS[key][1](result, limit) for key, limit in limits.items()):
        raise ValueError(f"{op}: {name}: expected a number{bounds}, got {value}")
    return result


def pair(op: str, name: str, value: Any, minimum: int) -> Pair:
    """Return ``(vertical, horizontal)`` from an int or a pair of ints."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        if len(value) != 2:
            raise ValueError(f"{op}: {name}: expected an int or a pair, got {value!r}")
        return integer(op, name, value[0], minimum), integer(op, name, value[1], minimum)
    both = integer(op, name, value, minimum)
    return both, both


def pads(op: str, value: Any) -> Padding:
    """Return ``((top, bottom), (left, right))`` from an int, a pair or a pair of pairs."""
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
        top_bottom, left_right = (pair(op, "padding", v, 0) for v in value)
        return top_bottom, left_right
    top_bottom = pair(op, "padding", value, 0)
    return top_bottom, top_bottom


class Window(NamedTuple):
    """The geometry of a sliding window: kernel, stride, padding and dilation."""

    kernel: Pair
    stride: Pair
    padding: Padding
    dilation: Pair

    @property
    def extent(self) -> Pair:
        """Rows and columns from the first to the last tap: ``dilation * (kernel - 1) + 1``."""
        (KH, KW), (DH, DW) = self.kernel, self.dilation
        return DH * (KH - 1) + 1, DW * (KW - 1) + 1

    def padded(self, H: int, W: int) -> Pair:
        """Rows and columns of an (H, W) map with its padding."""
        (top, bottom), (left, right) = self.padding
        return top + H + bottom, left + W + right

    def output_size(self, op: str, H: int, W: int, ceil_mode: bool = False) -> Pair:
        """Return (OH, OW): how many places the window takes on an (H, W) map.

        ``floor((H + top + bottom - extent) / stride) + 1``. With `ceil_mode` the division rounds
        up, and a last window that would start in the bottom or right padding is dropped.

        Raises
        ------
        ValueError
            If the window is larger than the padded map.
        """
        EH, EW = self.extent
        HP, WP = self.padded(H, W)
        if EH > HP or EW > WP:
            raise ValueError(
                f"{op}: kernel_size: expected at most the padded input {HP}x{WP}, got {EH}x{EW} "
                f"(kernel {self.kernel}, dilation {self.dilation}, input {H}x{W})"
            )
        check_pixels(op, "x", HP, WP)
        return (
            _places(H, HP, EH, self.stride[0], self.padding[0][0], ceil_mode),
            _places(W, WP, EW, self.stride[1], self.padding[1][0], ceil_mode),
        )

    def formula(self, H: int, W: int, ceil_mode: bool = False) -> str:
        """Return the arithmetic of `output_size` for the rows, with the numbers filled in."""
        (top, bottom), EH, SH = self.padding[0], self.extent[0], self.stride[0]
        half = "ceil" if ceil_mode else "floor"
        OH, _ = self.output_size("formula", H, W, ceil_mode)
        steps = H + top + bottom - EH
        dropped = " - 1 in the padding" if ceil_mode and -(-steps // SH) >= OH else ""
        return f"{half}(({H}+{top}+{bottom}-{EH})/{SH})+1{dropped} = {OH}"


def _places(size: int, padded: int, extent: int, stride: int, before: int, ceil: bool) -> int:
    steps = -(-(padded - extent) // stride) if ceil else (padded - extent) // stride
    if ceil and steps * stride >= size + before:
        steps -= 1
    return steps + 1


def window(op: str, kernel: Any, stride: Any = 1, padding: Any = 0, dilation: Any = 1) -> Window:
    """Check the four arguments of a sliding window and return it.

    `padding` may also be ``"valid"`` (none) or ``"same"`` (output as large as the input, for
    stride 1; an odd total puts the larger part at the bottom and the right).
    """
    kernel = pair(op, "kernel_size", kernel, 1)
    stride = pair(op, "stride", stride, 1)
    dilation = pair(op, "dilation", dilation, 1)
    if isinstance(padding, str):
        if padding not in ("valid", "same"):
            raise ValueError(
                f"{op}: padding: expected an int, a pair, ((top, bottom), (left, right)), "
                f"'valid' or 'same', got {padding!r}"
            )
        if padding == "same" and stride != (1, 1):
            raise ValueError(f"{op}: padding: expected numbers with stride {stride}, got 'same'")
        total = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation)]
        padding = tuple((t // 2, t - t // 2) for t in total)
    return Window(kernel, stride, pads(op, padding), dilation)


def check_ndim(op: str, name: str, a: Any, expected: str) -> None:
    """Raise ValueError unless `a` has as many axes as `expected`, such as ``"(N, C, H, W)"``."""
    ndim = expected.count(",") + 1
    if a.ndim != ndim:
        raise ValueError(
            f"{op}: {name}: expected {ndim} axes {expected}, got shape {tuple(a.shape)}"
        )


def check_rank(
    op: str, shape: Sequence[int], expected: str, channels: int | None = None
) -> tuple[int, ...]:
    """Return `shape`, or raise ValueError unless it has the axes `expected` and the `channels`."""
    ndim = expected.count(",") + 1
    if len(shape) != ndim or (channels is not None and shape[1] != channels):
        with_channels = "" if channels is None else f" with C = {channels}"
        raise ValueError(
            f"{op}: input_shape: expected {expected}{with_channels}, got {tuple(shape)}"
        )
    return tuple(shape)


def check_shape(op: str, name: str, a: Any, expected: Sequence[int], why: str = "") -> None:
    """Raise ValueError unless ``a.shape == expected``; `why` tells where that comes from."""
    if tuple(a.shape) != tuple(expected):
        because = f" ({why})" if why else ""
        raise ValueError(
            f"{op}: {name}: expected shape {tuple(expected)}{because}, got {tuple(a.shape)}"
        )


def check_pixels(op: str, name: str, rows: int, columns: int) -> None:
    """Raise ValueError for a map that no memory holds, instead of beginning to work on it."""
    if rows * columns > MOST_PIXELS:
        raise ValueError(
            f"{op}: {name}: expected a map of at most {MOST_PIXELS:,} pixels with its padding, "
            f"got {rows}x{columns}"
        )


def size(shape: Sequence[int]) -> int:
    """Return the number of elements as a Python int (numpy.prod wraps around at 2**63)."""
    return math.prod(shape)
