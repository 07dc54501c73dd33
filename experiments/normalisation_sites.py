"""Drozdzal's pipeline beyond electron microscopy: prostates of several sites, lesions of the liver, and a 3D pre-processor.

* prostate: FC-ResNet on raw intensities, FC-ResNet on standardised ones, and the pre-processor with FC-ResNet on raw ones. Patients
  at the sites A, B and C to learn from; other patients, each imaged at all four sites, to test on: D is a site that no network
  has seen. Then the average of the seeds, and images whose intensities are multiplied by a number ("gain").
* liver: the same code with other settings, trained on crops around lesions, scored inside the liver.
* volumes: the pre-processor in 3D in front of Kayalibay's 3D U-Net, against that net on raw and standardised volumes.

All networks of a part and a seed see the same batches. The tables are data/results/normalisation_*.csv, which notebook 08 reads.
Networks are kept in runs/normalisation_sites; the pipeline of seed 0 becomes data/checkpoints/drozdzal_prostate.safetensors.
"""

import time
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown

from medseg_lite import inference, losses, metrics, models, optimizers, phantoms, recipes, transforms
from medseg_lite.ensembles import Ensemble
from medseg_lite.models import Network
from medseg_lite.models.drozdzal import Pipeline
from medseg_lite.postprocess import largest_component
from medseg_lite.statistics import paired_t_test

SETTINGS = {"width": 0.25, "prostate": 250, "liver": 1200, "volumes": 150}  # share of the feature maps; updates by part
SEEDS = {"prostate": (0, 1), "liver": (0,), "volumes": (0,)}
# So few updates of so narrow networks need larger ones than the paper's (4e-4 and 1e-3), and a quicker decay than its .001.
# Networks without batch normalisation (the pre-processor, the U-Net) get a tenth: the pre-processor's output grew to 1e11 otherwise.
RATE, PLAIN_RATE, DECAY = 1e-2, 1e-3, 1e-2
SIZE = {"prostate": 64, "liver": 96, "volumes": 48}  # pixels of a slice's side
SYSTEMS = {  # network, and what is done to its input
    "prostate": {
        "FC-ResNet, raw": ("fc_resnet", "raw"),
        "FC-ResNet, standardised": ("fc_resnet", "standardised"),
        "FCN + FC-ResNet, raw": ("fcn_fc_resnet", "raw"),
    },
    "liver": {
        "U-Net, raw": ("unet2d", "raw"),
        "FC-ResNet, standardised": ("fc_resnet", "standardised"),
        "FC-ResNet, windowed": ("fc_resnet", "windowed"),
        "FCN + FC-ResNet, raw": ("fcn_fc_resnet", "raw"),
    },
    "volumes": {
        "3D U-Net, raw": ("kayalibay_unet3d", "raw"),
        "3D U-Net, standardised": ("kayalibay_unet3d", "standardised"),
        "3D FCN + 3D U-Net, raw": ("pipeline", "raw"),
    },
}
PREPARED = {
    "raw": lambda case: case,
    "standardised": transforms.standardise,
    "windowed": lambda case: case.replace(image=(case.image.clip(-110, 220) - 55) / 100),  # Hounsfield units of soft tissue
}
GAINS = (0.25, 0.5, 2.0, 4.0)  # times the scanner's own intensities
MINUTES = {"prostate": 1, "liver": 2, "volumes": 1}


# ------------------------------------------------------------------------------------------------------------- data


@cache
def patients(part: str) -> tuple[list, list, list]:
    """Return patients to train on, to validate and to test; those with prostates are tested at every site."""
    size = SIZE[part]
    if part == "liver":
        seeds = range(16), range(16, 18), range(100, 106)
        return tuple([phantoms.liver(s, size=size, slice_mm=8.0, lesions=2 + s % 5) for s in part] for part in seeds)
    train, validation = phantoms.prostate_cohort(18, size=size), phantoms.prostate_cohort(6, first_seed=18, size=size)
    return train, validation, [phantoms.prostate(seed, site=s, size=size) for seed in range(100, 110) for s in "ABCD"]


def keep_lesions(case):
    """Make the lesions class 1, since the paper's training cases have no outline of the liver, and the places to cut crops around."""
    lesion = case.label == 2
    return case.replace(label=lesion.astype(np.uint8), mask=lesion)


# --------------------------------------------------------------------------------------------------------- training


def build(part: str, name: str, seed: int) -> Network:
    torch.manual_seed(seed)
    width = SETTINGS["width"]
    if part == "volumes":
        model = models.kayalibay_unet3d(in_channels=1, classes=2, width=width)
        return Pipeline(models.fcn_preprocessor(dims=3, width=width), model) if name == "pipeline" else model
    # A quarter of the U-Net's maps are as many as the other networks have at their finest resolution.
    return getattr(models, name)(classes=1, width=width / 4 if name == "unet2d" and part == "liver" else width)


def optimize(model: Network, parameters) -> torch.optim.Optimizer:
    parts = (model.preprocessor, model.segmenter) if isinstance(model, Pipeline) else (model,)
    rates = [RATE if any("BatchNorm" in type(m).__name__ for m in p.modules()) else PLAIN_RATE for p in parts]
    groups = [{"params": part.parameters(), "lr": rate} for part, rate in zip(parts, rates)]
    return torch.optim.RMSprop(groups, lr=RATE, alpha=0.9, eps=1e-8)


def train(part: str, system: str, seed: int) -> Network:
    """Train with the paper's settings, shortened: RMSProp, Dice loss, L2, the weights of the best validation."""
    name, how = SYSTEMS[part][system]
    cases, validation, _ = ([PREPARED[how](c) for c in group] for group in patients(part))
    model = build(part, name, seed)
    options = {
        "network": model,
        "classes": model.classes,
        "steps": SETTINGS[part],
        "optimizer": partial(optimize, model),
        "schedule": partial(optimizers.InverseTimeDecay, decay=DECAY),
        "validate_every": 40 if part == "liver" else 25,
        "patience": 50,
        "seed": seed,
        "progress": False,
        "engine": {"validate": partial(validate, part=part, cases=validation)},
    }
    if part == "volumes":
        options["engine"]["l2"] = 1e-5
        size = (SIZE[part], SIZE[part], 16)
        return recipes.kayalibay(cases, loss=losses.dice_loss, crop=size, batch_size=4, augment=None, **options)
    if part == "liver":
        return recipes.drozdzal([keep_lesions(c) for c in cases], crop=64, augment=None, weight_decay=1e-4, **options)
    augment = partial(transforms.distort, flip=False, shear=0.1, angle=10)
    return recipes.drozdzal(cases, crop=64, scheme="foreground", augment=augment, weight_decay=1e-5, **options)


def validate(model: Network, *, part: str, cases: list) -> dict[str, float]:
    found = [(inference.predict(model, c, progress=False), c) for c in cases]
    if part == "liver":
        return {"dice": np.mean([score_liver(*pair)["dice_lesion"] for pair in found])}
    return {"dice": np.mean([metrics.dice(label > 0, case.label > 0) for label, case in found])}


# ------------------------------------------------------------------------------------------------------------ scores


def score(found: np.ndarray, case) -> dict:
    """Return Dice, average boundary distance in mm and volume difference in percent, as found and of the largest component."""
    row = {"patient": case.info["seed"], "site": case.info["site"], "coil": case.info["coil"]}
    for label, ending in ((found, ""), (largest_component(found), "_largest")):
        row["dice" + ending] = metrics.dice(label > 0, case.label > 0)
        row["distance" + ending] = metrics.boundary_distance(label > 0, case.label > 0, spacing=case.spacing)
        row["volume" + ending] = abs(metrics.volume_difference(label > 0, case.label > 0))
    return row


def score_liver(found: np.ndarray, case) -> dict:
    """Return the Dice of lesions and of the rest of the liver; what lies outside the liver does not count."""
    inside = case.label > 0
    lesion, truth = (found > 0)[inside], (case.label == 2)[inside]
    return {"dice_lesion": metrics.dice(lesion, truth), "dice_liver": metrics.dice(~lesion, ~truth)}


def segment(model: Network, how: str, cases: list):
    for case in cases:
        yield inference.predict(model, PREPARED[how](case), progress=False), case


def run(store: Store, part: str, system: str, seed: int) -> dict:
    clock = time.process_time()
    _, how = SYSTEMS[part][system]
    model, test = train(part, system, seed), patients(part)[2]
    tables = {}
    if part == "liver":
        rows = [{"case": c.name, "kind": c.info["kind"]} | score_liver(found, c) for found, c in segment(model, how, test)]
    else:
        rows = [score(*pair) for pair in segment(model, how, test)]
    if part == "prostate":
        models.save(weights(store, system, seed), model, model.card)
        if seed == 0 and system.startswith("FCN"):
            card = model.card | {"channels": ["t2"], "input": how, "pixels": SIZE[part]}
            store.save("drozdzal_prostate", model, card, half=True)
        at_d = [c for c in test if c.info["site"] == "D"][:6]
        tables["normalisation_gain"] = [
            {"gain": gain} | score(*pair)
            for gain in GAINS
            for pair in segment(model, how, [c.replace(image=c.image * gain) for c in at_d])
        ]
    about = {"steps": SETTINGS[part], "width": SETTINGS["width"], "seconds": round(time.process_time() - clock)}
    return tables | {f"normalisation_{part}": [about | row for row in rows]}


def weights(store: Store, system: str, seed: int):
    return store.runs / f"prostate_{''.join(c if c.isalnum() else '_' for c in system.lower())}_{seed}.safetensors"


def run_average(store: Store, system: str):
    """Score the average of the seeds."""
    paths = [weights(store, system, seed) for seed in SEEDS["prostate"]]
    if missing := [path for path in paths if not path.exists()]:
        raise SystemExit(f"{missing[0]} is missing; make the networks first: --again --only '{system}' --seeds 0 1")
    model, how = Ensemble([models.load(path) for path in paths]), SYSTEMS["prostate"][system][1]
    for pair in segment(model, how, patients("prostate")[2]):
        yield {"steps": SETTINGS["prostate"], "width": SETTINGS["width"], "seconds": 0} | score(*pair)


def plan(store: Store, seeds) -> list[Row]:
    rows = [
        Row(f"normalisation_{part}", {"system": s, "seed": seed}, partial(run, store, part, s, seed), MINUTES[part], part)
        for part, systems in SYSTEMS.items()
        for seed in seeds or SEEDS[part]
        for s in systems
    ]
    if not seeds:
        rows += [
            Row("normalisation_prostate", {"system": s, "seed": "average"}, partial(run_average, store, s), 0.2, "average")
            for s in SYSTEMS["prostate"]
        ]
    return rows


# ------------------------------------------------------------------------------------------------------------ report


def tabulate_means(table: pd.DataFrame, values: str, columns: str, digits: int = 3) -> str:
    """Return the means of a column for each system, in Markdown."""
    return markdown(table.pivot_table(index="system", columns=columns, values=values, sort=False).reset_index(), digits)


def lost_dice(table: pd.DataFrame) -> pd.DataFrame:
    """Return the Dice that each system loses at site D, for each patient: the mean of A, B and C less that of D."""
    sites = table.assign(known=table.site != "D").pivot_table(index=["system", "patient"], columns="known", values="dice")
    return (sites[True] - sites[False]).unstack("system")


def report_prostate(scores: pd.DataFrame, gain: pd.DataFrame) -> dict[str, str]:
    raw, standard, learned = SYSTEMS["prostate"]
    single = scores[scores.seed != "average"]
    measures = [name + ending for ending in ("", "_largest") for name in ("dice", "distance", "volume")]
    blocks = {
        "prostate": tabulate_means(single, "dice", "site"),
        "distances": markdown(single.groupby("system", sort=False)[measures].mean().reset_index(), 2),
    }
    if {raw, standard, learned} <= set(single.system):
        lost, known = lost_dice(single), single[single.site != "D"].groupby(["system", "patient"])["dice"].mean()
        lines = [f"* all seeds, averaged: {paired_t_test(lost[learned], lost[standard])}"]
        for seed, rows in single.groupby("seed"):
            lost = lost_dice(rows)
            lines.append(f"* seed {seed} alone: {paired_t_test(lost[learned], lost[standard])}")
        blocks["lost"] = "\n".join(lines)
        blocks["learned − raw"] = str(paired_t_test(known[learned], known[raw]))
    both = scores.assign(which=scores.seed.where(scores.seed == "average", "members' mean"))
    blocks["average"] = tabulate_means(both, "dice", "which")
    if not gain.empty:
        here = single[(single.site == "D") & single.patient.isin(gain.patient)].assign(gain=1.0)
        table = pd.concat([gain, here]).pivot_table(index="system", columns="gain", values="dice").reset_index()
        blocks["gain"] = markdown(table)
    return blocks


def report(store: Store) -> dict[str, str]:
    prostate, gain, liver, volumes = (
        store.read(f"normalisation_{name}", dtype={"seed": str}) for name in ("prostate", "gain", "liver", "volumes")
    )
    blocks = report_prostate(prostate, gain) if not prostate.empty else {}
    if not liver.empty:
        means = liver.groupby("system", sort=False)[["dice_lesion", "dice_liver"]].mean()
        blocks["liver"] = markdown(means.reset_index())
    if not volumes.empty:
        means = volumes.pivot_table(index="system", columns="site", values="dice", sort=False)
        seconds = volumes.groupby("system").seconds.mean().map("{:.0f}".format)
        blocks["volumes"] = markdown(means.assign(seconds=seconds).reset_index())
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
