"""Matrix products that a CUDA graph can hold.

CuPy refuses every call of cuBLAS while a stream is captured, although cuBLAS itself allows it as
long as it need not allocate. So a recorded step multiplies through a handle of its own, called by
ctypes, with a workspace that is there beforehand; everywhere else ``a @ b`` is as good.

cuBLAS stores matrices column by column. What lies in memory as C (M, N) row by row is its C', and
C' = B' A': the operands change places, and each is passed as "transposed" exactly if its rows are
not the ones that lie next to each other.

References
----------
NVIDIA, cuBLAS documentation, "CUDA Graphs Support" and "cublasSetWorkspace".
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

from minicnn.backend import Array, array_module

WORKSPACE = 32 << 20  # bytes: what NVIDIA suggests for Hopper
NAMES = ("libcublas.so.13", "libcublas.so.12", "cublas64_13.dll", "cublas64_12.dll")
AS_IS, TRANSPOSED = 0, 1  # cublasOperation_t
GEMM = {
    "float32": ("cublasSgemmStridedBatched", ctypes.c_float),
    "float64": ("cublasDgemmStridedBatched", ctypes.c_double),
}


class BlasError(RuntimeError):
    """cuBLAS is not to be found, or refused a call."""


@cache
def library() -> Any:
    """Load cuBLAS, the same file that CuPy uses.

    Raises
    ------
    BlasError
        If there is none.
    """
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # comes with CuPy 14

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except (ImportError, RuntimeError, OSError):
        pass
    for name in NAMES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise BlasError(f"no cuBLAS found, looked for {', '.join(NAMES)}")


class Blas:
    """A cuBLAS handle with a workspace, for work on one stream; made when first needed.

    Parameters
    ----------
    stream : cupy.cuda.Stream
        On which the products run.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._library: Any = None

    def _open(self, cupy: Any) -> None:
        self._library, self._handle = library(), ctypes.c_void_p()
        self._call("cublasCreate_v2", ctypes.byref(self._handle))
        # In this order: to set the stream takes the workspace away.
        self._call("cublasSetStream_v2", self._handle, ctypes.c_void_p(self._stream.ptr))
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
            self._workspace = cupy.empty(WORKSPACE, cupy.uint8)
        pointer, size = ctypes.c_void_p(self._workspace.data.ptr), ctypes.c_size_t(WORKSPACE)
        self._call("cublasSetWorkspace_v2", self._handle, pointer, size)

    def matmul(self, a: Array, b: Array) -> Array:
        """Return ``a @ b`` of matrices (M, K) and (K, N), or of stacks (G, M, K) and (G, K, N).

        Raises
        ------
        BlasError
            If cuBLAS is not there or refuses.
        """
        if self._library is None:
            self._open(array_module(a))
        xp, stacked = array_module(a), a.ndim == 3
        a3, b3 = (a, b) if stacked else (a[None], b[None])
        (G, M, K), N = a3.shape, b3.shape[2]
        c = xp.empty((G, M, N), a.dtype)
        if not K:
            c.fill(0)
        elif c.size:
            name, real = GEMM[a.dtype.name]
            first, second = _operand(b3), _operand(a3)
            self._call(
                name,
                self._handle,
                *(ctypes.c_int(n) for n in (first.how, second.how, N, M, K)),
                ctypes.byref(real(1)),
                *first.arguments(),
                *second.arguments(),
                ctypes.byref(real(0)),
                *(ctypes.c_void_p(c.data.ptr), ctypes.c_int(N), ctypes.c_longlong(M * N)),
                ctypes.c_int(G),
            )
        return c if stacked else c[0]

    def _call(self, name: str, *args: Any) -> None:
        status = getattr(self._library, name)(*args)
        if status:
            raise BlasError(f"{name}: status {status}")


class _operand:
    """How cuBLAS is told of a stack of row-by-row matrices: as it is, or transposed."""

    def __init__(self, a: Array) -> None:
        self.a, self.how = a, AS_IS
        _, rows, columns = a.shape
        step = a.itemsize
        if a.strides[2] == step or columns == 1:
            leading = a.strides[1]
        elif a.strides[1] == step or rows == 1:
            self.how, leading = TRANSPOSED, a.strides[2]
        else:
            self.a = a = array_module(a).ascontiguousarray(a)
            leading = a.strides[1]
        least = columns if self.how == AS_IS else rows
        self.leading = max(leading // step, least)
        self.apart = a.strides[0] // step

    def arguments(self) -> tuple[Any, Any, Any]:
        return (
            ctypes.c_void_p(self.a.data.ptr),
            ctypes.c_int(self.leading),
            ctypes.c_longlong(self.apart),
        )
