"""A folder that one process alone writes to."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from minicnn.files import sweep

try:
    import fcntl
except ImportError:
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


@contextmanager
def alone(folder: Path, fix: str = "") -> Iterator[None]:
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
