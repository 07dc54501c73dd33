"""Havaei's three cascades against the network they begin with: Dice, and how smooth the labels are.

Small networks (a fifth of the paper's feature maps), short runs in two phases, the same settings for all of them: the first
network, a second one with another seed for comparison, and the three cascades that begin with the first. They are trained on 12
generated brains with gliomas (2 mm, seeds 0 to 11) and scored on 8 others (seeds 100 to 107). Trained networks are kept in
runs/cascades; the input cascade there is the checkpoint data/checkpoints/havaei_input_cascade.safetensors of notebook 02.

The tables are data/results/cascades.csv (each network and held-out case), which notebook 02 reads, and baselines.csv.
"""

from functools import cache, partial

import numpy as np
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, vitals_row
from scipy import ndimage

from medseg_lite import inference, metrics, models, phantoms, recipes, transforms
from medseg_lite.models import Network
from medseg_lite.volume import Case

SETTINGS = {"steps": 120, "phase2_steps": 60, "batch_size": 64, "width": 0.2, "init": "he", "learning_rate": 1e-3}
ROWS = {
    "two paths": ("two_path_cnn", 0),
    "two paths, another seed": ("two_path_cnn", 1),
    "input cascade": ("input_cascade_cnn", 0),
    "local cascade": ("local_cascade_cnn", 0),
    "MF cascade": ("mf_cascade_cnn", 0),
}
MINUTES = {"two_path_cnn": 1, "input_cascade_cnn": 4, "local_cascade_cnn": 3, "mf_cascade_cnn": 3}


@cache
def cohort(count: int, first_seed: int) -> list[Case]:
    return [transforms.standardise(c) for c in phantoms.brain_cohort(count, first_seed=first_seed)]


def network(store: Store, name: str, seed: int) -> Network:
    """Return a trained network, from its file where it was trained before."""
    path = store.runs / f"{name}_{seed}.safetensors"
    if not path.exists():
        first = network(store, "two_path_cnn", 0) if "cascade" in name else None
        model = recipes.havaei(cohort(12, 0), network=name, first=first, seed=seed, progress=False, **SETTINGS)
        store.examine(f"{name}, {seed}", model, cohort(12, 0))
        models.save(path, model, model.card | SETTINGS | {"normalise": "standardise"})
    return models.load(path)


def run(store: Store, name: str, seed: int):
    model = network(store, name, seed)
    for case in cohort(8, 100):
        label = inference.predict(model, case, progress=False)
        table = metrics.evaluate(label, case.label, metrics=["dice"]).set_index("region")["dice"]
        borders = [sum(metrics.count_borders(a, axis=axis, mask=case.mask) for axis in range(3)) for a in (label, case.label)]
        yield {
            "case": case.name,
            **{f"Dice {region}": 100 * dice for region, dice in table.items()},
            "false positives": 100 * (label[case.mask & (case.label == 0)] > 0).mean(),
            "tumour pieces": ndimage.label(label > 0, np.ones((3, 3, 3)))[1],
            "class pieces": sum(ndimage.label(label == k)[1] for k in range(1, 5)),
            "borders / true": borders[0] / borders[1],
        }


def run_baselines() -> list[dict]:
    regions = {f"dice_{region}": labels for region, labels in metrics.regions["brats2015"].items()}
    return baseline_rows(cohort(12, 0), cohort(12, 0), cohort(8, 100), regions)


def plan(store: Store, seeds) -> list[Row]:
    rows = [
        Row("cascades", {"network": row}, partial(run, store, name, seed), MINUTES[name])
        for row, (name, seed) in ROWS.items()
        if not seeds or seed in seeds
    ]
    rows.append(baselines_row(store, "brains", run_baselines, 0.8))
    rows.append(vitals_row(store, "input_cascade_cnn, 0", "havaei_input_cascade", lambda: cohort(12, 0)))
    return rows


def report(store: Store) -> dict[str, str]:
    table = store.read("cascades")
    if table.empty:
        return {}
    means = table.drop(columns="case").groupby("network", sort=False).mean()
    dice = means.filter(like="Dice").rename(columns=lambda name: name.replace("Dice ", "dice_")) / 100
    blocks = {"means": markdown(means.reset_index(), 2)} | beside_baselines(store, {"brains": dice})
    for what, digits in (("tumour pieces", 0), ("class pieces", 0), ("borders / true", 2)):
        brains = table.pivot(index="network", columns="case", values=what).loc[means.index]
        blocks[what] = markdown(brains.reset_index(), digits)
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
