"""How fast brain phantoms are made, and how close their numbers come to real cases.

python benchmarks/phantoms.py            # writes benchmarks/phantoms.md; minutes
MEDSEG_DATA_DIR=... python benchmarks/phantoms.py    # also measures the real BRATS 2013 cases found there
"""

from __future__ import annotations

import datetime
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from medseg_lite import paths, phantoms
from medseg_lite.files import read_case
from medseg_lite.volume import Case

CASES = 32
CLASSES = ("healthy", "necrosis", "oedema", "non-enhancing", "enhancing")
# Per cent of the crop in BRATS 2015 (Kayalibay et al. 2017, table 1), widened by what 32 cases can tell.
FREQUENCIES = ("about 96", "0.20 to 0.35", "2.2 to 2.4", "0.45 to 0.60", "0.50 to 0.70")
Z_SCORES = {("flair", 2): "1.9 to 2.7", ("t1c", 4): "1.6 to 4.8", ("t1c", 1): "-2.4 to -0.8"}
QUANTILES = (1, 5, 25, 50, 75, 95, 99)


def z_map(case: Case, channel: str) -> np.ndarray:
    values = case.image[case.channels.index(channel)]
    return (values - values[case.mask].mean()) / values[case.mask].std()


def seconds(repeats: int, **options) -> tuple[float, float]:
    """Least wall-clock and least processor time for one case: other work on the machine only adds to them."""
    wall, processor = np.inf, np.inf
    for repeat in range(repeats):
        start = time.perf_counter(), time.process_time()
        phantoms.brain(repeat % 4, **options)
        wall = min(wall, time.perf_counter() - start[0])
        processor = min(processor, time.process_time() - start[1])
    return wall, processor


def real_cases() -> list[Case]:
    """The BRATS 2013 cases in `$MEDSEG_DATA_DIR/brats2013_deepmedic`, if any."""
    folders = sorted(p.parent for p in paths.real_data("brats2013_deepmedic").glob("*/OTMultiClass.nii.gz"))
    return [
        read_case(
            {"flair": f / "Flair_subtrMeanDivStd.nii.gz", "t1c": f / "T1c_subtrMeanDivStd.nii.gz"},
            label=f / "OTMultiClass.nii.gz",
            mask=f / "brainmask.nii.gz",
        )
        for f in folders
    ]


def z_of_class(cases: list[Case], channel: str, label: int) -> np.ndarray:
    return np.array([z_map(c, channel)[c.label == label].mean() for c in cases if (c.label == label).sum() > 30])


def main() -> None:
    torch.set_num_threads(1)
    times = {
        "the first of a process, which also prepares the template": seconds(1),
        "default grid, 72×80×64 voxels of 2 mm": seconds(16),
        "the same, healthy": seconds(12, lesion=None),
        "the same, stroke (5 channels)": seconds(12, lesion="stroke"),
        "1.5 mm, 96×107×85 voxels": seconds(4, spacing=1.5),
        "full grid, 144×160×128 voxels of 1 mm": seconds(3, spacing=1.0),
    }
    cases = phantoms.brain_cohort(CASES, progress=True)
    real = real_cases()

    lines = [
        "# Brain phantoms",
        "",
        f"{datetime.date.today()}, {platform.machine()}, {os.cpu_count()} cores shared with other work, "
        f"Python {platform.python_version()}, NumPy {np.__version__}, torch {torch.__version__} on 1 thread; "
        f"about {os.getloadavg()[1]:.0f} processes wanted to run at the same time, so read processor time.",
        f"Made by `python benchmarks/phantoms.py`; cohort: seeds 0 to {CASES - 1}, sites A, B, C in turn, default grid.",
        "",
        "| one case, least of several | wall clock, s | processor, s |",
        "|---|---|---|",
        *(f"| {name} | {wall:.2f} | {processor:.2f} |" for name, (wall, processor) in times.items()),
        "",
        "| class | % of the crop | target |",
        "|---|---|---|",
    ]
    share = np.array([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in cases]) * 100
    lines += [
        f"| {name} | {s.mean():.2f} (standard error {s.std() / CASES**0.5:.2f}) | {target} |"
        for name, s, target in zip(CLASSES, share.T, FREQUENCIES)
    ]
    lines += [
        "",
        "Mean z-score inside the mask, over cases (least to greatest case). The targets come from the real files' "
        "own normalised values, whose deviation inside the mask is 1.3 to 1.75, not 1; standardised as here, real cases "
        "lie lower.",
        "",
        "| | phantoms | target | real, same measure |",
        "|---|---|---|---|",
    ]
    for (channel, label), target in Z_SCORES.items():
        cells = []
        for group in (cases, real):
            z = z_of_class(group, channel, label) if group else np.array([])
            cells.append(f"{z.mean():.2f} ({z.min():.2f} to {z.max():.2f})" if z.size else "not at hand")
        lines.append(f"| {channel.upper()} {CLASSES[label]} | {cells[0]} | {target} | {cells[1]} |")
    lines += [
        "",
        "Quantiles of the z-score in healthy brain tissue (mean over cases): how far cortex, fluid and vessels stand out.",
        "",
        "| | " + " | ".join(f"{q} %" for q in QUANTILES) + " |",
        "|---|" + "---|" * len(QUANTILES),
    ]
    for channel in ("flair", "t1c"):
        for name, group in (("phantoms", cases), ("real", real)):
            if group:
                q = np.mean([np.percentile(z_map(c, channel)[c.mask & (c.label == 0)], QUANTILES) for c in group], 0)
                lines.append(f"| {channel.upper()}, {len(group)} {name} | " + " | ".join(f"{v:.2f}" for v in q) + " |")
    text = "\n".join(lines) + "\n"
    with paths.atomic_write(Path(__file__).with_suffix(".md")) as path:
        path.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
