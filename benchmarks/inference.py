"""Whole-volume inference of DeepMedic (4 channels, 5 classes, 663,155 parameters) against MONAI and naive segments.

    python benchmarks/inference.py [--size 160 192 155] [--repeats 2]

All methods run the same network on the same volume and their outputs are compared. MONAI's windows get the same context as
ours: the volume is padded by the margin, each window predicts 96³ voxels from 144³, and MONAI's overlap of 96³ windows
(.25, .5) is expressed in its own terms. The naive method predicts 9³ blocks in batches of ten, on an eighth of the volume.
Each method runs in a process of its own, so that its peak memory can be read. Writes benchmarks/inference.md.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from medseg_lite import inference, models
from medseg_lite.volume import Case

HERE = Path(__file__).parent
KFLOP = 722  # thousand floating-point operations a voxel, without any halo
# glibc gives large arrays back to the system at once and gets them again page by page; keeping them makes every method faster.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}
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
    """9³ at a time, ten segments a batch, over the first half of each axis."""
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
    model, case = build(size)
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        if method == "ours":
            logits = inference.predict(model, case, output="logits", progress=False)
        elif method == "ours, one pass":
            logits = inference.predict(model, case, output="logits", tile=max(size), progress=False)
        elif method.startswith("MONAI"):
            logits = monai(model, case, float(method.split()[1].rstrip(",")))
        else:
            logits = segments(model, case)
        seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if not reference.exists():
        np.save(reference, logits)
    expected = np.load(reference, mmap_mode="r")[(slice(None), *(slice(n) for n in logits.shape[1:]))]
    difference = float(np.abs(logits - expected).max())
    voxels = logits[0].size
    return {
        "seconds": min(seconds) * np.prod(size) / voxels,
        "peak_gb": peak / 1e6,
        "base_gb": base / 1e6,
        "difference": difference,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=(160, 192, 155))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--plain-allocator", action="store_true", help="leave glibc's allocator as it is")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, help="only these; nothing is written then")
    parser.add_argument("--only", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--reference", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options.size, options.repeats, options.reference)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for method in options.methods:
            arguments = ["--only", method, "--reference", f"{folder}/reference.npy", "--repeats", str(options.repeats)]
            command = [sys.executable, __file__, *arguments, "--size", *map(str, options.size)]
            environment = os.environ | ({} if options.plain_allocator else KEEP_MEMORY)
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
            results[method] = json.loads(printed.splitlines()[-1])
            print(method, results[method], flush=True)
    if tuple(options.methods) != METHODS:
        return
    ours = min(results[m]["seconds"] for m in METHODS[:2])
    voxels = np.prod(options.size)
    rows = ["| method | seconds | useful GFLOP/s | peak GB | times ours | largest difference |", "|---|---|---|---|---|---|"]
    for method, r in results.items():
        rows.append(
            f"| {method} | {r['seconds']:.1f} | {KFLOP * 1e-6 * voxels / r['seconds']:.0f} | {r['peak_gb']:.2f} | "
            f"{r['seconds'] / ours:.1f} | {r['difference']:.1e} |"
        )
    size = "×".join(map(str, options.size))
    text = [
        "# Whole-volume inference, DeepMedic",
        "",
        f"{date.today()}, {torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}, {size} voxels, "
        "4 channels, 5 classes; logits; the best of "
        f"{options.repeats} runs each. Useful operations: {KFLOP} thousand a voxel, what the network needs without any overlap. "
        "Peak memory is the whole process's, Python and PyTorch included. The naive method ran on an eighth of the volume; its "
        "seconds are scaled to the whole. glibc's allocator was told to keep memory (`KEEP_MEMORY` in the script), for all methods alike; "
        "whoever wants that too sets the three variables before Python starts.",
        "",
        *rows,
        "",
        "Repeat it: `python benchmarks/inference.py`",
    ]
    (HERE / "inference.md").write_text("\n".join(text) + "\n")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
