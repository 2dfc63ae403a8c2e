"""PyTorch's samples for modules and optimisers, run through our layers, losses and optimisers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import numpy as np

import minicnn as mc
from conformance.torch_ops import (
    LOSS,
    SEED,
    Op,
    Unsupported,
    array,
    assert_close,
    op_of,
    plain,
    run_ours,
)

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
    return op_of(LOSS_MODULES[name], *LOSS, axes=axes)


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
