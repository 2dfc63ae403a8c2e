"""PyTorch's own samples, run through our ops, layers and optimisers.

PyTorch tests itself with sample inputs and error inputs for each operator, module and optimiser
(``torch.testing._internal``). A sample passes if values and all gradients equal PyTorch's in
float64; an error input passes if it is refused by an error that names the argument, what was
expected and what came.

PyTorch also takes one picture without the batch axis and tuples of one number; what is compared
here is the same call with the batch axis added and the number itself.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np

import minicnn as mc
from minicnn import ops

SEED = 20260101
ERROR_FORM = re.compile(r"^[\w.]+: .*expected .+, got .+", re.DOTALL)
# What is refused on purpose, though PyTorch takes it: (words of our message, reason).
REFUSED_ON_PURPOSE = [
    (r"momentum: expected a number >= 0", "a momentum below 0 in batch norm"),
    (r"eps: expected a number > 0", "an eps below 0"),
    (r"divisor_override: expected an integer >= 1", "a divisor below 0 in average pooling"),
    (r"expected (at least 2 axes|shape \(N, C\))", "losses and norms without batch axis"),
    (r"expected an entry or more along axis", "a softmax over no entries"),
    (r"expected an axis of x with shape \(\)", "a softmax of a single number without axes"),
    (r"flatten: .*expected an axis from 0 to -1", "flattening a single number without axes"),
    (r"expected more than 1 value per channel", "batch norm of an empty batch in training"),
]  # fmt: skip


class Outcome(NamedTuple):
    """What became of a sample."""

    kind: str  # "op", "layer" or "optimizer"
    name: str
    error: bool  # whether it has to be refused
    result: str  # "passed", "failed" or "refused"
    detail: str


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


# ---------------------------------------------------------------- operators
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


def _pair(name: str, *arguments: str, grads: tuple[str, ...] = (), axes: int = 0) -> Op:
    return Op(
        getattr(ops, f"{name}_forward"), getattr(ops, f"{name}_backward"), arguments, grads, axes
    )


CONV = ("w", "b", "stride", "padding", "dilation", "groups")
LOSS = ("target",)
OPS: dict[str, Op] = {
    "nn.functional.conv2d": _pair("conv2d", *CONV, grads=("w", "b"), axes=4),
    "nn.functional.conv_transpose2d": _pair("conv_transpose2d", *CONV, grads=("w", "b"), axes=4),
    "nn.functional.max_pool2d": _pair("max_pool2d", axes=4),
    "nn.functional.avg_pool2d": _pair(
        "avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
        "divisor_override", axes=4,
    ),
    "nn.functional.adaptive_avg_pool2d": _pair("adaptive_avg_pool2d", "output_size", axes=4),
    "nn.functional.linear": _pair("linear", "w", "b", grads=("w", "b")),
    "nn.functional.relu": _pair("relu"),
    "nn.functional.leaky_relu": _pair("leaky_relu", "negative_slope"),
    "nn.functional.elu": _pair("elu", "alpha"),
    "sigmoid": _pair("sigmoid"),
    "tanh": _pair("tanh"),
    "nn.functional.gelu": _pair("gelu"),
    "nn.functional.silu": _pair("silu"),
    "nn.functional.softplus": _pair("softplus"),
    "softmax": _pair("softmax", "dim"),
    "log_softmax": _pair("log_softmax", "dim"),
    "nn.functional.batch_norm": _pair(
        "batch_norm", "running_mean", "running_var", "w", "b", grads=("w", "b")
    ),
    "nn.functional.layer_norm": _pair("layer_norm", "normalized_shape", "w", "b", grads=("w", "b")),
    "nn.functional.group_norm": _pair("group_norm", "num_groups", grads=("w", "b")),
    "nn.functional.dropout": _pair("dropout"),
    "flatten": _pair("flatten"),
    "nn.functional.nll_loss": _pair("nll_loss", *LOSS, axes=2),
    "nn.functional.cross_entropy": _pair("cross_entropy", *LOSS, axes=2),
    "nn.functional.mse_loss": _pair("mse_loss", *LOSS),
    "nn.functional.l1_loss": _pair("l1_loss", *LOSS),
    "nn.functional.binary_cross_entropy_with_logits": _pair("bce_with_logits", *LOSS),
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


# ---------------------------------------------------------------- layers

LOSS_MODULES = {
    "CrossEntropyLoss": "cross_entropy",
    "NLLLoss": "nll_loss",
    "MSELoss": "mse_loss",
    "L1Loss": "l1_loss",
    "BCEWithLogitsLoss": "bce_with_logits",
}
NO_BATCH = {"Conv2d": 4, "ConvTranspose2d": 4, "MaxPool2d": 4, "AvgPool2d": 4,
            "AdaptiveAvgPool2d": 4}  # fmt: skip


def modules() -> Iterator[tuple[Any, str]]:
    """All modules of PyTorch's list that we have, with the name."""
    from torch.testing._internal.common_modules import module_db

    for info in module_db:
        name = info.module_cls.__name__
        if name in LOSS_MODULES or inspect.isclass(getattr(mc, name, None)):
            yield info, name


def loss(name: str) -> Op:
    """The op of a loss module."""
    axes = 2 if name in ("CrossEntropyLoss", "NLLLoss") else 0
    return _pair(LOSS_MODULES[name], *LOSS, axes=axes)


def build(name: str, call: Any) -> Any:
    """Our layer of PyTorch's arguments."""
    kind = getattr(mc, name)
    known = inspect.signature(kind).parameters
    extra = set(call.kwargs) - set(known) - {"device", "dtype"}
    if extra:
        raise Unsupported(f"the argument {sorted(extra)[0]} of {name}")
    if len(call.args) > len(known):
        raise Unsupported(f"argument {len(known) + 1} of {name}")
    kwargs = {k: plain(array(v)) for k, v in call.kwargs.items() if k not in ("device", "dtype")}
    return kind(*(plain(a) for a in call.args), **kwargs)


def check_module(name: str, info: Any, inputs: Any, training: bool) -> None:
    """Compare one module on one input: values and all gradients."""
    import torch

    rng = np.random.default_rng(SEED)
    theirs = info.module_cls(*inputs.constructor_input.args, **inputs.constructor_input.kwargs)
    theirs = theirs.to(torch.float64).train(training)
    call = inputs.forward_input
    x, *more = (*call.args, *call.kwargs.values())
    x = x.detach().clone().requires_grad_()
    if name in LOSS_MODULES:
        op = loss(name)
        given = {"x": x, "target": more[0], **constructor_options(info, inputs)}
        y, dy, grads, _, alone = run_ours(op, given, rng)
        layer, dx = None, grads["x"][0] if alone else grads["x"]
        y, dy = (a[0] if alone and np.ndim(a) else np.asarray(a) for a in (y, dy))
    else:
        layer = build(name, inputs.constructor_input)
        layer.astype(np.float64).load_state_dict(theirs.state_dict())
        layer.train(training)
        a = array(x)
        alone = name in NO_BATCH and a.ndim == NO_BATCH[name] - 1
        a = a[None] if alone else a
        y, cache = layer.forward(a)
        dy = rng.standard_normal(y.shape)
        dx = layer.backward(dy, cache)
        y, dy, dx = (v[0] if alone else v for v in (y, dy, dx))
    expected = theirs(x, *more)
    assert_close(y, array(expected))
    expected.backward(torch.tensor(np.asarray(dy), dtype=expected.dtype))
    assert_close(dx, array(x.grad))
    if layer is not None:
        for key, p in theirs.named_parameters():
            assert_close(layer.grads[key], array(p.grad))
        for key, b in theirs.named_buffers():
            assert_close(layer.buffers[key], array(b))


def constructor_options(info: Any, inputs: Any) -> dict[str, Any]:
    """The arguments of a loss module by name."""
    call = inputs.constructor_input
    names = [n for n in inspect.signature(info.module_cls.__init__).parameters if n != "self"]
    return {**dict(zip(names, call.args)), **call.kwargs}


# ---------------------------------------------------------------- optimisers

OPTIMIZERS = ("SGD", "Adam", "AdamW", "RMSprop")
# What says how PyTorch computes a step and not what: our answer must be the same with and without.
HOW = ("foreach", "fused", "differentiable", "capturable")


def optimizers() -> Iterator[tuple[Any, str]]:
    """All optimisers of PyTorch's list that we have."""
    from torch.testing._internal.common_optimizers import optim_db

    for info in optim_db:
        if info.optim_cls.__name__ in OPTIMIZERS:
            yield info, info.optim_cls.__name__


def our_optimizer(name: str, model: Any, options: dict[str, Any]) -> Any:
    """Our optimiser of PyTorch's arguments."""
    kind = getattr(mc.optim, name)
    known = inspect.signature(kind).parameters
    options = {k: array(v) for k, v in options.items() if k not in HOW}
    options = {
        k: v.item() if isinstance(v, np.ndarray) and v.size == 1 else v for k, v in options.items()
    }
    extra = {k for k in set(options) - set(known) if options[k]}
    if extra:
        raise Unsupported(f"the argument {sorted(extra)[0]} of optimisers")
    return kind(model, **{k: v for k, v in options.items() if k in known})


def check_optimizer(name: str, info: Any, options: dict[str, Any]) -> None:
    """Ten steps on the same gradients lead to the same parameters."""
    import torch

    if name == "SGD":  # whose learning rate has no default here
        options = {"lr": 1e-3, **options}
    model = mc.Linear(3, 2, rng=0, dtype=np.float64)
    params = [torch.nn.Parameter(torch.tensor(p.copy())) for _, p, _ in model.named_params()]
    ours = our_optimizer(name, model, dict(options))
    theirs = info.optim_cls(params, **options)
    rng = np.random.default_rng(SEED)
    for _ in range(10):
        for (_, _, g), p in zip(model.named_params(), params):
            g[...] = rng.standard_normal(g.shape)
            p.grad = torch.tensor(g.copy())
        ours.step()
        theirs.step()
        for (_, q, _), p in zip(model.named_params(), params):
            np.testing.assert_allclose(q, array(p), rtol=1e-9, atol=1e-11)


# ---------------------------------------------------------------- all of it


def attempt(kind: str, name: str, error: bool, function: Callable[[], None]) -> Outcome:
    """Run one sample and say what became of it."""
    try:
        function()
    except AssertionError as wrong:
        return Outcome(kind, name, error, "failed", " ".join(str(wrong).split())[:300])
    except Unsupported as reason:
        return Outcome(kind, name, error, "refused", str(reason))
    except Exception as refusal:
        text = f"{type(refusal).__name__}: {refusal}"
        form = isinstance(refusal, ValueError | TypeError) and ERROR_FORM.match(str(refusal))
        if error:
            return Outcome(kind, name, error, "passed" if form else "failed", text[:300])
        for words, reason in REFUSED_ON_PURPOSE:
            if form and re.search(words, str(refusal)):
                return Outcome(kind, name, error, "refused", reason)
        return Outcome(kind, name, error, "failed", text[:300])
    return Outcome(kind, name, error, "failed" if error else "passed", "accepted" * error)


@cache
def outcomes() -> list[Outcome]:
    """Run every sample."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [*_op_outcomes(), *_module_outcomes(), *_optimizer_outcomes()]


def _op_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in op_samples():
        torch.manual_seed(SEED)
        for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
            yield attempt("op", name, False, lambda s=sample, i=info, n=name: check_op(n, i, s))
        if info.error_inputs_func is None or name == "nn.functional.unfold":
            continue
        for bad in info.error_inputs("cpu"):
            op, given = arguments(name, bad.sample_input)

            def refuse(op: Op = op, given: dict[str, Any] = given) -> None:
                run_ours(op, given, np.random.default_rng(SEED))

            yield attempt("op", name, True, refuse)


def _module_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in modules():
        for training in (True, False):
            torch.manual_seed(SEED)
            options = {"device": "cpu", "dtype": torch.float64, "requires_grad": True}
            for inputs in info.module_inputs_func(info, training=training, **options):
                yield attempt(
                    "layer", name, False,
                    lambda i=inputs, f=info, n=name, t=training: check_module(n, f, i, t),
                )  # fmt: skip
            if info.module_error_inputs_func is None:
                continue
            for bad in info.module_error_inputs_func(info, training=training, **options):
                yield attempt(
                    "layer", name, True, lambda b=bad, f=info, n=name: refused_module(n, f, b)
                )


def refused_module(name: str, info: Any, bad: Any) -> None:
    """Build and run what PyTorch refuses; returns only if we do not."""
    inputs = bad.module_error_input
    call = inputs.forward_input
    if name in LOSS_MODULES:
        op = loss(name)
        x, target = call.args
        given = {"x": x, "target": target, **constructor_options(info, inputs)}
        run_ours(op, given, np.random.default_rng(SEED))
        return
    layer = build(name, inputs.constructor_input)
    if call is not None:
        layer.astype(np.float64)
        layer.forward(array(call.args[0]))


def _optimizer_outcomes() -> Iterator[Outcome]:
    import torch

    for info, name in optimizers():
        for inputs in info.optim_inputs_func(device="cpu"):
            yield attempt(
                "optimizer", name, False,
                lambda k=inputs.kwargs, f=info, n=name: check_optimizer(n, f, k),
            )  # fmt: skip
        for bad in info.optim_error_inputs_func(device="cpu", dtype=torch.float64):
            options = bad.optimizer_error_input.kwargs
            if how_only(options) or bad.optimizer_error_input.params is not None:
                # Parameter groups, or ways to compute: we take a model, and compute in one way.
                if not isinstance(bad.optimizer_error_input.params, torch.nn.Parameter):
                    reason = "error inputs about parameter groups, or tensors as numbers"
                    yield Outcome("optimizer", name, True, "refused", reason)
                    continue
                yield attempt(
                    "optimizer", name, True,
                    lambda n=name: getattr(mc.optim, n)(np.zeros((1, 1)), lr=0.1),
                )  # fmt: skip
                continue

            def refuse(name: str = name, options: dict[str, Any] = options) -> None:
                kind = getattr(mc.optim, name)
                values = {k: array(v) for k, v in options.items()}
                kind(mc.Linear(3, 2, rng=0), **values)

            yield attempt("optimizer", name, True, refuse)


def how_only(options: dict[str, Any]) -> bool:
    """Whether an error is about how PyTorch computes: tensors as numbers, foreach."""
    tensors = [v for v in options.values() if hasattr(v, "detach") and v.numel() == 1]
    betas = options.get("betas", ())
    return (
        bool(tensors) or any(hasattr(b, "detach") for b in betas) or bool(set(options) & set(HOW))
    )


def table() -> str:
    """The outcome as Markdown."""
    lines = ["| PyTorch | samples | passed | failed | refused | bad inputs | refused by name |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind, title in (("op", "operators"), ("layer", "layers and losses, both modes"),
                        ("optimizer", "optimisers, 10 steps each")):  # fmt: skip
        some = [o for o in outcomes() if o.kind == kind]
        good, bad = [o for o in some if not o.error], [o for o in some if o.error]
        count = Counter(o.result for o in good)
        names = len({o.name for o in some})
        lines.append(
            f"| {names} {title} | {len(good)} | {count['passed']} | {count['failed']} | "
            f"{count['refused']} | {sum(o.result != 'refused' for o in bad)} | "
            f"{sum(o.result == 'passed' for o in bad)} |"
        )
    lines += ["", "| not supported because of | samples |", "| --- | --- |"]
    reasons = Counter(o.detail for o in outcomes() if o.result == "refused")
    lines += [f"| {reason} | {n} |" for reason, n in reasons.most_common()]
    return "\n".join(lines)
