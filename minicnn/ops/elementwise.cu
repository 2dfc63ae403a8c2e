// One number at a time: activations, by the formulas of activations.py's reference, and dropout.

__device__ __forceinline__ REAL sigmoid(REAL x) { return 1 / (1 + exp(-x)); }  // 1 / inf is 0
__device__ __forceinline__ REAL softplus(REAL x) { return (x > 0 ? x : REAL(0)) + log1p(exp(-fabs(x))); }
__device__ __forceinline__ REAL below(REAL x) { return erfc(-x * REAL(0.70710678118654752440)) / 2; }
__device__ __forceinline__ REAL bell(REAL x) { return REAL(0.39894228040143267794) * exp(-x * x / 2); }
__device__ __forceinline__ REAL u(REAL x) {
  return REAL(1.5957691216057307117) * (x + REAL(0.044715) * x * x * x);
}
__device__ __forceinline__ REAL du(REAL x) {
  return REAL(1.5957691216057307117) * (1 + 3 * REAL(0.044715) * x * x);
}

// name, y of x, dx of dy and of what was kept (called x as well), for parameters a and b.
#define FORMULA(name, value, gradient)                                                           \
  extern "C" __global__ void name##_forward(long long n, const REAL *in, REAL *out, REAL a, REAL b) { \
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                        \
    if (i >= n) return;                                                                          \
    const REAL x = in[i];                                                                        \
    out[i] = value;                                                                              \
  }                                                                                              \
  extern "C" __global__ void name##_backward(long long n, const REAL *upstream, const REAL *kept, \
                                             REAL *out, REAL a, REAL b) {                        \
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;                        \
    if (i >= n) return;                                                                          \
    const REAL dy = upstream[i], x = kept[i];                                                    \
    out[i] = gradient;                                                                           \
  }

FORMULA(relu, x <= 0 ? REAL(0) : x, x > 0 ? dy : REAL(0))  // a NaN is not <= 0 and passes
FORMULA(leaky_relu, x > 0 ? x : a * x, x > 0 ? dy : dy * a)
FORMULA(elu, x > 0 ? x : a * expm1(x), x > 0 ? dy : dy * a * exp(x))
FORMULA(sigmoid, sigmoid(x), dy * x * (1 - x))
FORMULA(tanh, tanh(x), dy * (1 - x) * (1 + x))
FORMULA(gelu, x * below(x), dy * (below(x) + x * bell(x)))
FORMULA(gelu_tanh, x * sigmoid(u(x)), dy * sigmoid(u(x)) * (1 + x * sigmoid(-u(x)) * du(x)))
FORMULA(silu, x * sigmoid(x), dy * sigmoid(x) * (1 + x * sigmoid(-x)))
FORMULA(softplus, a * x > b ? x : softplus(a * x) / a, a * x > b ? dy : dy * sigmoid(a * x))

// Dropped is what `keep` has false for; NaN and infinity times 0 stay NaN, as on the CPU.
extern "C" __global__ void dropout_forward(long long n, const REAL *x, const bool *keep, REAL *y,
                                           REAL *mask, REAL scale) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const REAL factor = keep[i] ? scale : REAL(0);
  y[i] = x[i] * factor;
  mask[i] = factor;
}
extern "C" __global__ void dropout_backward(long long n, const REAL *dy, const REAL *mask, REAL *dx) {
  const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) dx[i] = dy[i] * mask[i];
}
