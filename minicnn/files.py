"""Writing files so that a crash leaves the old one or the new one, whole."""

from __future__ import annotations

import glob
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedRandom
from pathlib import Path

STALE_SECONDS = 24 * 3600


def sweep(folder: Path, name: str = "*", age: float = STALE_SECONDS) -> None:
    """Remove what killed processes left of their files `name`, if it is `age` seconds old.

    A younger file may be another process's work at hand; a caller that has the folder to itself
    says 0. The name ``"*"`` stands for all files.
    """
    pattern = "*" if name == "*" else glob.escape(name)
    for stale in folder.glob(f".{pattern}.{'[0-9a-f]' * 32}.part"):
        with suppress(FileNotFoundError):  # another process may be sweeping too
            if time.time() - stale.stat().st_mtime >= age:
                stale.unlink()


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """Open a new file that takes the place of `path` when the block ends well.

    Until then `path` is untouched, so neither an exception nor a power cut leaves half a file.
    Remains of earlier processes that were killed in the block are removed after a day.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder {path.parent}, got none")
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected the name of a file, got a folder")
    sweep(path.parent, path.name)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with open(part, "x+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if error.filename is None:  # a full disk does not say which file was being written
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)
    if os.name == "posix":  # elsewhere a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
