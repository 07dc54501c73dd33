"""Havaei's three cascades against the network they begin with: Dice, and how smooth the labels are.

    OMP_NUM_THREADS=1 python experiments/cascades.py [--runs runs/cascades]

Small networks (a fifth of the paper's feature maps), short runs in two phases, the same settings for all of them: the first
network, a second one with another seed for comparison, and the three cascades that begin with the first. Trained networks and
their segmentations are kept in --runs, so an interrupted benchmark goes on where it stopped; the input cascade there is the checkpoint
data/checkpoints/havaei_input_cascade.safetensors of notebook 02.

Writes data/results/cascades.csv (each network and held-out case), which notebook 02 reads, and experiments/cascades.md.
"""

import argparse
import platform
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage
from torch import nn

from medseg_lite import inference, metrics, models, paths, phantoms, recipes, transforms
from medseg_lite.volume import Case

HERE = Path(__file__).parent
SETTINGS = {"steps": 120, "phase2_steps": 60, "batch_size": 64, "width": 0.2, "init": "he", "learning_rate": 1e-3}
ROWS = {
    "two paths": ("two_path_cnn", 0),
    "two paths, another seed": ("two_path_cnn", 1),
    "input cascade": ("input_cascade_cnn", 0),
    "local cascade": ("local_cascade_cnn", 0),
    "MF cascade": ("mf_cascade_cnn", 0),
}


def trained(train: list[Case], network: str, seed: int, runs: Path) -> nn.Module:
    """A network, trained or taken from an earlier run."""
    path = runs / f"{network}_{seed}.safetensors"
    if not path.exists():
        first = runs / "two_path_cnn_0.safetensors" if "cascade" in network else None
        model = recipes.havaei(train, network=network, first=first, seed=seed, **SETTINGS)
        models.save(path, model, model.card | SETTINGS | {"normalise": "standardise", "date": str(date.today())})
    return models.load(path)


def borders(label: np.ndarray, mask: np.ndarray) -> int:
    """Pairs of voxels of the brain that share a face and differ in class."""
    pairs = 0
    for axis in range(3):
        a, b = (np.take(label, range(s, label.shape[axis] - 1 + s), axis) for s in (0, 1))
        inside = np.logical_and(*(np.take(mask, range(s, label.shape[axis] - 1 + s), axis) for s in (0, 1)))
        pairs += np.count_nonzero((a != b) & inside)
    return pairs


def segmented(network: str, seed: int, case: Case, train: list[Case], runs: Path) -> np.ndarray:
    """The labels of one case, from an earlier run where there was one."""
    path = runs / f"{network}_{seed}_{case.name}.npy"
    if not path.exists():
        label = inference.predict(trained(train, network, seed, runs), case, progress=False)
        with paths.atomic_write(path) as temporary:
            np.save(temporary, label)
    return np.load(path, allow_pickle=False)


def score(label: np.ndarray, case: Case) -> dict[str, float]:
    table = metrics.evaluate(label, case.label, metrics=["dice"]).set_index("region")["dice"]
    return {
        **{f"Dice {region}": 100 * dice for region, dice in table.items()},
        "false positives": 100 * (label[case.mask & (case.label == 0)] > 0).mean(),
        "tumour pieces": ndimage.label(label > 0, np.ones((3, 3, 3)))[1],
        "class pieces": sum(ndimage.label(label == k)[1] for k in range(1, 5)),
        "borders / true": borders(label, case.mask) / borders(case.label, case.mask),
    }


def markdown(frame: pd.DataFrame) -> list[str]:
    rows = [frame.columns, ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return ["| " + " | ".join(map(str, row)) + " |" for row in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=HERE.parent / "runs" / "cascades")
    options = parser.parse_args()
    train = [transforms.standardise(c) for c in phantoms.brain_cohort(12)]
    test = [transforms.standardise(c) for c in phantoms.brain_cohort(8, first_seed=100)]
    rows = []
    for name, (network, seed) in ROWS.items():
        for case in test:
            scores = score(segmented(network, seed, case, train, options.runs), case)
            rows.append({"network": name, "case": case.name, **{k: round(float(v), 3) for k, v in scores.items()}})
            print(rows[-1], flush=True)
    table = pd.DataFrame(rows)
    with paths.atomic_write(HERE.parent / "data" / "results" / "cascades.csv") as temporary:
        table.to_csv(temporary, index=False)

    def by_brain(what: str) -> pd.DataFrame:
        return table.pivot(index="network", columns="case", values=what).loc[list(ROWS)]

    lines = [
        "# Cascades",
        "",
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}. Havaei's networks with "
        f"{SETTINGS['width']:g} of the paper's feature maps, {SETTINGS['steps']} updates of phase 1 and {SETTINGS['phase2_steps']} of phase "
        f"2, {SETTINGS['batch_size']} patches each, trained on 12 generated brains with gliomas (2 mm, seeds 0 to 11). Means over 8 "
        "held-out ones (seeds 100 to 107). Dice in %; false positives in % of the healthy brain; tumour pieces: connected components "
        "of what is called tumour (there is one tumour a brain); class pieces: connected components of each tumour class, "
        "added up; borders: pairs of neighbouring voxels of different class, in units of the truth's.",
        "",
        *markdown(table.drop(columns="case").groupby("network", sort=False).mean().round(2).reset_index()),
        "",
        "Tumour pieces, brain by brain:",
        "",
        *markdown(by_brain("tumour pieces").astype(int).reset_index()),
        "",
        "Class pieces:",
        "",
        *markdown(by_brain("class pieces").astype(int).reset_index()),
        "",
        "Borders:",
        "",
        *markdown(by_brain("borders / true").round(2).reset_index()),
        "",
        "Repeat it: `OMP_NUM_THREADS=1 python experiments/cascades.py`",
    ]
    with paths.atomic_write(HERE / "cascades.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
