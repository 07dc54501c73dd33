"""The claims of notebook 10 that stored runs decide: each check fails for a method that does not do what the claim says."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from claim_cells import read_cells, run_cell, spoil_table

from medseg_lite import attribution, models, paths, phantoms

CELLS = read_cells("10")
THINNED = "return watershed(~inside, ndimage.label(inside)[0], connectivity=1, watershed_line=True)"


def run(cells: list[str], names: dict | None = None, edit=lambda text: text) -> dict:
    """Run cells after the imports, with some names given and with a change of their text."""
    names = dict(names or {})
    for cell in ["norm-02", *cells]:
        run_cell(CELLS if cell == "norm-02" else {cell: edit(CELLS[cell])}, cell, names)
    return names


@pytest.fixture
def stored(monkeypatch):
    """A function that runs a cell on the stored tables, one of which is changed."""

    def runs(cell: str, file: str = "", change=None) -> None:
        spoil_table(monkeypatch, file, change)
        plain = [f"up.0.{n}" for n in range(1, 9)]  # the cell wants blocks whose shortcut is the identity
        run([cell], {"plain": plain})

    return runs


def put(where, column: str, value):
    """Set a column where a function of the table says so."""
    return lambda table: table.__setitem__(column, np.where(where(table), value(table), table[column]))


def lift(system: str, by: float):
    return put(lambda t: t.system == system, "v_rand", lambda t: t.v_rand + by)


@pytest.mark.parametrize("cell", ["blocks", "real-table"])
def test_the_claims_hold(cell, stored):
    stored(cell)


MUTATIONS = [
    ("blocks", "em_blocks", put(lambda t: t.what == "removed", "dice", lambda t: t.whole)),  # `without` does nothing
    ("blocks", "em_blocks", put(lambda t: t.what == "exchanged", "dice", lambda t: t.whole)),
    ("blocks", "em_blocks", put(lambda t: t.system == "standardised", "dice", lambda t: t.whole - 0.5)),
]


@pytest.mark.parametrize(("cell", "file", "change"), MUTATIONS)
def test_a_method_that_does_not_work_breaks_them(cell, file, change, stored):
    with pytest.raises(AssertionError):
        stored(cell, file, change)


# ------------------------------------------------------------------------------------------------------- what is computed live


def test_v_rand_is_built_with_the_thinning():
    names = {"test": [phantoms.em(100, slices=1, size=128, counts=True)]}
    run(["vrand"], names)
    with pytest.raises(AssertionError):
        run(["vrand"], names, lambda text: text.replace(THINNED, "return ndimage.label(inside)[0]"))


@pytest.fixture(scope="module")
def pipelines():
    """What the cells about gain, offset and what is handed on need, with the notebook's test stacks."""
    test = phantoms.em_cohort(6, first_seed=100, slices=2, size=256, counts=True)

    def images(cases):
        return torch.from_numpy(np.concatenate([c.image.transpose(3, 0, 1, 2) for c in cases]))

    def normalised(model, cases):
        with torch.no_grad():
            return model.preprocessor(images(cases))

    def load(name):
        return models.load(paths.shipped("checkpoints", f"em_inputs_{name}.safetensors"))

    torch.manual_seed(0)
    fresh = models.fc_resnet(width=0.25).train()
    thousands = [c.replace(image=c.image / 1000) for c in test]
    names = {"test": test, "thousands": thousands, "images": images, "normalised": normalised, "fresh": fresh}
    names |= {"crops": {"raw counts": images(test)}, "em_pipeline": load("learned"), "in_thousands": load("learned_1000")}
    return names


def test_the_preprocessor_has_learned(pipelines):
    run(["norm-30"], pipelines)


def test_a_formula_in_its_place_takes_the_gain_away(pipelines):
    pipeline = models.load(paths.shipped("checkpoints", "em_inputs_learned.safetensors"))
    pipeline.preprocessor = torch.nn.InstanceNorm2d(1)
    with pytest.raises(AssertionError):
        run(["norm-30"], pipelines | {"em_pipeline": pipeline})


@pytest.mark.parametrize("seed", range(3))
def test_a_frozen_start_separates_membranes_no_better_than_raw_counts(pipelines, seed):
    """The check of the cell about figure 7, on its own terms."""
    names = pipelines | {"labels": np.concatenate([c.label.transpose(2, 0, 1) for c in pipelines["test"]])}
    exec(CELLS["norm-33a"].split("\n\n\n")[0], run([]) | names, names)
    torch.manual_seed(seed)
    frozen = models.fcn_fc_resnet(width=0.25).eval()
    best, raw = names["best_by_threshold"], names["images"](names["test"])
    assert best(names["normalised"](names["em_pipeline"], names["test"])) > best(raw) + 0.05
    assert best(names["normalised"](frozen, names["test"])) < best(raw) + 0.05


def test_gradients_grow_without_shortcuts_only():
    torch.manual_seed(0)
    train = phantoms.em_cohort(4, slices=2, size=64, counts=True)
    crops = torch.from_numpy(np.concatenate([c.image.transpose(3, 0, 1, 2) for c in train]))
    names = {"train": train, "crops": {"standardised": (crops - crops.mean()) / crops.std()}}
    run(["gradients"], names)
    with pytest.raises(AssertionError):  # the shortcuts stay
        run(["gradients"], names, lambda text: text.replace("output - inputs[0]", "output"))


def test_layers_change_places_and_go_back():
    torch.manual_seed(0)
    model, x = models.fc_resnet(width=0.1).eval(), torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        before = model(x)
        with attribution.exchanged(model, [("up.0.2", "up.0.5"), ("up.0.5", "up.0.6")]):
            during = model(x)
        assert not torch.allclose(before, during) and torch.equal(before, model(x))
    with pytest.raises(ValueError, match=r"no layer 'up\.9'"), attribution.exchanged(model, [("up.9", "up.0.2")]):
        pass
    with pytest.raises(ValueError, match="different shapes"), attribution.exchanged(model, [("up.0.2", "up.1.2")]):
        pass


def test_shipped_networks_of_the_real_stack_say_what_they_are():
    file = paths.shipped("checkpoints", "em_real_unet.safetensors")
    card = models.load(file).card
    assert file.stat().st_size < 5e6 and card["input"] == "standardised" and 0.1 < card["share_of_membrane"] < 0.7
    assert card["command"] == "python experiments/em.py"


def test_stored_tables_of_the_real_stack_are_whole():
    real = pd.read_csv(paths.shipped("results", "em_real.csv"), dtype={"seed": str}).fillna({"seed": "none"})
    runs = real.groupby(["system", "seed", "turns", "reading"])["slice"].apply(list)
    assert all(slices == [16, 17, 18, 19] for slices in runs)
    systems = {"u-net", "standardised", "learned"}
    assert systems | {"threshold", "blur + threshold"} == set(real.system)
    assert real[real.system.isin(systems)].groupby("system").seed.nunique().eq(4).all()  # three, and their mean
    assert real[["v_rand", "v_info"]].stack().between(0, 1).all() and real[real.steps.notna()].width.eq(0.25).all()
    curves = pd.read_csv(paths.shipped("results", "em_real_curves.csv"))
    assert (curves.groupby(["system", "seed"]).step.max() == real.steps.max()).all()
