// A table of numbers as an ARIA grid: one element a number, made once; filling writes only what
// differs from what stands there. One cell is in the tab order, and the arrow keys move from it.

function make(tag, attributes = {}, ...children) {
  const e = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) e.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) e.setAttribute(key, value === true ? "" : value);
  }
  e.append(...children.filter((c) => c !== null));
  return e;
}

function write(e, text) { // what a screen reader speaks is not touched if it stays the same
  if (e.textContent !== text) e.textContent = text;
}

// Blue below zero, orange above: apart for every kind of colour vision. The colours are worked out
// here, once each: a mix in the style sheet would cost the browser more than the rest of a cell.
function shades({ low, high, paper }) {
  const made = new Map();
  return (v, limit) => {
    const share = Math.round(Math.min(1, Math.abs(v) / limit) ** 0.7 * 78) * (v < 0 ? -1 : 1);
    if (!made.has(share)) {
      const to = share < 0 ? low : high, mix = paper.map((p, k) => Math.round(p + (Math.abs(share) / 100) * (to[k] - p)));
      made.set(share, `rgb(${mix})`);
    }
    return made.get(share);
  };
}

// The part of an axis that is shown: it stays unless lo..hi with a margin of one leaves it.
function crop(n, lo, hi, width, old = null) {
  if (n <= width) return [0, n];
  if (old && Math.max(0, lo - 1) >= old[0] && Math.min(n - 1, hi + 1) < old[1]) return old;
  const from = clamp(Math.round((lo + hi - width + 1) / 2), 0, n - width);
  return [from, from + width];
}

const ARROWS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };

// pick(cell): clicked, Enter or Space. point(cell): under the mouse or focused. move(r, c): an arrow
// key asks for the cell at r, c, perhaps beyond what is shown; the answer is to fill the grid anew.
function grid(name, { pick = null, point = null, move = null } = {}) {
  const element = make("div", { role: "grid", class: `grid ${name}`, "aria-readonly": "true" });
  const cells = [], corners = [];
  let layout = "", lit = null, own = "0,0"; // own: the cell in the tab order where `cell` names none

  function build(rows, cols, heads) {
    cells.length = corners.length = 0;
    element.replaceChildren();
    element.style.setProperty("--cols", cols);
    const head = (role) => {
      const e = make("span", { role, class: "head" });
      corners.push(e);
      return e;
    };
    if (heads?.col) {
      element.append(make("div", { role: "row" }, ...Array.from({ length: cols + 1 }, () => head("columnheader"))));
    }
    for (let r = 0; r < rows; r++) {
      const line = make("div", { role: "row" }, heads ? head("rowheader") : null);
      for (let c = 0; c < cols; c++) {
        const e = make("span", { role: "gridcell", tabindex: -1 });
        e.cell = {};
        cells.push(e);
        line.append(e);
      }
      element.append(line);
    }
  }

  // cell(r, c) -> {key, text, back, label, cls, selected, stop}; heads: {col(c), row(r)}
  function fill({ rows: [r0, r1], cols: [c0, c1], label, heads = null, cell }) {
    const cols = c1 - c0, wanted = `${r1 - r0},${cols},${!!heads?.col},${!!heads}`;
    if (wanted !== layout) build(r1 - r0, cols, heads);
    layout = wanted;
    element.setAttribute("aria-label", label);
    if (heads) {
      const texts = heads.col ? ["", ...Array.from({ length: cols }, (_, c) => heads.col(c0 + c))] : [];
      for (let r = r0; r < r1; r++) texts.push(heads.row(r));
      corners.forEach((e, k) => write(e, texts[k]));
    }
    const filled = cells.map((_, k) => {
      const r = r0 + Math.floor(k / cols), c = c0 + (k % cols);
      return Object.assign(cell(r, c), { r, c });
    });
    if (cells.length && !filled.some((now) => now.stop)) (filled.find(({ r, c }) => own === `${r},${c}`) ?? filled[0]).stop = true;
    cells.forEach((e, k) => {
      const old = e.cell, now = filled[k];
      if (now.text !== old.text) e.textContent = now.text;
      if (now.back !== old.back) e.style.background = now.back;
      if (now.cls !== old.cls) e.className = now.cls;
      if (now.key !== old.key) e.dataset.index = now.key;
      if (now.label !== old.label) e.setAttribute("aria-label", now.label);
      if (now.selected !== old.selected) e.setAttribute("aria-selected", String(!!now.selected));
      if (now.stop !== old.stop) e.tabIndex = now.stop ? 0 : -1;
      e.cell = now;
    });
    if (lit) light(lit);
  }

  function light(ok) { // which cells stand for the same number as one elsewhere
    lit = ok;
    for (const e of cells) e.classList.toggle("lit", ok(e.cell));
  }

  const focus = () => cells.find((e) => e.cell.stop)?.focus({ preventScroll: true });
  const hit = (e) => e.target.closest("[role=gridcell]")?.cell;
  element.addEventListener("click", (e) => pick && hit(e) && pick(hit(e)));
  if (point) for (const event of ["mouseover", "focusin"]) element.addEventListener(event, (e) => hit(e) && point(hit(e)));
  element.addEventListener("keydown", (e) => {
    const cell = hit(e), step = ARROWS[e.key];
    if (!cell || e.ctrlKey || e.metaKey || e.altKey) return;
    if (step) {
      e.preventDefault();
      const [r, c] = [cell.r + step[0], cell.c + step[1]];
      if (move) {
        move(r, c);
        focus();
        return;
      }
      const next = cells.find((other) => other.cell.r === r && other.cell.c === c);
      if (!next) return;
      own = `${r},${c}`;
      for (const [other, stop] of [[e.target, false], [next, true]]) {
        other.tabIndex = stop ? 0 : -1;
        other.cell.stop = stop;
      }
      next.focus();
    } else if (pick && (e.key === "Enter" || e.key === " ")) {
      e.preventDefault();
      pick(cell);
      focus();
    }
  });
  return { element, fill, light, focus };
}
