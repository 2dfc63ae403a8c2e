// im2col side by side with the image, the matrix product, and col2im window by window.

const MATRIX = [18, 14]; // rows and columns shown of the column matrix, at most

function columnsView(app, width) {
  const { A, step } = app.context(), win = step.window, [KH, KW] = win.kernel, { x, w, y } = A;
  const [, , OH, OW] = y.shape, [, , H, W] = x.shape, CG = w.shape[1], FG = w.shape[0] / step.groups;
  const P = OH * OW, K = CG * KH * KW, half = width / 2 - 32;
  const IMAGEW = fitting(half, 55, CROP), MATRIXW = fitting(half - 66, 55, MATRIX[1]);
  let n = 0, f = 0, p0 = 0, channel = 0, row = 0, pixel = [0, 0]; // the cursors of product, matrix and image
  let crops = { h: null, v: null, k: null, p: null };

  const source = (k, p) => { // where entry (k, p) of the matrix stands in the image
    const { stride: [SH, SW], padding: [[top], [left]], dilation: [DH, DW] } = win;
    const cg = Math.floor(k / (KH * KW)), kh = Math.floor((k % (KH * KW)) / KW), kw = k % KW;
    return { cg, kh, kw, h: Math.floor(p / OW) * SH - top + kh * DH, v: (p % OW) * SW - left + kw * DW };
  };
  const first = () => Math.floor(f / FG) * CG; // channel of the image that the group begins with
  const copies = (cg, h, v) => [...covering(win, h, v, OH, OW)].length;

  const where = make("p", { class: "note where", role: "status" }, "Point at a number, or walk there with the arrow keys, to find it on the other side.");
  function point({ place }) {
    for (const g of [image, matrix]) g.light((other) => place !== null && other.place === place);
    if (place === null) return write(where, "Padding: a zero that stands nowhere in the image.");
    const [cg, h, v] = place.split(",").map(Number), c = first() + cg;
    return write(where, `x[${[n, c, h, v].join(",")}] = ${fmt(at(x, [n, c, h, v]))} stands ${copies(cg, h, v)} times in the column matrix, once a window that covers it.`);
  }
  const image = grid("image", { point,
    move: (h, v) => {
      pixel = [clamp(h, 0, H - 1), clamp(v, 0, W - 1)];
      draw();
    } });
  const matrix = grid("matrix", { point,
    pick: ({ r, c }) => {
      row = r;
      choose(c);
    },
    move: (k, p) => {
      row = clamp(k, 0, K - 1);
      choose(clamp(p, 0, P - 1));
    } });
  const product = grid("product", {
    pick: ({ c }) => choose(c),
    move: (_, p) => choose(clamp(p, 0, P - 1)) });
  const pick = make("input", { type: "number", min: 0, max: CG - 1, "aria-label": "Channel of the group",
    onchange: () => {
      channel = clamp(Number(pick.value) || 0, 0, CG - 1);
      row = channel * KH * KW;
      draw();
    } });
  const dots = make("span"), dot = make("output"), crops_note = make("p", { class: "note" });
  const fold = foldView(app, IMAGEW);
  const part = (heading, ...children) => make("div", { class: "scroll" }, make("h4", {}, ...heading), ...children);
  const element = make("section", { class: "im2col", "aria-label": "im2col" },
    make("p", { class: "formula" }, `Each window becomes a column of ${K} numbers: a (${K}, ${P}) matrix. A filter times that matrix is a row of ${P} numbers of y.`),
    where,
    make("div", { class: "pair" }, part(["image, channel ", pick], image.element),
      part(["column matrix"], matrix.element, make("h5", {}, "filter · column + b"), product.element)),
    make("p", { class: "dotproduct", role: "status" }, dots, dot), crops_note, fold.element);

  function choose(p) { // the window p of the filter that is shown
    app.choose(app.forward() ? "y" : "dy", [n, f, Math.floor(p / OW), p % OW]);
  }

  function draw() {
    const { letter, index } = app.state;
    if (["y", "dy"].includes(letter)) {
      [n, f] = index;
      const p = index[2] * OW + index[3];
      if (p !== p0) {
        const tap = source(row, p); // the image follows the column
        if (within(x, tap.h, tap.v)) pixel = [tap.h, tap.v];
      }
      p0 = p;
    } else if (["x", "dx"].includes(letter)) n = index[0];
    channel = Math.floor(row / (KH * KW));
    pick.value = channel;
    const base = first(), [kh0, kh1] = [channel * KH * KW, (channel + 1) * KH * KW - 1], corner = source(kh0, p0), end = source(kh1, p0);
    crops = {
      h: crop(H, Math.min(pixel[0], Math.max(0, corner.h)), Math.max(pixel[0], Math.min(H - 1, end.h)), CROP, crops.h),
      v: crop(W, Math.min(pixel[1], Math.max(0, corner.v)), Math.max(pixel[1], Math.min(W - 1, end.v)), IMAGEW, crops.v),
      k: crop(K, row, row, MATRIX[0], crops.k), p: crop(P, p0, p0, MATRIXW, crops.p),
    };
    const window = new Set([...patch(win, Math.floor(p0 / OW), p0 % OW)].map(([, , h, v]) => `${h},${v}`));
    image.fill({ rows: crops.h, cols: crops.v, label: `Image, channel ${base + channel}`,
      cell(h, v) {
        const value = at(x, [n, base + channel, h, v]), text = fmt(value), part = window.has(`${h},${v}`);
        return { key: `${h},${v}`, place: `${channel},${h},${v}`, text, back: app.colour(value, x.limit), stop: h === pixel[0] && v === pixel[1],
          cls: part ? "part" : "", label: `x ${n}, ${base + channel}, ${h}, ${v}: ${text}${part ? ", in the chosen window" : ""}` };
      } });
    matrix.fill({ rows: crops.k, cols: crops.p, label: "Column matrix: a row for each tap, a column for each window",
      heads: { col: (p) => `${Math.floor(p / OW)},${p % OW}`, row: (k) => ((q) => `c${base + q.cg} ${q.kh},${q.kw}`)(source(k, 0)) },
      cell(k, p) {
        const q = source(k, p), inside = within(x, q.h, q.v), value = inside ? at(x, [n, base + q.cg, q.h, q.v]) : 0, text = fmt(value);
        return { key: `${k},${p}`, place: inside ? `${q.cg},${q.h},${q.v}` : null, text, back: app.colour(value, x.limit), stop: k === row && p === p0,
          cls: `${p === p0 ? "here" : ""}${inside ? "" : " pad"}`,
          label: `window ${Math.floor(p / OW)}, ${p % OW}, tap ${q.kh}, ${q.kw}: ${text}${inside ? `, pixel ${q.h}, ${q.v}` : ", padding"}` };
      } });
    product.fill({ rows: [0, 1], cols: crops.p, label: `w[${f}] times the column matrix, plus b: a row of y`,
      heads: { row: () => `w[${f}] · col` },
      cell(_, p) {
        const yi = [n, f, Math.floor(p / OW), p % OW], value = at(y, yi), text = fmt(value);
        return { key: yi.join(), text, back: app.colour(value, y.limit), cls: p === p0 ? "here" : "", selected: p === p0, stop: p === p0, label: `y ${yi.join(", ")}: ${text}` };
      } });
    const yi = [n, f, Math.floor(p0 / OW), p0 % OW], d = derive(app.context(), "y", yi);
    const shownTerms = d.terms.slice(0, 6).map((t) => t.factors.map(fmt).join("·")).join(" + ");
    write(dots, `${shown("y", yi)} = ${d.startRef ? `${fmt(d.start)} + ` : ""}${shownTerms}${d.terms.length > 6 ? ` + ${d.terms.length - 6} more` : ""} = `);
    write(dot, fmt(d.total));
    const cropped = H > CROP || W > IMAGEW || K > MATRIX[0] || P > MATRIXW;
    write(crops_note, cropped ? `Cropped: rows ${crops.h[0]}–${crops.h[1] - 1} of ${H} and columns ${crops.v[0]}–${crops.v[1] - 1} of ${W} of the image; rows ${crops.k[0]}–${crops.k[1] - 1} of ${K} and columns ${crops.p[0]}–${crops.p[1] - 1} of ${P} of the matrix.` : "");
    fold.draw(n, Math.floor(f / FG), channel);
  }
  return { element, draw, stop: fold.stop };
}

function foldView(app, columnsShown) { // col2im of one channel, window by window
  const { A, step } = app.context(), { x, w, dy, dx } = A, [, , OH, OW] = dy.shape, [, , H, W] = x.shape;
  const total = OH * OW, FG = w.shape[0] / step.groups, taps = size(step.window.kernel);
  let n, group, cg, columns = null, folded = 0, timer = null;

  const button = (label, name, act) => make("button", { type: "button", class: name, onclick: act }, label);
  const play = button("Play", "play", () => {
    if (timer) {
      stop();
      return;
    }
    if (folded === total) folded = 0;
    play.textContent = "Pause";
    timer = setInterval(() => to(folded + Math.max(1, Math.round(total / 60)), true), 90);
  });
  const assign = make("input", { type: "checkbox", class: "assign", onchange: () => show() });
  const heading = make("h4"), verdict = make("p", { class: "verdict", role: "status" }), note = make("p", { class: "note" });
  const acc = grid("acc"), hits = grid("hits");
  const part = (text, g) => make("div", { class: "scroll" }, make("h5", {}, text), g.element);
  const element = make("div", { class: "fold" }, heading,
    make("p", { class: "controls", role: "group", "aria-label": "Fold back" }, play,
      button("One window", "one", () => to(folded + 1)), button("All", "all", () => to(total)),
      button("Clear", "clear", () => to(0)), make("label", {}, assign, " with = in place of +=")),
    make("div", { class: "pair" }, part("gradient so far", acc), part("windows that wrote here", hits)), verdict, note);

  function stop() {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
  }
  function to(p, playing = false) {
    if (!playing || p >= total) stop();
    folded = clamp(p, 0, total);
    show();
  }
  function gradients() { // of the columns: taps by windows, dcols = w^T dy
    const out = new Float64Array(taps * total);
    for (let f = group * FG; f < (group + 1) * FG; f++) for (let t = 0; t < taps; t++) {
      const k = w.values[(f * w.shape[1] + cg) * taps + t], from = (n * dy.shape[1] + f) * total;
      for (let p = 0; p < total; p++) out[p * taps + t] += k * dy.values[from + p];
    }
    return out;
  }

  function show() {
    const sums = new Float64Array(H * W), counts = new Int32Array(H * W), now = new Set(), c = group * w.shape[1] + cg;
    for (let p = 0; p < folded; p++) {
      let t = 0;
      for (const [, , h, v] of patch(step.window, Math.floor(p / OW), p % OW)) {
        const g = columns[p * taps + t++];
        if (!within(x, h, v)) continue;
        const k = h * W + v;
        sums[k] = assign.checked ? g : sums[k] + g;
        counts[k]++;
        if (p === folded - 1) now.add(k);
      }
    }
    const spots = [crop(H, H >> 1, H >> 1, CROP), crop(W, W >> 1, W >> 1, columnsShown)]; // the middle of a large image
    const fill = (g, values, limit, label, show) => g.fill({ rows: spots[0], cols: spots[1], label,
      cell(h, v) {
        const k = h * W + v, text = show(values[k]);
        return { key: `${h},${v}`, text, back: app.colour(values[k], limit), cls: now.has(k) ? "lit" : "", label: `${h}, ${v}: ${text}${now.has(k) ? ", just written" : ""}` };
      } });
    fill(acc, sums, dx.limit, `Gradient so far, channel ${c}`, fmt);
    fill(hits, counts, Math.max(1, taps), "Number of windows that wrote to each pixel", String);

    const rounding = dx.values instanceof Float64Array ? 1e-12 : 1e-5, from = (n * x.shape[1] + c) * H * W;
    let wrong = 0;
    for (let k = 0; k < H * W; k++) if (Math.abs(sums[k] - dx.values[from + k]) > rounding * dx.limit) wrong++;
    write(heading, `Fold back (col2im): dx, channel ${c}`);
    verdict.classList.toggle("bad", folded === total && wrong > 0);
    write(verdict, folded < total ? `${folded} of ${total} windows folded.` : wrong
      ? `${wrong} of ${H * W} pixels are wrong: ${assign.checked ? "= keeps only the last window, and the terms of the others are lost" : "the sums differ from dx"}.`
      : `All ${H * W} pixels equal dx.`);
    const cropped = H > CROP || W > columnsShown;
    note.hidden = !cropped;
    if (cropped) write(note, `Cropped: rows ${spots[0][0]}–${spots[0][1] - 1} of ${H}, columns ${spots[1][0]}–${spots[1][1] - 1} of ${W}; all are compared.`);
  }

  function draw(...which) {
    if (columns && which.join() === [n, group, cg].join()) return;
    [n, group, cg] = which;
    columns = gradients();
    stop();
    folded = 0;
    show();
  }
  return { element, draw, stop };
}
