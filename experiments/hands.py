"""Kayalibay's networks on hand phantoms over cross-validation folds: merges, segmentation maps, losses.

Thirty generated hands at 3.44 mm, as many as the paper has: in each fold 20 to train on, 5 for validation, 5 to test. All networks of
a fold see the same crops from the same first weights (as far as their layers are the same).

The tables are data/results/hands_scores.csv and hands_curves.csv, which notebook 06 reads. Fold 0's networks of both merges become
data/checkpoints/kayalibay_hands_*.safetensors.
"""

from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown

from medseg_lite import inference, losses, metrics, phantoms, recipes, statistics, transforms

BONES = ("metacarpal", "proximal", "middle", "distal")
SPACING, SHAPE, CROP = 3.44, (56, 56, 32), (48, 48, 24)
SETTINGS = {"steps": 120, "width": 0.5, "learning_rate": 1e-2}

VARIANTS = {  # options of the recipe
    "concat": {},
    "sum": {"merge": "sum"},
    "one map": {"maps": 1},
    "no skips": {"merge": "none"},
    "cross-entropy": {"loss": losses.cross_entropy},
    "weighted": {"loss": "weighted"},
}


@cache
def hands() -> list:
    return [transforms.standardise(c) for c in phantoms.hand_cohort(30, spacing=SPACING, shape=SHAPE)]


def split(fold: int) -> tuple[list, list, list]:
    """Return the cases to train on, to validate and to test."""
    test, validation = (list(range(5 * f, 5 * f + 5)) for f in (fold, (fold + 1) % (len(hands()) // 5)))
    train = [n for n in range(len(hands())) if n not in test + validation]
    return tuple([hands()[n] for n in part] for part in (train, validation, test))


def weight_classes(cases: list):
    """Return the cross-entropy with each class weighted by one over its share of the training voxels."""
    shares = np.mean([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in cases], axis=0)
    return partial(losses.cross_entropy, class_weights=1 / shares)


def dice(found: np.ndarray, case) -> dict[str, float]:
    return {bone: metrics.dice(found == k, case.label == k) for k, bone in enumerate(BONES, 1)}


def validate(model, cases: list) -> dict[str, float]:
    """Return the mean Jaccard distance and the mean Dice of each bone."""
    rows = []
    for case in cases:
        logits = inference.predict(model, case, output="logits", progress=False)
        label = torch.from_numpy(case.label.astype(np.int64))[None]
        distance = float(losses.jaccard_distance(torch.from_numpy(logits)[None], label))
        rows.append({"jaccard_distance": distance} | dice(logits.argmax(0), case))
    return pd.DataFrame(rows).mean().to_dict()


def run(store: Store, variant: str, fold: int) -> dict:
    train, validation, test = split(fold)
    options = dict(VARIANTS[variant])
    if options.get("loss") == "weighted":
        options["loss"] = weight_classes(train)
    model = recipes.kayalibay(
        train,
        classes=5,
        crop=CROP,
        augment=None,
        halvings=(0.6, 0.8, 0.9),
        validate_every=20,
        seed=fold,
        progress=False,
        engine={"validate": partial(validate, cases=validation)},
        **SETTINGS,
        **options,
    )
    facts = {name: SETTINGS[name] for name in ("steps", "width")}
    scores = [facts | {"case": c.name} | dice(inference.predict(model, c, progress=False), c) for c in test]
    if fold == 0 and variant in ("concat", "sum"):
        mean = pd.DataFrame(scores)[list(BONES)].mean().round(3).to_dict()
        store.save(f"kayalibay_hands_{variant}", model, model.card | {"spacing_mm": SPACING, "test_dice": mean})
    curve = model.history.dropna()[["step", "jaccard_distance", *BONES]]
    return {"hands_curves": [facts | row for row in curve.to_dict("records")], "hands_scores": scores}


def plan(store: Store, seeds) -> list[Row]:
    return [
        Row("hands_scores", {"variant": variant, "fold": fold}, partial(run, store, variant, fold), minutes=0.7)
        for fold in seeds or range(6)
        for variant in VARIANTS
    ]


def report(store: Store) -> dict[str, str]:
    scores, cells, lines = store.read("hands_scores"), [], []
    if scores.empty:
        return {}
    for variant, rows in scores.groupby("variant", sort=False):
        mean, sd = rows[list(BONES)].mean(), rows[list(BONES)].std()
        bones = [f"{mean[b]:.3f} ({sd[b]:.3f})" for b in BONES]
        cells.append([variant, rows["fold"].nunique(), len(rows), *bones, mean.mean()])
    folds = (
        scores.assign(dice=scores[list(BONES)].mean(axis=1)).groupby(["variant", "fold"], sort=False)["dice"].mean().unstack(0)
    )
    for variant in folds.columns.drop("concat", errors="ignore"):
        pair = folds[["concat", variant]].dropna() if "concat" in folds else ()
        if len(pair) > 1:
            lines.append(f"* {variant}: concat − {variant}, {statistics.paired_t_test(pair['concat'], pair[variant])}")
    table = pd.DataFrame(cells, columns=["variant", "folds", "hands", *BONES, "mean"])
    return {"variants": markdown(table), "tests": "\n".join(lines)}


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
