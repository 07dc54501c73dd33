"""Leave-one-out on the four real BRATS cases: DeepMedic at the paper's size (2 channels, 659,915 parameters).

Each case is segmented by networks that never saw it:

    real            trained on the other three cases
    phantoms        trained on generated cases only, the checkpoint that ships with the project
    phantoms+real   that checkpoint, trained on with the other three cases and the phantoms, half the segments from each

Training states and networks are kept in runs/real_brats. The table is data/results/real_brats.csv. New rows need the data:
`python -m medseg_lite download brats2013_deepmedic`.
"""

import time
from functools import cache, partial

import pandas as pd
import torch
from _frame import Row, Store, main, markdown

from medseg_lite import datasets, inference, metrics, models, paths, phantoms, recipes, statistics, transforms
from medseg_lite.models import Network

CHANNELS = ("flair", "t1c")
CASES = [f"brats_2013_pat{n:04d}_1" for n in (3, 4, 5, 6)]
PRETRAINED = "deepmedic_phantoms_flair_t1c.safetensors"
SETTINGS = {"real": 500, "phantoms+real": 250}  # updates
MINUTES = {"real": 14, "phantoms": 1, "phantoms+real": 8}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@cache
def cases() -> list:
    return [transforms.standardise(c) for c in datasets.brats2013_deepmedic()]


@cache
def generated_cases() -> list:
    return [transforms.standardise(c.select(CHANNELS)) for c in phantoms.brain_cohort(9, spacing=1.0)]


def train(store: Store, variant: str, held_out: str) -> Network:
    """Return the network of one fold, from its file where it was trained before."""
    if variant == "phantoms":
        return models.load(paths.shipped("checkpoints", PRETRAINED)).to(DEVICE)
    folder = store.runs / variant / held_out
    path = folder / "model.safetensors"
    if path.exists():
        return models.load(path).to(DEVICE)
    training, start = [c for c in cases() if c.name != held_out], None
    if variant == "phantoms+real":
        training, start = training * 3 + generated_cases(), paths.shipped("checkpoints", PRETRAINED)
    options = {"start": start, "folder": folder, "device": DEVICE, "validate_every": 100, "progress": False}
    model = recipes.deepmedic(training, steps=SETTINGS[variant], halvings=(0.6, 0.8, 0.9), **options)
    store.examine(f"{variant}, {held_out}", model, training[:1])
    card = model.card | {
        "trained_on": sorted(set(model.card["trained_on"])),
        "normalise": "standardise",
        "command": "python experiments/real_brats.py",
        "data": "BRATS 2013 cases as distributed with DeepMedic, CC BY-NC-SA 3.0; Menze et al. 2015",
    }
    models.save(path, model, card)
    return model


def run(store: Store, variant: str, name: str) -> list[dict]:
    """Return the metrics of each region of a case, with the seconds that training and inference took."""
    held_out = next(c for c in cases() if c.name == name)
    model = train(store, variant, name)
    clock = time.perf_counter()
    prediction = inference.predict(model, held_out, progress=False)
    seconds, history = time.perf_counter() - clock, store.runs / variant / name / "history.csv"
    training_s = pd.read_csv(history)["seconds"].iloc[-1] if history.exists() else None
    table = metrics.evaluate_cohort([prediction], [held_out]).assign(training_s=training_s, inference_s=seconds)
    return table.to_dict("records")


def plan(store: Store, seeds) -> list[Row]:
    return [
        Row("real_brats", {"trained on": variant, "case": name}, partial(run, store, variant, name), MINUTES[variant])
        for variant in MINUTES
        for fold, name in enumerate(CASES)
        if not seeds or fold in seeds
    ]


def report(store: Store) -> dict[str, str]:
    table = store.read("real_brats")
    if table.empty:
        return {}
    scores = table[["trained on", "case", "region", "dice", "precision", "sensitivity", "assd", "hausdorff"]]
    means = statistics.summary(scores, by=["trained on", "region"], decimals=3)
    blocks = {"means": markdown(means.reset_index()), "cases": markdown(scores)}
    if "inference_s" in table:
        seconds = table.groupby("trained on", sort=False)[["training_s", "inference_s"]].mean().dropna(how="all")
        blocks["seconds"] = markdown(seconds.reset_index(), 0)
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
