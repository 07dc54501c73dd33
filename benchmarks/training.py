"""Sampling and training steps of DeepMedic at the paper's size, against MONAI's and TorchIO's samplers.

    pip install torchio          # a peer, not a dependency
    python benchmarks/training.py

Writes benchmarks/training.md. All samplers deliver the same thing: ten segments as 25³ and 19³ inputs and 9³ labels.
"""

import argparse
import importlib.util
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from medseg_lite import losses, models, optimizers, phantoms, training, transforms
from medseg_lite.sampling import SegmentSampler

HERE = Path(__file__).parent
BATCH = 10
TRAINING_GFLOP = 3 * 2 * 1.37 * BATCH  # forward and twice that backward, 1.37 GMAC a segment


def timed(function, repeats: int) -> float:
    """Median seconds of a call, after one to warm up."""
    function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


def split(cut, patches, labels):
    """57³ patches to the inputs and labels that the network is trained on."""
    parts = [cut(p) for p in patches]
    return [torch.stack([p[n] for p in parts]) for n in range(2)], torch.stack([label[24:33, 24:33, 24:33] for label in labels])


def monai_sampler(case, cut, cached: bool):
    from monai.transforms import FgBgToIndicesd, RandCropByPosNegLabeld

    data = {"image": torch.from_numpy(case.image), "label": torch.from_numpy((case.label > 0).astype(np.int64))[None]}
    options = {
        "keys": ["image", "label"],
        "label_key": "label",
        "spatial_size": (57,) * 3,
        "pos": 1,
        "neg": 1,
        "num_samples": BATCH,
    }
    if cached:
        data = FgBgToIndicesd(keys="label", image_key="image")(data)
        crop = RandCropByPosNegLabeld(**options, fg_indices_key="label_fg_indices", bg_indices_key="label_bg_indices")
    else:
        crop = RandCropByPosNegLabeld(**options, image_key="image", image_threshold=0)
    return lambda: split(cut, *zip(*((p["image"], p["label"][0]) for p in crop(data))))


def torchio_queue(cases, cut) -> float:
    """Mean seconds a batch."""
    import torchio as tio

    subjects = [
        tio.Subject(
            image=tio.ScalarImage(tensor=torch.from_numpy(c.image)),
            label=tio.LabelMap(tensor=torch.from_numpy((c.label > 0).astype(np.uint8))[None]),
        )
        for c in cases
    ]
    sampler = tio.LabelSampler(patch_size=57, label_name="label", label_probabilities={0: 0.5, 1: 0.5})
    queue = tio.Queue(tio.SubjectsDataset(subjects), max_length=160, samples_per_volume=80, sampler=sampler, num_workers=0)
    batches = 2 * 160 // BATCH  # two fillings of the queue, which is where its time goes
    start = time.perf_counter()
    for _, batch in zip(range(batches), tio.SubjectsLoader(queue, batch_size=BATCH, num_workers=0)):
        split(cut, batch["image"]["data"], batch["label"]["data"][:, 0])
    return (time.perf_counter() - start) / batches


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    cases = [transforms.standardise(phantoms.brain(n, spacing=1.0)) for n in range(4)]
    torch.manual_seed(0)
    model = models.deepmedic()
    sampler = SegmentSampler(cases, margin=model.margin, cut=model.cut)
    many = SegmentSampler(cases * 10, margin=model.margin, cut=model.cut)

    numbers = iter(range(10**6))
    rows = {
        "ours, 4 cases": timed(lambda: sampler.batch(next(numbers)), 200),
        "ours, 40 cases": timed(lambda: many.batch(next(numbers)), 200),
        "MONAI RandCropByPosNegLabeld, indices cached": timed(monai_sampler(cases[0], model.cut, True), 30),
        "MONAI RandCropByPosNegLabeld": timed(monai_sampler(cases[0], model.cut, False), 5),
    }
    if importlib.util.find_spec("torchio"):
        rows["TorchIO Queue, 80 samples a volume"] = torchio_queue(cases, model.cut)
    ours = rows["ours, 4 cases"]
    text = [f"| {name} | {1e3 * s:.1f} | {s / ours:.1f} |" for name, s in rows.items()]

    batch = sampler.batch(0)
    optimizer = optimizers.RMSpropNesterov(model.parameters())

    def step():
        loss = losses.cross_entropy(model(batch.inputs), batch.label) + losses.weight_penalty(model, l1=1e-6, l2=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.train()
    bare, loop = [], []
    for _ in range(3):  # alternating, so that another process on the machine disturbs both alike
        bare.append(timed(step, options.steps))
        start = time.perf_counter()
        training.fit(model, sampler, steps=options.steps, optimizer=optimizer, l1=1e-6, l2=1e-4, progress=False)
        loop.append((time.perf_counter() - start) / options.steps)
        model.train()
    bare, loop = min(bare), min(loop)
    lines = [
        "# Sampling and training steps, DeepMedic",
        "",
        f"{date.today()}, {torch.get_num_threads()} CPU threads, {platform.machine()}, torch {torch.__version__}, phantoms of "
        f"{'×'.join(map(str, cases[0].shape))} voxels, 4 channels. One batch: ten segments, 25³ and 19³ inputs, 9³ labels.",
        "",
        "| sampler | ms a batch | times ours |",
        "|---|---|---|",
        *text,
        "",
        "| training step | s | GFLOP/s |",
        "|---|---|---|",
        f"| forward, backward, update | {bare:.3f} | {TRAINING_GFLOP / bare:.0f} |",
        f"| the same inside `training.fit`, with sampling | {loop:.3f} | {TRAINING_GFLOP / loop:.0f} |",
        "",
        f"The loop adds {100 * (loop / bare - 1):.1f} %.",
        "",
        "Repeat it: `python benchmarks/training.py`",
    ]
    (HERE / "training.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
