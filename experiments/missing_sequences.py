"""Mlynarski's 2D network where sequences are missing, in training (the paper's Table 2) and at test; and six networks that vote.

    python experiments/missing_sequences.py [--parts training test vote] [--folds 0 1 2]

Ten generated gliomas (seeds 0 to 9) to train on and twenty other persons (seeds 200 to 219) to judge. Necrosis and non-enhancing core
are one class, as in BRATS 2017. All networks are 2D, have an eighth of the feature maps, and see squares of slices, half of them
centred on a tumour.

* training (4 mm, axial model 1): two of the ten cases have all four sequences, and of the other eight two each lack T1, T1c, T2 or
  FLAIR (the paper's proportions; which ones depends on the fold, and so do weights and squares). "complete": the two complete cases
  only. "pretrained": the same after pre-training each subnetwork on the eight cases that have its sequence. "longer": complete cases
  only, with more updates, which take at least as long as the pre-training. "full": ten complete cases.
* test (4 mm, fold 0): the network of "full", and one ("dropped") whose training squares lacked a random sequence half of the time,
  judged with each sequence in turn replaced by zeros.
* vote (2 mm): axial, coronal and sagittal networks, models 1 and 2, on ten complete cases. Their label maps of the first twelve
  persons, and that of their averaged probabilities, go to data/results/vote_predictions.npz.

Results that are in data/results/missing_*.csv, which notebook 10 reads, are not made again: remove a file to start it afresh.
Training states are kept in runs/missing_sequences. Writes experiments/missing_sequences.md.
"""

import argparse
import functools
import io
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medseg_lite import context, inference, metrics, phantoms, recipes, statistics, transforms
from medseg_lite.paths import atomic_write

ROOT = Path(__file__).resolve().parent.parent
RESULTS, STATES = ROOT / "data" / "results", ROOT / "runs" / "missing_sequences"
SEQUENCES = ("flair", "t1", "t1c", "t2")
ONE_CORE = np.array([0, 1, 2, 1, 3], np.uint8)  # BRATS 2015's classes as the paper's: core, oedema, enhancing core
REGIONS = {"enhancing": [3], "core": [1, 3], "whole": [1, 2, 3]}
TRAIN, PERSONS, VOTED_ON = range(10), range(200, 220), range(200, 212)
STEPS, PRETRAIN, LONGER, WIDTH = 200, 150, 260, 0.125
SETTINGS = {
    "classes": 4,
    "width": WIDTH,
    "batch_size": 8,
    "accumulate": 1,
    "scheme": "foreground",
    "learning_rate": 0.1,
    "window": 20,
    "progress": False,
}
VOTERS = [(plane, subnets) for subnets in (1, 2) for plane in context.PLANES]


@functools.cache
def person(seed: int, spacing: float = 4.0):
    case = transforms.standardise(phantoms.brain(seed, site="ABC"[seed % 3], spacing=spacing))
    return case.replace(label=ONE_CORE[case.label])


def cohort(fold: int):
    """The two complete cases of a fold, and the eight others without the sequence that they lack."""
    order = np.random.default_rng(fold).permutation(TRAIN)
    lacks = {int(seed): (None, *SEQUENCES)[n % 5] for n, seed in enumerate(order)}
    complete = [person(s) for s, lack in lacks.items() if lack is None]
    others = [person(s).select([c for c in SEQUENCES if c != lack]) for s, lack in lacks.items() if lack]
    return complete, others


def network(variant: str, fold: int):
    """A trained network: from its kept state, where there is one."""
    complete, others = cohort(fold)
    options = {"steps": STEPS, "seed": fold, "folder": STATES / f"{variant}_{fold}", "output": 32}
    if variant == "pretrained":
        options |= {"incomplete": others, "pretrain_steps": PRETRAIN}
    elif variant == "longer":
        options["steps"] = LONGER
    elif variant == "dropped":
        options["drop"] = 0.5
    cases = [person(s) for s in TRAIN] if variant in ("full", "dropped") else complete
    return recipes.mlynarski(cases, **SETTINGS, **options)


def voter(number: int):
    """One of the six, likewise."""
    plane, subnets = VOTERS[number]
    return recipes.mlynarski(
        [context.facing(person(s, 2.0), plane) for s in TRAIN],
        steps=STEPS,
        subnets=subnets,
        output=64,
        flip=plane != "sagittal",
        seed=number,
        folder=STATES / f"voter_{plane}_{subnets}",
        **SETTINGS,
    )


def dice(found: np.ndarray, case) -> dict:
    return {
        f"dice_{region}": metrics.dice(np.isin(found, labels), np.isin(case.label, labels))
        for region, labels in REGIONS.items()
    }


def trained(variant: str, fold: int):
    model = network(variant, fold)
    for seed in PERSONS:
        yield {"case": person(seed).name} | dice(inference.predict(model, person(seed), progress=False), person(seed))


def tested(variant: str, fold: int):
    model = network(variant, fold)
    for lack in (None, *SEQUENCES):
        for seed in PERSONS:
            case = person(seed)
            seen = case if lack is None else transforms.complete(case.select([c for c in SEQUENCES if c != lack]), SEQUENCES)
            found = inference.predict(model, seen, progress=False)
            yield {"missing": lack or "none", "case": case.name} | dice(found, case)


def vote() -> None:
    """Label maps (persons, networks, D, H, W) of six networks, of their averaged probabilities, and the truth."""
    path = RESULTS / "vote_predictions.npz"
    if path.exists():
        return
    models = []
    for number, (plane, subnets) in enumerate(VOTERS):
        began = time.process_time()
        models.append(voter(number))
        print(f"vote, {plane} {subnets}: {time.process_time() - began:.0f} s of CPU", flush=True)
    maps, averages = [], []
    for seed in VOTED_ON:
        case = person(seed, 2.0)
        each = [
            context.facing_back(
                inference.predict(m, context.facing(case, plane), output="probabilities", progress=False), plane
            )
            for m, (plane, _) in zip(models, VOTERS)
        ]
        maps.append([p.argmax(0).astype(np.uint8) for p in each])
        averages.append(np.mean(each, 0).argmax(0).astype(np.uint8))
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(
            file,
            seeds=np.array(VOTED_ON),
            networks=np.array([f"{plane} {subnets}" for plane, subnets in VOTERS]),
            maps=np.array(maps),
            averages=np.array(averages),
            truth=np.stack([person(s, 2.0).label for s in VOTED_ON]),
        )


PARTS = {
    "training": (trained, ("complete", "pretrained", "full", "longer")),
    "test": (tested, ("full", "dropped")),
    "vote": (None, ()),
}


def table_of(part: str) -> Path:
    return RESULTS / f"missing_{part}.csv"


def report() -> str:
    out = io.StringIO()
    out.write(
        "# Missing sequences, and a vote\n\n"
        f"{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread. {STEPS} updates each ({PRETRAIN} more for each "
        f'subnetwork where pre-trained, {LONGER} in all in "longer"), width {WIDTH}, 4 mm; twenty unseen persons, mean Dice.\n'
    )
    if table_of("training").is_file():
        table = pd.read_csv(table_of("training"))
        out.write("\n## Sequences missing in training\n\n| variant | folds | EC | TC | WT |\n|---|---|---|---|---|\n")
        columns = [f"dice_{r}" for r in REGIONS]
        for variant, rows in table.groupby("variant", sort=False):
            means = " | ".join(f"{v:.3f}" for v in rows[columns].mean())
            out.write(f"| {variant} | {rows['fold'].nunique()} | {means} |\n")
        out.write("\nPre-trained less the other, paired by person over the folds that both have:\n\n")
        for other in ("complete", "longer"):
            for column in columns:
                pair = table.pivot_table(index=["case", "fold"], columns="variant", values=column)
                if {"pretrained", other} <= set(pair):
                    means = pair[["pretrained", other]].dropna().groupby("case").mean()
                    test = statistics.paired_t_test(means["pretrained"], means[other], alternative="greater")
                    out.write(f"* {other}, {column[5:]}: {test}\n")
    if table_of("test").is_file():
        table = pd.read_csv(table_of("test"))
        out.write("\n## A sequence missing at test\n\n| network | missing | EC | TC | WT |\n|---|---|---|---|---|\n")
        for (variant, lack), rows in table.groupby(["variant", "missing"], sort=False):
            out.write(f"| {variant} | {lack} | {' | '.join(f'{v:.3f}' for v in rows[columns].mean())} |\n")
    return out.getvalue() + "\nRepeat it: `python experiments/missing_sequences.py`\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="of the parts; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for fold in options.folds:
        for part in options.parts:
            run, variants = PARTS[part]
            if part == "vote":
                vote()
            for variant in variants if options.variants is None else options.variants:
                if variant not in variants or (part == "test" and fold):
                    continue
                path = table_of(part)
                done = pd.read_csv(path, keep_default_na=False) if path.is_file() else pd.DataFrame(columns=["variant", "fold"])
                if ((done["variant"] == variant) & (done["fold"] == fold)).any():
                    continue
                began, clock = time.process_time(), time.perf_counter()
                rows = pd.DataFrame([{"variant": variant, "fold": fold} | row for row in run(variant, fold)]).round(4)
                with atomic_write(path) as temporary:
                    (pd.concat([done, rows]) if len(done) else rows).to_csv(temporary, index=False)
                means = rows.filter(like="dice").mean().round(3).to_dict()
                spent = f"{time.process_time() - began:.0f} s of CPU, {time.perf_counter() - clock:.0f} s"
                print(f"{part}, {variant}, fold {fold}: {means}, {spent}", flush=True)
    with atomic_write(ROOT / "experiments" / "missing_sequences.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
