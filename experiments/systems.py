"""All the course's systems on one test set: the same patients to learn from, the same CPU seconds to learn in.

    OMP_NUM_THREADS=1 python experiments/systems.py [--systems forest deepmedic ...] [--seeds 0 ...]

Brain phantoms with gliomas (four sequences, 2 mm, five classes). Every system is trained on the patients 0 to 11, at the sites A, B
and C, and segments the patients 100 to 111 at these sites and 112 to 119 at site D, which no system has seen. The last eight are
segmented a second time, as scanned at A, B or C ("twin"): the same heads and tumours, so the difference is the scanner's.

Each has about BUDGET seconds of one CPU thread for its training: STEPS are what fits, measured once, so that a run can be repeated.
Where a system needs another one first (InputCascade, Mlynarski's A), the budget pays for both. An ensemble of three has three
budgets, and its row says so. Widths, batches and rates are what learns something in that time; nothing was tuned on
the test patients. The CRF's parameters are searched on the patients 50 to 53.

What is finished is not computed again: networks and probabilities are in runs/systems, scores in data/results/systems_scores.csv and
systems_runs.csv, written after each system and seed, which notebook 12 reads. Remove runs/systems to start over. Also writes
data/results/systems_labels.npz (four patients' segmentations) and experiments/systems.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from medseg_lite import (
    context,
    crf,
    inference,
    losses,
    metrics,
    models,
    optimizers,
    paths,
    phantoms,
    recipes,
    training,
    transforms,
)
from medseg_lite.ensembles import hierarchical_vote
from medseg_lite.forest import RandomForest
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.volume import Case, bounding_box

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "systems"
RESULTS = ROOT / "data" / "results"
SCORES, RUNTIMES, LABELS = (RESULTS / f"systems_{n}" for n in ("scores.csv", "runs.csv", "labels.npz"))

BUDGET = 120  # CPU seconds
TRAINING, CONFIGURATION = range(12), range(50, 54)
TEST = {"seen": range(100, 112), "unseen": range(112, 120), "twin": range(112, 120)}
CLASSES = 5
METRICS = ["dice", "precision", "sensitivity", "hausdorff95", "hausdorff", "assd"]
HALVINGS = (0.5, 0.7, 0.85, 0.95)
SHOWN = (101, 106, 113, 118)  # patients whose labels are kept for the notebook

# Updates that take about BUDGET seconds on one thread; those of a system with several parts together.
STEPS = {
    "two_path": (520, 260),
    "cascade_first": (260, 130),
    "cascade": (100, 50),
    "deepmedic": 460,
    "kayalibay": 400,
    "drozdzal": 720,
    "mlynarski_2d": 600,
    "mlynarski_3d": 515,
    "context_2d": 90,  # for each of three planes; then their scores of the training patients are computed
    "mlynarski_a": 215,
}


# ------------------------------------------------------------------------------------------------------------- data


def site(seed: int, kind: str) -> str:
    return "D" if kind == "unseen" else "ABC"[seed % 3]


@cache
def raw(seed: int, at: str) -> Case:
    return phantoms.brain(seed, site=at).replace(extra={})


@cache
def patient(seed: int, at: str) -> Case:
    return transforms.standardise(raw(seed, at))


def learning() -> list[Case]:
    return [patient(s, site(s, "seen")) for s in TRAINING]


def tests() -> list[tuple[str, int, str]]:
    """Set, patient and site of every test scan."""
    return [(kind, seed, site(seed, kind)) for kind, seeds in TEST.items() for seed in seeds]


# ---------------------------------------------------------------------------------------------------------- systems
#
# Each trains on `learning()` and returns the networks and what makes class probabilities `(5, D, H, W)` of a patient's scan.

Predict = Callable[[int, str], np.ndarray]
SETTINGS = {"classes": CLASSES, "progress": False}


def probabilities(model: nn.Module, case: Case) -> np.ndarray:
    return inference.predict(model, case, output="probabilities", progress=False)


def network(model: nn.Module) -> tuple[list[nn.Module], Predict]:
    return [model], lambda seed, at: probabilities(model, patient(seed, at))


def forest(seed: int) -> tuple[list[nn.Module], Predict]:
    """The paper's trees, on 4000 points a patient, a tenth of them tumour: about half of the budget, and more trees do not help."""
    trees = RandomForest(trees=50, jobs=1, seed=seed).fit(learning(), points_per_case=4000, balance=0.1)
    return [], lambda number, at: trees.predict(patient(number, at), progress=False)


def two_path(seed: int, *, steps: str = "two_path", name: str = "two_path_cnn", first: nn.Module | None = None):
    updates, updates2 = STEPS[steps]
    patches = 64 if first is None else 32  # a cascade's patches have four times the area
    return network(
        recipes.havaei(
            learning(),
            network=name,
            first=first,
            steps=updates,
            phase2_steps=updates2,
            width=0.2,
            init="he",
            learning_rate=1e-3,
            batch_size=patches,
            seed=seed,
            **SETTINGS,
        )
    )


def cascade(seed: int):
    (first,), _ = two_path(seed, steps="cascade_first")
    return two_path(seed, steps="cascade", name="input_cascade_cnn", first=first)


def deepmedic(seed: int):
    """Without dropout, which slows short runs; the same rate and penalties as the recipe."""
    torch.manual_seed(seed)
    model, steps = models.deepmedic(classes=CLASSES, width=0.3, dropout=0.0), STEPS["deepmedic"]
    sampler = SegmentSampler(learning(), margin=model.margin, cut=model.cut, seed=seed)
    optimizer = optimizers.RMSpropNesterov(model.parameters(), lr=1e-3, momentum=0.6)
    schedule = optimizers.HalveAt(optimizer, steps=[round(f * steps) for f in HALVINGS])
    training.fit(
        model, sampler, steps=steps, optimizer=optimizer, l1=1e-6, l2=1e-4, schedule=schedule, seed=seed, progress=False
    )
    return network(model)


def kayalibay(seed: int):
    """On crops of the standardised volumes, flipped left to right but not rotated."""
    torch.manual_seed(seed)
    model, steps = models.kayalibay_unet3d(classes=CLASSES, width=0.5), STEPS["kayalibay"]

    def flip(image, label, *, rng):
        return (image.flip(2), label.flip(1)) if rng.random() < 0.5 else (image, label)

    sampler = VolumeSampler(learning(), crop=(40, 48, 40), batch_size=1, augment=flip, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = optimizers.HalveAt(optimizer, steps=[round(f * steps) for f in HALVINGS])
    training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=losses.jaccard_distance,
        schedule=schedule,
        seed=seed,
        progress=False,
    )
    return network(model)


def drozdzal(seed: int):
    """On slices of raw intensities, as the scanner gave them."""
    cases = [raw(s, site(s, "seen")) for s in TRAINING]
    model = recipes.drozdzal(
        cases, steps=STEPS["drozdzal"], width=0.25, crop=64, batch_size=8, shear=0.1, angle=10, seed=seed, **SETTINGS
    )
    return [model], lambda number, at: probabilities(model, raw(number, at))


FLAT = {"width": 1 / 16, "output": 64, "batch_size": 8, "accumulate": 2, "window": 40}
SOLID = {"width": 1 / 4, "output": 16, "batch_size": 2, "accumulate": 2, "window": 30, "network": "mlynarski_3d"}


def mlynarski_2d(seed: int):
    return network(recipes.mlynarski(learning(), steps=STEPS["mlynarski_2d"], seed=seed, **FLAT, **SETTINGS))


def mlynarski_3d(seed: int):
    return network(recipes.mlynarski(learning(), steps=STEPS["mlynarski_3d"], seed=seed, **SOLID, **SETTINGS))


def mlynarski_a(seed: int):
    """Half of the budget for three 2D networks, half for the 3D network that takes their scores."""
    flat = {
        plane: recipes.mlynarski(
            [context.facing(c, plane) for c in learning()],
            steps=STEPS["context_2d"],
            flip=plane != "sagittal",
            seed=seed,
            **FLAT,
            **SETTINGS,
        )
        for plane in context.PLANES
    }
    folder = RUNS / f"scores_{seed}"

    def told(cases: Sequence[Case]) -> list[Case]:
        context.extract_scores(flat, cases, folder, progress=False)
        return [context.with_scores(c, folder) for c in cases]

    model = recipes.mlynarski(told(learning()), variant="a", steps=STEPS["mlynarski_a"], seed=seed, **SOLID, **SETTINGS)
    return [*flat.values(), model], lambda number, at: probabilities(model, *told([patient(number, at)]))


# In this order, so that an unfinished table is of use; the ensemble's other members and second seeds come last.
TRAINED = {
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
COMBINED = ("deepmedic_crf", "ensemble", "ensemble_crf", "average", "vote")
QUEUE = [*((name, 0) for name in TRAINED), ("deepmedic", 1), ("deepmedic", 2), ("kayalibay", 1), ("mlynarski_2d", 1)]


# ------------------------------------------------------------------------------------------------------------ results


def stored(path: Path) -> pd.DataFrame:
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["system", "seed"])


def done(system: str, seed: int) -> bool:
    return (RUNS / "rows" / f"{system}_{seed}_{RUNTIMES.name}").exists()


def keep(path: Path, rows: pd.DataFrame, system: str, seed: int) -> None:
    """Store a run's rows, and make the table anew from those of all runs (two processes may work on different ones)."""
    rows.insert(0, "system", system)
    rows.insert(1, "seed", seed)
    folder = RUNS / "rows"
    with paths.atomic_write(folder / f"{system}_{seed}_{path.name}") as temporary:
        rows.round(4).to_csv(temporary, index=False)
    order = {name: n for n, name in enumerate([*TRAINED, *COMBINED])}
    table = pd.concat([pd.read_csv(p) for p in sorted(folder.glob(f"[a-z]*_{path.name}"))])
    table = table.sort_values(["system", "seed"], key=lambda c: c.map(order) if c.name == "system" else c, kind="stable")
    with paths.atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


def score(found: np.ndarray, kind: str, seed: int, at: str) -> pd.DataFrame:
    case = patient(seed, at)
    rows = metrics.evaluate(found, case.label, spacing=case.spacing, metrics=METRICS)
    rows["case"] = case.name
    rows.insert(0, "set", kind)
    return rows


def file(system: str, seed: int, number: int, at: str) -> Path:
    return RUNS / "probabilities" / f"{system}_{seed}_{number}{at}.npy"


def of(system: str, seed: int, number: int, at: str) -> np.ndarray:
    """Stored probabilities `(5, D, H, W)`; background outside the mask."""
    case = patient(number, at)
    result = np.zeros((CLASSES, *case.shape), np.float32)
    result[0] = 1
    result[:, case.mask] = np.load(file(system, seed, number, at), allow_pickle=False)
    return result


def run(system: str, seed: int) -> None:
    """Train a system, segment everything, keep the rows."""
    if done(system, seed):
        return
    began = time.process_time()
    nets, predict = TRAINED[system](seed)
    trained = time.process_time() - began
    for i, net in enumerate(nets):
        models.save(RUNS / f"{system}_{seed}_{i}.safetensors", net, getattr(net, "card", {}))
    rows, clocks = [], []
    configuration = [("configuration", s, site(s, "seen")) for s in CONFIGURATION] * (system == "deepmedic")
    for kind, number, at in tests() + configuration:
        patient(number, at), raw(number, at)  # made before the clock runs
        clock = time.process_time()
        found = predict(number, at)
        clocks.append(time.process_time() - clock)
        with paths.atomic_write(file(system, seed, number, at)) as temporary, open(temporary, "wb") as target:
            np.save(target, found[:, patient(number, at).mask].astype(np.float16))
        if kind != "configuration":
            rows.append(score(found.argmax(0).astype(np.uint8), kind, number, at))
    table = pd.concat(rows)
    keep(SCORES, table, system, seed)
    parameters = sum(p.numel() for net in nets for p in net.parameters())
    note(system, seed, train_seconds=trained, seconds=np.median(clocks), parameters=parameters, budgets=1)
    says(system, seed, table, trained, np.median(clocks))


def note(system: str, seed: int, **columns) -> None:
    keep(RUNTIMES, pd.DataFrame([columns | {"date": str(datetime.date.today())}]), system, seed)


def says(system: str, seed: int, table: pd.DataFrame, trained: float, seconds: float) -> None:
    dice = table.groupby(["set", "region"], sort=False)["dice"].mean().unstack().round(3)
    print(f"{system} {seed}: {trained:.0f} s of training, {seconds:.1f} s a case\n{dice.to_string()}", flush=True)


# ------------------------------------------------------------------------------------------------------- combinations


@cache
def searched() -> crf.DenseCRF:
    """A CRF for tumour against the rest, its parameters searched on four patients that nothing else uses."""
    cases = [patient(s, site(s, "seen")).select(["flair", "t2"]) for s in CONFIGURATION]
    found = crf.search(
        cases, [of("deepmedic", 0, s, site(s, "seen")) for s in CONFIGURATION], trials=12, folder=RUNS, progress=False
    )
    print(found.table.round(3).to_string(), flush=True)
    return crf.DenseCRF(**found.best)


def with_crf(labels: Callable, number: int, at: str) -> np.ndarray:
    return crf.whole_tumour(searched(), labels(number, at), patient(number, at).select(["flair", "t2"]))


def mean_of(members: Sequence[tuple[str, int]], number: int, at: str) -> np.ndarray:
    return sum(of(*member, number, at) for member in members) / len(members)


def voted(members: Sequence[tuple[str, int]], number: int, at: str) -> np.ndarray:
    """The hierarchical vote has three kinds of tumour, as BRATS 2017: necrosis and non-enhancing core count as one."""
    one_core = np.array([0, 1, 2, 1, 4], np.uint8)
    return hierarchical_vote([one_core[of(*m, number, at).argmax(0)] for m in members], labels=(1, 2, 4))


def most_probable(mean: Callable, number: int, at: str) -> np.ndarray:
    return mean(number, at).argmax(0).astype(np.uint8)


def combine() -> None:
    """Everything that is made of finished systems; quick, so always from what is there now."""
    runs = stored(RUNTIMES)
    finished = [(s, 0) for s in TRAINED if done(s, 0)]
    trio = [("deepmedic", seed) for seed in range(3) if done("deepmedic", seed)]
    plans = {}
    if len(finished) > 2:
        plans["average"] = (partial(most_probable, partial(mean_of, finished)), finished)
        plans["vote"] = (partial(voted, finished), finished)
    if len(trio) == 3:
        plans["ensemble"] = (partial(most_probable, partial(mean_of, trio)), trio)
        plans["ensemble_crf"] = (partial(with_crf, partial(mean_of, trio)), trio)
    if done("deepmedic", 0):
        plans["deepmedic_crf"] = (partial(with_crf, partial(of, "deepmedic", 0)), [("deepmedic", 0)])
    for system, (labels, members) in plans.items():
        about = "+".join(f"{s}{k}" for s, k in members)
        if done(system, 0) and (runs[runs.system == system].members == about).all():
            continue
        if "crf" in system:
            searched()
        rows, clocks = [], []
        for kind, number, at in tests():
            patient(number, at)
            clock = time.process_time()
            found = labels(number, at)
            clocks.append(time.process_time() - clock)
            rows.append(score(found, kind, number, at))
            save_labels(system, number, at, found)
        table = pd.concat(rows)
        keep(SCORES, table, system, 0)
        parts = runs.set_index(["system", "seed"]).loc[members]
        seconds = parts.seconds.sum() + np.median(clocks)
        note(
            system,
            0,
            train_seconds=parts.train_seconds.sum(),
            seconds=seconds,
            parameters=int(parts.parameters.sum()),
            budgets=len(members),
            members=about,
        )
        says(system, 0, table, parts.train_seconds.sum(), seconds)


def save_labels(system: str, number: int, at: str, found: np.ndarray) -> None:
    path = RUNS / "labels" / f"{system}_{number}{at}.npy"
    with paths.atomic_write(path) as temporary, open(temporary, "wb") as target:
        np.save(target, found.astype(np.uint8))


def publish_labels() -> None:
    """Segmentations of a few patients for the notebook, cut to the tumours' box: `<patient>_<system>`, and where it begins."""
    arrays = {}
    for number in SHOWN:
        kind = "seen" if number < 112 else "unseen"
        at = site(number, kind)
        found = {s: of(s, 0, number, at).argmax(0).astype(np.uint8) for s in TRAINED if done(s, 0)}
        for path in sorted((RUNS / "labels").glob(f"*_{number}{at}.npy")):
            found[path.stem.rsplit("_", 1)[0]] = np.load(path, allow_pickle=False)
        if not found:
            return
        box = bounding_box(np.any([f > 0 for f in found.values()], axis=0))
        arrays[f"{number}_start"] = np.array([s.start for s in box], np.uint8)
        arrays |= {f"{number}_{name}": label[box] for name, label in found.items()}
    with paths.atomic_write(LABELS) as temporary, open(temporary, "wb") as target:
        np.savez_compressed(target, **arrays)


def report() -> None:
    runs, scores = stored(RUNTIMES), stored(SCORES)
    if not len(runs):
        return
    lines = [
        "# All systems on one test set",
        "",
        f"{datetime.date.today()}, {platform.machine()}, one thread of a shared machine, torch {torch.__version__}; seconds are of the CPU. "
        f"About {BUDGET} s of training each ({len(TRAINING)} patients, sites A, B, C; 2 mm, four sequences, five classes), reduced widths: "
        "short runs, far from what the networks can do. Dice in %, mean over the patients: 12 at the sites of the training (seen), "
        "8 at another one (unseen), and those 8 again at the seen sites (twin). HD95 and ASSD of the whole tumour in mm. The machine was "
        "busy: seconds scatter by half and more for the same updates; measured side by side, the U-Net's updates are a quarter over the budget. "
        "Systems without a row have not been run yet.",
        "",
    ]
    cells = [["system", "seed", "budgets", "training s", "s a case", "parameters"]]
    cells[0] += [f"{r} {s}" for s in TEST for r in ("whole", "core", "enhancing")] + ["HD95", "ASSD"]
    for row in runs.itertuples():
        mine = scores[(scores.system == row.system) & (scores.seed == row.seed)]
        dice = 100 * mine.groupby(["set", "region"]).dice.mean()
        far = mine[(mine.region == "whole") & (mine.set != "twin")]
        cells.append(
            [row.system, row.seed, row.budgets, round(row.train_seconds), round(row.seconds, 1), f"{row.parameters:,}"]
            + [round(dice[s, r], 1) for s in TEST for r in ("whole", "core", "enhancing")]
            + [round(far.hausdorff95.mean(), 1), round(far.assd.mean(), 2)]
        )
    cells.insert(1, ["---"] * len(cells[0]))
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in cells]
    lines += ["", "Repeat it: `OMP_NUM_THREADS=1 python experiments/systems.py`, which goes on where it was stopped."]
    with paths.atomic_write(Path(__file__).with_suffix(".md")) as path:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--systems", nargs="*", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for system, seed in QUEUE:
        if system in options.systems and seed in options.seeds:
            run(system, seed)
            report()
    if len(options.systems) == len(TRAINED):  # several processes share the work; the last call, for all, combines
        combine()
        publish_labels()
        report()


if __name__ == "__main__":
    main()
