"""Mlynarski's 2D network where sequences are missing, in training (the paper's Table 2) and at test; and six networks that vote.

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

Methods without learning take what they need to know from the cases of "complete" for the first part, and for the second from all ten
cases without the sequence.

The tables are data/results/missing_*.csv, which notebook 13 reads, and baselines.csv. Training states are kept in
runs/missing_sequences.
"""

from functools import cache, partial

import numpy as np
import pandas as pd
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, scan

from medseg_lite import context, inference, metrics, recipes, statistics, transforms

SEQUENCES = ("flair", "t1", "t1c", "t2")
ONE_CORE = np.array([0, 1, 2, 1, 3], np.uint8)  # BRATS 2015's classes as the paper's: core, oedema, enhancing core
REGIONS = {"enhancing": [3], "core": [1, 3], "whole": [1, 2, 3]}
TRAIN, PERSONS, VOTED_ON = range(10), range(200, 220), range(200, 212)
SETTINGS = {"steps": 200, "pretrain_steps": 150, "longer": 260, "width": 0.125}
VOTERS = [(plane, subnets) for subnets in (1, 2) for plane in context.PLANES]


@cache
def person(seed: int, spacing: float = 4.0):
    case = transforms.standardise(scan(seed, spacing=spacing))
    return case.replace(label=ONE_CORE[case.label])


def without(case, lack: str):
    return case.select([c for c in SEQUENCES if c != lack])


def train(cases: list, **options):
    """Train a network; its state is kept, so that an interrupted training goes on."""
    settings = {"classes": 4, "batch_size": 8, "accumulate": 1, "scheme": "foreground", "learning_rate": 0.1, "window": 20}
    settings |= {"steps": SETTINGS["steps"], "width": SETTINGS["width"], "progress": False}
    return recipes.mlynarski(cases, **settings | options)


def lacking(fold: int) -> dict[int, str | None]:
    """Return the sequence that each training case lacks, by its seed."""
    order = np.random.default_rng(fold).permutation(TRAIN)
    return {int(seed): (None, *SEQUENCES)[n % 5] for n, seed in enumerate(order)}


def complete_cases(fold: int) -> list:
    return [person(s) for s, lack in lacking(fold).items() if lack is None]


def train_variant(store: Store, variant: str, fold: int):
    complete = complete_cases(fold)
    options = {"seed": fold, "folder": store.runs / f"{variant}_{fold}", "output": 32}
    if variant == "pretrained":
        others = [without(person(s), lack) for s, lack in lacking(fold).items() if lack]
        options |= {"incomplete": others, "pretrain_steps": SETTINGS["pretrain_steps"]}
    elif variant == "longer":
        options["steps"] = SETTINGS["longer"]
    elif variant == "dropped":
        options["drop"] = 0.5
    model = train([person(s) for s in TRAIN] if variant in ("full", "dropped") else complete, **options)
    store.examine(f"{variant}, {fold}", model, [person(s) for s in TRAIN])
    return model


def score(found: np.ndarray, case) -> dict:
    pairs = {r: (np.isin(found, labels), np.isin(case.label, labels)) for r, labels in REGIONS.items()}
    return {"case": case.name} | {f"dice_{region}": metrics.dice(*pair) for region, pair in pairs.items()}


def run_training(store: Store, variant: str, fold: int):
    model = train_variant(store, variant, fold)
    for case in map(person, PERSONS):
        yield score(inference.predict(model, case, progress=False), case)


def run_test(store: Store, variant: str, fold: int):
    model = train_variant(store, variant, fold)
    for lack in (None, *SEQUENCES):
        for case in map(person, PERSONS):
            seen = case if lack is None else transforms.complete(without(case, lack), SEQUENCES)
            yield {"missing": lack or "none"} | score(inference.predict(model, seen, progress=False), case)


def run_vote(store: Store) -> dict:
    """Return label maps (persons, networks, D, H, W) of six networks, of their averaged probabilities, and the truth."""
    voters = []
    for number, (plane, subnets) in enumerate(VOTERS):
        cases = [context.facing(person(s, 2.0), plane) for s in TRAIN]
        options = {"output": 64, "flip": plane != "sagittal", "folder": store.runs / f"voter_{plane}_{subnets}"}
        voters.append(train(cases, subnets=subnets, seed=number, **options))
        store.examine(f"vote, {plane} {subnets}", voters[-1], cases)
    maps, averages = [], []
    for case in (person(seed, 2.0) for seed in VOTED_ON):
        turned = [context.facing(case, plane) for plane, _ in VOTERS]
        each = [inference.predict(v, c, output="probabilities", progress=False) for v, c in zip(voters, turned)]
        each = [context.facing_back(probabilities, plane) for probabilities, (plane, _) in zip(each, VOTERS)]
        maps.append([p.argmax(0).astype(np.uint8) for p in each])
        averages.append(np.mean(each, 0).argmax(0).astype(np.uint8))
    arrays = {
        "seeds": np.array(VOTED_ON),
        "networks": np.array([f"{plane} {subnets}" for plane, subnets in VOTERS]),
        "maps": np.array(maps),
        "averages": np.array(averages),
        "truth": np.stack([person(s, 2.0).label for s in VOTED_ON]),
    }
    return {"vote_predictions.npz": arrays}


def run_baselines(task: str) -> list[dict]:
    regions, test = {f"dice_{region}": labels for region, labels in REGIONS.items()}, [person(s) for s in PERSONS]
    if task == "training":
        rows = [row for fold in range(3) for row in baseline_rows(complete_cases(fold), complete_cases(fold), test, regions)]
        return pd.DataFrame(rows).groupby(["method", "case"], sort=False).mean().reset_index().to_dict("records")
    cases, lack = [person(s) for s in TRAIN], task.removeprefix("missing: ")
    if lack != "none":
        cases, test = ([without(case, lack) for case in part] for part in (cases, test))
    return baseline_rows(cases, cases, test, regions)


def plan(store: Store, seeds) -> list[Row]:
    def row(part: str, run, variant: str, fold: int, minutes: float) -> Row:
        return Row(f"missing_{part}", {"variant": variant, "fold": fold}, partial(run, store, variant, fold), minutes, part)

    rows = []
    for fold in seeds or range(3):
        rows += [row("training", run_training, v, fold, 0.8) for v in ("complete", "pretrained", "full", "longer")]
        if fold == 0:
            rows += [row("test", run_test, v, fold, 1) for v in ("full", "dropped")]
            rows.append(Row("vote_predictions.npz", {}, partial(run_vote, store), minutes=15, part="vote"))
    tasks = ["training", *(f"missing: {lack}" for lack in ("none", *SEQUENCES))]
    return rows + [baselines_row(store, task, partial(run_baselines, task), 0.1) for task in tasks]


def report(store: Store) -> dict[str, str]:
    training, test, columns = store.read("missing_training"), store.read("missing_test", keep_default_na=False), list(REGIONS)
    blocks, names, networks = {}, {f"dice_{region}": region for region in REGIONS}, {}
    if not training.empty:
        table = training.rename(columns=names)
        networks["training"] = training.groupby("variant", sort=False)[list(names)].mean()
        means = table.groupby("variant", sort=False)[columns].mean()
        means.insert(0, "folds", table.groupby("variant")["fold"].nunique())
        blocks["training"] = markdown(means.reset_index())
        lines = []
        for other in ("complete", "longer"):
            for region in columns:
                pair = table.pivot_table(index=["case", "fold"], columns="variant", values=region)
                if {"pretrained", other} <= set(pair):
                    means = pair[["pretrained", other]].dropna().groupby("case").mean()
                    found = statistics.paired_t_test(means["pretrained"], means[other], alternative="greater")
                    lines.append(f"* {other}, {region}: {found}")
        blocks["tests"] = "\n".join(lines)
    if not test.empty:
        table = test.rename(columns=names).groupby(["variant", "missing"], sort=False)[columns].mean()
        blocks["test"] = markdown(table.reset_index())
        for lack, rows in test.groupby("missing", sort=False):
            networks[f"missing: {lack}"] = rows.groupby("variant", sort=False)[list(names)].mean()
    return blocks | beside_baselines(store, networks)


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
