"""What identifies a run: of all that makes it, one thing at a time is changed in a call that would resume it."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pytest
import torch

from medseg_lite import losses, models, optimizers, recipes, transforms
from medseg_lite.engine.identity import describe, find_differences
from medseg_lite.optimizers import HalveAt, InverseTimeDecay, RMSpropNesterov
from medseg_lite.sampling import SegmentSampler, VolumeSampler
from medseg_lite.training import fit
from medseg_lite.volume import Case


def made_cases(count=2, *, channels=("flair",), seed=0) -> list[Case]:
    cases = []
    for n in range(count):
        rng = np.random.default_rng([seed, n])
        label = np.zeros((20, 20, 6), np.uint8)
        label[5:15, 5:15, 1:5] = 1
        image = rng.normal(size=(len(channels), *label.shape)).astype(np.float32) + label
        cases.append(Case(image, channels, f"case{n}", label))
    return cases


def run(folder, *, steps, cases=None, network=None, sampler=None, optimizer=None, schedule=None, seed=0, **options):
    """A small 2D run; every argument is one thing that makes it."""
    torch.manual_seed(0)
    model = models.dm2d_seg(**({"in_channels": 1, "classes": 2, "width": 0.1} | (network or {})))
    settings = {"output": 3, "batch_size": 4, "seed": 1} | (sampler or {})
    sampler = SegmentSampler(cases or made_cases(), margin=model.margin, cut=model.cut, spatial_dims=2, **settings)
    optimizer = (optimizer or partial(RMSpropNesterov, lr=1e-2))(model.parameters())
    schedule = schedule(optimizer) if schedule else None
    options = {"validate_every": 2, "progress": False} | options
    history = fit(model, sampler, steps=steps, optimizer=optimizer, schedule=schedule, seed=seed, folder=folder, **options)
    return model, history


def changed(cases: list[Case]) -> list[Case]:
    """Two cases, of which the second has other intensities."""
    return [cases[0], cases[1].replace(image=cases[1].image + 0.1)]


REFUSED = {
    "another case": ({"cases": made_cases(3)[1:]}, "sampler.cases.0 case0 was .* and is none; sampler.cases.1 case1"),
    "one case more": ({"cases": made_cases(3)}, "sampler.cases.2 case2 was none and is"),
    "other intensities": ({"cases": changed(made_cases())}, "sampler.cases.1 case1 was .* and is"),
    "another normalisation": ({"cases": [transforms.standardise(c) for c in made_cases()]}, "sampler.cases.0 case0 was"),
    "another label": (
        {"cases": [made_cases()[0], made_cases()[1].replace(label=1 - made_cases()[1].label)]},
        "sampler.cases.1 case1 was",
    ),
    "another channel": ({"cases": made_cases(channels=("t2",))}, r"sampler.channels was \['flair'\] and is \['t2'\]"),
    "another width": ({"network": {"width": 0.2}}, "network.width was 0.1 and is 0.2"),
    "another dropout": ({"network": {"dropout": 0.1}}, "network.dropout was none and is 0.1"),
    "other classes": ({"network": {"classes": 3}}, "network.classes was 2 and is 3"),
    "another loss": ({"loss": losses.dice_loss}, "loss was cross_entropy and is dice_loss"),
    "other weights of a loss": (
        {"loss": partial(losses.balanced_cross_entropy, target_weights=(0.3, 0.7))},
        "loss was cross_entropy and is {'function'",
    ),
    "a penalty": ({"l2": 1e-3}, "l2 was 0.0 and is 0.001"),
    "another output": ({"sampler": {"output": 6}}, r"sampler.output was \[3, 3, 1\] and is \[6, 6, 1\]"),
    "another batch": ({"sampler": {"batch_size": 5}}, "sampler.batch_size was 4 and is 5"),
    "another scheme": ({"sampler": {"scheme": "uniform"}}, "sampler.scheme was foreground and is uniform"),
    "no flips": ({"sampler": {"flip": False}}, "sampler.flip was True and is False"),
    "an augmentation": ({"sampler": {"augment": transforms.augment}}, "sampler.augment was none and is augment"),
    "another seed of the sampler": ({"sampler": {"seed": 2}}, "sampler.seed was 1 and is 2"),
    "another seed": ({"seed": 5}, "seed was 0 and is 5"),
    "more batches an update": ({"accumulate": 2}, "accumulate was 1 and is 2"),
    "another optimiser": ({"optimizer": partial(torch.optim.SGD, lr=1e-2)}, "optimizer.name was RMSpropNesterov and is SGD"),
    "another momentum": (
        {"optimizer": partial(RMSpropNesterov, lr=1e-2, momentum=0.9)},
        "optimizer.momentum was 0.6 and is 0.9",
    ),
    "further facts": ({"facts": {"start": "abc"}}, "start was none and is abc"),
}


@pytest.mark.parametrize("options, message", REFUSED.values(), ids=REFUSED)
def test_another_run_in_the_same_folder_is_refused(tmp_path, options, message):
    run(tmp_path, steps=2)
    before = (tmp_path / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=rf"last\.pt is of another run: .*{message}.*choose another folder"):
        run(tmp_path, steps=4, **options)
    with pytest.raises(ValueError, match=r"last\.pt is of another run"):
        run(tmp_path, steps=2, **options)  # also where nothing is left to do
    assert (tmp_path / "last.pt").read_bytes() == before


HONOURED = {
    "more updates": ({}, "steps was 2 and is 4"),
    "another rate": ({"optimizer": partial(RMSpropNesterov, lr=3e-3)}, r"learning_rate was \[0.01\] and is \[0.003\]"),
    "another schedule": (
        {"schedule": lambda o: InverseTimeDecay(o, decay=1.0)},
        "schedule.name was Schedule and is InverseTimeDecay",
    ),
    "other halvings": ({"schedule": lambda o: HalveAt(o, steps=[1, 3])}, r"schedule.steps was none and is \[1, 3\]"),
    "validations": ({"validate": lambda model: {"dice": 0.5}}, "steps was 2"),
    "batches made ahead": ({"engine": {"workers": 3}}, "steps was 2"),
}


@pytest.mark.parametrize("options, message", HONOURED.values(), ids=HONOURED)
def test_what_may_change_is_honoured_and_said(tmp_path, capsys, options, message):
    """The rates of the updates that are left are those of a run that was planned so from the start."""
    _, planned = run(tmp_path / "planned", steps=4, **options)
    run(tmp_path / "resumed", steps=2)
    capsys.readouterr()
    _, resumed = run(tmp_path / "resumed", steps=4, **options)
    assert resumed["learning_rate"][2:].tolist() == planned["learning_rate"][2:].tolist() and len(resumed) == 4
    told = capsys.readouterr().out
    assert "last.pt: going on from update 2; " in told
    assert re.search(message, told)


def test_a_longer_run_has_the_schedule_of_a_run_planned_so(tmp_path):
    def halve_at(optimizer, steps):
        return HalveAt(optimizer, steps=[steps // 2, 3 * steps // 4])

    run(tmp_path, steps=4, schedule=partial(halve_at, steps=4))
    _, long = run(tmp_path, steps=8, schedule=partial(halve_at, steps=8))
    assert long["learning_rate"].tolist() == [0.01, 0.01, 0.005, 0.0025, 0.01 / 2, 0.005, 0.0025, 0.0025]


def test_nothing_changed_is_nothing_said(tmp_path, capsys):
    run(tmp_path, steps=4)
    _, again = run(tmp_path, steps=4)
    assert len(again) == 4 and capsys.readouterr().out == ""


# ------------------------------------------------------------------------------------------------------------ recipes

SHORT = {"network": "dm2d_seg", "steps": 2, "width": 0.1, "batch_size": 2, "progress": False}


def test_recipes_refuse_other_held_out_cases_and_starts(tmp_path):
    cases, folder = made_cases(3), tmp_path / "run"
    model = recipes.deepmedic(cases[:2], validation=cases[2:], folder=folder, **SHORT)
    start = models.save(tmp_path / "start.safetensors", model, model.card)
    for options, message in [
        ({"cases": cases[1:], "validation": cases[:1]}, "sampler.cases.0 case0"),
        ({"cases": cases[:2], "validation": cases[1:2]}, "validation.case2 was .* and is none"),
        ({"cases": cases[:2], "validation": cases[2:], "start": start}, "start was none and is"),
        ({"cases": cases[:2], "validation": cases[2:], "scheme": "uniform"}, "sampler.scheme"),
        ({"cases": cases[:2], "validation": cases[2:], "loss": losses.dice_loss}, "loss was cross_entropy"),
    ]:
        with pytest.raises(ValueError, match=rf"of another run: .*{message}"):
            recipes.deepmedic(folder=folder, **SHORT | options)
    again = recipes.deepmedic(cases[:2], validation=cases[2:], folder=folder, **SHORT)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_network_of_the_reader_is_resumed_from_the_same_object(tmp_path):
    """As in a notebook, whose cell is run again after it was interrupted."""
    options = {k: v for k, v in SHORT.items() if k not in ("network", "width", "steps")}
    network = models.dm2d_seg(in_channels=1, classes=2, width=0.1)
    recipes.deepmedic(made_cases(), network=network, steps=2, folder=tmp_path, **options)
    assert len(recipes.deepmedic(made_cases(), network=network, steps=4, folder=tmp_path, **options).history) == 4


# ------------------------------------------------------------------------------------------------------- descriptions


def test_descriptions_are_plain():
    value = {
        "function": losses.dice_loss,
        "partial": partial(losses.balanced_cross_entropy, target_weights=np.array([0.5, 0.5])),
        "number": np.float32(0.5),
        "seed": np.int64(3),
        "set": {3, 1},
        3: torch.tensor([1, 2]),
        "object": optimizers.Schedule,
    }
    assert describe(value) == {
        "function": "dice_loss",
        "partial": {"function": "balanced_cross_entropy", "target_weights": [0.5, 0.5]},
        "number": 0.5,
        "seed": 3,
        "set": [1, 3],
        "3": [1, 2],
        "object": "Schedule",
    }


def test_differences_are_named():
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": "x"}
    now = {"a": {"b": 2, "c": [1, 2]}, "new": "y" * 100}
    lines = find_differences(before, now)
    assert lines[:2] == ["a.b was 1 and is 2", "gone was x and is none"] and lines[2].startswith("new was none and is yyy")
    assert len(lines[2]) < 90 and find_differences(now, now) == []


def test_samplers_describe_what_they_draw_from():
    cases = made_cases()
    whole = VolumeSampler(cases, crop=4).describe()
    assert whole["name"] == "VolumeSampler" and list(whole["cases"]) == ["0 case0", "1 case1"]
    assert VolumeSampler(cases, crop=4).describe() == whole != VolumeSampler(changed(cases), crop=4).describe()
