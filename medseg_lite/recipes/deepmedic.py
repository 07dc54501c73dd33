"""DeepMedic and the networks it is compared with.

networks    `models.deepmedic`, `models.deep_plus`, … (`models.DEEPMEDIC`)
samples     `sampling.SegmentSampler`: dense segments, half of them centred on a lesion
loss        `losses.cross_entropy`, with penalties on the kernels
optimiser   `optimizers.RMSpropNesterov`, `optimizers.HalveAt`
afterwards  `crf.DenseCRF`
notebooks   04, 05, 06 and 07
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from .. import losses, models, optimizers
from ..engine.identity import weights_code
from ..models import Network
from ..volume import Case
from .recipe import (
    OptimizerMaker,
    Recipe,
    ScheduleMaker,
    load_start,
    make_segments,
    network_name,
    prepare_network,
    prepare_optimizer,
    prepare_schedule,
    train,
)

# 35 epochs × 20 sub-epochs × 100 updates, and the epochs after which the published configuration halves the rate.
DEEPMEDIC_STEPS = 70_000
DEEPMEDIC_HALVINGS = tuple(epoch / 35 for epoch in (12, 16, 19, 22, 25, 28, 31, 34))

# Table B.1: predicted side, segments per update, learning rate and momentum where they are not 9, 10, 1e-3 and .6.
OUTPUT = {"dm2d_patch": 1}
BATCH_SIZE = {"dm2d_patch": 540, "dm2d_seg": 250, "wider2d_seg": 100, "deeper2d_seg": 100, "large2d_seg": 100}
LEARNING_RATE = {"shallow": 1e-4, "deep": 1e-4, "dm2d_patch": 1e-2}
MOMENTUM = {"dm2d_patch": 0.9}


def deepmedic(
    cases: Sequence[Case],
    *,
    network: str | Network = "deepmedic",
    classes: int | None = None,
    steps: int = DEEPMEDIC_STEPS,
    learning_rate: float | None = None,
    halvings: Sequence[float] = DEEPMEDIC_HALVINGS,
    schedule: ScheduleMaker | None = None,
    optimizer: OptimizerMaker | None = None,
    loss: Callable = losses.cross_entropy,
    augment: Callable | None = None,
    output: int | None = None,
    batch_size: int | None = None,
    scheme: str = "foreground",
    shift: float = 0.0,
    conv_dropout: float = 0.0,
    start: str | Path | None = None,
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
    """Train DeepMedic, or one of the networks it is compared with, with the paper's settings.

    `classes`, `optimizer`, `schedule`, `validation`, `validate_every`, `patience`, `folder`, `width`, `device`, `progress` and `engine`
    are described in `medseg_lite.recipes`.

    Args:
        cases: labelled cases, normalised (`transforms.standardise`).
        network: name of the builder in `models`, "deepmedic", "deep_plus", "dm2d_seg", …; or a built network.
        steps: number of updates. The paper makes 70,000.
        learning_rate: learning rate at the start, by default 1e-3, or what Table B.1 has for the network.
        halvings: fractions of the run after which the learning rate is halved, by default the published schedule.
        loss: function of logits and label.
        augment: function `(image, label, *, rng)` of each batch of segments, or None.
        output: side of the predicted block (9, so segments of 25³ for DeepMedic).
        batch_size: number of segments per update (Table B.1).
        scheme: scheme of the segments' centres, see `SegmentSampler`.
        shift: random shift of the intensities, .1 in the paper's brain-injury experiments and 0 for tumours.
        conv_dropout: dropout of the pathways' convolutions, .02 in the paper's brain-injury experiments and 0 for tumours.
        start: checkpoint to begin from instead of random weights (fine-tuning). It must hold the same network.
        seed: seed of the initial weights, the segments and the dropout. The paper's ensemble is three seeds.
        options: further options of the builder, such as dropout=0.

    Returns:
        The network in evaluation mode. `network.history` has one row per update, and `network.card` says what was done.

    Source: Kamnitsas et al. 2017, sections 4.1.2 and 4.2.2, appendix B and Table B.1.
    Taught in notebooks 04 and 05.
    """
    options |= {"conv_dropout": conv_dropout} if conv_dropout else {}
    build = {"classes": classes, "width": width, "seed": seed, "device": device, "validation": validation, **options}
    model = prepare_network(network, cases, models.DEEPMEDIC, **build)
    if start is not None:
        load_start(start, model, ignore=["dropout", "conv_dropout"])
    name, flat = network_name(model), model.spatial_dims == 2
    sizes = {"output": output or OUTPUT.get(name, 9), "batch_size": batch_size or BATCH_SIZE.get(name, 10)}
    sampler = make_segments(cases, model, scheme=scheme, shift=shift, augment=augment, seed=seed, **sizes)
    rmsprop = partial(optimizers.RMSpropNesterov, momentum=MOMENTUM.get(name, 0.6))
    optimizer = prepare_optimizer(model, optimizer, learning_rate, rmsprop, LEARNING_RATE.get(name, 1e-3))
    run = {"steps": steps, "validation": validation, "validate_every": validate_every, "patience": patience, "folder": folder}
    run |= {"seed": seed, "progress": progress, "engine": engine}
    return train(
        model,
        sampler,
        cases,
        optimizer=optimizer,
        loss=loss,
        l1=1e-8 if flat else 1e-6,
        l2=1e-6 if flat else 1e-4,
        schedule=prepare_schedule(optimizer, schedule, halvings, steps),
        **run,
        facts={"started_from": Path(start).name} if start else None,
        made_from={"start": weights_code(model)} if start else None,
    )


RECIPES = (
    Recipe(
        "deepmedic-brats2015",
        network="deepmedic",
        paper="Kamnitsas et al. 2017, section 4.2 and appendix B",
        data="BRATS 2015 training set, 274 cases; by registration",
        loader="brats2015",
        channels=("flair", "t1", "t1c", "t2"),
        classes=5,
        settings={"learning_rate": 1e-3, "output": 9, "batch_size": 10},
        reported={
            "where": "Table 2, DeepMedic without CRF, five folds of the same 274 cases",
            "dice": {"whole": 0.897, "core": 0.750, "enhancing": 0.720},
            "precision": {"whole": 0.897, "core": 0.842, "enhancing": 0.756},
            "sensitivity": {"whole": 0.905, "core": 0.723, "enhancing": 0.725},
        },
        departs="one network per fold; --members 3 for the paper's ensemble. The CRF is applied afterwards (medseg_lite.crf)",
    ),
    Recipe(
        "deepmedic-msd-brain",
        network="deepmedic",
        paper="Kamnitsas et al. 2017, section 4.2 and appendix B",
        data="Medical Segmentation Decathlon, Task01_BrainTumour, 484 cases; free (CC BY-SA 4.0)",
        loader="msd",
        loader_options={"as_brats": True},
        channels=("flair", "t1", "t1c", "t2"),
        label_map={4: 3},
        classes=4,
        settings={"learning_rate": 1e-3, "output": 9, "batch_size": 10},
        regions={"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]},
        reported={
            "where": "Table 2, DeepMedic without CRF, five folds of BRATS 2015: other cases",
            "dice": {"whole": 0.897, "core": 0.750, "enhancing": 0.720},
        },
        departs="not the paper's data, but cases of BRATS 2016 and 2017 that anyone may download",
    ),
)
