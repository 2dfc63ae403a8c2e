"""The tiles of conv2d.cu, on shapes that none of them divides; TF32; the cut of long sums."""

import numpy as np
import pytest

import devices
from minicnn.ops import conv2d, conv2d_cupy, conv_block, cuda
from minicnn.shapes import window
from strategies import normal

TILES = [
    *(("float32", tile) for tile in conv2d_cupy.TILES["float32"]),
    *(("float64", tile) for tile in conv2d_cupy.TILES["float64"]),
]
NUMPY, BLOCK = conv2d.VERSIONS["numpy"], conv_block.VERSIONS["numpy"]
U = 2.0**-24


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    devices.use(monkeypatch)


@pytest.fixture
def force(monkeypatch):
    """Let all products be cut into one kind of tile."""

    def run(tile):
        monkeypatch.setattr(conv2d_cupy, "choose", lambda *args, **kwargs: tile)

    return run


@pytest.fixture
def tensor_cores():
    conv2d_cupy.use_tf32()
    yield
    conv2d_cupy.use_tf32(False)


def integers(rng, shape, dtype):
    return rng.integers(-4, 5, shape).astype(dtype)


def run(function, *args):
    return devices.back(function(*devices.there(args)))


def both(x, w, b, dy, win, groups):
    """Forward and backward of the kernels, and of the numpy version in float64."""
    got = (
        run(conv2d_cupy.forward, x, w, b, win, groups),
        *run(conv2d_cupy.backward, dy, x, w, win, groups),
    )
    x, w, b, dy = (a.astype("f8") for a in (x, w, b, dy))
    want = NUMPY.forward(x, w, b, win, groups), *NUMPY.backward(dy, x, w, win, groups)
    return got, want


def case(dtype, draw=integers, N=2, C=5, F=37, size=9, groups=1, **kwargs):
    rng = np.random.default_rng(0)
    win = window("conv2d", (3, 3), **{"padding": 1, **kwargs})
    x, w = (
        draw(rng, (N, C * groups, size, size + 2), dtype),
        draw(rng, (F * groups, C, 3, 3), dtype),
    )
    y_shape = (N, F * groups, *win.output_size("conv2d", *x.shape[2:]))
    return x, w, draw(rng, w.shape[:1], dtype), draw(rng, y_shape, dtype), win, groups


@pytest.mark.parametrize(("dtype", "tile"), TILES, ids=[f"{d}-{t.area}" for d, t in TILES])
def test_integers_are_exact_in_every_tile(force, dtype, tile):
    force(tile)
    for kwargs in (
        {},
        {"N": 3, "size": 8, "C": 3},
    ):  # maps of 99 places, and of 80: stored in fours
        got, want = both(*case(dtype, **kwargs))
        for a, e in zip(got, want):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("tile", conv2d_cupy.TENSOR_TILES, ids=lambda tile: str(tile.area))
def test_tensor_cores_are_exact_for_small_integers(force, tile):
    force(tile)
    for kwargs in ({}, {"N": 3, "size": 8, "C": 3}, {"stride": 2, "groups": 2}):
        got, want = both(*case("float32", **kwargs))
        for a, e in zip(got, want):
            np.testing.assert_array_equal(a, e)


@pytest.mark.parametrize("pool", [(1, 1), (2, 1), (2, 2), (1, 4)])
def test_pooling_in_the_epilogue_of_tensor_cores(force, pool):
    force(conv2d_cupy.TENSOR_TILES[1])
    x, w, b, _, win, groups = case("float32", integers)
    w[0], b[0] = 0, -1  # a map in which the ReLU is off
    y, winner = run(conv2d_cupy.block_forward, x, w, b, win, groups, True, pool)
    want, want_winner = BLOCK.forward(x, w, b, win, groups, True, pool)
    np.testing.assert_array_equal(y, want)
    np.testing.assert_array_equal(winner, want_winner)


def test_tf32_is_off_unless_asked_for(tensor_cores):
    assert conv2d_cupy.choose("float32", 64, 10_000, 1) in conv2d_cupy.TENSOR_TILES
    assert conv2d_cupy.choose("float64", 64, 10_000, 1) in conv2d_cupy.TILES["float64"]
    conv2d_cupy.use_tf32(False)
    assert not conv2d_cupy.tf32()
    assert conv2d_cupy.choose("float32", 64, 10_000, 1) in conv2d_cupy.TILES["float32"]


def errors(draw):
    """Largest error of y, dx, dw and db in units of u times the sum of |terms|."""
    args = case("float32", draw)
    got, want = both(*args)
    _, scale = both(*(abs(a) for a in args[:4]), *args[4:])
    return [float((abs(a - e) / (U * s + 1e-30)).max()) for a, e, s in zip(got, want, scale)]


def test_float32_error():
    assert max(errors(normal)) < 16


def test_tf32_error(tensor_cores):
    *products, db = errors(normal)
    assert db < 2.0**13  # its factors of one are exact, dy is rounded
    assert all(16 < e < 2 * 2.0**13 for e in products)  # two factors with 11 bits each


@pytest.mark.parametrize("kwargs", [{"stride": 2}, {"dilation": 2}, {"groups": 3, "F": 5, "C": 2}])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_geometry_that_is_not_compiled_in(dtype, kwargs):
    got, want = both(*case(dtype, **kwargs))
    for a, e in zip(got, want):
        np.testing.assert_array_equal(a, e)


def test_a_sum_in_parts(monkeypatch):
    monkeypatch.setattr(conv2d_cupy, "LONGEST", 17)
    x, _, _, dy, win, groups = case("float32", normal)
    dw, db = run(conv2d_cupy.weight_gradient, dy, x, (37, 5, 3, 3), win, groups)
    again, _ = run(conv2d_cupy.weight_gradient, dy, x, (37, 5, 3, 3), win, groups)
    _, want, want_db = NUMPY.backward(
        dy.astype("f8"), x.astype("f8"), np.zeros((37, 5, 3, 3)), win, 1
    )
    np.testing.assert_allclose(dw, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(db, want_db, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(dw, again)


@pytest.mark.parametrize("places", [1, 64, 1000, 10**6, 2**31 + 5, 2**36])
@pytest.mark.parametrize("groups", [1, 2, 1000])
@pytest.mark.parametrize("blocks", [1, 300])
def test_the_cut_covers_the_sum(places, groups, blocks):
    parts, length = conv2d_cupy.cut(places, blocks * groups, groups)
    assert parts * groups <= cuda.MOST_BLOCKS
    assert (parts - 1) * length < places <= parts * length
    if places <= conv2d_cupy.LONGEST * (cuda.MOST_BLOCKS // groups):
        assert length <= conv2d_cupy.LONGEST


def test_a_large_product_gets_a_large_tile():
    sizes = [conv2d_cupy.choose("float32", 128, places, 1).area for places in (256, 4096, 10**6)]
    assert sizes == [(32, 32), (64, 64), (128, 128)]
    assert conv2d_cupy.choose("float32", 32, 10**6, 1).area[0] == 32  # 128 rows would be idle
    assert conv2d_cupy.choose("float32", 64, 801, 1, parts=64).area == (64, 64)


def test_what_outgrows_32_bits_is_left_to_numpy():
    w = np.zeros((8, 4, 3, 3), "f4")
    assert conv2d_cupy.applies((10**9, 4, 99, 99), w, (10**9, 8, 97, 97), 1)  # images: 64 bits
    assert not conv2d_cupy.applies((1, 4, 2**15, 2**14), w, (1, 8, 2**15, 2**13), 1)
    assert not conv2d_cupy.applies((1, 4, 2**14, 2**14), w, (1, 8, 2**14, 2**14), 1)


def test_launches(monkeypatch):
    """A block takes one launch forward, and four backward."""
    names = []
    launch = cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a, **k: (names.append(a[1]), launch(*a, **k))[1])
    x, w, b, _, win, groups = case("float32", normal)
    y, winner = devices.back(
        conv2d_cupy.block_forward(*devices.there((x, w, b)), win, groups, True, (2, 2))
    )
    assert names == ["conv2d_forward"]
    args = devices.there((y, winner, x, w))
    want = BLOCK.backward(y, winner, x, w, win, groups, (2, 2))
    dx, dw, db = conv2d_cupy.block_backward(*args, win, groups, (2, 2))
    assert names[1:] == [
        "conv2d_spread", "conv2d_weight_gradient", "conv2d_add", "conv2d_input_gradient",
    ]  # fmt: skip
    for a, e in zip(devices.back((dx, dw, db)), want):
        np.testing.assert_allclose(a, e, rtol=1e-4, atol=1e-4)
    dx, *_ = conv2d_cupy.block_backward(*args, win, groups, (2, 2), need_dx=False)
    assert dx is None
    assert names[-1] == "conv2d_add"
