"""Sampling and training steps of DeepMedic at the paper's size, against MONAI's and TorchIO's samplers.

    pip install torchio          # a peer, not a dependency
    python benchmarks/training.py

All samplers deliver the same thing: ten segments as 25³ and 19³ inputs and 9³ labels.
"""

import importlib.util
import time

import numpy as np
import pandas as pd
import torch
from _measure import fill, markdown, options, take_turns

from medseg_lite import losses, models, optimizers, phantoms, training, transforms
from medseg_lite.sampling import SegmentSampler

BATCH = 10
TRAINING_GFLOP = 3 * 2 * 1.37 * BATCH  # forward and twice that backward, 1.37 GMAC a segment


def split(cut, patches, labels):
    """Cut 57³ patches into the inputs and labels that the network is trained on."""
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
    return lambda turn: split(cut, *zip(*((p["image"], p["label"][0]) for p in crop(data))))


def torchio_queue(cases, cut) -> float:
    """Return the mean seconds of a batch."""
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


def measure_samplers(cases: list, model) -> pd.DataFrame:
    """Return the milliseconds of a batch of each sampler."""
    ours, more = (SegmentSampler(group, margin=model.margin, cut=model.cut) for group in (cases, cases * 10))
    cached, plain = (monai_sampler(cases[0], model.cut, cached) for cached in (True, False))
    functions = {
        "ours, 4 cases": (ours.batch, 200),
        "ours, 40 cases": (more.batch, 200),
        "MONAI RandCropByPosNegLabeld, indices cached": (cached, 30),
        "MONAI RandCropByPosNegLabeld": (plain, 5),
    }
    taken = {name: np.median(take_turns({"": f}, repeats=n)[""][:, 0]) for name, (f, n) in functions.items()}
    if importlib.util.find_spec("torchio"):
        taken["TorchIO Queue, 80 samples a volume"] = torchio_queue(cases, model.cut)
    rows = [[name, 1e3 * s, s / taken["ours, 4 cases"]] for name, s in taken.items()]
    return pd.DataFrame(rows, columns=["sampler", "ms a batch", "times ours"])


def measure_updates(cases: list, model, steps: int) -> tuple[float, float]:
    """Return the seconds of an update without the loop around it, and inside `training.fit`; the least of three turns."""
    sampler = SegmentSampler(cases, margin=model.margin, cut=model.cut)
    batch, optimizer = sampler.batch(0), optimizers.RMSpropNesterov(model.parameters())

    def update(turn: int) -> None:
        loss = losses.cross_entropy(model(batch.inputs), batch.label) + losses.weight_penalty(model, l1=1e-6, l2=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    bare, loop = [], []
    for _ in range(3):  # by turns, so that another process on the machine disturbs both alike
        model.train()
        bare.append(np.median(take_turns({"": update}, repeats=steps)[""][:, 0]))
        start = time.perf_counter()
        training.fit(model, sampler, steps=steps, optimizer=optimizer, l1=1e-6, l2=1e-4, progress=False)
        loop.append((time.perf_counter() - start) / steps)
    return min(bare), min(loop)


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--steps", type=int, default=15)
    given = parser.parse_args()
    cases = [transforms.standardise(phantoms.brain(n, spacing=1.0)) for n in range(4)]
    torch.manual_seed(0)
    model = models.deepmedic()
    samplers = measure_samplers(cases, model)
    bare, loop = measure_updates(cases, model, given.steps)
    rows = [
        ["forward, backward, update", f"{bare:.3f}", f"{TRAINING_GFLOP / bare:.0f}"],
        ["the same inside `training.fit`, with sampling", f"{loop:.3f}", f"{TRAINING_GFLOP / loop:.0f}"],
    ]
    blocks = {
        "samplers": markdown(samplers, 1),
        "updates": markdown(pd.DataFrame(rows, columns=["training step", "s", "GFLOP/s"])),
        "loop": f"The loop adds {100 * (loop / bare - 1):.1f} %.",
    }
    fill(__file__, given.results, f", phantoms of {'×'.join(map(str, cases[0].shape))} voxels, 4 channels", blocks)


if __name__ == "__main__":
    main()
