"""The command line: `python -m medseg_lite train | recipes | scores | segment | evaluate | phantom | download`."""

from __future__ import annotations

import argparse
import inspect
import shlex
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pandas as pd
from tqdm import tqdm

from . import __version__, context, datasets, ensembles, inference, metrics, models, phantoms, recipes, statistics
from .engine import distributed
from .files import read_label, write_case, write_nifti
from .paths import atomic_write
from .recipes import named
from .training import BEST
from .volume import Case

EXAMPLES = """\
examples

  twelve generated brains, and a small DeepMedic trained on them for a minute or two
    python -m medseg_lite phantom --count 12 --out my_phantoms
    python -m medseg_lite train deepmedic --data my_phantoms --channels flair t1 t1c t2 --width 0.3 --steps 200 --out runs/first

  real brain tumours: fetch, train on all cases but one, segment and score that one
    python -m medseg_lite download brats2013_deepmedic
    python -m medseg_lite train deepmedic --data brats2013_deepmedic --hold-out brats_2013_pat0003_1 --steps 500 --out runs/real
    python -m medseg_lite segment --model runs/real/model.safetensors --data brats2013_deepmedic --cases brats_2013_pat0003_1 --out runs/real/predictions
    python -m medseg_lite evaluate --predictions runs/real/predictions --data brats2013_deepmedic --cases brats_2013_pat0003_1

  a paper's complete recipe, in five folds, on all GPUs of the machine (`recipes` lists the others; --fold 0 for one fold)
    torchrun --nproc-per-node gpu -m medseg_lite train deepmedic-msd-brain --data Task01_BrainTumour --out runs/brains
    torchrun --nproc-per-node gpu -m medseg_lite segment --model runs/brains/fold0/model.safetensors --data my_scans --out runs/mine

  2D networks in three planes, and a 3D network that is told what they see (the same for coronal and sagittal)
    python -m medseg_lite train mlynarski_2d --plane axial --data my_phantoms --channels flair t1 t1c t2 --width 0.2 --steps 200 --out runs/axial
    python -m medseg_lite scores --model runs/{axial,coronal,sagittal}/model.safetensors --data my_phantoms --out runs/scores
    python -m medseg_lite train mlynarski_3d --scores runs/scores --data my_phantoms --channels flair t1 t1c t2 --width 0.5 --steps 200 --out runs/both

  your own scans: one sub-folder per case; say how each file is named
    python -m medseg_lite train deepmedic --data my_scans --channels 'flair=*flair.nii.gz' 't1c=*t1ce.nii.gz' --label '*seg.nii.gz' --out runs/mine

`python -m medseg_lite COMMAND --help` explains each command. Not for clinical use.
"""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status. Mistakes in the input end with one readable line on standard error."""
    parser = _parser()
    options = parser.parse_args(arguments)
    options.typed = "python -m medseg_lite " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    try:
        with distributed.joined(getattr(options, "device", "cpu")) as options.device:
            options.run(options)
    except (ValueError, FileNotFoundError, FloatingPointError, ConnectionError, MemoryError, OSError) as error:
        print(f"medseg_lite {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def _train(options) -> None:
    if options.fold is not None and not options.folds and options.network not in named.RECIPES:
        raise ValueError("--fold is one of --folds; say how many there are")
    if options.network in named.RECIPES or options.folds:
        _cross_validate(options)
        return
    options.normalise = options.normalise or "standardise"
    cases = list(_cases(options, label=True, normalise=options.normalise))
    held = [c for c in cases if c.name in options.hold_out]
    missing = set(options.hold_out) - {c.name for c in held}
    if missing:
        raise ValueError(f"--hold-out {', '.join(sorted(missing))}: no such case; there are {', '.join(c.name for c in cases)}")
    cases = [c for c in cases if c.name not in options.hold_out]
    if not cases:
        raise ValueError("every case is held out; leave at least one to train on")
    settings = _of_the_recipe(options)
    if options.plane:
        if options.network != "mlynarski_2d":
            raise ValueError(f"--plane is for mlynarski_2d; {options.network} takes volumes or axial slices")
        cases, held = ([context.facing(c, options.plane) for c in some] for some in (cases, held))
        settings["flip"] = options.plane != "sagittal"  # whose slices have no left and right
    first, device, out = distributed.number() == 0, options.device, Path(options.out)
    if first:
        print(f"{len(cases)} cases to train on, {len(held)} held out, on {_where(device)}")
    for member in range(options.ensemble):
        folder = out / f"member{member}" if options.ensemble > 1 else out
        model = recipes.of_network(options.network)(
            cases,
            network=options.network,
            folder=folder,
            classes=options.classes,
            width=options.width,
            validation=held if options.validate_every else (),
            validate_every=options.validate_every or 500,
            device=device,
            seed=options.seed + member,
            engine=_engine(options),
            **settings,
        )
        card = model.card | {"normalise": options.normalise, "held_out": [c.name for c in held], "command": options.typed}
        if options.plane:
            card["plane"] = options.plane
        if not first:
            continue
        print(f"saved {models.save(folder / 'model.safetensors', model, card)}")
        if (folder / BEST).exists():
            best = models.load(folder / BEST)
            models.save(folder / BEST, best, card | best.card)
        if held:
            predictions = [inference.predict(model, c) for c in held]
            table = metrics.evaluate_cohort(predictions, held, regions=recipes.regions_of(model.classes))
            _save_table(folder / "held_out.csv", table)
            print(table.round(3).to_string(index=False))


def _cross_validate(options) -> None:
    """A named recipe, or a network of which the folds are given."""
    if options.hold_out or options.start:
        raise ValueError("--hold-out and --start are for one network; with folds every case is held out once")
    settings = _of_the_recipe(options)
    if options.network in named.RECIPES:
        recipe = {"name": options.network, **named.recipe_of(options.network)}
        if options.channels or options.data in _KNOWN:
            cases = _cohort(options, label=True)
        else:
            cases = named.cases_of(options.network, options.data, cases=options.cases)
        if options.plane:
            raise ValueError("--plane is a part of the recipe's name")
    else:
        if not options.classes:
            raise ValueError("--folds of a network by itself needs --classes, the number of classes with the background")
        cases = _cohort(options, label=True)
        channels = [c.split("=")[0] for c in options.channels] if options.channels else cases[0].channels
        recipe = {
            "name": options.network,
            "network": options.network,
            "settings": {},
            "channels": channels,
            "classes": options.classes,
            "normalise": "standardise",
            "regions": recipes.regions_of(options.classes),
            "plane": options.plane or "axial",
        }
    recipe |= {"normalise": options.normalise} if options.normalise else {}
    if options.network in models.NETWORKS and options.plane == "sagittal":
        settings["flip"] = False  # slices that have no left and right
    settings |= {"validate_every": options.validate_every} if options.validate_every else {}
    settings |= {"width": options.width} if options.width != 1 else {}
    if distributed.number() == 0:
        print(f"{options.network}: {len(cases)} cases in {options.folds or recipe['folds']} folds, on {_where(options.device)}")
    recipes.cross_validate(
        recipe,
        cases,
        options.out,
        folds=options.folds,
        fold=options.fold,
        stored=options.store,
        scores=options.scores,
        members=options.ensemble if options.ensemble > 1 else None,
        seed=options.seed,
        device=options.device,
        engine=_engine(options),
        command=options.typed,
        **settings,
    )


def _recipes(options) -> None:
    for name, recipe in named.RECIPES.items():
        print(f"{name}\n  {recipe['paper']}\n  {recipe['data']}")
        print(
            f"  {recipe['network']}, {recipe['folds']} folds; "
            + ", ".join(f"{k} {_short(v)}" for k, v in recipe["settings"].items())
        )
        if recipe["reported"]:
            scores = "; ".join(
                f"{metric} " + ", ".join(f"{region} {value:g}" for region, value in row.items())
                for metric, row in recipe["reported"].items()
                if metric != "where"
            )
            print(f"  the paper, {recipe['reported']['where']}: {scores}")
        print()


def _short(value) -> str:
    numbers = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers)


def _engine(options) -> dict:
    """How the machine at hand is to be used."""
    return {
        "precision": options.precision,
        "compiled": options.compile,
        "channels_last": options.channels_last,
        "workers": options.workers,
        "tensorboard": options.tensorboard,
    }


def _where(device: str) -> str:
    return f"{distributed.count()} processes, this one on {device}" if distributed.count() > 1 else device


def _of_the_recipe(options) -> dict:
    """The settings that were given, where the network's recipe has them; the others stay as in the paper."""
    known = named.RECIPES.get(options.network, {"network": options.network})
    recipe = recipes.of_network(known["network"])
    given = {name: value for name in _SETTINGS if (value := getattr(options, name)) is not None}
    foreign = set(given) - set(inspect.signature(recipe).parameters)
    if foreign:
        flags = ", ".join(f"--{'block' if n == 'output' else n.replace('_', '-')}" for n in sorted(foreign))
        raise ValueError(f"{flags}: the recipe of {options.network} has no such setting; leave it out")
    return given


def _segment(options) -> None:
    device = options.device
    members = [models.load(path).to(device) for path in options.model]
    model = ensembles.Ensemble(members) if len(members) > 1 else members[0]
    cards = [m.card for m in members]
    if any(c.get("normalise") != cards[0].get("normalise") for c in cards):
        raise ValueError("the networks of the ensemble were trained on differently normalised images")
    plane = cards[0].get("plane", "axial")
    if any(c.get("plane", "axial") != plane for c in cards):
        raise ValueError("the networks of the ensemble were trained on slices of different planes; segment with each")
    channels = cards[0].get("channels")
    if options.channels is None and not _named(options.data):
        options.channels = channels
    if channels:
        options.channels = options.channels and [c for c in options.channels if c.split()[0] not in context.PLANES]
    out = Path(options.out)
    progress = distributed.number() == 0
    how = {"compiled": options.compile, "progress": progress, "tile": options.tile}
    for case in _cases(options, label=False, normalise=cards[0].get("normalise", "standardise"), shared=True):
        if channels:
            case = case.select(channels)
        if options.probabilities:
            probabilities = inference.predict(model, context.facing(case, plane), output="probabilities", **how)
            probabilities = context.facing_back(probabilities, plane)
            write_nifti(out / f"{case.name}_probabilities.nii.gz", probabilities, case)
            labels = probabilities.argmax(0).astype("uint8")
        else:
            labels = context.facing_back(inference.predict(model, context.facing(case, plane), **how), plane)
        path = write_nifti(out / f"{case.name}.nii.gz", labels, case)
        print(f"wrote {path}")


def _scores(options) -> None:
    device = options.device
    networks = {plane: models.load(path).to(device) for plane, path in zip(context.PLANES, options.model, strict=True)}
    cards = [network.card for network in networks.values()]
    found = [card.get("plane", "axial") for card in cards]
    if found != list(networks):
        raise ValueError(
            f"--model is for slices of the planes {', '.join(found)}; expected {', '.join(networks)}, in this order"
        )
    if options.channels is None and not _named(options.data):
        options.channels = cards[0].get("channels")
    cases = _cases(options, label=False, normalise=cards[0].get("normalise", "standardise"), shared=True)
    context.extract_scores(networks, cases, options.out)
    print(f"the scores are in {options.out}; train mlynarski_3d with --scores {options.out}")


def _evaluate(options) -> None:
    folder, predictions, cases = Path(options.predictions), [], []
    for case in _cases(options, label=True, normalise="none"):
        predictions.append(read_label(folder / f"{case.name}.nii.gz", case))
        cases.append(case.replace(image=case.image[:0].copy(), channels=()))  # the image has served its purpose
    classes = 1 + max(1, *(int(c.label.max()) for c in cases), *(int(p.max()) for p in predictions))
    table = metrics.evaluate_cohort(predictions, cases, regions=options.regions or recipes.regions_of(classes))
    print(table.round(3).to_string(index=False))
    print("\nmean (standard deviation) over cases; distances in mm")
    print(statistics.summary(table).to_string())
    if options.out:
        _save_table(Path(options.out), table)
        print(f"\nwrote {options.out}")


def _phantom(options) -> None:
    for n in tqdm(range(options.count), desc="phantoms"):
        site = options.sites[n % len(options.sites)]
        lesion = None if options.lesion == "none" else options.lesion
        case = phantoms.brain(options.seed + n, site=site, spacing=options.spacing, lesion=lesion)
        write_case(Path(options.out) / case.name, case)
    print(f"wrote {options.count} cases to {options.out}")


def _download(options) -> None:
    fetch = datasets.downloads[options.dataset]
    takes = "unverified" in inspect.signature(fetch).parameters
    if options.unverified and not takes:
        raise ValueError(f"--unverified: the checksum of {options.dataset} is known; leave it out")
    folder = fetch(options.folder, unverified=options.unverified) if takes else fetch(options.folder)
    print(f"{options.dataset} is ready in {folder}")


# ------------------------------------------------------------------------------------------------------------ input

# Settings of recipes that can be given on the command line; not every recipe has every one.
_SETTINGS = (
    "steps",
    "phase2_steps",
    "halvings",
    "output",
    "crop",
    "batch_size",
    "learning_rate",
    "start",
    "first",
    "shift",
    "conv_dropout",
    "patience",
)
_KNOWN = ("brats2013_deepmedic", "phantoms")  # --data that is not a folder, whatever the recipe
# --data that stands for the place where `datasets` looks for it by itself.
_LOADERS = {
    **{name: getattr(datasets, name) for name in ("brats2013_deepmedic", "brats2015", "brats2017", "lits", "promise12")},
    **{name: partial(datasets.msd, name) for name in ("msd03_liver", "msd04_hippocampus", "msd05_prostate")},
    "msd01_brain": partial(datasets.msd, "msd01_brain", as_brats=True),
}


def _named(data: str) -> bool:
    """Whether --data is a name and not a folder."""
    return data in _LOADERS or data in _KNOWN


def _cohort(options, *, label: bool) -> Sequence[Case]:
    """The cases that --data and its companions name, as they are, read when they are asked for."""
    if options.data in _LOADERS:
        return _LOADERS[options.data](cases=options.cases or None)
    elif options.data == "phantoms":
        return phantoms.brain_cohort(options.count, spacing=options.spacing, progress=distributed.number() == 0)
    else:
        if not options.channels:
            raise ValueError("--channels is needed to read a folder, for example --channels flair t1c or 'flair=*flair.nii.gz'")
        pairs = (c.split("=", 1) if "=" in c else (c, f"{c}.nii.gz") for c in options.channels)
        folder = Path(options.data)
        return datasets.nifti_folder(
            folder,
            channels=dict(pairs),
            label=(options.label or "label.nii.gz") if label else None,
            mask=options.mask or ("mask.nii.gz" if any(folder.glob("*/mask.nii.gz")) else None),
            labels=range(options.classes) if label and options.classes else None,
            cases=options.cases or None,
        )


def _cases(options, *, label: bool, normalise: str, shared: bool = False) -> Iterator[Case]:
    """The cases, ready for a network; of several processes each gets a part of them where they are `shared`."""
    cases = _cohort(options, label=label)
    ready = partial(_ready, channels=options.channels if _named(options.data) else None, normalise=normalise)
    if getattr(options, "store", None):
        store = partial(datasets.store, cases, options.store, normalise=ready, progress=distributed.number() == 0)
        if distributed.number() == 0:
            store()
        distributed.wait()
        cases, ready = store(), None
    start, step = (distributed.number(), distributed.count()) if shared else (0, 1)
    for n in range(start, len(cases), step):
        case = cases[n] if ready is None else ready(cases[n])
        yield context.with_scores(case, options.scores) if getattr(options, "scores", None) else case


def _ready(case: Case, *, channels: Sequence[str] | None, normalise: str) -> Case:
    return named.normalised(case.select(channels) if channels else case, normalise)


def _save_table(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)


# ---------------------------------------------------------------------------------------------------------- options


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number above zero")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m medseg_lite",
        description="Train, use and judge networks that segment medical images.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"medseg_lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text.split(".")[0].lower(), description=text, formatter_class=raw)
        sub.set_defaults(run=run)
        return sub

    def data(sub: argparse.ArgumentParser) -> None:
        group = sub.add_argument_group("data")
        group.add_argument(
            "--data",
            required=True,
            help=f"a folder with one sub-folder per case, or phantoms, or a data set that was fetched: {', '.join(_LOADERS)}",
        )
        group.add_argument("--cases", nargs="+", default=[], metavar="NAME", help="only these cases")
        group.add_argument(
            "--channels",
            nargs="+",
            metavar="NAME[=PATTERN]",
            help="the sequences to read from each case's folder, in this order; PATTERN finds the file (default NAME.nii.gz)",
        )
        group.add_argument("--label", metavar="PATTERN", help="finds the file with the true classes (default label.nii.gz)")
        group.add_argument(
            "--classes", type=_positive, metavar="K", help="labels must lie in 0 to K - 1 (default: whatever the files hold)"
        )
        group.add_argument(
            "--mask",
            metavar="PATTERN",
            help="finds the brain mask; 'all' for the whole volume; default: mask.nii.gz, or else where the image is not 0",
        )
        group.add_argument(
            "--scores", metavar="FOLDER", help="with the scores of 2D networks as further channels (see `scores`)"
        )
        group.add_argument("--spacing", type=float, default=2.0, help="voxel side in mm of --data phantoms (2)")
        group.add_argument("--count", type=_positive, default=24, help="phantoms to generate with --data phantoms (24)")

    def device(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, or auto (a GPU if there is one)")

    train = command(
        "train",
        _train,
        "Train a network. The run is kept in --out: last.pt to go on from (the same command resumes), history.csv, and "
        "model.safetensors at the end. Defaults are the paper's; they take a GPU a day. On a CPU try --steps 500.",
    )
    networks = [name for name in models.NETWORKS if name != "fcn_preprocessor"]  # which does not segment
    train.add_argument(
        "network",
        choices=[*networks, *named.RECIPES],
        metavar="NETWORK",
        help="a recipe of a paper on a data set: "
        + ", ".join(named.RECIPES)
        + "; or a network by itself: "
        + ", ".join(networks),
    )
    train.add_argument("--out", required=True, help="folder of the run")
    data(train)
    train.add_argument(
        "--hold-out", nargs="+", default=[], metavar="NAME", help="cases kept from training and scored at the end"
    )
    train.add_argument("--folds", type=_positive, help="cross-validation; the recipe's, or 1 to train on all cases")
    train.add_argument("--fold", type=int, metavar="K", help="this one alone, from 0")
    train.add_argument(
        "--store",
        metavar="FOLDER",
        help="keep the cases on disk as the network sees them and read segments from there: for cohorts larger than memory (with "
        "folds always; default: OUT/cases)",
    )
    train.add_argument("--width", type=float, default=1.0, help="scales every feature-map count; 1 is the paper's size")
    settings = train.add_argument_group(
        "settings of the recipe", "By default the paper's. Not every recipe has every one of them."
    )
    settings.add_argument("--steps", type=_positive, help="updates (DeepMedic's 70000)")
    settings.add_argument("--phase2-steps", type=int, help="of Havaei's second phase, 0 to leave it out")
    settings.add_argument(
        "--halvings",
        type=float,
        nargs="*",
        metavar="FRACTION",
        help="fractions of the run after which the learning rate is halved (DeepMedic: the published schedule); short runs do better with .6 .8 .9",
    )
    settings.add_argument(
        "--block",
        dest="output",
        type=_positive,
        help="side of the block predicted at a time; 9 is DeepMedic's (25³ segments), 21 costs less than half as much per labelled voxel",
    )
    settings.add_argument(
        "--crop",
        type=_positive,
        help="side of the crops, for networks that pad (default: Kayalibay whole volumes, Drozdzal 256)",
    )
    settings.add_argument("--batch-size", type=_positive, help="segments, crops or volumes per batch")
    settings.add_argument("--learning-rate", type=float, help="at the start")
    settings.add_argument(
        "--start", metavar="MODEL", help="begin from this model.safetensors instead of random weights (fine-tuning)"
    )
    settings.add_argument("--first", metavar="MODEL", help="the trained two_path_cnn of one of Havaei's cascades")
    settings.add_argument("--shift", type=float, help="random intensity shift; .1 for brain injuries")
    settings.add_argument("--conv-dropout", type=float, help="dropout on convolutions; .02 for brain injuries")
    settings.add_argument(
        "--patience", type=_positive, help="stop when the score has not risen for this many validations (with --validate-every)"
    )
    train.add_argument(
        "--ensemble", type=_positive, default=1, help="train this many networks that differ by their seed (paper: 3)"
    )
    train.add_argument(
        "--validate-every",
        type=int,
        default=0,
        metavar="STEPS",
        help="segment the held-out cases this often; 0: only at the end",
    )
    train.add_argument(
        "--normalise",
        choices=("standardise", "median", "none"),
        help="zero mean and unit variance inside the mask, divide by the median, or leave as is (default: the recipe's, or standardise)",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights, segments and dropout")
    settings.add_argument("--plane", choices=tuple(context.PLANES), help="whose slices mlynarski_2d is trained on (axial)")
    machine = train.add_argument_group("the machine")
    machine.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="auto: bfloat16 on a GPU that has it",
    )
    machine.add_argument("--compile", action="store_true", help="through torch.compile")
    machine.add_argument("--channels-last", action="store_true", help="another memory layout, faster on some machines")
    machine.add_argument("--workers", type=_positive, default=1, help="threads that prepare batches (1)")
    machine.add_argument("--tensorboard", action="store_true", help="also log to OUT/tensorboard, if it is installed")
    device(train)

    command("recipes", _recipes, "List the named recipes. With their papers, data, settings and the papers' own scores.")

    scores = command(
        "scores",
        _scores,
        "Write the class scores of three 2D networks for every case. One file for each case and plane, to be given to "
        "mlynarski_3d with --scores. What is there already is not computed again.",
    )
    scores.add_argument("--model", nargs=3, required=True, metavar=("AXIAL", "CORONAL", "SAGITTAL"), help="model.safetensors")
    scores.add_argument("--out", required=True, help="folder for the scores")
    data(scores)
    device(scores)

    segment = command(
        "segment",
        _segment,
        "Segment cases with a trained network, or with the average of several. Writes one NIfTI file of classes per case, on "
        "the grid of the case's own files. Images are normalised as the network's card says.",
    )
    segment.add_argument("--model", nargs="+", required=True, help="model.safetensors; several are averaged")
    segment.add_argument("--out", required=True, help="folder for the results")
    data(segment)
    segment.add_argument("--probabilities", action="store_true", help="also write the class probabilities as a 4-D file")
    segment.add_argument(
        "--tile",
        type=_positive,
        help="side of the block predicted at a time (default: as memory allows; the result is the same)",
    )
    segment.add_argument("--compile", action="store_true", help="through torch.compile; for many cases of one size")
    device(segment)

    evaluate = command(
        "evaluate",
        _evaluate,
        "Score segmentations against the truth: Dice, precision, sensitivity, specificity, average and Hausdorff surface "
        "distance for each region and case, and their mean and standard deviation.",
    )
    evaluate.add_argument("--predictions", required=True, help="folder with CASE.nii.gz files, as `segment` writes them")
    data(evaluate)
    evaluate.add_argument(
        "--regions", choices=sorted(metrics.regions), help="default: BRATS 2015 for five classes, else each class"
    )
    evaluate.add_argument("--out", help="also write the table to this CSV file")

    phantom = command("phantom", _phantom, "Generate brain phantoms. Writes them as NIfTI folders, ready for --data.")
    phantom.add_argument("--out", required=True, help="folder for the cases")
    phantom.add_argument("--count", type=_positive, default=1)
    phantom.add_argument("--seed", type=int, default=0, help="of the first phantom; the others follow")
    phantom.add_argument("--sites", default="ABC", help="scanner sites, taken in turn (D is the held-out one)")
    phantom.add_argument("--spacing", type=float, default=2.0, help="voxel side in mm: 2 (fast) or 1 (full)")
    phantom.add_argument("--lesion", default="glioma", choices=("glioma", "contusions", "stroke", "none"))

    download = command(
        "download",
        _download,
        "Download a public data set. Into the cache, checked by checksum; see data/README.md for its licence.",
    )
    download.add_argument("dataset", choices=sorted(datasets.downloads))
    download.add_argument("--unverified", action="store_true", help="accept what arrives where no checksum is known (isbi2012)")
    download.add_argument("--folder", help="where to put it instead of the cache or MEDSEG_DATA_DIR")
    return parser
