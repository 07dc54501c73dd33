"""Estimated minutes and memory of the notebooks on two GPUs, from operations that are counted. No GPU is used.

    python benchmarks/gpu_notebooks.py [--notebooks 02 08] [--keep FILE]

Each notebook runs at the GPU scale on a pretended GPU (tests/fake_device.py), with two updates a training and zeros from convolutions.
A kernel takes as long as its operations or its bytes do, whichever is longer. The GPU takes the time of all kernels, or that of
starting them. An update of a training is counted twice and multiplied up, and so is a validation. The rest is counted as it is.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pandas as pd
from _measure import fill, markdown, options, run_alone

from medseg_lite import devices, training

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
import fake_device
import test_notebooks_gpu as notebooks

UPDATES = 2  # of each training
SCALED = {path.name[:2]: path for path in notebooks.SCALED}


@dataclass(frozen=True)
class Card:
    """Assumed speeds of a GPU and of the machine around it.

    Attributes:
        rates: operations a second of convolutions and products, by number type and dimensions.
        bandwidth: bytes a second of its memory.
        launch: seconds to start a kernel.
        host: seconds that its machine needs for a CPU second of this one.
    """

    rates: dict[tuple[str, int], float]
    bandwidth: float
    launch: float
    host: float


CARDS = {
    "T4": Card({("float32", 2): 4e12, ("float32", 3): 3e12, ("half", 2): 12e12, ("half", 3): 12e12}, 250e9, 15e-6, 1.5),
    "A100": Card({("float32", 2): 25e12, ("float32", 3): 12e12, ("half", 2): 60e12, ("half", 3): 60e12}, 1.2e12, 10e-6, 1.0),
}


@dataclass(frozen=True)
class Work:
    """Seconds of a card's kernels, kernels started, and CPU seconds of this machine for all else."""

    gpu: float = 0.0
    launches: float = 0.0
    cpu: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.gpu + other.gpu, self.launches + other.launches, self.cpu + other.cpu)

    def __mul__(self, factor: float) -> Work:
        return Work(self.gpu * factor, self.launches * factor, self.cpu * factor)

    def __sub__(self, other: Work) -> Work:
        return self + other * -1

    def seconds(self, card: Card) -> float:
        """Return the seconds that the work takes with a card."""
        return max(self.gpu, self.launches * card.launch) + self.cpu * card.host


class Meter:
    """Counts the work of a notebook on the pretended GPU, training by training.

    Attributes:
        trainings: work of an update, updates, work of a validation, and validations, of each training.
        inside: work that the trainings took here, with their few updates.
    """

    def __init__(self, card: Card):
        self.card = card
        self.kernels, self.pretending = Work(), 0.0
        self.trainings: list[tuple[Work, int, Work, int]] = []
        self.inside = Work()

    def now(self) -> Work:
        """Return the work until now."""
        return self.kernels + Work(cpu=time.process_time() - self.pretending)

    @contextmanager
    def counting(self):
        """Count within the block."""
        run, count, fit = fake_device.run, fake_device.count_work, training.fit
        with (
            mock.patch.object(fake_device, "run", lambda *given: self._run(run, *given)),
            mock.patch.object(fake_device, "count_work", lambda *given: self._count(count, *given)),
            mock.patch.object(training, "fit", lambda *given, **how: self._fit(fit, *given, **how)),
        ):
            yield

    def _run(self, run: Callable, *given):
        """Run one operation. Where it is the GPU's, its CPU seconds are not the notebook's."""
        before, start = self.kernels, time.process_time()
        try:
            return run(*given)
        finally:
            if self.kernels is not before:
                self.pretending += time.process_time() - start

    def _count(self, count: Callable, gpu, func, args, kwargs, inputs, result) -> None:
        launches, read, flops = gpu.launches.total(), gpu.bytes.total(), dict(gpu.flops)
        count(gpu, func, args, kwargs, inputs, result)
        dims = 3 if any(t.ndim == 5 for t in inputs) else 2
        done = {kind: number - flops.get(kind, 0) for kind, number in gpu.flops.items()}
        slowest = self.card.rates["float32", dims]
        operations = sum(number / self.card.rates.get((kind, dims), slowest) for kind, number in done.items())
        moved = (gpu.bytes.total() - read) / self.card.bandwidth
        self.kernels += Work(max(operations, moved), gpu.launches.total() - launches)

    def _fit(self, fit: Callable, model, sampler, *, steps: int, validate=None, validate_every: int = 100, **how):
        """Train for a few updates, and note what an update and a validation take."""
        begin = self.now()
        for step in range(UPDATES):
            sampler.batch(step)
        batch = (self.now() - begin).cpu / UPDATES * how.get("accumulate", 1)
        spent: list[Work] = []

        def measured(network):
            start = self.now()
            scores = validate(network)
            spent.append(self.now() - start)
            return scores

        trained = self.now()
        watched = {"validate": measured if validate else None, "validate_every": validate_every}
        history = fit(model, sampler, steps=steps, **watched, **how)
        validations = sum(spent, Work())
        update = (self.now() - trained - validations) * (1 / UPDATES)
        # A batch takes the CPU's time. All else that the CPU does for an update is to start kernels.
        update = Work(update.gpu, update.launches, batch)
        each = validations * (1 / max(len(spent), 1))
        self.trainings.append((update, steps, each, -(-steps // validate_every) if validate else 0))
        self.inside += self.now() - begin
        return history

    def total(self, whole: Work) -> float:
        """Return the seconds of a notebook, whose work here was `whole`."""
        found = (whole - self.inside).seconds(self.card)
        for update, steps, validation, times in self.trainings:
            found += update.seconds(self.card) * steps + validation.seconds(self.card) * times
        return found


def measure(number: str, name: str) -> None:
    """Print what one notebook takes with one card, as JSON."""
    meter = Meter(CARDS[name])
    with (
        fake_device.cuda(name, compute=False) as gpu,
        mock.patch.object(devices, "fault_of", lambda device: None),
        notebooks.lenient(),
        meter.counting(),
    ):
        begin = meter.now()
        notebooks.run(SCALED[number])
        whole = meter.now() - begin
    updates = [update.seconds(meter.card) for update, *_ in meter.trainings if update.launches]
    found = {"seconds": meter.total(whole), "slowest": max(updates, default=0.0), "gpu": gpu.peak}
    found["cpu"] = (whole - meter.inside).cpu
    found["memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(found))


def tabulate(results: dict[str, dict]) -> pd.DataFrame:
    """Return the table of all notebooks that were measured."""
    rows = []
    for number, cards in results.items():
        if set(cards) != set(CARDS):
            continue
        slowest, most = cards["T4"]["slowest"], max(found["memory"] for found in cards.values())
        rows.append(
            {
                "notebook": SCALED[number].stem,
                "T4 minutes": f"{cards['T4']['seconds'] / 60:.1f}",
                "A100 minutes": f"{cards['A100']['seconds'] / 60:.1f}",
                "peak GPU GB": f"{max(found['gpu'] for found in cards.values()) / 1e9:.1f}",
                "peak main memory GB": f"{most / 1e9:.1f}",
                "updates a second on a T4": f"{1 / slowest:.0f}" if slowest else "–",
            }
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--notebooks", nargs="+", choices=SCALED, default=list(SCALED))
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add to the results in this JSON file")
    parser.add_argument("--one", nargs=2, metavar=("NOTEBOOK", "CARD"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return measure(*given.one)
    results: dict[str, dict] = {}
    if given.keep and given.keep.exists():
        results = json.loads(given.keep.read_text("utf-8"))
    environment = {"MEDSEG_SCALE": "gpu", "MEDSEG_STEPS": str(UPDATES), "OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}
    for number in given.notebooks:
        for name in CARDS:
            found = run_alone([__file__, "--one", number, name], environment)
            results.setdefault(number, {})[name] = found
            print(number, name, found, flush=True)
            if given.keep:
                given.keep.write_text(json.dumps(results), "utf-8")
    results = dict(sorted(results.items()))
    fill(__file__, given.results, ". All figures are estimates; no GPU was used", {"notebooks": markdown(tabulate(results))})


if __name__ == "__main__":
    main()
