"""Each paper's training recipe, complete: what the notebooks, the command line and the benchmarks all call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from . import models, optimizers, training
from .sampling import SegmentSampler
from .volume import Case

# 35 epochs × 20 sub-epochs × 100 updates, and the epochs after which the published configuration halves the rate.
DEEPMEDIC_STEPS = 70_000
DEEPMEDIC_HALVINGS = tuple(epoch / 35 for epoch in (12, 16, 19, 22, 25, 28, 31, 34))

# Our choice: the papers name no number of updates.
HAVAEI_STEPS, HAVAEI_PHASE2_STEPS = 30_000, 10_000

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        options = {"conv_dropout": conv_dropout} if conv_dropout else {}
        model = getattr(models, network)(in_channels=len(cases[0].channels), classes=classes, width=width, **options)
    if start is not None:
        before = models.load(start)
        wanted, found = (m.config | {"conv_dropout": None} for m in (model, before))
        if wanted != found:
            raise ValueError(
                f"{start} holds {before.config}; this run wants {model.config}: choose the same network, width and classes"
            )
        model.load_state_dict(before.state_dict())
    model.to(device)
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
        validate=training.validate_on(validation, regions=regions_of(classes)) if validation else None,
        validate_every=min(validate_every, steps),
        folder=folder,
        seed=seed,
        progress=progress,
    )
    model.history = history
    model.card = {
        "network": network,
        "channels": list(cases[0].channels),
        "classes": classes,
        "trained_on": [c.name for c in cases],
        "steps": steps,
        "seed": seed,
        "device": str(device),
        **({"started_from": Path(start).name} if start else {}),
    }
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
    sizes = {"in_channels": len(cases[0].channels), "classes": classes, "width": width, "init": init}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(models, network)(**sizes, **({"first": first} if cascade else {}))
    model.to(device)
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
            validate=training.validate_on(validation, regions=regions_of(classes)) if validation else None,
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
    model.card = {
        "network": network,
        "channels": list(cases[0].channels),
        "classes": classes,
        "trained_on": [c.name for c in cases],
        "steps": steps,
        "phase2_steps": phase2_steps,
        "seed": seed,
        "device": str(device),
    }
    return model


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
