"""All the course's systems on one test set: the same patients to learn from, the same CPU seconds to learn in.

Brain phantoms with gliomas (four sequences, 2 mm, five classes). Every system is trained on the patients 0 to 11, at the sites A, B
and C, and segments the patients 100 to 111 at these sites and 112 to 119 at site D, which no system has seen. The last eight are
segmented a second time, as scanned at A, B or C ("twin"): the same heads and tumours, so the difference is the scanner's.

Each has about 120 seconds of one CPU thread for its training: UPDATES are what fits, measured once, so that a run can be repeated.
Where a system needs another one first (InputCascade, Mlynarski's A), the budget pays for both. An ensemble of three has three
budgets, and its row says so. Widths, batches and rates are what learns something in that time; nothing was tuned on the test
patients. The CRF's parameters are searched on the patients 50 to 53.

Networks and probabilities are kept in runs/systems: what combines systems is made from them. The tables are
data/results/systems_scores.csv and systems_runs.csv, and systems_labels.npz (four patients' segmentations), which notebook 15 reads,
and baselines.csv.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, flip, main, markdown

from medseg_lite import context, crf, inference, metrics, models, paths, phantoms, recipes, transforms
from medseg_lite.ensembles import hierarchical_vote
from medseg_lite.forest import RandomForest
from medseg_lite.models import Network
from medseg_lite.volume import Case, bounding_box

TRAINING, CONFIGURATION = range(12), range(50, 54)
TEST = {"seen": range(100, 112), "unseen": range(112, 120), "twin": range(112, 120)}
CLASSES = 5
METRICS = ["dice", "precision", "sensitivity", "hausdorff95", "hausdorff", "assd"]
SHOWN = (101, 106, 113, 118)  # patients whose labels are kept for the notebook
SETTINGS = {"share": 1.0}  # of the updates

# Updates that take about 120 seconds on one thread; those of a system with several parts together.
UPDATES = {
    "two_path": 520,
    "two_path, phase 2": 260,
    "cascade_first": 260,
    "cascade_first, phase 2": 130,
    "cascade": 100,
    "cascade, phase 2": 50,
    "deepmedic": 460,
    "kayalibay": 400,
    "drozdzal": 720,
    "mlynarski_2d": 600,
    "mlynarski_3d": 515,
    "context_2d": 90,  # for each of three planes; then their scores of the training patients are computed
    "mlynarski_a": 215,
}


def updates(name: str) -> int:
    return max(round(SETTINGS["share"] * UPDATES[name]), 1)


# ------------------------------------------------------------------------------------------------------------- data


def site(seed: int, kind: str = "seen") -> str:
    return "D" if kind == "unseen" else "ABC"[seed % 3]


@cache
def raw_patient(seed: int, at: str) -> Case:
    return phantoms.brain(seed, site=at).replace(extra={})


@cache
def patient(seed: int, at: str) -> Case:
    return transforms.standardise(raw_patient(seed, at))


@cache
def training_cases() -> list[Case]:
    return [patient(s, site(s)) for s in TRAINING]


def test_scans() -> list[tuple[str, int, str]]:
    """Return set, patient and site of every test scan."""
    return [(kind, seed, site(seed, kind)) for kind, seeds in TEST.items() for seed in seeds]


# ---------------------------------------------------------------------------------------------------------- systems
#
# Each trains on `training_cases()` and returns the networks, each with a function that returns the training cases as it sees them, and
# a function that makes class probabilities `(5, D, H, W)` of a patient's scan.

Networks = list[tuple[Network, Callable[[], Sequence[Case]]]]
Predict = Callable[[int, str], np.ndarray]
COMMON = {"classes": CLASSES, "progress": False}
HALVINGS = (0.5, 0.7, 0.85, 0.95)
FLAT = {"width": 1 / 16, "output": 64, "batch_size": 8, "accumulate": 2, "window": 40}
SOLID = {"width": 1 / 4, "output": 16, "batch_size": 2, "accumulate": 2, "window": 30, "network": "mlynarski_3d"}


def predict(model: Network, case: Case) -> np.ndarray:
    return inference.predict(model, case, output="probabilities", progress=False)


def wrap(model: Network) -> tuple[Networks, Predict]:
    return [(model, training_cases)], lambda seed, at: predict(model, patient(seed, at))


def forest(store: Store, seed: int) -> tuple[Networks, Predict]:
    """Fit the paper's trees on 4000 points a patient, a tenth of them tumour: half of the budget, and more trees do not help."""
    trees = RandomForest(trees=50, jobs=1, seed=seed).fit(training_cases(), points_per_case=4000, balance=0.1)
    return [], lambda number, at: trees.predict(patient(number, at), progress=False)


def train_havaei(seed: int, name: str, **options) -> Network:
    steps = {"steps": updates(name), "phase2_steps": updates(f"{name}, phase 2")}
    settings = {"width": 0.2, "init": "he", "learning_rate": 1e-3, "seed": seed}
    return recipes.havaei(training_cases(), **settings, **steps, **options, **COMMON)


def two_path(store: Store, seed: int):
    return wrap(train_havaei(seed, "two_path", batch_size=64))


def cascade(store: Store, seed: int):
    """Train both networks; the cascade's patches have four times the area, so it has half as many."""
    first = train_havaei(seed, "cascade_first", batch_size=64)
    return wrap(train_havaei(seed, "cascade", network="input_cascade_cnn", first=first, batch_size=32))


def deepmedic(store: Store, seed: int):
    """Train without dropout, which slows short runs."""
    options = {"width": 0.3, "dropout": 0.0, "halvings": HALVINGS}
    return wrap(recipes.deepmedic(training_cases(), steps=updates("deepmedic"), seed=seed, **options, **COMMON))


def kayalibay(store: Store, seed: int):
    """Train on crops of the standardised volumes, flipped left to right but not rotated."""
    options = {"width": 0.5, "crop": (40, 48, 40), "augment": flip, "learning_rate": 1e-2, "halvings": HALVINGS}
    return wrap(recipes.kayalibay(training_cases(), steps=updates("kayalibay"), seed=seed, **options, **COMMON))


def drozdzal(store: Store, seed: int):
    """Train on slices of raw intensities, as the scanner gave them."""
    cases = [raw_patient(s, site(s)) for s in TRAINING]
    options = {"width": 0.25, "crop": 64, "batch_size": 8, "shear": 0.1, "angle": 10}
    model = recipes.drozdzal(cases, steps=updates("drozdzal"), seed=seed, **options, **COMMON)
    return [(model, lambda: cases)], lambda number, at: predict(model, raw_patient(number, at))


def mlynarski_2d(store: Store, seed: int):
    return wrap(recipes.mlynarski(training_cases(), steps=updates("mlynarski_2d"), seed=seed, **FLAT, **COMMON))


def mlynarski_3d(store: Store, seed: int):
    return wrap(recipes.mlynarski(training_cases(), steps=updates("mlynarski_3d"), seed=seed, **SOLID, **COMMON))


def mlynarski_a(store: Store, seed: int):
    """Spend half of the budget on three 2D networks, half on the 3D network that takes their scores."""
    flat, folder = {}, store.runs / f"scores_{seed}"
    for plane in context.PLANES:
        options = {"steps": updates("context_2d"), "flip": plane != "sagittal", "seed": seed}
        flat[plane] = recipes.mlynarski([context.facing(c, plane) for c in training_cases()], **options, **FLAT, **COMMON)

    def add_scores(cases: Sequence[Case]) -> list[Case]:
        context.extract_scores(flat, cases, folder, progress=False)
        return [context.with_scores(c, folder) for c in cases]

    options = {"variant": "a", "steps": updates("mlynarski_a"), "seed": seed}
    model = recipes.mlynarski(add_scores(training_cases()), **options, **SOLID, **COMMON)
    networks = [(net, lambda plane=plane: [context.facing(c, plane) for c in training_cases()]) for plane, net in flat.items()]
    networks.append((model, lambda: add_scores(training_cases())))
    return networks, lambda number, at: predict(model, *add_scores([patient(number, at)]))


# In this order, so that an unfinished table is of use; the ensemble's other members and second seeds come last.
SYSTEMS = {
    "forest": forest,
    "deepmedic": deepmedic,
    "kayalibay": kayalibay,
    "mlynarski_2d": mlynarski_2d,
    "two_path": two_path,
    "drozdzal": drozdzal,
    "mlynarski_3d": mlynarski_3d,
    "mlynarski_a": mlynarski_a,
    "cascade": cascade,
}
QUEUE = [*((name, 0) for name in SYSTEMS), ("deepmedic", 1), ("deepmedic", 2), ("kayalibay", 1), ("mlynarski_2d", 1)]


# ------------------------------------------------------------------------------------------------------------ results


def probabilities_file(store: Store, name: str, seed: int, number: int, at: str) -> Path:
    return store.runs / "probabilities" / f"{name}_{seed}_{number}{at}.npy"


def load_probabilities(store: Store, name: str, seed: int, number: int, at: str) -> np.ndarray:
    """Return stored probabilities `(5, D, H, W)`; background outside the mask."""
    case = patient(number, at)
    result = np.zeros((CLASSES, *case.shape), np.float32)
    result[0] = 1
    result[:, case.mask] = np.load(probabilities_file(store, name, seed, number, at), allow_pickle=False)
    return result


def segment_all(label: Callable[[int, str], np.ndarray]) -> tuple[list[dict], float, dict[int, np.ndarray]]:
    """Segment all test scans with a function; return the scores, the median CPU seconds, and the labels for the notebook."""
    rows, clocks, shown = [], [], {}
    for kind, number, at in test_scans():
        case = patient(number, at)  # made before the clock runs
        clock = time.process_time()
        found = label(number, at)
        clocks.append(time.process_time() - clock)
        table = metrics.evaluate(found, case.label, spacing=case.spacing, metrics=METRICS, case=case.name)
        rows += table.assign(set=kind)[["set", "case", "region", *METRICS]].to_dict("records")
        if number in SHOWN and kind != "twin":
            shown[number] = found
    return rows, float(np.median(clocks)), shown


def merge_labels(store: Store, name: str, shown: dict[int, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the labels that the notebook shows, with those of one more system.

    The labels of a patient, `<patient>_<system>`, are cut to the box of all systems' tumours, which begins at `<patient>_start`.
    """
    path, arrays = store.path("systems_labels.npz"), {}
    if path.exists():
        with np.load(path, allow_pickle=False) as stored:
            arrays = dict(stored)
    for number, label in shown.items():
        start, labels = arrays.pop(f"{number}_start", None), {}
        for key in [key for key in arrays if key.startswith(f"{number}_")]:
            labels[key], part = np.zeros_like(label), arrays[key]
            labels[key][tuple(slice(a, a + n) for a, n in zip(start, part.shape))] = part
        labels[f"{number}_{name}"] = label
        found = np.any([array > 0 for array in labels.values()], axis=0)
        box = bounding_box(found if found.any() else ~found)
        arrays |= {key: array[box] for key, array in labels.items()}
        arrays[f"{number}_start"] = np.array([s.start for s in box], np.uint8)
    return arrays


def collect_tables(store: Store, name: str, seed: int, segmented: tuple, **columns) -> dict:
    """Return a finished system's rows of all tables."""
    rows, seconds, shown = segmented
    columns["seconds"] += seconds
    found = {"systems_scores": rows, "systems_runs": [columns | {"date": date.today()}]}
    return found | ({"systems_labels.npz": merge_labels(store, name, shown)} if seed == 0 else {})


def run(store: Store, name: str, seed: int) -> dict:
    """Train a system, segment everything, and keep the probabilities."""
    clock = time.process_time()
    networks, probabilities = SYSTEMS[name](store, seed)
    trained = time.process_time() - clock
    for i, (network, see) in enumerate(networks):
        models.save(store.runs / f"{name}_{seed}_{i}.safetensors", network, network.card)
        store.examine(f"{name}, {seed}, {i}", network, see())

    def label(number: int, at: str) -> np.ndarray:
        found = probabilities(number, at)
        with paths.atomic_write(probabilities_file(store, name, seed, number, at)) as temporary:
            np.save(temporary, found[:, patient(number, at).mask].astype(np.float16))
        return found.argmax(0).astype(np.uint8)

    for number in CONFIGURATION if name == "deepmedic" else ():
        label(number, site(number))
    parameters = sum(p.numel() for network, _ in networks for p in network.parameters())
    about = {"train_seconds": trained, "seconds": 0.0, "parameters": parameters, "budgets": 1}
    return collect_tables(store, name, seed, segment_all(label), **about)


# ------------------------------------------------------------------------------------------------------- combinations


@cache
def search_crf(store: Store) -> crf.DenseCRF:
    """Return a CRF for tumour against the rest, its parameters searched on four patients that nothing else uses."""
    cases = [patient(s, site(s)).select(["flair", "t2"]) for s in CONFIGURATION]
    probabilities = [load_probabilities(store, "deepmedic", 0, s, site(s)) for s in CONFIGURATION]
    found = crf.search(cases, probabilities, trials=12, folder=store.runs, progress=False)
    return crf.DenseCRF(**found.best)


def vote(labels: Sequence[np.ndarray]) -> np.ndarray:
    """Vote over three kinds of tumour, as in BRATS 2017: necrosis and non-enhancing core count as one."""
    one_core = np.array([0, 1, 2, 1, 4], np.uint8)
    return hierarchical_vote([one_core[label] for label in labels], labels=(1, 2, 4))


def combine(store: Store, name: str, members: Sequence[tuple[str, int]], number: int, at: str) -> np.ndarray:
    """Return the labels that several systems' stored probabilities give together."""
    probabilities = [load_probabilities(store, *member, number, at) for member in members]
    if name == "vote":
        return vote([p.argmax(0) for p in probabilities])
    mean = sum(probabilities) / len(members)
    if "crf" in name:
        return crf.whole_tumour(search_crf(store), mean, patient(number, at).select(["flair", "t2"]))
    return mean.argmax(0).astype(np.uint8)


COMBINED = {
    "deepmedic_crf": [("deepmedic", 0)],
    "ensemble": [("deepmedic", seed) for seed in range(3)],
    "ensemble_crf": [("deepmedic", seed) for seed in range(3)],
    "average": None,  # of all systems that are stored
    "vote": None,
}


def run_combined(store: Store, name: str) -> dict:
    runs = store.read("systems_runs")
    parts = runs.set_index(["system", "seed"]) if len(runs) else runs
    members = COMBINED[name] or [(system, 0) for system in SYSTEMS if (system, 0) in parts.index]
    _, number, at = test_scans()[-1]  # the scan that a system segments last
    missing = [
        f"{s} {k}" for s, k in members if (s, k) not in parts.index or not probabilities_file(store, s, k, number, at).exists()
    ]
    if missing or not members:
        raise SystemExit(
            f"{name} is made of probabilities in {store.runs}, and those of {', '.join(missing) or 'any system'} are not there: "
            "make these systems first, with --only and --seeds, and --again where their rows are stored"
        )
    if "crf" in name:
        search_crf(store)  # before the clock runs
    parts = parts.loc[members]
    about = {"train_seconds": parts.train_seconds.sum(), "seconds": parts.seconds.sum(), "parameters": parts.parameters.sum()}
    about |= {"budgets": len(members), "members": "+".join(f"{s}{k}" for s, k in members)}
    return collect_tables(store, name, 0, segment_all(partial(combine, store, name, members)), **about)


# ------------------------------------------------------------------------------------------------------------- report


def run_baselines() -> list[dict]:
    """Score the methods without learning; the names of the scores end with the set of patients."""
    test = {patient(number, at).name: (kind, patient(number, at)) for kind, number, at in test_scans()}
    cases = training_cases()
    regions = {f"dice_{region}": labels for region, labels in metrics.regions["brats2015"].items()}
    rows = baseline_rows(cases, cases, [case for _, case in test.values()], regions)
    return [{f"{name}_{test[row['case']][0]}" if name in regions else name: v for name, v in row.items()} for row in rows]


def plan(store: Store, seeds) -> list[Row]:
    def row(name: str, seed: int, run, minutes: float, part: str) -> Row:
        return Row("systems_runs", {"system": name, "seed": seed}, run, minutes, part)

    queue = QUEUE if seeds is None else [(name, seed) for seed in seeds for name in SYSTEMS]
    rows = [row(name, seed, partial(run, store, name, seed), 3, "trained") for name, seed in queue]
    combined = COMBINED if not seeds or 0 in seeds else ()
    rows += [row(name, 0, partial(run_combined, store, name), 2, "combined") for name in combined]
    return [*rows, baselines_row(store, "brains", run_baselines, 0.8)]


def report(store: Store) -> dict[str, str]:
    runs, scores, cells = store.read("systems_runs"), store.read("systems_scores"), []
    if runs.empty:
        return {}
    order = {name: n for n, name in enumerate([*SYSTEMS, *COMBINED])}
    for row in runs.sort_values(["system", "seed"], key=lambda c: c.map(order) if c.name == "system" else c).itertuples():
        mine = scores[(scores.system == row.system) & (scores.seed == row.seed)]
        dice = 100 * mine.groupby(["set", "region"]).dice.mean()
        far = mine[(mine.region == "whole") & (mine.set != "twin")]
        cells.append(
            [row.system, row.seed, row.budgets, f"{row.train_seconds:.0f}", row.seconds, f"{row.parameters:,}"]
            + [dice[s, r] for s in TEST for r in ("whole", "core", "enhancing")]
            + [far.hausdorff95.mean(), f"{far.assd.mean():.2f}"]
        )
    columns = ["system", "seed", "budgets", "training s", "s a case", "parameters"]
    columns += [f"{r} {s}" for s in TEST for r in ("whole", "core", "enhancing")] + ["HD95", "ASSD"]
    named = scores.assign(score="dice_" + scores["region"] + "_" + scores["set"])
    means = named.pivot_table(index="system", columns="score", values="dice", sort=False)
    return {"systems": markdown(pd.DataFrame(cells, columns=columns), 1)} | beside_baselines(store, {"brains": means})


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
