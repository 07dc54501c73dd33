"""DeepMedic's own analysis on phantoms: the networks of each experiment of its paper, trained alike.

    OMP_NUM_THREADS=1 python experiments/deepmedic_analysis.py [--only 3.3 3.4 4 3.5 "4, contusions"]

Trains and scores, in short runs at reduced width: the deeper networks of section 3.3; the two scales of section 3.4; five-fold
cross-validation, an ensemble of three and the random forest as in section 4.1; the 2D networks of section 3.5, on isotropic
images and on slices of 5 mm. The task is glioma against the rest: binary, as in the paper's experiments on brain injury.

Every training is kept in runs/deepmedic_analysis and goes on where it stopped; every finished run's rows are written at once to
data/results/deepmedic_curves.csv and deepmedic_scores.csv, which notebook 04 reads, and are not computed again. Remove
these to start over. Takes about half an hour on one quiet CPU core and writes
experiments/deepmedic_analysis.md.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import nn

from medseg_lite import inference, metrics, models, optimizers, paths, phantoms, statistics, training, transforms
from medseg_lite.ensembles import Ensemble
from medseg_lite.forest import RandomForest
from medseg_lite.models.layers import init_normal
from medseg_lite.sampling import SegmentSampler
from medseg_lite.volume import Case

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "deepmedic_analysis"
RESULTS = ROOT / "data" / "results"
CURVES, SCORES = RESULTS / "deepmedic_curves.csv", RESULTS / "deepmedic_scores.csv"

WIDTH = 0.3  # share of the paper's feature maps
TRAINING, VALIDATION = range(0, 16), range(100, 106)  # seeds of the phantoms of section 3
SUBJECTS, FOLDS, MEMBERS = 20, 5, 3  # of section 4
STEPS = {"3.3": 220, "3.4": 220, "4": 160, "3.5": 80, "4, contusions": 1000}
HALVINGS = (0.5, 0.7, 0.85, 0.95)
BATCH = {"dm2d_seg": 250, "deeper2d_seg": 100, "wider2d_seg": 100, "large2d_seg": 100, "dm2d_patch": 540}  # Table B.1
FLAT = tuple(BATCH)
WITHOUT_HIDDEN = ("shallow", "shallow_plus", "deep", "deep_plus")  # and so without dropout
DROPOUT = "deepmedic, dropout"  # half of 45 hidden maps dropped: too slow for runs this short, so the others have none
BALANCE = 0.1  # tumour among the forest's training points, chosen on other phantoms in forest.md


# ------------------------------------------------------------------------------------------------------------- data


@cache
def patient(seed: int, slices: str = "isotropic") -> Case:
    """A standardised phantom with one binary label."""
    case = phantoms.brain(seed, site="ABC"[seed % 3])
    if slices == "5 mm":
        case = thick_slices(case)
    case = transforms.standardise(case)
    return case.replace(label=(case.label > 0).astype(np.uint8))


def thick_slices(case: Case, *, mm: float = 5.0, isotropic: Sequence[str] = ("t1",)) -> Case:
    """The case as if all channels but some had been scanned in thick axial slices, back on its own grid.

    Each slice is the mean over its thickness, inside the mask; between the middles of slices values are linear. The label keeps
    its resolution. In the paper's data, one of the sequences is isotropic and the others have slices of 5 mm.
    """
    n, step = case.shape[2], case.spacing[2]
    border = np.arange(n + 1) * step
    first = np.arange(0, n * step, mm)
    inside = np.minimum(border[1:], first[:, None] + mm) - np.maximum(border[:-1], first[:, None])
    average = np.clip(inside, 0, None)  # (slices, n): mm of each voxel in each slice
    back = np.stack([np.interp((border[1:] + border[:-1]) / 2, first + mm / 2, row) for row in np.eye(len(first))])
    weight = (case.mask @ average.T) @ back
    image = case.image.copy()
    for c, name in enumerate(case.channels):
        if name not in isotropic:
            blurred = ((case.image[c] * case.mask) @ average.T) @ back
            image[c] = np.where(case.mask, blurred / np.maximum(weight, 1e-6), 0)
    return case.replace(image=image)


# --------------------------------------------------------------------------------------------------------- training


def build(network: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    network, _, half = network.partition(", ")
    options = {} if half or network in WITHOUT_HIDDEN else {"dropout": 0.0}
    model = getattr(models, network)(in_channels=4, classes=2, width=WIDTH, **options)
    if network in ("shallow", "deep"):
        # A narrow network has fewer inputs a neuron; this keeps their number times the variance at the paper's value.
        init_normal(model, std=0.01 / WIDTH**0.5)
    return model


def train(
    name: str, network: str, cases: Sequence[Case], *, steps: int, seed: int = 0, validation: Sequence[Case] = ()
) -> tuple[nn.Module, pd.DataFrame]:
    """One network with the settings of appendix B, except for the rate of Shallow and Deep: all have the same."""
    model, patch, flat = build(network, seed), network == "dm2d_patch", network in FLAT
    sampler = SegmentSampler(
        cases,
        output=1 if patch else 9,
        margin=model.margin,
        cut=model.cut,
        batch_size=BATCH.get(network, 10),
        spatial_dims=model.spatial_dims,
        seed=seed,
    )
    optimizer = optimizers.RMSpropNesterov(model.parameters(), lr=1e-2 if patch else 1e-3, momentum=0.9 if patch else 0.6)
    history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        l1=1e-8 if flat else 1e-6,
        l2=1e-6 if flat else 1e-4,
        schedule=optimizers.HalveAt(optimizer, steps=[round(h * steps) for h in HALVINGS]),
        validate=(lambda m: watch(m, validation)) if validation else None,
        validate_every=steps // 5,
        folder=RUNS / name,
        seed=seed,
        progress=False,
    )
    return model.eval(), history


def watch(model: nn.Module, cases: Sequence[Case]) -> dict[str, float]:
    """Accuracy, sensitivity and specificity among all brain voxels, and the mean Dice of the segmentations."""
    found = [inference.predict(model, c, progress=False) for c in cases]
    p, t = (np.concatenate([a[c.mask] for a, c in zip(arrays, cases)]) for arrays in (found, [c.label for c in cases]))
    return {
        "dice": float(np.mean([metrics.dice(f, c.label) for f, c in zip(found, cases)])),
        "accuracy": float(np.mean(p == t)),
        "sensitivity": metrics.sensitivity(p, t),
        "specificity": metrics.specificity(p, t),
    }


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    """Table 1's columns, volumes, and in numbers what Figure 9 shows: what is found far from the lesion and deep in it."""
    truth, ml = case.label > 0, np.prod(case.spacing) / 1000
    found = found > 0
    inside = ndimage.distance_transform_edt(truth, sampling=case.spacing) > 8
    away = ndimage.distance_transform_edt(~truth, sampling=case.spacing) > 8
    pieces, count = ndimage.label(found)
    touching = np.unique(pieces[truth & found])
    return {
        "dice": metrics.dice(found, truth),
        "precision": metrics.precision(found, truth),
        "sensitivity": metrics.sensitivity(found, truth),
        "assd": metrics.assd(found, truth, spacing=case.spacing),
        "hausdorff": metrics.hausdorff(found, truth, spacing=case.spacing),
        "true_ml": truth.sum() * ml,
        "found_ml": found.sum() * ml,
        "false_islands": count - len(touching),
        "false_far_ml": (found & away).sum() * ml,
        "deep_found": found[inside].mean() if inside.any() else np.nan,
    }


# -------------------------------------------------------------------------------------------------------- experiments


def stored(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype={"section": str}) if path.exists() else pd.DataFrame(columns=["run"])


def keep(path: Path, rows: pd.DataFrame, **columns) -> None:
    """Put a finished run's rows into a table in the place of any that it had."""
    for n, (name, value) in enumerate(columns.items()):
        rows.insert(n, name, value)
    table = stored(path)
    table = pd.concat([table[table.run != columns["run"]], rows]) if len(table) else rows
    with paths.atomic_write(path) as temporary:
        table.round(4).to_csv(temporary, index=False)


def learn(section: str, network: str, *, slices: str = "isotropic", seed: int = 0) -> None:
    """Section 3: train on sixteen cases, watch and score on six others."""
    name = f"{section} {network} {slices} {seed}".replace(", ", "_").replace(" ", "-")
    if (stored(SCORES).run == name).any():
        return
    cases, unseen = ([patient(s, slices) for s in seeds] for seeds in (TRAINING, VALIDATION))
    began = time.process_time()
    watched = unseen if section != "3.5" else ()  # whose curves the paper does not show
    model, history = train(name, network, cases, steps=STEPS[section], seed=seed, validation=watched)
    columns = {"run": name, "section": section, "network": network, "slices": slices, "seed": seed}
    if watched:
        history["loss"] = history["loss"].rolling(STEPS[section] // 5, min_periods=1).mean()
        curve = history.dropna(subset="dice")[["step", "loss", "dice", "accuracy", "sensitivity", "specificity"]]
        keep(CURVES, curve.reset_index(drop=True), **columns)
    rows = [{"case": c.name} | score(inference.predict(model, c, progress=False), c) for c in unseen]
    keep(SCORES, pd.DataFrame(rows), **columns, fold=-1, parameters=sum(p.numel() for p in model.parameters()))
    if section == "3.4" or name.startswith("3.3-deep_plus"):
        card = {"channels": list(cases[0].channels), "classes": 2, "steps": STEPS[section], "seed": seed}
        models.save(RUNS / f"{name}.safetensors", model, card)
    print(f"{name}: Dice {np.mean([r['dice'] for r in rows]):.3f}, {time.process_time() - began:.0f} s", flush=True)


def cross_validate(fold: int, members: int = 1) -> None:
    """Section 4: DeepMedic and the forest, or an ensemble, on four fifths of the subjects, scored on the others."""
    name = f"4-fold-{fold}" if members == 1 else f"4-ensemble-{fold}"
    if (stored(SCORES).run == name).any():
        return
    began = time.process_time()
    subjects = [patient(s) for s in range(SUBJECTS)]
    unseen = subjects[fold::FOLDS]
    cases = [c for c in subjects if c not in unseen]
    networks = [train(f"4-fold-{fold}-{seed}", "deepmedic", cases, steps=STEPS["4"], seed=seed)[0] for seed in range(members)]
    if members == 1:
        forest = RandomForest(trees=50, jobs=1).fit(cases, points_per_case=1000, balance=BALANCE)
    tables = []
    for case in unseen:
        if members == 1:
            found = {"everything": case.mask, "forest": forest.predict(case, progress=False).argmax(0)}
            found["deepmedic"] = inference.predict(networks[0], case, progress=False)
        else:
            found = {"ensemble": inference.predict(Ensemble(networks).eval(), case, progress=False)}
        tables += [{"network": method, "case": case.name} | score(f, case) for method, f in found.items()]
    table = pd.DataFrame(tables)
    keep(SCORES, table, run=name, section="4", fold=fold, slices="isotropic")
    print(f"{name}: {table.groupby('network').dice.mean().round(3).to_dict()}, {time.process_time() - began:.0f} s", flush=True)


def contusions() -> None:
    """Section 4 on lesions like the paper's, small and several: the shipped full-size network against a forest of the same cases."""
    if (stored(SCORES).run == "contusions").any():
        return
    began = time.process_time()
    network = models.load(paths.shipped("checkpoints", "deepmedic_contusions.safetensors"))
    cases, unseen = ([injured(s) for s in seeds] for seeds in (range(32), range(100, 112)))
    assert [c.name for c in cases] == network.card["trained_on"], "both learn from the same brains"
    forest = RandomForest(trees=50, jobs=1).fit(cases, points_per_case=1000, balance=BALANCE)
    tables = []
    for case in unseen:
        found = {"everything": case.mask, "forest": forest.predict(case, progress=False).argmax(0)}
        found["deepmedic"] = inference.predict(network, case, progress=False)
        tables += [{"network": method, "case": case.name} | score(f, case) for method, f in found.items()]
    keep(SCORES, pd.DataFrame(tables), run="contusions", section="4, contusions", slices="isotropic", fold=-1)
    means = pd.DataFrame(tables).groupby("network").dice.mean().round(3).to_dict()
    print(f"contusions: {means}, {time.process_time() - began:.0f} s", flush=True)


def injured(seed: int) -> Case:
    return transforms.standardise(phantoms.brain(seed, site="ABC"[seed % 3], lesion="contusions"))


def markdown(frame: pd.DataFrame) -> list[str]:
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def report() -> None:
    """Write deepmedic_analysis.md from what is stored."""
    table = stored(SCORES)
    if "section" not in table.columns:
        return
    columns = ["dice", "precision", "sensitivity", "assd", "hausdorff", "false_far_ml", "deep_found"]
    lines = [
        "# DeepMedic's analysis on phantoms",
        "",
        f"{datetime.date.today()}, {platform.machine()}, one thread, torch {torch.__version__}. Phantoms with gliomas at 2 mm, sites A, B, C, tumour "
        f"against the rest; {WIDTH} of the paper's feature maps; rate 1e-3 (Dm2dPatch 1e-2), halved after 50, 70, 85 and 95 % of each run; "
        "Table B.1's batch sizes; seed 0. No dropout in the hidden layers except where it says so. Short runs, one each: a difference of "
        "a point or two is within chance.",
        "",
        "*far false ml*: millilitres called tumour more than 8 mm from the true one. *deep found*: share found of the tumour's voxels more than 8 mm below "
        "its surface. Distances in mm. Mean (standard deviation) over cases.",
        "",
        "Made by `OMP_NUM_THREADS=1 python experiments/deepmedic_analysis.py`, which goes on where it was stopped; the rows behind this are "
        "data/results/deepmedic_scores.csv and deepmedic_curves.csv.",
        "",
    ]
    for section, part in table.groupby("section", sort=False):
        folds = f", {part.fold.nunique()} of {FOLDS} folds" if section == "4" else ""
        lines += [f"## Section {section}: {STEPS[section]} updates{folds}", ""]
        summary = statistics.summary(part[["network", "slices", *columns]], by=["network", "slices"]).reset_index()
        lines += [*markdown(summary.rename(columns={"false_far_ml": "far false ml", "deep_found": "deep found"})), ""]
    with paths.atomic_write(Path(__file__).with_suffix(".md")) as path:
        path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=STEPS, default=list(STEPS), help="sections of the paper")
    wanted = parser.parse_args().only
    torch.set_num_threads(1)
    if "3.3" in wanted:
        for network in ("deep_plus", "deep", "shallow_plus", "shallow"):
            learn("3.3", network)
    if "3.4" in wanted:
        learn("3.4", "deepmedic")
    if "4, contusions" in wanted:
        contusions()
    if "4" in wanted:
        for fold in range(FOLDS):
            cross_validate(fold)
    if "3.5" in wanted:
        for network in ("deepmedic", *FLAT):
            for slices in ("isotropic", "5 mm"):
                learn("3.5", network, slices=slices)
    if "3.4" in wanted:
        learn("3.4", "big_deep_plus")
        learn("3.4", DROPOUT)
    if "4" in wanted:
        for fold in range(FOLDS):
            cross_validate(fold, MEMBERS)
    report()


if __name__ == "__main__":
    main()
