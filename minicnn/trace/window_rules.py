"""Derivations of convolution, linear and pooling layers: sums over windows and rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array
from minicnn.ops.adaptive_avg_pool2d import _bins
from minicnn.trace.derivation import Explanation, Index, made

if TYPE_CHECKING:
    from minicnn.trace.steps import Step


# ---------------------------------------------------------------- convolution and linear


def _covering(win: Any, h: int, w: int, OH: int, OW: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (i, j, kh, kw) for each window that covers pixel (h, w)."""
    (KH, KW), (SH, SW), ((top, _), (left, _)), (DH, DW) = win
    for kh in range(KH):
        for kw in range(KW):
            (i, a), (j, b) = divmod(h + top - kh * DH, SH), divmod(w + left - kw * DW, SW)
            if not a and not b and 0 <= i < OH and 0 <= j < OW:
                yield i, j, kh, kw


def _patch(win: Any, i: int, j: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (kh, kw, h, w) for each tap of window (i, j); h and w may lie in the padding."""
    (KH, KW), (SH, SW), ((top, _), (left, _)), (DH, DW) = win
    for kh in range(KH):
        for kw in range(KW):
            yield kh, kw, i * SH - top + kh * DH, j * SW - left + kw * DW


def _at(a: Array, n: int, c: int, h: int, w: int) -> float:
    return float(a[n, c, h, w]) if 0 <= h < a.shape[2] and 0 <= w < a.shape[3] else 0.0


def conv(forward: Step, backward: Step, what: str, index: Index, turn: bool = False) -> Explanation:
    """Conv2d; with `turn` ConvTranspose2d, which is the same map from y to x."""
    layer: Any = forward.layer
    win, G = layer.window(), layer.groups
    if turn:
        win = layer._window
    x, w = forward.inputs["x"], forward.params["weight"]
    dy, b = backward.inputs["dy"], forward.params.get("bias")
    bias = 0.0 if b is None or what != "y" else float(b[index[1]])
    if what == "db":
        f = index[0]
        places = np.ndindex(dy.shape[0], *dy.shape[2:])
        return made(
            "db[f] = sum over n, i, j of dy[n,f,i,j]",
            ((f"dy[{n},{f},{i},{j}]", dy[n, f, i, j]) for n, i, j in places),
        )
    # Letters of Conv2d: `small` holds one number a window, `large` the pixels beneath.
    if what == "dw":
        f, cg, kh, kw = index
        large, small = (dy, x) if turn else (x, dy)
        FG, CG = w.shape[0] // G, w.shape[1]
        c = f // FG * CG + cg
        (_, _), (SH, SW), ((top, _), (left, _)), (DH, DW) = win
        terms = []
        for n, i, j in np.ndindex(small.shape[0], *small.shape[2:]):
            p, q = i * SH - top + kh * DH, j * SW - left + kw * DW
            if 0 <= p < large.shape[2] and 0 <= q < large.shape[3]:
                terms.append(
                    (
                        f"window ({i},{j}), pixel ({n},{c},{p},{q})",
                        small[n, f, i, j],
                        large[n, c, p, q],
                    )
                )
        return made("dw = sum over all windows of dy * x at this tap", terms)
    if (what == "y") != turn:  # gather: one window, all its taps
        large = dy if turn else x
        n, f, i, j = index
        FG, CG = w.shape[0] // G, w.shape[1]
        terms = []
        for cg in range(CG):
            c = f // FG * CG + cg
            for kh, kw, h, v in _patch(win, i, j):
                inside = 0 <= h < large.shape[2] and 0 <= v < large.shape[3]
                where = f"[{n},{c},{h},{v}]" if inside else "padding"
                terms.append(
                    (f"{where} w[{f},{cg},{kh},{kw}]", _at(large, n, c, h, v), w[f, cg, kh, kw])
                )
        letter = "dy" if turn else "x"
        return made(f"{what} = sum over the patch of {letter} * w", terms, start=bias)
    small = x if turn else dy  # scatter: every window that covers the pixel
    n, c, h, v = index
    FG, CG = w.shape[0] // G, w.shape[1]
    g, cg = divmod(c, CG)
    terms = []
    for f in range(g * FG, (g + 1) * FG):
        for i, j, kh, kw in _covering(win, h, v, *small.shape[2:]):
            terms.append(
                (
                    f"window [{n},{f},{i},{j}] w[{f},{cg},{kh},{kw}]",
                    small[n, f, i, j],
                    w[f, cg, kh, kw],
                )
            )
    letter = "x" if turn else "dy"
    return made(
        f"{what} = sum over the windows that cover the pixel of {letter} * w", terms, start=bias
    )


def conv_transpose(f: Step, b: Step, what: str, index: Index) -> Explanation:
    return conv(f, b, what, index, turn=True)


def linear(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, w, dy = forward.inputs["x"], forward.params["weight"], backward.inputs["dy"]
    b = forward.params.get("bias")
    *lead, last = index
    row = tuple(lead)
    if what == "y":
        start = 0.0 if b is None else float(b[last])
        terms = ((f"x[{i}] w[{last},{i}]", x[row][i], w[last, i]) for i in range(w.shape[1]))
        return made("y[n,o] = b[o] + sum over i of x[n,i] w[o,i]", terms, start=start)
    if what == "dx":
        terms = ((f"dy[{o}] w[{o},{last}]", dy[row][o], w[o, last]) for o in range(w.shape[0]))
        return made("dx[n,i] = sum over o of dy[n,o] w[o,i]", terms)
    rows = list(np.ndindex(dy.shape[:-1]))
    if what == "dw":
        o, i = index
        terms = ((f"row {list(r)}: dy x", dy[r][o], x[r][i]) for r in rows)
        return made("dw[o,i] = sum over n of dy[n,o] x[n,i]", terms)
    return made("db[o] = sum over n of dy[n,o]", ((f"dy{[*r, last]}", dy[r][last]) for r in rows))


# ---------------------------------------------------------------- pooling


def max_pool(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy, cache = forward.inputs["x"], backward.inputs["dy"], forward.cache
    win, W = cache.window, x.shape[3]
    n, c, i, j = index
    if what == "y":
        h, w = divmod(int(cache.winner[index]), W)
        seen = ", ".join(
            f"x[{n},{c},{p},{q}]={x[n, c, p, q]:.5g}"
            for _, _, p, q in _patch(win, i, j)
            if 0 <= p < x.shape[2] and 0 <= q < W
        )
        note = f"window: {seen}; ties go to the first in row-major order; padding never wins"
        return made(
            "y = max of the window", [(f"winner x[{n},{c},{h},{w}]", x[n, c, h, w])], note=note
        )
    terms, lost = [], 0
    for p, q, _, _ in _covering(win, i, j, *dy.shape[2:]):
        if cache.winner[n, c, p, q] == i * W + j:
            terms.append((f"won window ({p},{q})", dy[n, c, p, q]))
        else:
            lost += 1
    return made(
        "dx = sum of dy over the windows that the pixel won", terms, note=f"lost {lost} windows"
    )


def avg_pool(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy, cache = forward.inputs["x"], backward.inputs["dy"], forward.cache
    n, c, i, j = index
    if what == "y":
        d = float(cache.divisor[i, j])
        terms: list[Any] = [
            (f"x[{n},{c},{h},{w}]", x[n, c, h, w])
            for _, _, h, w in _patch(cache.window, i, j)
            if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
        ]
        return made(f"y = sum of the window / {d:g}", terms, scale=1 / d)
    terms = [
        (f"window ({p},{q}): dy / divisor", dy[n, c, p, q], 1 / float(cache.divisor[p, q]))
        for p, q, _, _ in _covering(cache.window, i, j, *dy.shape[2:])
    ]
    return made("dx = sum of dy / divisor over the windows that cover the pixel", terms)


def adaptive(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy = forward.inputs["x"], backward.inputs["dy"]
    n, c, i, j = index
    rows, cols = _bins(x.shape[2], dy.shape[2]), _bins(x.shape[3], dy.shape[3])

    def cells(s: slice) -> range:
        return range(s.start, s.stop)

    if what == "y":
        terms: list[Any] = [
            (f"x[{n},{c},{h},{w}]", x[n, c, h, w]) for h in cells(rows[i]) for w in cells(cols[j])
        ]
        return made(f"y = mean of {len(terms)} pixels", terms, scale=1 / len(terms))
    terms = [
        (f"window ({p},{q}): dy / size", dy[n, c, p, q], 1 / (len(cells(r)) * len(cells(s))))
        for p, r in enumerate(rows)
        for q, s in enumerate(cols)
        if i in cells(r) and j in cells(s)
    ]
    return made("dx = sum of dy / size over the windows that cover the pixel", terms)
