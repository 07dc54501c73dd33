"""Kayalibay's network on brain phantoms: which sequences it needs, what it makes of healthy brains, crops or down-sampling.

    python experiments/brains.py [--parts healthy modalities memory] [--folds 0 1 2] [--variants ill ...]

Fifteen generated gliomas (seeds 0 to 14) at 4 mm in five cross-validation folds, twelve to train on and three to test; ten more
persons (seeds 100 to 109) that no network trains on are seen with a glioma, with a hemisphere of that mirrored where the glioma keeps
to one side, and before they fell ill. All networks have half the feature maps and make 120 updates.

* modalities: each sequence alone, and the combinations of the paper's Table 2; one volume a batch.
* healthy: two volumes a batch: both ill ("ill"); one ill, one healthy ("healthy beside"); one ill, one mirrored training case
  ("mirrored beside"); two ill or two healthy ones in turn ("healthy apart"). The networks of "ill" become
  data/checkpoints/kayalibay_brains_ill*.safetensors; fold 0 of "healthy beside" is kept too.
* memory: crops of 40x40x32 voxels at 2 mm against whole brains, averaged down to 4 mm, of that many voxels; judged at 2 mm.

Runs that are in data/results/brains_*.csv, which notebook 07 reads, are not made again: remove a file to start it afresh. Writes
experiments/brains.md.
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
from torch.nn import functional as F

from medseg_lite import inference, losses, metrics, models, optimizers, phantoms, statistics, training, transforms
from medseg_lite.paths import atomic_write
from medseg_lite.sampling import Batch, VolumeSampler

ROOT = Path(__file__).resolve().parent.parent
ALL = ("flair", "t1", "t1c", "t2")
SUBSETS = [("flair",), ("t1",), ("t1c",), ("t2",), ("flair", "t1c"), ("flair", "t1c", "t2"), ALL]  # Table 2's rows
COMPANY = ("ill", "healthy beside", "mirrored beside", "healthy apart")
CLASSES = ("necrosis", "oedema", "nonenhancing", "enhancing")
REGIONS = metrics.regions["brats2015"]
STEPS, WIDTH, RATE, CROP = 120, 0.5, 1e-2, (40, 40, 32)


def site(seed: int) -> str:
    return "ABC"[seed % 3]


@functools.cache
def ill(seed: int, spacing: float = 4.0):
    return transforms.standardise(phantoms.brain(seed, site=site(seed), spacing=spacing))


@functools.cache
def healthy(seed: int):
    return transforms.standardise(phantoms.brain(seed, site=site(seed), spacing=4.0, lesion=None))


@functools.cache
def mirrored(seed: int):
    """None where the glioma reaches into both hemispheres."""
    try:
        case = transforms.mirror_healthy(phantoms.brain(seed, site=site(seed), spacing=4.0))
    except ValueError:
        return None
    return transforms.standardise(case)


def halved(case):
    """Every block of 2x2x2 voxels made one: the image and the mask its mean, the label its most frequent class."""
    image = F.avg_pool3d(torch.from_numpy(case.image), 2).numpy()
    counts = F.avg_pool3d(F.one_hot(torch.from_numpy(case.label.astype(np.int64)), 5).movedim(-1, 0).float(), 2)
    mask = F.avg_pool3d(torch.from_numpy(case.mask)[None].float(), 2)[0].numpy() >= 0.5
    affine = case.affine.copy()
    affine[:3, :3] *= 2
    affine[:3, 3] += case.affine[:3, :3] @ [0.5, 0.5, 0.5]
    return case.replace(image=image, label=counts.argmax(0).numpy().astype(np.uint8), mask=mask, affine=affine, extra={})


def flip(image, label, *, rng):
    """Left and right exchanged in every second batch: tumours have no favourite side."""
    return (image.flip(2), label.flip(1)) if rng.random() < 0.5 else (image, label)


class Company:
    """Batches of two: a volume of each group beside the other, or two volumes of either group in turn."""

    def __init__(self, ill: list, others: list, *, apart: bool, seed: int):
        size = 2 if apart else 1
        self.apart = apart
        self.groups = [
            VolumeSampler(cases, multiple=8, batch_size=size, augment=flip, seed=seed + n)
            for n, cases in ((0, ill), (100, others))
        ]

    def batch(self, step: int) -> Batch:
        if self.apart:
            return self.groups[step % 2].batch(step // 2)
        (image, label), (other, none) = (group.batch(step) for group in self.groups)
        return Batch(torch.cat([image, other]), torch.cat([label, none]))


def train(sampler, channels: int, seed: int):
    torch.manual_seed(seed)
    model = models.kayalibay_unet3d(in_channels=channels, classes=5, width=WIDTH)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    training.fit(
        model,
        sampler,
        steps=STEPS,
        optimizer=optimizer,
        loss=losses.jaccard_distance,
        schedule=optimizers.HalveAt(optimizer, steps=[round(f * STEPS) for f in (0.6, 0.8, 0.9)]),
        seed=seed,
        progress=False,
    )
    return model


def fold_seeds(fold: int) -> tuple[list[int], list[int]]:
    test = list(range(3 * fold, 3 * fold + 3))
    return [s for s in range(15) if s not in test], test


def score(found: np.ndarray, case, group: str) -> dict:
    """Dice of every class and region; precision and sensitivity of regions; what a brain without lesion is charged for.

    Specificity counts voxels of the brain mask only: with the empty space around it every score would be near 1.
    """
    row = {"set": group, "case": case.name}
    if group in ("healthy", "mirrored"):
        for region, labels in REGIONS.items():
            wrong = np.isin(found, list(labels))
            row[f"specificity_{region}"] = 1 - np.count_nonzero(wrong) / np.count_nonzero(case.mask)
            row[f"false_ml_{region}"] = np.count_nonzero(wrong) * np.prod(case.spacing) / 1000
        return row
    row |= {f"dice_{name}": metrics.dice(found == k, case.label == k) for k, name in enumerate(CLASSES, 1)}
    for region, labels in REGIONS.items():
        pair = np.isin(found, list(labels)), np.isin(case.label, list(labels))
        row |= {f"{m}_{region}": getattr(metrics, m)(*pair) for m in ("dice", "precision", "sensitivity")}
    return row


def modalities(subset: tuple[str, ...], fold: int):
    seeds, held_out = fold_seeds(fold)
    model = train(VolumeSampler([ill(s).select(subset) for s in seeds], multiple=8, augment=flip, seed=fold), len(subset), fold)
    for group, group_seeds in (("fold", held_out), ("test", range(100, 110))):
        for seed in group_seeds:
            case = ill(seed).select(subset)
            yield score(inference.predict(model, case, progress=False), case, group)


def with_company(company: str, fold: int):
    seeds, held_out = fold_seeds(fold)
    sick = [ill(s) for s in seeds]
    if company == "ill":
        sampler = VolumeSampler(sick, multiple=8, batch_size=2, augment=flip, seed=fold)
    elif company == "mirrored beside":
        sampler = Company(sick, [m for s in seeds if (m := mirrored(s)) is not None], apart=False, seed=fold)
    else:
        sampler = Company(sick, [healthy(s) for s in range(300, 312)], apart=company == "healthy apart", seed=fold)
    model = train(sampler, 4, fold)
    if company == "ill" or (company == "healthy beside" and fold == 0):
        name = f"kayalibay_brains_{company.replace(' ', '_')}{fold}.safetensors"
        card = {
            "network": "kayalibay_unet3d",
            "channels": list(ALL),
            "classes": 5,
            "steps": STEPS,
            "seed": fold,
            "spacing_mm": 4.0,
            "trained_on": [c.name for c in sick] + (["12 healthy brains, seeds 300 to 311"] if company != "ill" else []),
            "command": "python experiments/brains.py --parts healthy",
        }
        models.save(ROOT / "data" / "checkpoints" / name, model, card)
    people = range(100, 110)
    groups = {
        "fold": map(ill, held_out),
        "test": map(ill, people),
        "healthy": map(healthy, people),
        "mirrored": map(mirrored, people),
    }
    for group, cases in groups.items():
        for case in cases:
            if case is not None:
                yield score(inference.predict(model, case, progress=False), case, group)


def memory(how: str, fold: int):
    """Same voxels a batch, hence same memory; judged on the 2 mm grid."""
    cases = [ill(s, 2.0) for s in fold_seeds(fold)[0]]
    if how == "down-sampled":
        model = train(VolumeSampler([halved(c) for c in cases], multiple=8, augment=flip, seed=fold), 4, fold)
    else:
        model = train(VolumeSampler(cases, crop=CROP, multiple=8, augment=flip, seed=fold), 4, fold)
    for seed in range(100, 110):
        case = ill(seed, 2.0)
        if how == "down-sampled":
            found = inference.predict(model, halved(case), progress=False)
            found = found.repeat(2, 0).repeat(2, 1).repeat(2, 2) * case.mask
        else:
            found = inference.predict(model, case, progress=False)
        yield score(found, case, "test")


PARTS = {
    "healthy": (with_company, {company: company for company in COMPANY}),
    "modalities": (modalities, {"+".join(s): s for s in SUBSETS}),
    "memory": (memory, {how: how for how in ("down-sampled", "crops")}),
}


def table_of(part: str) -> Path:
    return ROOT / "data" / "results" / f"brains_{part}.csv"


def report(command: str) -> str:
    out = io.StringIO()
    out.write(
        f"# Kayalibay's network on brain phantoms\n\n{date.today()}, {platform.machine()}, torch {torch.__version__}, one CPU thread. "
        f"{STEPS} updates each, width {WIDTH}; ten unseen persons, mean over persons and folds.\n"
    )
    for part in PARTS:
        if not table_of(part).is_file():
            continue
        table = pd.read_csv(table_of(part))
        columns = [c for c in table.columns if c.startswith("dice_")]
        seen = table[table["set"] == "test"].groupby("variant", sort=False)
        rows = seen[columns].mean().round(3)
        rows.insert(0, "folds", seen["fold"].nunique())
        for group in ("healthy", "mirrored"):
            if part == "healthy":
                chosen = table[table["set"] == group].groupby("variant", sort=False)
                rows[f"false ml, {group}"] = chosen["false_ml_whole"].mean().round(2)
                rows[f"specificity, {group}"] = chosen["specificity_whole"].mean().round(4)
        out.write(f"\n## {part}\n\n| variant | {' | '.join(rows.columns)} |\n{'|---' * (len(rows.columns) + 1)}|\n")
        for variant, row in rows.iterrows():
            out.write(f"| {variant} | {row['folds']:.0f} | {' | '.join(f'{v:g}' for v in row.iloc[1:])} |\n")
    if table_of("healthy").is_file():
        table = pd.read_csv(table_of("healthy"))
        rows = table[table["set"] == "healthy"]
        false = rows.pivot_table(index=["case", "fold"], columns="variant", values="false_ml_whole")
        out.write("\nFalse ml on healthy brains, ill − variant, over the folds that both have, paired by person:\n\n")
        for variant in COMPANY[1:]:
            if variant in false:
                pair = false[["ill", variant]].dropna()
                means = pair.groupby("case").mean()
                folds = pair.index.unique("fold").size
                out.write(f"* {variant} ({folds} folds): {statistics.paired_t_test(means['ill'], means[variant])}\n")
    return out.getvalue() + f"\nRepeat it: `{command}`\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--folds", type=int, nargs="+", default=[0, 1, 2], choices=range(5))
    parser.add_argument("--variants", nargs="+", help="of the parts; all by default")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = [(p, v, f) for f in options.folds for p in options.parts for v in options.variants or PARTS[p][1]]
    for part, variant, fold in plan:
        path = table_of(part)
        done = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["variant", "fold"])
        if ((done["variant"] == variant) & (done["fold"] == fold)).any():
            continue
        began, clock = time.process_time(), time.perf_counter()
        run, arguments = PARTS[part]
        rows = pd.DataFrame([{"variant": variant, "fold": fold} | row for row in run(arguments[variant], fold)]).round(4)
        with atomic_write(path) as temporary:
            (pd.concat([done, rows]) if len(done) else rows).to_csv(temporary, index=False)
        means = rows[[c for c in rows if c.startswith(("dice_w", "dice_c", "dice_e", "dice_o", "false_ml_w"))]].mean()
        seconds = f"{time.process_time() - began:.0f} s of CPU, {time.perf_counter() - clock:.0f} s"
        print(f"{part}, {variant}, fold {fold}: {means.round(3).to_dict()}, {seconds}", flush=True)
    with atomic_write(ROOT / "experiments" / "brains.md") as temporary:
        temporary.write_text(report("python experiments/brains.py"), encoding="utf-8")


if __name__ == "__main__":
    main()
