"""Membranes of electron microscopy: FCN + FC-ResNet, FC-ResNet and U-Net on the real stack, and five kinds of input on phantoms.

    python experiments/em.py [--what inputs real ...] [--seeds 0 1]

"inputs": generated stacks as a detector counts them (each with a gain and an offset of its own); the same FC-ResNet on raw
intensities, rescaled, standardised and equalised ones, and behind the FCN pre-processor, which takes raw ones; both once more in
other units, thousands of counts; and a U-Net on standardised ones. "real": the stack of ISBI 2012, the first 16 of the 20 slices
here to train on and the last 4 to test. "real, longer": the same with six times the updates.

Runs that are in data/results/em_scores.csv and em_curves.csv, which notebook 08 reads, are not made again: remove the two files to
start afresh. Seed 0's networks become data/checkpoints/em_*.safetensors. Writes experiments/em.md.
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

from medseg_lite import datasets, inference, metrics, models, phantoms, recipes, transforms
from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
SCORES, CURVES = (ROOT / "data" / "results" / f"em_{name}.csv" for name in ("scores", "curves"))
MEASURES = ["v_rand", "v_info", "dice"]
CROP, BATCH = 64, 8
TRAIN, TEST = 16, 6  # generated stacks of two slices of 256²
SLICES = 16  # of the real stack, to train on

PREPARED = {
    "raw": lambda case: case,
    "rescaled": transforms.rescale,
    "standardised": transforms.standardise,
    "equalised": transforms.equalise,
    "raw/1000": lambda case: case.replace(
        image=case.image / 1000
    ),  # one constant for all stacks: other units, no normalisation
}

# What is compared: the network, its width, and what is done to its input.
VARIANTS = {
    "raw": ("fc_resnet", 0.25, "raw"),
    "rescaled": ("fc_resnet", 0.25, "rescaled"),
    "standardised": ("fc_resnet", 0.25, "standardised"),
    "equalised": ("fc_resnet", 0.25, "equalised"),
    "learned": ("fcn_fc_resnet", 0.25, "raw"),
    "raw/1000": ("fc_resnet", 0.25, "raw/1000"),
    "learned/1000": ("fcn_fc_resnet", 0.25, "raw/1000"),
    "u-net": ("unet2d", 0.125, "standardised"),
}
ON = {
    "inputs": list(VARIANTS),
    "real": ["learned", "standardised", "u-net"],
    "real, longer": ["learned", "standardised", "u-net"],
}
STEPS = {"inputs": 500, "real": 500, "real, longer": 3000}
SHIPPED = {
    ("inputs", "learned"),
    ("inputs", "learned/1000"),
    ("inputs", "standardised"),
    ("inputs", "u-net"),
    ("real", "learned"),
}


def stacks(what: str) -> tuple[list, list]:
    """Cases to train on and to test."""
    if what == "inputs":
        return (
            phantoms.em_cohort(TRAIN, slices=2, size=256, counts=True),
            phantoms.em_cohort(TEST, first_seed=100, slices=2, size=256, counts=True),
        )
    whole = datasets.isbi2012()
    return [part(whole, 0, SLICES)], [part(whole, SLICES, whole.shape[2])]


def part(case, first: int, stop: int):
    """Slices `first` to `stop` of a stack."""
    keep = slice(first, stop)
    return case.replace(image=case.image[..., keep], label=case.label[..., keep], name=f"{case.name}[{first}:{stop}]")


def score(model, case) -> dict[str, float]:
    """V_rand and V_info of a stack, and the Dice of its membranes."""
    cell = inference.predict(model, case, output="probabilities", progress=False)[0]
    values = metrics.v_rand(cell, case.label == 0), metrics.v_info(cell, case.label == 0)
    return dict(zip(MEASURES, np.round([*values, metrics.dice(cell < 0.5, case.label == 1)], 4)))


def run(what: str, variant: str, seed: int, *, steps: int, train: list, test: list):
    network, width, prepared = VARIANTS[variant]
    train, test = ([PREPARED[prepared](c) for c in cases] for cases in (train, test))
    began = time.process_time()
    model = recipes.drozdzal(
        train,
        network=network,
        width=width,
        steps=steps,
        crop=CROP,
        batch_size=BATCH,
        validation=test,  # for the curves; nothing is chosen by it
        validate_every=100,
        seed=seed,
        progress=False,
    )
    row = {"what": what, "variant": variant, "seed": seed, "steps": steps, "width": width}
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["seconds"] = round(time.process_time() - began)
    scores = pd.DataFrame([row | {"case": c.name} | score(model, c) for c in test])
    curve = model.history.dropna()[["step", "loss", "dice_lesion"]].rename(columns={"dice_lesion": "dice"}).round(4)
    curve = pd.DataFrame([{k: row[k] for k in ("what", "variant", "seed")}] * len(curve)).join(curve.reset_index(drop=True))
    return model, scores, curve


def store(path: Path, rows: pd.DataFrame) -> None:
    table = pd.concat([pd.read_csv(path), rows]) if path.is_file() else rows
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


def report() -> str:
    scores = pd.read_csv(SCORES)
    out = io.StringIO()
    out.write(
        "# Membranes of electron microscopy\n\n"
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread. Drozdzal's recipe (augmentation, Dice loss, "
        f"RMSProp, decay) with {BATCH} crops of {CROP}² a batch and narrow networks; the weights are those of the last update. "
        "Means over test stacks and seeds; in brackets the lowest and highest mean of a seed.\n"
    )
    titles = {
        "inputs": f"Generated stacks in detector counts: {TRAIN} to train on, {TEST} to test, each 2 slices of 256²",
        "real": f"The real stack of ISBI 2012: {SLICES} slices to train on, 4 to test (512²)",
        "real, longer": "The same, six times as long",
    }
    for what, rows in scores.groupby("what", sort=False):
        out.write(
            f"\n## {titles[what]}\n\n| | parameters | updates | CPU s | seeds | V_rand | V_info | Dice |\n|---|---|---|---|---|---|---|---|\n"
        )
        for variant in [v for v in ON[what] if v in set(rows["variant"])]:
            r = rows[rows["variant"] == variant]
            seeds = r.groupby("seed")[MEASURES].mean()
            cells = " | ".join(f"{seeds[m].mean():.3f} ({seeds[m].min():.3f}–{seeds[m].max():.3f})" for m in MEASURES)
            first = r.iloc[0]
            out.write(
                f"| {variant} | {first.parameters:,} | {first.steps} | {r.groupby('seed').seconds.first().mean():.0f} | {len(seeds)} | {cells} |\n"
            )
    out.write(
        "\nThe paper (30 unlabelled test slices of ISBI 2012, ten networks of 12.9 million parameters averaged): V_rand .981, "
        "V_info .988; FC-ResNet on standardised input .969, .986; U-Net .973, .987.\n\n"
        "Repeat it: `python experiments/em.py`, with the real stack in `$MEDSEG_DATA_DIR/isbi2012`\n"
    )
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", nargs="+", default=list(ON), choices=list(ON))
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    options = parser.parse_args()
    torch.set_num_threads(1)
    for what in options.what:
        train, test = stacks(what)
        for seed in options.seeds:
            for variant in [v for v in ON[what] if v in options.variants]:
                done = pd.read_csv(SCORES) if SCORES.is_file() else pd.DataFrame(columns=["what", "variant", "seed"])
                if ((done["what"] == what) & (done["variant"] == variant) & (done["seed"] == seed)).any():
                    continue
                model, scores, curve = run(what, variant, seed, steps=STEPS[what], train=train, test=test)
                if seed == 0 and (what, variant) in SHIPPED:
                    mean = scores[MEASURES].mean().round(3).to_dict()
                    command = f"python experiments/em.py --what {what} --seeds 0"
                    card = model.card | {"input": VARIANTS[variant][2], "test": mean, "command": command}
                    name = f"em_{what}_{variant.replace('-', '').replace('/', '_')}.safetensors"
                    models.save(ROOT / "data" / "checkpoints" / name, model, card, half=True)
                store(SCORES, scores)
                store(CURVES, curve)
                print(what, seed, variant, scores[MEASURES].mean().round(3).to_dict(), f"{scores.seconds[0]} s", flush=True)
    with atomic_write(ROOT / "experiments" / "em.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
