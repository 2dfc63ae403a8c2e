"""Lines of text: errors, bars and small pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

BAR = 30  # characters of a bar that stands for 100%
SHADES = (" ░▒▓█", " .+#@")  # dark to bright, and what every terminal can print


def one_line(error: BaseException) -> str:
    """An error and its notes in one line."""
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        text = f"{error.filename}: {error.strerror}"
    lines = "\n".join([text, *getattr(error, "__notes__", ())]).splitlines()
    return "; ".join(line.strip() for line in lines if line.strip())


def complain(error: BaseException) -> None:
    """Print an error on stderr, after all that was printed on stdout."""
    sys.stdout.flush()
    print(f"minicnn: error: {one_line(error)}", file=sys.stderr)


def bars(names: list[str], shares: np.ndarray) -> Iterator[str]:
    """A line for each name with a bar as long as its share."""
    block = _shades()[-1]
    width = max(map(len, names))
    for name, share in zip(names, shares):
        yield f"{name:<{width}}  {block * round(BAR * float(share)):<{BAR}}  {share:6.1%}"


def picture(x: np.ndarray) -> Iterator[str]:
    """Draw (C, H, W) values in [0, 1], two characters a pixel; colours as their mean."""
    shades = np.array(list(_shades()))
    levels = (x.mean(axis=0).clip(0, 1) * len(shades)).astype(int).clip(max=len(shades) - 1)
    for row in np.repeat(shades[levels], 2, axis=1):  # (H, 2 * W)
        yield "".join(row)


def _shades() -> str:
    try:
        SHADES[0].encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return SHADES[1]
    return SHADES[0]
