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


@contextmanager
def replacing(path: Path) -> Iterator[BufferedRandom]:
    """Open a new file that takes the place of `path` when the block ends well.

    Until then `path` is untouched, so neither an exception nor a power cut leaves half a file.
    Remains of earlier processes that were killed in the block are removed after a day.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: expected a folder {path.parent}, got none")
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(FileNotFoundError):  # another process may be sweeping too
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                stale.unlink()
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
