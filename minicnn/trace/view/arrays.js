// Arrays and windows: what the passes, the derivations and the view share.
// An array is {shape, values, limit}: values in C order (null where it was left out of the page) and
// the largest of their sizes, which the colours are scaled to.

const size = (shape) => shape.reduce((a, b) => a * b, 1);
const flat = (shape, index) => index.reduce((at, i, k) => at * shape[k] + i, 0);
const at = (a, index) => a.values[flat(a.shape, index)];
const within = (a, h, w) => h >= 0 && w >= 0 && h < a.shape[2] && w < a.shape[3];
const clamp = (v, low, high) => Math.max(low, Math.min(high, v));

function fmt(v) {
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (Number.isInteger(v) && size < 1e4) return String(v);
  return size < 1e-3 ? v.toExponential(3) : v.toPrecision(4); // at most nine characters, as a cell holds
}

const shown = (letter, index) => `${letter}[${index.join(",")}]`;

function unravel(shape, at) {
  const index = Array(shape.length);
  for (let k = shape.length - 1; k >= 0; k--) {
    index[k] = at % shape[k];
    at = Math.floor(at / shape[k]);
  }
  return index;
}

function unpack(packed) {
  const types = { float32: Float32Array, float64: Float64Array, int32: Int32Array };
  return packed.map(({ shape, dtype, data }) => {
    if (data === null) return { shape, values: null, limit: 1 };
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const values = new types[dtype](bytes.buffer);
    let limit = 0;
    for (const v of values) if (Math.abs(v) > limit) limit = Math.abs(v);
    return { shape, values, limit: limit || 1 };
  });
}

// ------------------------------------------------------------------ windows

function* patch(win, i, j) { // [kh, kw, h, w] of window (i, j); h and w may lie in the padding
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  for (let kh = 0; kh < KH; kh++) {
    for (let kw = 0; kw < KW; kw++) yield [kh, kw, i * SH - top + kh * DH, j * SW - left + kw * DW];
  }
}

function* covering(win, h, w, OH, OW) { // [i, j, kh, kw] of each window that covers pixel (h, w)
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  for (let kh = 0; kh < KH; kh++) {
    for (let kw = 0; kw < KW; kw++) {
      const p = h + top - kh * DH, q = w + left - kw * DW;
      if (p % SH || q % SW || p < 0 || q < 0 || p / SH >= OH || q / SW >= OW) continue;
      yield [p / SH, q / SW, kh, kw];
    }
  }
}

function bins(length, places) { // [from, to) of each bin of adaptive pooling
  return Array.from({ length: places }, (_, i) => [
    Math.floor((i * length) / places), Math.ceil(((i + 1) * length) / places)]);
}

// The windows i in [from, to) for which i * stride + offset lies within 0..length-1.
function reach(offset, stride, length, windows) {
  const from = Math.max(0, Math.ceil(-offset / stride));
  return [from, Math.min(windows, Math.floor((length - 1 - offset) / stride) + 1)];
}

// ------------------------------------------------------------------ normalisation

// Which elements share a mean and a variance, and which entry of w and b an element uses.
function normLayout(step, shape) {
  if (step.op === "LayerNorm") {
    const m = size(step.normalized);
    return { groups: size(shape) / m, group: (k) => Math.floor(k / m), param: (k) => k % m };
  }
  const C = shape[1], inner = size(shape.slice(2)), param = (k) => Math.floor(k / inner) % C;
  if (step.op === "BatchNorm2d") return { groups: C, group: param, param };
  const span = (C / step.groups) * inner;
  return { groups: shape[0] * step.groups, group: (k) => Math.floor(k / span), param };
}

function normStatistics(step, A, x, { groups, group }) { // mean and 1 / sqrt(var + eps) a group
  const mean = new Float64Array(groups), rstd = new Float64Array(groups), count = x.length / groups;
  if (step.fixed) mean.set(A.running_mean.values);
  else for (let k = 0; k < x.length; k++) mean[group(k)] += x[k] / count;
  if (step.fixed) rstd.set(A.running_var.values);
  else for (let k = 0; k < x.length; k++) rstd[group(k)] += (x[k] - mean[group(k)]) ** 2 / count;
  for (let g = 0; g < groups; g++) rstd[g] = 1 / Math.sqrt(rstd[g] + step.eps);
  return { mean, rstd, count };
}

// ------------------------------------------------------------------ activations

const sigmoid = (x) => 0.5 * (1 + Math.tanh(x / 2));
const softplus = (x) => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x)));

function erfc(x) { // a series of positive terms near 0, a continued fraction in the tails
  const z = Math.abs(x);
  if (z < 2.5) {
    let term = z, sum = z;
    for (let n = 1; term > 1e-17 * sum; n++) sum += term *= (2 * z * z) / (2 * n + 1);
    return 1 - Math.sign(x) * (2 / Math.sqrt(Math.PI)) * Math.exp(-z * z) * sum;
  }
  let fraction = z;
  for (let n = 60; n > 0; n--) fraction = z + n / 2 / fraction;
  const tail = Math.exp(-z * z) / (fraction * Math.sqrt(Math.PI));
  return x > 0 ? tail : 2 - tail;
}

// op: (x, options) -> [y, dy/dx, y in letters, dy/dx in letters]
const ACTIVATIONS = {
  ReLU: (x) => [Math.max(x, 0), x > 0 ? 1 : 0, "max(x, 0)", "1 if x > 0, else 0"],
  LeakyReLU: (x, { negative_slope: a }) => (x > 0 ? [x, 1, "x", "1, since x > 0"] : [a * x, a, `${a} x`, `${a}, since x ≤ 0`]),
  ELU: (x, { alpha: a }) => (x > 0 ? [x, 1, "x", "1, since x > 0"]
    : [a * Math.expm1(x), a * Math.exp(x), `${a} (e^x − 1)`, `${a} e^x`]),
  Sigmoid: (x) => [sigmoid(x), sigmoid(x) * sigmoid(-x), "1 / (1 + e^−x)", "y (1 − y)"],
  Tanh: (x) => [Math.tanh(x), 1 - Math.tanh(x) ** 2, "tanh x", "1 − y²"],
  GELU(x, { approximate }) {
    if (approximate === "tanh") {
      const a = Math.sqrt(2 / Math.PI), t = Math.tanh(a * (x + 0.044715 * x ** 3));
      return [0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * a * (1 + 0.134145 * x * x),
        "x (1 + t) / 2, t = tanh(√(2/π) (x + 0.044715 x³))", "its derivative"];
    }
    const phi = 0.5 * erfc(-x / Math.SQRT2);
    return [x * phi, phi + (x * Math.exp((-x * x) / 2)) / Math.sqrt(2 * Math.PI), "x Φ(x)", "Φ(x) + x φ(x)"];
  },
  SiLU: (x) => [x * sigmoid(x), sigmoid(x) * (1 + x * sigmoid(-x)), "x σ(x)", "σ(x) (1 + x σ(−x))"],
  Softplus: (x, { beta: b, threshold }) => (b * x > threshold ? [x, 1, "x, above the threshold", "1"]
    : [softplus(b * x) / b, sigmoid(b * x), `log(1 + e^(${b} x)) / ${b}`, `σ(${b} x)`]),
};
