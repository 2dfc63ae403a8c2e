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
import platform
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property, partial
from pathlib import Path
from typing import IO, Any

from minicnn import checkpoint, models, ops
from minicnn.data import DATASETS, Dataset, load, load_folder
from minicnn.data.folder import Switch
from minicnn.files import replacing, sweep
from minicnn.layers import Sequential
from minicnn.shapes import Pair, integer, number, pair
from minicnn.train import Callback, Loss, Trainer

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

RUNS = Path("runs")
CONFIG, HISTORY, LOCK = "config.json", "history.jsonl", ".lock"
WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
CHECKPOINTS = "checkpoint-*.safetensors"  # with the number of updates, in 8 digits

MODELS = {"mnist_cnn": models.mnist_cnn}


@dataclass(frozen=True)
class Config:
    """What has to be known about a run to use or repeat it.

    Attributes
    ----------
    dataset : str
        One of `minicnn.data.DATASETS`, or the folder that holds ``train`` and ``test``.
    classes : tuple of str
    channels : int
    image_size : pair of int
        Rows and columns.
    model : str
        One of `MODELS`.
    label_smoothing : float
        Of the loss.
    invert, crop : bool or "auto"
        How `read_picture` has to bring a new picture into the form of the data set.
    options, versions : dict
        The other settings of the training, which it is resumed with, and what it ran on.
    data_sha256 : str
        Of the training data, which must not change before the training is resumed.
    """

    dataset: str
    classes: tuple[str, ...]
    channels: int
    image_size: Pair
    model: str = "mnist_cnn"
    label_smoothing: float = 0.0
    invert: Switch = False
    crop: Switch = False
    options: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    data_sha256: str = ""

    @classmethod
    def parse(cls, text: str) -> Config:
        """Read what `text` keeps; names that this version does not know are passed over.

        Raises
        ------
        ValueError, TypeError
            Not JSON, something missing, or a value of the wrong kind.
        """
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"expected a JSON object, got {type(found).__name__}")
        names = {f.name for f in fields(cls)}
        config = cls(**{name: value for name, value in found.items() if name in names})
        if config.model not in MODELS:
            raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {config.model!r}")
        classes = config.classes
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            raise TypeError(f"classes: expected a list of names, got {classes!r}")
        for name, kind in (("dataset", str), ("options", dict), ("versions", dict)):
            if not isinstance(getattr(config, name), kind):
                raise TypeError(
                    f"{name}: expected {kind.__name__}, got {type(getattr(config, name)).__name__}"
                )
        for name in ("invert", "crop"):
            value = getattr(config, name)
            if not (isinstance(value, bool) or value == "auto"):
                raise ValueError(f"{name}: expected true, false or 'auto', got {value!r}")
        checked = {
            "classes": tuple(classes),
            "channels": integer("config", "channels", config.channels, 1),
            "image_size": pair("config", "image_size", config.image_size, 1),
            "label_smoothing": number(
                "config", "label_smoothing", config.label_smoothing, ge=0, le=1
            ),
        }
        return cls(**(vars(config) | checked))

    def build(self, seed: int = 0) -> Sequential:
        """The network with fresh weights."""
        return MODELS[self.model](seed, self.channels, len(self.classes), self.image_size)

    def loss(self) -> Loss:
        """The loss that the network was trained with, as `Trainer` takes it."""
        forward = partial(ops.cross_entropy_forward, label_smoothing=self.label_smoothing)
        return forward, ops.cross_entropy_backward

    def load(self, split: str, dataset: str | None = None) -> Dataset:
        """Load "train" or "test" of this data set, or of another one with the same classes."""
        name = dataset or self.dataset
        data = load_split(name, split, self.image_size, self.channels)
        if data.classes != self.classes:
            raise ValueError(
                f"{name} ({split}): classes: expected {_listed(self.classes)}, "
                f"got {_listed(data.classes)}"
            )
        if data.x.shape[1:] != (self.channels, *self.image_size):
            raise ValueError(
                f"{name} ({split}): expected pictures of shape "
                f"{(self.channels, *self.image_size)}, got {data.x.shape[1:]}"
            )
        return data


def load_split(dataset: str, split: str, image_size: Pair, channels: int) -> Dataset:
    """Load a split of a data set by name, or of a folder with one sub-folder for each split."""
    if dataset in DATASETS:
        return load(dataset, split)
    return load_folder(Path(dataset) / split, image_size, channels)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:10])
    return f"{len(names)} ({shown}{', ...' if len(names) > 10 else ''})"


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
            If no epoch was finished, or a file is damaged.
        """
        model = self.config.build()
        checkpoint.load(model, self.folder / WEIGHTS)
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
    with _alone(run.folder, "; choose another --out"):
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
    with _alone(run.folder):
        yield run


@contextmanager
def _alone(folder: Path, fix: str = "") -> Iterator[None]:
    """Make a folder if there is none, lock it, and sweep out what killed processes left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / LOCK).touch()
    except OSError as error:
        raise OSError(
            f"{folder}: expected a folder that can be written to, got: {error.strerror}{fix}"
        ) from error
    lock = _lock(folder, fix)
    try:
        sweep(folder, age=0)
        yield
    finally:
        with lock, suppress(OSError):
            (folder / LOCK).unlink()
        with suppress(OSError):  # as a rule something is in it
            folder.rmdir()


def _lock(folder: Path, fix: str) -> IO[str]:
    """Open the lock file of a folder, alone.

    The system gives the lock back when a process ends, however it ends, so a lock file that a
    killed process left behind locks nothing. Windows and some file systems have no such lock.
    """
    path = folder / LOCK
    while True:
        file = open(path, "a+")  # noqa: SIM115 (stays open: closing it gives the lock back)
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with file:
                file.seek(0)
                holder = file.read() or "another process"
            raise FileExistsError(
                f"{folder}: expected a folder for this run alone, got one in which {holder} "
                f"is at work{fix}"
            ) from None
        except OSError:  # a file system without locks
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}")
                file.flush()
                return file
        file.close()  # its holder removed it between our open and our lock


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
