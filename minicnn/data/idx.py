"""Reading and writing IDX files, the plain array format of MNIST.

An IDX file is a header and the numbers, everything big-endian::

    0x00 0x00 | dtype code | ndim | ndim sizes, 4 bytes each | the numbers in C order

A name that ends in ``.gz`` means that the whole file is gzip-compressed.

References
----------
Y. LeCun, C. Cortes, C. J. C. Burges, "The MNIST database of handwritten digits", 1998
(the section on file formats).
"""

from __future__ import annotations

import gzip
import math
import os
import sys
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np

from minicnn.files import replacing

DTYPES = {
    code: np.dtype(name)
    for code, name in {
        0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8",
    }.items()
}  # fmt: skip

CHUNK = 1 << 20
MAX_NDIM = 64  # what NumPy can hold; the format could say 255
MAX_INFLATION = 1032  # deflate never packs more bytes than this into one


def read_idx(path: str | os.PathLike[str]) -> np.ndarray:
    """Read an IDX file.

    Parameters
    ----------
    path
        File to read; gzip-compressed if its name ends in ``.gz``.

    Returns
    -------
    ndarray
        Native-endian, C-contiguous and writable; dtype uint8, int8, int16, int32, float32
        or float64.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        The file is not exactly one whole IDX array: wrong magic or dtype code, shorter or
        longer than its header says, sizes no memory can hold, or damaged gzip data. Memory is
        asked for only after the sizes have been checked against the size of the file.
    """
    path = Path(path)
    with open(path, "rb") as file:
        return read_idx_stream(file, str(path), compressed=path.suffix.lower() == ".gz")


def read_idx_stream(file: BufferedIOBase, name: str, compressed: bool) -> np.ndarray:
    """Read IDX data from an open file (see `read_idx`); `name` is what errors call it."""
    size = os.fstat(file.fileno()).st_size
    if not compressed:
        return _parse(file, name, size, limit=size)
    start = file.read(16)
    if start[:2] != b"\x1f\x8b":
        raise ValueError(f"{name}: expected gzip data, got {_describe(start)}")
    file.seek(0)
    try:
        with gzip.GzipFile(fileobj=file, mode="rb") as stream:
            return _parse(stream, name, size, limit=size * MAX_INFLATION)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(
            f"{name}: expected whole gzip data, got {size} damaged or cut bytes ({error}); "
            "get the file again"
        ) from error


def _parse(stream: BufferedIOBase, name: str, size: int, limit: int) -> np.ndarray:
    """Read one array from a file of `size` bytes that holds at most `limit` bytes of content."""
    magic = stream.read(4)
    if len(magic) < 4 or magic[:2] != b"\0\0":
        raise ValueError(f"{name}: magic: expected 00 00, dtype code, ndim, got {_describe(magic)}")
    code, ndim = magic[2], magic[3]
    if code not in DTYPES:
        known = ", ".join(f"0x{known:02x}" for known in DTYPES)
        raise ValueError(f"{name}: dtype code: expected one of {known}, got 0x{code:02x}")
    if ndim > MAX_NDIM:
        raise ValueError(f"{name}: ndim: expected at most {MAX_NDIM}, got {ndim}")

    header = stream.read(4 * ndim)
    if len(header) < 4 * ndim:
        raise ValueError(
            f"{name}: header: expected {4 + 4 * ndim} bytes for {ndim} sizes, got {4 + len(header)}"
        )
    shape = tuple(int.from_bytes(header[i : i + 4], "big") for i in range(0, 4 * ndim, 4))
    dtype = DTYPES[code]
    # Python integers: NumPy's would wrap. NumPy itself refuses on the non-zero sizes alone.
    if math.prod(n for n in shape if n) * dtype.itemsize > sys.maxsize:
        raise ValueError(f"{name}: sizes: expected an array that fits memory, got shape {shape}")
    expected = math.prod(shape) * dtype.itemsize
    says = f"{expected} bytes of data for shape {shape} of {dtype.newbyteorder('=')}"
    if len(magic) + len(header) + expected > limit:
        raise ValueError(f"{name}: expected {says}, got a file of only {size} bytes")

    data = np.empty(expected, np.uint8)
    view, filled = data.data, 0
    while filled < expected:
        n = stream.readinto(view[filled : filled + CHUNK])
        if not n:
            raise ValueError(f"{name}: expected {says}, got {filled} bytes")
        filled += n
    if stream.read(1):  # at the end of gzip data this also compares its checksum
        raise ValueError(f"{name}: expected {says}, got more (the file has {size} bytes)")
    return data.view(dtype).reshape(shape).astype(dtype.newbyteorder("="), copy=False)


def _describe(start: bytes) -> str:
    if start.lstrip()[:1] == b"<":
        return f"{start!r}: an HTML or XML page, not the file; look at the address it came from"
    if start[:2] == b"\x1f\x8b":
        return f"{start!r}: gzip data, whose name has to end in .gz"
    return repr(start) if start else "an empty file"


def idx_header(array: np.ndarray) -> bytes:
    """The bytes that stand before the numbers of `array` in an IDX file."""
    code = {dtype.newbyteorder("="): code for code, dtype in DTYPES.items()}.get(
        array.dtype.newbyteorder("=")
    )
    if code is None:
        known = ", ".join(str(dtype.newbyteorder("=")) for dtype in DTYPES.values())
        raise TypeError(f"write_idx: array: expected dtype {known}, got {array.dtype}")
    if any(n >= 1 << 32 for n in array.shape):
        raise ValueError(f"write_idx: array: expected sizes below 2**32, got {array.shape}")
    return bytes([0, 0, code, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)


def write_idx(path: str | os.PathLike[str], array: np.ndarray) -> None:
    """Write an array as an IDX file; the old file stays until the new one is whole on disk.

    Parameters
    ----------
    path
        File to write; gzip-compressed if its name ends in ``.gz``. The same array gives the
        same bytes each time (no time stamp is stored).
    array
        Any shape and byte order; dtype uint8, int8, int16, int32, float32 or float64.

    Raises
    ------
    TypeError
        IDX has no code for the dtype.
    ValueError
        A size does not fit 4 bytes.
    FileNotFoundError
        The folder does not exist.
    """
    path = Path(path)
    array = np.asarray(array)
    content = idx_header(array) + array.astype(array.dtype.newbyteorder(">")).tobytes()
    with replacing(path) as file:
        if path.suffix.lower() == ".gz":
            with gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
                stream.write(content)
        else:
            file.write(content)
