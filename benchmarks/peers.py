"""The same network in other libraries: each takes the layers and weights of a minicnn model.

Every function here returns a dict of name to (step, predict): one training step (gradients to
zero, forward, cross-entropy, backward, Adam) and one prediction, on one fixed batch. A step
returns the loss, and `predict` the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from harness import optional, torch_on

from minicnn.layers import Layer

LR = 1e-3
Pair = tuple[Callable[[], float], Callable[[], Any]]


# ---------------------------------------------------------------- PyTorch


def torch_module(model: Layer) -> Any:
    """Build the torch.nn module of a minicnn model, with its weights."""
    from torch import nn

    def make(layer: Layer) -> Any:
        kind = type(layer).__name__
        if kind == "Sequential":
            return nn.Sequential(*(make(child) for child in layer))
        if kind == "Residual":
            return residual(make(layer.body), layer.shortcut and make(layer.shortcut))
        if kind == "Conv2d":
            kernel, stride, (rows, columns), dilation = layer.window()
            return nn.Conv2d(
                layer.in_channels,
                layer.out_channels,
                kernel,
                stride,
                (rows[0], columns[0]),
                dilation,
                layer.groups,
                bias="bias" in layer.params,
            )
        if kind == "Linear":
            return nn.Linear(layer.in_features, layer.out_features, "bias" in layer.params)
        if kind == "BatchNorm2d":
            return nn.BatchNorm2d(layer.num_features, layer.eps, layer.momentum)
        if kind == "MaxPool2d":
            return nn.MaxPool2d(layer.options["kernel_size"], layer.options["stride"])
        return getattr(nn, kind)(**getattr(layer, "options", {}))

    class Residual(nn.Module):
        def __init__(self, body: Any, shortcut: Any) -> None:
            super().__init__()
            self.body = body
            if shortcut is not None:
                self.shortcut = shortcut

        def forward(self, x: Any) -> Any:
            return self.body(x) + (self.shortcut(x) if hasattr(self, "shortcut") else x)

    residual = Residual
    module = make(model)
    import torch

    module.load_state_dict({k: torch.from_numpy(v) for k, v in model.state_dict().items()})
    return module


def torch_step(module: Any, run: Any, captured: bool = False) -> Callable[[Any, Any], Any]:
    """Return a training step of a batch with Adam's fused kernel; it returns the loss, a tensor.

    `run` is the module, or what was compiled of it; `captured` says that the step will be part of
    a CUDA graph.
    """
    import torch

    optimizer = torch.optim.Adam(module.parameters(), lr=LR, fused=True, capturable=captured)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad(set_to_none=not captured)
        loss = torch.nn.functional.cross_entropy(run(x), y)
        loss.backward()
        optimizer.step()
        return loss

    return step


def torch_compiled(module: Any, device: str) -> Any:
    """Return the module compiled, on a GPU with CUDA graphs."""
    import torch

    return torch.compile(module, mode="reduce-overhead" if device == "cuda" else None)


def pytorch(
    model: Layer, x: np.ndarray, y: np.ndarray, compiled: bool = True, device: str = "cpu"
) -> dict[str, Pair]:
    """Eager with NCHW and with channels_last arrays, and compiled; Adam with its fused kernel.

    On the CPU it runs under the allocator settings of `harness.SETTINGS`, which make its step
    faster.
    """
    torch = torch_on(device)
    if torch is None:
        return {}
    pairs = {}
    modes = ["eager NCHW", "eager channels_last"]
    if compiled:
        modes += ["compile NCHW"] * (device == "cuda") + ["compile channels_last"]
    for mode in modes:
        module = torch_module(model).to(device)
        tx, ty = torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
        if "channels_last" in mode:
            module = module.to(memory_format=torch.channels_last)
            tx = tx.contiguous(memory_format=torch.channels_last)
        run = torch_compiled(module, device) if "compile" in mode else module
        update = torch_step(module, run)

        def step(module=module, update=update, x=tx, y=ty) -> float:
            module.train()
            return update(x, y).item()

        def predict(module=module, run=run, x=tx) -> Any:
            module.eval()
            with torch.inference_mode():
                return run(x)

        pairs[f"PyTorch {mode}"] = step, predict
    return pairs


# ---------------------------------------------------------------- JAX


def jax(model: Layer, x: np.ndarray, y: np.ndarray) -> dict[str, Pair]:
    """One jitted function for the whole step; batch-norm in training uses the batch alone."""
    jax = optional("jax")
    if jax is None:
        return {}
    from jax import lax
    from jax import numpy as jnp

    def apply(layer: Layer, name: str, p: dict[str, Any], x: Any, training: bool) -> Any:
        kind = type(layer).__name__
        if kind in ("Sequential", "Residual"):
            inner = {
                key: lambda x, key=key, child=child: apply(child, f"{name}{key}.", p, x, training)
                for key, child in layer.children().items()
            }
            if kind == "Residual":
                return inner["body"](x) + inner.get("shortcut", lambda x: x)(x)
            for run in inner.values():
                x = run(x)
            return x
        w, b = p.get(name + "weight"), p.get(name + "bias")
        if kind == "Conv2d":
            win = layer.window()
            y = lax.conv_general_dilated(
                x, w, win.stride, win.padding, rhs_dilation=win.dilation,
                feature_group_count=layer.groups,
            )  # fmt: skip
            return y if b is None else y + b[:, None, None]
        if kind == "Linear":
            return x @ w.T + b
        if kind == "ReLU":
            return jnp.maximum(x, 0)
        if kind == "Flatten":
            return x.reshape(len(x), -1)
        if kind == "MaxPool2d":
            win = layer.window()
            return lax.reduce_window(
                x, -jnp.inf, lax.max, (1, 1, *win.kernel), (1, 1, *win.stride), "VALID"
            )
        if kind == "AdaptiveAvgPool2d":
            return x.mean((2, 3), keepdims=True)
        if kind == "BatchNorm2d":
            mean, var = (p[f"{name}running_{s}"][:, None, None] for s in ("mean", "var"))
            if training:
                mean, var = x.mean((0, 2, 3), keepdims=True), x.var((0, 2, 3), keepdims=True)
            scale = w[:, None, None] / jnp.sqrt(var + layer.eps)
            return (x - mean) * scale + b[:, None, None]
        raise NotImplementedError(kind)

    def loss_of(p: dict[str, Any], x: Any, y: Any) -> Any:
        logits = apply(model, "", p, x, True)
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()

    @jax.jit
    def update(p: Any, m: Any, v: Any, n: Any, x: Any, y: Any) -> Any:
        loss, g = jax.value_and_grad(loss_of)(p, x, y)
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        a, c = 1 / (1 - 0.9**n), 1 / (1 - 0.999**n)
        p = jax.tree.map(lambda p, m, v: p - LR * a * m / (jnp.sqrt(v * c) + 1e-8), p, m, v)
        return loss, p, m, v

    forward = jax.jit(lambda p, x: apply(model, "", p, x, False))
    p = {k: jnp.asarray(a) for k, a in model.state_dict().items() if a.dtype.kind == "f"}
    zero = jax.tree.map(jnp.zeros_like, p)
    state = [p, zero, zero, 0]
    xs, ys = jnp.asarray(x), jnp.asarray(y)

    def step() -> float:
        p, m, v, n = state
        loss, *rest = update(p, m, v, n + 1.0, xs, ys)
        state[:] = [*rest, n + 1]
        return float(loss)

    return {"JAX jit": (step, lambda: np.asarray(forward(state[0], xs)))}


# ---------------------------------------------------------------- DeZero


def dezero(model: Layer, x: np.ndarray, y: np.ndarray) -> dict[str, Pair]:
    """Educational framework on NumPy; it runs what a stack of conv, linear, ReLU and pool needs."""
    vars(np)["int"] = int  # DeZero 0.0.13 was written for NumPy 1.19
    dezero = optional("dezero")
    kinds = {type(layer).__name__ for _, layer in model.modules()}
    if dezero is None or kinds & {"Residual", "BatchNorm2d"}:
        return {}
    import dezero.functions as F
    import dezero.layers as L
    import dezero.optimizers

    class Net(dezero.Model):
        def __init__(self) -> None:
            super().__init__()
            self.run = []
            for i, layer in enumerate(model):
                kind = type(layer).__name__
                if kind in ("Conv2d", "Linear"):
                    if kind == "Conv2d":
                        win = layer.window()
                        made = L.Conv2d(
                            layer.out_channels, win.kernel, win.stride[0], win.padding[0][0],
                            in_channels=layer.in_channels,
                        )  # fmt: skip
                        made.W.data[...] = layer.weight
                    else:
                        made = L.Linear(layer.out_features, in_size=layer.in_features)
                        made.W.data[...] = layer.weight.T
                    made.b.data[...] = layer.bias
                    setattr(self, f"l{i}", made)
                    self.run.append(made)
                elif kind == "MaxPool2d":
                    win = layer.window()
                    self.run.append(lambda x, win=win: F.pooling(x, win.kernel, win.stride[0]))
                else:
                    self.run.append({"ReLU": F.relu, "Flatten": F.flatten}[kind])

        def forward(self, x: Any) -> Any:
            for run in self.run:
                x = run(x)
            return x

    net = Net()
    optimizer = dezero.optimizers.Adam(alpha=LR).setup(net)

    def step() -> float:
        net.cleargrads()
        loss = F.softmax_cross_entropy(net(x), y)
        loss.backward()
        optimizer.update()
        return float(loss.data)

    def predict() -> Any:
        with dezero.no_grad():
            return net(x).data

    return {"DeZero": (step, predict)}


# ---------------------------------------------------------------- CS231n style


def places(x: np.ndarray, K: int) -> Any:
    """Return index arrays that lay the pixels under every KxK window out, and (OH, OW)."""
    C, OH, OW = x.shape[1], x.shape[2] - K + 1, x.shape[3] - K + 1
    k = np.repeat(np.arange(C), K * K)[:, None]
    i = np.tile(np.repeat(np.arange(K), K), C)[:, None] + np.repeat(np.arange(OH), OW)
    j = np.tile(np.arange(K), K * C)[:, None] + np.tile(np.arange(OW), OH)
    return k, i, j, (OH, OW)


def course_conv2d(
    x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray, padding: int
) -> dict[str, Callable[[], Any]]:
    """Return a convolution's forward and backward pass as courses teach them."""
    pads = (0, 0), (0, 0), (padding, padding), (padding, padding)
    padded, F, N = np.pad(x, pads), len(w), len(x)
    k, i, j, (OH, OW) = places(padded, w.shape[2])
    flat = w.reshape(F, -1)

    def columns() -> np.ndarray:
        return np.pad(x, pads)[:, k, i, j].transpose(1, 2, 0).reshape(flat.shape[1], -1)

    def forward() -> Any:
        y = (flat @ columns() + b[:, None]).reshape(F, OH, OW, N)
        return np.ascontiguousarray(y.transpose(3, 0, 1, 2))

    cols = columns()

    def backward() -> Any:
        rows = dy.transpose(1, 2, 3, 0).reshape(F, -1)
        dw = (rows @ cols.T).reshape(w.shape)
        dcols = (flat.T @ rows).reshape(flat.shape[1], -1, N)
        dx = np.zeros_like(padded)
        np.add.at(dx, (slice(None), k, i, j), dcols.transpose(2, 0, 1))
        H, W = x.shape[2:]
        return dx[:, :, padding : padding + H, padding : padding + W], dw, dy.sum(axis=(0, 2, 3))

    return {"forward": forward, "backward": backward}


def cs231n(model: Layer, x: np.ndarray, y: np.ndarray) -> dict[str, Pair]:
    """The way courses teach it: fancy-index im2col, one matrix product, `np.add.at` back."""
    kinds = {type(layer).__name__ for _, layer in model.modules()}
    if kinds & {"Residual", "BatchNorm2d"}:
        return {}
    twin = {name: a.copy() for name, a in model.state_dict().items()}
    m, v = ({name: np.zeros_like(a) for name, a in twin.items()} for _ in range(2))
    count = [0]

    def forward(x: np.ndarray) -> tuple[np.ndarray, list[Any]]:
        caches = []
        for n, layer in enumerate(model):
            kind = type(layer).__name__
            w, b = twin.get(f"{n}.weight"), twin.get(f"{n}.bias")
            if kind == "Conv2d":
                k, i, j, (OH, OW) = places(x, w.shape[2])
                cols = x[:, k, i, j].transpose(1, 2, 0).reshape(w[0].size, -1)
                caches.append((x, cols))
                x = (w.reshape(len(w), -1) @ cols + b[:, None]).reshape(len(w), OH, OW, -1)
                x = np.ascontiguousarray(x.transpose(3, 0, 1, 2))
            elif kind == "MaxPool2d":
                N, C, H, W = x.shape
                windows = x.reshape(N, C, H // 2, 2, W // 2, 2)
                out = windows.max(axis=(3, 5))
                caches.append((windows, out))
                x = out
            elif kind == "ReLU":
                caches.append(x)
                x = np.maximum(x, 0)
            elif kind == "Flatten":
                caches.append(x.shape)
                x = x.reshape(len(x), -1)
            else:
                caches.append(x)
                x = x @ w.T + b
        return x, caches

    def backward(d: np.ndarray, caches: list[Any]) -> dict[str, np.ndarray]:
        g = {}
        for n in reversed(range(len(caches))):
            kind, cache = type(model[n]).__name__, caches[n]
            w = twin.get(f"{n}.weight")
            if kind == "Conv2d":
                x, cols = cache
                g[f"{n}.bias"] = d.sum(axis=(0, 2, 3))
                rows = d.transpose(1, 2, 3, 0).reshape(len(w), -1)
                g[f"{n}.weight"] = (rows @ cols.T).reshape(w.shape)
                if n == 0:
                    break
                k, i, j, _ = places(x, w.shape[2])
                dcols = (w.reshape(len(w), -1).T @ rows).reshape(w[0].size, -1, len(x))
                d = np.zeros_like(x)
                np.add.at(d, (slice(None), k, i, j), dcols.transpose(2, 0, 1))
            elif kind == "MaxPool2d":
                windows, out = cache
                mask = windows == out[:, :, :, None, :, None]
                share = (d / mask.sum(axis=(3, 5)))[:, :, :, None, :, None]
                N, C, OH, _, OW, _ = windows.shape
                d = (mask * share).reshape(N, C, 2 * OH, 2 * OW)
            elif kind == "ReLU":
                d = d * (cache > 0)
            elif kind == "Flatten":
                d = d.reshape(cache)
            else:
                g[f"{n}.weight"], g[f"{n}.bias"] = d.T @ cache, d.sum(axis=0)
                d = d @ w
        return g

    def step() -> float:
        z, caches = forward(x)
        e = np.exp(z - z.max(axis=1, keepdims=True))
        p = e / e.sum(axis=1, keepdims=True)
        rows = np.arange(len(y))
        loss = -np.log(p[rows, y]).mean()
        p[rows, y] -= 1
        count[0] += 1
        a, c = 1 / (1 - 0.9 ** count[0]), 1 / (1 - 0.999 ** count[0])
        for name, g in backward(p / len(y), caches).items():
            m[name] = 0.9 * m[name] + 0.1 * g
            v[name] = 0.999 * v[name] + 0.001 * g * g
            twin[name] -= LR * a * m[name] / (np.sqrt(v[name] * c) + 1e-8)
        return float(loss)

    return {"CS231n-style NumPy": (step, lambda: forward(x)[0])}


# ---------------------------------------------------------------- ONNX Runtime


def onnx_runtime(model: Layer, x: np.ndarray, threads: int) -> dict[str, Callable[[], Any]]:
    """Inference alone, of the model as minicnn exports it."""
    runtime = optional("onnxruntime")
    if runtime is None:
        return {}
    import tempfile
    from pathlib import Path

    from minicnn.onnx import export

    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    # Else its threads spin on for longer than the pause before what is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        export(model, path, x.shape[1:])
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    return {"ONNX Runtime": lambda: session.run(None, feed)[0]}
