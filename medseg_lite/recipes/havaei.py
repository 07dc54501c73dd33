"""Havaei's two-pathway network and its cascades, in two phases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import models, optimizers, training
from ..sampling import SegmentSampler
from ..volume import Case
from ._shared import build, card, check, validation_of

# Our choice: the papers give no number of updates.
HAVAEI_STEPS, HAVAEI_PHASE2_STEPS = 30_000, 10_000


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
    engine: dict | None = None,
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
        engine: options of `training.fit` for the machine at hand: precision, compiled, channels_last, workers, tensorboard.

    Returns:
        The network in evaluation mode; `network.history` has one row per update of either phase, `network.card` what was done.

    Source: Finzel 2017, section 3.1; Havaei et al. 2017, sections 3.2 and 3.3. The weight penalties are DeepMedic's.
    """
    classes = check(cases, network, models.HAVAEI, classes)
    if phase2_steps < 0:
        raise ValueError(f"phase2_steps={phase2_steps}; expected 0 or more")
    cascade = "cascade" in network
    if cascade != (first is not None):
        needs = "needs a trained two_path_cnn: give it as first=" if cascade else "has no first network: leave first out"
        raise ValueError(f"{network} {needs}")
    if isinstance(first, (str, Path)):
        first = models.load(first)
    model = build(network, cases, classes, width, seed, device, init=init, **({"first": first} if cascade else {}))
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
            validate=validation_of(validation, classes),
            validate_every=min(validate_every, steps),
            folder=Path(folder) / f"phase{number}" if folder else None,
            seed=seed,
            progress=progress,
            **engine or {},
        )
        return history.assign(phase=number)

    model.history = phase(1, steps, "equal")
    if phase2_steps:
        fixed = [p for p in model.parameters() if p.requires_grad and all(p is not q for q in model.output.parameters())]
        try:
            for p in fixed:
                p.requires_grad_(False)
            second = phase(2, phase2_steps, "uniform")
        finally:
            for p in fixed:
                p.requires_grad_(True)
        second["step"] += steps
        model.history = pd.concat([model.history, second], ignore_index=True)
    model.card = card(network, cases, classes, steps, seed, device) | {"phase2_steps": phase2_steps}
    return model
