"""IDX files: what is written comes back, and nothing damaged is taken for data."""

import gzip
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn.data.idx import DTYPES, read_idx, write_idx
from minicnn.data.mnist import DIGITS_FOLDER
from strategies import laid_out, layouts, seeds

SMALL = np.arange(24, dtype=np.int16).reshape(2, 3, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a hypothesis test."""
    return tmp_path_factory.mktemp("idx")


def idx_bytes(code, shape, data=b""):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, code, len(shape), *shape) + data


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@given(
    dtype=st.sampled_from(list(DTYPES.values())),
    shape=st.lists(st.integers(0, 4), max_size=4),
    layout=layouts,
    suffix=st.sampled_from(["", ".gz", ".GZ"]),
    seed=seeds,
)
def test_what_is_written_comes_back(folder, dtype, shape, layout, suffix, seed):
    raw = np.random.default_rng(seed).integers(-100, 100, shape)
    array = np.asarray(raw, dtype.newbyteorder("="))
    path = folder / f"array{suffix}"
    write_idx(path, laid_out(array, layout) if array.ndim else array)
    back = read_idx(path)
    assert back.dtype == array.dtype
    assert back.dtype.isnative
    assert back.shape == array.shape
    assert back.flags.c_contiguous
    assert back.flags.writeable
    np.testing.assert_array_equal(back, array)


def test_layout_of_the_bytes(tmp_path):
    write_idx(tmp_path / "a", np.array([[1, -2]], np.int32))
    expected = b"\0\0\x0c\2" + b"\0\0\0\1" + b"\0\0\0\2" + b"\0\0\0\1" + b"\xff\xff\xff\xfe"
    assert (tmp_path / "a").read_bytes() == expected


def test_gz_bytes_repeat(tmp_path):
    write_idx(tmp_path / "a.gz", SMALL)
    write_idx(tmp_path / "b.gz", SMALL)
    assert (tmp_path / "a.gz").read_bytes() == (tmp_path / "b.gz").read_bytes()
    assert (tmp_path / "a.gz").read_bytes()[4:8] == bytes(4)  # the time stamp


@pytest.mark.parametrize("dtype", ["bool", "int64", "uint16", "float16", "complex64", "U1", "O"])
def test_write_refuses_other_dtypes(tmp_path, dtype):
    with pytest.raises(TypeError, match=r"write_idx: array: expected dtype uint8, .*got"):
        write_idx(tmp_path / "a", np.zeros(3, dtype))
    assert list(tmp_path.iterdir()) == []


def test_write_refuses_a_size_beyond_four_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"sizes below 2\*\*32, got \(4294967296,\)"):
        write_idx(tmp_path / "a", np.broadcast_to(np.uint8(0), 1 << 32))


def test_write_into_a_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected a folder .*missing"):
        write_idx(tmp_path / "missing" / "a", SMALL)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing-here"):
        read_idx(tmp_path / "nothing-here.gz")


HUGE = (0xFFFFFFFF,) * 3
DAMAGED = {
    "empty": (b"", "magic: .* got an empty file"),
    "magic cut": (b"\0\0\x08", "magic: .* got"),
    "magic": (b"\x01\0\x08\x01\0\0\0\0", "magic: .* got"),
    "pickle": (pickle.dumps([1]), "magic: .* got"),
    "html": (b"\n<!DOCTYPE html><p>Not found", "magic: .* an HTML or XML page"),
    "dtype code": (idx_bytes(0x0A, [1], b"1"), "dtype code: expected one of 0x08, .*, got 0x0a"),
    "ndim": (b"\0\0\x08\x41" + bytes(4 * 65), "ndim: expected at most 64, got 65"),
    "header cut": (b"\0\0\x08\3" + bytes(7), "header: expected 16 bytes for 3 sizes, got 11"),
    "shorter": (idx_bytes(0x0C, [3], bytes(11)), r"expected 12 bytes .*\(3,\) of int32, got"),
    "longer": (idx_bytes(0x08, [3], bytes(4)), r"expected 3 bytes .*\(3,\) of uint8, got more"),
    "size of a large disk": (
        idx_bytes(0x08, [1 << 20, 1 << 20]),
        "expected 1099511627776 bytes .* got",
    ),
    "overflow": (idx_bytes(0x0E, HUGE), "sizes: expected an array that fits memory"),
    "overflow to 0": (idx_bytes(0x08, [1 << 31] * 4), "sizes: expected an array that fits"),
    "overflow beside 0": (idx_bytes(0x08, (*HUGE, 0)), "sizes: expected an array that fits"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_damage_is_named(tmp_path, content, message, compressed):
    path = tmp_path / ("bad-file.gz" if compressed else "bad-file")
    path.write_bytes(gzip.compress(content) if compressed else content)
    with pytest.raises(ValueError, match=f"(?s)bad-file.*: {message}"):
        read_idx(path)


@pytest.mark.parametrize("content", [b"", b"<html>", b"\0\0\x08\1", b"\x1f"])
def test_no_gzip_in_a_gz(tmp_path, content):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.gz: expected gzip data, got "):
        read_idx(tmp_path / "a.gz")


def test_gzip_under_another_name(tmp_path):
    write_idx(tmp_path / "a.gz", SMALL)
    (tmp_path / "a.gz").rename(tmp_path / "a")
    with pytest.raises(ValueError, match=r"has to end in \.gz"):
        read_idx(tmp_path / "a")


def test_every_1000th_cut_of_a_gz(tmp_path):
    whole = (DIGITS_FOLDER / "t10k-images-idx3-ubyte.gz").read_bytes()
    path = tmp_path / "cut.gz"
    cuts = [*range(0, len(whole), 1000), len(whole) - 8, len(whole) - 1]
    for cut in cuts:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut\.gz: expected"):
            read_idx(path)
    path.write_bytes(whole)
    assert read_idx(path).shape == (1000, 28, 28)


def test_every_cut_of_a_plain_file(tmp_path):
    path = tmp_path / "cut"
    write_idx(path, SMALL)
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"cut: "):
            read_idx(path)


def test_every_flipped_bit_of_a_gz(tmp_path):
    """Every bit matters but gzip's notes such as the time stamp, and what fills the last byte."""
    path = tmp_path / "flipped.gz"
    write_idx(path, SMALL)
    whole = path.read_bytes()
    passed = set()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        try:
            np.testing.assert_array_equal(read_idx(path), SMALL)
            passed.add(bit // 8)
        except ValueError as error:
            assert "flipped.gz: " in str(error)  # noqa: PT017
    assert passed <= {*range(3, 10), len(whole) - 9}


@pytest.mark.parametrize("tail", [b"x", b"\x1f\x8b", gzip.compress(b"x")])
def test_bytes_after_the_gzip_data(tmp_path, tail):
    write_idx(tmp_path / "a.gz", SMALL)
    with open(tmp_path / "a.gz", "ab") as file:
        file.write(tail)
    with pytest.raises(ValueError, match=r"a\.gz: expected"):
        read_idx(tmp_path / "a.gz")


def test_bomb_is_not_unpacked(tmp_path):
    path = tmp_path / "bomb.gz"
    with gzip.open(path, "wb", 1) as file:
        file.write(idx_bytes(0x08, [10]))
        for _ in range(64):
            file.write(bytes(1 << 20))

    def read():
        with pytest.raises(ValueError, match=r"bomb\.gz: expected 10 bytes .* got more"):
            read_idx(path)

    assert peak_bytes(read) < 4 << 20


@pytest.mark.parametrize("compressed", [False, True])
def test_sizes_are_refused_before_allocation(tmp_path, compressed):
    path = tmp_path / ("big.gz" if compressed else "big")
    content = idx_bytes(0x08, [1 << 10, 1 << 10, 1 << 10], bytes(1000))
    path.write_bytes(gzip.compress(content) if compressed else content)

    def read():
        with pytest.raises(ValueError, match=r"1073741824 bytes .*, got a file of only"):
            read_idx(path)

    assert peak_bytes(read) < 4 << 20


class Payload:
    """Unpickling this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("compressed", [False, True])
def test_pickle_is_not_executed(tmp_path, compressed):
    target = tmp_path / "executed"
    payload = pickle.dumps(Payload(target))
    path = tmp_path / ("a.gz" if compressed else "a")
    path.write_bytes(gzip.compress(payload) if compressed else payload)
    with pytest.raises(ValueError, match="magic"):
        read_idx(path)
    assert not target.exists()
    pickle.loads(payload)  # the payload is a real one
    assert target.exists()


def test_kill_leaves_the_old_or_the_new_file(tmp_path):
    """Kill a process that writes without pause; what it wrote last has to be whole."""
    path = tmp_path / "a.gz"
    script = (
        "import sys, itertools, numpy as np\n"
        "from minicnn.data.idx import write_idx\n"
        "for i in itertools.count():\n"
        "    write_idx(sys.argv[1], np.random.default_rng(i).integers(0, 9, 50000, np.uint8))\n"
        "    print(flush=True)\n"
    )
    for _ in range(4):
        child = subprocess.Popen([sys.executable, "-c", script, path], stdout=subprocess.PIPE)
        with child:
            child.stdout.readline()
            time.sleep(0.01)
            child.kill()
        array = read_idx(path)
        assert array.shape == (50000,)
        path.unlink()
