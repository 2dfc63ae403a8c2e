// A tile of a matrix product, c[i, j] = sum over k of a[i, k] * b[k, j], by one block.
//
// TI x TJ is the tile. DEPTH values of k at a time lie in shared memory, in two stages: while one is
// multiplied, the next is on its way from global memory (asynchronous copies). A Problem says what
// a and b are (`load`) and what happens with the result (`emit`), so that convolutions need no
// column matrix: they gather the pixels as they load.
//
// Plain: a thread owns RI x RJ of the tile. With SLICES > 1, that many teams of threads share the
// k of a stage out among them and add up at the end, in a fixed order: small products would keep
// too few threads busy otherwise. TF32: a warp owns WI x WJ, and the tensor cores multiply.
#include "device.cuh"

#ifdef TF32
constexpr int SLICES = 1, TEAM = 32 * (TI / WI) * (TJ / WJ), PAD = 8;  // fragments meet no bank twice
#else
constexpr int TEAM = (TI / RI) * (TJ / RJ), PAD = 4;
#endif
constexpr int THREADS = SLICES * TEAM, ROW_A = TI + PAD, ROW_B = TJ + PAD;
// Two blocks of 256 threads a multiprocessor: 128 registers a thread.
constexpr int MIN_BLOCKS = THREADS < 512 ? 512 / THREADS : 1;
constexpr int STAGE = DEPTH * (ROW_A + ROW_B), STAGES = 2;
static_assert(DEPTH % (SLICES * 8) == 0 || SLICES > 1, "tensor cores take 8 k at a time");
static_assert(DEPTH % SLICES == 0 && THREADS % TI == 0 && THREADS % TJ == 0, "all threads load");
static_assert(DEPTH * TI % THREADS == 0 && DEPTH * TJ % THREADS == 0, "and all the same");
static_assert(THREADS % DEPTH == 0, "and each its own k");

struct __align__(16) Four {
  REAL v[4];
};

// Which place of the result stands in column j of the tile. The tensor cores leave a thread columns
// 2t, 2t + 1, 8 + 2t and 9 + 2t: they get the places 4t to 4t + 3, so that it has four in a row.
__device__ __forceinline__ int place(int j) {
#ifdef TF32
  return (j & ~15) | (j >> 1 & 3) << 2 | (j >> 3 & 1) << 1 | (j & 1);
#else
  return j;
#endif
}

// Copy DEPTH x COUNT values; find(k, i, from) points `from` at one and says whether it counts, else
// it is 0. Neighbouring threads take neighbouring k ...
template <int COUNT, int ROW, class Find> __device__ __forceinline__ void load_along_k(REAL *to, Find find) {
  const int k = threadIdx.x % DEPTH;
#pragma unroll
  for (int r = 0; r < DEPTH * COUNT / THREADS; r++) {
    const int i = threadIdx.x / DEPTH + r * (THREADS / DEPTH);
    const REAL *from = nullptr;
    const bool valid = find(k, i, from);
    copy_async(to + k * ROW + i, from, sizeof(REAL), valid);
  }
}
// ... or neighbouring i; then a thread has the same i all the time, threadIdx.x % COUNT.
template <int COUNT, int ROW, class Find> __device__ __forceinline__ void load_across(REAL *to, Find find) {
  const int i = threadIdx.x % COUNT;
#pragma unroll
  for (int r = 0; r < DEPTH * COUNT / THREADS; r++) {
    const int k = threadIdx.x / COUNT + r * (THREADS / COUNT);
    const REAL *from = nullptr;
    const bool valid = find(k, i, from);
    copy_async(to + k * ROW + i, from, sizeof(REAL), valid);
  }
}

// problem.load(a, b, k) fills the stage from k on; problem.emit(i, j, v) gets four neighbouring
// places of a row. `shared` holds STAGES * STAGE values, and TI * TJ where SLICES > 1.
template <class Problem> __device__ __forceinline__ void multiply(Problem &problem, int depth, REAL *shared) {
  const int stages = (depth + DEPTH - 1) / DEPTH;
  if (stages > 0) problem.load(shared, shared + DEPTH * ROW_A, 0);
  copy_commit();

#ifdef TF32
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int i0 = warp / (TJ / WJ) * WI, j0 = warp % (TJ / WJ) * WJ;
  float sum[WI / 16][WJ / 8][4] = {};
#else
  const int slice = threadIdx.x / TEAM, t = threadIdx.x % TEAM;
  const int i0 = t / (TJ / RJ) * 4, j0 = t % (TJ / RJ) * 4;
  constexpr int STEP_I = TI * 4 / RI, STEP_J = TJ * 4 / RJ;  // rows come in fours, far apart
  REAL sum[RI][RJ] = {};
#endif

  for (int s = 0; s < stages; s++) {
    copy_wait<0>();
    __syncthreads();  // stage s has landed, and everybody is done with the one before
    if (s + 1 < stages) {
      REAL *next = shared + (s + 1) % STAGES * STAGE;
      problem.load(next, next + DEPTH * ROW_A, (s + 1) * DEPTH);
    }
    copy_commit();
    const REAL *a = shared + s % STAGES * STAGE, *b = a + DEPTH * ROW_A;
#ifdef TF32
#pragma unroll
    for (int k = 0; k < DEPTH; k += 8) {
      unsigned fa[WI / 16][4], fb[WJ / 8][2];
#pragma unroll
      for (int m = 0; m < WI / 16; m++) {
        const float *from = a + (k + t) * ROW_A + i0 + 16 * m + g;
        fa[m][0] = to_tf32(from[0]), fa[m][1] = to_tf32(from[8]);
        fa[m][2] = to_tf32(from[4 * ROW_A]), fa[m][3] = to_tf32(from[4 * ROW_A + 8]);
      }
#pragma unroll
      for (int n = 0; n < WJ / 8; n++) {
        const float *from = b + (k + t) * ROW_B + j0 + 8 * n + g;
        fb[n][0] = to_tf32(from[0]), fb[n][1] = to_tf32(from[4 * ROW_B]);
      }
#pragma unroll
      for (int m = 0; m < WI / 16; m++)
#pragma unroll
        for (int n = 0; n < WJ / 8; n++) mma_tf32(sum[m][n], fa[m], fb[n]);
    }
#else
#pragma unroll
    for (int d = 0; d < DEPTH / SLICES; d++) {
      const int k = slice * (DEPTH / SLICES) + d;
      REAL va[RI], vb[RJ];
#pragma unroll
      for (int r = 0; r < RI; r += 4) *(Four *)(va + r) = *(const Four *)(a + k * ROW_A + r / 4 * STEP_I + i0);
#pragma unroll
      for (int r = 0; r < RJ; r += 4) *(Four *)(vb + r) = *(const Four *)(b + k * ROW_B + r / 4 * STEP_J + j0);
#pragma unroll
      for (int i = 0; i < RI; i++)
#pragma unroll
        for (int j = 0; j < RJ; j++) sum[i][j] += va[i] * vb[j];
    }
#endif
  }

#ifdef TF32
#pragma unroll
  for (int m = 0; m < WI / 16; m++)
#pragma unroll
    for (int n = 0; n < WJ / 8; n += 2)
#pragma unroll
      for (int h = 0; h < 4; h += 2) {
        const REAL v[4] = {sum[m][n][h], sum[m][n][h + 1], sum[m][n + 1][h], sum[m][n + 1][h + 1]};
        problem.emit(i0 + 16 * m + g + 4 * h, j0 + 8 * n + 4 * t, v);
      }
#else
#pragma unroll
  for (int s = 1; s < SLICES; s++) {
    __syncthreads();
#pragma unroll
    for (int r = 0; r < RI * RJ; r++)
      if (slice == s) shared[r * TEAM + t] = sum[r / RJ][r % RJ];
    __syncthreads();
#pragma unroll
    for (int r = 0; r < RI * RJ; r++)
      if (slice == 0) sum[r / RJ][r % RJ] += shared[r * TEAM + t];
  }
  if (slice == 0) {
#pragma unroll
    for (int i = 0; i < RI; i++)
#pragma unroll
      for (int j = 0; j < RJ; j += 4)
        problem.emit(i / 4 * STEP_I + i0 + i % 4, j / 4 * STEP_J + j0, sum[i] + j);
  }
#endif
}
