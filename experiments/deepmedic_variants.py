"""Small changes of DeepMedic's second pathway, on a puzzle that needs it.

Questions, asked before the runs. Kamnitsas et al. 2017 take every third voxel for the second pathway and repeat its features three
times along each axis (section 2.4). They say that pooling would lose a voxel's exact position and cost accuracy, and that repetition is
enough (section 2.4, appendix A). They give no numbers.

* Does the low resolution alone, which is what a network with pooling would keep, lose accuracy? The whole network must have the
  higher Dice, with intervals apart.
* Do interpolated features bring more than repeated ones? Repetition is enough if the interval of the gain ends below .03.
* Does the mean of 27 voxels serve better than one of them? The same margin.

The task is the ring (`phantoms.puzzles`) where two scales are needed, with the networks, cases and settings of `puzzles.py`. Metric: mean
Dice of both classes. Eight test cases, three seeds, intervals over both. All variants have the same start, cases and updates.
"""

from functools import partial

import pandas as pd
import torch
from _frame import Row, Store, main, markdown, provenance
from puzzles import HALF, HIDDEN, PUZZLES, SEEDS, cohort, dice, interval, last_third, train
from torch.nn import functional as F

from medseg_lite import inference, statistics
from medseg_lite.models.deepmedic import DeepMedic

SETTINGS = {"steps": 180}  # updates
MARGIN = 0.03  # a gain in Dice below this is none


class Unfolded(DeepMedic):
    """DeepMedic without the arrangement for fast inference, which knows the original alone."""

    def for_inference(self):
        return self


class Averaged(Unfolded):
    """The second pathway sees the mean of 3³ voxels, not the one in their middle."""

    def cut(self, patch):
        normal, _ = super().cut(patch)
        sides = [n - n % 3 for n in patch.shape[-3:]]
        blocks = patch[(..., *(slice(n) for n in sides))].reshape(*patch.shape[:-3], *(k for n in sides for k in (n // 3, 3)))
        return normal, blocks.mean((-1, -3, -5))


class Interpolated(Unfolded):
    """The features of the second pathway are interpolated linearly between their places, not repeated."""

    def forward(self, x):
        normal, low = self.cut(x) if isinstance(x, torch.Tensor) else x
        context = F.interpolate(self.low(low), scale_factor=3, mode="trilinear", align_corners=False)
        return self.classifier(self.drop(self.hidden(torch.cat([self.normal(normal), context], dim=1))))


class LowAlone(Unfolded):
    """The features of the first pathway are set to zero: what is left knows a voxel's place to three voxels."""

    def forward(self, x):
        _, low = self.cut(x) if isinstance(x, torch.Tensor) else x
        context = F.interpolate(self.low(low), scale_factor=3, mode="nearest")
        return self.classifier(self.drop(self.hidden(torch.cat([torch.zeros_like(context), context], dim=1))))


VARIANTS = {
    "as in the paper": Unfolded,
    "averaged input": Averaged,
    "interpolated features": Interpolated,
    "low resolution alone": LowAlone,
}


def run(store: Store, variant: str, seed: int) -> dict:
    """Train and score a variant."""
    about = PUZZLES["ring"]
    cases, validation, test = (cohort("ring", part, about["ends"][0]) for part in ("train", "validation", "test"))
    torch.manual_seed(seed)
    model = VARIANTS[variant](1, about["classes"], widths=HALF, hidden=HIDDEN, dropout=0.0)
    model = train("ring", "DeepMedic", cases, validation, seed=seed, network=model, steps=SETTINGS["steps"])
    signs = store.examine(f"{variant}, {seed}", model, validation)
    facts = {"alive": signs.alive} | provenance()
    scores = [{"case": c.name} | dice(inference.predict(model, c, progress=False), c, about["scored"]) | facts for c in test]
    curve = model.history.dropna()[["step", "loss", "dice"]].to_dict("records")
    return {"deepmedic_variants_curves": curve, "deepmedic_variants": scores}


def plan(store: Store, seeds) -> list[Row]:
    keys = [{"variant": variant, "seed": seed} for seed in seeds or SEEDS for variant in VARIANTS]
    return [Row("deepmedic_variants", key, partial(run, store, **key), 0.2, part="networks") for key in keys]


def report(store: Store) -> dict[str, str]:
    scores, curves = store.read("deepmedic_variants"), store.read("deepmedic_variants_curves")
    if scores.empty or curves.empty or scores.groupby("variant")["seed"].nunique().reindex(VARIANTS, fill_value=0).min() < 2:
        return {}
    tables = {v: rows.pivot(index="seed", columns="case", values="dice") for v, rows in scores.groupby("variant", sort=False)}
    rows = []
    for variant, rows_of in scores.groupby("variant", sort=False):
        found = interval(rows_of)
        less = statistics.two_way((tables[variant] - tables["as in the paper"]).dropna())
        shown = "" if variant == "as in the paper" else f"{less.mean:+.3f} ({less.low:+.3f} to {less.high:+.3f})"
        gained = f"{last_third(curves[curves['variant'] == variant]):+.2f}"
        rows.append([variant, f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})", shown, gained])
    return {"table": markdown(pd.DataFrame(rows, columns=["variant", "Dice", "less the paper's", "gain in the last third"]))}


if __name__ == "__main__":
    main(__file__, plan, report, SETTINGS)
