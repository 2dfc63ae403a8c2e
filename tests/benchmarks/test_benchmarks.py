"""The benchmarks run: one tiny measurement each. How long anything takes is not looked at."""

import importlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from emulator import fake_cupy
from emulator.cuda import Function

pytest.importorskip("numba", reason="Numba is not installed")

FOLDER = Path(__file__).parents[2] / "benchmarks"
QUICK = ["--repeats", "1", "--no-compile", "--peers", "PyTorch,CS231n"]
CASES = {  # one case, by part of its name, for each script
    "conv2d": "1x1",
    "conv_transpose2d": "2x2",
    "pool": "max 2x2, 64",
    "norm": "layer_norm",
    "linear": "128 to 10",
    "activations": "gelu, 64x128",
    "softmax_loss": "cross_entropy, 64x10",
    "im2col": "5x5, 1",
    "optim": "SGD, reference",
    "step": "reference 1",
}


@pytest.fixture
def scripts(monkeypatch):
    """Import a module of the benchmarks by name; they find each other on the path."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def harness(scripts, monkeypatch):
    """The harness, with limits that need no measuring and threads left as they are."""
    harness = scripts("harness")
    monkeypatch.setattr(harness, "fma_peak", lambda threads: 100.0)
    monkeypatch.setattr(harness, "copy_speed", lambda: 10.0)
    monkeypatch.setattr(harness, "use_threads", lambda count: count or 1)
    return harness


@pytest.mark.parametrize("name", CASES)
def test_a_script_checks_times_and_reports(name, scripts, harness, capsys, tmp_path):
    script, out = scripts(name), tmp_path / "out.json"
    argv = [*QUICK, "--only", CASES[name], "--json", str(out)]
    if name == "step":
        script.main(argv)
    else:
        scripts("contest").run(script.__doc__, script.CASES, script.make, argv)
    report = json.loads(out.read_text())
    assert report["fma_peak_gflops"] == 100
    assert [case for case in script.CASES if CASES[name] in case] == list(report["cases"])
    printed = capsys.readouterr().out
    for case, figures in report["cases"].items():
        assert case in printed
        ours = [c for c in figures["seconds"] if c.startswith("minicnn")]
        assert len(ours) >= 2
        assert all(s > 0 for passes in figures["seconds"].values() for s in passes.values())
        assert figures["first_call_seconds"].keys() == figures["seconds"].keys()
    assert "first calls, compilation included" in printed


SMALL = {  # cases that the emulator of CUDA runs in no time
    "conv2d": {"3x3": (2, 3, 5, 8, 3, 1, 1, 2), "depthwise": (2, 4, 4, 6, 3, 1, 4)},
    "conv_transpose2d": {"2x2": (2, 3, 4, 5, 2, 2, 0)},
    "pool": {
        "max": ("max_pool2d", (2, 3, 6, 6), 2, 2),
        "average": ("avg_pool2d", (2, 3, 6, 6), 3, 2, 1),
        "adaptive": ("adaptive_avg_pool2d", (2, 3, 4, 4), 1),
    },
    "norm": {
        "batch": ("batch_norm", (4, 3, 5, 5)),
        "layer": ("layer_norm", (6, 20)),
        "group": ("group_norm", (2, 6, 4, 4), 3),
    },
    "linear": {"8 to 3": (5, 8, 3)},
    "activations": {"gelu": ("gelu", (4, 30)), "tanh": ("tanh", (4, 30))},
    "softmax_loss": {
        name: (name, (6, 10)) for name in ("log_softmax", "cross_entropy", "bce_with_logits")
    },
    "im2col": {"3x3": (2, 3, 6, 3)},
    "optim": {"Adam": ("Adam", "mnist_cnn")},
    "step": {"reference 1": ("mnist_cnn", 1)},
}


@pytest.mark.parametrize("name", SMALL)
def test_a_script_runs_on_the_gpu(
    name, scripts, harness, cupy, imitated, monkeypatch, capsys, tmp_path
):
    """Without peers: version numpy is what version cupy is compared with."""
    monkeypatch.setattr(harness, "highest_clock", lambda: 2e9)
    monkeypatch.setattr(harness, "gpu_copy_speed", lambda: 1000.0)
    script, out, launched = scripts(name), tmp_path / "out.json", Function.launches
    make = (lambda case: script.Case(*case)) if hasattr(script, "Case") else tuple
    cases = {key: make(case) for key, case in SMALL[name].items()}
    argv = ["--device", "cuda", "--repeats", "1", "--peers", "none", "--json", str(out)]
    if name == "step":
        monkeypatch.setattr(script, "CASES", cases)
        script.main(argv)
    else:
        scripts("contest").run(script.__doc__, cases, script.make, argv)
    report = json.loads(out.read_text())
    assert (report["device"], report["machine"]) == ("cuda", "Imitated GPU")
    assert report["fma_peak_gflops"] == pytest.approx(132 * 256 * 2)
    assert report["cases"].keys() == cases.keys()
    ours = {
        "step": {"minicnn", "minicnn, fused=False"},
        "optim": {"minicnn cupy", "minicnn cupy, one launch"},
    }.get(name, {"minicnn cupy"})
    for figures in report["cases"].values():
        assert figures["seconds"].keys() == figures["first_call_seconds"].keys() == ours
        assert all(s > 0 for passes in figures["seconds"].values() for s in passes.values())
    assert Function.launches > launched
    assert "minicnn numpy" not in capsys.readouterr().out


def test_the_gpus_numbers_are_compared_with_the_cpus(scripts, harness, cupy):
    contest = scripts("contest")
    args = harness.arguments("", argv=["--device", "cuda", "--repeats", "1"])
    op = contest.Op(
        lambda x: (x + (1e-3 if hasattr(x, "get") else 0), None), lambda dy, cache: dy,
        (np.ones(5, "f4"),), {},
    )  # fmt: skip
    wrong = contest.Contest(contest.contenders(op, args), {}, {})
    with pytest.raises(SystemExit, match="minicnn cupy: forward: differs from minicnn numpy"):
        contest.bench("", wrong, args, {})


@pytest.mark.parametrize("name", ["step", "linear"])
def test_without_a_gpu_the_option_says_what_is_missing(name, scripts, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)  # not installed
    script = scripts(name)
    run = getattr(script, "main", partial(scripts("contest").run, "", script.CASES, None))
    with pytest.raises(SystemExit) as stopped:
        run(["--device", "cuda"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert "--device cuda: CuPy is not installed (fix: pip install '.[cuda13]'" in message


def test_what_a_gpu_run_leaves_out(scripts, harness, cupy, capsys):
    contest = scripts("contest")
    args = harness.arguments("", argv=["--device", "cuda"])
    assert [p for p in harness.PEERS if contest.asked(args, p)] == ["PyTorch"]
    with pytest.raises(SystemExit):
        harness.arguments("", argv=["--device", "cuda", "--peak"])
    assert "--peak: expected --device cpu" in capsys.readouterr().err


def test_each_librarys_events_time_its_own_calls(harness, monkeypatch):
    asked = []
    for name, seconds in (("event_seconds", 2e-3), ("torch_seconds", 5e-3)):

        def between(call, calls=1, name=name, seconds=seconds):
            asked.append((name, calls))
            return seconds

        monkeypatch.setattr(harness, name, between)
    monkeypatch.setattr(harness.time, "sleep", lambda s: None)
    calls = {("minicnn cupy", "forward"): None, "PyTorch eager": None}
    assert list(harness.measure(calls, 1, "cuda").values()) == [2e-3, 5e-3]
    ours, theirs = (("event_seconds", 1), ("event_seconds", 10)), (("torch_seconds", 1),)
    assert asked == [*ours, *theirs, ("torch_seconds", 6)]
    assert list(harness.warm_up(calls, "cuda").values()) == [2e-3, 5e-3]


def test_events_count_what_lies_between_them(harness, cupy, imitated, monkeypatch):
    clock, stream = [0.0], cupy.cuda.Stream()
    monkeypatch.setattr(fake_cupy.time, "perf_counter", lambda: clock[0])
    used = []

    def call():
        clock[0] += 0.25
        used.append(cupy.cuda.get_current_stream())

    assert harness.event_seconds(call) == pytest.approx(0.25)
    assert harness.event_seconds(call, 3, stream) == pytest.approx(0.25)
    assert used == [cupy.cuda.Stream.null, *[stream] * 3]


@pytest.mark.torch
def test_pytorchs_passes_for_cuda_graphs_agree(torch, scripts, monkeypatch):
    """Uncompiled, and on the CPU: forward and backward are functions of their own there."""
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    contest, script = scripts("contest"), scripts("softmax_loss")
    args = scripts("harness").arguments("", argv=["--peers", "none"])
    seen = {}
    monkeypatch.setattr(contest, "contenders", lambda op, args: seen.setdefault("op", op) and {})
    script.make(("cross_entropy", (6, 10)), args)
    op = seen["op"]
    arrays, targets = ([torch.from_numpy(a) for a in part] for part in (op.arrays, op.targets))
    dy = torch.tensor(0.5)
    passes = contest.in_graphs(op, "it", arrays, targets, dy)["it"]
    y, cache = op.forward(*op.arrays, *op.targets)
    np.testing.assert_allclose(passes["forward"]().item(), y, rtol=1e-6)
    (dx,) = passes["backward"]()
    np.testing.assert_allclose(dx, op.backward(np.float32(0.5), cache), rtol=1e-4, atol=1e-7)


@pytest.mark.torch
def test_ratios_are_to_pytorch(torch, scripts, harness, tmp_path):
    script, out = scripts("linear"), tmp_path / "out.json"
    argv = ["--repeats", "1", "--only", "128 to 10", "--no-compile", "--json", str(out)]
    scripts("contest").run(script.__doc__, script.CASES, script.make, [*argv, "--peers", "PyTorch"])
    (figures,) = json.loads(out.read_text())["cases"].values()
    ours, theirs = (sum(figures["seconds"][c].values()) for c in ("minicnn numba", "PyTorch eager"))
    assert figures["ratios"]["total"]["minicnn numba"] == pytest.approx(
        {"PyTorch eager": ours / theirs}
    )


def test_every_family_has_a_script_and_a_line_in_the_summary(scripts):
    families = scripts("summary").FAMILIES
    assert families.keys() == CASES.keys()
    assert all((FOLDER / f"{name}.py").is_file() for name in families)


def test_case_that_does_not_exist_is_an_error(scripts, harness):
    script = scripts("linear")
    with pytest.raises(SystemExit, match="--only: expected part of one of 1024 to 128"):
        scripts("contest").run(script.__doc__, script.CASES, script.make, ["--only", "x"])


def test_contenders_have_to_agree(scripts):
    contest = scripts("contest")
    a = np.arange(6, dtype=np.float32)

    def of(y, dx):
        return {"forward": lambda: y, "backward": lambda: (dx,)}

    def apart(y, dx, dw):
        return {"forward": lambda: y, "dx": lambda: dx, "dw": lambda: dw}

    contest.agree(contest.Contest({"one": of(a, a), "two": of(a + 1e-5, a)}, {}, {}))
    for bad in (of(a, a + 0.01), of(a * np.nan, a), of(a[:, None], a), apart(a, a, a)):
        with pytest.raises(SystemExit, match=r"two: (forward|backward): "):
            contest.agree(contest.Contest({"one": of(a, a), "two": bad}, {}, {}))
    # What is laid out otherwise is looked at through a view.
    turned = {"forward": lambda: a[::-1]}
    views = {"two": lambda y: y[::-1]}
    contest.agree(contest.Contest({"one": of(a, a), "two": turned}, {}, {}, views))


def test_totals_add_forward_and_both_gradients(scripts):
    totals = scripts("contest").totals(
        {"a": {"forward": 1.0, "backward": 2.0}, "b": {"forward": 1.0, "dx": 2.0, "dw": 3.0},
         "c": {"forward": 5.0}, "d": {"step": 7.0}}
    )  # fmt: skip
    assert totals["total"] == {"a": 3, "b": 6}
    assert totals["backward"] == {"a": 2, "b": 5}
    assert totals["forward"] == {"a": 1, "b": 1, "c": 5}
    assert totals["step"] == {"d": 7}


def test_ratio_is_to_the_best_mode_of_each_peer(harness):
    seconds = {"minicnn": 1.0, "PyTorch eager": 4.0, "PyTorch compile": 2.0, "JAX jit": 10.0}
    assert harness.ratios(seconds, "minicnn") == {"PyTorch compile": 0.5, "JAX jit": 0.1}


@pytest.mark.parametrize(("seconds", "calls"), [(1.0, 4), (0.02, 9 * 2), (1e-4, 9 * 11)])
def test_long_calls_are_not_repeated_for_ever(seconds, calls, harness, monkeypatch):
    clock, ran = [0.0], []
    monkeypatch.setattr(harness.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(harness.time, "sleep", lambda s: None)

    def call():
        ran.append(1)
        clock[0] += seconds

    assert harness.measure({"it": call}, repeats=9)["it"] == pytest.approx(seconds)
    assert len(ran) == calls  # the first of a turn warms up


def test_peak_memory_is_that_of_a_process_of_its_own():
    command = [sys.executable, str(FOLDER / "linear.py"), *QUICK, "--only", "128 to 10", "--peak"]
    command[command.index("PyTorch,CS231n")] = "none"
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    head, first, *_ = done.stdout.partition("128 to 10, batch 64")[2].split("\n", 3)[1:]
    assert head.split()[-2:] == ["peak", "MB"]
    assert 0 <= float(first.split()[-1]) < 1000


def report(seconds, flop, traffic):
    return {
        "machine": "a processor", "threads": 2, "versions": {"numpy": "2.0"},
        "fma_peak_gflops": 100.0, "copy_gb_per_s": 10.0,
        "cases": {
            "a case": {"seconds": seconds, "flop": flop, "bytes": traffic, "memory_mb": {}},
        },
    }  # fmt: skip


@pytest.fixture
def results(tmp_path):
    """JSON files as the scripts write them, of figures that are easy to check."""
    both = {"forward": 1e-3, "backward": 3e-3}
    seconds = {
        "minicnn numba": both,
        "minicnn numba channels-last": {"forward": 1e-9, "dx": 1e-9, "dw": 1e-9},
        "PyTorch eager": {"forward": 9e-3, "backward": 9e-3},
        "PyTorch eager channels_last": {"forward": 2e-3, "backward": 6e-3},
    }
    flop = {"forward": 1e8, "backward": 1e8}
    files = {
        "conv2d": report(seconds, flop, {"forward": 1e6, "backward": 1e6}),
        "step": report(
            {"minicnn": {"inference": 3e-3}, "PyTorch eager": {"inference": 1e-3}}, {}, {}
        ),
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_summary_compares_with_the_best_mode(scripts, results, capsys):
    summary = scripts("summary")
    summary.main([str(results), "--images", str(results / "images")])
    table = capsys.readouterr().out
    assert "| convolution | a case | 4 | numba | 8 | eager channels_last | 0.50 | 50 % |" in table
    assert "| networks | a case, inference | 3 | as it comes | 1 | eager | 3.00 |  |" in table
    for name in ("speed", "roofline"):
        data = (results / "images" / f"{name}.png").read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 200_000


def test_roofline_shows_what_was_measured(scripts, results):
    summary = scripts("summary")
    figure = summary.roofline(summary.read(results), "light")
    (ax,) = figure.axes
    points = [(float(x), float(y)) for line in ax.lines for x, y in zip(*line.get_data())]
    intensity = 2e8 / 2e6
    for seconds in (4e-3, 8e-3):
        assert pytest.approx((intensity, 2e8 / seconds / 1e9)) in points
    assert (10.0, 100.0) in points  # the ridge: 100 GFLOP/s over 10 GB/s


def test_summary_of_nothing_says_so(scripts, tmp_path):
    with pytest.raises(SystemExit, match="expected JSON files of the benchmarks, found none"):
        scripts("summary").main([str(tmp_path)])


def test_all_runs_the_scripts_and_the_summary(tmp_path):
    command = [sys.executable, str(FOLDER / "all.py"), "--scripts", "linear", "--only", "128 to 10"]
    command += ["--repeats", "1", "--no-compile", "--peers", "none"]
    command += ["--results", str(tmp_path), "--images", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (tmp_path / "linear.json").is_file(), done.stderr
    assert "== linear" in done.stdout
    assert "expected results" in done.stderr  # nothing to compare with: no peer ran
