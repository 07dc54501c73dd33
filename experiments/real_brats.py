"""Leave-one-out on the four real BRATS cases: DeepMedic at the paper's size (2 channels, 659,915 parameters).

    python experiments/real_brats.py

Each case is segmented by networks that never saw it:

    real            trained on the other three cases
    phantoms        trained on generated cases only, the checkpoint that ships with the project
    phantoms+real   that checkpoint, trained on with the other three cases and the phantoms, half the segments from each

Runs are kept in runs/real_brats, so an interrupted benchmark goes on where it stopped. Writes experiments/real_brats.md. Needs the
data: `python -m medseg_lite download brats2013_deepmedic`.
"""

import argparse
import platform
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch

from medseg_lite import datasets, inference, metrics, models, paths, phantoms, recipes, statistics, transforms

HERE = Path(__file__).parent
CHANNELS = ("flair", "t1c")
PRETRAINED = "deepmedic_phantoms_flair_t1c.safetensors"
STEPS = {"real": 500, "phantoms+real": 250}
SCHEDULE = (0.6, 0.8, 0.9)


def train(variant: str, training: list, folder: Path, device: str):
    """The network of one fold, trained or taken from an earlier run."""
    path = folder / "model.safetensors"
    if path.exists():
        return models.load(path)
    if variant == "phantoms":
        return models.load(paths.shipped("checkpoints", PRETRAINED))
    start = None
    if variant == "phantoms+real":
        start = paths.shipped("checkpoints", PRETRAINED)
        generated = phantoms.brain_cohort(9, first_seed=0, spacing=1.0, progress=True)
        training = training * 3 + [transforms.standardise(c.select(CHANNELS)) for c in generated]
    options = {"start": start, "folder": folder, "device": device, "validate_every": 100}
    model = recipes.deepmedic(training, steps=STEPS[variant], halvings=SCHEDULE, **options)
    card = model.card | {
        "trained_on": sorted(set(model.card["trained_on"])),
        "normalise": "standardise",
        "command": f"python experiments/real_brats.py --variants {variant}",
        "data": "BRATS 2013 cases as distributed with DeepMedic, CC BY-NC-SA 3.0; Menze et al. 2015",
        "date": str(date.today()),
    }
    models.save(path, model, card)
    return model


def score(variant: str, held_out, training: list, folder: Path, device: str) -> pd.DataFrame:
    """Metrics of one case and region, with the seconds that training and inference took."""
    path = folder / "scores.csv"
    if path.exists():
        return pd.read_csv(path)
    model = train(variant, training, folder, device).to(device)
    start = time.perf_counter()
    prediction = inference.predict(model, held_out)
    seconds = time.perf_counter() - start
    table = metrics.evaluate_cohort([prediction], [held_out])
    table.insert(0, "trained on", variant)
    history = folder / "history.csv"
    table["training_s"] = pd.read_csv(history)["seconds"].iloc[-1] if history.exists() else float("nan")
    table["inference_s"] = seconds
    with paths.atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)
    print(table.round(3).to_string(index=False), flush=True)
    return table


def markdown(frame: pd.DataFrame) -> list[str]:
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    variants = ("real", "phantoms", "phantoms+real")
    parser.add_argument("--variants", nargs="+", choices=variants, default=variants)
    parser.add_argument(
        "--folds", type=int, nargs="+", default=[0, 1, 2, 3], help="only these; several processes can share the work"
    )
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "real_brats")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    cases = [transforms.standardise(c) for c in datasets.brats2013_deepmedic()]
    tables = []
    for variant in options.variants:
        for held_out in (cases[n] for n in options.folds):
            training = [c for c in cases if c is not held_out]
            tables.append(score(variant, held_out, training, options.runs / variant / held_out.name, options.device))
    if tuple(options.variants) != variants or len(options.folds) < len(cases):
        return

    table = pd.concat(tables, ignore_index=True)
    seconds = table.groupby("trained on", sort=False)[["training_s", "inference_s"]].mean().round(0).reset_index()
    scores = table.drop(columns=["training_s", "inference_s", "specificity"])
    device = torch.cuda.get_device_name() if options.device == "cuda" else f"2 CPU cores, {platform.machine()}"
    lines = [
        "# Real brain tumours: four cases, each segmented by networks that never saw it",
        "",
        f"{date.today()}, {device}, torch {torch.__version__}. DeepMedic with 2 channels (FLAIR, T1c), 659,915 parameters. "
        f"*real*: {STEPS['real']} updates of ten 25³ segments on the three other cases. *phantoms*: the shipped checkpoint, generated "
        f"cases only. *phantoms+real*: {STEPS['phantoms+real']} more updates from there, half the segments from the three other cases "
        "and half from nine phantoms. Rate 1e-3, halved at 60, 80 and 90 % of each run. These are short runs on few cases with two "
        "of four sequences (the paper: 70,000 updates, hundreds of cases), so not to be compared with its tables. Distances in mm.",
        "",
        "Repeat it: `python experiments/real_brats.py`",
        "",
        "Mean (standard deviation) over the four cases:",
        "",
        *markdown(statistics.summary(scores, by=["trained on", "region"], decimals=3).reset_index()),
        "",
        "Seconds a case (several processes shared the two cores, so these are upper bounds):",
        "",
        *markdown(seconds),
        "",
        "Every case:",
        "",
        *markdown(scores.round(3)),
    ]
    (HERE / "real_brats.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
