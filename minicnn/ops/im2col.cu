// im2col and col2im by gathering: a thread an entry, and nobody adds to what another writes.

#define PARAMETERS                                                                             \
  int N, int C, int H, int W, int OH, int OW, int top, int left, int KH, int KW, int SH, int SW, \
      int DH, int DW

// cols[(c p q), (n i j)] = x[n, c, i*SH + p*DH - top, j*SW + q*DW - left], 0 in the padding.
extern "C" __global__ void im2col(long long size, const REAL *x, REAL *cols, PARAMETERS) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const long long row = e / ((long long)N * OH * OW), place = e - row * ((long long)N * OH * OW);
  const long long n = place / (OH * OW);
  const int at = (int)(place - n * (OH * OW)), i = at / OW, j = at - i * OW;
  const int c = (int)(row / (KH * KW)), tap = (int)(row - (long long)c * (KH * KW));
  const int h = i * SH + tap / KW * DH - top, v = j * SW + tap % KW * DW - left;
  const bool inside = (unsigned)h < H && (unsigned)v < W;
  cols[e] = inside ? x[((n * C + c) * H + h) * W + v] : REAL(0);
}

// The adjoint: a pixel is the sum of the entries that were read from it.
extern "C" __global__ void col2im(long long size, const REAL *cols, REAL *x, PARAMETERS) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= size) return;
  const long long map = e / (H * W), n = map / C;
  const int at = (int)(e - map * (H * W)), h = at / W, v = at - h * W, c = (int)(map - n * C);
  REAL sum = 0;
  for (int p = 0; p < KH; p++) {
    const int hi = h + top - p * DH, i = hi / SH;
    if (hi < 0 || i >= OH || i * SH != hi) continue;
    for (int q = 0; q < KW; q++) {
      const int vj = v + left - q * DW, j = vj / SW;
      if (vj < 0 || j >= OW || j * SW != vj) continue;
      sum += cols[((((long long)c * KH + p) * KW + q) * N + n) * (OH * OW) + i * OW + j];
    }
  }
  x[e] = sum;
}
