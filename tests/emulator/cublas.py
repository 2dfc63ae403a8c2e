"""cuBLAS as a library for ctypes: strided batched products on memory that is the host's.

It takes what the real functions take, addresses included, so that an operand that is passed the
wrong way round, or with a wrong leading dimension, gives wrong numbers here too.
"""

import ctypes

import numpy as np

INVALID_VALUE = 7


class CuBlas:
    """As the loaded ``libcublas``, for one imitated GPU."""

    def __init__(self, machine):
        self._machine = machine
        self._workspace = None
        self._stream = None

    def cublasCreate_v2(self, handle):
        handle._obj.value = 1
        return 0

    def cublasSetStream_v2(self, handle, stream):
        self._stream, self._workspace = stream.value, None
        return 0

    def cublasSetWorkspace_v2(self, handle, pointer, size):
        self._workspace = size.value
        return 0

    def cublasSgemmStridedBatched(self, *args):
        return self._gemm(np.float32, *args)

    def cublasDgemmStridedBatched(self, *args):
        return self._gemm(np.float64, *args)

    def _gemm(self, dtype, handle, how_a, how_b, m, n, k, alpha, *rest):
        a, lda, apart_a, b, ldb, apart_b, beta, c, ldc, apart_c, count = rest
        m, n, k, count = (size.value for size in (m, n, k, count))
        if not handle.value or self._stream != self._machine.stream.ptr:
            return INVALID_VALUE
        if self._machine.capturing and not self._workspace:
            return INVALID_VALUE  # it would have to allocate
        least = (k if how_a.value else m), (n if how_b.value else k), m
        if any(ld.value < max(1, size) for ld, size in zip((lda, ldb, ldc), least)):
            return INVALID_VALUE

        def matrices(pointer, leading, apart, rows, columns, transposed=0):
            """Stored column by column: element (i, j) at i + j * leading."""
            stored = (columns, rows) if transposed else (rows, columns)
            span = (count - 1) * apart.value + (stored[1] - 1) * leading.value + stored[0]
            memory = (ctypes.c_char * (span * dtype().itemsize)).from_address(pointer.value)
            size = dtype().itemsize
            steps = (apart.value * size, size, leading.value * size)
            stack = np.ndarray((count, *stored), dtype, memory, strides=steps)
            return stack.swapaxes(1, 2) if transposed else stack

        left = matrices(a, lda, apart_a, m, k, how_a.value)
        right = matrices(b, ldb, apart_b, k, n, how_b.value)
        out = matrices(c, ldc, apart_c, m, n)
        factor, keep = alpha._obj.value, beta._obj.value

        def work():
            with np.errstate(all="ignore"):
                product = factor * (left @ right)
                out[...] = product + keep * out if keep else product

        self._machine.queue(work)
        return 0
