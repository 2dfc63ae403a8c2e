"""One op's benchmark: contenders that agree, timed pass by pass, and the report on them.

A script of this folder has a dict of cases and a function that makes a `Contest` of one of them;
`run` does the rest. `Op` makes the contest of any op that minicnn and PyTorch both have.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple

import harness
import numpy as np

import minicnn as mc

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
    first = {
        contender: sum(harness.warm_up(passes).values())
        for contender, passes in contest.calls.items()
    }
    agree(contest)
    calls = {(c, p): call for c, passes in contest.calls.items() for p, call in passes.items()}
    times = harness.measure(calls, args.repeats)
    seconds = {c: {p: times[c, p] for p in passes} for c, passes in contest.calls.items()}
    memory = {c: harness.peak_memory(name, c) for c in contest.calls} if args.peak else {}
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
    return np.asarray(a.detach() if hasattr(a, "detach") else a)


# ---------------------------------------------------------------- contenders of one op


class Op(NamedTuple):
    """One op of minicnn on given arrays, and how other libraries say it."""

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    arrays: tuple[np.ndarray, ...]  # those that get a gradient
    options: dict[str, Any]
    torch: Callable[..., Any] | None = None  # of the arrays as tensors
    jax: Callable[..., Any] | None = None
    versions: tuple[str, ...] = ("numpy", "numba")


def contenders(op: Op, args: argparse.Namespace) -> dict[str, Passes]:
    """Return every version of the op, PyTorch in all its modes, and JAX."""
    calls: dict[str, Passes] = {}
    for version in op.versions:
        with mc.use(version):
            y, cache = op.forward(*op.arrays, **op.options)
        dy = draw(3, np.shape(y))
        calls[f"{OURS} {version}"] = ours(op, version, dy, cache)
    dy = draw(3, np.shape(y))
    if op.torch is not None and asked(args, "PyTorch"):
        calls |= pytorch(op, dy, not args.no_compile)
    if op.jax is not None and asked(args, "JAX"):
        calls |= jax(op, dy)
    return calls


def asked(args: argparse.Namespace, peer: str) -> bool:
    """Tell whether --peers names this one."""
    return any(peer.startswith(name.strip()) for name in args.peers.split(",") if name.strip())


def ours(op: Op, version: str, dy: np.ndarray, cache: Any) -> Passes:
    def forward() -> Any:
        with mc.use(version):
            return op.forward(*op.arrays, **op.options)[0]

    def backward() -> Any:
        with mc.use(version):
            return op.backward(dy, cache)

    return {"forward": forward, "backward": backward}


def pytorch(op: Op, dy: np.ndarray, compiled: bool) -> dict[str, Passes]:
    """Eager with NCHW and, for images, channels_last arrays, and compiled for the latter."""
    torch = harness.optional("torch")
    if torch is None:
        return {}
    if compiled:  # its buffers stay, as the backward pass runs many times
        import_module("torch._functorch.config").donated_buffer = False
    images = any(a.ndim == 4 for a in op.arrays)
    modes = ["eager", "eager channels_last"] if images else ["eager"]
    modes += [modes[-1].replace("eager", "compile")] if compiled else []
    calls: dict[str, Passes] = {}
    for mode in modes:
        last = "channels_last" in mode

        def tensor(a: np.ndarray, last: bool = last) -> Any:
            t = torch.from_numpy(a.copy())
            return t.contiguous(memory_format=torch.channels_last) if last and a.ndim == 4 else t

        leaves = [tensor(a).requires_grad_() for a in op.arrays]
        function = torch.compile(op.torch) if "compile" in mode else op.torch
        y, tdy = function(*leaves), tensor(dy)

        def forward(function: Any = function, leaves: Any = leaves) -> Any:
            with torch.no_grad():
                return function(*leaves)

        def backward(y: Any = y, leaves: Any = leaves, dy: Any = tdy) -> Any:
            return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        calls[f"PyTorch {mode}"] = {"forward": forward, "backward": backward}
    return calls


def jax(op: Op, dy: np.ndarray) -> dict[str, Passes]:
    """Jitted; the backward pass computes of the forward what it needs."""
    module = harness.optional("jax")
    if module is None:
        return {}
    arrays = [module.numpy.asarray(a) for a in op.arrays]
    run = module.jit(op.jax)
    gradients = module.jit(lambda arrays, dy: module.vjp(op.jax, *arrays)[1](dy))
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
