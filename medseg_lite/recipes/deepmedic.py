"""DeepMedic and the networks it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import models, optimizers, training
from ..sampling import SegmentSampler
from ..volume import Case
from ._shared import build, card, check, validation_of

# 35 epochs × 20 sub-epochs × 100 updates, and the epochs after which the published configuration halves the rate.
DEEPMEDIC_STEPS = 70_000
DEEPMEDIC_HALVINGS = tuple(epoch / 35 for epoch in (12, 16, 19, 22, 25, 28, 31, 34))

# Table B.1: the predicted side and the batch size where they are not 9 and 10.
_OUTPUT = {"dm2d_patch": 1}
_BATCH = {"dm2d_patch": 540, "dm2d_seg": 250, "wider2d_seg": 100, "deeper2d_seg": 100, "large2d_seg": 100}


def deepmedic(
    cases: Sequence[Case],
    *,
    network: str = "deepmedic",
    classes: int | None = None,
    steps: int = DEEPMEDIC_STEPS,
    halvings: Sequence[float] = DEEPMEDIC_HALVINGS,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    folder: str | Path | None = None,
    start: str | Path | None = None,
    width: float = 1.0,
    output: int | None = None,
    batch_size: int | None = None,
    scheme: str = "foreground",
    shift: float = 0.0,
    conv_dropout: float = 0.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    engine: dict | None = None,
) -> nn.Module:
    """Train DeepMedic, or one of the networks it is compared with, with the paper's settings.

    Args:
        cases: labelled cases, normalised (`transforms.standardise`).
        network: name of the builder in `models`: "deepmedic", "deep_plus", "dm2d_seg", …
        classes: output classes; by default the highest label plus one.
        steps: updates. The paper makes 70,000.
        halvings: fractions of the run after which the learning rate is halved, by default the published schedule.
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        folder: where the run is kept; the same call goes on from an interrupted run.
        start: a checkpoint to begin from instead of random weights (fine-tuning); `network` and `width` must be its own.
        width: scales every feature-map count; 1 is the paper's size.
        output: side of the predicted block (9, so segments of 25³ for DeepMedic).
        batch_size: segments per update (Table B.1).
        scheme: see `SegmentSampler`.
        shift, conv_dropout: 0.1 and 0.02 in the paper's brain-injury experiments, 0 for tumours.
        device: "cpu", "cuda", ….
        seed: of the initial weights, the segments and the dropout. The paper's ensemble is three seeds.
        engine: options of `training.fit` for the machine at hand: precision, compiled, channels_last, workers, tensorboard.

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Kamnitsas et al. 2017, sections 4.1.2 and 4.2.2, appendix B and Table B.1.
    """
    classes = check(cases, network, models.DEEPMEDIC, classes)
    options = {"conv_dropout": conv_dropout} if conv_dropout else {}
    model = build(network, cases, classes, width, seed, device, **options)
    if start is not None:
        before = models.load(start)
        wanted, found = (m.config | {"conv_dropout": None} for m in (model, before))
        if wanted != found:
            raise ValueError(
                f"{start} holds {before.config}; this run wants {model.config}: choose the same network, width and classes"
            )
        model.load_state_dict(before.state_dict())
    flat = model.spatial_dims == 2
    sampler = SegmentSampler(
        cases,
        output=output or _OUTPUT.get(network, 9),
        margin=model.margin,
        cut=model.cut,
        batch_size=batch_size or _BATCH.get(network, 10),
        scheme=scheme,
        shift=shift,
        spatial_dims=model.spatial_dims,
        seed=seed,
    )
    patch = network == "dm2d_patch"
    optimizer = optimizers.RMSpropNesterov(
        model.parameters(),
        lr=1e-4 if network in ("shallow", "deep") else 1e-2 if patch else 1e-3,
        momentum=0.9 if patch else 0.6,
    )
    history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        l1=1e-8 if flat else 1e-6,
        l2=1e-6 if flat else 1e-4,
        schedule=optimizers.HalveAt(optimizer, steps=[round(f * steps) for f in halvings]),
        validate=validation_of(validation, classes),
        validate_every=min(validate_every, steps),
        folder=folder,
        seed=seed,
        progress=progress,
        **engine or {},
    )
    model.history = history
    model.card = card(network, cases, classes, steps, seed, device)
    if start is not None:
        model.card["started_from"] = Path(start).name
    return model
