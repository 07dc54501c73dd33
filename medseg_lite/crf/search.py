"""Random search for the CRF's parameters on held-out cases by their Dice, as the paper configures its CRF."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from ..arrays import as_array, as_image, as_tensor
from ..devices import find_device
from ..metrics import dice
from ..paths import atomic_write
from ..plain import make_plain
from ..statistics import TTest, paired_t_test
from ..volume import Case
from .dense import CLIP, DenseCRF, log_inside
from .kernels import Prepared, take_voxels

# Ranges of the parameters, drawn uniformly in the logarithm. Sigmas are in voxels and in standard deviations of intensity.
SPACE = {
    "smoothness_weight": (0.3, 10.0),
    "smoothness_sigma": (0.5, 4.0),
    "appearance_weight": (0.3, 10.0),
    "appearance_sigma": (2.0, 20.0),
    "intensity_sigma": (0.05, 1.0),
}
_WEIGHTS = ("smoothness_weight", "appearance_weight")


@dataclass(frozen=True)
class Search:
    """The result of `search`.

    Attributes:
        table: table with one row per trial: its parameters, the mean `dice` over the cases, its `gain` over no CRF, and the `p`
            of a two-sided paired t-test between the two.
        scores: Dice of every trial (row) and case (column).
        baseline: Dice of every case without the CRF.
    """

    table: pd.DataFrame
    scores: pd.DataFrame
    baseline: pd.Series

    @property
    def best(self) -> dict[str, float]:
        """The parameters of the trial with the highest mean Dice, for `DenseCRF(**best)`."""
        row = self.table.loc[self.table["dice"].idxmax()]
        return {name: float(row[name]) for name in self.table.columns if name not in ("dice", "gain", "p")}

    def test(self, trial: int | None = None, **options) -> TTest:
        """Compare one trial, by default the best, with no CRF; `options` are those of `statistics.paired_t_test`."""
        trial = int(self.table["dice"].idxmax()) if trial is None else trial
        return paired_t_test(self.scores.loc[trial], self.baseline, **options)


def search(
    cases: Sequence[Case],
    probabilities: Sequence[np.ndarray],
    *,
    trials: int = 60,
    weights_per_lattice: int = 4,
    space: Mapping[str, tuple[float, float]] = SPACE,
    seed: int = 0,
    folder: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    **fixed,
) -> Search:
    """Try random parameters and score each set by the mean Dice of the foreground over the cases.

    The kernels depend only on the sigmas, so each draw of sigmas serves several draws of weights. What no searched parameter
    changes is computed once for each case. With more than two classes the paper's recipe for tumours is searched
    (`whole_tumour`), and the foreground is the whole tumour.

    Args:
        cases: labelled cases that the network was not trained on.
        probabilities: the network's class probabilities for each case, `(K, D, H, W)`.
        trials: number of parameter sets. A search with more trials begins with the same ones.
        weights_per_lattice: number of draws of weights that share one draw of sigmas.
        space: range of each parameter that is searched. Values are drawn uniformly in their logarithm.
        seed: seed of the draws.
        folder: where finished trials are stored. The same call on the same data resumes from there.
        device: where the CRFs compute. On the CPU as many trials run side by side as PyTorch has threads; the results do not
            depend on how many that are.
        progress: whether to show a bar.
        **fixed: parameters of `DenseCRF` that are not searched, such as `iterations` or `units`.

    Source: Kamnitsas et al. 2017, sections 4.1.2, 4.2.2 and 4.3.2 (random search; the ranges are ours).
    Taught in notebook 07.
    """
    _check(cases, probabilities, trials, weights_per_lattice, space, fixed)
    device = find_device(str(device))
    trials, weights_per_lattice, seed = int(trials), int(weights_per_lattice), int(seed)
    names = [case.name for case in cases]
    base_scores = [_dice(as_array(p).argmax(0) > 0, case) for case, p in zip(cases, probabilities)]
    question = {
        "cases": names,
        "inputs": [_checksum(c.image, c.mask, c.label, c.voxel_size, as_array(p)) for c, p in zip(cases, probabilities)],
        "space": {k: list(map(float, v)) for k, v in space.items()},
        "seed": seed,
        "weights_per_lattice": weights_per_lattice,
        "fixed": {k: repr(make_plain(v, k)) for k, v in sorted(fixed.items())},
    }
    question = make_plain(question, "question")
    file = None if folder is None else _file_for(question, Path(folder))
    done = {} if file is None else _load(file)
    drawn = [_draw(space, seed, t, weights_per_lattice) for t in range(trials)]
    groups = [
        [t for t in range(g, min(g + weights_per_lattice, trials)) if t not in done]
        for g in range(0, trials, weights_per_lattice)
    ]
    groups = [group for group in groups if group]
    problems = [_Problem(case, p, device) for case, p in zip(cases, probabilities)] if groups else []

    def score(job: tuple[list[int], _Problem]) -> list[float]:
        group, problem = job
        return problem.score([DenseCRF(**drawn[t], **fixed, learn=()).to(device) for t in group])

    bar = tqdm(total=trials, initial=sum(t in done for t in range(trials)), desc="CRF search", disable=not progress)
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    results = _side_by_side(score, [(group, problem) for group in groups for problem in problems], threads)
    for group in groups:
        by_case = [next(results) for _ in problems]
        done |= dict(zip(group, map(list, zip(*by_case))))
        if file is not None:
            _store(file, question | {"dice": done})
        bar.update(len(group))
    results.close()
    bar.close()

    scores = pd.DataFrame([done[t] for t in range(trials)], columns=names)
    baseline = pd.Series(base_scores, index=names, name="no CRF")
    table = pd.DataFrame(drawn)
    table["dice"] = scores.mean(axis=1)
    table["gain"] = table["dice"] - baseline.mean()
    table["p"] = [paired_t_test(row, base_scores).p if len(cases) > 1 else np.nan for row in scores.to_numpy()]
    table.index.name = scores.index.name = "trial"
    return Search(table, scores, baseline)


class _Problem:
    """One case of the search: what all trials on it share."""

    def __init__(self, case: Case, probabilities: np.ndarray, device: torch.device) -> None:
        p = as_image(probabilities, "probabilities")
        self._foreground = p.argmax(0) > 0
        self._truth, self._spacing = case.label > 0, case.spacing
        mask = None if case.mask is None else as_tensor(case.mask)
        self._voxels = take_voxels(as_tensor(case.image).to(device), mask)
        # With several classes tumour against background is refined, as `whole_tumour` does.
        p = p if len(p) == 2 else np.stack([p[0], 1 - p[0]])
        self._log_p = log_inside(as_tensor(p), self._voxels, CLIP)
        self._index = self._voxels.index.cpu().numpy()
        self._last: Prepared | None = None

    def score(self, crfs: Sequence[DenseCRF]) -> list[float]:
        """Return the Dice of several CRFs that have the same sigmas and so share a lattice."""
        prepared = crfs[0].prepare_voxels(self._voxels, spacing=self._spacing if crfs[0].units == "mm" else None)
        if self._last is not None:
            prepared.take_kernels(self._last)
        scores = []
        for crf in crfs:
            with torch.no_grad():
                refined = crf.mean_field(self._log_p, prepared)
            found = self._foreground.copy()
            found.reshape(-1)[self._index] = (refined[1] > refined[0]).cpu().numpy()
            scores.append(float(dice(found, self._truth)))
        self._last = prepared
        return scores


def _side_by_side(function: Callable, jobs: Sequence, threads: int) -> Iterator:
    """Yield the results of a function of each job, in their order; several jobs run at a time, with one thread for each."""
    before = torch.get_num_threads()
    # Threads that PyTorch meets for the first time take this number. It is 1 for a single job too: sums depend on it a little.
    torch.set_num_threads(1)
    pool = ThreadPoolExecutor(threads) if threads > 1 else None
    try:
        yield from map(function, jobs) if pool is None else pool.map(function, jobs)
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)


def _file_for(question: Mapping, folder: Path) -> Path:
    digest = hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"crf_search_{digest}.json"


def _load(file: Path) -> dict[int, list[float]]:
    """Return the stored Dice of every case in each finished trial."""
    return {int(t): s for t, s in json.loads(file.read_text("utf-8"))["dice"].items()} if file.exists() else {}


def _store(file: Path, content: Mapping) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(content), "utf-8")


def _draw(space: Mapping, seed: int, trial: int, weights_per_lattice: int) -> dict[str, float]:
    shared = np.random.default_rng([seed, 0, trial // weights_per_lattice])
    own = np.random.default_rng([seed, 1, trial])
    return {
        name: float(np.exp((own if name in _WEIGHTS else shared).uniform(np.log(low), np.log(high))))
        for name, (low, high) in space.items()
    }


def _checksum(*arrays: np.ndarray | None) -> int:
    total = 0
    for array in arrays:
        total = zlib.crc32(np.ascontiguousarray(() if array is None else array), total)
    return total


def _dice(foreground: np.ndarray, case: Case) -> float:
    return float(dice(foreground, case.label > 0))


def _check(cases, probabilities, trials, weights_per_lattice, space, fixed) -> None:
    if not cases or len(cases) != len(probabilities):
        raise ValueError(f"{len(cases)} cases and {len(probabilities)} probability maps; expected one map for each case")
    for case, p in zip(cases, probabilities):
        if case.label is None:
            raise ValueError(f"{case.name} has no label; the search needs the truth")
        if np.shape(p)[1:] != case.shape or len(p) < 2:
            raise ValueError(f"probabilities of {case.name} have shape {np.shape(p)}; expected (classes, *{case.shape})")
    if len(set(case.name for case in cases)) < len(cases):
        raise ValueError("two cases share one name; give each its own")
    if trials < 1 or weights_per_lattice < 1:
        raise ValueError(f"trials={trials}, weights_per_lattice={weights_per_lattice}; both must be at least 1")
    for name, limits in space.items():
        if name not in SPACE:
            raise ValueError(f"space has {name!r}; what can be searched is {', '.join(SPACE)}")
        low, high = limits
        if not 0 < low <= high:
            raise ValueError(f"space[{name!r}]={limits}; expected 0 < low <= high")
    if twice := sorted(set(space) & set(fixed)):
        raise ValueError(f"{', '.join(twice)} cannot be both searched and fixed")
