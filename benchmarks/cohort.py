"""Drawing training segments from a stored cohort (`datasets.store`): 4 cases against 400, and against cases in memory.

    python benchmarks/cohort.py [--cases 400] [--shape 120 120 96] [--folder /a/fast/disk]

The cases are generated: four brain phantoms, resampled and disturbed by noise of their own, so that every file is a different one
(400 take some 4 GB, removed at the end). Batches of the small and the large cohort take turns in one process, so that both see the
same machine; memory is measured in a process for each.
"""

import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, memory, options, run_alone, take_turns
from scipy import ndimage
from tqdm import tqdm

from medseg_lite import datasets, models, phantoms, transforms
from medseg_lite.engine.stored import write
from medseg_lite.files import read_case, write_case
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.volume import Case

FEW = 4
DEEPMEDIC = "DeepMedic's 25³ and 19³ (of 57³)"


def generate(folder: Path, number: int, shape) -> None:
    originals = [transforms.standardise(phantoms.brain(seed, spacing=2.0)) for seed in range(4)]
    rng = np.random.default_rng(0)
    larger = []
    for case in originals:
        zoom = [n / m for n, m in zip(shape, case.shape)]
        mask, label = (ndimage.zoom(a, zoom, order=0) for a in (case.mask, case.label))
        image = np.stack([ndimage.zoom(channel, zoom, order=1) for channel in case.image])
        larger.append((np.where(mask, image, image[:, :1, :1, :1]).astype(np.float32), label, mask))
    noise = rng.normal(0, 0.1, (len(originals[0].channels), *shape)).astype(np.float32)
    for n in tqdm(range(number), desc="generating"):
        image, label, mask = larger[n % 4]
        image = image + np.roll(noise, n, axis=1) * mask
        write(folder / f"case{n:03d}.safetensors", Case(image, originals[0].channels, f"case{n:03d}", label, mask))


def samplers(cases) -> dict:
    """Return the samplers by the kind of their segments, with the segments of a batch."""
    model = models.deepmedic(width=0.1)
    return {
        DEEPMEDIC: (SegmentSampler(cases, margin=model.margin, cut=model.cut), 10),
        "cubes of 57³": (SegmentSampler(cases, margin=24), 10),
        "patches of 33² in a slice": (SegmentSampler(cases, output=1, margin=16, spatial_dims=2, batch_size=128), 128),
        "crops of 64³": (VolumeSampler(cases, crop=64, batch_size=2), 2),
    }


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its memory, so that they come from the disk."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure_memory(folder: Path, number: int) -> dict:
    """Open the cohort and draw from it; return the seconds to open, and how much the peak rises above the start."""
    names = [f"case{n:03d}" for n in range(number)]
    datasets.stored(folder, cases=names[:1])[0].block((0, 0, 0), (9, 9, 9))  # imports and buffers
    SegmentSampler(list(datasets.stored(folder, cases=names[:1])), margin=24).batch(0)
    base = memory("VmHWM") / 2**20
    start = time.perf_counter()
    cases = list(datasets.stored(folder, cases=names))
    opened = time.perf_counter()
    sampler = SegmentSampler(cases, margin=24)
    prepared = time.perf_counter()
    for step in range(200):
        sampler.batch(step)
    peak = memory("VmHWM") / 2**20
    return {"open": opened - start, "sampler": prepared - opened, "rise_mb": peak - base, "peak_mb": peak}


def draw_cold(folder: Path) -> dict[str, float]:
    """Return the seconds of a segment of each kind from files that are not in the system's memory."""
    seconds = {}
    forget(folder)
    for kind, (sampler, number) in samplers(list(datasets.stored(folder))).items():
        start = time.perf_counter()
        for step in range(5):
            sampler.batch(step)
        seconds[kind] = (time.perf_counter() - start) / 5 / number
        forget(folder)
    for path in [*folder.iterdir()] * 2:
        path.read_bytes()  # now it is in the system's memory
    return seconds


def draw(cases: list, cold: dict, seconds: float) -> pd.DataFrame:
    """Return the milliseconds of a segment of each kind, from cases in memory and from few and many stored ones."""
    many, rows = len(cases), []
    kinds = [samplers([c.replace() for c in cases[:FEW]]), samplers(cases[:FEW]), samplers(cases)]
    for kind, (_, number) in kinds[0].items():
        taken = take_turns({n: k[kind][0].batch for n, k in enumerate(kinds)}, seconds=seconds, warm_up=20).values()
        a, b, c = (1e3 * np.median(times[:, 1]) / number for times in taken)
        cells = [f"{v:.3f}" for v in (a, b, c)]
        rows.append([kind, *cells, c / b, 1e3 * cold[kind]])
    columns = ["in memory", f"{FEW} stored", f"{many} stored", f"{many} against {FEW}", f"{many} stored, from the disk"]
    return pd.DataFrame(rows, columns=["what", f"{FEW} cases {columns[0]}", *columns[1:]])


def draw_in_threads(cases: list) -> str:
    """Return the milliseconds of a batch of DeepMedic's segments that several threads make."""
    sampler, _ = samplers(cases)[DEEPMEDIC]
    taken = []
    for threads in (1, 2, 4):
        with ThreadPoolExecutor(threads) as pool:
            start = time.perf_counter()
            list(pool.map(sampler.batch, range(100)))
            taken.append(f"{threads}: {1e3 * (time.perf_counter() - start) / 100:.1f}")
    return ", ".join(taken)


def read_whole(folder: Path, case: Case) -> float:
    """Return the seconds to read a case from compressed NIfTI files, as a loader without a stored cohort does for each segment."""
    write_case(folder / "nifti", case)
    files = {channel: folder / "nifti" / f"{channel}.nii.gz" for channel in case.channels}
    taken = take_turns({"read": lambda turn: read_case(files, label=folder / "nifti" / "label.nii.gz")}, seconds=5)["read"]
    return float(np.median(taken[:, 1]))


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--cases", type=int, default=400)
    parser.add_argument("--shape", type=int, nargs=3, default=(120, 120, 96))
    parser.add_argument("--seconds", type=float, default=15, help="seconds of measuring each kind of segment (15)")
    parser.add_argument("--folder", help="place for the cohort, in a temporary folder (the system's)")
    parser.add_argument("--memory", nargs=2, metavar=("FOLDER", "CASES"), help="measure the memory of this process")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.memory:
        print(json.dumps(measure_memory(Path(given.memory[0]), int(given.memory[1]))))
        return
    with tempfile.TemporaryDirectory(dir=given.folder) as place:
        folder = Path(place) / "stored"
        generate(folder, given.cases, given.shape)
        size = sum(p.stat().st_size for p in folder.iterdir())
        cold = draw_cold(folder)
        cases = list(datasets.stored(folder))
        table, threads, loaded = (
            draw(cases, cold, given.seconds),
            draw_in_threads(cases),
            read_whole(Path(place), cases[0].replace()),
        )
        used = {n: run_alone([__file__, "--memory", folder, n]) for n in (FEW, given.cases)}
    rows = [[n, f"{u['open']:.3f}", f"{u['sampler']:.3f}", f"{u['peak_mb']:.0f}", u["rise_mb"]] for n, u in used.items()]
    columns = ["cases", "opening, s", "making a sampler, s", "peak memory, MB", "of which for opening and sampling"]
    about = f". Cases of 4 channels, {'×'.join(map(str, given.shape))} voxels, float16, {size / given.cases / 1e6:.1f} MB each, {size / 1e9:.1f} GB in all"
    blocks = {
        "segments": markdown(table, 2),
        "whole": f"One case read whole, from compressed NIfTI files, takes {1e3 * loaded:.0f} ms.",
        "memory": markdown(pd.DataFrame(rows, columns=columns), 1),
        "threads": f"Batches of ten DeepMedic segments of {given.cases} cases made by several threads, ms a batch: {threads}.",
    }
    fill(__file__, given.results, about, blocks)


if __name__ == "__main__":
    main()
