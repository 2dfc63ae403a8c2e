"""Kill a training at random moments, resume it, and see that nothing is lost.

    python tests/kill_resume.py                       # 50 kills, then 500
    python tests/kill_resume.py --kills 1000 --seed 7 # another 1000 moments

Two things are shown, each on runs of ``minicnn train`` in processes of their own:

1. After each kill (SIGKILL) the run is resumed, killed again, and so on until it has come to its
   end. Weights, best weights, optimiser state, random generators and history then equal those of
   a run that nobody disturbed, bit for bit. Every second kill strikes inside the writing of a
   file, the others at a random moment.
2. After each of many kills every file of the run is whole: it is read as its users read it.

The network is small, but runs as every training does, on the fused kernels of `Trainer`: they are
compiled by the undisturbed run and read from the disk by the others, so that a process lives for a
second or two. A child is forked from this process, which has run no kernel and started no thread,
and so spares the imports.
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minicnn import checkpoint
from minicnn.cli import main, train
from minicnn.config import MODELS
from minicnn.data import Dataset
from minicnn.layers import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, ReLU, Sequential
from minicnn.runs import Run

STEPS = 24  # 4 epochs of 6 batches
ARGV = (
    *("train", "--dataset", "digits", "--epochs", "4", "--batch-size", "10", "--quiet"),
    *("--augment", "shift=1,noise=0.1", "--optimizer", "adam", "--schedule", "cosine"),
    *("--device", "cpu", "--checkpoint-every", "1"),
)


def network(rng, in_channels, num_classes, image_size):
    """A small network with all that a checkpoint has to hold: buffers and generators too."""
    rng = np.random.default_rng(rng)
    H, W = image_size
    return Sequential(
        Conv2d(in_channels, 2, 3, stride=4, rng=rng),
        BatchNorm2d(2),
        ReLU(),
        Flatten(),
        Dropout(0.2, rng=rng),
        Linear(2 * ((H - 3) // 4 + 1) * ((W - 3) // 4 + 1), num_classes, rng=rng),
    )


def digits(name, split):
    rng = np.random.default_rng([len(split)])
    x, y = rng.random((60, 1, 28, 28), np.float32), rng.integers(0, 10, 60)
    return Dataset(x, y, tuple("0123456789"))


class Kill(NamedTuple):
    """When a child dies: so many seconds after its start, or after so many system calls."""

    seconds: float | None = None
    calls: int | None = None


def child(argv: list[str], kill: Kill) -> None:
    """Run a command line in this forked process, and end it."""
    import minicnn.config

    MODELS["mnist_cnn"] = network
    minicnn.config.load = digits
    train.load_split = lambda name, split, *sizes: digits(name, split)
    train._draw = lambda *args: []
    if kill.calls is not None:
        die_at_call(kill.calls)
    try:
        with open(os.devnull, "w") as sys.stdout:
            status = main(argv)
    except BaseException:
        traceback.print_exc()
        status = 70
    os._exit(status)


def die_at_call(number: int) -> None:
    """Kill this process before, after or within the n-th step of writing a file.

    Each file takes five: open, write (of which half is done when it strikes), fsync, rename, and
    fsync of the folder. `sys.addaudithook` would not see write and fsync, so they are wrapped.
    """
    import builtins
    import io

    left = number

    def strike() -> bool:
        nonlocal left
        left -= 1
        return left < 0

    def now() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    class Writer(io.BufferedRandom):
        def write(self, data):
            if strike():
                super().write(data[: len(data) // 2])
                self.flush()
                now()
            return super().write(data)

    real_open, fsync, replace = builtins.open, os.fsync, os.replace

    def opening(path, mode="r", *args, **kwargs):
        if mode != "x+b":
            return real_open(path, mode, *args, **kwargs)
        file = Writer(io.FileIO(path, "x+"))
        if strike():
            now()
        return file

    def before(call):
        def wrapped(*args):
            if strike():
                now()
            return call(*args)

        return wrapped

    builtins.open, os.fsync, os.replace = opening, before(fsync), before(replace)


NEVER = Kill()


def run(argv: list[str], kill: Kill = NEVER) -> int:
    """Run a command line in a child; returns its exit status, or -9 if it was killed."""
    pid = os.fork()
    if pid == 0:
        child(argv, kill)
    if kill.seconds is not None:
        time.sleep(kill.seconds)
        os.kill(pid, signal.SIGKILL)  # to a child that has ended nothing happens
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def result(folder: Path) -> tuple[dict, list, list]:
    """All that a run comes to: its last checkpoint, its weights, its history without the times."""
    run = Run(folder)
    paths = [run.checkpoints()[-1], folder / "weights.safetensors", folder / "best.safetensors"]
    arrays = {
        (path.name, name): (a.dtype.str, a.shape, a.tobytes())
        for path in paths
        for name, a in checkpoint.load_arrays(path).items()
    }
    trainer = restored(folder, paths[0])
    generators = [rng.bit_generator.state for _, rng in trainer.model.named_generators()]
    history = [{k: v for k, v in r.items() if k != "seconds"} for r in run.read_history()]
    assert history == [{k: v for k, v in r.items() if k != "seconds"} for r in trainer.history], (
        "history.jsonl and the checkpoint differ"
    )
    return arrays, generators, history


def restored(folder: Path, path: Path):
    """A trainer that goes on from a checkpoint of the run in `folder`."""
    from minicnn.cli.recipes import recall

    args = train_arguments(folder)
    config = Run(folder).config
    recall(args, config)
    MODELS["mnist_cnn"] = network
    return checkpoint.load_training(train._trainer(args, config, 60), path)


def train_arguments(folder: Path) -> argparse.Namespace:
    from minicnn.cli import _parser

    return _parser().parse_args(["train", "--resume", str(folder)])


def unreadable(folder: Path) -> list[str]:
    """Read every file of a run; the complaints."""
    found, run = [], Run(folder)
    for path in folder.glob("[!.]*"):
        try:
            if path.name == "config.json":
                _ = run.config
            elif path.name == "history.jsonl":
                run.read_history()
            elif path.name.startswith("checkpoint"):
                restored(folder, path)
            else:
                checkpoint.load_arrays(path)
        except Exception as error:
            found.append(f"{path.name}: {error}")
    return found


def begin_or_resume(folder: Path) -> list[str]:
    if (folder / "config.json").exists():
        return ["train", "--resume", str(folder), "--quiet"]
    return [*ARGV, "--out", str(folder)]


def kills(rng: random.Random, lifetime: float):
    """Moments without end: by the clock, and within the writing of a file, in turn."""
    while True:
        yield Kill(seconds=rng.uniform(0, lifetime))
        yield Kill(calls=rng.randrange(60))


def kill_and_resume(
    folder: Path, count: int, rng: random.Random, lifetime: float, progress
) -> tuple[int, int, list[str]]:
    """Kill and resume until `count` kills have struck and every run begun has come to its end.

    Returns the kills that struck within a write, the runs, and what was not as it should be.
    """
    struck = within = runs = 0
    complaints: list[str] = []
    expected = result(folder / "undisturbed")
    moments = kills(rng, lifetime)
    while struck < count:
        here = folder / f"run{runs}"
        runs += 1
        while True:
            kill = next(moments) if struck < count else NEVER
            status = run(begin_or_resume(here), kill)
            if status == 0:
                break
            if status != -signal.SIGKILL:
                complaints.append(f"{here.name}: exit status {status}")
                break
            struck += 1
            within += any(here.glob(".*.part"))
            complaints += unreadable(here)
            progress(1)
        if (here / "history.jsonl").exists():
            if result(here) != expected:
                complaints.append(f"{here.name}: differs from the undisturbed run")
            if leftover := [path.name for path in here.glob(".*")]:
                complaints.append(f"{here.name}: left {leftover}")
        shutil.rmtree(here)
    return within, runs, complaints


def undisturbed(folder: Path) -> float:
    """Make the run that the others are compared with; returns how long such a run lives.

    It is made twice, which must make no difference: the first one compiles the kernels.
    """
    import minicnn.plan.build  # noqa: F401 (imports the kernels, so that no child has to)

    for name in ("first", "undisturbed"):
        began = time.perf_counter()
        status = run([*ARGV, "--out", str(folder / name)])
        assert status == 0, f"the undisturbed run ended with {status}"
    assert result(folder / "first") == result(folder / "undisturbed"), "two runs differ"
    return time.perf_counter() - began


def command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, nargs="+", default=[50, 500], metavar="N")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: 0)")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    from tqdm import tqdm

    args = command_line()
    failed = False
    for number, count in enumerate(args.kills):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            lifetime = undisturbed(Path(name))
            with tqdm(total=count, unit="kill", desc=f"{count} kills") as bar:
                within, runs, complaints = kill_and_resume(
                    Path(name), count, random.Random(args.seed + number), lifetime, bar.update
                )
        print(
            f"{count} kills, {within} of them while a file was being written, in {runs} runs: "
            f"{len(complaints)} faults"
        )
        print("\n".join(complaints))
        failed |= bool(complaints)
    sys.exit(failed)
