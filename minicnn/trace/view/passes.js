// The forward pass once more, in float64: what a finite difference runs twice.
// Each op takes (step, A, inputs): the node's description, its arrays and the values of its sources.
// It returns the values of y, or is a generator that does, where it may take long.

// Visit each row of taps: row(weight, place in large, place in small, how many windows).
// `large` is under the windows and `small` holds one number a window: x and y of Conv2d, or y and x
// of ConvTranspose2d.
function* slide({ window: win, groups: G }, w, large, small, row) {
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  const [N, F, OH, OW] = small, [, C, H, W] = large, CG = C / G, FG = F / G;
  for (let kw = 0; kw < KW; kw++) {
    const [j0, j1] = reach(kw * DW - left, SW, W, OW);
    if (j0 >= j1) continue;
    yield;
    for (let kh = 0; kh < KH; kh++) {
      const [i0, i1] = reach(kh * DH - top, SH, H, OH);
      for (let n = 0; n < N; n++) for (let f = 0; f < F; f++) for (let cg = 0; cg < CG; cg++) {
        const k = w[((f * CG + cg) * KH + kh) * KW + kw];
        const plane = n * C + Math.floor(f / FG) * CG + cg;
        for (let i = i0; i < i1; i++) {
          const h = i * SH - top + kh * DH, v = j0 * SW - left + kw * DW;
          row(k, (plane * H + h) * W + v, ((n * F + f) * OH + i) * OW + j0, j1 - j0);
        }
      }
    }
  }
}

function withBias({ y, b }) { // y's array, filled with its channel's bias
  const values = new Float64Array(size(y.shape));
  if (!b) return values;
  const inner = size(y.shape.slice(2));
  for (let k = 0; k < values.length; k++) values[k] = b.values[Math.floor(k / inner) % y.shape[1]];
  return values;
}

function pooled({ window: win }, { x, y }, values, start, take, finish) {
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  const [N, C, OH, OW] = y.shape, [, , H, W] = x.shape, out = new Float64Array(size(y.shape));
  let o = 0;
  for (let p = 0; p < N * C; p++) for (let i = 0; i < OH; i++) for (let j = 0; j < OW; j++, o++) {
    let seen = start;
    for (let kh = 0; kh < KH; kh++) {
      const h = i * SH - top + kh * DH;
      if (h < 0 || h >= H) continue;
      for (let kw = 0; kw < KW; kw++) {
        const v = j * SW - left + kw * DW;
        if (v >= 0 && v < W) seen = take(seen, values[(p * H + h) * W + v]);
      }
    }
    out[o] = finish(seen, o % (OH * OW));
  }
  return out;
}

// Each row along an axis: visit(k => place of its k-th element).
function alongAxis(shape, d, visit) {
  const inner = size(shape.slice(d + 1)), outer = size(shape.slice(0, d)), n = shape[d];
  for (let o = 0; o < outer; o++) for (let i = 0; i < inner; i++) visit((k) => (o * n + k) * inner + i, n);
}

function logSoftmax(shape, d, x) {
  const out = new Float64Array(x.length);
  alongAxis(shape, d, (place, n) => {
    let max = -Infinity, sum = 0;
    for (let k = 0; k < n; k++) max = Math.max(max, x[place(k)]);
    for (let k = 0; k < n; k++) sum += Math.exp(x[place(k)] - max);
    for (let k = 0; k < n; k++) out[place(k)] = x[place(k)] - max - Math.log(sum);
  });
  return out;
}

// Of one element: its loss as factors, and the terms of its derivative as [label, factors].
const LOSSES = {
  mse_loss: { name: "(x − target)²", y: (x, t) => [x - t, x - t], dx: (x, t) => [["2 (x − target)", [2, x - t]]] },
  l1_loss: { name: "|x − target|", y: (x, t) => [Math.abs(x - t)], dx: (x, t) => [["sign(x − target)", [Math.sign(x - t)]]] },
  bce_with_logits: { name: "−t log σ(x) − (1 − t) log(1 − σ(x))",
    y: (x, t) => [t * softplus(-x) + (1 - t) * softplus(x)], dx: (x, t) => [["σ(x)", [sigmoid(x)]], ["−target", [-t]]] },
};

const PASSES = {
  * conv(step, A, [x]) {
    const y = withBias(A), SW = step.window.stride[1];
    yield* slide(step, A.w.values, A.x.shape, A.y.shape, (k, l, s, m) => {
      for (let j = 0; j < m; j++) y[s + j] += k * x[l + j * SW];
    });
    return y;
  },
  * convTranspose(step, A, [x]) {
    const y = withBias(A), SW = step.window.stride[1];
    yield* slide(step, A.w.values, A.y.shape, A.x.shape, (k, l, s, m) => {
      for (let j = 0; j < m; j++) y[l + j * SW] += k * x[s + j];
    });
    return y;
  },
  linear(step, { w, b, y }, [x]) {
    const [O, I] = w.shape, out = new Float64Array(size(y.shape));
    for (let k = 0; k < out.length; k++) {
      const o = k % O, row = ((k - o) / O) * I;
      let sum = b ? b.values[o] : 0;
      for (let i = 0; i < I; i++) sum += x[row + i] * w.values[o * I + i];
      out[k] = sum;
    }
    return out;
  },
  maxPool: (step, A, [x]) => pooled(step, A, x, -Infinity, (m, v) => (v > m || v !== v ? v : m), (m) => m),
  avgPool: (step, A, [x]) => pooled(step, A, x, 0, (s, v) => s + v, (s, p) => s / A.divisor.values[p]),
  adaptive(step, { x: { shape: [N, C, H, W] }, y }, [x]) {
    const [, , OH, OW] = y.shape, rows = bins(H, OH), cols = bins(W, OW), out = new Float64Array(size(y.shape));
    let o = 0;
    for (let p = 0; p < N * C; p++) for (const [h0, h1] of rows) for (const [w0, w1] of cols) {
      let sum = 0;
      for (let h = h0; h < h1; h++) for (let w = w0; w < w1; w++) sum += x[(p * H + h) * W + w];
      out[o++] = sum / ((h1 - h0) * (w1 - w0));
    }
    return out;
  },
  norm(step, A, [x]) {
    const layout = normLayout(step, A.x.shape), { mean, rstd } = normStatistics(step, A, x, layout);
    return x.map((v, k) => {
      const g = layout.group(k), p = layout.param(k);
      return (A.w ? A.w.values[p] : 1) * (v - mean[g]) * rstd[g] + (A.b ? A.b.values[p] : 0);
    });
  },
  softmax(step, A, [x]) {
    const log = logSoftmax(A.x.shape, step.dim, x);
    return step.op === "LogSoftmax" ? log : log.map(Math.exp);
  },
  elementwise: (step, A, [x]) => x.map((v) => ACTIVATIONS[step.op](v, step.options)[0]),
  dropout: (step, A, [x]) => (A.mask ? x.map((v, k) => v * A.mask.values[k]) : x),
  flatten: (step, A, [x]) => x,
  residual: (step, A, [x, shortcut]) => x.map((v, k) => v + shortcut[k]),
  likelihood(step, A, [x]) { // of the labels: cross_entropy and nll_loss
    const log = step.op === "cross_entropy" ? logSoftmax(A.x.shape, 1, x) : x;
    let sum = 0;
    for (let k = 0; k < x.length; k++) if (A.weights.values[k]) sum -= A.weights.values[k] * log[k];
    return Float64Array.of(sum * step.share);
  },
  loss(step, A, [x]) {
    let sum = 0;
    for (let k = 0; k < x.length; k++) sum += LOSSES[step.op].y(x[k], A.target.values[k]).reduce((p, v) => p * v);
    return Float64Array.of(sum / x.length);
  },
};

const STEP = 1e-5; // of the number that a finite difference changes

// Return difference(at, what, index): a generator that yields now and then, and returns the central
// difference of the loss in one number, or undefined where the page lacks an array.
function differences(contexts) {
  const values = [];
  const needed = ["w", "b", "mask", "divisor", "running_mean", "running_var", "weights", "target"];
  const input = contexts.find(({ step }) => step.sources[0] < 0).A.x;
  const whole = input.values && contexts.every(({ A }) => needed.every((l) => !A[l] || A[l].values));
  function* run(k, A, inputs) {
    const { step } = contexts[k], y = PASSES[step.rule](step, A, inputs);
    yield;
    return y.next ? yield* y : y;
  }
  const bumped = (a, place, by) => {
    const copy = Float64Array.from(a);
    copy[place] += by;
    return copy;
  };

  return function* difference(at, what, index) {
    if (!whole || contexts.some(({ step }) => !PASSES[step.rule])) return undefined;
    const inputs = (k, changed) => contexts[k].step.sources.map((s) => changed.get(s) ?? values[s]);
    const none = new Map();
    values[-1] ??= Float64Array.from(input.values);
    for (let k = values.length; k < contexts.length; k++) values[k] = yield* run(k, contexts[k].A, inputs(k, none));
    const { A } = contexts[at], losses = [];
    const letter = { y: "y", dx: "x", dw: "w", db: "b" }[what], place = flat(A[letter].shape, index);
    for (const by of [STEP, -STEP]) {
      const changed = new Map(), [x, ...others] = inputs(at, none);
      if (what === "y") changed.set(at, bumped(values[at], place, by));
      else if (what === "dx") changed.set(at, yield* run(at, A, [bumped(x, place, by), ...others]));
      else {
        const p = { ...A[letter], values: bumped(A[letter].values, place, by) };
        changed.set(at, yield* run(at, { ...A, [letter]: p }, [x, ...others]));
      }
      for (let k = at + 1; k < contexts.length; k++) {
        if (contexts[k].step.sources.some((s) => changed.has(s))) changed.set(k, yield* run(k, contexts[k].A, inputs(k, changed)));
      }
      losses.push(changed.get(contexts.length - 1)[0]);
    }
    return (losses[0] - losses[1]) / (2 * STEP);
  };
}
