"""Kayalibay's network on hand phantoms over cross-validation folds: skips, losses, segmentation maps, and smaller choices.

Claims (Kayalibay et al. 2017, sections 2.1, 3.2 and 4.1; figures 8 to 13, curves and boxes without numbers, six folds of 30 hands):
without long skips the network is worse for every bone; with cross-entropy it does as well on the two frequent bones and is far less
able to find the two rare ones; three segmentation maps learn faster than one and end at a similar loss; concatenation beats summation
in all six folds, and its last feature maps look more like segmentations; strided convolutions are slightly better than pooling;
Xavier's initialisation is worse than N(0, .01). Future work: weighted cross-entropy. Appendix A, equation 6: batch normalisation
keeps half of its old statistics at each update.

Thirty generated hands at 3.44 mm, as many as the paper has: in each fold 20 to train on and 5 for validation. Ten more hands are the
test of all networks, so that intervals can be over folds and hands (`statistics.two_way`, of differences within a fold). Metric: Dice of each bone, its mean over all
four, over the two frequent and over the two rare bones. Networks of a fold have the same hands and the same crops. Every network has
half of the paper's maps, two crops an update, and Adam whose rate falls to zero along a cosine, so that the curve of the validation
hands can become flat. Nothing is chosen on test hands, and no network has a threshold: each voxel gets the class with the highest score.

Controls. "noise 1" and "noise 2" are the first network again, with weights that differ by one millionth: as far as these differ from it
and each other, any two runs may. Scores are taken a second time with the statistics of batch normalisation averaged over thirty
batches. Methods without learning are in baselines.csv. Planned and made by `--only planned` alone: "wide sum", a summing network of as
many parameters as the concatenating one, and one row for each smaller choice.

The tables are data/results/hands_scores.csv, hands_curves.csv, hands_statistics.csv, hands_maps.csv and hands_progress.npz (what
five networks of fold 0 say of one validation hand during training), which notebook 08 reads. Fold 0's networks of both merges become
data/checkpoints/kayalibay_hands_*.safetensors.
"""

import copy
import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, provenance, vitals_row
from torch import nn

from medseg_lite import (
    baselines,
    inference,
    losses,
    metrics,
    models,
    phantoms,
    plotting,
    recipes,
    statistics,
    training,
    transforms,
)
from medseg_lite.models import Network
from medseg_lite.optimizers import FromTorch
from medseg_lite.sampling import VolumeSampler
from medseg_lite.volume import Case

BONES = ("metacarpal", "proximal", "middle", "distal")
SPACING, SHAPE, CROP = 3.44, (56, 56, 32), (32, 48, 24)
SETTINGS = {"steps": 500, "width": 0.5, "learning_rate": 1e-2}
BATCH, VALIDATIONS, FOLDS = 2, 20, (0, 1, 2)
WIDER = 1.1  # a sum of this width has .8 % more parameters than the concatenation

VARIANTS: dict[str, dict] = {  # options of the recipe and of the network
    "Jaccard": {},
    "cross-entropy": {"loss": losses.cross_entropy},
    "sum": {"merge": "sum"},
    "one map": {"maps": 1},
    "no skips": {"merge": "none"},
    "1/f": {"loss": 1.0},  # cross-entropy with each class weighted by this power of one over its share
    "1/root f": {"loss": 0.5},
    "wide sum": {"merge": "sum", "wider": WIDER},
    "Xavier": {"init": "xavier"},
    "pooling": {"pool": True},
    "augmentation": {"augment": transforms.augment},
    "one against the rest": {"loss": "apart"},
}
NOISE = ("noise 1", "noise 2")
SHOWN = {
    "Jaccard": "Jaccard",
    "cross-entropy": "cross-entropy",
    "1/f": "weighted",
    "no skips": "no skips",
    "one map": "one map",
}


@cache
def hands() -> list[Case]:
    return [transforms.standardise(c) for c in phantoms.hand_cohort(40, spacing=SPACING, shape=SHAPE)]


def split(fold: int) -> tuple[list[Case], list[Case], list[Case]]:
    """Return the cases to train on, to validate and to test. Five of the thirty hands are left out of a fold; the last ten are the test."""
    left_out, validation = (list(range(5 * f, 5 * f + 5)) for f in (fold, (fold + 1) % 6))
    train = [n for n in range(30) if n not in left_out + validation]
    return tuple([hands()[n] for n in part] for part in (train, validation, range(30, 40)))


def weight_classes(cases: Sequence[Case], power: float):
    """Return the cross-entropy with each class weighted by a power of one over its share of the training voxels."""
    shares = np.mean([np.bincount(c.label.ravel(), minlength=5) / c.label.size for c in cases], axis=0)
    return partial(losses.cross_entropy, class_weights=shares**-power)


def one_against_the_rest(logits: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Return the sum of the Jaccard distances of five tasks: each class by itself, with a sigmoid, against all others."""
    total = 0
    for k in range(logits.shape[1]):
        pair = torch.stack([-logits[:, k] / 2, logits[:, k] / 2], dim=1)  # whose softmax is the sigmoid of the logit
        total = total + losses.jaccard_distance(pair, (label == k).long(), per_class=True)[1]
    return total


def build(variant: str, fold: int) -> Network:
    """Return a network before training."""
    options = {name: value for name, value in VARIANTS.get(variant, {}).items() if name in ("merge", "maps", "init")}
    width = SETTINGS["width"] * VARIANTS.get(variant, {}).get("wider", 1)
    torch.manual_seed(fold)
    model = models.kayalibay_unet3d(in_channels=1, classes=5, width=width, **options)
    if variant == "pooling":  # the same kernels after a maximum over 2³ voxels, at the same cost
        for block in model.contracting:
            block.down.stride = (1, 1, 1)
            block.down = nn.Sequential(nn.MaxPool3d(2), block.down)
    if variant in NOISE:
        training.perturb_weights(model, seed=NOISE.index(variant))
    return model


def dice(found: np.ndarray, case: Case) -> dict[str, float]:
    return {bone: metrics.dice(found == k, case.label == k) for k, bone in enumerate(BONES, 1)}


def score(model: Network, cases: Sequence[Case]) -> list[dict]:
    return [{"case": c.name} | dice(inference.predict(model, c, progress=False), c) for c in cases]


def from_above(volume: np.ndarray) -> np.ndarray:
    """Return the highest value along the last axis, `(D, H, W)` to a picture `(H, D)`: all labelled bones, seen through the hand."""
    return plotting.cut(volume.max(axis=2, keepdims=True), plotting.find_plane("axial"), 0)


def validate(model: Network, cases: Sequence[Case], shown: list | None = None) -> dict[str, float]:
    """Return the mean Jaccard distance and the mean Dice of each bone. `shown` gets what is predicted for the first case."""
    rows = []
    for n, case in enumerate(cases):
        logits = inference.predict(model, case, output="logits", progress=False)
        label = torch.from_numpy(case.label.astype(np.int64))[None]
        distance = float(losses.jaccard_distance(torch.from_numpy(logits)[None], label))
        rows.append({"jaccard_distance": distance} | dice(logits.argmax(0), case))
        if shown is not None and n == 0:
            shown.append(from_above(logits.argmax(0)).astype(np.uint8))
    return pd.DataFrame(rows).mean().to_dict()


def with_statistics(model: Network, cases: Sequence[Case], seed: int, batches: int, momentum: float | None) -> Network:
    """Return a copy whose batch normalisation has seen other crops since: running averages, or the plain mean with `momentum=None`."""
    other = copy.deepcopy(model)
    for norm in (m for m in other.modules() if isinstance(m, nn.BatchNorm3d)):
        norm.momentum = momentum
        if momentum is None:
            norm.reset_running_stats()
    sampler = VolumeSampler(cases, crop=CROP, batch_size=BATCH, seed=1000 + seed)
    other.train()
    with torch.no_grad():
        for n in range(batches):
            other(sampler.batch(n)[0])
    return other.eval()


def undecided(model: Network, cases: Sequence[Case]) -> list[dict]:
    """Return, for a network of five tasks, how many voxels no task claims and how many several do, per voxel of bone."""
    rows = []
    for case in cases:
        claims = (inference.predict(model, case, output="logits", progress=False) > 0).sum(axis=0)
        bone = (case.label > 0).sum()
        rows.append({"unclaimed": (claims == 0).sum() / bone, "claimed_twice": (claims > 1).sum() / bone})
    return rows


def best_dice(values: np.ndarray, label: np.ndarray) -> list[float]:
    """Return for each bone the best Dice of "value above a threshold", over all thresholds at once."""
    ordered, counts = label[np.argsort(-values)], np.arange(1, len(label) + 1)
    return [(2 * np.cumsum(ordered == k) / (counts + (label == k).sum()))[:-1].max() for k in range(1, 5)]


def keep_output(caught: list, module: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
    caught.append(output[0])


def likeness(model: Network, cases: Sequence[Case]) -> list[dict]:
    """Return how well each of the last feature maps fits the bone that it fits best, cut from above or from below: its Dice."""
    rows = []
    for case in cases:
        caught: list[torch.Tensor] = []
        handle = model.expanding[-1].conv.register_forward_hook(partial(keep_output, caught))
        with torch.no_grad():
            model.eval()(torch.from_numpy(case.image)[None])
        handle.remove()
        for number, values in enumerate(caught[0].flatten(1).numpy()):
            fits = np.maximum(best_dice(values, case.label.ravel()), best_dice(-values, case.label.ravel()))
            rows.append({"case": case.name, "map": number, "bone": BONES[fits.argmax()], "dice": fits.max()})
    return rows


def multiplications(model: Network) -> int:
    """Return the multiplications of one forward pass over a crop."""
    total, handles = [0], []

    def count(module, inputs, output):
        total[0] += output[0, 0].numel() * module.weight.numel()

    for conv in (m for m in model.modules() if isinstance(m, nn.Conv3d)):
        handles.append(conv.register_forward_hook(count))
    with torch.no_grad():
        model.eval()(torch.zeros(1, 1, *CROP))
    for handle in handles:
        handle.remove()
    return total[0]


def run(store: Store, variant: str, fold: int) -> dict:
    train, validation, test = split(fold)
    options, shown = VARIANTS.get(variant, {}), []
    loss = options.get("loss", losses.jaccard_distance)
    if isinstance(loss, float):
        loss = weight_classes(train, loss)
    model, steps = build(variant, fold), SETTINGS["steps"]
    facts = {"million_multiplications": round(multiplications(model) / 1e6)}
    cpu = time.process_time()
    recipes.kayalibay(
        train,
        network=model,
        crop=CROP,
        batch_size=BATCH,
        augment=options.get("augment"),
        steps=steps,
        learning_rate=SETTINGS["learning_rate"],
        schedule=lambda optimizer: FromTorch(torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)),
        loss=one_against_the_rest if loss == "apart" else loss,
        validate_every=-(-steps // VALIDATIONS),
        seed=fold,
        device="cpu",
        progress=False,
        engine={"channels_last": True, "validate": partial(validate, cases=validation, shown=shown)},
    )
    facts |= {"parameters": sum(p.numel() for p in model.parameters()), "cpu_seconds": round(time.process_time() - cpu, 1)}
    signs = store.examine(f"{variant}, {fold}", model, validation)
    facts = {name: SETTINGS[name] for name in ("steps", "width")} | facts | {"alive": signs.alive} | provenance()
    curve = model.history.dropna()[["step", "loss", "jaccard_distance", *BONES]].to_dict("records")
    scores = score(model, test)
    if variant == "one against the rest":
        scores = [row | more for row, more in zip(scores, undecided(model, test))]
    if fold == 0 and variant in ("Jaccard", "sum"):
        name = {"Jaccard": "concat"}.get(variant, variant)
        mean = pd.DataFrame(scores)[list(BONES)].mean().round(3).to_dict()
        store.save(f"kayalibay_hands_{name}", model, model.card | {"spacing_mm": SPACING, "test_dice": mean})
    store.runs.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), store.runs / f"{variant.replace('/', ' over ')}-{fold}.pt")
    others = {"averaged": with_statistics(model, train, fold, 30, None)}
    if variant == "Jaccard":
        others |= {f"other crops {n}": with_statistics(model, train, 10 + n, 8, 0.5) for n in range(5)}
    rows = [{"statistics": name} | row for name, other in others.items() for row in score(other, test)]
    tables = {"hands_curves": curve, "hands_statistics": rows, "hands_scores": [row | facts for row in scores]}
    if variant in ("Jaccard", "sum", "wide sum"):
        tables["hands_maps"] = likeness(model, test[:4])
    if fold == 0 and variant in SHOWN:
        steps = [row["step"] for row in curve]
        tables["hands_progress.npz"] = merge_progress(store, variant, steps, np.stack(shown), validation[0])
    return tables


def merge_progress(store: Store, variant: str, steps: Sequence[int], labels: np.ndarray, case: Case) -> dict:
    """Return the arrays of hands_progress.npz with one more network: ten of the predictions, early ones closer together."""
    chosen = [n for n in (0, 1, 2, 3, 5, 7, 9, 12, 15, 19) if n < len(steps)]
    found = {}
    if store.path("hands_progress.npz").exists():
        with np.load(store.path("hands_progress.npz")) as file:
            found = dict(zip(file["variants"], file["labels"]))
    found[SHOWN[variant]] = labels[chosen]
    names = [name for name in SHOWN.values() if name in found]
    return {
        "steps": np.array(steps)[chosen],
        "labels": np.stack([found[name] for name in names]),
        "variants": np.array(names),
        "image": from_above(case.image[0]).astype(np.float32),
        "truth": from_above(case.label).astype(np.uint8),
    }


def mean_jaccard_distance(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean over hands, as `validate` does."""
    return torch.stack([losses.jaccard_distance(*pair) for pair in zip(logits.split(1), labels.split(1))]).mean()


def run_baselines() -> list[dict]:
    """Score the methods without learning in the test hands of all folds, and the best constant prediction in the validation hands."""
    rows = []
    for fold in FOLDS:
        cases = split(fold)
        rows += baseline_rows(*cases, {bone: [k] for k, bone in enumerate(BONES, 1)})
        labels = torch.from_numpy(np.stack([c.label.astype(np.int64) for c in cases[1]]))
        lowest = baselines.constant_loss(mean_jaccard_distance, labels, 5, steps=50)
        rows.append({"method": "best constant", "case": f"validation of fold {fold}", "jaccard_distance": lowest})
    return rows


def plan(store: Store, seeds) -> list[Row]:
    folds, names = seeds or FOLDS, list(VARIANTS)
    runs = [(name, fold, "central") for name in names[:6] for fold in folds]
    runs += [(name, 0, "noise") for name in NOISE]
    runs += [(name, fold, "planned") for name in names[6:] for fold in folds]  # what there was no time for
    rows = []
    for name, fold, part in runs:
        key, make = {"variant": name, "fold": fold}, partial(run, store, name, fold)
        rows.append(Row("hands_scores", key, make, minutes=1.1, part=part, extra=part == "planned"))
    rows.append(baselines_row(store, "bones", run_baselines, 0.8))
    for variant, merge in (("Jaccard", "concat"), ("sum", "sum")):
        rows.append(vitals_row(store, f"{variant}, 0", f"kayalibay_hands_{merge}", lambda: split(0)[1]))
    return rows


# ----------------------------------------------------------------------------------------------------------- the page

GROUPS = {"all bones": BONES, "frequent bones": BONES[:2], "rare bones": BONES[2:]}
PAIRS = [
    ("Jaccard", "no skips"),
    ("Jaccard", "cross-entropy"),
    ("Jaccard", "1/f"),
    ("Jaccard", "1/root f"),
    ("1/root f", "cross-entropy"),
    ("Jaccard", "one map"),
    ("Jaccard", "sum"),
    ("Jaccard", "wide sum"),
    ("Jaccard", "Xavier"),
    ("Jaccard", "pooling"),
    ("Jaccard", "augmentation"),
    ("Jaccard", "one against the rest"),
]


def table_of(scores: pd.DataFrame, variant: str, bones: Sequence[str]) -> np.ndarray | None:
    """Return the mean Dice of some bones as `(folds, hands)`, or None with fewer than two folds."""
    rows = scores[scores["variant"] == variant]
    table = rows.assign(mean=rows[list(bones)].mean(axis=1)).pivot(index="fold", columns="case", values="mean").to_numpy()
    return table if len(table) > 1 else None


def last_third(curves: pd.DataFrame, variant: str, column: str) -> float:
    """Return what a variant's mean validation score gained in the last third of the updates."""
    mine = curves[curves["variant"] == variant]
    late = mine[mine["step"] >= 2 / 3 * mine["step"].max()].groupby("step")[column].mean()
    return float(late.iloc[-1] - late.iloc[0])


def summarise(scores: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    rows = []
    for variant, mine in scores.groupby("variant", sort=False):
        row = {"variant": variant, "folds": mine["fold"].nunique(), "parameters": f"{mine['parameters'].iloc[0]:,}"}
        row |= {"million multiplications": mine["million_multiplications"].iloc[0]}
        row |= {"CPU s": f"{mine.groupby('fold')['cpu_seconds'].first().mean():.0f}"}
        row |= {bone: mine[bone].mean() for bone in BONES} | {"mean": f"{mine[list(BONES)].mean(axis=None):.3f}"}
        table = table_of(scores, variant, BONES)
        if table is not None:
            found = statistics.two_way(table)
            row["mean"] += f" ({found.low:.3f} to {found.high:.3f})"
        rows.append(row | {"gain in the last third": f"{last_third(curves, variant, 'mean'):+.3f}"})
    return pd.DataFrame(rows)


def compare(scores: pd.DataFrame) -> str:
    """Return a line for each comparison and group of bones, with the number of folds in which the first is ahead."""
    lines = []
    for title, bones in GROUPS.items():
        lines.append(f"\n{title.capitalize()}:\n")
        for names in PAIRS:
            tables = [table_of(scores, name, bones) for name in names]
            if all(t is not None and len(t) == len(FOLDS) for t in tables):
                ahead = sum(a.mean() > b.mean() for a, b in zip(*tables))
                found = statistics.two_way(tables[0] - tables[1])  # networks of a fold have the same hands and crops
                lines.append(f"* {' − '.join(names)}: {found}; ahead in {ahead} of {min(map(len, tables))} folds")
    return "\n".join(lines)


def compare_statistics(scores: pd.DataFrame, others: pd.DataFrame) -> pd.DataFrame:
    """Return the mean Dice of all bones by the crops that batch normalisation has seen last."""
    both = pd.concat([scores.assign(statistics="as trained"), others])
    both = (
        both.assign(mean=both[list(BONES)].mean(axis=1)).groupby(["variant", "fold", "statistics"], sort=False)["mean"].mean()
    )
    wide = both.unstack("statistics")
    drawn = wide.filter(like="other crops").columns
    wide = wide.assign(lowest=wide[drawn].min(axis=1), highest=wide[drawn].max(axis=1)).drop(columns=drawn)
    return wide.rename(columns={"lowest": "other crops, lowest", "highest": "other crops, highest"}).reset_index()


def report(store: Store) -> dict[str, str]:
    scores, curves = store.read("hands_scores"), store.read("hands_curves")
    if scores.empty or curves.empty:
        return {}
    curves["mean"] = curves[list(BONES)].mean(axis=1)
    trained = scores[~scores["variant"].isin(NOISE)]
    blocks = {"variants": markdown(summarise(trained, curves)), "tests": compare(scores)}
    early = (
        curves[curves["step"] <= curves["step"].max() / 2].groupby(["variant", "fold"], sort=False)["jaccard_distance"].mean()
    )
    last = curves[curves["step"] == curves["step"].max()].groupby("variant", sort=False)["jaccard_distance"].mean()
    simple = store.baselines("bones")
    if len(simple):
        last["best constant"] = simple.loc["best constant", "jaccard_distance"]
    table = early.unstack("fold").reindex(last.index).add_prefix("first half, fold ").assign(last=last)
    blocks["losses"] = markdown(table.reset_index())
    others = store.read("hands_statistics")
    if len(others):
        blocks["statistics"] = markdown(compare_statistics(trained, others))
    noise = scores[scores["variant"].isin((*NOISE, "Jaccard")) & (scores["fold"] == 0)]
    if noise["variant"].nunique() > 1:
        means = noise.groupby("variant", sort=False)[list(BONES)].mean().assign(mean=lambda t: t.mean(axis=1))
        blocks["noise"] = markdown(means.reset_index())
    maps = store.read("hands_maps")
    if len(maps):
        found = maps.groupby(["variant", "fold", "case"], sort=False)["dice"].agg(["max", "mean", lambda d: (d >= 0.5).sum()])
        found = found.set_axis(["best map", "mean of all maps", "maps of .5 or more"], axis=1)
        blocks["maps"] = markdown(found.groupby(["variant", "fold"], sort=False).mean().reset_index())
    if "unclaimed" in scores and scores["unclaimed"].notna().any():
        apart = scores[scores["unclaimed"].notna()].groupby("fold")[["unclaimed", "claimed_twice"]].mean()
        blocks["apart"] = markdown(apart.reset_index())
    means = trained.groupby("variant", sort=False)[list(BONES)].mean()
    return blocks | beside_baselines(store, {"bones": means}) | store.dead_networks()


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
