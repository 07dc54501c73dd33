"""Kayalibay's 3D U-Net.

network     `models.kayalibay_unet3d`
samples     `sampling.VolumeSampler`: whole volumes or crops, with `transforms.augment`
loss        `losses.jaccard_distance`
optimiser   Adam
evaluation  `metrics.evaluate`
notebooks   08 and 09
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from .. import losses, models, transforms
from ..models import Network
from ..sampling import VolumeSampler
from ..volume import Case
from .recipe import OptimizerMaker, Recipe, ScheduleMaker, prepare_network, prepare_optimizer, prepare_schedule, train

# 50 epochs of 220 cases, one case an update.
KAYALIBAY_STEPS = 11_000
LOSSES = {"jaccard": losses.jaccard_distance, "cross_entropy": losses.cross_entropy}


def kayalibay(
    cases: Sequence[Case],
    *,
    network: str | Network = "kayalibay_unet3d",
    classes: int | None = None,
    steps: int = KAYALIBAY_STEPS,
    learning_rate: float | None = None,
    halvings: Sequence[float] = (),
    schedule: ScheduleMaker | None = None,
    optimizer: OptimizerMaker | None = None,
    loss: str | Callable = "jaccard",
    augment: bool | Callable = True,
    crop: int | Sequence[int] | None = None,
    batch_size: int = 1,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    patience: int | None = None,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    engine: Mapping[str, object] | None = None,
    **options,
) -> Network:
    """Train Kayalibay's 3D U-Net on whole volumes, or crops of them, with the paper's settings.

    `classes`, `optimizer`, `schedule`, `validation`, `validate_every`, `patience`, `folder`, `width`, `device`, `progress` and `engine`
    are described in `medseg_lite.recipes`.

    Args:
        cases: labelled cases. The authors feed raw intensities; `transforms.standardise` is the safer choice.
        network: "kayalibay_unet3d", or a built network.
        steps: number of updates. The paper makes 50 epochs of 220 brains, or 600 of 20 hands.
        learning_rate: Adam's learning rate, 5e-5 in the paper. Short runs need more, 1e-3 or so.
        halvings: fractions of the run after which it is halved; the paper has none.
        loss: "jaccard" (`losses.jaccard_distance`), "cross_entropy", or a function of logits and label.
        augment: whether to flip or rotate volumes (`transforms.augment`), or a function `(image, label, *, rng)` in its place.
        crop: voxels along each axis of random crops; None for whole volumes, as in the paper.
        batch_size: number of volumes per update; 1 in the paper.
        seed: seed of the initial weights, the order of cases and the augmentation.
        options: further options of the builder, such as merge="sum" or maps=1.

    Returns:
        The network in evaluation mode. `network.history` has one row per update, and `network.card` says what was done.

    Source: Kayalibay et al. 2017, section 3.2.
    Taught in notebooks 08 and 09.
    """
    if isinstance(loss, str) and loss not in LOSSES:
        raise ValueError(f"loss={loss!r}; expected one of {', '.join(LOSSES)}, or a function")
    build = {"classes": classes, "width": width, "seed": seed, "device": device, "validation": validation, **options}
    model = prepare_network(network, cases, models.KAYALIBAY, **build)
    sampler = VolumeSampler(
        cases,
        crop=crop,
        multiple=model.multiple,
        batch_size=batch_size,
        augment=augment if callable(augment) else transforms.augment if augment else None,
        seed=seed,
        device=next(model.parameters()).device,
    )
    optimizer = prepare_optimizer(model, optimizer, learning_rate, torch.optim.Adam, 5e-5)
    run = {"steps": steps, "validation": validation, "validate_every": validate_every, "patience": patience, "folder": folder}
    run |= {"seed": seed, "progress": progress, "engine": engine}
    return train(
        model,
        sampler,
        cases,
        optimizer=optimizer,
        loss=loss if callable(loss) else LOSSES[loss],
        schedule=prepare_schedule(optimizer, schedule, halvings, steps),
        **run,
        facts={"loss": loss if isinstance(loss, str) else "given"},
    )


RECIPES = (
    Recipe(
        "kayalibay-brats2015",
        network="kayalibay_unet3d",
        paper="Kayalibay et al. 2017, sections 3.2 and 4",
        data="BRATS 2015 training set, 274 cases; by registration",
        loader="brats2015",
        channels=("flair", "t1", "t1c", "t2"),
        classes=5,
        normalise="none",
        settings={"learning_rate": 5e-5, "crop": (160, 144, 128), "validate_every": 220},
        validation=0.11,
        reported={
            "where": "Tables 3 to 5, cross-validation over the same 274 cases",
            "dice": {"whole": 0.90, "core": 0.79, "enhancing": 0.44},
            "precision": {"whole": 0.90, "core": 0.81, "enhancing": 0.57},
            "sensitivity": {"whole": 0.92, "core": 0.87, "enhancing": 0.68},
        },
        departs="crops anywhere in the volume instead of around the brain's centre of mass",
    ),
    Recipe(
        "kayalibay-hands",
        network="kayalibay_unet3d",
        paper="Kayalibay et al. 2017, sections 3.2 and 4",
        data="30 hand MRI of 120×120×64 voxels; not public: your own folder, or generated ones (phantoms.hand)",
        channels=("t1",),
        classes=5,
        normalise="none",
        settings={"steps": 12_000, "learning_rate": 5e-5, "validate_every": 20, "patience": 100},
        folds=6,
        validation=0.2,
        regions={"metacarpal": [1], "proximal": [2], "middle": [3], "distal": [4]},
        departs="stops by the Dice score of the validation cases instead of their loss",
    ),
)
