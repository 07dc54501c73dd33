"""The command line: `python -m medseg_lite train | recipes | scores | segment | evaluate | phantom | download`.

Every sub-command has a file of its own, with its options and its work.
"""

from __future__ import annotations

import argparse
import importlib
import io
import shlex
import sys
from collections.abc import Collection

from .. import __version__

# The help of each sub-command is the first sentence of its module. The module itself is imported when the sub-command is named,
# because PyTorch takes seconds.
COMMANDS = {
    "train": "train a network",
    "recipes": "list the named recipes",
    "scores": "write the class scores of three 2d networks for every case",
    "segment": "segment cases with a trained network, or with the average of several",
    "evaluate": "score segmentations against the truth: dice, precision, sensitivity, specificity, average and hausdorff surface distance "
    "for each region and case, and their mean and standard deviation",
    "phantom": "generate brain phantoms",
    "download": "download a public data set",
}

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

  a paper's complete recipe, in five folds, each on a GPU of its own (`recipes` lists the others; --fold 0 for one fold)
    python -m medseg_lite train deepmedic-msd-brain --data Task01_BrainTumour --out runs/brains --folds-on-gpus

  all GPUs of the machine for each update, or for the cases to segment
    torchrun --nproc-per-node gpu -m medseg_lite train drozdzal-msd-prostate --data Task05_Prostate --out runs/prostate
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
    """Run one command and return the exit status. Mistakes in the input end with one readable line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that cannot show "×" shows "?"
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    options = make_parser(arguments).parse_args(arguments)
    options.arguments, options.typed = arguments, "python -m medseg_lite " + shlex.join(arguments)

    from ..engine import distributed
    from ._folds import find_places

    try:
        options.places = find_places(options)
        # A process that starts others leaves the GPUs to them.
        with distributed.joined("cpu" if options.places else options.device) as options.device:
            options.run(options)
    except (ValueError, FileNotFoundError, FloatingPointError, ConnectionError, MemoryError, OSError) as error:
        print(f"medseg_lite {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as stop:
        print(f"\n{stop or 'stopped'}", file=sys.stderr)
        return 130
    return 0


def make_parser(named: Collection[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """Return the parser of all sub-commands. Only those that are named have their options."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m medseg_lite",
        description="Train, use and judge networks that segment medical images.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"medseg_lite {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, formatter_class=raw)
        if name in named:
            module = importlib.import_module(f".{name}", __name__)
            command.description = " ".join(module.__doc__.split())
            command.set_defaults(run=module.run, device="cpu")
            module.add_options(command)
    return parser
