"""The live widget in JupyterLab itself: edit, and see maps, loss and gradients change.

A kernel, the server and a browser take part; what the browser shows is compared with a trace of
the same network, changed in the same way, made here.
"""

import copy
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import minicnn as m

ROOT = Path(__file__).resolve().parents[2]
CELL = """\
import numpy as np
import minicnn as m

model = m.Sequential(
    m.Conv2d(1, 2, 3, rng=1, dtype="f8"), m.Tanh(), m.AdaptiveAvgPool2d(2), m.Flatten(), m.Linear(8, 3, rng=2, dtype="f8")
)
x = np.random.default_rng(0).normal(size=(1, 1, 8, 8))
trace = m.trace(model, x, np.array([1]))
"""


@pytest.fixture
def server(tmp_path):
    """A JupyterLab on a free port with one notebook, whose cell ends in the widget."""
    pytest.importorskip("anywidget", reason="needs anywidget (pip install '.[notebooks]')")
    pytest.importorskip("jupyterlab", reason="needs jupyterlab (pip install '.[notebooks]')")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat (pip install '.[notebooks]')")
    pytest.importorskip("ipykernel", reason="needs ipykernel (pip install '.[notebooks]')")
    cell = nbformat.v4.new_code_cell(CELL + "trace.widget()")
    notebook = nbformat.v4.new_notebook(
        cells=[cell], metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    )
    nbformat.write(notebook, tmp_path / "live.ipynb")
    runtime = tmp_path / "runtime"
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JUPYTER_RUNTIME_DIR": str(runtime),
        "JUPYTER_CONFIG_DIR": str(tmp_path / "config"),
        "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces"),
    }
    options = ["--no-browser", "--port=0", "--IdentityProvider.token=trace", "--allow-root"]
    log = (tmp_path / "server.log").open("w")
    process = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", *options, f"--ServerApp.root_dir={tmp_path}"],
        env=env,
        stdout=log,
        stderr=log,
    )
    try:
        until = time.monotonic() + 90
        while not (found := list(runtime.glob("jpserver-*.json"))) and process.poll() is None:
            assert time.monotonic() < until, "the server does not start"
            time.sleep(0.1)
        assert found, (tmp_path / "server.log").read_text()
        time.sleep(0.2)  # the file is written in one go, but not renamed into place
        yield json.loads(found[0].read_text())["url"]
    finally:
        process.terminate()
        process.wait(30)
        log.close()


def shown(browser, letter):
    """The numbers of a map of the view, by their indices."""
    cells = browser.execute_script(
        'return [...document.querySelectorAll(`.stepping [data-letter="${arguments[0]}"] [role=gridcell]`)]'
        ".map(e => [e.dataset.index, e.textContent])",
        letter,
    )
    return {tuple(map(int, index.split(","))): text for index, text in cells}


def same(text, value):
    return float(text) == float(f"{value:.4g}")


def test_edits_in_jupyter(browser, server):
    from selenium.common.exceptions import NoSuchElementException
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(f"{server}lab/tree/live.ipynb?token=trace")
    SELECT_ALL = Keys.CONTROL + "a" + Keys.NULL
    wait = WebDriverWait(
        browser, 60, poll_frequency=0.2, ignored_exceptions=[NoSuchElementException]
    )

    def one(css):
        return browser.find_element(By.CSS_SELECTOR, css)

    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-Notebook .jp-CodeCell"))
    wait.until(lambda _: "Idle" in one("#jp-main-statusbar").text)
    one("[data-command='notebook:run-cell-and-select-next']").click()
    wait.until(lambda b: b.find_elements(By.CSS_SELECTOR, ".jp-OutputArea .stepping"))

    space = {}
    exec(CELL, space)
    start, model, x = space["trace"], copy.deepcopy(space["model"]), space["x"].copy()

    def read(css):  # in one go: the element may be replaced at any moment
        script = "return document.querySelector(arguments[0])?.textContent ?? ''"
        return browser.execute_script(script, f".stepping {css}")

    def agrees(trace, *letters, step="forward"):
        """The view shows this trace's loss and these arrays of its first layer."""
        wait.until(lambda _: same(read(".loss output") or "nan", trace.loss))
        arrays = getattr(trace, step)("0").arrays
        for letter in letters:
            cells = shown(browser, letter)
            assert cells, browser.execute_script(
                'return document.querySelector(".stepping").outerHTML.slice(-3000)'
            )
            for index, text in cells.items():
                assert same(text, arrays[letter][index]), (letter, index, text)

    def go(step):
        browser.execute_script(
            f"document.querySelectorAll('.stepping .rail button')[{int(step != 'forward')}].click()"
        )

    def set_number(letter, index, value):
        place = ",".join(map(str, index))
        browser.execute_script(
            f"document.querySelector('.stepping [data-letter={letter}] [data-index=\"{place}\"]').click()"
        )
        one(".stepping .edit input").send_keys(SELECT_ALL, str(value) + Keys.ENTER)

    agrees(start, "x", "w", "y")
    go("backward")
    agrees(start, "dw", "db", "dx", step="backward")
    before = shown(browser, "dw")
    go("forward")

    set_number("w", (1, 0, 2, 0), 0.75)
    model[0].weight[1, 0, 2, 0] = 0.75
    edited = m.trace(model, x, np.array([1]))
    agrees(edited, "w", "y")
    go("backward")
    agrees(edited, "dw", "db", "dx", step="backward")
    assert shown(browser, "dw") != before
    go("forward")

    # The arrow keys belong to the view, not to the notebook around it.
    browser.execute_script(
        "document.querySelector('.stepping [data-letter=w] [role=gridcell]').click()"
    )
    first = browser.switch_to.active_element
    place = first.get_attribute("data-index")
    first.send_keys(Keys.ARROW_RIGHT)
    assert browser.switch_to.active_element.get_attribute("data-index") == place[:-1] + "1"

    row, column = max(i[-2:] for i in shown(browser, "x"))
    set_number("x", (0, 0, row, column), -2)
    x[0, 0, row, column] = -2
    agrees(m.trace(model, x, np.array([1])), "x", "y")

    def option(name, value):
        one(f".stepping .{name}").send_keys(SELECT_ALL, str(value) + Keys.TAB)

    options = {"stride": 1, "padding": 0}
    for name, value in (("stride", 2), ("padding", 1)):
        option(name, value)
        options[name] = value
        other = m.Conv2d(1, 2, 3, **options, dtype="f8")
        other.load_state_dict(model[0].state_dict())
        changed = m.trace(m.Sequential(other, *model.layers[1:]), x, np.array([1]))
        agrees(changed, "x", "w", "y")
        message = read(".message")
        assert message.startswith("loss "), message

    one(".stepping .lr").send_keys(SELECT_ALL, "0.001")
    one(".stepping .sgd").click()
    gradients = [g for step in changed.steps for g in step.grads.values()]
    expected = -0.001 * sum(float((g**2).sum()) for g in gradients)
    wait.until(lambda _: "predicted" in read(".message"))
    number = r"(-?[\d.]+(?:e-?\d+)?)"
    actual, predicted = re.search(
        rf"changed by {number}, predicted .* = {number}$", read(".message")
    ).groups()
    assert same(predicted, expected)
    assert float(actual) == pytest.approx(expected, rel=0.05)
    stepped = copy.deepcopy(changed.model)
    for step in changed.steps:
        for letter, g in step.grads.items():
            layer = dict(stepped.modules())[step.name]
            layer.params[{"dw": "weight", "db": "bias"}[letter]] -= 0.001 * g
    agrees(m.trace(stepped, x, np.array([1])), "w", "y")

    option("stride", 0)
    wait.until(lambda _: "Not possible here" in read(".message"))
    one(".stepping .reset").click()
    agrees(start, "x", "w", "y")
    browser.get("about:blank")  # before the server goes
