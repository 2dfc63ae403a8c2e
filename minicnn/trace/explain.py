"""Derive one number of a trace: the terms it is the sum of, and the finite difference beside it.

Every number here is ``scale * (start + sum of terms)``; what differs from op to op is which terms.
Each rule below lists them for one op from the arrays of the trace, apart from the code that
computed the number, and the sum is held against it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minicnn.backend import Array
from minicnn.ops.adaptive_avg_pool2d import _bins
from minicnn.ops.cross_entropy import IGNORE_INDEX

if TYPE_CHECKING:
    from minicnn.trace.steps import Step, Trace

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


def explain(trace: Trace, name: str, what: str, index: Any) -> Explanation:
    """Derive one number of `trace`; see `Trace.explain`."""
    forward, backward = trace.forward(name), trace.backward(name)
    arrays = {"y": forward.outputs["y"]} | backward.outputs | backward.grads
    if what not in arrays:
        raise ValueError(
            f"explain: what: expected one of {', '.join(arrays)} for {forward.op} {name!r}, "
            f"got {what!r}"
        )
    a = arrays[what]
    index = tuple(index) if isinstance(index, tuple | list) else (index,)
    if len(index) != a.ndim or any(not -n <= i < n for i, n in zip(index, a.shape)):
        raise IndexError(
            f"explain: index: expected {a.ndim} integers within {tuple(a.shape)}, got {index}"
        )
    index = tuple(int(i) % n for i, n in zip(index, a.shape))
    rule = _rule(forward.op)
    title = f"{what}{list(index)} of {forward.op} {name!r}"
    result = rule(forward, backward, what, index)
    result.title = title
    result.value = float(a[index])
    result.gradient = float(backward.inputs["dy"][index]) if what == "y" else result.value
    result.numeric = trace.finite_difference(name, what, index)
    return result


def _make(formula: str, terms: Any, **more: Any) -> Explanation:
    made = [Term(label, tuple(float(f) for f in factors)) for label, *factors in terms]
    return Explanation("", formula, made, **more)


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


def _conv(
    forward: Step, backward: Step, what: str, index: Index, turn: bool = False
) -> Explanation:
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
        return _make(
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
        return _make("dw = sum over all windows of dy * x at this tap", terms)
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
        return _make(f"{what} = sum over the patch of {letter} * w", terms, start=bias)
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
    return _make(
        f"{what} = sum over the windows that cover the pixel of {letter} * w", terms, start=bias
    )


def _conv_transpose(f: Step, b: Step, what: str, index: Index) -> Explanation:
    return _conv(f, b, what, index, turn=True)


def _linear(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, w, dy = forward.inputs["x"], forward.params["weight"], backward.inputs["dy"]
    b = forward.params.get("bias")
    *lead, last = index
    row = tuple(lead)
    if what == "y":
        start = 0.0 if b is None else float(b[last])
        terms = ((f"x[{i}] w[{last},{i}]", x[row][i], w[last, i]) for i in range(w.shape[1]))
        return _make("y[n,o] = b[o] + sum over i of x[n,i] w[o,i]", terms, start=start)
    if what == "dx":
        terms = ((f"dy[{o}] w[{o},{last}]", dy[row][o], w[o, last]) for o in range(w.shape[0]))
        return _make("dx[n,i] = sum over o of dy[n,o] w[o,i]", terms)
    rows = list(np.ndindex(dy.shape[:-1]))
    if what == "dw":
        o, i = index
        terms = ((f"row {list(r)}: dy x", dy[r][o], x[r][i]) for r in rows)
        return _make("dw[o,i] = sum over n of dy[n,o] x[n,i]", terms)
    return _make("db[o] = sum over n of dy[n,o]", ((f"dy{[*r, last]}", dy[r][last]) for r in rows))


# ---------------------------------------------------------------- pooling


def _max_pool(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
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
        return _make(
            "y = max of the window", [(f"winner x[{n},{c},{h},{w}]", x[n, c, h, w])], note=note
        )
    terms, lost = [], 0
    for p, q, _, _ in _covering(win, i, j, *dy.shape[2:]):
        if cache.winner[n, c, p, q] == i * W + j:
            terms.append((f"won window ({p},{q})", dy[n, c, p, q]))
        else:
            lost += 1
    return _make(
        "dx = sum of dy over the windows that the pixel won", terms, note=f"lost {lost} windows"
    )


def _avg_pool(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy, cache = forward.inputs["x"], backward.inputs["dy"], forward.cache
    n, c, i, j = index
    if what == "y":
        d = float(cache.divisor[i, j])
        terms: list[Any] = [
            (f"x[{n},{c},{h},{w}]", x[n, c, h, w])
            for _, _, h, w in _patch(cache.window, i, j)
            if 0 <= h < x.shape[2] and 0 <= w < x.shape[3]
        ]
        return _make(f"y = sum of the window / {d:g}", terms, scale=1 / d)
    terms = [
        (f"window ({p},{q}): dy / divisor", dy[n, c, p, q], 1 / float(cache.divisor[p, q]))
        for p, q, _, _ in _covering(cache.window, i, j, *dy.shape[2:])
    ]
    return _make("dx = sum of dy / divisor over the windows that cover the pixel", terms)


def _adaptive(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy = forward.inputs["x"], backward.inputs["dy"]
    n, c, i, j = index
    rows, cols = _bins(x.shape[2], dy.shape[2]), _bins(x.shape[3], dy.shape[3])

    def cells(s: slice) -> range:
        return range(s.start, s.stop)

    if what == "y":
        terms: list[Any] = [
            (f"x[{n},{c},{h},{w}]", x[n, c, h, w]) for h in cells(rows[i]) for w in cells(cols[j])
        ]
        return _make(f"y = mean of {len(terms)} pixels", terms, scale=1 / len(terms))
    terms = [
        (f"window ({p},{q}): dy / size", dy[n, c, p, q], 1 / (len(cells(r)) * len(cells(s))))
        for p, r in enumerate(rows)
        for q, s in enumerate(cols)
        if i in cells(r) and j in cells(s)
    ]
    return _make("dx = sum of dy / size over the windows that cover the pixel", terms)


# ---------------------------------------------------------------- normalisation


def _norm(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x = forward.inputs["x"].astype(np.float64)
    dy = backward.inputs["dy"].astype(np.float64)
    layer: Any = forward.layer
    # What shares a mean and a variance, as a key for each element.
    if forward.op == "BatchNorm2d":
        view, axes, shape = x.shape, (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    elif forward.op == "LayerNorm":
        k = len(layer.normalized_shape)
        view, axes, shape = x.shape, tuple(range(x.ndim - k, x.ndim)), layer.normalized_shape
    else:
        view = (x.shape[0], layer.num_groups, -1)
        axes, shape = (2,), (1, -1, *[1] * (x.ndim - 2))
    fixed = forward.op == "BatchNorm2d" and not forward.cache.training
    grouped = x.reshape(view)
    if fixed:
        mean = layer.buffers["running_mean"].reshape(shape).astype(np.float64)
        var = layer.buffers["running_var"].reshape(shape).astype(np.float64)
    else:
        mean, var = grouped.mean(axes, keepdims=True), grouped.var(axes, keepdims=True)
    rstd = 1 / np.sqrt(var + layer.eps)
    xhat = ((grouped - mean) * rstd).reshape(x.shape)
    w, b = (forward.params.get(k) for k in ("weight", "bias"))
    scale = np.broadcast_to(1.0 if w is None else w.reshape(shape), x.shape)
    full_rstd = np.broadcast_to(rstd, grouped.shape).reshape(x.shape)
    r = float(full_rstd[index]) if what in ("y", "dx") else 0.0
    if what == "y":
        start = 0.0 if b is None else float(np.broadcast_to(b.reshape(shape), x.shape)[index])
        m = float(np.broadcast_to(mean, grouped.shape).reshape(x.shape)[index])
        return _make(
            "y = w * (x - mean) * rstd + b",
            [("w, x - mean, rstd", scale[index], x[index] - m, r)],
            start=start,
            note=f"x {x[index]:.6g}, mean {m:.6g}, rstd = 1/sqrt(var + {layer.eps:g}) = {r:.6g}",
        )
    if what == "dx":
        g = dy * scale
        if fixed:
            return _make(
                "dx = dy w rstd (fixed statistics)", [("dy w rstd", dy[index], scale[index], r)]
            )

        def mean_of(a: Array) -> float:
            m = a.reshape(view).mean(axes, keepdims=True)
            return float(np.broadcast_to(m, grouped.shape).reshape(x.shape)[index])

        terms = [
            ("1 direct: rstd, g = dy w", r, g[index]),
            ("2 through the mean: -rstd, mean(g)", -r, mean_of(g)),
            (
                "3 through the variance: -rstd, xhat, mean(g xhat)",
                -r,
                xhat[index],
                mean_of(g * xhat),
            ),
        ]
        return _make("dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy w", terms)
    # dw and db: over all elements that this parameter touched
    of: Any = np.broadcast_to(np.arange(w.size).reshape(shape), x.shape)  # type: ignore[union-attr]
    mine = np.argwhere(of == np.ravel_multi_index(index, w.shape))  # type: ignore[union-attr]
    if what == "dw":
        return _make(
            "dw = sum of dy * xhat",
            ((f"{list(map(int, e))}: dy xhat", dy[tuple(e)], xhat[tuple(e)]) for e in mine),
        )
    return _make("db = sum of dy", ((f"dy{list(map(int, e))}", dy[tuple(e)]) for e in mine))


# ---------------------------------------------------------------- softmax and losses


def _softmax(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, y, dy = forward.inputs["x"], forward.outputs["y"], backward.inputs["dy"]
    dim = forward.cache.dim % x.ndim
    log = forward.op == "LogSoftmax"

    def row(a: Array) -> list[float]:
        return [float(v) for v in np.moveaxis(a, dim, -1)[index[:dim] + index[dim + 1 :]]]

    xs, ys, gs, c = row(x), row(y), row(dy), index[dim]
    m = max(xs)
    if what == "y":
        terms: list[Any] = [(f"e^(x[{k}] - max)", math.exp(v - m)) for k, v in enumerate(xs)]
        total, e = math.fsum(t[1] for t in terms), math.exp(xs[c] - m)
        if log:
            return _make(
                "y = x - max - log(sum)",
                terms,
                final=lambda s: xs[c] - m - math.log(s),
                note=f"x - max = {xs[c] - m:.6g}, log(sum) = {math.log(total):.6g}",
            )
        return _make(
            "y = e^(x - max) / sum",
            terms,
            final=lambda s: e / s,
            note=f"{e:.6g} / sum {total:.6g}",
        )
    if log:
        terms = [("dy", gs[c])] + [
            (f"-e^y[{c}] dy[{k}]", -math.exp(ys[c]), g) for k, g in enumerate(gs)
        ]
        return _make("dx = dy - e^y * sum of dy", terms)
    terms = [("y dy", ys[c], gs[c])] + [
        (f"-y[{c}] y[{k}] dy[{k}]", -ys[c], p, g) for k, (p, g) in enumerate(zip(ys, gs))
    ]
    return _make("dx = y (dy - sum over k of dy[k] y[k])", terms)


def _loss(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x = forward.inputs["x"].astype(np.float64)
    t, op = forward.inputs["target"], forward.op
    if op in ("cross_entropy", "nll_loss"):
        C = x.shape[1]
        if t.dtype.kind == "f":
            target = t.astype(np.float64)
        else:
            target = np.moveaxis((t[..., None] == np.arange(C)).astype(np.float64), -1, 1)
        count = t.size // C if t.dtype.kind == "f" else np.count_nonzero(t != IGNORE_INDEX)
        log_p = x
        if op == "cross_entropy":
            z = x - x.max(axis=1, keepdims=True)
            log_p = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
        if what == "y":
            terms = (
                (f"-log p{e}", -target[tuple(e)], log_p[tuple(e)])
                for e in np.argwhere(target).tolist()
            )
            return _make(f"loss = -sum of y log p / {count}", terms, scale=1 / count)
        if op == "nll_loss":
            return _make(f"dx = -y / {count}", [("-y", -target[index])], scale=1 / count)
        p = [math.exp(log_p[index])]
        total = float(target.sum(axis=1)[(index[0], *index[2:])])
        if total != 1:  # 0 for a label that is ignored
            p.append(total)
        return _make(
            f"dx = (p - y) / {count}",
            [("p = softmax(x)", *p), ("-y", -target[index])],
            scale=1 / count,
        )
    t = t.astype(np.float64)
    d, count = x - t, x.size
    grad: list[Any]
    if op == "mse_loss":

        def each(e: list[int]) -> Any:
            return (f"(x - target)^2 {e}", d[tuple(e)], d[tuple(e)])

        grad = [("2 (x - target)", 2, d[index] if what == "dx" else 0)]
    elif op == "l1_loss":

        def each(e: list[int]) -> Any:
            return (f"|x - target| {e}", abs(d[tuple(e)]))

        grad = [("sign(x - target)", np.sign(d[index]) if what == "dx" else 0)]
    else:
        losses = np.maximum(x, 0) - x * t + np.log1p(np.exp(-np.abs(x)))

        def each(e: list[int]) -> Any:
            return (f"max(x,0) - x t + log(1 + e^-|x|) {e}", losses[tuple(e)])

        grad = (
            [("sigmoid(x)", 0.5 * (1 + math.tanh(x[index] / 2))), ("-target", -t[index])]
            if what == "dx"
            else []
        )
    if what == "y":
        return _make(
            f"loss = sum / {count}", map(each, map(list, np.ndindex(x.shape))), scale=1 / count
        )
    return _make(f"dx = derivative / {count}", grad, scale=1 / count)


# ---------------------------------------------------------------- element by element


def _sigmoid(x: float) -> float:
    return 0.5 * (1 + math.tanh(x / 2))


def _gelu(x: float, approximate: str = "none") -> tuple[float, float]:
    if approximate == "tanh":
        a = math.sqrt(2 / math.pi)
        t = math.tanh(a * (x + 0.044715 * x**3))
        return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 0.134145 * x * x)
    phi = 0.5 * math.erfc(-x / math.sqrt(2))
    return x * phi, phi + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def _activation(op: str, x: float, o: dict[str, Any]) -> tuple[str, float, str, float]:
    """Return how an activation and its derivative are written, and both values at x."""
    s = _sigmoid(x)
    match op:
        case "ReLU":
            return "max(x, 0)", max(x, 0.0), "1 if x > 0 else 0", float(x > 0)
        case "LeakyReLU":
            a = o["negative_slope"]
            return (
                f"x if x > 0 else {a:g} x",
                x if x > 0 else a * x,
                f"1 or {a:g}",
                1.0 if x > 0 else a,
            )
        case "ELU":
            a = o["alpha"]
            low = a * math.expm1(min(x, 0.0))
            return (
                f"x or {a:g}(e^x - 1)",
                x if x > 0 else low,
                "1 or y + alpha",
                1.0 if x > 0 else low + a,
            )
        case "Sigmoid":
            return "1 / (1 + e^-x)", s, "y (1 - y)", s * (1 - s)
        case "Tanh":
            t = math.tanh(x)
            return "tanh x", t, "1 - y^2", 1 - t * t
        case "GELU":
            y, d = _gelu(x, o["approximate"])
            return "x Phi(x)", y, "Phi(x) + x phi(x)", d
        case "SiLU":
            return "x sigmoid(x)", x * s, "s + x s (1 - s)", s + x * s * (1 - s)
        case _:
            b, limit = o["beta"], o["threshold"]
            if b * x > limit:
                return "x (above the threshold)", x, "1", 1.0
            y = (max(b * x, 0) + math.log1p(math.exp(-abs(b * x)))) / b
            return "log(1 + e^(beta x)) / beta", y, "sigmoid(beta x)", _sigmoid(b * x)


def _elementwise(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy, layer = forward.inputs["x"], backward.inputs["dy"], forward.layer
    formula, y, slope, d = _activation(forward.op, float(x[index]), layer.options)  # type: ignore[union-attr]
    if what == "y":
        return _make(f"y = {formula}", [(f"x = {x[index]:.6g}", y)])
    return _make(f"dx = dy * derivative, which is {slope}", [("dy, derivative", dy[index], d)])


def _dropout(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    a = forward.inputs["x"] if what == "y" else backward.inputs["dy"]
    mask = 1.0 if forward.cache.mask is None else forward.cache.mask[index]
    letter = "x" if what == "y" else "dy"
    return _make(f"{what} = {letter} * mask", [(f"{letter}, mask", a[index], mask)])


def _flatten(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, y = forward.inputs["x"], forward.outputs["y"]
    if what == "y":
        a, source = x, np.unravel_index(np.ravel_multi_index(index, y.shape), x.shape)
    else:
        a, source = (
            backward.inputs["dy"],
            np.unravel_index(np.ravel_multi_index(index, x.shape), y.shape),
        )
    place = tuple(int(i) for i in source)
    letter = "x" if what == "y" else "dy"
    return _make(f"{what} is {letter} at another index", [(f"{letter}{list(place)}", a[place])])


def _residual(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    if what == "y":
        both = forward.inputs["x"][index], forward.inputs["shortcut"][index]
        return _make("y = body + shortcut", [("body", both[0]), ("shortcut", both[1])])
    return _make("the sum hands dy on unchanged", [("dy", backward.inputs["dy"][index])])


RULES: dict[str, Callable[[Step, Step, str, Index], Explanation]] = {
    "Conv2d": _conv,
    "ConvTranspose2d": _conv_transpose,
    "Linear": _linear,
    "MaxPool2d": _max_pool,
    "AvgPool2d": _avg_pool,
    "AdaptiveAvgPool2d": _adaptive,
    **dict.fromkeys(("BatchNorm2d", "LayerNorm", "GroupNorm"), _norm),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _softmax),
    **dict.fromkeys(("cross_entropy", "nll_loss", "mse_loss", "l1_loss", "bce_with_logits"), _loss),
    **dict.fromkeys(
        ("ReLU", "LeakyReLU", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Softplus"), _elementwise
    ),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Residual": _residual,
}


def _rule(op: str) -> Callable[[Step, Step, str, Index], Explanation]:
    if op not in RULES:
        raise ValueError(f"explain: name: expected a layer of minicnn, got {op}")
    return RULES[op]
