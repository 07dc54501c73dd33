"""Why does the plain deep network not train, and what do depth, He's start and batch normalisation bring in longer runs?

Claims (Kamnitsas et al. 2017, sections 2.3 and 3.3, figure 7, table B.1, appendix B): from N(0, 0.01) the plain network Deep calls
everything background (Dice 0.0 %); He's start lets it train; with batch normalisation, too, Shallow+ beats Shallow (61.7 against 60.2 %),
and Deep+ beats Shallow+ (64.9 against 61.7 %) in a similar time. The paper gives one run each, on 15 brain injuries.

1. "cause": Deep, 120 updates on the four gliomas of notebook 05, at a fifth of the feature maps and a constant rate. One thing is changed
   at a time: the start, batch normalisation, the constant epsilon inside RMSProp's root. Epsilon and batch normalisation are crossed with
   the start. Comparison: each row against the row "as in the paper". Signal, gradient and the size of the update are noted by layer.
2. "optimiser": the same with other optimisers, and without the penalties on the weights.
3. "longer": Shallow, Shallow+ and Deep+ on sixteen gliomas, with a rate that is halved four times. Comparisons: Shallow+ less Shallow,
   Deep+ less Shallow+.
4. "time": seconds of an update of Shallow+ and Deep+ with all feature maps.

Metric: mean Dice of the tumour in six test cases, three seeds, interval over both (`statistics.two_way`); the label is the likelier class,
or the tumour where its probability is above a threshold that is chosen on the validation cases, for each network. Cases to train on have
seeds from 0, for validation from 60, to test from 100. N(0, 0.01) becomes N(0, 0.01/√width), so that the number of inputs times the
variance of the weights, which is what counts, is the paper's.

The tables are data/results/deepmedic_start.csv, deepmedic_start_curves.csv, deepmedic_start_layers.csv and deepmedic_start_time.csv.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, baseline_rows, main, markdown, provenance, scan

from medseg_lite import inference, losses, metrics, models, optimizers, statistics, training, transforms
from medseg_lite.models import Network
from medseg_lite.models.layers import init_normal
from medseg_lite.sampling import SegmentSampler
from medseg_lite.volume import Case

SETTINGS = {"width": 0.2, "cause": 120, "longer": 200}  # share of the feature maps; updates
SEEDS = (0, 1, 2)
FIRST = {"train": 0, "validation": 60, "test": 100}  # seeds of the phantoms
COUNT = {"train": 16, "validation": 3, "test": 6}
FEW = 4  # cases to train on that the causes are looked for with
HALVINGS = (0.5, 0.7, 0.85, 0.95)
LOOKS = (1, 40, 120)  # updates at which signal, gradient and update are noted
PENALTIES = {"l1": 1e-6, "l2": 1e-4}  # of appendix B
PAPER, SMALLEST = "as in the paper", 1e-30

rmsprop = partial(optimizers.RMSpropNesterov, lr=1e-3)
exact = partial(rmsprop, eps=1e-16)
# For each row what differs from Deep with the paper's settings: the network and its options, the optimiser, the penalties.
CAUSES: dict[str, dict] = {
    PAPER: {},
    "epsilon 1e-16": {"optimizer": exact},
    "He": {"options": {"init": "he"}},
    "He, epsilon 1e-16": {"options": {"init": "he"}, "optimizer": exact},
    "batch normalisation": {"options": {"batch_norm": True}},
    "He, batch normalisation": {"options": {"batch_norm": True, "init": "he"}},
}
OPTIMISERS: dict[str, dict] = {
    "no penalties": {"penalties": 0},
    "no penalties, epsilon 1e-16": {"penalties": 0, "optimizer": exact},
    "PyTorch's RMSprop": {"optimizer": partial(torch.optim.RMSprop, lr=1e-3)},
    "Adam": {"optimizer": partial(torch.optim.Adam, lr=1e-3)},
    "SGD": {"optimizer": partial(torch.optim.SGD, lr=0.1, momentum=0.9)},
}
LONGER: dict[str, dict] = {
    "Deep+": {"network": "deep_plus"},
    "Shallow+": {"network": "shallow_plus"},
    "Shallow": {"network": "shallow"},
}
PARTS = {"cause": CAUSES, "longer": LONGER, "optimiser": OPTIMISERS}
MINUTES = {"cause": 0.2, "longer": 0.4, "optimiser": 0.2}
COMPARED = [("Shallow+", "Shallow"), ("Deep+", "Shallow+")]  # of the longer trainings


@cache
def cohort(part: str) -> list[Case]:
    """Return the standardised phantoms with one binary label of "train", "validation" or "test"."""
    cases = [transforms.standardise(scan(FIRST[part] + n)) for n in range(COUNT[part])]
    return [case.replace(label=(case.label > 0).astype(np.uint8)) for case in cases]


def build(network: str, seed: int, width: float, **options) -> Network:
    """Return an untrained network; the plain ones have the paper's start unless told otherwise."""
    torch.manual_seed(seed)
    model = getattr(models, network)(in_channels=4, classes=2, width=width, **options)
    if network in ("shallow", "deep") and "init" not in options:
        init_normal(model, std=0.01 / width**0.5)
    return model


@torch.enable_grad()
def look(model: Network, batch) -> dict[str, list[float]]:
    """Return root mean squares in each layer: signal, and gradient of the loss by it, by the kernels and by the biases; the kernels.

    The gradient of the penalties by the kernels is there, too, to compare with.
    """
    model, found = copy.deepcopy(model).train(), []  # a copy, because batch normalisation remembers what it sees

    def note(module, inputs, output):
        output.retain_grad()
        found.append(output)

    for block in model.normal:
        block.conv.register_forward_hook(note)
    losses.cross_entropy(model(batch.inputs), batch.label).backward()
    kernels, biases = kernels_and_biases(model)
    parts = {"signal": found, "gradient": [z.grad for z in found], "kernel_gradient": [w.grad for w in kernels]}
    parts |= {"bias_gradient": [b.grad for b in biases], "kernels": kernels}
    parts["penalty_gradient"] = [PENALTIES["l1"] * w.sign() + 2 * PENALTIES["l2"] * w for w in kernels]
    return {name: [rms(t) for t in tensors] for name, tensors in parts.items()}


def kernels_and_biases(model: Network) -> tuple[list, list]:
    """Return the kernel of each layer, and its bias, which is that of the batch normalisation where there is one."""
    return [b.conv.weight for b in model.normal], [(b.norm if hasattr(b, "norm") else b.conv).bias for b in model.normal]


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.detach().double().square().mean().sqrt())


class Watch:
    """Notes signal, gradient and the size of the update in each layer, at the updates of `LOOKS`.

    Args:
        model: network before its training.
        batch: segments on which signal and gradient are measured.
    """

    def __init__(self, model: Network, batch):
        self.model, self.batch, self.rows = model, batch, []
        self.first, self.before = look(model, batch), copy.deepcopy(kernels_and_biases(model))

    def __call__(self, row: dict) -> None:
        """Take note of an update; of the first, with signal and gradient before it."""
        before, self.before = self.before, copy.deepcopy(kernels_and_biases(self.model))
        if row["step"] not in LOOKS:
            return
        found = self.first if row["step"] == 1 else look(self.model, self.batch)
        for name, old, new in zip(("kernel_update", "bias_update"), before, self.before):
            found = found | {name: [rms(b - a) for a, b in zip(old, new)]}
        for layer in range(len(self.model.normal)):  # tables keep four decimals, so logarithms are stored
            logs = {f"log10_{name}": np.log10(max(values[layer], SMALLEST)) for name, values in found.items()}
            self.rows.append({"step": row["step"], "layer": layer + 1} | logs)


def probabilities(model: Network, cases: Sequence[Case]) -> list[np.ndarray]:
    """Return the probability of tumour at the voxels of each case's mask."""
    return [inference.predict(model, c, output="probabilities", progress=False)[1][c.mask] for c in cases]


def validate(model: Network) -> dict[str, float]:
    cases = cohort("validation")
    return {"dice": np.mean([metrics.dice(p > 0.5, c.label[c.mask] > 0) for p, c in zip(probabilities(model, cases), cases)])}


def run(store: Store, part: str, variant: str, seed: int) -> dict:
    """Train a network, watch it, and score it on the test cases."""
    about, cause = PARTS[part][variant], part in ("cause", "optimiser")
    model = build(about.get("network", "deep"), seed, SETTINGS["width"], **about.get("options", {}))
    cases, steps = cohort("train")[: FEW if cause else None], SETTINGS["cause" if cause else "longer"]
    sampler = SegmentSampler(cases, output=9, margin=model.margin, cut=model.cut, seed=seed)
    optimizer = about.get("optimizer", rmsprop)(model.parameters())
    halvings = [] if cause else [round(share * steps) for share in HALVINGS]
    watch, cpu = Watch(model, sampler.batch(0)), time.process_time()
    history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        **{name: strength * about.get("penalties", 1) for name, strength in PENALTIES.items()},
        schedule=optimizers.HalveAt(optimizer, steps=halvings),
        validate=validate,
        validate_every=steps // (3 if cause else 5),
        on_update=watch if cause else None,
        seed=seed,
        progress=False,
    )
    cpu = time.process_time() - cpu
    signs = store.examine(f"{part}, {variant}, {seed}", model, cohort("validation")[:1])
    truths = [c.label[c.mask] > 0 for c in cohort("validation")]
    threshold = metrics.best_threshold(probabilities(model, cohort("validation")), truths)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "updates": steps,
        "cpu_seconds": round(cpu, 1),
        "threshold": threshold,
        "alive": signs.alive,
    } | provenance()
    scores, test = [], cohort("test")
    for case, p in zip(test, probabilities(model, test)):
        truth, found = case.label[case.mask] > 0, p > 0.5
        counts = {"found_voxels": int(found.sum()), "true_voxels": int(truth.sum())}
        chosen = metrics.dice(p > threshold, truth)
        scores.append({"case": case.name, "dice": metrics.dice(found, truth), "dice_chosen": chosen} | counts | facts)
    history["loss"] = history["loss"].rolling(10, min_periods=1).mean()
    curve = history.dropna(subset="dice")[["step", "loss", "dice"]].to_dict("records")
    tables = {"deepmedic_start_curves": curve, "deepmedic_start": scores}
    return tables | ({"deepmedic_start_layers": watch.rows} if cause else {})


def run_baselines() -> list[dict]:
    """Score the methods without learning, with thresholds from the same validation cases."""
    rows = baseline_rows(*(cohort(part) for part in ("train", "validation", "test")), {"dice_chosen": [1]})
    return [row | {"dice": row["dice_chosen"], "variant": row.pop("method")} | provenance() for row in rows]


def run_time(updates: int = 4) -> list[dict]:
    """Time updates of both networks at the paper's width, by turns, and keep the quickest: other work only adds to it."""
    seconds: dict[str, list] = {"shallow_plus": [], "deep_plus": []}
    for name, found in seconds.items():
        model = build(name, 0, 1.0).train()
        sampler, optimizer = SegmentSampler(cohort("train")[:1], output=9, margin=model.margin), rmsprop(model.parameters())
        for step in range(updates + 1):
            batch, start = sampler.batch(step), (time.process_time(), time.perf_counter())
            loss = losses.cross_entropy(model(batch.inputs), batch.label) + losses.weight_penalty(model, **PENALTIES)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append((time.process_time() - start[0], time.perf_counter() - start[1]))
    quickest = {name: np.min(found[1:], axis=0) for name, found in seconds.items()}  # the first update warms up
    return [{"network": name, "cpu_seconds": cpu, "seconds": clock} | provenance() for name, (cpu, clock) in quickest.items()]


def plan(store: Store, seeds) -> list[Row]:
    def networks(part: str) -> list[Row]:
        keys = [{"part": part, "variant": variant, "seed": seed} for seed in seeds or SEEDS for variant in PARTS[part]]
        return [Row("deepmedic_start", key, partial(run, store, **key), MINUTES[part]) for key in keys]

    # All methods without learning are made at once. "nothing" is the first of them.
    baselines = Row("deepmedic_start", {"part": "baseline", "variant": "nothing", "seed": None}, run_baselines, 0.3)
    times = [Row("deepmedic_start_time", {"repeat": n}, run_time, 0.1, part="time") for n in range(3)]
    first, last = ([row for part in parts for row in networks(part)] for parts in (list(PARTS)[:2], list(PARTS)[2:]))
    return [*first, baselines, *times, *last]


# ----------------------------------------------------------------------------------------------------------- the page


def pivot(table: pd.DataFrame, column: str) -> np.ndarray:
    """Return scores `(runs, cases)` of one row."""
    return table.fillna({"seed": -1}).pivot(index="seed", columns="case", values=column).to_numpy()


def interval(table: pd.DataFrame, column: str) -> str:
    """Return the mean with its interval over seeds and cases; over cases alone for a method without seeds."""
    scores = pivot(table, column)
    if len(scores) == 1 and table["seed"].notna().all():
        return "–"  # one seed so far
    found = statistics.two_way(np.repeat(scores, 2, axis=0) if len(scores) == 1 else scores)
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def summarise(scores: pd.DataFrame, curves: pd.DataFrame, part: str) -> pd.DataFrame:
    """Return the table of a part: a line for each row, with its curve."""
    cells = []
    for variant, rows in scores[scores["part"] == part].groupby("variant", sort=False):
        cell = {"row": variant, "seeds": rows["seed"].nunique()}
        cell |= {"Dice": interval(rows, "dice"), "Dice, chosen threshold": interval(rows, "dice_chosen")}
        mine = curves[(curves["part"] == part) & (curves["variant"] == variant)]
        for step, looked in mine.groupby("step"):
            cell[f"validation Dice at {step}"] = f"{looked['dice'].mean():.3f}"
        if len(mine):
            last = mine[mine["step"] == mine["step"].max()]
            cell |= {"loss": f"{last['loss'].mean():.3f}", "alive": f"{rows.groupby('seed')['alive'].first().sum():.0f}"}
            cell |= {"parameters": f"{rows['parameters'].iloc[0]:.0f}", "CPU s": f"{rows['cpu_seconds'].mean():.0f}"}
        cells.append(cell)
    return pd.DataFrame(cells)


def describe_layers(layers: pd.DataFrame) -> pd.DataFrame:
    """Return root mean squares in the first and in the last layer, mean over seeds of the logarithm."""
    ends = layers[layers["layer"].isin([layers["layer"].min(), layers["layer"].max()])]
    table = ends.groupby(["variant", "step", "layer"], sort=False).mean(numeric_only=True).drop(columns="seed")
    return (10**table).map("{:.1e}".format).rename(columns=lambda name: name.removeprefix("log10_")).reset_index()


def compare(scores: pd.DataFrame) -> str:
    """Return a line for each comparison: the difference in Dice at the chosen thresholds, with its interval."""
    pairs = [(p, variant, "cause", PAPER) for p in ("cause", "optimiser") for variant in PARTS[p] if variant != PAPER]
    pairs.append(("cause", "He, batch normalisation", "cause", "He"))
    pairs += [("longer", a, "longer", b) for a, b in COMPARED]
    lines = []
    for part_a, a, part_b, b in pairs:
        tables = [scores[(scores["part"] == p) & (scores["variant"] == v)] for p, v in ((part_a, a), (part_b, b))]
        if min(t["seed"].nunique() for t in tables) > 1:
            column = "dice" if part_b == "cause" else "dice_chosen"
            lines.append(f"* {part_a}: {a} − {b}, {statistics.two_way(*(pivot(t, column) for t in tables))}")
    return "\n".join(lines)


def report(store: Store) -> dict[str, str]:
    scores, curves, layers, times = (store.read(f"deepmedic_start{name}") for name in ("", "_curves", "_layers", "_time"))
    if scores.empty or curves.empty or layers.empty:
        return {}
    parts = [part for part in (*PARTS, "baseline") if part in set(scores["part"])]
    blocks = {part: markdown(summarise(scores, curves, part).fillna("–")) for part in parts}
    blocks |= {"layers": markdown(describe_layers(layers)), "compare": compare(scores)}
    if not times.empty:
        blocks["time"] = markdown(times.groupby("network")[["cpu_seconds", "seconds"]].min().reset_index(), digits=2)
    return blocks


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
