// The picture of a trace: one view for the page and for the widget.
//   render(root, data, send)   data as page.py packs it; send(message) in the widget, else null
// Every number is read from the arrays of the trace or derived here from them, term by term.

const CROP = 12; // rows and columns of a table; larger maps are cropped around the chosen pixel
const MATRIX = [18, 14]; // rows and columns shown of the column matrix
const LISTED = 60; // terms listed of a derivation; the sum is over all

const fmt = (v) => (v === 0 ? "0" : Number.isInteger(v) && Math.abs(v) < 1e4 ? String(v) : v.toPrecision(4));
const flat = (shape, index) => index.reduce((at, i, k) => at * shape[k] + i, 0);
const size = (shape) => shape.reduce((a, b) => a * b, 1);

function unravel(shape, at) {
  const index = Array(shape.length);
  for (let k = shape.length - 1; k >= 0; k--) [index[k], at] = [at % shape[k], Math.floor(at / shape[k])];
  return index;
}

function unpack(packed) {
  const types = { float32: Float32Array, float64: Float64Array };
  return packed.map(({ shape, dtype, data }) => {
    if (data === null) return { shape, values: null, limit: 1 };
    const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
    const values = new types[dtype](bytes.buffer);
    let limit = 0;
    for (const v of values) if (Math.abs(v) > limit) limit = Math.abs(v);
    return { shape, values, limit: limit || 1 };
  });
}

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) e.setAttribute(key, value === true ? "" : value);
  }
  e.append(...children.filter((c) => c !== null));
  return e;
}

// ------------------------------------------------------------------ derivations

// Each rule returns {formula, terms, start, scale, final}; a term is {label, factors, refs}, and a
// ref [array, index] is lit in the maps. The number is final(scale * (start + sum of terms)).
const at = (a, index) => a.values[flat(a.shape, index)];
const term = (label, factors, ...refs) => ({ label, factors, refs });

function* covering(win, h, w, OH, OW) { // the windows that cover pixel (h, w), with the tap
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  for (let kh = 0; kh < KH; kh++) for (let kw = 0; kw < KW; kw++) {
    const p = h + top - kh * DH, q = w + left - kw * DW;
    if (p % SH || q % SW || p < 0 || q < 0 || p / SH >= OH || q / SW >= OW) continue;
    yield [p / SH, q / SW, kh, kw];
  }
}

function* patch(win, i, j) { // the taps of window (i, j); h and w may lie in the padding
  const { kernel: [KH, KW], stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
  for (let kh = 0; kh < KH; kh++) for (let kw = 0; kw < KW; kw++)
    yield [kh, kw, i * SH - top + kh * DH, j * SW - left + kw * DW];
}

const within = (a, h, w) => h >= 0 && w >= 0 && h < a.shape[2] && w < a.shape[3];
const shown = (letter, index) => `${letter}[${index.join(",")}]`;

function sumOf(letter, a, keep, formula) {
  const terms = [];
  for (let k = 0; k < a.values.length; k++) {
    const index = unravel(a.shape, k);
    if (keep(index)) terms.push(term(shown(letter, index), [a.values[k]], [letter, index]));
  }
  return { formula, terms };
}

function conv({ A, step }, what, index) {
  const { window: win, groups: G } = step;
  const { x, w, b, y, dy } = A;
  const [F, CG] = w.shape, FG = F / G, terms = [];
  if (what === "y") {
    const [n, f, i, j] = index;
    for (let cg = 0; cg < CG; cg++) for (const [kh, kw, h, v] of patch(win, i, j)) {
      const c = Math.floor(f / FG) * CG + cg, wi = [f, cg, kh, kw];
      const inside = within(x, h, v), xi = [n, c, h, v];
      terms.push(term(`${inside ? shown("x", xi) : "padding"} · ${shown("w", wi)}`,
        [inside ? at(x, xi) : 0, at(w, wi)], ...(inside ? [["x", xi]] : []), ["w", wi]));
    }
    return { formula: "y = b + sum over the patch of x · w", terms, start: b ? at(b, [f]) : 0, startRef: b && ["b", [f]] };
  }
  if (what === "dx") {
    const [n, c, h, v] = index, g = Math.floor(c / CG), cg = c % CG;
    for (let f = g * FG; f < (g + 1) * FG; f++) for (const [i, j, kh, kw] of covering(win, h, v, y.shape[2], y.shape[3])) {
      const di = [n, f, i, j], wi = [f, cg, kh, kw];
      terms.push(term(`${shown("dy", di)} · ${shown("w", wi)}`, [at(dy, di), at(w, wi)], ["dy", di], ["w", wi]));
    }
    return { formula: "dx = sum over every window that covers the pixel of dy · w", terms };
  }
  if (what === "dw") {
    const [f, cg, kh, kw] = index, c = Math.floor(f / FG) * CG + cg;
    const { stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
    const [N, , OH, OW] = y.shape;
    for (let n = 0; n < N; n++) for (let i = 0; i < OH; i++) for (let j = 0; j < OW; j++) {
      const xi = [n, c, i * SH - top + kh * DH, j * SW - left + kw * DW], di = [n, f, i, j];
      if (within(x, xi[2], xi[3]))
        terms.push(term(`${shown("dy", di)} · ${shown("x", xi)}`, [at(dy, di), at(x, xi)], ["dy", di], ["x", xi]));
    }
    return { formula: "dw = sum over all windows of dy · the x under this tap", terms };
  }
  return sumOf("dy", dy, (i) => i[1] === index[0], "db = sum over n, i, j of dy");
}

function linear({ A }, what, index) {
  const { x, w, b, dy } = A, row = index.slice(0, -1), last = index[index.length - 1], terms = [];
  if (what === "y") {
    for (let i = 0; i < w.shape[1]; i++)
      terms.push(term(`${shown("x", [...row, i])} · ${shown("w", [last, i])}`, [at(x, [...row, i]), at(w, [last, i])], ["x", [...row, i]], ["w", [last, i]]));
    return { formula: "y = b + sum over i of x · w", terms, start: b ? at(b, [last]) : 0, startRef: b && ["b", [last]] };
  }
  if (what === "dx") {
    for (let o = 0; o < w.shape[0]; o++)
      terms.push(term(`${shown("dy", [...row, o])} · ${shown("w", [o, last])}`, [at(dy, [...row, o]), at(w, [o, last])], ["dy", [...row, o]], ["w", [o, last]]));
    return { formula: "dx = sum over o of dy · w", terms };
  }
  if (what === "db") return sumOf("dy", dy, (i) => i[i.length - 1] === index[0], "db = sum over n of dy");
  const rows = dy.shape.slice(0, -1), [o, i] = index;
  for (let k = 0; k < size(rows); k++) {
    const r = unravel(rows, k), di = [...r, o], xi = [...r, i];
    terms.push(term(`${shown("dy", di)} · ${shown("x", xi)}`, [at(dy, di), at(x, xi)], ["dy", di], ["x", xi]));
  }
  return { formula: "dw = sum over n of dy · x", terms };
}

function maxPool({ A, step }, what, index) {
  const { x, dy, winner } = A, [n, c, i, j] = index, W = x.shape[3];
  if (what === "y") {
    const k = at(winner, index), xi = [n, c, Math.floor(k / W), k % W];
    const others = [];
    for (const [, , h, w] of patch(step.window, i, j)) if (within(x, h, w)) others.push(["x", [n, c, h, w]]);
    return { formula: "y = the largest x of the window; a tie goes to the first, row by row", terms: [term(`winner ${shown("x", xi)}`, [at(x, xi)], ["x", xi])], also: others };
  }
  const terms = [], also = [];
  for (const [p, q] of covering(step.window, i, j, dy.shape[2], dy.shape[3])) {
    const di = [n, c, p, q];
    if (at(winner, di) === i * W + j) terms.push(term(`won ${shown("dy", di)}`, [at(dy, di)], ["dy", di]));
    else also.push(["dy", di]);
  }
  return { formula: `dx = sum of dy over the windows this pixel won (it lost ${also.length})`, terms, also };
}

function avgPool({ A, step }, what, index) {
  const { x, dy, divisor } = A, [n, c, i, j] = index, terms = [];
  if (what === "y") {
    for (const [, , h, w] of patch(step.window, i, j))
      if (within(x, h, w)) terms.push(term(shown("x", [n, c, h, w]), [at(x, [n, c, h, w])], ["x", [n, c, h, w]]));
    return { formula: `y = sum of the window / ${at(divisor, [i, j])}`, terms, scale: 1 / at(divisor, [i, j]) };
  }
  for (const [p, q] of covering(step.window, i, j, dy.shape[2], dy.shape[3]))
    terms.push(term(`${shown("dy", [n, c, p, q])} · 1/${at(divisor, [p, q])}`, [at(dy, [n, c, p, q]), 1 / at(divisor, [p, q])], ["dy", [n, c, p, q]]));
  return { formula: "dx = sum of dy / divisor over the windows that cover the pixel", terms };
}

function norm({ A, step }, what, index) {
  const { x, w, b, dy } = A, total = x.values.length;
  const inner = step.param_axis === "last" ? size(w ? w.shape : step.normalized) : 0;
  const param = (k, ix) => (inner ? k % inner : ix[1]); // which entry of w this element uses
  const group = (k, ix) => (step.op === "BatchNorm2d" ? ix[1] : inner ? Math.floor(k / inner)
    : ix[0] * step.groups + Math.floor((ix[1] * step.groups) / x.shape[1]));
  const weight = (k, ix) => (w ? w.values[param(k, ix)] : 1);
  const statistics = (g) => { // of the group, or the running ones
    if (step.fixed) return [A.mean.values[g], A.rstd.values[g]];
    let n = 0, s = 0, q = 0;
    for (let k = 0; k < total; k++) if (group(k, unravel(x.shape, k)) === g) { n++; s += x.values[k]; }
    for (let k = 0; k < total; k++) if (group(k, unravel(x.shape, k)) === g) q += (x.values[k] - s / n) ** 2;
    return [s / n, 1 / Math.sqrt(q / n + step.eps), n];
  };
  if (what === "y" || what === "dx") {
    const k = flat(x.shape, index), g = group(k, index), [mean, rstd, n] = statistics(g);
    if (what === "y")
      return { formula: `y = b + w · (x − mean) · rstd, mean ${fmt(mean)}, rstd ${fmt(rstd)}`, terms: [term("w · (x − mean) · rstd", [weight(k, index), x.values[k] - mean, rstd], ["x", index])], start: b ? b.values[param(k, index)] : 0 };
    const own = dy.values[k] * weight(k, index), xhat = (x.values[k] - mean) * rstd;
    if (step.fixed) return { formula: "dx = dy · w · rstd: the statistics are fixed", terms: [term("dy · w · rstd", [dy.values[k], weight(k, index), rstd], ["dy", index])] };
    let mg = 0, mgx = 0;
    for (let e = 0; e < total; e++) {
      const ix = unravel(x.shape, e);
      if (group(e, ix) !== g) continue;
      const v = dy.values[e] * weight(e, ix);
      mg += v / n;
      mgx += (v * (x.values[e] - mean) * rstd) / n;
    }
    return { formula: "dx = rstd (g − mean(g) − x̂ mean(g x̂)) with g = dy · w: three paths", terms: [
      term("1 direct: rstd · g", [rstd, own], ["dy", index]),
      term("2 through the mean: −rstd · mean(g)", [-rstd, mg]),
      term("3 through the variance: −rstd · x̂ · mean(g x̂)", [-rstd, xhat, mgx], ["x", index])] };
  }
  const which = flat(A[what].shape, index), keep = (ix) => param(flat(x.shape, ix), ix) === which;
  if (what === "db") return sumOf("dy", dy, keep, "db = sum of dy");
  const terms = [], known = new Map();
  for (let k = 0; k < total; k++) {
    const ix = unravel(x.shape, k);
    if (!keep(ix)) continue;
    const g = group(k, ix);
    if (!known.has(g)) known.set(g, statistics(g));
    const [mean, rstd] = known.get(g);
    terms.push(term(`${shown("dy", ix)} · x̂`, [dy.values[k], (x.values[k] - mean) * rstd], ["dy", ix], ["x", ix]));
  }
  return { formula: "dw = sum of dy · x̂", terms };
}

function softmax({ A, step }, what, index) {
  const { x, y, dy } = A, log = step.op === "LogSoftmax", d = step.dim, n = x.shape[d];
  const place = (k) => index.map((v, a) => (a === d ? k : v)), all = [...Array(n).keys()].map(place);
  if (what === "y") {
    const m = Math.max(...all.map((p) => at(x, p))), own = at(x, index) - m;
    return { formula: log ? "y = x − max − log of the sum" : "y = e^(x − max) / the sum", terms: all.map((p) => term(`e^(${shown("x", p)} − max)`, [Math.exp(at(x, p) - m)], ["x", p])), final: (s) => (log ? own - Math.log(s) : Math.exp(own) / s) };
  }
  const own = at(y, index);
  return log
    ? { formula: "dx = dy − e^y · sum of dy", terms: [term("dy", [at(dy, index)], ["dy", index]), ...all.map((p) => term(`−e^y · ${shown("dy", p)}`, [-Math.exp(own), at(dy, p)], ["dy", p]))] }
    : { formula: "dx = y (dy − sum of dy · y)", terms: [term("y · dy", [own, at(dy, index)], ["dy", index]), ...all.map((p) => term(`−y · ${shown("y", p)} · ${shown("dy", p)}`, [-own, at(y, p), at(dy, p)], ["dy", p]))] };
}

function crossEntropy({ A }, what, index) {
  const { x, target } = A, [N, C] = x.shape, terms = [];
  const logP = (n, c) => {
    const row = [...Array(C).keys()].map((k) => at(x, [n, k])), m = Math.max(...row);
    return row[c] - m - Math.log(row.reduce((s, v) => s + Math.exp(v - m), 0));
  };
  if (what === "y") {
    for (let n = 0; n < N; n++) terms.push(term(`−log p[${n}, ${target.values[n]}]`, [-logP(n, target.values[n])], ["x", [n, target.values[n]]]));
    return { formula: `loss = sum of −log p of the right class / ${N}`, terms, scale: 1 / N };
  }
  const [n, c] = index;
  return { formula: `dx = (p − y) / ${N} with p = softmax(x)`, terms: [term(`p = softmax(x)[${n},${c}]`, [Math.exp(logP(n, c))], ["x", index]), term("−y", [target.values[n] === c ? -1 : 0])], scale: 1 / N };
}

function elementwise({ A, step }, what, index) {
  if (what === "y") return { formula: `y = ${step.op}(x) at x = ${fmt(at(A.x, index))}`, terms: [term(`${step.op}(${shown("x", index)})`, [at(A.y, index)], ["x", index])] };
  return { formula: `dx = dy · ${step.op}′(x)`, terms: [term("dy · slope", [at(A.dy, index), at(A.slope, index)], ["dy", index], ["x", index])] };
}

function dropout({ A }, what, index) {
  const from = what === "y" ? "x" : "dy";
  return { formula: `${what} = ${from} · mask`, terms: [term(`${from} · mask`, [at(A[from], index), A.mask ? at(A.mask, index) : 1], [from, index])] };
}

function flatten({ A }, what, index) {
  const [from, to] = what === "y" ? ["x", "y"] : ["dy", "x"];
  const source = unravel(A[from].shape, flat(A[to].shape, index));
  return { formula: `${what} is ${from} at another index`, terms: [term(shown(from, source), [at(A[from], source)], [from, source])] };
}

function residual({ A }, what, index) {
  if (what === "dx") return { formula: "the sum hands dy to both branches", terms: [term("dy", [at(A.dy, index)], ["dy", index])] };
  return { formula: "y = body + shortcut", terms: [term("body", [at(A.x, index)], ["x", index]), term("shortcut", [at(A.shortcut, index)], ["shortcut", index])] };
}

const RULES = { conv, linear, maxPool, avgPool, norm, softmax, crossEntropy, elementwise, dropout, flatten, residual };

function derive(context, what, index) {
  const rule = RULES[context.step.rule];
  if (!rule || Object.values(context.A).some((a) => a.values === null)) return null;
  const d = { start: 0, scale: 1, final: (s) => s, also: [], ...rule(context, what, index) };
  for (const t of d.terms) t.value = t.factors.reduce((p, f) => p * f, 1);
  d.sum = d.start + d.terms.reduce((s, t) => s + t.value, 0);
  d.total = d.final(d.scale * d.sum);
  return d;
}

// ------------------------------------------------------------------ the view

const KIND = { x: "x", shortcut: "x", w: "w", b: "w", y: "y", target: "y" };
const kind = (letter) => KIND[letter] || "g";

function colour(v, limit) { // blue below zero, orange above: apart for every kind of colour vision
  const share = Math.round(Math.min(1, Math.abs(v) / limit) ** 0.7 * 78);
  return `color-mix(in oklab, var(${v < 0 ? "--low" : "--high"}) ${share}%, var(--paper))`;
}

function render(root, data, send = null) {
  const state = { step: 0, letter: null, index: null, tool: "derive", hover: null, folded: 0, add: true, timer: null };
  let arrays, contexts;

  function load(next) {
    data = next;
    arrays = unpack(data.arrays);
    contexts = data.nodes.map((step) => ({ step, A: Object.fromEntries(Object.entries(step.arrays).map(([k, i]) => [k, arrays[i]])) }));
  }
  const count = () => data.nodes.length;
  const forward = () => state.step < count();
  const context = () => contexts[forward() ? state.step : 2 * count() - 1 - state.step];
  const letters = () => (forward() ? ["x", "shortcut", "target", "w", "b", "y"] : ["dy", "x", "w", "dw", "db", "dx"]).filter((l) => context().A[l]);

  function go(step) {
    stop();
    state.step = Math.max(0, Math.min(2 * count() - 1, step));
    state.letter = forward() ? "y" : "dx";
    const a = context().A[state.letter];
    // Start where there is something to see: the largest number of the map.
    let best = 0;
    if (a.values) for (let k = 1; k < a.values.length; k++) if (Math.abs(a.values[k]) > Math.abs(a.values[best])) best = k;
    state.index = unravel(a.shape, best);
    state.folded = 0;
    if (context().step.rule !== "conv") state.tool = "derive";
    draw();
  }
  function choose(letter, index, focus = true) {
    state.letter = letter;
    state.index = index;
    state.hover = null;
    draw();
    if (focus) root.querySelector(`[data-letter="${letter}"] [aria-selected=true]`)?.focus({ preventScroll: true });
  }
  const derivable = (letter) => ["y", "dx", "dw", "db"].includes(letter);

  // -------------------------------------------------------------- a map as a table

  function plane(a, index) { // how an array is laid out: [leading axes], rows, columns
    const nd = a.shape.length;
    if (nd === 0) return { lead: [], rows: 1, cols: 1 };
    if (nd === 1) return { lead: [], rows: 1, cols: a.shape[0] };
    return { lead: index.slice(0, nd - 2), rows: a.shape[nd - 2], cols: a.shape[nd - 1] };
  }
  const full = (a, lead, r, c) => (a.shape.length === 0 ? [] : a.shape.length === 1 ? [c] : [...lead, r, c]);

  function crop(n, around, width) {
    const from = Math.max(0, Math.min(n - width, around - Math.floor(width / 2)));
    return [from, Math.min(n, from + width)];
  }

  function map(letter, lit, views) {
    const a = context().A[letter], own = letter === state.letter;
    const index = own ? state.index : views[letter] || lit.get(letter)?.first || a.shape.map(() => 0);
    const { lead, rows, cols } = plane(a, index), nd = a.shape.length;
    const [r0, c0] = nd === 0 ? [0, 0] : nd === 1 ? [0, index[0]] : index.slice(-2);
    const box = make("section", { class: `map ${kind(letter)}`, "data-letter": letter, "aria-label": `${letter}, shape ${a.shape.join(" by ") || "one number"}` });
    const head = make("header", {}, make("b", {}, letter), make("span", { class: "shape" }, `(${a.shape.join(", ")})`));
    lead.forEach((value, axis) => {
      const input = make("input", { type: "number", min: 0, max: a.shape[axis] - 1, value, "aria-label": `${letter}, index of axis ${axis}`, onchange: () => {
        const next = [...index];
        next[axis] = Math.max(0, Math.min(a.shape[axis] - 1, Number(input.value) || 0));
        if (derivable(letter) || send) choose(letter, next, false);
        else { views[letter] = next; draw(); }
      } });
      head.append(make("label", {}, nd === 4 ? [letter.endsWith("w") ? "f" : "n", "c"][axis] : `axis ${axis}`, input));
    });
    box.append(head);
    if (a.values === null) {
      box.append(make("p", { class: "note" }, "Too large for the page; trace.explain shows its numbers."));
      return box;
    }
    const [ra, rb] = crop(rows, r0, CROP), [ca, cb] = crop(cols, c0, CROP);
    const table = make("div", { role: "grid", class: "grid", style: `--cols:${cb - ca}`, "aria-label": `${letter}, rows ${ra} to ${rb - 1}, columns ${ca} to ${cb - 1}` });
    for (let r = ra; r < rb; r++) {
      const line = make("div", { role: "row" });
      for (let c = ca; c < cb; c++) {
        const ix = full(a, lead, r, c), v = at(a, ix), key = ix.join();
        const chosen = own && key === state.index.join(), part = lit.get(letter)?.keys.has(key);
        const also = lit.get(letter)?.also.has(key);
        line.append(make("button", {
          type: "button", role: "gridcell", class: part ? "part" : also ? "also" : null, "data-index": key,
          tabindex: chosen || (!own && r === ra && c === ca) ? 0 : -1, "aria-selected": String(chosen),
          "aria-label": `${letter} ${ix.join(", ")}: ${fmt(v)}${part ? ", part of the sum" : ""}`,
          style: `background:${colour(v, a.limit)}`, onclick: () => choose(letter, ix),
        }, fmt(v)));
      }
      table.append(line);
    }
    table.addEventListener("keydown", (e) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[e.key];
      if (!move) return;
      e.preventDefault();
      const at0 = document.activeElement?.dataset.index ?? root.getRootNode().activeElement?.dataset.index;
      const now = at0 ? at0.split(",").map(Number) : index, tail = nd > 1 ? now.slice(-2) : [0, now[0] ?? 0];
      const r = Math.max(0, Math.min(rows - 1, tail[0] + move[0])), c = Math.max(0, Math.min(cols - 1, tail[1] + move[1]));
      choose(letter, full(a, lead, r, c));
    });
    if (rows > CROP || cols > CROP) {
      if (rows > 1 && rows <= 64 && cols <= 64) box.append(overview(a, lead, rows, cols, [ra, rb, ca, cb], (r, c) => choose(letter, full(a, lead, r, c))));
      box.append(table, make("p", { class: "note" }, `Cropped: rows ${ra}–${rb - 1} of ${rows}, columns ${ca}–${cb - 1} of ${cols}.`));
    } else box.append(table);
    return box;
  }

  function overview(a, lead, rows, cols, [ra, rb, ca, cb], pick) {
    const css = getComputedStyle(root), canvas = make("canvas", { width: cols, height: rows, class: "overview", "aria-hidden": "true", title: "Click to move the crop" });
    const hex = (name) => css.getPropertyValue(name).trim().match(/\w\w/g).map((h) => parseInt(h, 16));
    const low = hex("--low"), high = hex("--high"), paper = hex("--paper");
    const g = canvas.getContext("2d"), picture = g.createImageData(cols, rows);
    for (let r = 0; r < rows; r++) for (let c = 0; c < cols; c++) {
      const v = at(a, full(a, lead, r, c)), s = Math.min(1, Math.abs(v) / a.limit) ** 0.7, to = v < 0 ? low : high;
      for (let k = 0; k < 3; k++) picture.data[4 * (r * cols + c) + k] = paper[k] + s * (to[k] - paper[k]);
      picture.data[4 * (r * cols + c) + 3] = 255;
    }
    g.putImageData(picture, 0, 0);
    const holder = make("div", { class: "holder", style: `aspect-ratio:${cols}/${rows}` }, canvas,
      make("i", { style: `left:${(100 * ca) / cols}%;top:${(100 * ra) / rows}%;width:${(100 * (cb - ca)) / cols}%;height:${(100 * (rb - ra)) / rows}%` }));
    holder.addEventListener("click", (e) => {
      const box = canvas.getBoundingClientRect();
      pick(Math.min(rows - 1, Math.floor(((e.clientY - box.top) / box.height) * rows)), Math.min(cols - 1, Math.floor(((e.clientX - box.left) / box.width) * cols)));
    });
    return holder;
  }

  // -------------------------------------------------------------- the derivation

  function derivation(d) {
    const { letter, index } = state, a = context().A[letter];
    const box = make("section", { class: "derivation", "aria-label": "Derivation" });
    const value = a.values ? at(a, index) : NaN;
    box.append(make("h3", { class: kind(letter) }, shown(letter, index), make("span", { class: "value" }, ` = ${fmt(value)}`)));
    if (d) {
      box.append(make("p", { class: "formula" }, d.formula));
      const body = make("tbody"), long = d.terms.length > LISTED;
      const listed = long ? d.terms.filter((t) => t.value !== 0).slice(0, LISTED) : d.terms;
      let running = d.start;
      if (d.startRef) body.append(make("tr", {}, make("th", { scope: "row" }, shown(...d.startRef)), make("td"), make("td", {}, fmt(d.start)), make("td", { class: "running" }, fmt(running))));
      for (const t of listed) {
        running += t.value;
        body.append(make("tr", { class: "term" }, make("th", { scope: "row" }, t.label), make("td", {}, t.factors.map(fmt).join(" · ")), make("td", { class: "product" }, fmt(t.value)), make("td", { class: "running" }, fmt(running))));
      }
      const head = make("tr", {}, ...["term", "factors", "product", "sum so far"].map((h) => make("th", { scope: "col" }, h)));
      box.append(make("div", { class: "scroll", tabindex: 0 }, make("table", {}, make("thead", {}, head), body)));
      if (long) box.append(make("p", { class: "note" }, `${listed.length} of ${d.terms.length} terms listed, zeros left out; the total is over all.`));
      box.append(make("p", { class: "total", role: "status" }, "derived ", make("output", { class: "derived" }, fmt(d.total)), "  in the array ", make("output", { class: "stored" }, fmt(value))));
    } else if (derivable(letter)) box.append(make("p", { class: "note" }, `trace.explain("${context().step.name}", "${letter}", (${index.join(", ")})) derives this one.`));
    else box.append(make("p", { class: "note" }, letter === "dy" ? "The gradient that comes from the layer after this one." : "Given to this step; choose a pixel of an output to see its derivation."));
    if (send && ["x", "w", "b"].includes(letter) && (letter !== "x" || context().step.first)) box.append(edit(value));
    return box;
  }

  function edit(value) {
    const input = make("input", { type: "number", step: "any", value: fmt(value), "aria-label": "New value" });
    return make("form", { class: "edit", onsubmit: (e) => { e.preventDefault(); send({ type: "set", name: context().step.name, letter: state.letter, index: state.index, value: Number(input.value) }); } },
      make("label", {}, "What if it were ", input), make("button", { type: "submit" }, "Set"));
  }

  // -------------------------------------------------------------- im2col and col2im

  function columns() {
    const { A, step } = context(), win = step.window, [KH, KW] = win.kernel, { x, w, y, dy } = A;
    const [f, i0, j0] = ["y", "dy"].includes(state.letter) ? state.index.slice(1) : [0, 0, 0];
    const n = x.shape.length === state.index.length && state.letter !== "dw" && state.letter !== "w" ? state.index[0] : 0;
    const CG = w.shape[1], base = Math.floor(f / (w.shape[0] / step.groups)) * CG;
    const OW = y.shape[3], P = y.shape[2] * OW, K = CG * KH * KW, p0 = i0 * OW + j0;
    const pixel = (k, p) => {
      const cg = Math.floor(k / (KH * KW)), kh = Math.floor((k % (KH * KW)) / KW), kw = k % KW;
      const { stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
      return [cg, Math.floor(p / OW) * SH - top + kh * DH, (p % OW) * SW - left + kw * DW, kh, kw];
    };
    const seen = state.hover?.k ?? 0, channel = state.channel !== undefined && state.channel < CG ? state.channel : pixel(seen, p0)[0];
    const box = make("section", { class: "im2col", "aria-label": "im2col" });
    const pick = make("input", { type: "number", min: 0, max: CG - 1, value: channel, "aria-label": "Channel of the group", onchange: () => { state.channel = Math.max(0, Math.min(CG - 1, Number(pick.value) || 0)); draw(); } });
    const [ka, kb] = crop(K, channel * KH * KW + Math.floor((KH * KW) / 2), MATRIX[0]), [pa, pb] = crop(P, p0, MATRIX[1]);

    const centre = [i0 * win.stride[0] - win.padding[0][0], j0 * win.stride[1] - win.padding[1][0]];
    const [ha, hb] = crop(x.shape[2], centre[0] + KH, CROP), [va, vb] = crop(x.shape[3], centre[1] + KW, CROP);
    const light = (ok) => {
      for (const e of box.querySelectorAll("[data-at]")) e.classList.toggle("lit", ok(e));
    };
    const image = make("table", { class: "cells", "aria-label": `Image, channel ${base + channel}` });
    for (let h = ha; h < hb; h++) {
      const row = make("tr");
      for (let v = va; v < vb; v++) {
        const key = `${channel},${h},${v}`, value = at(x, [n, base + channel, h, v]);
        row.append(make("td", { "data-at": key, class: "pixel", tabindex: -1, style: `background:${colour(value, x.limit)}`, onmouseenter: () => light((e) => e.dataset.at === key) }, fmt(value)));
      }
      image.append(row);
    }
    const matrix = make("table", { class: "cells", "aria-label": "Column matrix" });
    matrix.append(make("tr", {}, make("th"), ...Array.from({ length: pb - pa }, (_, t) => make("th", { scope: "col", class: pa + t === p0 ? "here" : null }, `${Math.floor((pa + t) / OW)},${(pa + t) % OW}`))));
    for (let k = ka; k < kb; k++) {
      const row = make("tr", {}, make("th", { scope: "row" }, ((q) => `c${base + q[0]} ${q[3]},${q[4]}`)(pixel(k, 0))));
      for (let p = pa; p < pb; p++) {
        const [cg, h, v] = pixel(k, p), inside = within(x, h, v), value = inside ? at(x, [n, base + cg, h, v]) : 0, key = inside ? `${cg},${h},${v}` : "pad";
        row.append(make("td", { "data-at": key, class: `col${p === p0 ? " here" : ""}${inside ? "" : " pad"}`, style: `background:${colour(value, x.limit)}`, onmouseenter: () => light((e) => e.dataset.at === key && key !== "pad") }, fmt(value)));
      }
      matrix.append(row);
    }
    const product = make("tr", {}, make("th", { scope: "row" }, `w[${f}] · col + b`));
    for (let p = pa; p < pb; p++) {
      const yi = [n, f, Math.floor(p / OW), p % OW];
      product.append(make("td", { class: `dot${p === p0 ? " here" : ""}` }, make("button", { type: "button", "data-index": yi.join(), onclick: () => { if (forward()) choose("y", yi, false); else { state.letter = "dy"; choose("dy", yi, false); } } }, fmt(at(y, yi)))));
    }
    matrix.append(product);
    const d = derive(context(), "y", [n, f, i0, j0]);
    const dots = d.terms.slice(0, 6).map((t) => t.factors.map(fmt).join("·")).join(" + ");
    box.append(
      make("p", { class: "formula" }, `Each window becomes a column of ${K} numbers: a (${K}, ${P}) matrix. Point at a number to find it on the other side.`),
      make("div", { class: "pair" },
        make("div", { class: "scroll", tabindex: 0 }, make("h4", {}, "image, channel ", pick), image),
        make("div", { class: "scroll", tabindex: 0 }, make("h4", {}, "column matrix"), matrix)),
      make("p", { class: "dotproduct", role: "status" }, `y[${[n, f, i0, j0].join(",")}] = ${d.start ? fmt(d.start) + " + " : ""}${dots}${d.terms.length > 6 ? ` + ${d.terms.length - 6} more` : ""} = `, make("output", {}, fmt(d.total))));
    if (kb - ka < K || pb - pa < P) box.append(make("p", { class: "note" }, `Cropped: rows ${ka}–${kb - 1} of ${K}, columns ${pa}–${pb - 1} of ${P}.`));
    box.append(fold(n, base + channel, base / CG, channel));
    return box;
  }

  function fold(n, c, group, cg) { // col2im of one channel, window by window
    const { A, step } = context(), { x, w, dy, dx } = A, [, , OH, OW] = dy.shape, [, , H, W] = x.shape;
    const total = OH * OW, FG = w.shape[0] / step.groups, acc = new Float64Array(H * W), hits = new Int32Array(H * W), now = new Set();
    for (let p = 0; p < state.folded; p++) for (const [kh, kw, h, v] of patch(step.window, Math.floor(p / OW), p % OW)) {
      if (!within(x, h, v)) continue;
      let g = 0;
      for (let f = group * FG; f < (group + 1) * FG; f++) g += at(dy, [n, f, Math.floor(p / OW), p % OW]) * at(w, [f, cg, kh, kw]);
      const k = h * W + v;
      acc[k] = state.add ? acc[k] + g : g;
      hits[k]++;
      if (p === state.folded - 1) now.add(k);
    }
    const [ha, hb] = crop(H, Math.floor(H / 2), CROP), [va, vb] = crop(W, Math.floor(W / 2), CROP);
    const table = (values, limit, name, show) => {
      const t = make("table", { class: `cells ${name}` });
      for (let h = ha; h < hb; h++) {
        const row = make("tr");
        for (let v = va; v < vb; v++) row.append(make("td", { class: now.has(h * W + v) ? "lit" : null, "data-index": `${h},${v}`, style: `background:${colour(values[h * W + v], limit)}` }, show(values[h * W + v])));
        t.append(row);
      }
      return t;
    };
    const rounding = dx.values instanceof Float64Array ? 1e-12 : 1e-5;
    let wrong = 0;
    for (let k = 0; k < H * W; k++) {
      const v = dx.values[(n * x.shape[1] + c) * H * W + k];
      if (Math.abs(acc[k] - v) > rounding * dx.limit) wrong++;
    }
    const done = state.folded === total;
    const verdict = !done ? `${state.folded} of ${total} windows folded.` : wrong ? `${wrong} of ${H * W} pixels are wrong: ${state.add ? "the sums differ from dx" : "= keeps only the last window, and the terms of the others are lost"}.` : `All ${H * W} pixels equal dx.`;
    const play = () => {
      if (state.timer) { stop(); draw(); return; }
      if (state.folded === total) state.folded = 0;
      state.timer = setInterval(() => { state.folded = Math.min(total, state.folded + Math.max(1, Math.round(total / 60))); if (state.folded === total) stop(); redrawFold(); }, 90);
      draw();
    };
    const button = (label, act, name) => make("button", { type: "button", class: name, onclick: act }, label);
    const check = make("input", { type: "checkbox", class: "assign", onchange: () => { state.add = !check.checked; draw(); } });
    check.checked = !state.add;
    const redrawFold = () => { const old = root.querySelector(".fold"); if (old) old.replaceWith(fold(n, c, group, cg)); };
    const box = make("div", { class: "fold" }, make("h4", {}, `Fold back (col2im): dx, channel ${c}`),
      make("p", { class: "controls" }, button(state.timer ? "Pause" : "Play", play, "play"), button("One window", () => { stop(); state.folded = Math.min(total, state.folded + 1); redrawFold(); }, "one"), button("All", () => { stop(); state.folded = total; redrawFold(); }, "all"), button("Clear", () => { stop(); state.folded = 0; redrawFold(); }, "clear"), make("label", {}, check, " with = in place of +=")),
      make("div", { class: "pair" }, make("div", { class: "scroll", tabindex: 0 }, make("h5", {}, "gradient so far"), table(acc, dx.limit, "acc", fmt)), make("div", { class: "scroll", tabindex: 0 }, make("h5", {}, "windows that wrote here"), table(hits, Math.max(1, step.window.kernel[0] * step.window.kernel[1]), "hits", String))),
      make("p", { class: `verdict${done && wrong ? " bad" : ""}`, role: "status" }, verdict));
    if (hb - ha < H || vb - va < W) box.append(make("p", { class: "note" }, `Cropped: rows ${ha}–${hb - 1} of ${H}, columns ${va}–${vb - 1} of ${W}; all are compared.`));
    return box;
  }

  function stop() {
    clearInterval(state.timer);
    state.timer = null;
  }

  // -------------------------------------------------------------- frame

  function rail() {
    const list = make("ol", { class: "rail" });
    list.append(make("li", { class: "head" }, make("span"), make("span", {}, "forward ↓"), make("span", {}, "backward ↑")));
    data.nodes.forEach((node, i) => {
      const item = (k, text, label) => make("button", { type: "button", class: state.step === k ? "current" : null, "aria-current": state.step === k ? "step" : null, "aria-label": `${label} ${node.name} ${node.op}`, onclick: () => go(k) }, text);
      list.append(make("li", {}, make("span", { class: "name", title: node.label }, make("small", {}, node.name), ` ${node.op}`), item(i, "y", "forward"), item(2 * count() - 1 - i, "dx", "backward")));
    });
    return list;
  }

  function statistics() {
    const t = make("table", {}, make("thead", {}, make("tr", {}, ...["", "shape", "min", "mean", "max", "zeros"].map((h) => make("th", { scope: "col" }, h)))));
    for (const l of letters()) {
      const s = context().step.statistics[l];
      if (s) t.append(make("tr", {}, make("th", { scope: "row", class: kind(l) }, l), make("td", {}, `(${context().A[l].shape.join(", ")})`), ...[s.min, s.mean, s.max].map((v) => make("td", {}, fmt(v))), make("td", {}, `${(100 * s.zeros).toFixed(1)} %`)));
    }
    return make("details", { class: "statistics" }, make("summary", {}, "Min, mean, max, zeros"), make("div", { class: "scroll" }, t));
  }

  function whatIf() {
    const { step } = context(), box = make("section", { class: "whatif", "aria-label": "What if" });
    if (step.rule === "conv") for (const option of ["stride", "padding"]) {
      const input = make("input", { type: "number", min: option === "stride" ? 1 : 0, value: option === "stride" ? step.window.stride[0] : step.window.padding[0][0], class: option, onchange: () => send({ type: "option", name: step.name, option, value: Number(input.value) }) });
      box.append(make("label", {}, `${option} `, input));
    }
    const lr = make("input", { type: "number", step: "any", value: data.lr ?? 0.01, class: "lr" });
    box.append(make("label", {}, "learning rate ", lr), make("button", { type: "button", class: "sgd", onclick: () => send({ type: "sgd", lr: Number(lr.value) }) }, "One SGD step"), make("button", { type: "button", class: "reset", onclick: () => send({ type: "reset" }) }, "Reset"));
    if (data.message) box.append(make("p", { role: "status", class: `message${data.failed ? " bad" : ""}` }, data.message));
    return box;
  }

  const views = {};
  function draw() {
    const c = context(), { step } = c, d = derivable(state.letter) ? derive(c, state.letter, state.index) : null;
    const lit = new Map();
    const note = (refs, set) => {
      for (const [l, ix] of refs) {
        if (!lit.has(l)) lit.set(l, { keys: new Set(), also: new Set(), first: ix });
        lit.get(l)[set].add(ix.join());
      }
    };
    if (d) {
      // First the refs of the largest term: maps that were not chosen open there.
      const largest = d.terms.reduce((m, t) => (m && Math.abs(m.value) >= Math.abs(t.value) ? m : t), null);
      note(largest?.refs ?? [], "keys");
      note(d.terms.flatMap((t) => t.refs), "keys"); if (d.startRef) note([d.startRef], "keys");
      note(d.also, "also");
    }
    const main = make("main", {}, make("h2", {}, make("span", { class: "direction" }, forward() ? "forward" : "backward"), ` ${step.name} `, make("b", {}, step.label)),
      make("p", { class: "formula" }, forward() ? step.formula : step.backward_formula));
    if (send) main.append(whatIf());
    if (step.rule === "conv") main.append(make("p", { class: "tools", role: "group", "aria-label": "View" }, ...[["derive", "Patch and sum"], ["im2col", "im2col and fold back"]].map(([tool, label]) => make("button", { type: "button", class: `tool-${tool}`, "aria-pressed": String(state.tool === tool), onclick: () => { stop(); state.tool = tool; draw(); } }, label))));
    if (state.tool === "im2col" && step.rule === "conv" && Object.values(c.A).every((a) => a.values)) main.append(columns());
    else main.append(make("div", { class: "work" }, make("div", { class: "maps" }, ...letters().map((l) => map(l, lit, views))), derivation(d)));
    main.append(statistics());
    const scrolled = root.querySelector(".rail")?.scrollTop ?? 0;
    const top = make("header", { class: "top" }, make("h1", {}, "Stepping through"), make("p", { class: "loss" }, `${data.loss_name} `, make("output", {}, fmt(data.loss))),
      make("nav", { "aria-label": "Steps" }, make("button", { type: "button", class: "back", disabled: state.step === 0, onclick: () => go(state.step - 1) }, "← Back"), make("span", { role: "status" }, `${state.step + 1} of ${2 * count()}`), make("button", { type: "button", class: "next", disabled: state.step === 2 * count() - 1, onclick: () => go(state.step + 1) }, "Next →"),
        make("button", { type: "button", class: "theme", "aria-label": "Switch between light and dark", onclick: () => { const dark = getComputedStyle(root).getPropertyValue("--dark").trim() === "1"; root.dataset.theme = dark ? "light" : "dark"; draw(); } }, "◐")));
    root.replaceChildren(top, make("div", { class: "body" }, make("nav", { "aria-label": "Layers" }, rail()), main));
    root.querySelector(".rail").scrollTop = scrolled;
  }

  root.classList.add("stepping");
  load(data);
  go(0);
  return {
    update(next) { // after an edit: the same step and, where it still exists, the same number
      load(next);
      state.step = Math.min(state.step, 2 * count() - 1);
      const a = context().A[state.letter];
      if (!a || a.shape.length !== state.index.length || state.index.some((v, k) => v >= a.shape[k])) go(state.step);
      else draw();
    },
    stop,
  };
}
