"""Havaei's two pathways, two phases and cascades, each beside the control that decides.

Claims (Havaei et al. 2017): two pathways are better than either alone, and the second phase improves every network (table 1; Dice of
the whole tumour .85 against .85 and .82, and .78 → .85); cascades are better than their first network (table 2; .86 to .88 against
.85), and the output cascade smooths the borders. The controls:

    twice the updates     one network with as many updates as a cascade and its first network together
    average of two        the mean of the probabilities of two seeds: two trainings, and no cascade
    Bayes                 the probabilities of phase 1, weighed by how often the classes really occur: no second phase
    out-of-fold           the second network learns from probabilities of brains that the first one has not seen. The training
                          brains are cut into two halves, and a network of each half labels the other one. A test brain gets the
                          first network of all training brains
    copies                the first network again, from weights changed by a millionth: the noise floor

Metric: Dice of the whole tumour, its core and its enhancing part, and how ragged the labels are. Eight test brains (2 mm, seeds 100
to 107), twelve to train on (seeds 0 to 11), three seeds. A fifth of the paper's feature maps, dense segments of 9² pixels, and Adam
with a rate that falls: the paper's optimiser is not the question, and without these a run of this length loses to a threshold. The
settings were chosen with the first network, on three validation brains (seeds 50 to 52). All networks have the same ones.
A cascade's first network is frozen, so its probabilities are stored once, as further channels of each brain.

The tables are data/results/cascades.csv (each network, seed, reading and test brain), cascades_curves.csv, cascades_readings.csv
(calibration, and the rule against flat pieces), cascades_noise.csv and baselines.csv. runs/cascades keeps all probabilities.
"""

import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, baselines_row, beside_baselines, main, markdown, provenance, vitals_row
from puzzles import start_copy
from scipy import ndimage

from medseg_lite import metrics, models, paths, phantoms, postprocess, recipes, sampling, statistics, training, transforms
from medseg_lite.models import Network
from medseg_lite.volume import Case

SETTINGS = {"steps": 180, "phase2_steps": 40, "batch_size": 12, "output": 9, "width": 0.2, "rate": 2e-3, "phase2_rate": 2e-4}
HALVINGS = (0.5, 0.7, 0.8, 0.9)  # shares of each phase after which the rate is halved
SEEDS, COPIES = (0, 1, 2), (1, 2)
PHASE1, BAYES, BOTH = READINGS = ("phase 1", "phase 1 + Bayes", "phases 1 + 2")
FIRST, LONGER, AVERAGE = "two paths", "two paths, twice the updates", "average of two"
SINGLE = {FIRST: "two_path_cnn", "local path": "local_path_cnn", "global path": "global_path_cnn"}
CASCADES = {"input cascade": "input", "input cascade, out-of-fold": "input", "local cascade": "local", "MF cascade": "output"}
BUILDERS = {"input": "input_cascade_cnn", "local": "local_cascade_cnn", "output": "mf_cascade_cnn"}
# Pixels of the first network's probabilities, before and behind, that the second network does not see, by where they come in.
RIM = {"input": (0, 0), "local": (4, 5), "output": (6, 6)}
MINUTES = {FIRST: 1.1, "local path": 0.8, "global path": 0.7, LONGER: 1.2, AVERAGE: 0.1, "input cascade": 1.5}
MINUTES |= {"input cascade, out-of-fold": 2.3, "local cascade": 1.2, "MF cascade": 1.2}
REGIONS = {"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}
RAGGED = ("tumour pieces", "class pieces", "borders / true")


class Second(Network):
    """The second network of a cascade, for cases that hold the first one's probabilities as their last channels.

    It has the numbers of `models.CascadeCNN`, but at the rim of the volume, where the probabilities are mirrored and not the image.
    """

    margin, spatial_dims = models.havaei.REACH, 2

    def __init__(self, second: Network):
        super().__init__(second.in_channels + second.classes, second.classes)
        self.second = second

    @property
    def output(self) -> torch.nn.Module:
        """The output layer. The second phase of training changes this layer only."""
        return self.second.output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        before, behind = RIM[self.second.joins]
        image, probabilities = x.split([self.second.in_channels, self.second.classes], dim=1)
        rows, columns = x.shape[2:]
        return self.second(image, probabilities[..., before : rows - behind, before : columns - behind])


# ---------------------------------------------------------------------------------------------------------- the brains


@cache
def cohort(count: int, first_seed: int) -> list[Case]:
    return [transforms.standardise(c) for c in phantoms.brain_cohort(count, first_seed=first_seed)]


@cache
def brains(part: str) -> list[Case]:
    """Return the brains to "test", every second slice of those to "train" on, or every fourth of those for "validation"."""
    if part == "test":
        return cohort(8, 100)
    return [thin(case, 2) for case in cohort(12, 0)] if part == "train" else [thin(case, 4) for case in cohort(2, 50)]


def thin(case: Case, step: int) -> Case:
    """Return every so many axial slices of a case. These networks see one slice at a time, so fewer of them cost less."""
    arrays = {name: np.ascontiguousarray(getattr(case, name)[..., ::step]) for name in ("image", "label", "mask")}
    return case.replace(extra={}, **arrays)


def hear(case: Case, probabilities: np.ndarray) -> Case:
    """Return a case with the probabilities of a network as further channels."""
    names = (f"class {k}" for k in range(len(probabilities)))
    image = np.concatenate([case.image, probabilities.astype(np.float32)])
    return case.replace(image=image, channels=(*case.channels, *names))


@cache
def weights_of_bayes(seed: int) -> np.ndarray:
    """Return how much more often each class occurs in the brain than in the segments of phase 1: Bayes' rule multiplies by it.

    A segment is centred on each class equally often. What lies beside the centre gives back some of the natural balance.
    """
    shares = []
    for scheme in ("uniform", "equal"):
        how = {"scheme": scheme, "output": SETTINGS["output"], "batch_size": 64, "spatial_dims": 2, "seed": seed}
        sampler = sampling.SegmentSampler(brains("train"), **how)
        counts = sum(np.bincount(np.asarray(sampler.batch(n)[1]).ravel(), minlength=5) for n in range(1, 41))
        shares.append(counts / counts.sum())
    return shares[0] / shares[1]


def by_bayes(p: np.ndarray, seed: int) -> np.ndarray:
    """Return the probabilities of phase 1 as they would be where the classes occur as often as in the brain."""
    p = p * weights_of_bayes(seed).reshape(-1, 1, 1, 1)
    return p / p.sum(axis=0)


# ------------------------------------------------------------------------------------------------------------ training


def train(
    store: Store, name: str, network: str | Network, cases: Sequence[Case], seed: int, *, validation=(), copy: int = 0, share=1
) -> dict:
    """Train a network in two phases. Return the network and the CPU seconds after each phase, the updates and the curve.

    A built network is trained in place: after both phases it is the same.

    Args:
        name: name of the folder of the training's states.
        network: name of a builder, or a built network.
        cases: labelled cases.
        seed: seed of the segments, and of the weights of a network that is built here.
        validation: labelled cases, whose Dice is noted three times in phase 1 and after phase 2.
        copy: number of a copy whose initial weights are changed by a millionth; 0 for none.
        share: factor of the numbers of updates.
    """
    steps, second = (max(2, round(share * SETTINGS[what])) for what in ("steps", "phase2_steps"))
    options = {what: SETTINGS[what] for what in ("batch_size", "output")}
    if isinstance(network, str):
        options |= {"width": SETTINGS["width"], "init": "he", "dropout": 0.0}
    engine = {"validate": training.validate_on(validation)} if validation else None
    found, cpu = {"updates": {PHASE1: steps, BOTH: steps + second}}, time.process_time()
    # The second call goes on where the first one stopped.
    for phase, updates, rate, number in ((PHASE1, 0, "rate", copy), (BOTH, second, "phase2_rate", 0)):
        model = recipes.havaei(
            cases,
            network=network,
            steps=steps,
            phase2_steps=updates,
            optimizer=partial(start_copy, torch.optim.Adam, number, lr=SETTINGS[rate]),
            halvings=HALVINGS,
            validate_every=max(1, steps // 3),
            engine=engine,
            folder=store.runs / name,
            seed=seed,
            device="cpu",
            progress=False,
            **options,
        )
        found[phase] = model, time.process_time() - cpu
    if validation:
        columns = ["phase", "step", "loss", *(f"dice_{region}" for region in REGIONS)]
        found["curve"] = model.history.dropna()[columns].to_dict("records")
    return found


def build_second(joins: str, first: Network, seed: int) -> Network:
    """Return an untrained cascade with the weights that the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return models.BUILDERS[BUILDERS[joins]](first=first, width=SETTINGS["width"], init="he", dropout=0.0)


@torch.no_grad()
def segment(model: Network, case: Case) -> np.ndarray:
    """Return the probabilities of a network: those of `inference.predict`, in less time, from the box of each slice's brain."""
    rim, model = model.margin, model.for_inference()
    image = np.pad(case.image, ((0, 0), (rim, rim), (rim, rim), (0, 0)), mode="reflect")
    found = np.zeros((5, *case.shape), np.float32)
    found[0] = 1
    for level in np.flatnonzero(case.mask.any(axis=(0, 1))):
        inside = np.argwhere(case.mask[..., level])
        (top, left), (bottom, right) = inside.min(axis=0), inside.max(axis=0) + 1
        patch = image[:, top : bottom + 2 * rim, left : right + 2 * rim, level]
        p = model(torch.from_numpy(np.ascontiguousarray(patch))[None]).softmax(dim=1)[0].numpy()
        found[:, top:bottom, left:right, level] = p
    found[:, ~case.mask] = np.eye(5, 1, dtype=np.float32)  # background
    return found


def ask(store: Store, name: str, model: Network | None, cases: Sequence[Case]) -> list[np.ndarray]:
    """Return the probabilities of a network in each case, from their file where it was asked before."""
    path = store.runs / f"{name}.npz"
    if not path.exists():
        answers = {case.name: segment(model, case) for case in cases}
        with paths.atomic_write(path) as temporary:
            np.savez_compressed(temporary, **{key: p.astype(np.float16) for key, p in answers.items()})
    with np.load(path) as stored:
        return [stored[case.name].astype(np.float32) for case in cases]


def heard(store: Store, name: str, model: Network, part: str) -> list[Case]:
    """Return the brains of a part with the probabilities of a first network."""
    cases = brains(part)
    return [hear(case, p) for case, p in zip(cases, ask(store, f"{name} {part}", model, cases))]


def heard_out_of_fold(store: Store, seed: int) -> tuple[list[Case], float]:
    """Return the brains to train on with probabilities of networks that have not seen them, and the networks' CPU seconds."""
    cases, found, spent = brains("train"), {}, 0.0
    for half in (0, 1):
        name = f"half {half} {seed}"
        model, seconds = train(store, name, SINGLE[FIRST], cases[half::2], seed)[BOTH]
        others = cases[1 - half :: 2]
        found |= {c.name: hear(c, p) for c, p in zip(others, ask(store, f"{name} others", model, others))}
        spent += seconds
    return [found[case.name] for case in cases], spent


# ------------------------------------------------------------------------------------------------------------ the rows


def score(p: np.ndarray, case: Case) -> dict[str, float]:
    """Return the scores of the probabilities of a case, in %, and how ragged their labels are."""
    label = p.argmax(0).astype(np.uint8)
    table = metrics.evaluate(label, case.label, metrics=["dice", "precision", "sensitivity"]).set_index("region")
    borders = [sum(metrics.count_borders(a, axis=axis, mask=case.mask) for axis in range(3)) for a in (label, case.label)]
    dice = {f"Dice {region}": 100 * value for region, value in table["dice"].items()}
    return {
        "case": case.name,
        "Dice": float(np.mean(list(dice.values()))),
        **dice,
        **{f"{what} {region}": 100 * table.loc[region, what] for what in ("precision", "sensitivity") for region in REGIONS},
        "false positives": 100 * (label[case.mask & (case.label == 0)] > 0).mean(),
        "expected / true volume": float((1 - p[0][case.mask]).sum() / (case.label > 0).sum()),
        "tumour pieces": ndimage.label(label > 0, np.ones((3, 3, 3)))[1],
        "class pieces": sum(ndimage.label(label == k)[1] for k in range(1, 5)),
        "borders / true": borders[0] / borders[1],
    }


def calibration_error(p: np.ndarray, case: Case) -> float:
    """Return the mean distance, in %, of ten bins of the tumour's probability from the share that is tumour."""
    said, true = 1 - p[0][case.mask], case.label[case.mask] > 0
    bins = np.digitize(said, np.linspace(0.1, 0.9, 9))
    return float(100 * np.abs(np.bincount(bins, said, 10) - np.bincount(bins, true, 10)).sum() / len(said))


def cost_of_first(store: Store, seed: int) -> pd.Series:
    """Return the CPU seconds, the updates and the parameters of the first network of a seed."""
    row = store.read("cascades").set_index(["network", "reading", "seed"]).loc[[(FIRST, BOTH, seed)]].iloc[0]
    return row[["cpu_seconds", "updates", "parameters"]]


def run_single(store: Store, name: str, seed: int) -> dict:
    """Train one network of one or two paths, and score it after each phase and with Bayes' rule in place of the second."""
    share = 2 if name == LONGER else 1
    builder = SINGLE.get(name, SINGLE[FIRST])
    trained = train(store, f"{name} {seed}", builder, brains("train"), seed, validation=brains("validation"), share=share)
    model = trained[BOTH][0]
    models.save(store.runs / f"{name} {seed}.safetensors", model, model.card)
    alive = store.examine(f"{name}, {seed}", model, brains("validation")).alive
    facts = {"parameters": sum(p.numel() for p in model.parameters()), "alive": alive} | provenance()
    readings = {BOTH: ask(store, f"{name} {seed} test", model, brains("test"))}
    if name != LONGER:
        readings[PHASE1] = ask(store, f"{name} {seed} phase 1 test", trained[PHASE1][0], brains("test"))
        readings[BAYES] = [by_bayes(p, seed) for p in readings[PHASE1]]
    rows = []
    for reading, found in readings.items():
        phase = BOTH if reading == BOTH else PHASE1
        cost = {"updates": trained["updates"][phase], "cpu_seconds": round(trained[phase][1], 1)}
        rows += [{"reading": reading} | score(p, case) | cost | facts for p, case in zip(found, brains("test"))]
    return {"cascades_curves": trained["curve"], "cascades": rows}


def run_average(store: Store, seed: int) -> list[dict]:
    """Score the mean of the probabilities of two first networks."""
    pair = seed, SEEDS[(SEEDS.index(seed) + 1) % len(SEEDS)]
    facts = {**sum(cost_of_first(store, s) for s in pair), "alive": True} | provenance()
    answers = zip(*(ask(store, f"{FIRST} {s} test", None, brains("test")) for s in pair))
    return [{"reading": BOTH} | score(sum(two) / 2, case) | facts for two, case in zip(answers, brains("test"))]


def run_cascade(store: Store, name: str, seed: int) -> dict:
    """Train the second network of a cascade on the probabilities of the first one of the same seed, and score it."""
    first, known = models.load(store.runs / f"{FIRST} {seed}.safetensors"), f"{FIRST} {seed}"
    seconds, updates, _ = cost_of_first(store, seed)
    if "out-of-fold" in name:
        cases, more = heard_out_of_fold(store, seed)
        seconds, updates = seconds + more, 3 * updates
    else:
        cases = heard(store, known, first, "train")
    cascade = build_second(CASCADES[name], first, seed)
    validation = heard(store, known, first, "validation")
    trained = train(store, f"{name} {seed}", Second(cascade.second), cases, seed, validation=validation)
    model, own = trained[BOTH]
    if (name, seed) == ("input cascade", 0):
        card = first.card | SETTINGS | {"network": BUILDERS["input"], "normalise": "standardise"}
        store.save("havaei_input_cascade", cascade, card)
    alive = store.examine(f"{name}, {seed}", model, validation).alive
    cost = {"updates": updates + trained["updates"][BOTH], "cpu_seconds": round(seconds + own, 1)}
    facts = cost | {"parameters": sum(p.numel() for p in cascade.parameters()), "alive": alive} | provenance()
    found = ask(store, f"{name} {seed} test", model, heard(store, known, first, "test"))
    rows = [{"reading": BOTH} | score(p, case) | facts for p, case in zip(found, brains("test"))]
    return {"cascades_curves": trained["curve"], "cascades": rows}


def run_copy(store: Store, copy: int) -> list[dict]:
    """Train the first network of the first seed from weights changed by a millionth, and score it."""
    trained = train(store, f"copy {copy}", SINGLE[FIRST], brains("train"), SEEDS[0], copy=copy)
    found = ask(store, f"copy {copy} test", trained[BOTH][0], brains("test"))
    return [score(p, case) | provenance() for p, case in zip(found, brains("test"))]


def run_reading(store: Store, reading: str, seed: int) -> list[dict]:
    """Score the first network's calibration after a phase, and its labels with and without the rule against flat pieces."""
    rows, name = [], f"{FIRST} {seed}{' phase 1' * (reading != BOTH)} test"
    for p, case in zip(ask(store, name, None, brains("test")), brains("test")):
        p, tumour = by_bayes(p, seed) if reading == BAYES else p, case.label > 0
        label = p.argmax(0).astype(np.uint8)
        cleaned = postprocess.remove_flat_components(label, case)
        gone = (label > 0) & (cleaned == 0)
        row = {"case": case.name, "calibration error": calibration_error(p, case)}
        row |= {
            "Dice whole": 100 * metrics.dice(label > 0, tumour),
            "Dice whole, cleaned": 100 * metrics.dice(cleaned > 0, tumour),
        }
        rows.append(row | {"removed": gone.sum(), "removed tumour": (gone & tumour).sum()})
    return rows


def run_baselines() -> list[dict]:
    regions = {f"dice_{region}": labels for region, labels in metrics.regions["brats2015"].items()}
    return baseline_rows(cohort(12, 0), cohort(12, 0), cohort(8, 100), regions)


def plan(store: Store, seeds) -> list[Row]:
    """Return the rows. Those that decide about cascades come first, and each group of rows seed by seed."""
    seeds, rows = seeds or SEEDS, []
    groups = ((FIRST,), (LONGER, "input cascade", "input cascade, out-of-fold", AVERAGE), ("local path", "global path"))
    for group in (*groups, ("local cascade", "MF cascade")):
        for seed in seeds:
            for name in group:
                run, part = (run_cascade, "cascades") if name in CASCADES else (run_single, "single")
                job = partial(run_average, store, seed) if name == AVERAGE else partial(run, store, name, seed)
                rows.append(Row("cascades", {"network": name, "seed": seed}, job, MINUTES[name], part=part))
    for copy in COPIES:
        rows.append(Row("cascades_noise", {"copy": copy}, partial(run_copy, store, copy), 0.9, "noise floor", extra=True))
    for seed in seeds:
        for reading in READINGS:
            key = {"reading": reading, "seed": seed}
            rows.append(Row("cascades_readings", key, partial(run_reading, store, reading, seed), 0.1, part="readings"))
    rows.append(baselines_row(store, "brains", run_baselines, 0.8))
    rows.append(vitals_row(store, "input cascade, 0", "havaei_input_cascade", lambda: cohort(12, 0)))
    return rows


# ------------------------------------------------------------------------------------------------------------ the page

CONTROLS = [("input cascade", FIRST), (LONGER, FIRST), (AVERAGE, FIRST), ("input cascade", AVERAGE)]
CONTROLS += [(name, LONGER) for name in CASCADES]
CONTROLS += [("input cascade, out-of-fold", "input cascade"), ("MF cascade", "input cascade")]
COMPARED = {  # pairs of a network and a reading, by question
    "Two phases": [((n, a), (n, b)) for n in SINGLE for a, b in ((BOTH, PHASE1), (BAYES, PHASE1), (BAYES, BOTH))],
    "Two paths": [((FIRST, reading), (name, reading)) for reading in (BOTH, BAYES) for name in list(SINGLE)[1:]],
    "More training, or a cascade": [((a, BOTH), (b, BOTH)) for a, b in CONTROLS],
}
COUNTED = ("Dice", "Dice whole", "Dice core", "Dice enhancing", "false positives", "expected / true volume", *RAGGED)


def scores(table: pd.DataFrame, network: str, reading: str, column: str) -> pd.DataFrame:
    """Return a score of each seed (rows) in each test brain (columns)."""
    mine = table[(table["network"] == network) & (table["reading"] == reading)]
    return mine.pivot(index="seed", columns="case", values=column)


def interval(found: pd.DataFrame, digits: int, sign: str = "") -> str:
    """Return a mean with its interval over seeds and brains, or without one where there are fewer than two seeds."""
    if len(found) < 2:
        return f"{found.to_numpy().mean():{sign}.{digits}f}" if len(found) else "–"
    w = statistics.two_way(found)
    return f"{w.mean:{sign}.{digits}f} ({w.low:{sign}.{digits}f} to {w.high:{sign}.{digits}f})"


def differences(table: pd.DataFrame, first: tuple, second: tuple) -> dict[str, str]:
    """Return the difference of two readings in each score. Networks of one seed have the same draws, so their runs are paired."""
    cells = {"first − second": " − ".join(f"{n}, {r}" for n, r in (first, second))}
    for column in COUNTED:
        a, b = (scores(table, *which, column) for which in (first, second))
        cells[column] = interval((a - b).dropna(), 2 if "/" in column else 1, "+")
    return cells


def report(store: Store) -> dict[str, str]:
    table, curves, noise = store.read("cascades"), store.read("cascades_curves"), store.read("cascades_noise")
    if table.empty:
        return {}
    readings = list(table[["network", "reading"]].drop_duplicates().itertuples(index=False, name=None))
    means = table.groupby(["network", "reading"], sort=False).mean(numeric_only=True)
    costs, details, ragged = [], [], []
    for which in readings:
        mean, start = means.loc[which], dict(zip(("network", "reading"), which))
        cost = {what: f"{mean[what]:.0f}" for what in ("parameters", "updates", "cpu_seconds")}
        dice = {column: interval(scores(table, *which, column), 1) for column in COUNTED[:4]}
        costs.append(start | {"seeds": len(scores(table, *which, "Dice"))} | cost | dice)
        columns = [f"{what} {region}" for what in ("precision", "sensitivity") for region in REGIONS]
        details.append(start | {c: mean[c] for c in (*columns, "false positives", "expected / true volume")})
        ragged.append(start | {c: interval(scores(table, *which, c), 2 if "/" in c else 1) for c in RAGGED})
    blocks = {"dice": markdown(pd.DataFrame(costs)), "ragged": markdown(pd.DataFrame(ragged))}
    blocks["details"] = markdown(pd.DataFrame(details), 1)
    compared = {question: pd.DataFrame([differences(table, *p) for p in pairs]) for question, pairs in COMPARED.items()}
    blocks["compared"] = "\n\n".join(f"### {question}\n\n{markdown(found)}" for question, found in compared.items())
    if not noise.empty and noise["copy"].nunique() > 1:
        runs = {c: (scores(table, FIRST, BOTH, c)[:1], noise.pivot(index="copy", columns="case", values=c)) for c in COUNTED}
        spread = {c: statistics.noise_floor(pd.concat(pair).to_numpy()) for c, pair in runs.items()}
        blocks["noise"] = markdown(pd.DataFrame([spread]), 2)
    if not curves.empty:
        blocks["curves"] = markdown(last_third(curves), 1)
    if not (more := store.read("cascades_readings")).empty:
        mean = more.groupby("reading", sort=False).mean(numeric_only=True).drop(columns="seed")
        blocks["readings"] = markdown(mean.reset_index(), 2)
    dice = means.xs(BOTH, level="reading").filter(regex="^Dice ").rename(columns=lambda c: c.replace("Dice ", "dice_")) / 100
    return blocks | beside_baselines(store, {"brains": dice}) | store.dead_networks()


def last_third(curves: pd.DataFrame) -> pd.DataFrame:
    """Return the validation Dice of each network over its training, mean of the seeds, and what the last third of phase 1 added."""
    rows, curves["Dice"] = [], 100 * curves[[f"dice_{region}" for region in REGIONS]].mean(axis=1)
    columns = ("network", "a third of phase 1", "two thirds", "end of phase 1", "end of phase 2", "gain in the last third")
    for network, mine in curves.groupby("network", sort=False):
        mean = mine.groupby(["phase", "step"])["Dice"].mean()
        first, second = mean.loc[1], mean.loc[2]
        rows.append(dict(zip(columns, (network, *first, second.iloc[-1], first.iloc[-1] - first.iloc[-2]))))
    return pd.DataFrame(rows)


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
