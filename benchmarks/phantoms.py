"""Brain phantoms: how fast they are made, and how close their numbers come to real cases.

    python benchmarks/phantoms.py                        # minutes
    MEDSEG_DATA_DIR=... python benchmarks/phantoms.py    # also measures the real BRATS 2013 cases found there

The cohort has the seeds 0 to 31, sites A, B, C in turn, on the default grid.
"""

from __future__ import annotations

import os
import platform

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options, take_turns

from medseg_lite import paths, phantoms
from medseg_lite.files import read_case
from medseg_lite.volume import Case

CASES = 32
CLASSES = ("healthy", "necrosis", "oedema", "non-enhancing", "enhancing")
# Per cent of the crop in BRATS 2015 (Kayalibay et al. 2017, table 1), widened by what 32 cases can tell.
FREQUENCIES = ("about 96", "0.20 to 0.35", "2.2 to 2.4", "0.45 to 0.60", "0.50 to 0.70")
Z_SCORES = {("flair", 2): "1.9 to 2.7", ("t1c", 4): "1.6 to 4.8", ("t1c", 1): "-2.4 to -0.8"}
QUANTILES = (1, 5, 25, 50, 75, 95, 99)
KINDS = {  # repeats, and options of the phantom
    "the first of a process, which also prepares the template": (1, {}),
    "default grid, 72×80×64 voxels of 2 mm": (16, {}),
    "the same, healthy": (12, {"lesion": None}),
    "the same, stroke (5 channels)": (12, {"lesion": "stroke"}),
    "1.5 mm, 96×107×85 voxels": (4, {"spacing": 1.5}),
    "full grid, 144×160×128 voxels of 1 mm": (3, {"spacing": 1.0}),
}


def normalise(case: Case, channel: str) -> np.ndarray:
    """Return the z-scores of a channel."""
    values = case.image[case.channels.index(channel)]
    return (values - values[case.mask].mean()) / values[case.mask].std()


def real_cases() -> list[Case]:
    """Return the BRATS 2013 cases in `$MEDSEG_DATA_DIR/brats2013_deepmedic`, if there are any."""
    folders = sorted(p.parent for p in paths.real_data("brats2013_deepmedic").glob("*/OTMultiClass.nii.gz"))
    return [
        read_case(
            {"flair": f / "Flair_subtrMeanDivStd.nii.gz", "t1c": f / "T1c_subtrMeanDivStd.nii.gz"},
            label=f / "OTMultiClass.nii.gz",
            mask=f / "brainmask.nii.gz",
        )
        for f in folders
    ]


def measure_speed() -> pd.DataFrame:
    """Return the least seconds of a case, by the clock and of the processor: other work on the machine only adds to them."""
    rows = []
    for kind, (repeats, settings) in KINDS.items():
        taken = take_turns(
            {"": lambda turn, settings=settings: phantoms.brain(turn % 4, **settings)}, repeats=repeats, warm_up=0
        )
        rows.append([kind, *taken[""].min(0)])
    return pd.DataFrame(rows, columns=["one case, least of several", "wall clock, s", "processor, s"])


def measure_shares(cases: list[Case]) -> pd.DataFrame:
    share = np.array([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in cases]) * 100
    rows = [
        [name, f"{s.mean():.2f} (standard error {s.std() / CASES**0.5:.2f})", target]
        for name, s, target in zip(CLASSES, share.T, FREQUENCIES)
    ]
    return pd.DataFrame(rows, columns=["class", "% of the crop", "target"])


def measure_z_scores(cases: list[Case], real: list[Case]) -> pd.DataFrame:
    rows = []
    for (channel, label), target in Z_SCORES.items():
        cells = []
        for group in (cases, real):
            z = np.array([normalise(c, channel)[c.label == label].mean() for c in group if (c.label == label).sum() > 30])
            cells.append(f"{z.mean():.2f} ({z.min():.2f} to {z.max():.2f})" if z.size else "not at hand")
        rows.append([f"{channel.upper()} {CLASSES[label]}", cells[0], target, cells[1]])
    return pd.DataFrame(rows, columns=["z-score", "phantoms", "target", "real, same measure"])


def measure_quantiles(cases: list[Case], real: list[Case]) -> pd.DataFrame:
    rows = []
    for channel in ("flair", "t1c"):
        for name, group in (("phantoms", cases), ("real", real)):
            if group:
                q = [np.percentile(normalise(c, channel)[c.mask & (c.label == 0)], QUANTILES) for c in group]
                rows.append([f"{channel.upper()}, {len(group)} {name}", *np.mean(q, 0)])
    return pd.DataFrame(rows, columns=["healthy tissue", *(f"{q} %" for q in QUANTILES)])


def main() -> None:
    given = options(__doc__).parse_args()
    torch.set_num_threads(1)
    blocks = {"speed": markdown(measure_speed(), 2)}
    cases, real = phantoms.brain_cohort(CASES, progress=True), real_cases()
    blocks |= {
        "shares": markdown(measure_shares(cases)),
        "z-scores": markdown(measure_z_scores(cases, real)),
        "quantiles": markdown(measure_quantiles(cases, real), 2),
    }
    about = (
        f", {os.cpu_count()} cores shared with other work, Python {platform.python_version()}, NumPy {np.__version__}; "
        f"about {os.getloadavg()[1]:.0f} processes wanted to run at the same time, so read processor time"
    )
    fill(__file__, given.results, about, blocks)


if __name__ == "__main__":
    main()
