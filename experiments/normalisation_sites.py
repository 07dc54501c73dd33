"""Does a learned pre-processor cope with scanners of several sites, and with one that it has never seen?

Claims (Drozdzal et al. 2018): the pipeline segments prostates from raw intensities, without any pre-processing, across hospitals and
protocols (section IV-C, table VI: 87.4 % Dice); the pre-processor brings [0, 2000] to [-5, 10] (figure 6a); the largest component
cleans the volume, ten networks are averaged, base and apex are sometimes over-segmented (section IV-C, figure 5); liver lesions (table
V: .711 against .535 to .617); a 3D pre-processor (section V).

Task "prostate": generated prostates that lie anywhere in the middle two fifths of the field of view and vary in size (`vary`), so that
their usual place says little. Patients at the sites A, B and C to learn from; others, each imaged at all four sites, to test on: no
network has seen site D. Five systems, which differ only in what FC-ResNet is given: raw intensities; raw intensities divided by 1000,
one constant for all scanners; standardised volumes; slices that an instance normalisation layer, trained with the network, brings to
mean 0 and deviation 1; what the pre-processor makes of intensities divided by 1000. That division is the pre-processor's start:
behind He's weights its output then spans a few units, and thousands without it.

Metric: Dice, average boundary distance in mm and volume error in percent, as found and of the largest component. Three seeds; intervals
over seeds and patients. The comparisons are the pipeline less each other system, at A to C and at D; the loss at D (the mean of A, B
and C less D); the average of the three networks less its members. Then images at D multiplied by a gain; ml too many at, above and
below the gland; the range of the pre-processor's output, trained and at its own start.

No pre-processing is needed if the pipeline is at most .03 of Dice behind standardised input, by the lower end of the interval.
Over-segmentation of the ends is the volume error in the outer fifths of the gland and beyond, less that of the middle three fifths.

Equal care: one width, depth, optimiser, schedule to zero, loss, number of updates and stream of batches for all; the last weights are
kept. The threshold of each network, and of each method without learning, is the best on the validation patients. Patients to train on
have the numbers 0 to 23, for validation 24 to 29, to test 100 to 109.

Waiting for a machine, and asked for by name (`--only`): "longer", the pipeline with half as many updates more, because its curve still
rises; "volumes", the pre-processor in 3D in front of Kayalibay's 3D U-Net, against that net on raw and on standardised volumes; "liver",
four systems of equal width on crops around lesions, windowed input for the U-Net too. Three seeds each.

The tables are data/results/normalisation_*.csv, which notebook 11 reads, and baselines.csv. Networks are kept in
runs/normalisation_sites; three of seed 0 become data/checkpoints/drozdzal_prostate*.safetensors, which take raw intensities, or
standardised ones where their name says so.
"""

import time
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, provenance, vitals_row
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR

from medseg_lite import inference, losses, metrics, models, phantoms, recipes, statistics, transforms
from medseg_lite.ensembles import Ensemble
from medseg_lite.models import Network
from medseg_lite.models.drozdzal import Pipeline
from medseg_lite.optimizers import FromTorch
from medseg_lite.postprocess import largest_component

SETTINGS = {
    "width": 0.25,
    "depth": 0.5,
    "prostate": 400,
    "liver": 1500,
    "volumes": 150,
}  # shares of the paper's; updates by part
SEEDS = (0, 1, 2)
RATE = 2e-3
VALIDATIONS, WATCHED = 6, 3  # points of the curve of validation, and its patients
SIZE = {"prostate": 64, "liver": 96, "volumes": 48}  # pixels of a slice's side
RAW, SCALED, STANDARD = "FC-ResNet, raw", "FC-ResNet, ÷ 1000", "FC-ResNet, standardised"
INSTANCE, LEARNED = "instance norm + FC-ResNet", "FCN + FC-ResNet, ÷ 1000"
LONGER = f"{LEARNED}, longer"  # half as many updates more, because the pipeline learns more slowly
SYSTEMS = {  # network, and what is done to its input
    "prostate": {
        STANDARD: ("fc_resnet", "standardised"),
        LEARNED: ("fcn_fc_resnet", "÷ 1000"),
        INSTANCE: ("instance_fc_resnet", "raw"),
        SCALED: ("fc_resnet", "÷ 1000"),
        RAW: ("fc_resnet", "raw"),
        LONGER: ("fcn_fc_resnet", "÷ 1000"),
    },
    "volumes": {
        "3D U-Net, raw": ("kayalibay_unet3d", "raw"),
        "3D U-Net, standardised": ("kayalibay_unet3d", "standardised"),
        "3D FCN + 3D U-Net, ÷ 1000": ("pipeline", "÷ 1000"),
    },
    "liver": {
        "U-Net, windowed": ("unet2d", "windowed"),
        "FC-ResNet, windowed": ("fc_resnet", "windowed"),
        STANDARD: ("fc_resnet", "standardised"),
        LEARNED: ("fcn_fc_resnet", "÷ 1000"),
    },
}
UNIT = 1000
PREPARED = {
    "raw": lambda case: case,
    "÷ 1000": lambda case: case.replace(image=case.image / UNIT),
    "standardised": transforms.standardise,
    "windowed": lambda case: case.replace(image=(case.image.clip(-110, 220) - 55) / 100),  # Hounsfield units of soft tissue
}
SHIPPED = {RAW: "drozdzal_prostate_raw", STANDARD: "drozdzal_prostate_standardised", LEARNED: "drozdzal_prostate"}
GAINS = (0.25, 0.5, 2.0, 4.0)  # times the scanner's own intensities
PLACES = ("below", "apex", "second", "third", "fourth", "base", "above")  # of the slices: the gland in fifths
BY_SITE = {"index": "system", "columns": "site", "values": "dice", "sort": False}  # of a table
MINUTES = {"prostate": 1.2, "liver": 4, "volumes": 1}


# ------------------------------------------------------------------------------------------------------------- data


@cache
def patients(part: str) -> tuple[list, list, list]:
    """Return patients to train on, to validate and to test; those with prostates are tested at every site."""
    size = SIZE[part]
    if part == "liver":
        seeds = range(16), range(16, 18), range(100, 106)
        return tuple([phantoms.liver(s, size=size, slice_mm=8.0, lesions=2 + s % 5) for s in part] for part in seeds)
    cohort = partial(phantoms.prostate_cohort, size=size, vary=True)
    test = [phantoms.prostate(seed, site=site, size=size, vary=True) for seed in range(100, 110) for site in "ABCD"]
    return cohort(24), cohort(6, first_seed=24), test


def validation_cases(part: str, system: str) -> list:
    """Return the validation cases as a system sees them; class 1 is what it looks for."""
    cases = [PREPARED[SYSTEMS[part][system][1]](case) for case in patients(part)[1]]
    return [case.replace(label=(case.label == (2 if part == "liver" else 1)).astype(np.uint8)) for case in cases]


def keep_lesions(case):
    """Make the lesions class 1, since the paper's training cases have no outline of the liver, and the places to cut crops around."""
    lesion = case.label == 2
    return case.replace(label=lesion.astype(np.uint8), mask=lesion)


# --------------------------------------------------------------------------------------------------------- training


class InstanceNormalised(Network):
    """A layer that gives each slice mean 0 and deviation 1, then a trained scale and shift, in front of a network of slices."""

    spatial_dims, multiple = 2, 32

    def __init__(self, network: Network):
        super().__init__(network.in_channels, network.classes)
        self.layer, self.network, self.halo = nn.InstanceNorm2d(network.in_channels, affine=True), network, network.halo

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(self.layer(x))


@models.builder
def instance_fc_resnet(*, in_channels: int = 1, classes: int = 2, width: float = 1.0, depth: float = 1.0) -> InstanceNormalised:
    return InstanceNormalised(models.fc_resnet(in_channels=in_channels, classes=classes, width=width, depth=depth))


def build(part: str, name: str, seed: int) -> Network:
    torch.manual_seed(seed)
    width, depth = SETTINGS["width"], {} if name == "unet2d" else {"depth": SETTINGS["depth"]}
    if part == "volumes":
        model = models.kayalibay_unet3d(in_channels=1, classes=2, width=width)
        return Pipeline(models.fcn_preprocessor(dims=3, width=width), model) if name == "pipeline" else model
    return models.BUILDERS[name](classes=1, width=width, **depth)


def both_losses(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return cross-entropy plus the Dice loss."""
    if logits.shape[1] > 1:
        entropy = losses.cross_entropy(logits, target)
    else:
        entropy = F.binary_cross_entropy_with_logits(logits[:, 0], (target > 0).to(logits))
    return entropy + losses.dice_loss(logits, target)


def updates(part: str, system: str) -> int:
    return SETTINGS[part] * 3 // 2 if system == LONGER else SETTINGS[part]


def train(store: Store, part: str, system: str, seed: int) -> Network:
    """Train a network; the last weights are kept."""
    name, how = SYSTEMS[part][system]
    cases, steps = [PREPARED[how](c) for c in patients(part)[0]], updates(part, system)
    options = {
        "network": build(part, name, seed),
        "steps": steps,
        "loss": both_losses,
        "optimizer": partial(torch.optim.Adam, lr=RATE, fused=True),
        "schedule": lambda optimizer: FromTorch(CosineAnnealingLR(optimizer, steps)),
        "validate_every": -(-steps // VALIDATIONS),
        "folder": weights(store, part, system, seed).with_suffix(""),
        "seed": seed,
        "device": "cpu",
        "progress": False,
        "engine": {"validate": partial(validate, part=part, how=how)},
    }
    if part == "volumes":
        size = (SIZE[part], SIZE[part], 16)
        return recipes.kayalibay(cases, crop=size, batch_size=4, augment=None, **options)
    options |= {"crop": 64, "weight_decay": 0}
    if part == "liver":
        return recipes.drozdzal([keep_lesions(c) for c in cases], augment=None, **options)
    augment = partial(transforms.distort, flip=False, shear=0.1, angle=10)
    return recipes.drozdzal(cases, scheme="foreground", augment=augment, **options)


def validate(model: Network, *, part: str, how: str) -> dict[str, float]:
    found = segment(model, how, patients(part)[1][:WATCHED])
    if part == "liver":
        return {"dice": np.mean([score_liver(*pair)["dice_lesion"] for pair in found])}
    return {"dice": np.mean([metrics.dice(label > 0, case.label > 0) for label, case in found])}


def weights(store: Store, part: str, system: str, seed: int):
    return store.runs / f"{part}_{''.join(c if c.isalnum() else '_' for c in system.lower())}_{seed}.safetensors"


def take_raw(model: Network) -> Network:
    """Divide the kernels of the first convolution by 1000, so that a network of divided intensities takes raw ones."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    with torch.no_grad():
        first.weight /= UNIT
    return model


# ------------------------------------------------------------------------------------------------------------ scores


def probability(model: Network, how: str, case) -> np.ndarray:
    """Return the probability of class 1 in every voxel."""
    return inference.predict(model, PREPARED[how](case), output="probabilities", progress=False)[-1]


def segment(model: Network, how: str, cases: list, threshold: float = 0.5):
    for case in cases:
        yield (probability(model, how, case) > threshold).astype(np.uint8), case


def choose(model: Network, part: str, how: str) -> float:
    """Return the threshold with the highest mean Dice on the validation patients."""
    cases = patients(part)[1]
    inside = [c.label > 0 if part == "liver" else np.ones(c.shape, bool) for c in cases]
    truths = [(c.label == (2 if part == "liver" else 1))[m] for c, m in zip(cases, inside)]
    return metrics.best_threshold([probability(model, how, c)[m] for c, m in zip(cases, inside)], truths)


def score(found: np.ndarray, case) -> dict:
    """Return Dice, average boundary distance in mm and volume difference in percent, as found and of the largest component."""
    row = {"patient": case.info["seed"], "site": case.info["site"], "coil": case.info["coil"]}
    for label, ending in ((found, ""), (largest_component(found), "_largest")):
        row["dice" + ending] = metrics.dice(label > 0, case.label > 0)
        row["distance" + ending] = metrics.boundary_distance(label > 0, case.label > 0, spacing=case.spacing)
        row["volume" + ending] = abs(metrics.volume_difference(label > 0, case.label > 0))
    return row


def score_slices(found: np.ndarray, case) -> dict:
    """Return ml found, ml of the prostate and ml of both, below it, in each fifth of it from apex to base, and above it."""
    truth, ml = case.label > 0, np.prod(case.spacing) / 1000
    gland = np.flatnonzero(truth.any((0, 1)))
    place = (np.arange(truth.shape[2]) - gland[0]) / len(gland)
    part = np.clip(np.floor(5 * place), -1, 5).astype(int)
    for n, name in enumerate(PLACES, -1):
        here = np.s_[:, :, part == n]
        sizes = ((found[here] > 0), truth[here], (found[here] > 0) & truth[here])
        yield {"place": name} | {k: round(v.sum() * ml, 3) for k, v in zip(("found_ml", "true_ml", "both_ml"), sizes)}


def score_liver(found: np.ndarray, case) -> dict:
    """Return the Dice of lesions and of the rest of the liver; what lies outside the liver does not count."""
    inside = case.label > 0
    lesion, truth = (found > 0)[inside], (case.label == 2)[inside]
    return {"dice_lesion": metrics.dice(lesion, truth), "dice_liver": metrics.dice(~lesion, ~truth)}


def score_range(preprocessor: Network, cases: list) -> dict:
    """Return between which values 99.8 % of the pre-processor's output lies, and the deviation within a slice, over all slices."""
    with torch.no_grad():
        slices = [preprocessor.eval()(torch.from_numpy(c.image).permute(3, 0, 1, 2)) for c in cases]
    low, high = np.quantile(np.concatenate([y.numpy().ravel() for y in slices]), (0.001, 0.999))
    return {"low": low, "high": high, "sd_within": float(np.mean([y.std(dim=(1, 2, 3)).mean() for y in slices]))}


def run(store: Store, part: str, system: str, seed: int) -> dict:
    clock = time.process_time()
    _, how = SYSTEMS[part][system]
    model = train(store, part, system, seed)
    spent, test = time.process_time() - clock, patients(part)[2]
    count, threshold = sum(p.numel() for p in model.parameters()), choose(model, part, how)
    facts = {"updates": updates(part, system), "parameters": count, "cpu_seconds": spent, "threshold": threshold} | provenance()
    found = list(segment(model, how, test, threshold))
    rows = [{"case": c.name} | score_liver(label, c) if part == "liver" else score(label, c) for label, c in found]
    tables = {f"normalisation_{part}_curves": model.history.dropna()[["step", "loss", "dice"]].to_dict("records")}
    if part == "prostate":
        models.save(weights(store, part, system, seed), model, model.card)
        tables |= look_closer(store, system, seed, model, found, threshold)
    store.examine(f"{part}, {system}, {seed}", model, validation_cases(part, system))
    return tables | {f"normalisation_{part}": [row | facts for row in rows]}


def look_closer(store: Store, system: str, seed: int, model: Network, found: list, threshold: float) -> dict:
    """Return errors along the gland, Dice of brighter and darker images, and the pre-processor's range; ship what ships."""
    name, how = SYSTEMS["prostate"][system]
    at_d = [c for _, c in found if c.info["site"] == "D"][:6]
    slices = pd.DataFrame([{"patient": c.info["seed"]} | row for label, c in found for row in score_slices(label, c)])
    tables = {
        "normalisation_places": slices.groupby(["patient", "place"], sort=False).sum().reset_index().to_dict("records"),
        "normalisation_gain": [
            {"gain": gain} | score(*pair)
            for gain in GAINS
            for pair in segment(model, how, [c.replace(image=c.image * gain) for c in at_d], threshold)
        ],
    }
    if system in (LEARNED, LONGER):
        seen = [PREPARED[how](c) for _, c in found if c.info["site"] != "D"][:9]
        steps = {"start": build("prostate", name, seed), "trained": model}
        tables["normalisation_range"] = [{"when": k} | score_range(m.preprocessor, seen) for k, m in steps.items()]
    if seed == 0 and system in SHIPPED:
        seen_as = "standardised" if how == "standardised" else "raw"
        card = model.card | {"channels": ["t2"], "input": seen_as, "pixels": 64, "threshold": threshold}
        copy = models.load(weights(store, "prostate", system, seed))
        store.save(SHIPPED[system], take_raw(copy) if how == "÷ 1000" else copy, card, half=True)
    return tables


def run_average(store: Store, system: str):
    """Score the average of the three networks, from their probabilities."""
    paths = [weights(store, "prostate", system, seed) for seed in SEEDS]
    if missing := [path for path in paths if not path.exists()]:
        raise SystemExit(f"{missing[0]} is missing; make the networks first: --again --only '{system}'")
    model, how = Ensemble([models.load(path) for path in paths]), SYSTEMS["prostate"][system][1]
    threshold = choose(model, "prostate", how)
    for pair in segment(model, how, patients("prostate")[2], threshold):
        yield score(*pair) | {"updates": updates("prostate", system), "threshold": threshold} | provenance()


def run_baselines(part: str) -> list[dict]:
    """Score the methods without learning: the prostate's Dice by site, or lesions by `score_liver`."""
    if part == "liver":
        cases = ([case.replace(mask=case.label > 0) for case in group] for group in patients(part))
        return baseline_rows(*cases, {"lesion": [2]}, score_liver)
    cases = ([transforms.standardise(case) for case in group] for group in patients(part))
    return baseline_rows(*cases, {"dice": [1]}, lambda found, case: {case.info["site"]: score(found, case)["dice"]})


def plan(store: Store, seeds) -> list[Row]:
    rows = []
    for part, systems in SYSTEMS.items():
        for seed in seeds or SEEDS:
            for s in systems:
                key, make = {"system": s, "seed": seed}, partial(run, store, part, s, seed)
                rows.append(
                    Row(f"normalisation_{part}", key, make, MINUTES[part], part, extra=part != "prostate" or s == LONGER)
                )
    if not seeds:
        rows += [
            Row("normalisation_prostate", {"system": s, "seed": "average"}, partial(run_average, store, s), 0.3, "average")
            for s in SYSTEMS["prostate"]
            if s != LONGER
        ]
    look = partial(validation_cases, "prostate", RAW)
    return [
        *rows,
        baselines_row(store, "prostate", partial(run_baselines, "prostate"), 0.3),
        vitals_row(store, f"prostate, {LEARNED}, 0", SHIPPED[LEARNED], look),
    ]


# ------------------------------------------------------------------------------------------------------------ report


def by_run(scores: pd.DataFrame, system: str, column: str = "dice", sites: str = "ABC") -> pd.DataFrame:
    """Return the scores of a system as runs × patients, the mean over sites."""
    mine = scores[(scores.system == system) & (scores.seed != "average") & scores.site.isin(list(sites))]
    return mine.pivot_table(index="seed", columns="patient", values=column)


def lost_dice(scores: pd.DataFrame, system: str) -> pd.DataFrame:
    """Return what each run loses at site D with each patient: the mean Dice of A, B and C less that of D."""
    return by_run(scores, system) - by_run(scores, system, sites="D")


def last_third(curves: pd.DataFrame, system: str) -> float:
    """Return what the mean validation Dice of a system gained in the last third of the updates."""
    means = curves[(curves.system == system) & (curves.step >= 2 / 3 * curves.step.max())].groupby("step").dice.mean()
    return float(means.iloc[-1] - means.iloc[0])


def interval(*tables: pd.DataFrame, digits: int = 3) -> str:
    """Return a mean, or a difference of two, with its interval over seeds and patients; nothing for a single seed."""
    if min(map(len, tables)) < 2:
        return "one seed"
    found, style = statistics.two_way(*tables), f"{'+' if len(tables) > 1 else ''}.{digits}f"
    return f"{found.mean:{style}} ({found.low:{style}} to {found.high:{style}})"


def report_prostate(scores: pd.DataFrame, curves: pd.DataFrame) -> dict[str, str]:
    single, rows, lines, pieces = scores[scores.seed != "average"], [], [], []
    for system, mine in single.groupby("system", sort=False):
        facts = {"seeds": mine.seed.nunique()} | mine.iloc[0][["parameters", "updates"]].astype(int).to_dict()
        facts["CPU s"] = f"{mine.groupby('seed').cpu_seconds.first().mean():.0f}"
        measures = {"A to C": by_run, "D": partial(by_run, sites="D"), "lost at D": lost_dice}
        facts |= {what: interval(measure(scores, system)) for what, measure in measures.items()}
        rows.append({"system": system} | facts | {"gain in the last third": f"{last_third(curves, system):+.3f}"})
        if system != LEARNED:
            pairs = {what: [measure(scores, name) for name in (LEARNED, system)] for what, measure in measures.items()}
            lines += [f"* {what}: {LEARNED} − {system}, {interval(*pair)}" for what, pair in pairs.items()]
        piece = {"system": system}
        for name, digits in (("dice", 3), ("distance", 2), ("volume", 1)):
            before, after = (by_run(scores, system, name + end, "ABCD") for end in ("", "_largest"))
            change = interval(after - before, digits=digits)
            piece |= {name: f"{before.mean(axis=None):.{digits}f}", f"{name}, largest − all": change}
        pieces.append(piece)
    both = scores.assign(which=scores.seed.where(scores.seed == "average", "members' mean"))
    blocks = {"prostate": markdown(pd.DataFrame(rows)), "compared": "\n".join(lines), "pieces": markdown(pd.DataFrame(pieces))}
    return blocks | {
        "sites": markdown(single.pivot_table(**BY_SITE).reset_index()),
        "average": markdown(both.pivot_table(index="system", columns="which", values="dice", sort=False).reset_index()),
    }


def report_closer(store: Store, scores: pd.DataFrame) -> dict[str, str]:
    """Return the blocks on the gain, on the ends of the gland, and on the pre-processor's range."""
    gain, places, ranges = (
        store.read(f"normalisation_{n}", dtype={"seed": str}, keep_default_na=False) for n in ("gain", "places", "range")
    )
    here = scores[(scores.seed != "average") & (scores.site == "D") & scores.patient.isin(gain.patient)].assign(gain=1.0)
    curves = pd.concat([gain, here]).pivot_table(index=["system", "seed"], columns="gain", values="dice").reset_index()
    sums = places.groupby(["system", "place"], sort=False)[["found_ml", "true_ml", "both_ml"]].mean().reset_index()
    sums["ml too many"] = sums.found_ml - sums.true_ml
    sums["dice"] = 2 * sums.both_ml / (sums.found_ml + sums.true_ml).where(sums.true_ml > 0)
    wide = [sums.pivot_table(index="system", columns="place", values=v, sort=False) for v in ("dice", "ml too many")]
    wide = [w[[p for p in PLACES if p in w]].reset_index() for w in wide]
    ends = f"Dice:\n\n{markdown(wide[0])}\n\nml found less ml of the prostate, the sum of four sites:\n\n{markdown(wide[1], 2)}"
    return {"gain": markdown(curves), "ends": ends} | ({} if ranges.empty else {"range": markdown(ranges, 2)})


def report(store: Store) -> dict[str, str]:
    prostate, liver, volumes = (
        store.read(f"normalisation_{name}", dtype={"seed": str}) for name in ("prostate", "liver", "volumes")
    )
    blocks, networks = {}, {}
    if not prostate.empty:
        blocks |= report_prostate(prostate, store.read("normalisation_prostate_curves"))
        blocks |= report_closer(store, prostate)
        networks["prostate"] = prostate[prostate.seed != "average"].pivot_table(**BY_SITE)
    if not liver.empty:
        means = networks["liver"] = liver.groupby("system", sort=False)[["dice_lesion", "dice_liver"]].mean()
        blocks["liver"] = markdown(means.reset_index())
    if not volumes.empty:
        networks["volumes"] = volumes.pivot_table(**BY_SITE)
        blocks["volumes"] = markdown(networks["volumes"].reset_index())
    return blocks | store.dead_networks() | beside_baselines(store, networks)


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
