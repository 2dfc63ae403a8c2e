"""One op's benchmark: contenders that agree, timed pass by pass, and the report on them.

A script of this folder has a dict of cases and a function that makes a `Contest` of one of them;
`run` does the rest. `Op` makes the contest of any op that minicnn and PyTorch both have. On the GPU
version ``numpy`` is what the others have to agree with, on the CPU, and is not timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import harness
import numpy as np

import minicnn as mc
from minicnn.backend import is_cupy

Passes = dict[str, harness.Call]  # name of a pass to its call
OURS = "minicnn"
TOLERANCE = 5e-5  # of the largest number of an array


class Contest(NamedTuple):
    """What is timed against each other."""

    calls: dict[str, Passes]  # by contender; the first one is what the others have to agree with
    flop: dict[str, float]  # of each pass; empty where that says little
    traffic: dict[str, float]  # bytes that each pass has to read and write at least
    # How a contender's results become NumPy arrays like the first one's, where that needs saying
    views: dict[str, Callable[[Any], Any]] = {}  # noqa: RUF012  (never written to)


# ---------------------------------------------------------------- running a script


def run(
    description: str,
    cases: Mapping[str, Any],
    make: Callable[..., Contest],
    argv: Sequence[str] | None = None,
) -> None:
    """Be the script: parse options, then check, time and report every case."""
    args = harness.arguments(description, argv=argv)
    if args.memory:
        harness.use_threads(args.threads)
        name, contender = args.memory
        return harness.report_memory(list(make(cases[name], args).calls[contender].values()))
    chosen = {name: case for name, case in cases.items() if args.only in name}
    if not chosen:
        raise SystemExit(f"--only: expected part of one of {', '.join(cases)}, got {args.only!r}")
    report = harness.headline(args)
    report["cases"] = {
        name: bench(name, make(case, args), args, report) for name, case in chosen.items()
    }
    harness.save(args, report)
    return None


def bench(
    name: str, contest: Contest, args: argparse.Namespace, limits: Mapping[str, Any]
) -> dict[str, Any]:
    """Check and time one case, print it, and return its part of the report."""
    calls = {(c, p): call for c, passes in contest.calls.items() for p, call in passes.items()}
    once = harness.warm_up(calls, args.device)
    agree(contest)
    timed = on_device(contest.calls, args)
    first = {c: sum(once[c, p] for p in passes) for c, passes in timed.items()}
    calls = {key: call for key, call in calls.items() if key[0] in timed}
    times = harness.measure(calls, args.repeats, args.device)
    seconds = {c: {p: times[c, p] for p in passes} for c, passes in timed.items()}
    memory = {c: harness.peak_memory(name, c) for c in timed} if args.peak else {}
    compared = {
        p: {ours: harness.ratios(of_pass, ours) for ours in of_pass if ours.startswith(OURS)}
        for p, of_pass in totals(seconds).items()
    }
    report = {
        "seconds": seconds,
        "first_call_seconds": first,
        "flop": contest.flop,
        "bytes": contest.traffic,
        "ratios": compared,
        "memory_mb": memory,
    }
    print(f"\n{name}")
    print(as_text(report, limits))
    return report


def totals(seconds: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return, for each pass and for all together, the seconds of those that have it.

    Some contenders have dx and dw apart and others one backward for both.
    """
    apart = {"dx", "dw"}
    out: dict[str, dict[str, float]] = {}
    for contender, passes in seconds.items():
        times = dict(passes)
        if apart <= times.keys():
            times["backward"] = times["dx"] + times["dw"]
        if len(times) > 1 and {"forward", "backward"} <= times.keys():
            times["total"] = times["forward"] + times["backward"]
        for p, s in times.items():
            out.setdefault(p, {})[contender] = s
    return out


def as_text(report: Mapping[str, Any], limits: Mapping[str, Any]) -> str:
    """Return the table of one case, and the lines on ratios and first calls."""
    of_pass = totals(report["seconds"])
    passes = [p for p in ("forward", "dx", "dw", "backward", "total") if p in of_pass]
    passes += [p for p in of_pass if p not in passes]
    rank = passes[-1]
    flop, traffic = sum(report["flop"].values()), sum(report["bytes"].values())
    head = ["", *(f"{p} ms" for p in passes)]
    head += ["GFLOP/s", "of peak"] if flop else []
    head += ["GB/s"] if traffic else []
    head += ["peak MB"] if report["memory_mb"] else []
    rows = [head]
    never = float("inf")
    for contender in sorted(report["seconds"], key=lambda c: of_pass[rank].get(c, never)):
        cells = [of_pass[p].get(contender) for p in passes]
        row = [f"  {contender}", *("" if s is None else f"{1e3 * s:.3f}" for s in cells)]
        s = of_pass[rank].get(contender)
        if flop:
            speed = flop / s / 1e9 if s else 0
            share = 100 * speed / limits["fma_peak_gflops"]
            row += [f"{speed:.0f}", f"{share:.0f} %"] if s else ["", ""]
        if traffic:
            row.append(f"{traffic / s / 1e9:.1f}" if s else "")
        if report["memory_mb"]:
            row.append(f"{report['memory_mb'][contender]:.0f}")
        rows.append(row)
    lines = [harness.table(rows)]
    for p in ["total"] if "total" in passes else passes:
        for ours, to in report["ratios"][p].items():
            if to and ours != f"{OURS} numpy":
                listed = ", ".join(f"{mode} {ratio:.2f}" for mode, ratio in to.items())
                lines.append(f"  ratio, {p}: {ours} / {listed}")
    compiled = ", ".join(f"{c} {s:.2f} s" for c, s in report["first_call_seconds"].items())
    return "\n".join([*lines, f"  first calls, compilation included: {compiled}"])


def agree(contest: Contest) -> None:
    """Exit unless every contender returns what the first one does."""
    (first, passes), *others = contest.calls.items()
    expected = _results(contest, first, passes)
    for contender, passes in others:
        for what, wanted in expected.items():
            got = _results(contest, contender, passes).get(what)
            if got is None:
                continue  # inference only
            if len(got) != len(wanted):
                raise SystemExit(f"{contender}: {what}: {len(got)} arrays, not {len(wanted)}")
            for a, e in zip(got, wanted):
                gap = np.abs(a - e).max() / max(np.abs(e).max(), 1e-30)
                if a.shape != e.shape or not gap < TOLERANCE:
                    raise SystemExit(
                        f"{contender}: {what}: differs from {first}: shape {a.shape} for "
                        f"{e.shape}, relative error {gap:.1e}"
                    )


def _results(contest: Contest, contender: str, passes: Passes) -> dict[str, list[np.ndarray]]:
    """Return what the passes give as NumPy arrays; dx and dw as one backward."""
    view = contest.views.get(contender, lambda result: result)
    out: dict[str, list[np.ndarray]] = {}
    for p, call in passes.items():
        result = view(call())
        arrays = result if isinstance(result, tuple | list) else (result,)
        out.setdefault("backward" if p in ("dx", "dw") else p, []).extend(map(as_numpy, arrays))
    return out


def as_numpy(a: Any) -> np.ndarray:
    """Return an array of any library as a NumPy array."""
    if hasattr(a, "detach"):
        return np.asarray(a.detach().cpu())
    return a.get() if is_cupy(a) else np.asarray(a)


# ---------------------------------------------------------------- contenders of one op


class Op(NamedTuple):
    """One op of minicnn on given arrays, and how other libraries say it."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]  # those that get a gradient
    options: dict[str, Any]
    torch: Callable[..., Any] | None = None  # of the arrays as tensors
    jax: Callable[..., Any] | None = None
    versions: tuple[str, ...] = ("numpy", "numba")  # on the CPU
    targets: tuple[np.ndarray, ...] = ()  # arrays without a gradient, which follow the others


def on_device(contenders: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Return those that are timed."""
    left_out = f"{OURS} numpy" if args.device == "cuda" else None
    return {name: calls for name, calls in contenders.items() if name != left_out}


def versions_on(args: argparse.Namespace, on_cpu: tuple[str, ...]) -> tuple[str, ...]:
    """Return the versions that take part; the first is what the others have to agree with."""
    return on_cpu if args.device == "cpu" else ("numpy", "cupy")


def using(version: str | None) -> mc.use:
    """Choose a version for a ``with`` block; on the GPU the arrays do."""
    return mc.use(None if version == "cupy" else version)


def placed(version: str, obj: Any) -> Any:
    """Return an array, a tuple of them or a model where `version` runs."""
    return mc.to_gpu(obj) if version == "cupy" else obj


def contenders(op: Op, args: argparse.Namespace) -> dict[str, Passes]:
    """Return every version of the op, PyTorch in all its modes, and JAX."""
    calls: dict[str, Passes] = {}
    for version in versions_on(args, op.versions):
        own = op._replace(arrays=placed(version, op.arrays), targets=placed(version, op.targets))
        with using(version):
            y, cache = own.forward(*own.arrays, *own.targets, **own.options)
        dy = draw(3, getattr(y, "shape", ()))
        calls[f"{OURS} {version}"] = ours(own, version, placed(version, dy), cache)
    if op.torch is not None and asked(args, "PyTorch"):
        calls |= pytorch(op, dy, not args.no_compile, args.device)
    if op.jax is not None and asked(args, "JAX"):
        calls |= jax(op, dy)
    return calls


def asked(args: argparse.Namespace, peer: str) -> bool:
    """Tell whether --peers names this one, and it runs on the device."""
    if args.device == "cuda" and peer not in harness.GPU_PEERS:
        return False
    return any(peer.startswith(name.strip()) for name in args.peers.split(",") if name.strip())


def ours(op: Op, version: str, dy: Any, cache: Any) -> Passes:
    def forward() -> Any:
        with using(version):
            return op.forward(*op.arrays, *op.targets, **op.options)[0]

    def backward() -> Any:
        with using(version):
            return op.backward(dy, cache)

    return {"forward": forward, "backward": backward}


def pytorch(op: Op, dy: np.ndarray, compiled: bool, device: str) -> dict[str, Passes]:
    """Eager with NCHW and, for images, channels_last arrays, and compiled for the latter."""
    torch = harness.torch_on(device)
    if torch is None:
        return {}
    if compiled:  # its buffers stay, as the backward pass runs many times
        import_module("torch._functorch.config").donated_buffer = False
        torch.compiler.reset()  # of one function it keeps eight variants, and then compiles no more
    images = any(a.ndim == 4 for a in op.arrays)
    modes = ["eager", "eager channels_last"] if images else ["eager"]
    modes += [modes[-1].replace("eager", "compile")] if compiled else []
    calls: dict[str, Passes] = {}
    for mode in modes:
        last = "channels_last" in mode

        def tensor(a: np.ndarray, last: bool = last) -> Any:
            t = torch.from_numpy(a.copy()).to(device)
            return t.contiguous(memory_format=torch.channels_last) if last and a.ndim == 4 else t

        targets = [tensor(a) for a in op.targets]
        if "compile" in mode and device == "cuda":
            calls |= in_graphs(
                op, f"PyTorch {mode}", list(map(tensor, op.arrays)), targets, tensor(dy)
            )
            continue
        leaves = [tensor(a).requires_grad_() for a in op.arrays]
        function = torch.compile(op.torch) if "compile" in mode else op.torch
        y, tdy = function(*leaves, *targets), tensor(dy)

        def forward(function: Any = function, arrays: Any = (*leaves, *targets)) -> Any:
            with torch.no_grad():
                return function(*arrays)

        def backward(y: Any = y, leaves: Any = leaves, dy: Any = tdy) -> Any:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        calls[f"PyTorch {mode}"] = {"forward": forward, "backward": backward}
    return calls


def in_graphs(op: Op, name: str, arrays: Any, targets: Any, dy: Any) -> dict[str, Passes]:
    """Compiled with CUDA graphs; the backward pass computes of the forward what it needs.

    Both passes are functions of their own: a graph's results last until it is launched again.
    """
    torch = harness.optional("torch")
    compiled = functools.partial(torch.compile, mode="reduce-overhead")
    function = op.torch  # the compiler looks at what a function refers to: not at all of `op`

    def gradients(dy: Any, arrays: Any, targets: Any) -> Any:
        return torch.func.vjp(lambda *arrays: function(*arrays, *targets), *arrays)[1](dy)

    run, pull = compiled(function), compiled(gradients)
    passes = {
        "forward": lambda: run(*arrays, *targets),
        "backward": lambda: pull(dy, arrays, targets),
    }
    try:
        for _ in range(3):  # compiled, recorded, launched
            for call in passes.values():
                call()
    except Exception as error:  # no reason to go without the other modes
        print(f"({name} left out: {type(error).__name__}: {str(error)[:200]})")
        return {}
    return {name: passes}


def jax(op: Op, dy: np.ndarray) -> dict[str, Passes]:
    """Jitted; the backward pass computes of the forward what it needs."""
    module = harness.optional("jax")
    if module is None:
        return {}
    arrays = [module.numpy.asarray(a) for a in op.arrays]
    targets = [module.numpy.asarray(a) for a in op.targets]
    run = module.jit(lambda *arrays: op.jax(*arrays, *targets))
    gradients = module.jit(lambda arrays, dy: module.vjp(run, *arrays)[1](dy))
    dy = module.numpy.asarray(dy)

    def backward() -> Any:
        out = gradients(arrays, dy)
        for a in out:
            a.block_until_ready()
        return out

    return {"JAX jit": {"forward": lambda: run(*arrays).block_until_ready(), "backward": backward}}


def draw(seed: int, shape: Sequence[int]) -> np.ndarray:
    """Return normally distributed float32 numbers; a float for no axes."""
    return np.asarray(np.random.default_rng(seed).standard_normal(shape), dtype=np.float32)


def bytes_of(*arrays: Any) -> float:
    """Return the bytes of arrays, or of float32 arrays of these shapes or sizes."""
    return float(
        sum(a.nbytes if isinstance(a, np.ndarray) else 4 * int(np.prod(a)) for a in arrays)
    )
