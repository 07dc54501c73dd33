"""Membranes of electron microscopy: FCN + FC-ResNet, FC-ResNet and U-Net on the real stack, and five kinds of input on phantoms.

"inputs": generated stacks as a detector counts them (each with a gain and an offset of its own); the same FC-ResNet on raw
intensities, rescaled, standardised and equalised ones, and behind the FCN pre-processor, which takes raw ones; both once more in
other units, thousands of counts; and a U-Net on standardised ones. "real": the stack of ISBI 2012, in `$MEDSEG_DATA_DIR/isbi2012`, the
first 16 of the 20 slices here to train on and the last 4 to test. "real, longer": the same with six times the updates.

The tables are data/results/em_scores.csv and em_curves.csv, which notebook 08 reads. Seed 0's networks become
data/checkpoints/em_*.safetensors.
"""

import time
from functools import cache, partial

import pandas as pd
from _frame import Row, Store, main, markdown

from medseg_lite import datasets, inference, metrics, phantoms, recipes, transforms

MEASURES = ["v_rand", "v_info", "dice"]
SETTINGS = {"inputs": 500, "real": 500, "real, longer": 3000}  # updates
TRAIN, TEST = 16, 6  # generated stacks of two slices of 256²
SLICES = 16  # of the real stack, to train on

PREPARED = {
    "raw": lambda case: case,
    "rescaled": transforms.rescale,
    "standardised": transforms.standardise,
    "equalised": transforms.equalise,
    # One constant for all stacks: other units, no normalisation.
    "raw/1000": lambda case: case.replace(image=case.image / 1000),
}
VARIANTS = {  # the network, its width, and what is done to its input
    "raw": ("fc_resnet", 0.25, "raw"),
    "rescaled": ("fc_resnet", 0.25, "rescaled"),
    "standardised": ("fc_resnet", 0.25, "standardised"),
    "equalised": ("fc_resnet", 0.25, "equalised"),
    "learned": ("fcn_fc_resnet", 0.25, "raw"),
    "raw/1000": ("fc_resnet", 0.25, "raw/1000"),
    "learned/1000": ("fcn_fc_resnet", 0.25, "raw/1000"),
    "u-net": ("unet2d", 0.125, "standardised"),
}
REAL = ("learned", "standardised", "u-net")
SHIPPED = {("inputs", v) for v in ("learned", "learned/1000", "standardised", "u-net")} | {("real", "learned")}


@cache
def stacks(what: str) -> tuple[list, list]:
    """Return the cases to train on and those to test."""
    if what == "inputs":
        options = {"slices": 2, "size": 256, "counts": True}
        return phantoms.em_cohort(TRAIN, **options), phantoms.em_cohort(TEST, first_seed=100, **options)
    whole = datasets.isbi2012()
    parts = [slice(0, SLICES), slice(SLICES, whole.shape[2])]
    return tuple(
        [whole.replace(image=whole.image[..., p], label=whole.label[..., p], name=f"{whole.name}[{p.start}:{p.stop}]")]
        for p in parts
    )


def score(model, case) -> dict[str, float]:
    """Return V_rand and V_info of a stack, and the Dice of its membranes."""
    cell = inference.predict(model, case, output="probabilities", progress=False)[0]
    values = metrics.v_rand(cell, case.label == 0), metrics.v_info(cell, case.label == 0)
    return dict(zip(MEASURES, [*values, metrics.dice(cell < 0.5, case.label == 1)]))


def run(store: Store, what: str, variant: str, seed: int) -> dict:
    network, width, prepared = VARIANTS[variant]
    train, test = ([PREPARED[prepared](c) for c in cases] for cases in stacks(what))
    clock = time.process_time()
    model = recipes.drozdzal(
        train,
        network=network,
        width=width,
        steps=SETTINGS[what],
        crop=64,
        batch_size=8,
        validation=test,  # for the curves; nothing is chosen by it
        validate_every=100,
        seed=seed,
        progress=False,
    )
    seconds = round(time.process_time() - clock)
    row = {
        "steps": SETTINGS[what],
        "width": width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
    }
    scores = [row | {"case": c.name} | score(model, c) for c in test]
    if seed == 0 and (what, variant) in SHIPPED:
        mean = pd.DataFrame(scores)[MEASURES].mean().round(3).to_dict()
        card = model.card | {"input": prepared, "test": mean}
        store.save(f"em_{what}_{variant.replace('-', '').replace('/', '_')}", model, card, half=True)
    curve = model.history.dropna()[["step", "loss", "dice_lesion"]].rename(columns={"dice_lesion": "dice"})
    return {"em_curves": curve.to_dict("records"), "em_scores": scores}


def plan(store: Store, seeds) -> list[Row]:
    return [
        Row("em_scores", {"what": what, "variant": variant, "seed": seed}, partial(run, store, what, variant, seed), minutes)
        for what, variants, minutes in (("inputs", VARIANTS, 1.5), ("real", REAL, 2), ("real, longer", REAL, 7))
        for seed in seeds or (0, 1)
        for variant in variants
    ]


def report(store: Store) -> dict[str, str]:
    table, blocks = store.read("em_scores"), {}
    if table.empty:
        return {}
    for what, rows in table.groupby("what", sort=False):
        cells = []
        for variant in [v for v in VARIANTS if v in set(rows["variant"])]:
            r = rows[rows["variant"] == variant]
            seeds = r.groupby("seed")[MEASURES].mean()
            means = [f"{seeds[m].mean():.3f} ({seeds[m].min():.3f}–{seeds[m].max():.3f})" for m in MEASURES]
            seconds = r.groupby("seed").seconds.first().mean()
            cells.append([variant, f"{r.parameters.iloc[0]:,}", r.steps.iloc[0], f"{seconds:.0f}", len(seeds), *means])
        columns = ["input", "parameters", "updates", "CPU s", "seeds", "V_rand", "V_info", "Dice"]
        blocks[what] = markdown(pd.DataFrame(cells, columns=columns))
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
