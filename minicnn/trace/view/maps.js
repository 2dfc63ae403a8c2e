// One array of a step: its size, which plane of it is shown, and the numbers of that plane.

const CROP = 12; // rows and columns of a table; larger maps are cropped around the chosen pixel
const KIND = { x: "x", shortcut: "x", w: "w", b: "w", y: "y", target: "y" };
const kind = (letter) => KIND[letter] || "g";

function plane(a, index) { // how an array is laid out: leading axes, rows, columns, the place in it
  const nd = a.shape.length;
  if (nd === 0) return { lead: [], rows: 1, cols: 1, r: 0, c: 0 };
  if (nd === 1) return { lead: [], rows: 1, cols: a.shape[0], r: 0, c: index[0] };
  return { lead: index.slice(0, nd - 2), rows: a.shape[nd - 2], cols: a.shape[nd - 1], r: index[nd - 2], c: index[nd - 1] };
}
const placed = (a, lead, r, c) => (a.shape.length === 0 ? [] : a.shape.length === 1 ? [c] : [...lead, r, c]);

// What a derivation uses, letter by letter: keys, also (flat places) and the box around them in the
// plane of the largest term.
function litBy(d, A) {
  const lit = new Map();
  if (!d) return lit;
  const largest = d.terms.reduce((m, t) => (m && Math.abs(m.value) >= Math.abs(t.value) ? m : t), null);
  const note = (set) => ([letter, index]) => {
    const a = A[letter];
    if (!lit.has(letter)) lit.set(letter, { keys: new Set(), also: new Set(), first: index, box: null });
    const l = lit.get(letter), { lead, r, c } = plane(a, index);
    l[set].add(flat(a.shape, index));
    if (lead.some((v, k) => v !== l.first[k])) return;
    const [r0, r1, c0, c1] = l.box ?? [r, r, c, c];
    l.box = [Math.min(r0, r), Math.max(r1, r), Math.min(c0, c), Math.max(c1, c)];
  };
  largest?.refs.forEach(note("keys"));
  for (const t of d.terms) t.refs.forEach(note("keys"));
  if (d.startRef) note("keys")(d.startRef);
  d.also.forEach(note("also"));
  return lit;
}

const AXES = { 4: ["n", "c"], "4w": ["f", "c"] };

const fitting = (width, cell, most) => clamp(Math.floor(width / cell), 5, most); // columns without a scroll bar

function mapView(app, letter, width) {
  const a = app.array(letter), nd = a.shape.length, CROPW = fitting(width - 34, 58, CROP);
  const element = make("section", { class: `map ${kind(letter)}`, "data-letter": letter,
    "aria-label": `${letter}, shape ${a.shape.join(" by ") || "one number"}` });
  const head = make("header", {}, make("b", {}, letter), make("span", { class: "shape" }, `(${a.shape.join(", ")})`));
  let index, lead, rows, cols, crops = [null, null], painted = "";

  const inputs = a.shape.slice(0, Math.max(0, nd - 2)).map((n, axis) => {
    const input = make("input", { type: "number", min: 0, max: n - 1, "aria-label": `${letter}, index of axis ${axis}`,
      onchange: () => {
        const next = [...index];
        next[axis] = clamp(Number(input.value) || 0, 0, n - 1);
        app.choose(letter, next);
      } });
    head.append(make("label", {}, AXES[`${nd}${letter.endsWith("w") ? "w" : ""}`]?.[axis] ?? AXES[nd]?.[axis] ?? `axis ${axis}`, input));
    return input;
  });
  element.append(head);
  if (a.values === null) {
    element.append(make("p", { class: "note" }, "Too large for the page; trace.explain shows its numbers."));
    return { element, draw: () => {}, focus: () => {} };
  }

  const table = grid("map-cells", {
    pick: (cell) => {
      app.choose(letter, placed(a, lead, cell.r, cell.c));
      table.focus();
    },
    move: (r, c) => app.choose(letter, placed(a, lead, clamp(r, 0, rows - 1), clamp(c, 0, cols - 1))),
  });
  const note = make("p", { class: "note" });
  const last = plane(a, a.shape.map(() => 0));
  const large = last.rows > CROP || last.cols > CROPW;
  const small = large && last.rows > 1 && last.rows <= 64 && last.cols <= 64
    ? overview((r, c) => app.choose(letter, placed(a, lead, r, c))) : null;
  if (small) element.append(small.element);
  element.append(table.element);
  // Maps that are not on the screen are not laid out; this is the room that they would take.
  element.style.containIntrinsicSize = `${Math.min(last.cols, CROPW) * 58 + 34}px ${Math.min(last.rows, CROP) * 26 + 64 + (small ? 150 : 0)}px`;
  if (large) element.append(note);

  function draw(lit) {
    const own = letter === app.state.letter, mine = lit.get(letter);
    index = own ? app.state.index : mine?.first ?? app.views[letter] ?? a.shape.map(() => 0);
    app.views[letter] = index;
    let r, c;
    ({ lead, rows, cols, r, c } = plane(a, index));
    inputs.forEach((input, axis) => { input.value = lead[axis]; });
    const [r0, r1, c0, c1] = (!own && mine?.box) || [r, r, c, c];
    const [ra, rb] = crops[0] = crop(rows, r0, r1, CROP, crops[0]), [ca, cb] = crops[1] = crop(cols, c0, c1, CROPW, crops[1]);
    const chosen = own ? flat(a.shape, index) : -1, base = flat(a.shape, placed(a, lead, 0, 0));
    table.fill({
      rows: [ra, rb], cols: [ca, cb], label: `${letter}, rows ${ra} to ${rb - 1}, columns ${ca} to ${cb - 1}`,
      cell(r, c) {
        const k = base + r * cols + c, v = a.values[k], text = fmt(v), part = mine?.keys.has(k);
        const key = placed(a, lead, r, c).join();
        return { key, text, back: app.colour(v, a.limit), selected: k === chosen, stop: k === chosen,
          cls: part ? "part" : mine?.also.has(k) ? "also" : "",
          label: `${letter} ${key}: ${text}${part ? ", part of the sum" : ""}` };
      },
    });
    write(note, `Cropped: rows ${ra}–${rb - 1} of ${rows}, columns ${ca}–${cb - 1} of ${cols}.`);
    if (small) {
      const key = `${lead.join()} ${app.paint}`;
      if (key !== painted) small.paint(app.palette(), a, base, rows, cols);
      painted = key;
      small.mark([ra / rows, rb / rows, ca / cols, cb / cols]);
    }
  }
  return { element, draw, focus: table.focus };
}

function overview(pick) { // the whole plane as a picture, with a frame around what is shown in numbers
  const canvas = make("canvas", { class: "overview", "aria-hidden": "true", title: "Click to move the crop" });
  const frame = make("i"), element = make("div", { class: "holder" }, canvas, frame);
  element.addEventListener("click", (e) => {
    const box = canvas.getBoundingClientRect(), { width, height } = canvas;
    pick(clamp(Math.floor(((e.clientY - box.top) / box.height) * height), 0, height - 1),
      clamp(Math.floor(((e.clientX - box.left) / box.width) * width), 0, width - 1));
  });

  function paint({ low, high, paper }, a, base, rows, cols) {
    canvas.width = cols;
    canvas.height = rows;
    element.style.aspectRatio = `${cols}/${rows}`;
    const g = canvas.getContext("2d"), picture = g.createImageData(cols, rows);
    for (let k = 0; k < rows * cols; k++) {
      const v = a.values[base + k], s = Math.min(1, Math.abs(v) / a.limit) ** 0.7, to = v < 0 ? low : high;
      for (let j = 0; j < 3; j++) picture.data[4 * k + j] = paper[j] + s * (to[j] - paper[j]);
      picture.data[4 * k + 3] = 255;
    }
    g.putImageData(picture, 0, 0);
  }
  function mark([top, bottom, left, right]) {
    const percent = (v) => `${100 * v}%`;
    Object.assign(frame.style, { left: percent(left), top: percent(top), width: percent(right - left), height: percent(bottom - top) });
  }
  return { element, paint, mark };
}
