"""The named recipes: a paper on a data set, with its settings, folds and regions, and what the paper reports.

    python -m medseg_lite recipes
    python -m medseg_lite train deepmedic-brats2015 --data BRATS2015_Training --out runs/deepmedic

Each stands beside its paper's recipe; here they come together.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .. import datasets
from ..moved import forward
from ..volume import Case
from .deepmedic import RECIPES as DEEPMEDIC
from .drozdzal import RECIPES as DROZDZAL
from .havaei import RECIPES as HAVAEI
from .kayalibay import RECIPES as KAYALIBAY
from .mlynarski import RECIPES as MLYNARSKI
from .recipe import Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe for paper in (DEEPMEDIC, HAVAEI, KAYALIBAY, DROZDZAL, MLYNARSKI) for recipe in paper
}


def find_recipe(name: str) -> Recipe:
    """Return a recipe by its name."""
    if name not in RECIPES:
        raise ValueError(f"recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def load_cases(name: str, folder: str | Path, *, cases: Sequence[str] | None = None) -> Sequence[Case]:
    """Return the cases of a recipe's data set, which are read when they are asked for.

    Slices of an electron microscopy stack are cases of their own, for folds are made of slices there.

    Args:
        name: name of the recipe.
        folder: folder of the data. The name of the loader, or of a download, stands for the place where `datasets` looks by itself.
        cases: names of the cases wanted; by default all.

    Raises:
        ValueError, FileNotFoundError: there is no such recipe, no loader for its data, or the folder holds something else.
    """
    recipe = find_recipe(name)
    if recipe.loader is None:
        raise ValueError(
            f"{name} is for {recipe.data}, which has no reader of its own: say how the files are named with "
            f"--channels {' '.join(c + '=PATTERN' for c in recipe.channels)} and --label PATTERN"
        )
    root = None if folder == recipe.loader != "msd" and not Path(folder).is_dir() else folder
    if recipe.loader != "isbi2012":
        return getattr(datasets, recipe.loader)(root, cases=cases or None, **recipe.loader_options)
    stack = datasets.isbi2012(root)
    count = stack.shape[2]
    slices = [stack.crop((slice(None), slice(None), slice(n, n + 1))) for n in range(count)]
    named = {(name := f"{stack.name}-{n:0{len(str(count - 1))}}"): s.replace(name=name) for n, s in enumerate(slices)}
    unknown = set(cases or ()) - set(named)
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no such slice; there are {', '.join(named)}")
    return [named[name] for name in cases or named]


_MOVED = {
    "recipe_of": "medseg_lite.recipes.named.find_recipe",
    "cases_of": "medseg_lite.recipes.named.load_cases",
    "folds_of": "medseg_lite.recipes.crossvalidation.split_folds",
    "prepared": "medseg_lite.recipes.crossvalidation.prepare_case",
    "normalised": "medseg_lite.transforms.normalise",
}
__getattr__ = forward(__name__, _MOVED)
