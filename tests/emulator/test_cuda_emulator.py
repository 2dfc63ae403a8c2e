"""The emulator runs what CUDA would, and refuses what would fail or hang there."""

import numpy as np
import pytest

cuda = pytest.importorskip("emulator.cuda")
pytestmark = pytest.mark.skipif(cuda.compiler() is None, reason="no C++ compiler (g++)")

CODE = r"""
extern "C" __global__ void add(const float *x, float *y, long long n, float by) {
  long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i] = x[i] + by;
}
extern "C" __global__ void reverse(int *x) {  // a block turns its part round
  extern __shared__ int part[];
  part[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
#ifndef RACE
  __syncthreads();
#endif
  x[blockIdx.x * blockDim.x + threadIdx.x] = part[blockDim.x - 1 - threadIdx.x];
}
extern "C" __global__ void warp_sum(const double *x, double *y) {
  double v = x[threadIdx.x];
  for (int bits = 16; bits; bits /= 2) v += __shfl_xor_sync(0xffffffff, v, bits);
  y[threadIdx.x] = v;
}
extern "C" __global__ void diverge(int *x, int how) {
  if (how == 0 && threadIdx.x == 3) return;
  if (how == 1 && threadIdx.x == 3) __syncthreads();
  if (how == 2 && threadIdx.x == 3) {
    __syncwarp();
    return;
  }
  __syncthreads();
  x[threadIdx.x] = 1;
}
extern "C" __global__ void touch(const float *x, float *y, int i, int j) { y[j] = x[i]; }
extern "C" __global__ void beyond(float *y, int i) {
  extern __shared__ float part[];
  part[i] = 1;
  y[0] = part[0];
}
extern "C" __global__ void unwritten(float *y) {
  __shared__ float part[32];
  if (threadIdx.x && blockIdx.x == 0) part[threadIdx.x] = 1;
  __syncthreads();
  y[blockIdx.x * 32 + threadIdx.x] = part[threadIdx.x];
}
extern "C" __global__ void count(int *total, int *last) {
  if (atomicAdd(total, 1) == gridDim.x * blockDim.x - 1) *last = blockIdx.x;
}
extern "C" __global__ void tensor(const float *a, const float *b, float *c) {
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  unsigned fa[4] = {to_tf32(a[g * 8 + t]), to_tf32(a[(g + 8) * 8 + t]), to_tf32(a[g * 8 + t + 4]),
                    to_tf32(a[(g + 8) * 8 + t + 4])};
  unsigned fb[2] = {to_tf32(b[t * 8 + g]), to_tf32(b[(t + 4) * 8 + g])};
  float d[4] = {0, 0, 0, 0};
  mma_tf32(d, fa, fb);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = d[i];
}
extern "C" __global__ void pipeline(const float *x, float *y) {
  __shared__ float part[2][32];
  copy_async(&part[0][threadIdx.x], x + threadIdx.x, 4, true);
  copy_commit();
  copy_async(&part[1][threadIdx.x], x + 32 + threadIdx.x, 4, threadIdx.x < 30);
  copy_commit();
  copy_wait<1>();
  __syncthreads();
  y[threadIdx.x] = part[0][31 - threadIdx.x];
  y[32 + threadIdx.x] = part[1][threadIdx.x];  // not here yet
  copy_wait<0>();
  __syncthreads();
  y[64 + threadIdx.x] = part[1][threadIdx.x];
}
extern "C" __global__ void never_waits(const float *x) {
  __shared__ float part[1];
  for (int i = 0; i < 1000; i++) copy_async(part, x, 4, true);
}
"""


@pytest.fixture(scope="module")
def kernel():
    return cuda.RawModule(code=CODE).get_function


def test_a_grid_of_blocks(kernel):
    x, y = np.arange(1000, dtype="f4"), np.zeros(1000, "f4")
    kernel("add")((4,), (256,), (x, y, np.int64(1000), np.float32(0.5)))
    np.testing.assert_array_equal(y, x + np.float32(0.5))


def test_shared_memory_and_barriers(kernel):
    x = np.arange(64, dtype="i4")
    kernel("reverse")((2,), (32,), (x,), shared_mem=128)
    np.testing.assert_array_equal(x.reshape(2, 32), np.arange(64).reshape(2, 32)[:, ::-1])


def test_a_missing_barrier_is_seen():
    x = np.arange(64, dtype="i4")
    module = cuda.RawModule(code=CODE, options=("-DRACE",))
    module.get_function("reverse")((2,), (32,), (x,), shared_mem=128)
    assert (x.reshape(2, 32) != np.arange(64).reshape(2, 32)[:, ::-1]).any()


def test_shuffles(kernel):
    x, y = np.arange(64.0), np.zeros(64)
    kernel("warp_sum")((1,), (64,), (x, y))
    np.testing.assert_array_equal(y, np.repeat(x.reshape(2, 32).sum(1), 32))


@pytest.mark.parametrize("how", [0, 1, 2])
def test_a_barrier_that_some_threads_miss(kernel, how):
    with pytest.raises(cuda.CudaError, match=r"diverge: divergent barrier: "):
        kernel("diverge")((1,), (64,), (np.zeros(64, "i4"), np.int32(how)))


@pytest.mark.parametrize(
    ("i", "j", "where"),
    [(1200, 0, "argument 0: element 1200 of 1000"), (0, 1200, "argument 1: element 1200 of 1000")],
)
def test_an_index_outside_an_array(kernel, i, j, where):
    x, y = np.zeros(1000, "f4"), np.zeros(1000, "f4")
    with pytest.raises(cuda.CudaError, match=where):
        kernel("touch")((1,), (1,), (x, y, np.int32(i), np.int32(j)))
    kernel("touch")((1,), (1,), (x, y, np.int32(0), np.int32(999)))  # and all goes on


def test_one_beside_the_array(kernel):
    x, y = np.zeros(999, "f4"), np.zeros(999, "f4")
    with pytest.raises(cuda.CudaError, match="argument 1: written outside"):
        kernel("touch")((1,), (1,), (x, y, np.int32(0), np.int32(-1)))
    kernel("touch")((1,), (1,), (x, y, np.int32(-1), np.int32(0)))
    assert np.isnan(y[0])


def test_shared_memory_is_bounded_and_starts_as_nan(kernel):
    y = np.zeros(64, "f4")
    with pytest.raises(cuda.CudaError, match="outside the dynamic shared memory"):
        kernel("beyond")((1,), (1,), (y, np.int32(8)), shared_mem=32)
    with pytest.raises(cuda.CudaError, match="not granted"):
        kernel("beyond")((1,), (1,), (y, np.int32(0)), shared_mem=50_000)
    kernel("unwritten")((2,), (32,), (y,))
    assert np.isnan(y[[0, *range(32, 64)]]).all()  # nothing is left of the block before
    assert (y[1:32] == 1).all()


def test_atomics(kernel):
    total, last = np.zeros(1, "i4"), np.zeros(1, "i4")
    kernel("count")((3,), (32,), (total, last))
    assert (total[0], last[0]) == (96, 2)


def test_tensor_cores(kernel):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((16, 8), "f4"), rng.standard_normal((8, 8), "f4")
    c = np.zeros((16, 8), "f4")
    kernel("tensor")((1,), (32,), (a, b, c))
    np.testing.assert_allclose(c, a @ b, atol=8 * 2**-10)
    assert np.abs(c - a @ b).max() > 2**-14  # and it did round
    a, b = rng.integers(-9, 9, a.shape).astype("f4"), rng.integers(-9, 9, b.shape).astype("f4")
    kernel("tensor")((1,), (32,), (a, b, c))
    np.testing.assert_array_equal(c, a @ b)


def test_an_asynchronous_copy_lands_when_waited_for(kernel):
    x, y = np.arange(64, dtype="f4"), np.zeros(96, "f4")
    kernel("pipeline")((1,), (32,), (x, y))
    np.testing.assert_array_equal(y[:32], x[31::-1])
    assert np.isnan(y[32:64]).all()
    np.testing.assert_array_equal(y[64:], [*range(32, 62), 0, 0])


def test_copies_that_are_never_waited_for(kernel):
    with pytest.raises(cuda.CudaError, match="never waited for"):
        kernel("never_waits")((1,), (1,), (np.zeros(1, "f4"),))


X = np.zeros(4, "f4")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, X.copy(), np.int64(4)), "expected 4 arguments, got 3"),
        ((X, X.copy(), np.int32(4), np.float32(1)), "argument 2: expected i8, got int32"),
        ((X, X.copy(), np.int64(4), 1.0), "argument 3: expected f4, got float64"),
        ((X, np.zeros(4), np.int64(4), np.float32(1)), "argument 1: expected items of 4 bytes"),
        ((X, np.zeros((4, 2), "f4")[:, 0], np.int64(4), np.float32(1)), "C-contiguous"),
    ],
)
def test_arguments_have_to_match(kernel, args, message):
    with pytest.raises(cuda.CudaError, match=message):
        kernel("add")((1,), (32,), args)


@pytest.mark.parametrize(
    ("grid", "block"), [((0,), (32,)), ((1,), (1025,)), ((1, 65536), (1,)), ((2**31,), (1,))]
)
def test_grids_that_no_device_runs(kernel, grid, block):
    with pytest.raises(cuda.CudaError, match=r"grid|threads"):
        kernel("add")(grid, block, (X, X.copy(), np.int64(4), np.float32(1)))


def test_what_the_compiler_refuses():
    with pytest.raises(cuda.CudaError, match="nonsense"):
        cuda.RawModule(code="nonsense")
    with pytest.raises(cuda.CudaError, match="no kernel 'missing'"):
        cuda.RawModule(code=CODE).get_function("missing")
