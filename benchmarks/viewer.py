"""The time that the slice viewer takes from a slider's movement to changed pixels, in Chromium.

    python benchmarks/viewer.py [--chromium /usr/bin/chromium] [--steps 40]

The exported page is measured, without a kernel: in a notebook the same code draws before it tells the kernel anything. A step
sets a slider as a user would (one `input` event) and reads a pixel back from the canvas, which waits for the drawing to be
done. "All planes" moves the crosshair along all three axes at once, as a click does, and reads from all three.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from _measure import fill, markdown, options
from playwright.sync_api import sync_playwright
from scipy import ndimage

from medseg_lite.volume import Case
from medseg_lite.widgets import SliceViewer

MEASURE = """
async ([plane, steps]) => {
  const slider = document.querySelector(`[data-plane=${plane}]`).closest("figure").querySelector("input");
  const canvas = document.querySelector(`[data-plane=${plane}] canvas`), context = canvas.getContext("2d"), times = [];
  const middle = Math.floor(slider.max / 2);
  for (let i = 0; i < steps; i++) {
    await new Promise(requestAnimationFrame);
    const start = performance.now();
    slider.value = middle + (i % 20) - 10;
    slider.dispatchEvent(new Event("input"));
    context.getImageData(canvas.width / 2, canvas.height / 2, 1, 1);
    times.push(performance.now() - start);
  }
  return times;
}
"""
CLICK = """
async (steps) => {
  const stage = document.querySelector("[data-plane=axial]"), r = stage.getBoundingClientRect(), times = [];
  const slider = stage.closest("figure").querySelector("input");
  const contexts = [...document.querySelectorAll("canvas")].map((c) => c.getContext("2d"));
  stage.setPointerCapture = () => {};
  for (let i = 0; i < steps; i++) {
    await new Promise(requestAnimationFrame);
    const at = 0.3 + 0.02 * (i % 20), start = performance.now();
    const place = { clientX: r.left + at * r.width, clientY: r.top + at * r.height, button: 0, buttons: 1 };
    stage.dispatchEvent(new PointerEvent("pointerdown", place));
    slider.value = slider.max * at;
    slider.dispatchEvent(new Event("input"));
    for (const context of contexts) context.getImageData(5, 5, 1, 1);
    times.push(performance.now() - start);
  }
  return times;
}
"""


def make_case(size: int) -> tuple[Case, np.ndarray]:
    """Return a noisy head with a four-class lesion, and a prediction that is a little off."""
    d, h, w = np.indices((size,) * 3) / size - 0.5
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(size,) * 3), 1)
    head = d**2 + h**2 + w**2 < 0.2
    image = head * (1 + 0.4 * np.sin(20 * d) * np.cos(25 * h) + 0.3 * noise)
    radius = np.sqrt((d + 0.1) ** 2 + (h - 0.1) ** 2 + w**2) + 0.04 * noise
    label = np.select([radius < 0.04, radius < 0.08, radius < 0.1, radius < 0.18], [1, 4, 3, 2], 0).astype(np.uint8)
    case = Case(image=image[None].astype(np.float32), channels=("flair",), name=f"{size} cubed", label=label)
    return case, np.roll(label, 2, axis=0)


def measure(browser, size: int, overlays: int, steps: int) -> list:
    case, prediction = make_case(size)
    start = time.perf_counter()
    viewer = SliceViewer(case, prediction) if overlays else SliceViewer(case.replace(label=None))
    created = time.perf_counter() - start
    start = time.perf_counter()
    viewer.snapshot()
    picture = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "viewer.html"
        viewer.to_html(path)
        page = browser.new_page(viewport={"width": 1000, "height": 800})
        page.goto(path.as_uri())
        page.wait_for_selector("[data-ready]")
        runs = [page.evaluate(MEASURE, [plane, steps]) for plane in ("axial", "coronal", "sagittal")]
        runs.append(page.evaluate(CLICK, steps))
        page.close()
    sent = sum(map(len, viewer._volumes)) + sum(len(layer["data"]) for layer in viewer._layers)
    cells = [f"{np.median(run):.1f} ({np.percentile(run, 90):.1f})" for run in runs]
    return [f"{size}³", overlays, *cells, f"{created:.2f} s", f"{sent / 1e6:.2f} MB", f"{1000 * picture:.0f} ms"]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--chromium", default="/usr/bin/chromium")
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=given.chromium, args=["--no-sandbox", "--disable-gpu"])
        rows = [measure(browser, size, overlays, given.steps) for size in (128, 256) for overlays in (0, 2)]
        about = f", Chromium {browser.version} headless without GPU"
        browser.close()
    columns = ["volume", "overlays", "axial", "coronal", "sagittal", "all planes", "created", "sent", "snapshot"]
    fill(__file__, given.results, about, {"milliseconds": markdown(pd.DataFrame(rows, columns=columns))})


if __name__ == "__main__":
    main()
