"""The picture of a trace as one HTML file: its arrays packed, and the view that reads them."""

from __future__ import annotations

import base64
import html
import json
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.backend import Array
from minicnn.layers import BatchNorm2d, Dropout, GroupNorm, LayerNorm

if TYPE_CHECKING:
    from minicnn.trace.steps import Step, Trace

BUDGET = 2_150_000  # bytes of arrays in a page, which base64 makes 4/3 of: below 3 MB in all

_RULES = {
    "Conv2d": "conv",
    "ConvTranspose2d": "convTranspose",
    "Linear": "linear",
    "MaxPool2d": "maxPool",
    "AvgPool2d": "avgPool",
    "AdaptiveAvgPool2d": "adaptive",
    **dict.fromkeys(("BatchNorm2d", "LayerNorm", "GroupNorm"), "norm"),
    **dict.fromkeys(("Softmax", "LogSoftmax"), "softmax"),
    **dict.fromkeys(
        ("ReLU", "LeakyReLU", "ELU", "Sigmoid", "Tanh", "GELU", "SiLU", "Softplus"), "elementwise"
    ),
    "Dropout": "dropout",
    "Flatten": "flatten",
    "Residual": "residual",
    **dict.fromkeys(("cross_entropy", "nll_loss"), "likelihood"),
    **dict.fromkeys(("mse_loss", "l1_loss", "bce_with_logits"), "loss"),
}

# In this order one after the other: the view is plain functions, in a page and in the widget.
SCRIPTS = (
    "arrays.js",
    "passes.js",
    "rules.js",
    "grid.js",
    "maps.js",
    "derivation.js",
    "columns.js",
    "view.js",
)


def pack(trace: Trace) -> dict[str, Any]:
    """Return what the view reads: nodes, and the arrays in base64, each once."""
    arrays: list[Array] = []
    places: dict[int, int] = {}
    nodes = []
    for node in trace.nodes:
        forward, backward = trace.forward(node.name), trace.backward(node.name)
        entry = _describe(forward)
        own = forward.arrays | backward.arrays | entry.pop("extra")
        entry["arrays"] = {}
        for letter, a in own.items():
            if id(a) not in places:
                places[id(a)] = len(arrays)
                arrays.append(a)
            entry["arrays"][letter] = places[id(a)]
        entry["sources"] = node.sources
        entry["backward_formula"] = backward.formula
        entry["statistics"] = forward.statistics() | backward.statistics()
        nodes.append(entry)

    # What does not fit is left out, the largest first, and the view says so.
    kept = sorted(range(len(arrays)), key=lambda i: arrays[i].size)
    room, chosen = BUDGET, set()
    for i in kept:
        room -= _plain(arrays[i]).nbytes
        if room >= 0:
            chosen.add(i)
    return {
        "loss": trace.loss,
        "loss_name": trace.loss_name,
        "nodes": nodes,
        "arrays": [_encode(a, i in chosen) for i, a in enumerate(arrays)],
    }


def _describe(step: Step) -> dict[str, Any]:
    """Everything but the arrays of the trace, and what a derivation needs from the cache."""
    layer: Any = step.layer
    label = step.op if layer is None or layer.children() else repr(layer)
    entry: dict[str, Any] = {"name": step.name, "op": step.op, "label": label}
    entry["formula"] = step.formula
    entry["rule"] = _RULES.get(step.op, "")  # a layer of the user's own has none
    extra: dict[str, Array] = {}
    window = getattr(layer, "_window", None)
    if window is not None:
        entry["window"] = window._asdict()
        entry["groups"] = getattr(layer, "groups", 1)
        for name in ("winner", "divisor"):
            if hasattr(step.cache, name):
                extra[name] = getattr(step.cache, name)
    elif isinstance(layer, BatchNorm2d | GroupNorm | LayerNorm):
        entry["eps"] = layer.eps
        entry["groups"] = getattr(layer, "num_groups", 1)
        entry["fixed"] = isinstance(layer, BatchNorm2d) and not step.cache.training
        if entry["fixed"]:
            extra |= layer.buffers
        if isinstance(layer, LayerNorm):
            entry["normalized"] = layer.normalized_shape
    elif isinstance(layer, Dropout):
        if step.cache.mask is not None:
            extra["mask"] = step.cache.mask
    elif entry["rule"] == "softmax":
        entry["dim"] = step.cache.dim % step.inputs["x"].ndim
    elif entry["rule"] == "elementwise":
        entry["options"] = layer.options
    elif entry["rule"] == "likelihood":
        extra["weights"] = step.cache.a
        entry["share"] = float(step.cache.share)
    entry["extra"] = extra
    return entry


def _plain(a: Array) -> Array:
    """As the view reads it: float32, float64 or int32, little-endian and in C order."""
    kind = "<i4" if a.dtype.kind in "iu" else "<f4" if a.dtype == np.float32 else "<f8"
    return np.asarray(a, dtype=kind, order="C")


def _encode(a: Array, keep: bool) -> dict[str, Any]:
    plain = _plain(a)
    data = base64.b64encode(plain.tobytes()).decode() if keep else None
    return {"shape": list(a.shape), "dtype": plain.dtype.name, "data": data}


def source(name: str) -> str:
    """Return the text of a file of the view."""
    return files("minicnn.trace").joinpath("view", name).read_text(encoding="utf-8")


def script() -> str:
    """Return the view's program, which defines ``render(root, data, send)``."""
    return "\n".join(map(source, SCRIPTS))


def page(trace: Trace) -> str:
    """Return the page of `trace`: no server and nothing from elsewhere."""
    data = json.dumps(pack(trace), separators=(",", ":")).replace("</", "<\\/")
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Stepping through: {html.escape(trace.loss_name)} {trace.loss:.4g}</title>\n"
        "<style>\n:root { color-scheme: light dark }\nbody { margin: 0 }\n"
        f"{source('view.css')}</style>\n"
        '<div id="view" style="min-height: 100vh"></div>\n'
        f'<script type="application/json" id="data">{data}</script>\n'
        f"<script>\n{script()}\n"
        'render(document.getElementById("view"), '
        'JSON.parse(document.getElementById("data").textContent));\n</script>\n</html>\n'
    )


def frame(trace: Trace) -> str:
    """Return the page in a frame of its own, for a notebook."""
    return (
        f'<iframe title="Stepping through" srcdoc="{html.escape(page(trace))}" '
        'sandbox="allow-scripts" style="width: 100%; height: 860px; border: 0"></iframe>'
    )
