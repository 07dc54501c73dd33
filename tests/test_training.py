from __future__ import annotations

import copy
import itertools
import math
import os
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import ndimage

from medseg_lite import losses, models, paths, training
from medseg_lite.engine import distributed
from medseg_lite.engine.run import Interruptible
from medseg_lite.optimizers import HalveAt, HalveOnPlateau, HalveOnSlowLoss, RMSpropNesterov
from medseg_lite.sampling import SegmentSampler
from medseg_lite.training import fit, validate_on
from medseg_lite.volume import Case


@pytest.fixture
def setup(noise_case):
    """`setup()`: network, sampler and optimizer of a tiny 2-D run with dropout, the same each time; keywords for `fit`."""

    def build(*, seed: int = 0, schedule=None, lr: float = 1e-2, **options):
        torch.manual_seed(seed)
        model = models.dm2d_seg(in_channels=1, classes=2, width=0.1, **options)
        case = noise_case((18, 18, 4), channels=("flair",))
        sampler = SegmentSampler([case], output=3, margin=model.margin, cut=model.cut, spatial_dims=2, batch_size=4, seed=1)
        optimizer = RMSpropNesterov(model.parameters(), lr=lr)
        keywords = {"optimizer": optimizer, "progress": False, "validate_every": 4}
        if schedule is not None:
            keywords["schedule"] = schedule(optimizer)
        return model, sampler, keywords

    return build


def assert_same_network(a: torch.nn.Module, b: torch.nn.Module) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_same_history(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a.drop(columns="seconds"), b.drop(columns="seconds"), check_exact=True)


class At:
    """A loss function that does something at one of its calls."""

    def __init__(self, call: int, action):
        self.call, self.action, self.count = call, action, 0

    def __call__(self, logits, label):
        self.count += 1
        value = losses.cross_entropy(logits, label)
        if self.count == self.call:
            value = self.action(value)
        return value


At.__qualname__ = losses.cross_entropy.__qualname__  # for a run it is the same loss


def press_ctrl_c(value=None):
    os.kill(os.getpid(), signal.SIGINT)
    return value


def crash(value=None):
    raise RuntimeError("power cut")


# ------------------------------------------------------------------------------------------------------------ learning


def test_history(setup, tmp_path):
    model, sampler, keywords = setup()
    history = fit(model, sampler, steps=6, folder=tmp_path, **keywords)
    assert list(history.columns) == ["step", "loss", "learning_rate", "seconds"]
    assert history["step"].tolist() == [1, 2, 3, 4, 5, 6] and (history["learning_rate"] == 1e-2).all()
    assert history["seconds"].is_monotonic_increasing and np.isfinite(history["loss"]).all()
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "history.csv"), history)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "last.pt"]
    assert not model.training


def test_one_update_by_hand(setup):
    model, sampler, keywords = setup(dropout=0.0)
    twin, _, other = setup(dropout=0.0)
    history = fit(model, sampler, steps=1, l1=1e-3, l2=1e-2, **keywords)
    inputs, label = sampler.batch(0)
    twin.train()
    value = losses.cross_entropy(twin(inputs), label)
    kernels = [p for p in twin.parameters() if p.ndim == 4]
    (value + 1e-3 * sum(k.abs().sum() for k in kernels) + 1e-2 * sum(k.square().sum() for k in kernels)).backward()
    other["optimizer"].step()
    assert history["loss"][0] == pytest.approx(value.item(), rel=1e-6)  # reported without the penalties
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)


def learn(case: Case, steps: int, **options) -> np.ndarray:
    """Losses of a small 2-D network trained on one case."""
    torch.manual_seed(0)
    model = models.dm2d_seg(in_channels=1, classes=2, hidden=[8], dropout=0.0, **options)
    sampler = SegmentSampler(
        [case], output=9, margin=model.margin, cut=model.cut, spatial_dims=2, batch_size=8, flip=False, seed=1
    )
    optimizer = RMSpropNesterov(model.parameters(), lr=1e-2)
    return fit(model, sampler, steps=steps, optimizer=optimizer, progress=False)["loss"].to_numpy()


@pytest.mark.parametrize("low_resolution", [True, False])
def test_overfits_voxels_of_noise(noise_case, low_resolution):
    """Every label is the sign of its own voxel among independent ones: only a network whose input, output and label agree to
    the voxel gets below log 2 = .69."""
    case = noise_case((30, 30, 4), channels=("flair",))
    loss = learn(case, 40, widths=[8, 8], low_resolution=low_resolution)
    assert loss[:3].mean() > 0.6 and loss[-10:].mean() < 0.2


def test_only_the_second_pathway_sees_far():
    """The label of a voxel is the sign of a smooth field 9 voxels away: outside the 9³ of one pathway, inside 27³ of both."""
    rng = np.random.default_rng(0)
    field = ndimage.gaussian_filter(rng.normal(size=(60, 60, 6)), (2.5, 2.5, 0))
    label = (np.roll(field, 9, axis=0) > 0).astype(np.uint8)
    case = Case(image=(field / field.std())[None].astype(np.float32), channels=("flair",), label=label)
    both, one = (learn(case, 50, widths=[8] * 4, low_resolution=low)[-10:].mean() for low in (True, False))
    assert both < 0.5 < 0.58 < one


def test_validation_scores_are_in_the_history(setup):
    seen = []
    calls = iter([{"dice_whole": 0.25, "dice_core": torch.tensor(0.5)}, {"dice_whole": np.float32(0.75), "dice_core": 1}])

    def validate(network):
        assert network is model and not network.training and not torch.is_grad_enabled()
        return next(calls)

    model, sampler, keywords = setup()
    history = fit(model, sampler, steps=8, validate=validate, on_update=lambda row: seen.append(row), **keywords)
    scores = {row["step"]: (row["dice_whole"], row["dice_core"]) for row in seen if "dice_whole" in row}
    assert scores == {4: (0.25, 0.5), 8: (0.75, 1.0)} and len(seen) == 8
    assert history["dice_whole"].dropna().to_dict() == {3: 0.25, 7: 0.75}
    assert history["dice_core"].dropna().to_dict() == {3: 0.5, 7: 1.0}


def test_validate_on_cases(setup, noise_case):
    case = noise_case((9, 9, 3), channels=("flair",))
    brain = case.replace(label=np.where(case.image[0] > 0.5, 4, 0).astype(np.uint8))
    healthy = case.replace(label=np.zeros(case.shape, np.uint8), name="healthy")
    model, _, _ = setup()
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.0, 1.0]))  # predicts class 1 everywhere
    share = float((brain.label > 0).mean())
    scores = validate_on([brain])(model)
    assert scores.keys() == {"dice_whole", "dice_core", "dice_enhancing"}
    assert scores["dice_whole"] == pytest.approx(2 * share / (1 + share)) and scores["dice_enhancing"] == 0
    assert validate_on([brain, healthy])(model)["dice_whole"] == pytest.approx(share / (1 + share))
    masked = brain.replace(mask=brain.label > 0)
    assert validate_on([masked])(model)["dice_whole"] == 1
    assert validate_on([masked], inside_mask=False)(model)["dice_whole"] == pytest.approx(2 * share / (1 + share))


def test_validation_and_callbacks_do_not_disturb_training(setup):
    def meddle(*_):
        torch.rand(3)
        for module in model.modules():
            module.eval()
        return {"dice": 0.0}

    quiet, sampler, keywords = setup()
    fit(quiet, sampler, steps=8, **keywords)
    model, sampler, keywords = setup()
    fit(model, sampler, steps=8, validate=meddle, on_update=meddle, **keywords)
    assert_same_network(quiet, model)


def test_global_random_states_are_left_alone(setup):
    model, sampler, keywords = setup()
    state, other = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    fit(model, sampler, steps=2, **keywords)
    assert torch.equal(state, torch.get_rng_state()) and np.array_equal(other, np.random.get_state()[1])  # noqa: NPY002


def test_dropout_follows_the_seed(setup):
    def losses_of(seed):
        model, sampler, keywords = setup()
        return fit(model, sampler, steps=3, seed=seed, **keywords)["loss"].tolist()

    assert losses_of(0) == losses_of(0) != losses_of(1)


# ----------------------------------------------------------------------------------------------------------- schedules


def test_halve_on_plateau_follows_the_first_score(setup):
    scores = iter([0.5, 0.6, 0.6, 0.6])
    model, sampler, keywords = setup(schedule=lambda o: HalveOnPlateau(o, patience=0))
    keywords["validate_every"] = 2
    history = fit(model, sampler, steps=8, validate=lambda m: {"dice": next(scores), "other": 1.0}, **keywords)
    # The row of an update shows the rate it was made with; a plateau is noticed after it.
    assert history["learning_rate"].tolist() == [0.01] * 6 + [0.005] * 2
    assert keywords["optimizer"].param_groups[0]["lr"] == 0.0025


def test_halve_on_plateau_of_the_training_loss(setup):
    model, sampler, keywords = setup(schedule=lambda o: HalveOnPlateau(o, patience=0, window=2, threshold=100))
    keywords["validate_every"] = 2
    fit(model, sampler, steps=6, **keywords)
    assert keywords["optimizer"].param_groups[0]["lr"] == 0.01 / 4


def test_halve_at(setup):
    model, sampler, keywords = setup(schedule=lambda o: HalveAt(o, steps=[2, 3]))
    history = fit(model, sampler, steps=4, **keywords)
    assert history["learning_rate"].tolist() == [0.01, 0.01, 0.005, 0.0025]


# ------------------------------------------------------------------------------------------------------- interruptions

SCHEDULES = {
    "none": None,
    "HalveAt": lambda o: HalveAt(o, steps=[3, 6]),
    "HalveOnPlateau": lambda o: HalveOnPlateau(o, patience=0, window=3, threshold=100),
    "HalveOnSlowLoss": lambda o: HalveOnSlowLoss(o, window=2, ratio=0.1),
}


def test_several_batches_for_one_update(setup, tmp_path):
    """The gradient is the mean over the batches; a resumed run goes on with the batch that is due."""
    model, sampler, keywords = setup(dropout=0.0, batch_norm=False)
    twin, _, other = setup(dropout=0.0, batch_norm=False)
    history = fit(model, sampler, steps=2, accumulate=3, **keywords)
    for update in range(2):
        twin.train()
        other["optimizer"].zero_grad()
        values = [losses.cross_entropy(twin(x), y) for x, y in map(sampler.batch, range(3 * update, 3 * update + 3))]
        (sum(values) / 3).backward()
        other["optimizer"].step()
        assert history["loss"][update] == pytest.approx(sum(values).item() / 3, rel=1e-5)
    for a, b in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)

    whole, sampler, keywords = setup()
    fit(whole, sampler, steps=6, accumulate=2, **keywords)
    part, sampler, keywords = setup()
    fit(part, sampler, steps=4, accumulate=2, folder=tmp_path, **keywords)
    part, sampler, keywords = setup()
    fit(part, sampler, steps=6, accumulate=2, folder=tmp_path, **keywords)
    assert_same_network(whole, part)
    with pytest.raises(ValueError, match="of another run"):
        fit(part, sampler, steps=8, accumulate=3, folder=tmp_path, **keywords)


def test_patience(setup, tmp_path):
    """Scores rise until update 8; with a patience of 2 validations of 4 updates, update 16 is the last."""
    scores = {4: 0.3, 8: 0.6, 12: 0.5, 16: 0.6, 20: 0.9}

    def run(folder, *, first=4, loss=losses.cross_entropy):
        model, sampler, keywords = setup()
        due = itertools.count(first, 4)

        def validate(model):
            return {"dice": scores[next(due)]}

        return model, fit(model, sampler, steps=24, validate=validate, patience=2, folder=folder, loss=loss, **keywords)

    model, history = run(tmp_path / "whole")
    assert history["step"].iloc[-1] == 16 and not model.training
    eight, sampler, keywords = setup()
    fit(eight, sampler, steps=8, **keywords)
    assert_same_network(model, eight)

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", loss=At(11, crash))
    again, resumed = run(tmp_path / "cut", first=12)
    assert_same_network(again, eight)
    assert_same_history(resumed, history)

    model, sampler, keywords = setup()
    with pytest.raises(ValueError, match="patience=3 needs validations"):
        fit(model, sampler, steps=3, patience=3, **keywords)


def test_another_way_through_the_network(setup):
    """`forward` decides what the loss sees, here the logits twice."""
    model, sampler, keywords = setup()
    twin, _, other = setup()
    a = fit(
        model, sampler, steps=3, forward=lambda x: (model(x), 0), loss=lambda y, t: losses.cross_entropy(y[0], t), **keywords
    )
    b = fit(twin, sampler, steps=3, **other)
    assert_same_history(a, b)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_a_crashed_run_continues_as_if_nothing_had_happened(setup, tmp_path, schedule):
    whole, sampler, keywords = setup(schedule=schedule)
    history = fit(whole, sampler, steps=11, **keywords)

    model, sampler, keywords = setup(schedule=schedule)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model, sampler, steps=11, folder=tmp_path, loss=At(7, crash), **keywords)
    model, sampler, keywords = setup(schedule=schedule, seed=9)  # other weights, to be overwritten
    counting = At(0, None)
    resumed = fit(model, sampler, steps=11, folder=tmp_path, loss=counting, **keywords)
    assert counting.count == 7  # updates 5 to 11: the state of 4 was kept
    assert_same_network(whole, model)
    assert_same_history(history, resumed)
    assert resumed["seconds"].is_monotonic_increasing


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_ctrl_c_saves_and_the_run_continues(setup, tmp_path, schedule):
    whole, sampler, keywords = setup(schedule=schedule)
    history = fit(whole, sampler, steps=9, **keywords)

    before = signal.getsignal(signal.SIGINT)
    model, sampler, keywords = setup(schedule=schedule)
    with pytest.raises(KeyboardInterrupt, match=r"stopped after update 3; the same call goes on from .*last\.pt"):
        fit(model, sampler, steps=9, folder=tmp_path, loss=At(3, press_ctrl_c), **keywords)
    assert signal.getsignal(signal.SIGINT) is before
    assert pd.read_csv(tmp_path / "history.csv")["step"].tolist() == [1, 2, 3]
    model, sampler, keywords = setup(schedule=schedule, seed=9)
    assert_same_history(history, fit(model, sampler, steps=9, folder=tmp_path, **keywords))
    assert_same_network(whole, model)


def test_ctrl_c_during_a_validation(setup, tmp_path):
    model, sampler, keywords = setup()
    seen = []
    with pytest.raises(KeyboardInterrupt, match="stopped after update 4"):
        fit(
            model,
            sampler,
            steps=9,
            folder=tmp_path,
            validate=lambda m: {"dice": 0.5},
            on_update=lambda row: "dice" in row and (press_ctrl_c(), seen.append(row)),
            **keywords,
        )
    assert len(seen) == 1  # it was finished first
    assert pd.read_csv(tmp_path / "history.csv")["dice"].tolist()[-1] == 0.5


def test_ctrl_c_without_a_folder(setup):
    model, sampler, keywords = setup()
    with pytest.raises(KeyboardInterrupt, match=r"^stopped after update 2$"):
        fit(model, sampler, steps=9, loss=At(2, press_ctrl_c), **keywords)


def test_a_second_ctrl_c_stops_at_once(setup, tmp_path):
    model, sampler, keywords = setup()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(model, sampler, steps=9, folder=tmp_path, loss=At(3, lambda v: press_ctrl_c() or press_ctrl_c()), **keywords)
    assert not str(stopped.value) and not (tmp_path / "last.pt").exists()
    assert signal.getsignal(signal.SIGINT) is before


def test_an_echo_of_ctrl_c_is_no_second_one(monkeypatch):
    """`torchrun` passes on the Ctrl-C that its processes have heard already."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with Interruptible() as interruption:
        press_ctrl_c()
        press_ctrl_c()
        assert interruption.asked
        interruption.since -= 6
        with pytest.raises(KeyboardInterrupt):
            press_ctrl_c()


def test_a_finished_run_is_returned_as_it_is(setup, tmp_path):
    model, sampler, keywords = setup()
    history = fit(model, sampler, steps=5, folder=tmp_path, **keywords)
    again, sampler, keywords = setup(seed=9)
    assert_same_history(fit(again, sampler, steps=5, folder=tmp_path, loss=At(1, crash), **keywords), history)
    assert_same_network(model, again)
    assert not again.training


def test_a_longer_run_goes_on_from_a_shorter_one(setup, tmp_path):
    whole, sampler, keywords = setup()
    history = fit(whole, sampler, steps=8, **keywords)
    model, sampler, keywords = setup()
    fit(model, sampler, steps=4, folder=tmp_path, **keywords)
    assert_same_history(fit(model, sampler, steps=8, folder=tmp_path, **keywords), history)
    assert_same_network(whole, model)
    with pytest.raises(ValueError, match=r"last\.pt has 8 updates already, more than the 6 asked for"):
        fit(model, sampler, steps=6, folder=tmp_path, **keywords)


@pytest.mark.parametrize("written", [b"", b"PK\x03\x04 half a state"])
def test_death_while_writing_leaves_the_last_whole_state(setup, tmp_path, monkeypatch, written):
    """The state of update 8 breaks off in the middle; that of update 4 must still be there, and nothing else."""
    model, sampler, keywords = setup()
    real, calls = torch.save, []

    def save(state, path):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(written)
            raise OSError("no space left on device")
        real(state, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        with pytest.raises(OSError, match="no space"):
            fit(model, sampler, steps=12, folder=tmp_path, **keywords)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["history.csv", "last.pt"]
    whole, sampler, keywords = setup()
    history = fit(whole, sampler, steps=12, **keywords)
    model, sampler, keywords = setup(seed=9)
    counting = At(0, None)
    assert_same_history(fit(model, sampler, steps=12, folder=tmp_path, loss=counting, **keywords), history)
    assert counting.count == 8
    assert_same_network(whole, model)


def test_numpy_scalars_do_not_spoil_the_state(noise_case, tmp_path):
    torch.manual_seed(0)
    model = models.dm2d_seg(in_channels=np.int64(1), classes=np.int64(2), width=np.float64(0.1))
    sampler = SegmentSampler([noise_case((9, 9, 2), channels=("flair",))], margin=model.margin, cut=model.cut, spatial_dims=2)
    optimizer = RMSpropNesterov(model.parameters(), lr=np.float64(1e-3))
    fit(model, sampler, steps=1, optimizer=optimizer, folder=tmp_path, progress=False)
    assert len(fit(model, sampler, steps=2, optimizer=optimizer, folder=tmp_path, progress=False)) == 2
    models.load(models.save(tmp_path / "net.safetensors", model, {}))


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(setup, tmp_path, value):
    model, sampler, keywords = setup()
    with pytest.raises(FloatingPointError, match=rf"loss became {value} at update 6 .*The state of update 4 is kept in"):
        fit(model, sampler, steps=9, folder=tmp_path, loss=At(6, lambda v: v * value), **keywords)
    assert torch.load(tmp_path / "last.pt", weights_only=True)["history"][-1]["step"] == 4
    assert all(p.isfinite().all() for p in model.parameters())
    model, sampler, keywords = setup()
    with pytest.raises(FloatingPointError, match="lower the learning rate") as raised:
        fit(model, sampler, steps=9, loss=At(2, lambda v: v * value), **keywords)
    assert "kept" not in str(raised.value)


def test_a_gradient_that_is_not_finite_never_reaches_the_weights(setup, tmp_path):
    """The loss is finite, its slope is not: the square root of 0. The last update of a run is looked at too."""

    def steep(value):
        return value + torch.sqrt((value - value.detach()).clamp(min=0))

    for folder, steps, call in ((tmp_path / "middle", 9, 8), (tmp_path / "last", 6, 6), (None, 3, 3)):
        model, sampler, keywords = setup()
        with pytest.raises(FloatingPointError, match=rf"the gradient became nan at update {call} .*lower the learning rate"):
            fit(model, sampler, steps=steps, folder=folder, loss=At(call, steep), **keywords)
        assert all(value.isfinite().all() for value in model.state_dict().values())
        if folder:
            state = torch.load(folder / "last.pt", weights_only=True)
            assert len(state["history"]) == 4 and all(v.isfinite().all() for v in state["model"].values())


def test_weights_that_are_not_finite_are_neither_saved_nor_returned(setup, tmp_path):
    """Loss and gradients are finite, but the step is too long for the numbers."""
    model, sampler, keywords = setup()
    keywords["optimizer"] = torch.optim.SGD(model.parameters(), lr=1e38)
    with pytest.raises(FloatingPointError, match=r"is not finite after update 1|became (nan|inf) at update 2"):
        fit(model, sampler, steps=1, folder=tmp_path, loss=lambda y, t: 1e3 * losses.cross_entropy(y, t), **keywords)
    assert not (tmp_path / "last.pt").exists()


def test_a_folder_of_another_run(setup, tmp_path):
    model, sampler, keywords = setup()
    fit(model, sampler, steps=2, folder=tmp_path, **keywords)
    state = (tmp_path / "last.pt").read_bytes()
    other, sampler, others = setup(centered=False)
    with pytest.raises(
        ValueError, match=r"last\.pt is of another run: network\.centered was none and is False; choose another folder"
    ):
        fit(other, sampler, steps=4, folder=tmp_path, **others)
    with pytest.raises(ValueError, match="of another run"):
        fit(model, sampler, steps=4, folder=tmp_path, seed=5, **keywords)
    keywords["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"of another run: optimizer\.name was RMSpropNesterov and is SGD"):
        fit(model, sampler, steps=4, folder=tmp_path, **keywords)
    assert (tmp_path / "last.pt").read_bytes() == state


@pytest.mark.parametrize("content", [b"", b"<!doctype html>", "half", "list", "object"])
def test_a_state_that_is_none(setup, tmp_path, content):
    model, sampler, keywords = setup()
    path = tmp_path / "last.pt"
    if content == "half":
        fit(model, sampler, steps=1, folder=tmp_path, **keywords)
        path.write_bytes(path.read_bytes()[:2000])
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "object":  # a pickle that could run code is refused
        torch.save({"config": pd.DataFrame()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"last\.pt is not a training state: .*remove it or choose another folder"):
        fit(model, sampler, steps=2, folder=tmp_path, **keywords)


def test_errors_of_the_sampler_and_the_validation_reach_the_caller(setup):
    model, sampler, keywords = setup()

    class Broken:
        def batch(self, step):
            if step == 2:
                raise RuntimeError("disk gone")
            return sampler.batch(step)

    with pytest.raises(RuntimeError, match="disk gone"):
        fit(model, Broken(), steps=4, **keywords)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model, sampler, steps=4, validate=crash, **keywords)


def test_bad_settings(setup):
    model, sampler, keywords = setup()
    for options, message in [
        ({"steps": 0}, "steps=0, validate_every="),
        ({"steps": 1, "validate_every": 0}, "validate_every=0, accumulate=1, workers=1; all must be at least 1"),
        ({"steps": 1, "engine": {"precision": "float8"}}, "precision='float8'; expected auto, float32"),
        ({"steps": 1, "engine": {"precision": "float16"}}, "float16 training needs a CUDA device"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(model, sampler, **(keywords | options))


def test_labels_of_a_foreign_sampler(setup):
    """Only where the loss is ours, which has a class for every label; a loss of the reader's may leave voxels out by their number."""
    model, sampler, keywords = setup()

    class Foreign:
        def batch(self, step):
            inputs, label = sampler.batch(step)
            return inputs, torch.where(label > 0, self.label, label)

    foreign = Foreign()
    for label in (2, 255, -100):
        foreign.label = label
        with pytest.raises(ValueError, match=r"batch 0 has labels from .*; with classes=2 labels are 0 to 1: renumber them"):
            fit(model, foreign, steps=1, **keywords)
    fit(model, foreign, steps=1, loss=lambda y, t: losses.cross_entropy(y, t.clamp(min=0), mask=t >= 0), **keywords)


def test_medseg_steps_limits_every_training(setup, tmp_path, monkeypatch, capsys):
    whole, sampler, keywords = setup(schedule=lambda o: HalveAt(o, steps=[2]))
    history = fit(whole, sampler, steps=6, **keywords)
    paths.say_once.cache_clear()
    monkeypatch.setenv("MEDSEG_STEPS", "3")
    model, sampler, keywords = setup()
    assert len(fit(model, sampler, steps=2, **keywords)) == 2 and not capsys.readouterr().out
    for folder in (tmp_path, None):
        model, sampler, keywords = setup(schedule=lambda o: HalveAt(o, steps=[2]))
        assert_same_history(fit(model, sampler, steps=6, folder=folder, **keywords), history[:3])
    assert capsys.readouterr().out == "MEDSEG_STEPS=3: no training makes more updates than that\n"
    monkeypatch.delenv("MEDSEG_STEPS")
    model, sampler, keywords = setup(schedule=lambda o: HalveAt(o, steps=[2]))
    assert_same_history(fit(model, sampler, steps=6, folder=tmp_path, **keywords), history)
    assert_same_network(whole, model)


@pytest.mark.parametrize("value", ["0", "-3", "1.5", "few"])
def test_a_bad_value_of_medseg_steps(setup, monkeypatch, value):
    model, sampler, keywords = setup()
    monkeypatch.setenv("MEDSEG_STEPS", value)
    with pytest.raises(ValueError, match=f"MEDSEG_STEPS='{value}'; expected the largest number of updates of a training"):
        fit(model, sampler, steps=2, **keywords)


def test_bfloat16(setup):
    model, sampler, keywords = setup()
    history = fit(model, sampler, steps=3, engine={"precision": "bfloat16"}, **keywords)
    assert np.isfinite(history["loss"]).all()
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_running_average_by_hand():
    """Equation 6 with α = .5 and μ*_0 = 1."""
    assert training.running_average([3, 5, 1], start=1).tolist() == [2, 3.5, 2.25]
    assert training.running_average([3, 5, 1]).tolist() == [3, 4, 2.5]
    assert training.running_average([3, 5, 1], alpha=0).tolist() == [3, 5, 1]
    assert training.running_average([]).tolist() == []
    with pytest.raises(ValueError, match="alpha=1; expected 0"):
        training.running_average([1, 2], alpha=1)


def test_running_average_is_that_of_batch_normalisation():
    norm, torch_rng = torch.nn.BatchNorm1d(1, momentum=0.5), torch.Generator().manual_seed(0)
    batches = torch.randn(6, 10, 1, generator=torch_rng)
    seen = [norm(b) is not None and float(norm.running_mean) for b in batches]
    expected = training.running_average(batches.mean(dim=(1, 2)).numpy(), start=0)
    np.testing.assert_allclose(seen, expected, atol=1e-6)


# ------------------------------------------------------------------------------------------------------------ at scale


def test_the_best_network_is_kept_beside_the_last(setup, tmp_path):
    scores = {4: 0.3, 8: 0.6, 12: 0.5}

    def run(folder, steps, first=4, loss=losses.cross_entropy):
        model, sampler, keywords = setup()
        due = itertools.count(first, 4)
        history = fit(
            model,
            sampler,
            steps=steps,
            validate=lambda m: {"dice_whole": scores[next(due)]},
            folder=folder,
            loss=loss,
            **keywords,
        )
        return model, history

    last, _ = run(tmp_path / "whole", 12)
    eight, _ = run(tmp_path / "eight", 8)
    best = models.load(tmp_path / "whole" / "best.safetensors")
    assert best.card == {"step": 8, "dice_whole": 0.6}
    for name, value in best.state_dict().items():
        if not name.endswith(("recent", "batches")):
            assert torch.equal(value, eight.state_dict()[name]), name
    assert not torch.equal(best.classifier.weight, last.classifier.weight)  # without a patience the last one is returned

    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", 12, loss=At(11, crash))
    resumed, _ = run(tmp_path / "cut", 12, first=12)
    assert_same_network(resumed, last)
    assert models.load(tmp_path / "cut" / "best.safetensors").card["step"] == 8  # .5 at the end is no better


@pytest.mark.parametrize(
    "options",
    [{"engine": {"workers": 3}}, {"engine": {"precision": "bfloat16"}}, {"engine": {"channels_last": True}}, {"accumulate": 2}],
)
def test_options_resume_exactly(setup, tmp_path, options):
    whole, sampler, keywords = setup()
    history = fit(whole, sampler, steps=7, **options, **keywords)
    model, sampler, keywords = setup()
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model, sampler, steps=7, folder=tmp_path, loss=At(6 * options.get("accumulate", 1), crash), **options, **keywords)
    model, sampler, keywords = setup(seed=9)
    assert_same_history(fit(model, sampler, steps=7, folder=tmp_path, **options, **keywords), history)
    assert_same_network(whole, model)


def test_workers_prepare_batches_ahead_in_their_order(setup):
    one, sampler, keywords = setup()
    history = fit(one, sampler, steps=6, **keywords)
    made = []

    class Slow:
        def batch(self, step):
            made.append(step)
            time.sleep(0.05 if step % 2 == 0 else 0)  # the later one is ready first
            return sampler.batch(step)

    three, _, keywords = setup()
    ahead = []
    found = fit(three, Slow(), steps=6, engine={"workers": 3}, on_update=lambda row: ahead.append(len(made)), **keywords)
    assert_same_history(found, history)
    assert_same_network(one, three)
    assert sorted(made) == list(range(6)) and ahead[0] >= 3


KILLED = """
import itertools, sys, torch
from medseg_lite import models
from medseg_lite.training import fit
torch.set_num_threads(1)
model = models.dm2d_seg(in_channels=1, classes=2, width=0.5)
class Sampler:
    def batch(self, step):
        generator = torch.Generator().manual_seed(step)
        inputs = model.cut(torch.randn(1, 2 * model.margin + 9, 2 * model.margin + 9, generator=generator))
        return tuple(part[None] for part in inputs), torch.zeros(1, 9, 9, dtype=torch.long)
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
scores = itertools.count()
fit(model, Sampler(), steps=10_000, optimizer=optimizer, folder=sys.argv[1], validate_every=1, progress=False,
    validate=lambda m: {"dice": float(next(scores))}, on_update=lambda row: print(row["step"], flush=True))
"""


def test_kill_while_writing_never_leaves_a_file_that_does_not_load(tmp_path):
    """A run that writes all the time is killed at odd moments, and every time the next one goes on from what is there."""
    rng, done, leftovers = np.random.default_rng(0), 0, 0
    for _ in range(3):
        with subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True) as process:
            for _ in range(3):
                assert process.stdout.readline(), "the run ended by itself"
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
        state = torch.load(tmp_path / "last.pt", weights_only=True)
        assert len(state["history"]) >= done + 2  # it went on from the state before
        done = len(state["history"])
        assert models.load(tmp_path / "best.safetensors").card["step"] <= done + 1
        assert len(pd.read_csv(tmp_path / "history.csv")) in (done, done - 1)
        leftovers += len(list(tmp_path.glob(".partial-*")))
        assert len(list(tmp_path.glob(".partial-*"))) <= 1  # those of the kill before are gone


def test_tensorboard(setup, tmp_path, monkeypatch, capsys):
    rows, made = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            made.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            rows.append((name, value, step))

        def close(self):
            made.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    model, sampler, keywords = setup()
    history = fit(
        model, sampler, steps=4, folder=tmp_path, engine={"tensorboard": True}, validate=lambda m: {"dice": 0.5}, **keywords
    )
    assert made == [(str(tmp_path / "tensorboard"), 1), "closed"]
    assert [r for r in rows if r[0] == "loss"] == [("loss", loss, n) for n, loss in enumerate(history["loss"], 1)]
    assert [r for r in rows if r[0] == "dice"] == [("dice", 0.5, 4)]
    fit(model, sampler, steps=5, folder=tmp_path, engine={"tensorboard": True}, validate=lambda m: {"dice": 0.5}, **keywords)
    assert made[2:] == [(str(tmp_path / "tensorboard"), 5), "closed"] and rows[-1][2] == 5

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as if it were not installed
    capsys.readouterr()
    fit(model, sampler, steps=6, folder=tmp_path, engine={"tensorboard": True}, **keywords)
    told = capsys.readouterr().out.split("\n", 1)[1]  # below the line that says that there are more updates
    assert told == "tensorboard is not installed (pip install tensorboard); the history goes to history.csv alone\n"
    assert len(pd.read_csv(tmp_path / "history.csv")) == 6


def test_perturbed_weights_are_nearly_the_same():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv3d(2, 8, 3), torch.nn.BatchNorm3d(8))
    before = copy.deepcopy(model.state_dict())
    training.perturb_weights(model, share=1e-3, seed=1)
    kernel = model[0].weight / before["0.weight"] - 1
    assert 0.8e-3 < kernel.std() < 1.2e-3 and torch.equal(model[1].running_var, before["1.running_var"])
    first = model[0].weight.clone()
    model.load_state_dict(before)
    training.perturb_weights(model, share=1e-3, seed=1)
    assert torch.equal(model[0].weight, first)
    training.perturb_weights(model, share=1e-3, seed=2)
    assert not torch.equal(model[0].weight, first)
