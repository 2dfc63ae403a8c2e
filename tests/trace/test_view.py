"""The picture in a real browser: click, read the numbers, compare with NumPy's."""

import json

import numpy as np
import pytest

import minicnn as m
from minicnn.trace.page import script as view_script
from minicnn.trace.page import source
from minicnn.trace.widget import _GLUE, Edits

D = np.float64


def geometry():
    """Convolution with every option, pooling, all norms, and softmax + cross-entropy behind them."""
    model = m.Sequential(
        m.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2, rng=1, dtype=D),
        m.BatchNorm2d(6, dtype=D),
        m.SiLU(),
        m.MaxPool2d(3, stride=1, padding=1),
        m.Residual(m.AvgPool2d(3, stride=1, padding=1)),
        m.GroupNorm(2, 6, dtype=D),
        m.Flatten(),
        m.Dropout(0.2, rng=1),
        m.LayerNorm(96, dtype=D),
        m.Linear(96, 3, rng=2, dtype=D),
        m.Softmax(),
    )
    return model, (2, 4, 9, 9), np.array([2, 0]), "cross_entropy"


def other_layers():
    transposed = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    model = m.Sequential(
        m.ConvTranspose2d(4, 6, 3, **transposed, rng=1, dtype=D),
        m.BatchNorm2d(6, dtype=D).eval(),
        m.Residual(m.ReLU(), m.Conv2d(6, 6, 1, bias=False, rng=3, dtype=D)),
        m.AdaptiveAvgPool2d((5, 3)),
        m.LeakyReLU(0.1),
        m.AvgPool2d(3, stride=2, padding=1, count_include_pad=False),
        m.ELU(0.7),
        m.GELU(),
        m.Sigmoid(),
        m.GELU("tanh"),
        m.Flatten(),
        m.Tanh(),
        m.Linear(36, 4, bias=False, rng=2, dtype=D),
        m.Softplus(2.0, 1.0),
        m.LogSoftmax(),
    )
    return model, (2, 4, 4, 4), np.array([3, 1]), "nll_loss"


def loss(name, target=None):
    """A loss alone, behind what has no parameters."""
    target = np.random.default_rng(4).random((3, 5)) if target is None else np.array(target)
    return lambda: (
        m.Sequential(m.Tanh()),
        (3, 5, *target.shape[1:] * (target.dtype == int)),
        target,
        name,
    )


TRACES = {
    "geometry": geometry,
    "other_layers": other_layers,
    **{name: loss(name) for name in ("mse_loss", "l1_loss", "bce_with_logits")},
    "probabilities": loss("cross_entropy"),
    "ignored": loss("cross_entropy", [4, -100, 0]),
    "places": loss("cross_entropy", [[4, 0], [-100, 1], [2, 2]]),
}


def made(build):
    rng = np.random.default_rng(0)
    model, shape, target, name = build()
    for _, p, _ in model.named_params():
        p += 0.2 * rng.normal(size=p.shape)
    return m.trace(model, rng.normal(size=shape), target, name)


@pytest.fixture(scope="module")
def trace():
    return made(geometry)


def open_page(browser, trace, path):
    trace.to_html(path)
    browser.get(path.as_uri())
    browser.get_log("browser")  # forget what other pages said
    browser.refresh()


def same(text, value):
    """The text is the value to the four digits that the view prints."""
    return float(text) == float(f"{value:.4g}")


READ = """
const [step, letter, index, done] = arguments, $ = (s) => document.querySelector(s);
[...document.querySelectorAll('.rail button')][step].click();
const box = () => $(`[data-letter="${letter}"]`);
index.slice(0, -2).forEach((value, axis) => {
  const input = box().querySelectorAll('input')[axis];
  input.value = value;
  input.dispatchEvent(new Event('change'));
});
for (let k = 0; k < 200; k++) {  // click on the rim of the crop until it reaches there
  const chosen = box().querySelector(`[data-index="${index.join()}"]`);
  if (chosen) { chosen.click(); break; }
  const cells = box().querySelectorAll('[role=gridcell]');
  const past = Number(cells[0].dataset.index.split(',').at(-1)) > index.at(-1);
  cells[past ? 0 : cells.length - 1].click();
}
const text = (s) => $(s).textContent, read = () => {
  if (text('.numeric') === '…') return setTimeout(read, 2);
  done({
    title: text('.derivation h3'), derived: text('.derived'), stored: text('.stored'),
    gradient: text('.gradient'), numeric: text('.numeric'), doubt: !$('.doubt').hidden,
    factors: [...document.querySelectorAll('.term .factors')].map((e) => e.textContent),
    products: [...document.querySelectorAll('.term .product')].map((e) => e.textContent),
    last: [...document.querySelectorAll('.running')].at(-1)?.textContent,
    cells: Object.fromEntries([...document.querySelectorAll('.map')].map((b) => [b.dataset.letter,
      [...b.querySelectorAll('[role=gridcell]')].map((c) => [c.dataset.index, c.textContent, c.ariaLabel])])),
    loss: text('.loss output'),
    statistics: [...document.querySelectorAll('.statistics tbody tr')].map((r) => [...r.children].map((c) => c.textContent)),
  });
};
read();
"""


@pytest.mark.parametrize("name", TRACES)
def test_every_number_is_numpys(browser, name, tmp_path):
    """Of every array of every step: numbers, factors, products, sum, and the finite difference."""
    trace = made(TRACES[name])
    open_page(browser, trace, tmp_path / "trace.html")
    rng = np.random.default_rng(1)
    for number, node in enumerate(trace.nodes):
        forward, backward = trace.forward(node.name), trace.backward(node.name)
        arrays = backward.arrays | forward.arrays
        for what, a in (forward.outputs | backward.outputs | backward.grads).items():
            step = forward if what == "y" else backward
            button = 2 * number + (what != "y")  # the buttons stand in rows: forward, backward
            for at in rng.choice(a.size, min(a.size, 3), replace=False):
                index = tuple(int(i) for i in np.unravel_index(at, a.shape))
                seen = browser.execute_async_script(READ, button, what, list(index))
                where = node.name, forward.op, what, index, seen
                assert seen["title"].startswith(f"{what}[{','.join(map(str, index))}]"), where
                assert same(seen["stored"], a[index]), where
                # db before batch-norm is 0 but for rounding, which no order of adding shares.
                rounding = 1e-14 * (1 + np.abs(backward.inputs["dy"]).sum())

                def near(text, value, limit=rounding):
                    return same(text, value) or abs(float(text) - value) <= limit

                assert near(seen["derived"], a[index]), where
                want = trace.explain(node.name, what, index)
                assert near(seen["gradient"], want.gradient), where
                assert near(seen["numeric"], want.numeric, 1e-10), where
                assert not seen["doubt"], where
                terms = want.terms
                if len(terms) > 60:  # long sums are listed without their zeros
                    terms = [t for t in terms if t.value][:60]
                assert len(seen["products"]) == len(terms), where
                for term, product, factors in zip(terms, seen["products"], seen["factors"]):
                    assert near(product, term.value), where
                    assert len(factors.split(" · ")) == len(term.factors), where
                    assert all(map(near, factors.split(" · "), term.factors)), where
                if terms and want.start == 0 and len(terms) == len(want.terms):
                    assert near(seen["last"], sum(t.value for t in terms)), where
                assert same(seen["loss"], trace.loss), where
                table = step.statistics()
                assert len(seen["statistics"]) >= len(step.outputs), where
                for letter, _, low, mean, high, zeros in seen["statistics"]:
                    s = table.get(letter) or forward.statistics()[letter]
                    assert all(map(near, (low, mean, high), (s["min"], s["mean"], s["max"]))), where
                    assert zeros == f"{100 * s['zeros']:.1f} %", where
                for letter, cells in seen["cells"].items():
                    assert cells
                    for place, text, label in cells:
                        i = tuple(int(k) for k in place.split(",")) if place else ()
                        assert same(text, arrays[letter][i]), (where, letter, place)
                        assert label.startswith(f"{letter} {place}: {text}"), (where, label)
    assert not browser.get_log("browser")


def test_every_layer_and_loss_is_in_these_traces():
    from minicnn.trace.explain import RULES

    ops = {step.op for build in TRACES.values() for step in made(build)}
    assert ops == set(RULES)


def im2col(x):
    """Columns of the first layer of `geometry`, apart from the package: (N, C*3*3, 4*4)."""
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
    taps = [
        padded[:, c, k : k + 7 : 2, l : l + 7 : 2]
        for c in range(x.shape[1])
        for k in (0, 2, 4)
        for l in (0, 2, 4)  # noqa: E741
    ]
    return np.stack(taps, 1).reshape(len(x), -1, 16)


def test_im2col_and_fold_back(browser, trace, tmp_path):
    open_page(browser, trace, tmp_path / "trace.html")
    script = browser.execute_script
    script("document.querySelector('.tool-im2col').click()")
    y = trace.forward("0").outputs["y"]
    for index, text in script(
        "return [...document.querySelectorAll('.product [role=gridcell]')].map(b => [b.dataset.index, b.textContent])"
    ):
        assert same(text, y[tuple(map(int, index.split(",")))])
    script("document.querySelectorAll('.product [role=gridcell]')[3].click()")
    label = script("return document.querySelector('.dotproduct').textContent")
    index = tuple(map(int, label[2 : label.index("]")].split(",")))
    assert same(label.rpartition("=")[2], y[index])

    columns = im2col(trace.forward("0").inputs["x"])
    for place, text in script(
        "return [...document.querySelectorAll('.matrix [role=gridcell]')].map(b => [b.dataset.index, b.textContent])"
    ):
        k, p = map(int, place.split(","))
        first = index[1] // 3 * 2 * 9  # row of the group's first channel
        assert same(text, columns[index[0], first + k, p])

    # Pointing at a pixel lights its copies in the matrix, and says how many windows cover it.
    lit, pixel, where, said = script(
        "const p = document.querySelector('.image .part');"
        "p.dispatchEvent(new MouseEvent('mouseover', {bubbles: true}));"
        "const lit = [...document.querySelectorAll('.matrix .lit')].map(e => e.textContent);"
        "return [lit, p.textContent, p.dataset.index, document.querySelector('.where').textContent]"
    )
    assert set(lit) == {pixel}
    covers = np.prod(
        [
            sum(int(h) == 2 * i - 1 + 2 * k for i in range(4) for k in range(3))
            for h in where.split(",")
        ]
    )
    assert f"= {pixel} stands {covers} times" in said

    fold = (
        "document.querySelector('.all').click();"
        "return [document.querySelector('.verdict').textContent,"
        "Object.fromEntries([...document.querySelectorAll('.acc [role=gridcell]')].map(t => [t.dataset.index, t.textContent])),"
        "Object.fromEntries([...document.querySelectorAll('.hits [role=gridcell]')].map(t => [t.dataset.index, t.textContent])),"
        "document.querySelector('.fold h4').textContent]"
    )
    verdict, acc, hits, title = script(fold)
    n, c = index[0], int(title.rsplit(maxsplit=1)[1])
    dx = trace.backward("0").outputs["dx"][n, c]
    assert verdict == "All 81 pixels equal dx."
    assert all(same(text, dx[tuple(map(int, at.split(",")))]) for at, text in acc.items())
    counts = np.zeros((13, 13), int)  # what += adds up when every window writes ones
    for i, j in np.ndindex(4, 4):
        counts[2 * i : 2 * i + 5 : 2, 2 * j : 2 * j + 5 : 2] += 1
    assert all(
        int(text) == counts[1:10, 1:10][tuple(map(int, at.split(",")))] for at, text in hits.items()
    )
    script("document.querySelector('.assign').click()")
    wrong = script(fold)[0]
    overlaps = int((counts[1:10, 1:10] > 1).sum())
    assert wrong.startswith(f"{overlaps} of 81 pixels are wrong")


def test_keyboard_walks_steps_and_pixels(browser, trace, tmp_path):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, trace, tmp_path / "trace.html")
    chosen = browser.find_element("css selector", "[data-letter=y] [aria-selected=true]")
    before = [int(i) for i in chosen.get_attribute("data-index").split(",")]
    key, step = (Keys.ARROW_LEFT, -1) if before[-1] else (Keys.ARROW_RIGHT, 1)
    chosen.send_keys(key)
    after = browser.switch_to.active_element.get_attribute("data-index")
    assert [int(i) for i in after.split(",")] == [*before[:-1], before[-1] + step]
    browser.find_element("css selector", ".next").send_keys(Keys.ENTER)
    assert "2 of 26" in browser.find_element("css selector", "header.top").text
    browser.find_element("css selector", ".back").send_keys(Keys.ENTER)
    assert_named(browser)

    # im2col: the arrow keys walk through the matrix, and light the pixel on the other side.
    browser.find_element("css selector", ".tool-im2col").send_keys(Keys.ENTER)
    browser.find_element("css selector", ".matrix [tabindex='0']").send_keys(Keys.ARROW_DOWN)
    focus = browser.switch_to.active_element
    k, p = map(int, focus.get_attribute("data-index").split(","))
    focus.send_keys(Keys.ARROW_DOWN)
    focus = browser.switch_to.active_element
    assert focus.get_attribute("data-index") == f"{k + 1},{p}"
    label = focus.get_attribute("aria-label")
    assert label.startswith(f"window {p // 4}, {p % 4}, tap {(k + 1) // 3}, {(k + 1) % 3}: ")
    spoken = browser.find_element("css selector", ".where").text
    if "padding" not in label:
        lit = browser.find_elements("css selector", ".image .lit")
        assert [e.text for e in lit] == [focus.text]
        assert f"= {focus.text} stands" in spoken
    before = browser.find_element("css selector", ".dotproduct").text
    focus.send_keys(Keys.ARROW_RIGHT if p < 15 else Keys.ARROW_LEFT)
    assert browser.find_element("css selector", ".dotproduct").text != before
    browser.find_element("css selector", ".one").send_keys(Keys.ENTER)
    browser.find_element("css selector", ".acc [tabindex='0']").send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("data-index") == "0,1"
    browser.find_element("css selector", ".assign").send_keys(Keys.SPACE)
    assert browser.find_element("css selector", ".assign").is_selected()
    assert_named(browser)


def assert_named(browser):
    """What can be operated or holds numbers has a name for a screen reader."""
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input, [role=gridcell], [role=grid], section, nav, [role=region]')]"
        ".filter(e => e.checkVisibility() && !(e.ariaLabel || e.closest('label') || (e.tagName === 'BUTTON' && e.textContent)))"
        ".map(e => e.outerHTML.slice(0, 200))"
    )
    assert unnamed == []
    stops = browser.execute_script(
        "return [...document.querySelectorAll('[role=grid]')].map(g => g.querySelectorAll('[tabindex=\"0\"]').length)"
    )
    assert set(stops) == {1}, "each grid is one stop of the tab key"


def test_reference_network_fits_a_page(trace):
    x = np.random.default_rng(0).random((1, 1, 28, 28), "f4")
    page = m.trace(m.models.mnist_cnn(), x, [3]).to_html()
    assert len(page) < 3e6
    assert '"data":null' not in page
    assert "http" not in page.replace("http-equiv", "")


def test_what_if_in_the_browser(browser, tmp_path):
    """The widget's own module, with this test in the place of Jupyter's messages."""
    rng = np.random.default_rng(0)
    model = m.Sequential(
        m.Conv2d(1, 2, 3, rng=1, dtype=D),
        m.Tanh(),
        m.AdaptiveAvgPool2d(2),
        m.Flatten(),
        m.Dropout(0.3, rng=5),
        m.Linear(8, 3, rng=2, dtype=D),
    )
    x = rng.normal(size=(1, 1, 8, 8))
    start = m.trace(model, x, [1])
    edits = Edits(start)
    module = (view_script() + _GLUE).replace("export default", "window.widget =")
    (tmp_path / "widget.html").write_text(
        f'<meta charset="utf-8"><style>{source("view.css")}</style><div id="el"></div>'
        '<script type="module">'
        + module
        + f"""
        const calls = []; window.sent = []; window.data = JSON.parse({json.dumps(json.dumps(edits.data()))});
        widget.render({{ el: document.getElementById('el'), model: {{ get: () => window.data,
          on: (_, f) => calls.push(f), off() {{}}, send: (m) => sent.push(m) }} }});
        window.push = (d) => {{ window.data = d; calls.forEach((f) => f()); }};
        </script>""",
        encoding="utf-8",
    )
    browser.get((tmp_path / "widget.html").as_uri())

    def act(script):
        browser.execute_script(script)
        message = browser.execute_script("return window.sent.pop()")
        edits.handle(message)
        browser.execute_script("window.push(arguments[0])", edits.data())
        shown = browser.execute_script("return document.querySelector('.loss output').textContent")
        assert same(shown, edits.trace.loss)
        return browser.execute_script("return document.querySelector('.message')?.textContent")

    act(
        "document.querySelector('[data-letter=w] [role=gridcell]').click();"
        "const i = document.querySelector('.edit input'); i.value = 0.75;"
        "document.querySelector('.edit button').click()"
    )
    changed = edits.trace.forward("0").params["weight"]
    assert np.argwhere(changed != model[0].weight).shape[0] == 1
    assert 0.75 in changed
    assert edits.trace.loss != start.loss

    text = act("document.querySelector('.sgd').click()")
    assert "predicted" in text
    act("document.querySelector('.reset').click()")
    assert edits.trace is start
    act(
        "const i = document.querySelector('.stride'); i.value = 2; i.dispatchEvent(new Event('change'))"
    )
    assert edits.trace.forward("0").outputs["y"].shape == (1, 2, 3, 3)
    bad = act(
        "const i = document.querySelector('.stride'); i.value = 0; i.dispatchEvent(new Event('change'))"
    )
    assert bad.startswith("Not possible here")
    assert "stride" in bad
