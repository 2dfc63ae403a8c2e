"""Products through cuBLAS by ctypes: every layout of the operands, alone and in stacks."""

import numpy as np
import pytest

from minicnn import to_cpu, to_gpu
from minicnn.gpu import blas
from minicnn.gpu.blas import Blas, BlasError

LAYOUTS = {
    "rows": lambda a: np.ascontiguousarray(a),
    "columns": lambda a: np.ascontiguousarray(a.swapaxes(-1, -2)).swapaxes(-1, -2),
    "every other row": lambda a: np.repeat(a, 2, axis=-2)[..., ::2, :],
    "every other column": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
}
layouts = pytest.mark.parametrize("a_layout", LAYOUTS)


def laid_out(cupy, a, layout):
    """The same layout on the GPU, where copies of arrays are in C order."""
    a = LAYOUTS[layout](a)
    if layout == "columns":
        return to_gpu(np.ascontiguousarray(a.swapaxes(-1, -2))).swapaxes(-1, -2)
    if layout == "every other row":
        return to_gpu(np.repeat(a, 2, axis=-2))[..., ::2, :]
    if layout == "every other column":
        return to_gpu(np.repeat(a, 2, axis=-1))[..., ::2]
    return to_gpu(a)


@layouts
@pytest.mark.parametrize("b_layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((2, 3), (3, 4)),
        ((1, 3), (3, 1)),
        ((3, 1), (1, 3)),
        ((5, 2, 3), (5, 3, 4)),
        ((1, 1, 4), (1, 4, 7)),
        ((2, 0), (0, 3)),
        ((0, 2), (2, 3)),
        ((2, 3, 0), (2, 0, 1)),
    ],
)
def test_products(cupy, a_layout, b_layout, dtype, a_shape, b_shape):
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-9, 9, shape).astype(dtype) for shape in (a_shape, b_shape))
    stream = cupy.cuda.Stream()
    with stream:
        there = laid_out(cupy, a, a_layout), laid_out(cupy, b, b_layout)
        c = Blas(stream).matmul(*there)
        stream.synchronize()
    assert c.dtype == dtype
    np.testing.assert_array_equal(to_cpu(c), a @ b)  # whole numbers: exact


def test_without_cublas_it_says_so(monkeypatch):
    def fail(name, mode=0):
        raise OSError(name)

    monkeypatch.setattr("minicnn.gpu.blas.ctypes.CDLL", fail)
    with pytest.raises(BlasError, match=r"no cuBLAS found, looked for libcublas.so.13"):
        blas.library.__wrapped__()


def test_a_refusal_is_named(cupy, imitated):
    stream, other = cupy.cuda.Stream(), cupy.cuda.Stream()
    with other, pytest.raises(BlasError, match="cublasDgemmStridedBatched: status 7"):
        Blas(stream).matmul(cupy.ones((2, 2)), cupy.ones((2, 2)))
