"""Atomic writing: after any failure the old file is whole and nothing else lies about."""

import os
import time

import pytest

from minicnn.files import STALE_SECONDS, replacing, sweep


def write(path, content):
    with replacing(path) as file:
        file.write(content)


def test_new_content_takes_the_place_of_the_old(tmp_path):
    path = tmp_path / "a"
    write(path, b"old")
    with replacing(path) as file:
        file.write(b"new")
        assert path.read_bytes() == b"old", "the old file must stay until the block ends"
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_who_has_the_old_file_open_goes_on_reading_it(tmp_path):
    """The new file takes the old one's name, not its place on the disk."""
    path = tmp_path / "a"
    write(path, b"old")
    with open(path, "rb") as reader:
        write(path, b"new")
        assert reader.read() == b"old"


def test_an_error_in_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "a"
    write(path, b"old")

    def interrupted():
        with replacing(path) as file:
            file.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write(path, b"old")

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_remains_of_a_killed_write_are_swept_after_a_day(tmp_path):
    hexes = f"{'0' * 32}", f"{'f' * 32}"
    old, new = (tmp_path / f".a[1].{end}.part" for end in hexes)
    other = tmp_path / f".b.{hexes[0]}.part"
    for path in (old, new, other):
        path.touch()
    for path in (old, other):
        os.utime(path, (0, time.time() - STALE_SECONDS - 60))
    write(tmp_path / "a[1]", b"")
    assert set(tmp_path.iterdir()) == {tmp_path / "a[1]", new, other}


def test_who_has_the_folder_alone_sweeps_all_at_once(tmp_path):
    for name in (f".a.{'0' * 32}.part", f".b.{'c' * 32}.part", "a.part", ".mine.part"):
        (tmp_path / name).touch()
    sweep(tmp_path, age=0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.part", "a.part"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder .*missing"):
        write(tmp_path / "missing" / "a", b"")


def test_a_folder_of_that_name_is_named(tmp_path):
    with (
        pytest.raises(IsADirectoryError, match="expected the name of a file, got a folder"),
        replacing(tmp_path),
    ):
        pass
    assert list(tmp_path.parent.glob(".*.part")) == []
