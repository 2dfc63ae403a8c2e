"""PyTorch's samples for operators, run through our ops: values and all gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops

SEED = 20260101


class Unsupported(Exception):
    """A sample that our interface cannot express; the text is the reason."""


def array(t: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    return t.detach().cpu().numpy().copy() if hasattr(t, "detach") else t


def plain(value: Any) -> Any:
    """Tuples of one number as that number, empty ones as None."""
    if isinstance(value, tuple | list) and len(value) < 2:
        return value[0] if value else None
    return value


#
# How a sample's arguments reach our op: (forward, backward, arguments in PyTorch's order, those
# that get a gradient, options). PyTorch's x is always the first.

GEOMETRY = ("stride", "padding", "dilation", "output_padding", "kernel_size")


class Op(NamedTuple):
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arguments: tuple[str, ...] = ()  # names of PyTorch's positional arguments after x
    differentiable: tuple[str, ...] = ()  # which of them get a gradient, in backward's order
    axes: int = 0  # of a batch, where PyTorch also takes one example alone


def op_of(name: str, *arguments: str, grads: tuple[str, ...] = (), axes: int = 0) -> Op:
    return Op(
        getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward"), arguments, grads, axes
    )


CONV = ("w", "b", "stride", "padding", "dilation", "groups")
LOSS = ("target",)
OPS: dict[str, Op] = {
    "nn.functional.conv2d": op_of("conv2d", *CONV, grads=("w", "b"), axes=4),
    "nn.functional.conv_transpose2d": op_of("conv_transpose2d", *CONV, grads=("w", "b"), axes=4),
    "nn.functional.max_pool2d": op_of("max_pool2d", axes=4),
    "nn.functional.avg_pool2d": op_of(
        "avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "divisor_override", axes=4,
    ),
    "nn.functional.adaptive_avg_pool2d": op_of("adaptive_avg_pool2d", "output_size", axes=4),
    "nn.functional.linear": op_of("linear", "w", "b", grads=("w", "b")),
    "nn.functional.relu": op_of("relu"),
    "nn.functional.leaky_relu": op_of("leaky_relu", "negative_slope"),
    "nn.functional.elu": op_of("elu", "alpha"),
    "sigmoid": op_of("sigmoid"),
    "tanh": op_of("tanh"),
    "nn.functional.gelu": op_of("gelu"),
    "nn.functional.silu": op_of("silu"),
    "nn.functional.softplus": op_of("softplus"),
    "softmax": op_of("softmax", "dim"),
    "log_softmax": op_of("log_softmax", "dim"),
    "nn.functional.batch_norm": op_of(
        "batch_norm", "running_mean", "running_var", "w", "b", grads=("w", "b")
    ),
    "nn.functional.layer_norm": op_of("layer_norm", "normalized_shape", "w", "b", grads=("w", "b")),
    "nn.functional.group_norm": op_of("group_norm", "num_groups", grads=("w", "b")),
    "nn.functional.dropout": op_of("dropout"),
    "flatten": op_of("flatten"),
    "nn.functional.nll_loss": op_of("nll_loss", *LOSS, axes=2),
    "nn.functional.cross_entropy": op_of("cross_entropy", *LOSS, axes=2),
    "nn.functional.mse_loss": op_of("mse_loss", *LOSS),
    "nn.functional.l1_loss": op_of("l1_loss", *LOSS),
    "nn.functional.binary_cross_entropy_with_logits": op_of("bce_with_logits", *LOSS),
}  # fmt: skip
RENAMED = {"weight": "w", "bias": "b"}  # as keywords of norms and layers
# Where torch.flatten and F.batch_norm differ from the layers, whose defaults our ops have.
DEFAULTS = {"flatten": ("start_dim", 0), "nn.functional.batch_norm": ("training", False)}
KEPT = ("nn.functional.nll_loss", "nn.functional.cross_entropy",
        "nn.functional.binary_cross_entropy_with_logits")  # fmt: skip


def op_samples() -> Iterator[tuple[Any, str]]:
    """All operators of PyTorch's list that we have, with the name."""
    from torch.testing._internal.common_methods_invocations import op_db

    for info in op_db:
        known = info.name in OPS or info.name == "nn.functional.unfold"
        if known and info.variant_test_name not in ("complex",):
            yield info, info.name


def arguments(name: str, sample: Any) -> tuple[Op, dict[str, Any]]:
    """The arguments of our op by name, "x" among them, still as PyTorch's tensors."""
    op = OPS[name]
    given: dict[str, Any] = {"x": sample.input}
    given.update(zip(op.arguments, sample.args))
    for key, value in sample.kwargs.items():
        given[key if name in KEPT else RENAMED.get(key, key)] = value
    given.pop("dtype", None)
    if name in DEFAULTS:
        given.setdefault(*DEFAULTS[name])
    for key in GEOMETRY:
        if key in given:
            given[key] = plain(given[key])
    if given.get("stride", 0) is None and "pool" not in name:
        del given["stride"]
    return op, given


def run_ours(op: Op, given: dict[str, Any], rng: np.random.Generator) -> Any:
    """Call forward and backward on arrays: (y, dy, {name: gradient}, cache)."""
    values = {key: array(value) for key, value in given.items()}
    x = values.pop("x")
    alone = op.axes and x.ndim == op.axes - 1
    if alone:
        x = x[None]
        if "target" in values:
            values["target"] = values["target"][None]
    if op.forward is ops.dropout_forward:
        values.setdefault("rng", rng)
    values.pop("return_indices", None)
    y, cache = op.forward(x, **values)
    dy = rng.standard_normal(np.shape(y)).astype(y.dtype)
    grads = op.backward(dy if np.ndim(y) or op.forward not in LOSSES else float(dy), cache)
    grads = grads if isinstance(grads, tuple) else (grads,)
    named = dict(zip(("x", *op.differentiable), grads))
    return y, dy, named, cache, alone


LOSSES = {op.forward for name, op in OPS.items() if op.arguments == LOSS}


def check_op(name: str, info: Any, sample: Any) -> None:
    """Compare one sample; raises what our op raises, or AssertionError."""
    import torch

    rng = np.random.default_rng(SEED)
    if name == "nn.functional.unfold":
        check_unfold(sample, rng)
        return
    op, given = arguments(name, sample)
    y, dy, grads, cache, alone = run_ours(op, given, rng)
    y, dy = (a[0] if alone and np.ndim(a) else np.asarray(a) for a in (y, dy))
    if (
        op.forward is ops.dropout_forward
        and given.get("training", True)
        and given.get("p", 0.5) % 1
    ):
        # Each library draws for itself: what is left must be scaled, and the gradient must match.
        x, p = array(given["x"]), given.get("p", 0.5)
        kept = y != 0
        assert_close(y, np.where(kept, x / (1 - p), 0))
        assert_close(grads["x"], np.where(kept, dy / (1 - p), 0))
        return
    leaves = {
        key: t.detach().clone().requires_grad_(t.dtype.is_floating_point)
        for key, t in (("x", sample.input), *((k, given.get(k)) for k in op.differentiable))
        if isinstance(t, torch.Tensor)
    }
    args = [leaves.get(key, a) for key, a in zip(op.arguments, sample.args)]
    kwargs = {
        k: v if name in KEPT else leaves.get(RENAMED.get(k, k), v) for k, v in sample.kwargs.items()
    }
    args += list(sample.args[len(args) :])
    expected = info.op(leaves["x"], *args, **kwargs)
    if isinstance(expected, tuple):
        expected, indices = expected
        np.testing.assert_array_equal(
            cache.winner[0] if alone else cache.winner, indices.numpy(), "winners"
        )
    assert_close(y, array(expected))
    found = torch.autograd.grad(
        expected, list(leaves.values()), torch.tensor(dy, dtype=expected.dtype), allow_unused=True
    )
    for key, want in zip(leaves, found):
        got = grads[key]
        if key == "x" and alone:
            got = got[0]
        assert_close(got, np.zeros_like(got) if want is None else array(want))


def check_unfold(sample: Any, rng: np.random.Generator) -> None:
    """im2col and col2im against unfold and its gradient."""
    import torch

    names = ("kernel_size", "dilation", "padding", "stride")
    given = {**dict(zip(names, sample.args)), **sample.kwargs}
    given = {key: plain(value) for key, value in given.items()}
    x = sample.input.detach().clone().requires_grad_()
    a = array(x)
    a = a[None] if a.ndim == 3 else a
    expected = torch.nn.functional.unfold(x, **given)  # (N, K, L)
    cols = ops.im2col(a, **given)  # (K, N*L)
    dcols = rng.standard_normal(cols.shape)

    def theirs(c: Any) -> Any:
        N = len(a)
        c = c.reshape(c.shape[0], N, c.shape[1] // N if N else 0)
        c = np.moveaxis(c, 1, 0)
        return c.reshape(expected.shape)

    assert_close(theirs(cols), array(expected))
    expected.backward(torch.tensor(theirs(dcols).copy()))
    back = ops.col2im(dcols, a.shape, **given)
    assert_close(back.reshape(x.shape), array(x.grad))


def assert_close(got: Any, want: Any) -> None:
    """Equal shape, and equal values to what float64 sums in another order differ by."""
    assert np.shape(got) == np.shape(want), f"shape {np.shape(want)} expected, got {np.shape(got)}"
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-11)
