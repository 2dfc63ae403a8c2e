"""conv_transpose2d: the adjoint of conv2d, held to it and to the equation."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minicnn import use
from minicnn.ops import conv2d
from minicnn.ops.conv_transpose2d import (
    VERSIONS,
    conv_transpose2d_backward,
    conv_transpose2d_forward,
)
from minicnn.shapes import window
from opchecks import (
    assert_adjoint,
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import dtypes, layouts, normal, paddings, pairs, seeds

versions = pytest.mark.parametrize("version", VERSIONS)
PAIR = conv_transpose2d_forward, conv_transpose2d_backward


@st.composite
def cases(draw, paddings=paddings, extra_below_stride=False):
    """Shapes and keyword arguments of one call that fits: (x_shape, w_shape, kwargs)."""
    groups = draw(st.integers(1, 3))
    N, CG, FG = draw(st.tuples(*[st.integers(1, 2)] * 3))
    kernel, stride, dilation, padding = draw(st.tuples(pairs, pairs, pairs, paddings))
    most = stride if extra_below_stride else [max(s, d) for s, d in zip(stride, dilation)]
    extra = tuple(draw(st.integers(0, n - 1)) for n in most)
    win = window("", kernel, stride, padding, dilation)
    # (n - 1) * stride + extent - padding + extra leaves at least one pixel.
    short = [1 + sum(p) - e - o for p, e, o in zip(win.padding, win.extent, extra)]
    least = [max(1, 1 - -n // s) for n, s in zip(short, stride)]
    x_shape = (N, CG * groups, *(draw(st.integers(n, n + 2)) for n in least))
    kwargs = {
        "stride": stride,
        "padding": padding,
        "output_padding": extra,
        "groups": groups,
        "dilation": dilation,
    }
    return x_shape, (CG * groups, FG, *kernel), kwargs


def draw_arrays(seed, x_shape, w_shape, groups=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return tuple(normal(rng, s, dtype) for s in (x_shape, w_shape, (w_shape[1] * groups,)))


@versions
def test_hand_computed_numbers(version):
    x = np.array([[[[1.0, 2], [3, 4]]]])
    w = np.array([[[[1.0, 10], [100, 0]]]])
    with use(version):
        y, cache = conv_transpose2d_forward(x, w, np.array([0.5]))
        dy = np.array([[[[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]]])
        dx, dw, db = conv_transpose2d_backward(dy, cache)
    np.testing.assert_array_equal(
        y, [[[[1.5, 12.5, 20.5], [103.5, 234.5, 40.5], [300.5, 400.5, 0.5]]]]
    )
    np.testing.assert_array_equal(dx, [[[[421, 532], [754, 865]]]])
    np.testing.assert_array_equal(dw, [[[[37, 47], [67, 77]]]])
    np.testing.assert_array_equal(db, [45])


@versions
def test_padding_cuts_and_output_padding_gives_back(version):
    x, w = np.array([[[[1.0, 2]]]]), np.array([[[[3.0, 4, 5]]]])
    canvas = [3, 4, 5 + 6, 8, 10]
    for padding, extra, expected in [
        (0, 0, canvas),
        ((0, (1, 0)), 0, canvas[1:]),
        ((0, (0, 1)), 0, canvas[:-1]),
        ((0, (1, 2)), (0, 1), canvas[1:-1]),
        ((0, (1, 0)), (0, 1), [*canvas[1:], 0]),
        ((0, (4, 0)), (0, 1), [10, 0]),
    ]:
        with use(version):
            y, _ = conv_transpose2d_forward(
                x, w, stride=(1, 2), padding=padding, output_padding=extra
            )
        np.testing.assert_array_equal(y, [[[expected]]])


@versions
def test_an_output_past_the_canvas_holds_the_bias(version):
    # The canvas is 1x1; padding cuts two columns before it and output_padding adds three.
    x, w, b = np.ones((1, 1, 1, 1)), np.ones((1, 1, 1, 1)), np.array([7.0])
    with use(version):
        y, cache = conv_transpose2d_forward(
            x, w, b, padding=(0, (2, 0)), output_padding=(0, 3), dilation=4
        )
        dx, dw, db = conv_transpose2d_backward(np.ones_like(y), cache)
    np.testing.assert_array_equal(y, [[[[7, 7]]]])
    assert not dx.any()
    assert not dw.any()
    assert db == 2


@versions
@given(case=cases(extra_below_stride=True), seed=seeds)  # else conv2d takes more places on y
def test_equals_the_backward_of_conv2d(version, case, seed):
    x_shape, w_shape, kwargs = case
    x, w, _ = draw_arrays(seed, x_shape, w_shape)
    with use(version):
        y, cache = conv_transpose2d_forward(x, w, **kwargs)
        dx, dw, _ = conv_transpose2d_backward(y, cache)
    kwargs.pop("output_padding")
    conv_y, conv_cache = conv2d.conv2d_forward(y, w, **kwargs)
    conv_dx, conv_dw, _ = conv2d.conv2d_backward(x, conv_cache)
    for got, expected in ((y, conv_dx), (dx, conv_y), (dw, conv_dw)):
        np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


@versions
@given(case=cases(), seed=seeds, dtype=dtypes, bias=st.booleans())
def test_versions_equal_the_reference(version, case, seed, dtype, bias):
    x_shape, w_shape, kwargs = case
    x, w, b = draw_arrays(seed, x_shape, w_shape, kwargs["groups"], dtype)
    assert_equals_reference(version, *PAIR, (x, w, b if bias else None), seed, **kwargs)


@versions
@settings(max_examples=15)
@given(case=cases(), seed=seeds)
def test_gradients_equal_finite_differences(version, case, seed):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, kwargs["groups"])
    assert_gradients(version, *PAIR, arrays, seed, **kwargs)


@versions
@given(case=cases(), seed=seeds)
def test_backward_is_the_adjoint(version, case, seed):
    x_shape, w_shape, kwargs = case
    x, w, _ = draw_arrays(seed, x_shape, w_shape)
    assert_adjoint(version, *PAIR, (x, w), seed, **kwargs)


@versions
@given(case=cases(), seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(version, case, seed, layout, dtype):
    x_shape, w_shape, kwargs = case
    arrays = draw_arrays(seed, x_shape, w_shape, kwargs["groups"], dtype)
    assert_layout_free(version, *PAIR, arrays, seed, layout, **kwargs)


def test_without_a_bias_there_is_no_gradient_for_it():
    y, cache = conv_transpose2d_forward(X, W)
    assert conv_transpose2d_backward(y, cache)[2] is None


@versions
def test_empty_batch(version):
    with use(version):
        y, cache = conv_transpose2d_forward(
            np.zeros((0, 4, 5, 5)), np.ones((4, 2, 3, 3)), np.ones(2)
        )
        dx, dw, db = conv_transpose2d_backward(y, cache)
    assert y.shape == (0, 2, 7, 7)
    assert dx.shape == (0, 4, 5, 5)
    assert dw.shape == (4, 2, 3, 3)
    assert not dw.any()
    assert db.shape == (2,)
    assert not db.any()


@versions
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_stay_under_the_kernel(version, bad):
    x, w = np.ones((1, 1, 3, 3)), np.ones((1, 1, 2, 2))
    hurt = x.copy()
    hurt[0, 0, 1, 1] = bad
    with use(version):
        clean, cache = conv_transpose2d_forward(x, w, np.zeros(1))
        y, _ = conv_transpose2d_forward(hurt, w)
    expected = clean.copy()
    expected[0, 0, 1:3, 1:3] = bad
    np.testing.assert_array_equal(y, expected)

    dy = np.ones_like(y)
    dy[0, 0, 1, 1] = bad
    with use(version):
        dx, dw, db = conv_transpose2d_backward(dy, cache)
    np.testing.assert_array_equal(dx, [[[[bad, bad, 4], [bad, bad, 4], [4, 4, 4]]]])
    np.testing.assert_array_equal(dw, np.full((1, 1, 2, 2), bad))
    np.testing.assert_array_equal(db, [bad])


def test_blocks_of_the_batch_give_the_whole_batch(monkeypatch):
    x, w, b = draw_arrays(0, (5, 3, 4, 4), (3, 2, 3, 3))
    with use("reference"):
        whole, cache = conv_transpose2d_forward(x, w, b)
        grads = conv_transpose2d_backward(whole, cache)
    monkeypatch.setattr(conv2d, "COLS_BYTES", 2 * 18 * 16 * 8)  # two images a block, one left
    y, cache = conv_transpose2d_forward(x, w, b)
    np.testing.assert_allclose(y, whole, rtol=1e-12)
    for a, e in zip(conv_transpose2d_backward(whole, cache), grads):
        np.testing.assert_allclose(a, e, rtol=1e-11)


two = st.integers(0, 2)


@given(case=cases(paddings=st.one_of(two, st.tuples(two, two))), seed=seeds, bias=st.booleans())
def test_equals_pytorch(torch, case, seed, bias):
    x_shape, w_shape, kwargs = case

    def torch_conv_transpose2d(*arrays):
        return torch.nn.functional.conv_transpose2d(*arrays, **kwargs)

    x, w, b = draw_arrays(seed, x_shape, w_shape, kwargs["groups"])
    arrays = (x, w, b if bias else None)
    assert_equals_torch(torch, *PAIR, arrays, seed, torch_conv_transpose2d, **kwargs)


X, W = np.zeros((2, 6, 5, 5)), np.zeros((6, 4, 3, 3))


@pytest.mark.parametrize(
    ("args", "kwargs", "error", "message"),
    [
        (
            (X[0], W),
            {},
            ValueError,
            r"conv_transpose2d: x: expected 4 axes .*got shape \(6, 5, 5\)",
        ),
        ((X, W[0]), {}, ValueError, r"conv_transpose2d: w: expected 4 axes"),
        ((X[:, :3], W), {}, ValueError, r"x: expected 6 channels \(w.shape\[0\]\), got 3"),
        ((X, W), {"groups": 4}, ValueError, r"groups: expected a divisor of the 6 channels, got 4"),
        ((X, W), {"groups": 0}, ValueError, r"groups: expected an integer >= 1, got 0"),
        ((X, W, np.zeros(5)), {}, ValueError, r"b: expected shape \(4,\) .* got \(5,\)"),
        ((X, W, np.zeros(4)), {"groups": 2}, ValueError, r"b: expected shape \(8,\) .* got \(4,\)"),
        ((X, W[:, :0]), {}, ValueError, r"w: expected no axis of length 0"),
        ((X[:, :, :0], W), {}, ValueError, r"x: expected at least one pixel, got 0x5"),
        ((X, W), {"stride": 0}, ValueError, r"stride: expected an integer >= 1, got 0"),
        ((X, W), {"stride": (1, -1)}, ValueError, r"stride: expected an integer >= 1, got -1"),
        ((X, W), {"stride": 1.5}, TypeError, r"stride: expected an integer >= 1, got 1.5"),
        ((X, W), {"dilation": 0}, ValueError, r"dilation: expected an integer >= 1, got 0"),
        ((X, W), {"padding": -1}, ValueError, r"padding: expected an integer >= 0, got -1"),
        ((X, W), {"padding": "same"}, TypeError, r"padding: expected an integer .* got 'same'"),
        ((X, W), {"padding": 4}, ValueError, r"padding: .* at least 1x1, got -1x-1 \(7x7 less"),
        ((X, W), {"padding": (0, (3, 4))}, ValueError, r"padding: .* at least 1x1, got 7x0"),
        ((X, W), {"output_padding": -1}, ValueError, r"output_padding: .* >= 0, got -1"),
        ((X, W), {"output_padding": 1}, ValueError, r"output_padding: expected less than stride"),
        (
            (X, W),
            {"output_padding": (1, 2), "stride": (2, 1), "dilation": (1, 2)},
            ValueError,
            r"output_padding: expected less than .* got \(1, 2\)",
        ),
        ((X.astype("f4"), W), {}, TypeError, r"w: expected float32 like x, got float64"),
        ((X.astype("f2"), W), {}, TypeError, r"x: expected float32 or float64, got float16"),
        ((X.astype(int), W), {}, TypeError, r"x: expected float32 or float64, got int64"),
        ((X.tolist(), W), {}, TypeError, r"x: expected a NumPy or CuPy array, got list"),
    ],
)
def test_bad_input_is_named(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        conv_transpose2d_forward(*args, **kwargs)


def test_bad_upstream_gradient_is_named():
    y, cache = conv_transpose2d_forward(X, W)
    with pytest.raises(ValueError, match=r"conv_transpose2d_backward: dy: expected shape .*like y"):
        conv_transpose2d_backward(y[:, :, :1], cache)
    with pytest.raises(TypeError, match=r"dy: expected float64 like x, got float32"):
        conv_transpose2d_backward(y.astype("f4"), cache)
