import inspect
from functools import partial
from importlib import import_module

import numpy as np
import pytest
import torch

from medseg_lite import context, datasets, inference, losses, models, recipes, sampling, training
from medseg_lite.recipes import recipe
from medseg_lite.sampling import SegmentSampler
from medseg_lite.volume import Case

mlynarski_module = import_module("medseg_lite.recipes.mlynarski")  # the name `recipes.mlynarski` is the function


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


# ------------------------------------------------------------------------------------------------------ two phases

SHORT = {"steps": 3, "phase2_steps": 3, "width": 0.1, "output": 3, "batch_size": 4, "progress": False}


def same(a: torch.nn.Module, b: torch.nn.Module) -> dict[str, bool]:
    return {name: torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items()}


def test_phase_two_changes_the_output_layer_alone(cases, tmp_path):
    first = recipes.havaei(cases, folder=tmp_path, **SHORT | {"phase2_steps": 0})
    both = recipes.havaei(cases, folder=tmp_path, **SHORT)
    equal = same(first, both)
    assert {n for n, unchanged in equal.items() if not unchanged} == {"output.weight", "output.bias"}
    assert all(p.requires_grad for p in both.parameters()) and not both.training
    assert both.history["phase"].tolist() == [1, 1, 1, 2, 2, 2]
    assert both.history["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert both.card["phase2_steps"] == 3


def test_phases_draw_differently(cases, monkeypatch):
    made = []

    class Recorded(SegmentSampler):
        def __init__(self, *arguments, **options):
            made.append(options)
            super().__init__(*arguments, **options)

    monkeypatch.setattr(recipe, "SegmentSampler", Recorded)
    recipes.havaei(cases, **SHORT)
    assert [m["scheme"] for m in made] == ["equal", "uniform"] and made[0]["seed"] != made[1]["seed"]
    assert all(m["spatial_dims"] == 2 and m["margin"] == 16 and m["output"] == 3 for m in made)


def test_two_phases_resume_exactly(cases, tmp_path, monkeypatch):
    whole = recipes.havaei(cases, **SHORT)
    batch = SegmentSampler.batch
    for phase, name in ((1, "equal"), (2, "uniform")):

        def broken(self, step, name=name):
            if step == 2 and self.scheme == name:
                raise RuntimeError("power cut")
            return batch(self, step)

        monkeypatch.setattr(SegmentSampler, "batch", broken)
        with pytest.raises(RuntimeError, match="power cut"):
            recipes.havaei(cases, folder=tmp_path, validate_every=1, **SHORT)
        monkeypatch.setattr(SegmentSampler, "batch", batch)
        assert (tmp_path / f"phase{phase}" / "last.pt").exists()
    again = recipes.havaei(cases, folder=tmp_path, validate_every=1, **SHORT)
    assert all(same(whole, again).values())
    assert again.history["loss"].equals(whole.history["loss"])


def test_papers_schedule(cases):
    options = SHORT | {"steps": 6, "phase2_steps": 3}
    assert recipes.havaei(cases, **options).history["learning_rate"].tolist() == pytest.approx(
        [5e-3, 5e-3, 5e-4, 5e-4, 5e-5, 5e-5, 5e-3, 5e-4, 5e-5]
    )
    rates = recipes.havaei(cases, init="he", epochs=1, **options).history["learning_rate"]
    assert rates.tolist() == pytest.approx([1e-3] * 9)


def test_max_norm_reaches_the_optimiser(cases):
    model = recipes.havaei(cases, max_norm=0.01, **SHORT)
    norms = [p.detach().flatten(1).norm(dim=1) for p in model.parameters() if p.ndim > 1]
    assert all((n <= 0.01 + 1e-6).all() for n in norms)
    assert all((n > 0.0099).all() for n in norms)


@pytest.mark.parametrize("network", ["input_cascade_cnn", "local_cascade_cnn", "mf_cascade_cnn"])
def test_cascades(cases, tmp_path, network):
    first = recipes.havaei(cases, **SHORT)
    path = models.save(tmp_path / "first.safetensors", first, first.card)
    cascade = recipes.havaei(cases, network=network, first=first, **SHORT)
    assert all(same(first, cascade.first).values())
    assert all(same(cascade, recipes.havaei(cases, network=network, first=path, **SHORT)).values())
    phase1 = recipes.havaei(cases, network=network, first=path, **SHORT | {"phase2_steps": 0})
    assert {n for n, unchanged in same(cascade, phase1).items() if not unchanged} == {
        "second.output.weight",
        "second.output.bias",
    }


def test_validation_in_both_phases(cases):
    model = recipes.havaei(cases[:1], network="local_path_cnn", validation=cases[1:], **SHORT)
    assert model.history["dice_lesion"].notna().tolist() == [False, False, True] * 2


def test_havaei_bad_input(cases):
    first = models.two_path_cnn(in_channels=1, classes=2, width=0.2)
    checks = [
        ({"network": "deepmedic"}, "network='deepmedic'; expected one of global_path_cnn"),
        ({"network": "mf_cascade_cnn"}, "mf_cascade_cnn needs a trained two_path_cnn: give it as first="),
        ({"first": first}, "two_path_cnn has no first network: leave first out"),
        ({"network": "mf_cascade_cnn", "first": first}, "'width': 0.2.* this cascade needs .*'width': 0.1"),
        ({"phase2_steps": -1}, "phase2_steps=-1; expected 0 or more"),
    ]
    for options, message in checks:
        with pytest.raises(ValueError, match=message):
            recipes.havaei(cases, **SHORT | options)
    with pytest.raises(ValueError, match="no cases"):
        recipes.havaei([])
    with pytest.raises(ValueError, match=r"network='two_path_cnn'; expected one of big_deep_plus"):
        recipes.deepmedic(cases, network="two_path_cnn")


@pytest.mark.parametrize("classes, names", [(5, None), (2, ["lesion"]), (4, ["class_1", "class_2", "class_3"])])
def test_regions(classes, names):
    regions = recipes.regions_for(classes)
    assert regions == "brats2015" if names is None else list(regions) == names


# ------------------------------------------------------------------------------------------------- the other papers


def test_kayalibay(cases, tmp_path):
    options = {"width": 0.1, "crop": 16, "learning_rate": 1e-2, "progress": False}
    model = recipes.kayalibay(cases, steps=4, halvings=(0.5,), merge="sum", validation=cases[1:], validate_every=2, **options)
    assert model.history["learning_rate"].tolist() == [1e-2, 1e-2, 5e-3, 5e-3]
    assert model.history["dice_lesion"].notna().tolist() == [False, True, False, True]
    assert model.config["merge"] == "sum" and model.card["loss"] == "jaccard" and not model.training
    assert 0 < model.history["loss"][0] < 2  # a distance for each of two classes
    whole = recipes.kayalibay(cases, steps=2, folder=tmp_path, **options)
    recipes.kayalibay(cases, steps=1, folder=tmp_path / "short", **options)
    resumed = recipes.kayalibay(cases, steps=2, folder=tmp_path / "short", **options)
    assert all(same(whole, resumed).values())
    with pytest.raises(ValueError, match="loss='dice'; expected one of jaccard, cross_entropy"):
        recipes.kayalibay(cases, loss="dice")


@pytest.mark.parametrize("network", ["fcn_fc_resnet", "fc_resnet", "unet2d", "fcn8"])
def test_drozdzal(network):
    rng = np.random.default_rng(0)
    label = np.zeros((48, 64, 3), np.uint8)
    label[10:30, 20:50] = 1
    slices = [Case((1000.0 * label + rng.normal(500, 9, label.shape)).astype(np.float32)[None], ("em",), "s", label)]
    options = {"network": network, "width": 0.1, "crop": 32, "batch_size": 2, "progress": False}
    model = recipes.drozdzal(slices, steps=3, **options)
    assert model.history["learning_rate"].tolist() == pytest.approx([1e-3, 1e-3 / 1.001, 1e-3 / 1.002])
    assert model.history["loss"].between(-1, 0).all() and model.card["network"] == network
    again = recipes.drozdzal(slices, steps=3, **options)
    assert all(same(model, again).values())
    with pytest.raises(ValueError, match=r"crop=40; .* needs a multiple of"):
        recipes.drozdzal(slices, **options | {"crop": 40})


def test_drozdzal_wants_a_network_that_segments(cases):
    with pytest.raises(ValueError, match="network='fcn_preprocessor'; expected one of"):
        recipes.drozdzal(cases, network="fcn_preprocessor")


def test_mlynarski_in_two_steps(tmp_path):
    """2D networks in three planes, their scores on disk, and a 3D network that is given them."""
    rng = np.random.default_rng(0)
    label = np.zeros((24, 20, 28), np.uint8)
    label[5:15, 5:15, 5:15] = 1
    label[8:12, 8:12, 8:12] = 2
    cases = [
        Case(rng.standard_normal((2, *label.shape)).astype(np.float32) + label, ("flair", "t1c"), name, label)
        for name in ("one", "two")
    ]
    short = {"steps": 2, "width": 0.1, "accumulate": 2, "progress": False}
    flat = {
        plane: recipes.mlynarski([context.facing(c, plane) for c in cases], output=16, batch_size=2, flip=False, **short)
        for plane in context.PLANES
    }
    assert flat["axial"].history["loss"][0] == pytest.approx(np.log(3), rel=0.5)
    context.extract_scores(flat, cases, tmp_path, progress=False)
    seeing = [context.with_scores(c, tmp_path) for c in cases]
    model = recipes.mlynarski(seeing, network="mlynarski_3d", output=4, **short)
    assert model.config["variant"] == "a" and model.in_channels == 2 + 9 and model.classes == 3
    assert inference.predict(model, seeing[0], progress=False).shape == label.shape
    again = models.load(models.save(tmp_path / "net.safetensors", model, model.card))
    assert all(same(model, again).values())
    alone = recipes.mlynarski(cases, network="mlynarski_3d", output=4, **short)
    assert alone.config["variant"] == "standard" and alone.in_channels == 2
    with pytest.raises(ValueError, match="expected 3 numbers, none negative, that sum to 1"):
        recipes.mlynarski(cases, network="mlynarski_3d", output=4, target_weights=(0.5, 0.5), **short)


# ------------------------------------------------------------------------------------------------------ missing sequences


@pytest.fixture
def gappy():
    """One complete case, and two that lack a sequence each, in another order."""
    rng = np.random.default_rng(0)
    label = np.zeros((20, 20, 8), np.uint8)
    label[5:15, 5:15, 2:6] = 1
    cases = [
        Case(rng.standard_normal((3, *label.shape)).astype(np.float32) + label, ("flair", "t1", "t1c"), name, label)
        for name in ("whole", "no t1", "no flair")
    ]
    return [cases[0], cases[1].select(["t1c", "flair"]), cases[2].select(["t1", "t1c"])]


QUICK = {"output": 16, "batch_size": 2, "accumulate": 2, "progress": False}


def test_pretraining_changes_one_subnetwork_and_sees_the_cases_that_have_its_sequence(gappy, monkeypatch):
    model = models.mlynarski_2d(in_channels=3, classes=2, width=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    sampler = recipe.SegmentSampler
    monkeypatch.setattr(recipe, "SegmentSampler", lambda cases, **o: seen.extend(cases) or sampler(cases, **o))
    history = recipes.pretrain_subnetwork(
        model, "t1", gappy, channels=("flair", "t1", "t1c"), steps=3, scheme="foreground", **QUICK
    )
    assert [c.name for c in seen] == ["whole", "no flair"] and {c.channels for c in seen} == {("t1",)}
    np.testing.assert_array_equal(seen[1].image[0], gappy[2].image[0])
    changed = {k.split(".")[1] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    parts = {k.split(".")[0] for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {"1"} and parts == {"subnetworks", "auxiliary"} and len(history) == 3


def test_incomplete_cases_reach_the_network_through_its_subnetworks(gappy, tmp_path):
    options = {"steps": 2, "width": 0.1, **QUICK}
    plain = recipes.mlynarski(gappy[:1], **options)
    helped = recipes.mlynarski(gappy[:1], incomplete=gappy[1:], pretrain_steps=2, folder=tmp_path, **options)
    assert helped.card["pretrained_on"] == ["no t1", "no flair"] and helped.card["trained_on"] == ["whole"]
    assert not plain.history["loss"].equals(helped.history["loss"]) and len(helped.history) == 2
    assert {p.name for p in tmp_path.iterdir()} == {
        "last.pt",
        "history.csv",
        "subnetwork_flair",
        "subnetwork_t1",
        "subnetwork_t1c",
    }
    again = recipes.mlynarski(gappy[:1], incomplete=gappy[1:], pretrain_steps=2, folder=tmp_path, **options)
    assert all(same(helped, again).values())


def test_training_with_dropped_sequences(gappy):
    options = {"steps": 2, "width": 0.1, **QUICK}
    dropped = recipes.mlynarski(gappy[:1], drop=1.0, **options).history["loss"]
    assert not dropped.equals(recipes.mlynarski(gappy[:1], **options).history["loss"])


def test_missing_sequences_are_named(gappy):
    model = models.mlynarski_2d(in_channels=3, classes=2, width=0.1)
    channels = ("flair", "t1", "t1c")
    with pytest.raises(ValueError, match="channel='t2'; the network's sequences are flair, t1, t1c"):
        recipes.pretrain_subnetwork(model, "t2", gappy, channels=channels, steps=1)
    with pytest.raises(ValueError, match="the network takes 3 sequences"):
        recipes.pretrain_subnetwork(model, "t1", gappy, channels=("flair", "t1"), steps=1)
    with pytest.raises(ValueError, match="none of the 1 cases has t1"):
        recipes.pretrain_subnetwork(model, "t1", gappy[1:2], channels=channels, steps=1)
    with pytest.raises(ValueError, match="no flair has t1c, which the network does not take"):
        recipes.pretrain_subnetwork(model, "t1", gappy[2:], channels=("flair", "t1", "t2"), steps=1)
    with pytest.raises(ValueError, match=r"whole has channels .* but no t1 has|no t1 has channels"):
        recipes.mlynarski(gappy, steps=1, width=0.1, **QUICK)
    with pytest.raises(ValueError, match="give pretrain_steps="):
        recipes.mlynarski(gappy[:1], incomplete=gappy[1:], steps=1)
    with pytest.raises(ValueError, match="are for mlynarski_2d"):
        recipes.mlynarski(gappy[:1], network="mlynarski_3d", drop=0.5, steps=1)


# ------------------------------------------------------------------------------------------- labels beyond the classes

TRAININGS = {
    "deepmedic": {"network": "deep_plus"},
    "havaei": {"phase2_steps": 0, "batch_size": 2},
    "kayalibay": {"crop": 16},
    "drozdzal": {"network": "unet2d", "crop": 16, "batch_size": 2},
    "mlynarski": {"output": 16, "batch_size": 1, "accumulate": 1},
}


def with_highest(case, label: int, name: str = "p7"):
    changed = case.label.copy()
    changed[10, 10, 10] = label
    return case.replace(label=changed, name=name)


@pytest.fixture
def cases_of_two(noise_case):
    return [noise_case((24, 24, 24), seed=n, name=f"c{n}") for n in range(2)]


@pytest.mark.parametrize("recipe", TRAININGS)
@pytest.mark.parametrize("role", ["training", "validation", "stored"])
@pytest.mark.parametrize("label, classes", [(4, 4), (2, 2), (255, 2), (255, None)])
def test_a_label_beyond_the_classes(recipe, role, label, classes, cases_of_two, tmp_path):
    case = with_highest(cases_of_two[0], label)
    cases, validation = ([cases_of_two[1]], [case]) if role == "validation" else ([cases_of_two[1], case], [])
    if role == "stored":
        cases = datasets.store(cases, tmp_path, normalise=None, progress=False)
    if role == "validation" and classes is None:
        classes = 2
    expected = "p7 has label " + (
        f"{label}: if 255" if classes is None else rf"{label}; with classes={classes} labels are 0 to"
    )
    remedy = "if 255 marks voxels to ignore" if label == 255 else f"set classes={label + 1}, or renumber"
    with pytest.raises(ValueError, match=f"{expected}.*{remedy}|{expected}"):
        train = vars(recipes)[recipe]
        train(cases, validation=validation, classes=classes, steps=1, width=0.1, progress=False, **TRAININGS[recipe])


@pytest.mark.parametrize("label, classes", [(2, 1), (5, 5)])
def test_a_label_beyond_a_built_network(label, classes, cases_of_two):
    network = models.unet2d(in_channels=2, classes=classes, width=0.1)
    with pytest.raises(ValueError, match=f"p7 has label {label}; with classes={classes} labels are 0 to {max(classes, 2) - 1}"):
        recipes.drozdzal([with_highest(cases_of_two[0], label)], network=network, crop=16, steps=1, progress=False)
    model = recipes.drozdzal(cases_of_two, network=network, crop=16, batch_size=1, steps=1, progress=False)
    assert model.classes == classes  # labels 0 and 1 fit both


def test_validation_cases_are_looked_at_before_the_training(cases_of_two):
    a, b = cases_of_two
    for other, message in [
        (b.replace(label=None), "c1 has no label; training needs one"),
        (b.select(["t1c", "flair"]), r"c1, for the validation, has channels \('t1c', 'flair'\) but c0 has \('flair', 't1c'\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            recipes.deepmedic([a], validation=[other], steps=1, width=0.1, progress=False)


def test_two_validation_cases_of_one_name_are_both_part_of_the_run(cases_of_two, tmp_path):
    a, b = cases_of_two
    options = {"steps": 1, "width": 0.1, "progress": False, "folder": tmp_path, "batch_size": 2}
    recipes.deepmedic([a], validation=[a.replace(name="v"), b.replace(name="v")], **options)
    with pytest.raises(ValueError, match=r"last\.pt is of another run: validation\.v was"):
        recipes.deepmedic([a], validation=[b.replace(name="v"), b.replace(name="v")], **options)


def test_a_loop_of_its_own_is_told_of_labels_too(cases_of_two):
    sampler = sampling.SegmentSampler([with_highest(cases_of_two[0], 3)], output=9, batch_size=1, margin=8)
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=3, width=0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    how = {"steps": 1, "optimizer": optimizer, "progress": False}
    for loss in (losses.cross_entropy, partial(losses.cross_entropy, class_weights=[1, 1, 1]), losses.dice_loss):
        with pytest.raises(ValueError, match="p7 has label 3; with classes=3 labels are 0 to 2: set classes=4"):
            training.fit(model, sampler, loss=loss, **how)
    sampler = sampling.SegmentSampler(
        [with_highest(cases_of_two[0], 3)], output=9, batch_size=1, margin=model.margin, cut=model.cut
    )
    training.fit(model, sampler, loss=lambda logits, label: losses.cross_entropy(logits, label.clamp(max=2)), **how)


def test_incomplete_cases_are_looked_at_before_the_first_update(gappy, monkeypatch):
    monkeypatch.setattr(training, "fit", lambda *args, **options: pytest.fail("the training began"))
    options = {"classes": 2, "pretrain_steps": 1, "steps": 1, "width": 0.1, **QUICK}
    *before, last = gappy
    with pytest.raises(ValueError, match="no flair has label 4; with classes=2 labels are 0 to 1: set classes=5"):
        recipes.mlynarski(before[:1], incomplete=[before[1], last.replace(label=4 * last.label)], **options)
    with pytest.raises(ValueError, match="no flair has no label; training needs one"):
        recipes.mlynarski(before[:1], incomplete=[before[1], last.replace(label=None)], **options)


# ---------------------------------------------------------------------------------------- what reaches every stage


def stages(cases, gappy, folder) -> dict:
    """Calls of all recipes, by what they are of, with the number of trainings in each."""
    first = models.two_path_cnn(in_channels=1, classes=2, width=0.1)
    start = models.deepmedic(in_channels=1, classes=2, width=0.1)
    path = models.save(folder / "start.safetensors", start, {})
    havaei = {"phase2_steps": 2, "batch_size": 2}
    slices = {"network": "unet2d", "crop": 16, "batch_size": 2}
    squares = {"output": 16, "batch_size": 2, "accumulate": 2}
    helped = squares | {"pretrain_steps": 2, "incomplete": gappy[1:], "drop": 0.5}
    return {
        "deepmedic": (1, recipes.deepmedic, cases, {"batch_size": 2}),
        "deepmedic from a start": (1, recipes.deepmedic, cases, {"batch_size": 2, "start": path}),
        "havaei": (2, recipes.havaei, cases, havaei),
        "havaei cascade": (2, recipes.havaei, cases, {"network": "input_cascade_cnn", "first": first} | havaei),
        "kayalibay": (1, recipes.kayalibay, cases, {"crop": 16}),
        "drozdzal": (1, recipes.drozdzal, cases, slices),
        "mlynarski 2d": (1, recipes.mlynarski, cases, squares),
        "mlynarski 2d, pre-trained": (4, recipes.mlynarski, gappy[:1], helped),
        "mlynarski 3d": (1, recipes.mlynarski, cases, {"network": "mlynarski_3d", "output": 4, "accumulate": 2}),
    }


NAMES = (
    *("deepmedic", "deepmedic from a start", "havaei", "havaei cascade", "kayalibay", "drozdzal"),
    *("mlynarski 2d", "mlynarski 2d, pre-trained", "mlynarski 3d"),
)


@pytest.mark.parametrize("name", NAMES)
def test_the_engines_options_reach_every_stage(name, cases, gappy, tmp_path, monkeypatch):
    seen, fit, rows = [], training.fit, []

    def recorded(model, sampler, **options):
        seen.append((options["engine"], sampler.device, next(model.parameters()).device, options.get("on_update")))
        return fit(model, sampler, **options)

    monkeypatch.setattr(training, "fit", recorded)
    count, recipe, cohort, options = stages(cases, gappy, tmp_path)[name]
    engine = {"precision": "float32", "channels_last": True, "workers": 2}
    recipe(cohort, steps=1, width=0.1, progress=False, engine=engine | {"on_update": rows.append}, **options)
    assert [given for given, *_ in seen] == [engine] * count
    assert all(place == device for _, place, device, _ in seen)
    own = [on_update for *_, on_update in seen if on_update]  # that of the network itself, not of a subnetwork before it
    assert len(own) == (2 if "havaei" in name else 1) and seen[-1][-1] and len(rows) >= 1


def test_pretraining_by_itself_takes_options_of_both_kinds(gappy):
    model, rows = models.mlynarski_2d(in_channels=3, classes=2, width=0.1), []
    how = {"channels": ("flair", "t1", "t1c"), "steps": 3} | QUICK
    recipes.pretrain_subnetwork(model, "t1", gappy, engine={"workers": 2, "on_update": rows.append}, **how)
    assert [row["step"] for row in rows] == [1, 2, 3]
    with pytest.raises(ValueError, match="precision='float8'; expected auto, float32"):
        recipes.pretrain_subnetwork(model, "t1", gappy, engine={"precision": "float8"}, **how)


def test_recipes_find_the_device_themselves(cases):
    for train in (recipes.deepmedic, recipes.havaei, recipes.kayalibay, recipes.drozdzal, recipes.mlynarski):
        assert inspect.signature(train).parameters["device"].default == "auto"
    with pytest.raises(ValueError, match="device 'abacus': PyTorch knows no such device"):
        recipes.kayalibay(cases, device="abacus", crop=16, steps=1, width=0.1)
    model = recipes.kayalibay(cases, crop=16, steps=1, width=0.1, progress=False)
    assert model.card["device"].startswith("cuda" if torch.cuda.is_available() else "cpu")


def test_sequences_are_dropped_beside_an_augmentation(gappy):
    def bright(image, label, *, rng):
        return image.abs() + 1, label

    seen = []

    def watch(image, label, *, rng):
        seen.append(image)
        return image, label

    both = mlynarski_module._with_dropping(bright, 1.0)
    image, label = torch.randn(5, 3, 4, 4), torch.zeros(5, 4, 4, dtype=torch.long)
    dropped, _ = both(image, label, rng=np.random.default_rng(0))
    assert ((dropped == 0).flatten(2).all(2).sum(1) == 1).all() and int((dropped >= 1).flatten(2).all(2).sum()) == 10
    assert mlynarski_module._with_dropping(bright, 0) is bright and mlynarski_module._with_dropping(None, 0) is None
    recipes.mlynarski(gappy[:1], steps=1, width=0.1, drop=0.5, augment=watch, **QUICK)
    assert len(seen) == 2  # the batches of the update


@pytest.mark.parametrize("precision", ["auto", "bfloat16"])
def test_a_cpu_validates_in_float32(precision, cases, monkeypatch):
    told, predict = [], inference.predict
    monkeypatch.setattr(inference, "predict", lambda *args, **how: told.append(how["precision"]) or predict(*args, **how))
    options = {"crop": 16, "steps": 1, "width": 0.1, "progress": False, "engine": {"precision": precision}}
    recipes.kayalibay(cases[:1], validation=cases[1:], **options)
    assert told == ["auto"]
