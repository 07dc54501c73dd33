"""Do two scales, and three dimensions, help DeepMedic on strokes among the white-matter spots of age?

Claims (Kamnitsas et al. 2017): DeepMedic segments better than the single-scale Deep+ (section 3.4, figure 8: 66.6 against 64.9 % Dice);
capacity does not explain it, BigDeep+ is no better than Deep+ and over-fits (65.2 %); the second scale finds the inside of large lesions
and removes false positives elsewhere (figure 9); Deep+ beats Shallow+ (section 3.3, figure 7); DeepMedic beats its 2D variants (section
3.5, table B.1: 66.6 against 61.5 %); the low-resolution pathway learns where in the brain a voxel lies (section 5, figure 14).

Task: generated strokes in FLAIR and T2 alone. An infarct and a white-matter spot of age have nearly the same T1, T2 and density, so
extent, shape and side tell them apart. "stroke": sites A, B and C in turn, as in the other experiments. "isotropic": site C alone,
which is the only one with voxels of equal sides; A and B scan slices of 3 and 5 mm.

Metric: Dice, and the other columns of table 1; the share of the lesion's inside (deeper than 8 mm) that is found; false volume farther
than 8 mm from the lesion; islands that touch no lesion. Ten test patients, three seeds, intervals over both. The comparisons are
DeepMedic less Deep+, DeepMedic less BigDeep+, BigDeep+ less Deep+, Deep+ less Shallow+; DeepMedic less Large2dSeg at equal CPU seconds.

Equal care: all networks have the same cases, share of the paper's maps, optimiser and schedule, whose rate falls to zero. The threshold
of every method, the forest included, is chosen on the same four validation patients. Nothing else was chosen for any of them.
Persons to train on have numbers from 0, for validation from 1000, to test from 2000.

The tables are data/results/deepmedic_scales.csv, deepmedic_scales_curves.csv and deepmedic_scales_place.csv, which notebook 06 reads.
"""

import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown, provenance, scan
from deepmedic_analysis import score
from torch.optim.lr_scheduler import CosineAnnealingLR

from medseg_lite import (
    baselines,
    features,
    inference,
    metrics,
    models,
    phantoms,
    plotting,
    recipes,
    statistics,
    training,
    transforms,
)
from medseg_lite.forest import RandomForest
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch
from medseg_lite.volume import Case

SETTINGS = {"width": 0.2, "share": 1.0}  # of the paper's feature maps; of the updates, for a quick trial
SEEDS, COPIES = (0, 1, 2), (1, 2, 3)
FIRST = {"train": 0, "validation": 1000, "test": 2000}  # numbers of the persons
COUNT = {"train": 24, "validation": 4, "test": 10}
VALIDATIONS = 6
RATE = 3e-3
THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98)  # of which the curves have the best
NOT_RUN = ("Shallow+",)  # for lack of time: --only depth makes its rows
BASELINE = "Deep+"  # whose noise floor is measured

# Of each task: its networks with their updates and minutes of one CPU core. In "isotropic" both have the same CPU seconds.
TASKS = {
    "stroke": {
        "Deep+": ("deep_plus", 900, 1.4),
        "DeepMedic": ("deepmedic", 900, 1.9),
        "BigDeep+": ("big_deep_plus", 900, 2.4),
        "Shallow+": ("shallow_plus", 900, 1.3),
    },
    "isotropic": {"DeepMedic": ("deepmedic", 600, 1.6), "Large2dSeg": ("large2d_seg", 390, 1.6)},
}
SHIPPED = {"Deep+": "scales_deep_plus", "DeepMedic": "scales_deepmedic"}
COMPARED = {
    "stroke": (
        ("DeepMedic", "Deep+"),
        ("DeepMedic", "BigDeep+"),
        ("BigDeep+", "Deep+"),
        ("Deep+", "Shallow+"),
        ("DeepMedic", "forest"),
    ),
    "isotropic": (("DeepMedic", "Large2dSeg"),),
}
COLUMNS = ("dice", "precision", "sensitivity", "assd", "hausdorff", "deep_found", "false_far_ml", "false_islands")


@cache
def cohort(task: str, part: str) -> list[Case]:
    """Return the standardised strokes to train on ("train"), for "validation" or to "test". No person has two of these uses."""
    make = partial(phantoms.brain, site="C") if task == "isotropic" else scan
    numbers = range(FIRST[part], FIRST[part] + COUNT[part])
    return [transforms.standardise(make(n, lesion="stroke").select(["flair", "t2"])) for n in numbers]


def lesion(model: Network, case: Case) -> np.ndarray:
    """Return the probability of the lesion in every voxel."""
    return inference.predict(model, case, output="probabilities", progress=False)[1]


def watch(model: Network, cases: Sequence[Case], seen: Sequence[Case]) -> dict[str, float]:
    """Return the mean Dice of validation cases, and of cases that the network learns from, each with its best threshold."""

    def best(part):
        found = [(lesion(model, case), case.label) for case in part]
        return max(float(np.mean([metrics.dice(p > threshold, t) for p, t in found])) for threshold in THRESHOLDS)

    return {"dice": best(cases), "dice_train": best(seen)}


def start(builder: str, seed: int, copy: int = 0) -> Network:
    """Return an untrained network of a seed. Copies differ from it by a millionth of each weight."""
    torch.manual_seed(seed)
    model = models.BUILDERS[builder](in_channels=2, classes=2, width=SETTINGS["width"], dropout=0.0)
    if copy:
        training.perturb_weights(model, seed=copy)
    return model


def train(store: Store, task: str, method: str, seed: int, copy: int = 0) -> Network:
    """Train a network. Its history has the Dice of `watch` six times."""
    builder, updates, _ = TASKS[task][method]
    steps, cases = max(2, round(updates * SETTINGS["share"])), cohort(task, "train")
    return recipes.deepmedic(
        cases,
        network=start(builder, seed, copy),
        steps=steps,
        optimizer=partial(torch.optim.Adam, lr=RATE),
        schedule=lambda optimizer: FromTorch(CosineAnnealingLR(optimizer, steps)),
        validate_every=-(-steps // VALIDATIONS),
        engine={"validate": partial(watch, cases=cohort(task, "validation"), seen=cases[:2])},
        folder=store.runs / f"{task}-{builder}-{seed}-{copy}",
        seed=seed,
        device="cpu",
        progress=False,
    )


def run_network(store: Store, task: str, method: str, seed: int, copy: int) -> dict:
    """Train a network, choose its threshold on validation cases, and score it on the test cases."""
    cohort(task, "train")
    cpu = time.process_time()
    model = train(store, task, method, seed, copy)
    spent, validation = time.process_time() - cpu, cohort(task, "validation")
    threshold = metrics.best_threshold([lesion(model, c) for c in validation], [c.label > 0 for c in validation])
    curve = model.history.dropna()[["step", "loss", "dice", "dice_train"]].to_dict("records")
    facts = {
        "threshold": threshold,
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": curve[-1]["step"],
        "cpu_seconds": round(spent, 1),
        "alive": store.examine(f"{task}, {method}, {seed}, {copy}", model, validation).alive,
    } | provenance()
    scores = [{"case": c.name} | score(lesion(model, c) > threshold, c) | facts for c in cohort(task, "test")]
    tables = {"deepmedic_scales_curves": curve, "deepmedic_scales": scores}
    if task == "stroke" and method == "DeepMedic":
        tables["deepmedic_scales_place"] = find_place(model, start(TASKS[task][method][0], seed), cohort(task, "test")[:3])
    if task == "stroke" and method in SHIPPED and (seed, copy) == (0, 0):
        store.save(SHIPPED[method], model, model.card | {"threshold": threshold})
    return tables


def find_place(trained: Network, untrained: Network, cases: Sequence[Case]) -> list[dict]:
    """Return how well a voxel's place can be read from the last layer of each pathway: R² of a ridge regression on other voxels."""
    rows = []
    for case in cases:
        level = plotting.busiest_position(case.label, case.shape)[2]
        for kind, model in (("trained", trained), ("untrained", untrained.eval())):
            maps = features.capture(
                model, case, ["normal.7", "low.7"], region=np.s_[:, :, level - 10 : level + 10], progress=False
            )
            for name, pathway in (("normal.7", "normal"), ("low.7", "low resolution")):
                found = dict(zip(("left_right", "back_front", "foot_head"), read_place(maps[name], case)))
                rows.append({"case": case.name, "pathway": pathway, "kind": kind} | found)
    return rows


def read_place(layer, case: Case) -> np.ndarray:
    """Return R² of the three coordinates of healthy voxels, fitted on half of 6000 voxels and tested on the others."""
    voxels = np.random.default_rng(0).permutation(np.argwhere(layer.sampled(case.mask & (case.label == 0))))[:6000]
    x = layer.data[(slice(None), *voxels.T)].T.astype(float)
    x = np.c_[(x - x.mean(0)) / (x.std(0) + 1e-6), np.ones(len(x))]
    y, half = voxels - voxels.mean(0), len(x) // 2
    weights = np.linalg.solve(x[:half].T @ x[:half] + 10 * np.eye(x.shape[1]), x[:half].T @ y[:half])
    return 1 - (y[half:] - x[half:] @ weights).var(0) / y[half:].var(0)


def run_forest(seed: int) -> list[dict]:
    """Train a random forest on the same cases, with a threshold chosen as for the networks."""
    cohort("stroke", "train")
    cpu = time.process_time()
    forest = RandomForest(trees=30, seed=seed, jobs=1).fit(cohort("stroke", "train"), points_per_case=1000, balance=0.1)
    spent, validation = time.process_time() - cpu, cohort("stroke", "validation")

    def found(case):
        return forest.predict(case, progress=False)[1]

    threshold = metrics.best_threshold([found(c) for c in validation], [c.label > 0 for c in validation])
    facts = {"threshold": threshold, "cpu_seconds": round(spent, 1)} | provenance()
    return [{"case": c.name} | score(found(c) > threshold, c) | facts for c in cohort("stroke", "test")]


def run_baselines() -> list[dict]:
    """Score the methods without learning. The key's name is the first of them."""
    parts = (cohort("stroke", part) for part in ("train", "validation"))
    methods = baselines.fit(*parts)
    return [
        {"method": name, "case": c.name} | score(method(c), c) | provenance()
        for name, method in methods.items()
        for c in cohort("stroke", "test")
    ]


def plan(store: Store, seeds) -> list[Row]:
    def network(task: str, method: str, seed: int, copy: int = 0, part: str = "") -> Row:
        key = {"task": task, "method": method, "seed": seed, "copy": copy}
        run = partial(run_network, store, task, method, seed, copy)
        return Row("deepmedic_scales", key, run, TASKS[task][method][2], part, extra=method in NOT_RUN)

    def other(method: str, seed, run, minutes: float) -> Row:
        return Row("deepmedic_scales", {"task": "stroke", "method": method, "seed": seed, "copy": 0}, run, minutes, "others")

    chosen = seeds or SEEDS
    return [
        *(network("stroke", method, seed) for seed in chosen for method in ("Deep+", "DeepMedic", "BigDeep+")),
        other("nothing", None, run_baselines, 0.3),
        *(other("forest", seed, partial(run_forest, seed), 0.4) for seed in chosen),
        *(network("isotropic", method, seed) for seed in chosen for method in TASKS["isotropic"]),
        *(network("stroke", BASELINE, 0, copy, "noise floor") for copy in COPIES),
        *(network("stroke", "Shallow+", seed, part="depth") for seed in chosen),
    ]


# ----------------------------------------------------------------------------------------------------------- the page


def table(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """Return the scores of a method as runs × cases, without the cases that have no such score."""
    return rows.fillna({"seed": -1}).pivot(index="seed", columns="case", values=column).replace(np.inf, np.nan).dropna(axis=1)


def interval(rows: pd.DataFrame, column: str) -> statistics.Interval | None:
    """Return the mean over seeds and cases with its interval; over cases alone for a method without seeds."""
    scores = table(rows, column).to_numpy()
    if len(scores) == 1 and rows["seed"].notna().all():
        return None  # one seed so far
    return statistics.two_way(np.repeat(scores, 2, axis=0) if len(scores) == 1 else scores)


def last_third(curves: pd.DataFrame, column: str = "dice") -> float:
    """Return what the mean score of several runs gained in the last third of the updates."""
    late = curves[curves["step"] >= 2 / 3 * curves["step"].max()].groupby("step")[column].mean()
    return float(late.iloc[-1] - late.iloc[0])


def summarise(scores: pd.DataFrame, curves: pd.DataFrame, task: str) -> pd.DataFrame:
    """Return a task's table for the page: one row for each method, networks first."""
    cells = []
    for method, rows in scores[(scores["task"] == task) & (scores["copy"] == 0)].groupby("method", sort=False):
        about, cell = rows.iloc[0], {"method": method, "seeds": rows["seed"].nunique()}
        for what, number in (
            ("parameters", about["parameters"]),
            ("updates", about["updates"]),
            ("CPU s", rows["cpu_seconds"].mean()),
        ):
            cell[what] = "–" if np.isnan(number) else f"{number:.0f}"
        for column in COLUMNS:
            found = interval(rows, column) if column == "dice" else None
            mean = rows[column].replace(np.inf, np.nan).mean()
            cell[column] = (
                f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"
                if found
                else ("–" if np.isnan(mean) else f"{mean:.3f}")
            )
        mine = curves[(curves["task"] == task) & (curves["method"] == method) & (curves["copy"] == 0)]
        cell["gain in the last third"] = f"{last_third(mine):+.3f}" if len(mine) else "–"
        end = mine[mine["step"] == mine["step"].max()]
        cell["train − validation"] = f"{(end['dice_train'] - end['dice']).mean():+.3f}" if len(mine) else "–"
        cells.append((not len(mine), cell))
    return pd.DataFrame([cell for _, cell in sorted(cells, key=lambda pair: pair[0])])


def compare(scores: pd.DataFrame, task: str) -> list[str]:
    """Return a line for each comparison and score whose interval leaves 0 out, and for every Dice."""
    mine = scores[(scores["task"] == task) & (scores["copy"] == 0) & scores["seed"].notna()]
    lines = []
    for best, rival in COMPARED[task]:
        for column in COLUMNS:
            a, b = (table(mine[mine["method"] == method], column) for method in (best, rival))
            if min(len(a), len(b)) > 1 and len(a.columns) > 1:
                lines.append(f"* {column}: {best} − {rival}, {statistics.two_way(a, b[a.columns])}")
    return lines


def report(store: Store) -> dict[str, str]:
    scores, curves, blocks = store.read("deepmedic_scales"), store.read("deepmedic_scales_curves"), {}
    if scores.empty or curves.empty:
        return {}
    for task in TASKS:
        if task in set(scores["task"]):
            blocks[task] = "\n\n".join([markdown(summarise(scores, curves, task)), "\n".join(compare(scores, task))])
    copies = scores[(scores["task"] == "stroke") & (scores["method"] == BASELINE) & (scores["seed"] == 0)]
    if copies["copy"].nunique() > 1:
        means = copies.pivot(index="copy", columns="case", values="dice")
        blocks["floor"] = (
            f"{len(means)} runs of {BASELINE}, mean Dice {', '.join(f'{m:.3f}' for m in means.mean(axis=1))}: noise floor {statistics.noise_floor(means):.3f}."
        )
    place = store.read("deepmedic_scales_place")
    if not place.empty:
        mean = place.groupby(["pathway", "kind"])[["left_right", "back_front", "foot_head"]].mean().reset_index()
        blocks["place"] = markdown(mean, 2)
    vitals = store.read("vitals")
    mine = vitals[vitals["experiment"] == store.name] if not vitals.empty else vitals
    if len(mine):
        blocks["vitals"] = (
            f"{len(mine)} networks, {mine['constant'].sum()} constant, {(~mine['alive']).sum()} blind to a class; largest share of silent channels {mine['silent'].max():.2f}."
        )
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
