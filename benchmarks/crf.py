"""The dense CRF on a whole brain against pydensecrf2 and SimpleCRF: seconds, memory, agreement, growth with size.

    pip install pydensecrf2                  # needs a C++ compiler
    pip install "numpy<2" && pip install --no-build-isolation SimpleCRF      # optional: DeepMedic's own C++ code
    python benchmarks/crf.py [--repeats 3] [--channels 2 4] [--labels 2 5] [--peers pydensecrf2 SimpleCRF]

A generated brain of 0.87 mm voxels on a grid of 240 x 240 x 155, with a soft segmentation made from the truth by smoothing and
noise. Both kernels, five iterations, building included; the parameters are DeepMedic's published example (sigma 3, weight 3;
sigma 17, 12, 10, weight 5; intensities 4 and 3 of 255). pydensecrf2 is given the voxels inside the brain only, as we are;
SimpleCRF takes whole volumes only. Methods take turns, each run in a process of its own with one allocator setting for all.
"""

import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import KEEP_MEMORY, fill, markdown, memory, options, run_alone
from scipy.ndimage import gaussian_filter

from medseg_lite import crf, phantoms, transforms
from medseg_lite.volume import Case

SHAPE = (240, 240, 155)
PER_SD = 42.5  # DeepMedic's code maps -3 to 3 standard deviations to 0 to 255
SMOOTHNESS, APPEARANCE, INTENSITY = (3.0, 3.0), (5.0, (17.0, 12.0, 10.0)), (4.0, 3.0, 4.0, 3.0)
CUBES = (48, 64, 96, 128, 192)


def scan(labels: int, cube: int | None = None) -> tuple[Case, np.ndarray]:
    """Return a brain in four sequences, clipped at 3 standard deviations, and noisy probabilities of its labels."""
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


def work(method: str, file: str, channels: int, out: str, warm: bool) -> None:
    """Run a method in this process; print its seconds and the bytes a voxel that it needs, and keep its labels."""
    with np.load(file) as arrays:
        case = Case(arrays["image"][:channels], tuple("abcd"[:channels]), "brain", mask=arrays["mask"])
        soft = arrays["soft"]
    # Once before: on everything when time is measured, so that imports are done and memory is at hand; on little for memory.
    if warm:
        METHODS[method](case, soft)
    else:
        middle = tuple(slice(n // 2 - 8, n // 2 + 8) for n in case.shape)
        METHODS[method](case.crop(middle), np.ascontiguousarray(soft[(slice(None), *middle)]))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # forget the peak so far
    start = time.perf_counter()
    result = METHODS[method](case, soft)
    seconds = time.perf_counter() - start
    peak = memory("VmHWM") - before
    np.save(out, result.argmax(0).astype(np.uint8))
    print(json.dumps({"seconds": seconds, "bytes": peak / case.mask.sum()}))


def measure(method: str, file: Path, channels: int, *, keep_memory: bool = True) -> tuple[dict, np.ndarray]:
    """Run a method in a process of its own; return what it printed, and its labels."""
    out = file.with_name("labels.npy")
    command = [__file__, "--worker", method, file, channels, out, int(keep_memory)]
    return run_alone(command, KEEP_MEMORY if keep_memory else None), np.load(out)


def store(folder: Path, labels: int, cube: int | None = None) -> tuple[Path, Case, np.ndarray]:
    """Write a brain and its soft segmentation to a file for the workers."""
    case, soft = scan(labels, cube)
    file = folder / f"{labels}_{cube}.npz"
    np.savez(file, image=case.image, mask=case.mask, soft=soft)
    return file, case, soft


def compare(file: Path, case: Case, soft: np.ndarray, channels: int, peers: list[str], repeats: int) -> dict:
    """Measure all methods by turns; a method that fails is left out."""
    runs, answers = {m: [] for m in ("ours", *peers, "ours, backward too") if m != "SimpleCRF" or len(soft) == 2}, {}
    for _ in range(repeats):
        for method in list(runs):
            try:
                result, answers[method] = measure(method, file, channels)
                runs[method].append(result["seconds"])
            except RuntimeError as error:
                print(f"{method}: {error}")
                runs.pop(method)
    seconds = {method: np.median(taken) for method, taken in runs.items()}
    row = {"channels": channels, "labels": len(soft), "ours [s]": f"{seconds['ours']:.2f}"}
    for peer in (p for p in peers if p in seconds):
        row |= {f"{peer} [s]": f"{seconds[peer]:.2f}", f"{peer} / ours": f"{seconds[peer] / seconds['ours']:.1f}"}
    for method in (m for m in ("ours", "pydensecrf2") if m in runs):
        row[f"{method} [bytes a voxel]"] = round(measure(method, file, channels, keep_memory=False)[0]["bytes"])
    row["forward and backward / forward"] = f"{seconds['ours, backward too'] / seconds['ours']:.2f}"
    if "pydensecrf2" in answers:
        mine, theirs = (answers[method][case.mask] for method in ("ours", "pydensecrf2"))
        changed = theirs != soft.argmax(0)[case.mask]
        row |= {
            "same labels [%]": f"{100 * (mine == theirs).mean():.3f}",
            "changed by pydensecrf2 [%]": f"{100 * changed.mean():.2f}",
            "same among these [%]": f"{100 * (mine == theirs)[changed].mean():.2f}",
        }
    print(row, flush=True)
    return row


def measure_growth(folder: Path, repeats: int) -> tuple[pd.DataFrame, float]:
    """Return the seconds of cubes of several sizes, and the exponent of their growth."""
    rows = []
    for cube in CUBES:
        file, case, _ = store(folder, 2, cube)
        rows.append((int(case.mask.sum()), min(measure("ours", file, 2)[0]["seconds"] for _ in range(repeats))))
        print(cube, rows[-1], flush=True)
    slope = np.polyfit(*np.log(np.array(rows, float)).T, 1)[0]
    return pd.DataFrame([[f"{n:,}", seconds] for n, seconds in rows], columns=["N", "seconds"]), slope


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--channels", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--peers", nargs="*", default=["pydensecrf2", "SimpleCRF"])
    parser.add_argument("--worker", nargs=5, metavar=("METHOD", "FILE", "CHANNELS", "OUT", "WARM"), help="run in this process")
    given = parser.parse_args()
    if given.worker:
        method, file, channels, out, warm = given.worker
        return work(method, file, int(channels), out, warm == "1")
    rows = []
    with tempfile.TemporaryDirectory(prefix="crf_benchmark_") as place:
        for labels in given.labels:
            file, case, soft = store(Path(place), labels)
            rows += [compare(file, case, soft, channels, given.peers, given.repeats) for channels in given.channels]
        growth, slope = measure_growth(Path(place), given.repeats)
    peer = f", pydensecrf2 {version('pydensecrf2')}" if "pydensecrf2" in given.peers else ""
    about = f", {os.cpu_count()} CPU cores, numpy {np.__version__}{peer}. {int(case.mask.sum()):,} voxels inside the mask"
    blocks = {
        "methods": markdown(pd.DataFrame(rows).astype(object).fillna("")),
        "growth": f"Seconds ~ N^{slope:.2f}, two channels, two labels:\n\n{markdown(growth)}",
    }
    fill(__file__, given.results, about, blocks)


if __name__ == "__main__":
    main()
