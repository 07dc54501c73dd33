"""Drozdzal's FCN pre-processor with FC-ResNet, and its baselines.

networks    `models.fcn_fc_resnet`, `models.fc_resnet`, `models.unet2d`, `models.fcn8`
samples     `sampling.SegmentSampler`: crops of slices, with `transforms.distort`
loss        `losses.dice_loss`, with a penalty on the kernels
optimiser   RMSProp, `optimizers.InverseTimeDecay`
evaluation  `metrics.v_rand`, `metrics.v_info`, `metrics.evaluate`
notebooks   10 and 11
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from .. import losses, models, optimizers, transforms
from ..models import Network
from ..volume import Case
from .recipe import (
    OptimizerMaker,
    Recipe,
    ScheduleMaker,
    make_segments,
    prepare_network,
    prepare_optimizer,
    prepare_schedule,
    train,
)

# Our choice: the paper trains until the validation score has not risen for 50 epochs.
DROZDZAL_STEPS = 20_000


def drozdzal(
    cases: Sequence[Case],
    *,
    network: str | Network = "fcn_fc_resnet",
    classes: int | None = None,
    steps: int = DROZDZAL_STEPS,
    learning_rate: float | None = None,
    halvings: Sequence[float] | None = None,
    schedule: ScheduleMaker | None = None,
    optimizer: OptimizerMaker | None = None,
    loss: Callable = losses.dice_loss,
    augment: bool | Callable = True,
    weight_decay: float = 1e-4,
    crop: int = 256,
    batch_size: int = 8,
    scheme: str = "uniform",
    shear: float = 0.41,
    angle: float = 25.0,
    warp: float = 0.1,
    validation: Sequence[Case] = (),
    validate_every: int = 100,
    patience: int | None = None,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    engine: Mapping[str, object] | None = None,
    **options,
) -> Network:
    """Train the FCN pre-processor with FC-ResNet, or a network it is compared with, on crops of slices.

    The settings are the paper's for electron microscopy. For the prostate: `learning_rate=4e-4, weight_decay=1e-5, batch_size=24,
    shear=0.1, angle=10`; for the liver: `crop=128, batch_size=20`.

    `classes`, `optimizer`, `schedule`, `validation`, `validate_every`, `patience`, `folder`, `width`, `device`, `progress` and `engine`
    are described in `medseg_lite.recipes`.

    Args:
        cases: labelled cases. The pipeline takes raw intensities, the other networks want normalised ones.
        network: one of `models.DROZDZAL` that segments: "fcn_fc_resnet", "fc_resnet", "unet2d", "fcn8"; or a built network.
        steps: number of updates.
        learning_rate: RMSProp's learning rate at the start, 1e-3 in the paper; after t updates it is divided by 1 + .001 t.
        halvings: fractions of the run after which the rate is halved, in place of that decay.
        loss: function of logits and label.
        augment: whether to flip, shear, rotate and bend the crops (`transforms.distort`), by at most `shear`, `angle`, `warp`; or a
            function `(image, label, *, rng)` in its place.
        weight_decay: factor λ of the penalty λ Σ w² on the kernels.
        crop: side of the crops in pixels, a multiple of the network's `multiple`.
        batch_size: number of crops per update.
        scheme: scheme of the crops' centres, see `SegmentSampler`; "foreground" for lesions that most crops would miss.
        patience: as in `medseg_lite.recipes`; 50 epochs in the paper.
        seed: seed of the initial weights, the crops and the augmentation. The paper's ensemble is ten seeds.
        options: further options of the builder.

    Returns:
        The network in evaluation mode. `network.history` has one row per update, and `network.card` says what was done.

    Source: Drozdzal et al. 2018, section 4.
    Taught in notebooks 10 and 11.
    """
    names = [name for name in models.DROZDZAL if name != "fcn_preprocessor"]
    build = {"classes": classes, "width": width, "seed": seed, "device": device, "validation": validation, **options}
    model = prepare_network(network, cases, names, **build)
    if crop % model.multiple:
        raise ValueError(f"crop={crop}; {network} needs a multiple of {model.multiple}")
    distort = partial(transforms.distort, shear=shear, angle=angle, warp=warp)
    augment = augment if callable(augment) else distort if augment else None
    segments = {"output": crop, "batch_size": batch_size, "scheme": scheme, "flip": False, "augment": augment, "seed": seed}
    sampler = make_segments(cases, model, **segments)
    rmsprop = partial(torch.optim.RMSprop, alpha=0.9, eps=1e-8)
    optimizer = prepare_optimizer(model, optimizer, learning_rate, rmsprop, 1e-3)
    run = {"steps": steps, "validation": validation, "validate_every": validate_every, "patience": patience, "folder": folder}
    run |= {"seed": seed, "progress": progress, "engine": engine}
    return train(
        model,
        sampler,
        cases,
        optimizer=optimizer,
        loss=loss,
        l2=weight_decay,
        schedule=prepare_schedule(optimizer, schedule, halvings, steps, paper=optimizers.InverseTimeDecay),
        **run,
    )


_PROSTATE = Recipe(
    "drozdzal-promise12",
    network="fcn_fc_resnet",
    paper="Drozdzal et al. 2018, section 4.3",
    data="PROMISE12 training set, 50 cases; research use",
    loader="promise12",
    channels=("t2",),
    classes=1,
    normalise="none",
    settings={"learning_rate": 4e-4, "weight_decay": 1e-5, "batch_size": 24, "shear": 0.1, "angle": 10.0, "patience": 50},
    validation=0.2,
    regions={"prostate": [1]},
    postprocess="largest",
    reported={
        "where": "Table VI, ten networks, PROMISE12's 30 test cases",
        "dice": {"prostate": 0.874},
        "boundary_distance": {"prostate": 2.17},
    },
    departs="five folds instead of ten random splits into 40 and 10; an epoch of the patience is taken as 100 updates",
)

RECIPES = (
    Recipe(
        "drozdzal-isbi2012",
        network="fcn_fc_resnet",
        paper="Drozdzal et al. 2018, section 4.1",
        data="ISBI 2012 electron microscopy, 30 slices of 512×512; free",
        loader="isbi2012",
        channels=("em",),
        classes=1,
        normalise="none",
        settings={"learning_rate": 1e-3, "patience": 50},
        validation=0.2,
        regions="cells",
        reported={
            "where": "Table IV, ten networks, the challenge's 30 test slices",
            "v_rand": {"cells": 0.981},
            "v_info": {"cells": 0.988},
        },
        departs="five folds of the training slices, whose truth is public, one network each (--members for more); an epoch of "
        "the patience is taken as 100 updates",
    ),
    _PROSTATE,
    replace(
        _PROSTATE,
        name="drozdzal-msd-prostate",
        data="Medical Segmentation Decathlon, Task05_Prostate, 32 cases; free (CC BY-SA 4.0)",
        loader="msd",
        label_map={2: 1},
        departs="not the paper's data: both zones of the prostate together, with the paper's settings for PROMISE12",
    ),
    Recipe(
        "drozdzal-lits",
        network="fcn_fc_resnet",
        paper="Drozdzal et al. 2018, section 4.2",
        data="LiTS, 131 CT volumes; by registration",
        loader="lits",
        channels=("ct",),
        label_map={1: 0, 2: 1},
        classes=1,
        normalise="none",
        settings={
            "learning_rate": 1e-3,
            "crop": 128,
            "batch_size": 20,
            "scheme": "foreground",
            "augment": False,
            "patience": 50,
        },
        validation=0.27,
        regions={"lesion": [1]},
        reported={"where": "Table V, 30 test scans of the authors' own hospital: other cases", "dice": {"lesion": 0.711}},
        departs="not the paper's data; half of the crops instead of all are around a lesion; one weight decay for the whole network "
        "(the paper has 5e-4 for FC-ResNet); five folds instead of one split into 77, 28 and 30; an epoch is taken as 100 updates",
    ),
)
