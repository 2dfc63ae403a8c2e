"""Weights and whole trainings in safetensors files; nothing is ever unpickled.

A file of weights is one that ``torch.nn.Sequential`` models of the same layers read too. A
checkpoint of a training holds the optimiser's arrays as well, and in the file's metadata, as
JSON, everything that is no array. Each tensor's sha256 stands in the metadata, so that a flipped
bit is noticed.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from minicnn.backend import to_cpu
from minicnn.files import replacing
from minicnn.layers import Layer
from minicnn.shapes import integer, number
from minicnn.train import Position, Trainer

DIGESTS = "minicnn.sha256"  # metadata key: a JSON object from tensor name to hex digest
TRAINING = "minicnn.training"  # metadata key, and among the digests: all that is no array
MODEL, OPTIMIZER = "model.", "optimizer."  # what the names of a checkpoint's tensors begin with


class DamagedError(ValueError):
    """A file is not, to the last bit, what was written."""


def save(model: Layer, path: str | os.PathLike[str]) -> None:
    """Write a model's parameters and buffers; an older file stays until the new one is whole.

    Parameters
    ----------
    model : Layer
        On the CPU or the GPU.
    path : path-like
        Usually named ``*.safetensors``.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    _write(Path(path), model.state_dict())


def load(model: Layer, path: str | os.PathLike[str]) -> Layer:
    """Read parameters and buffers into a model of the same layers; returns the model.

    Parameters
    ----------
    model : Layer
        Left as it is if anything is wrong with the file.
    path : path-like
        Written by `save`, or by safetensors from a ``torch.nn.Sequential``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no whole safetensors file, if a tensor's sha256 differs from the stored one (both
        as `DamagedError`), or if its keys or shapes are not the model's.
    """
    model.load_state_dict(load_arrays(path))
    return model


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file and check them against their stored sha256."""
    return _read(Path(path))[0]


def save_training(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Write all that a training goes on from; an older file stays until the new one is whole.

    That is the model's parameters and buffers, the states of its layers' random generators, the
    optimiser's arrays, step and learning rate, the position in the epoch, and the history. The
    optimiser's other settings, the schedule and `clip_norm` are written down to be compared.

    Parameters
    ----------
    trainer : Trainer
        On the CPU or the GPU, between two steps.
    path : path-like
        Usually named ``*.safetensors``.

    Raises
    ------
    OSError
        If the file cannot be written.

    Examples
    --------
    >>> import numpy as np, tempfile
    >>> from minicnn import Linear, Trainer, optim
    >>> x, y = np.ones((4, 2), np.float32), np.array([0, 1, 0, 1])
    >>> def trainer():
    ...     model = Linear(2, 2, rng=0)
    ...     return Trainer(model, optim.Adam(model))
    >>> first, second = trainer(), trainer()
    >>> _ = first.step(x, y)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_training(first, f"{folder}/checkpoint.safetensors")
    ...     _ = load_training(second, f"{folder}/checkpoint.safetensors")
    >>> first.step(x, y) == second.step(x, y)
    True
    """
    arrays = {f"{MODEL}{name}": a for name, a in trainer.model.state_dict().items()}
    arrays |= {f"{OPTIMIZER}{name}": a for name, a in trainer.optimizer.state_dict().items()}
    state = {
        "settings": _settings(trainer),
        "lr": trainer.optimizer.lr,
        "position": asdict(trainer.position),
        "history": trainer.history,
        "generators": {
            name: rng.bit_generator.state for name, rng in trainer.model.named_generators()
        },
    }
    # Python's JSON gives floats back to the last bit, and whole numbers of any size.
    _write(Path(path), arrays, json.dumps(state, default=np.ndarray.tolist))


def load_training(trainer: Trainer, path: str | os.PathLike[str]) -> Trainer:
    """Let a trainer go on where another one was written by `save_training`; returns the trainer.

    With the same data and seed its `fit` then does, bit for bit, what the other one would have
    done.

    Parameters
    ----------
    trainer : Trainer
        Built as the other one was. Left as it is if anything is wrong.
    path : path-like

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is damaged (`DamagedError`) or holds weights alone, or if the trainer has
        another model, optimiser, setting, schedule or `clip_norm` than the one that was written.
    """
    path = Path(path)
    arrays, metadata = _read(path)
    if TRAINING not in metadata:
        raise ValueError(
            f"{path}: expected the checkpoint of a training, got a file of weights alone "
            "(fix: minicnn.load)"
        )
    state = _training_state(path, metadata)
    settings, own = state["settings"], _settings(trainer)
    for name in {**settings, **own}:
        if settings.get(name) != own.get(name):
            raise ValueError(
                f"{path}: {name}: expected a trainer with {settings.get(name)}, got one with "
                f"{own.get(name)} (fix: build it with the settings of the one that was saved)"
            )
    generators = dict(trainer.model.named_generators())
    if generators.keys() != state["generators"].keys():
        raise ValueError(
            f"{path}: generators: expected a model with {sorted(state['generators'])}, got one "
            f"with {sorted(generators)}"
        )
    model, optimizer = trainer.model, trainer.optimizer
    before = model.state_dict(), optimizer.state_dict(), _generator_states(generators)
    try:
        model.load_state_dict(_named(arrays, MODEL))
        optimizer.load_state_dict(_named(arrays, OPTIMIZER))
        for name, rng in generators.items():
            rng.bit_generator.state = state["generators"][name]
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
        for name, rng in generators.items():
            rng.bit_generator.state = before[2][name]
        raise ValueError(f"{path}: {error}") from error
    optimizer.lr = state["lr"]
    trainer.position = state["position"]
    trainer.history[:] = state["history"]
    return trainer


def _settings(trainer: Trainer) -> dict[str, Any]:
    """What two trainers must have in common for one to go on where the other ended."""
    optimizer = trainer.optimizer
    names = inspect.signature(type(optimizer)).parameters.keys() - {"model", "lr"}
    settings = {
        "optimizer": type(optimizer).__name__,
        # A function's text holds its address, which is another one in each process.
        "schedule": re.sub(" at 0x[0-9a-f]+", "", repr(trainer.schedule)),
        "clip_norm": trainer.clip_norm,
    }
    settings |= {
        name: getattr(optimizer, name) for name in sorted(names) if hasattr(optimizer, name)
    }
    return json.loads(json.dumps(settings))  # tuples are lists in a file


def _training_state(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Parse and check what a checkpoint holds beside its arrays."""
    text = metadata[TRAINING]
    if _digests(path, metadata).get(TRAINING) != _text_digest(text):
        raise DamagedError(
            f"{path}: {TRAINING}: expected another sha256 (the file is damaged; use another copy)"
        )
    try:
        state = dict(json.loads(text))
        position = Position(**state["position"])
        for name in ("epoch", "batch", "samples", "correct"):
            integer("position", name, getattr(position, name), 0)
        for name in ("loss", "seconds"):
            setattr(position, name, float(getattr(position, name)))
        if not all(isinstance(record, dict) for record in state["history"]):
            raise TypeError("history: expected a list of objects")
        return {
            "settings": dict(state["settings"]),
            "lr": number("optimizer", "lr", state["lr"], ge=0),
            "position": position,
            "history": list(state["history"]),
            "generators": dict(state["generators"]),
        }
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(
            f"{path}: {TRAINING}: expected the state of a training: {error}"
        ) from error


def _named(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name[len(prefix) :]: a for name, a in arrays.items() if name.startswith(prefix)}


def _generator_states(generators: dict[str, np.random.Generator]) -> dict[str, Any]:
    return {name: rng.bit_generator.state for name, rng in generators.items()}


def _write(path: Path, arrays: dict[str, Any], training: str | None = None) -> None:
    from safetensors.numpy import save as to_bytes

    # safetensors writes wrong values for arrays that are not C-contiguous.
    arrays = {name: np.array(to_cpu(a), order="C") for name, a in arrays.items()}
    digests = {name: _digest(a) for name, a in arrays.items()}
    metadata = {}
    if training is not None:
        metadata[TRAINING] = training
        digests[TRAINING] = _text_digest(training)
    metadata[DIGESTS] = json.dumps(digests, sort_keys=True)
    with replacing(path) as file:
        file.write(to_bytes(arrays, metadata))


def _read(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """All arrays of a file, checked against their sha256, and its metadata."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a weight file, got none")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy lacks
        raise DamagedError(f"{path}: expected a whole safetensors file, got: {error}") from error
    if DIGESTS in metadata:
        digests = _digests(path, metadata)
        for name, a in arrays.items():
            if digests.get(name) != _digest(a):
                raise DamagedError(
                    f"{path}: {name}: expected sha256 {digests.get(name)}, got {_digest(a)} "
                    "(the file is damaged; use another copy)"
                )
    return arrays, metadata


def _digests(path: Path, metadata: dict[str, str]) -> dict[str, str]:
    stored = metadata.get(DIGESTS, "null")
    try:
        return dict(json.loads(stored))
    except (ValueError, TypeError) as error:
        raise DamagedError(
            f"{path}: {DIGESTS}: expected a JSON object, got {stored!r:.80}"
        ) from error


def _digest(a: np.ndarray) -> str:
    header = f"{a.dtype.str}{a.shape}".encode()
    return hashlib.sha256(header + a.tobytes()).hexdigest()


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
