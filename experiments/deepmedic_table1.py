"""Table 1 of DeepMedic's paper on brains with contusions: forest, DeepMedic, ensemble of three, each without and with the CRF.

Claims (Kamnitsas et al. 2017, section 4.1.3, table 1 and figure 10, on 61 brain injuries): DeepMedic has 11.2 points more Dice than a
random forest and leads in all five columns; the average of three networks has 1.9 points more than one; the CRF adds 3.7 points to the
forest, .7 to DeepMedic and .3 to the ensemble, raises precision and lowers sensitivity; volumes are biased neither way; small lesions
are segmented too, less reliably. Section 4.1.3: averaging removes errors that are not common to the networks.

Metrics: the table's five columns, false islands, volumes, and the share found of each lesion, in fourteen test brains. Three forests and
three networks that differ by their seed. All three networks make an ensemble, and every two of them; an ensemble is compared with the
mean of its own members.
One more row is the full-size network that ships with the project, trained on the same brains. Intervals are over seeds and patients.

Equal care: everything is chosen by mean Dice on the same six validation brains. For the forest that is its balance, in four trials.
Then, for each forest and network alike: the threshold (31 trials); the threshold and the smallest piece that is kept (31 x 6 trials);
the CRF's parameters, on the probabilities as they are and with the chosen threshold moved to one half (12 trials each). The networks
are narrow and train until the validation Dice is flat. Methods without learning are rows of the same table.

The tables are data/results/deepmedic_table1.csv, _curves.csv, _lesions.csv, _balance.csv and _errors.csv, which notebook 06 reads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, lesion_scores, main, markdown, moved, provenance, scan
from scipy import ndimage

from medseg_lite import baselines, crf, inference, metrics, models, paths, recipes, statistics, transforms
from medseg_lite.forest import RandomForest
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch
from medseg_lite.volume import Case

TRAINING, VALIDATION, TEST = range(32), range(60, 66), range(100, 114)  # seeds of the brains
SEEDS = (0, 1, 2)
SETTINGS = {"width": 0.3, "steps": 600, "rate": 2e-3}
VALIDATIONS = 6
BALANCES = (0.2, 0.1, 0.05, 0.025)  # lesion among the training points
TREES, DEPTH, POINTS = 50, 30, 500
THRESHOLDS = 1 / (1 + np.exp(-np.linspace(-5, 5, 31)))
TRIALS = 12  # of the CRF's parameters, for either form of the probabilities
COLUMNS = ["dice", "precision", "sensitivity", "assd", "hausdorff"]
ENSEMBLES = {
    "ensemble of 2": [(1, 2), (0, 2), (0, 1)],
    "ensemble of 3": [SEEDS],
}  # seeds of the members, by the ensemble's number
VARIANTS = {"half": "P > ½", "threshold": "", "pieces": " + pieces", "CRF": " + CRF"}


@cache
def patient(seed: int) -> Case:
    return transforms.standardise(scan(seed, lesion="contusions")).replace(extra={})


def truths(seeds: Sequence[int]) -> list[np.ndarray]:
    return [patient(seed).label > 0 for seed in seeds]


# --------------------------------------------------------------------------------------------------------- the classifiers


def train(store: Store, seed: int, cases: Sequence[Case], validation: Sequence[Case], name: str) -> Network:
    """Train a narrow DeepMedic without dropout, with a rate that falls to zero."""
    steps = SETTINGS["steps"]

    def watch(model: Network) -> dict[str, float]:
        found = [lesion(model, case) for case in validation]
        labels = [case.label > 0 for case in validation]
        above = metrics.best_threshold(found, labels, thresholds=THRESHOLDS)
        return {
            "dice": float(np.mean([metrics.dice(p > above, t) for p, t in zip(found, labels)])),
            "dice_half": float(np.mean([metrics.dice(p > 0.5, t) for p, t in zip(found, labels)])),
        }

    return recipes.deepmedic(
        cases,
        classes=2,
        width=SETTINGS["width"],
        dropout=0.0,
        steps=steps,
        optimizer=partial(torch.optim.Adam, lr=SETTINGS["rate"]),
        schedule=lambda optimizer: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        shift=0.1,  # as in the paper's experiments on brain injuries
        validate_every=-(-steps // VALIDATIONS),
        engine={"validate": watch},
        folder=store.runs / name,
        seed=seed,
        device="cpu",
        progress=False,
    )


def lesion(model: Network, case: Case) -> np.ndarray:
    """Return the probability of a lesion in every voxel."""
    return inference.predict(model, case, output="probabilities", progress=False)[1]


def fit_forest(balance: float, seed: int) -> RandomForest:
    forest = RandomForest(trees=TREES, depth=DEPTH, seed=seed, jobs=1)
    return forest.fit([patient(s) for s in TRAINING], points_per_case=POINTS, balance=balance)


def best_balance(store: Store) -> float:
    """Return the forest's balance with the highest Dice on the validation brains, as stored."""
    return float(store.read("deepmedic_table1_balance").groupby("balance")["dice"].mean().idxmax())


def predict(store: Store, classifier: str, seed: int) -> tuple[list[np.ndarray], dict, list[dict]]:
    """Return the probability of a lesion in all validation and test brains, facts about the classifier, and its curve."""
    seeds, curve, facts, cpu = [*VALIDATION, *TEST], [], {}, time.process_time()
    if classifier in ENSEMBLES:
        members = [stored(store, "DeepMedic", s) for s in ENSEMBLES[classifier][seed]]
        facts = {what: sum(about[what] for _, about in members) for what in ("parameters", "cpu_seconds")}
        return [np.mean(maps, axis=0) for maps in zip(*(maps for maps, _ in members))], facts, curve
    if classifier == "forest":
        balance = best_balance(store)
        forest = fit_forest(balance, seed)
        facts = {"balance": balance, "cpu_seconds": time.process_time() - cpu}
        return [forest.predict(patient(s), progress=False)[1] for s in seeds], facts, curve
    if classifier == "DeepMedic, full size":
        model = models.load(paths.shipped("checkpoints", "deepmedic_contusions.safetensors"))
        if model.card["trained_on"] != [patient(s).name for s in TRAINING]:
            raise ValueError("the full-size network was trained on other brains")
    else:
        name = f"{classifier} {seed}".replace(" ", "-")
        model = train(store, seed, [patient(s) for s in TRAINING], [patient(s) for s in VALIDATION[:4]], name)
        curve = model.history.dropna()[["step", "loss", "dice", "dice_half"]].to_dict("records")
        facts["updates"] = curve[-1]["step"]
        facts["cpu_seconds"] = time.process_time() - cpu
    facts["parameters"] = sum(p.numel() for p in model.parameters())
    facts["alive"] = store.examine(f"{classifier}, {seed}", model, [patient(s) for s in VALIDATION[:2]]).alive
    return [lesion(model, patient(s)) for s in seeds], facts, curve


def stored(store: Store, classifier: str, seed: int) -> tuple[list[np.ndarray], dict]:
    """Return a member's probabilities and facts, kept in runs/ since it was scored."""
    path = store.runs / f"{classifier}-{seed}.npz"
    if not path.exists():
        keep(store, classifier, seed, *predict(store, classifier, seed)[:2])
    with np.load(path) as file:
        return list(file["maps"].astype(np.float32)), {name: float(file[name]) for name in ("parameters", "cpu_seconds")}


def keep(store: Store, classifier: str, seed: int, maps: Sequence[np.ndarray], facts: dict) -> None:
    path = store.runs / f"{classifier}-{seed}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = {name: facts[name] for name in ("parameters", "cpu_seconds")}
    np.savez_compressed(path, maps=np.stack(maps).astype(np.float16), **kept)


# --------------------------------------------------------------------------------------------------------------- scores


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    return lesion_scores(found, case.label > 0, case.spacing)


def each_lesion(found: np.ndarray, case: Case) -> list[dict]:
    """Return the volume of every lesion of a case, in ml, and the share of it that was found."""
    pieces, count = ndimage.label(case.label > 0)
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)[1:]
    inside = np.bincount(pieces[found], minlength=count + 1)[1:]
    ml = np.prod(case.spacing) / 1000
    return [{"case": case.name, "ml": n * ml, "found": k / n} for n, k in zip(sizes, inside)]


def choose_pieces(maps: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> tuple[float, int]:
    """Return the threshold and the smallest piece, in voxels, with the highest mean Dice."""
    best = (-1.0, 0.5, 0)
    for threshold in THRESHOLDS:
        found = [p > threshold for p in maps]
        for size in baselines.SMALLEST:
            dice = np.mean([metrics.dice(baselines.without_small_components(f, size), t) for f, t in zip(found, labels)])
            best = max(best, (float(dice), float(threshold), size), key=lambda trial: trial[0])
    return best[1:]


def run(store: Store, classifier: str, seed: int) -> dict:
    """Make a classifier, choose its threshold, smallest piece and CRF on the validation brains, and score all in the test brains."""
    maps, facts, curve = predict(store, classifier, seed)
    if classifier == "DeepMedic":
        keep(store, classifier, seed, maps, facts)
    first, second = maps[: len(VALIDATION)], maps[len(VALIDATION) :]
    cases, labels = [patient(s) for s in VALIDATION], truths(VALIDATION)
    threshold = metrics.best_threshold(first, labels, thresholds=THRESHOLDS)
    above, smallest = choose_pieces(first, labels)
    searches = {
        t: crf.search(cases, [moved(p, t) for p in first], trials=TRIALS, seed=0, progress=False) for t in (0.5, threshold)
    }
    start = max(searches, key=lambda t: searches[t].table["dice"].max())
    refiner = crf.DenseCRF(**searches[start].best, learn=())
    chosen = {
        "half": {"threshold": 0.5},
        "threshold": {"threshold": threshold},
        "pieces": {"threshold": above, "smallest": smallest},
        "CRF": {"threshold": start} | searches[start].best,
    }
    rows, lesions = [], []
    for p, number in zip(second, TEST):
        case = patient(number)
        found = {
            "half": p > 0.5,
            "threshold": p > threshold,
            "pieces": baselines.without_small_components(p > above, smallest),
            "CRF": refiner.refine(moved(p, start), case).argmax(0) > 0,
        }
        for variant, f in found.items():
            about = {"variant": variant, "case": case.name}
            rows.append(about | score(f, case) | chosen[variant] | facts | provenance())
        lesions += [{"variant": v} | row for v in ("threshold", "CRF") for row in each_lesion(found[v], case)]
    tables = {"deepmedic_table1": rows, "deepmedic_table1_lesions": lesions}
    return tables | ({"deepmedic_table1_curves": curve} if curve else {})


def run_baselines() -> list[dict]:
    """Score the methods without learning. "nothing" is the first of them."""
    methods = baselines.fit([patient(s) for s in TRAINING], [patient(s) for s in VALIDATION])
    rows = []
    for name, method in methods.items():
        for case in map(patient, TEST):
            rows.append({"classifier": name, "case": case.name} | score(method(case), case) | provenance())
    return rows


def run_balance(balance: float, seed: int) -> list[dict]:
    """Score a forest on the validation brains, at the threshold that is best for them."""
    cpu, cases = time.process_time(), [patient(s) for s in VALIDATION]
    forest = fit_forest(balance, seed)
    cpu = time.process_time() - cpu
    maps = [forest.predict(case, progress=False)[1] for case in cases]
    above = metrics.best_threshold(maps, truths(VALIDATION), thresholds=THRESHOLDS)
    facts = {"threshold": above, "cpu_seconds": cpu} | provenance()
    return [{"case": c.name, "dice": metrics.dice(p > above, c.label > 0)} | facts for p, c in zip(maps, cases)]


def run_errors(store: Store) -> list[dict]:
    """Count the wrong voxels of the three networks by how many of them make the error, and how many of each kind the ensemble makes."""
    members, labels, rows = [stored(store, "DeepMedic", s)[0] for s in SEEDS], truths(VALIDATION), []
    maps = [*members, [np.mean(together, axis=0) for together in zip(*members)]]
    n = len(VALIDATION)
    above = [metrics.best_threshold(p[:n], labels, thresholds=THRESHOLDS) for p in maps]
    for number, case in enumerate(map(patient, TEST)):
        truth = case.label > 0
        wrong = [(p[n + number] > t) != truth for p, t in zip(maps, above)]
        common = np.sum(wrong[:-1], axis=0)
        for count in range(len(members) + 1):
            of = common == count
            rows.append({"case": case.name, "made_by": count, "voxels": of.sum(), "ensemble_wrong": (of & wrong[-1]).sum()})
    return rows


def plan(store: Store, seeds) -> list[Row]:
    chosen = seeds or SEEDS

    def rows(classifier: str, minutes: float, seeds=chosen, part: str = "table") -> list[Row]:
        keys = [{"classifier": classifier, "seed": seed} for seed in seeds]
        return [Row("deepmedic_table1", k, partial(run, store, *k.values()), minutes, part) for k in keys]

    def balanced(balance: float) -> Row:
        key = {"balance": balance, "seed": 0}
        return Row("deepmedic_table1_balance", key, partial(run_balance, **key), 0.25, "balance")

    return [
        *rows("DeepMedic", 2.2),
        *map(balanced, BALANCES),
        *rows("forest", 0.6),
        *(row for name, members in ENSEMBLES.items() for row in rows(name, 0.2, range(len(members)))),
        *rows("DeepMedic, full size", 1, [0]),
        Row("deepmedic_table1", {"classifier": "nothing", "seed": None}, run_baselines, 0.2, "baselines"),
        Row("deepmedic_table1_errors", {"of": "DeepMedic"}, partial(run_errors, store), 0.05, "errors"),
    ]


# --------------------------------------------------------------------------------------------------------------- the page


def scores_of(table: pd.DataFrame, classifier: str, variant: str, column: str) -> np.ndarray:
    """Return the scores, `(runs, cases)`."""
    rows = table[(table["classifier"] == classifier) & (table["variant"] == variant)]
    return rows.pivot(index="seed", columns="case", values=column).to_numpy(float)


def estimate(a: np.ndarray, b: np.ndarray | None = None) -> statistics.Interval:
    """Apply `two_way`. Where there is one run its spread over runs counts as 0: the interval is over cases alone."""
    given = [table for table in (a, b) if table is not None]
    found = statistics.two_way(*(np.repeat(table, 2, axis=0) if len(table) == 1 else table for table in given))
    return replace(found, runs=min(map(len, given)))


def compare(table: pd.DataFrame, a: tuple[str, str], b: tuple[str, str], column: str) -> statistics.Interval:
    """Return the mean of a method less that of another; a method is a classifier and a variant.

    Two variants of one classifier are compared run by run, an ensemble with its own members. Cases with NaN are left out of both.
    """
    first, second = (scores_of(table, *method, column) for method in (a, b))
    if a[0] in ENSEMBLES and b[0] == "DeepMedic":
        second = np.stack([second[list(members)].mean(axis=0) for members in ENSEMBLES[a[0]][: len(first)]])
    there = np.isfinite(first).all(axis=0) & np.isfinite(second).all(axis=0)
    first, second = first[:, there], second[:, there]
    return estimate(first - second) if a[0] == b[0] or a[0] in ENSEMBLES else estimate(first, second)


def name(classifier: str, variant: str) -> str:
    return classifier + VARIANTS.get(variant, "").replace("P > ½", ", P > ½")


def summarise(table: pd.DataFrame) -> pd.DataFrame:
    """Return Table 1 with all columns: the mean over runs and cases, its interval for the Dice."""
    rows, order = [], ["forest", "DeepMedic", *ENSEMBLES, "DeepMedic, full size"]
    table = table.sort_values("classifier", key=lambda c: c.map(lambda n: order.index(n) if n in order else 99), kind="stable")
    for (classifier, variant), part in table.groupby(["classifier", "variant"], sort=False, dropna=False):
        learned = isinstance(variant, str)
        row = {
            "method": name(classifier, variant) if learned else classifier,
            "runs": part["seed"].nunique() if learned else "–",
        }
        row["Dice %"] = f"{100 * part['dice'].mean():.1f}"
        if learned:
            found = estimate(100 * scores_of(table, classifier, variant, "dice"))
            row["Dice %"] += f" ({found.low:.1f} to {found.high:.1f})"
        row |= {f"{what} %": f"{100 * part[what].mean():.1f}" for what in ("precision", "sensitivity")}
        row |= {"ASSD": part["assd"].mean(), "Hausdorff": part["hausdorff"].mean()}
        row |= {"false islands": part["false_islands"].mean(), "found ml": part["found_ml"].mean()}
        row |= {"true ml": part["true_ml"].mean(), "threshold": part["threshold"].mean()}
        rows.append(
            row | {"CPU s": f"{part['cpu_seconds'].mean():.0f}" if learned and part["cpu_seconds"].notna().all() else "–"}
        )
    return pd.DataFrame(rows)


def comparisons(table: pd.DataFrame) -> list[str]:
    """Return a line for each of the table's claims that has its rows."""
    network, forest, ensemble = "DeepMedic", "forest", "ensemble of 3"
    pairs = [((network, "threshold"), (forest, "threshold"))]
    if table.loc[table["classifier"] == network, "seed"].nunique() == len(SEEDS):
        pairs += [((several, "threshold"), (network, "threshold")) for several in ENSEMBLES]
    pairs += [((c, "CRF"), (c, "half")) for c in (forest, network, ensemble)]
    pairs += [
        ((c, "CRF"), (c, other))
        for c in (forest, network, ensemble, "DeepMedic, full size")
        for other in ("threshold", "pieces")
    ]
    made, lines = set(zip(table["classifier"], table["variant"])), []
    for a, b in pairs:
        if {a, b} <= made:
            for column in [*COLUMNS, "false_islands"]:
                percent = 100 if column in COLUMNS[:3] else 1
                found = compare(table.assign(**{column: percent * table[column]}), a, b, column)
                lines.append(f"* {name(*a)} − {name(*b)}, {column}: {found}")
    return lines


def report(store: Store) -> dict[str, str]:
    table, balances, errors = (store.read(f"deepmedic_table1{part}") for part in ("", "_balance", "_errors"))
    curves, vitals, blocks = store.read("deepmedic_table1_curves"), store.read("vitals"), {}
    if not table.empty:
        blocks["table"] = markdown(summarise(table), 2)
        blocks["differences"] = "\n".join(comparisons(table))
        learned = table[table["variant"] == "threshold"].groupby(["classifier", "seed"], sort=False)
        volumes = [
            f"* {classifier}, {seed:.0f}: {statistics.bland_altman(part['found_ml'], part['true_ml'])}"
            for (classifier, seed), part in learned
        ]
        blocks["volumes"] = "\n".join(volumes)
    if not balances.empty:
        mean = balances.groupby("balance")[["dice", "threshold"]].mean()
        blocks["balance"] = markdown(mean.reset_index().astype({"balance": str}))
    if not errors.empty:
        counts = errors.groupby("made_by")[["voxels", "ensemble_wrong"]].sum()
        counts["share made by the ensemble too"] = counts["ensemble_wrong"] / counts["voxels"]
        blocks["errors"] = markdown(counts.reset_index())
    if not curves.empty:
        runs = "seed " + curves["seed"].astype(str)
        blocks["curves"] = markdown(curves.assign(run=runs).pivot(index="step", columns="run", values="dice").reset_index())
        mine = vitals[vitals["experiment"] == store.name]
        blocks["vitals"] = markdown(mine.drop(columns="experiment"))
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
