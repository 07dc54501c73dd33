"""Write the class scores of three 2D networks for every case. One file for each case and plane, to be given to mlynarski_3d with
--scores. Scores that are there already are not computed again.
"""

from __future__ import annotations

import argparse

from .. import context, models
from ._data import add_data, add_device, is_name, read_cases


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `scores`."""
    command.add_argument("--model", nargs=3, required=True, metavar=("AXIAL", "CORONAL", "SAGITTAL"), help="model.safetensors")
    command.add_argument("--out", required=True, help="folder for the scores")
    add_data(command)
    add_device(command)


def run(options) -> None:
    """Compute and write the scores."""
    networks = {plane: models.load(path).to(options.device) for plane, path in zip(context.PLANES, options.model, strict=True)}
    cards = [network.card for network in networks.values()]
    found = [card.get("plane", "axial") for card in cards]
    if found != list(networks):
        raise ValueError(
            f"--model is for slices of the planes {', '.join(found)}; expected {', '.join(networks)}, in this order"
        )
    if options.channels is None and not is_name(options.data):
        options.channels = cards[0].get("channels")
    cases = read_cases(options, label=False, normalise=cards[0].get("normalise", "standardise"), shared=True)
    context.extract_scores(networks, cases, options.out)
    print(f"the scores are in {options.out}; train mlynarski_3d with --scores {options.out}")
