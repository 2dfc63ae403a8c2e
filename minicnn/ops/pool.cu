// Pooling, a thread an output. Backward a thread a pixel gathers from the windows that cover it,
// always in the same order: no atomics, so the result repeats.

#define PARAMETERS                                                                              \
  int H, int W, int OH, int OW, int top, int left, int KH, int KW, int SH, int SW, int DH, int DW

// The thread's element of maps of `rows` x `columns`: which map, row and column.
#define ELEMENT(size, rows, columns, map, i, j)                            \
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;    \
  if (e >= size) return;                                                   \
  const long long map = e / (rows * columns);                              \
  const int at = (int)(e - map * (rows * columns)), i = at / columns, j = at - i * columns;

extern "C" __global__ void max_pool2d_forward(long long size, const REAL *x, REAL *y,
                                              long long *winner, PARAMETERS) {
  ELEMENT(size, OH, OW, map, i, j)
  const REAL *from = x + map * ((long long)H * W);
  REAL best = 0;
  int where = -1;
  for (int p = 0; p < KH; p++) {
    const int h = i * SH + p * DH - top;
    if ((unsigned)h >= H) continue;
    for (int q = 0; q < KW; q++) {
      const int v = j * SW + q * DW - left;
      if ((unsigned)v >= W) continue;
      const REAL value = from[h * W + v];
      // The first of equal ones wins, and the first NaN.
      if (where < 0 || value > best || (value != value && best == best))
        best = value, where = h * W + v;
    }
  }
  y[e] = best;
  winner[e] = where;
}

extern "C" __global__ void max_pool2d_backward(long long size, const REAL *dy,
                                               const long long *winner, REAL *dx, PARAMETERS) {
  ELEMENT(size, H, W, map, h, v)
  REAL sum = 0;
  for (int p = 0; p < KH; p++) {
    const int hi = h + top - p * DH, i = hi / SH;
    if (hi < 0 || i >= OH || i * SH != hi) continue;
    for (int q = 0; q < KW; q++) {
      const int vj = v + left - q * DW, j = vj / SW;
      if (vj < 0 || j >= OW || j * SW != vj) continue;
      const long long window = (map * OH + i) * OW + j;
      if (winner[window] == at) sum += dy[window];
    }
  }
  dx[e] = sum;
}

extern "C" __global__ void avg_pool2d_forward(long long size, const REAL *x, const REAL *divisor,
                                              REAL *y, PARAMETERS) {
  ELEMENT(size, OH, OW, map, i, j)
  const REAL *from = x + map * ((long long)H * W);
  REAL sum = 0;
  for (int p = 0; p < KH; p++) {
    const int h = i * SH + p * DH - top;
    if ((unsigned)h >= H) continue;
    for (int q = 0; q < KW; q++) {
      const int v = j * SW + q * DW - left;
      if ((unsigned)v < W) sum += from[h * W + v];
    }
  }
  y[e] = sum / divisor[at];
}

extern "C" __global__ void avg_pool2d_backward(long long size, const REAL *dy, const REAL *divisor,
                                               REAL *dx, PARAMETERS) {
  ELEMENT(size, H, W, map, h, v)
  REAL sum = 0;
  for (int p = 0; p < KH; p++) {
    const int hi = h + top - p * DH, i = hi / SH;
    if (hi < 0 || i >= OH || i * SH != hi) continue;
    for (int q = 0; q < KW; q++) {
      const int vj = v + left - q * DW, j = vj / SW;
      if (vj < 0 || j >= OW || j * SW != vj) continue;
      sum += dy[(map * OH + i) * OW + j] / divisor[i * OW + j];
    }
  }
  dx[e] = sum;
}

// Bin i of `places` over `size` pixels: from floor(i * size / places) up to ceil((i + 1) ...).
__device__ __forceinline__ int bin_start(int i, int size, int places) {
  return (int)((long long)i * size / places);
}
__device__ __forceinline__ int bin_end(int i, int size, int places) {
  return (int)(((long long)(i + 1) * size + places - 1) / places);
}

extern "C" __global__ void adaptive_forward(long long size, const REAL *x, REAL *y, int H, int W,
                                            int OH, int OW) {
  ELEMENT(size, OH, OW, map, i, j)
  const REAL *from = x + map * ((long long)H * W);
  const int top = bin_start(i, H, OH), bottom = bin_end(i, H, OH);
  const int left = bin_start(j, W, OW), right = bin_end(j, W, OW);
  REAL sum = 0;
  for (int h = top; h < bottom; h++)
    for (int v = left; v < right; v++) sum += from[h * W + v];
  y[e] = sum / ((REAL)(bottom - top) * (REAL)(right - left));
}

extern "C" __global__ void adaptive_backward(long long size, const REAL *dy, REAL *dx, int H, int W,
                                             int OH, int OW) {
  ELEMENT(size, H, W, map, h, v)
  const REAL *from = dy + map * ((long long)OH * OW);
  REAL sum = 0;
  // Bin i holds row h where i * H < (h + 1) * OH and (i + 1) * H > h * OH.
  for (int i = bin_start(h, OH, H); i < bin_end(h, OH, H); i++)
    for (int j = bin_start(v, OW, W); j < bin_end(v, OW, W); j++) {
      const int rows = bin_end(i, H, OH) - bin_start(i, H, OH);
      const int columns = bin_end(j, W, OW) - bin_start(j, W, OW);
      sum += from[i * OW + j] / ((REAL)rows * (REAL)columns);
    }
  dx[e] = sum;
}
