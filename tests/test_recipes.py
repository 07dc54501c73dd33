import numpy as np
import pytest

from medseg_lite import models, recipes
from medseg_lite.volume import Case


@pytest.fixture
def cases():
    rng = np.random.default_rng(0)
    label = np.zeros((20, 20, 20), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    image = rng.standard_normal((1, *label.shape)).astype(np.float32) + 2 * label
    return [Case(image, ("a",), "one", label), Case(image[..., ::-1].copy(), ("a",), "two", label)]


def test_paper_settings_reach_the_optimiser(cases):
    model = recipes.deepmedic(cases, network="shallow", steps=4, halvings=(0.5,), width=0.1, progress=False)
    assert model.history["learning_rate"].tolist() == [1e-4, 1e-4, 5e-5, 5e-5]
    assert model.card["network"] == "shallow" and model.card["trained_on"] == ["one", "two"]
    assert not model.training


def test_seed_decides(cases):
    options = {"steps": 3, "width": 0.1, "progress": False}
    first, again, other = (recipes.deepmedic(cases, seed=s, **options).history["loss"] for s in (0, 0, 1))
    assert first.equals(again) and not first.equals(other)


def test_validation_is_in_the_history(cases):
    model = recipes.deepmedic(cases[:1], validation=cases[1:], validate_every=2, steps=4, width=0.1, progress=False)
    assert model.history["dice_lesion"].notna().tolist() == [False, True, False, True]


def test_flat_networks(cases):
    model = recipes.deepmedic(cases, network="dm2d_patch", batch_size=4, steps=2, width=0.1, progress=False)
    assert model.spatial_dims == 2 and len(model.history) == 2


def test_bad_input(cases):
    with pytest.raises(ValueError, match="no cases"):
        recipes.deepmedic([])
    with pytest.raises(ValueError, match="expected one of"):
        recipes.deepmedic(cases, network="load")
    with pytest.raises(ValueError, match="one has no label"):
        recipes.deepmedic([cases[0].replace(label=None)])


def test_fine_tuning_starts_from_the_checkpoint(cases, tmp_path):
    options = {"steps": 2, "width": 0.1, "progress": False}
    first = recipes.deepmedic(cases, **options)
    path = models.save(tmp_path / "first.safetensors", first, first.card)
    tuned = recipes.deepmedic(cases, start=path, seed=1, **options)
    fresh = recipes.deepmedic(cases, seed=1, **options)

    def change(model):
        return float((model.classifier.weight - first.classifier.weight).detach().abs().max())

    assert change(tuned) < 0.02 < change(fresh)
    assert tuned.card["started_from"] == "first.safetensors"
    with pytest.raises(ValueError, match="choose the same network"):
        recipes.deepmedic(cases, start=path, network="deep_plus", **options)


@pytest.mark.parametrize("classes, names", [(5, None), (2, ["lesion"]), (4, ["class_1", "class_2", "class_3"])])
def test_regions(classes, names):
    regions = recipes.regions_of(classes)
    assert regions == "brats2015" if names is None else list(regions) == names
