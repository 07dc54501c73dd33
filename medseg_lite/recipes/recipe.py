"""The parts that all recipes share: the named recipe, the network from its seed, the training with its card."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from .. import models, optimizers, training
from ..datasets import case_names
from ..devices import find_device
from ..models import Network
from ..sampling import SegmentSampler, check_label
from ..volume import Case, new_name

OptimizerMaker = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
ScheduleMaker = Callable[[torch.optim.Optimizer], optimizers.Schedule]


@dataclass(frozen=True)
class Recipe:
    """A paper's experiment on a data set: network, settings, folds, and the scores that were published.

    Attributes:
        name: name on the command line.
        network: name of the builder in `models`.
        channels: sequences, in the order of the network's input.
        classes: number of the network's classes.
        paper: place in the paper that the settings come from.
        data: data set that is meant, and how to get it.
        loader: function of `datasets` that reads the data, with `loader_options`; None where only the reader's own folder will do.
        label_map: class of the network for those labels of the data that have another number there.
        normalise: "standardise", "median" or "none", see `transforms.normalise`.
        settings: arguments of the paper's recipe, where they differ from its defaults.
        plane: plane of the slices that a 2D network sees.
        folds: number of folds of the cross-validation.
        validation: share of a fold's training cases that decide when to stop.
        members: number of networks per fold that differ by their seed. Their probabilities are averaged.
        regions: regions that are scored, see `metrics.evaluate`; "cells" for V_rand and V_info of electron microscopy.
        postprocess: "largest" to keep the largest connected component of a prediction.
        reported: the paper's own row: "where" it stands, and the mean of each metric for each region.
        departs: differences from the paper, and choices where the paper is silent.
        needs: argument that the reader must give: "scores" of 2D networks, or the "first" network of a cascade.
    """

    name: str
    network: str
    channels: tuple[str, ...]
    classes: int
    paper: str = ""
    data: str = ""
    loader: str | None = None
    loader_options: Mapping[str, object] = field(default_factory=dict)
    label_map: Mapping[int, int] = field(default_factory=dict)
    normalise: str = "standardise"
    settings: Mapping[str, object] = field(default_factory=dict)
    plane: str = "axial"
    folds: int = 5
    validation: float = 0.0
    members: int = 1
    regions: str | Mapping[str, Sequence[int]] = "brats2015"
    postprocess: str | None = None
    reported: Mapping[str, object] | None = None
    departs: str = ""
    needs: str | None = None

    def __getitem__(self, name: str) -> object:
        """Return an attribute by its name, as when a recipe was a dictionary."""
        return vars(self)[name]


def prepare_network(
    network: str | Network,
    cases: Sequence[Case],
    names: Sequence[str],
    *,
    classes: int | None,
    width: float,
    seed: int,
    device: str | torch.device,
    validation: Sequence[Case] = (),
    others: Sequence[Case] = (),
    channels: int | None = None,
    **options,
) -> Network:
    """Build a network with the weights that the seed draws, or take one that is built already, once cases and network are checked.

    The checks come first, so nothing reaches the device before them. The network then lies on the device.

    Args:
        network: name of a builder, one of `names`, or a built network.
        cases: labelled cases to train on.
        names: names of the networks that the recipe is for.
        classes: number of classes; None for the highest label plus one.
        width, options: options of the builder.
        seed: seed of the weights.
        device: device of the training, or "auto", see `devices.find_device`.
        validation: labelled cases for the validation.
        others: further labelled cases, for a part of the network. They may lack channels.
        channels: number of channels of the image, by default those of the first case.

    Raises:
        ValueError: there are no cases, one has no label, other channels or a label beyond the classes, or the network is unknown or
            does not fit what else was given; or there is no such device.
    """
    if not cases:
        raise ValueError("no cases to train on; give at least one labelled case")
    everyone = [*cases, *validation, *others]
    for case in validation:
        if case.channels != cases[0].channels:
            raise ValueError(
                f"{case.name}, for the validation, has channels {case.channels} but {cases[0].name} has {cases[0].channels}"
            )
    if isinstance(network, nn.Module):
        if not isinstance(network, Network):
            raise ValueError(f"network is a {type(network).__name__}; expected a models.Network: wrap it in models.Adapter")
        given = {"classes": classes not in (None, network.classes), "width": width != 1, **dict.fromkeys(options, True)}
        if any(given.values()):
            names = ", ".join(name for name, is_given in given.items() if is_given)
            raise ValueError(f"{names}: the network is built already; give these options to its builder")
        check_labels(everyone, network.classes)
        return network.to(find_device(device))
    if network not in names:
        raise ValueError(f"network={network!r}; expected one of {', '.join(names)}, or a built network")
    check_labels(everyone if classes else cases, classes)
    if classes is None:
        classes = 1 + max(case.highest_label for case in cases)
        check_labels(everyone, classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        model = models.BUILDERS[network](
            in_channels=channels or len(cases[0].channels), classes=classes, width=float(width), **options
        )
    return model.to(find_device(device))


def check_labels(cases: Sequence[Case], classes: int | None) -> None:
    """Raise ValueError where a case has no label or one beyond the classes, see `sampling.check_label`. Stored cases are not read."""
    for case in cases:
        if not case.labelled:
            raise ValueError(f"{case.name} has no label; training needs one")
        check_label(case.name, case.highest_label, classes)


def network_name(model: Network) -> str:
    """Return the name of the builder of a network, or the name of its class where it has no builder."""
    return model.config["builder"] if model.config else type(model).__name__


def make_segments(cases: Sequence[Case], model: Network, **how) -> SegmentSampler:
    """Return a sampler of segments that fit a network, on the network's device.

    Args:
        cases: labelled cases.
        model: network, which decides the margin, the inputs that are cut out of a patch, and the dimensions.
        how: other options of `SegmentSampler`.
    """
    device = next(model.parameters()).device
    return SegmentSampler(cases, margin=model.margin, cut=model.cut, spatial_dims=model.spatial_dims, device=device, **how)


def prepare_optimizer(
    model: nn.Module,
    optimizer: OptimizerMaker | None,
    learning_rate: float | None,
    paper: Callable[..., torch.optim.Optimizer],
    rate: float,
) -> torch.optim.Optimizer:
    """Return the reader's optimizer, or else the paper's, over the parameters that are to be trained.

    Args:
        model: network to train.
        optimizer: the reader's function of the parameters, or None.
        learning_rate: the reader's learning rate, or None.
        paper: the paper's function of the parameters and `lr`.
        rate: the paper's learning rate.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if optimizer is None:
        return paper(parameters, lr=rate if learning_rate is None else learning_rate)
    if learning_rate is not None:
        raise ValueError(
            "both optimizer and learning_rate are given; set the rate in the optimizer, as in partial(Adam, lr=1e-3)"
        )
    return optimizer(parameters)


def prepare_schedule(
    optimizer: torch.optim.Optimizer,
    schedule: ScheduleMaker | None,
    halvings: Sequence[float] | None,
    steps: int,
    *,
    paper: ScheduleMaker = optimizers.Schedule,
) -> optimizers.Schedule:
    """Return the reader's schedule, or one that halves the rate after these fractions of the run, or else the paper's."""
    if schedule is not None:
        return schedule(optimizer)
    if halvings is not None:
        return optimizers.HalveAt(optimizer, steps=[round(float(fraction) * int(steps)) for fraction in halvings])
    return paper(optimizer)


def train(
    model: Network,
    sampler,
    cases: Sequence[Case],
    *,
    steps: int,
    validation: Sequence[Case],
    validate_every: int,
    engine: Mapping[str, object] | None,
    facts: Mapping[str, object] | None = None,
    made_from: Mapping[str, object] | None = None,
    **how,
) -> Network:
    """Train a network with `training.fit`, and note on it what was done: `model.history` and `model.card`.

    Args:
        model, sampler, steps, validate_every: as in `training.fit`.
        cases: cases trained on, for the card.
        validation: cases for the validation, or none.
        engine: options of `training.Engine`, and options of `training.fit` that replace those of the recipe.
        facts: further facts for the card.
        made_from: further facts that make the run what it is, such as the code of the weights that it starts from.
        how: further options of `training.fit`.
    """
    machine, replaced = split_engine(engine)
    how["seed"] = int(how["seed"])
    device = next(model.parameters()).device
    how |= {
        "facts": {"validation": _case_codes(validation) if how["folder"] else {}} | dict(made_from or {}),
        "steps": steps,
        "validate_every": min(validate_every, steps),
        "validate": make_validation(validation, model.classes, _validation_precision(machine, device)),
    }
    model.history = training.fit(model, sampler, engine=machine, **(how | replaced))
    model.card = {
        "network": network_name(model),
        "channels": list(cases[0].channels),
        "classes": model.classes,
        "trained_on": case_names(cases),
        "steps": steps,
        "seed": how["seed"],
        "device": str(device),
    } | dict(facts or {})
    return model


def split_engine(engine: Mapping[str, object] | None) -> tuple[dict, dict]:
    """Return the options of `training.Engine`, which are for every stage of a recipe, and those of `training.fit`."""
    machine = {option.name for option in dataclasses.fields(training.Engine)}
    given = dict(engine or {})
    return {n: v for n, v in given.items() if n in machine}, {n: v for n, v in given.items() if n not in machine}


def _validation_precision(machine: Mapping[str, object], device: torch.device) -> str:
    """Return the precision of the validation: the training's on a CUDA GPU. Other devices segment in float32 alone."""
    return machine.get("precision", "auto") if device.type == "cuda" else "auto"


def _case_codes(cases: Sequence[Case]) -> dict[str, str]:
    codes: dict[str, str] = {}
    for case in cases:
        codes[new_name(case.name, codes)] = case.code()
    return codes


def make_validation(cases: Sequence[Case], classes: int, precision: str = "auto") -> Callable | None:
    """Return the validation for `training.fit`, or None where there are no cases for it.

    Args:
        cases: labelled cases.
        classes: number of the network's classes.
        precision: number type of the predictions, see `inference.predict`.
    """
    return training.validate_on(cases, regions=regions_for(classes), precision=precision) if cases else None


def regions_for(classes: int) -> str | dict[str, list[int]]:
    """Return the regions to score: BRATS 2015's for five classes, otherwise each class but the background by itself.

    A network with one class is one with a single output, for a sigmoid.
    """
    if classes == 5:
        return "brats2015"
    return {"lesion": [1]} if classes <= 2 else {f"class_{c}": [c] for c in range(1, classes)}


def load_start(path: str | Path, model: Network, *, ignore: Sequence[str] = ()) -> None:
    """Give a network the weights of a checkpoint of the same network.

    Args:
        path: checkpoint.
        model: network to change.
        ignore: options of the builder that may differ, since they have no weights.
    """
    before = models.load(path)
    wanted, found = ({k: v for k, v in (m.config or {}).items() if k not in ignore} for m in (model, before))
    if wanted != found:
        raise ValueError(
            f"{path} holds {before.config}; this run wants {model.config}: choose the same network, width and classes"
        )
    model.load_state_dict(before.state_dict())
