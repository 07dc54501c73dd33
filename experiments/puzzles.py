"""Six puzzles, in each of which a method must win by construction, trained at both ends of their dial.

In a puzzle (`medseg_lite.phantoms.puzzles`) a single property tells the classes apart. At the end "needed" of its dial nothing else
does; at the end "not needed" something simpler does too. The method that is made for the property must win at the first end, where its
rivals can only guess. At the second end all must be alike.

Claims: two scales (DeepMedic, Kamnitsas et al. 2017, section 2.3), 3-D convolutions (sections 1 and 3.5), long-range 2-D context for a
3-D network (Mlynarski et al. 2019, section 2), two pathways (Havaei et al. 2017, section 3.1), a loss for rare classes (Kayalibay et
al. 2017, section 4.3), far context. The papers report effects of .01 to .1 in Dice on patients.

Metric: mean Dice over the classes in `SCORED`, in each test case. Eight test cases, three seeds. The networks have the structure of
their paper, fewer feature maps and, most of them, half the depth. All networks of a puzzle have the same cases, updates and optimiser,
with a rate that falls to zero (the far plate's 2D network has its own). Cases to train on have seeds from 0, for validation from 1000,
to test from 2000. Whatever was chosen was chosen on validation cases.

Two controls. In "2D-3D A, plate hidden" the 2D network is trained and asked without the part of the image that holds the plate: it
learns as long and hands over as many scores, but none from far away. And the method that each puzzle is made for is trained three
more times from the same seed, with weights changed by a millionth: what these runs differ by is the noise floor.

The tables are data/results/puzzles.csv, puzzles_curves.csv and puzzles_noise.csv. The page's picture is made by

    cd experiments && python -c "import puzzles; puzzles.draw('puzzles.webp')"
"""

import time
from collections.abc import Callable, Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, main, markdown, provenance
from scipy import ndimage
from torch import nn

from medseg_lite import inference, losses, metrics, models, phantoms, recipes, statistics, training
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch, NormalizedSGD
from medseg_lite.volume import Case

SETTINGS = {"share": 1.0}  # of the updates, for a quick trial
ENDS = ("needed", "not needed")  # of a dial
SEEDS = (0, 1, 2)
COPIES = (1, 2, 3)  # of the noise floor
FIRST = {"train": 0, "validation": 1000, "test": 2000}  # seeds of the cases
COUNT = {"validation": 2, "test": 8}
VALIDATIONS = 6
PLATE = 24  # planes along x, from the left, in which the far plate's balls never lie

HALF, HIDDEN = (12, 12, 16, 16), (24, 24)  # four convolutions of DeepMedic's eight
TWICE = tuple(2 * maps for maps in HALF)
EIGHT = (8, 8, 12, 12, 12, 12, 16, 16)
CUBES = {"output": 9, "batch_size": 10, "dropout": 0.0}
SQUARES = CUBES | {"batch_size": 120}  # about as many voxels
SLICES = {"network": "mlynarski_2d", "width": 1 / 16, "output": 64, "batch_size": 8, "scheme": "equal"}
# The background weighs less than in the paper. Otherwise some seeds do not notice the plate in so few updates. See `balance`.
SLICES |= {"steps": 300, "rate": 5e-3, "target_weights": (0.04, 0.48, 0.48)}
VOLUMES = {"network": "mlynarski_3d", "width": 1 / 4, "output": 12, "batch_size": 2, "scheme": "foreground"}
VOLUMES |= {"steps": 400, "rate": 0.03, "optimizer": NormalizedSGD, "loss": losses.cross_entropy}

# For each puzzle: its classes, those that are scored, the two ends of its dial, the recipe, the settings of all networks, and those of
# each network. The method that the puzzle is made for stands last. The minutes are of one CPU core, for one network.
PUZZLES: dict[str, dict] = {
    "ring": {
        "classes": 3,
        "scored": (1, 2),
        "ends": (1.0, 0.0),
        "recipe": recipes.deepmedic,
        "common": {"cases": 24, "steps": 180, "rate": 3e-3} | CUBES,
        "methods": {
            "Deep+": {"network": "deep_plus", "widths": HALF},
            "BigDeep+": {"network": "big_deep_plus", "widths": TWICE, "hidden": HIDDEN},
            "DeepMedic": {"network": "deepmedic", "widths": HALF, "hidden": HIDDEN},
        },
        "minutes": 0.16,
    },
    "tube": {
        "classes": 3,
        "scored": (1, 2),
        "ends": (1.0, 0.0),
        "recipe": recipes.deepmedic,
        "common": {"cases": 24, "steps": 100, "rate": 3e-3},
        "methods": {
            "DeepMedic, 2D": {"network": "dm2d_seg", "widths": TWICE, "hidden": HIDDEN} | SQUARES,
            "DeepMedic, 3D": {"network": "deepmedic", "widths": HALF, "hidden": HIDDEN} | CUBES,
        },
        "minutes": 0.11,
    },
    "far_plate": {
        "classes": 3,
        "scored": (1, 2),
        "ends": (1.0, 0.0),
        "recipe": recipes.mlynarski,
        "common": {"cases": 24, "accumulate": 1, "flip": False},
        "methods": {
            "2D": SLICES,
            "3D": VOLUMES | {"variant": "standard"},
            "2D-3D A, plate hidden": VOLUMES | {"variant": "a"},
            "2D-3D A": VOLUMES | {"variant": "a"},
        },
        "minutes": 0.4,
    },
    "textures": {
        "classes": 5,
        "scored": (1, 2, 3, 4),
        "ends": (1.0, 0.0),
        "recipe": recipes.havaei,
        "common": {"cases": 60, "steps": 120, "rate": 2e-3, "width": 0.1, "init": "he", "phase2_steps": 0}
        | {"output": 24, "batch_size": 8, "dropout": 0.0},
        "methods": {
            "local path": {"network": "local_path_cnn"},
            "global path": {"network": "global_path_cnn"},
            "two paths": {"network": "two_path_cnn"},
        },
        "minutes": 0.07,
    },
    "rare": {
        "classes": 3,
        "scored": (2,),
        "ends": (1.0, 0.0),
        "recipe": recipes.deepmedic,
        "common": {"cases": 24, "steps": 200, "rate": 1e-2, "network": "deep_plus", "widths": (8, 8, 12, 12)}
        | {"output": 32, "batch_size": 2, "scheme": "equal", "dropout": 0.0},
        "methods": {
            "cross-entropy": {"loss": losses.cross_entropy},
            "weighted cross-entropy": {"loss": "weighted"},
            "Jaccard distance": {"loss": losses.jaccard_distance},
        },
        "minutes": 0.28,
    },
    "decoys": {
        "classes": 2,
        "scored": (1,),
        "ends": (0.35, 0.0),
        "recipe": recipes.deepmedic,
        "common": {"cases": 40, "steps": 200, "rate": 6e-3} | CUBES,
        "methods": {
            "Deep+": {"network": "deep_plus", "widths": EIGHT},
            "DeepMedic": {"network": "deepmedic", "widths": EIGHT, "hidden": HIDDEN},
        },
        "minutes": 0.42,
    },
}


@cache
def cohort(puzzle: str, part: str, needed: float) -> list[Case]:
    """Return the cases to train on ("train"), for "validation" or to "test". No case has two of these uses."""
    count = (COUNT | {"train": PUZZLES[puzzle]["common"]["cases"]})[part]
    cases = phantoms.puzzle_cohort(puzzle, count, first_seed=FIRST[part], needed=needed)
    return [near_objects(case) for case in cases] if part == "train" and puzzle == "decoys" else cases


def hide_plate(case: Case) -> Case:
    """Return a case of the far plate whose image is zero in the part that holds plates and no balls."""
    image = case.image.copy()
    image[:, :PLATE] = 0
    return case.replace(image=image)


def near_objects(case: Case, start: int = 0) -> Case:
    """Return a case whose mask holds what is bright and one voxel of a hundred elsewhere, for a sampler of training segments.

    What must be told from the object covers a thousandth of the volume. In cubes from anywhere a network would hardly meet it.

    Args:
        start: first voxel along x of the part that counts as bright.
    """
    bright = ndimage.gaussian_filter(case.image[0], 1) > 1.5
    bright[:start] = False
    some = np.random.default_rng(0).random(case.shape) < 0.01
    return case.replace(mask=case.whole_mask() & (ndimage.binary_dilation(bright, iterations=2) | some | (case.label > 0)))


def dice(found: np.ndarray, case: Case, classes: Sequence[int]) -> dict[str, float]:
    """Return the mean Dice of some classes, and that of each."""
    scores = {f"dice_{k}": metrics.dice(found == k, case.label == k) for k in classes}
    return {"dice": float(np.mean(list(scores.values())))} | scores


def validate(model: Network, cases: Sequence[Case], classes: Sequence[int]) -> dict[str, float]:
    return {"dice": float(np.mean([dice(inference.predict(model, c, progress=False), c, classes)["dice"] for c in cases]))}


def train(
    puzzle: str, method: str, cases: Sequence[Case], validation: Sequence[Case], *, seed: int, copy: int = 0, **changes
) -> Network:
    """Train a network on a puzzle with a recipe of the package and the settings above.

    Args:
        puzzle, method: keys of `PUZZLES` and of its "methods".
        cases, validation: labelled cases, as the network sees them.
        seed: seed of the initial weights and of the samples.
        copy: number of a copy whose initial weights are changed by a millionth; 0 for none.
        changes: settings in place of those above; `network` may be a built network.

    Returns:
        The network. Its history has the mean Dice of the validation cases six times.
    """
    about = PUZZLES[puzzle]
    settings = about["common"] | about["methods"][method] | changes
    if isinstance(settings["network"], nn.Module):  # built with options of its own
        settings = {name: value for name, value in settings.items() if name not in ("widths", "hidden", "dropout")}
    steps, rate = max(2, round(settings["steps"] * SETTINGS["share"])), settings["rate"]
    if settings.get("loss") == "weighted":
        shares = np.mean([np.bincount(c.label.ravel(), minlength=about["classes"]) / c.label.size for c in cases], axis=0)
        settings["loss"] = partial(losses.cross_entropy, class_weights=1 / shares)
    return about["recipe"](
        cases,
        classes=about["classes"],
        steps=steps,
        optimizer=partial(start_copy, settings.pop("optimizer", torch.optim.Adam), copy, lr=rate),
        schedule=lambda optimizer: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        validate_every=-(-steps // VALIDATIONS),
        engine={"validate": partial(validate, cases=validation, classes=about["scored"])},
        seed=seed,
        device="cpu",
        progress=False,
        **{name: value for name, value in settings.items() if name not in ("cases", "steps", "rate")},
    )


def start_copy(optimizer: Callable, copy: int, parameters, **options) -> torch.optim.Optimizer:
    """Return an optimizer of the parameters. For a copy, first change them by a millionth, with the copy's number as the seed."""
    parameters = list(parameters)
    if copy:
        training.perturb_weights(nn.ParameterList(parameters), seed=copy)
    return optimizer(parameters, **options)


# ------------------------------------------------------------------------------------------------------ the far plate


def with_scores(case: Case, flat: Network, *, hidden: bool = False, scale: float = 0.25) -> Case:
    """Return a case with the class scores of a 2D network as further channels; of one that does not see the plate if it is `hidden`.

    The scores are an order of magnitude larger than the image. Unscaled, they drown it in the first updates.
    """
    seen = hide_plate(case) if hidden else case
    scores = scale * inference.predict(flat, seen, output="logits", inside_mask=False, progress=False)
    names = [f"axial {k}" for k in range(len(scores))]
    return case.replace(image=np.concatenate([case.image, scores]), channels=(*case.channels, *names))


@torch.no_grad()
def balance(model: Network, validation: Sequence[Case]) -> None:
    """Raise the background's score by what gives the highest Dice on validation cases: training showed it too rarely."""
    start, tried = float(model.classifier.bias[0]), {}
    for raised in range(0, 11, 2):
        model.classifier.bias[0] = start + raised
        tried[raised] = validate(model, validation, PUZZLES["far_plate"]["scored"])["dice"]
    model.classifier.bias[0] = start + max(tried, key=tried.get)


def flat_network(store: Store, needed: float, seed: int, *, hidden: bool = False) -> Network:
    """Return the far plate's 2D network of a seed, from its file where it was trained before.

    Args:
        hidden: whether it never sees the plate.
    """
    path = store.runs / f"far_plate_2d_{'hidden_' * hidden}{needed}_{seed}_{SETTINGS['share']}.safetensors"
    if not path.exists():
        cpu = time.process_time()
        cases, validation = (cohort("far_plate", part, needed) for part in ("train", "validation"))
        if hidden:
            cases, validation = ([hide_plate(case) for case in part] for part in (cases, validation))
        model = train("far_plate", "2D", cases, validation, seed=seed)
        balance(model, validation)
        curve = model.history.dropna()[["step", "loss", "dice"]].to_dict("records")
        models.save(path, model, model.card | {"curve": curve, "cpu_seconds": time.process_time() - cpu})
    return models.load(path)


# ----------------------------------------------------------------------------------------------------------- the rows


def prepare(store: Store, puzzle: str, needed: float, method: str, seed: int) -> tuple[list[list[Case]], Network | None]:
    """Return the cases to train on, for validation and to test as a method sees them, and the far plate's 2D network of the seed."""
    parts = [cohort(puzzle, part, needed) for part in ("train", "validation", "test")]
    if puzzle != "far_plate":
        return parts, None
    hidden, flat = method.endswith("hidden"), None
    if method != "3D":
        flat = flat_network(store, needed, seed, hidden=hidden)
    if flat and method != "2D":
        parts = [[with_scores(case, flat, hidden=hidden) for case in part] for part in parts]
    if method != "2D":
        parts[0] = [near_objects(case, start=PLATE) for case in parts[0]]
    return parts, flat


def run(store: Store, puzzle: str, needed: float, method: str, seed: int) -> dict:
    """Train and score a network. In the far plate, what the 2D network cost is added to the cost of the one that uses it."""
    (cases, validation, test), flat = prepare(store, puzzle, needed, method, seed)
    cpu = time.process_time()
    model = flat if method == "2D" else train(puzzle, method, cases, validation, seed=seed)
    spent = time.process_time() - cpu + (flat.card["cpu_seconds"] if flat else 0)
    curve = flat.card["curve"] if method == "2D" else model.history.dropna()[["step", "loss", "dice"]].to_dict("records")
    signs = store.examine(f"{puzzle}, {needed}, {method}, {seed}", model, validation)
    facts = {
        "parameters": sum(p.numel() for network in {model, flat} - {None} for p in network.parameters()),
        "updates": curve[-1]["step"],
        "cpu_seconds": round(spent, 1),
        "alive": signs.alive,
    } | provenance()
    classes = PUZZLES[puzzle]["scored"]
    scores = [{"case": c.name} | dice(inference.predict(model, c, progress=False), c, classes) | facts for c in test]
    return {"puzzles_curves": curve, "puzzles": scores}


def run_copy(store: Store, puzzle: str, copy: int) -> list[dict]:
    """Train the method of a puzzle from weights changed by a millionth, where it is needed, and score it."""
    about = PUZZLES[puzzle]
    needed, method, seed = about["ends"][0], list(about["methods"])[-1], SEEDS[0]
    (cases, validation, test), _ = prepare(store, puzzle, needed, method, seed)
    model = train(puzzle, method, cases, validation, seed=seed, copy=copy)
    found = [dice(inference.predict(model, case, progress=False), case, about["scored"])["dice"] for case in test]
    return [{"method": method, "case": case.name, "dice": score} | provenance() for case, score in zip(test, found)]


def run_baselines(puzzle: str, needed: float) -> list[dict]:
    """Score the methods without learning."""
    parts = (cohort(puzzle, part, needed) for part in ("train", "validation", "test"))
    classes = [f"dice_{k}" for k in PUZZLES[puzzle]["scored"]]
    rows = baseline_rows(*parts, {name: [int(name[-1])] for name in classes})
    return [row | {"dice": np.mean([row[name] for name in classes])} | provenance() for row in rows]


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for seed in seeds or SEEDS:
        for puzzle, about in PUZZLES.items():
            for needed in about["ends"]:
                for method in reversed(about["methods"]):
                    key = {"puzzle": puzzle, "needed": needed, "method": method, "seed": seed}
                    job = partial(run, store, puzzle, needed, method, seed)
                    rows.append(Row("puzzles", key, job, about["minutes"], part="networks"))
    for puzzle, about in PUZZLES.items():
        for needed in about["ends"]:
            # All methods without learning are made at once. "nothing" is the first of them.
            key = {"puzzle": puzzle, "needed": needed, "method": "nothing", "seed": None}
            rows.append(Row("puzzles", key, partial(run_baselines, puzzle, needed), 0.02, part="baselines"))
        for copy in COPIES:
            key = {"puzzle": puzzle, "copy": copy}
            rows.append(Row("puzzles_noise", key, partial(run_copy, store, puzzle, copy), about["minutes"], part="noise floor"))
    return rows


# ----------------------------------------------------------------------------------------------------------- the page


def interval(rows: pd.DataFrame) -> statistics.Interval | None:
    """Return the mean Dice over seeds and cases with its interval; over cases alone for a method without seeds."""
    scores = rows.fillna({"seed": -1}).pivot(index="seed", columns="case", values="dice").to_numpy()
    if len(scores) == 1 and rows["seed"].notna().all():
        return None  # one seed so far
    return statistics.two_way(np.repeat(scores, 2, axis=0) if len(scores) == 1 else scores)


def last_third(curves: pd.DataFrame) -> float:
    """Return what the mean validation Dice of several runs gained in the last third of the updates."""
    steps = curves["step"].max()
    late = curves[curves["step"] >= 2 / 3 * steps].groupby("step")["dice"].mean()
    return float(late.iloc[-1] - late.iloc[0])


def summarise(scores: pd.DataFrame, curves: pd.DataFrame, puzzle: str) -> pd.DataFrame:
    """Return a puzzle's table for the page: one row for each method, networks first."""
    cells = []
    for method, rows in scores[scores["puzzle"] == puzzle].groupby("method", sort=False):
        learned, cell = rows["seed"].notna().any(), {"method": method}
        cell |= {what: f"{rows[what].iloc[0]:.0f}" if learned else "–" for what in ("parameters", "updates")}
        cell["CPU s"] = f"{rows['cpu_seconds'].mean():.0f}" if learned else "–"
        for needed, name in zip(PUZZLES[puzzle]["ends"], ENDS):
            end = rows[rows["needed"] == needed]
            found = interval(end) if len(end) else None
            cell[name] = f"{found.mean:.2f} ({found.low:.2f} to {found.high:.2f})" if found else "–"
        for needed, name in zip(PUZZLES[puzzle]["ends"], ENDS):
            mine = curves.query(f"puzzle == @puzzle and method == @method and needed == {needed}")
            cell[f"gain in the last third, {name}"] = f"{last_third(mine):+.2f}" if len(mine) else "–"
        cells.append((not learned, cell))
    return pd.DataFrame([cell for _, cell in sorted(cells, key=lambda pair: pair[0])])


def compare(scores: pd.DataFrame, puzzle: str) -> list[str]:
    """Return a line for each rival and end: the difference from the method that the puzzle is made for."""
    *rivals, best = PUZZLES[puzzle]["methods"]
    lines = []
    for needed, name in zip(PUZZLES[puzzle]["ends"], ENDS):
        end = scores[(scores["puzzle"] == puzzle) & (scores["needed"] == needed) & scores["seed"].notna()]
        tables = {m: rows.pivot(index="seed", columns="case", values="dice") for m, rows in end.groupby("method")}
        for rival in rivals:
            if min(len(tables.get(m, ())) for m in (best, rival)) > 1:
                lines.append(f"* {name}: {best} − {rival}, {statistics.two_way(tables[best], tables[rival])}")
    return lines


def floor(noise: pd.DataFrame, puzzle: str) -> list[str]:
    """Return the line that says by how much the copies of a network differ."""
    copies = noise[noise["puzzle"] == puzzle] if len(noise) else noise
    if len(copies) == 0 or copies["copy"].nunique() < 2:
        return []
    found = copies.pivot(index="copy", columns="case", values="dice")
    spread = statistics.noise_floor(found.to_numpy())
    return [f"* noise floor: {len(found)} copies of {copies['method'].iloc[0]} differ by {spread:.3f} at most"]


def report(store: Store) -> dict[str, str]:
    scores, curves, noise, blocks = store.read("puzzles"), store.read("puzzles_curves"), store.read("puzzles_noise"), {}
    if scores.empty or curves.empty:
        return {}
    for puzzle in scores["puzzle"].unique():
        table = markdown(summarise(scores, curves, puzzle))
        blocks[puzzle] = "\n\n".join([table, "\n".join(compare(scores, puzzle) + floor(noise, puzzle))])
    return blocks | store.dead_networks()


def draw(path: str) -> None:
    """Draw one case of each puzzle at both ends, in a slice through the class that the puzzle is about, and save the picture."""
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(2, len(PUZZLES), figsize=(2.1 * len(PUZZLES), 4.6), layout="constrained")
    for column, (puzzle, about) in zip(grid.T, PUZZLES.items()):
        for axes, needed, name in zip(column, about["ends"], ENDS):
            case = phantoms.PUZZLES[puzzle](3, needed=needed)
            axis = 1 if puzzle in ("tube", "far_plate") else 2  # coronal, or axial
            shown = 2 if puzzle in ("tube", "far_plate", "rare") else 1
            place = int((case.label == shown).sum(axis=tuple({0, 1, 2} - {axis})).argmax())
            image, label = (np.take(array, place, axis).T for array in (case.image[0], case.label))
            axes.imshow(image, cmap="gray", origin="lower", vmin=-1.5, vmax=4)
            for k in np.unique(label[label > 0]):
                axes.contour(label == k, [0.5], colors=[f"C{k}"], linewidths=1.2)
            axes.set(title=f"{puzzle}, {name}", xticks=[], yticks=[])
    figure.savefig(path, dpi=80, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
