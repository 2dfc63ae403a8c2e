"""Weights in safetensors files, which ``torch.nn.Sequential`` models of the same layers read too.

Each tensor's sha256 stands in the file's metadata, so that a flipped bit is noticed; nothing is
ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from minicnn.backend import to_cpu
from minicnn.files import replacing
from minicnn.layers import Layer

DIGESTS = "minicnn.sha256"  # metadata key: a JSON object from tensor name to hex digest


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
    from safetensors.numpy import save as to_bytes

    # safetensors writes wrong values for arrays that are not C-contiguous.
    state = {name: np.array(to_cpu(a), order="C") for name, a in model.state_dict().items()}
    digests = json.dumps({name: _digest(a) for name, a in state.items()}, sort_keys=True)
    with replacing(Path(path)) as file:
        file.write(to_bytes(state, {DIGESTS: digests}))


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
        If it is no whole safetensors file, if a tensor's sha256 differs from the stored one, or
        if its keys or shapes are not the model's.
    """
    model.load_state_dict(load_arrays(path))
    return model


def load_arrays(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Read all arrays of a safetensors file and check them against their stored sha256."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a weight file, got none")
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError) as error:  # TypeError: a dtype that NumPy lacks
        raise ValueError(f"{path}: expected a whole safetensors file, got: {error}") from error
    if DIGESTS in metadata:
        _check_digests(path, state, metadata[DIGESTS])
    return state


def _check_digests(path: Path, state: dict[str, np.ndarray], stored: str) -> None:
    try:
        digests = dict(json.loads(stored))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path}: {DIGESTS}: expected a JSON object, got {stored!r:.80}"
        ) from error
    for name, a in state.items():
        if digests.get(name) != _digest(a):
            raise ValueError(
                f"{path}: {name}: expected sha256 {digests.get(name)}, got {_digest(a)} "
                "(the file is damaged; use another copy)"
            )


def _digest(a: np.ndarray) -> str:
    header = f"{a.dtype.str}{a.shape}".encode()
    return hashlib.sha256(header + a.tobytes()).hexdigest()
