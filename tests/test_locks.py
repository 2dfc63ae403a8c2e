"""A folder for one process alone, and what the others are told."""

import os
import subprocess
import sys

import pytest

from minicnn import locks
from minicnn.runs import new_run


def test_a_folder_that_stays_empty_is_removed(tmp_path):
    with pytest.raises(RuntimeError, match="no data"), new_run(tmp_path / "r"):
        raise RuntimeError("no data")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/none"])
def test_an_unwritable_folder_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=f"^{folder}: expected a folder that can be"), new_run(folder):
        pass


def test_the_second_process_is_told_of_the_first(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "r"], stdout=subprocess.PIPE, text=True
    )
    with other, other.stdout:
        assert other.stdout.readline() == "locked\n"
        with (
            pytest.raises(FileExistsError, match=f"process {other.pid} on "),
            new_run(tmp_path / "r"),
        ):
            pass
        other.kill()
    # Killed, it left its lock file behind; that holds nobody up.
    assert (tmp_path / "r" / ".lock").exists()
    with new_run(tmp_path / "r"):
        text = (tmp_path / "r" / ".lock").read_text()
    assert text.startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / "r").exists()


HOLD = """
import sys, time
from minicnn.runs import new_run
with new_run(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_file_that_vanishes_while_one_waits(tmp_path, monkeypatch):
    """Between our open and our lock its holder may end and remove the file."""
    real, calls = locks.fcntl.flock, []

    def flock(file, how):
        calls.append(file)
        if len(calls) == 1:
            (tmp_path / ".lock").unlink()
        real(file, how)

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    (tmp_path / "other").touch()
    with new_run(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith("process")
        with pytest.raises(FileExistsError, match="is at work"), new_run(tmp_path):
            pass
    assert len(calls) == 3
