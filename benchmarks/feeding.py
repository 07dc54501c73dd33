"""Batches a second that one CPU thread makes, against those that a GPU trains on: for each paper's recipe at the paper's size.

    OMP_NUM_THREADS=1 python benchmarks/feeding.py [--only deepmedic "havaei 128×33²"]

Every recipe is called as a reader calls it, up to its first update. So network, sampler and augmentation are the recipe's own. Batches
are made and timed (time of the processor, not of the clock). The work of an update is counted on tensors without numbers, operation
by operation, and turned into the time of a GPU by the assumptions on the page. Where there is a CUDA GPU, batches are also made
there, and timed by the clock.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before NumPy and PyTorch are loaded

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options, take_turns
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from medseg_lite import recipes, training
from medseg_lite.volume import Case


@dataclass(frozen=True)
class Gpu:
    """A GPU as it is assumed to be.

    Attributes:
        name: name in the tables, with the number type of the training.
        rates: floating-point operations a second in 2D and in 3D.
        bandwidth: bytes a second of its memory.
        number: bytes of a number.
        launches: least seconds of a batch, because the CPU has to start all kernels.
    """

    name: str
    rates: dict[int, float]
    bandwidth: float
    number: int
    launches: float


GPUS = (
    Gpu("T4, float32", {2: 4e12, 3: 3e12}, 0.25e12, 4, 0.010),
    Gpu("A100, float32", {2: 25e12, 3: 12e12}, 1.2e12, 4, 0.008),
    Gpu("A100, bfloat16", {2: 60e12, 3: 60e12}, 1.2e12, 2, 0.008),
)
BRAIN, SLICES = (240, 240, 155), (512, 512, 30)
MADE = 12  # batches that are timed, of which about a third are rotated in Kayalibay's recipe
WHOLE, REST, HERE = "CPU thread", "CPU thread, no augmentation", "the GPU here, augmentation"


def make_cases(shape: tuple, channels: int, classes: int) -> list[Case]:
    """Return two cases of noise with an ellipsoid as mask and a block of each class, of which only the size matters."""
    cases, grid = [], np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij", sparse=True)
    mask = sum(g**2 for g in grid) < 0.8 if channels > 1 else None
    for seed in range(2):
        rng, label = np.random.default_rng(seed), np.zeros(shape, np.uint8)
        for c in range(1, classes):
            corner = [n // 3 + 5 * c for n in shape[:2]]
            label[corner[0] : corner[0] + 30, corner[1] : corner[1] + 30, shape[2] // 3 : shape[2] // 3 + 12] = c
        image = rng.standard_normal((channels, *shape), dtype=np.float32)
        cases.append(Case(image, tuple(f"sequence {n}" for n in range(channels)), name=f"case{seed}", label=label, mask=mask))
    return cases


PROSTATE = {"batch_size": 24, "shear": 0.1, "angle": 10.0}
RECIPES: dict[str, tuple[Callable, dict, tuple]] = {
    "deepmedic 10×25³": (recipes.deepmedic, {}, (BRAIN, 4, 5)),
    "deepmedic 250 slices of 25²": (recipes.deepmedic, {"network": "dm2d_seg"}, (BRAIN, 4, 5)),
    "deepmedic 540 patches": (recipes.deepmedic, {"network": "dm2d_patch"}, (BRAIN, 4, 5)),
    "havaei 128×33²": (recipes.havaei, {}, (BRAIN, 4, 5)),
    "kayalibay 160×144×128": (recipes.kayalibay, {"crop": (160, 144, 128)}, (BRAIN, 4, 5)),
    "kayalibay 240×240×160": (recipes.kayalibay, {}, (BRAIN, 4, 5)),
    "drozdzal 8×256²": (recipes.drozdzal, {"classes": 1}, (SLICES, 1, 2)),
    "drozdzal 24×256²": (recipes.drozdzal, {"classes": 1, **PROSTATE}, (SLICES, 1, 2)),
    "mlynarski 4×192²": (recipes.mlynarski, {}, (BRAIN, 4, 4)),
    "mlynarski 1×70³": (recipes.mlynarski, {"network": "mlynarski_3d"}, (BRAIN, 4, 4)),
}


class Reached(Exception):
    """The recipe has come to its first update."""


def prepare(recipe: Callable, settings: dict, cases: list, device: str = "cpu") -> tuple:
    """Return the network, the sampler and the way through the network that a recipe trains with."""
    found = []

    def fit(model, sampler, *, forward=None, **how):
        found.append((model, sampler, forward or model))
        raise Reached

    with mock.patch.object(training, "fit", fit):
        try:
            recipe(cases, steps=1, device=device, progress=False, **settings)
        except Reached:
            return found[0]
    raise RuntimeError(f"{recipe.__name__} made no update")


class Work(TorchDispatchMode):
    """Notes the floating-point operations and the numbers read and written of every operation that starts a kernel."""

    def __init__(self):
        super().__init__()
        self.operations: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            flops = flop_registry.get(func.overloadpacket)
            numbers = sum(t.numel() for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor))
            self.operations.append((flops(*args, **(kwargs or {}), out_val=result) if flops else 0, numbers))
        return result

    def seconds(self, gpu: Gpu, dims: int) -> float:
        """Return the time of a GPU: of each operation the longer of its arithmetic and its memory traffic."""
        return sum(max(f / gpu.rates[dims], n * gpu.number / gpu.bandwidth) for f, n in self.operations)


def count_work(model, forward: Callable, inputs) -> Work:
    """Return the work of a batch, forward and backward, without the loss and the optimiser. Nothing is computed."""
    model.to("meta").eval()  # the statistics of a batch are read back by some networks, which tensors without numbers cannot do
    inputs = tuple(t.to("meta") for t in inputs) if isinstance(inputs, tuple) else inputs.to("meta")
    with Work() as work:
        outputs = [t for t in tree_leaves(forward(inputs)) if isinstance(t, torch.Tensor)]
        torch.autograd.backward(outputs, [torch.empty_like(t) for t in outputs])
    return work


def time_batches(sampler) -> float:
    """Return the mean seconds of the processor for a batch."""
    return float(take_turns({"": sampler.batch}, repeats=MADE)[""][:, 1].mean())


def time_on_gpu(recipe: Callable, settings: dict, cases: list) -> float:
    """Return the mean seconds, by the clock, of a batch that is augmented on the GPU here."""
    sampler = prepare(recipe, settings, cases, "cuda")[1]
    sampler.batch(0)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for step in range(MADE):
        sampler.batch(step)
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / MADE


def measure(name: str) -> dict:
    """Return the seconds of a batch on the CPU, with and without augmentation, and on each GPU; and its work."""
    recipe, settings, size = RECIPES[name]
    cases = make_cases(*size)
    model, sampler, forward = prepare(recipe, settings, cases)
    row = {"batch": name, WHOLE: time_batches(sampler)}
    augmented, sampler.augment = sampler.augment is not None, None
    row[REST] = time_batches(sampler) if augmented else row[WHOLE]
    if torch.cuda.is_available():
        row[HERE] = time_on_gpu(recipe, settings, cases)
    dims = model.spatial_dims
    work = count_work(model, forward, sampler.batch(0).inputs)
    row |= {gpu.name: max(work.seconds(gpu, dims), gpu.launches) for gpu in GPUS}
    row |= {"TFLOP": sum(f for f, _ in work.operations) / 1e12, "GB in float32": 4e-9 * sum(n for _, n in work.operations)}
    return row


def show(value: float) -> str:
    """Return a number with two digits that count."""
    return f"{value:.{max(0, 1 - math.floor(math.log10(value)))}f}"


def tabulate(rows: list[dict], columns: list[str], change: Callable[[float], float]) -> str:
    """Return a table of some of what was measured."""
    shown = [[row["batch"], *(show(change(row[column])) for column in columns)] for row in rows]
    return markdown(pd.DataFrame(shown, columns=["batch", *columns]))


def judge(rows: list[dict]) -> str:
    """Return which GPUs wait for the CPU, where it augments and where it does not."""
    lines = []
    for made, where in ((WHOLE, "the CPU"), (REST, "the GPU")):
        late = [f"{row['batch']} ({gpu.name})" for row in rows for gpu in GPUS if row[made] > row[gpu.name]]
        lines.append(f"* Augmentation on {where}: the GPU would wait in {', '.join(late) or 'none of them'}.")
    return "\n".join(lines)


def assumptions() -> str:
    """Return the assumptions about the GPUs as a list."""
    lines = []
    for gpu in GPUS:
        rates = " and ".join(f"{rate / 1e12:g} TFLOP/s in {dims}D" for dims, rate in gpu.rates.items())
        least = f"at least {1e3 * gpu.launches:g} ms a batch to start its kernels"
        lines.append(f"* {gpu.name}: {rates}, {gpu.bandwidth / 1e12:g} TB/s, {least}.")
    return "\n".join(lines)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), metavar="BATCH")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in given.only:
        rows.append(measure(name))
        print(rows[-1], flush=True)
    cpu, gpus = [c for c in (WHOLE, REST, HERE) if c in rows[0]], [gpu.name for gpu in GPUS]
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU: what is said of GPUs is estimated"
    about = f"{gpu}. Two cases of noise of {'×'.join(map(str, BRAIN))} voxels, 4 channels (slices: {'×'.join(map(str, SLICES))}, one)"
    blocks = {
        "batches": tabulate(rows, cpu + gpus, lambda seconds: 1 / seconds),
        "verdict": judge(rows),
        "assumptions": assumptions(),
        "milliseconds": tabulate(rows, cpu + gpus, lambda seconds: 1e3 * seconds),
        "work": tabulate(rows, ["TFLOP", "GB in float32"], float),
    }
    fill(__file__, given.results, about, blocks)


if __name__ == "__main__":
    main()
