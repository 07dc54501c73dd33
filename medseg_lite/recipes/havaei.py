"""Havaei's two-pathway network and its cascades, in two phases.

networks    `models.two_path_cnn`, `models.input_cascade_cnn`, … (`models.HAVAEI`)
samples     `sampling.SegmentSampler`: classes equally often, then as they are
loss        `losses.cross_entropy`
optimiser   `optimizers.MaxNormSGD`, `optimizers.MomentumSchedule`
afterwards  `postprocess.remove_flat_components`
notebook    02
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from .. import losses, models, optimizers
from ..models import Network
from ..volume import Case
from .recipe import (
    OptimizerMaker,
    Recipe,
    ScheduleMaker,
    make_segments,
    prepare_network,
    prepare_optimizer,
    prepare_schedule,
    train,
)

# Our choice: the papers give no number of updates.
HAVAEI_STEPS, HAVAEI_PHASE2_STEPS = 30_000, 10_000


def havaei(
    cases: Sequence[Case],
    *,
    network: str | Network = "two_path_cnn",
    first: Network | str | Path | None = None,
    classes: int | None = None,
    steps: int = HAVAEI_STEPS,
    phase2_steps: int = HAVAEI_PHASE2_STEPS,
    learning_rate: float | None = None,
    halvings: Sequence[float] | None = None,
    schedule: ScheduleMaker | None = None,
    optimizer: OptimizerMaker | None = None,
    loss: Callable = losses.cross_entropy,
    augment: Callable | None = None,
    output: int = 1,
    batch_size: int = 128,
    epochs: int = 3,
    max_norm: float = 2.0,
    init: str = "uniform",
    validation: Sequence[Case] = (),
    validate_every: int = 500,
    folder: str | Path | None = None,
    width: float = 1.0,
    device: str | torch.device = "auto",
    seed: int = 0,
    progress: bool = True,
    engine: Mapping[str, object] | None = None,
    **options,
) -> Network:
    """Train one of Havaei's networks in two phases.

    Phase 1 trains the whole network on patches whose centres are of every class equally often. That is not how often the
    classes occur, so the network calls too many voxels tumour. Phase 2 trains the output layer alone on patches from
    anywhere in the brain: the features stay, the probabilities become right.

    `classes`, `optimizer`, `schedule`, `validation`, `validate_every`, `folder`, `width`, `device`, `progress` and `engine` are described
    in `medseg_lite.recipes`. The folder gets `phase1` and `phase2`.

    Args:
        cases: labelled cases, normalised (`transforms.standardise`).
        network: one of `models.HAVAEI`, "two_path_cnn", "input_cascade_cnn", …; or a built network with a layer `output`.
        first: trained "two_path_cnn" of a cascade, or its checkpoint; of the same width and classes.
        steps: number of updates of phase 1. The papers give no number.
        phase2_steps: number of updates of phase 2, 0 to leave it out.
        learning_rate: learning rate at the start of each phase; by default .005, the paper's, or 1e-4 / width with `init="he"`:
            features that are larger from the start need smaller steps, and the more of them the output layer sees, the smaller.
        halvings: fractions of each phase after which the rate is halved, in place of the paper's schedule.
        loss: function of logits and label.
        augment: function `(image, label, *, rng)` of each batch of patches, or None.
        output: side of the predicted square: 1 for the paper's patches (of 33²), more for dense segments, which cost far less
            per labelled pixel; then only their middle pixels are of every class equally often.
        batch_size: number of patches or segments per update (our choice).
        epochs: number of equal parts of each phase; the rate falls to a tenth after each.
        max_norm: longest kernel (the paper gives no number).
        init: "uniform", the paper's, or "he", which short runs need (see `models.havaei.TwoPathCNN`).
        seed: seed of the initial weights, the patches and the dropout.
        options: further options of the builder, such as dropout=0.

    Returns:
        The network in evaluation mode. `network.history` has one row per update of either phase, and `network.card` says what was done.

    Source: Finzel 2017, section 3.1; Havaei et al. 2017, sections 3.2 and 3.3. The weight penalties are DeepMedic's.
    Taught in notebook 02.
    """
    steps, phase2_steps = int(steps), int(phase2_steps)
    if phase2_steps < 0:
        raise ValueError(f"phase2_steps={phase2_steps}; expected 0 or more")
    if isinstance(network, str):
        options |= {"init": init, **_first_network(network, first)}
    build = {"classes": classes, "width": width, "seed": seed, "device": device, "validation": validation, **options}
    model = prepare_network(network, cases, models.HAVAEI, **build)
    rate = 0.005 if init == "uniform" else 1e-4 / width

    run = {"validation": validation, "validate_every": validate_every, "seed": seed, "progress": progress, "engine": engine}

    def phase(number: int, steps: int, scheme: str) -> pd.DataFrame:
        segments = {"output": output, "batch_size": batch_size, "augment": augment, "seed": 2 * seed + number - 1}
        sampler = make_segments(cases, model, scheme=scheme, **segments)
        sgd = prepare_optimizer(model, optimizer, learning_rate, partial(optimizers.MaxNormSGD, max_norm=max_norm), rate)
        paper = partial(optimizers.MomentumSchedule, steps=steps, epochs=epochs)
        how = {"schedule": prepare_schedule(sgd, schedule, halvings, steps, paper=paper), "loss": loss, "l1": 1e-6, "l2": 1e-4}
        place = Path(folder) / f"phase{number}" if folder else None
        train(model, sampler, cases, steps=steps, optimizer=sgd, folder=place, **how, **run)
        return model.history.assign(phase=number)

    history = phase(1, steps, "equal")
    if phase2_steps:
        with _output_layer_alone(model):
            second = phase(2, phase2_steps, "uniform")
        second["step"] += steps
        history = pd.concat([history, second], ignore_index=True)
    model.history = history
    model.card |= {"steps": steps, "phase2_steps": phase2_steps}
    return model


def _first_network(network: str, first: Network | str | Path | None) -> dict[str, Network]:
    """Return the first network of a cascade as an option of its builder."""
    cascade = "cascade" in network
    if cascade != (first is not None):
        needs = "needs a trained two_path_cnn: give it as first=" if cascade else "has no first network: leave first out"
        raise ValueError(f"{network} {needs}")
    if first is None:
        return {}
    return {"first": models.load(first) if isinstance(first, (str, Path)) else first}


@contextmanager
def _output_layer_alone(model: nn.Module) -> Iterator[None]:
    """Freeze all but the output layer within the block."""
    output = {id(p) for p in model.output.parameters()}
    fixed = [p for p in model.parameters() if p.requires_grad and id(p) not in output]
    try:
        for p in fixed:
            p.requires_grad_(False)
        yield
    finally:
        for p in fixed:
            p.requires_grad_(True)


RECIPES = (
    Recipe(
        "havaei-brats2013",
        network="two_path_cnn",
        paper="Havaei et al. 2017, sections 3.2 and 3.3",
        data="BRATS 2013 training set, 30 cases; by registration",
        loader="brats2015",
        channels=("flair", "t1", "t1c", "t2"),
        classes=5,
        settings={"learning_rate": 0.005},
        reported={
            "where": "Table 1, TwoPathCNN*, BRATS 2013's challenge cases",
            "dice": {"whole": 0.85, "core": 0.78, "enhancing": 0.73},
            "sensitivity": {"whole": 0.80, "core": 0.76, "enhancing": 0.75},
        },
        departs="no bias-field correction and no clipping of intensities; numbers of updates, patches per update and longest "
        "kernel are our choice; postprocess.remove_flat_components is left to you",
    ),
    Recipe(
        "havaei-brats2013-cascade",
        network="input_cascade_cnn",
        needs="first",
        paper="Havaei et al. 2017, section 3.4",
        data="BRATS 2013 training set, 30 cases; by registration",
        loader="brats2015",
        channels=("flair", "t1", "t1c", "t2"),
        classes=5,
        settings={"learning_rate": 0.005},
        reported={
            "where": "Table 2, InputCascadeCNN*, BRATS 2013's challenge cases",
            "dice": {"whole": 0.88, "core": 0.79, "enhancing": 0.73},
        },
        departs="as havaei-brats2013, whose network of the same fold is to be given as --first",
    ),
)
