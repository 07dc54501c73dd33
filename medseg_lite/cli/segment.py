"""Segment cases with a trained network, or with the average of several. Writes one NIfTI file of classes per case, on the grid of the
case's own files. Images are normalised as the network's card says, and classes have the numbers of the data that it was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from .. import context, ensembles, inference, models
from ..engine import distributed
from ..files import write_nifti
from ..paths import file_for
from ..recipes import find_numbers
from ._data import add_data, add_device, is_name, positive, read_cases


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `segment`."""
    command.add_argument("--model", nargs="+", required=True, help="model.safetensors; several are averaged")
    command.add_argument("--out", required=True, help="folder for the results")
    add_data(command)
    command.add_argument("--probabilities", action="store_true", help="also write the class probabilities as a 4-D file")
    command.add_argument("--tile", type=positive, help="side of the tiles (default: as memory allows; the result is the same)")
    command.add_argument("--compiled", action="store_true", help="through torch.compile; for many cases of one size")
    add_device(command)


def _find_numbers(network: models.Network) -> np.ndarray:
    """Return the number of each class in the data that a network was trained on, as its card says."""
    label_map = {int(old): new for old, new in network.card.get("label_map", {}).items()}
    return np.array(network.card.get("data_labels") or find_numbers(label_map, network.classes))


def run(options) -> None:
    """Segment the cases and write the predictions."""
    members = [models.load(path).to(options.device) for path in options.model]
    model = ensembles.Ensemble(members) if len(members) > 1 else members[0]
    cards = [member.card for member in members]
    card, plane = cards[0], cards[0].get("plane", "axial")
    if any(c.get("normalise") != card.get("normalise") for c in cards):
        raise ValueError("the networks of the ensemble were trained on differently normalised images")
    if any(c.get("plane", "axial") != plane for c in cards):
        raise ValueError("the networks of the ensemble were trained on slices of different planes; segment with each")
    numbers = [_find_numbers(member) for member in members]
    if any(n.tolist() != numbers[0].tolist() for n in numbers):
        raise ValueError(
            f"the networks of the ensemble were trained on data with other class numbers: {[n.tolist() for n in numbers]}"
        )
    channels = card.get("channels")
    if options.channels is None and not is_name(options.data):
        options.channels = channels
    if channels and options.channels:
        options.channels = [c for c in options.channels if c.split()[0] not in context.PLANES]
    out, how = Path(options.out), {"compiled": options.compiled, "progress": distributed.rank() == 0, "tile": options.tile}
    for case in read_cases(options, label=False, normalise=card.get("normalise", "standardise"), shared=True):
        if channels:
            case = case.select(channels)
        path, probabilities = (file_for(out, case.name, ending) for ending in (".nii.gz", "_probabilities.nii.gz"))
        output = "probabilities" if options.probabilities else "labels"
        prediction = context.facing_back(inference.predict(model, context.facing(case, plane), output=output, **how), plane)
        if options.probabilities:
            write_nifti(probabilities, prediction, case)
            prediction = prediction.argmax(0)
        prediction = numbers[0][prediction].astype(np.uint8)
        print(f"wrote {write_nifti(path, prediction, case)}")
