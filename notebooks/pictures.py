"""Make the pictures of the README from a phantom and shipped networks. `make pictures` calls this script.

python notebooks/pictures.py                            # hero.webp, hero.png and the buttons
python notebooks/pictures.py --live build/site/live     # and a thumbnail of each live page there; needs a Chromium
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image
from scipy import ndimage

from medseg_lite import inference, models, phantoms, plotting, transforms
from medseg_lite.paths import atomic_write, shipped
from medseg_lite.volume import Case, bounding_box

FOLDER = Path(__file__).resolve().parent.parent / "data" / "pictures"
SIZE = (1800, 540)  # twice the size at which the README shows it
FRAMES = 32
PLANES = ("axial", "coronal", "sagittal")


def segment() -> tuple[Case, np.ndarray]:
    """Return a generated brain and the classes that the shipped network finds in it."""
    case = transforms.standardise(phantoms.brain(seed=104, site="B"))
    network = models.load(shipped("checkpoints", "deepmedic_phantoms.safetensors"))
    found = inference.predict(network, case, progress=False)
    box = bounding_box(case.mask, border=3)
    return case.crop(box), found[box]


def enlarge(array: np.ndarray, side: int, order: int) -> np.ndarray:
    """Return a slice scaled to fit a square, its aspect kept, with nothing around it."""
    zoomed = ndimage.zoom(array.astype(np.float32), side / max(array.shape), order=order, mode="nearest", grid_mode=True)
    around = [((side - n) // 2, side - n - (side - n) // 2) for n in zoomed.shape]
    return np.pad(zoomed, around)


def smooth(mask: np.ndarray, side: int) -> np.ndarray:
    """Return an enlarged mask with a smooth outline, 0 to 1."""
    return np.clip(4 * enlarge(ndimage.gaussian_filter(mask.astype(np.float32), 0.7), side, 1) - 1.5, 0, 1)


def draw_plane(case: Case, found: np.ndarray, plane: plotting.Plane, index: int, opacity: float, side: int) -> np.ndarray:
    """Return a slice as colours and opacity (side, side, 4): transparent outside the brain, classes with soft edges."""
    image = plotting.cut(case.image[case.channels.index("flair")], plane, index)
    black, white = plotting.default_window(case.image[case.channels.index("flair")], case.mask)
    grey = np.clip((enlarge(image, side, 3) - black) / (white - black), 0, 1)
    picture = np.repeat(0.08 + 0.92 * grey[..., None], 3, axis=2)
    classes = plotting.cut(found, plane, index)
    for k in range(1, len(case.info["classes"])):
        share = smooth(classes == k, side)[..., None] * opacity * 0.8
        picture = picture * (1 - share) + share * np.array(to_rgb(plotting.class_colour(k, case.info["classes"])))
    return np.dstack([picture, smooth(plotting.cut(case.mask, plane, index), side)])


def make_frames(case: Case, found: np.ndarray) -> list[Image.Image]:
    """Return the frames: each plane sweeps through the tumour and back, while the classes fade in."""
    core = bounding_box(ndimage.binary_opening(np.isin(found, (1, 3, 4))))
    frames = []
    for t in np.arange(FRAMES) / FRAMES:
        opacity = np.clip(2 - 4 * abs(t - 0.5), 0, 1)  # none at the beginning, whole in the middle half
        row = []
        for plane in map(plotting.find_plane, PLANES):
            first, last = core[plane.cut].start, core[plane.cut].stop - 1
            index = round((first + last) / 2 + 0.6 * (last - first) * np.sin(4 * np.pi * t))
            row.append(draw_plane(case, found, plane, index, float(opacity), SIZE[1]))
        gap = np.zeros((SIZE[1], (SIZE[0] - 3 * SIZE[1]) // 2, 4))
        frames.append(Image.fromarray((np.hstack([row[0], gap, row[1], gap, row[2]]) * 255).round().astype(np.uint8), "RGBA"))
    return frames


def make_hero() -> None:
    case, found = segment()
    frames = make_frames(case, found)
    with atomic_write(FOLDER / "hero.webp") as temporary:
        frames[0].save(
            temporary, save_all=True, append_images=frames[1:], duration=110, loop=0, quality=38, alpha_quality=60, method=4
        )
    still = frames[FRAMES // 2].quantize(192, method=Image.Quantize.FASTOCTREE)
    with atomic_write(FOLDER / "hero.png") as temporary:
        still.save(temporary, optimize=True)


BUTTONS = {"browser": "Try it in the browser", "colab": "Open in Colab", "notebook": "Read notebook 00", "lab": "make lab"}


def make_buttons() -> None:
    """Write the README's four buttons: white on blue (contrast 7.2), the same in light and dark mode."""
    for name, words in BUTTONS.items():
        font = "monospace" if name == "lab" else "sans-serif"
        button = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="200" height="40" role="img" aria-label="{words}">'
            f'<rect width="200" height="40" rx="8" fill="#0b57a4"/><text x="100" y="26" fill="#fff" font-family="{font}" '
            f'font-size="16" font-weight="600" text-anchor="middle">{words}</text></svg>\n'
        )
        (FOLDER / f"button_{name}.svg").write_text(button, encoding="utf-8")


def make_thumbnails(folder: Path) -> None:
    """Take a picture of each live page, at the size of a small window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 960, "height": 640}, device_scale_factor=1)
        for path in (folder / f"{name}.html" for name in ("slices", "compare", "kernel", "training")):
            page.goto(path.resolve().as_uri())
            page.wait_for_selector("[data-ready]")
            file = FOLDER / f"live_{path.stem}.png"
            page.screenshot(path=file)
            with Image.open(file) as picture:
                small = picture.convert("RGB").resize((480, 320), Image.Resampling.LANCZOS)
            file.unlink()
            small.save(file.with_suffix(".webp"), quality=80, method=6)
        browser.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--live", type=Path, help="folder of live pages")
    options = parser.parse_args()
    make_buttons()
    make_hero()
    if options.live:
        make_thumbnails(options.live)
    for path in sorted(FOLDER.iterdir()):
        print(f"{path.name}  {path.stat().st_size / 1000:.0f} kB")
