// Derivations: a number as final(scale * (start + sum of terms)), each term from the trace's arrays.
// A rule takes (context, what, index) and returns {formula, terms, start, startRef, scale, final,
// also}; refs [letter, index] are lit in the maps, those of `also` faintly.

const term = (factors, refs, label = null) => ({ factors, refs, label });
const labelled = (t) => t.label ?? t.refs.map((r) => shown(...r)).join(" · ");

function conv({ A, step }, what, index) {
  const turn = step.rule === "convTranspose"; // the same map, from y to x
  const { window: win, groups: G } = step, { x, w, b, dy } = A;
  const [F, CG] = w.shape, FG = F / G, terms = [];
  const bias = what === "y" && b ? { start: at(b, [index[1]]), startRef: ["b", [index[1]]] } : {};
  if (what === "db") {
    const [N, , OH, OW] = dy.shape, [f] = index;
    for (let n = 0; n < N; n++) for (let i = 0; i < OH; i++) for (let j = 0; j < OW; j++) {
      terms.push(term([at(dy, [n, f, i, j])], [["dy", [n, f, i, j]]]));
    }
    return { formula: "db = sum over n, i, j of dy", terms };
  }
  // `small` holds one number a window, `large` the pixels beneath.
  if (what === "dw") {
    const [f, cg, kh, kw] = index, c = Math.floor(f / FG) * CG + cg;
    const { stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
    const [large, small] = turn ? ["dy", "x"] : ["x", "dy"], [N, , OH, OW] = A[small].shape;
    for (let n = 0; n < N; n++) for (let i = 0; i < OH; i++) for (let j = 0; j < OW; j++) {
      const l = [n, c, i * SH - top + kh * DH, j * SW - left + kw * DW], s = [n, f, i, j];
      if (within(A[large], l[2], l[3])) terms.push(term([at(A[small], s), at(A[large], l)], [[small, s], [large, l]]));
    }
    return { formula: `dw = sum over all windows of ${small} · the ${large} under this tap`, terms };
  }
  if ((what === "y") !== turn) { // gather: one window, all its taps
    const letter = turn ? "dy" : "x", large = A[letter], [n, f, i, j] = index;
    for (let cg = 0; cg < CG; cg++) for (const [kh, kw, h, v] of patch(win, i, j)) {
      const l = [n, Math.floor(f / FG) * CG + cg, h, v], wi = [f, cg, kh, kw];
      if (within(large, h, v)) terms.push(term([at(large, l), at(w, wi)], [[letter, l], ["w", wi]]));
      else terms.push(term([0, at(w, wi)], [["w", wi]], `padding · ${shown("w", wi)}`));
    }
    return { formula: `${what} = ${bias.startRef ? "b + " : ""}sum over the patch of ${letter} · w`, terms, ...bias };
  }
  const letter = turn ? "x" : "dy", small = A[letter]; // scatter: the windows that cover the pixel
  const [n, c, h, v] = index, g = Math.floor(c / CG), cg = c % CG, [, , OH, OW] = small.shape;
  for (let f = g * FG; f < (g + 1) * FG; f++) for (const [i, j, kh, kw] of covering(win, h, v, OH, OW)) {
    const s = [n, f, i, j], wi = [f, cg, kh, kw];
    terms.push(term([at(small, s), at(w, wi)], [[letter, s], ["w", wi]]));
  }
  return { formula: `${what} = ${bias.startRef ? "b + " : ""}sum over every window that covers the pixel of ${letter} · w`, terms, ...bias };
}

function linear({ A: { x, w, b, dy } }, what, index) {
  const row = index.slice(0, -1), last = index[index.length - 1], [O, I] = w.shape, terms = [];
  const pair = (p, pi, q, qi) => terms.push(term([at(p[1], pi), at(q[1], qi)], [[p[0], pi], [q[0], qi]]));
  if (what === "y") {
    for (let i = 0; i < I; i++) pair(["x", x], [...row, i], ["w", w], [last, i]);
    return { formula: "y = b + sum over i of x · w", terms, start: b ? at(b, [last]) : 0, startRef: b && ["b", [last]] };
  }
  if (what === "dx") {
    for (let o = 0; o < O; o++) pair(["dy", dy], [...row, o], ["w", w], [o, last]);
    return { formula: "dx = sum over o of dy · w", terms };
  }
  const rows = dy.shape.slice(0, -1), [o, i] = index;
  for (let k = 0; k < size(rows); k++) {
    const r = unravel(rows, k);
    if (what === "dw") pair(["dy", dy], [...r, o], ["x", x], [...r, i]);
    else terms.push(term([at(dy, [...r, o])], [["dy", [...r, o]]]));
  }
  return { formula: what === "dw" ? "dw = sum over n of dy · x" : "db = sum over n of dy", terms };
}

// ------------------------------------------------------------------ pooling

function maxPool({ A: { x, dy, winner }, step }, what, [n, c, i, j]) {
  const W = x.shape[3], terms = [], also = [];
  if (what === "y") {
    const k = at(winner, [n, c, i, j]), xi = [n, c, Math.floor(k / W), k % W];
    for (const [, , h, w] of patch(step.window, i, j)) if (within(x, h, w)) also.push(["x", [n, c, h, w]]);
    terms.push(term([at(x, xi)], [["x", xi]], `winner ${shown("x", xi)}`));
    return { formula: "y = the largest x of the window; a tie goes to the first, row by row", terms, also };
  }
  for (const [p, q] of covering(step.window, i, j, dy.shape[2], dy.shape[3])) {
    const di = [n, c, p, q];
    if (at(winner, di) === i * W + j) terms.push(term([at(dy, di)], [["dy", di]], `won ${shown("dy", di)}`));
    else also.push(["dy", di]);
  }
  return { formula: `dx = sum of dy over the windows this pixel won (it lost ${also.length})`, terms, also };
}

function avgPool({ A: { x, dy, divisor }, step }, what, [n, c, i, j]) {
  const terms = [];
  if (what === "y") {
    for (const [, , h, w] of patch(step.window, i, j)) {
      if (within(x, h, w)) terms.push(term([at(x, [n, c, h, w])], [["x", [n, c, h, w]]]));
    }
    return { formula: `y = sum of the window / ${at(divisor, [i, j])}`, terms, scale: 1 / at(divisor, [i, j]) };
  }
  for (const [p, q] of covering(step.window, i, j, dy.shape[2], dy.shape[3])) {
    const d = at(divisor, [p, q]), di = [n, c, p, q];
    terms.push(term([at(dy, di), 1 / d], [["dy", di]], `${shown("dy", di)} / ${d}`));
  }
  return { formula: "dx = sum of dy / divisor over the windows that cover the pixel", terms };
}

function adaptive({ A: { x, dy } }, what, [n, c, i, j]) {
  const rows = bins(x.shape[2], dy.shape[2]), cols = bins(x.shape[3], dy.shape[3]), terms = [];
  if (what === "y") {
    for (let h = rows[i][0]; h < rows[i][1]; h++) for (let w = cols[j][0]; w < cols[j][1]; w++) {
      terms.push(term([at(x, [n, c, h, w])], [["x", [n, c, h, w]]]));
    }
    return { formula: `y = mean of ${terms.length} pixels`, terms, scale: 1 / terms.length };
  }
  rows.forEach(([h0, h1], p) => cols.forEach(([w0, w1], q) => {
    if (i < h0 || i >= h1 || j < w0 || j >= w1) return;
    const d = (h1 - h0) * (w1 - w0), di = [n, c, p, q];
    terms.push(term([at(dy, di), 1 / d], [["dy", di]], `${shown("dy", di)} / ${d}`));
  }));
  return { formula: "dx = sum of dy / size over the cells that hold the pixel", terms };
}

// ------------------------------------------------------------------ normalisation, softmax

function norm({ A, step }, what, index) {
  const { x, w, b, dy } = A, layout = normLayout(step, x.shape), { group, param } = layout;
  const { mean, rstd, count } = normStatistics(step, A, x.values, layout);
  const weight = (k) => (w ? w.values[param(k)] : 1), terms = [];
  const hat = (k) => (x.values[k] - mean[group(k)]) * rstd[group(k)];
  if (what === "dw" || what === "db") {
    const which = flat(A[what].shape, index);
    for (let k = 0; k < x.values.length; k++) {
      if (param(k) !== which) continue;
      const ix = unravel(x.shape, k);
      if (what === "db") terms.push(term([dy.values[k]], [["dy", ix]]));
      else terms.push(term([dy.values[k], hat(k)], [["dy", ix], ["x", ix]], `${shown("dy", ix)} · x̂`));
    }
    return { formula: what === "db" ? "db = sum of dy" : "dw = sum of dy · x̂", terms };
  }
  const k = flat(x.shape, index), g = group(k), r = rstd[g];
  if (what === "y") {
    terms.push(term([weight(k), x.values[k] - mean[g], r], [["x", index]], "w · (x − mean) · rstd"));
    return { formula: `y = w · (x − mean) · rstd + b, mean ${fmt(mean[g])}, rstd ${fmt(r)}`, terms,
      start: b ? b.values[param(k)] : 0, startRef: b && ["b", unravel(b.shape, param(k))] };
  }
  if (step.fixed) {
    terms.push(term([dy.values[k], weight(k), r], [["dy", index]], "dy · w · rstd"));
    return { formula: "dx = dy · w · rstd: the statistics are fixed", terms };
  }
  let mg = 0, mgx = 0;
  for (let e = 0; e < x.values.length; e++) {
    if (group(e) !== g) continue;
    const v = dy.values[e] * weight(e);
    mg += v / count;
    mgx += (v * hat(e)) / count;
  }
  terms.push(
    term([r, dy.values[k] * weight(k)], [["dy", index]], "1 direct: rstd · g"),
    term([-r, mg], [], "2 through the mean: −rstd · mean(g)"),
    term([-r, hat(k), mgx], [["x", index]], "3 through the variance: −rstd · x̂ · mean(g x̂)"));
  return { formula: "dx = rstd (g − mean(g) − x̂ mean(g x̂)) with g = dy · w: three paths", terms };
}

function softmax({ A: { x, y, dy }, step }, what, index) {
  const log = step.op === "LogSoftmax", d = step.dim, own = at(y, index);
  const all = Array.from({ length: x.shape[d] }, (_, k) => index.map((v, a) => (a === d ? k : v)));
  if (what === "y") {
    const max = Math.max(...all.map((p) => at(x, p))), e = at(x, index) - max;
    return { formula: log ? "y = x − max − log of the sum" : "y = e^(x − max) / the sum",
      terms: all.map((p) => term([Math.exp(at(x, p) - max)], [["x", p]], `e^(${shown("x", p)} − max)`)),
      final: (s) => (log ? e - Math.log(s) : Math.exp(e) / s) };
  }
  if (log) {
    const through = all.map((p) => term([-Math.exp(own), at(dy, p)], [["dy", p]], `−e^y · ${shown("dy", p)}`));
    return { formula: "dx = dy − e^y · sum of dy", terms: [term([at(dy, index)], [["dy", index]]), ...through] };
  }
  const through = all.map((p) => term([-own, at(y, p), at(dy, p)], [["y", p], ["dy", p]], `−y · ${shown("y", p)} · ${shown("dy", p)}`));
  return { formula: "dx = y (dy − sum of dy · y)", terms: [term([own, at(dy, index)], [["dy", index]], `y · ${shown("dy", index)}`), ...through] };
}

// ------------------------------------------------------------------ losses

function likelihood({ A: { x, weights }, step }, what, index) { // cross_entropy and nll_loss
  const entropy = step.op === "cross_entropy", C = x.shape[1], scale = step.share;
  const row = (ix) => Array.from({ length: C }, (_, c) => [ix[0], c, ...ix.slice(2)]);
  const logP = (ix) => {
    if (!entropy) return at(x, ix);
    const max = Math.max(...row(ix).map((p) => at(x, p)));
    return at(x, ix) - max - Math.log(row(ix).reduce((s, p) => s + Math.exp(at(x, p) - max), 0));
  };
  const count = fmt(1 / scale);
  if (what === "y") {
    const terms = [];
    for (let k = 0; k < weights.values.length; k++) {
      const ix = unravel(x.shape, k), label = `−y log p[${ix.join(",")}]`;
      if (weights.values[k]) terms.push(term([-weights.values[k], logP(ix)], [["x", ix]], label));
    }
    return { formula: `loss = −sum of y log p / ${count}`, terms, scale };
  }
  const own = term([-at(weights, index)], [], "−y");
  if (!entropy) return { formula: `dx = −y / ${count}`, terms: [own], scale };
  const total = row(index).reduce((s, p) => s + at(weights, p), 0); // 1, or 0 for an ignored label
  const p = term([Math.exp(logP(index)), ...(total === 1 ? [] : [total])], [["x", index]], "p = softmax(x)");
  return { formula: `dx = (p − y) / ${count} with p = softmax(x)`, terms: [p, own], scale };
}

function loss({ A: { x, target }, step }, what, index) { // element by element
  const count = x.values.length, scale = 1 / count, rule = LOSSES[step.op], refs = (ix) => [["x", ix], ["target", ix]];
  if (what === "y") {
    const terms = Array.from(x.values, (v, k) => {
      const ix = unravel(x.shape, k);
      return term(rule.y(v, target.values[k]), refs(ix), `element ${ix.join(",")}`);
    });
    return { formula: `loss = sum of ${rule.name} / ${count}`, terms, scale };
  }
  const terms = rule.dx(at(x, index), at(target, index)).map(([label, factors]) => term(factors, refs(index), label));
  return { formula: `dx = (${terms.map((t) => t.label).join(" + ")}) / ${count}`, terms, scale };
}

// ------------------------------------------------------------------ element by element

function elementwise({ A: { x, dy }, step }, what, index) {
  const [y, slope, name, slopeName] = ACTIVATIONS[step.op](at(x, index), step.options);
  if (what === "y") return { formula: `y = ${name} at x = ${fmt(at(x, index))}`, terms: [term([y], [["x", index]], `${step.op}(${shown("x", index)})`)] };
  return { formula: `dx = dy · slope, which is ${slopeName} at x = ${fmt(at(x, index))}`, terms: [term([at(dy, index), slope], [["dy", index], ["x", index]], `${shown("dy", index)} · slope`)] };
}

function dropout({ A }, what, index) {
  const from = what === "y" ? "x" : "dy";
  return { formula: `${what} = ${from} · mask`, terms: [term([at(A[from], index), A.mask ? at(A.mask, index) : 1], [[from, index]], `${shown(from, index)} · mask`)] };
}

function flatten({ A }, what, index) {
  const [from, to] = what === "y" ? ["x", "y"] : ["dy", "x"];
  const source = unravel(A[from].shape, flat(A[to].shape, index));
  return { formula: `${what} is ${from} at another index`, terms: [term([at(A[from], source)], [[from, source]])] };
}

function residual({ A }, what, index) {
  const terms = (what === "y" ? ["x", "shortcut"] : ["dy"]).map((l) => term([at(A[l], index)], [[l, index]]));
  return { formula: what === "y" ? "y = body + shortcut" : "the sum hands dy to both branches", terms };
}

const RULES = {
  conv, convTranspose: conv, linear, maxPool, avgPool, adaptive, norm, softmax, likelihood, loss,
  elementwise, dropout, flatten, residual,
};

function derive(context, what, index) {
  const rule = RULES[context.step.rule];
  if (!rule || Object.values(context.A).some((a) => a.values === null)) return null;
  const d = { start: 0, startRef: null, scale: 1, final: (s) => s, also: [], ...rule(context, what, index) };
  for (const t of d.terms) t.value = t.factors.reduce((p, f) => p * f, 1);
  d.total = d.final(d.scale * (d.start + d.terms.reduce((s, t) => s + t.value, 0)));
  return d;
}
