"""linear in Numba where its own decisions lie: layouts, ReLUs taken along, panels, threads."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import normal, seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import linear_numba  # noqa: E402  (needs Numba)
from minicnn.ops.conv_block_numba import channels_last  # noqa: E402

NAMES = ("y", "dx", "dw", "db")
# x's shape behind the batch, with more or less inputs than a panel, and around a vector
features = st.one_of(
    st.tuples(st.integers(1, 80)),
    st.tuples(st.integers(1, 40), st.integers(1, 5), st.integers(1, 5)),
)
cases = st.tuples(st.sampled_from([1, 1, 2, 7, 8, 9, 300]), features, st.integers(1, 40))


def run(case, seed, dtype, whole=False, relu=False, masked=False, add=False):
    """Return what Numba and what float64 NumPy give, in the order of NAMES, x flattened."""
    M, shape, outputs = case
    rng = np.random.default_rng(seed)
    draw = (lambda *s: rng.integers(-3, 4, s).astype(dtype)) if whole else None
    draw = draw or (lambda *s: normal(rng, s, dtype))
    x = draw(M, *shape)
    inputs = x[0].size
    w, b, dy, dw0, db0 = (
        draw(outputs, inputs),
        draw(outputs),
        draw(M, outputs),
        draw(outputs, inputs),
        draw(outputs),
    )
    xl = channels_last(x) if x.ndim == 4 else x
    y, dx = np.full((M, outputs), np.nan, dtype), np.full(xl.shape, np.nan, dtype)
    dw, db = (dw0.copy(), db0.copy()) if add else (np.full_like(w, np.nan), np.full_like(b, np.nan))
    linear_numba.forward(xl, w, b, y, relu=relu)
    options = {"masked": masked, "accumulate": add, "y": y if relu else None}
    linear_numba.backward(dy.copy(), xl, w, dw, db, dx, **options)

    X, W, DY = x.reshape(M, inputs).astype(np.float64), w.astype(np.float64), dy.astype(np.float64)
    Y = X @ W.T + b
    if relu:
        Y, DY = np.maximum(Y, 0), DY * (Y > 0)
    DX = (DY @ W) * (X > 0) if masked else DY @ W
    DW, DB = DY.T @ X, DY.sum(axis=0)
    if add:
        DW, DB = DW + dw0, DB + db0
    if x.ndim == 4:
        assert not dx[..., shape[0] :].any()
        dx = dx[..., : shape[0]].transpose(0, 3, 1, 2)
    return (y, dx.reshape(M, inputs), dw, db), (Y, DX, DW, DB)


@settings(max_examples=80)
@given(
    case=cases,
    seed=seeds,
    dtype=st.sampled_from([np.float32, np.float64]),
    relu=st.booleans(),
    masked=st.booleans(),
    add=st.booleans(),
)
def test_whole_numbers_are_exact(case, seed, dtype, relu, masked, add):
    got, want = run(case, seed, dtype, True, relu, masked, add)
    for name, a, e in zip(NAMES, got, want):
        assert a.dtype == dtype
        np.testing.assert_array_equal(a, e, err_msg=name)


@pytest.mark.parametrize("case", [(64, (64, 4, 4), 128), (1, (3000,), 70), (700, (33,), 300)])
def test_float32_error_is_small_for_long_sums(case):
    M, shape, outputs = case
    inputs = int(np.prod(shape))
    got, want = run(case, 0, np.float32)
    for name, a, e, terms in zip(NAMES, got, want, (inputs, outputs, M, M)):
        # Normal numbers: a sum of products is about sqrt(terms) large.
        assert abs(a - e).max() < 8 * 2**-24 * 2 * terms, name


@pytest.mark.parametrize("case", [(1, (16, 3, 3), 33), (3, (70,), 20), (40, (16, 3, 3), 33)])
def test_number_of_threads_changes_no_bit(case):
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    before, results = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            results.append(run(case, 0, np.float32)[0])
    finally:
        numba.set_num_threads(before)
    for name, one, two in zip(NAMES, *results):
        assert one.tobytes() == two.tobytes(), name


def test_relu_keeps_nan_and_drops_minus_infinity():
    x = np.array([[np.nan], [-np.inf], [np.inf]], np.float32)
    y = np.empty((3, 1), np.float32)
    linear_numba.forward(x, np.ones((1, 1), np.float32), None, y, relu=True)
    np.testing.assert_array_equal(y, [[np.nan], [0], [np.inf]])


@pytest.mark.parametrize("inputs", [5, 19])
def test_what_is_not_finite_stays_in_its_row_of_w(inputs):
    w = np.ones((3, inputs), np.float32)
    w[1] = np.nan  # a whole vector from the end of row 0 would reach it
    y, dx = np.empty((1, 3), np.float32), np.empty((1, inputs), np.float32)
    linear_numba.forward(np.ones((1, inputs), np.float32), w, None, y)
    np.testing.assert_array_equal(np.isnan(y), [[False, True, False]])
    dw = np.empty_like(w)
    linear_numba.backward(
        np.ones((1, 3), np.float32), np.ones((1, inputs), np.float32), w, dw, None, dx
    )
    np.testing.assert_array_equal(dw, np.ones_like(w))


def test_dx_and_db_may_be_left_out():
    x, dy = np.ones((2, 3)), np.ones((2, 4))
    dw = np.empty((4, 3))
    linear_numba.backward(dy, x, np.ones((4, 3)), dw, None)
    np.testing.assert_array_equal(dw, np.full((4, 3), 2))
