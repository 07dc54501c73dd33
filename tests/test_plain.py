"""Plain values: what NumPy and PyTorch count with becomes Python's own, and what no file can hold is named."""

from __future__ import annotations

import io
import json
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg_lite import (
    crf,
    datasets,
    ensembles,
    forest,
    inference,
    metrics,
    models,
    phantoms,
    recipes,
    sampling,
    training,
    transforms,
)
from medseg_lite.engine.identity import describe
from medseg_lite.engine.stored import StoredCase, write
from medseg_lite.optimizers import Schedule
from medseg_lite.plain import make_plain

NUMBERS = {
    "int64": np.int64(3),
    "uint8": np.uint8(3),
    "float32": np.float32(0.5),
    "float64": np.float64(0.1),
    "bool": np.bool_(True),
    "0-d array": np.array(2),
    "0-d tensor": torch.tensor(0.5),
    "text": np.str_("flair"),
}


def types_in(value) -> set[type]:
    if isinstance(value, dict):
        return {dict} | {t for pair in value.items() for part in pair for t in types_in(part)}
    return {type(value)}.union(*(types_in(part) for part in value)) if isinstance(value, (list, tuple)) else {type(value)}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("tensors", [False, True])
def test_numbers_of_numpy_become_plain(name, tensors):
    value = NUMBERS[name]
    nested = {"a": [value, (value, {"b": value})], "c": value}
    plain = make_plain(nested, "nested", tensors=tensors)
    allowed = {dict, list, str, int, float, bool} | ({tuple, torch.Tensor} if tensors else set())
    assert types_in(plain) <= allowed and plain["c"] == value
    if tensors:
        file = io.BytesIO()
        torch.save(plain, file)
        file.seek(0)
        assert torch.load(file, weights_only=True)["c"] == value
    else:
        assert json.loads(json.dumps(plain)) == plain


numpys = [st.integers(0, 99).map(np.int32), st.floats(width=16, allow_nan=False).map(np.float16), st.just(np.arange(3))]
plains = [st.none(), st.booleans(), st.integers(-9, 9), st.floats(allow_nan=False), st.text(max_size=3)]
leaves = st.one_of(*plains, *numpys)


@given(st.recursive(leaves, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=2), part, max_size=3)))
@settings(max_examples=80, deadline=None)
def test_whatever_is_made_plain_survives_both_kinds_of_file(value):
    plain = make_plain(value, "value")
    assert json.loads(json.dumps(plain)) == plain
    file = io.BytesIO()
    torch.save(make_plain(value, "value", tensors=True), file)
    file.seek(0)
    torch.load(file, weights_only=True)


def test_other_values():
    assert make_plain({1: Path("a/b"), "s": {2, 1}}, "x") == {"1": str(Path("a/b")), "s": [1, 2]}
    state = OrderedDict(weight=torch.ones(2))
    state._metadata = {"version": 2}
    assert make_plain(state, "model", tensors=True) is state  # a network's state has attributes of its own
    assert make_plain(Counter({np.int64(3): 1}), "x", tensors=True) == {3: 1}
    assert make_plain({"betas": (0.9, np.float64(0.5)), 0: b"x"}, "x", tensors=True) == {"betas": (0.9, 0.5), 0: b"x"}
    for wrong, message in [
        ({"a": [1, object()]}, r"card.a\[1\] is of type object, which cannot be stored; expected numbers, texts, lists"),
        ({"f": print}, "card.f is of type builtin_function_or_method"),
        ({"z": 1j}, "card.z is of type complex"),
        ({"b": b"x"}, "card.b is of type bytes"),
        ({1: "a", "1": "b"}, "card has keys that become one when they are stored, among 1; rename one"),
        ({"z": np.complex64(1)}, "card.z is of type complex"),
    ]:
        with pytest.raises(TypeError, match=message):
            make_plain(wrong, "card")


# --------------------------------------------------------------------------------------------------- the doors of files


@pytest.fixture
def case(noise_case):
    return noise_case((24, 24, 24))


@pytest.mark.parametrize("seed", [np.int64(1), np.array(1), torch.tensor(1)])
def test_a_seed_of_any_kind(seed, case, tmp_path):
    options = {"width": np.float32(0.1), "steps": np.int64(2), "progress": False, "batch_size": np.int16(2)}
    options |= {"output": np.uint8(9), "classes": np.int64(2), "validate_every": np.int32(1), "learning_rate": np.float64(1e-3)}
    model = recipes.deepmedic([case], seed=seed, folder=tmp_path, **options)
    models.save(tmp_path / "m.safetensors", model, model.card | {"score": np.float32(0.5), "cases": np.array(["a", "b"])})
    card = models.load(tmp_path / "m.safetensors").card
    assert (card["seed"], card["score"], card["cases"], card["steps"]) == (1, 0.5, ["a", "b"], 2)
    again = recipes.deepmedic([case], seed=1, folder=tmp_path, **options | {"steps": 3})  # goes on
    fresh = recipes.deepmedic([case], seed=1, **options | {"steps": 3})
    for a, b in zip(again.parameters(), fresh.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Warm(Schedule):
    """A schedule that keeps what it is given."""

    def __init__(self, optimizer, kept):
        super().__init__(optimizer)
        self.kept = kept

    def state_dict(self):
        return super().state_dict() | {"kept": self.kept}


def fit(case, folder, steps, *, make, kept=None, scores=None, on_update=None, **options):
    torch.manual_seed(0)
    model = models.deepmedic(in_channels=2, classes=2, width=0.1)
    optimizer = make(model.parameters())
    schedule = None if kept is None else Warm(optimizer, kept)
    validate = None if scores is None else lambda model: scores
    sampler = recipes.recipe.make_segments([case], model, output=9, batch_size=2)
    return training.fit(
        model,
        sampler,
        steps=steps,
        optimizer=optimizer,
        schedule=schedule,
        validate=validate,
        validate_every=1,
        folder=folder,
        progress=False,
        on_update=on_update,
        **options,
    )


OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(
        p, lr=np.logspace(-4, -2, 3)[1], betas=(np.float64(0.9), np.float64(0.99)), eps=np.float64(1e-8)
    ),
    "SGD": lambda p: torch.optim.SGD(p, lr=np.float32(1e-3), momentum=np.float64(0.5), weight_decay=np.float64(1e-4)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=np.array(1e-3).item(), alpha=np.float64(0.9)),
    "AdamW": lambda p: torch.optim.AdamW([{"params": list(p), "lr": np.float64(1e-3)}]),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_state_with_numbers_of_numpy_is_read_again(name, case, tmp_path):
    options = {"make": OPTIMIZERS[name], "kept": {"best": np.float64(0.5), np.int64(2): [np.float32(1)]}}
    options |= {
        "scores": {"dice": np.float64(0.5)},
        "l1": np.float64(1e-6),
        "on_update": lambda row: row.update(mine=np.float32(2)),
    }
    fit(case, tmp_path, 2, **options)
    assert len(fit(case, tmp_path, np.int64(4), **options)) == 4
    history = torch.load(tmp_path / "last.pt", weights_only=True)["history"]
    assert {type(value) for row in history for value in row.values()} == {int, float} and history[0]["mine"] == 2


def test_what_no_state_can_hold_is_said_before_the_first_update(case, tmp_path):
    with pytest.raises(TypeError, match=r"schedule\.kept.function is of type function, which cannot be stored"):
        fit(
            case,
            tmp_path,
            2,
            make=OPTIMIZERS["SGD"],
            kept={"function": lambda: 1},
            on_update=lambda row: pytest.fail("trained"),
        )
    fit(case, None, 1, make=OPTIMIZERS["SGD"], kept={"function": lambda: 1})  # nothing is kept
    for name in ("loss", "step", "seconds", "learning_rate"):
        with pytest.raises(ValueError, match=f"a score of the validation is called '{name}', as a column of the history"):
            fit(case, None, 1, make=OPTIMIZERS["SGD"], scores={"dice": 1.0, name: 2.0})


def test_facts_of_a_stored_case(case, tmp_path):
    values, counts = np.unique(case.label, return_counts=True)
    info = {"counts": dict(zip(values, counts)), "classes": np.array(["tissue", "lésion, “dark”"]), "site": np.str_("A")}
    found = StoredCase(write(tmp_path / "a.safetensors", case.replace(info=info))).info
    named = case.replace(info={"classes": {1: "lesion", 4: "core"}})
    assert StoredCase(write(tmp_path / "c.safetensors", named)).info["classes"] == {1: "lesion", 4: "core"}
    assert found["counts"] == {"0": counts[0], "1": counts[1]} and found["classes"] == ("tissue", "lésion, “dark”")
    with pytest.raises(TypeError, match=r"info\.scanner is of type object"):
        write(tmp_path / "b.safetensors", case.replace(info={"scanner": object()}))


def test_options_of_a_network_with_numbers_of_numpy(tmp_path):
    network = models.deepmedic(in_channels=np.int64(2), classes=np.array(3), width=np.float32(0.1))
    models.save(tmp_path / "m.safetensors", network, {})
    assert models.load(tmp_path / "m.safetensors").classes == 3
    assert describe({"a": np.int64(3), "b": torch.tensor(0.5)}) == {"a": 3, "b": 0.5}


# ----------------------------------------------------------------------------------------- whole numbers as arguments

KINDS = {"int64": np.int64, "uint8": np.uint8, "0-d array": np.array, "0-d tensor": torch.tensor}


def refine(case, n):
    return crf.DenseCRF(iterations=n, smoothness_weight=n).refine(np.stack([1 - case.label, case.label]), case)


def train_forest(case, n):
    model = forest.RandomForest(forest.BoxFeatures(n, count=n, seed=n), trees=n, depth=n, seed=n)
    return model.fit([case], points_per_case=50).predict(case, progress=False)


def segment(case, n):
    torch.manual_seed(0)
    return inference.predict(
        models.unet2d(in_channels=2, classes=2, width=0.1), case, tile=4 * n, output="logits", progress=False
    )


CALLS = {
    "brain": (3, lambda case, n: phantoms.brain(n, spacing=6 * n / n).image),
    "em": (64, lambda case, n: phantoms.em(n, slices=n // n, size=n).image),
    "VolumeSampler": (8, lambda case, n: sampling.VolumeSampler([case], crop=n, batch_size=n, seed=n).batch(n).inputs),
    "SegmentSampler": (
        3,
        lambda case, n: sampling.SegmentSampler([case], output=n, margin=n, batch_size=n, seed=n).batch(n).inputs,
    ),
    "predict": (4, segment),
    "refine": (1, refine),
    "forest": (2, train_forest),
    "regions": (1, lambda case, n: metrics.evaluate(case.label, case.label, regions={"a": n, "b": [0, n]}, metrics=["dice"])),
    "hausdorff": (2, lambda case, n: metrics.hausdorff(case.label, 1 - case.label, spacing=(n, n, n), percentile=n)),
    "count_borders": (1, lambda case, n: metrics.count_borders(case.label, axis=n)),
    "split_folds": (2, lambda case, n: recipes.split_folds(list("abcd"), n, seed=n)),
    "vote": (3, lambda case, n: ensembles.hierarchical_vote([case.label], labels=(1, 2, n))),
    "complete": (2, lambda case, n: transforms.complete(case, ["flair", "t1c", "t2"], value=n).image),
}


@pytest.mark.parametrize("name", CALLS)
def test_whole_numbers_of_any_kind(name, noise_case):
    case = noise_case((12, 12, 8))
    number, call = CALLS[name]
    expected = call(case, number)
    for kind in KINDS.values():
        found = call(case, kind(number))
        assert (
            found.equals(expected) if hasattr(expected, "equals") else np.array_equal(np.asarray(found), np.asarray(expected))
        )


def test_the_same_files_for_the_same_numbers(noise_case, tmp_path):
    case, channels = noise_case((10, 10, 10)), ["flair", "t1c", "t2"]
    path = tmp_path / "noise.safetensors"
    made = set()
    for value in (0.5, np.float64(0.5), np.array(0.5), torch.tensor(0.5)):
        prepare = partial(transforms.complete, channels=channels, value=value)
        datasets.store([case], tmp_path, normalise=prepare, progress=False)
        made.add(path.stat().st_mtime_ns)
    assert len(made) == 1
    p = np.stack([1 - case.label, case.label])
    for seed in (1, np.int64(1), torch.tensor(1)):
        crf.search(
            [case], [p], trials=np.int16(1), seed=seed, iterations=np.int64(1), folder=tmp_path / "search", progress=False
        )
    assert len(list((tmp_path / "search").iterdir())) == 1
    facts = {"width": np.float32(0.1), "steps": np.int64(1), "batch_size": np.int64(2)}
    recipe = recipes.Recipe(
        "x", "deep_plus", ("flair", "t1c"), np.int64(2), label_map={np.int64(1): np.uint8(1)}, settings=facts
    )
    again = recipes.Recipe(
        "x", "deep_plus", ("flair", "t1c"), 2, label_map={1: 1}, settings=facts | {"steps": 1, "batch_size": 2}
    )
    cases = [noise_case((10, 10, 10), seed=n, name=str(n)) for n in range(2)]
    for which, seed in ((recipe, np.int64(3)), (again, 3)):
        recipes.cross_validate(which, cases, tmp_path / "run", folds=2, seed=seed, progress=False)
