"""Mlynarski's 2D networks, and the 3D networks that take their scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from .. import context, losses, models, optimizers, training
from ..sampling import SegmentSampler
from ..volume import Case
from ._shared import build, card, check, validation_of

# Our choice: the paper names no number of updates.
MLYNARSKI_STEPS = 10_000


def mlynarski(
    cases: Sequence[Case],
    *,
    network: str = "mlynarski_2d",
    classes: int | None = None,
    steps: int = MLYNARSKI_STEPS,
    target_weights: Sequence[float] | None = None,
    learning_rate: float = 0.25,
    window: int = 200,
    output: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    scheme: str | None = None,
    flip: bool = True,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    **options,
) -> nn.Module:
    """Train one of Mlynarski's networks: 2D on squares of slices, 3D on cubes, with or without scores of 2D networks.

    For a 2D network of another plane, turn the cases first (`context.facing`) and leave `flip` out where the first axis is not
    left to right. For a 3D network with features, give cases `context.with_scores` and `variant="a"`, "b" or "c".

    Args:
        cases: labelled cases, normalised.
        network: "mlynarski_2d" or "mlynarski_3d".
        classes: output classes; by default the highest label plus one.
        steps: updates.
        target_weights: what each class counts in a batch; by default .7 for the background in 2D and .4 in 3D, and the same for
            each of the others, as in the paper.
        learning_rate: length of a step of `optimizers.NormalizedSGD`, .25 in the paper.
        window: updates between decisions on it (`optimizers.HalveOnSlowLoss`), 200 in the paper.
        output: side of the predicted square (by default 192) or cube (28, from 70³ voxels).
        batch_size: squares or cubes per batch, by default 4 or 1.
        accumulate: batches per update, 10 (2D) or 5 (3D) in the paper.
        scheme: see `SegmentSampler`; by default "uniform" in 2D and "foreground" in 3D.
        flip: mirror left to right with probability one half.
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        folder: where the run is kept; the same call goes on from an interrupted run.
        width: scales every feature-map count.
        device: "cpu", "cuda", ….
        seed: of the initial weights and the segments.
        options: further ones of the builder: subnets=2, variant="a".

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Mlynarski et al. 2019, sections 2.4 and 3. Squares and their number are our choice: the paper has whole slices.
    """
    classes = check(cases, network, models.MLYNARSKI, classes)
    flat = network == "mlynarski_2d"
    features = sum(channel.split()[0] in context.PLANES for channel in cases[0].channels)  # of context.with_scores
    if not flat:
        options = {"features": features, "variant": "a" if features else "standard"} | options
    model = build(network, cases, classes, width, seed, device, channels=len(cases[0].channels) - features, **options)
    if target_weights is None:
        background = 0.7 if flat else 0.4
        target_weights = [background, *[(1 - background) / (classes - 1)] * (classes - 1)]
    sampler = SegmentSampler(
        cases,
        output=output or (192 if flat else 28),
        margin=model.margin,
        batch_size=batch_size or (4 if flat else 1),
        scheme=scheme or ("uniform" if flat else "foreground"),
        flip=flip,
        spatial_dims=model.spatial_dims,
        seed=seed,
    )

    def balanced(logits, target):
        return losses.balanced_cross_entropy(logits, target, target_weights=target_weights)

    def supervised(outputs, target):
        return losses.deep_supervision(outputs, target, loss=balanced)

    optimizer = optimizers.NormalizedSGD(model.parameters(), lr=learning_rate)
    model.history = training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=supervised if flat else balanced,
        forward=model.with_auxiliary if flat else None,
        accumulate=accumulate or (10 if flat else 5),
        schedule=optimizers.HalveOnSlowLoss(optimizer, window=window),
        validate=validation_of(validation, classes),
        validate_every=min(validate_every, steps),
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.card = card(network, cases, classes, steps, seed, device)
    return model
