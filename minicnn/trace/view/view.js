// The picture of a trace: one view for the page and for the widget.
//   render(root, data, send)   data as page.py packs it; send(message) in the widget, else null
// Every number is read from the arrays of the trace or derived here from them, term by term. The
// parts of a step are built when the step is entered, and filled when another number is chosen.

function render(root, data, send = null) {
  const state = { step: 0, letter: null, index: null, tool: "derive" };
  let contexts = [], difference = null, parts = null, palette = null, shade = null; // parts: what is built of the current step

  const app = {
    root, state, send,
    views: {}, // the index that each map shows
    paint: 0, // grows when the colours or the numbers change
    palette() { // read once, since asking for a style lays the page out
      const css = palette ? null : getComputedStyle(root);
      const rgb = (name) => css.getPropertyValue(name).trim().match(/\w\w/g).map((h) => parseInt(h, 16));
      palette ??= { low: rgb("--low"), high: rgb("--high"), paper: rgb("--paper") };
      return palette;
    },
    colour(v, limit) {
      shade ??= shades(app.palette());
      return shade(v, limit);
    },
    node: () => (app.forward() ? state.step : 2 * contexts.length - 1 - state.step),
    context: () => contexts[app.node()],
    array: (letter) => app.context().A[letter],
    forward: () => state.step < contexts.length,
    derivable: (letter) => ["y", "dx", "dw", "db"].includes(letter),
    difference: (...which) => difference(...which),
    choose(letter, index) {
      state.letter = letter;
      state.index = index;
      draw();
    },
  };

  function load(next) {
    data = next;
    const arrays = unpack(data.arrays);
    contexts = data.nodes.map((step) => ({ step, A: Object.fromEntries(Object.entries(step.arrays).map(([k, i]) => [k, arrays[i]])) }));
    difference = differences(contexts);
    app.paint++;
  }

  function go(step) {
    state.step = clamp(step, 0, 2 * contexts.length - 1);
    state.letter = app.forward() ? "y" : "dx";
    const a = app.array(state.letter);
    // Start where there is something to see: the largest number of the map.
    let best = 0;
    if (a.values) for (let k = 1; k < a.values.length; k++) if (Math.abs(a.values[k]) > Math.abs(a.values[best])) best = k;
    state.index = unravel(a.shape, best);
    if (app.context().step.rule !== "conv") state.tool = "derive";
    enter();
  }

  // -------------------------------------------------------------- what stays: header and list of steps

  const repaint = () => {
    palette = shade = null;
    app.paint++;
    if (parts) draw();
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", repaint);
  const loss = make("output"), place = make("span", { role: "status" });
  const nav = (name, text, by) => make("button", { type: "button", class: name, onclick: () => go(state.step + by) }, text);
  const back = nav("back", "← Back", -1), next = nav("next", "Next →", 1), lossName = make("span");
  const theme = make("button", { type: "button", class: "theme", "aria-label": "Switch between light and dark",
    onclick: () => {
      const dark = getComputedStyle(root).getPropertyValue("--dark").trim() === "1";
      root.dataset.theme = dark ? "light" : "dark";
      repaint();
    } }, "◐");
  const rail = make("ol", { class: "rail" }), main = make("main");
  let railButtons = [];

  function listSteps() {
    const button = (k, text, label, node) => make("button", { type: "button", "data-step": k, "aria-label": `${label} ${node.name} ${node.op}` }, text);
    const last = 2 * contexts.length - 1;
    rail.replaceChildren(make("li", { class: "head" }, make("span"), make("span", {}, "forward ↓"), make("span", {}, "backward ↑")),
      ...data.nodes.map((node, i) => make("li", {}, make("span", { class: "name", title: node.label }, make("small", {}, node.name), ` ${node.op}`),
        button(i, "y", "forward", node), button(last - i, "dx", "backward", node))));
    railButtons = [...rail.querySelectorAll("button")];
  }
  rail.addEventListener("click", (e) => {
    const k = e.target.closest("button")?.dataset.step;
    if (k !== undefined) go(Number(k));
  });

  // -------------------------------------------------------------- a step

  function statistics(letters) {
    const head = ["", "shape", "min", "mean", "max", "zeros"].map((h) => make("th", { scope: "col" }, h));
    const rows = letters.filter((l) => app.context().step.statistics[l]).map((l) => {
      const s = app.context().step.statistics[l];
      return make("tr", {}, make("th", { scope: "row", class: kind(l) }, l), make("td", {}, `(${app.array(l).shape.join(", ")})`),
        ...[s.min, s.mean, s.max].map((v) => make("td", {}, fmt(v))), make("td", {}, `${(100 * s.zeros).toFixed(1)} %`));
    });
    return make("details", { class: "statistics" }, make("summary", {}, "Min, mean, max, zeros"),
      make("div", { class: "scroll" }, make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...rows))));
  }

  function whatIf() { // the widget's: geometry, a step of SGD, back to the start
    const { step } = app.context(), element = make("section", { class: "whatif", "aria-label": "What if" }), fields = [];
    if (step.window) for (const [option, low, value] of [["stride", 1, (win) => win.stride[0]], ["padding", 0, (win) => win.padding[0][0]]]) {
      const input = make("input", { type: "number", min: low, class: option,
        onchange: () => send({ type: "option", name: step.name, option, value: Number(input.value) }) });
      fields.push(() => { input.value = value(app.context().step.window); });
      element.append(make("label", {}, `${option} `, input));
    }
    const lr = make("input", { type: "number", step: "any", class: "lr" }), message = make("p", { role: "status", class: "message" });
    element.append(make("label", {}, "learning rate ", lr),
      make("button", { type: "button", class: "sgd", onclick: () => send({ type: "sgd", lr: Number(lr.value) }) }, "One SGD step"),
      make("button", { type: "button", class: "reset", onclick: () => send({ type: "reset" }) }, "Reset"), message);
    function draw() {
      fields.forEach((fill) => fill());
      lr.value = data.lr ?? 0.01;
      write(message, data.message ?? "");
      message.classList.toggle("bad", !!data.failed);
    }
    draw();
    return element;
  }

  function tools() {
    const buttons = [["derive", "Patch and sum"], ["im2col", "im2col and fold back"]].map(([tool, label]) => make("button", {
      type: "button", class: `tool-${tool}`, "aria-pressed": String(state.tool === tool),
      onclick: () => {
        state.tool = tool;
        enter();
        root.querySelector(`.tool-${tool}`).focus();
      } }, label));
    return make("p", { class: "tools", role: "group", "aria-label": "View" }, ...buttons);
  }

  function enter() { // build the current step anew
    parts?.stop();
    const { step, A } = app.context(), whole = Object.values(A).every((a) => a.values);
    const letters = (app.forward() ? ["x", "shortcut", "target", "w", "b", "y"] : ["dy", "x", "target", "w", "dw", "db", "dx"])
      .filter((l) => A[l]);
    const asColumns = state.tool === "im2col" && step.rule === "conv" && whole;
    const heading = make("h2", {}, make("span", { class: "direction" }, app.forward() ? "forward" : "backward"), ` ${step.name} `, make("b", {}, step.label));
    const room = make("div", { class: "maps" }), work = make("div", { class: asColumns ? "" : "work" }, room);
    app.views = {};
    main.replaceChildren(heading, make("p", { class: "formula" }, app.forward() ? step.formula : step.backward_formula),
      ...(send ? [whatIf()] : []), ...(step.rule === "conv" && whole ? [tools()] : []), work, statistics(letters));
    if (asColumns) {
      parts = columnsView(app, room.clientWidth);
      room.replaceWith(parts.element);
    } else {
      const maps = letters.map((l) => mapView(app, l, room.clientWidth)), derivation = derivationView(app);
      room.append(...maps.map((m) => m.element));
      work.append(derivation.element);
      parts = {
        stop: derivation.stop,
        draw() {
          const d = app.derivable(state.letter) ? derive(app.context(), state.letter, state.index) : null, lit = litBy(d, A);
          maps.forEach((m) => m.draw(lit));
          derivation.draw(d);
        },
      };
    }
    write(place, `${state.step + 1} of ${2 * contexts.length}`);
    back.disabled = state.step === 0;
    next.disabled = state.step === 2 * contexts.length - 1;
    for (const e of railButtons) {
      const current = Number(e.dataset.step) === state.step;
      e.classList.toggle("current", current);
      if (current) e.setAttribute("aria-current", "step");
      else e.removeAttribute("aria-current");
    }
    draw();
  }

  function draw() {
    write(lossName, `${data.loss_name} `);
    write(loss, fmt(data.loss));
    parts.draw();
  }

  root.classList.add("stepping");
  root.dataset.lmSuppressShortcuts = "true"; // else Jupyter takes the arrow keys and Enter for itself
  root.replaceChildren(
    make("header", { class: "top" }, make("h1", {}, "Stepping through"), make("p", { class: "loss" }, lossName, loss),
      make("nav", { "aria-label": "Steps" }, back, place, next, theme)),
    make("div", { class: "body" }, make("nav", { "aria-label": "Layers" }, rail), main));
  load(data);
  listSteps();
  // Jupyter hands over a root that stands nowhere yet. How many columns fit is known once it has a
  // width, and anew when that changes by more than a scroll bar's.
  let width = 0;
  const start = () => {
    if (!root.clientWidth || Math.abs(root.clientWidth - width) < 40) return;
    width = root.clientWidth;
    if (parts) enter();
    else go(0);
  };
  const observer = new ResizeObserver(start);
  observer.observe(root);
  start();
  return {
    update(changed) { // after an edit: the same step and, where it still exists, the same number
      const active = root.getRootNode().activeElement; // Jupyter may put the view in a shadow root
      const name = active && root.contains(active) && (active.closest(".edit") ? "edit input" : active.classList[0]);
      load(changed);
      listSteps();
      if (!parts) return;
      const a = app.array(state.letter);
      if (!a || a.shape.length !== state.index.length || state.index.some((v, k) => v >= a.shape[k])) go(state.step);
      else enter();
      if (name) root.querySelector(`.${name}`)?.focus({ preventScroll: true });
    },
    stop() {
      observer.disconnect();
      parts?.stop();
    },
  };
}
