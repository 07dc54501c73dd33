"""Steps of a fixed length against steps as long as the gradient, on a network that learns within the run.

Claims (Mlynarski et al. 2019, section 2.4; no numbers): dividing the gradient by its length makes training stable and well
converging; one batch an update gives oscillations and a difficult convergence; the rate must fall, so that the training
converges.

The paper's 2D network with an eighth of its feature maps, glioma phantoms at 4 mm, all sequences, ten to train on (seeds 0 to
9), eight squares of slices a batch, 60 updates. Three methods: plain descent with momentum .9; the same with the loss divided
by the number of voxels of a batch, as the paper's equation 1 prints it; normalised steps with momentum .9. Four rates each, the
same for all. Two rates of the normalised method once more with a rate that falls to zero along a cosine, and one of them with 2
and 5 batches an update, at as many updates, so at 2 and 5 times the cost.

Metric: the loss, balanced cross-entropy with target weights .7, .1, .1, .1, and the recall of each class, on 16 batches of twelve
other persons (seeds 200 to 211). A run has learned if its loss is below that of the best constant answer by .2 at least and the
recall of no class is 0. Three seeds, of weights and squares. Nothing is chosen on these persons.

The table is data/results/normalised_steps.csv, which notebook 13 reads.
"""

import math
import time
from functools import cache, partial

import numpy as np
import torch
from _frame import Row, Store, main, markdown, provenance
from missing_sequences import person

from medseg_lite import baselines, losses, models, optimizers, vitals
from medseg_lite.models import Network
from medseg_lite.sampling import SegmentSampler

SETTINGS = {"updates": 60, "width": 0.125}
RATES, SEEDS, MARGIN = (0.01, 0.1, 1.0, 10.0), (0, 1, 2), 0.2
SQUARES = {"spatial_dims": 2, "output": 32, "batch_size": 8, "scheme": "foreground"}
VOXELS = SQUARES["batch_size"] * SQUARES["output"] ** 2
METHODS = ("plain", "plain, loss / V", "normalised")
FALLING = [("normalised", rate) for rate in (0.1, 1.0)]
SEVERAL = [("normalised", 0.1, batches) for batches in (2, 5)]
KEY = ("method", "rate", "schedule", "batches")

loss = partial(losses.balanced_cross_entropy, target_weights=(0.7, 0.1, 0.1, 0.1))


@cache
def judges() -> tuple[list, float]:
    """Return batches of other persons, and the loss of the best constant answer on them."""
    sampler = SegmentSampler([person(seed) for seed in range(200, 212)], seed=0, **SQUARES)
    batches = [sampler.batch(n) for n in range(16)]
    labels = torch.cat([label for _, label in batches])
    return batches, baselines.constant_loss(mean_over_batches, labels, 4, steps=50)


def mean_over_batches(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean loss of batches: in one without some class, that class has no share of the loss."""
    pairs = zip(logits.split(SQUARES["batch_size"]), labels.split(SQUARES["batch_size"]))
    return torch.stack([loss(*pair) for pair in pairs]).mean()


@torch.no_grad()
def judge(model: Network) -> dict:
    """Return the mean loss on the batches of other persons, and the mean and the lowest recall of a class."""
    values, right, of = [], np.zeros(4), np.zeros(4)
    for image, label in judges()[0]:
        logits = model(image)
        values.append(loss(logits, label).item())
        hit = label[logits.argmax(1) == label]
        right, of = (total + np.bincount(part.flatten(), minlength=4) for total, part in ((right, hit), (of, label)))
    return {"loss": np.mean(values), "mean_recall": np.mean(right / of), "lowest_recall": np.min(right / of)}


def make_optimizer(method: str, model: Network, rate: float) -> torch.optim.Optimizer:
    make = optimizers.NormalizedSGD if method == "normalised" else torch.optim.SGD
    return make(model.parameters(), lr=rate, momentum=0.9)


def train(method: str, rate: float, schedule: str, batches: int, seed: int) -> tuple[Network, list[float]]:
    """Train a network and return it with its losses. A run stops where its loss is not a number."""
    torch.manual_seed(seed)
    model, history = models.mlynarski_2d(classes=4, width=SETTINGS["width"]).train(), []
    sampler = SegmentSampler([person(s) for s in range(10)], seed=seed, **SQUARES)
    optimizer = make_optimizer(method, model, rate)
    scale = 1 / VOXELS if method == "plain, loss / V" else 1.0
    for update in range(SETTINGS["updates"]):
        if schedule == "falling":
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * update / SETTINGS["updates"])) / 2
        optimizer.zero_grad()
        values = []
        for n in range(batches):
            image, label = sampler.batch(update * batches + n)
            value = losses.deep_supervision(model.with_auxiliary(image), label, loss=loss)
            (scale * value).backward()
            values.append(value.item())
        history.append(float(np.mean(values)))
        if not math.isfinite(history[-1]):
            break
        optimizer.step()
    return model.eval(), history


def run(store: Store, method: str, rate: float, schedule: str, batches: int, seed: int) -> list[dict]:
    cpu = time.process_time()
    model, history = train(method, rate, schedule, batches, seed)
    spent = time.process_time() - cpu
    row = {"loss": math.inf, "constant": judges()[1], "mean_recall": 0.0, "lowest_recall": 0.0, "silent": None}
    if math.isfinite(history[-1]) and all(p.isfinite().all() for p in model.state_dict().values()):
        row |= judge(model) | {"silent": vitals.examine(model, [person(200)]).silent}
    row["learned"] = bool(row["loss"] < row["constant"] - MARGIN and row["lowest_recall"] > 0)
    return [row | {"training_loss": np.mean(history[-20:]), "cpu_seconds": round(spent, 1)} | provenance()]


def plan(store: Store, seeds) -> list[Row]:
    kinds = [(method, rate, "constant", 1) for rate in RATES for method in METHODS]
    kinds += [(method, rate, "falling", 1) for method, rate in FALLING]
    kinds += [(method, rate, "constant", batches) for method, rate, batches in SEVERAL]
    rows = []
    for seed in seeds or SEEDS:
        for kind in kinds:
            key = dict(zip(KEY, kind)) | {"seed": seed}
            rows.append(Row("normalised_steps", key, partial(run, store, *kind, seed), 0.07 * kind[-1], part="runs"))
    return rows


def report(store: Store) -> dict[str, str]:
    table = store.read("normalised_steps")
    if table.empty:
        return {}
    columns = ["loss", "constant", "mean_recall", "lowest_recall", "silent", "cpu_seconds"]
    groups = table.groupby(list(KEY), sort=False)
    means = groups[columns].mean()
    means.insert(0, "learned", [f"{mine.sum()} of {len(mine)}" for _, mine in groups["learned"]])
    means.insert(2, "loss of each seed", [" ".join(f"{v:.2f}" for v in mine) for _, mine in groups["loss"]])
    return {"runs": markdown(means.reset_index())}


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
