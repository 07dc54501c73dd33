"""Download a public data set. Into the cache, checked by checksum; see data/README.md for its licence."""

from __future__ import annotations

import argparse
import inspect

from .. import datasets


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options of `download`."""
    command.add_argument("dataset", choices=sorted(datasets.downloads))
    command.add_argument("--unverified", action="store_true", help="accept files of unknown checksum (isbi2012)")
    command.add_argument("--folder", help="where to put it instead of the cache or MEDSEG_DATA_DIR")


def run(options) -> None:
    """Fetch, check and unpack the data set."""
    fetch = datasets.downloads[options.dataset]
    takes = "unverified" in inspect.signature(fetch).parameters
    if options.unverified and not takes:
        raise ValueError(f"--unverified: the checksum of {options.dataset} is known; leave it out")
    folder = fetch(options.folder, unverified=options.unverified) if takes else fetch(options.folder)
    print(f"{options.dataset} is ready in {folder}")
