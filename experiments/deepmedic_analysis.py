"""DeepMedic's own analysis on phantoms: the networks of each experiment of its paper, trained alike.

Trains and scores, in short runs at reduced width: the deeper networks of section 3.3; the two scales of section 3.4; five-fold
cross-validation, an ensemble of three and the random forest as in section 4.1; the 2D networks of section 3.5, on isotropic
images and on slices of 5 mm. The task is glioma against the rest: binary, as in the paper's experiments on brain injury.

A first attempt, with one seed. `deepmedic_start.py`, `deepmedic_scales.py` and `deepmedic_table1.py` have taken its place. Two of its
networks, data/checkpoints/analysis_*.safetensors, are used in `crf_effects.py` and in notebook 16.

Training states are kept in runs/deepmedic_analysis. The tables are data/results/deepmedic_curves.csv and deepmedic_scores.csv.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import torch
from _frame import Row, Store, lesion_scores, main, markdown, scan
from scipy import ndimage

from medseg_lite import inference, metrics, models, paths, recipes, statistics, transforms
from medseg_lite.ensembles import Ensemble
from medseg_lite.forest import RandomForest
from medseg_lite.models import Network
from medseg_lite.models.layers import init_normal
from medseg_lite.phantoms.mri import slice_matrices
from medseg_lite.volume import Case

TRAINING, VALIDATION = range(0, 16), range(100, 106)  # seeds of the phantoms of section 3
SUBJECTS, FOLDS, MEMBERS = 20, 5, 3  # of section 4
SETTINGS = {"width": 0.3, "3.3": 220, "3.4": 220, "4": 160, "3.5": 80}  # share of the paper's feature maps; updates by section
HALVINGS = (0.5, 0.7, 0.85, 0.95)
FLAT = ("dm2d_seg", "deeper2d_seg", "wider2d_seg", "large2d_seg", "dm2d_patch")
WITHOUT_HIDDEN = ("shallow", "shallow_plus", "deep", "deep_plus")  # and so without dropout
DROPOUT = "deepmedic, dropout"  # half of 45 hidden maps dropped: too slow for runs this short, so the others have none
SHIPPED = {"3.3-deep_plus-isotropic-0": "analysis_deep_plus", "3.4-deepmedic-isotropic-0": "analysis_deepmedic"}
BALANCE = 0.1  # tumour among the forest's training points, chosen on other phantoms in benchmarks/forest.md


@cache
def patient(seed: int, slices: str = "isotropic") -> Case:
    """Return a standardised phantom with one binary label."""
    case = scan(seed)
    case = transforms.standardise(thicken_slices(case) if slices == "5 mm" else case)
    return case.replace(label=(case.label > 0).astype(np.uint8))


@cache
def injured_patient(seed: int) -> Case:
    return transforms.standardise(scan(seed, lesion="contusions"))


def thicken_slices(case: Case, *, mm: float = 5.0, isotropic: Sequence[str] = ("t1",)) -> Case:
    """Return the case as if all channels but some had been scanned in thick axial slices, on its own grid.

    Each slice is the mean over its thickness, inside the mask; between the middles of slices values are linear. The label keeps
    its resolution. In the paper's data, one of the sequences is isotropic and the others have slices of 5 mm.
    """
    n, step = case.shape[2], case.spacing[2]
    voxels = round(math.ceil(n * step / mm) * mm / step)  # of a grid that whole slices fill, from the first voxel on
    matrices = slice_matrices(voxels, step, mm)
    average, back = (m.astype(float).round(6) for m in (matrices[0][:, :n].T, matrices[1][:n].T))
    weight = np.maximum(case.mask @ average @ back, 1e-6)
    image = case.image.copy()
    for c, name in enumerate(case.channels):
        if name not in isotropic:
            image[c] = np.where(case.mask, (case.image[c] * case.mask) @ average @ back / weight, 0)
    return case.replace(image=image)


def train(
    store: Store, name: str, network: str, cases: Sequence[Case], *, steps: int, seed: int = 0, validation: Sequence[Case] = ()
) -> Network:
    """Train a network with the settings of appendix B, except for the rate of Shallow and Deep: all have the same."""
    builder, _, dropout = network.partition(", ")
    options = {"network": builder, "width": SETTINGS["width"]}
    if not dropout and builder not in WITHOUT_HIDDEN:
        options["dropout"] = 0.0
    if builder in ("shallow", "deep"):
        torch.manual_seed(seed)
        model = getattr(models, builder)(in_channels=4, classes=2, width=SETTINGS["width"])
        # A narrow network has fewer inputs a neuron; this keeps their number times the variance at the paper's value.
        init_normal(model, std=0.01 / SETTINGS["width"] ** 0.5)
        options = {"network": model, "learning_rate": 1e-3}
    return recipes.deepmedic(
        cases,
        classes=2,
        steps=steps,
        halvings=HALVINGS,
        validate_every=steps // 5,
        folder=store.runs / name,
        seed=seed,
        progress=False,
        engine={"validate": partial(watch, cases=validation)} if validation else None,
        **options,
    )


def watch(model: Network, cases: Sequence[Case]) -> dict[str, float]:
    """Return accuracy, sensitivity and specificity among all brain voxels, and the mean Dice of the segmentations."""
    found = [inference.predict(model, c, progress=False) for c in cases]
    p, t = (np.concatenate([a[c.mask] for a, c in zip(arrays, cases)]) for arrays in (found, [c.label for c in cases]))
    return {
        "dice": float(np.mean([metrics.dice(f, c.label) for f, c in zip(found, cases)])),
        "accuracy": float(np.mean(p == t)),
        "sensitivity": metrics.sensitivity(p, t),
        "specificity": metrics.specificity(p, t),
    }


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    """Return Table 1's columns, volumes, and in numbers what Figure 9 shows: what is found far from the lesion and deep in it."""
    truth, found = case.label > 0, found > 0
    inside = ndimage.distance_transform_edt(truth, sampling=case.spacing) > 8
    away = ndimage.distance_transform_edt(~truth, sampling=case.spacing) > 8
    return lesion_scores(found, truth, case.spacing) | {
        "false_far_ml": (found & away).sum() * np.prod(case.spacing) / 1000,
        "deep_found": found[inside].mean() if inside.any() else np.nan,
    }


def run_network(store: Store, section: str, network: str, slices: str, seed: int) -> dict:
    """Train on sixteen cases, watch and score on six others (section 3)."""
    name = name_run(section, network, slices, seed)
    cases, unseen = ([patient(s, slices) for s in seeds] for seeds in (TRAINING, VALIDATION))
    watched = unseen if section != "3.5" else ()  # the paper shows no curves for that section
    steps = SETTINGS[section]
    model = train(store, name, network, cases, steps=steps, seed=seed, validation=watched)
    about = {"section": section, "network": network, "slices": slices, "seed": seed}
    facts = about | {"fold": -1, "parameters": sum(p.numel() for p in model.parameters())}
    scores = [facts | {"case": c.name} | score(inference.predict(model, c, progress=False), c) for c in unseen]
    if name in SHIPPED:
        store.save(SHIPPED[name], model, model.card)
    if not watched:
        return {"deepmedic_scores": scores}
    history = model.history.assign(loss=model.history["loss"].rolling(steps // 5, min_periods=1).mean())
    curve = history.dropna(subset="dice")[["step", "loss", "dice", "accuracy", "sensitivity", "specificity"]]
    return {"deepmedic_curves": [about | row for row in curve.to_dict("records")], "deepmedic_scores": scores}


def run_fold(store: Store, fold: int, members: int):
    """Train DeepMedic and the forest, or an ensemble, on four fifths of the subjects, and score the others (section 4)."""
    subjects = [patient(s) for s in range(SUBJECTS)]
    unseen = subjects[fold::FOLDS]
    cases = [c for c in subjects if c not in unseen]
    networks = [
        train(store, f"4-fold-{fold}-{seed}", "deepmedic", cases, steps=SETTINGS["4"], seed=seed) for seed in range(members)
    ]
    about = {"section": "4", "slices": "isotropic", "fold": fold}
    if members == 1:
        return compare(cases, unseen, networks[0], about)
    model = Ensemble(networks).eval()
    about["network"] = "ensemble"
    return [about | {"case": c.name} | score(inference.predict(model, c, progress=False), c) for c in unseen]


def run_contusions():
    """Compare the shipped full-size network with a forest of the same cases on lesions like the paper's, small and several."""
    network = models.load(paths.shipped("checkpoints", "deepmedic_contusions.safetensors"))
    cases, unseen = ([injured_patient(s) for s in seeds] for seeds in (range(32), range(100, 112)))
    assert [c.name for c in cases] == network.card["trained_on"], "both learn from the same brains"
    return compare(cases, unseen, network, {"section": "4, contusions", "slices": "isotropic", "fold": -1})


def compare(cases: list[Case], unseen: list[Case], network: Network, about: dict) -> list[dict]:
    """Score a trained network, a forest that learns from the same cases, and the label that is tumour everywhere."""
    forest, rows = RandomForest(trees=50, jobs=1).fit(cases, points_per_case=1000, balance=BALANCE), []
    for case in unseen:
        found = {"everything": case.mask, "forest": forest.predict(case, progress=False).argmax(0)}
        found["deepmedic"] = inference.predict(network, case, progress=False)
        rows += [about | {"network": method, "case": case.name} | score(f, case) for method, f in found.items()]
    return rows


def name_run(section: str, network: str, slices: str, seed: int) -> str:
    return f"{section} {network} {slices} {seed}".replace(", ", "_").replace(" ", "-")


def plan(store: Store, seeds) -> list[Row]:
    def row(section: str, name: str, run, minutes: float) -> Row:
        return Row("deepmedic_scores", {"run": name}, run, minutes, section)

    def networks(section: str, names: Sequence[str], slices: Sequence[str] = ("isotropic",), minutes: float = 1.0) -> list[Row]:
        runs = [(section, network, s, seed) for network in names for s in slices for seed in seeds or [0]]
        return [row(section, name_run(*r), partial(run_network, store, *r), minutes) for r in runs]

    folds = [fold for fold in range(FOLDS) if not seeds or fold in seeds]
    return [
        *networks("3.3", ("deep_plus", "deep", "shallow_plus", "shallow")),
        *networks("3.4", ("deepmedic",)),
        row("4, contusions", "contusions", run_contusions, 2),
        *(row("4", f"4-fold-{fold}", partial(run_fold, store, fold, 1), 1.5) for fold in folds),
        *networks("3.5", ("deepmedic", *FLAT), ("isotropic", "5 mm")),
        *networks("3.4", ("big_deep_plus", DROPOUT), minutes=1.5),
        *(row("4", f"4-ensemble-{fold}", partial(run_fold, store, fold, MEMBERS), 3) for fold in folds),
    ]


def report(store: Store) -> dict[str, str]:
    table, lines = store.read("deepmedic_scores", dtype={"section": str}), []
    if table.empty:
        return {}
    columns = ["dice", "precision", "sensitivity", "assd", "hausdorff", "false_far_ml", "deep_found"]
    for section, part in table.groupby("section", sort=False):
        updates = SETTINGS.get(section, "the shipped network, 1000")
        folds = f", {part.fold.nunique()} of {FOLDS} folds" if section == "4" else ""
        summary = statistics.summary(part[["network", "slices", *columns]], by=["network", "slices"]).reset_index()
        summary = summary.rename(columns={"false_far_ml": "far false ml", "deep_found": "deep found"})
        lines += [f"## Section {section}: {updates} updates{folds}", "", markdown(summary), ""]
    return {"sections": "\n".join(lines)}


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
