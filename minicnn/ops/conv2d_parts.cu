// What stands beside the products of conv2d.cu: the second pass of dw's sum, and the gradient of a
// pool behind the convolution.

// Add the parts up: part (parts, F, columns) to dw (F, columns - 1) and db (F,).
extern "C" __global__ void conv2d_add(long long n, const REAL *part, REAL *dw, REAL *db, int parts,
                                      int columns) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n) return;
  double sum = 0;
  for (int i = 0; i < parts; i++) sum += part[i * n + e];
  const long long f = e / columns;
  const int k = (int)(e - f * columns);
  if (k == columns - 1) db[f] = (REAL)sum;
  else dw[f * (columns - 1) + k] = (REAL)sum;
}

// ---------------------------------------------------------------- the pool's gradient, spread out

// dz[n, f, i, j] = dy[n, f, i / PH, j / PW] where that window's winner is this pixel, else 0.
extern "C" __global__ void conv2d_spread(long long n, const REAL *dy, const unsigned char *winner,
                                         REAL *dz, int OH, int OW, int PH, int PW) {
  const long long e = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= n) return;
  const long long map = e / (OH * OW);
  const int at = (int)(e - map * (OH * OW)), i = at / OW, j = at - i * OW;
  const int pi = i / PH, pj = j / PW, rows = OH / PH, columns = OW / PW;
  REAL v = 0;
  if (pi < rows && pj < columns) {
    const long long window = (map * rows + pi) * columns + pj;
    if (winner[window] == (i - pi * PH) * PW + j - pj * PW) v = dy[window];
  }
  dz[e] = v;
}
