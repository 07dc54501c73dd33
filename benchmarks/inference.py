"""Whole-volume inference of DeepMedic (4 channels, 5 classes, 663,155 parameters) against MONAI and naive segments.

    python benchmarks/inference.py [--size 160 192 155] [--repeats 2]

All methods run the same network on the same volume and their outputs are compared. MONAI's windows get the same context as
ours: the volume is padded by the margin, each window predicts 96³ voxels from 144³, and MONAI's overlap of 96³ windows
(.25, .5) is expressed in its own terms. The naive method predicts 9³ blocks in batches of ten, on an eighth of the volume.
Each method runs in a process of its own, so that its peak memory can be read.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import KEEP_MEMORY, fill, markdown, memory, options, run_alone, take_turns

from medseg_lite import inference, models
from medseg_lite.volume import Case

KFLOP = 722  # thousand floating-point operations a voxel, without any halo
METHODS = ("ours", "ours, one pass", "MONAI .25, channels_last", "MONAI .5, channels_last", "segments of 25³")


def build(size):
    torch.manual_seed(0)
    model = models.deepmedic().train()
    with torch.no_grad():
        model(torch.randn(2, 4, 57, 57, 57))  # so that batch normalisation has statistics to fold
    model.eval()
    image = np.random.default_rng(0).standard_normal((4, *size), dtype=np.float32)
    return model, Case(image, ("flair", "t1", "t1c", "t2"), "noise")


def monai(model, case, overlap: float) -> np.ndarray:
    from monai.inferers import sliding_window_inference

    m, window = model.margin, 96
    roi = window + 2 * m
    step = window * (1 - overlap)
    model = model.to(memory_format=torch.channels_last_3d)
    grid = [-n % model.multiple for n in case.shape]  # so that MONAI's last window starts on the network's grid too
    padded = np.pad(case.image, ((0, 0), *((m, m + g) for g in grid)), mode="reflect")
    weight = torch.zeros(roi, roi, roi)
    weight[m:-m, m:-m, m:-m] = 1

    def same_size(x):
        """MONAI expects as many voxels out as in. The weights leave the rim out, and windows start on the network's grid."""
        return torch.nn.functional.pad(model(x), (m,) * 6)

    x = torch.from_numpy(padded)[None].contiguous(memory_format=torch.channels_last_3d)
    overlap = 1 - (step + 0.5) / roi  # MONAI rounds the step down
    with torch.no_grad():
        y = sliding_window_inference(x, roi, 1, same_size, overlap=overlap, roi_weight_map=weight)
    return y[(0, slice(None), *(slice(m, m + n) for n in case.shape))].numpy()


def segments(model, case) -> np.ndarray:
    """Predict 9³ voxels at a time, ten segments a batch, over the first half of each axis."""
    size = [n // 2 // 9 * 9 for n in case.shape]
    m = model.margin
    padded = torch.from_numpy(np.pad(case.image, ((0, 0), *((m, m),) * 3), mode="reflect"))
    out = torch.empty(5, *size)
    starts = [(i, j, k) for i in range(0, size[0], 9) for j in range(0, size[1], 9) for k in range(0, size[2], 9)]
    with torch.no_grad():
        for n in range(0, len(starts), 10):
            batch = starts[n : n + 10]
            cut = [model.cut(padded[:, i : i + 57, j : j + 57, k : k + 57]) for i, j, k in batch]
            logits = model(tuple(torch.stack(parts) for parts in zip(*cut)))
            for (i, j, k), block in zip(batch, logits):
                out[:, i : i + 9, j : j + 9, k : k + 9] = block
    return out.numpy()


def measure(method: str, size, repeats: int, reference: Path) -> dict:
    """Run a method in this process; compare its logits with those that the first method has left."""
    model, case = build(size)
    base, found = memory("VmHWM"), {}

    def run(turn: int) -> None:
        if method.startswith("ours"):
            tile = {"tile": max(size)} if "one pass" in method else {}
            found["logits"] = inference.predict(model, case, output="logits", progress=False, **tile)
        elif method.startswith("MONAI"):
            found["logits"] = monai(model, case, float(method.split()[1].rstrip(",")))
        else:
            found["logits"] = segments(model, case)

    seconds = take_turns({method: run}, repeats=repeats, warm_up=0)[method][:, 0].min()
    peak, logits = memory("VmHWM"), found["logits"]
    if not reference.exists():
        np.save(reference, logits)
    expected = np.load(reference, mmap_mode="r")[(slice(None), *(slice(n) for n in logits.shape[1:]))]
    return {
        "seconds": seconds * np.prod(size) / logits[0].size,
        "peak_gb": peak / 1e9,
        "base_gb": base / 1e9,
        "difference": float(np.abs(logits - expected).max()),
    }


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--size", type=int, nargs=3, default=(160, 192, 155))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plain-allocator", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument(
        "--methods", nargs="+", default=METHODS, choices=METHODS, help="measure only these; the page is left as it is"
    )
    parser.add_argument("--alone", nargs=2, metavar=("METHOD", "REFERENCE"), help="measure a method in this process")
    given = parser.parse_args()
    if given.alone:
        print(json.dumps(measure(given.alone[0], given.size, given.repeats, Path(given.alone[1]))))
        return
    results, allocator = {}, None if given.plain_allocator else KEEP_MEMORY
    with tempfile.TemporaryDirectory() as folder:
        for method in given.methods:
            command = [
                __file__,
                "--alone",
                method,
                f"{folder}/reference.npy",
                "--repeats",
                given.repeats,
                "--size",
                *given.size,
            ]
            results[method] = run_alone(command, allocator)
            print(method, results[method], flush=True)
    if tuple(given.methods) != METHODS:
        return
    ours = min(results[m]["seconds"] for m in METHODS[:2])
    operations = KFLOP * 1e-6 * np.prod(given.size)
    rows = [
        [
            method,
            f"{r['seconds']:.1f}",
            f"{operations / r['seconds']:.0f}",
            f"{r['peak_gb']:.2f}",
            f"{r['seconds'] / ours:.1f}",
            f"{r['difference']:.1e}",
        ]
        for method, r in results.items()
    ]
    columns = ["method", "seconds", "useful GFLOP/s", "peak GB", "times ours", "largest difference"]
    about = f", {'×'.join(map(str, given.size))} voxels, the best of {given.repeats} runs each"
    fill(__file__, given.results, about, {"methods": markdown(pd.DataFrame(rows, columns=columns))})


if __name__ == "__main__":
    main()
