"""Drawing training segments from a stored cohort (`datasets.store`): 4 cases against 400, and against cases in memory.

    python benchmarks/cohort.py [--cases 400] [--shape 120 120 96] [--folder /a/fast/disk]

The cases are generated: four brain phantoms, resampled and disturbed by noise of their own, so that every file is a different one
(400 take some 4 GB, removed at the end). Batches of the small and the large cohort take turns in one process, so that both see the
same machine; memory is measured in a process for each. Writes benchmarks/cohort.md.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from tqdm import tqdm

from medseg_lite import datasets, models, phantoms, transforms
from medseg_lite.engine.stored import write
from medseg_lite.files import read_case, write_case
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.volume import Case

HERE = Path(__file__).parent


def generate(folder: Path, count: int, shape) -> None:
    originals = [transforms.standardise(phantoms.brain(seed, spacing=2.0)) for seed in range(4)]
    rng = np.random.default_rng(0)
    larger = []
    for case in originals:
        zoom = [n / m for n, m in zip(shape, case.shape)]
        mask, label = (ndimage.zoom(a, zoom, order=0) for a in (case.mask, case.label))
        image = np.stack([ndimage.zoom(channel, zoom, order=1) for channel in case.image])
        larger.append((np.where(mask, image, image[:, :1, :1, :1]).astype(np.float32), label, mask))
    noise = rng.normal(0, 0.1, (len(originals[0].channels), *shape)).astype(np.float32)
    for n in tqdm(range(count), desc="generating"):
        image, label, mask = larger[n % 4]
        image = image + np.roll(noise, n, axis=1) * mask
        write(folder / f"case{n:03d}.safetensors", Case(image, originals[0].channels, f"case{n:03d}", label, mask))


def samplers(cases) -> dict:
    """By what they draw: the sampler, and segments a batch."""
    model = models.deepmedic(width=0.1)
    return {
        "DeepMedic's 25³ and 19³ (of 57³)": (SegmentSampler(cases, margin=model.margin, cut=model.cut), 10),
        "cubes of 57³": (SegmentSampler(cases, margin=24), 10),
        "patches of 33² in a slice": (SegmentSampler(cases, output=1, margin=16, spatial_dims=2, batch_size=128), 128),
        "crops of 64³": (VolumeSampler(cases, crop=64, batch_size=2), 2),
    }


def take_turns(functions: dict, seconds: float) -> dict[str, float]:
    """Median seconds of the processor that a call of each takes, by turns; others at work on the machine do not count."""
    taken, step = {name: [] for name in functions}, 0
    for function in functions.values():
        for n in range(20):
            function(10**6 + n)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for name, function in functions.items():
            begin = time.process_time()
            function(step)
            taken[name].append(time.process_time() - begin)
        step += 1
    return {name: float(np.median(times)) for name, times in taken.items()}


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its memory, so that they come from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory(folder: Path, count: int) -> dict:
    """Of a process that opens the cohort and draws from it: seconds to open, and how much its peak rises above the start."""
    names = [f"case{n:03d}" for n in range(count)]
    datasets.stored(folder, cases=names[:1])[0].block((0, 0, 0), (9, 9, 9))  # imports and buffers
    SegmentSampler(list(datasets.stored(folder, cases=names[:1])), margin=24).batch(0)
    base = peak_memory()
    start = time.perf_counter()
    cases = list(datasets.stored(folder, cases=names))
    opened = time.perf_counter() - start
    start = time.perf_counter()
    sampler = SegmentSampler(cases, margin=24)
    prepared = time.perf_counter() - start
    for step in range(200):
        sampler.batch(step)
    peak = peak_memory()
    return {"open": opened, "sampler": prepared, "rise_mb": peak - base, "peak_mb": peak}


def peak_memory() -> float:
    """MB of this process, file pages included (`getrusage` would count those of the process that started it)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def whole_volumes(folder: Path, case: Case) -> float:
    """Seconds to read one case from compressed NIfTI files, as a loader without a stored cohort does for each segment."""
    write_case(folder / "nifti", case)
    files = {channel: folder / "nifti" / f"{channel}.nii.gz" for channel in case.channels}
    return take_turns({"": lambda _: read_case(files, label=folder / "nifti" / "label.nii.gz")}, 5)[""]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--shape", type=int, nargs=3, default=(120, 120, 96))
    parser.add_argument("--seconds", type=float, default=15, help="of measuring, each kind of segment (15)")
    parser.add_argument("--folder", help="where the cohort is put, in a temporary folder (the system's)")
    parser.add_argument("--memory", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.memory:
        print(json.dumps(memory(Path(options.folder), options.memory)))
        return
    few, many = 4, options.cases
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        folder = Path(place) / "stored"
        generate(folder, many, options.shape)
        size = sum(p.stat().st_size for p in folder.iterdir())
        forget(folder)
        cold = {}
        cases = list(datasets.stored(folder))
        for name, (sampler, count) in samplers(cases).items():
            start = time.perf_counter()
            for step in range(5):
                sampler.batch(step)
            cold[name] = (time.perf_counter() - start) / 5 / count
            forget(folder)
        for _ in range(2):
            for path in folder.iterdir():
                path.read_bytes()  # now it is in the system's memory
        in_memory = [c.replace() for c in cases[:few]]
        kinds = {few: samplers(cases[:few]), many: samplers(cases), "memory": samplers(in_memory)}
        rows = [
            f"| what | {few} cases in memory | {few} stored | {many} stored | {many} against {few} | {many} stored, from the disk |",
            "|---|---|---|---|---|---|",
        ]
        for name, (_, count) in kinds[few].items():
            times = take_turns({key: kind[name][0].batch for key, kind in kinds.items()}, options.seconds)
            a, b, c = (1e3 * times[key] / count for key in ("memory", few, many))
            rows.append(f"| {name} | {a:.3f} | {b:.3f} | {c:.3f} | {c / b:.2f} | {1e3 * cold[name]:.2f} |")
            print(rows[-1], flush=True)
        workers = []
        sampler, count = kinds[many]["DeepMedic's 25³ and 19³ (of 57³)"]
        for threads in (1, 2, 4):
            with ThreadPoolExecutor(threads) as pool:
                start = time.perf_counter()
                list(pool.map(sampler.batch, range(100)))
                workers.append(f"{threads}: {1e3 * (time.perf_counter() - start) / 100:.1f}")
        loaded = whole_volumes(Path(place), in_memory[0])
        command = [sys.executable, __file__, "--folder", str(folder), "--memory"]
        use = {
            n: json.loads(subprocess.run([*command, str(n)], check=True, stdout=subprocess.PIPE, text=True).stdout)
            for n in (few, many)
        }
    text = [
        "# Stored cohorts",
        "",
        f"{date.today()}, {os.cpu_count()} CPU cores of which one is used, {platform.machine()}, torch {torch.__version__}. Cases of 4 channels, "
        f"{'×'.join(map(str, options.shape))} voxels, float16, {size / many / 1e6:.1f} MB each, {size / 1e9:.1f} GB in all; "
        "ms a segment: of the processor, median, files in the system's memory; in the last column by the clock, files dropped from it before.",
        "",
        *rows,
        "",
        f"One case read whole, from compressed NIfTI files, takes {1e3 * loaded:.0f} ms.",
        "",
        "| cases | opening, s | making a sampler, s | peak memory, MB | of which for opening and sampling |",
        "|---|---|---|---|---|",
        *(f"| {n} | {u['open']:.3f} | {u['sampler']:.3f} | {u['peak_mb']:.0f} | {u['rise_mb']:.1f} |" for n, u in use.items()),
        "",
        f"Batches of ten DeepMedic segments of {many} cases made by several threads, ms a batch: {', '.join(workers)}.",
        "",
        "Repeat it: `python benchmarks/cohort.py`",
    ]
    (HERE / "cohort.md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()
