"""Damage to files: what disks, cut downloads, editors and people with bad intentions do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Numbers at which sizes, offsets and lengths go wrong, as bytes of both orders.
EDGES = [
    n.to_bytes(width, order)
    for width in (1, 2, 4, 8)
    for n in (0, 1, 2 ** (8 * width - 1) - 1, 2 ** (8 * width - 1), 2 ** (8 * width) - 1,
              2 ** (4 * width), 2 ** (6 * width))
    for order in ("little", "big")
]  # fmt: skip
TEXT = [b'"', b"{", b"}", b"[", b"]", b":", b",", b"-1", b"0", b"1e999", b"NaN", b"null", b"true",
        b"\\u0000", b"999999999999999999999", b'""', b"[[[[[[[[",
        b"\xff\xfe", b"../", b"0.5"]  # fmt: skip


def flip_bit(data: bytearray, rng: np.random.Generator) -> None:
    data[_at(data, rng)] ^= 1 << int(rng.integers(8))


def set_byte(data: bytearray, rng: np.random.Generator) -> None:
    data[_at(data, rng)] = int(rng.integers(256))


def edge_number(data: bytearray, rng: np.random.Generator) -> None:
    i, edge = _at(data, rng), EDGES[rng.integers(len(EDGES))]
    data[i : i + len(edge)] = edge


def text(data: bytearray, rng: np.random.Generator) -> None:
    i, piece = _at(data, rng), TEXT[rng.integers(len(TEXT))]
    data[i : i + int(rng.integers(len(piece) + 1))] = piece


def cut_end(data: bytearray, rng: np.random.Generator) -> None:
    del data[_at(data, rng) :]


def cut_out(data: bytearray, rng: np.random.Generator) -> None:
    i = _at(data, rng)
    del data[i : i + int(rng.integers(1, 17))]


def insert(data: bytearray, rng: np.random.Generator) -> None:
    i = _at(data, rng)
    data[i:i] = rng.bytes(int(rng.integers(1, 17)))


def append(data: bytearray, rng: np.random.Generator) -> None:
    data += rng.bytes(int(rng.integers(1, 65)))


def repeat(data: bytearray, rng: np.random.Generator) -> None:
    i, n = _at(data, rng), int(rng.integers(1, 65))
    data[i:i] = bytes(data[i : i + n]) * int(rng.integers(1, 5))


def zero(data: bytearray, rng: np.random.Generator) -> None:
    i = _at(data, rng)
    n = min(int(rng.integers(1, 513)), len(data) - i)
    data[i : i + n] = bytes(n)


def swap(data: bytearray, rng: np.random.Generator) -> None:
    i, j, n = _at(data, rng), _at(data, rng), int(rng.integers(1, 33))
    i, j = sorted((i, j))
    n = min(n, j - i, len(data) - j)
    data[i : i + n], data[j : j + n] = data[j : j + n], data[i : i + n]


MUTATIONS: Sequence[Callable[[bytearray, np.random.Generator], None]] = (
    flip_bit, set_byte, edge_number, text, cut_end, cut_out, insert, append, repeat, zero, swap,
)  # fmt: skip


def mutate(
    files: Sequence[bytes],
    rng: np.random.Generator,
    rewrite: Callable[[bytes, np.random.Generator], bytes] | None = None,
) -> tuple[int, bytes]:
    """Damage one of the files one to four times, or splice two: (number of the file, content).

    Half of the time `rewrite` does it, which leaves a well-formed file that says something else.
    """
    which = int(rng.integers(len(files)))
    data = bytearray(files[which])
    if rewrite is not None and rng.random() < 0.5:
        for _ in range(min(3, int(rng.geometric(0.6)))):
            data = bytearray(rewrite(bytes(data), rng))
        return which, bytes(data)
    if rng.random() < 0.05:
        other = files[rng.integers(len(files))]
        data[_at(data, rng) :] = other[int(rng.integers(max(1, len(other)))) :]
    for _ in range(min(4, int(rng.geometric(0.6)))):
        if data:
            MUTATIONS[rng.integers(len(MUTATIONS))](data, rng)
    return which, bytes(data)


def _at(data: bytearray, rng: np.random.Generator) -> int:
    """A position; every third one in the first bytes, where headers are."""
    if not data:
        return 0
    near = min(len(data), 128) if rng.random() < 0.3 else len(data)
    return int(rng.integers(near))
