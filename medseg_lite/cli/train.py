"""Train a network. The run is kept in --out: last.pt to go on from (the same command resumes), history.csv, and model.safetensors at the
end. Defaults are the paper's; they take a GPU a day. On a CPU try --steps 500.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
from pathlib import Path

import pandas as pd

from .. import context, inference, metrics, models, training
from ..engine import distributed
from ..recipes import RECIPES, Recipe, cross_validate, find_recipe, recipe_for, regions_for
from ..recipes.crossvalidation import save_with_card, size_of_update
from ..volume import Case
from ._data import add_data, add_device, open_cohort, open_recipe_cohort, positive, read_cases
from ._folds import FoldProcesses, add_folds, is_one_of_several

# Arguments of the papers' recipes that have an option of the same name. Not every recipe has every one of them.
SETTINGS = {
    "steps": {"type": positive, "help": "updates (DeepMedic's 70000)"},
    "phase2_steps": {"type": int, "help": "updates of Havaei's second phase, 0 to leave it out"},
    "halvings": {
        "type": float,
        "nargs": "*",
        "metavar": "FRACTION",
        "help": "fractions of the run after which the learning rate is halved (DeepMedic: the published schedule); short runs do "
        "better with .6 .8 .9",
    },
    "output": {
        "type": positive,
        "help": "side of the block that is predicted at a time in training; 9 is DeepMedic's (25³ segments), 21 costs less than half as "
        "much per labelled voxel",
    },
    "crop": {
        "type": positive,
        "help": "side of the crops, for networks that pad (default: Kayalibay whole volumes, Drozdzal 256)",
    },
    "batch_size": {"type": positive, "help": "segments, crops or volumes per batch"},
    "accumulate": {"type": positive, "help": "batches per update (Mlynarski: 10 in 2D, 5 in 3D)"},
    "learning_rate": {"type": float, "help": "learning rate at the start"},
    "start": {"metavar": "MODEL", "help": "begin from this model.safetensors instead of random weights (fine-tuning)"},
    "first": {"metavar": "MODEL", "help": "the trained two_path_cnn of one of Havaei's cascades"},
    "shift": {"type": float, "help": "random intensity shift; .1 for brain injuries"},
    "conv_dropout": {"type": float, "help": "dropout on convolutions; .02 for brain injuries"},
    "patience": {
        "type": positive,
        "help": "stop when the score has not risen for this many validations (with --validate-every)",
    },
}


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `train`."""
    networks = [name for name in models.NETWORKS if name != "fcn_preprocessor"]  # which does not segment
    command.add_argument(
        "network",
        choices=[*networks, *RECIPES],
        metavar="NETWORK",
        help=f"a recipe of a paper on a data set: {', '.join(RECIPES)}; or a network by itself: {', '.join(networks)}",
    )
    command.add_argument("--out", required=True, help="folder of the run")
    add_data(command)
    command.add_argument(
        "--hold-out", nargs="+", default=[], metavar="NAME", help="cases kept from training and scored at the end"
    )
    add_folds(command)
    command.add_argument(
        "--stored",
        metavar="FOLDER",
        help="keep the cases on disk as the network sees them and read segments from there: for cohorts larger than memory (with "
        "folds always; default: OUT/cases)",
    )
    command.add_argument("--members", type=positive, default=1, help="networks to train that differ by their seed (paper: 3)")
    command.add_argument(
        "--validate-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="segment the held-out cases this often; 0: only at the end",
    )
    command.add_argument(
        "--normalise",
        choices=("standardise", "median", "none"),
        help="zero mean and unit variance inside the mask, divide by the median, or leave as is (default: the recipe's, or standardise)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of weights, segments and dropout")
    settings = command.add_argument_group(
        "settings of the recipe", "By default the paper's. Not every recipe has every one of them."
    )
    settings.add_argument("--width", type=float, default=1.0, help="scales every feature-map count; 1 is the paper's size")
    settings.add_argument("--plane", choices=tuple(context.PLANES), help="plane of the slices for mlynarski_2d (axial)")
    for name, how in SETTINGS.items():
        settings.add_argument(flag(name), **how)
    machine = command.add_argument_group("the machine")
    machine.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="number type of the training; auto: bfloat16 on GPUs that compute in it (Ampere and later), else float32. On older "
        "GPUs such as the T4 float16 needs less memory and may be faster; where numbers overflow, the training goes on in float32",
    )
    machine.add_argument("--compiled", action="store_true", help="through torch.compile")
    machine.add_argument("--channels-last", action="store_true", help="another memory layout, faster on some machines")
    machine.add_argument("--workers", type=positive, default=1, help="threads that prepare batches (1)")
    machine.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard, if it is installed")
    add_device(machine)


def flag(name: str) -> str:
    """Return the option that sets an argument."""
    return f"--{name.replace('_', '-')}"


def run(options) -> None:
    """Train one network, or one for each fold."""
    if options.network in RECIPES or options.folds:
        _train_folds(options)
        return
    if options.fold is not None or options.folds_on_gpus or options.folds_at_once > 1:
        raise ValueError("--fold, --folds-on-gpus and --folds-at-once are for --folds; say how many there are")
    normalise = options.normalise or "standardise"
    cases = list(read_cases(options, label=True, normalise=normalise, stored=options.stored))
    cases, held = _hold_out(cases, options.hold_out)
    settings = _settings(options)
    if options.plane:
        if options.network != "mlynarski_2d":
            raise ValueError(f"--plane is for mlynarski_2d; {options.network} takes volumes or axial slices")
        cases, held = ([context.facing(c, options.plane) for c in some] for some in (cases, held))
        settings["flip"] = options.plane != "sagittal"  # whose slices have no left and right
    if distributed.rank() == 0:
        print(f"{len(cases)} cases to train on, {len(held)} held out, on {_where(options.device)}")
    facts = {"normalise": normalise, "held_out": [c.name for c in held], "command": options.typed}
    facts |= {"plane": options.plane} if options.plane else {}
    for member in range(options.members):
        folder = Path(options.out) / f"member{member}" if options.members > 1 else Path(options.out)
        model = recipe_for(options.network)(
            cases,
            network=options.network,
            folder=folder,
            classes=options.classes,
            width=options.width,
            validation=held if options.validate_every else (),
            validate_every=options.validate_every or 500,
            device=options.device,
            seed=options.seed + member,
            engine=_engine(options),
            **settings,
        )
        model.card |= facts
        path = save_with_card(model, folder)
        if distributed.rank() == 0:
            print(f"saved {path}")
        if held:
            _score_held_out(model, held, folder)


def _train_folds(options) -> None:
    """Cross-validate a named recipe, or a network of which the folds are given."""
    if options.hold_out or options.start:
        raise ValueError("--hold-out and --start are for one network; with folds every case is held out once")
    settings = _settings(options)
    if options.network in RECIPES:
        if options.plane:
            raise ValueError("--plane is a part of the recipe's name")
        recipe = find_recipe(options.network)
        cases = open_recipe_cohort(options, recipe)
    else:
        if not options.classes:
            raise ValueError("--folds of a network by itself needs --classes, the number of classes with the background")
        cases = open_cohort(options, label=True)
        recipe = Recipe(
            options.network,
            network=options.network,
            channels=tuple(c.split("=")[0] for c in options.channels or cases[0].channels),
            classes=options.classes,
            regions=regions_for(options.classes),
            plane=options.plane or "axial",
        )
        if options.plane == "sagittal":
            settings["flip"] = False  # slices that have no left and right
    if options.normalise:
        recipe = dataclasses.replace(recipe, normalise=options.normalise)
    settings |= {"validate_every": options.validate_every} if options.validate_every else {}
    settings |= {"width": options.width} if options.width != 1 else {}
    if options.network in RECIPES:
        distributed.check_enough(*size_of_update(dataclasses.replace(recipe, settings={**recipe.settings, **settings})))
    processes = FoldProcesses(options.arguments, options.places) if options.places else None
    if distributed.rank() == 0:
        where = f"{len(options.places)} at once, each in a process of its own" if processes else f"on {_where(options.device)}"
        print(f"{options.network}: {len(cases)} cases in {options.folds or recipe.folds} folds, {where}")
    cross_validate(
        recipe,
        cases,
        options.out,
        folds=options.folds,
        fold=options.fold,
        stored=options.stored,
        scores=options.scores,
        members=options.members if options.members > 1 else None,
        seed=options.seed,
        device=options.device,
        engine=_engine(options),
        command=options.typed,
        summary=not is_one_of_several(options),
        launch=processes,
        **settings,
    )
    if processes:
        processes.check()


def _hold_out(cases: list[Case], names: list[str]) -> tuple[list[Case], list[Case]]:
    """Return the cases to train on and the cases held out."""
    held = [c for c in cases if c.name in names]
    missing = set(names) - {c.name for c in held}
    if missing:
        raise ValueError(f"--hold-out {', '.join(sorted(missing))}: no such case; there are {', '.join(c.name for c in cases)}")
    cases = [c for c in cases if c.name not in names]
    if not cases:
        raise ValueError("every case is held out; leave at least one to train on")
    return cases, held


def _score_held_out(model: models.Network, held: list[Case], folder: Path) -> None:
    """Segment and score the held-out cases. Several processes share them."""

    def score(case: Case) -> pd.DataFrame:
        prediction = inference.predict(model, case, progress=distributed.rank() == 0)
        return metrics.evaluate_cohort([prediction], [case], regions=regions_for(model.classes))

    table = pd.concat(distributed.deal_out(score, held), ignore_index=True)
    if distributed.rank() == 0:
        metrics.write_table(folder / "held_out.csv", table)
        print(table.round(3).to_string(index=False))


def _settings(options) -> dict:
    """Return the settings that were given, where the network's recipe has them; the others stay as in the paper."""
    network = RECIPES[options.network].network if options.network in RECIPES else options.network
    given = {name: value for name, value in vars(options).items() if name in SETTINGS and value is not None}
    foreign = sorted(given.keys() - inspect.signature(recipe_for(network)).parameters.keys())
    if foreign:
        raise ValueError(f"{', '.join(map(flag, foreign))}: the recipe of {options.network} has no such setting; leave it out")
    return given


def _engine(options) -> dict:
    """Return the options for the machine at hand."""
    return {f.name: value for f in dataclasses.fields(training.Engine) if (value := vars(options)[f.name]) is not None}


def _where(device: str) -> str:
    count = distributed.world_size()
    return f"{count} processes, this one on {device}" if count > 1 else device
