"""Random changes to training pictures that leave the label true.

Shift, rotation and zoom are one affine map per picture, so the picture is resampled once. With
the centre c of the picture, rotation R, zoom z and shift t, the output pixel at p shows the
input at

    q = c + R^-1 (p - c - t) / z

which is bilinear between its four neighbours; outside the picture everything is 0.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from minicnn.shapes import check_ndim, integer, number


@dataclass(frozen=True)
class Augment:
    """Draw a random change for each picture of a batch on its own.

    The changes are made in the order flip, affine map, noise, cutout.

    Parameters
    ----------
    shift
        Largest shift, whole pixels, in both directions.
    rotate
        Largest rotation to either side in degrees, at most 180.
    zoom
        Largest change of size as a fraction, in [0, 1): 0.1 draws factors from 0.9 to 1.1.
    flip
        Mirror left and right with probability 1/2.
    noise
        Standard deviation of the Gaussian noise added to each value. The sum is not clipped.
    cutout
        Side in pixels of a square that is set to 0. Its centre is anywhere in the picture, so
        part of it may lie outside.

    References
    ----------
    T. DeVries, G. W. Taylor, "Improved regularization of convolutional neural networks with
    cutout", arXiv:1708.04552, 2017.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> Augment(shift=2, rotate=10)(np.ones((64, 1, 28, 28), np.float32), rng).shape
    (64, 1, 28, 28)
    """

    shift: int = 0
    rotate: float = 0
    zoom: float = 0
    flip: bool = False
    noise: float = 0
    cutout: int = 0

    def __post_init__(self) -> None:
        integer("Augment", "shift", self.shift, 0)
        number("Augment", "rotate", self.rotate, ge=0, le=180)
        number("Augment", "zoom", self.zoom, ge=0, lt=1)
        number("Augment", "noise", self.noise, ge=0)
        integer("Augment", "cutout", self.cutout, 0)
        if not isinstance(self.flip, bool):
            raise TypeError(f"Augment: flip: expected True or False, got {self.flip!r}")

    def __call__(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a changed copy of a batch.

        Parameters
        ----------
        x
            (N, C, H, W) float32 or float64; stays as it is.
        rng
            Where the changes are drawn from.

        Returns
        -------
        ndarray
            Same shape and dtype.
        """
        y = _pictures("Augment", x).copy()
        N, _, H, W = y.shape
        if self.flip:
            flipped = rng.random(N) < 0.5
            y[flipped] = y[flipped, :, :, ::-1]
        dy, dx = rng.integers(-self.shift, self.shift, (2, N), endpoint=True)
        if self.rotate or self.zoom:
            degrees = rng.uniform(-self.rotate, self.rotate, N)
            y = warp(y, dy, dx, degrees, rng.uniform(1 - self.zoom, 1 + self.zoom, N))
        elif self.shift:  # the same as warp(y, dy, dx), five times as fast
            s = min(self.shift, max(H, W))  # further out nothing is left to see
            dy, dx = dy.clip(-s, s), dx.clip(-s, s)
            padded = np.pad(y, ((0, 0), (0, 0), (s, s), (s, s)))
            windows = sliding_window_view(padded, (H, W), axis=(2, 3))
            y = windows[np.arange(N), :, s - dy, s - dx]  # (N, C, H, W)
        if self.noise:
            y += self.noise * rng.standard_normal(y.shape, y.dtype)
        if self.cutout:
            rows = _covered(rng, N, H, self.cutout)[:, None, :, None]  # (N, 1, H, 1)
            columns = _covered(rng, N, W, self.cutout)[:, None, None, :]  # (N, 1, 1, W)
            y[np.broadcast_to(rows & columns, y.shape)] = 0
        return y


def _covered(rng: np.random.Generator, N: int, length: int, side: int) -> np.ndarray:
    """Which of `length` places a span of `side` around a random place covers: (N, length)."""
    first = rng.integers(0, max(length, 1), (N, 1)) - side // 2
    places = np.arange(length)
    return (first <= places) & (places < first + side)


def warp(x: np.ndarray, dy: Any = 0, dx: Any = 0, degrees: Any = 0, zoom: Any = 1) -> np.ndarray:
    """Shift, rotate and zoom pictures about their centre, each by its own amount.

    Whole shifts, quarter turns of squares and the identity are exact.

    Parameters
    ----------
    x
        (N, C, H, W) float32 or float64; stays as it is.
    dy, dx
        Pixels downwards and to the right; a number or (N,).
    degrees
        Rotation counter-clockwise; a number or (N,).
    zoom
        Factor above 0, larger than 1 to magnify; a number or (N,).

    Returns
    -------
    ndarray
        Same shape and dtype; 0 where the picture has been moved away.

    Examples
    --------
    >>> warp(np.array([[[[1.0, 2.0], [3.0, 4.0]]]]), dx=1)[0, 0]
    array([[0., 1.],
           [0., 3.]])
    """
    x = _pictures("warp", x)
    N, C, H, W = x.shape
    dy, dx, degrees, zoom = (
        _amount(name, a, N)
        for name, a in (("dy", dy), ("dx", dx), ("degrees", degrees), ("zoom", zoom))
    )  # (N, 1) each
    if (zoom <= 0).any():
        raise ValueError(f"warp: zoom: expected numbers above 0, got {zoom.min():g}")
    # Rounded so that quarter turns, whose cosine comes out as 6e-17, are exact.
    cos, sin = (np.round(f(np.deg2rad(degrees % 360)), 15) / zoom for f in (np.cos, np.sin))
    down = np.arange(H) - (H - 1) / 2 - dy  # (N, H)
    right = np.arange(W) - (W - 1) / 2 - dx  # (N, W)

    # Two zeros around the picture stand for everything outside; coordinates count from there.
    padded = np.zeros((N, C, H + 4, W + 4), x.dtype)
    padded[:, :, 2:-2, 2:-2] = x
    i, fi = _split((H + 3) / 2 + cos * down, sin * right, H + 2, x.dtype)  # (N, H, W)
    j, fj = _split((W + 3) / 2 - sin * down, cos * right, W + 2, x.dtype)

    picture = np.arange(N * C, dtype=np.intp).reshape(N, C, 1, 1) * ((H + 4) * (W + 4))
    at = picture + (i * (W + 4) + j)[:, None]  # (N, C, H, W)
    flat = padded.reshape(-1)
    fi, fj = fi[:, None], fj[:, None]  # (N, 1, H, W)
    top = _between(flat.take(at), flat.take(at + 1), fj)
    at += W + 4
    return _between(top, _between(flat.take(at), flat.take(at + 1), fj), fi)


def _amount(name: str, a: Any, N: int) -> np.ndarray:
    """Return `a` as finite numbers of shape (N, 1), or raise."""
    numbers = np.asarray(a, np.float64)
    if numbers.shape not in ((), (N,)) or not np.isfinite(numbers).all():
        raise ValueError(f"warp: {name}: expected a finite number, or {N} of them, got {a}")
    return np.broadcast_to(numbers, N)[:, None]


def _split(
    rows: np.ndarray, columns: np.ndarray, last: int, dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """Whole and fractional part of ``rows[:, :, None] + columns[:, None, :]``, in [0, last]."""
    q = rows.astype(dtype)[:, :, None] + columns.astype(dtype)[:, None, :]
    np.clip(q, 0, last, out=q)
    whole = q.astype(np.intp)
    q -= whole
    return whole, q


def _between(a: np.ndarray, b: np.ndarray, fraction: np.ndarray) -> np.ndarray:
    """``a + (b - a) * fraction``, in the memory of `b`."""
    b -= a
    b *= fraction
    b += a
    return b


def _pictures(op: str, x: np.ndarray) -> np.ndarray:
    """Return `x` in native byte order, or raise unless it is a batch of float pictures."""
    if not isinstance(x, np.ndarray) or x.dtype.newbyteorder("=") not in (np.float32, np.float64):
        got = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{op}: x: expected a float32 or float64 NumPy array, got {got}")
    check_ndim(op, "x", x, "(N, C, H, W)")
    return x.astype(x.dtype.newbyteorder("="), copy=False)


AUGMENTATIONS = {
    "none": Augment(),
    "digits": Augment(shift=1, rotate=10, zoom=0.1),
    "photos": Augment(shift=4, flip=True, cutout=8),
}
"""Named settings: a mirrored digit is another sign, a mirrored photo is not."""


def parse_augment(text: str) -> Augment:
    """Read an `Augment` from the command line.

    Parameters
    ----------
    text
        A name in `AUGMENTATIONS`, or settings such as ``"shift=2,rotate=10,flip"``.

    Raises
    ------
    ValueError
        Unknown name, or a value that is not a number or out of range.

    Examples
    --------
    >>> parse_augment("digits")
    Augment(shift=1, rotate=10, zoom=0.1, flip=False, noise=0, cutout=0)
    >>> parse_augment("shift=4,flip").flip
    True
    """
    if text in AUGMENTATIONS:
        return AUGMENTATIONS[text]
    defaults = {field.name: field.default for field in fields(Augment)}
    settings: dict[str, Any] = {}
    for item in text.split(","):
        name, equals, value = item.strip().partition("=")
        if name not in defaults or name in settings:
            raise ValueError(
                f"augment: expected one of {', '.join(AUGMENTATIONS)}, or settings such as "
                f"shift=2,flip, each of {', '.join(defaults)} at most once, got {text!r}"
            )
        if name == "flip":
            if equals:
                raise ValueError(f"augment: flip: expected no value, got {value!r}")
            settings[name] = True
            continue
        try:
            settings[name] = int(value) if name in ("shift", "cutout") else float(value)
        except ValueError:
            kind = "a whole number" if name in ("shift", "cutout") else "a number"
            raise ValueError(f"augment: {name}: expected {kind}, got {value!r}") from None
    return Augment(**settings)
