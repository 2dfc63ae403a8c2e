"""Faults of the disk, and files that somebody damaged or made up."""

import errno
import json
import os
import random
import resource
import struct
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest

from minicnn import Linear, Trainer, save
from minicnn.checkpoint import DamagedError, load_arrays, load_training, save_training
from minicnn.optim import Adam

# ------------------------------------------------------------ safetensors


def crafted(header, data=b"", length=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(crafted({"a": tensor(0, 4), "b": tensor(0, 4)}, bytes(4)), id="overlap"),
        pytest.param(crafted({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), id="hole"),
        pytest.param(crafted({"a": tensor(0, 4)}, bytes(8)), id="trailing bytes"),
        pytest.param(crafted({"a": tensor(0, 8)}, bytes(8)), id="shape smaller than its bytes"),
        pytest.param(crafted({"a": tensor(0, 4, (2**40,))}, bytes(4)), id="4 TB announced"),
        pytest.param(crafted({"a": tensor(0, 4, (2**33, 2**33))}, bytes(4)), id="2**66 elements"),
        pytest.param(crafted({"a": tensor(0, 2**62)}, bytes(4)), id="offset beyond the file"),
        pytest.param(crafted({"a": tensor(4, 0)}, bytes(4)), id="offsets in reverse"),
        pytest.param(crafted({"a": tensor(0, 4, (-1,))}, bytes(4)), id="negative size"),
        pytest.param(crafted({"a": tensor(0, 4, dtype="F33")}, bytes(4)), id="unknown dtype"),
        pytest.param(crafted({}, length=2**63), id="huge header"),
        pytest.param(crafted({}, length=2**30), id="header longer than the file"),
        pytest.param(crafted(b"{" * 60), id="no JSON"),
        pytest.param(crafted(b"\xff\xfe\x00"), id="no UTF-8"),
        pytest.param(b"<!DOCTYPE html><html><body>404</body></html>", id="a web page"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_made_up_safetensors_are_refused_before_memory_is_asked_for(content, tmp_path):
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(DamagedError, match="w: expected a whole safetensors file, got: "):
        load_arrays(tmp_path / "w")


def trainer(seed=0, n=8):
    model = Linear(n, n, rng=seed)
    return Trainer(model, Adam(model))


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_pickle_in_place_of_a_checkpoint_is_not_executed(tmp_path):
    """Neither as the file, nor as a text in its metadata."""
    import pickle

    from safetensors.numpy import save as to_bytes

    bomb = pickle.dumps(Bomb(tmp_path / "executed"), protocol=0)
    pickle.loads(bomb).close()
    assert (tmp_path / "executed").exists(), "the bomb must work"
    (tmp_path / "executed").unlink()
    (tmp_path / "a").write_bytes(bomb)
    text = bomb.decode("ascii")
    metadata = {"minicnn.training": text, "minicnn.sha256": text}
    (tmp_path / "b").write_bytes(to_bytes({"a": np.zeros(1)}, metadata))
    for name in "ab":
        with pytest.raises(ValueError, match=f"{name}: "):
            load_training(trainer(), tmp_path / name)
    assert not (tmp_path / "executed").exists()


# ------------------------------------------------------------ a disk that is full


def state(trainer):
    arrays = {**trainer.model.state_dict(), **trainer.optimizer.state_dict()}
    return {name: a.tobytes() for name, a in arrays.items()}


def assert_old_checkpoint_survives(write, folder, error):
    first, later = trainer(0), trainer(1)
    save_training(first, folder / "c")
    with pytest.raises(OSError, match="c") as caught:
        write(later, folder / "c")
    assert caught.value.errno == error
    assert [path.name for path in folder.iterdir()] == ["c"]
    assert state(load_training(trainer(2), folder / "c")) == state(first)
    return first


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path / "disk"]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a file system needs root")
    try:
        yield tmp_path / "disk"
    finally:
        subprocess.run(["umount", tmp_path / "disk"], check=True)


def fill(path):
    """Write until there is no room."""
    with open(path, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_keeps_the_last_checkpoint(small_disk):
    def write(later, path):
        fill(path.parent / "other")
        try:
            save_training(later, path)
        finally:
            (path.parent / "other").unlink()

    assert_old_checkpoint_survives(write, small_disk, errno.ENOSPC)


def test_a_file_that_may_not_grow_keeps_the_last_checkpoint(tmp_path):
    def write(later, path):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        try:
            save_training(later, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    assert_old_checkpoint_survives(write, tmp_path, errno.EFBIG)


TRAIN = """
import os, sys
from minicnn.cli import main
if sys.argv[1] != "-1":  # after the imports: the interpreter may lie where others cannot read
    os.setgroups([])
    os.setgid(int(sys.argv[1]))
    os.setuid(int(sys.argv[1]))
sys.exit(main(sys.argv[2:]))
"""


def cli(*argv, user=-1):
    return subprocess.run(
        [sys.executable, "-c", TRAIN, str(user), *map(str, argv)], capture_output=True, text=True
    )


def test_a_disk_without_room_is_noticed_before_the_first_update(small_disk):
    """The reference network's checkpoint takes 2 MB."""
    done = cli("train", "--device", "cpu", "--quiet", "--out", small_disk / "r")
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert done.stderr.count("\n") == 1
    assert {path.name for path in (small_disk / "r").iterdir()} == {"config.json"}


# ------------------------------------------------------------ a folder that may not be written to


def refused(folder, user=-1):
    done = cli("train", "--device", "cpu", "--quiet", "--out", folder, user=user)
    assert done.returncode == 1
    assert done.stderr.startswith(
        f"minicnn: error: {folder}: expected a folder that can be written to, got: "
    )
    assert done.stderr.count("\n") == 1
    assert not list(folder.iterdir())


def test_another_users_folder_is_refused_at_the_start(tmp_path):
    """Root may write everywhere, so it becomes nobody first."""
    folder = tmp_path / "r"
    folder.mkdir(mode=0o555)
    if os.geteuid() != 0:
        refused(folder)
    else:
        for parent in (tmp_path, *tmp_path.parents[:2]):  # pytest keeps them to itself
            parent.chmod(0o755)
        refused(folder, user=65534)


def test_an_immutable_folder_is_refused_at_the_start(tmp_path):
    folder = tmp_path / "r"
    folder.mkdir()
    try:
        subprocess.run(["chattr", "+i", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("chattr needs root and a file system that knows it")
    try:
        refused(folder)
    finally:
        subprocess.run(["chattr", "-i", folder], check=True)


# ------------------------------------------------------------ kills


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_kills_lose_nothing(tmp_path):
    """A short run of `kill_resume.py`, in a process that has no threads to fork."""
    script = f"""
import random, sys
from pathlib import Path
sys.path.insert(0, {str(os.path.dirname(os.path.dirname(__file__)))!r})
import kill_resume
folder = Path(sys.argv[1])
lifetime = kill_resume.undisturbed(folder)
within, runs, complaints = kill_resume.kill_and_resume(
    folder, 16, random.Random(1), lifetime, lambda n: None)
assert within >= 1, within
assert not complaints, complaints
"""
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)


@pytest.mark.parametrize("seed", range(3))
def test_random_damage_is_noticed(seed, tmp_path):
    """Bytes changed, cut out, put in: refused, or of no account."""
    rng, path = random.Random(seed), tmp_path / "c"
    save_training(trainer(), path)
    whole, expected = path.read_bytes(), state(trainer())
    for _ in range(60):
        damaged = bytearray(whole)
        at = rng.randrange(len(whole))
        how = rng.randrange(3)
        if how == 0:
            damaged[at] ^= rng.randrange(1, 256)
        elif how == 1:
            del damaged[at : at + rng.randrange(1, 9)]
        else:
            damaged[at:at] = rng.randbytes(rng.randrange(1, 9))
        path.write_bytes(damaged)
        other = trainer(5)
        before = state(other)
        try:
            load_training(other, path)
        except ValueError:
            assert state(other) == before
        else:
            assert state(other) == expected


def test_weights_are_safe_too(tmp_path):
    model = Linear(8, 8, rng=0)
    save(model, tmp_path / "w")
    before = (tmp_path / "w").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(Linear(8, 8, rng=1), tmp_path / "w")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "w").read_bytes() == before
