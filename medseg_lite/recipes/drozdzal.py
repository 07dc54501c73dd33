"""Drozdzal's FCN pre-processor with FC-ResNet, and its baselines."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import losses, models, optimizers, training, transforms
from ..sampling import SegmentSampler
from ..volume import Case
from ._shared import build, card, check, validation_of

# Our choice: the paper trains until the validation score has not risen for 50 epochs.
DROZDZAL_STEPS = 20_000


def drozdzal(
    cases: Sequence[Case],
    *,
    network: str = "fcn_fc_resnet",
    classes: int | None = None,
    steps: int = DROZDZAL_STEPS,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-4,
    crop: int = 256,
    batch_size: int = 8,
    scheme: str = "uniform",
    augment: bool = True,
    shear: float = 0.41,
    angle: float = 25.0,
    warp: float = 0.1,
    validation: Sequence[Case] = (),
    validate_every: int = 100,
    patience: int | None = None,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    engine: dict | None = None,
) -> nn.Module:
    """Train the FCN pre-processor with FC-ResNet, or a network it is compared with, on crops of slices.

    The settings are the paper's for electron microscopy. For the prostate: `learning_rate=4e-4, weight_decay=1e-5, batch_size=24,
    shear=0.1, angle=10`; for the liver: `crop=128, batch_size=20`.

    Args:
        cases: labelled cases. The pipeline takes raw intensities, the other networks want normalised ones.
        network: one of `models.DROZDZAL` that segments: "fcn_fc_resnet", "fc_resnet", "unet2d", "fcn8".
        classes: outputs; by default the highest label plus one.
        steps: updates.
        learning_rate: RMSProp's at the start; after t updates it is divided by 1 + .001 t.
        weight_decay: λ of λ Σ w² over the kernels.
        crop: side of the crops in pixels, a multiple of the network's `multiple`.
        batch_size: crops per update.
        scheme: of their centres, see `SegmentSampler`; "foreground" for lesions that most crops would miss.
        augment: flip, shear, rotate and bend the crops (`transforms.distort`), by at most `shear`, `angle`, `warp`.
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        patience: stop when it has not risen for this many validations, and go back to the best weights (50 epochs in the paper).
        folder: where the run is kept; the same call goes on from an interrupted run.
        width: scales every feature-map count; 1 is the paper's size.
        device: "cpu", "cuda", ….
        seed: of the initial weights, the crops and the augmentation. The paper's ensemble is ten seeds.
        engine: options of `training.fit` for the machine at hand: precision, compiled, channels_last, workers, tensorboard.

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Drozdzal et al. 2018, section 4.
    """
    networks = [name for name in models.DROZDZAL if name != "fcn_preprocessor"]
    classes = check(cases, network, networks, classes)
    model = build(network, cases, classes, width, seed, device)
    if crop % model.multiple:
        raise ValueError(f"crop={crop}; {network} needs a multiple of {model.multiple}")

    def distorted(image, label, *, rng):
        return transforms.distort(image, label, rng=rng, shear=shear, angle=angle, warp=warp)

    sampler = SegmentSampler(
        cases,
        output=crop,
        batch_size=batch_size,
        scheme=scheme,
        flip=False,
        spatial_dims=2,
        augment=distorted if augment else None,
        seed=seed,
    )
    optimizer = torch.optim.RMSprop(model.parameters(), lr=learning_rate, alpha=0.9, eps=1e-8)
    model.history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=losses.dice_loss,
        l2=weight_decay,
        schedule=optimizers.InverseTimeDecay(optimizer),
        validate=validation_of(validation, classes),
        validate_every=min(validate_every, steps),
        patience=patience,
        folder=folder,
        seed=seed,
        progress=progress,
        **engine or {},
    )
    model.card = card(network, cases, classes, steps, seed, device)
    return model
