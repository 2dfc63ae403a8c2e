// Depthwise convolution: filter f sees channel f and nothing else. No product of matrices to
// share loads in: a thread an output, and neighbouring threads find their pixels in the cache.

#define SHAPE_PARAMETERS                                                                        \
  int N, int C, int H, int W, int F, int G, int OH, int OW, int top, int left, int KH, int KW, \
      int SH, int SW, int DH, int DW

extern "C" __global__ void depthwise_forward(long long size, const REAL *x, const REAL *w,
                                             const REAL *b, REAL *y, SHAPE_PARAMETERS) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const long long map = e / (OH * OW);
  const int at = (int)(e - map * (OH * OW)), i = at / OW, j = at - i * OW, f = (int)(map % F);
  const REAL *from = x + map * ((long long)H * W), *taps = w + f * (KH * KW);
  REAL sum = b ? b[f] : REAL(0);
  for (int p = 0; p < KH; p++) {
    const int h = i * SH + p * DH - top;
    if ((unsigned)h >= H) continue;
    for (int q = 0; q < KW; q++) {
      const int v = j * SW + q * DW - left;
      if ((unsigned)v < W) sum += taps[p * KW + q] * from[h * W + v];
    }
  }
  y[e] = sum;
}

extern "C" __global__ void depthwise_input_gradient(long long size, const REAL *dy, const REAL *w,
                                                    const REAL *b, REAL *dx, SHAPE_PARAMETERS) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const long long map = e / (H * W);
  const int at = (int)(e - map * (H * W)), h = at / W, v = at - h * W, f = (int)(map % F);
  const REAL *from = dy + map * ((long long)OH * OW), *taps = w + f * (KH * KW);
  REAL sum = b ? b[f] : REAL(0);
  for (int p = 0; p < KH; p++) {
    const int hi = h + top - p * DH, i = hi / SH;
    if (hi < 0 || i >= OH || i * SH != hi) continue;
    for (int q = 0; q < KW; q++) {
      const int vj = v + left - q * DW, j = vj / SW;
      if (vj >= 0 && j < OW && j * SW == vj) sum += taps[p * KW + q] * from[i * OW + j];
    }
  }
  dx[e] = sum;
}

// A block sums one tap of one filter over all images, blockIdx.x == KH * KW the bias. Each of its
// 256 threads takes every 256th place; the threads' sums are added in a tree, always the same.
extern "C" __global__ void __launch_bounds__(256) depthwise_weight_gradient(
    const REAL *dy, const REAL *x, REAL *dw, REAL *db, SHAPE_PARAMETERS) {
  __shared__ double sums[256];
  const int tap = blockIdx.x, f = blockIdx.y, p = tap / KW, q = tap % KW, size = OH * OW;
  const bool bias = tap == KH * KW;
  double total = 0;
  for (int n = 0; n < N; n++) {
    const REAL *g = dy + ((long long)n * F + f) * size;
    const REAL *from = x + ((long long)n * C + f) * ((long long)H * W);
    REAL sum = 0;
    for (int at = threadIdx.x; at < size; at += 256) {
      const int i = at / OW, j = at - i * OW, h = i * SH + p * DH - top, v = j * SW + q * DW - left;
      if (bias) sum += g[at];
      else if ((unsigned)h < H && (unsigned)v < W) sum += g[at] * from[h * W + v];
    }
    total += sum;
  }
  sums[threadIdx.x] = total;
  __syncthreads();
  for (int half = 128; half; half /= 2) {
    if (threadIdx.x < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    if (bias) db[f] = (REAL)sums[0];
    else dw[f * (KH * KW) + tap] = (REAL)sums[0];
  }
}
