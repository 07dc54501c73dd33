"""The random forest: how fast its features are against SciPy's box filter, and what it takes and scores on phantoms.

    python benchmarks/forest.py [--jobs 2]

A feature is the difference of two box means of arbitrary size and place; the peer makes one box mean with
`scipy.ndimage.uniform_filter`, in turns with ours. The share of lesion points among the training points is chosen on validation
cases; scores are those of other cases. It takes minutes.
"""

from __future__ import annotations

import os
import platform
import time

import numpy as np
import pandas as pd
import scipy
import sklearn
from _measure import fill, markdown, options, take_turns
from scipy import ndimage

from medseg_lite import metrics, phantoms, transforms
from medseg_lite.forest import BoxFeatures, RandomForest
from medseg_lite.volume import Case

TRAINING, VALIDATION, TEST = range(0, 8), range(50, 56), range(100, 108)
BALANCES = (0.5, 0.25, 0.1, 0.05)
LIVE = {"trees": 20, "points_per_case": 1000}
PAPER = {"trees": 50, "points_per_case": 2000}
LETTER = {**LIVE, "count": 1000, "max_features": 200}  # each node draws its 200 from a large pool
SCORES = ("dice", "precision", "sensitivity")


def cases(seeds: range, lesion: str) -> list[Case]:
    made = [transforms.standardise(phantoms.brain(s, site="ABC"[s % 3], lesion=lesion)) for s in seeds]
    return [c.replace(label=(c.label > 0).astype(np.uint8)) for c in made]


def measure_features(spacing: float, count: int, repeats: int) -> list:
    case = transforms.standardise(phantoms.brain(100, lesion="contusions", spacing=spacing))
    drawn = [f for f in BoxFeatures(4, count=count).drawn if f.minus is not None]
    pairs = BoxFeatures(4, count=len(drawn))
    pairs.drawn = tuple(drawn)  # only differences of two boxes, the costliest kind
    functions = {
        "ours": lambda turn: [None for _ in pairs.volumes(case)],
        "SciPy": lambda turn: [ndimage.uniform_filter(c, 5) for c in case.image for _ in range(5)],
    }
    taken = take_turns(functions, repeats=repeats, warm_up=0)
    ours, peer = 1e3 * taken["ours"][:, 0] / len(drawn), 1e3 * taken["SciPy"][:, 0] / 20
    return ["×".join(map(str, case.shape)), f"{ours.min():.1f}", f"{peer.min():.1f}", f"{np.median(ours / peer):.2f}"]


def time_once(function):
    """Return what a call returns, its seconds by the clock and those of the processor."""
    wall, processor = time.perf_counter(), time.process_time()
    result = function()
    return result, time.perf_counter() - wall, time.process_time() - processor


def train(training: list[Case], balance: float, jobs: int, *, trees, points_per_case, count=200, max_features="sqrt"):
    forest = RandomForest(BoxFeatures(4, count=count), trees=trees, max_features=max_features, jobs=jobs)
    return time_once(lambda: forest.fit(training, points_per_case=points_per_case, balance=balance))


def score(forest: RandomForest, unseen: list[Case]):
    """Return `(cases, scores)`, and the least seconds a case, by the clock and of the processor."""
    results = [time_once(lambda case=case: forest.predict(case, progress=False)) for case in unseen]
    scores = [
        [getattr(metrics, name)(probabilities.argmax(0), case.label) for name in SCORES]
        for (probabilities, _, _), case in zip(results, unseen)
    ]
    return np.array(scores), min(r[1] for r in results), min(r[2] for r in results)


def measure_forest(name: str, training, unseen, balance: float, jobs: int, settings: dict) -> list:
    forest, wall, processor = train(training, balance, jobs, **settings)
    scores, each, each_processor = score(forest, unseen)
    cells = [f"{m:.2f} ({low:.2f} to {high:.2f})" for m, low, high in zip(scores.mean(0), scores.min(0), scores.max(0))]
    row = [name, str(balance), f"{wall:.1f} ({processor:.1f})", f"{each:.1f} ({each_processor:.1f})", *cells]
    print(*row, flush=True)
    return row


def measure_lesion(lesion: str, jobs: int) -> tuple[list, list, float]:
    """Choose the balance on validation cases, and score forests on test cases.

    Returns:
        The validation Dice of each balance, the rows of the forests, and the mean Dice of calling the whole brain lesion.
    """
    training, validation, unseen = (cases(seeds, lesion) for seeds in (TRAINING, VALIDATION, TEST))
    found = {b: score(train(training, b, jobs, **LIVE)[0], validation)[0][:, 0].mean() for b in BALANCES}
    best = max(found, key=found.get)
    forests = [("live", best, LIVE), ("live, equal shares", 0.5, LIVE), ("paper", best, PAPER)]
    if lesion == "contusions":
        forests += [("paper, equal shares", 0.5, PAPER), ("200 of 1000 a node", best, LETTER)]
    rows = [measure_forest(f"{lesion}, {name}", training, unseen, b, jobs, settings) for name, b, settings in forests]
    share = [c.label.sum() / c.mask.sum() for c in unseen]
    return [lesion, *found.values()], rows, float(np.mean([2 * s / (1 + s) for s in share]))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    given = parser.parse_args()
    speed = [measure_features(2.0, 200, 7), measure_features(1.0, 30, 5)]
    (contusions, rows, trivial), (glioma, more, trivial_glioma) = (
        measure_lesion(x, given.jobs) for x in ("contusions", "glioma")
    )
    about = (
        f", {os.cpu_count()} cores shared with other work, {given.jobs} threads, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"SciPy {scipy.__version__}, scikit-learn {sklearn.__version__}; about {os.getloadavg()[1]:.0f} processes wanted to run at the "
        "same time, so read processor time"
    )
    columns = ["forest", "balance", "training, s", "segmenting, s", "Dice", "precision", "sensitivity"]
    balances = ["mean validation Dice", *(f"balance {b}" for b in BALANCES)]
    blocks = {
        "features": markdown(
            pd.DataFrame(speed, columns=["voxels", "ours", "one `scipy.ndimage.uniform_filter`", "ours / SciPy's"])
        ),
        "balance": markdown(pd.DataFrame([contusions, glioma], columns=balances), 2),
        "forests": markdown(pd.DataFrame(rows + more, columns=columns)),
        "trivial": f"Calling the whole brain lesion would have a mean Dice of {trivial:.2f} on the contusions and {trivial_glioma:.2f} on "
        "the gliomas.",
    }
    fill(__file__, given.results, about, blocks)


if __name__ == "__main__":
    main()
