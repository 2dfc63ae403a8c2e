// The chosen number: its terms, their sum, what the array holds, and the finite difference.

const LISTED = 60; // terms listed of a derivation; the sum is over all

// Run a generator in short slices, the first of them after the next picture, so that a click is
// answered before; return what calls it off.
function sliced(generator, done) {
  let timer, frame;
  const go = () => {
    const until = performance.now() + 8;
    let step;
    do step = generator.next(); while (!step.done && performance.now() < until);
    if (step.done) done(step.value);
    else timer = setTimeout(go);
  };
  frame = requestAnimationFrame(() => { timer = setTimeout(go); });
  return () => {
    cancelAnimationFrame(frame);
    clearTimeout(timer);
  };
}

function derivationView(app) {
  const name = make("span"), value = make("span", { class: "value" });
  const title = make("h3", {}, name, value), formula = make("p", { class: "formula" });
  const body = make("tbody"), head = ["term", "factors", "product", "sum so far"].map((h) => make("th", { scope: "col" }, h));
  const table = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Terms" },
    make("table", {}, make("thead", {}, make("tr", {}, ...head)), body));
  const note = make("p", { class: "note" });
  const out = (cls) => make("output", { class: cls });
  const derived = out("derived"), stored = out("stored"), gradient = out("gradient"), numeric = out("numeric");
  const total = make("dl", { class: "total", role: "status" },
    make("dt", {}, "derived"), make("dd", {}, derived), make("dt", {}, "in the array"), make("dd", {}, stored));
  const slope = make("dt");
  const check = make("dl", { class: "total check", role: "status" },
    slope, make("dd", {}, gradient),
    make("dt", { title: "(loss with the number 1e-5 larger − loss with it 1e-5 smaller) / 2e-5, in float64" }, "finite difference"), make("dd", {}, numeric));
  const doubt = make("p", { class: "note doubt" });
  const element = make("section", { class: "derivation", "aria-label": "Derivation" },
    title, formula, table, note, total, check, doubt);
  const form = app.send ? editForm(app) : null;
  if (form) element.append(form.element);
  let cancel = () => {};

  function list(d) {
    const row = (cls, label, ...texts) => make("tr", { class: cls }, make("th", { scope: "row" }, label),
      ...texts.map((text, k) => make("td", { class: ["factors", "product", "running"][k] }, text)));
    const long = d.terms.length > LISTED, rows = [];
    const listed = long ? d.terms.filter((t) => t.value !== 0).slice(0, LISTED) : d.terms;
    let running = d.start;
    if (d.startRef) rows.push(row("start", shown(...d.startRef), "", fmt(d.start), fmt(running)));
    for (const t of listed) {
      running += t.value;
      rows.push(row("term", labelled(t), t.factors.map(fmt).join(" · "), fmt(t.value), fmt(running)));
    }
    body.replaceChildren(...rows);
    note.hidden = !long;
    if (long) note.textContent = `${listed.length} of ${d.terms.length} terms listed, zeros left out; the total is over all.`;
  }

  function finite() { // the finite difference, and what it should equal
    const { letter, index } = app.state, A = app.context().A, of = letter === "y" ? "dy" : letter;
    const wanted = at(A[of], index), variable = { y: "y", dx: "x", dw: "w", db: "b" }[letter];
    write(slope, `gradient of the loss to ${shown(variable, index)}`);
    write(gradient, fmt(wanted));
    write(numeric, "…");
    doubt.hidden = true;
    cancel = sliced(app.difference(app.node(), letter, index), (v) => {
      write(numeric, v === undefined ? "needs arrays that are too large for the page" : fmt(v));
      const far = Math.abs(v - wanted) > 1e-3 * Math.max(Math.abs(v), Math.abs(wanted)) + 1e-6 + 1e-4 * A[of].limit;
      doubt.hidden = !far;
      doubt.textContent = "They differ: a kink or a tie lies within 1e-5 of this number.";
    });
  }

  function draw(d) {
    cancel();
    const { letter, index } = app.state, a = app.array(letter), v = a.values ? at(a, index) : NaN;
    title.className = kind(letter);
    write(name, shown(letter, index));
    write(value, ` = ${fmt(v)}`);
    table.hidden = total.hidden = check.hidden = note.hidden = doubt.hidden = true;
    if (d) {
      write(formula, d.formula);
      list(d);
      write(derived, fmt(d.total));
      write(stored, fmt(v));
      table.hidden = total.hidden = check.hidden = false;
      finite();
    } else if (app.derivable(letter) && !RULES[app.context().step.rule]) {
      write(formula, "A layer of your own: how it works is not known here.");
    } else if (app.derivable(letter)) {
      write(formula, `Some arrays of this step are too large for the page: trace.explain("${app.context().step.name}", "${letter}", (${index.join(", ")})) derives it.`);
    } else if (letter === "dy") {
      write(formula, "The gradient that comes from the layer after this one.");
    } else {
      write(formula, `Given to this step. Choose a number of ${app.forward() ? "y" : "dx, dw or db"} to see what it is made of.`);
    }
    form?.draw(v);
  }
  return { element, draw, stop: () => cancel() };
}

function editForm(app) { // what if this number were another; no <form>, whose Enter Jupyter swallows
  const set = () => {
    const { letter, index } = app.state;
    app.send({ type: "set", name: app.context().step.name, letter, index, value: Number(input.value) });
  };
  const input = make("input", { type: "number", step: "any", onkeydown: (e) => e.key === "Enter" && set() });
  const element = make("div", { class: "edit" }, make("label", {}, "What if it were ", input),
    make("button", { type: "button", onclick: set }, "Set"));
  function draw(value) {
    const { letter } = app.state, { step } = app.context();
    element.hidden = !(["w", "b"].includes(letter) || (letter === "x" && step.sources[0] < 0));
    if (!element.hidden) input.value = fmt(value);
  }
  return { element, draw };
}
