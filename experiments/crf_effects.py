"""What DeepMedic's CRF adds to segmenters of different quality, and what of it simpler steps and simpler fields add as well.

Claims (Kamnitsas et al. 2017): the CRF improves every segmenter, and the more the weaker it is (table 1, sections 4.1.3 and 5: +3.7
points of Dice for a forest with 51.1, +.7 for a network with 62.3); it improves the whole tumour of gliomas (tables 2 and 3: +.1, and
+1.1 where centres are new) and leaves core and enhancing tumour as they are; it improves strokes (table 4: +2 points, with a warning
that part of it may be over-fitting of the configuration); it removes islands and fills holes (section 2.5); a local field would do less
(section 5).

Metric: Dice, and all other columns of the paper's tables: precision, sensitivity, ASSD, Hausdorff distance; islands and holes. Comparison:
with and without the CRF, the same probabilities. All methods have their settings chosen on the same six configuration cases with as many
trials, by mean Dice: the CRF by random search; a threshold, a threshold with a smallest piece, and both after a blur, with draws that
are spread evenly, which favours them. Configuration cases have seeds from 60, test cases from 100 and (site D) from 200.

* contusions: random forests with four balances, three seeds each; the shipped DeepMedic, one seed. The balance is a dial from calling too
  much to calling about right. Ablations without smoothness, without appearance, and with a short reach.
* operating points: the same segmenters with the threshold at which they call too much, about the right amount, or too little. On the
  configuration cases, the two outer points are alike in Dice. So quality is held, and only the kind of error differs.
* gliomas: the shipped DeepMedic, two narrow networks that know tumour or not, three forests. 8 persons at sites A to C, 6 others at D.
* strokes: three forests on FLAIR, T1, T2 and DWI; 8 test cases.
* baselines: methods without learning (`medseg_lite.baselines`).

Nothing is trained but forests. The tables are data/results/crf_effects.csv (scores), crf_effects_chosen.csv (settings, and what they
promised), crf_effects_trials.csv (all trials of some searches, on all cases) and crf_effects_pieces.csv (true pieces of contusions, and
how much of each is found). Notebook 07 reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache, partial

import numpy as np
import pandas as pd
from _frame import Row, Store, baseline_rows, lesion_scores, main, markdown, moved
from scipy import ndimage
from scipy.stats import qmc

from medseg_lite import crf, inference, metrics, models, paths, phantoms, statistics, transforms
from medseg_lite.baselines import without_small_components
from medseg_lite.forest import RandomForest
from medseg_lite.volume import Case

SETTINGS = {"trials": 24, "cases": 0}  # trials of every method; cases of each set, 0 for all (fewer for a quick look)
SEEDS = (0, 1, 2)
BALANCES = (0.5, 0.2, 0.1, 0.05)
POINTS = ("too much", "best", "too little")
DROP = 0.06  # of Dice, from the best point to the outer ones, on the configuration cases
SEEN = ["flair", "t2"]  # what the appearance kernel sees

LESIONS = {"contusions": "contusions", "gliomas": "glioma", "strokes": "stroke"}
CHANNELS = {"strokes": ["flair", "t1", "t2", "dwi"]}  # those of the paper's strokes
TRAINING = {"contusions": range(10), "gliomas": range(10), "strokes": range(10)}
CONFIGURATION = range(60, 66)
TEST = {
    "contusions": {"test": range(100, 112)},
    "gliomas": {"sites A to C": range(100, 108), "site D": range(200, 206)},
    "strokes": {"test": range(100, 108)},
}
REGIONS = {task: {"whole": [1]} for task in LESIONS}
REGIONS["gliomas"] = {region: sorted(classes) for region, classes in metrics.regions["brats2015"].items()}
NETWORKS = {
    "contusions": {"DeepMedic": "deepmedic_contusions"},
    "gliomas": {
        "DeepMedic": "deepmedic_phantoms",
        "DeepMedic, narrow": "analysis_deepmedic",
        "Deep+, narrow": "analysis_deep_plus",
    },
    "strokes": {},
}

# What each method may choose, and how: limits, drawn uniformly in the logarithm. A threshold is 1 minus the number that is drawn.
RIVALS = {
    "threshold": {"beyond": (0.01, 0.7)},
    "threshold + pieces": {"beyond": (0.01, 0.7), "smallest": (3, 1000)},
    "blur + threshold + pieces": {"beyond": (0.01, 0.7), "smallest": (3, 1000), "blur": (0.4, 3)},
}
WITHOUT = {"smoothness": {"smoothness_weight": 0.0, "smoothness_sigma": 1.0}}
WITHOUT["appearance"] = {"appearance_weight": 0.0, "appearance_sigma": 1.0, "intensity_sigma": 1.0}
SHORT = {"smoothness_sigma": (0.5, 1.0), "appearance_sigma": (1.0, 1.5)}  # voxels: little is heard beyond the next two
FIELDS = {
    "CRF": {},
    "CRF without smoothness": {"fixed": WITHOUT["smoothness"]},
    "CRF without appearance": {"fixed": WITHOUT["appearance"]},
    "CRF of short reach": {"space": SHORT},
}
CHOSEN = ("forest, balance 0.05", "DeepMedic")  # of contusions: ablated, moved to other operating points, all trials kept


# ------------------------------------------------------------------------------------------------------------- cases


@cache
def case(task: str, seed: int, site: str) -> Case:
    found = phantoms.brain(seed, site=site, lesion=LESIONS[task])
    found = found.select(CHANNELS[task]) if task in CHANNELS else found
    return transforms.standardise(found).replace(extra={})


def home(task: str, seeds: Sequence[int], sites: str = "ABC") -> list[Case]:
    """Return cases at the sites in turn."""
    return [case(task, seed, sites[seed % len(sites)]) for seed in list(seeds)[: SETTINGS["cases"] or None]]


def test_sets(task: str) -> dict[str, list[Case]]:
    return {name: home(task, seeds, "D" if name == "site D" else "ABC") for name, seeds in TEST[task].items()}


# -------------------------------------------------------------------------------------------------------- segmenters


@lru_cache(maxsize=1)
def trained(task: str, segmenter: str, seed: int):
    """Return a function that makes class probabilities `(K, D, H, W)` of a case."""
    if segmenter in NETWORKS[task]:
        model = models.load(paths.shipped("checkpoints", f"{NETWORKS[task][segmenter]}.safetensors"))
        return partial(inference.predict, model, output="probabilities", progress=False)
    balance = float(segmenter.rpartition(" ")[2])
    forest = RandomForest(trees=20, depth=30, seed=seed, jobs=1)
    forest.fit(home(task, TRAINING[task]), points_per_case=1000, balance=balance)
    return partial(forest.predict, progress=False)


@lru_cache(maxsize=1)
def probabilities(task: str, segmenter: str, seed: int) -> dict[str, list[np.ndarray]]:
    """Return the probabilities of the configuration cases and of each test set."""
    predict = trained(task, segmenter, seed)
    sets = {"configuration": home(task, CONFIGURATION)} | test_sets(task)
    return {name: [predict(c) for c in cases] for name, cases in sets.items()}


def operating_thresholds(maps: Sequence[np.ndarray], cases: Sequence[Case]) -> dict[str, float]:
    """Return the threshold of the highest mean Dice, and one on either side of it whose Dice is lower by `DROP`."""
    tried = 1 / (1 + np.exp(-np.linspace(-7, 7, 57)))
    dice = np.array([np.mean([metrics.dice(1 - p[0] > t, c.label > 0) for p, c in zip(maps, cases)]) for t in tried])
    best = int(dice.argmax())
    short = np.abs(dice - (dice[best] - DROP))
    return {
        "too much": tried[short[: best + 1].argmin()],
        "best": tried[best],
        "too little": tried[best + short[best:].argmin()],
    }


# ----------------------------------------------------------------------------------------------------------- methods


def draws(space: dict[str, tuple[float, float]]) -> list[dict[str, float]]:
    """Draw settings that are spread evenly over their ranges (a Latin hypercube)."""
    low, high = np.log(list(space.values())).T
    values = np.exp(low + (high - low) * qmc.LatinHypercube(len(space), seed=0).random(SETTINGS["trials"]))
    return [{"threshold" if k == "beyond" else k: 1 - v if k == "beyond" else v for k, v in zip(space, row)} for row in values]


def clean(p: np.ndarray, c: Case, *, threshold: float = 0.5, smallest: float = 0.0, blur: float = 0.0) -> np.ndarray:
    """Return where the lesion is: a blur, a threshold and a smallest piece in voxels, those of them that are given."""
    score = (1 - p[0]) * c.mask
    score = ndimage.gaussian_filter(score, blur) if blur else score
    found = (score > threshold) & c.mask
    return without_small_components(found, round(smallest)) if smallest else found


def choose(method: str, maps: Sequence[np.ndarray], cases: Sequence[Case]) -> tuple[dict[str, float], float]:
    """Return the settings with the highest mean Dice on the configuration cases, and that Dice, for a method without a field."""
    tried = [
        (np.mean([metrics.dice(clean(p, c, **s), c.label > 0) for p, c in zip(maps, cases)]), s) for s in draws(RIVALS[method])
    ]
    dice, settings = max(tried, key=lambda one: one[0])
    return settings, float(dice)


def search(method: str, maps: Sequence[np.ndarray], cases: Sequence[Case]) -> crf.Search:
    fixed, other = FIELDS[method].get("fixed", {}), FIELDS[method].get("space", {})
    space = {name: limits for name, limits in (crf.SPACE | other).items() if name not in fixed}
    seen = [c.select(SEEN) for c in cases]
    return crf.search(seen, maps, trials=SETTINGS["trials"], weights_per_lattice=3, space=space, progress=False, **fixed)


def apply(method: str, settings: dict[str, float], p: np.ndarray, c: Case) -> np.ndarray:
    """Return the labels of a case. What is added to a tumour with several classes gets its most probable class."""
    if method == "alone":
        return p.argmax(0).astype(np.uint8)
    if method in FIELDS:
        fixed = FIELDS[method].get("fixed", {})
        return crf.whole_tumour(crf.DenseCRF(**(fixed | settings)), p, c.select(SEEN))
    return np.where(clean(p, c, **settings), 1 + p[1:].argmax(0), 0).astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------ scores


def score(label: np.ndarray, c: Case, classes: Sequence[int]) -> dict[str, float]:
    """Return the columns of the paper's tables, volumes, islands (pieces that touch no lesion) and voxels in holes."""
    found, truth = np.isin(label, classes), np.isin(c.label, classes)
    scores = lesion_scores(found, truth, c.spacing)
    islands, holes = scores.pop("false_islands"), int(ndimage.binary_fill_holes(found).sum() - found.sum())
    return scores | {"islands": islands, "holes": holes}


def describe_pieces(c: Case) -> list[tuple[np.ndarray, dict]]:
    """Return where each true piece of lesion is, with its size, its depth below the skull and its intensities.

    The contrast is the mean FLAIR of the piece less that of the tissue within 6 mm around it. The spread is the mean standard deviation
    of FLAIR and T2 within the piece. All in standard deviations of the brain.
    """
    pieces, count = ndimage.label(c.label > 0)
    below = ndimage.distance_transform_edt(c.mask, sampling=c.spacing)
    flair, t2 = (c.image[c.channels.index(name)] for name in SEEN)
    rows = []
    for number in range(1, count + 1):
        inside = pieces == number
        if inside.sum() < 20:  # voxels; what is left is too small to have a spread
            continue
        around = ndimage.binary_dilation(inside, iterations=3) & c.mask & (c.label == 0)
        facts = {
            "piece": number,
            "ml": round(inside.sum() * np.prod(c.spacing) / 1000, 2),
            "depth_mm": round(below[inside].mean(), 1),
            "contrast": round(float(flair[inside].mean() - flair[around].mean()), 3),
            "spread": round(float(flair[inside].std() + t2[inside].std()) / 2, 3),
        }
        rows.append((inside, facts))
    return rows


# -------------------------------------------------------------------------------------------------------------- rows


def run(task: str, segmenter: str, seed: int) -> dict:
    """Choose and score all methods for one segmenter."""
    maps = probabilities(task, segmenter, seed)
    config, tests = home(task, CONFIGURATION), test_sets(task)
    chosen_one = task == "contusions" and segmenter in CHOSEN
    methods = ["alone", *RIVALS, *(FIELDS if chosen_one else ["CRF"])]
    chosen, scores, pieces, trials, searches = [], [], [], [], {}
    regions = {r: k for r, k in REGIONS[task].items() if r == "whole" or len(maps["configuration"][0]) > 2}
    found = {}
    for method in methods:
        settings = {}
        if method in FIELDS:
            searches[method] = search(method, maps["configuration"], config)
            settings, promised = searches[method].best, float(searches[method].table["dice"].max())
        elif method in RIVALS:
            settings, promised = choose(method, maps["configuration"], config)
        if settings:
            chosen.append({"method": method, "promised": promised, "settings": _words(settings)})
        for name, cases in tests.items():
            found[method, name] = [apply(method, settings, p, c) for p, c in zip(maps[name], cases)]
            for label, c in zip(found[method, name], cases):
                facts = {"method": method, "set": name, "case": c.name}
                scores += [facts | {"region": region} | score(label, c, classes) for region, classes in regions.items()]
    if task == "contusions":
        for i, c in enumerate(tests["test"]):
            for inside, facts in describe_pieces(c):
                shares = {m: round(float((found[m, "test"][i][inside] > 0).mean()), 3) for m in methods}
                pieces.append({"case": c.name} | facts | {m: shares.get(m) for m in ("alone", *RIVALS, *FIELDS)})
    if task == "strokes" or chosen_one:
        both = {"configuration": searches["CRF"], "test": search("CRF", maps["test"], tests["test"])}
        for name, result in both.items():
            cases = config if name == "configuration" else tests["test"]
            for c, base, column in zip(cases, result.baseline, result.scores.to_numpy().T):
                trials += [{"set": name, "case": c.name, "trial": t, "alone": base, "dice": d} for t, d in enumerate(column)]
    beside = {"crf_effects_pieces": pieces, "crf_effects_trials": trials}
    return {"crf_effects": scores, "crf_effects_chosen": chosen} | {table: rows for table, rows in beside.items() if rows}


def run_point(segmenter: str, seed: int, point: str) -> dict:
    """Move a segmenter of contusions to another operating point, and score it with and without its own CRF."""
    maps = probabilities("contusions", segmenter, seed)
    config, tests = home("contusions", CONFIGURATION), test_sets("contusions")
    threshold = operating_thresholds(maps["configuration"], config)[point]
    there = {name: [moved(1 - p[0], threshold) for p in some] for name, some in maps.items()}
    found = search("CRF", there["configuration"], config)
    settings, promised = found.best, float(found.table["dice"].max())
    scores = []
    for method, chosen in {"alone": {}, "CRF": settings}.items():
        for p, c in zip(there["test"], tests["test"]):
            facts = {"method": method, "set": "test", "case": c.name, "region": "whole"}
            scores.append(facts | score(apply(method, chosen, p, c), c, [1]))
    notes = [
        {"method": "threshold", "promised": None, "settings": _words({"threshold": threshold})},
        {"method": "CRF", "promised": promised, "settings": _words(settings)},
    ]
    return {"crf_effects": scores, "crf_effects_chosen": notes}


def run_baselines(task: str) -> dict:
    """Score the methods without learning; gliomas for the whole tumour, at all sites."""
    named = {c.name: name for name, some in test_sets(task).items() for c in some}
    cases = [home(task, TRAINING[task]), home(task, CONFIGURATION), [c for some in test_sets(task).values() for c in some]]
    parts = [[c.select(SEEN) for c in some] for some in cases]  # what the CRF sees, which also shows the lesions best
    rows = baseline_rows(*parts, {"dice": REGIONS[task]["whole"]})
    return {"crf_effects": [row | {"region": "whole", "set": named[row["case"]]} for row in rows]}


def _words(settings: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in settings.items())


def plan(store: Store, seeds) -> list[Row]:
    def row(part: str, segmenter: str, seed: int | None, point: str, job, minutes: float) -> Row:
        key = {"task": part, "segmenter": segmenter, "point": point, "seed": seed}
        return Row("crf_effects", key, job, minutes, part="operating points" if point else "")

    seeds, rows = seeds or SEEDS, []
    for task in LESIONS:
        forests = [f"forest, balance {b}" for b in (BALANCES if task == "contusions" else (0.1,))]
        several = [(name, seed) for name in forests for seed in seeds] + [(name, 0) for name in NETWORKS[task]]
        for name, seed in several:
            rows.append(row(task, name, seed, "", partial(run, task, name, seed), 0.6))
            if task == "contusions" and name in CHOSEN:
                rows += [row(task, name, seed, p, partial(run_point, name, seed, p), 0.1) for p in POINTS]
        rows.append(row(task, "baselines", None, "", partial(run_baselines, task), 0.3))
    return rows


# ---------------------------------------------------------------------------------------------------------- the page


def interval(rows: pd.DataFrame, method: str, rival: str | None = None, column: str = "dice") -> statistics.Interval:
    """Return the mean of a column, or its difference between two methods, over seeds and cases; over cases alone for one seed."""
    one = rows.pivot(index=["seed", "case"], columns="method", values=column)
    difference = one[method] - (one[rival] if rival else 0)
    table = difference.unstack("case").to_numpy()
    scale = 100 if column in ("dice", "precision", "sensitivity") else 1
    return statistics.two_way(scale * (np.repeat(table, 2, axis=0) if len(table) == 1 else table))


def show(found: statistics.Interval, digits: int = 1, sign: str = "+") -> str:
    return f"{found.mean:{sign}.{digits}f} ({found.low:{sign}.{digits}f} to {found.high:{sign}.{digits}f})"


def quality(scores: pd.DataFrame) -> pd.DataFrame:
    """Return each segmenter of contusions before the CRF, and what the CRF adds."""
    rows = []
    for (segmenter, point), part in scores[scores["segmenter"] != "baselines"].groupby(["segmenter", "point"], sort=False):
        before = part[part["method"] == "alone"]
        means = 100 * before[["dice", "precision", "sensitivity"]].mean()
        rows.append(
            {"segmenter": segmenter, "point": point or "P > .5", "runs": part["seed"].nunique()}
            | {"Dice": means["dice"], "precision": means["precision"], "sensitivity": means["sensitivity"]}
            | {"found / true volume": (before["found_ml"] / before["true_ml"]).mean()}
            | {"Dice with the CRF": 100 * part.loc[part["method"] == "CRF", "dice"].mean()}
            | {"gain": show(interval(part, "CRF", "alone"))}
        )
    return pd.DataFrame(rows)


def all_columns(scores: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return the means of all columns without and with the CRF."""
    some = scores[scores["method"].isin(["alone", "threshold + pieces", "CRF"])]
    columns = ["dice", "precision", "sensitivity", "assd", "hausdorff", "islands", "holes"]
    table = some.groupby([*by, "method"], sort=False)[columns].mean().reset_index()
    table[columns[:3]] *= 100
    return table


def rivals(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the Dice of every method for each segmenter, and by how much the CRF is ahead of it."""
    rows = []
    for segmenter, part in scores.groupby("segmenter", sort=False):
        for method, mine in part.groupby("method", sort=False):
            ahead = show(interval(part, "CRF", method)) if method != "CRF" else "–"
            rows.append({"segmenter": segmenter, "method": method, "Dice": 100 * mine["dice"].mean(), "CRF − method": ahead})
    return pd.DataFrame(rows)


def cohort(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the gain of the CRF on gliomas for each segmenter, set and region."""
    rows = []
    for (segmenter, name, region), part in scores.groupby(["segmenter", "set", "region"], sort=False):
        cell = {"segmenter": segmenter, "set": name, "n": part["case"].nunique(), "region": region}
        for column in ("dice", "precision", "sensitivity"):
            before, after = (100 * part.loc[part["method"] == m, column].mean() for m in ("alone", "CRF"))
            cell[column] = f"{before:.1f} → {after:.1f}"
        rows.append(cell | {"gain in Dice": show(interval(part, "CRF", "alone"))})
    return pd.DataFrame(rows)


def optimism(trials: pd.DataFrame, *, cases: int, draws: int = 300, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean gain of the best trial where it was chosen, and on other cases, and the mean gain of any trial.

    Each repetition draws `cases` of all cases, chooses the best trial on them, and looks at the others.
    """
    table = 100 * (trials.pivot(index="trial", columns="case", values="dice") - trials.groupby("case")["alone"].first())
    gains, rng, found = table.to_numpy(), np.random.default_rng(seed), []
    for _ in range(draws):
        order = rng.permutation(gains.shape[1])
        best = gains[:, order[:cases]].mean(axis=1).argmax()
        found.append((gains[best, order[:cases]].mean(), gains[best, order[cases:]].mean()))
    return *map(float, np.mean(found, axis=0)), float(gains.mean())


def overfitting(trials: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for (task, segmenter, seed), part in trials.groupby(["task", "segmenter", "seed"], sort=False):
        for cases in (1, 3, 6):
            promised, kept, any_trial = optimism(part, cases=cases)
            rows.append({"task": task, "segmenter": segmenter, "seed": seed, "chosen on": f"{cases} case{'s' * (cases > 1)}"})
            rows[-1] |= {
                "promised gain": promised,
                "kept gain": kept,
                "promised less kept": promised - kept,
                "any trial": any_trial,
            }
    return pd.DataFrame(rows)


def report(store: Store) -> dict[str, str]:
    scores = store.read("crf_effects", dtype={"point": str}).fillna({"point": ""})
    if scores.empty:
        return {}
    blocks = {}
    for task, part in scores[scores["segmenter"] != "baselines"].groupby("task", sort=False):
        plain = part[part["point"] == ""]
        if task == "contusions":
            blocks["quality"] = markdown(quality(part), 2)
            blocks["contusions"] = markdown(all_columns(plain, ["segmenter"]), 2)
            blocks["rivals"] = markdown(rivals(plain), 1)
        elif task == "gliomas":
            blocks["gliomas"] = markdown(cohort(plain), 1)
        else:
            blocks["strokes"] = "\n\n".join([markdown(all_columns(plain, ["segmenter"]), 2), markdown(rivals(plain), 1)])
    dumb = scores[scores["segmenter"] == "baselines"]
    if len(dumb):
        table = 100 * dumb.pivot_table(index=["task", "set"], columns="method", values="dice", sort=False)
        blocks["baselines"] = markdown(table.reset_index(), 1)
    trials = store.read("crf_effects_trials")
    if len(trials):
        blocks["overfitting"] = markdown(overfitting(trials), 1)
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
