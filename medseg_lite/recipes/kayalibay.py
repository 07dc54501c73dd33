"""Kayalibay's 3D U-Net."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import losses, models, optimizers, training, transforms
from ..sampling import VolumeSampler
from ..volume import Case
from ._shared import build, card, check, validation_of

# 50 epochs of 220 cases, one case an update.
KAYALIBAY_STEPS = 11_000


def kayalibay(
    cases: Sequence[Case],
    *,
    network: str = "kayalibay_unet3d",
    classes: int | None = None,
    steps: int = KAYALIBAY_STEPS,
    learning_rate: float = 5e-5,
    halvings: Sequence[float] = (),
    loss: str = "jaccard",
    crop: int | Sequence[int] | None = None,
    batch_size: int = 1,
    augment: bool = True,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    patience: int | None = None,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    engine: dict | None = None,
    **options,
) -> nn.Module:
    """Train Kayalibay's 3D U-Net on whole volumes, or crops of them, with the paper's settings.

    Args:
        cases: labelled cases. The authors feed raw intensities; `transforms.standardise` is the safer choice.
        network: "kayalibay_unet3d".
        classes: output classes; by default the highest label plus one.
        steps: updates. The paper makes 50 epochs of 220 brains, or 600 of 20 hands.
        learning_rate: Adam's, 5e-5 in the paper. Short runs need more, 1e-3 or so.
        halvings: fractions of the run after which it is halved; the paper has none.
        loss: "jaccard" (`losses.jaccard_distance`) or "cross_entropy".
        crop: voxels along each axis of random crops; None for whole volumes, as in the paper.
        batch_size: volumes per update; 1 in the paper.
        augment: leave as is, flip or rotate each volume (`transforms.augment`).
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        patience: stop when it has not risen for this many validations, and go back to the best weights.
        folder: where the run is kept; the same call goes on from an interrupted run.
        width: scales every feature-map count; 1 is the paper's size.
        device: "cpu", "cuda", ….
        seed: of the initial weights, the order of cases and the augmentation.
        engine: options of `training.fit` for the machine at hand: precision, compiled, channels_last, workers, tensorboard.
        options: further ones of `models.kayalibay.KayalibayUNet3d`, such as merge="sum" or maps=1.

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Kayalibay et al. 2017, section 3.2.
    """
    classes = check(cases, network, models.KAYALIBAY, classes)
    functions = {"jaccard": losses.jaccard_distance, "cross_entropy": losses.cross_entropy}
    if loss not in functions:
        raise ValueError(f"loss={loss!r}; expected one of {', '.join(functions)}")
    model = build(network, cases, classes, width, seed, device, **options)
    sampler = VolumeSampler(
        cases,
        crop=crop,
        multiple=model.multiple,
        batch_size=batch_size,
        augment=transforms.augment if augment else None,
        seed=seed,
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    model.history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=functions[loss],
        schedule=optimizers.HalveAt(optimizer, steps=[round(f * steps) for f in halvings]),
        validate=validation_of(validation, classes),
        validate_every=min(validate_every, steps),
        patience=patience,
        folder=folder,
        seed=seed,
        progress=progress,
        **engine or {},
    )
    model.card = card(network, cases, classes, steps, seed, device) | {"loss": loss}
    return model
