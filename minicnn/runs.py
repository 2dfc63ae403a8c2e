"""The folder of a training run: what was trained, how it went, and the weights.

::

    runs/digits-20260131-120000/
      config.json          data set, classes, network, all options, versions
      history.jsonl        one JSON object an epoch
      weights.safetensors  after the last whole epoch
      best.safetensors     weights after the epoch with the best test accuracy
      checkpoint-00000120.safetensors
                           all that the training goes on from, after 120 updates; the last few
      curves.png confusion.png filters.png mistakes.png

Every file is replaced as a whole, so a crash leaves what was written last.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from minicnn import checkpoint
from minicnn.config import Config
from minicnn.files import replacing
from minicnn.init import limited
from minicnn.layers import Sequential
from minicnn.locks import alone
from minicnn.shapes import integer
from minicnn.train import Callback, Trainer

RUNS = Path("runs")
CONFIG, HISTORY = "config.json", "history.jsonl"
WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
CHECKPOINTS = "checkpoint-*.safetensors"  # with the number of updates, in 8 digits


class Run:
    """The folder of a run; `new_run` makes a new one, `latest` finds the newest.

    Parameters
    ----------
    folder : path-like
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)

    @cached_property
    def config(self) -> Config:
        """What was trained.

        Raises
        ------
        FileNotFoundError
            If the folder holds no run.
        ValueError
            If ``config.json`` is damaged.
        """
        path = self.folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{self.folder}: expected the folder of a run, got no {CONFIG}")
        try:
            return Config.parse(path.read_text("utf-8"))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def read_history(self) -> list[dict[str, float]]:
        """The records of all epochs so far, as in `Trainer.history`."""
        path = self.folder / HISTORY
        try:
            records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
            for record in records:
                for key, value in record.items():
                    if isinstance(value, bool) or not isinstance(value, float | int | None):
                        raise ValueError(f"{key}: expected a number or null, got {value!r}")
            return [
                {key: math.nan if value is None else value for key, value in record.items()}
                for record in records
            ]
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: expected one JSON object a line, got: {error}") from error

    def load_model(self) -> Sequential:
        """The network with the weights after the last epoch.

        Raises
        ------
        FileNotFoundError, ValueError
            If no epoch was finished, a file is damaged, or they do not belong together.
        """
        config, path = self.config, self.folder / WEIGHTS
        weights = checkpoint.load_arrays(path)
        try:
            # A damaged config may name sizes that no memory holds.
            with limited(sum(8 * a.size for a in weights.values())):
                model = config.build()
            model.load_state_dict(weights)
        except ValueError as error:
            raise ValueError(
                f"{path}: expected the weights of the network in {CONFIG}: {error}"
            ) from error
        return model

    def checkpoints(self) -> list[Path]:
        """Files of `checkpoint.save_training`, the one after the most updates last."""
        return sorted(self.folder.glob(CHECKPOINTS))

    def write_checkpoint(self, trainer: Trainer, keep: int) -> Path:
        """Write a checkpoint, leave the last `keep` of them, and return the path of the new one."""
        step = trainer.optimizer.step_count
        path = self.folder / CHECKPOINTS.replace("*", f"{step:08}")
        checkpoint.save_training(trainer, path)
        for old in self.checkpoints()[:-keep]:
            old.unlink(missing_ok=True)
        return path

    def restore(self, trainer: Trainer) -> None:
        """Let the trainer go on from the last checkpoint, or from an older one if it is damaged.

        A run that was ended before its first checkpoint begins anew.

        Raises
        ------
        ValueError
            If no checkpoint is whole, or the trainer is not like the one that wrote it.
        FileNotFoundError
            If there are results but no checkpoint.
        """
        paths = self.checkpoints()
        if not paths and (self.folder / HISTORY).exists():
            raise FileNotFoundError(
                f"{self.folder}: expected a {CHECKPOINTS} to go on from, got none "
                "(earlier versions kept none); start a new run"
            )
        for path in reversed(paths):
            try:
                checkpoint.load_training(trainer, path)
                return
            except checkpoint.DamagedError as error:
                if path == paths[0]:
                    raise
                warnings.warn(f"{error}; an earlier checkpoint is used", stacklevel=2)

    def write_config(self, config: Config) -> None:
        """Write ``config.json``."""
        self.config = config
        with replacing(self.folder / CONFIG) as file:
            file.write(f"{json.dumps(asdict(config), indent=2, default=str)}\n".encode())

    def write_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Write ``history.jsonl``; what is not finite becomes null, as JSON has no NaN."""
        with replacing(self.folder / HISTORY) as file:
            for record in history:
                finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
                file.write(f"{json.dumps(finite)}\n".encode())

    def write_figure(self, name: str, figure: Any) -> Path:
        """Write a Matplotlib figure and return the path of the file."""
        path = self.folder / f"{name}.png"
        with replacing(path) as file:
            figure.savefig(file, format="png")
        return path


class KeepRun(Callback):
    """Writes what there is of a run: weights and history after each epoch, and checkpoints.

    Parameters
    ----------
    run : Run
    every : int
        Updates from one checkpoint to the next; 0 for one after each epoch alone.
    keep : int
        Checkpoints that stay, at least 1.

    Attributes
    ----------
    kept : int
        Epochs that are safe on the disk.
    """

    needs_loss = False

    def __init__(self, run: Run, every: int = 0, keep: int = 2) -> None:
        self.run = run
        self.every = integer("KeepRun", "every", every, 0)
        self.keep = integer("KeepRun", "keep", keep, 1)
        self.kept = 0

    def begin(self, trainer: Trainer) -> None:
        """Write the first checkpoint, so that a disk that takes none is noticed before the work.

        Raises
        ------
        OSError
            If it cannot be written, or there is no room for the files that will follow.
        """
        self.kept = len(trainer.history)
        path = self.run.write_checkpoint(trainer, self.keep)
        # Later files come beside it: further checkpoints, and twice the weights, each smaller.
        needed = path.stat().st_size * (self.keep + 2)
        free = shutil.disk_usage(self.run.folder).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"expected {needed:,} bytes of free space for checkpoints and weights, "
                f"got {free:,}",
                str(self.run.folder),
            )

    def on_step(self, trainer: Trainer, loss: float) -> None:
        if self.every and trainer.optimizer.step_count % self.every == 0:
            self.run.write_checkpoint(trainer, self.keep)

    def on_epoch(self, trainer: Trainer, record: dict[str, float]) -> None:
        folder, history = self.run.folder, trainer.history
        checkpoint.save(trainer.model, folder / WEIGHTS)
        if len(history) == 1 + max(range(len(history)), key=lambda i: _merit(history[i])):
            checkpoint.save(trainer.model, folder / BEST)
        self.run.write_history(history)
        # Last, so that a crash before it has this epoch's end done again, and all files with it.
        self.run.write_checkpoint(trainer, self.keep)
        self.kept = len(history)


def _merit(record: Mapping[str, float]) -> tuple[float, float]:
    """By what the best epoch is chosen; the first of equals wins, and NaN is worst."""
    accuracy, loss = (record.get(name, math.nan) for name in ("test_accuracy", "test_loss"))
    return (
        -math.inf if math.isnan(accuracy) else accuracy,
        -math.inf if math.isnan(loss) else -loss,
    )


@contextmanager
def new_run(folder: str | os.PathLike[str]) -> Iterator[Run]:
    """Make the folder of a new run, and keep other processes out of it inside the block.

    A folder that was made and stayed empty is removed again.

    Raises
    ------
    FileExistsError
        If the folder holds the results of a run, or another process is at work in it.
    OSError
        If the folder cannot be made or written to.
    """
    run = Run(folder)
    with alone(run.folder, "; choose another --out"):
        # A run that ended before its first update left a checkpoint that is worth nothing.
        first = run.folder / CHECKPOINTS.replace("*", "0" * 8)
        for path in (run.folder / WEIGHTS, run.folder / HISTORY, *run.checkpoints()):
            if path.exists() and path != first:
                raise FileExistsError(
                    f"{run.folder}: expected a new folder, got one that holds a run "
                    f"({path.name}); choose another --out, or go on with --resume"
                )
        first.unlink(missing_ok=True)
        yield run


@contextmanager
def resume_run(folder: str | os.PathLike[str]) -> Iterator[Run]:
    """Open the folder of a run to go on with it, and keep other processes out inside the block.

    Raises
    ------
    FileNotFoundError, ValueError
        If the folder holds no run, or its ``config.json`` is damaged.
    FileExistsError
        If another process is at work in it.
    OSError
        If the folder cannot be written to.
    """
    run = Run(folder)
    _ = run.config  # before a lock file is written into a folder that is no run's
    with alone(run.folder):
        yield run


def latest(root: str | os.PathLike[str] = RUNS) -> Run:
    """The run under `root` whose weights were written last.

    Raises
    ------
    FileNotFoundError
        If there is none.
    """
    found = [path for path in Path(root).glob(f"*/{WEIGHTS}") if (path.parent / CONFIG).is_file()]
    if not found:
        raise FileNotFoundError(
            f"{root}: expected a folder with runs, got none (fix: minicnn train --dataset digits)"
        )
    return Run(max(found, key=lambda path: path.stat().st_mtime_ns).parent)
