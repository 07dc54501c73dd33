"""Mlynarski's 2D networks, and the 3D networks that take their scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import context, losses, models, optimizers, training, transforms
from ..models.mlynarski import Mlynarski2d
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
    incomplete: Sequence[Case] = (),
    pretrain_steps: int = 0,
    drop: float = 0.0,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    engine: dict | None = None,
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
        incomplete: further labelled cases, each lacking sequences, for `pretrain_steps`. The network as a whole never sees them.
        pretrain_steps: updates of every 2D subnetwork of one sequence by itself, on the cases and incomplete cases that have the
            sequence (`pretrain_subnetwork`), before the network is trained.
        drop: probability with which a square of the 2D network lacks a sequence, so that it learns to do without one
            (`transforms.drop_channels`; not in the paper).
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        folder: where the run is kept; the same call goes on from an interrupted run.
        width: scales every feature-map count.
        device: "cpu", "cuda", ….
        seed: of the initial weights and the segments.
        engine: options of `training.fit` for the machine at hand: precision, compiled, channels_last, workers, tensorboard.
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
    elif features:
        raise ValueError(f"{cases[0].name} has scores of 2D networks among its channels; those are for mlynarski_3d")
    if not flat and (incomplete or pretrain_steps or drop):
        raise ValueError("incomplete, pretrain_steps and drop are for mlynarski_2d: only it has a subnetwork for each sequence")
    if incomplete and not pretrain_steps:
        raise ValueError("incomplete cases serve to pre-train subnetworks only; give pretrain_steps=, or leave them out")
    model = build(network, cases, classes, width, seed, device, channels=len(cases[0].channels) - features, **options)
    target_weights = target_weights or _weights(classes, 0.7 if flat else 0.4)
    channels = cases[0].channels
    if pretrain_steps:
        for channel in channels:
            pretrain_subnetwork(
                model,
                channel,
                [*cases, *incomplete],
                channels=channels,
                steps=pretrain_steps,
                target_weights=target_weights,
                learning_rate=learning_rate,
                window=window,
                output=output or 192,
                batch_size=batch_size or 4,
                accumulate=accumulate or 10,
                scheme=scheme or "uniform",
                flip=flip,
                folder=Path(folder) / f"subnetwork_{channel}" if folder else None,
                seed=seed,
                progress=progress,
            )
    sampler = SegmentSampler(
        cases,
        output=output or (192 if flat else 28),
        margin=model.margin,
        batch_size=batch_size or (4 if flat else 1),
        scheme=scheme or ("uniform" if flat else "foreground"),
        flip=flip,
        spatial_dims=model.spatial_dims,
        augment=partial(transforms.drop_channels, probability=drop) if drop else None,
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
        **engine or {},
    )
    model.card = card(network, cases, classes, steps, seed, device)
    if pretrain_steps:
        model.card |= {"pretrained_on": [c.name for c in incomplete], "pretrain_steps": pretrain_steps}
    return model


def pretrain_subnetwork(
    model: Mlynarski2d,
    channel: str,
    cases: Sequence[Case],
    *,
    channels: Sequence[str],
    steps: int,
    target_weights: Sequence[float] | None = None,
    learning_rate: float = 0.25,
    window: int = 200,
    output: int = 192,
    batch_size: int = 4,
    accumulate: int = 10,
    scheme: str = "uniform",
    flip: bool = True,
    folder: str | Path | None = None,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Train the subnetwork of one sequence by itself, on all cases that have the sequence.

    Where every case lacks some sequence, no more than a few can show the whole network all of them; but each subnetwork
    can learn from most. The network is changed in place: the subnetwork and its auxiliary classifier.

    Args:
        model: a 2D network.
        channel: whose subnetwork.
        cases: labelled, normalised; those whose `channels` lack this one are left aside.
        channels: the network's sequences in the order of its inputs.
        steps: updates.
        target_weights, learning_rate, window, output, batch_size, accumulate, scheme, flip, folder, seed, progress: as for
            `mlynarski`.

    Returns:
        One row per update, as `training.fit`.

    Source: Mlynarski et al. 2019, sections 2.2 and 3.2.
    """
    channels = tuple(channels)
    if len(channels) != model.in_channels:
        raise ValueError(f"channels names {', '.join(channels)}; the network takes {model.in_channels} sequences")
    if channel not in channels:
        raise ValueError(f"channel={channel!r}; the network's sequences are {', '.join(channels)}")
    for case in cases:
        unknown = [c for c in case.channels if c not in channels]
        if unknown:
            raise ValueError(
                f"{case.name} has {', '.join(unknown)}, which the network does not take; its sequences are "
                f"{', '.join(channels)}: use case.select([...])"
            )
    having = [case.select([channel]) for case in cases if channel in case.channels]
    if not having:
        raise ValueError(f"none of the {len(cases)} cases has {channel}, so its subnetwork has nothing to learn from")
    subnetwork = model.subnetwork(channels.index(channel))
    weights = target_weights or _weights(model.classes, 0.7)
    sampler = SegmentSampler(having, output=output, batch_size=batch_size, scheme=scheme, flip=flip, spatial_dims=2, seed=seed)
    optimizer = optimizers.NormalizedSGD(subnetwork.parameters(), lr=learning_rate)
    return training.fit(
        subnetwork,
        sampler,
        steps=steps,
        optimizer=optimizer,
        loss=partial(losses.balanced_cross_entropy, target_weights=weights),
        accumulate=accumulate,
        schedule=optimizers.HalveOnSlowLoss(optimizer, window=window),
        validate_every=steps,
        folder=folder,
        seed=seed,
        progress=progress,
    )


def _weights(classes: int, background: float) -> list[float]:
    return [background, *[(1 - background) / (classes - 1)] * (classes - 1)]
