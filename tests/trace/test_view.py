"""The picture in a real browser: click, read the numbers, compare with NumPy's."""

import json
import os
import shutil

import numpy as np
import pytest

import minicnn as m
from minicnn.trace.page import source
from minicnn.trace.widget import _GLUE, Edits

D = np.float64
selenium = pytest.importorskip("selenium", reason="needs selenium (pip install '.[browser]')")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium (apt-get install chromium chromium-driver)"
)


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    arguments = ["--headless=new", "--disable-gpu", "--window-size=1400,1000"]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses its sandbox to root, as in containers
    for argument in [*arguments, "--disable-dev-shm-usage"]:
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def trace():
    rng = np.random.default_rng(0)
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
    for _, p, _ in model.named_params():
        p += 0.2 * rng.normal(size=p.shape)
    return m.trace(model, rng.normal(size=(2, 4, 9, 9)), [2, 0])


def open_page(browser, trace, path):
    trace.to_html(path)
    browser.get(path.as_uri())


def same(text, value):
    """The text is the value to the four digits that the view prints."""
    return float(text) == float(f"{value:.4g}")


READ = """
const [step, letter, index] = arguments, $ = (s) => document.querySelector(s);
[...document.querySelectorAll('.rail button')][step].click();
const box = () => $(`[data-letter="${letter}"]`);
index.slice(0, -2).forEach((value, axis) => {
  const input = box().querySelectorAll('input')[axis];
  input.value = value;
  input.dispatchEvent(new Event('change'));
});
for (let k = 0; k < 200; k++) {  // walk with the arrow keys to where a crop does not reach yet
  const chosen = box().querySelector(`[data-index="${index.join()}"]`);
  if (chosen) { chosen.click(); break; }
  const cells = box().querySelectorAll('[role=gridcell]');
  const past = Number(cells[0].dataset.index.split(',').at(-1)) > index.at(-1);
  cells[past ? 0 : cells.length - 1].click();
}
return {
  title: $('.derivation h3').textContent, derived: $('.derived')?.textContent,
  stored: $('.stored')?.textContent,
  products: [...document.querySelectorAll('.term .product')].map((e) => e.textContent),
  last: [...document.querySelectorAll('.running')].at(-1)?.textContent,
  cells: Object.fromEntries([...document.querySelectorAll('.map')].map((b) => [b.dataset.letter,
    [...b.querySelectorAll('[role=gridcell]')].map((c) => [c.dataset.index, c.textContent])])),
};
"""


def test_every_number_is_numpys(browser, trace, tmp_path):
    open_page(browser, trace, tmp_path / "trace.html")
    rng = np.random.default_rng(1)
    checked = set()
    for number, node in enumerate(trace.nodes):
        forward, backward = trace.forward(node.name), trace.backward(node.name)
        for what, a in (forward.outputs | backward.outputs | backward.grads).items():
            step = forward if what == "y" else backward
            button = 2 * number + (what != "y")  # the buttons stand in rows: forward, backward
            for at in rng.choice(a.size, min(a.size, 4), replace=False):
                index = tuple(int(i) for i in np.unravel_index(at, a.shape))
                seen = browser.execute_script(READ, button, what, list(index))
                where = node.name, what, index, seen
                assert seen["title"].startswith(f"{what}[{','.join(map(str, index))}]"), where
                assert same(seen["stored"], a[index]), where
                # db before batch-norm is 0 but for rounding, which no order of adding shares.
                rounding = 1e-14 * np.abs(trace.backward(node.name).inputs["dy"]).sum()
                near = abs(float(seen["derived"]) - a[index]) <= rounding
                assert near or same(seen["derived"], a[index]), where
                terms = trace.explain(node.name, what, index).terms
                products = [t.value for t in terms]
                if what == "y" and step.op in ("LayerNorm", "Conv2d", "Linear", "MaxPool2d"):
                    # The page lists padding like explain, and long sums without their zeros.
                    want = products[:60] if len(products) > 60 else products
                    assert len(seen["products"]) == len(want), where
                    assert all(map(same, seen["products"], want)), where
                arrays = forward.arrays | backward.arrays
                for letter, cells in seen["cells"].items():
                    for place, text in cells:
                        i = tuple(int(k) for k in place.split(",")) if place else ()
                        assert same(text, arrays[letter][i]), (where, letter, place)
                checked.add((step.op, what))
    assert {("Conv2d", "dw"), ("MaxPool2d", "dx"), ("BatchNorm2d", "dx")} < checked
    assert {("Linear", "dw"), ("cross_entropy", "dx"), ("Softmax", "dx")} < checked
    assert not browser.get_log("browser")


def test_im2col_and_fold_back(browser, trace, tmp_path):
    open_page(browser, trace, tmp_path / "trace.html")
    script = browser.execute_script
    script("document.querySelector('.tool-im2col').click()")
    y = trace.forward("0").outputs["y"]
    for index, text in script(
        "return [...document.querySelectorAll('.dot button')].map(b => [b.dataset.index, b.textContent])"
    ):
        assert same(text, y[tuple(map(int, index.split(",")))])
    script("document.querySelectorAll('.dot button')[3].click()")
    label = script("return document.querySelector('.dotproduct').textContent")
    index = tuple(map(int, label[2 : label.index("]")].split(",")))
    assert same(label.rpartition("=")[2], y[index])

    # Hovering a pixel lights its copies in the matrix: as many as taps that read it.
    lit, expected = script(
        "const p = document.querySelectorAll('.pixel')[10];"
        "p.dispatchEvent(new MouseEvent('mouseenter'));"
        "return [document.querySelectorAll('.col.lit').length,"
        " [...document.querySelectorAll('.col')].filter(c => c.dataset.at === p.dataset.at).length]"
    )
    assert lit == expected > 1

    fold = (
        "document.querySelector('.all').click();"
        "return [document.querySelector('.verdict').textContent,"
        "Object.fromEntries([...document.querySelectorAll('.acc td')].map(t => [t.dataset.index, t.textContent])),"
        "Object.fromEntries([...document.querySelectorAll('.hits td')].map(t => [t.dataset.index, t.textContent])),"
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
    unnamed = browser.execute_script(
        "return [...document.querySelectorAll('button, input')].filter("
        "e => !(e.textContent || e.ariaLabel || e.closest('label'))).length"
    )
    assert unnamed == 0


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
    module = (source("view.js") + _GLUE).replace("export default", "window.widget =")
    (tmp_path / "widget.html").write_text(
        '<meta charset="utf-8"><div id="el"></div><script type="module">'
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
