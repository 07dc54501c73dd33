"""Old names of version 0.1 go on working for one release, with a warning."""

import importlib

import pytest

from medseg_lite import attribution, files, models, recipes, transforms, volume
from medseg_lite.recipes import crossvalidation, named

OLD = [
    (volume, "read_case", files.read_case),
    (volume, "write_nifti", files.write_nifti),
    (volume, "Scan", files.Scan),
    (named, "prepared", crossvalidation.prepare_case),
    (named, "folds_of", recipes.split_folds),
    (named, "recipe_of", recipes.find_recipe),
    (named, "normalised", transforms.normalise),
    (recipes, "of_network", recipes.recipe_for),
    (recipes, "regions_of", recipes.regions_for),
    (models, "without", attribution.without),
]


@pytest.mark.parametrize("module, name, new", OLD, ids=[f"{m.__name__}.{n}" for m, n, _ in OLD])
def test_an_old_name_gives_the_new_thing_and_says_so(module, name, new):
    with pytest.warns(DeprecationWarning, match=rf"{name} is medseg_lite\..*{new.__name__} now"):
        assert getattr(module, name) is new


def test_other_names_are_missing_as_everywhere():
    for module in (volume, named, recipes, models):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nonsense'"):
            module.nonsense  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nonsense'"):
        exec("from medseg_lite.volume import nonsense")
    assert importlib.import_module("medseg_lite.volume") is volume


def test_a_recipe_may_still_be_read_as_a_dictionary():
    assert named.RECIPES["drozdzal-lits"]["label_map"] == {1: 0, 2: 1}
