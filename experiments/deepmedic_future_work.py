"""The proposals of Finzel's survey for DeepMedic, a cascade of two of them and training in two phases, against plain DeepMedic.

All are trained on the same 12 phantoms (seeds 0 to 11) and scored on the same 8 held-out ones (seeds 100 to 107). In all, each makes
the same number of updates, but for the two that are only the first part of another, "half as long" and "equal classes":

    plain                 DeepMedic's recipe: half of the segments centred on tumour, half on healthy brain
    half as long          the same with half of the updates, the first network of the cascade
    cascade               then a second DeepMedic, which sees the first one's class probabilities as further channels
    equal classes         three quarters of the updates with every class equally often in the middle of a segment
    equal, then natural   then a quarter for the classifier alone, on segments from anywhere in the brain
    plain, then natural   the same second phase after three quarters of DeepMedic's own recipe

The tables are data/results/deepmedic_future_work.csv (means over the held-out cases, for each seed and variant), which notebook 02
reads, and baselines.csv.
"""

from functools import cache, partial

import numpy as np
import pandas as pd
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown
from scipy import ndimage
from torch import Tensor

from medseg_lite import inference, metrics, phantoms, recipes, transforms
from medseg_lite.models import Network
from medseg_lite.volume import Case

SETTINGS = {"updates": 500, "width": 0.2}
BATCH = 5  # half of the paper's, for twice the updates in the same time


class LastLayer(Network):
    """A trained DeepMedic of which only the classifier (and the dropout before it) is still in training."""

    def __init__(self, model: Network):
        super().__init__()
        self.copy_contract(model)
        self.model, self.cut = model, model.cut
        for p in model.parameters():
            p.requires_grad_(False)
        for p in model.classifier.parameters():
            p.requires_grad_(True)

    def train(self, mode: bool = True) -> Network:
        """Set the last layer to training; batch normalisation keeps the statistics that it has."""
        super().train(mode)
        self.model.eval()
        self.model.drop.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


@cache
def cohort(count: int, first_seed: int) -> list[Case]:
    return [transforms.standardise(c) for c in phantoms.brain_cohort(count, first_seed=first_seed)]


def train(cases: list[Case], updates: int, **options) -> Network:
    settings = {"halvings": (0.6, 0.8, 0.9), "batch_size": BATCH, "progress": False}
    if "network" not in options:
        settings["width"] = SETTINGS["width"]
    return recipes.deepmedic(cases, steps=updates, **settings | options)


def train_naturally(model: Network, cases: list[Case], updates: int, seed: int) -> Network:
    """Train the classifier alone on segments from anywhere in the brain, starting at the first rate again."""
    # The segments are others than in the first phase; the dropout has the same seed.
    train(cases, updates, network=LastLayer(model), scheme="uniform", seed=seed + 1000, engine={"seed": seed})
    return model.eval()


def add_scores(first: Network, case: Case) -> Case:
    """Return the case with the first network's class probabilities as further channels."""
    scores = inference.predict(first, case, output="probabilities", progress=False)
    names = tuple(f"class {k}" for k in range(len(scores)))
    return case.replace(image=np.concatenate([case.image, scores]), channels=(*case.channels, *names))


def score(model: Network, case: Case) -> dict[str, float]:
    """Return the Dice of the regions (%), and for the whole tumour: false alarms, their pieces, and the expected volume."""
    probabilities = inference.predict(model, case, output="probabilities", progress=False)
    label = probabilities.argmax(0).astype(np.uint8)
    table = metrics.evaluate(label, case.label, metrics=["dice", "precision", "sensitivity"]).set_index("region")
    tumour, healthy = label > 0, case.mask & (case.label == 0)
    expected = 1 - probabilities[0][case.mask]
    return {
        **{f"Dice {region}": 100 * table.loc[region, "dice"] for region in table.index},
        "precision": 100 * table.loc["whole", "precision"],
        "sensitivity": 100 * table.loc["whole", "sensitivity"],
        "false positives": 100 * tumour[healthy].mean(),
        "pieces": ndimage.label(tumour, np.ones((3, 3, 3)))[1],
        "expected / true volume": expected.sum() / np.count_nonzero(case.label),
    }


def run(store: Store, variant: str, seed: int):
    """Train a variant, and score it and its first part."""
    cases, test, updates = cohort(12, 0), cohort(8, 100), SETTINGS["updates"]

    def row(name: str, model: Network, see=lambda case: case) -> dict:
        store.examine(f"{name}, {seed}", model, [see(c) for c in cases[:4]])
        return {"variant": name} | pd.DataFrame([score(model, see(c)) for c in test]).mean().to_dict()

    if variant == "plain":
        yield row(variant, train(cases, updates, seed=seed))
    elif variant == "cascade":
        first = train(cases, updates // 2, seed=seed)
        yield row("half as long", first)
        second = train([add_scores(first, c) for c in cases], updates - updates // 2, seed=seed + 500)
        yield row(variant, second, partial(add_scores, first))
    else:
        most, equal = updates * 3 // 4, variant.startswith("equal")
        model = train(cases, most, seed=seed, scheme="equal" if equal else "foreground")
        if equal:
            yield row("equal classes", model)
        yield row(variant, train_naturally(model, cases, updates - most, seed))


def run_baselines() -> list[dict]:
    regions = {f"dice_{region}": labels for region, labels in metrics.regions["brats2015"].items()}
    return baseline_rows(cohort(12, 0), cohort(12, 0), cohort(8, 100), regions)


def plan(store: Store, seeds) -> list[Row]:
    rows = [
        Row("deepmedic_future_work", {"variant": variant, "seed": seed}, partial(run, store, variant, seed), minutes=0.8)
        for seed in seeds or range(3)
        for variant in ("plain", "cascade", "equal, then natural", "plain, then natural")
    ]
    return [*rows, baselines_row(store, "brains", run_baselines, 0.8)]


def report(store: Store) -> dict[str, str]:
    table = store.read("deepmedic_future_work")
    if table.empty:
        return {}
    by = table.drop(columns="seed").groupby("variant", sort=False)
    mean, deviation = (frame.map("{:.2f}".format) for frame in (by.mean(), by.std()))
    dice = by.mean().filter(like="Dice").rename(columns=lambda name: name.replace("Dice ", "dice_")) / 100
    return {"variants": markdown((mean + " ± " + deviation).reset_index())} | beside_baselines(store, {"brains": dice})


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
