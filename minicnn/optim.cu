// One optimiser step over all parameters in one launch.
//
// A block takes a piece of one tensor: pieces[2 * block] is the tensor, [2 * block + 1] its first
// element. arrays[tensor * SLOTS + slot] is an address: p, g, and what the optimiser keeps. What
// changes from step to step comes from device memory, so that a captured CUDA graph can be
// repeated: rates[0] is 0 for a step that must change nothing, rates[1] to [3] are the optimiser's.
// Compiled without fused multiply-adds and in the order of the functions in optim.py: the result
// is NumPy's to the last bit.

enum { SLOTS = 5, PIECE = 1024, BLOCK = 256 };

#define PARAMETERS \
  const long long *pieces, const long long *sizes, const long long *arrays, const REAL *rates

#define EACH_ELEMENT                                                                   \
  if (rates[0] == 0) return;                                                           \
  const long long tensor = pieces[2 * blockIdx.x], first = pieces[2 * blockIdx.x + 1]; \
  const long long size = sizes[tensor];                                                \
  const long long *at = arrays + tensor * SLOTS;                                       \
  REAL *p = (REAL *)at[0], *s0 = (REAL *)at[2], *s1 = (REAL *)at[3], *s2 = (REAL *)at[4]; \
  const REAL *gradient = (const REAL *)at[1];                                          \
  for (long long i = first + threadIdx.x; i < size && i < first + PIECE; i += BLOCK)

// Denormal numbers become zero, as everywhere: see optim.py.
__device__ __forceinline__ REAL flushed(REAL x) {
  const REAL tiny = sizeof(REAL) == 4 ? REAL(0x1p-126) : REAL(0x1p-1022);
  return fabs(x) < tiny ? REAL(0) : x;  // NaN stays
}

// rates: lr, share of g that b takes in, nesterov's rate of b. s0 is b, the momentum buffer.
extern "C" __global__ void __launch_bounds__(BLOCK)
    sgd(PARAMETERS, int momentum, int nesterov, int decay, REAL keep, REAL weight_decay) {
  EACH_ELEMENT {
    REAL g = gradient[i], q = p[i];
    if (decay) g = g + q * weight_decay;
    if (!momentum || nesterov) q = q - g * rates[1];
    if (momentum) {
      const REAL b = flushed(s0[i] * keep + rates[2] * g);
      s0[i] = b;
      q = q - b * (nesterov ? rates[3] : rates[1]);
    }
    p[i] = q;
  }
}

// rates: of m, the divisor of v's root, AdamW's factor of p. s0 is m, s1 is v, s2 the largest v.
extern "C" __global__ void __launch_bounds__(BLOCK)
    adam(PARAMETERS, int amsgrad, int decoupled, int decay, REAL beta1, REAL new1, REAL beta2,
         REAL new2, REAL eps, REAL weight_decay) {
  EACH_ELEMENT {
    REAL g = gradient[i], q = p[i];
    if (decoupled) q = q * rates[3];
    else if (decay) g = g + weight_decay * q;
    const REAL m = flushed(s0[i] * beta1 + g * new1);
    REAL v = s1[i] * beta2 + g * g * new2;
    s0[i] = m, s1[i] = v;
    if (amsgrad) {  // a NaN stays, as in numpy.maximum
      const REAL before = s2[i];
      if (before >= v || before != before) v = before;
      s2[i] = v;
    }
    p[i] = q - m / (sqrt(v) / rates[2] + eps) * rates[1];
  }
}

// rates: lr. s0 is v, s1 is m where centered, s2 is b with momentum.
extern "C" __global__ void __launch_bounds__(BLOCK)
    rmsprop(PARAMETERS, int centered, int momentum, int decay, REAL alpha, REAL fresh, REAL eps,
            REAL weight_decay, REAL keep) {
  EACH_ELEMENT {
    REAL g = gradient[i];
    if (decay) g = g + weight_decay * p[i];
    const REAL v = s0[i] * alpha + g * g * fresh;
    s0[i] = v;
    REAL variance = v;
    if (centered) {
      const REAL m = flushed(s1[i] * alpha + g * fresh);
      s1[i] = m;
      variance = v - m * m;
      if (variance < 0) variance = 0;  // NaN stays
    }
    REAL d = g / (sqrt(variance) + eps);
    if (momentum) {
      d = flushed(s2[i] * keep + d);
      s2[i] = d;
    }
    p[i] = p[i] - d * rates[1];
  }
}

// After a step's gradients: are they and the loss finite? `tally` keeps count in double, as
// minicnn.gpu.training has it: sums of loss, samples and hits over the good steps; the first bad
// step or -1; steps; the last loss. rates[0] tells the update whether to go on. A block looks at a
// piece of the gradients, and the last to finish draws the sum; counters[0] counts bad blocks and
// [1] the finished ones, both 0 before and after.
extern "C" __global__ void __launch_bounds__(BLOCK)
    finish_step(long long n, const REAL *gradients, const REAL *loss, const long long *kept,
                const long long *correct, REAL *rates, double *tally, unsigned *counters) {
  enum { LOSS, SAMPLES, CORRECT, BAD, STEPS, LAST };
  __shared__ int bad;
  if (threadIdx.x == 0) bad = 0;
  __syncthreads();
  const long long first = (long long)blockIdx.x * PIECE;
  for (long long i = first + threadIdx.x; i < n && i < first + PIECE; i += BLOCK)
    if (!(gradients[i] - gradients[i] == 0)) bad = 1;  // whoever writes, writes this
  __syncthreads();
  if (threadIdx.x) return;
  if (bad) atomicAdd(counters, 1u);
  __threadfence();
  if (atomicAdd(counters + 1, 1u) != gridDim.x - 1) return;
  __threadfence();
  const double value = *loss;
  const bool finite = value - value == 0 && ((volatile unsigned *)counters)[0] == 0;
  if (!finite && tally[BAD] < 0) tally[BAD] = tally[STEPS];
  const bool good = tally[BAD] < 0;
  rates[0] = good ? REAL(1) : REAL(0);
  if (good) tally[LOSS] += value * *kept, tally[SAMPLES] += *kept, tally[CORRECT] += *correct;
  tally[LAST] = value, tally[STEPS] += 1;
  counters[0] = counters[1] = 0;
}
