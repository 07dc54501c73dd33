"""List the named recipes. With their papers, data, settings and the papers' own scores."""

from __future__ import annotations

import argparse

from ..recipes import RECIPES, find_settings
from ..recipes.crossvalidation import size_of_update


def add_options(command: argparse.ArgumentParser) -> None:
    """Add no options: there are none."""


def run(options) -> None:
    """Print every recipe."""
    for name, recipe in RECIPES.items():
        print(f"{name}\n  {recipe.paper}\n  {recipe.data}")
        settings = ", ".join(
            f"{k} {_short(v)}" for k, v in find_settings(recipe).items() if isinstance(v, (int, float, str, tuple))
        )
        print(f"  {recipe.network}, {recipe.folds} folds; {settings}")
        print(f"  processes that can share an update: at most {max(size_of_update(recipe))}")
        if recipe.reported:
            scores = "; ".join(
                f"{metric} " + ", ".join(f"{region} {value:g}" for region, value in row.items())
                for metric, row in recipe.reported.items()
                if metric != "where"
            )
            print(f"  the paper, {recipe.reported['where']}: {scores}")
        print()


def _short(value) -> str:
    numbers = value if isinstance(value, tuple) else (value,)
    return " ".join(f"{n:.3g}" if isinstance(n, float) else str(n) for n in numbers)
