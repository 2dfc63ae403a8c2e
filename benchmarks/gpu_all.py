"""Check and time everything on a CUDA device, beside PyTorch with cuDNN, in under eight minutes.

    python benchmarks/gpu_all.py --json gpu.json

The parts run in this order, and each goes on where another fails:

    warm       compile what the later parts run, many kernels at a time, into CuPy's cache
    accuracy   float32 against float64 on the CPU, in units of u times the sum of |terms|
    kernels    each kernel of the reference network's step, microseconds in a CUDA graph
    convs      3x3 convolutions, forward + dx + dw, float32 and TF32, against cuDNN
    steps      training step of the reference network, data on the device, against PyTorch
               eager, channels_last, in a CUDA graph and compiled with CUDA graphs
    mnist      ten epochs of MNIST, data on the device
    tests      pytest -m gpu, on the device, in the time that is left

Contenders take turns; medians count. Kernels are timed with events; steps by the clock on the
wall, between two moments at which the device has nothing left to do. The exit status is 1 where
a part failed; a missed target is reported and no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import peers

import minicnn as mc
from minicnn import ops
from minicnn.data import Dataset
from minicnn.ops import conv2d, conv2d_cupy, linear_cupy, softmax_cupy
from minicnn.shapes import window

U = 2.0**-24  # unit roundoff of float32
SECONDS = 450  # after this no further part begins
CONVS = {"64 on 32x32": (64, 32), "128 on 16x16": (128, 16), "256 on 8x8": (256, 8)}
BATCH = 256
TARGETS = {
    "step 64 / eager": 0.5,
    "step 64 / best": 1.0,
    "step 1024 / best": 1.0,
    **{f"conv {name} float32": 1.3 for name in CONVS},
    **{f"conv {name} TF32": 1.5 for name in CONVS},
    "mnist seconds": 3.0,
}
Report = dict[str, Any]


def main() -> int:
    """Run the parts that were asked for, and write what they report."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each (7)")
    parser.add_argument("--warm", nargs=2, type=int, metavar=("I", "N"), help=argparse.SUPPRESS)
    parser.add_argument("--json", metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args()
    if args.warm:
        return warm_some(*args.warm)
    report: Report = {"device": harness.describe_gpu(), "failed": {}, "ratios": {}}
    print(*(f"{k}: {v}" for k, v in report["device"].items()), sep="\n", flush=True)
    began = args.began = time.perf_counter()
    for name in args.only:
        print(f"\n== {name} ({time.perf_counter() - began:.0f} s)", flush=True)
        try:
            if time.perf_counter() - began > SECONDS:
                raise TimeoutError(f"not begun: {SECONDS} s are over")
            report[name] = PARTS[name](args, report)
        except Exception as error:
            traceback.print_exc()
            report["failed"][name] = f"{type(error).__name__}: {error}"
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1, default=str))
    print(f"\n== summary ({time.perf_counter() - began:.0f} s)")
    rows = [("", "measured", "target", "")]
    for key, target in TARGETS.items():
        value = report["ratios"].get(key)
        if value is None:
            rows.append((key, "-", f"{target:.2f}", "not measured"))
        else:
            rows.append(
                (key, f"{value:.2f}", f"{target:.2f}", "met" if value <= target else "MISSED")
            )
    print(harness.table(rows))
    for name, why in report["failed"].items():
        print(f"FAILED {name}: {why}")
    return 1 if report["failed"] else 0


# ---------------------------------------------------------------- timing


def graph_of(call: Callable[[], Any], calls: int) -> Callable[[], Any]:
    """Capture `calls` calls in a CUDA graph, so that the host's time for a launch is left out."""
    import cupy

    # Memory of its own: nobody else is given it between launches.
    stream, pool = cupy.cuda.Stream(non_blocking=True), cupy.cuda.MemoryPool()
    cupy.cuda.runtime.deviceSynchronize()  # what `call` reads has been written
    with stream, cupy.cuda.using_allocator(pool.malloc):
        call()
        kept = [call() for _ in range(calls)]  # the pool has memory for all of them now
        stream.synchronize()
        del kept
        stream.begin_capture()
        try:
            kept = [call() for _ in range(calls)]
        finally:
            graph = stream.end_capture()

    def launch(kept: Any = kept) -> None:  # whose results have to stay where they are
        graph.launch(stream)

    launch.stream = stream  # type: ignore[attr-defined]
    return launch


def kernel_seconds(call: Callable[[], Any], repeats: int, inner: int = 20) -> float:
    """Median seconds of `call`, without the host's part if it can be captured."""
    import cupy

    try:
        run = graph_of(call, inner)
    except Exception as error:
        print(f"  (not captured: {type(error).__name__}: {error}; the host's time counts)")
        run, stream = call, cupy.cuda.Stream.null
        inner = 1
    else:
        stream = run.stream  # type: ignore[attr-defined]
    run()
    times = [harness.event_seconds(run, 1 if inner > 1 else 20, stream) for _ in range(repeats)]
    return statistics.median(times) / inner


def in_turns(
    calls: Mapping[str, Callable[[], Any]], repeats: int, wait: Callable[[], Any]
) -> dict[str, float]:
    """Median seconds of each call, on the wall clock; `wait` returns when the device is idle."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats + 1):  # the first round warms up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def wait_for_device() -> None:
    """Return when the device has nothing left to do."""
    import cupy

    cupy.cuda.runtime.deviceSynchronize()


# ---------------------------------------------------------------- compilation


def warm(args: argparse.Namespace, report: Report) -> Report:
    """Run everything once, spread over processes: a kernel takes seconds to compile."""
    count = min(12, os.cpu_count() or 1)
    start = time.perf_counter()
    command = [sys.executable, __file__, "--warm"]
    running = [subprocess.Popen([*command, str(i), str(count)]) for i in range(count)]
    codes = [process.wait(150) for process in running]
    print(f"{time.perf_counter() - start:.0f} s in {count} processes")
    assert not any(codes), f"exit codes {codes}"
    return {"seconds": time.perf_counter() - start}


def warm_some(i: int, count: int) -> int:
    """In a child: run every `count`-th of all calls, from the i-th on."""
    calls: list[Callable[[], Any]] = [
        partial(compared, case, normals) for case in GEOMETRY.values()
    ]
    for tf32 in (False, True):
        for C, H in CONVS.values():
            for name in ("forward", "dx", "dw"):
                calls.append(partial(warm_conv, C, H, tf32, name))
    for N in (64, 1024):
        for name in step_calls(1):
            calls.append(partial(warm_step, N, name))
    for call in calls[i::count]:
        call()
    return 0


def warm_conv(C: int, H: int, tf32: bool, name: str) -> None:
    conv2d_cupy.use_tf32(tf32)
    conv_calls(C, H)[0][name]()


def warm_step(N: int, name: str) -> None:
    step_calls(N)[name]()


# ---------------------------------------------------------------- tests


def tests(args: argparse.Namespace, report: Report) -> Report:
    """Run the tests of CUDA kernels and of training on the device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if harness.optional("xdist") is not None:
        command += ["-n", "6"]
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    limit = max(30, SECONDS + 20 - (time.perf_counter() - args.began))
    try:
        done = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired as error:
        tail = (error.stdout or b"").decode(errors="replace")[-2000:]
        raise TimeoutError(f"the tests took more than {limit:.0f} s:\n{tail}") from None
    tail = "\n".join((done.stdout + done.stderr).splitlines()[-25:])
    print(tail)
    if done.returncode:
        raise AssertionError(tail.splitlines()[-1])
    return {"summary": done.stdout.splitlines()[-1]}


# ---------------------------------------------------------------- accuracy

GEOMETRY = {
    "5x5 1 to 32": ((64, 1, 28, 28), (32, 1, 5, 5), {}),
    "5x5 32 to 64": ((64, 32, 12, 12), (64, 32, 5, 5), {}),
    "3x3 64 to 64": ((16, 64, 32, 32), (64, 64, 3, 3), {"padding": 1}),
    "3x3 256 to 256": ((16, 256, 8, 8), (256, 256, 3, 3), {"padding": 1}),
    "3x3 stride 2": ((8, 33, 31, 29), (65, 33, 3, 3), {"padding": 1, "stride": 2}),
    "3x2 dilated, groups": ((5, 12, 17, 19), (10, 6, 3, 2), {"dilation": 2, "groups": 2}),
    "depthwise 3x3 128": ((8, 128, 16, 16), (128, 1, 3, 3), {"padding": 1, "groups": 128}),
    "1x1 128 to 64": ((8, 128, 14, 14), (64, 128, 1, 1), {}),
}


def both(x: np.ndarray, w: np.ndarray, b: np.ndarray, dy: np.ndarray, kwargs: Any) -> list[Any]:
    """y, dx, dw and db of a convolution by the arrays' own version."""
    y, cache = ops.conv2d_forward(x, w, b, **kwargs)
    return [y, *ops.conv2d_backward(dy, cache)]


def accuracy(args: argparse.Namespace, report: Report) -> Report:
    """Compare convolutions with the CPU in float64; integers have to be exact."""
    rows = [("float32 error, u times sum of |terms|", "y", "dx", "dw", "db")]
    worst: Report = {}
    for name, case in GEOMETRY.items():
        got, want, _ = compared(case, integers)
        assert all((a == e).all() for a, e in zip(got, want)), f"{name}: integers differ"
        got, want, scale = compared(case, normals)
        worst[name] = [float((abs(a - e) / (U * s)).max()) for a, e, s in zip(got, want, scale)]
        rows.append((name, *(f"{e:.2f}" for e in worst[name])))
    print(harness.table(rows))
    highest = max(map(max, worst.values()))
    print(f"worst {highest:.2f}, bound 16; integer data exact everywhere")
    assert highest <= 16, f"error of {highest:.1f} u times the sum of |terms|"
    return worst


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(-3, 4, shape).astype("f4")


def normals(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.standard_normal(shape, "f4")


def compared(case: Any, draw: Callable[..., np.ndarray]) -> tuple[list[Any], list[Any], list[Any]]:
    """Results of the device, of the CPU in float64, and the sums of the terms' magnitudes."""
    x_shape, w_shape, kwargs = case
    rng = np.random.default_rng(0)
    win = window("conv2d", w_shape[2:], **{k: v for k, v in kwargs.items() if k != "groups"})
    y_shape = (x_shape[0], w_shape[0], *win.output_size("conv2d", *x_shape[2:]))
    arrays = [draw(rng, s) for s in (x_shape, w_shape, w_shape[:1], y_shape)]
    wide = [a.astype("f8") for a in arrays]
    got = [a.get() for a in both(*map(mc.to_gpu, arrays), kwargs)]
    return got, both(*wide, kwargs), both(*map(abs, wide), kwargs)


# ---------------------------------------------------------------- kernels


def kernels(args: argparse.Namespace, report: Report) -> Report:
    """Time what a step of the reference network launches."""
    return {str(N): step_kernels(N, args.repeats) for N in (64, 1024)}


def step_kernels(N: int, repeats: int) -> dict[str, float]:
    """Seconds of each, at batch N."""
    times = {name: kernel_seconds(call, repeats) for name, call in step_calls(N).items()}
    rows = [(f"batch {N}", "us"), *((name, f"{1e6 * t:.1f}") for name, t in times.items())]
    rows.append(("together, without the optimiser", f"{1e6 * sum(times.values()):.1f}"))
    print(harness.table(rows))
    return times


def step_calls(N: int) -> dict[str, Callable[[], Any]]:
    """The launches of a step of the reference network, on numbers of no meaning."""
    import cupy

    rng = np.random.default_rng(0)

    def put(*shape: int) -> Any:
        return cupy.asarray(rng.standard_normal(shape, "f4"))

    x, w1, b1 = put(N, 1, 28, 28), put(32, 1, 5, 5), put(32)
    w2, b2, w3, b3 = put(64, 32, 5, 5), put(64), put(128, 1024), put(128)
    w4, b4 = put(10, 128), put(10)
    labels = cupy.asarray(rng.integers(0, 10, N))
    win, pool = window("conv2d", (5, 5)), (2, 2)
    y1, k1 = conv2d_cupy.block_forward(x, w1, b1, win, 1, True, pool)
    y2, k2 = conv2d_cupy.block_forward(y1, w2, b2, win, 1, True, pool)
    h = linear_cupy.forward(y2.reshape(N, -1), w3, b3, relu=True)
    z = linear_cupy.forward(h, w4, b4)
    dz1 = conv2d_cupy.spread(y1, k1, pool, 24, 24)
    dz2 = conv2d_cupy.spread(y2, k2, pool, 8, 8)
    flat = y2.reshape(N, -1)
    return {
        "conv1 + ReLU + pool": lambda: conv2d_cupy.block_forward(x, w1, b1, win, 1, True, pool),
        "conv2 + ReLU + pool": lambda: conv2d_cupy.block_forward(y1, w2, b2, win, 1, True, pool),
        "fc1 + ReLU": lambda: linear_cupy.forward(flat, w3, b3, relu=True),
        "fc2": lambda: linear_cupy.forward(h, w4, b4),
        "softmax + loss + gradient": lambda: softmax_cupy.labelled(z, labels),
        "fc2 backward, ReLU": lambda: linear_cupy.backward(z, h, w4, after_relu=True),
        "fc1 backward": lambda: linear_cupy.backward(h, flat, w3),
        "conv2 spread": lambda: conv2d_cupy.spread(y2, k2, pool, 8, 8),
        "conv2 dw, db": lambda: conv2d_cupy.weight_gradient(dz2, y1, w2.shape, win, 1),
        "conv2 dx": lambda: conv2d_cupy.input_gradient(dz2, w2, y1.shape, win, 1),
        "conv1 spread": lambda: conv2d_cupy.spread(y1, k1, pool, 24, 24),
        "conv1 dw, db": lambda: conv2d_cupy.weight_gradient(dz1, x, w1.shape, win, 1),
    }


# ---------------------------------------------------------------- convolutions


def convs(args: argparse.Namespace, report: Report) -> Report:
    """3x3 convolutions, forward + dx + dw, against cuDNN with its algorithms searched."""
    torch = harness.optional("torch")
    out: Report = {"measured_peak": matmul_peak(torch)} if torch else {}
    for mode, peak in out.get("measured_peak", {}).items():
        print(f"cuBLAS {mode}: {peak / 1e12:.1f} TFLOP/s")
    for tf32 in (False, True):
        conv2d_cupy.use_tf32(tf32)
        mode = "TF32" if tf32 else "float32"
        try:
            for name, (C, H) in CONVS.items():
                key = f"conv {name} {mode}"
                out[key] = one_conv(torch, args, key, C, H, tf32, report)
        finally:
            conv2d_cupy.use_tf32(False)
    return out


def matmul_peak(torch: Any) -> dict[str, float]:
    """Operations a second of a large product, the ceiling that can be reached."""
    peaks, n = {}, 8192
    a, b = torch.randn(n, n, device="cuda"), torch.randn(n, n, device="cuda")
    for mode in ("float32", "TF32"):
        torch.backends.cuda.matmul.allow_tf32 = mode == "TF32"
        times = [harness.torch_seconds(lambda: a @ b) for _ in range(4)]
        peaks[mode] = 2 * n**3 / min(times)
    torch.backends.cuda.matmul.allow_tf32 = False
    return peaks


def one_conv(torch: Any, args: Any, key: str, C: int, H: int, tf32: bool, report: Report) -> Report:
    """Check, then time one convolution in both libraries, pass by pass."""
    ours, (x, w, dy) = conv_calls(C, H)
    win = window("conv2d", (3, 3), padding=1)
    few = slice(0, 4)
    want = conv2d.VERSIONS["numpy"].forward(
        *(a.get().astype("f8") for a in (x[few], w)), None, win, 1
    )
    error = float(abs(ours["forward"]()[few].get() - want).max() / abs(want).max())
    assert error < (2e-3 if tf32 else 1e-5), f"{key}: relative error {error:.1e}"
    flop = 2 * BATCH * C * C * 9 * H * H
    peak = report["device"]["float32_peak"]
    times = {name: kernel_seconds(call, args.repeats, 5) for name, call in ours.items()}
    theirs = torch_convs(torch, x, w, dy, tf32, args.repeats) if torch else {}
    rows = [(key, "us", "TFLOP/s", "of float32 peak", "cuDNN us", "ratio")]
    for name, t in times.items():
        other = theirs.get(name)
        rate = flop / t
        rows.append(
            (
                name,
                f"{1e6 * t:.1f}",
                f"{rate / 1e12:.1f}",
                f"{100 * rate / peak:.0f} %",
                f"{1e6 * other:.1f}" if other else "-",
                f"{t / other:.2f}" if other else "-",
            )
        )
    print(harness.table(rows), flush=True)
    if theirs:
        report["ratios"][key] = sum(times.values()) / sum(theirs.values())
    return {"ours": times, "cudnn": theirs, "flop": flop, "error": error}


def conv_calls(C: int, H: int) -> tuple[dict[str, Callable[[], Any]], tuple[Any, Any, Any]]:
    """The passes of a 3x3 convolution with padding 1, and its x, w and dy."""
    import cupy

    rng = np.random.default_rng(0)
    x, dy = (cupy.asarray(rng.standard_normal((BATCH, C, H, H), "f4")) for _ in range(2))
    w = cupy.asarray(rng.standard_normal((C, C, 3, 3), "f4") / np.float32(3 * C**0.5))
    win = window("conv2d", (3, 3), padding=1)
    calls = {
        "forward": lambda: conv2d_cupy.forward(x, w, None, win, 1),
        "dx": lambda: conv2d_cupy.input_gradient(dy, w, x.shape, win, 1),
        "dw": lambda: conv2d_cupy.weight_gradient(dy, x, w.shape, win, 1)[0],
    }
    return calls, (x, w, dy)


def torch_convs(torch: Any, x: Any, w: Any, dy: Any, tf32: bool, repeats: int) -> dict[str, float]:
    """The better of NCHW and channels_last for each pass of cuDNN."""
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, True
    best: dict[str, float] = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        arrays = (torch.from_dlpack(a).clone(memory_format=layout) for a in (x, w, dy))
        for name, call in torch_passes(torch, *arrays).items():
            for _ in range(3):
                call()
            times = [harness.torch_seconds(call, 5) for _ in range(repeats)]
            best[name] = min(best.get(name, 1e9), statistics.median(times))
    return best


def torch_passes(torch: Any, x: Any, w: Any, dy: Any) -> dict[str, Callable[[], Any]]:
    """The three passes of a 3x3 convolution with padding 1."""
    backward = torch.ops.aten.convolution_backward
    rest = ([0], [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    return {
        "forward": lambda: torch.nn.functional.conv2d(x, w, padding=1),
        "dx": lambda: backward(dy, x, w, *rest, [True, False, False]),
        "dw": lambda: backward(dy, x, w, *rest, [False, True, False]),
    }


# ---------------------------------------------------------------- training steps


def steps(args: argparse.Namespace, report: Report) -> Report:
    """Time a training step, the gathering of the batch on the device included."""
    torch = harness.optional("torch")
    out: Report = {}
    for N, count in ((64, 200), (1024, 50)):
        rng = np.random.default_rng(0)
        x = rng.random((N * count, 1, 28, 28), "f4")
        y = rng.integers(0, 10, len(x))
        calls = {"minicnn": minicnn_epoch(x, y, N)}
        if torch is not None:
            calls |= torch_epochs(torch, x, y, N)
        seconds = in_turns(calls, args.repeats, wait_for_device)
        seconds = {name: s / count for name, s in seconds.items()}
        print(f"\nreference network, batch {N}, {count} steps at a time")
        theirs = {name: s for name, s in seconds.items() if name != "minicnn"}
        for name, s in sorted(seconds.items(), key=lambda item: item[1]):
            print(f"  {name:32} {1e6 * s:9.1f} us")
        if theirs:
            best = min(theirs.values())
            eager = [s for name, s in theirs.items() if "eager" in name]
            report["ratios"][f"step {N} / best"] = seconds["minicnn"] / best
            if eager:
                report["ratios"][f"step {N} / eager"] = seconds["minicnn"] / min(eager)
        out[str(N)] = seconds
    return out


def minicnn_epoch(x: np.ndarray, y: np.ndarray, N: int) -> Callable[[], Any]:
    """One epoch of Trainer.fit."""
    model = mc.to_gpu(mc.models.mnist_cnn(rng=0))
    trainer = mc.Trainer(model, mc.optim.Adam(model, lr=1e-3))
    data = mc.to_gpu(Dataset(x, y, tuple("0123456789")))
    run = lambda: trainer.fit(data, epochs=1, batch_size=N, progress=False)  # noqa: E731
    run()
    print(trainer.plan())
    return run


def torch_epochs(torch: Any, x: np.ndarray, y: np.ndarray, N: int) -> dict[str, Callable[[], Any]]:
    """The same epoch by PyTorch, in its modes; each is left out if it cannot be set up."""
    harness.torch_on("cuda")
    tx, ty = torch.from_numpy(x).cuda(), torch.from_numpy(y).cuda()
    makers = {
        "PyTorch eager": (torch.contiguous_format, "eager"),
        "PyTorch eager channels_last": (torch.channels_last, "eager"),
        "PyTorch CUDA graph": (torch.contiguous_format, "graph"),
        "PyTorch compile, CUDA graphs": (torch.contiguous_format, "compile"),
        "PyTorch compile, channels_last": (torch.channels_last, "compile"),
    }
    epochs: dict[str, Callable[[], Any]] = {}
    for name, (layout, how) in makers.items():
        try:
            model = peers.torch_module(mc.models.mnist_cnn(rng=0)).cuda().to(memory_format=layout)
            run = torch_epoch(torch, model, tx, ty, N, layout, how)
            run()
            epochs[name] = run
        except Exception as error:
            print(f"  ({name} left out: {type(error).__name__}: {str(error)[:200]})", flush=True)
    return epochs


def torch_epoch(
    torch: Any, model: Any, x: Any, y: Any, N: int, layout: Any, how: str
) -> Callable[[], Any]:
    """One epoch over shuffled data on the device, without waiting for a loss."""
    captured = how == "graph"
    run = peers.torch_compiled(model, "cuda") if how == "compile" else model
    step = peers.torch_step(model, run, captured)
    if captured:
        sx, sy = x[:N].clone(), y[:N].clone()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(sx, sy)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(sx, sy)

    def epoch() -> None:
        order = torch.randperm(len(x), device="cuda")
        for i in range(0, len(x), N):
            at = order[i : i + N]
            if captured:
                torch.index_select(x, 0, at, out=sx)
                torch.index_select(y, 0, at, out=sy)
                graph.replay()
            else:
                step(x[at].contiguous(memory_format=layout), y[at])

    return epoch


# ---------------------------------------------------------------- MNIST


def mnist(args: argparse.Namespace, report: Report) -> Report:
    """Ten epochs of full MNIST; the clock runs over training and a test after each epoch."""
    shared = Path(__file__).resolve().parents[2] / "shared" / "data"
    here = Path(__file__).resolve().parents[1] / "shared" / "data"
    for folder in (shared, here):
        if folder.is_dir():
            os.environ.setdefault("MINICNN_DATA_DIR", str(folder))
    train, test = (mc.to_gpu(mc.data.load("mnist", split)) for split in ("train", "test"))
    runs = []
    for _ in range(2):  # the first compiles and captures
        model = mc.to_gpu(mc.models.mnist_cnn(rng=0))
        optimizer = mc.optim.AdamW(model, lr=3e-3, weight_decay=0.01)
        batch, epochs = 128, 10
        total = epochs * -(-len(train.x) // batch)
        schedule = mc.schedules.make_schedule("onecycle", 3e-3, total)
        trainer = mc.Trainer(model, optimizer, schedule=schedule)
        wait_for_device()
        start = time.perf_counter()
        history = trainer.fit(train, test, epochs=epochs, batch_size=batch, progress=False)
        wait_for_device()
        runs.append((time.perf_counter() - start, history[-1]["test_accuracy"]))
        print(f"  {runs[-1][0]:.2f} s, {runs[-1][1]:.2%}", flush=True)
    seconds, right = runs[-1]
    report["ratios"]["mnist seconds"] = seconds
    assert right >= 0.993, f"test accuracy {right:.2%}, expected 99.3 % or more"
    return {"seconds": seconds, "accuracy": right, "first": runs[0]}


PARTS: dict[str, Callable[[argparse.Namespace, Report], Report]] = {
    "warm": warm,
    "accuracy": accuracy,
    "kernels": kernels,
    "convs": convs,
    "steps": steps,
    "mnist": mnist,
    "tests": tests,
}

if __name__ == "__main__":
    sys.exit(main())
