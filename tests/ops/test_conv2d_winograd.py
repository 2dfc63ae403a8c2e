"""Winograd's method gives the convolution, up to the rounding that it promises."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import ops
from minicnn.shapes import window
from strategies import seeds

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import conv2d_winograd as kernels  # noqa: E402  (needs Numba)
from minicnn.ops import last, winograd  # noqa: E402
from ops_last import numbers, to_first, to_last  # noqa: E402


@pytest.mark.parametrize(("M", "R"), [(4, 3), (4, 5), (3, 4), (5, 4)])
def test_the_matrices_are_exact(M, R):
    T = M + R - 1
    B, G, A = (
        np.array(m, dtype=object)
        for m in (
            winograd.input_matrix(T),
            winograd.filter_matrix(T, R),
            winograd.output_matrix(T, M),
        )
    )
    rng = np.random.default_rng(0)
    d, g = rng.integers(-9, 10, M + R - 1), rng.integers(-9, 10, R)
    got = A.dot(G.dot(g) * B.dot(d))
    assert list(got) == list(np.correlate(d, g, "valid"))


def test_the_matrices_of_stride_2_are_exact():
    rng = np.random.default_rng(0)
    x, w, dy = rng.integers(-9, 10, 9), rng.integers(-9, 10, 3), rng.integers(-9, 10, 4)

    def run(A, G, B, g, d):
        A, G, B = (np.array(matrix, dtype=object) for matrix in (A, G, B))
        return list(A.dot(G.dot(g) * B.dot(d)))

    G, B = winograd.strided_filter_matrix, winograd.strided_input_matrix
    A = winograd.strided_output_matrix
    assert run(A(4), G(3), B(9), w, x) == list(np.correlate(x, w, "valid")[::2])
    assert run(A(3), G(4), B(9), dy, x) == [(x[p : p + 8 : 2][:4] * dy).sum() for p in range(3)]
    full, d = np.zeros(12, int), rng.integers(-9, 10, 5)
    for i in range(5):  # what y[i] adds to the gradient of padded x
        full[2 * i : 2 * i + 3] += d[i] * w
    assert run(A(8), G(3), B(5), w[::-1], d) == list(full[1:9])


@st.composite
def cases(draw):
    R, stride = draw(st.sampled_from([(3, 1), (5, 1), (3, 2)]))
    before = st.integers(0, R) if stride == 1 else st.sampled_from([1, 3])
    padding = tuple((draw(before), draw(st.integers(0, R))) for _ in range(2))
    H, W = (draw(st.integers(max(1, R - sum(p)), 18)) for p in padding)
    N, C, F = draw(st.integers(1, 3)), draw(st.integers(1, 40)), draw(st.integers(1, 40))
    return (N, C, H, W), (F, C, R, R), stride, padding, draw(seeds)


@settings(max_examples=60)
@given(cases(), st.sampled_from([np.float32, np.float64]))
def test_all_three_passes_equal_the_plain_op(case, dtype):
    x_shape, w_shape, stride, padding, seed = case
    x, w = numbers(seed, x_shape), numbers(seed + 1, w_shape)
    b = numbers(seed + 2, w_shape[:1])
    x, w, b = (a.astype(dtype) for a in (x, w, b))
    y, cache = ops.conv2d_forward(*(a.astype("f8") for a in (x, w, b)), stride, padding)
    dy = numbers(seed + 3, y.shape).astype(dtype)
    dx, dw, _ = ops.conv2d_backward(dy.astype("f8"), cache)
    got = to_last(np.zeros_like(y, dtype))
    kernels.forward(to_last(x), w, b, cache.window, got)
    got_dx = to_last(np.zeros_like(x))
    kernels.input_gradient(to_last(dy), w, cache.window, got_dx)
    more_dx = got_dx.copy()
    kernels.input_gradient(to_last(dy), w, cache.window, more_dx, more=True)
    np.testing.assert_array_equal(more_dx, got_dx + got_dx)
    got_dw = np.full_like(w, 9)
    kernels.weight_gradient(to_last(x), to_last(dy), cache.window, got_dw)
    results = [
        ("y", to_first(got, len(w)), y),
        ("dx", to_first(got_dx, x.shape[1]), dx),
        ("dw", got_dw, dw),
    ]
    for name, a, want in results:
        # The bound of the module's docstring.
        scale = np.abs(want).max()
        atol = (3e-5 if dtype == np.float32 else 1e-13) * scale
        np.testing.assert_allclose(a, want, rtol=0, atol=atol, err_msg=name)


@settings(max_examples=30)
@given(cases(), st.sampled_from([(1, 1), (2, 2), (1, 2), (2, 1)]), st.booleans())
def test_relu_and_pool_on_the_way_out(case, pool, relu):
    x_shape, w_shape, stride, padding, seed = case
    x, w, b = numbers(seed, x_shape), numbers(seed + 1, w_shape), numbers(seed + 2, w_shape[:1])
    win = window("test", w_shape[2:], stride, padding)
    sizes = win.output_size("test", *x_shape[2:])
    if any(size < p for size, p in zip(sizes, pool)) or not kernels.takes_pool(pool):
        return
    block, _cache = ops.conv_block_forward(x, w, b, stride, padding, relu=relu, pool=pool)
    got = to_last(np.zeros_like(block))
    winner = np.zeros(got.shape, np.uint8)
    kernels.forward(to_last(x), w, b, win, got, relu=relu, pool=pool, winner=winner)
    np.testing.assert_allclose(to_first(got, len(w)), block, rtol=0, atol=1e-10)
    if pool == (1, 1):
        return
    # Rounding may decide a tie the other way: the winner's value counts, not its place.
    z, _ = ops.conv2d_forward(x, w, b, stride, padding)
    won = winner[..., : len(w)].transpose(0, 3, 1, 2)
    for n, f, i, j in np.ndindex(won.shape):
        k = int(won[n, f, i, j])
        if k == last.OFF:
            assert relu
            assert block[n, f, i, j] < 1e-10
        else:
            p, q = divmod(k, pool[1])
            value = z[n, f, i * pool[0] + p, j * pool[1] + q]
            assert value == pytest.approx(block[n, f, i, j], abs=1e-10)


@pytest.mark.parametrize("item_bytes", [0, kernels.ITEM_BYTES], ids=["large", "small"])
def test_sums_of_many_items(monkeypatch, item_bytes):
    monkeypatch.setattr(kernels, "L2_BYTES", 0)
    monkeypatch.setattr(kernels, "ITEM_BYTES", item_bytes)
    kernels._plan.cache_clear()
    x, w = numbers(0, (50, 3, 22, 22)), numbers(1, (17, 3, 3, 3))
    y, cache = ops.conv2d_forward(x, w, padding=1)
    dy, got = numbers(2, y.shape), np.full_like(w, 9)
    kernels.weight_gradient(to_last(x), to_last(dy), cache.window, got)
    kernels._plan.cache_clear()
    np.testing.assert_allclose(got, ops.conv2d_backward(dy, cache)[1], rtol=0, atol=1e-10)


@pytest.mark.skipif(numba.config.NUMBA_NUM_THREADS < 2, reason="needs two threads")
@pytest.mark.parametrize(("stride", "C"), [(1, 33), (2, 33), (1, 150)])
def test_one_and_two_threads_give_the_same_bits(stride, C):
    x, w = numbers(0, (9, C, 10, 10)).astype("f4"), numbers(1, (40, C, 3, 3)).astype("f4")
    dy = numbers(2, (9, 40, 10 // stride, 10 // stride)).astype("f4")
    win = window("test", 3, stride, padding=1)
    results = []
    for threads in (1, 2):
        numba.set_num_threads(threads)
        y, dx, dw = np.zeros_like(to_last(dy)), np.zeros_like(to_last(x)), np.zeros_like(w)
        kernels.forward(to_last(x), w, None, win, y)
        kernels.input_gradient(to_last(dy), w, win, dx)
        kernels.weight_gradient(to_last(x), to_last(dy), win, dw)
        results.append((y, dx, dw))
    for a, b in zip(*results):
        np.testing.assert_array_equal(a, b)


def test_where_it_applies():
    w = np.zeros((4, 2, 3, 3))
    assert kernels.applies(w, window("", 3, padding=1), 1)
    assert kernels.applies(w, window("", 5), 1)
    assert kernels.applies(w, window("", 3, stride=2, padding=1), 1)
    for win, groups in (
        (window("", 3), 2),
        (window("", 3, stride=2), 1),
        (window("", 3, stride=(2, 1), padding=1), 1),
        (window("", 5, stride=2, padding=1), 1),
        (window("", 3, dilation=2), 1),
        (window("", (3, 5)), 1),
        (window("", 7), 1),
    ):
        assert not kernels.applies(w, win, groups)
    assert last.OFF == 255
