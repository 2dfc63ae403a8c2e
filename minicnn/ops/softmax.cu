// Softmax, its logarithm and the cross-entropy, a warp a row. Rows lie along the middle axis of
// (outer, C, inner); 32 lanes take every 32nd entry and add up in a tree, always the same.

enum { WARPS = 8, LANES = 32 };  // a block has WARPS warps, or less where there are fewer rows

__device__ __forceinline__ REAL warp_sum(REAL v) {
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) v += __shfl_xor_sync(0xffffffff, v, bits);
  return v;
}
__device__ __forceinline__ REAL warp_max(REAL v) {  // leaves NaN out: it comes back in the sum
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) v = max(v, __shfl_xor_sync(0xffffffff, v, bits));
  return v;
}
__device__ __forceinline__ REAL lowest() { return -REAL(1) / REAL(0); }

// The warp's row: where it starts, and how far apart its entries are.
#define ROW(rows, C, inner)                                                              \
  const long long row = (long long)blockIdx.x * (blockDim.x / LANES) + threadIdx.x / LANES; \
  const int lane = threadIdx.x % LANES;                                                  \
  const bool active = row < rows;                                                        \
  const long long start = active ? row / inner * C * inner + row % inner : 0;

// Maximum m of a row and sum of e^(x - m). Inactive warps take part, so that no lane is missed.
#define MAX_AND_SUM(x, C, inner)                                                          \
  REAL m = lowest(), sum = 0;                                                             \
  for (int c = lane; active && c < C; c += LANES) m = max(m, x[start + (long long)c * inner]); \
  m = warp_max(m);                                                                        \
  for (int c = lane; active && c < C; c += LANES) sum += exp(x[start + (long long)c * inner] - m); \
  sum = warp_sum(sum);

extern "C" __global__ void softmax_forward(long long rows, const REAL *x, REAL *y, int C, int inner,
                                           int logarithm) {
  ROW(rows, C, inner)
  MAX_AND_SUM(x, C, inner)
  const REAL log_sum = log(sum);
  for (int c = lane; active && c < C; c += LANES) {
    const long long at = start + (long long)c * inner;
    y[at] = logarithm ? x[at] - m - log_sum : exp(x[at] - m) / sum;
  }
}

// softmax: y (dy - sum of dy y); log_softmax: dy - e^y sum of dy.
extern "C" __global__ void softmax_backward(long long rows, const REAL *dy, const REAL *y, REAL *dx,
                                            int C, int inner, int logarithm) {
  ROW(rows, C, inner)
  REAL sum = 0;
  for (int c = lane; active && c < C; c += LANES) {
    const long long at = start + (long long)c * inner;
    sum += logarithm ? dy[at] : dy[at] * y[at];
  }
  sum = warp_sum(sum);
  for (int c = lane; active && c < C; c += LANES) {
    const long long at = start + (long long)c * inner;
    dx[at] = logarithm ? dy[at] - exp(y[at]) * sum : y[at] * (dy[at] - sum);
  }
}

// log p and the loss, minus the sum of a log p; where a is 0 nothing counts, even -inf.
extern "C" __global__ void cross_entropy_forward(long long rows, const REAL *x, const REAL *a,
                                                 REAL *log_p, REAL *losses, int C, int inner) {
  ROW(rows, C, inner)
  MAX_AND_SUM(x, C, inner)
  const REAL log_sum = log(sum);
  REAL loss = 0;
  for (int c = lane; active && c < C; c += LANES) {
    const long long at = start + (long long)c * inner;
    const REAL l = x[at] - m - log_sum;
    log_p[at] = l;
    if (a[at] != 0) loss -= a[at] * l;
  }
  loss = warp_sum(loss);
  if (active && lane == 0) losses[row] = loss;
}

// dx = g (p sum of a - a), with g for each row, or one for all (step 0).
extern "C" __global__ void cross_entropy_backward(long long rows, const REAL *g, const REAL *log_p,
                                                  const REAL *a, REAL *dx, int C, int inner, int step) {
  ROW(rows, C, inner)
  REAL sum = 0;
  const REAL share = active ? g[row * step] : REAL(0);
  for (int c = lane; active && c < C; c += LANES) sum += -share * a[start + (long long)c * inner];
  sum = warp_sum(sum);
  for (int c = lane; active && c < C; c += LANES) {
    const long long at = start + (long long)c * inner;
    dx[at] = -share * a[at] - exp(log_p[at]) * sum;
  }
}

// Softmax + cross-entropy of labels, mean over the rows that count, in one launch: the loss, its
// gradient dx to the scores x (rows, C), how many rows count, and how many of all have their
// maximum at their label. The label `ignored` counts nothing; another one out of range makes the
// loss NaN. `finished` is 0 before and after: the block that finishes last adds the blocks' sums
// up, in their order.
extern "C" __global__ void softmax_cross_entropy(long long rows, const REAL *x, const long long *labels,
                                                 REAL *dx, double *sums, int *hits, unsigned *finished,
                                                 REAL *loss, long long *kept, long long *correct, int C,
                                                 long long ignored) {
  __shared__ double part[WARPS];
  __shared__ int part_hits[WARPS];
  __shared__ bool last;
  const int inner = 1, warp = threadIdx.x / LANES, warps = blockDim.x / LANES;
  ROW(rows, C, inner)
  MAX_AND_SUM(x, C, inner)
  // Every warp counts for itself: the labels are few and in the cache.
  int count = 0;
  for (long long r = lane; r < rows; r += LANES) count += labels[r] != ignored;
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) count += __shfl_xor_sync(0xffffffff, count, bits);
  const long long label = active ? labels[row] : 0;
  const bool counts = active && label != ignored, valid = label >= 0 && label < C;
  for (int c = lane; active && c < C; c += LANES) {
    const REAL g = (exp(x[start + c] - m) / sum - (c == label ? REAL(1) : REAL(0))) / (REAL)count;
    dx[start + c] = counts ? g : REAL(0);
  }
  // The first of equal maxima is the prediction, and NaN before all, as numpy.argmax has it.
  int first = C;
  for (int c = lane; active && c < C; c += LANES) {
    const REAL v = x[start + c];
    if (first == C && (sum == sum ? v == m : v != v)) first = c;
  }
#pragma unroll
  for (int bits = LANES / 2; bits; bits /= 2) first = min(first, __shfl_xor_sync(0xffffffff, first, bits));
  if (lane == 0) {
    const REAL nan = lowest() - lowest();
    part[warp] = !counts ? REAL(0) : valid ? log(sum) - (x[start + (valid ? label : 0)] - m) : nan;
    part_hits[warp] = active && first == label;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    int hit = 0;
    for (int i = 0; i < warps; i++) total += part[i], hit += part_hits[i];
    sums[blockIdx.x] = total, hits[blockIdx.x] = hit;
    __threadfence();  // the sums are there before the count says so
    last = atomicAdd(finished, 1u) == gridDim.x - 1;
  }
  __syncthreads();
  if (last && threadIdx.x == 0) {
    __threadfence();
    double total = 0;
    long long hit = 0;
    for (unsigned i = 0; i < gridDim.x; i++)
      total += ((volatile double *)sums)[i], hit += ((volatile int *)hits)[i];
    *loss = (REAL)(total / count), *kept = count, *correct = hit, *finished = 0;
  }
}
