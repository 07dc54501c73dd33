"""Mlynarski's two steps on brain phantoms: what do scores of 2D networks add to a 3D network, and on which grid?

On each grid (voxels of 2 mm, 1.5 mm, or, where there is time and `--only "1 mm"` asks for it, 1 mm as in the paper): three 2D
networks, for axial, coronal and sagittal slices, are trained on 12 generated gliomas (seeds 0 to 11); their scores of all cases go to
disk; 3D networks are trained on cubes of the same 12 cases, with the scores (A, B, C) and without ("standard"). The paper also trains
both steps on the same cases. All are judged on 10 patients that no network has seen (seeds 100 to 109). Controls:

* "2D, three planes": the sum of the three 2D networks' scores, no 3D network at all;
* "standard, longer": the standard network with three times the updates, about the CPU seconds of the 2D networks and A together;
* "A, other cases": A trained on 12 cases (seeds 12 to 23) that the 2D networks have not seen, so that their scores are as good or
  bad there as on a new patient.

Labels as in BRATS 2017: 1 necrosis and non-enhancing core, 2 oedema, 3 enhancing core. Networks and scores are kept in runs/context
(some hundred MB). The tables are data/results/context_scores.csv, which notebook 12 reads, and baselines.csv; networks of the 2 mm
grid become data/checkpoints/context_*.safetensors.
"""

import shutil
import time
from functools import lru_cache, partial

import numpy as np
import pandas as pd
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, scan, vitals_row

from medseg_lite import context, inference, metrics, models, recipes, statistics, transforms
from medseg_lite.models import Network
from medseg_lite.volume import Case

TRAIN, OTHERS, TEST = range(12), range(12, 24), range(100, 110)
REGIONS = {"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]}
SETTINGS = {"steps_2d": 250, "steps_3d": 300}
FLAT = {"width": 3 / 32, "batch_size": 5, "accumulate": 2, "window": 30, "learning_rate": 0.08}
SOLID = {"width": 1 / 4, "batch_size": 2, "accumulate": 2, "window": 60, "learning_rate": 0.03, "output": 16}
LONGER = 3  # times the updates of the standard network
SQUARE = {2.0: 64, 1.5: 80, 1.0: 128}  # pixels, nearly the shortest side of a slice
PLANES = {f"2D {plane}": [plane] for plane in context.PLANES} | {"2D, three planes": list(context.PLANES)}
VARIANTS = {
    "standard": ("standard", TRAIN),
    "A": ("a", TRAIN),
    "B": ("b", TRAIN),
    "C": ("c", TRAIN),
    "standard, longer": ("standard", TRAIN),
    "A, other cases": ("a", OTHERS),
    "standard, other cases": ("standard", OTHERS),
}
SHIPPED = {"axial": "2d_axial", "coronal": "2d_coronal", "sagittal": "2d_sagittal", "standard_0": "3d_standard", "A_0": "3d_a"}


@lru_cache(maxsize=30)
def patient(seed: int, grid: float) -> Case:
    """Return a phantom with the four classes of BRATS 2017, numbered as in the paper."""
    case = scan(seed, spacing=grid)
    info = case.info | {"classes": ("background", "necrosis and non-enhancing", "oedema", "enhancing")}
    label = np.array([0, 1, 2, 1, 3], np.uint8)[case.label]
    return transforms.standardise(case.replace(label=label, info=info, extra={}))


def network(store: Store, grid: float, name: str, cases, train) -> Network:
    """Return the network of that name, from its file where it was trained before; on the 2 mm grid, ship it.

    Args:
        cases: function that returns the training cases as the network sees them.
        train: function of these cases that returns the trained network.
    """
    path = store.runs / f"{grid:g}mm" / f"{name}.safetensors"
    if not path.exists():
        clock, seen = time.process_time(), cases()
        model = train(seen, folder=path.with_suffix(""), classes=4, validate_every=50, progress=False)
        facts = {"cpu_seconds": round(time.process_time() - clock), "command": "python experiments/context.py"}
        models.save(path, model, model.card | facts, half=True)
        store.examine(f"{grid:g} mm, {name}", model, seen)
        if grid == 2 and name in SHIPPED:
            store.checkpoints.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, store.checkpoints / f"context_{SHIPPED[name]}.safetensors")
    return models.load(path)


def facing_cases(grid: float, plane: str) -> list[Case]:
    return [context.facing(patient(s, grid), plane) for s in TRAIN]


def flat_network(store: Store, grid: float, plane: str) -> Network:
    def train(cases, **options):
        left_to_right = plane != "sagittal"  # the first axis of the slices
        return recipes.mlynarski(cases, output=SQUARE[grid], flip=left_to_right, steps=SETTINGS["steps_2d"], **FLAT, **options)

    return network(store, grid, plane, partial(facing_cases, grid, plane), train)


def add_scores(store: Store, grid: float, cases: list[Case]) -> list[Case]:
    """Return the cases with the scores of the three 2D networks as further channels."""
    folder = store.runs / f"{grid:g}mm" / "scores"
    context.extract_scores({p: flat_network(store, grid, p) for p in context.PLANES}, cases, folder, progress=False)
    return [context.with_scores(case, folder) for case in cases]


def solid_network(store: Store, grid: float, row: str, seed: int) -> Network:
    variant, seeds = VARIANTS[row]

    def see() -> list[Case]:
        cases = [patient(s, grid) for s in seeds]
        return cases if variant == "standard" else add_scores(store, grid, cases)

    def train(cases, **options):
        times = LONGER if "longer" in row else 1
        options |= SOLID | {"steps": times * SETTINGS["steps_3d"], "window": times * SOLID["window"]}
        return recipes.mlynarski(cases, network="mlynarski_3d", variant=variant, seed=seed, **options)

    return network(store, grid, f"{row.replace(', ', '_').replace(' ', '_')}_{seed}", see, train)


def segment(store: Store, grid: float, row: str, seed: int, case: Case) -> np.ndarray:
    if VARIANTS.get(row, "")[0] == "standard":
        return inference.predict(solid_network(store, grid, row, seed), case, progress=False)
    (full,) = add_scores(store, grid, [case])
    if row in VARIANTS:
        return inference.predict(solid_network(store, grid, row, seed), full, progress=False)
    scores = full.image[4:].reshape(3, 4, *case.shape)
    total = sum(scores[list(context.PLANES).index(plane)] for plane in PLANES[row])
    return np.where(case.mask, total.argmax(0), 0).astype(np.uint8)


def run(store: Store, grid: float, row: str, seed: int):
    """Score a row on the test cases; 2D networks also on their training cases, since 3D networks learn from their scores of those."""
    for cohort, seeds in ({"test": TEST} | ({"train": TRAIN} if row in PLANES else {})).items():
        for case in (patient(s, grid) for s in seeds):
            found = segment(store, grid, row, seed, case)
            table = metrics.evaluate(found, case.label, regions=REGIONS, metrics=["dice"]).set_index("region")["dice"]
            scores = {f"dice_{region}": dice for region, dice in table.items()}
            for what, label in (("", found), ("true_", case.label)):
                for plane, axis in context.PLANES.items():
                    scores[f"{what}stripes_{plane}"] = metrics.slice_inconsistency(label, axis=axis, mask=case.mask)
            yield {"set": cohort, "case": case.name} | scores


def run_baselines() -> list[dict]:
    cases, test = ([patient(s, 2.0) for s in seeds] for seeds in (TRAIN, TEST))
    return baseline_rows(cases, cases, test, {f"dice_{region}": labels for region, labels in REGIONS.items()})


def plan(store: Store, seeds) -> list[Row]:
    rows = [
        Row(
            "context_scores",
            {"grid": grid, "row": row, "seed": seed},
            partial(run, store, grid, row, seed),
            minutes=(4 if "longer" in row else 2) * (2 / grid) ** 2,
            part=f"{grid:g} mm",
            extra=grid == 1,
        )
        for grid in SQUARE
        for seed in seeds or [0]
        for row in (*PLANES, *VARIANTS)
        # The 2D networks have one seed. The question of the other cases is one that the cheapest grid answers.
        if not (seed and row in PLANES) and not (grid != 2 and "other cases" in row)
    ]
    rows.append(baselines_row(store, "2 mm", run_baselines, 0.8))
    for plane in context.PLANES:
        rows.append(vitals_row(store, f"2 mm, {plane}", f"context_2d_{plane}", partial(facing_cases, 2.0, plane)))
    rows.append(vitals_row(store, "2 mm, standard_0", "context_3d_standard", lambda: [patient(s, 2.0) for s in TRAIN]))
    return rows


def compare(test: pd.DataFrame) -> list[str]:
    """Test A's Dice of the core against that of every other row."""
    lines = []
    for other in [row for row in (*PLANES, *VARIANTS) if row != "A"]:
        for seed in sorted(test[test.row == "A"].seed.unique()):
            a = test[(test.row == "A") & (test.seed == seed)].set_index("case")
            b = test[(test.row == other) & (test.seed == (0 if other in PLANES else seed))].set_index("case")
            if len(a) == len(b):
                found = statistics.paired_t_test(a.dice_core, b.dice_core.loc[a.index], alternative="greater")
                lines.append(f"* core, A − {other}, seed {seed}: {found}")
    return lines


def report(store: Store) -> dict[str, str]:
    table, lines = store.read("context_scores"), []
    if table.empty:
        return {}
    for grid, rows in table.groupby("grid", sort=False):
        cells = [
            [
                row,
                str(seed),
                f"{len(group)} {cohort}",
                *(100 * group[f"dice_{r}"].mean() for r in REGIONS),
                group.stripes_axial.mean(),
            ]
            for (row, seed, cohort), group in rows.groupby(["row", "seed", "set"], sort=False)
        ]
        test = rows[rows.set == "test"]
        truth = test.drop_duplicates("case")
        cells.append(["truth", "", f"{len(truth)} test", "", "", "", truth.true_stripes_axial.mean()])
        frame = pd.DataFrame(cells, columns=["network", "seed", "cases", *REGIONS, "stripes"])
        frame["stripes"] = frame["stripes"].map("{:.2f}".format)
        lines += [f"## {grid:g} mm", "", markdown(frame, 1), "", *compare(test), ""]
    test = table[(table.grid == 2) & (table.set == "test")]
    dice = test.groupby("row", sort=False)[[f"dice_{region}" for region in REGIONS]].mean()
    return {"grids": "\n".join(lines)} | beside_baselines(store, {"2 mm": dice})


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
