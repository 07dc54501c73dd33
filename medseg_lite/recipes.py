"""Each paper's training recipe, complete: what the notebooks, the command line and the benchmarks all call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from . import context, losses, models, optimizers, training, transforms
from .sampling import SegmentSampler, VolumeSampler
from .volume import Case

# 35 epochs × 20 sub-epochs × 100 updates, and the epochs after which the published configuration halves the rate.
DEEPMEDIC_STEPS = 70_000
DEEPMEDIC_HALVINGS = tuple(epoch / 35 for epoch in (12, 16, 19, 22, 25, 28, 31, 34))

# Our choice: the papers name no number of updates.
HAVAEI_STEPS, HAVAEI_PHASE2_STEPS = 30_000, 10_000

# 50 epochs of 220 cases, one case an update.
KAYALIBAY_STEPS = 11_000

# Our choice: the paper trains until the validation score has not risen for 50 epochs.
DROZDZAL_STEPS = 20_000

# Our choice: the paper names no number of updates.
MLYNARSKI_STEPS = 10_000

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

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Kamnitsas et al. 2017, sections 4.1.2 and 4.2.2, appendix B and Table B.1.
    """
    classes = _check(cases, network, models.DEEPMEDIC, classes)
    options = {"conv_dropout": conv_dropout} if conv_dropout else {}
    model = _build(network, cases, classes, width, seed, device, **options)
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
        validate=_validate(validation, classes),
        validate_every=min(validate_every, steps),
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.history = history
    model.card = _card(network, cases, classes, steps, seed, device)
    if start is not None:
        model.card["started_from"] = Path(start).name
    return model


def havaei(
    cases: Sequence[Case],
    *,
    network: str = "two_path_cnn",
    first: nn.Module | str | Path | None = None,
    classes: int | None = None,
    steps: int = HAVAEI_STEPS,
    phase2_steps: int = HAVAEI_PHASE2_STEPS,
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    folder: str | Path | None = None,
    width: float = 1.0,
    init: str = "uniform",
    output: int = 1,
    batch_size: int = 128,
    learning_rate: float | None = None,
    epochs: int = 3,
    max_norm: float = 2.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> nn.Module:
    """Train one of Havaei's networks in two phases.

    Phase 1 trains the whole network on patches whose centres are of every class equally often. That is not how often the
    classes occur, so the network calls too many voxels tumour. Phase 2 trains the output layer alone on patches from
    anywhere in the brain: the features stay, the probabilities become right.

    Args:
        cases: labelled cases, normalised (`transforms.standardise`).
        network: one of `models.HAVAEI`: "two_path_cnn", "input_cascade_cnn", …
        first: the trained "two_path_cnn" of a cascade, or its checkpoint; of the same width and classes.
        classes: output classes; by default the highest label plus one.
        steps: updates of phase 1. The papers give no number.
        phase2_steps: updates of phase 2, 0 to leave it out.
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        folder: where the run is kept, `phase1` and `phase2` in it; the same call goes on from an interrupted run.
        width: scales every feature-map count; 1 is the paper's size.
        init: "uniform", the paper's, or "he", which short runs need (see `models.havaei.TwoPathCNN`).
        output: side of the predicted square: 1 for the paper's patches (of 33²), more for dense segments, which cost far less
            per labelled pixel; then only their middle pixels are of every class equally often.
        batch_size: patches or segments per update (our choice).
        learning_rate: at the start of each phase; by default .005, the paper's, or 1e-4 / width with `init="he"`: features that
            are larger from the start need smaller steps, and the more of them the output layer sees, the smaller.
        epochs: equal parts of each phase; the rate falls to a tenth after each.
        max_norm: longest kernel (the paper gives no number).
        device: "cpu", "cuda", ….
        seed: of the initial weights, the patches and the dropout.

    Returns:
        The network in evaluation mode; `network.history` has one row per update of either phase, `network.card` what was done.

    Source: Finzel 2017, section 3.1; Havaei et al. 2017, sections 3.2 and 3.3. The weight penalties are DeepMedic's.
    """
    classes = _check(cases, network, models.HAVAEI, classes)
    if phase2_steps < 0:
        raise ValueError(f"phase2_steps={phase2_steps}; expected 0 or more")
    cascade = "cascade" in network
    if cascade != (first is not None):
        needs = (
            "needs a trained two_path_cnn: give it as first=" if cascade else "has no first network: leave first out"
        )
        raise ValueError(f"{network} {needs}")
    if isinstance(first, (str, Path)):
        first = models.load(first)
    model = _build(network, cases, classes, width, seed, device, init=init, **({"first": first} if cascade else {}))
    rate = learning_rate or (0.005 if init == "uniform" else 1e-4 / width)

    def phase(number: int, steps: int, scheme: str) -> pd.DataFrame:
        sampler = SegmentSampler(
            cases,
            output=output,
            margin=model.margin,
            batch_size=batch_size,
            scheme=scheme,
            spatial_dims=2,
            seed=2 * seed + number - 1,
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = optimizers.MaxNormSGD(trained, lr=rate, max_norm=max_norm)
        history = training.fit(
            model,
            sampler,
            steps=steps,
            optimizer=optimizer,
            l1=1e-6,
            l2=1e-4,
            schedule=optimizers.MomentumSchedule(optimizer, steps=steps, epochs=epochs),
            validate=_validate(validation, classes),
            validate_every=min(validate_every, steps),
            folder=Path(folder) / f"phase{number}" if folder else None,
            seed=seed,
            progress=progress,
        )
        return history.assign(phase=number)

    model.history = phase(1, steps, "equal")
    if phase2_steps:
        fixed = [
            p for p in model.parameters() if p.requires_grad and all(p is not q for q in model.output.parameters())
        ]
        try:
            for p in fixed:
                p.requires_grad_(False)
            second = phase(2, phase2_steps, "uniform")
        finally:
            for p in fixed:
                p.requires_grad_(True)
        second["step"] += steps
        model.history = pd.concat([model.history, second], ignore_index=True)
    model.card = _card(network, cases, classes, steps, seed, device) | {"phase2_steps": phase2_steps}
    return model


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
        options: further ones of `models.kayalibay.KayalibayUNet3d`, such as merge="sum" or maps=1.

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Kayalibay et al. 2017, section 3.2.
    """
    classes = _check(cases, network, models.KAYALIBAY, classes)
    functions = {"jaccard": losses.jaccard_distance, "cross_entropy": losses.cross_entropy}
    if loss not in functions:
        raise ValueError(f"loss={loss!r}; expected one of {', '.join(functions)}")
    model = _build(network, cases, classes, width, seed, device, **options)
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
        validate=_validate(validation, classes),
        validate_every=min(validate_every, steps),
        patience=patience,
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.card = _card(network, cases, classes, steps, seed, device) | {"loss": loss}
    return model


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
        augment: flip, shear, rotate and bend the crops (`transforms.distort`), by at most `shear`, `angle`, `warp`.
        validation: cases segmented every `validate_every` updates; their mean Dice goes into the history.
        patience: stop when it has not risen for this many validations, and go back to the best weights (50 epochs in the paper).
        folder: where the run is kept; the same call goes on from an interrupted run.
        width: scales every feature-map count; 1 is the paper's size.
        device: "cpu", "cuda", ….
        seed: of the initial weights, the crops and the augmentation. The paper's ensemble is ten seeds.

    Returns:
        The network in evaluation mode; `network.history` has one row per update and `network.card` what was done.

    Source: Drozdzal et al. 2018, section 4.
    """
    networks = [name for name in models.DROZDZAL if name != "fcn_preprocessor"]
    classes = _check(cases, network, networks, classes)
    model = _build(network, cases, classes, width, seed, device)
    if crop % model.multiple:
        raise ValueError(f"crop={crop}; {network} needs a multiple of {model.multiple}")

    def distorted(image, label, *, rng):
        return transforms.distort(image, label, rng=rng, shear=shear, angle=angle, warp=warp)

    sampler = SegmentSampler(
        cases,
        output=crop,
        batch_size=batch_size,
        scheme="uniform",
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
        validate=_validate(validation, classes),
        validate_every=min(validate_every, steps),
        patience=patience,
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.card = _card(network, cases, classes, steps, seed, device)
    return model


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
    classes = _check(cases, network, models.MLYNARSKI, classes)
    flat = network == "mlynarski_2d"
    features = sum(channel.split()[0] in context.PLANES for channel in cases[0].channels)  # of context.with_scores
    if not flat:
        options = {"features": features, "variant": "a" if features else "standard"} | options
    model = _build(network, cases, classes, width, seed, device, channels=len(cases[0].channels) - features, **options)
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
        validate=_validate(validation, classes),
        validate_every=min(validate_every, steps),
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.card = _card(network, cases, classes, steps, seed, device)
    return model


def of_network(network: str) -> Callable[..., nn.Module]:
    """The recipe that trains a network, by the network's name."""
    for recipe, networks in (
        (deepmedic, models.DEEPMEDIC),
        (havaei, models.HAVAEI),
        (kayalibay, models.KAYALIBAY),
        (drozdzal, models.DROZDZAL),
        (mlynarski, models.MLYNARSKI),
    ):
        if network in networks:
            return recipe
    raise ValueError(f"network={network!r}; expected one of {', '.join(models.NETWORKS)}")


def _build(
    network: str,
    cases: Sequence[Case],
    classes: int,
    width: float,
    seed: int,
    device,
    *,
    channels: int | None = None,
    **options,
) -> nn.Module:
    """The network with the weights that the seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(models, network)(
            in_channels=channels or len(cases[0].channels), classes=classes, width=width, **options
        )
    return model.to(device)


def _validate(cases: Sequence[Case], classes: int) -> Callable | None:
    """The validation of `training.fit`, where there are cases for it."""
    return training.validate_on(cases, regions=regions_of(classes)) if cases else None


def _card(network: str, cases: Sequence[Case], classes: int, steps: int, seed: int, device) -> dict:
    """What was done, for the checkpoint."""
    return {
        "network": network,
        "channels": list(cases[0].channels),
        "classes": classes,
        "trained_on": [c.name for c in cases],
        "steps": steps,
        "seed": seed,
        "device": str(device),
    }


def _check(cases: Sequence[Case], network: str, networks: Sequence[str], classes: int | None) -> int:
    """The number of classes, once it is clear that there is something to train on and a network to train."""
    if not cases:
        raise ValueError("no cases to train on; give at least one labelled case")
    for case in cases:
        if case.label is None:
            raise ValueError(f"{case.name} has no label; training needs one")
    if network not in networks:
        raise ValueError(f"network={network!r}; expected one of {', '.join(networks)}")
    return classes or 1 + max(int(c.label.max()) for c in cases)


def regions_of(classes: int) -> str | dict[str, list[int]]:
    """The regions to score: BRATS 2015's for five classes, otherwise each class but the background by itself."""
    if classes == 5:
        return "brats2015"
    return {"lesion": [1]} if classes == 2 else {f"class_{c}": [c] for c in range(1, classes)}
