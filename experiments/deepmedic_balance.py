"""Uniform patches, equal patches and dense segments: what the share of lesion does, and what the number of voxels does.

Claim (Kamnitsas et al. 2017, section 3.2 and figure 6, curves without numbers): a network trained on patches from anywhere (P_uni) is
specific and misses lesions; one trained on patches of which half sit on a lesion (P_eq) is sensitive and over-segments; dense training
on segments (S-d) lies between, and has the highest Dice, for a wide range of sizes.

Two things differ between these schemes at once: the share of lesion among the training voxels, and the number of voxels an update. Here
they are taken apart, by rows whose segments are those of S-25. In "uniform S-25" their centres lie anywhere, so it has the share of
P_uni. In "equal S-25" the loss weighs the classes so that lesion has half of the weight, as in P_eq. Both have as many voxels an update
as S-25. In "few S-25" as many voxels count in the loss as P_uni and P_eq have, drawn anew in each update. All rows have equal
updates, the "longer" ones three times as many, and about equal multiplications an update, as in the paper. (Patches as many as S-25 has
voxels would cost 36 times as much.)

Sensitivity, precision, specificity and Dice inside the brain, of eight test brains with contusions at 2 mm, three seeds; once at a
probability of .5, as in the paper, and once at the threshold with the best Dice on eight validation brains, chosen for each network
alike. A threshold is the control: where a scheme is behind at .5 and not at its own threshold, the scheme has moved the threshold and
no more. Compared are S-25 with both kinds of patches, both kinds with each other, shares and numbers of voxels, and the sizes.

The network is Shallow with kernels of 3³ and a fifth of its feature maps. It sees 9³ voxels, 18 mm, which is what the paper's
17³ voxels of 1 mm are. The segments are named after the paper's S-d that predicts as many voxels.

The tables are data/results/deepmedic_balance.csv and deepmedic_balance_curves.csv.
"""

import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown, provenance

from medseg_lite import baselines, inference, losses, metrics, phantoms, recipes, statistics, transforms
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch
from medseg_lite.volume import Case

SETTINGS = {"steps": 300}
SEEDS = (0, 1, 2)
COHORTS = {"train": (12, 0), "validation": (8, 1000), "test": (8, 2000)}  # number of cases, seed of the first
NETWORK = {"network": "shallow", "kernel": 3, "widths": (6, 8, 8, 10), "init": "he", "dropout": 0.0}
RATE, VALIDATIONS = 1e-2, 6

# Side of the predicted cube, where its centre lies, cubes an update, and how many times the updates of `SETTINGS`.
SCHEMES: dict[str, tuple[int, str, int, int]] = {
    "S-25": (9, "foreground", 4, 1),
    "P_eq": (1, "equal", 82, 1),
    "P_uni": (1, "uniform", 82, 1),
    "S-19": (3, "foreground", 30, 1),
    "S-29": (13, "foreground", 2, 1),
    "uniform S-25": (9, "uniform", 4, 1),
    "equal S-25": (9, "foreground", 4, 1),
    "few S-25": (9, "foreground", 4, 1),
    "longer S-25": (9, "foreground", 4, 3),
    "longer P_eq": (1, "equal", 82, 3),
    "longer P_uni": (1, "uniform", 82, 3),
}
FEW = 82  # voxels that count in "few S-25"
CUTS = {"half": "at .5", "chosen": "at the chosen threshold"}
SCORES = {name: getattr(metrics, name) for name in ("sensitivity", "specificity", "precision", "dice")}
COMPARED = {  # score, method, rival
    "Of the schemes": [
        ("sensitivity", "P_eq", "P_uni"),
        ("specificity", "P_eq", "P_uni"),
        ("precision", "P_eq", "P_uni"),
        ("dice", "S-25", "P_uni"),
        ("dice", "S-25", "P_eq"),
    ],
    "Of the share of lesion, with as many voxels an update as S-25": [
        ("sensitivity", "equal S-25", "uniform S-25"),
        ("precision", "equal S-25", "uniform S-25"),
        ("dice", "S-25", "uniform S-25"),
        ("dice", "S-25", "equal S-25"),
    ],
    "Of the number of voxels, with the same share": [
        ("dice", "S-25", "few S-25"),
        ("dice", "uniform S-25", "P_uni"),
        ("dice", "equal S-25", "P_eq"),
    ],
    "Of the schemes, after three times the updates": [
        ("sensitivity", "longer P_eq", "longer P_uni"),
        ("precision", "longer P_eq", "longer P_uni"),
        ("dice", "longer S-25", "longer P_uni"),
        ("dice", "longer S-25", "longer P_eq"),
        ("dice", "longer S-25", "S-25"),
    ],
    "Of the segment's size": [("dice", "S-19", "S-25"), ("dice", "S-29", "S-25"), ("dice", "S-29", "S-19")],
}


@cache
def cohort(part: str) -> list[Case]:
    """Return the brains to train on ("train"), for "validation" or to "test", with labels 0 and 1. No brain has two of these uses."""
    count, first = COHORTS[part]
    return [transforms.standardise(c) for c in phantoms.brain_cohort(count, lesion="contusions", first_seed=first)]


def scores_of(model: Network, case: Case) -> np.ndarray:
    """Return how much higher the lesion's logit is than the background's, `(D, H, W)`: above 0 where P > .5. Very low outside the brain."""
    logits = inference.predict(model, case, output="logits", progress=False)
    return np.where(case.mask, logits[1] - logits[0], -np.inf)


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    """Return the scores of a segmentation, inside the brain: background outside it is no merit."""
    pair = found[case.mask], case.label[case.mask] == 1
    return {name: metric(*pair) for name, metric in SCORES.items()}


def best_threshold(model: Network, cases: Sequence[Case]) -> tuple[float, list[np.ndarray]]:
    """Return the threshold of `scores_of` with the highest mean Dice, and the scores of each case."""
    maps = [scores_of(model, case) for case in cases]
    inside = [(m[c.mask], c.label[c.mask] == 1) for c, m in zip(cases, maps)]
    return metrics.best_threshold(*zip(*inside)), maps


def validate(model: Network, cases: Sequence[Case]) -> dict[str, float]:
    """Return the mean scores of the validation brains at P > .5, and their Dice at the best threshold."""
    threshold, maps = best_threshold(model, cases)
    rows = pd.DataFrame([score(m > 0, c) for c, m in zip(cases, maps)]).mean().to_dict()
    return rows | {"dice_chosen": float(np.mean([score(m > threshold, c)["dice"] for c, m in zip(cases, maps)]))}


def train(scheme: str, seed: int) -> tuple[Network, float]:
    """Train a network with a scheme; return it and the lesion's share in its loss, mean over the updates."""
    output, centres, count, times = SCHEMES[scheme]
    steps, shares, rng = times * SETTINGS["steps"], [], torch.Generator().manual_seed(seed)

    def loss(logits, label):
        if scheme == "equal S-25":
            shares.append(0.5)
            return losses.balanced_cross_entropy(logits, label, target_weights=(0.5, 0.5))
        counts = torch.ones(label.shape, dtype=torch.bool)
        if scheme == "few S-25":
            counts = (torch.randperm(label.numel(), generator=rng) < FEW).reshape(label.shape)
        shares.append(float(label[counts].float().mean()))
        return losses.cross_entropy(logits, label, mask=counts)

    model = recipes.deepmedic(
        cohort("train"),
        **NETWORK,
        classes=2,
        steps=steps,
        optimizer=partial(torch.optim.Adam, lr=RATE),
        schedule=lambda optimizer: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        loss=loss,
        output=output,
        scheme=centres,
        batch_size=count,
        validate_every=-(-steps // VALIDATIONS),
        engine={"validate": partial(validate, cases=cohort("validation"))},
        seed=seed,
        device="cpu",
        progress=False,
    )
    return model, float(np.mean(shares))


def multiplications(model: Network, output: int) -> int:
    """Return the multiplications of one forward pass that predicts a cube of this side."""
    side, total = output + 2 * model.margin, 0
    for conv in (m for m in model.modules() if isinstance(m, torch.nn.Conv3d)):
        side -= conv.kernel_size[0] - 1
        total += side**3 * conv.weight.numel()
    return total


def run(store: Store, scheme: str, seed: int) -> dict:
    """Train a network, choose its threshold on the validation brains, and score the test brains at .5 and at that threshold."""
    for part in COHORTS:
        cohort(part)  # which no row's seconds count
    cpu = time.process_time()
    model, share = train(scheme, seed)
    threshold, _ = best_threshold(model, cohort("validation"))
    cpu = time.process_time() - cpu
    output, _, count, times = SCHEMES[scheme]
    signs = store.examine(f"{scheme}, {seed}", model, cohort("validation"))
    facts = {
        "lesion_share": share,
        "voxels": FEW if scheme == "few S-25" else count * output**3,
        "million_multiplications": round(count * multiplications(model, output) / 1e6),
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": times * SETTINGS["steps"],
        "cpu_seconds": round(cpu, 1),
        "alive": signs.alive,
    } | provenance()
    rows = []
    for case in cohort("test"):
        above = scores_of(model, case)
        for cut, value in (("half", 0.0), ("chosen", threshold)):
            rows.append({"cut": cut, "logit": value, "case": case.name} | score(above > value, case) | facts)
    curve = model.history.dropna()[["step", "loss", *SCORES, "dice_chosen"]].to_dict("records")
    return {"deepmedic_balance_curves": curve, "deepmedic_balance": rows}


def run_baselines() -> list[dict]:
    """Score the methods without learning. Their thresholds are chosen on the validation brains."""
    methods = baselines.fit(cohort("train"), cohort("validation"))
    rows = []
    for name, method in methods.items():
        for case in cohort("test"):
            rows.append({"method": name, "cut": "chosen", "case": case.name} | score(method(case), case) | provenance())
    return rows


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for longer in (False, True):
        for seed in seeds or SEEDS:
            for scheme in (name for name in SCHEMES if name.startswith("longer") is longer):
                key, minutes = {"method": scheme, "seed": seed}, 0.25 if longer else 0.15
                rows.append(Row("deepmedic_balance", key, partial(run, store, scheme, seed), minutes, part="networks"))
    # All methods without learning are made at once. "nothing" is the first of them.
    return [*rows, Row("deepmedic_balance", {"method": "nothing", "seed": None}, run_baselines, 0.25, part="baselines")]


# ----------------------------------------------------------------------------------------------------------- the page


def table_of(scores: pd.DataFrame, method: str, cut: str, column: str) -> np.ndarray | None:
    """Return a column as `(seeds, cases)`, or None with fewer than two seeds."""
    rows = scores[(scores["method"] == method) & (scores["cut"] == cut)]
    table = rows.pivot(index="seed", columns="case", values=column).to_numpy()
    return table if len(table) > 1 else None


def last_third(curves: pd.DataFrame, method: str, column: str) -> float:
    """Return what a method's mean validation Dice gained in the last third of the updates."""
    mine = curves[curves["method"] == method]
    late = mine[mine["step"] >= 2 / 3 * mine["step"].max()].groupby("step")[column].mean()
    return float(late.iloc[-1] - late.iloc[0])


def summarise(scores: pd.DataFrame, curves: pd.DataFrame, cut: str) -> pd.DataFrame:
    """Return the table of a threshold for the page: percentages, means over seeds and cases, the Dice with its interval."""
    rows = []
    column = "dice" if cut == "half" else "dice_chosen"
    for method in (m for m in SCHEMES if m in set(scores["method"])):
        mine = scores[(scores["method"] == method) & (scores["cut"] == cut)]
        row = {"training examples": method, "lesion": f"{100 * mine['lesion_share'].mean():.1f}"}
        row |= {name: f"{100 * mine[name].mean():.1f}" for name in SCORES}
        found = table_of(scores, method, cut, "dice")
        if found is not None:
            interval = statistics.two_way(found)
            row["dice"] += f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
        if cut == "chosen":
            logits = mine.groupby("seed")["logit"].first()
            row["thresholds"] = ", ".join(f"{1 / (1 + np.exp(-value)):.3f}" for value in logits)
        rows.append(row | {"gain in the last third": f"{100 * last_third(curves, method, column):+.1f}"})
    if cut == "chosen":
        for name, mine in scores[scores["seed"].isna()].groupby("method", sort=False):
            rows.append({"training examples": name} | {k: f"{100 * mine[k].mean():.1f}" for k in SCORES})
    return pd.DataFrame(rows).fillna("–")


def costs(scores: pd.DataFrame) -> pd.DataFrame:
    """Return what an update and a training of each method cost."""
    columns = {"voxels": "voxels an update", "million_multiplications": "million multiplications an update"}
    columns |= {"updates": "updates", "parameters": "parameters", "cpu_seconds": "CPU s"}
    networks = scores[scores["seed"].notna()]
    means = networks.groupby("method", sort=False)[list(columns)].mean().round().astype(int)
    return means.rename(columns=columns).rename_axis("training examples").reset_index()


def compare(scores: pd.DataFrame) -> str:
    """Return a line for each comparison and threshold."""
    lines = []
    for title, pairs in COMPARED.items():
        lines.append(f"\n{title}:\n")
        for column, *methods in pairs:
            for cut, words in CUTS.items():
                tables = [table_of(scores, m, cut, column) for m in methods]
                if all(t is not None for t in tables):
                    found = statistics.two_way(*(100 * t for t in tables))
                    lines.append(f"* {column}, {' − '.join(methods)}, {words}: {found}")
    return "\n".join(lines)


def report(store: Store) -> dict[str, str]:
    scores, curves = store.read("deepmedic_balance"), store.read("deepmedic_balance_curves")
    if scores.empty or curves.empty:
        return {}
    blocks = {cut: markdown(summarise(scores, curves, cut)) for cut in CUTS}
    blocks |= {"compared": compare(scores), "costs": markdown(costs(scores))}
    return blocks | store.dead_networks()


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
