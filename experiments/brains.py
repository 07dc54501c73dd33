"""Kayalibay's network on brain phantoms: which sequences it needs, what it makes of healthy brains, crops or down-sampling.

Claims (Kayalibay et al. 2017). Table 2: alone, T1c is best on every class but oedema, where FLAIR is, then T2; FLAIR + T1c come close to
all four sequences (.81 against .84 in oedema, .78 against .80 in enhancing tumour); necrosis is better without T1 (.55 against .49).
Table 6: networks trained on ill brains alone give false positives on brains without tumour, at a specificity of .9927. Future work:
healthy brains in training remove them; cross-entropy may do where imbalance is milder. Tables 3 to 5: an ensemble of five segments.

Task: generated gliomas at 4 mm whose volume ends where the brain does. Everybody, ill or healthy, has white-matter spots of age beyond
what the age brings (`spots=1`), which look like oedema, belong to the background, and are there at every site. Persons 0 to 26 in three
folds: 18 to train on, 9 left out, of which the first three give the validation curve. Ten more (100 to 109) that no network trains on
are imaged at every site, A to D (no network has seen D): with their glioma ("test"), with its hemisphere mirrored where it keeps to one
side ("mirrored"), before they fell ill ("healthy"), and with a stroke in its place ("stroke"), a disease no network has seen.

Metrics: Dice of four classes and three regions; in brains without tumour the millilitres called tumour. Three folds, intervals over
folds and persons (`statistics.two_way`).

Equal care: all networks have the same width, updates, two volumes in a batch, Adam with a rate that falls to zero, left-right flips,
statistics of batch normalisation estimated anew at the end, and the largest output as the answer. Nothing was tuned for any of them.

* modalities: the rows of Table 2. The row with all sequences is "ill" below.
* healthy: two volumes a batch, both ill ("ill"), or one ill and one healthy ("healthy beside"), also with twice the updates, which are
  as many ill brains as those of "ill" ("healthy beside, longer"); either with intensity augmentation
  ("+ intensity"): gain, offset and a smooth field for each sequence. The networks of "ill" become
  data/checkpoints/kayalibay_brains_ill*.safetensors; fold 0 of "healthy beside" is kept too.
* losses: "cross-entropy", with ill brains; two ill or two healthy brains in turn with the Jaccard distance ("healthy apart"), and with
  the smoothed one, its rival ("healthy apart, smoothed").
* contrasts: no network; what the intensities of each sequence separate, and how rare the classes are in the volume and in the brain's
  box, on twelve phantoms and on four real cases with FLAIR and T1c.
* memory: crops of 40x40x32 voxels at 2 mm against whole brains, averaged down to 4 mm, of that many voxels; judged at 2 mm. Fifteen
  persons without additional spots in five folds of three, 120 updates, one volume a batch: short runs.

Methods without learning see the same sequences, and take what they need to know from the training cases of fold 0.

The tables are data/results/brains_*.csv, which notebook 09 reads, and baselines.csv.
"""

from functools import cache, partial
from itertools import count

import numpy as np
import pandas as pd
import torch
from _brains_page import ALL, CLASSES, REGIONS, SCORED, SITES, SUBSETS, report
from _frame import Row, Store, baseline_rows, baselines_row, flip, main, scan, vitals_row
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from medseg_lite import datasets, inference, metrics, phantoms, recipes, transforms
from medseg_lite.optimizers import FromTorch
from medseg_lite.sampling import Batch, VolumeSampler
from medseg_lite.volume import bounding_box

COMPANY = ("ill", "healthy beside", "healthy beside, longer", "ill + intensity", "healthy beside + intensity")
LOSSES = ("cross-entropy", "healthy apart", "healthy apart, smoothed")
PERSONS, HEALTHY, CROP = range(100, 110), range(300, 318), (40, 40, 32)
STROKES = PERSONS[:5]
# For lack of time; `--only` makes their rows. Of "t1c" only the first fold was run.
NOT_RUN = ("healthy beside, longer", "ill + intensity", "healthy beside + intensity", *map("+".join, SUBSETS), *LOSSES)
SMOOTH = 10.0  # voxels
VALIDATIONS = 5
FOLDS, HELD_OUT = range(3), 9
SETTINGS = {"steps": 200, "width": 0.35, "learning_rate": 5e-3}
SHORT = {"steps": 120, "width": 0.5, "learning_rate": 1e-2, "halvings": (0.6, 0.8, 0.9)}  # "memory"


@cache
def ill_case(seed: int, site: str | None = None):
    return transforms.standardise(phantoms.brain(seed, site=site or SITES[seed % 3], spacing=4.0, spots=1.0))


@cache
def healthy_case(seed: int, site: str | None = None, lesion: str | None = None):
    case = phantoms.brain(seed, site=site or SITES[seed % 3], spacing=4.0, spots=1.0, lesion=lesion)
    return transforms.standardise(case.select(ALL))


@cache
def mirrored_case(seed: int, site: str):
    """Return the case with its healthy hemisphere mirrored, or None where the glioma reaches into both."""
    try:
        return transforms.standardise(transforms.mirror_healthy(phantoms.brain(seed, site=site, spacing=4.0, spots=1.0)))
    except ValueError:
        return None


@cache
def short_case(seed: int, spacing: float):
    return transforms.standardise(scan(seed, spacing=spacing))


def halve(case):
    """Make one voxel of every 2x2x2: the image and the mask get the mean, the label its most frequent class."""
    image = F.avg_pool3d(torch.from_numpy(case.image), 2).numpy()
    counts = F.avg_pool3d(F.one_hot(torch.from_numpy(case.label.astype(np.int64)), 5).movedim(-1, 0).float(), 2)
    mask = F.avg_pool3d(torch.from_numpy(case.mask)[None].float(), 2)[0].numpy() >= 0.5
    affine = case.affine.copy()
    affine[:3, :3] *= 2
    affine[:3, 3] += case.affine[:3, :3] @ [0.5, 0.5, 0.5]
    return case.replace(image=image, label=counts.argmax(0).numpy().astype(np.uint8), mask=mask, affine=affine, extra={})


def vary(image, label, *, rng):
    """Flip, then give every sequence of every volume another gain, offset and smooth field, which is 0 outside the brain."""
    image, label = flip(image, label, rng=rng)
    gain, offset = (torch.from_numpy(rng.normal(0, 0.25, (*image.shape[:2], 1, 1, 1))).float() for _ in range(2))
    field = torch.from_numpy(rng.normal(0, 0.3, (*image.shape[:2], 3, 3, 3))).float()
    field = F.interpolate(field, image.shape[2:], mode="trilinear", align_corners=True)
    return torch.where(image != 0, image * gain.exp() + offset + field, image), label


class Company:
    """Batches of two groups of cases, in the place of those that the recipe draws from one.

    A batch holds a volume of each group, or (`apart`) two volumes of either group in turn.
    """

    def __init__(self, cases: list, others: list, *, apart: bool, seed: int, augment=flip):
        self.apart, self.steps = apart, count()
        options = {"multiple": 8, "batch_size": 2 if apart else 1, "augment": augment}
        self.groups = [VolumeSampler(group, seed=seed + n, **options) for n, group in ((0, cases), (100, others))]

    def __call__(self, image, label, *, rng) -> Batch:
        step = next(self.steps)
        if self.apart:
            return self.groups[step % 2].batch(step // 2)
        images, labels = zip(*(group.batch(step) for group in self.groups))
        return Batch(torch.cat(images), torch.cat(labels))


def smoothed_jaccard(logits, target):
    """Return the Jaccard distance with `SMOOTH` voxels added to both numbers of every class, so that an absent class teaches."""
    p = logits.softmax(1).transpose(0, 1).flatten(1)
    t = F.one_hot(target, p.shape[0]).to(p.dtype).flatten(0, -2).T
    both = (p * t).sum(1)
    return (1 - (both + SMOOTH) / (p.square().sum(1) + t.sum(1) - both + SMOOTH)).sum()


def settle(model, sampler, batches: int = 8) -> None:
    """Estimate the statistics of batch normalisation anew, as the mean over some batches: the paper's are those of the last two."""
    norms = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm3d)]
    kept = [(layer, layer.momentum) for layer in norms]
    for layer in norms:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean
    model.train()
    with torch.no_grad():
        for step in range(batches):
            model(sampler.batch(step).inputs)
    for layer, momentum in kept:
        layer.momentum = momentum
    model.eval()


def train(cases: list, watched: list, seed: int, augment=flip, again=flip, loss="jaccard", share: float = 1.0):
    """Train a network. Its history has the mean Dice of the `watched` cases five times.

    `again` changes batches as `augment` does; from its batches come the statistics of batch normalisation. They must be those of
    training: a network that was trained on an ill brain beside a healthy one finds less with the statistics of two ill ones.
    """
    steps, twin = (
        round(share * SETTINGS["steps"]),
        VolumeSampler(cases, multiple=8, batch_size=2, augment=again, seed=seed + 50),
    )

    def watch(model):
        settle(model, twin)
        rows = pd.DataFrame([score(inference.predict(model, c, progress=False), c, "") for c in watched])
        return rows[list(SCORED)].mean().to_dict()

    return recipes.kayalibay(
        cases,
        classes=5,
        steps=steps,
        width=SETTINGS["width"],
        learning_rate=SETTINGS["learning_rate"],
        schedule=lambda optimizer: FromTorch(CosineAnnealingLR(optimizer, steps)),
        loss=loss,
        batch_size=2,
        augment=augment,
        validate_every=max(1, steps // VALIDATIONS),
        engine={"validate": watch},
        seed=seed,
        device="cpu",
        progress=False,
    )


def split(fold: int) -> tuple[list[int], list[int]]:
    """Return the seeds of the training cases and of the cases left out."""
    out = list(range(HELD_OUT * fold, HELD_OUT * (fold + 1)))
    return [s for s in range(HELD_OUT * len(FOLDS)) if s not in out], out


def ill_cases(fold: int) -> list:
    """Return the training cases of a fold."""
    return [ill_case(s) for s in split(fold)[0]]


def short_cases(fold: int, spacing: float = 2.0) -> list:
    return [short_case(s, spacing) for s in range(15) if s // 3 != fold]


def score(found: np.ndarray, case, group: str) -> dict:
    """Return the Dice of every class and region, with precision and sensitivity; of a brain without lesion, the false alarms.

    Specificity counts voxels of the brain mask only: with the empty space around it every score would be near 1.
    """
    row = {"set": group, "person": case.info["seed"], "site": case.info["site"], "case": case.name}
    if group in ("healthy", "mirrored", "stroke"):
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


def history(model) -> list[dict]:
    return model.history.dropna()[["step", "loss", *SCORED]].to_dict("records")


def run_modalities(store: Store, subset: tuple[str, ...], fold: int):
    cases, out = ([ill_case(s).select(subset) for s in seeds] for seeds in split(fold))
    model = train(cases, out[:3], fold)
    store.examine(f"modalities, {'+'.join(subset)}, {fold}", model, cases)
    test = [ill_case(s).select(subset) for s in PERSONS]
    rows = [
        score(inference.predict(model, c, progress=False), c, g) for g, group in (("fold", out), ("test", test)) for c in group
    ]
    return {"brains_modalities_curves": history(model), "brains_modalities": rows}


def run_healthy(store: Store, variant: str, fold: int):
    cases, out = ([ill_case(s) for s in seeds] for seeds in split(fold))
    company, _, intensity = variant.partition(" + ")
    augment = again = vary if intensity else flip
    loss = {"cross-entropy": "cross_entropy", "healthy apart, smoothed": smoothed_jaccard}.get(variant, "jaccard")
    if company.startswith("healthy"):
        others = [healthy_case(s) for s in HEALTHY]
        augment, again = (Company(cases, others, apart="apart" in company, seed=fold + n, augment=augment) for n in (0, 50))
    model = train(cases, out[:3], fold, augment, again, loss, 2.0 if "longer" in variant else 1.0)
    store.examine(f"healthy, {variant}, {fold}", model, cases)
    if variant == "ill" or (variant == "healthy beside" and fold == 0):
        card = model.card | {"spacing_mm": 4.0, "spots": 1.0}
        if variant != "ill":
            card["trained_on"] = [*card["trained_on"], f"{len(HEALTHY)} healthy brains, seeds {HEALTHY[0]} to {HEALTHY[-1]}"]
        store.save(f"kayalibay_brains_{variant.replace(' ', '_')}{fold}", model, card)
    everywhere = [(s, site) for s in PERSONS for site in SITES]
    groups = {
        "fold": out,
        "test": [ill_case(*place) for place in everywhere],
        "healthy": [healthy_case(*place) for place in everywhere],
        "mirrored": [case for place in everywhere if (case := mirrored_case(*place))],
        "stroke": [healthy_case(s, site, "stroke") for s in STROKES for site in SITES],
    }
    rows = [score(inference.predict(model, c, progress=False), c, g) for g, group in groups.items() for c in group]
    return {"brains_healthy_curves": history(model), "brains_healthy": rows}


def run_memory(store: Store, how: str, fold: int):
    """Train on as many voxels a batch, hence with the same memory, in either way; judge on the 2 mm grid."""
    small = how == "down-sampled"
    cases = [halve(c) if small else c for c in short_cases(fold)]
    model = recipes.kayalibay(
        cases, classes=5, seed=fold, augment=flip, crop=None if small else CROP, progress=False, device="cpu", **SHORT
    )
    store.examine(f"memory, {how}, {fold}", model, cases)
    for case in (short_case(s, 2.0) for s in PERSONS):
        found = inference.predict(model, halve(case) if small else case, progress=False)
        if small:
            found = found.repeat(2, 0).repeat(2, 1).repeat(2, 2) * case.mask
        yield {k: v for k, v in score(found, case, "test").items() if k not in ("person", "site")}


QUESTIONS = {
    "oedema / healthy brain": ((2,), (0,)),
    "core / oedema": ((1, 3, 4), (2,)),
    "enhancing / rest of tumour": ((4,), (1, 2, 3)),
}


def separation(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """Return how far apart the intensities of two tissues lie: |2 AUC - 1|, and the share by which their histograms differ.

    The first is blind to a tissue of two intensities, one below and one above the other tissue; the second (total variation) is not.
    """
    ranks = np.concatenate([a, b]).argsort().argsort()[: len(a)]
    auc = (ranks.sum() - len(a) * (len(a) - 1) / 2) / (len(a) * len(b))
    low, high = np.quantile(np.concatenate([a, b]), [0.005, 0.995])
    shares = [np.histogram(np.clip(x, low, high), 24, (low, high))[0] / len(x) for x in (a, b)]
    return {"auc": abs(2 * auc - 1), "histograms": np.abs(shares[0] - shares[1]).sum() / 2}


def run_contrasts(kind: str) -> dict[str, list[dict]]:
    """Measure, without a network, what each sequence separates, and how rare the classes are before and after cropping to the brain."""
    if kind == "real":
        cases = large = [transforms.standardise(c) for c in datasets.brats2013_deepmedic()]
    else:
        cases = [short_case(s, 2.0) for s in range(12)]
        large = [phantoms.brain(s, site=SITES[s % 3], spacing=4.0, shape=(60, 60, 39)) for s in range(12)]  # 240 mm, as BRATS
    found, shares = [], []
    for case in cases:
        for question, groups in QUESTIONS.items():
            voxels = [np.isin(case.label, group) & case.mask for group in groups]
            if all(v.sum() > 30 for v in voxels):
                for channel, image in zip(case.channels, case.image):
                    row = {"case": case.name, "question": question, "channel": channel}
                    found.append(row | separation(*(image[v] for v in voxels)))
    for case in large:
        for crop, label in (("whole", case.label), ("brain", case.label[bounding_box(case.mask)])):
            counts = np.bincount(label.ravel(), minlength=5)[:5] / label.size
            shares.append(
                {"case": case.name, "volume": crop} | dict(zip(("background", *CLASSES), (f"{n:.6f}" for n in counts)))
            )
    return {"brains_shares": shares, "brains_contrasts": found}


def count_false_alarms(found: np.ndarray, case) -> dict:
    return {f"false_ml_{case.info['site']}": score(found, case, "healthy")["false_ml_whole"]}


def run_baselines(subset: tuple[str, ...], spacing: float = 4.0) -> list[dict]:
    """Score the methods without learning; with all sequences, their false alarms in healthy brains at every site, too."""
    if spacing == 4:
        cases, test = ([ill_case(s).select(subset) for s in seeds] for seeds in (split(0)[0], PERSONS))
    else:
        cases, test = short_cases(0), [short_case(s, 2.0) for s in PERSONS]
    labels = {f"dice_{name}": [k] for k, name in enumerate(CLASSES, 1)} | {f"dice_{r}": k for r, k in REGIONS.items()}
    rows = baseline_rows(cases, cases, test, labels)
    if subset == ALL and spacing == 4:
        healthy = [healthy_case(s, site) for site in SITES for s in PERSONS]
        rows += baseline_rows(cases, cases, healthy, {"whole": REGIONS["whole"]}, count_false_alarms)
    return rows


def plan(store: Store, seeds) -> list[Row]:
    folds = seeds or FOLDS
    first = ("t1c", "flair", "flair+t1c", "t2", "t1", "flair+t1c+t2")  # the rows that decide most
    rows = [
        Row(
            table,
            {"variant": variant, "fold": fold},
            partial(run, store, variants[variant], fold),
            minutes,
            part,
            extra=variant in NOT_RUN,
        )
        for table, part, run, minutes, variants in (
            ("brains_healthy", "healthy", run_healthy, 1.0, {v: v for v in COMPANY}),
            ("brains_modalities", "modalities", run_modalities, 0.7, {n: tuple(n.split("+")) for n in first}),
            ("brains_healthy", "losses", run_healthy, 1.0, {v: v for v in LOSSES}),
            ("brains_memory", "memory", run_memory, 0.6, {how: how for how in ("down-sampled", "crops")}),
        )
        for variant in variants
        for fold in folds
    ]
    for kind in ("phantoms", "real"):  # the real ones need `python -m medseg_lite download brats2013_deepmedic`
        rows.append(
            Row("brains_contrasts", {"kind": kind}, partial(run_contrasts, kind), 0.3, "contrasts", extra=kind == "real")
        )
    rows += [baselines_row(store, "+".join(s), partial(run_baselines, s), 0.4) for s in (*SUBSETS, ALL)]
    rows.append(baselines_row(store, "2 mm", partial(run_baselines, ALL, 2.0), 0.8))
    for variant, fold in [("ill", 0), ("ill", 1), ("ill", 2), ("healthy beside", 0)]:
        checkpoint = f"kayalibay_brains_{variant.replace(' ', '_')}{fold}"
        rows.append(vitals_row(store, f"healthy, {variant}, {fold}", checkpoint, partial(ill_cases, fold)))
    return rows


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
