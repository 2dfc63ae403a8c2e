"""The ops that a kernel can be checked against: their arrays, sizes and options."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array
from minicnn.shapes import Window, pair, window

Sizes = dict[str, int]
Options = dict[str, Any]
Shapes = dict[str, tuple[int, ...]]
Draw = Callable[[np.random.Generator, tuple[int, ...], Mapping[str, Any]], np.ndarray]


class Op(NamedTuple):
    """What a check of one op needs to know.

    `shapes` gives the arrays of a call, in order, from sizes and options; `inputs` says which of
    them have a gradient and `optional` which may be left out. `options` are the op's own with
    the values that a call leaves out; those in `required` are always passed on, and those that
    follow from the sizes (`derived`).
    """

    shapes: Callable[[Sizes, Options], Shapes]
    sizes: Callable[[Options], Sizes]
    inputs: tuple[str, ...]
    options: Mapping[str, Any]
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    draws: Mapping[str, Draw] = MappingProxyType({})
    derived: Callable[[Sizes], Options] = lambda sizes: {}
    pair: tuple[Callable[..., Any], Callable[..., Any]] | None = None
    ties: bool = False
    note: str = ""

    def arrays(self, sizes: Sizes, options: Options, seed: int, bias: bool) -> dict[str, Array]:
        """Draw the float64 arrays of a call."""
        rng, known = np.random.default_rng(seed), {**sizes, **options}
        return {
            name: self.draws.get(name, distinct if name == "x" else normal)(rng, shape, known)
            for name, shape in self.shapes(sizes, options).items()
            if bias or name not in self.optional
        }


# ------------------------------------------------------------ values


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], known: Mapping[str, Any]
) -> np.ndarray:
    """Normally distributed numbers."""
    return rng.standard_normal(shape)


def distinct(
    rng: np.random.Generator, shape: tuple[int, ...], known: Mapping[str, Any]
) -> np.ndarray:
    """Numbers evenly apart in random order, about from -2 to 2: no ties, and none near zero."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2 + 0.5) * (4 / max(size, 4))
    return rng.permutation(values).reshape(shape)


def _labels(
    rng: np.random.Generator, shape: tuple[int, ...], known: Mapping[str, Any]
) -> np.ndarray:
    return rng.integers(0, known["C"], shape)


def _bits(rng: np.random.Generator, shape: tuple[int, ...], known: Mapping[str, Any]) -> np.ndarray:
    return rng.integers(0, 2, shape).astype(np.float64)


def _kept(rng: np.random.Generator, shape: tuple[int, ...], known: Mapping[str, Any]) -> np.ndarray:
    kept = rng.random(shape) >= known["p"]
    kept.ravel()[:2] = (True, False)[: kept.size]  # both occur
    return kept


# ------------------------------------------------------------ shapes


def _geometry(options: Options, kernel: Any) -> Window:
    padding = options.get("padding", 0)
    stride = options.get("stride", 1)
    stride = kernel if stride is None else stride
    return window("gradcheck", kernel, stride, padding, options.get("dilation", 1))


def _map(win: Window, places: int = 3) -> tuple[int, int]:
    """An input, higher than wide, that leaves at least that many places, and a rest row."""
    (top, bottom), (left, right) = win.padding
    H = win.extent[0] + (places - 1) * win.stride[0] - top - bottom
    W = win.extent[1] + (places - 1) * win.stride[1] - left - right
    return max(H, win.kernel[0] + 1, 4) + 1, max(W, win.kernel[1] + 1, 4)


def _conv_sizes(options: Options) -> Sizes:
    KH, KW, G = 3, 2, options["groups"]
    H, W = _map(_geometry(options, (KH, KW)))
    return {"N": 2, "C": 2 * G, "F": (3 if G == 1 else 2) * G, "H": H, "W": W, "KH": KH, "KW": KW}


def _conv_shapes(s: Sizes, o: Options) -> Shapes:
    return {
        "x": (s["N"], s["C"], s["H"], s["W"]),
        "w": (s["F"], s["C"] // o["groups"], s["KH"], s["KW"]),
        "b": (s["F"],),
    }


def _transpose_sizes(options: Options) -> Sizes:
    G = options["groups"]
    return {"N": 2, "C": 2 * G, "F": (3 if G == 1 else 2) * G, "H": 4, "W": 3, "KH": 3, "KW": 2}


def _transpose_shapes(s: Sizes, o: Options) -> Shapes:
    return {
        "x": (s["N"], s["C"], s["H"], s["W"]),
        "w": (s["C"], s["F"] // o["groups"], s["KH"], s["KW"]),
        "b": (s["F"],),
    }


def _image_sizes(**sizes: int) -> Callable[[Options], Sizes]:
    return lambda options: dict(sizes)


def _pool_sizes(options: Options) -> Sizes:
    kernel = pair("gradcheck", "kernel_size", options["kernel_size"], 1)
    H, W = _map(_geometry(options, kernel))
    return {"N": 2, "C": 2, "H": H, "W": W}


def _image(s: Sizes, o: Options) -> Shapes:
    return {"x": (s["N"], s["C"], s["H"], s["W"])}


def _matrix(s: Sizes, o: Options) -> Shapes:
    return {"x": (s["N"], s["C"])}


def _normed(s: Sizes, o: Options) -> Shapes:
    return {**_image(s, o), "w": (s["C"],), "b": (s["C"],)}


def _layer_normed(s: Sizes, o: Options) -> Shapes:
    return {"x": (s["N"], s["L"], s["D"]), "w": (s["D"],), "b": (s["D"],)}


def _scored(name: str) -> Callable[[Sizes, Options], Shapes]:
    def shapes(s: Sizes, o: Options) -> Shapes:
        return {name: (s["N"], s["C"]), "target": (s["N"],)}

    return shapes


def _paired(s: Sizes, o: Options) -> Shapes:
    return {"x": (s["N"], s["C"]), "target": (s["N"], s["C"])}


# ------------------------------------------------------------ the table

CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
PIXELS = _image_sizes(N=2, C=3, H=4, W=3)
ROWS = _image_sizes(N=4, C=5)


def _elementwise(**options: Any) -> Op:
    return Op(_image, PIXELS, ("x",), options)


def _drop(x: Array, keep: Array, p: float = 0.5) -> tuple[Array, Any]:
    mask = np.asarray(keep, x.dtype) / x.dtype.type(1 - p)
    return x * mask, mask


OPS: dict[str, Op] = {
    "conv2d": Op(_conv_shapes, _conv_sizes, ("x", "w", "b"), CONV, optional=("b",)),
    "conv_transpose2d": Op(
        _transpose_shapes,
        _transpose_sizes,
        ("x", "w", "b"),
        {**CONV, "output_padding": 0},
        optional=("b",),
    ),
    "max_pool2d": Op(
        _image,
        _pool_sizes,
        ("x",),
        {"kernel_size": 2, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False},
        required=("kernel_size",),
        ties=True,
    ),
    "avg_pool2d": Op(
        _image,
        _pool_sizes,
        ("x",),
        {
            "kernel_size": 2,
            "stride": None,
            "padding": 0,
            "ceil_mode": False,
            "count_include_pad": True,
        },
        required=("kernel_size",),
    ),
    "adaptive_avg_pool2d": Op(
        _image,
        _image_sizes(N=2, C=2, H=7, W=5),
        ("x",),
        {"output_size": (3, 2)},
        required=("output_size",),
    ),
    "linear": Op(
        lambda s, o: {"x": (s["N"], s["I"]), "w": (s["O"], s["I"]), "b": (s["O"],)},
        _image_sizes(N=4, I=5, O=3),
        ("x", "w", "b"),
        {},
        optional=("b",),
    ),
    "relu": _elementwise(),
    "leaky_relu": _elementwise(negative_slope=0.01),
    "elu": _elementwise(alpha=1.0),
    "sigmoid": _elementwise(),
    "tanh": _elementwise(),
    "gelu": _elementwise(approximate="none"),
    "silu": _elementwise(),
    "softplus": _elementwise(beta=1.0, threshold=20.0),
    "softmax": Op(_matrix, ROWS, ("x",), {"dim": 1}),
    "log_softmax": Op(_matrix, ROWS, ("x",), {"dim": 1}),
    "batch_norm": Op(_normed, PIXELS, ("x", "w", "b"), {"eps": 1e-5}),
    "layer_norm": Op(
        _layer_normed,
        _image_sizes(N=2, L=3, D=4),
        ("x", "w", "b"),
        {"eps": 1e-5},
        derived=lambda sizes: {"normalized_shape": (sizes["D"],)},
    ),
    "group_norm": Op(
        _normed,
        _image_sizes(N=2, C=4, H=3, W=2),
        ("x", "w", "b"),
        {"num_groups": 2, "eps": 1e-5},
        required=("num_groups",),
    ),
    "dropout": Op(
        lambda s, o: {**_image(s, o), "keep": _image(s, o)["x"]},
        PIXELS,
        ("x",),
        {"p": 0.5},
        required=("p",),
        draws={"keep": _kept},
        pair=(_drop, lambda dy, mask: dy * mask),
        note="`keep` is a boolean array: which elements stay.",
    ),
    "flatten": Op(_image, PIXELS, ("x",), {"start_dim": 1, "end_dim": -1}),
    "nll_loss": Op(
        _scored("log_p"),
        ROWS,
        ("log_p",),
        {"reduction": "mean"},
        draws={"target": _labels},
        note="`target` holds class labels, int64.",
    ),
    "cross_entropy": Op(
        _scored("x"),
        ROWS,
        ("x",),
        {"reduction": "mean", "label_smoothing": 0.0},
        draws={"target": _labels},
        note="`target` holds class labels, int64.",
    ),
    "mse_loss": Op(_paired, ROWS, ("x",), {"reduction": "mean"}),
    "l1_loss": Op(_paired, ROWS, ("x",), {"reduction": "mean"}),
    "bce_with_logits": Op(_paired, ROWS, ("x",), {"reduction": "mean"}, draws={"target": _bits}),
}
