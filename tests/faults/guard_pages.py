"""Run every kernel on arrays that end, or begin, where memory that may not be touched begins.

    python tests/faults/guard_pages.py
    python tests/faults/guard_pages.py few     # a few calls: what the test suite runs
    NUMBA_BOUNDSCHECK=1 python tests/faults/guard_pages.py   # every index is checked as well

Inputs, outputs and scratch memory each lie between two pages that nobody may read or write, flush
with the second one, and then with the first one. A kernel that leaves an array by one number, by
a vector load for example, ends the process. Fresh memory is full of NaN, so what is read before
it is written shows too: results must equal those of ordinary memory bit for bit.
"""

from __future__ import annotations

import ctypes
import faulthandler
import math
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

import minicnn as mc
from minicnn import ops

libc = ctypes.CDLL(None, use_errno=True)
PAGE = mmap.PAGESIZE
empty, zeros = np.empty, np.zeros  # before they are replaced


def guarded(shape: Any, dtype: Any, at_end: bool = True) -> np.ndarray:
    """Return an array of bytes 255 (NaN) between two pages that may not be touched."""
    shape = tuple(shape) if np.iterable(shape) else (int(shape),)
    size = math.prod(shape) * np.dtype(dtype).itemsize
    room = -(-size // PAGE) * PAGE
    memory = mmap.mmap(-1, room + 2 * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for page in (start, start + PAGE + room):
        if libc.mprotect(ctypes.c_void_p(page), PAGE, mmap.PROT_READ & 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = PAGE + (room - size if at_end else 0)
    a = np.frombuffer(memory, np.uint8, size, offset)
    a[...] = 255
    return a.view(dtype).reshape(shape)


@contextmanager
def guarding(at_end: bool) -> Iterator[None]:
    """Let NumPy's fresh arrays, and the memory that is lent to kernels, be guarded ones."""
    from minicnn.ops import jit
    from minicnn.plan.buffers import Buffers

    def new(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
        return guarded(shape, dtype, at_end)

    def cleared(shape: Any, dtype: Any = float, order: str = "C") -> np.ndarray:
        a = guarded(shape, dtype, at_end)
        a[...] = 0
        return a

    @contextmanager
    def lend(dtype: Any, *sizes: int) -> Iterator[list[np.ndarray]]:
        with buffers(dtype):
            yield [guarded(size, dtype, at_end) for size in sizes]

    def lend_rows(dtype: Any, sizes: Any) -> list[np.ndarray]:
        return [
            guarded((rows, size), other[0] if other else dtype, at_end)
            for rows, size, *other in sizes
        ]

    def make(self: Any, name: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        # A kept buffer is zero at first, and holds anything in later steps.
        view = self._views[name, shape, dtype] = guarded(shape, dtype, at_end)
        return view

    buffers = jit.buffers
    borrowers = [m for m in sys.modules.values() if getattr(m, "buffers", None) is buffers]
    replaced = [
        *((np, name, new if name.startswith("empty") else cleared) for name in ("empty", "zeros")),
        (np, "empty_like", lambda a, dtype=None, **_: new(a.shape, dtype or a.dtype)),
        (np, "zeros_like", lambda a, dtype=None, **_: cleared(a.shape, dtype or a.dtype)),
        *((module, "buffers", lend) for module in borrowers),
        (jit, "_lend_rows", lend_rows),
        (jit, "_arena", empty(0, np.uint8)),  # another one: what was lent before is given up
        (Buffers, "_make", make),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


Place = Callable[[np.ndarray], np.ndarray]


def draw(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> np.ndarray:
    return rng.standard_normal(shape).astype(dtype)


def op_cases(few: bool) -> Iterator[tuple[str, list[Any], dict[str, Any]]]:
    """Calls of every op with a Numba version; few sizes fill vectors, tiles or bands evenly."""
    rng = np.random.default_rng(0)
    for dtype in (np.float32,) if few else (np.float32, np.float64):
        maps = [draw(rng, *shape, dtype=dtype) for shape in
                ((1, 1, 1, 1), (2, 3, 7, 5), (3, 17, 6, 9), (2, 32, 8, 8))]  # fmt: skip
        for x in maps[1:3] if few else maps:
            C = x.shape[1]
            for name in (
                "relu",
                "leaky_relu",
                "elu",
                "gelu",
                "softplus",
                "sigmoid",
                "tanh",
                "silu",
            ):
                yield name, [x], {}
            rows = x.reshape(len(x), -1)
            yield "softmax", [rows], {}
            yield "log_softmax", [rows], {}
            if x.shape[2] > 2:
                yield "max_pool2d", [x], {"kernel_size": 3, "stride": 2, "padding": 1}
                yield "avg_pool2d", [x], {"kernel_size": 2}
            yield "dropout", [x], {"rng": 0}
            yield "batch_norm", [np.concatenate([x, x + 1]), *draw(rng, 2, C, dtype=dtype)], {}
            yield "layer_norm", [x], {"normalized_shape": x.shape[2:]}
            yield "group_norm", [x], {"num_groups": 1}
            yield "adaptive_avg_pool2d", [x], {"output_size": (3, 2)}
        for C, F, H, W, K, options in [
            (1, 1, 3, 3, 3, {}),
            (1, 6, 9, 8, 5, {"padding": 2}),
            (3, 5, 7, 9, 3, {"stride": 2, "padding": 1}),
            (4, 6, 8, 7, 3, {"dilation": 2, "groups": 2, "padding": 2}),
            (6, 6, 7, 7, 3, {"groups": 6, "padding": 1}),
            (17, 20, 6, 5, 5, {"padding": 2}),
            (16, 32, 8, 8, 3, {"padding": 1}),
            (5, 7, 11, 13, 1, {}),
        ][:: 3 if few else 1]:
            x, groups = draw(rng, 3, C, H, W, dtype=dtype), options.get("groups", 1)
            w, b = draw(rng, F, C // groups, K, K, dtype=dtype), draw(rng, F, dtype=dtype)
            yield "conv2d", [x, w, b], options
            if groups == 1:
                yield "conv_block", [x, w, b], {**options, "pool": (2, 1) if H > K else 1}
            w = draw(rng, C, F // groups, K, K, dtype=dtype)
            yield "conv_transpose2d", [x, w, b], options
        for N, I, O in ((1, 1, 1), (1, 50, 33), (5, 7, 3), (9, 33, 17), (300, 40, 10)):  # noqa: E741
            x, w, b = (draw(rng, *s, dtype=dtype) for s in ((N, I), (O, I), (O,)))
            yield "linear", [x, w, b], {}


def run_op(version: str, name: str, arrays: list[Any], options: Any, place: Place) -> list[Any]:
    with mc.use(version):
        y, cache = getattr(ops, f"{name}_forward")(*map(place, arrays), **options)
        grads = getattr(ops, f"{name}_backward")(place(np.cos(y)), cache)
    return [y, *(grads if isinstance(grads, tuple) else [grads])]


def networks(few: bool) -> Iterator[tuple[Any, tuple[int, ...]]]:
    """Makers of networks that take every stage of a plan, and the shapes of their input."""
    from minicnn import (
        AdaptiveAvgPool2d,
        BatchNorm2d,
        Conv2d,
        Flatten,
        Linear,
        MaxPool2d,
        ReLU,
        Residual,
        Sequential,
    )  # fmt: skip

    def lenet(rng: Any) -> Any:
        return Sequential(
            Conv2d(1, 6, 5, padding=2, rng=rng), ReLU(), MaxPool2d(2), Conv2d(6, 17, 3, rng=rng),
            ReLU(), MaxPool2d(2), Flatten(), Linear(17 * 9, 11, rng=rng), ReLU(),
            Linear(11, 3, rng=rng),
        )  # fmt: skip

    def residual(rng: Any) -> Any:
        return Sequential(
            Conv2d(3, 20, 3, padding=1, rng=rng), BatchNorm2d(20), ReLU(),
            Residual(Sequential(Conv2d(20, 33, 3, 2, 1, rng=rng), BatchNorm2d(33), ReLU(),
                                Conv2d(33, 33, 3, padding=1, rng=rng)),
                     Conv2d(20, 33, 1, 2, rng=rng)), ReLU(),
            Conv2d(33, 33, 3, padding=1, groups=33, rng=rng), MaxPool2d(3, 1, 1),
            AdaptiveAvgPool2d(1), Flatten(), Linear(33, 3, rng=rng),
        )  # fmt: skip

    def winograd(rng: Any) -> Any:
        return Sequential(
            Conv2d(17, 18, 5, padding=2, rng=rng), ReLU(), MaxPool2d(2),
            Conv2d(18, 16, 3, padding=1, rng=rng), ReLU(), MaxPool2d(2),
            Flatten(), Linear(16 * 64, 3, rng=rng),
        )  # fmt: skip

    yield lenet, (5, 1, 16, 16)
    if few:
        return
    yield residual, (2, 3, 9, 7)
    yield winograd, (5, 17, 33, 34)


def train(make: Any, shape: tuple[int, ...], optimizer: Any, place: Place) -> list[Any]:
    """Two steps, of which the second one meets the buffers of the first, and a prediction."""
    rng = np.random.default_rng(0)
    model = make(rng)
    model.map_arrays(place)
    x, y = place(draw(rng, *shape)), rng.integers(0, 3, len(shape) and shape[0])
    trainer = mc.Trainer(model, optimizer(model), clip_norm=1.0)
    losses = [trainer.step(x, y) for _ in range(2)]
    outputs = mc.predict(model, x[:1].copy()), mc.predict(model, x)
    return [np.array(losses), *outputs, *(p for _, p, _ in model.named_params())]


def optimizers() -> list[Callable[[Any], Any]]:
    optim = mc.optim
    return [
        lambda m: optim.Adam(m, weight_decay=0.1, amsgrad=True),
        lambda m: optim.SGD(m, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda m: optim.RMSprop(m, momentum=0.9, centered=True),
    ]


def calls(few: bool) -> Iterator[tuple[str, Callable[[Place], list[Any]]]]:
    """All that is run, by name: what places arrays in, arrays out."""
    for name, arrays, options in op_cases(few):
        versions = ["numba"]
        if name == "conv2d" and arrays[1].shape[2] in (3, 5):
            versions.append("winograd")
        for version in versions:
            shapes = ", ".join(str(a.shape) for a in arrays)
            what = f"{name} {version} {arrays[0].dtype} {shapes} {options}"
            yield (
                what,
                lambda place, v=version, n=name, a=arrays, o=options: run_op(v, n, a, o, place),
            )
    for (make, shape), optimizer in zip(networks(few), optimizers()):
        yield (
            f"Trainer {make.__name__}",
            lambda place, m=make, s=shape, o=optimizer: train(m, s, o, place),
        )


def main() -> int:
    """Run all calls; exits with 1 if results differ, and dies where a guard is touched."""
    faulthandler.enable()
    if sys.argv[1:] == ["touch"]:  # what this file rests on
        return touch()
    differ = count = 0
    for what, call in calls(few=sys.argv[1:] == ["few"]):
        print(what, end="\r", file=sys.stderr, flush=True)
        expected = call(lambda a: a)  # and compiles
        for at_end in (True, False):

            def place(a: np.ndarray, at_end: bool = at_end) -> np.ndarray:
                out = guarded(a.shape, a.dtype, at_end)
                out[...] = a
                return out

            with guarding(at_end):
                found = call(place)
            same = all(
                a is b or np.asarray(a).tobytes() == np.asarray(b).tobytes()
                for a, b in zip(expected, found, strict=True)
            )
            if not same:
                print(f"{what}: other bits, with arrays at the {'end' if at_end else 'start'}")
            differ, count = differ + (not same), count + 1
    print(f"{count} calls between guards, {differ} with other results")
    return 1 if differ else 0


def touch() -> int:
    """Read one number too many, at either end, in a kernel: only a signal can come of it."""
    import os

    from minicnn.ops.jit import kernel

    @kernel()
    def read(a: Any, i: int) -> Any:
        return a[i]

    for at_end, i in ((True, 8), (False, -1)):
        a = guarded(8, np.float32, at_end)
        assert np.isnan(read(a, 0))
        assert np.isnan(read(a, 7))
        inner = a[1:] if i < 0 else a  # -1 would be the last one: of the array behind it, it is not
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            read(a, i) if i > 0 else read(inner, -len(inner) - 2)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(pid, 0)[1]), "a guard was read"
    return 0


if __name__ == "__main__":
    sys.exit(main())
