"""Kayalibay's networks on hand phantoms over cross-validation folds: merges, segmentation maps, losses.

    python experiments/hands.py [--steps 120] [--folds 0 1 ...] [--variants concat sum ...] [--width 0.5]

Thirty generated hands at 3.44 mm, as many as the paper has: in each fold 20 to train on, 5 for validation, 5 to test. All networks of
a fold see the same crops from the same first weights (as far as their layers are the same). Runs that are in
data/results/hands_scores.csv and hands_curves.csv, which notebook 06 reads, are not made again: remove the two files to start
afresh. Fold 0's networks of both merges become data/checkpoints/kayalibay_hands_*.safetensors. Writes experiments/hands.md.
"""

import argparse
import io
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medseg_lite import inference, losses, metrics, models, optimizers, phantoms, statistics, training, transforms
from medseg_lite.paths import atomic_write
from medseg_lite.sampling import VolumeSampler

ROOT = Path(__file__).resolve().parent.parent
SCORES, CURVES = (ROOT / "data" / "results" / f"hands_{name}.csv" for name in ("scores", "curves"))
BONES = ("metacarpal", "proximal", "middle", "distal")
SPACING, SHAPE, CROP, RATE = 3.44, (56, 56, 32), (48, 48, 24), 1e-2

# Options of the network, and the loss.
VARIANTS = {
    "concat": ({}, "jaccard"),
    "sum": ({"merge": "sum"}, "jaccard"),
    "one map": ({"maps": 1}, "jaccard"),
    "no skips": ({"merge": "none"}, "jaccard"),
    "cross-entropy": ({}, "cross-entropy"),
    "weighted": ({}, "weighted"),
}


def split(hands: list, fold: int) -> tuple[list, list, list]:
    """Cases to train on, to validate and to test."""
    test, validation = (list(range(5 * f, 5 * f + 5)) for f in (fold, (fold + 1) % (len(hands) // 5)))
    train = [h for n, h in enumerate(hands) if n not in test + validation]
    return train, [hands[n] for n in validation], [hands[n] for n in test]


def loss_for(name: str, train: list):
    if name == "jaccard":
        return losses.jaccard_distance
    if name == "cross-entropy":
        return losses.cross_entropy
    frequencies = np.mean([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in train], axis=0)
    return lambda logits, label: losses.cross_entropy(logits, label, class_weights=1 / frequencies)


def dice(model, case) -> list[float]:
    found = inference.predict(model, case, progress=False)
    return [metrics.dice(found == k, case.label == k) for k in range(1, 5)]


def run(variant: str, fold: int, hands: list, *, steps: int, width: float):
    options, loss_name = VARIANTS[variant]
    train, validation, test = split(hands, fold)
    torch.manual_seed(fold)
    model = models.kayalibay_unet3d(in_channels=1, classes=5, width=width, **options)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    loss = loss_for(loss_name, train)

    def validate(model):
        values, found = [], []
        for case in validation:
            logits = inference.predict(model, case, output="logits", progress=False)
            label = torch.from_numpy(case.label.astype(np.int64))[None]
            values.append(float(losses.jaccard_distance(torch.from_numpy(logits)[None], label)))
            found.append([metrics.dice(logits.argmax(0) == k, case.label == k) for k in range(1, 5)])
        return {"jaccard_distance": np.mean(values), **dict(zip(BONES, np.mean(found, axis=0)))}

    history = training.fit(
        model,
        VolumeSampler(train, crop=CROP, multiple=model.multiple, seed=fold),
        steps=steps,
        optimizer=optimizer,
        loss=loss,
        schedule=optimizers.HalveAt(optimizer, steps=[round(f * steps) for f in (0.6, 0.8, 0.9)]),
        validate=validate,
        validate_every=20,
        seed=fold,
        progress=False,
    )
    run = {"variant": variant, "fold": fold, "steps": steps, "width": width}
    scores = [run | {"case": c.name, **dict(zip(BONES, np.round(dice(model, c), 4)))} for c in test]
    curve = history.dropna()[["step", "jaccard_distance", *BONES]].round(4)
    return model, pd.DataFrame(scores), pd.DataFrame([run] * len(curve)).join(curve.reset_index(drop=True))


def store(path: Path, rows: pd.DataFrame) -> None:
    table = pd.concat([pd.read_csv(path), rows]) if path.is_file() else rows
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


def report(command: str) -> str:
    scores = pd.read_csv(SCORES)
    settings = scores.groupby("variant", sort=False)[["steps", "width"]].first().iloc[0]
    out = io.StringIO()
    out.write(
        "# Kayalibay's networks on hand phantoms\n\n"
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread. {settings.steps:.0f} updates each, width "
        f"{settings.width}, Dice of the test hands of all folds that were run, mean (standard deviation) over hands.\n\n"
        f"| variant | folds | hands | {' | '.join(BONES)} | mean |\n|---|---|---|---|---|---|---|---|\n"
    )
    for variant, rows in scores.groupby("variant", sort=False):
        mean, sd = rows[list(BONES)].mean(), rows[list(BONES)].std()
        cells = " | ".join(f"{mean[b]:.3f} ({sd[b]:.3f})" for b in BONES)
        out.write(f"| {variant} | {rows['fold'].nunique()} | {len(rows)} | {cells} | {mean.mean():.3f} |\n")
    out.write("\nAgainst `concat`, paired by fold (mean Dice of all bones of a fold's five hands, n folds):\n\n")
    folds = scores.assign(dice=scores[list(BONES)].mean(axis=1)).groupby(["variant", "fold"], sort=False)["dice"].mean()
    for variant in folds.index.unique("variant").drop("concat"):
        pair = pd.concat([folds["concat"], folds[variant]], axis=1, join="inner")
        if len(pair) > 1:
            out.write(f"* {variant}: concat − {variant}, {statistics.paired_t_test(pair.iloc[:, 0], pair.iloc[:, 1])}\n")
    return out.getvalue() + f"\nRepeat it: `{command}`\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--folds", type=int, nargs="+", default=list(range(6)))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--width", type=float, default=0.5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    hands = [transforms.standardise(c) for c in phantoms.hand_cohort(30, spacing=SPACING, shape=SHAPE)]
    for fold in options.folds:
        for variant in options.variants:
            done = pd.read_csv(SCORES) if SCORES.is_file() else pd.DataFrame(columns=["variant", "fold"])
            if ((done["variant"] == variant) & (done["fold"] == fold)).any():
                continue
            began = time.process_time()
            model, scores, curve = run(variant, fold, hands, steps=options.steps, width=options.width)
            store(SCORES, scores)
            store(CURVES, curve)
            print(
                f"fold {fold}, {variant}: {scores[list(BONES)].mean().round(3).to_dict()}, {time.process_time() - began:.0f} s",
                flush=True,
            )
            if fold == 0 and variant in ("concat", "sum"):
                card = {
                    "network": "kayalibay_unet3d",
                    "channels": ["t1"],
                    "classes": 5,
                    "steps": options.steps,
                    "seed": 0,
                    "trained_on": [c.name for c in split(hands, 0)[0]],
                    "spacing_mm": SPACING,
                    "command": "python experiments/hands.py --folds 0",
                    "test_dice": scores[list(BONES)].mean().round(3).to_dict(),
                }
                models.save(ROOT / "data" / "checkpoints" / f"kayalibay_hands_{variant}.safetensors", model, card)
    with atomic_write(ROOT / "experiments" / "hands.md") as temporary:
        temporary.write_text(report("python experiments/hands.py"), encoding="utf-8")


if __name__ == "__main__":
    main()
