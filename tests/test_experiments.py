"""The experiments: plans without training, stored rows that survive every run, pages that hold the stored tables; the benchmarks."""

import dataclasses
import importlib.util
import runpy
import shutil
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from medseg_lite import models, paths, training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
BESIDE = {  # tables that a row writes beside its own
    "deepmedic_scores": ["deepmedic_curves"],
    "em_scores": ["em_curves"],
    "hands_scores": ["hands_curves"],
    "normalisation_prostate": ["normalisation_gain"],
    "systems_runs": ["systems_scores"],
}

sys.path.append(str(ROOT / "experiments"))
import _frame  # noqa: E402


@cache
def load(name: str):
    spec = importlib.util.spec_from_file_location(f"experiment_{name}", ROOT / "experiments" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def have_key(table: pd.DataFrame, key) -> pd.Series:
    """Return which rows of a table have these values in these columns."""
    return (table[list(key)] == [str(value) for value in key.values()]).all(axis=1)


@pytest.fixture
def results(tmp_path):
    """A copy of the shipped tables."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results"))


# ----------------------------------------------------------------------------------------------------- the scripts


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_plan_trains_nothing_and_writes_nothing(name, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise AssertionError("--plan trained or wrote something")

    monkeypatch.setattr(training, "fit", fail)
    monkeypatch.setattr(paths, "atomic_write", fail)
    monkeypatch.setattr(_frame, "atomic_write", fail)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--plan"])
    runpy.run_path(str(ROOT / "experiments" / f"{name}.py"), run_name="__main__")
    head, *rows = capsys.readouterr().out.splitlines()
    assert "rows to make" in head and any(row.strip().startswith("stored") for row in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_interrupted_run_goes_on_and_shipped_rows_survive(name, results):
    module, store = load(name), _frame.Store(name, results)
    rows = [row for row in module.plan(store, None) if not row.extra]
    lost = next(row for row in rows if store.holds(row) and not row.table.endswith(".npz"))
    whole = {table: read(store.path(table)) for table in (lost.table, *BESIDE.get(lost.table, ()))}
    mine = {table: have_key(frame, lost.key) for table, frame in whole.items()}
    for table, frame in whole.items():
        frame[~mine[table]].to_csv(store.path(table), index=False)
    shipped = {path: set(path.read_text().splitlines()) for path in results.glob("*.csv")}
    waiting = [row for row in rows if not store.holds(row)]
    made, patience = [], len(waiting) // 2

    def make(row):
        if len(made) == patience:
            raise KeyboardInterrupt
        made.append(row.key)
        if row.key == lost.key:
            return {table: frame[mine[table]].to_dict("records") for table, frame in whole.items()}
        tables = {}
        for table in (row.table, *BESIDE.get(row.table, ())):  # rows like those of the first run in the table
            frame = read(store.path(table))
            first = have_key(frame, frame[list(row.key)].iloc[0].to_dict())
            tables[table] = frame[first].drop(columns=list(row.key)).to_dict("records")
        return tables

    def plan(store, seeds):
        return [dataclasses.replace(row, run=lambda row=row: make(row)) for row in module.plan(store, seeds)]

    script, options = ROOT / "experiments" / f"{name}.py", ["--results", str(results)]
    with pytest.raises(KeyboardInterrupt):
        _frame.main(script, plan, module.report, {}, options)
    patience = -1
    _frame.main(script, plan, module.report, {}, options)
    assert lost in waiting and made == [row.key for row in waiting], "each row once, and in the order of the plan"
    for path, lines in shipped.items():
        assert lines <= set(path.read_text().splitlines()), f"{path.name} lost rows"
    for table, frame in whole.items():
        assert set(map(tuple, read(store.path(table)).to_numpy())) >= set(map(tuple, frame.to_numpy()))
    runs = read(results / "runs.csv")
    assert len(runs) == len(made) and set(runs.experiment) == {name}
    assert all(store.holds(row) for row in rows)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_page_holds_the_stored_tables(name, results):
    module = load(name)
    shutil.copy(ROOT / "experiments" / f"{name}.md", results)
    store = _frame.Store(ROOT / "experiments" / f"{name}.py", results)
    store.fill(module.report(store))
    assert store.page.read_text("utf-8") == (ROOT / "experiments" / f"{name}.md").read_text("utf-8")


@pytest.mark.parametrize("name", SCRIPTS)
def test_an_empty_folder_gives_an_empty_page(name, tmp_path):
    module = load(name)
    store = _frame.Store(ROOT / "experiments" / f"{name}.py", tmp_path)
    assert module.report(store) == {} and not any(store.holds(row) for row in module.plan(store, None))
    store.fill({"made": "today"})
    text = store.page.read_text("utf-8")
    assert "<!-- made -->\n\ntoday\n\n<!-- /made -->" in text and "\n| --- |" not in text


def test_the_readme_lists_every_script_and_its_minutes():
    text = (ROOT / "experiments" / "README.md").read_text("utf-8")
    for name in SCRIPTS:
        rows = load(name).plan(_frame.Store(name), None)
        minutes = sum(row.minutes for row in rows if not row.extra)
        (line,) = (line for line in text.splitlines() if line.startswith(f"| [{name}.py]({name}.md) |"))
        assert line.endswith(f"| {minutes:.0f} |"), f"{name}.py takes {minutes:.0f} CPU minutes"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_explains_itself(name, monkeypatch, capsys):
    if name == "viewer":
        pytest.importorskip("playwright")
    path = ROOT / "benchmarks" / f"{name}.py"
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.setattr(sys, "argv", [path.name, "--help"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(path), run_name="__main__")
    assert "--results" in capsys.readouterr().out
    assert "<!-- made -->" in path.with_suffix(".md").read_text("utf-8")
    assert f"[{name}.md]({name}.md)" in (path.parent / "README.md").read_text("utf-8")


# ------------------------------------------------------------------------------------------------------- the frame


def test_rows_are_added_or_replaced_in_their_place(tmp_path):
    store = _frame.Store("any.py", tmp_path)
    text = "seed,case,dice\n0,a,0.50\n0,b,\n1,a,1e-05\n"
    store.path("scores").write_text(text)
    store.put("scores", [{"case": "a", "dice": 0.123456}, {"case": "b", "dice": np.nan}], {"seed": 2})
    text += "2,a,0.1235\n2,b,\n"
    assert store.path("scores").read_text() == text
    store.put("scores", [{"case": "c", "dice": np.float32(0.25), "found": True}], {"seed": 0})
    assert store.path("scores").read_text().splitlines() == [
        "seed,case,dice,found",
        "0,c,0.25,True",
        "1,a,1e-05,",
        "2,a,0.1235,",
        "2,b,,",
    ]


def test_a_rows_own_table_is_written_last(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(_frame.Store, "put", lambda store, table, rows, key: written.append(table))
    monkeypatch.setattr(_frame.Store, "fill", lambda store, blocks: None)
    row = _frame.Row("scores", {"seed": 0}, lambda: {"scores": [{}], "curves": [{}], "labels.npz": {}}, 1)
    _frame.main("any.py", lambda store, seeds: [row], lambda store: {}, {}, ["--results", str(tmp_path)])
    assert written == ["curves", "labels.npz", "scores", "runs"]


def test_rows_are_chosen_by_names_and_made_again_only_where_asked(tmp_path):
    made = []

    def plan(store, seeds):
        return [
            _frame.Row(
                "t", {"variant": v, "seed": s}, lambda v=v, s=s: made.append((v, s)) or [{"x": 1}], 1, part, part == "slow"
            )
            for part in ("quick", "slow")
            for v in ("a", "b")
            for s in seeds or [0]
        ]

    (tmp_path / "any.md").write_text("<!-- made -->\n<!-- /made -->\n")

    def call(*options):
        made.clear()
        _frame.main("any.py", plan, lambda store: {}, {"steps": 5}, ["--results", str(tmp_path), *options])
        return made

    assert call() == [("a", 0), ("b", 0)] and call() == []
    assert call("--only", "a", "--again") == [("a", 0)]
    assert call("--seeds", "1", "2", "--only", "b") == [("b", 1), ("b", 2)]
    assert call("--only", "slow", "--again") == [("a", 0), ("b", 0)]
    with pytest.raises(
        SystemExit, match="--only c: no such row; expected a row that --plan shows, or one of: quick; a; 0; b; slow"
    ):
        call("--only", "c")


def test_settings_are_changed_for_another_folder_only(tmp_path, capsys):
    settings = {"steps": 5, "width": 0.5}

    def call(*options):
        _frame.main("any.py", lambda store, seeds: [], lambda store: {}, settings, ["--plan", *options])

    call("--results", str(tmp_path), "--set", "steps=2", "width=.1")
    assert settings == {"steps": 2, "width": 0.1}
    for options, message in (
        (["--set", "steps=2"], "give --results FOLDER"),
        (["--results", str(tmp_path), "--set", "depth=2"], "--set depth: no such setting; expected one of steps, width"),
    ):
        with pytest.raises(SystemExit):
            call(*options)
        assert message in capsys.readouterr().err


def test_a_page_without_the_block_is_named(tmp_path):
    (tmp_path / "any.md").write_text("# Page\n")
    with pytest.raises(
        ValueError, match=r"any.md has no block 'scores'; expected the lines <!-- scores --> and <!-- /scores -->"
    ):
        _frame.Store(tmp_path / "any.py", tmp_path).fill({"scores": "| |"})


# ---------------------------------------------------------------------------------------------------- all systems


def test_combined_systems_without_probabilities_say_what_is_missing(results):
    systems = load("systems")
    store = _frame.Store("systems.py", results)
    with pytest.raises(SystemExit, match=r"those of forest 0, deepmedic 0, .* are not there: make these systems first"):
        systems.run_combined(store, "average")
    for path in RESULTS.glob("systems_*"):
        assert (results / path.name).read_bytes() == path.read_bytes()


def test_labels_of_one_more_system_leave_the_others_as_they_are(results):
    systems, shape = load("systems"), (72, 80, 64)
    store = _frame.Store("systems.py", results)
    label = np.zeros(shape, np.uint8)
    label[2, 3, 4] = 1  # outside the stored box

    def place(arrays, name):
        whole, part = np.zeros(shape, np.uint8), arrays[name]
        whole[tuple(slice(a, a + n) for a, n in zip(arrays[f"{name.split('_')[0]}_start"], part.shape))] = part
        return whole

    with np.load(store.path("systems_labels.npz")) as file:
        stored = dict(file)
    merged = systems.merge_labels(store, "new", {113: label})
    assert set(merged) == {*stored, "113_new"}
    for name in (name for name in stored if not name.endswith("_start")):
        assert np.array_equal(place(merged, name), place(stored, name)), name
    assert np.array_equal(place(merged, "113_new"), label)


def test_every_network_is_examined(tmp_path, noise_case):
    torch.manual_seed(0)
    store, model, case = (
        _frame.Store("hands.py", tmp_path),
        models.deep_plus(in_channels=2, classes=2, width=0.1),
        noise_case((20, 20, 4)),
    )
    with torch.no_grad():
        list(model.parameters())[-1].copy_(torch.tensor([90.0, -90.0]))
    assert not store.examine("dead, seed 0", model, [case]).alive
    store.examine("dead, seed 0", model, [case])  # the same row again takes its own place
    table = store.read("vitals")
    assert list(table["row"]) == ["dead, seed 0"] and not table["alive"][0] and table["constant"][0]
    assert table["rarest_class"][0] == 1 and table["lowest_recall"][0] == 0
