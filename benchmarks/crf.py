"""The dense CRF on a whole brain against pydensecrf2 and SimpleCRF: seconds, memory, agreement, growth with size.

    pip install pydensecrf2                  # needs a C++ compiler
    pip install "numpy<2" && pip install --no-build-isolation SimpleCRF      # optional: DeepMedic's own C++ code
    python benchmarks/crf.py [--repeats 2] [--channels 2 4] [--labels 2 5] [--peers pydensecrf2 SimpleCRF]

A generated brain of 0.87 mm voxels on a grid of 240 x 240 x 155, with a soft segmentation made from the truth by smoothing and
noise. Both kernels, five iterations, building included; the parameters are DeepMedic's published example (sigma 3, weight 3;
sigma 17, 12, 10, weight 5; intensities 4 and 3 of 255). pydensecrf2 is given the voxels inside the brain only, as we are;
SimpleCRF takes whole volumes only.

The methods of a row take turns in one process with one thread each, after a call that is not counted; their seconds are the
processor's. SimpleCRF is called once. The whole takes about six minutes.
"""

import importlib
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import KEEP_MEMORY, fill, markdown, memory, options, run_alone, take_turns
from scipy.ndimage import gaussian_filter

from medseg_lite import crf, phantoms, transforms
from medseg_lite.volume import Case

SHAPE = (240, 240, 155)
PER_SD = 42.5  # DeepMedic's code maps -3 to 3 standard deviations to 0 to 255
SMOOTHNESS, APPEARANCE, INTENSITY = (3.0, 3.0), (5.0, (17.0, 12.0, 10.0)), (4.0, 3.0, 4.0, 3.0)
CUBES = (48, 64, 96, 128, 192)
PEERS = {"pydensecrf2": "pydensecrf.densecrf", "SimpleCRF": "denseCRF3D"}  # and the modules that they come with


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


def load(file: str, channels: int) -> tuple[Case, np.ndarray]:
    """Return the case in a file, with its first channels, and its soft segmentation."""
    with np.load(file) as arrays:
        case = Case(arrays["image"][:channels], tuple("abcd"[:channels]), "brain", mask=arrays["mask"])
        return case, arrays["soft"]


def take_seconds(file: str, channels: int, repeats: int, methods: list[str], out: str) -> None:
    """Print the seconds of the methods, by turns and with one thread, and ours with all threads; keep the labels."""
    case, soft = load(file, channels)
    threads, answers = torch.get_num_threads(), {}

    def call(method: str):
        def run(turn: int) -> None:
            answers[method] = METHODS[method](case, soft)

        return run

    torch.set_num_threads(1)
    taken = take_turns({method: call(method) for method in methods if method != "SimpleCRF"}, repeats=repeats)
    if "SimpleCRF" in methods:
        taken |= take_turns({"SimpleCRF": call("SimpleCRF")}, repeats=1, warm_up=0)
    seconds = {method: float(np.median(turns[:, 1])) for method, turns in taken.items()}
    torch.set_num_threads(threads)
    seconds["all threads"] = float(np.median(take_turns({"": call("ours")}, repeats=3)[""][:, 0]))
    np.savez(
        out, **{method: answers[method].argmax(0).astype(np.uint8) for method in ("ours", "pydensecrf2") if method in answers}
    )
    print(json.dumps(seconds))


def take_memory(file: str, channels: int, method: str) -> None:
    """Print the bytes a voxel that a method needs. A call on little before imports what it needs."""
    case, soft = load(file, channels)
    middle = tuple(slice(n // 2 - 20, n // 2 + 20) for n in case.shape)
    METHODS[method](case.crop(middle), np.ascontiguousarray(soft[(slice(None), *middle)]))
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", "utf-8")  # forget the peak so far
    METHODS[method](case, soft)
    print(json.dumps({"bytes": (memory("VmHWM") - before) / case.mask.sum()}))


def work(task: str, file: str, channels: str, *rest: str) -> None:
    """Do one task in this process."""
    if task == "seconds":
        repeats, out, *methods = rest
        take_seconds(file, int(channels), int(repeats), methods, out)
    else:
        take_memory(file, int(channels), *rest)


def store(folder: Path, labels: int, cube: int | None = None) -> tuple[Path, Case, np.ndarray]:
    """Write a brain and its soft segmentation to a file for the workers."""
    case, soft = scan(labels, cube)
    file = folder / f"{labels}_{cube}.npz"
    np.savez(file, image=case.image, mask=case.mask, soft=soft)
    return file, case, soft


def works(module: str) -> bool:
    """Return whether a peer can be imported; say so if not."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        print(f"left out: {error}")
        return False
    return True


def compare(file: Path, case: Case, soft: np.ndarray, channels: int, peers: list[str], repeats: int) -> dict:
    """Measure all methods of one row."""
    peers = [peer for peer in peers if peer != "SimpleCRF" or len(soft) == 2]
    out = file.with_name("labels.npz")
    methods = ["ours", *peers, "ours, backward too"]
    seconds = run_alone([__file__, "--worker", "seconds", file, channels, repeats, out, *methods], KEEP_MEMORY)
    row = {"channels": channels, "labels": len(soft), "ours [s]": f"{seconds['ours']:.2f}"}
    for peer in peers:
        row |= {f"{peer} [s]": f"{seconds[peer]:.2f}", f"{peer} / ours": f"{seconds[peer] / seconds['ours']:.1f}"}
    row["ours, all threads [s]"] = f"{seconds['all threads']:.2f}"
    for method in ("ours", *(peer for peer in peers if peer == "pydensecrf2")):
        found = run_alone([__file__, "--worker", "memory", file, channels, method])
        row[f"{method} [bytes a voxel]"] = round(found["bytes"])
    row["forward and backward / forward"] = f"{seconds['ours, backward too'] / seconds['ours']:.2f}"
    if "pydensecrf2" in peers:
        with np.load(out) as labels:
            mine, theirs = (labels[method][case.mask] for method in ("ours", "pydensecrf2"))
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
        command = [__file__, "--worker", "seconds", file, 2, repeats, folder / "labels.npz", "ours"]
        rows.append((int(case.mask.sum()), run_alone(command, KEEP_MEMORY)["ours"]))
        print(cube, rows[-1], flush=True)
    slope = np.polyfit(*np.log(np.array(rows, float)).T, 1)[0]
    return pd.DataFrame([[f"{n:,}", seconds] for n, seconds in rows], columns=["N", "seconds"]), slope


def measure_compiling(folder: Path) -> float:
    """Return the seconds that a process takes longer when it has to compile the loops first."""
    command, seconds = ["-c", "import json, medseg_lite.crf.loops; print(json.dumps({}))"], []
    for _ in range(2):
        start = time.perf_counter()
        run_alone(
            command, {"NUMBA_CACHE_DIR": str(folder / "compiled"), "PYTHONPATH": str(Path(__file__).resolve().parent.parent)}
        )
        seconds.append(time.perf_counter() - start)
    return seconds[0] - seconds[1]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--channels", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--labels", type=int, nargs="+", default=[2, 5])
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--worker", nargs="+", metavar="TASK", help="do one task in this process")
    given = parser.parse_args()
    if given.worker:
        return work(*given.worker)
    peers, rows = [peer for peer in given.peers if works(PEERS[peer])], []
    with tempfile.TemporaryDirectory(prefix="crf_benchmark_") as place:
        compiling = measure_compiling(Path(place))
        for labels in given.labels:
            file, case, soft = store(Path(place), labels)
            rows += [compare(file, case, soft, channels, peers, given.repeats) for channels in given.channels]
        growth, slope = measure_growth(Path(place), given.repeats)
    versions = ", ".join(f"{peer} {version(peer)}" for peer in peers)
    about = f", {os.cpu_count()} CPU cores, numpy {np.__version__}, numba {version('numba')}, {versions or 'no peers'}"
    blocks = {
        "methods": markdown(pd.DataFrame(rows).astype(object).fillna("")),
        "compiling": f"{compiling:.1f} seconds.",
        "growth": f"Seconds ~ N^{slope:.2f}, two channels, two labels:\n\n{markdown(growth)}",
    }
    fill(__file__, given.results, f"{about}. {int(case.mask.sum()):,} voxels inside the mask", blocks)


if __name__ == "__main__":
    main()
