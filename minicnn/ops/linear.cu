// A matrix product with what stands before and behind it in a network, for sizes at which the
// launches cost more than the arithmetic (large products are cuBLAS's).
//
//   c[i, j] = sum over k of a[i, k] * b[k, j], then + bias[j], max(., 0), and 0 where mask <= 0
//
// a[i, k] lies at a[i * SI + k * SK], b[k, j] at b[k * TK + j * TJ_]; A_ALONG_K and B_ALONG_K say
// that neighbours in k are neighbours in memory. With `ones`, column `columns` of b is all ones
// and gives the row sums: dw = dy^T x gets db that way.
#include "tile.cuh"

__device__ const REAL ONE[1] = {1};

struct Product {
  const REAL *a, *b, *bias, *mask;
  REAL *c, *sums;
  int rows, columns, depth, si, sk, tk, tj, relu;
  int i0, j0;

  __device__ __forceinline__ void load(REAL *to_a, REAL *to_b, int k0) const {
    const auto find_a = [&](int k, int i, const REAL *&from) {
      from = a + (long long)(i0 + i) * si + (long long)(k0 + k) * sk;
      return i0 + i < rows && k0 + k < depth;
    };
    const auto find_b = [&](int k, int column, const REAL *&from) {
      const int j = j0 + place(column);
      if (sums && j == columns) {
        from = ONE;
        return k0 + k < depth;
      }
      from = b + (long long)(k0 + k) * tk + (long long)j * tj;
      return j < columns && k0 + k < depth;
    };
#if A_ALONG_K
    load_along_k<TI, ROW_A>(to_a, find_a);
#else
    load_across<TI, ROW_A>(to_a, find_a);
#endif
#if B_ALONG_K
    load_along_k<TJ, ROW_B>(to_b, find_b);
#else
    load_across<TJ, ROW_B>(to_b, find_b);
#endif
  }
  __device__ __forceinline__ void emit(int i, int j, const REAL *v) const {
    i += i0, j += j0;
    if (i >= rows) return;
#pragma unroll
    for (int e = 0; e < 4; e++) {
      if (sums && j + e == columns) sums[i] = v[e];
      if (j + e >= columns) break;
      const long long at = (long long)i * columns + j + e;
      REAL z = v[e] + (bias ? bias[j + e] : REAL(0));
      if (relu && z <= 0) z = 0;  // NaN passes
      if (mask && !(mask[at] > 0)) z = 0;
      c[at] = z;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) linear_product(
    const REAL *a, const REAL *b, const REAL *bias, const REAL *mask, REAL *c, REAL *sums, int rows,
    int columns, int depth, int si, int sk, int tk, int tj, int relu) {
  extern __shared__ float4 shared[];
  Product p = {a, b, bias, mask, c, sums, rows, columns, depth, si, sk, tk, tj, relu};
  p.i0 = blockIdx.y * TI, p.j0 = blockIdx.x * TJ;
  multiply(p, depth, (REAL *)shared);
}
