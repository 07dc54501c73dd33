"""The dense CRF on a whole brain against pydensecrf2 and SimpleCRF: seconds, memory, agreement, growth with size.

    pip install pydensecrf2                  # needs a C++ compiler
    pip install "numpy<2" && pip install --no-build-isolation SimpleCRF      # optional: DeepMedic's own C++ code
    python benchmarks/crf.py [--repeats 3] [--channels 2 4] [--labels 2 5] [--peers pydensecrf2 SimpleCRF]

A generated brain of 0.87 mm voxels on a grid of 240 x 240 x 155, with a soft segmentation made from the truth by smoothing and
noise. Both kernels, five iterations, building included; the parameters are DeepMedic's published example (sigma 3, weight 3;
sigma 17, 12, 10, weight 5; intensities 4 and 3 of 255). pydensecrf2 is given the voxels inside the brain only, as we are;
SimpleCRF takes whole volumes only. Methods take turns, each run in a process of its own with one allocator setting for all.
Writes benchmarks/crf.md.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import gaussian_filter

from medseg_lite import crf, phantoms, transforms
from medseg_lite.volume import Case

HERE = Path(__file__).parent
SHAPE = (240, 240, 155)
PER_SD = 42.5  # DeepMedic's code maps -3 to 3 standard deviations to 0 to 255
SMOOTHNESS, APPEARANCE, INTENSITY = (3.0, 3.0), (5.0, (17.0, 12.0, 10.0)), (4.0, 3.0, 4.0, 3.0)
CUBES = (48, 64, 96, 128, 192)
# glibc gives large arrays back to the system at once and gets them again page by page; keeping them makes all methods faster.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**28)}


def scan(labels: int, cube: int | None = None) -> tuple[Case, np.ndarray]:
    """A brain in four sequences, clipped at 3 standard deviations, and noisy probabilities of its labels."""
    brain = transforms.standardise(phantoms.brain(7, site="A", spacing=0.65 if cube else 0.87))
    image = brain.image.clip(-3, 3)
    if cube:
        start = [max(0, (n - cube) // 2) for n in brain.shape]
        cut = tuple(slice(s, s + cube) for s in start)
        image, label = image[(slice(None), *cut)], brain.label[cut]
        mask = np.ones(label.shape, bool)
    else:
        pad = [((n - m) // 2, n - m - (n - m) // 2) for n, m in zip(SHAPE, brain.shape)]
        image, label = np.pad(image, ((0, 0), *pad), mode="edge"), np.pad(brain.label, pad)
        mask = np.pad(brain.mask, pad)
    label = label > 0 if labels == 2 else label
    noise = np.random.default_rng(0).standard_normal((labels, *label.shape)).astype(np.float32)
    soft = np.stack([gaussian_filter((label == k).astype(np.float32), 1.5) for k in range(labels)])
    soft = (soft + 0.42 * np.abs(np.stack([gaussian_filter(n, 1) for n in noise]))).clip(1e-3)
    soft /= soft.sum(0)
    return Case(np.ascontiguousarray(image), brain.channels, "brain", mask=mask), soft


def model(case: Case) -> crf.DenseCRF:
    return crf.DenseCRF(
        smoothness_weight=SMOOTHNESS[0],
        smoothness_sigma=SMOOTHNESS[1],
        appearance_weight=APPEARANCE[0],
        appearance_sigma=APPEARANCE[1],
        intensity_sigma=[s / PER_SD for s in INTENSITY[: len(case.image)]],
    )


def ours(case: Case, soft: np.ndarray) -> np.ndarray:
    return model(case).refine(soft, case)


def ours_with_gradients(case: Case, soft: np.ndarray) -> np.ndarray:
    logits = torch.from_numpy(soft)[None].log().requires_grad_()
    refined = model(case)(logits, torch.from_numpy(case.image)[None], torch.from_numpy(case.mask)[None])
    refined.sum().backward()
    return refined[0].detach().softmax(0).numpy()


def pydensecrf2(case: Case, soft: np.ndarray) -> np.ndarray:
    import pydensecrf.densecrf as peer

    labels = len(soft)
    position = np.stack(np.nonzero(case.mask)).astype(np.float32)
    sigma = np.array(APPEARANCE[1], np.float32)[:, None]
    intensity = np.array(INTENSITY[: len(case.image)], np.float32)[:, None] / PER_SD
    field = peer.DenseCRF(position.shape[1], labels)
    field.setUnaryEnergy(np.ascontiguousarray(-np.log(soft[:, case.mask].clip(1e-5))))
    field.addPairwiseEnergy(np.ascontiguousarray(position / SMOOTHNESS[1]), SMOOTHNESS[0])
    features = np.concatenate([position / sigma, case.image[:, case.mask] / intensity])
    field.addPairwiseEnergy(np.ascontiguousarray(features, np.float32), APPEARANCE[0])
    result = soft.copy()
    result[:, case.mask] = np.array(field.inference(5))
    return result


def simplecrf(case: Case, soft: np.ndarray) -> np.ndarray:
    import denseCRF3D

    image = np.ascontiguousarray(((case.image + 3) * PER_SD).transpose(1, 2, 3, 0).astype(np.uint8))
    settings = {"MaxIterations": 5, "PosW": SMOOTHNESS[0], "BilateralW": APPEARANCE[0]}
    for axis, sigma in zip("RCZ", APPEARANCE[1]):
        settings |= {"PosRStd" if axis == "R" else f"Pos{axis}Std": SMOOTHNESS[1], f"Bilateral{axis}Std": sigma}
    settings |= {"ModalityNum": len(case.image), "BilateralModsStds": tuple(INTENSITY[: len(case.image)])}
    labels = denseCRF3D.densecrf3d(image, np.ascontiguousarray(soft.transpose(1, 2, 3, 0)), settings)
    return (np.arange(len(soft))[:, None, None, None] == labels).astype(np.float32)


METHODS = {"ours": ours, "pydensecrf2": pydensecrf2, "SimpleCRF": simplecrf, "ours, backward too": ours_with_gradients}


def work(method: str, file: str, channels: int, out: str, warm: str) -> None:
    with np.load(file) as arrays:
        case = Case(arrays["image"][:channels], tuple("abcd"[:channels]), "brain", mask=arrays["mask"])
        soft = arrays["soft"]
    # Once before: on everything when time is measured, so that imports are done and memory is at hand; on little for memory.
    if warm == "True":
        METHODS[method](case, soft)
    else:
        middle = tuple(slice(n // 2 - 8, n // 2 + 8) for n in case.shape)
        METHODS[method](case.crop(middle), np.ascontiguousarray(soft[(slice(None), *middle)]))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    start = time.perf_counter()
    result = METHODS[method](case, soft)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    np.save(out, result.argmax(0).astype(np.uint8))
    print(json.dumps({"seconds": seconds, "bytes": peak / case.mask.sum()}))


def memory(field: str) -> int:
    """Bytes, from Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def measure(method: str, file: Path, channels: int, *, keep_memory: bool = True) -> tuple[dict, np.ndarray]:
    out = file.with_name("labels.npy")
    command = [sys.executable, __file__, "--worker", method, str(file), str(channels), str(out), str(keep_memory)]
    environment = os.environ | (KEEP_MEMORY if keep_memory else {})
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{method}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1]), np.load(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--channels", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--peers", nargs="*", default=["pydensecrf2", "SimpleCRF"])
    options = parser.parse_args()
    if options.worker:
        method, file, channels, out, warm = options.worker
        return work(method, file, int(channels), out, warm)

    folder = Path(tempfile.mkdtemp(prefix="crf_benchmark_"))
    table, growth = [], []
    peers = options.peers
    for labels in options.labels:
        case, soft = scan(labels)
        file = folder / f"{labels}.npz"
        np.savez(file, image=case.image, mask=case.mask, soft=soft)
        start = soft.argmax(0)[case.mask]
        for channels in options.channels:
            runs = {m: [] for m in ("ours", *peers, "ours, backward too")}
            if labels > 2:
                runs.pop("SimpleCRF", None)
            answers = {}
            for _ in range(options.repeats):
                for method in list(runs):
                    try:
                        result, answers[method] = measure(method, file, channels)
                        runs[method].append(result)
                    except RuntimeError as error:
                        print(error)
                        runs.pop(method)
            seconds = {m: statistics.median(r["seconds"] for r in rs) for m, rs in runs.items()}
            row = {"channels": channels, "labels": labels, "ours [s]": round(seconds["ours"], 2)}
            for peer in peers:
                if peer in seconds:
                    row |= {f"{peer} [s]": round(seconds[peer], 2), f"{peer} / ours": round(seconds[peer] / seconds["ours"], 1)}
            for method in ("ours", "pydensecrf2"):
                if method in runs:
                    row[f"{method} [bytes a voxel]"] = round(measure(method, file, channels, keep_memory=False)[0]["bytes"])
            row["forward and backward / forward"] = round(seconds["ours, backward too"] / seconds["ours"], 2)
            mine = answers["ours"][case.mask]
            if "pydensecrf2" in answers:
                theirs = answers["pydensecrf2"][case.mask]
                changed = theirs != start
                row |= {
                    "same labels [%]": round(100 * (mine == theirs).mean(), 3),
                    "changed by pydensecrf2 [%]": round(100 * changed.mean(), 2),
                    "same among these [%]": round(100 * (mine == theirs)[changed].mean(), 2),
                }
            table.append(row)
            print(row, flush=True)
    for cube in CUBES:
        case, soft = scan(2, cube)
        file = folder / f"cube{cube}.npz"
        np.savez(file, image=case.image, mask=case.mask, soft=soft)
        runs = [measure("ours", file, 2)[0]["seconds"] for _ in range(options.repeats)]
        growth.append((case.mask.sum(), min(runs)))
        print(cube, growth[-1], flush=True)
    write(table, growth, int(scan(2)[0].mask.sum()))


def write(table: list[dict], growth: list[tuple[int, float]], voxels: int) -> None:
    slope = np.polyfit(*np.log(np.array(growth, float)).T, 1)[0]
    names = list(dict.fromkeys(name for row in table for name in row))
    lines = [
        "# The dense CRF on a whole brain",
        "",
        f"{date.today()}, {os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}, numpy {np.__version__}, "
        f"pydensecrf2 {version('pydensecrf2')}. A generated brain on 240 x 240 x 155 voxels, {voxels:,} of them inside the mask; "
        "both kernels, five iterations, building included; medians. Our smoothness kernel is exact, pydensecrf2's is on a lattice. "
        "SimpleCRF takes the whole grid, two labels.",
        "",
        "Repeat it: `python benchmarks/crf.py`",
        "",
        "| " + " | ".join(names) + " |",
        "|" + " --- |" * len(names),
        *("| " + " | ".join(str(row.get(n, "")) for n in names) + " |" for row in table),
        "",
        f"Growth with the number of voxels N, two channels, two labels: seconds ~ N^{slope:.2f}.",
        "",
        "| N | seconds |",
        "| --- | --- |",
        *(f"| {n:,} | {s:.3f} |" for n, s in growth),
        "",
    ]
    (HERE / "crf.md").write_text("\n".join(lines))


if __name__ == "__main__":
    main()
