"""Mlynarski's 2D networks, and the 3D networks that take their scores.

networks    `models.mlynarski_2d`, `models.mlynarski_3d`
samples     `sampling.SegmentSampler`: squares of slices, or cubes; `context.with_scores` joins the scores to the image
loss        `losses.balanced_cross_entropy`, with `losses.deep_supervision` in 2D
optimiser   `optimizers.NormalizedSGD`, `optimizers.HalveOnSlowLoss`
afterwards  `ensembles.Vote`
notebooks   12 and 13
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from .. import context, losses, models, optimizers, training, transforms
from ..models import Network
from ..models.mlynarski import Mlynarski2d
from ..volume import Case
from .recipe import (
    OptimizerMaker,
    Recipe,
    ScheduleMaker,
    make_segments,
    prepare_network,
    prepare_optimizer,
    prepare_schedule,
    split_engine,
    train,
)

# Our choice: the paper names no number of updates.
MLYNARSKI_STEPS = 10_000
SAMPLES_2D = {"output": 192, "batch_size": 4, "accumulate": 10, "scheme": "uniform"}
SAMPLES_3D = {"output": 28, "batch_size": 1, "accumulate": 5, "scheme": "foreground"}


def mlynarski(
    cases: Sequence[Case],
    *,
    network: str | Network = "mlynarski_2d",
    classes: int | None = None,
    steps: int = MLYNARSKI_STEPS,
    learning_rate: float | None = None,
    window: int = 200,
    halvings: Sequence[float] | None = None,
    schedule: ScheduleMaker | None = None,
    optimizer: OptimizerMaker | None = None,
    target_weights: Sequence[float] | None = None,
    loss: Callable | None = None,
    augment: Callable | None = None,
    output: int | None = None,
    batch_size: int | None = None,
    accumulate: int | None = None,
    scheme: str | None = None,
    flip: bool = True,
    drop: float = 0.0,
    incomplete: Sequence[Case] = (),
    pretrain_steps: int = 0,
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
    """Train one of Mlynarski's networks: 2D on squares of slices, 3D on cubes, with or without scores of 2D networks.

    For a 2D network of another plane, turn the cases first (`context.facing`) and set `flip=False` where the first axis is not
    left to right. For a 3D network with features, give cases `context.with_scores` and `variant="a"`, "b" or "c".

    `classes`, `optimizer`, `schedule`, `validation`, `validate_every`, `patience`, `folder`, `width`, `device`, `progress` and `engine`
    are described in `medseg_lite.recipes`.

    Args:
        cases: labelled cases, normalised.
        network: "mlynarski_2d" or "mlynarski_3d"; or a built network.
        steps: number of updates.
        learning_rate: length of a step of `optimizers.NormalizedSGD`, .25 in the paper.
        window: number of updates between decisions on it (`optimizers.HalveOnSlowLoss`), 200 in the paper.
        halvings: fractions of the run after which the rate is halved, in place of those decisions.
        target_weights: weight of each class in a batch; by default .7 for the background in 2D and .4 in 3D, and the same for
            each of the others, as in the paper.
        loss: function of logits and label, by default `losses.balanced_cross_entropy` with these weights.
        augment: function `(image, label, *, rng)` of each batch, or None. Sequences are dropped (`drop`) after it.
        output: side of the predicted square (by default 192) or cube (28, from 70³ voxels).
        batch_size: number of squares or cubes per batch, by default 4 or 1.
        accumulate: number of batches per update, 10 (2D) or 5 (3D) in the paper.
        scheme: scheme of the samples' centres, see `SegmentSampler`; by default "uniform" in 2D and "foreground" in 3D.
        flip: whether to mirror samples left to right with probability one half.
        drop: probability with which a square of the 2D network lacks a sequence, so that it learns to do without one
            (`transforms.drop_channels`; not in the paper).
        incomplete: further labelled cases, each without some sequence, for `pretrain_steps`. The network as a whole never sees them.
        pretrain_steps: number of updates of every 2D subnetwork of one sequence by itself, on the cases and incomplete cases that have
            the sequence (`pretrain_subnetwork`), before the network is trained. Of `engine` it takes the options of the machine.
        seed: seed of the initial weights and the samples.
        options: further options of the builder, such as subnets=2 or variant="a".

    Returns:
        The network in evaluation mode. `network.history` has one row per update, and `network.card` says what was done.

    Source: Mlynarski et al. 2019, sections 2.4 and 3. Squares and their number are our choice: the paper has whole slices.
    Taught in notebooks 12 and 13.
    """
    build = {"classes": classes, "width": width, "seed": seed, "device": device, "validation": validation, **options}
    model = _prepare(network, cases, others=incomplete, **build)
    flat = isinstance(model, Mlynarski2d)
    _check_2d_only(flat, incomplete=incomplete, pretrain_steps=pretrain_steps, drop=drop)
    samples, accumulate = _choose_samples(model, accumulate, output=output, batch_size=batch_size, scheme=scheme)
    weights = _choose_weights(model, target_weights)
    if pretrain_steps:
        how = samples | {"target_weights": weights, "window": window, "accumulate": accumulate, "flip": flip, "seed": seed}
        how |= {"progress": progress, "engine": split_engine(engine)[0]}
        _pretrain_subnetworks(model, cases, incomplete, pretrain_steps, learning_rate, folder, **how)
    sampler = make_segments(cases, model, flip=flip, augment=_with_dropping(augment, drop), seed=seed, **samples)
    loss = loss or partial(losses.balanced_cross_entropy, target_weights=weights)
    optimizer = prepare_optimizer(model, optimizer, learning_rate, optimizers.NormalizedSGD, 0.25)
    slow = partial(optimizers.HalveOnSlowLoss, window=window)
    run = {"steps": steps, "validation": validation, "validate_every": validate_every, "patience": patience, "folder": folder}
    run |= {"accumulate": accumulate, "seed": seed, "progress": progress, "engine": engine}
    return train(
        model,
        sampler,
        cases,
        optimizer=optimizer,
        loss=partial(losses.deep_supervision, loss=loss) if flat else loss,
        forward=model.with_auxiliary if flat else None,
        schedule=prepare_schedule(optimizer, schedule, halvings, steps, paper=slow),
        **run,
        facts={"pretrained_on": [c.name for c in incomplete], "pretrain_steps": pretrain_steps} if pretrain_steps else None,
    )


def _prepare(network: str | Network, cases: Sequence[Case], **build) -> Network:
    """Build the network, told how many of the channels are scores of 2D networks."""
    channels = None
    if isinstance(network, str) and cases:
        features = sum(channel.split()[0] in context.PLANES for channel in cases[0].channels)  # of context.with_scores
        if network == "mlynarski_3d":
            build = {"features": features, "variant": "a" if features else "standard"} | build
        elif features:
            raise ValueError(f"{cases[0].name} has scores of 2D networks among its channels; those are for mlynarski_3d")
        channels = len(cases[0].channels) - features
    return prepare_network(network, cases, models.MLYNARSKI, channels=channels, **build)


def _check_2d_only(flat: bool, *, incomplete: Sequence[Case], pretrain_steps: int, drop: float) -> None:
    if not flat and (incomplete or pretrain_steps or drop):
        raise ValueError("incomplete, pretrain_steps and drop are for mlynarski_2d: only it has a subnetwork for each sequence")
    if incomplete and not pretrain_steps:
        raise ValueError("incomplete cases serve to pre-train subnetworks only; give pretrain_steps=, or leave them out")


def _with_dropping(augment: Callable | None, drop: float) -> Callable | None:
    """Return the augmentation, followed by sequences dropped with a probability."""
    if not drop:
        return augment
    dropping = partial(transforms.drop_channels, probability=drop)
    return partial(_augment_and_drop, augment=augment, drop=dropping) if augment else dropping


def _augment_and_drop(image: Tensor, label: Tensor, *, rng, augment: Callable, drop: Callable) -> tuple[Tensor, Tensor]:
    return drop(*augment(image, label, rng=rng), rng=rng)


def _choose_samples(model: Network, accumulate: int | None, **given) -> tuple[dict, int]:
    """Return options of the samples, and the batches for an update; those of the network's dimension where they are not given."""
    samples = dict(SAMPLES_2D if model.spatial_dims == 2 else SAMPLES_3D)
    usual = samples.pop("accumulate")
    return {name: value if given.get(name) is None else given[name] for name, value in samples.items()}, accumulate or usual


def _choose_weights(model: Network, given: Sequence[float] | None) -> Sequence[float]:
    """Return the weight of each class in a batch; by default the paper's for networks of that dimension."""
    return class_weights(model.classes, 0.7 if model.spatial_dims == 2 else 0.4) if given is None else given


def _pretrain_subnetworks(model: Mlynarski2d, complete, incomplete, steps, learning_rate, folder, **how) -> None:
    how |= {"steps": steps, "channels": complete[0].channels, "learning_rate": learning_rate or 0.25}
    for channel in complete[0].channels:
        place = Path(folder) / f"subnetwork_{channel}" if folder else None
        pretrain_subnetwork(model, channel, [*complete, *incomplete], folder=place, **how)


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
    engine: Mapping[str, object] | None = None,
) -> pd.DataFrame:
    """Train the subnetwork of one sequence by itself, on all cases that have the sequence.

    Where every case lacks some sequence, no more than a few can show the whole network all of them; but each subnetwork
    can learn from most. The network is changed in place, on the device that it lies on: the subnetwork and its auxiliary classifier.

    Args:
        model: a 2D network.
        channel: sequence of the subnetwork.
        cases: labelled cases, normalised. Those whose `channels` lack this one are left aside.
        channels: the network's sequences in the order of its inputs.
        steps: number of updates.
        target_weights, learning_rate, window, output, batch_size, accumulate, scheme, flip, folder, seed, progress, engine: as for
            `mlynarski`.

    Returns:
        One row per update, as `training.fit`.

    Source: Mlynarski et al. 2019, sections 2.2 and 3.2.
    Taught in notebook 13.
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
    weights = _choose_weights(model, target_weights)
    sampler = make_segments(having, subnetwork, output=output, batch_size=batch_size, scheme=scheme, flip=flip, seed=seed)
    optimizer = optimizers.NormalizedSGD(subnetwork.parameters(), lr=learning_rate)
    machine, replaced = split_engine(engine)
    how = {
        "loss": partial(losses.balanced_cross_entropy, target_weights=weights),
        "accumulate": accumulate,
        "schedule": optimizers.HalveOnSlowLoss(optimizer, window=window),
        "validate_every": steps,
        "folder": folder,
        "seed": seed,
        "progress": progress,
    }
    return training.fit(subnetwork, sampler, steps=steps, optimizer=optimizer, engine=machine, **(how | replaced))


def class_weights(classes: int, background: float) -> list[float]:
    """Return the weight of each class in a batch: `background`, and the rest shared equally by the others."""
    return [background, *[(1 - background) / (classes - 1)] * (classes - 1)]


_AXIAL = Recipe(
    "mlynarski-brats2017-axial",
    network="mlynarski_2d",
    paper="Mlynarski et al. 2019, sections 2.2 and 2.4",
    data="BRATS 2017 training set, 285 cases; by registration",
    loader="brats2017",
    channels=("flair", "t1", "t1c", "t2"),
    label_map={4: 3},
    classes=4,
    normalise="median",
    settings={"learning_rate": 0.25, "target_weights": (0.7, 0.1, 0.1, 0.1), **SAMPLES_2D},
    regions={"whole": [1, 2, 3], "core": [1, 3], "enhancing": [3]},
    reported={
        "where": "Table 1, 2D model 1, axial, on 50 of the 285 cases",
        "dice": {"whole": 0.866, "core": 0.794, "enhancing": 0.736},
    },
    departs="squares of 192 instead of whole slices, four a batch, and the number of updates are our choice; five folds "
    "instead of one part of 50 cases",
)

RECIPES = (
    _AXIAL,
    replace(_AXIAL, name="mlynarski-brats2017-coronal", plane="coronal"),
    replace(_AXIAL, name="mlynarski-brats2017-sagittal", plane="sagittal", settings={**_AXIAL.settings, "flip": False}),
    replace(
        _AXIAL,
        name="mlynarski-brats2017-3d",
        network="mlynarski_3d",
        needs="scores",
        paper="Mlynarski et al. 2019, sections 2.3 and 2.4",
        settings={"learning_rate": 0.25, "target_weights": (0.4, 0.2, 0.2, 0.2), "variant": "a", **SAMPLES_3D},
        reported={
            "where": "Table 1, model A with 2D model 1, on 50 of the 285 cases",
            "dice": {"whole": 0.873, "core": 0.809, "enhancing": 0.774},
        },
        departs="numbers of feature maps and of updates are our choice; five folds instead of one part of 50 cases. The scores "
        "must come from 2D networks that were trained without the fold's cases",
    ),
)
