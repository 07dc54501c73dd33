"""Does a generative model of the acquisition, used as augmentation, make DeepMedic indifferent to scanners?

Claims (Kamnitsas et al. 2017). Section 5, future work: such a model would serve for augmentation; no number. Section 4.2.3, table 3:
scores fall on test data of centres that gave no training data, 89.7 to 83.6 % Dice of the whole tumour. Section 5, future work:
dropout at inference shows the model's confidence; no number.

The phantoms' scanner is such a model: `phantoms.random_site` draws a scanner that exists nowhere. Sixteen patients with gliomas, tumour
against the rest, are scanned for three trainings that are alike in all else, updates included:

    "sites A to C"          each patient at the three known sites
    "random scanners"       each patient in four random scanners, none of them a known site
    "shifted intensities"   the known sites; every channel of every segment is multiplied and shifted at random (the control: any
                            variation of intensities, without a model of where it comes from)

Test: twelve other patients, each scanned twice, at a known site and at site D, which no training has seen. So the two scores of a
patient differ by the scanner alone. Three seeds. The random scanners' ranges hold site D's settings; none was fitted to them. The
threshold is chosen for each network on the same six validation patients at known sites. Metric: Dice of the whole tumour; precision,
sensitivity and volumes are stored. Networks are narrow, have the
paper's dropout, and train for a short time with a rate that falls to zero.

Doubt: for the first training's networks, dropout is left on for eight draws. Which voxels are wrong is decided once, by the ordinary
answer. How well are they found by the entropy of the draws' mean, and by that of the ordinary probabilities? Areas under the curve,
the share of errors among the most doubtful tenth, and the gap between confidence and accuracy (expected calibration error), in the
scans of six test patients. Intervals are over seeds and patients.

The tables are data/results/deepmedic_acquisition.csv, _curves.csv and _doubt.csv, which notebook 06 reads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown, moved, provenance
from scipy.stats import rankdata
from torch.nn import functional as F

from medseg_lite import baselines, inference, metrics, phantoms, recipes, statistics, transforms
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch
from medseg_lite.phantoms import Site
from medseg_lite.volume import Case

TRAINING, VALIDATION, TEST = range(16), range(60, 66), range(200, 212)  # seeds of the patients
SCANNERS = 4  # random ones for each patient
SEEDS = (0, 1, 2)
SETTINGS = {"width": 0.3, "steps": 300, "rate": 2e-3}
VALIDATIONS = 4
DRAWS = 8
THRESHOLDS = 1 / (1 + np.exp(-np.linspace(-5, 5, 41)))
DOUBTFUL = TEST[:6]  # patients whose doubt is measured
DOUBTS = ("ordinary", "dropout")
TRAININGS = ("sites A to C", "random scanners", "shifted intensities")


@cache
def scan(seed: int, site: str | int) -> Case:
    """Return a standardised scan, with one label for the whole tumour, at a site or in the random scanner of a number."""
    where: str | Site = phantoms.random_site(site) if isinstance(site, int) else site
    case = transforms.standardise(phantoms.brain(seed, site=where)).replace(extra={})
    return case.replace(label=(case.label > 0).astype(np.uint8))


def known(seed: int) -> Case:
    return scan(seed, "ABC"[seed % 3])


def training_scans(training: str) -> list[Case]:
    if training == "random scanners":
        return [scan(seed, 100 * seed + n) for seed in TRAINING for n in range(SCANNERS)]
    return [scan(seed, site) for seed in TRAINING for site in "ABC"]


def unsettle(image, label, *, rng):
    """Multiply every channel of every segment by a random number, and shift it."""
    shape = (*image.shape[:2], *[1] * (image.ndim - 2))
    gain, shift = (torch.as_tensor(rng.normal(0, 0.3, shape), dtype=image.dtype) for _ in range(2))
    return image * gain.exp() + shift, label


class DropoutSamples(Network):
    """The mean probabilities of a DeepMedic over draws with dropout, as logits; the pathways are computed once."""

    def __init__(self, network: Network, draws: int = DRAWS):
        super().__init__()
        self.copy_contract(network)
        self.network, self.draws = network, draws

    def forward(self, patch):
        net = self.network
        normal, low = net.cut(patch)
        context = F.interpolate(net.low(low), scale_factor=3, mode="nearest")
        first, second = net.hidden[0](torch.cat([net.normal(normal), context], dim=1)), net.hidden[1]
        mean = 0
        for _ in range(self.draws):
            h = second.act(second.norm(second.conv(F.dropout(first, net.drop.p, training=True))))
            mean = mean + net.classifier(F.dropout(h, net.drop.p, training=True)).softmax(1) / self.draws
        return mean.log()


def tumour(model: Network, case: Case) -> np.ndarray:
    """Return the probability of tumour in every voxel."""
    return inference.predict(model, case, output="probabilities", progress=False)[1]


def best_threshold(maps: Sequence[np.ndarray], cases: Sequence[Case]) -> float:
    return metrics.best_threshold(maps, [case.label > 0 for case in cases], thresholds=THRESHOLDS)


def train(store: Store, training: str, seed: int, validation: Sequence[Case]) -> Network:
    steps = SETTINGS["steps"]

    def watch(model: Network) -> dict[str, float]:
        maps = [tumour(model, case) for case in validation]
        above = best_threshold(maps, validation)
        return {"dice": float(np.mean([metrics.dice(p > above, c.label > 0) for p, c in zip(maps, validation)]))}

    return recipes.deepmedic(
        training_scans(training),
        classes=2,
        width=SETTINGS["width"],
        steps=steps,
        optimizer=partial(torch.optim.Adam, lr=SETTINGS["rate"]),
        schedule=lambda optimizer: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        augment=unsettle if training == "shifted intensities" else None,
        validate_every=-(-steps // VALIDATIONS),
        engine={"validate": watch},
        folder=store.runs / f"{training}-{seed}".replace(" ", "-"),
        seed=seed,
        device="cpu",
        progress=False,
    )


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    truth, ml = case.label > 0, np.prod(case.spacing) / 1000
    rates = {name: getattr(metrics, name)(found, truth) for name in ("dice", "precision", "sensitivity")}
    return rates | {"true_ml": truth.sum() * ml, "found_ml": found.sum() * ml}


@cache
def trained(store: Store, training: str, seed: int) -> tuple[Network, float, dict]:
    """Return a network, the threshold that is best for the validation patients, and facts. What runs/ holds is not trained again."""
    cpu, cases = time.process_time(), [known(s) for s in VALIDATION]
    model = train(store, training, seed, cases[:3])
    above = best_threshold([tumour(model, case) for case in cases], cases)
    facts = {"threshold": above, "parameters": sum(p.numel() for p in model.parameters()), "updates": SETTINGS["steps"]}
    return model, above, facts | {"cpu_seconds": round(time.process_time() - cpu, 1)}


def test_scans(patients: Sequence[int]) -> list[tuple[dict, Case]]:
    """Return the two scans of each patient, with what the tables say of them."""
    both = [(s, where) for s in patients for where in ("known", "D")]
    return [({"set": where, "patient": s}, scan(s, "D") if where == "D" else known(s)) for s, where in both]


def run(store: Store, training: str, seed: int) -> dict:
    model, above, facts = trained(store, training, seed)
    signs = store.examine(f"{training}, {seed}", model, [known(s) for s in VALIDATION[:2]])
    facts = facts | {"alive": signs.alive} | provenance()
    scores = [about | score(tumour(model, case) > above, case) | facts for about, case in test_scans(TEST)]
    curve = model.history.dropna()[["step", "loss", "dice"]].to_dict("records")
    return {"deepmedic_acquisition": scores, "deepmedic_acquisition_curves": curve}


def run_doubt(store: Store, training: str, seed: int) -> list[dict]:
    """Return how well two kinds of doubt find the same errors, in the scans of some test patients."""
    model, above, _ = trained(store, training, seed)
    torch.manual_seed(seed)
    sampled, cases, rows = DropoutSamples(model).eval(), [known(s) for s in VALIDATION], []
    own = best_threshold([tumour(sampled, case) for case in cases], cases)
    for about, case in test_scans(DOUBTFUL):
        truth, inside = case.label[case.mask] > 0, case.mask
        maps = {
            "ordinary": moved(tumour(model, case)[inside], above)[1],
            "dropout": moved(tumour(sampled, case)[inside], own)[1],
        }
        wrong = (maps["ordinary"] > 0.5) != truth
        row = about | {"wrong": wrong.mean()}
        for name, q in maps.items():
            entropy = -q * np.log(q) - (1 - q) * np.log(1 - q)
            row[f"auc_{name}"] = area_under_curve(entropy, wrong)
            row[f"tenth_{name}"] = wrong[np.argsort(-entropy)[: len(wrong) // 10]].sum() / wrong.sum()
            row[f"ece_{name}"] = calibration_error(np.maximum(q, 1 - q), (q > 0.5) == truth)
            row[f"dice_{name}"] = metrics.dice(q > 0.5, truth)
        rows.append(row)
    return rows


def area_under_curve(score: np.ndarray, wrong: np.ndarray) -> float:
    """Return the chance that a wrong voxel has a higher score than a right one."""
    ranks, count = rankdata(score), wrong.sum()
    return (ranks[wrong].sum() - count * (count + 1) / 2) / (count * (~wrong).sum())


def calibration_error(confidence: np.ndarray, right: np.ndarray, bins: int = 15) -> float:
    """Return the mean gap between confidence and share right, over bins of the confidence, weighted by their voxels."""
    number = np.minimum((bins * (2 * confidence - 1)).astype(int), bins - 1)
    gaps = np.bincount(number, confidence - right, minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def run_baselines() -> list[dict]:
    """Score the methods without learning. "nothing" is the first of them."""
    methods = baselines.fit(training_scans(TRAININGS[0]), [known(s) for s in VALIDATION])
    rows = []
    for name, method in methods.items():
        rows += [{"training": name} | about | score(method(case), case) | provenance() for about, case in test_scans(TEST)]
    return rows


def plan(store: Store, seeds) -> list[Row]:
    def rows(table: str, training: str, job: Callable, minutes: float, part: str) -> list[Row]:
        keys = [{"training": training, "seed": seed} for seed in seeds or SEEDS]
        return [Row(table, key, partial(job, store, *key.values()), minutes, part) for key in keys]

    first, second, control = TRAININGS
    return [
        *rows("deepmedic_acquisition", first, run, 1.3, "networks"),
        *rows("deepmedic_acquisition", second, run, 1.3, "networks"),
        *rows("deepmedic_acquisition_doubt", first, run_doubt, 1.2, "doubt"),
        *rows("deepmedic_acquisition", control, run, 1.3, "networks"),
        Row("deepmedic_acquisition", {"training": "nothing", "seed": None}, run_baselines, 0.5, "baselines"),
    ]


# --------------------------------------------------------------------------------------------------------------- the page


def dice_at(table: pd.DataFrame, training: str, where: str) -> pd.DataFrame:
    """Return the Dice in percent, `(runs, patients)`."""
    rows = table[(table["training"] == training) & (table["set"] == where) & table["seed"].notna()]
    return 100 * rows.pivot(index="seed", columns="patient", values="dice")


def comparisons(table: pd.DataFrame, trainings: Sequence[str]) -> list[str]:
    """Return a line for the loss at site D of each training, and for each gain of the random scanners."""
    lines = []
    for training in trainings:
        lost = statistics.two_way(
            dice_at(table, training, "D") - dice_at(table, training, "known")
        )  # the same networks and patients
        lines.append(f"* {training}, Dice at site D − Dice at known sites: {lost}")
    for rival in trainings:
        if rival != "random scanners" and "random scanners" in trainings:
            for where in ("D", "known"):
                gain = statistics.two_way(dice_at(table, "random scanners", where), dice_at(table, rival, where))
                lines.append(f"* random scanners − {rival}, Dice at {'site D' if where == 'D' else 'known sites'}: {gain}")
    return lines


def report(store: Store) -> dict[str, str]:
    table, curves, doubt = (store.read(f"deepmedic_acquisition{part}") for part in ("", "_curves", "_doubt"))
    if table.empty or curves.empty:
        return {}
    trainings = [t for t in TRAININGS if table.loc[table["training"] == t, "seed"].nunique() > 1]
    columns = ["dice", "precision", "sensitivity", "true_ml", "found_ml"]
    means = table.groupby(["training", "set"], sort=False)[columns].mean().reset_index()
    runs = table.groupby(["training", "set"], sort=False)["seed"].nunique().to_numpy()
    named = curves["training"] + ", " + curves["seed"].astype(str)
    blocks = {
        "scores": markdown(means.assign(runs=runs)),
        "differences": "\n".join(comparisons(table, trainings)),
        "curves": markdown(curves.assign(run=named).pivot(index="step", columns="run", values="dice").reset_index()),
    }
    if not doubt.empty and doubt["seed"].nunique() > 1:
        lines = [markdown(doubt.drop(columns=["patient", "training", "seed"]).groupby("set", sort=False).mean().reset_index())]
        lines.append("\nArea under the curve in percent, dropout − ordinary:\n")
        for where in ("known", "D"):
            of = {
                k: 100 * doubt[doubt["set"] == where].pivot(index="seed", columns="patient", values=f"auc_{k}") for k in DOUBTS
            }
            lines.append(f"* {where}: {statistics.two_way(of['dropout'] - of['ordinary'])}")
        blocks["doubt"] = "\n".join(lines)
    vitals = store.read("vitals")
    blocks["vitals"] = markdown(vitals[vitals["experiment"] == store.name].drop(columns="experiment"))
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
