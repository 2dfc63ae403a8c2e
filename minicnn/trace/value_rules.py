"""Derivations of norms, softmax, losses, and of what works element by element."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array
from minicnn.ops.cross_entropy import IGNORE_INDEX
from minicnn.trace.derivation import Explanation, Index, made

if TYPE_CHECKING:
    from minicnn.trace.steps import Step


# ---------------------------------------------------------------- normalisation


def norm(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
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
        return made(
            "y = w * (x - mean) * rstd + b",
            [("w, x - mean, rstd", scale[index], x[index] - m, r)],
            start=start,
            note=f"x {x[index]:.6g}, mean {m:.6g}, rstd = 1/sqrt(var + {layer.eps:g}) = {r:.6g}",
        )
    if what == "dx":
        g = dy * scale
        if fixed:
            return made(
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
        return made("dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy w", terms)
    # dw and db: over all elements that this parameter touched
    of: Any = np.broadcast_to(np.arange(w.size).reshape(shape), x.shape)  # type: ignore[union-attr]
    mine = np.argwhere(of == np.ravel_multi_index(index, w.shape))  # type: ignore[union-attr]
    if what == "dw":
        return made(
            "dw = sum of dy * xhat",
            ((f"{list(map(int, e))}: dy xhat", dy[tuple(e)], xhat[tuple(e)]) for e in mine),
        )
    return made("db = sum of dy", ((f"dy{list(map(int, e))}", dy[tuple(e)]) for e in mine))


# ---------------------------------------------------------------- softmax and losses


def softmax(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
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
            return made(
                "y = x - max - log(sum)",
                terms,
                final=lambda s: xs[c] - m - math.log(s),
                note=f"x - max = {xs[c] - m:.6g}, log(sum) = {math.log(total):.6g}",
            )
        return made(
            "y = e^(x - max) / sum",
            terms,
            final=lambda s: e / s,
            note=f"{e:.6g} / sum {total:.6g}",
        )
    if log:
        terms = [("dy", gs[c])] + [
            (f"-e^y[{c}] dy[{k}]", -math.exp(ys[c]), g) for k, g in enumerate(gs)
        ]
        return made("dx = dy - e^y * sum of dy", terms)
    terms = [("y dy", ys[c], gs[c])] + [
        (f"-y[{c}] y[{k}] dy[{k}]", -ys[c], p, g) for k, (p, g) in enumerate(zip(ys, gs))
    ]
    return made("dx = y (dy - sum over k of dy[k] y[k])", terms)


def loss(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
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
            return made(f"loss = -sum of y log p / {count}", terms, scale=1 / count)
        if op == "nll_loss":
            return made(f"dx = -y / {count}", [("-y", -target[index])], scale=1 / count)
        p = [math.exp(log_p[index])]
        total = float(target.sum(axis=1)[(index[0], *index[2:])])
        if total != 1:  # 0 for a label that is ignored
            p.append(total)
        return made(
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
        return made(
            f"loss = sum / {count}", map(each, map(list, np.ndindex(x.shape))), scale=1 / count
        )
    return made(f"dx = derivative / {count}", grad, scale=1 / count)


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


def elementwise(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    x, dy, layer = forward.inputs["x"], backward.inputs["dy"], forward.layer
    formula, y, slope, d = _activation(forward.op, float(x[index]), layer.options)  # type: ignore[union-attr]
    if what == "y":
        return made(f"y = {formula}", [(f"x = {x[index]:.6g}", y)])
    return made(f"dx = dy * derivative, which is {slope}", [("dy, derivative", dy[index], d)])


def dropout(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    a = forward.inputs["x"] if what == "y" else backward.inputs["dy"]
    mask = 1.0 if forward.cache.mask is None else forward.cache.mask[index]
    letter = "x" if what == "y" else "dy"
    return made(f"{what} = {letter} * mask", [(f"{letter}, mask", a[index], mask)])


def flatten(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
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
    return made(f"{what} is {letter} at another index", [(f"{letter}{list(place)}", a[place])])


def residual(forward: Step, backward: Step, what: str, index: Index) -> Explanation:
    if what == "y":
        both = forward.inputs["x"][index], forward.inputs["shortcut"][index]
        return made("y = body + shortcut", [("body", both[0]), ("shortcut", both[1])])
    return made("the sum hands dy on unchanged", [("dy", backward.inputs["dy"][index])])
