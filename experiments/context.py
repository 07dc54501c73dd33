"""Mlynarski's two steps on brain phantoms: what do scores of 2D networks add to a 3D network, and on which grid?

    OMP_NUM_THREADS=1 python experiments/context.py [--grids 1.5 2] [--rows ...] [--runs runs/context]

On each grid (voxels of 2 mm, 1.5 mm, or, where there is time, 1 mm as in the paper): three 2D networks, for axial, coronal and
sagittal slices, are trained on 12 generated gliomas (seeds 0 to 11); their scores of all cases go to disk; 3D networks are trained
on cubes of the same 12 cases, with the scores (A, B, C) and without ("standard"). The paper also trains both steps on the same
cases. All are judged on 10 patients that no network has seen (seeds 100 to 109). Controls:

* "2D, three planes": the sum of the three 2D networks' scores, no 3D network at all;
* "standard, longer": the standard network with three times the updates, about the CPU seconds of the 2D networks and A together;
* "A, other cases": A trained on 12 cases (seeds 12 to 23) that the 2D networks have not seen, so that their scores are as good or
  bad there as on a new patient.

Labels as in BRATS 2017: 1 necrosis and non-enhancing core, 2 oedema, 3 enhancing core. Networks, scores and labels are kept in --runs
(some hundred MB); what is there is not made again. Writes data/results/context_scores.csv after every row, which notebook
09 reads, the networks of the 2 mm grid to data/checkpoints/context_*.safetensors, and experiments/context.md.
"""

import argparse
import functools
import io
import platform
import shutil
import time
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from medseg_lite import context, inference, metrics, models, phantoms, recipes, statistics, transforms
from medseg_lite.paths import atomic_write
from medseg_lite.volume import Case

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "data" / "results" / "context_scores.csv"
TRAIN, OTHERS, TEST = range(12), range(12, 24), range(100, 110)
REGIONS = {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}
FLAT = {"width": 3 / 32, "steps": 250, "batch_size": 5, "accumulate": 2, "window": 30, "learning_rate": 0.08}
SOLID = {"width": 1 / 4, "steps": 300, "batch_size": 2, "accumulate": 2, "window": 60, "learning_rate": 0.03, "output": 16}
SQUARE = {2.0: 64, 1.5: 80, 1.0: 128}  # pixels, nearly the shortest side of a slice
ROWS = {
    "2D axial": {"planes": ["axial"]},
    "2D coronal": {"planes": ["coronal"]},
    "2D sagittal": {"planes": ["sagittal"]},
    "2D, three planes": {"planes": list(context.PLANES)},
    "standard": {"variant": "standard"},
    "A": {"variant": "a"},
    "B": {"variant": "b"},
    "C": {"variant": "c"},
    "standard, longer": {"variant": "standard", "steps": 3 * SOLID["steps"], "window": 3 * SOLID["window"]},
    "A, other cases": {"variant": "a", "cases": OTHERS},
    "standard, other cases": {"variant": "standard", "cases": OTHERS},
}

SHIPPED = {"2d_axial": "axial", "2d_coronal": "coronal", "2d_sagittal": "sagittal", "3d_standard": "standard", "3d_a": "A"}


@functools.lru_cache(maxsize=30)
def patient(seed: int, grid: float) -> Case:
    """A phantom with the four classes of BRATS 2017, numbered as in the paper."""
    case = phantoms.brain(seed, site="ABC"[seed % 3], spacing=float(grid))
    info = case.info | {"classes": ("background", "necrosis and non-enhancing", "oedema", "enhancing")}
    label = np.array([0, 1, 2, 1, 3], np.uint8)[case.label]
    return transforms.standardise(case.replace(label=label, info=info, extra={}))


def kept(path: Path, train) -> torch.nn.Module:
    """The network of that file, or else the one that `train()` makes, with a card that says how."""
    if not path.exists():
        clock = time.process_time()
        model = train(path.with_suffix(""))
        seconds = round(time.process_time() - clock)
        card = model.card | {"cpu_seconds": seconds, "command": "python experiments/context.py", "date": str(date.today())}
        models.save(path, model, card, half=True)
        print(f"{path.stem}: {seconds} s of CPU, loss {model.history.loss.tail(20).mean():.3f}", flush=True)
    return models.load(path)


def flat_networks(grid: float, runs: Path) -> dict[str, torch.nn.Module]:
    def train(plane: str, folder: Path):
        return recipes.mlynarski(
            [context.facing(patient(s, grid), plane) for s in TRAIN],
            output=SQUARE[grid],
            flip=plane != "sagittal",  # whose first axis is not left to right
            classes=4,
            folder=folder,
            validate_every=50,
            progress=False,
            **FLAT,
        )

    return {plane: kept(runs / f"{plane}.safetensors", functools.partial(train, plane)) for plane in context.PLANES}


def solid_network(row: str, grid: float, runs: Path, seed: int) -> torch.nn.Module:
    settings = SOLID | ROWS[row]
    variant, seeds = settings.pop("variant"), settings.pop("cases", TRAIN)

    def train(folder: Path):
        cases = [patient(s, grid) for s in seeds]
        if variant != "standard":
            context.extract_scores(flat_networks(grid, runs), cases, runs / "scores", progress=False)
            cases = [context.with_scores(case, runs / "scores") for case in cases]
        return recipes.mlynarski(
            cases,
            network="mlynarski_3d",
            variant=variant,
            classes=4,
            seed=seed,
            folder=folder,
            validate_every=50,
            progress=False,
            **settings,
        )

    return kept(runs / f"{row.replace(', ', '_').replace(' ', '_')}_{seed}.safetensors", train)


def segment(row: str, case: Case, grid: float, runs: Path, seed: int) -> np.ndarray:
    settings = ROWS[row]
    if settings.get("variant") != "standard":
        context.extract_scores(flat_networks(grid, runs), [case], runs / "scores", progress=False)
        full = context.with_scores(case, runs / "scores")
    if "planes" in settings:
        scores = full.image[4:].reshape(3, 4, *case.shape)
        total = sum(scores[list(context.PLANES).index(plane)] for plane in settings["planes"])
        return np.where(case.mask, total.argmax(0), 0).astype(np.uint8)
    model = solid_network(row, grid, runs, seed)
    return inference.predict(model, case if settings["variant"] == "standard" else full, progress=False)


def labels(row: str, case: Case, grid: float, runs: Path, seed: int) -> np.ndarray:
    path = runs / "labels" / f"{row}_{seed}_{case.name}.npz"
    if not path.exists():
        found = segment(row, case, grid, runs, seed)
        with atomic_write(path) as temporary:
            np.savez_compressed(temporary, label=found)
    with np.load(path, allow_pickle=False) as file:
        return file["label"]


def score(found: np.ndarray, case: Case) -> dict[str, float]:
    table = metrics.evaluate(found, case.label, regions=REGIONS, metrics=["dice"]).set_index("region")["dice"]
    out = {f"dice_{region}": dice for region, dice in table.items()}
    for what, label in (("", found), ("true_", case.label)):
        for plane, axis in context.PLANES.items():
            out[f"{what}stripes_{plane}"] = metrics.slice_inconsistency(label, axis=axis, mask=case.mask)
    return {name: round(float(value), 4) for name, value in out.items()}


def cohorts(row: str) -> dict[str, range]:
    """2D networks are also scored on their own training cases, for the 3D networks learn from their scores of those."""
    return {"test": TEST} | ({"train": TRAIN} if "planes" in ROWS[row] else {})


def report() -> str:
    table = pd.read_csv(TABLE)
    out = io.StringIO()
    out.write(
        f"# Long-range 2D context\n\n{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread of a shared machine. "
        f"Generated gliomas, 12 to train on and {len(TEST)} unseen ones. 2D networks (model 1): {FLAT['width']:g} of our feature maps, "
        f"{FLAT['steps']} updates of {FLAT['accumulate']} batches of {FLAT['batch_size']} squares, 128 mm wide (120 mm on the 1.5 mm grid). 3D networks: {SOLID['width']:g} of "
        f"our feature maps, {SOLID['steps']} updates of {SOLID['accumulate']} batches of {SOLID['batch_size']} cubes with "
        f'{SOLID["output"]}³ predictions from {SOLID["output"] + 42}³ voxels; "standard, longer" has three times the updates.\n\nMean Dice in %. '
        "Stripes: `metrics.slice_inconsistency` across axial slices, mean over patients; the truth's own is in the last row.\n"
    )
    for grid, rows in table.groupby("grid"):
        out.write(
            f"\n## {grid:g} mm\n\n| network | seed | cases | whole | core | enhancing | stripes |\n|---|---|---|---|---|---|---|\n"
        )
        for (row, seed, cohort), group in rows.groupby(["row", "seed", "set"], sort=False):
            means = group[["dice_whole", "dice_core", "dice_enhancing"]].mean() * 100
            numbers = " | ".join(f"{v:.1f}" for v in means)
            out.write(f"| {row} | {seed} | {len(group)} {cohort} | {numbers} | {group.stripes_axial.mean():.2f} |\n")
        truth = rows[rows.set == "test"].drop_duplicates("case")
        out.write(f"| truth | | {len(truth)} test | | | | {truth.true_stripes_axial.mean():.2f} |\n\n")
        test = rows[rows.set == "test"]
        for other in [r for r in ROWS if r != "A"]:
            for seed in sorted(test[test.row == "A"].seed.unique()):
                a = test[(test.row == "A") & (test.seed == seed)].set_index("case")
                b = test[(test.row == other) & (test.seed == (0 if "planes" in ROWS[other] else seed))].set_index("case")
                if len(a) == len(b):
                    found = statistics.paired_t_test(a.dice_core, b.dice_core.loc[a.index], alternative="greater")
                    out.write(f"* core, A − {other}, seed {seed}: {found}\n")
    out.write("\nRepeat it: `OMP_NUM_THREADS=1 python experiments/context.py`\n")
    return out.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--grids", type=float, nargs="+", default=[2.0, 1.5], choices=sorted(SQUARE))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the 3D networks")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "context")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for grid in options.grids:
        runs = options.runs / f"{grid:g}mm"
        for seed in options.seeds:
            for row in options.rows:
                if grid != 2 and "other cases" in row:  # a question that the cheaper grid answers
                    continue
                if seed and "planes" in ROWS[row]:
                    continue
                table = pd.read_csv(TABLE) if TABLE.exists() else pd.DataFrame(columns=["grid", "row", "seed"])
                if ((table.grid == grid) & (table.row == row) & (table.seed == seed)).any():
                    continue
                clock = time.process_time()
                key = {"grid": grid, "row": row, "seed": seed}
                found = pd.DataFrame(
                    key
                    | {"set": cohort, "case": patient(s, grid).name}
                    | score(labels(row, patient(s, grid), grid, runs, seed), patient(s, grid))
                    for cohort, seeds in cohorts(row).items()
                    for s in seeds
                )
                with atomic_write(TABLE) as temporary:
                    (pd.concat([table, found]) if len(table) else found).to_csv(temporary, index=False)
                means = found[found.set == "test"].filter(like="dice").mean().round(3).to_dict()
                print(f"{grid:g} mm, {row}, seed {seed}: {means}, {time.process_time() - clock:.0f} s of CPU", flush=True)
    shipped = options.runs / "2mm"
    for target, source in SHIPPED.items():
        for path in shipped.glob(f"{source}.safetensors" if target.startswith("2d") else f"{source}_0.safetensors"):
            shutil.copyfile(path, ROOT / "data" / "checkpoints" / f"context_{target}.safetensors")
    with atomic_write(ROOT / "experiments" / "context.md") as temporary:
        temporary.write_text(report(), encoding="utf-8")


if __name__ == "__main__":
    main()
