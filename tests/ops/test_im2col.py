"""im2col reads what the window covers; col2im is its adjoint."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn import ops, use
from minicnn.gradcheck import adjoint_gap
from minicnn.ops.im2col import VERSIONS
from minicnn.shapes import window
from strategies import conv_cases, dtypes, laid_out, layouts, normal, seeds

versions = pytest.mark.parametrize("version", VERSIONS)


def geometry(case):
    """Shape of x and the window's keyword arguments, from a convolution's case."""
    x_shape, w_shape, kwargs = case
    return x_shape, {k: v for k, v in kwargs.items() if k != "groups"} | {
        "kernel_size": w_shape[2:]
    }


def test_hand_computed_numbers():
    x = np.arange(1.0, 7).reshape(1, 1, 2, 3)
    cols = ops.im2col(x, (1, 2), stride=(1, 2), padding=((0, 0), (1, 0)))
    np.testing.assert_array_equal(cols, [[0, 2, 0, 5], [1, 3, 4, 6]])
    np.testing.assert_array_equal(
        ops.col2im(cols, x.shape, (1, 2), stride=(1, 2), padding=((0, 0), (1, 0))), x
    )


def test_overlaps_add_up():
    counts = ops.col2im(np.ones((9, 9)), (1, 1, 5, 5), 3)[0, 0]
    line = np.array([1, 2, 3, 2, 1])
    np.testing.assert_array_equal(counts, np.outer(line, line))


@versions
@given(case=conv_cases(), seed=seeds, dtype=dtypes, layout=layouts)
def test_versions_equal_the_reference(version, case, seed, dtype, layout):
    x_shape, kwargs = geometry(case)
    rng = np.random.default_rng(seed)
    x = normal(rng, x_shape, dtype)
    with use("reference"):
        expected = ops.im2col(x, **kwargs)
        dcols = normal(rng, expected.shape, dtype)
        dx_expected = ops.col2im(dcols, x_shape, **kwargs)
    with use(version):
        cols = ops.im2col(laid_out(x, layout), **kwargs)
        dx = ops.col2im(laid_out(dcols, layout), x_shape, **kwargs)
    assert cols.dtype == dx.dtype == dtype
    np.testing.assert_array_equal(cols, expected)
    tolerance = 1e-6 if dtype == np.float32 else 1e-14
    np.testing.assert_allclose(dx, dx_expected, rtol=tolerance, atol=10 * tolerance)
    assert adjoint_gap(cols, dcols, x, dx) < tolerance


@given(case=conv_cases(), seed=seeds, padding=st.integers(0, 2))
def test_equals_pytorch_unfold_and_fold(torch, case, seed, padding):
    x_shape, kwargs = geometry(case)
    kwargs["padding"] = padding
    EH, EW = window("", kwargs["kernel_size"], dilation=kwargs["dilation"]).extent
    N, C, H, W = *x_shape[:2], x_shape[2] + EH, x_shape[3] + EW
    x = normal(np.random.default_rng(seed), (N, C, H, W))
    cols = ops.im2col(x, **kwargs)
    unfolded = torch.nn.functional.unfold(torch.tensor(x), **kwargs)  # (N, C*KH*KW, OH*OW)
    np.testing.assert_array_equal(cols, unfolded.numpy().swapaxes(0, 1).reshape(cols.shape))
    folded = torch.nn.functional.fold(unfolded, (H, W), **kwargs).numpy()
    np.testing.assert_allclose(ops.col2im(cols, x.shape, **kwargs), folded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.im2col(np.zeros((3, 3)), 2), ValueError, r"im2col: x: expected 4 axes"),
        (
            lambda: ops.im2col(np.zeros((1, 1, 3, 3)), 4),
            ValueError,
            r"im2col: kernel_size: .*got 4x4",
        ),
        (lambda: ops.im2col(np.zeros((1, 1, 3, 3)), 0), ValueError, r"kernel_size: .* got 0"),
        (
            lambda: ops.col2im(np.zeros((4, 3)), (1, 1, 3, 3), 2),
            ValueError,
            r"col2im: cols: expected shape \(4, 4\), got \(4, 3\)",
        ),
        (lambda: ops.col2im(np.zeros((4, 4)), (1, 3, 3), 2), ValueError, r"x_shape: expected"),
        (lambda: ops.im2col(np.zeros((1, 1, 3, 3), int), 2), TypeError, r"x: expected float32"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "kwargs", [{}, {"padding": (2, 5)}, {"stride": (2, 3), "padding": 1}, {"dilation": (1, 6)}]
)
def test_numba_takes_rows_of_any_length(kwargs, dtype):
    """Less than a vector, several, and a rest; small integers, whose sums are exact."""
    pytest.importorskip("numba", reason="Numba is not installed")
    for W in (14, 23, 71):
        rng = np.random.default_rng(W)
        x = rng.integers(-9, 9, (2, 3, 7, W)).astype(dtype)
        with use("numpy"):
            expected = ops.im2col(x, (3, 2), **kwargs)
            cols = rng.integers(-9, 9, expected.shape).astype(dtype)
            back = ops.col2im(cols, x.shape, (3, 2), **kwargs)
        with use("numba"):
            np.testing.assert_array_equal(ops.im2col(x, (3, 2), **kwargs), expected)
            np.testing.assert_array_equal(ops.col2im(cols, x.shape, (3, 2), **kwargs), back)
