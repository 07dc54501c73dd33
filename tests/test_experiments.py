"""The experiments: plans without training, stored rows that survive every run, pages that hold the stored tables; the benchmarks."""

import dataclasses
import runpy
import shutil
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scripts
import torch

from medseg_lite import models, paths, training

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "data" / "results"
SCRIPTS = sorted(path.stem for path in (ROOT / "experiments").glob("[a-z]*.py"))

BENCHMARKS = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))
BESIDE = {  # tables that a row writes beside its own
    "brains_contrasts": ["brains_shares"],
    "brains_healthy": ["brains_healthy_curves"],
    "brains_modalities": ["brains_modalities_curves"],
    "cascades": ["cascades_curves"],
    "crf_effects": ["crf_effects_chosen", "crf_effects_pieces"],
    "crf_layer": ["crf_layer_curves", "crf_layer_matrix"],
    "deepmedic_acquisition": ["deepmedic_acquisition_curves"],
    "deepmedic_balance": ["deepmedic_balance_curves"],
    "deepmedic_scales": ["deepmedic_scales_curves"],
    "deepmedic_scores": ["deepmedic_curves"],
    "deepmedic_start": ["deepmedic_start_curves", "deepmedic_start_layers"],
    "deepmedic_table1": ["deepmedic_table1_curves", "deepmedic_table1_lesions"],
    "deepmedic_variants": ["deepmedic_variants_curves"],
    "em_real": ["em_real_curves"],
    "em_scores": ["em_curves"],
    "hands_scores": ["hands_curves"],
    "missing_training": ["missing_curves"],
    "normalisation_prostate": ["normalisation_gain", "normalisation_places", "normalisation_prostate_curves"],
    "puzzles": ["puzzles_curves"],
    "systems_runs": ["systems_scores"],
}

IN_ONE_TABLE = [  # experiments whose methods without learning are in baselines.csv
    "brains",
    "cascades",
    "context",
    "deepmedic_future_work",
    "em",
    "hands",
    "missing_sequences",
    "normalisation_sites",
    "systems",
]

load = partial(scripts.load, "experiments")
load("puzzles")  # puts the folder on the path
import _frame  # noqa: E402


def read(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def have_key(table: pd.DataFrame, key) -> pd.Series:
    """Return which rows of a table have these values in these columns."""
    return (table[list(key)] == [str(value) for value in key.values()]).all(axis=1)


@pytest.fixture
def results(tmp_path):
    """A copy of the shipped tables, without the notes on when they were made."""
    return Path(shutil.copytree(RESULTS, tmp_path / "results", ignore=shutil.ignore_patterns("runs.csv")))


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


def test_methods_without_learning_are_chosen_on_validation_cases(noise_case):
    """Where the two channels change places between training and validation, the better one for validation cases is taken."""
    right = noise_case(seed=1)  # the label can be told from the first channel
    turned = right.replace(image=right.image[::-1].copy())
    for validation, dice in (([right], 1.0), ([turned], 0.5)):
        rows = _frame.baseline_rows([turned], validation, [right], {"dice_1": [1], "dice_none": [2]})
        assert [row["method"] for row in rows][:2] == ["nothing", "everything"] and {row["case"] for row in rows} == {
            right.name
        }
        (threshold,) = (row for row in rows if row["method"] == "threshold")
        assert threshold["dice_1"] == pytest.approx(dice, abs=0.2) and set(threshold) == {
            "method",
            "case",
            "dice_1",
            "dice_none",
        }


def test_baselines_go_to_one_table_and_networks_that_lose_are_named(tmp_path, noise_case):
    store, case, other = (
        _frame.Store("hands.py", tmp_path),
        noise_case(),
        noise_case(seed=1),
    )  # the first channel tells the label
    assert store.baselines("noise").empty and _frame.beside_baselines(store, {"noise": pd.DataFrame()}) == {}

    def score() -> list[dict]:
        rows = _frame.baseline_rows([other], [case], [case], {"dice": [1]})
        return [*rows, {"method": "best constant", "case": "validation", "loss": 1.5}]

    row = _frame.baselines_row(store, "noise", score, 0.1)
    store.put(row.table, row.run(), row.key)
    store.put(
        "baselines", [{"method": "nothing", "case": "noise", "score": "dice", "value": 1}], {"experiment": "x", "task": "noise"}
    )
    assert store.holds(row) and row.names[1] == "baselines"
    table = store.read("baselines")
    assert list(table) == ["experiment", "task", "method", "case", "score", "value"] and table["value"].notna().all()
    simple = store.baselines("noise")
    assert simple.loc["nothing", "dice"] == 0 and simple.loc["threshold", "dice"] > 0.95
    assert simple.loc["best constant", "loss"] == 1.5
    networks = pd.DataFrame({"dice": {"good": 1.0, "poor": 0.5}})
    text = _frame.beside_baselines(store, {"noise": networks, "not stored": networks})["baselines"]
    head, _, *rows = text.split("\n\n")[0].splitlines()
    assert head == "| noise | dice |" and [row.split(" | ")[0] for row in rows] == [
        f"| {name}" for name in ("good", "poor", "nothing", "everything", "prior", "threshold", "blur + threshold", "rule")
    ]
    assert text.count("loses") == 1 and f"* poor loses: dice 0.500 (threshold {simple['dice'].max():.3f})" in text
    assert "No network loses" in _frame.beside_baselines(store, {"noise": networks[:1]})["baselines"]


def test_methods_without_learning_are_scored_as_the_networks_are(noise_case):
    case = noise_case()
    (nothing, *_) = _frame.baseline_rows([case], [case], [case], {"any": [1]}, lambda found, case: {"voxels": found.sum()})
    assert nothing == {"method": "nothing", "case": case.name, "voxels": 0}


@pytest.mark.parametrize("name", IN_ONE_TABLE)
def test_methods_without_learning_stand_beside_the_networks(name):
    module, store = load(name), _frame.Store(ROOT / "experiments" / f"{name}.py")
    rows = [row for row in module.plan(store, None) if row.part == "baselines"]
    assert rows and not any(row.extra for row in rows)
    for row in rows:
        methods = store.baselines(row.key["task"]).index
        assert {"nothing", "everything", "prior", "threshold", "blur + threshold", "rule"} <= set(methods)
        assert f"| {row.key['task']} | " in module.report(store)["baselines"]


def test_a_training_is_examined(tmp_path):
    brains = load("brains")
    options = ["--only", "modalities, flair, 0", "--results", str(tmp_path), "--set", "steps=2", "width=0.125"]
    _frame.main(ROOT / "experiments" / "brains.py", brains.plan, brains.report, brains.SETTINGS, options)
    assert list(read(tmp_path / "vitals.csv")["row"]) == ["modalities, flair, 0"]


@pytest.mark.parametrize("name", ["puzzles", "real_brats", *IN_ONE_TABLE])
def test_every_script_that_trains_examines(name):
    assert "store.examine(" in (ROOT / "experiments" / f"{name}.py").read_text("utf-8")


def test_shipped_networks_are_examined_where_asked(tmp_path):
    hands, store = load("hands"), _frame.Store("hands.py", tmp_path)
    row = next(row for row in hands.plan(store, None) if row.part == "vitals")
    assert row.extra and row.key == {"experiment": "hands", "row": "Jaccard, 0"}
    store.put(row.table, row.run(), row.key)
    assert store.holds(row) and store.read("vitals")["alive"].all()


def test_membranes_of_blurred_intensities_are_scored_as_probabilities(noise_case, monkeypatch):
    em, case = load("em"), noise_case((24, 24, 2), channels=("em",), name="stack")
    case = case.replace(label=(case.image[0] < -0.5).astype(np.uint8))  # membranes are dark
    monkeypatch.setattr(em, "stacks", lambda: ([case], [case]))
    rows = {row["method"]: row for row in em.run_baselines()}
    assert rows["threshold"]["dice"] > 0.95 and rows["nothing"]["dice"] == 0
    assert rows["threshold"]["v_rand"] > rows["nothing"]["v_rand"]
    assert all(rows[f"intensity, blur {sd:g}"]["dice"] is None for sd in em.baselines.BLURS)
    assert 0 < rows["intensity, blur 0.5"]["v_rand"] <= 1


def test_lesions_are_scored_inside_the_liver_alone(noise_case, monkeypatch):
    sites, case = load("normalisation_sites"), noise_case(channels=("ct",))
    label = np.where(np.arange(15)[:, None] > 6, 1 + case.label, 0).astype(np.uint8)  # half of the volume is liver
    monkeypatch.setattr(sites, "patients", lambda part: ([case.replace(label=label)],) * 3)
    rows = {row["method"]: row for row in sites.run_baselines("liver")}
    assert rows["threshold"]["dice_lesion"] > 0.95 and rows["nothing"]["dice_liver"] == pytest.approx(2 / 3, abs=0.1)
    assert rows["everything"]["dice_lesion"] == pytest.approx(2 / 3, abs=0.1) and rows["everything"]["dice_liver"] == 0


def test_scores_of_all_systems_are_named_by_their_patients(noise_case, monkeypatch):
    systems = load("systems")
    monkeypatch.setattr(systems, "patient", lambda number, at: noise_case(seed=number, name=f"{at}{number}"))
    monkeypatch.setattr(systems, "training_cases", lambda: [noise_case(seed=number) for number in (0, 1)])
    monkeypatch.setattr(systems, "test_scans", lambda: [("seen", 2, "A"), ("unseen", 3, "D"), ("twin", 3, "A")])
    rows = systems.run_baselines()
    assert [set(row) - {"method", "case"} for row in rows[:3]] == [
        {f"dice_{region}_{kind}" for region in ("whole", "core", "enhancing")} for kind in ("seen", "unseen", "twin")
    ]


def test_hands_know_the_best_constant_prediction(monkeypatch):
    hands = load("hands")
    labels = torch.zeros(2, 8, 8, 8, dtype=torch.long)
    labels[:, :4] = 1
    logits = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).float() * 50
    assert float(hands.mean_jaccard_distance(logits, labels)) < float(hands.mean_jaccard_distance(0 * logits, labels))
