// Convolution as a matrix product whose column matrix is never written down.
//
//   forward  y[f, (n i j)]  = sum over (c p q) of w[f, (c p q)] * x[n, c, i*SH + p*DH - top, ...]
//   dx       dx[c, (n h w)] = sum over (f p q) of w[f, c, p, q] * dy[n, f, (h + top - p*DH) / SH, ...]
//   dw       dw[f, (c p q)] = sum over (n i j) of dy[n, f, i, j] * x[n, c, i*SH + p*DH - top, ...]
//
// one product a group (blockIdx.z). dw has one more column, of ones, which gives db. Its sum is
// long and its result small, so blocks take parts of the sum and conv2d_add adds the parts up, in
// order: no atomics, so the result repeats.
//
// Offsets inside an image or a filter are 32-bit (the caller checks), offsets of images 64-bit.
// FIXED_* are geometry known at compile time, which turns divisions into multiplications.
#include "tile.cuh"

#define SHAPE_PARAMETERS                                                                       \
  int N, int C, int H, int W, int F, int G, int OH, int OW, int top, int left, int KH_, int KW_, \
      int SH_, int SW_, int DH_, int DW_
#define SHAPE {N, C, H, W, F, G, OH, OW, top, left, KH_, KW_, SH_, SW_, DH_, DW_}

#ifdef FIXED_K
#define KH FIXED_K
#define KW FIXED_K
#define SH FIXED_S
#define SW FIXED_S
#define DH 1
#define DW 1
#else
#define KH s.KH_
#define KW s.KW_
#define SH s.SH_
#define SW s.SW_
#define DH s.DH_
#define DW s.DW_
#endif

// Of three kernels, compile the one that ONLY names, or all of them.
#define ONLY_conv2d_forward 1
#define ONLY_conv2d_input_gradient 2
#define ONLY_conv2d_weight_gradient 3
#ifndef ONLY
#define ONLY 0
#endif

struct Shape {
  int N, C, H, W, F, G, OH, OW, top, left, KH_, KW_, SH_, SW_, DH_, DW_;
};

__device__ const REAL ONE[1] = {1};
enum { OFF = 255 };  // winner of a pool window in which the ReLU was off

// Four neighbouring results of one map, or of several where maps end: y[n, f, at] for the places
// `at` = m to m + 3 of all the images' maps of `size` places.
__device__ __forceinline__ void store_map(REAL *y, int channels, int f, long long m, int size,
                                          long long end, const REAL *v) {
  if (m >= end) return;
  if (size % 4 == 0) {  // then all four lie in one map, aligned: y and all its maps are
    const long long n = m / size;
    Four four;
    for (int e = 0; e < 4; e++) four.v[e] = v[e];
    *(Four *)(y + (n * channels + f) * size + (m - n * size)) = four;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; e++) {
    const long long n = (m + e) / size;
    if (m + e < end) y[(n * channels + f) * size + (m + e - n * size)] = v[e];
  }
}

// ---------------------------------------------------------------- forward
#if ONLY == 0 || ONLY == 1

struct Forward {
  Shape s;
  const REAL *x, *w, *b;
  REAL *y;
  unsigned char *winner;  // pool windows only
  int PH, PW, relu;       // PH * PW: 0 for a plain convolution, else 1, 2 or 4
  int group, f0, rows, depth;
  long long m0, end;  // places, in the order of the pool windows
  // of this thread's column:
  const REAL *image;
  int h0, w0;
  bool inside;

  __device__ void column(int j) {
    const long long m = m0 + place(j);
    const int T = PH ? PH * PW : 1, ph = PH ? PH : 1, pw = PH ? PW : 1;
    const int rows_ = s.OH / ph, columns = s.OW / pw, tap = (int)(m % T);
    const long long window = m / T, n = window / (rows_ * columns);
    const int at = (int)(window - n * (rows_ * columns));
    const int i = at / columns * ph + tap / pw, j_ = at % columns * pw + tap % pw;
    inside = m < end;
    h0 = i * SH - s.top, w0 = j_ * SW - s.left;
    image = x + (n * s.C + group * (s.C / s.G)) * ((long long)s.H * s.W);
  }
  __device__ __forceinline__ void load(REAL *a, REAL *b_, int k0) const {
    const REAL *filters = w + (long long)(group * rows + f0) * depth;
    load_along_k<TI, ROW_A>(a, [&](int k, int i, const REAL *&from) {
      from = filters + i * depth + k0 + k;
      return f0 + i < rows && k0 + k < depth;
    });
    load_across<TJ, ROW_B>(b_, [&](int k, int, const REAL *&from) {
      const int c = (k0 + k) / (KH * KW), tap = (k0 + k) % (KH * KW);
      const int h = h0 + tap / KW * DH, v = w0 + tap % KW * DW;
      from = image + (c * s.H + h) * s.W + v;
      return inside && k0 + k < depth && (unsigned)h < s.H && (unsigned)v < s.W;
    });
  }
  __device__ __forceinline__ void emit(int i, int j, const REAL *v) const {
    const int f = f0 + i;
    if (f >= rows) return;
    const REAL bias = b ? b[group * rows + f] : REAL(0);
    const long long m = m0 + j;
    REAL z[4];
#pragma unroll
    for (int e = 0; e < 4; e++) z[e] = v[e] + bias;
    if (!PH) {
      store_map(y, s.F, group * rows + f, m, s.OH * s.OW, end, z);
      return;
    }
    const int T = PH * PW, size = (s.OH / PH) * (s.OW / PW);
#pragma unroll
    for (int first = 0; first < 4; first++) {
      if (first % T || m + first >= end) continue;
      REAL best = z[first];
      int at = 0;
#pragma unroll
      for (int e = 1; e < 4; e++)  // the first of equal ones wins, and the first NaN
        if (e < T && first + e < 4 && (z[(first + e) & 3] > best || (z[(first + e) & 3] != z[(first + e) & 3] && best == best)))
          best = z[(first + e) & 3], at = e;
      if (relu && best <= 0) best = 0, at = OFF;
      const long long window = (m + first) / T, n = window / size;
      const long long to = (n * s.F + group * rows + f) * size + (window - n * size);
      y[to] = best, winner[to] = (unsigned char)at;
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv2d_forward(
    const REAL *x, const REAL *w, const REAL *b, REAL *y, unsigned char *winner, int PH, int PW,
    int relu, SHAPE_PARAMETERS) {
  extern __shared__ float4 shared[];
  Forward p = {SHAPE, x, w, b, y, winner, PH, PW, relu};
  const Shape &s = p.s;
  p.group = blockIdx.z, p.f0 = blockIdx.y * TI, p.rows = F / G, p.depth = C / G * KH * KW;
  p.m0 = (long long)blockIdx.x * TJ;
  p.end = PH ? (long long)N * (OH / PH) * (OW / PW) * (PH * PW) : (long long)N * OH * OW;
  p.column(threadIdx.x % TJ);
  multiply(p, p.depth, (REAL *)shared);
}

#endif
// ---------------------------------------------------------------- dx
#if ONLY == 0 || ONLY == 2

struct InputGradient {
  Shape s;
  const REAL *dy, *w;
  REAL *dx;
  const REAL *b;  // a transposed convolution's bias, or none
  int group, c0, rows, depth;
  long long m0, end;
  const REAL *image;  // of dy
  int h0, w0;
  bool inside;

  __device__ void column(int j) {
    const long long m = m0 + place(j), size = (long long)s.H * s.W, n = m / size;
    const int at = (int)(m - n * size);
    inside = m < end;
    h0 = at / s.W + s.top, w0 = at % s.W + s.left;
    image = dy + (n * s.F + group * (s.F / s.G)) * ((long long)s.OH * s.OW);
  }
  __device__ __forceinline__ void load(REAL *a, REAL *b_, int k0) const {
    const REAL *filters = w + (long long)group * (s.F / s.G) * rows * (KH * KW);
    load_along_k<TI, ROW_A>(a, [&](int k, int i, const REAL *&from) {
      const int f = (k0 + k) / (KH * KW), tap = (k0 + k) % (KH * KW);
      from = filters + (f * rows + c0 + i) * (KH * KW) + tap;
      return c0 + i < rows && k0 + k < depth;
    });
    load_across<TJ, ROW_B>(b_, [&](int k, int, const REAL *&from) {
      const int f = (k0 + k) / (KH * KW), tap = (k0 + k) % (KH * KW);
      const int h = h0 - tap / KW * DH, v = w0 - tap % KW * DW, i = h / SH, j = v / SW;
      from = image + (f * s.OH + i) * s.OW + j;
      return inside && k0 + k < depth && h >= 0 && v >= 0 && i < s.OH && j < s.OW &&
             i * SH == h && j * SW == v;
    });
  }
  __device__ __forceinline__ void emit(int i, int j, const REAL *v) const {
    if (c0 + i >= rows) return;
    const REAL bias = b ? b[group * rows + c0 + i] : REAL(0);
    REAL z[4];
#pragma unroll
    for (int e = 0; e < 4; e++) z[e] = v[e] + bias;
    store_map(dx, s.C, group * rows + c0 + i, m0 + j, s.H * s.W, end, z);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv2d_input_gradient(
    const REAL *dy, const REAL *w, const REAL *b, REAL *dx, SHAPE_PARAMETERS) {
  extern __shared__ float4 shared[];
  InputGradient p = {SHAPE, dy, w, dx, b};
  const Shape &s = p.s;
  p.group = blockIdx.z, p.c0 = blockIdx.y * TI, p.rows = C / G, p.depth = F / G * KH * KW;
  p.m0 = (long long)blockIdx.x * TJ, p.end = (long long)N * H * W;
  p.column(threadIdx.x % TJ);
  multiply(p, p.depth, (REAL *)shared);
}

#endif
// ---------------------------------------------------------------- dw and db
#if ONLY == 0 || ONLY == 3

struct WeightGradient {
  Shape s;
  const REAL *dy, *x;
  REAL *part;  // (parts, G, F/G, K + 1)
  int group, f0, k0, rows, columns;  // columns: K + 1
  int slot, length, at0;             // which part of the sum, its places, where in image n0 it starts
  long long n0;

  __device__ __forceinline__ void load(REAL *a, REAL *b, int m0) const {
    // One place of the sum a thread and stage.
    const int m = m0 + threadIdx.x % DEPTH, size = s.OH * s.OW, e = at0 + m;
    const long long n = n0 + e / size;
    const int at = e % size, i = at / s.OW, j = at - i * s.OW;
    const bool inside = m < length;
    const REAL *from_dy = dy + (n * s.F + group * rows + f0) * size + at;
    load_along_k<TI, ROW_A>(a, [&](int, int f, const REAL *&from) {
      from = from_dy + (long long)f * size;
      return inside && f0 + f < rows;
    });
    const int h0 = i * SH - s.top, w0 = j * SW - s.left;
    const REAL *image = x + (n * s.C + group * (s.C / s.G)) * ((long long)s.H * s.W);
    load_along_k<TJ, ROW_B>(b, [&](int, int column, const REAL *&from) {
      const int k = k0 + place(column), c = k / (KH * KW), tap = k % (KH * KW);
      const int h = h0 + tap / KW * DH, v = w0 + tap % KW * DW;
      if (k == columns - 1) {
        from = ONE;
        return inside;
      }
      from = image + (c * s.H + h) * s.W + v;
      return inside && k < columns && (unsigned)h < s.H && (unsigned)v < s.W;
    });
  }
  __device__ __forceinline__ void emit(int i, int j, const REAL *v) const {
    if (f0 + i >= rows) return;
    REAL *to = part + (((long long)slot * s.G + group) * rows + f0 + i) * columns + k0 + j;
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (k0 + j + e < columns) to[e] = v[e];
  }
};

// blockIdx.z = part * G + group; a part is `length` places of the sum over n, i and j.
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS) conv2d_weight_gradient(
    const REAL *dy, const REAL *x, REAL *part, int length, SHAPE_PARAMETERS) {
  extern __shared__ float4 shared[];
  WeightGradient p = {SHAPE, dy, x, part};
  const Shape &s = p.s;
  p.slot = blockIdx.z / G, p.group = blockIdx.z % G, p.rows = F / G, p.columns = C / G * KH * KW + 1;
  p.k0 = blockIdx.x * TJ, p.f0 = blockIdx.y * TI;
  const long long first = (long long)p.slot * length, left_over = (long long)N * OH * OW - first;
  p.length = left_over < length ? (int)left_over : length;
  p.n0 = first / (OH * OW), p.at0 = (int)(first - p.n0 * (OH * OW));
  multiply(p, p.length, (REAL *)shared);
}
#endif
