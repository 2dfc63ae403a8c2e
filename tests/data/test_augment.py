"""Augmentation: exact where it can be, against a loop where not, and within its bounds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn.data.augment import AUGMENTATIONS, Augment, parse_augment, warp
from strategies import dtypes, laid_out, layouts, seeds

EVERYTHING = Augment(shift=2, rotate=30, zoom=0.2, flip=True, noise=0.1, cutout=2)


def pictures(seed, shape=(3, 2, 6, 6), dtype=np.float64):
    return np.random.default_rng(seed).uniform(0.1, 1, shape).astype(dtype)


def shifted(x, dy, dx):
    """Move pictures by whole pixels, with zeros where nothing is left."""
    H, W = x.shape[2:]
    wide = np.pad(x, ((0, 0), (0, 0), (H, H), (W, W)))
    dy, dx = np.clip([dy, dx], [-H, -W], [H, W])
    return wide[:, :, H - dy : 2 * H - dy, W - dx : 2 * W - dx]


def warp_loop(x, dy, dx, degrees, zoom):
    """The definition, pixel by pixel, for one set of numbers."""
    H, W = x.shape[2:]
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y = np.zeros_like(x)
    for r in range(H):
        for c in range(W):
            down, right = r - (H - 1) / 2 - dy, c - (W - 1) / 2 - dx
            i = (cos * down + sin * right) / zoom + (H - 1) / 2
            j = (-sin * down + cos * right) / zoom + (W - 1) / 2
            for k in (math.floor(i), math.floor(i) + 1):
                for m in (math.floor(j), math.floor(j) + 1):
                    if 0 <= k < H and 0 <= m < W:
                        y[:, :, r, c] += (1 - abs(i - k)) * (1 - abs(j - m)) * x[:, :, k, m]
    return y


@given(seeds, dtypes)
def test_identity_is_exact(seed, dtype):
    x = pictures(seed, dtype=dtype)
    np.testing.assert_array_equal(warp(x), x)
    np.testing.assert_array_equal(Augment()(x, np.random.default_rng(0)), x)


@given(seeds, dtypes, st.integers(-8, 8), st.integers(-8, 8))
def test_whole_shifts_are_exact(seed, dtype, dy, dx):
    x = pictures(seed, (2, 2, 5, 7), dtype)
    np.testing.assert_array_equal(warp(x, dy, dx), shifted(x, dy, dx))


@pytest.mark.parametrize("turns", [-2, -1, 0, 1, 2, 3, 4, 9])
@pytest.mark.parametrize("size", [1, 4, 5, 28])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_quarter_turns_are_exact(turns, size, dtype):
    x = pictures(0, (2, 2, size, size), dtype)
    np.testing.assert_array_equal(warp(x, degrees=90 * turns), np.rot90(x, turns, axes=(2, 3)))


def test_zoom_by_2():
    x = np.zeros((1, 1, 5, 5))
    x[0, 0, 2, 2] = 1
    line = np.array([0, 0.5, 1, 0.5, 0])
    np.testing.assert_array_equal(warp(x, zoom=2)[0, 0], np.outer(line, line))


@given(
    seeds,
    st.floats(-4, 4),
    st.floats(-4, 4),
    st.floats(-400, 400),
    st.floats(0.2, 5),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
)
def test_against_a_loop(seed, dy, dx, degrees, zoom, size):
    x = pictures(seed, (1, 2, *size))
    expected = warp_loop(x, dy, dx, degrees, zoom)
    np.testing.assert_allclose(warp(x, dy, dx, degrees, zoom), expected, atol=1e-12)
    x32 = x.astype(np.float32)
    np.testing.assert_allclose(warp(x32, dy, dx, degrees, zoom), expected, atol=2e-5)


@given(seeds)
def test_each_picture_has_its_own_numbers(seed):
    rng = np.random.default_rng(seed)
    x = pictures(seed)
    numbers = [rng.uniform(low, 2, 3) for low in (-2, -2, -90, 0.5)]
    alone = [warp(x[n : n + 1], *(a[n] for a in numbers)) for n in range(3)]
    np.testing.assert_array_equal(warp(x, *numbers), np.concatenate(alone))


@given(seeds, dtypes, layouts)
def test_layout_does_not_matter_and_input_stays(seed, dtype, layout):
    x = pictures(seed, dtype=dtype)
    given = laid_out(x, layout)
    before = given.tobytes()
    y = EVERYTHING(given, np.random.default_rng(seed))
    np.testing.assert_array_equal(y, EVERYTHING(x, np.random.default_rng(seed)))
    assert given.tobytes() == before
    assert y.dtype == dtype
    assert y.dtype.isnative
    assert y.shape == x.shape
    assert not np.shares_memory(y, given)


@pytest.mark.parametrize("augment", [Augment(), Augment(shift=3), EVERYTHING])
@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (2, 0, 4, 4), (2, 1, 0, 4), (2, 3, 1, 1)])
def test_small_and_empty_batches(augment, shape):
    assert augment(np.ones(shape, np.float32), np.random.default_rng(0)).shape == shape


@given(seeds, st.integers(1, 9))
def test_shift_is_the_warp_of_its_draws(seed, shift):
    x = pictures(seed, (4, 2, 5, 7))
    y = Augment(shift=shift)(x, np.random.default_rng(seed))
    dy, dx = np.random.default_rng(seed).integers(-shift, shift, (2, 4), endpoint=True)
    np.testing.assert_array_equal(y, warp(x, dy, dx))


def test_a_far_shift_takes_no_memory():
    y = Augment(shift=10**9)(np.ones((4, 1, 3, 3)), np.random.default_rng(0))
    assert not y.any()


def spread(augment, n=4000, size=9):
    """What becomes of n equal pictures of a bright dot in the middle, and their coordinates."""
    x = np.zeros((n, 1, size, size))
    x[:, :, size // 2, size // 2] = 1
    return augment(x, np.random.default_rng(0))[:, 0]


def test_shifts_reach_both_ends_evenly():
    y = spread(Augment(shift=2))
    places = y.reshape(len(y), -1).argmax(1)
    rows, columns = np.divmod(places, 9)
    for values in (rows, columns):
        assert np.all(np.abs(np.bincount(values - 2, minlength=5) / len(y) - 0.2) < 0.03)
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 0.05


@pytest.mark.parametrize(
    ("augment", "angle_limit"), [(Augment(rotate=30), 30), (Augment(rotate=10, zoom=0.2), 10)]
)
def test_rotation_reaches_both_ends(augment, angle_limit):
    x = np.zeros((2000, 1, 21, 21))
    x[:, :, 10, 16:19] = 1  # a dash to the right of the centre
    y = augment(x, np.random.default_rng(0))[:, 0]
    mass = y.sum((1, 2))
    up = 10 - (y.sum(2) @ np.arange(21)) / mass
    right = (y.sum(1) @ np.arange(21)) / mass - 10
    angles = np.degrees(np.arctan2(up, right))
    assert -1.05 * angle_limit < angles.min() < -0.95 * angle_limit
    assert 0.95 * angle_limit < angles.max() < 1.05 * angle_limit
    assert abs(angles.mean()) < 0.05 * angle_limit
    lengths = np.hypot(up, right) / 7
    assert 1 - augment.zoom - 0.02 < lengths.min() <= lengths.max() < 1 + augment.zoom + 0.02
    assert lengths.max() - lengths.min() >= 1.9 * augment.zoom


def test_flip_mirrors_half_of_them():
    x = pictures(0, (1000, 2, 3, 4))
    y = Augment(flip=True)(x, np.random.default_rng(0))
    mirrored = (y == x[:, :, :, ::-1]).all((1, 2, 3))
    assert np.all(mirrored | (y == x).all((1, 2, 3)))
    assert 430 < mirrored.sum() < 570


def test_noise_has_its_standard_deviation():
    x = pictures(0, (50, 2, 20, 20), np.float32)
    added = Augment(noise=0.3)(x, np.random.default_rng(0)) - x
    assert abs(added.std() - 0.3) < 0.01
    assert abs(added.mean()) < 0.01


@pytest.mark.parametrize("side", [1, 2, 3, 20])
def test_cutout_is_one_square_around_a_random_place(side):
    x = np.ones((3000, 2, 7, 5))
    y = Augment(cutout=side)(x, np.random.default_rng(0))
    np.testing.assert_array_equal(y[:, 0], y[:, 1])
    hole = y[:, 0] == 0
    assert hole.any((1, 2)).all()
    rows, columns = hole.any(2), hole.any(1)
    np.testing.assert_array_equal(hole, rows[:, :, None] & columns[:, None, :])
    for span, length in ((rows, 7), (columns, 5)):
        edges = np.abs(np.diff(span.astype(int), axis=1)).sum(1)
        assert edges.max() <= 2  # in one piece
        expected = {
            tuple(first <= p < first + side for p in range(length))
            for first in range(-(side // 2), length - side // 2)
        }
        assert {tuple(row) for row in span.tolist()} == expected


def test_pictures_of_a_batch_differ():
    y = EVERYTHING(np.tile(pictures(0, (1, 1, 8, 8)), (50, 1, 1, 1)), np.random.default_rng(0))
    assert len({picture.tobytes() for picture in y}) == 50


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones((1, 1, 2, 2), int), TypeError, "x: expected a float32 or float64 .*, got int64"),
        (np.ones((1, 1, 2, 2), np.float16), TypeError, "x: expected .*, got float16"),
        ([[[[1.0]]]], TypeError, "x: expected .*, got list"),
        (np.ones((1, 2, 2)), ValueError, r"x: expected 4 axes \(N, C, H, W\), got shape"),
    ],
)
def test_what_is_no_batch_of_pictures(x, error, message):
    with pytest.raises(error, match=f"Augment: {message}"):
        Augment()(x, np.random.default_rng(0))
    with pytest.raises(error, match=f"warp: {message}"):
        warp(x)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"shift": -1}, ValueError, "shift: expected an integer >= 0, got -1"),
        ({"shift": 1.5}, TypeError, "shift: expected an integer"),
        ({"rotate": 181}, ValueError, "rotate: .* got 181"),
        ({"rotate": math.nan}, ValueError, "rotate: .* got nan"),
        ({"zoom": 1}, ValueError, "zoom: .* got 1"),
        ({"noise": -0.1}, ValueError, "noise: .* got -0.1"),
        ({"noise": math.inf}, ValueError, "noise: .* got inf"),
        ({"cutout": -1}, ValueError, "cutout: expected an integer >= 0, got -1"),
        ({"flip": 1}, TypeError, "flip: expected True or False, got 1"),
    ],
)
def test_settings_are_checked(kwargs, error, message):
    with pytest.raises(error, match=f"Augment: {message}"):
        Augment(**kwargs)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *AUGMENTATIONS.items(),
        ("shift=2,rotate=10,zoom=0.1", Augment(shift=2, rotate=10, zoom=0.1)),
        (" flip , noise=1e-2,cutout=8", Augment(flip=True, noise=0.01, cutout=8)),
    ],
)
def test_parse(text, expected):
    assert parse_augment(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one of none, digits, photos, or settings such as .* got ''"),
        ("blur=2", "expected one of .* each of shift, rotate, .* at most once, got 'blur=2'"),
        ("shift=1,shift=2", ".* at most once, got 'shift=1,shift=2'"),
        ("digits,shift=1", ".* got 'digits,shift=1'"),
        ("shift=1.5", "shift: expected a whole number, got '1.5'"),
        ("shift", "shift: expected a whole number, got ''"),
        ("rotate=far", "rotate: expected a number, got 'far'"),
        ("flip=no", "flip: expected no value, got 'no'"),
        ("zoom=2", "zoom: expected a number >= 0 and < 1, got 2"),
    ],
)
def test_parse_errors(text, message):
    with pytest.raises(ValueError, match=f"(?i)augment: {message}"):
        parse_augment(text)


def test_presets():
    assert AUGMENTATIONS["none"] == Augment()
    assert not AUGMENTATIONS["digits"].flip  # a mirrored digit is another sign
    assert AUGMENTATIONS["photos"] == Augment(shift=4, flip=True, cutout=8)
