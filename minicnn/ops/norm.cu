// Batch, layer and group normalisation. Sums and means are taken in double, in a fixed order.

enum { BLOCK = 256 };

// Sum over the block, for all its threads; `room` holds BLOCK values.
__device__ double block_sum(double v, double *room) {
  __syncthreads();  // whoever still reads the sum before
  room[threadIdx.x] = v;
  __syncthreads();
  for (int half = BLOCK / 2; half; half /= 2) {
    if (threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
    __syncthreads();
  }
  return room[0];
}

// ---------------------------------------------------------------- batch: x is (N, C, L)

// Block (part, c) sums over a part, `length` of the channel's N * L values: mean, and squares
// around it. parts: (C, parts, 2).
extern "C" __global__ void __launch_bounds__(BLOCK) batch_statistics(const REAL *x, double *parts, int N,
                                                              int C, int L, int length) {
  __shared__ double room[BLOCK];
  const int c = blockIdx.y;
  const long long first = (long long)blockIdx.x * length, total = (long long)N * L;
  const int count = (int)(total - first < length ? total - first : length);
  const long long n0 = first / L;
  const int l0 = (int)(first - n0 * L);
  double sum = 0, squares = 0;
  for (int i = threadIdx.x; i < count; i += BLOCK) {
    const int m = l0 + i;
    sum += x[((n0 + m / L) * C + c) * L + m % L];
  }
  const double mean = block_sum(sum, room) / count;
  for (int i = threadIdx.x; i < count; i += BLOCK) {
    const int m = l0 + i;
    const double d = x[((n0 + m / L) * C + c) * L + m % L] - mean;
    squares += d * d;
  }
  squares = block_sum(squares, room);
  if (threadIdx.x == 0) {
    double *to = parts + ((long long)c * gridDim.x + blockIdx.x) * 2;
    to[0] = mean, to[1] = squares;
  }
}

// Merge the parts to mean and var (T. Chan, G. Golub, R. LeVeque 1979); scale = w / sqrt(var + eps).
// Without parts, mean and var are given.
extern "C" __global__ void batch_merge(long long C, const double *parts, const REAL *w, double *mean,
                                       double *var, REAL *scale, int count, int length,
                                       long long total, double eps) {
  const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= C) return;
  if (count) {
    double m = 0, squares = 0, seen = 0;
    for (int i = 0; i < count; i++) {
      const double *from = parts + (c * count + i) * 2;
      const double n = i + 1 < count ? length : total - (double)length * i, d = from[0] - m;
      squares += from[1] + d * d * (seen * n / (seen + n));
      m += d * (n / (seen + n));
      seen += n;
    }
    mean[c] = m, var[c] = squares / total;
  }
  scale[c] = (REAL)(w[c] / sqrt(var[c] + eps));
}

extern "C" __global__ void batch_apply(long long size, const REAL *x, const double *mean,
                                       const REAL *scale, const REAL *b, REAL *y, int C, int L) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const int c = (int)(e / L % C);
  y[e] = (REAL)(x[e] - mean[c]) * scale[c] + b[c];
}

// Block (part, c): sums of dy and of dy * xhat over a part. parts: (C, parts, 2).
extern "C" __global__ void __launch_bounds__(BLOCK) batch_gradient_sums(
    const REAL *dy, const REAL *x, const double *mean, const double *rstd, double *parts, int N, int C,
    int L, int length) {
  __shared__ double room[BLOCK];
  const int c = blockIdx.y;
  const long long first = (long long)blockIdx.x * length, total = (long long)N * L;
  const int count = (int)(total - first < length ? total - first : length);
  const long long n0 = first / L;
  const int l0 = (int)(first - n0 * L);
  const REAL r = (REAL)rstd[c];
  double sum = 0, product = 0;
  for (int i = threadIdx.x; i < count; i += BLOCK) {
    const int m = l0 + i;
    const long long at = ((n0 + m / L) * C + c) * L + m % L;
    sum += dy[at];
    product += (double)dy[at] * ((REAL)(x[at] - mean[c]) * r);
  }
  sum = block_sum(sum, room);
  product = block_sum(product, room);
  if (threadIdx.x == 0) {
    double *to = parts + ((long long)c * gridDim.x + blockIdx.x) * 2;
    to[0] = sum, to[1] = product;
  }
}

// Add the parts up: dw, db, and for dx the two means (0 in evaluation) and the scale. per: (C, 3).
extern "C" __global__ void batch_gradient_merge(long long C, const double *parts, const REAL *w,
                                                const double *rstd, REAL *dw, REAL *db, REAL *per,
                                                int count, long long total, int training) {
  const long long c = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (c >= C) return;
  double sum = 0, product = 0;
  for (int i = 0; i < count; i++)
    sum += parts[(c * count + i) * 2], product += parts[(c * count + i) * 2 + 1];
  dw[c] = (REAL)product, db[c] = (REAL)sum;
  per[c * 3] = training ? (REAL)(sum / total) : REAL(0);
  per[c * 3 + 1] = training ? (REAL)(product / total) : REAL(0);
  per[c * 3 + 2] = (REAL)(w[c] * rstd[c]);
}

extern "C" __global__ void batch_gradient_apply(long long size, const REAL *dy, const REAL *x,
                                                const double *mean, const double *rstd,
                                                const REAL *per, REAL *dx, int C, int L) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const int c = (int)(e / L % C);
  const REAL xhat = (REAL)(x[e] - mean[c]) * (REAL)rstd[c];
  // In evaluation both means are 0, and an infinite xhat must not make 0 * inf of them.
  const REAL back = per[c * 3 + 1] == 0 ? REAL(0) : xhat * per[c * 3 + 1];
  dx[e] = per[c * 3 + 2] * (dy[e] - per[c * 3] - back);
}

// ---------------------------------------------------------------- layer and group: a row a block
// x is (N, G, CG, L), rows are (n, g); w and b are (G * CG,). A layer norm has G = L = 1.

extern "C" __global__ void __launch_bounds__(BLOCK) rows_forward(const REAL *x, const REAL *w,
                                                          const REAL *b, REAL *y, double *mean,
                                                          double *rstd, int G, int CG, int L,
                                                          double eps) {
  __shared__ double room[BLOCK];
  const long long row = blockIdx.x;
  const int D = CG * L, first = (int)(row % G) * CG;
  const REAL *from = x + row * D;
  double sum = 0, squares = 0;
  for (int d = threadIdx.x; d < D; d += BLOCK) sum += from[d];
  const double m = block_sum(sum, room) / D;
  for (int d = threadIdx.x; d < D; d += BLOCK) squares += (from[d] - m) * (from[d] - m);
  const double r = 1 / sqrt(block_sum(squares, room) / D + eps);
  for (int d = threadIdx.x; d < D; d += BLOCK) {
    const int c = first + d / L;
    y[row * D + d] = (REAL)(from[d] - m) * (REAL)r * w[c] + b[c];
  }
  if (threadIdx.x == 0) mean[row] = m, rstd[row] = r;
}

extern "C" __global__ void __launch_bounds__(BLOCK) rows_backward(const REAL *dy, const REAL *x,
                                                           const REAL *w, const double *mean,
                                                           const double *rstd, REAL *dx, int G,
                                                           int CG, int L) {
  __shared__ double room[BLOCK];
  const long long row = blockIdx.x;
  const int D = CG * L, first = (int)(row % G) * CG;
  const double m = mean[row];
  const REAL r = (REAL)rstd[row];
  double sum = 0, product = 0;
  for (int d = threadIdx.x; d < D; d += BLOCK) {
    const REAL g = dy[row * D + d] * w[first + d / L];
    sum += g;
    product += (double)g * ((REAL)(x[row * D + d] - m) * r);
  }
  const REAL mean_g = (REAL)(block_sum(sum, room) / D), mean_gx = (REAL)(block_sum(product, room) / D);
  for (int d = threadIdx.x; d < D; d += BLOCK) {
    const REAL g = dy[row * D + d] * w[first + d / L], xhat = (REAL)(x[row * D + d] - m) * r;
    dx[row * D + d] = r * (g - mean_g - xhat * mean_gx);
  }
}

// dw and db, a block a channel: over all images and places.
extern "C" __global__ void __launch_bounds__(BLOCK) channel_sums(const REAL *dy, const REAL *x,
                                                          const double *mean, const double *rstd,
                                                          REAL *dw, REAL *db, int N, int G, int CG,
                                                          int L) {
  __shared__ double room[BLOCK];
  const int c = blockIdx.x, C = G * CG;
  double sum = 0, product = 0;
  for (long long m = threadIdx.x; m < (long long)N * L; m += BLOCK) {
    const long long n = m / L, at = (n * C + c) * L + (m - n * L), row = n * G + c / CG;
    sum += dy[at];
    product += (double)dy[at] * ((REAL)(x[at] - mean[row]) * (REAL)rstd[row]);
  }
  sum = block_sum(sum, room);
  product = block_sum(product, room);
  if (threadIdx.x == 0) dw[c] = (REAL)product, db[c] = (REAL)sum;
}

// The same for L = 1, where the channels of an image are neighbours: a block takes 32 channels,
// and 8 threads share the images of each.
extern "C" __global__ void __launch_bounds__(BLOCK) column_sums(const REAL *dy, const REAL *x,
                                                         const double *mean, const double *rstd,
                                                         REAL *dw, REAL *db, int N, int G, int CG) {
  __shared__ double room[2][BLOCK];
  const int C = G * CG, lane = threadIdx.x % 32, team = threadIdx.x / 32;
  const int c = blockIdx.x * 32 + lane;
  double sum = 0, product = 0;
  if (c < C)
    for (long long n = team; n < N; n += BLOCK / 32) {
      const long long at = n * C + c, row = n * G + c / CG;
      sum += dy[at];
      product += (double)dy[at] * ((REAL)(x[at] - mean[row]) * (REAL)rstd[row]);
    }
  room[0][threadIdx.x] = sum, room[1][threadIdx.x] = product;
  __syncthreads();
  if (team == 0 && c < C) {
    for (int i = 1; i < BLOCK / 32; i++) sum += room[0][32 * i + lane], product += room[1][32 * i + lane];
    dw[c] = (REAL)product, db[c] = (REAL)sum;
  }
}
