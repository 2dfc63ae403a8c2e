"""``minicnn train``: train the reference network and keep all that came of it in a folder."""

from __future__ import annotations

import argparse
import hashlib
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from minicnn import info, interrupts, ops, plots
from minicnn.backend import to_cpu, to_gpu
from minicnn.cli.options import (
    DATASET_HELP,
    add_command,
    add_device,
    choose_device,
    count,
    dataset,
    index,
    not_negative,
    positive,
    share,
)
from minicnn.cli.recipes import (
    OPTIMIZERS,
    by_data_set,
    by_optimizer,
    recall,
    settings_text,
    settle,
)
from minicnn.config import Config, load_split
from minicnn.data import AUGMENTATIONS, Dataset, parse_augment
from minicnn.runs import RUNS, KeepRun, Run, new_run, resume_run
from minicnn.schedules import SCHEDULES, make_schedule
from minicnn.shapes import size
from minicnn.train import Callback, Trainer

Augmentation = Callable[[np.ndarray, np.random.Generator], np.ndarray]


EPILOG = f"""\
defaults by data set:
{by_data_set()}

defaults by optimizer, if another one is chosen than the data set's:
{by_optimizer()}

The folder of the run gets config.json, history.jsonl (a line for each epoch), the weights after
the last epoch and the best one, the last checkpoints, and at the end curves.png, confusion.png,
filters.png and mistakes.png.

Ctrl-C and SIGTERM end the run after the update at hand, write a checkpoint and exit with 130 or
143. --resume goes on with a run, whatever ended it, and comes to the same weights, bit for bit,
as if nothing had happened. Its options are the run's own.

examples:
  minicnn train --dataset digits
  minicnn train --dataset mnist --augment digits --epochs 20 --out runs/best
  minicnn train --dataset photos/ --image-size 32 --augment photos
  minicnn train --dataset digits --optimizer sgd --schedule cosine --warmup 50 --lr 0.1
  minicnn train --resume runs/best
"""


def add(commands: Any) -> None:
    """Describe the arguments."""
    text = "train the reference network and keep weights, history and pictures"
    parser = add_command(commands, "train", run, text, EPILOG)
    _add_data(parser.add_argument_group("data"))
    _add_training(
        parser.add_argument_group("training", "Defaults that are not named here are below.")
    )
    out = parser.add_argument_group("output")
    out.add_argument(
        "--out", type=Path, metavar="FOLDER", help=f"(default: {RUNS}/DATASET-DATE-TIME)"
    )
    out.add_argument(
        "--resume", type=Path, metavar="FOLDER", help="go on with the run in this folder"
    )
    out.add_argument(
        "--checkpoint-every",
        type=index,
        metavar="STEPS",
        help="updates from one checkpoint to the next, beside the one after each epoch "
        "(default: 100; 0: none)",
    )
    out.add_argument(
        "--keep", type=count, metavar="N", help="checkpoints that stay, the last ones (default: 2)"
    )
    out.add_argument("--quiet", action="store_true", help="print the result alone")


def _add_data(data: argparse._ArgumentGroup) -> None:
    data.add_argument(
        "--dataset",
        metavar="NAME",
        type=dataset,
        help=f"{DATASET_HELP} (default: digits)",
    )
    data.add_argument(
        "--image-size",
        nargs="+",
        type=count,
        metavar="N",
        help="size to which pictures from a folder are brought: rows and columns, or one number "
        "for both (default: 28, at least: 16)",
    )
    data.add_argument(
        "--channels",
        type=int,
        choices=(1, 3),
        help="read pictures from a folder as gray (1) or RGB (3, the default)",
    )
    data.add_argument(
        "--augment",
        metavar="CHANGES",
        type=_augment,
        help=f"random changes to training pictures: {', '.join(AUGMENTATIONS)}, or settings such "
        "as shift=2,rotate=10,zoom=0.1,flip,noise=0.05,cutout=8",
    )


def _add_training(how: argparse._ArgumentGroup) -> None:
    how.add_argument("--epochs", type=count, metavar="N", help="times that every picture is seen")
    how.add_argument("--batch-size", type=count, metavar="N", help="pictures for one update")
    how.add_argument("--optimizer", choices=OPTIMIZERS, help="rule of the update")
    how.add_argument("--lr", type=positive, metavar="X", help="highest learning rate")
    how.add_argument("--momentum", type=share, metavar="X", help="for sgd and rmsprop")
    how.add_argument(
        "--weight-decay", type=not_negative, metavar="X", help="pull of the weights to 0"
    )
    how.add_argument("--schedule", choices=SCHEDULES, help="course of the learning rate")
    how.add_argument(
        "--warmup",
        type=index,
        metavar="STEPS",
        help="updates over which the learning rate rises first (default: 0; onecycle has its own)",
    )
    how.add_argument(
        "--label-smoothing",
        type=share,
        metavar="X",
        help="share of each label given to all classes",
    )
    how.add_argument(
        "--clip-norm",
        type=positive,
        metavar="X",
        help="largest norm of all gradients (default: any)",
    )
    how.add_argument(
        "--seed",
        type=index,
        metavar="N",
        help="fixes weights, order and augmentation (default: 0)",
    )
    add_device(how)
    how.set_defaults(device=None)  # here, a choice that was left out and "auto" are two things


def _augment(text: str) -> str:
    try:
        parse_augment(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def run(args: argparse.Namespace) -> int:
    """Train, and keep everything in a new folder or, to resume a run, in its own."""
    if args.resume is None:
        settle(args)
        args.device = choose_device(args.device)
        with new_run(args.out) as folder:
            train = load_split(args.dataset, "train", args.image_size, args.channels)
            config = _config(args, train)
            test = config.load("test")
            folder.write_config(config)
            return _run(args, folder, train, test)
    with resume_run(args.resume) as folder:
        recall(args, folder.config)
        args.device = choose_device(args.device)
        train, test = folder.config.load("train"), folder.config.load("test")
        if _digest(train) != folder.config.data_sha256:
            raise ValueError(
                f"{args.dataset} (train): expected the data that the run in {folder.folder} began "
                "with, got others; start a new run"
            )
        return _run(args, folder, train, test)


def _config(args: argparse.Namespace, train: Dataset) -> Config:
    """What this run is."""
    return Config(
        dataset=args.dataset,
        classes=train.classes,
        channels=args.channels,
        image_size=args.image_size,
        label_smoothing=args.label_smoothing,
        invert=args.invert,
        crop=args.crop,
        options={k: v for k, v in vars(args).items() if k not in ("command", "resume")},
        versions=info.installed(),
        data_sha256=_digest(train),
    )


def _digest(data: Dataset) -> str:
    digest = hashlib.sha256()
    for a in (data.x, data.y):
        digest.update(np.ascontiguousarray(a).data)
    return digest.hexdigest()


def _run(args: argparse.Namespace, folder: Run, train: Dataset, test: Dataset) -> int:
    """Train from wherever the run stands, and return the exit status."""
    trainer = _trainer(args, folder.config, len(train.y))
    folder.restore(trainer)
    if not args.quiet:
        print(_announcement(args, trainer, train, test), flush=True)
    began = time.perf_counter()
    keep = KeepRun(folder, args.checkpoint_every, args.keep)
    with _noting_what_is_kept(keep):
        keep.begin(trainer)
        with interrupts.caught() as received:
            _fit(args, trainer, train, test, [keep, _StopOnSignal(received)])
            if received:
                folder.write_checkpoint(trainer, args.keep)
        if received:
            return _stopped(received[0], trainer, folder)
        seconds = time.perf_counter() - began
        pictures = _draw(trainer, test, folder)
    _report(args, trainer, pictures, seconds)
    return 0


class _StopOnSignal(Callback):
    """Ends the training after the step in which a signal came."""

    needs_loss = False

    def __init__(self, received: list[int]) -> None:
        self.received = received

    def on_step(self, trainer: Trainer, loss: float) -> None:
        trainer.stop |= bool(self.received)

    def on_epoch(self, trainer: Trainer, record: dict[str, float]) -> None:
        trainer.stop |= bool(self.received)


def _stopped(number: int, trainer: Trainer, folder: Run) -> int:
    """Say how to go on, and return the exit status that shells give to this signal."""
    print(
        f"minicnn: stopped by {signal.Signals(number).name} after update "
        f"{trainer.optimizer.step_count}; {_how_to_go_on(folder)}",
        file=sys.stderr,
    )
    return 128 + number


def _how_to_go_on(folder: Run) -> str:
    return f"go on with: minicnn train --resume {shlex.quote(str(folder.folder))}"


def _trainer(args: argparse.Namespace, config: Config, samples: int) -> Trainer:
    model = config.build(args.seed)
    kind, settings = OPTIMIZERS[args.optimizer]
    optimizer = kind(model, **{name: getattr(args, name) for name in settings})
    steps = args.epochs * -(-samples // args.batch_size)
    schedule = make_schedule(args.schedule, args.lr, steps, args.warmup)
    return Trainer(model, optimizer, config.loss(), schedule, args.clip_norm)


def _announcement(args: argparse.Namespace, trainer: Trainer, train: Dataset, test: Dataset) -> str:
    """What is about to be done."""
    C, H, W = train.x.shape[1:]
    layers = " ".join(type(layer).__name__ for layer in trainer.model.children().values())
    parameters = sum(size(p.shape) for _, p, _ in trainer.model.named_params())
    settings = settings_text({name: getattr(args, name) for name in OPTIMIZERS[args.optimizer][1]})
    threads = f", {info.threads()} threads" if args.device == "cpu" else ""
    return f"""\
data       {args.dataset}: {len(train.y):,} to train and {len(test.y):,} to test, {C}x{H}x{W}, \
{len(train.classes)} classes
network    {layers}, {parameters:,} parameters
optimizer  {args.optimizer}: {settings}, {args.schedule} schedule
training   {_epochs(args)}, batches of {args.batch_size}, augment {args.augment}
device     {args.device}{threads}
folder     {args.out}"""


def _epochs(args: argparse.Namespace) -> str:
    return f"{args.epochs} epoch{'' if args.epochs == 1 else 's'}"


@contextmanager
def _noting_what_is_kept(keep: KeepRun) -> Iterator[None]:
    """Add to an error that passes through what the folder holds."""
    try:
        yield
    except BaseException as error:
        if keep.kept:
            error.add_note(f"{keep.run.folder} keeps the weights after epoch {keep.kept}")
        # Of other errors, the same step would come to the same end.
        passing = isinstance(error, KeyboardInterrupt | OSError | MemoryError)
        if passing and keep.run.checkpoints():
            error.add_note(_how_to_go_on(keep.run))
        raise


def _fit(
    args: argparse.Namespace,
    trainer: Trainer,
    train: Dataset,
    test: Dataset,
    callbacks: list[Callback],
) -> None:
    augment: Augmentation | None = parse_augment(args.augment)
    if augment == AUGMENTATIONS["none"]:
        augment = None
    if args.device == "cuda":
        trainer, test = to_gpu(trainer), to_gpu(test)
        if augment is None:
            train = to_gpu(train)
        else:  # the pictures stay here, where they are augmented, and follow batch by batch
            train, augment = train._replace(y=to_gpu(train.y)), _sending(augment)
    trainer.fit(
        train,
        test,
        epochs=args.epochs - trainer.position.epoch,
        batch_size=args.batch_size,
        seed=args.seed,
        augment=augment,
        callbacks=callbacks,
        progress=not args.quiet,
    )


def _sending(augment: Augmentation) -> Augmentation:
    """Send what `augment` returns to the GPU."""
    return lambda x, rng: to_gpu(augment(x, rng))


def _draw(trainer: Trainer, test: Dataset, folder: Run) -> list[Path]:
    """Write the pictures of a run that has ended."""
    model = to_cpu(trainer).model
    probabilities, _ = ops.softmax_forward(trainer.predict(test.x))
    figures = {
        "curves": plots.plot_history(trainer.history),
        "confusion": plots.plot_confusion(test.y, probabilities.argmax(axis=1), test.classes),
        "filters": plots.plot_filters(next(p for _, p, _ in model.named_params() if p.ndim == 4)),
        "mistakes": plots.plot_mistakes(test.x, test.y, probabilities, test.classes),
    }
    return [folder.write_figure(name, figure) for name, figure in figures.items()]


def _report(
    args: argparse.Namespace, trainer: Trainer, pictures: list[Path], seconds: float
) -> None:
    last = trainer.history[-1]
    print(
        f"test accuracy {last['test_accuracy']:.2%}, loss {last['test_loss']:.4f} after "
        f"{_epochs(args)} in {seconds:.0f} s"
    )
    if not args.quiet:
        print("\n".join(f"  {path}" for path in pictures))
        print(f"next: minicnn predict PICTURE --run {shlex.quote(str(args.out))}")
