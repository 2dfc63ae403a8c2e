"""How fast the view of a trace answers, in headless Chromium.

    python benchmarks/stepping.py            # needs: pip install '.[browser]', Chromium, its driver

Traces the reference network with one digit, then visits every step and clicks into every map, and
into the im2col view; prints the time to the next picture and to the finite difference.
"""

import shutil
import tempfile
import time
from pathlib import Path

import numpy as np

import minicnn as mc

CLICKS = """
const done = arguments[0], out = [], long = [];
const frame = () => new Promise((r) => requestAnimationFrame(() => {
  const c = new MessageChannel(); c.port1.onmessage = r; c.port2.postMessage(0); }));
new PerformanceObserver((l) => l.getEntries().forEach((e) => long.push(e.duration))).observe({ type: 'longtask' });
const pending = () => document.querySelector('.numeric')?.textContent === '…';
async function timed(name, act) {
  await new Promise((r) => setTimeout(r, 120));
  const t = performance.now();
  act();
  await frame();
  const shown = performance.now() - t;
  while (pending()) await new Promise((r) => setTimeout(r, 1));
  out.push([name, shown, performance.now() - t]);
}
const middle = (css, root = document) => { const e = root.querySelectorAll(css); return e[e.length >> 1]; };
(async () => {
  for (let round = 0; round < 2; round++) {
    for (const button of document.querySelectorAll('.rail button')) {
      await timed(button.ariaLabel, () => button.click());
      for (const map of document.querySelectorAll('.map'))
        await timed(`${button.ariaLabel}, ${map.dataset.letter}`, () => middle('[role=gridcell]', map).click());
    }
    document.querySelector('.rail button').click();
    for (const css of ['.tool-im2col', '.image [role=gridcell]', '.matrix [role=gridcell]', '.product [role=gridcell]',
      '.one', '.all', '.assign', '.clear', '.tool-derive']) await timed(css, () => middle(css).click());
  }
  done([out, long]);
})();
"""


def main():
    from selenium import webdriver

    test = mc.data.load("digits", "test")
    began = time.perf_counter()
    trace = mc.trace(mc.models.mnist_cnn(rng=0), test.x[:1], test.y[:1])
    trace.explain("3", "dx", (0, 3, 4, 5))
    print(f"trace and explain {time.perf_counter() - began:.2f} s")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("chromium-browser")
    for argument in ("--headless=new", "--disable-gpu", "--window-size=1400,1000", "--no-sandbox"):
        options.add_argument(argument)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "trace.html"
        began = time.perf_counter()
        trace.to_html(page)
        print(f"page {page.stat().st_size / 1e6:.2f} MB, {time.perf_counter() - began:.2f} s")
        driver = webdriver.ChromeService(shutil.which("chromedriver"))
        browser = webdriver.Chrome(options=options, service=driver)
        browser.set_script_timeout(300)
        try:
            browser.get(page.as_uri())
            time.sleep(1)
            clicks, long = browser.execute_async_script(CLICKS)
        finally:
            browser.quit()
    for column, name in ((1, "next picture"), (2, "finite difference")):
        times = np.array([click[column] for click in clicks])
        slowest = clicks[int(times.argmax())][0]
        print(
            f"{len(clicks)} clicks, {name}: median {np.median(times):.0f} ms, "
            f"worst {times.max():.0f} ms ({slowest})"
        )
    print(f"tasks over 50 ms: {len(long)}")


if __name__ == "__main__":
    main()
