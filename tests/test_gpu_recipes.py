"""Every recipe, with all its stages, on a GPU: two updates at a tiny width."""

from __future__ import annotations

import fake_device
import numpy as np
import pytest
import torch
from test_first_losses import binary, made_cases, with_scores

from medseg_lite import inference, models, recipes, training
from medseg_lite.devices import find_device

SMALL = {"width": 0.1, "steps": 2, "seed": 3, "progress": False}
ALIKE = {"dropout": 0}  # a GPU draws other random numbers for dropout


def deepmedic(network, **options):
    return recipes.deepmedic(made_cases(), network=network, batch_size=3, shift=0.1, **ALIKE, **SMALL, **options)


def fine_tuned(folder, **options):
    torch.manual_seed(1)
    start = models.save(folder / "start.safetensors", models.deepmedic(in_channels=2, classes=5, width=0.1), {})
    return deepmedic("deepmedic", start=start, **options)


def havaei(network, **options):
    if "cascade" in network:
        torch.manual_seed(0)
        first = models.two_path_cnn(in_channels=2, classes=5, width=0.1)
        options["first"] = first.to(find_device(options["device"]))  # where a recipe leaves it
    how = {"init": "he", "phase2_steps": 2, "batch_size": 3} | ALIKE | SMALL
    return recipes.havaei(made_cases(), network=network, **how, **options)


def kayalibay(crop, **options):
    cases = made_cases(shape=(24, 28, 20))
    return recipes.kayalibay(cases, learning_rate=1e-3, crop=crop, **SMALL | {"steps": 3}, **options)


def drozdzal(network, **options):
    cases = binary(made_cases(shape=(40, 40, 14)))
    return recipes.drozdzal(cases, network=network, crop=32, batch_size=2, learning_rate=1e-5, **SMALL, **options)


def mlynarski(**options):
    size = {"batch_size": 2, "accumulate": 2, "learning_rate": 0.025}
    size["output"] = 4 if options.get("network") == "mlynarski_3d" else 32
    cases = with_scores(made_cases()) if "variant" in options else made_cases()
    return recipes.mlynarski(cases, **size, **SMALL, **options)


def pretrained(**options):
    incomplete = [case.replace(name=f"more {case.name}").select(["t1c"]) for case in made_cases()]
    return mlynarski(pretrain_steps=2, incomplete=incomplete, drop=0.5, **options)


RUNS = {
    "deepmedic": (deepmedic, {"network": "deepmedic"}),
    "deepmedic of slices": (deepmedic, {"network": "dm2d_seg"}),
    "deepmedic from a start": (fine_tuned, {}),
    "havaei": (havaei, {"network": "two_path_cnn"}),
    "havaei, input cascade": (havaei, {"network": "input_cascade_cnn"}),
    "kayalibay": (kayalibay, {"crop": None}),
    "kayalibay, crops": (kayalibay, {"crop": 16}),
    "drozdzal, pipeline": (drozdzal, {"network": "fcn_fc_resnet"}),
    "drozdzal, U-Net": (drozdzal, {"network": "unet2d"}),
    "mlynarski 2d": (mlynarski, {"network": "mlynarski_2d"}),
    "mlynarski 2d, pre-trained": (pretrained, {"network": "mlynarski_2d"}),
    "mlynarski 3d": (mlynarski, {"network": "mlynarski_3d"}),
    "mlynarski 3d, variant c": (mlynarski, {"network": "mlynarski_3d", "variant": "c"}),
}


def train(name: str, folder, **options):
    recipe, settings = RUNS[name]
    return recipe(**settings, **{"folder": folder} if recipe is fine_tuned else {}, **options)


@pytest.fixture
def places(monkeypatch):
    """What every training got and gave: the devices of its network and its batches, its engine, its losses."""
    found, fit = [], training.fit

    def recorded(model, sampler, **options):
        place = next(model.parameters()).device
        history = fit(model, sampler, **options)
        inputs, label = sampler.batch(0)
        batch = {t.device for t in (*(inputs if isinstance(inputs, tuple) else (inputs,)), label)}
        found.append({"network": place, "batch": batch, "engine": options["engine"], "losses": history["loss"].to_numpy()})
        return history

    monkeypatch.setattr(training, "fit", recorded)
    return found


def check_places(places: list[dict], model, device: torch.device) -> None:
    for stage in places:
        assert stage["network"] == device and stage["batch"] == {device} and np.isfinite(stage["losses"]).all()
    assert {t.device for t in model.state_dict().values()} == {device} and not model.training
    assert model.card["device"] == str(device) and model.history["loss"].notna().all()


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_on_a_t4_has_the_losses_of_the_cpu(name, places, tmp_path):
    train(name, tmp_path, device="cpu")
    expected = [stage["losses"] for stage in places]
    places.clear()
    with fake_device.cuda("T4") as gpu:
        model = train(name, tmp_path, device="auto")
        check_places(places, model, gpu.device)
        assert not gpu.flops["half"], "a T4 trains in float32"
    for stage, losses in zip(places, expected, strict=True):
        np.testing.assert_allclose(stage["losses"], losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_every_stage_on_an_a100_computes_in_bfloat16(name, places, tmp_path):
    with fake_device.cuda("A100") as gpu:
        check_places(places, train(name, tmp_path, device="auto"), gpu.device)
        assert gpu.flops["half"]


@pytest.mark.parametrize("name, trainings", [("havaei, input cascade", 2), ("mlynarski 2d, pre-trained", 3)])
def test_every_stage_computes_as_it_is_told(name, trainings, places, tmp_path):
    with fake_device.cuda("A100") as gpu:
        train(name, tmp_path, device="auto", engine={"precision": "float32"})
        assert len(places) == trainings and not gpu.flops["half"]


def test_a_run_goes_on_on_another_device(tmp_path):
    options = {"learning_rate": 1e-3, "crop": 16, "batch_size": 2, "width": 0.1, "progress": False, "seed": 3}
    cases = made_cases(shape=(24, 28, 20))
    whole = recipes.kayalibay(cases, steps=5, device="cpu", **options).history["loss"]
    recipes.kayalibay(cases, steps=2, device="cpu", folder=tmp_path, **options)
    with fake_device.cuda():
        recipes.kayalibay(cases, steps=4, device="cuda", folder=tmp_path, **options)
    again = recipes.kayalibay(cases, steps=5, device="cpu", folder=tmp_path, **options)
    assert again.history["step"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(again.history["loss"], whole, rtol=1e-4)


@pytest.mark.parametrize(
    "preset, told, expected", [("A100", "float32", False), ("A100", "auto", True), ("T4", "float32", False)]
)
def test_the_validation_has_the_precision_of_the_training(preset, told, expected, monkeypatch):
    cases, half, predict = made_cases(shape=(24, 28, 20)), [], inference.predict

    def watched(*args, **how):
        before = gpu.flops["half"]
        result = predict(*args, **how)
        half.append(gpu.flops["half"] > before)
        return result

    monkeypatch.setattr(inference, "predict", watched)
    options = {"crop": 16, "steps": 1, "width": 0.1, "progress": False, "engine": {"precision": told}}
    with fake_device.cuda(preset) as gpu:
        recipes.kayalibay(cases[:1], validation=cases[1:], **options)
    assert half == [expected]


@pytest.mark.parametrize("name", ["deepmedic", "havaei", "kayalibay", "drozdzal, U-Net", "mlynarski 2d", "mlynarski 3d"])
@pytest.mark.parametrize("role", ["training", "validation"])
def test_a_label_beyond_the_classes_is_refused_before_anything_reaches_the_gpu(name, role, tmp_path, monkeypatch):
    made = made_cases

    def spoilt(**options):
        cases = made(**options)
        label = cases[1].label.copy()
        label[3, 3, 3] = 7
        return [cases[0], cases[1].replace(label=label)]

    module = globals()
    if role == "training":
        monkeypatch.setitem(module, "made_cases", spoilt)
        monkeypatch.setitem(module, "binary", lambda cases: cases)
        options = {"classes": 5}
    else:
        options = {"validation": spoilt()[1:]}
    with fake_device.cuda() as gpu, pytest.raises(ValueError, match="case1 has label 7; with classes="):
        train(name, tmp_path, device="auto", **options)
    assert gpu.peak == 0 and not gpu.launches


def test_incomplete_cases_with_a_label_beyond_the_classes_reach_no_gpu(tmp_path):
    cases = made_cases()
    spoilt = cases[1].replace(label=np.where(cases[1].label == 4, 9, cases[1].label), name="p9").select(["t1c"])
    with fake_device.cuda() as gpu, pytest.raises(ValueError, match="p9 has label 9; with classes=5 labels are 0 to 4"):
        recipes.mlynarski(cases, incomplete=[spoilt], pretrain_steps=1, output=32, **SMALL)
    assert gpu.peak == 0 and not gpu.launches
