"""The CRF as a layer of a network: are its parameters better learned than searched, one set for all classes or one for each?

Claims (Kamnitsas et al. 2017, section 5): trained end to end as a layer, a CRF would need no search for its parameters; parameters of
each class would be possible, and harder to configure. The paper gives no number.

Metric: Dice of whole tumour, core and enhancing tumour, and their mean, over the four slices of each test patient. A small 2D network
that sees 3x3 pixels is trained on four axial slices of each of 12 generated gliomas (seeds 0 to 11, 2 mm), three seeds. What comes after it
has the same slices: a search (15 draws, judged by the mean Dice on every second slice) with one weight for each kernel, and with a
factor for each class besides; and gradient descent (40 updates) on these factors, on the weights and all 25 compatibilities, and
(30 updates more) on the network as well. Controls: a 5x5 matrix on the logits, which hears no neighbours, with three times as many
updates; and the network alone with the updates and the loss of the end-to-end training. Curves are those of four validation patients
(seeds 60 to 63); nothing is chosen by them. 8 test patients, seeds 100 to 107.

All networks, searches and controls of a seed are made together. The tables are data/results/crf_layer.csv, crf_layer_curves.csv and
crf_layer_matrix.csv (the learned compatibilities). Notebook 07 reads them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial

import numpy as np
import pandas as pd
import torch
from _frame import Row, Store, main, markdown
from torch import Tensor, nn
from torch.func import functional_call

from medseg_lite import crf, metrics, phantoms, statistics, transforms

SETTINGS = {"share": 1.0}  # of the updates and of the draws, for a quick trial
SEEDS = (0, 1, 2)
PARTS = {"train": (12, 0), "validation": (4, 60), "test": (8, 100)}  # patients, and the first one's seed
SLICES = 4  # of each patient
REGIONS = {name: torch.tensor(sorted(classes)) for name, classes in metrics.regions["brats2015"].items()}
NAMES = ("healthy", "necrosis", "oedema", "non-enhancing", "enhancing")
SEEN = [0, 2]  # FLAIR and T1c, which tell the classes apart
SPACE = crf.SPACE | {"intensity_sigma": (0.2, 1.0)}  # in two dimensions a narrower one hears next to nobody
FACTORS = (1 / 3, 3.0)  # of the classes' own weights
OFF_DIAGONAL = 1 - torch.eye(len(NAMES))

Batch = Sequence[Tensor]


def count(number: int) -> int:
    return max(2, round(number * SETTINGS["share"]))


@cache
def slices(part: str) -> Batch:
    """Return axial slices through each tumour: images (B, 4, D, H), labels and masks (B, D, H), those of a patient side by side."""
    patients, first = PARTS[part]
    chosen = []
    for case in map(transforms.standardise, phantoms.brain_cohort(patients, first_seed=first)):
        area = (case.label > 0).sum(axis=(0, 1))
        good = np.flatnonzero(area > area.max() / 4)
        for k in good[np.linspace(0, len(good) - 1, SLICES).astype(int)]:
            chosen.append((case.image[:, :, :, k], case.label[:, :, k].astype(np.int64), case.mask[:, :, k]))
    return [torch.from_numpy(np.stack(arrays)) for arrays in zip(*chosen)]


def loss(logits: Tensor, label: Tensor, mask: Tensor, *, with_dice: bool = True) -> Tensor:
    """Return the cross-entropy, and beside it the mean of the regions' soft Dice losses, since all are judged by Dice."""
    result = nn.functional.cross_entropy(logits.movedim(1, -1)[mask], label[mask])
    if not with_dice:
        return result
    probability = logits.softmax(1) * mask[:, None]
    for classes in REGIONS.values():
        q, truth = probability[:, classes].sum(1), torch.isin(label, classes)
        result = result + (1 - 2 * (q * truth).sum() / (q.sum() + truth.sum() + 1)) / len(REGIONS)
    return result


def dice(logits: Tensor, part: str, *, every: int = 1) -> list[dict[str, float]]:
    """Return the Dice of each region for each patient, over the patient's slices, or over every second one and so on."""
    found = logits.detach().argmax(1)
    _, label, mask = (x[::every] for x in slices(part))
    patients = range(0, len(found), SLICES // every)
    return [
        {
            name: metrics.dice(*(torch.isin(x[i : i + SLICES // every], classes) for x in (found * mask, label * mask)))
            for name, classes in REGIONS.items()
        }
        for i in patients
    ]


def mean_dice(scores: Iterable[dict[str, float]]) -> float:
    return float(np.mean([list(one.values()) for one in scores]))


class Layer:
    """A CRF over the slices of all parts, whose kernels are prepared once.

    Args:
        sigmas, weights: options of `DenseCRF`.
        matrix: function that returns the compatibilities `(5, 5)`, or None for those of the CRF itself.
    """

    def __init__(self, sigmas: dict, weights: dict, *, matrix: Callable[[], Tensor] | None = None):
        self.crf, self.matrix = crf.DenseCRF(**sigmas, **weights, classes=len(NAMES)), matrix
        self._prepared: dict[str, list] = {}

    def prepared(self, part: str) -> list:
        if part not in self._prepared:
            images, _, masks = slices(part)
            self._prepared[part] = [self.crf.prepare(image[SEEN], mask) for image, mask in zip(images, masks)]
        return self._prepared[part]

    def share_kernels(self, other: Layer) -> Layer:
        """Take over the kernels of a layer with the same sigmas."""
        self._prepared = other._prepared
        return self

    def __call__(self, logits: Tensor, part: str, index: Tensor) -> Tensor:
        images, _, masks = slices(part)
        own = {} if self.matrix is None else {"compatibility": self.matrix()}
        prepared = [self.prepared(part)[i] for i in index]
        return functional_call(self.crf, own, (logits, images[index][:, SEEN], masks[index]), {"prepared": prepared})


Predict = Callable[[str, Tensor], Tensor]  # logits of some slices of a part


def everything(predict: Predict, part: str) -> Tensor:
    with torch.no_grad():
        return predict(part, torch.arange(len(slices(part)[0])))


def fit(parameters: Iterable, predict: Predict, *, steps: int, rate: float, seed: int, with_dice: bool = True) -> list[dict]:
    """Train on batches of eight slices with a rate that rises and falls to zero; return the validation curve, five points."""
    steps, parameters = count(steps), list(parameters)
    optimizer = torch.optim.Adam(parameters, rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    generator, curve = torch.Generator().manual_seed(seed), []
    _, labels, masks = slices("train")
    for step in range(1, steps + 1):
        index = torch.randint(len(labels), (8,), generator=generator)
        value = loss(predict("train", index), labels[index], masks[index], with_dice=with_dice)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 5) == 0:
            validation = mean_dice(dice(everything(predict, "validation"), "validation"))
            curve.append({"step": step, "loss": float(value.detach()), "dice": validation})
    return curve


def draw(rng: np.random.Generator, kind: str) -> dict[str, float]:
    return {name: float(np.exp(rng.uniform(*np.log(SPACE[name])))) for name in SPACE if kind in name}


def search(logits: Tensor, seed: int, *, by_class: bool) -> tuple[float, Layer, dict, dict]:
    """Return the best of 15 draws: its Dice on every second training slice, its layer, its sigmas and its weights.

    Args:
        by_class: whether a factor for each class is drawn as well. It multiplies what other labels pay beside this class.
    """
    rng, other = np.random.default_rng([seed, 0]), np.random.default_rng([seed, 1])  # the same sigmas and weights for both
    index, best = torch.arange(0, len(logits), 2), None
    for _ in range(count(5)):
        sigmas, kernels = draw(rng, "sigma"), None
        for _ in range(3):
            weights, factors = draw(rng, "weight"), torch.ones(len(NAMES))
            if by_class:
                factors = torch.tensor(np.exp(other.uniform(*np.log(FACTORS), len(NAMES))), dtype=torch.float32)
            layer = Layer(sigmas, weights, matrix=partial(torch.mul, OFF_DIAGONAL, factors))
            kernels = kernels or layer
            with torch.no_grad():
                found = layer.share_kernels(kernels)(logits[index], "train", index)
            value = mean_dice(dice(found, "train", every=2))
            if best is None or value > best[0]:
                best = value, layer, sigmas, weights
    return best


def run(seed: int) -> dict:
    """Train a network of this seed, and all that comes after it."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Conv2d(4, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 1), nn.ReLU(), nn.Conv2d(24, 5, 1))

    def of(model: nn.Module) -> Predict:
        return lambda part, index: model(slices(part)[0][index])

    curves = {"network": fit(network.parameters(), of(network), steps=200, rate=0.03, seed=seed, with_dice=False)}
    logits = {part: everything(of(network), part) for part in PARTS}
    promised, predictions = {}, {"network alone": of(network)}

    def after(layer: Layer) -> Predict:
        return lambda part, index: layer(logits[part][index], part, index)

    promised["searched"], searched, sigmas, weights = search(logits["train"], seed, by_class=False)
    promised["searched, by class"], by_class, *_ = search(logits["train"], seed, by_class=True)
    predictions |= {"searched": after(searched), "searched, by class": after(by_class)}

    factors = nn.Parameter(torch.ones(len(NAMES)))
    layer = Layer(sigmas, weights, matrix=lambda: OFF_DIAGONAL * factors).share_kernels(searched)
    parameters = [layer.crf.smoothness_weight, layer.crf.appearance_weight, factors]
    curves["learned, by class"] = fit(parameters, after(layer), steps=40, rate=0.1, seed=seed)
    predictions["learned, by class"] = after(layer)

    learned = Layer(sigmas, weights).share_kernels(searched)
    curves["learned"] = fit(learned.crf.parameters(), after(learned), steps=40, rate=0.1, seed=seed)
    matrix = learned.crf.compatibility.detach().clone()
    predictions["learned"] = after(copy.deepcopy(learned).share_kernels(searched))

    recalibrate = nn.Conv2d(5, 5, 1)
    nn.init.eye_(recalibrate.weight[:, :, 0, 0])
    nn.init.zeros_(recalibrate.bias)
    predictions["no neighbours"] = lambda part, index: recalibrate(logits[part][index])
    curves["no neighbours"] = fit(recalibrate.parameters(), predictions["no neighbours"], steps=120, rate=0.05, seed=seed)

    more = copy.deepcopy(network)
    curves["network, more updates"] = fit(more.parameters(), of(more), steps=30, rate=5e-3, seed=seed + 100)
    predictions["network, more updates"] = of(more)

    whole = copy.deepcopy(network)
    together = [*whole.parameters(), *learned.crf.parameters()]
    predictions["end to end"] = lambda part, index: learned(whole(slices(part)[0][index]), part, index)
    curves["end to end"] = fit(together, predictions["end to end"], steps=30, rate=5e-3, seed=seed + 100)

    scores = [
        {"method": method, "patient": PARTS["test"][1] + i, "promised": promised.get(method)} | found
        for method, predict in predictions.items()
        for i, found in enumerate(dice(everything(predict, "test"), "test"))
    ]
    cells = [
        {"label": label, "neighbour": neighbour, "value": float(matrix[i, j])}
        for i, label in enumerate(NAMES)
        for j, neighbour in enumerate(NAMES)
    ]
    points = [{"method": method} | point for method, curve in curves.items() for point in curve]
    return {"crf_layer_curves": points, "crf_layer_matrix": cells, "crf_layer": scores}


def plan(store: Store, seeds) -> list[Row]:
    return [Row("crf_layer", {"seed": seed}, partial(run, seed), 0.6) for seed in seeds or SEEDS]


def report(store: Store) -> dict[str, str]:
    scores, curves = store.read("crf_layer"), store.read("crf_layer_curves")
    if scores.empty:
        return {}
    scores["mean"] = scores[list(REGIONS)].mean(axis=1)
    # Where a patient has no enhancing tumour, its Dice is 1 for nothing and 0 for a single voxel.
    empty = scores.groupby("patient")["enhancing"].agg(lambda values: values.isin([0, 1]).all())
    most = scores[~scores["patient"].map(empty)]

    def table(rows: pd.DataFrame, method: str) -> np.ndarray:
        return 100 * rows[rows["method"] == method].pivot(index="seed", columns="patient", values="mean").to_numpy()

    cells, lines = [], []
    for method in scores["method"].unique():
        mine, end = scores[scores["method"] == method], curves[curves["method"] == method].groupby("step")["dice"].mean()
        late = 100 * (end.iloc[-1] - end.iloc[-2]) if len(end) > 1 else np.nan
        cells.append({"method": method} | (100 * mine[[*REGIONS, "mean"]].mean()).to_dict())
        cells[-1] |= {
            "mean without empty": table(most, method).mean(),
            "mean where it was searched": 100 * mine["promised"].mean(),
        }
        cells[-1] |= {"gain in the last fifth, validation": late}
        if method != "searched" and scores["seed"].nunique() > 1:
            both = [statistics.two_way(table(rows, method) - table(rows, "searched")) for rows in (scores, most)]
            lines.append(f"* {method} − searched: {both[0]}; without empty {both[1]}")
    return {"scores": markdown(pd.DataFrame(cells), 1) + "\n\n" + "\n".join(lines)}


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
