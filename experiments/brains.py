"""Kayalibay's network on brain phantoms: which sequences it needs, what it makes of healthy brains, crops or down-sampling.

Fifteen generated gliomas (seeds 0 to 14) at 4 mm in five cross-validation folds, twelve to train on and three to test. Ten more
persons (seeds 100 to 109) that no network trains on are seen with a glioma, with a hemisphere of that mirrored where the glioma keeps
to one side, and before they fell ill. All networks have half the feature maps and make 120 updates.

* modalities: each sequence alone, and the combinations of the paper's Table 2; one volume a batch.
* healthy: two volumes a batch: both ill ("ill"); one ill, one healthy ("healthy beside"); one ill, one mirrored training case
  ("mirrored beside"); two ill or two healthy ones in turn ("healthy apart"). The networks of "ill" become
  data/checkpoints/kayalibay_brains_ill*.safetensors; fold 0 of "healthy beside" is kept too.
* memory: crops of 40x40x32 voxels at 2 mm against whole brains, averaged down to 4 mm, of that many voxels; judged at 2 mm.

The tables are data/results/brains_*.csv, which notebook 07 reads.
"""

from functools import cache, partial
from itertools import count

import numpy as np
import torch
from _frame import Row, Store, flip, main, markdown, scan
from torch.nn import functional as F

from medseg_lite import inference, metrics, recipes, statistics, transforms
from medseg_lite.sampling import Batch, VolumeSampler

ALL = ("flair", "t1", "t1c", "t2")
SUBSETS = [("flair",), ("t1",), ("t1c",), ("t2",), ("flair", "t1c"), ("flair", "t1c", "t2"), ALL]  # Table 2's rows
COMPANY = ("ill", "healthy beside", "mirrored beside", "healthy apart")
CLASSES = ("necrosis", "oedema", "nonenhancing", "enhancing")
REGIONS = metrics.regions["brats2015"]
PERSONS, HEALTHY, CROP = range(100, 110), range(300, 312), (40, 40, 32)
SETTINGS = {"steps": 120, "width": 0.5, "learning_rate": 1e-2}


@cache
def ill_case(seed: int, spacing: float = 4.0):
    return transforms.standardise(scan(seed, spacing=spacing))


@cache
def healthy_case(seed: int):
    return transforms.standardise(scan(seed, spacing=4.0, lesion=None))


@cache
def mirrored_case(seed: int):
    """Return the case with its healthy hemisphere mirrored, or None where the glioma reaches into both."""
    try:
        return transforms.standardise(transforms.mirror_healthy(scan(seed, spacing=4.0)))
    except ValueError:
        return None


def halve(case):
    """Make one voxel of every 2x2x2: the image and the mask get the mean, the label its most frequent class."""
    image = F.avg_pool3d(torch.from_numpy(case.image), 2).numpy()
    counts = F.avg_pool3d(F.one_hot(torch.from_numpy(case.label.astype(np.int64)), 5).movedim(-1, 0).float(), 2)
    mask = F.avg_pool3d(torch.from_numpy(case.mask)[None].float(), 2)[0].numpy() >= 0.5
    affine = case.affine.copy()
    affine[:3, :3] *= 2
    affine[:3, 3] += case.affine[:3, :3] @ [0.5, 0.5, 0.5]
    return case.replace(image=image, label=counts.argmax(0).numpy().astype(np.uint8), mask=mask, affine=affine, extra={})


class Company:
    """Batches of two groups of cases, in the place of those that the recipe draws from one.

    A batch holds a volume of each group, or (`apart`) two volumes of either group in turn.
    """

    def __init__(self, cases: list, others: list, *, apart: bool, seed: int):
        self.apart, self.steps = apart, count()
        options = {"multiple": 8, "batch_size": 2 if apart else 1, "augment": flip}
        self.groups = [VolumeSampler(group, seed=seed + n, **options) for n, group in ((0, cases), (100, others))]

    def __call__(self, image, label, *, rng) -> Batch:
        step = next(self.steps)
        if self.apart:
            return self.groups[step % 2].batch(step // 2)
        images, labels = zip(*(group.batch(step) for group in self.groups))
        return Batch(torch.cat(images), torch.cat(labels))


def train(cases: list, seed: int, augment=flip, **options):
    options = {"augment": augment, "halvings": (0.6, 0.8, 0.9), "progress": False} | SETTINGS | options
    return recipes.kayalibay(cases, classes=5, seed=seed, **options)


def split(fold: int) -> tuple[list[int], list[int]]:
    """Return the seeds of the training cases and of the test cases."""
    test = list(range(3 * fold, 3 * fold + 3))
    return [s for s in range(15) if s not in test], test


def score(found: np.ndarray, case, group: str) -> dict:
    """Return the Dice of every class and region, with precision and sensitivity; of a brain without lesion, the false alarms.

    Specificity counts voxels of the brain mask only: with the empty space around it every score would be near 1.
    """
    row = {"set": group, "case": case.name}
    if group in ("healthy", "mirrored"):
        for region, labels in REGIONS.items():
            wrong = np.count_nonzero(np.isin(found, list(labels)))
            row[f"specificity_{region}"] = 1 - wrong / np.count_nonzero(case.mask)
            row[f"false_ml_{region}"] = wrong * np.prod(case.spacing) / 1000
        return row
    row |= {f"dice_{name}": metrics.dice(found == k, case.label == k) for k, name in enumerate(CLASSES, 1)}
    for region, labels in REGIONS.items():
        pair = np.isin(found, list(labels)), np.isin(case.label, list(labels))
        row |= {f"{m}_{region}": getattr(metrics, m)(*pair) for m in ("dice", "precision", "sensitivity")}
    return row


def run_modalities(subset: tuple[str, ...], fold: int):
    seeds, held_out = split(fold)
    model = train([ill_case(s).select(subset) for s in seeds], fold)
    for group, group_seeds in (("fold", held_out), ("test", PERSONS)):
        for case in (ill_case(s).select(subset) for s in group_seeds):
            yield score(inference.predict(model, case, progress=False), case, group)


def run_healthy(store: Store, company: str, fold: int):
    seeds, held_out = split(fold)
    sick = [ill_case(s) for s in seeds]
    others = [mirrored_case(s) for s in seeds] if company == "mirrored beside" else [healthy_case(s) for s in HEALTHY]
    if company == "ill":
        model = train(sick, fold, batch_size=2)
    else:
        others = [case for case in others if case is not None]
        model = train(sick, fold, augment=Company(sick, others, apart=company == "healthy apart", seed=fold))
    if company == "ill" or (company == "healthy beside" and fold == 0):
        card = model.card | {"spacing_mm": 4.0}
        if company != "ill":
            card["trained_on"] = [*card["trained_on"], "12 healthy brains, seeds 300 to 311"]
        store.save(f"kayalibay_brains_{company.replace(' ', '_')}{fold}", model, card)
    groups = {"fold": map(ill_case, held_out), "test": map(ill_case, PERSONS)}
    for group, cases in (groups | {"healthy": map(healthy_case, PERSONS), "mirrored": map(mirrored_case, PERSONS)}).items():
        for case in (c for c in cases if c is not None):
            yield score(inference.predict(model, case, progress=False), case, group)


def run_memory(how: str, fold: int):
    """Train on as many voxels a batch, hence with the same memory, in either way; judge on the 2 mm grid."""
    small = how == "down-sampled"
    cases = [ill_case(s, 2.0) for s in split(fold)[0]]
    model = train([halve(c) for c in cases], fold) if small else train(cases, fold, crop=CROP)
    for case in (ill_case(s, 2.0) for s in PERSONS):
        found = inference.predict(model, halve(case) if small else case, progress=False)
        if small:
            found = found.repeat(2, 0).repeat(2, 1).repeat(2, 2) * case.mask
        yield score(found, case, "test")


def plan(store: Store, seeds) -> list[Row]:
    parts = {
        "healthy": ({company: company for company in COMPANY}, partial(run_healthy, store), 0.6),
        "modalities": ({"+".join(s): s for s in SUBSETS}, run_modalities, 0.3),
        "memory": ({how: how for how in ("down-sampled", "crops")}, run_memory, 0.6),
    }
    return [
        Row(f"brains_{part}", {"variant": variant, "fold": fold}, partial(run, argument, fold), minutes, part)
        for fold in seeds or range(3)
        for part, (variants, run, minutes) in parts.items()
        for variant, argument in variants.items()
    ]


def report(store: Store) -> dict[str, str]:
    blocks = {}
    for part in ("healthy", "modalities", "memory"):
        table = store.read(f"brains_{part}")
        if table.empty:
            continue
        seen = table[table["set"] == "test"].groupby("variant", sort=False)
        rows = seen[[c for c in table.columns if c.startswith("dice_")]].mean()
        rows.insert(0, "folds", seen["fold"].nunique())
        for group in ("healthy", "mirrored") if part == "healthy" else ():
            chosen = table[table["set"] == group].groupby("variant", sort=False)
            rows[f"false ml, {group}"] = chosen["false_ml_whole"].mean().map("{:.2f}".format)
            rows[f"specificity, {group}"] = chosen["specificity_whole"].mean().map("{:.4f}".format)
        blocks[part] = markdown(rows.reset_index())
    if "healthy" in blocks:
        table = store.read("brains_healthy")
        false = table[table["set"] == "healthy"].pivot_table(index=["case", "fold"], columns="variant", values="false_ml_whole")
        lines = []
        for variant in (v for v in COMPANY[1:] if {"ill", v} <= set(false)):
            pair = false[["ill", variant]].dropna()
            means = pair.groupby("case").mean()
            test = statistics.paired_t_test(means["ill"], means[variant])
            lines.append(f"* {variant} ({pair.index.unique('fold').size} folds): {test}")
        blocks["false alarms"] = "\n".join(lines)
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
