"""What Finzel's survey proposes for DeepMedic: a cascade of two of them, and training in two phases, against plain DeepMedic.

    OMP_NUM_THREADS=1 python experiments/deepmedic_future_work.py [--updates 500] [--seeds 3] [--width .2]

All are trained on the same phantoms and scored on the same held-out ones. In all, each makes the same number of updates, but for
the two that are only the first part of another, "half as long" and "equal classes":

    plain                 DeepMedic's recipe: half of the segments centred on tumour, half on healthy brain
    half as long          the same with half of the updates, the first network of the cascade
    cascade               then a second DeepMedic, which sees the first one's class probabilities as further channels
    equal classes         three quarters of the updates with every class equally often in the middle of a segment
    equal, then natural   then a quarter for the classifier alone, on segments from anywhere in the brain
    plain, then natural   the same second phase after three quarters of DeepMedic's own recipe

Writes data/results/deepmedic_future_work.csv (means over the held-out cases, for each seed and variant), which notebook 02 reads,
and experiments/deepmedic_future_work.md.
"""

import argparse
import platform
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import Tensor, nn

from medseg_lite import inference, metrics, optimizers, paths, phantoms, recipes, training, transforms
from medseg_lite.sampling import SegmentSampler
from medseg_lite.volume import Case

HERE = Path(__file__).parent
HALVINGS = (0.6, 0.8, 0.9)
BATCH = 5  # half of the paper's, for twice the updates in the same time


class LastLayer(nn.Module):
    """A trained DeepMedic of which only the classifier (and the dropout before it) is still in training."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> nn.Module:
        """Training mode for the last layer; batch normalisation keeps the statistics it has."""
        super().train(mode)
        self.model.eval()
        self.model.drop.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def natural_phase(model: nn.Module, cases: list[Case], *, updates: int, seed: int) -> nn.Module:
    """Train the classifier alone on segments from anywhere in the brain, starting at the first rate again."""
    sampler = SegmentSampler(
        cases, output=9, margin=model.margin, cut=model.cut, batch_size=BATCH, scheme="uniform", seed=seed + 1000
    )
    optimizer = optimizers.RMSpropNesterov(model.classifier.parameters())
    halve = optimizers.HalveAt(optimizer, steps=[round(f * updates) for f in HALVINGS])
    for p in model.parameters():
        p.requires_grad_(False)
    for p in model.classifier.parameters():
        p.requires_grad_(True)
    training.fit(
        LastLayer(model),
        sampler,
        steps=updates,
        optimizer=optimizer,
        l1=1e-6,
        l2=1e-4,
        schedule=halve,
        seed=seed,
        progress=False,
    )
    return model.eval()


def with_scores(first: nn.Module, case: Case) -> Case:
    """The case with the first network's class probabilities as further channels."""
    scores = inference.predict(first, case, output="probabilities", progress=False)
    names = tuple(f"class {k}" for k in range(len(scores)))
    return case.replace(image=np.concatenate([case.image, scores]), channels=(*case.channels, *names))


def score(model: nn.Module, case: Case) -> dict[str, float]:
    """Dice of the regions (%), and for the whole tumour: what is called so by mistake, in how many pieces, how surely."""
    probabilities = inference.predict(model, case, output="probabilities", progress=False)
    label = probabilities.argmax(0).astype(np.uint8)
    table = metrics.evaluate(label, case.label, metrics=["dice", "precision", "sensitivity"]).set_index("region")
    tumour, healthy = label > 0, case.mask & (case.label == 0)
    expected = 1 - probabilities[0][case.mask]
    return {
        **{f"Dice {region}": 100 * table.loc[region, "dice"] for region in table.index},
        "precision": 100 * table.loc["whole", "precision"],
        "sensitivity": 100 * table.loc["whole", "sensitivity"],
        "false positives": 100 * tumour[healthy].mean(),
        "pieces": ndimage.label(tumour, np.ones((3, 3, 3)))[1],
        "expected / true volume": expected.sum() / np.count_nonzero(case.label),
    }


def variants(train: list[Case], test: list[Case], *, updates: int, width: float, seed: int) -> Iterator:
    """Name, network and test cases of each variant, one after the other."""
    options = {"width": width, "halvings": HALVINGS, "batch_size": BATCH, "progress": False}
    half, most = updates // 2, updates * 3 // 4
    yield "plain", recipes.deepmedic(train, steps=updates, seed=seed, **options), test

    first = recipes.deepmedic(train, steps=half, seed=seed, **options)
    yield "half as long", first, test
    seen = [with_scores(first, c) for c in train]
    second = recipes.deepmedic(seen, steps=updates - half, seed=seed + 500, **options)
    yield "cascade", second, [with_scores(first, c) for c in test]

    model = recipes.deepmedic(train, steps=most, seed=seed, scheme="equal", **options)
    yield "equal classes", model, test
    yield "equal, then natural", natural_phase(model, train, updates=updates - most, seed=seed), test

    model = recipes.deepmedic(train, steps=most, seed=seed, **options)
    yield "plain, then natural", natural_phase(model, train, updates=updates - most, seed=seed), test


def markdown(frame: pd.DataFrame) -> list[str]:
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--width", type=float, default=0.2)
    options = parser.parse_args()
    train = [transforms.standardise(c) for c in phantoms.brain_cohort(12)]
    test = [transforms.standardise(c) for c in phantoms.brain_cohort(8, first_seed=100)]
    began, rows = time.process_time(), []
    for seed in range(options.seeds):
        runs = variants(train, test, updates=options.updates, width=options.width, seed=seed)
        for name, model, cases in runs:
            scores = pd.DataFrame([score(model, c) for c in cases]).mean()
            rows.append({"variant": name, "seed": seed, **scores.round(3).to_dict()})
            print(rows[-1], f"{time.process_time() - began:.0f} CPU s", flush=True)
    minutes = (time.process_time() - began) / 60
    table = pd.DataFrame(rows)
    with paths.atomic_write(HERE.parent / "data" / "results" / "deepmedic_future_work.csv") as temporary:
        table.to_csv(temporary, index=False)

    by = table.drop(columns="seed").groupby("variant", sort=False)
    text = by.mean().round(2).astype(str) + " ± " + by.std().round(2).astype(str)
    lines = [
        "# A cascade of two DeepMedics, and DeepMedic trained in two phases",
        "",
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}, "
        f"{minutes:.0f} CPU minutes. {options.width:g} of the paper's feature maps; {options.updates} updates of {BATCH} segments of 25³ in all "
        f"(*half as long*: a half, *equal classes*: three quarters); rate 1e-3, halved at 60, 80 and 90 % of each part. 12 generated "
        "brains with gliomas to train on (2 mm, seeds 0 to 11), 8 held out (seeds 100 to 107). Means over the held-out cases, ± the "
        f"standard deviation over {options.seeds} seeds of the training. Dice, precision and sensitivity in %; false positives in % of the "
        "healthy brain; pieces: connected components called tumour (there is one tumour a brain); expected volume: the "
        "sum of the tumour probabilities over the true volume, 1 where they are calibrated on average.",
        "",
        "Short runs of narrow networks: they show what changes, not what is best after 70,000 updates. An enhancing Dice of 12.5 is that "
        "of finding nothing: one of the eight brains has no enhancing tumour, which counts as 100.",
        "",
        *markdown(text.reset_index()),
        "",
        "Repeat it: `OMP_NUM_THREADS=1 python experiments/deepmedic_future_work.py`",
    ]
    with paths.atomic_write(HERE / "deepmedic_future_work.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
