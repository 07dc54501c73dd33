"""Drozdzal's pipeline beyond electron microscopy: prostates of several sites, lesions of the liver, and a 3D pre-processor.

    python experiments/normalisation_sites.py [--parts prostate liver volumes]

* prostate: FC-ResNet on raw intensities, FC-ResNet on standardised ones, and the pre-processor with FC-ResNet on raw ones. Patients
  at the sites A, B and C to learn from; other patients, each imaged at all four sites, to test on: D is a site that no network
  has seen. Then the average of the seeds, and images whose intensities are multiplied by a number ("gain").
* liver: the same code with other settings, trained on crops around lesions, scored inside the liver.
* volumes: the pre-processor in 3D in front of Kayalibay's 3D U-Net, against that net on raw and standardised volumes.

All networks of a part and a seed see the same batches. Runs that are in data/results/normalisation_*.csv, which notebook 08
reads, are not made again: remove the files to start afresh. Networks are kept in runs/normalisation; the pipeline of seed 0
becomes data/checkpoints/drozdzal_prostate.safetensors. Writes experiments/normalisation_sites.md.
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

from medseg_lite import inference, losses, metrics, models, optimizers, phantoms, training, transforms
from medseg_lite.ensembles import Ensemble
from medseg_lite.models.drozdzal import Pipeline
from medseg_lite.paths import atomic_write
from medseg_lite.postprocess import largest_component
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.statistics import paired_t_test

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "normalisation"
TABLES = {name: ROOT / "data" / "results" / f"normalisation_{name}.csv" for name in ("prostate", "gain", "liver", "volumes")}
WIDTH = {"prostate": 0.25, "liver": 0.25, "volumes": 0.25}
STEPS = {"prostate": 250, "liver": 1200, "volumes": 150}
SEEDS = {"prostate": 2, "liver": 1, "volumes": 1}
# So few updates of so narrow networks need larger ones than the paper's (4e-4 and 1e-3), and a quicker decay than its .001.
# Networks without batch normalisation (the pre-processor, the U-Net) get a tenth: the pre-processor's output grew to 1e11 otherwise.
RATE, PLAIN_RATE, DECAY = 1e-2, 1e-3, 1e-2
SIZE = {"prostate": 64, "liver": 96, "volumes": 48}  # pixels of a slice's side
SYSTEMS = {  # network, and whether it is given standardised images
    "FC-ResNet, raw": ("fc_resnet", False),
    "FC-ResNet, standardised": ("fc_resnet", True),
    "FCN + FC-ResNet, raw": ("fcn_fc_resnet", False),
}
LIVER = {
    "U-Net, raw": ("unet2d", False),
    "FC-ResNet, standardised": ("fc_resnet", True),
    "FC-ResNet, windowed": ("fc_resnet", "window"),
    "FCN + FC-ResNet, raw": ("fcn_fc_resnet", False),
}
VOLUMES = {
    "3D U-Net, raw": (False, False),
    "3D U-Net, standardised": (False, True),
    "3D FCN + 3D U-Net, raw": (True, False),
}  # whether there is a pre-processor, and standardisation
GAINS = (0.25, 0.5, 2.0, 4.0)  # times the scanner's own intensities


def fit(model, sampler, validate, *, steps, decay, seed, every=25):
    """The paper's training, shortened: RMSProp, Dice loss, L2, the weights of the best validation."""
    parts = (model.preprocessor, model.segmenter) if isinstance(model, Pipeline) else (model,)
    groups = [
        {"params": p.parameters(), "lr": RATE if any("BatchNorm" in type(m).__name__ for m in p.modules()) else PLAIN_RATE}
        for p in parts
    ]
    optimizer = torch.optim.RMSprop(groups, lr=RATE, alpha=0.9, eps=1e-8)
    return training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=losses.dice_loss,
        l2=decay,
        validate=validate,
        validate_every=every,
        patience=50,
        schedule=optimizers.InverseTimeDecay(optimizer, decay=DECAY),
        seed=seed,
        progress=False,
    )


def ready(case, how: bool | str):
    """A case as the network is to see it: as it is, standardised, or ("window") cut to the Hounsfield units of soft tissue."""
    if how == "window":
        return case.replace(image=(case.image.clip(-110, 220) - 55) / 100)
    return transforms.standardise(case) if how else case


def prostates(size: int):
    """Patients to train on, to validate and to test; the last are imaged at every site."""
    train, validation = phantoms.prostate_cohort(18, size=size), phantoms.prostate_cohort(6, first_seed=18, size=size)
    return train, validation, [phantoms.prostate(seed, site=s, size=size) for seed in range(100, 110) for s in "ABCD"]


def score(found: np.ndarray, case) -> dict:
    """Dice, average boundary distance in mm and volume difference in percent, as found and of the largest component."""
    row = {}
    for label, ending in ((found, ""), (largest_component(found), "_largest")):
        row["dice" + ending] = metrics.dice(label > 0, case.label > 0)
        row["distance" + ending] = metrics.boundary_distance(label > 0, case.label > 0, spacing=case.spacing)
        row["volume" + ending] = abs(metrics.volume_difference(label > 0, case.label > 0))
    return {k: round(v, 4) for k, v in row.items()}


def score_prostates(model, cases, standardised: bool) -> list[dict]:
    rows = []
    for case in cases:
        found = inference.predict(model, ready(case, standardised), progress=False)
        about = {"patient": case.info["seed"], "site": case.info["site"], "coil": case.info["coil"]}
        rows.append(about | score(found, case))
    return rows


def mean_dice(cases, standardised: bool, of=lambda found, case: metrics.dice(found > 0, case.label > 0)):
    prepared = [ready(c, standardised) for c in cases]
    return lambda model: {"dice": np.mean([of(inference.predict(model, c, progress=False), c) for c in prepared])}


def train_prostate(system: str, seed: int, train, validation, *, steps):
    name, standardised = SYSTEMS[system]
    torch.manual_seed(seed)
    model = models.__dict__[name](classes=1, width=WIDTH["prostate"])

    def distorted(image, label, *, rng):
        return transforms.distort(image, label, rng=rng, flip=False, shear=0.1, angle=10)

    sampler = SegmentSampler(
        [ready(c, standardised) for c in train],
        output=SIZE["prostate"],
        batch_size=8,
        flip=False,
        spatial_dims=2,
        augment=distorted,
        seed=seed,
    )
    model.history = fit(model, sampler, mean_dice(validation, standardised), steps=steps, decay=1e-5, seed=seed)
    return model


def average_of(system: str, cases) -> list[dict]:
    """Scores of the seeds' average."""
    members = [models.load(weights("prostate", system, seed)) for seed in range(SEEDS["prostate"])]
    return score_prostates(Ensemble(members), cases, SYSTEMS[system][1])


def livers():
    def draw(seeds):
        return [phantoms.liver(seed, size=SIZE["liver"], slice_mm=8.0, lesions=2 + seed % 5) for seed in seeds]

    return draw(range(16)), draw(range(16, 18)), draw(range(100, 106))


def lesions_only(case):
    """The lesions as class 1, as the paper's training cases have no outline of the liver, and as the places to cut crops around."""
    lesion = case.label == 2
    return case.replace(label=lesion.astype(np.uint8), mask=lesion)


def score_liver(found: np.ndarray, case) -> dict:
    """Dice of lesions and of the rest of the liver; what lies outside the liver does not count."""
    inside = case.label > 0
    lesion, truth = (found > 0)[inside], (case.label == 2)[inside]
    return {"dice_lesion": round(metrics.dice(lesion, truth), 4), "dice_liver": round(metrics.dice(~lesion, ~truth), 4)}


def train_liver(system: str, seed: int, train, validation, *, steps):
    name, standardised = LIVER[system]
    torch.manual_seed(seed)
    # A quarter of the U-Net's maps are as many as the other networks have at their finest resolution.
    width = WIDTH["liver"] / 4 if name == "unet2d" else WIDTH["liver"]
    model = models.__dict__[name](classes=1, width=width)
    sampler = SegmentSampler(
        [lesions_only(ready(c, standardised)) for c in train],
        output=64,
        batch_size=8,
        scheme="uniform",
        flip=False,
        spatial_dims=2,
        seed=seed,
    )
    validate = mean_dice(validation, standardised, lambda found, case: score_liver(found, case)["dice_lesion"])
    model.history = fit(model, sampler, validate, steps=steps, decay=1e-4, seed=seed, every=40)
    return model


def train_volumes(system: str, seed: int, train, validation, *, steps):
    preprocessed, standardised = VOLUMES[system]
    torch.manual_seed(seed)
    model = models.kayalibay_unet3d(in_channels=1, classes=2, width=WIDTH["volumes"])
    if preprocessed:
        model = Pipeline(models.fcn_preprocessor(dims=3, width=WIDTH["volumes"]), model)
    sampler = VolumeSampler(
        [ready(c, standardised) for c in train],
        crop=(SIZE["volumes"], SIZE["volumes"], 16),
        multiple=16,
        batch_size=4,
        seed=seed,
    )
    model.history = fit(model, sampler, mean_dice(validation, standardised), steps=steps, decay=1e-5, seed=seed)
    return model


def weights(part: str, system: str, seed: int) -> Path:
    name = "".join(c if c.isalnum() else "_" for c in system.lower())
    return RUNS / f"{part}_{name}_{seed}.safetensors"


def keep(part: str, system: str, seed: int, model, train) -> None:
    """Save a network, and seed 0's pipeline for the notebook."""
    card = {
        "network": model.config["builder"],
        "channels": ["t2"],
        "classes": 1,
        "steps": STEPS[part],
        "seed": seed,
        "input": system.split(", ")[1],
        "trained_on": [c.name for c in train],
        "pixels": SIZE[part],
        "command": "python experiments/normalisation_sites.py --parts prostate",
    }
    models.save(weights(part, system, seed), model, card)
    if part == "prostate" and seed == 0 and system.startswith("FCN"):
        models.save(ROOT / "data" / "checkpoints" / "drozdzal_prostate.safetensors", model, card, half=True)


def missing(name: str, **wanted) -> bool:
    if not TABLES[name].is_file():
        return True
    table = pd.read_csv(TABLES[name], dtype={"seed": str})
    return not np.logical_and.reduce([table[k] == str(v) for k, v in wanted.items()]).any()


def store(name: str, rows: list[dict], **about) -> None:
    path, rows = TABLES[name], pd.DataFrame([about | row for row in rows])
    table = pd.concat([pd.read_csv(path), rows]) if path.is_file() else rows
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


def run_prostate(seeds) -> None:
    train, validation, test = prostates(SIZE["prostate"])
    for seed in seeds:
        for system, (_, standardised) in SYSTEMS.items():
            if not missing("prostate", system=system, seed=seed):
                continue
            began = time.process_time()
            model = train_prostate(system, seed, train, validation, steps=STEPS["prostate"])
            keep("prostate", system, seed, model, train)
            at_d = [c for c in test if c.info["site"] == "D"][:6]
            louder = [
                {"gain": gain} | row
                for gain in GAINS
                for row in score_prostates(model, [c.replace(image=c.image * gain) for c in at_d], standardised)
            ]
            rows = score_prostates(model, test, standardised)
            seconds = round(time.process_time() - began)
            store("gain", louder, system=system, seed=seed)
            store("prostate", rows, system=system, seed=seed, steps=STEPS["prostate"], width=WIDTH["prostate"], seconds=seconds)
            print(f"prostate, seed {seed}, {system}: {np.mean([r['dice'] for r in rows]):.3f}, {seconds} s", flush=True)
    if not all(weights("prostate", system, s).is_file() for system in SYSTEMS for s in range(SEEDS["prostate"])):
        return
    for system in SYSTEMS:
        if missing("prostate", system=system, seed="average"):
            about = {"steps": STEPS["prostate"], "width": WIDTH["prostate"], "seconds": 0}
            store("prostate", average_of(system, test), system=system, seed="average", **about)


def run_liver(seeds) -> None:
    train, validation, test = livers()
    for seed in seeds:
        for system, (_, standardised) in LIVER.items():
            if not missing("liver", system=system, seed=seed):
                continue
            began = time.process_time()
            model = train_liver(system, seed, train, validation, steps=STEPS["liver"])
            rows = [
                {"case": c.name, "kind": c.info["kind"]}
                | score_liver(inference.predict(model, ready(c, standardised), progress=False), c)
                for c in test
            ]
            seconds = round(time.process_time() - began)
            store("liver", rows, system=system, seed=seed, steps=STEPS["liver"], width=WIDTH["liver"], seconds=seconds)
            print(f"liver, seed {seed}, {system}: {np.mean([r['dice_lesion'] for r in rows]):.3f}, {seconds} s", flush=True)


def run_volumes(seeds) -> None:
    train, validation, test = prostates(SIZE["volumes"])
    for seed in seeds:
        for system, (_, standardised) in VOLUMES.items():
            if not missing("volumes", system=system, seed=seed):
                continue
            began = time.process_time()
            model = train_volumes(system, seed, train, validation, steps=STEPS["volumes"])
            rows = score_prostates(model, test, standardised)
            seconds = round(time.process_time() - began)
            store("volumes", rows, system=system, seed=seed, steps=STEPS["volumes"], width=WIDTH["volumes"], seconds=seconds)
            print(f"volumes, seed {seed}, {system}: {np.mean([r['dice'] for r in rows]):.3f}, {seconds} s", flush=True)


def table(frame: pd.DataFrame, digits: int = 3) -> str:
    rows = [f"| {' | '.join([frame.index.name or '', *map(str, frame.columns)])} |", "|" + "---|" * (len(frame.columns) + 1)]
    rows += [f"| {name} | {' | '.join(f'{v:.{digits}f}' for v in row)} |" for name, row in zip(frame.index, frame.values)]
    return "\n".join(rows) + "\n\n"


def report() -> str:
    out = io.StringIO()
    out.write(
        "# Drozdzal's pipeline: prostates of several sites, livers, and a pre-processor in 3D\n\n"
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread, generated patients. RMSProp from {RATE} ({PLAIN_RATE} for networks without batch normalisation) with "
        f"decay {DECAY}, L2, the weights of the best validation Dice. Repeat it: `python experiments/normalisation_sites.py`\n\n"
    )
    scores = pd.read_csv(TABLES["prostate"], dtype={"seed": str})
    single = scores[scores.seed != "average"]
    out.write(
        f"## Prostate\n\n{STEPS['prostate']} updates, width {WIDTH['prostate']}, {SIZE['prostate']}² pixels, {single.seed.nunique()} seed(s). 18 "
        f"patients at A, B, C to train on; {single.patient.nunique()} others, each at every site, to test. Dice by site:\n\n"
    )
    out.write(table(single.pivot_table(index="system", columns="site", values="dice", sort=False)))
    out.write("All sites: Dice, average boundary distance (mm), volume difference (%); then of the largest component:\n\n")
    names = ["dice", "distance", "volume", "dice_largest", "distance_largest", "volume_largest"]
    out.write(table(single.groupby("system", sort=False)[names].mean(), 2))
    sites = single.assign(known=single.site != "D")
    sites = sites.pivot_table(index=["system", "patient"], columns="known", values="dice")
    cost = (sites[True] - sites[False]).unstack("system")
    raw, standard, learned = SYSTEMS
    out.write("Dice lost at D, per patient (mean of A, B, C, less D, averaged over seeds), learned − standardised: ")
    out.write(f"{paired_t_test(cost[learned], cost[standard])}\n\n")
    for seed, rows in single.groupby("seed"):
        one = rows.assign(known=rows.site != "D").pivot_table(index=["system", "patient"], columns="known", values="dice")
        one = (one[True] - one[False]).unstack("system")
        out.write(f"* seed {seed} alone: {paired_t_test(one[learned], one[standard])}\n")
    out.write("\nDice at A, B, C, learned − raw: ")
    out.write(f"{paired_t_test(sites.xs(learned)[True], sites.xs(raw)[True])}\n\n")
    if (scores.seed == "average").any():
        both = scores.assign(which=scores.seed.where(scores.seed == "average", "members' mean"))
        out.write("The seeds' average against its members' mean:\n\n")
        out.write(table(both.pivot_table(index="system", columns="which", values="dice", sort=False)))
    gain = pd.read_csv(TABLES["gain"])
    here = single[(single.site == "D") & single.patient.isin(gain.patient)].assign(gain=1.0)
    out.write("Dice at D when intensities are multiplied by a gain:\n\n")
    out.write(table(pd.concat([gain, here]).pivot_table(index="system", columns="gain", values="dice").loc[list(SYSTEMS)]))
    if TABLES["liver"].is_file():
        liver = pd.read_csv(TABLES["liver"])
        out.write(
            f"## Liver\n\n{STEPS['liver']} updates, width {WIDTH['liver']}, {liver['case'].nunique()} patients, {liver.seed.nunique()} seed(s). Dice; "
            "what lies outside the liver does not count:\n\n"
        )
        out.write(table(liver.groupby("system", sort=False)[["dice_lesion", "dice_liver"]].mean()))
    if TABLES["volumes"].is_file():
        volumes = pd.read_csv(TABLES["volumes"])
        out.write(
            f"## A pre-processor in 3D\n\n{STEPS['volumes']} updates, width {WIDTH['volumes']}, {SIZE['volumes']}² pixels a slice, "
            f"{volumes.seed.nunique()} seed(s). Dice by site, and seconds of CPU time to train and test:\n\n"
        )
        frame = volumes.pivot_table(index="system", columns="site", values="dice", sort=False)
        out.write(table(frame.assign(seconds=volumes.groupby("system").seconds.mean())))
    return out.getvalue().rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    runs = {"prostate": run_prostate, "liver": run_liver, "volumes": run_volumes}
    parser.add_argument("--parts", nargs="+", default=list(runs), choices=list(runs))
    parser.add_argument("--seeds", type=int, nargs="+", help="by default all that a part has")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for part in options.parts:
        runs[part](options.seeds or range(SEEDS[part]))
    with atomic_write(ROOT / "experiments" / "normalisation_sites.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
