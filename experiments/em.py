"""Membranes of electron microscopy: FCN + FC-ResNet, FC-ResNet and U-Net on the real stack, and five kinds of input on phantoms.

Claims (Drozdzal et al. 2018): the pipeline has a higher V_rand than U-Net and FC-ResNet on ISBI 2012 (table III: .981, .973, .969); a
learned pre-processor serves an FC-ResNet better than standardising or rescaling (section IV-A); it brings a broad range of intensities
to a narrow one (section IV-D, figure 6).

"real": the stack of ISBI 2012, in `$MEDSEG_DATA_DIR/isbi2012`. Of its 20 labelled slices 12 are for training, 4 for choices, the last 4
for the test. Three systems of the same width, with the same loss (cross-entropy + Dice), optimiser (Adam, warm-up, cosine to zero),
crops and augmentation: the pipeline on raw intensities, FC-ResNet and U-Net on standardised ones. Three seeds. Metrics: V_rand and V_info
by the challenge's rule (the best of the thresholds 0, .1, … 1, by the test's own truth), and at a threshold that makes a share of all
pixels membrane; the share is chosen on the four slices for choices, for each network by itself. Each network alone, and the mean of the
three networks of a system, with `--only turns` also averaged over the eight
turns and flips of a slice. Beside them stands a blur with a threshold, chosen
on the same slices. Intervals are over seeds and slices (`statistics.two_way`).

"blocks": layers taken out of these networks or exchanged, the estimate after each block, and one threshold on what is handed on.

"start": the pipeline's pre-processor from three starts, with and without weight decay: loss, and the range of what it hands on, by update.

"inputs": generated stacks as a detector counts them (each with a gain and an offset of its own); the same FC-ResNet on raw
intensities, rescaled, standardised and equalised ones, and behind the FCN pre-processor, which takes raw ones; both once more in
other units, thousands of counts; and a U-Net, of half the width, on standardised ones.

The tables are data/results/em_real.csv, em_real_curves.csv, em_start.csv, em_scores.csv and em_curves.csv, which notebook 10 reads, and
baselines.csv. Networks become data/checkpoints/em_*.safetensors: seed 0's of "inputs"; of "real" the U-Net that is best on the slices for
choices.
"""

import time
from functools import cache, partial

import _em_page as page
import numpy as np
import pandas as pd
from _em_real import (
    MEASURES,
    PREPARED,
    SEEDS,
    SETTINGS,
    SIGMAS,
    START,
    STARTS,
    SYSTEMS,
    run_blocks,
    run_blur,
    run_mean,
    run_probe,
    run_real,
    run_start,
)
from _frame import Row, Store, baseline_rows, baselines_row, main, vitals_row

from medseg_lite import baselines, inference, metrics, phantoms, recipes

TRAIN, TEST = 16, 6  # generated stacks of two slices of 256²
VARIANTS = {  # of "inputs": the network, its width, and what is done to its input
    "raw": ("fc_resnet", 0.25, "raw"),
    "rescaled": ("fc_resnet", 0.25, "rescaled"),
    "standardised": ("fc_resnet", 0.25, "standardised"),
    "equalised": ("fc_resnet", 0.25, "equalised"),
    "learned": ("fcn_fc_resnet", 0.25, "raw"),
    "raw/1000": ("fc_resnet", 0.25, "raw/1000"),
    "learned/1000": ("fcn_fc_resnet", 0.25, "raw/1000"),
    "u-net": ("unet2d", 0.125, "standardised"),
}
SHIPPED = ("learned", "learned/1000", "standardised", "u-net")


@cache
def stacks() -> tuple[list, list]:
    """Return the generated cases to train on and those to test."""
    options = {"slices": 2, "size": 256, "counts": True}
    return phantoms.em_cohort(TRAIN, **options), phantoms.em_cohort(TEST, first_seed=100, **options)


def prepared_cases(variant: str) -> list[list]:
    """Return the cases to train on and those to test, as the network sees them."""
    return [[PREPARED[VARIANTS[variant][2]](c) for c in cases] for cases in stacks()]


def score(cell: np.ndarray, case) -> dict[str, float]:
    """Return V_rand and V_info of a stack, and the Dice of its membranes, from the probability of being inside a cell."""
    values = metrics.v_rand(cell, case.label == 0), metrics.v_info(cell, case.label == 0)
    return dict(zip(MEASURES, [*values, metrics.dice(cell < 0.5, case.label == 1)]))


def run(store: Store, variant: str, seed: int) -> dict:
    """Train a variant of "inputs" by the paper's recipe, with smaller crops, and score it."""
    network, width, prepared = VARIANTS[variant]
    train, test = prepared_cases(variant)
    clock = time.process_time()
    model = recipes.drozdzal(
        train,
        network=network,
        width=width,
        steps=SETTINGS["inputs"],
        crop=64,
        batch_size=8,
        validation=test,  # for the curves; nothing is chosen by it
        validate_every=100,
        seed=seed,
        progress=False,
    )
    seconds = round(time.process_time() - clock)
    row = {
        "steps": SETTINGS["inputs"],
        "width": width,
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
    }
    store.examine(f"inputs, {variant}, {seed}", model, train)
    probabilities = [inference.predict(model, c, output="probabilities", progress=False) for c in test]
    scores = [row | {"case": c.name} | score(p[0], c) for p, c in zip(probabilities, test)]
    if seed == 0 and variant in SHIPPED:
        mean = pd.DataFrame(scores)[MEASURES].mean().round(3).to_dict()
        card = model.card | {"input": prepared, "test": mean}
        store.save(checkpoint(variant), model, card, half=True)
    curve = model.history.dropna()[["step", "loss", "dice_lesion"]].rename(columns={"dice_lesion": "dice"})
    return {"em_curves": curve.to_dict("records"), "em_scores": scores}


def checkpoint(variant: str) -> str:
    """Return the name of the checkpoint of a variant of "inputs"."""
    return f"em_inputs_{variant.replace('-', '').replace('/', '_')}"


def run_baselines() -> list[dict]:
    """Score the methods without learning on generated stacks.

    Their masks have a single threshold, while V_rand and V_info take the best of eleven of a network's probabilities. So blurred
    intensities are scored as probabilities, too.
    """
    train, test = prepared_cases("standardised")
    rows = baseline_rows(train, train, test, {"dice": [1]}, lambda found, case: score(~found, case))
    for sd in baselines.BLURS:
        for case in test:
            bright = baselines.blurred(case, case.channels[0], sd)
            share = np.searchsorted(np.sort(bright, axis=None), bright) / bright.size  # of the voxels that are darker
            rows.append({"method": f"intensity, blur {sd:g}", "case": case.name} | score(share, case) | {"dice": None})
    return rows


# ------------------------------------------------------------------------------------------------------------ plan and page


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for seed in seeds or SEEDS:
        rows += [
            Row("em_real", {"system": system, "seed": seed}, partial(run_real, store, system, seed), minutes, "real")
            for system, (_, _, minutes) in SYSTEMS.items()
        ]
    for name, sigmas in (("threshold", (0,)), ("blur + threshold", SIGMAS)):
        rows.append(Row("em_real", {"system": name, "seed": None}, partial(run_blur, sigmas), 1, "real"))
    for seed in seeds or SEEDS:
        for system in ("standardised", "u-net"):
            rows.append(
                Row("em_blocks", {"system": system, "seed": seed}, partial(run_blocks, store, system, seed), 0.5, "blocks")
            )
        rows.append(Row("em_blocks", {"system": "learned", "seed": seed}, partial(run_probe, store, seed), 0.3, "blocks"))
    for system in SYSTEMS:
        rows.append(Row("em_real", {"system": system, "seed": "mean"}, partial(run_mean, store, system), 0.2, "means"))
        key = {"system": system, "seed": "mean of turns"}
        rows.append(Row("em_real", key, partial(run_mean, store, system, turns=8), 2, "turns", extra=True))
    for start, penalty in [*((start, 1e-4) for start in STARTS), (START, 0.0)]:
        key = {"start": start, "penalty": penalty}
        rows.append(Row("em_start", key, partial(run_start, store, start, penalty), 1, "start"))
    for seed in seeds or (0, 1):
        for variant in VARIANTS:
            key = {"what": "inputs", "variant": variant, "seed": seed}
            rows.append(Row("em_scores", key, partial(run, store, variant, seed), 1.5))
    rows.append(baselines_row(store, "inputs", run_baselines, 0.5))
    for variant in SHIPPED:
        see = partial(prepared_cases, variant)
        rows.append(vitals_row(store, f"inputs, {variant}, 0", checkpoint(variant), lambda see=see: see()[0]))
    return rows


def report(store: Store) -> dict[str, str]:
    return page.report(store, VARIANTS)


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
