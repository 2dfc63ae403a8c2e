"""The vector layer: every word of it does to L lanes what NumPy does to L elements."""

import os
import subprocess
import sys

import numpy as np
import pytest

from strategies import normal

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import vector  # noqa: E402  (needs Numba)
from minicnn.ops.jit import kernel  # noqa: E402

ROWS, WIDE = vector.ROWS, 2 * vector.ROWS
WIDE_STEP = 2 * vector.VECTOR_BYTES // 4 + 1  # numbers from one row of a tile to the next
both = pytest.mark.parametrize("dtype", [np.float32, np.float64])


def draw(dtype, size, seed=0):
    return normal(np.random.default_rng(seed), size, dtype)


@kernel()
def _arithmetic(a, b, c, out):
    L = vector.lane_count(a)
    x, y, z = vector.load(a, 1), vector.load(b, 0), vector.load(c, 0)
    vector.store(out, 0, vector.add(x, y))
    vector.store(out, L, vector.sub(x, y))
    vector.store(out, 2 * L, vector.mul(x, y))
    vector.store(out, 3 * L, vector.fma(x, y, z))
    vector.store(out, 4 * L, vector.maximum(x, y))
    vector.store(out, 5 * L, vector.broadcast(a, 2))
    vector.store(out, 6 * L, vector.splat(b[3]))
    vector.store(out, 7 * L, vector.zero(a))
    out[8 * L] = vector.horizontal_sum(x)
    return L


@both
def test_arithmetic_is_numpys(dtype):
    L = vector.lanes(dtype)
    a, b, c = (draw(dtype, L + 4, seed) for seed in range(3))
    out = np.full(8 * L + 1, np.nan, dtype)
    assert _arithmetic(a, b, c, out) == L
    x, y, z = a[1 : L + 1], b[:L], c[:L]
    rows = out[:-1].reshape(8, L)
    expected = [x + y, x - y, x * y, None, np.maximum(x, y), a[2], b[3], 0]
    for row, want in zip(rows, expected):
        if want is not None:
            np.testing.assert_array_equal(row, np.broadcast_to(want, L))
    # Rounded once: within half a unit in the last place of the exact value.
    exact = x.astype(np.longdouble) * y + z
    assert (abs(rows[3] - exact) <= 0.501 * np.spacing(abs(rows[3]))).all()
    np.testing.assert_allclose(out[-1], x.astype(np.longdouble).sum(), rtol=4 * np.finfo(dtype).eps)


@both
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_inf_propagate(dtype, bad):
    L = vector.lanes(dtype)
    a, b, c = (draw(dtype, L + 4, seed) for seed in range(3))
    a[1] = bad
    b[1] = bad if np.isnan(bad) else b[1]
    out = np.empty(8 * L + 1, dtype)
    _arithmetic(a, b, c, out)
    for row in (0, 1, 2, 3):
        assert not np.isfinite(out[row * L])
    np.testing.assert_array_equal(out[4 * L : 5 * L], np.maximum(a[1 : L + 1], b[:L]))
    np.testing.assert_equal(out[-1], np.asarray(bad, dtype))


@kernel()
def _winner(a, best_out, winner_out):
    L = vector.lane_count(a)
    best, winner = vector.load(a, 0), vector.winner_of(0, a)
    for k in range(1, a.size // L):
        best, winner = vector.take_larger(best, winner, vector.load(a, k * L), k)
    vector.store(best_out, 0, best)
    vector.store(winner_out, 0, winner)


@both
def test_first_maximum_wins(dtype):
    L = vector.lanes(dtype)
    a = np.random.default_rng(0).integers(0, 3, (4, L)).astype(dtype)  # ties in every lane
    a[2, 1] = np.nan
    best, winner = np.empty(L, dtype), np.full(L, 9, np.uint8)
    _winner(a.ravel(), best, winner)
    np.testing.assert_array_equal(best, a.max(axis=0))
    np.testing.assert_array_equal(winner, a.argmax(axis=0))  # NumPy, too: first, and NaN wins


@kernel()
def _parts(a, n, out):
    other = vector.splat(a[0])
    vector.store_part(out, 1, n, vector.load_part(a, 2, n, vector.sub(other, other)))
    return vector.horizontal_max(vector.load_part(a, 2, n, other))


@both
@pytest.mark.parametrize("n", [-3, 0, 1, 3, "all", "more"])
def test_part_of_a_vector_and_nothing_beyond(n, dtype):
    L = vector.lanes(dtype)
    n = {"all": L, "more": L + 5}.get(n, n)
    a = abs(draw(dtype, L + 8)) + 1
    a[0] = 0.5  # fills the lanes beyond
    out = np.full(L + 8, 7, dtype)
    largest = _parts(a, n, out)
    expected, lanes = np.full(L + 8, 7, dtype), max(0, min(n, L))
    expected[1 : 1 + lanes] = a[2 : 2 + lanes]
    np.testing.assert_array_equal(out, expected)
    assert largest == max(a[2 : 2 + lanes], default=0.5)


@both
def test_largest_lane_or_nan(dtype):
    L = vector.lanes(dtype)
    out, a = np.empty(L + 8, dtype), draw(dtype, L + 8)
    for place in range(L):
        b = a.copy()
        b[2 + place] = 99
        assert _parts(b, L, out) == 99
        b[2 + place] = np.nan
        assert np.isnan(_parts(b, L, out))


@kernel()
def _zipped(a, out):
    L = vector.lane_count(a)
    x, y = vector.load(a, 0), vector.load(a, L)
    even, odd = vector.halves(x, y)
    first, second = vector.zip_halves(x, y)
    for k, v in enumerate((even, odd, first, second)):
        vector.store(out, k * L, v)


@both
def test_halves_and_back(dtype):
    L = vector.lanes(dtype)
    a, out = np.arange(2 * L, dtype=dtype), np.empty(4 * L, dtype)
    _zipped(a, out)
    np.testing.assert_array_equal(out[: 2 * L], np.concatenate([a[::2], a[1::2]]))
    np.testing.assert_array_equal(out[2 * L :], a.reshape(2, L).T.ravel())


@kernel()
def _functions(which, x, y):
    L = vector.lane_count(x)
    for i in range(0, x.size, L):
        v = vector.load(x, i)
        if which == 0:
            v = vector.exp(v)
        elif which == 1:
            v = vector.expm1(v)
        elif which == 2:
            v = vector.log(v)
        elif which == 3:
            v = vector.absolute(v)
        elif which == 4:
            v = vector.copysign(vector.constant(2, v), v)
        else:
            v = vector.sqrt(v)
        vector.store(y, i, v)


FUNCTIONS = np.exp, np.expm1, np.log, np.abs, lambda x: np.copysign(2, x), np.sqrt


@both
@pytest.mark.parametrize("which", range(6))
def test_functions_are_within_two_units_in_the_last_place(which, dtype):
    # Down to where e^x is 0 and up to where it is infinite, the subnormal numbers on the way.
    low, high = (-110, 92) if dtype == np.float32 else (-760, 712)
    special = [0, -0.0, np.inf, -np.inf, np.nan, 1e-30, -1e-30, 88.8, -104.2, 709.9, -745.2]
    parts = np.linspace(low, high, 40_000), np.linspace(-2, 2, 40_000), special
    x = np.resize(np.concatenate(parts).astype(dtype), 80_064)
    y = np.empty_like(x)
    _functions(which, x, y)
    with np.errstate(all="ignore"):
        exact = FUNCTIONS[which](x.astype(np.longdouble))
        rounded = exact.astype(dtype)
    finite = np.isfinite(rounded)
    np.testing.assert_array_equal(y[~finite], rounded[~finite])
    unit = np.spacing(abs(rounded[finite])).astype(np.longdouble)
    assert (abs(y[finite] - exact[finite]) <= 2 * unit).all()
    if which in (3, 4):
        np.testing.assert_array_equal(y, rounded)
        np.testing.assert_array_equal(np.signbit(y[finite]), np.signbit(rounded[finite]))


SINGLE, DOUBLE = (0.1, -2.0, 3.0), (0.1, 7.0, -5.0, 0.25, 1.0)


@kernel()
def _chosen(x, y, a, b, out):
    L = vector.lane_count(x)
    u, v = vector.load(x, 0), vector.load(y, 0)
    vector.store(out, 0, vector.where_greater(u, v, vector.load(a, 0), vector.load(b, 0)))
    vector.store(out, L, vector.polynomial(u, SINGLE, DOUBLE))


@both
def test_where_greater_and_polynomial(dtype):
    L = vector.lanes(dtype)
    x, y, a, b = (draw(dtype, L, seed) for seed in range(4))
    y[0], out = x[0], np.empty(2 * L, dtype)
    _chosen(x, y, a, b, out)
    np.testing.assert_array_equal(out[:L], np.where(x > y, a, b))
    series, wide = SINGLE if dtype == np.float32 else DOUBLE, x.astype(np.longdouble)
    exact, size = (sum(f(c * wide**k) for k, c in enumerate(series)) for f in (np.positive, np.abs))
    assert (abs(out[L:] - exact) <= np.finfo(dtype).eps * size).all()
    for bad in (np.nan, np.inf, -np.inf):
        for one, other in ((x, y), (y, x)):
            one[1], other[1] = bad, 1
            _chosen(x, y, a, b, out)
            assert out[1] == (a[1] if x[1] > y[1] else b[1])
            assert np.isfinite(out[L + 1]) == np.isfinite(x[1])


@kernel()
def _to_boundary(a, i):
    return vector.to_boundary(a, i)


@both
def test_distance_to_where_a_whole_vector_begins(dtype):
    L = vector.lanes(dtype)
    a = np.zeros(4 * L, dtype)
    for i in range(2 * L):
        n = _to_boundary(a, i)
        assert 1 <= n <= L
        assert a[i + n :].ctypes.data % vector.VECTOR_BYTES == 0
    assert n == L or _to_boundary(a, 2 * L - 1 + n) == L


@kernel()
def _offsets(table, a, out):
    rows = vector.offsets(table, 1, 3, ROWS)
    times = vector.multiples(1, 3, 10, ROWS)
    each = vector.scaled(vector.lane_offsets(table, 2, a), -5)
    for r in range(ROWS):
        out[0, r], out[1, r] = rows[r], times[r]
    for r in range(len(each)):
        out[2, r] = each[r]


@both
@pytest.mark.parametrize("integers", [np.int32, np.int64])
def test_offsets(dtype, integers):
    L = vector.lanes(dtype)
    table = np.arange(L + 2, dtype=integers) ** 2 - 3
    out = np.zeros((3, max(L, ROWS)), np.int64)
    _offsets(table, np.zeros(1, dtype), out)
    index = np.minimum(np.arange(1, ROWS + 1), 3)
    np.testing.assert_array_equal(out[0, :ROWS], table[index])
    np.testing.assert_array_equal(out[1, :ROWS], 10 * index)
    np.testing.assert_array_equal(out[2, :L], -5 * table[2 : 2 + L])


@kernel()
def _transposed(a, reads, writes, out):
    block = vector.load_rows(a, 1, vector.lane_offsets(reads, 0, a))
    vector.store_rows(out, 0, vector.lane_offsets(writes, 0, a), vector.transpose(block))


@both
def test_transpose_and_rows(dtype):
    L = vector.lanes(dtype)
    a = draw(dtype, L * L + 1)
    order = np.random.default_rng(1).permutation(L)
    writes = np.arange(L) * L
    writes[L - 1] = -1  # not stored
    out = np.full(L * L, 7, dtype)
    _transposed(a, order * L, writes, out)
    expected = a[1:].reshape(L, L)[order].T.copy()
    expected[L - 1] = 7
    np.testing.assert_array_equal(out.reshape(L, L), expected)


@kernel()
def _tiles(lanewise, wide, a, rows, cols, b, n, out):
    L = vector.lane_count(a)
    at = vector.offsets(rows, 0, rows.size - 1, ROWS)
    if wide:
        acc, places = vector.zeros(a, WIDE), vector.multiples(0, ROWS, 2 * L, ROWS)
        acc = vector.tile_repeat(acc, b, 0, ROWS)
        if lanewise:
            block = vector.lane_tile(vector.zeros(a, WIDE), a, 1, at, cols, 1, n, b, 2, 3 * L)
        else:
            block = vector.outer_tile(vector.zeros(a, WIDE), a, 1, at, cols, 1, n, b, 2, 3 * L)
        vector.tile_store(vector.tile_add(acc, block), out, 0, places)
    else:
        acc, places = vector.zeros(a, ROWS), vector.multiples(0, ROWS, 2 * L, ROWS)
        vector.tile_store(acc, out, L, places)
        acc = vector.tile_load(acc, out, 0, places)
        if lanewise:
            acc = vector.lane_tile(acc, a, 1, at, cols, 1, n, b, 2, 3 * L)
        else:
            acc = vector.outer_tile(acc, a, 1, at, cols, 1, n, b, 2, 3 * L)
        vector.tile_store(acc, out, 0, places)


@both
@pytest.mark.parametrize("n", [0, 1, 5])
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("lanewise", [False, True])
def test_tiles_are_matrix_products(lanewise, wide, n, dtype):
    L = vector.lanes(dtype)
    V = 2 if wide else 1
    rng = np.random.default_rng(0)
    # Small integers: every product and sum is exact, so any order of adding gives the same.
    a, b = (rng.integers(-9, 9, size).astype(dtype) for size in (200, 30 * L))
    rows, cols = rng.integers(0, 90, ROWS), rng.integers(0, 60, 8).astype(np.int32)
    out = rng.integers(-9, 9, 2 * L * ROWS).astype(dtype)
    expected = out.reshape(ROWS, 2 * L).copy()
    if wide:
        expected[:] = b[: 2 * L]
    else:
        expected[:, L:] = 0
    for r, row in enumerate(rows):
        for k in range(n):
            x = a[1 + row + cols[1 + k] :][: V * L] if lanewise else a[1 + row + cols[1 + k]]
            expected[r, : V * L] += x * b[2 + k * 3 * L :][: V * L]
    _tiles(lanewise, wide, a, rows, cols, b, n, out)
    np.testing.assert_array_equal(out.reshape(ROWS, 2 * L), expected)


@kernel()
def _picks(g, n, at_of, a, rows, R, S, T, out):
    L = vector.lane_count(a)
    at = vector.offsets(rows, 0, len(R) - 1, R)
    acc = vector.pick_tile(g, 1, n, 2 * L, at_of, a, 3, at, S, 2)
    places = vector.multiples(0, len(T) - 1, L, T)
    vector.tile_store(acc, out, 0, places)


@both
@pytest.mark.parametrize("n", [0, 1, 5])
def test_lanes_pick_from_tables(n, dtype):
    L, S = vector.lanes(dtype), 2
    rng = np.random.default_rng(0)
    g, a = (rng.integers(-9, 9, 200).astype(dtype) for _ in range(2))
    at_of = rng.integers(0, L - 2 * (S - 1), 200).astype(np.int32)
    rows = np.array([0, 40, 7], np.int32)
    out, expected = np.full((3, S, L), 7, dtype), np.zeros((3, S, L), dtype)
    for r, s, k, lane in np.ndindex(3, S, n, L):
        i = 1 + k * 2 * L + lane
        expected[r, s, lane] += g[i] * a[3 + rows[r] + k * L + at_of[i] + 2 * s]
    _picks(g, n, at_of, a, rows, (0,) * 3, (0,) * S, (0,) * 3 * S, out.ravel())
    np.testing.assert_array_equal(out, expected)


@kernel()
def _pool(a, area, more, relu, table, i, end, y, winner):
    acc = vector.tile_load(vector.zeros(a, WIDE), a, 0, vector.multiples(0, 99, WIDE_STEP, ROWS))
    vector.tile_pool(acc, area, more, relu, 255, y, 3, table, i, end, winner)


@both
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("area", [1, 2] if ROWS == 6 else [1, 2, 4])
def test_a_tile_is_pooled_window_by_window(area, relu, dtype):
    L, windows = vector.lanes(dtype), ROWS // area
    a = draw(dtype, (ROWS, WIDE_STEP)).round(1)  # with ties
    a[0, 0], a[area - 1, 1], a[0, 2] = np.nan, np.nan, -0.0
    end = max(1, windows - 1)  # the last window is beyond the end
    table = (np.arange(windows + 2) * 3 * L)[::-1].astype(np.int32)
    y, winner = np.full(9 * 3 * L, 7, dtype), np.full(9 * 3 * L, 7, np.uint8)
    _pool(a.ravel(), (0,) * area, False, relu, table, 2, 2 + end, y, winner)
    wanted, who = np.full_like(y, 7), np.full_like(winner, 7)
    rows = a[:, : 2 * L].reshape(windows, area, 2 * L)
    for w in range(end):
        best = rows[w].max(axis=0)  # NaN wins
        first = np.where(np.isnan(best), np.isnan(rows[w]), rows[w] == best).argmax(axis=0)
        off = relu & (best <= 0)
        at = 3 + table[2 + w]
        wanted[at : at + 2 * L] = np.where(off, 0, best)
        who[at : at + 2 * L] = np.where(off, 255, first)
    np.testing.assert_array_equal(y, wanted)
    if area > 1:
        np.testing.assert_array_equal(winner, who)
    else:
        assert (winner == 7).all()
    _pool(a.ravel(), (0,) * area, False, relu, table, 2, 2 + end, y, winner[:0])  # nobody asks who
    np.testing.assert_array_equal(y, wanted)


@both
def test_a_tile_is_added_to_what_is_there(dtype):
    L = vector.lanes(dtype)
    a, y = draw(dtype, (ROWS, WIDE_STEP)), draw(dtype, 3 + 2 * L * ROWS, seed=1)
    wanted = y.copy()
    wanted[3:] = np.maximum(wanted[3:] + a[:, : 2 * L].ravel(), 0)
    table = (np.arange(ROWS) * 2 * L).astype(np.int32)
    _pool(a.ravel(), (0,), True, True, table, 0, ROWS, y, np.empty(0, np.uint8))
    np.testing.assert_array_equal(y, wanted)


@kernel()
def _bits(winner, k, a, out):
    out[0] = vector.winner_bits(winner, 1, k, a)
    out[1] = vector.first_bit(out[0])
    out[2] = vector.first_bit(np.int64(-1) << 63)


@both
def test_bits_of_the_winners(dtype):
    L = vector.lanes(dtype)
    winner = np.random.default_rng(3).integers(0, 3, L + 1).astype(np.uint8)
    winner[1] = 0
    winner[L] = 255
    a, out = np.zeros(1, dtype), np.zeros(3, np.int64)
    for k in (1, 2, 255):
        _bits(winner, k, a, out)
        same = np.flatnonzero(winner[1:] == k)
        assert out[0] == (1 << same).sum()
        assert len(same) == 0 or out[1] == same[0]
        assert out[2] == 63


def test_every_access_is_checked_on_request():
    script = """
import numpy as np
from minicnn.ops import vector
from minicnn.ops.jit import kernel
import numba

@numba.njit
def load(a, i):
    return vector.horizontal_sum(vector.load(a, i))

@numba.njit
def tile(a, n):
    rows = vector.multiples(0, 0, 1, 1)
    cols = np.arange(4)
    acc = vector.outer_tile(vector.zeros(a, 1), a, 0, rows, cols, 0, n, a, 0, 1)
    return vector.horizontal_sum(acc[0])

a = np.ones(vector.lanes("f4") + 3, np.float32)
assert load(a, 3) == a.size - 3 and tile(a, 4) == 4 * (a.size - 3)
for call in (lambda: load(a, 4), lambda: load(a, -1), lambda: tile(a, 5)):
    try:
        call()
    except IndexError as error:
        assert "outside the array" in str(error)
    else:
        raise AssertionError("not noticed")
"""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1"}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
