"""Run an experiment: its command line, rows that are made once, tables that lose nothing, and the page beside the script.

A script has two functions. `plan(store, seeds)` returns its rows. `report(store)` returns the text of each block of its page.

    python experiments/hands.py --plan                     show the rows, which are stored, and the minutes of the others
    python experiments/hands.py                            make the rows that are not stored, and fill hands.md
    python experiments/hands.py --only sum --seeds 0 1     make only these
    python experiments/hands.py --only sum --again         make stored rows again and replace them
    python experiments/hands.py --results /tmp/hands --set steps=20     other settings, everything below another folder

An interrupted script goes on where it stopped. Every row that is made is noted in runs.csv, with its seconds, versions and date.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy import ndimage

from medseg_lite import __version__, baselines, metrics, models, paths, phantoms, vitals
from medseg_lite.models import Network
from medseg_lite.paths import atomic_write
from medseg_lite.vitals import VitalSigns
from medseg_lite.volume import Case

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Row:
    """One run of an experiment, made once.

    Attributes:
        table: name of a CSV file without its ending, or of an ".npz" file; the row is stored when it is there.
        key: columns of that table, and the values in them that identify the run.
        run: function that makes the run. It returns the rows to store, as dicts, or those of several tables, `{table: rows}`.
        minutes: estimated minutes of one CPU core.
        part: name of a group of rows, for `--only`.
        extra: make this row only where `--only` has its full name or its part.
    """

    table: str
    key: dict
    run: Callable[[], Iterable[dict] | dict]
    minutes: float
    part: str = ""
    extra: bool = False

    @property
    def names(self) -> list[str]:
        """The row's full name, then its parts: each of them chooses it on the command line."""
        words = [word for word in (self.part, *map(str, self.key.values())) if word]
        return [", ".join(words), *words]


class Store:
    """The files that an experiment writes: in the repository, or all below the folder `results`."""

    def __init__(self, script: str | Path, results: str | Path | None = None):
        script, home = Path(script).resolve(), Path(results or ROOT)
        self.name, self.template = script.stem, script.with_suffix(".md")
        self.page = home / self.template.name if results else self.template
        self.results = home if results else ROOT / "data" / "results"
        self.checkpoints = (home if results else ROOT / "data") / "checkpoints"
        self.runs = home / "runs" / self.name

    def path(self, table: str) -> Path:
        """Return the file of a table."""
        return self.results / (table if table.endswith(".npz") else f"{table}.csv")

    def read(self, table: str, **options) -> pd.DataFrame:
        """Return a stored table, or an empty one where nothing is stored; options as for `pandas.read_csv`."""
        return pd.read_csv(self.path(table), **options) if self.path(table).exists() else pd.DataFrame()

    def holds(self, row: Row) -> bool:
        """Return whether a row is stored."""
        if row.table.endswith(".npz"):
            return self.path(row.table).exists()
        table = self.read(row.table, dtype=str, keep_default_na=False)
        return not table.empty and bool((table[list(row.key)] == [_text(v) for v in row.key.values()]).all(axis=1).any())

    def baselines(self, task: str) -> pd.DataFrame:
        """Return the mean scores of the methods without learning on a task: a row for each method, a column for each score."""
        table = self.read("baselines")
        if table.empty:
            return table
        mine = table[(table["experiment"] == self.name) & (table["task"] == task)]
        return mine.pivot_table(index="method", columns="score", values="value", sort=False)

    def put(self, table: str, rows: Iterable[dict] | dict, key: dict) -> None:
        """Add rows to a table. They take the place of rows with the same key; all other rows keep every character."""
        with atomic_write(self.path(table)) as temporary:
            if table.endswith(".npz"):
                np.savez_compressed(temporary, **rows)
                return
            new = pd.DataFrame([{name: _text(value) for name, value in (key | row).items()} for row in rows])
            old = self.read(table, dtype=str, keep_default_na=False)
            replaced = set(map(tuple, new[list(key)].to_numpy()))
            same = np.array([tuple(k) in replaced for k in old.reindex(columns=list(key)).to_numpy()], bool)
            place = int(same.argmax()) if same.any() else len(old)
            whole = pd.concat([old[:place], new, old[place:][~same[place:]]]).fillna("")
            whole.to_csv(temporary, index=False, lineterminator="\n")

    def save(self, name: str, model: Network, card: dict, **options) -> None:
        """Save a network among the checkpoints, with the command that makes it on its card."""
        card = {"command": f"python experiments/{self.name}.py"} | card
        models.save(self.checkpoints / f"{name}.safetensors", model, card, **options)

    def examine(self, row: str, model: Network, cases: Sequence[Case]) -> VitalSigns:
        """Note in vitals.csv whether a trained network is alive, on the first four cases: no conclusion is drawn from a dead one."""
        signs = vitals.examine(model, cases[:4])
        self.put("vitals", [_signs_row(signs)], {"experiment": self.name, "row": row})
        return signs

    def dead_networks(self) -> dict[str, str]:
        """Return the block "vitals" of a page: how many networks were examined, and which of them are not alive."""
        vitals = self.read("vitals")
        if vitals.empty:
            return {}
        mine = vitals[vitals["experiment"] == self.name]
        dead = mine.loc[~mine["alive"], ["row", "rarest_class", "lowest_recall", "silent"]]
        return {"vitals": f"{len(mine)} networks, {mine['constant'].sum()} of them constant.\n\n{markdown(dead)}"}

    def fill(self, blocks: dict[str, str]) -> None:
        """Fill the page: the text of each block goes between its lines `<!-- name -->` and `<!-- /name -->`."""
        if self.page.exists():
            text = self.page.read_text("utf-8")
        else:  # a copy of the script's page, without its contents
            text = re.sub(r"(<!-- (.+) -->\n).*?(<!-- /\2 -->)", r"\1\n\3", self.template.read_text("utf-8"), flags=re.DOTALL)
        for name, content in blocks.items():
            start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
            if start not in text or end not in text:
                raise ValueError(f"{self.page} has no block {name!r}; expected the lines {start.strip()} and {end}")
            text = text.split(start)[0] + f"{start}\n{content.strip()}\n\n{end}" + text.split(end)[1]
        with atomic_write(self.page) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _text(value) -> str:
    """Return a value as a table stores it: numbers to four decimals, nothing for NaN and None."""
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else str(round(float(value), 4))
    return "" if value is None else str(value)


def markdown(table: pd.DataFrame, digits: int = 3) -> str:
    """Return a table, without its index, in Markdown; `digits` decimals for numbers that are not integers."""

    def cell(value) -> str:
        if isinstance(value, (float, np.floating)):
            return "–" if np.isnan(value) else f"{value:.{digits}f}"
        return str(value)

    rows = [map(str, table.columns), ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows)


def machine() -> str:
    """Return the date, the CPU threads in use, the machine and PyTorch's version, for a page."""
    threads = torch.get_num_threads()
    return f"{date.today()}, {threads} CPU thread{'s' * (threads > 1)}, {platform.machine()}, torch {torch.__version__}"


def provenance() -> dict:
    """Return the date, the machine and the versions, for a row of a table."""
    return {"date": date.today(), "machine": platform.machine(), "torch": torch.__version__, "medseg_lite": __version__}


def baseline_rows(
    train: Sequence[Case],
    validation: Sequence[Case],
    test: Sequence[Case],
    regions: dict[str, Sequence[int]],
    score: Callable[[np.ndarray, Case], dict] | None = None,
) -> list[dict]:
    """Return the scores of every method of `medseg_lite.baselines` in every test case, as rows of `method`, `case` and the scores.

    Each method is fitted to each region by itself, so it may call a voxel two classes. That is in its favour.

    Args:
        train, validation: labelled cases from which the methods take what they need to know. Where the networks have no validation
            cases, some of the training cases are enough for a threshold.
        test: labelled cases to score.
        regions: class numbers of each region, by the name of the column that gets its Dice.
        score: function of the voxels that a method found, `(D, H, W)` bool, and the case, that returns scores in place of the Dice.
    """
    rows: dict[tuple, dict] = {}
    for name, classes in regions.items():
        target = partial(np.isin, test_elements=list(classes))
        for method, segment in baselines.fit(train, validation, target=target).items():
            for case in test:
                found = segment(case)
                scores = score(found, case) if score else {name: metrics.dice(found, target(case.label))}
                key = {"method": method, "case": case.name}
                rows.setdefault(tuple(key.values()), key).update(scores)
    return list(rows.values())


def baselines_row(store: Store, task: str, score: Callable[[], list[dict]], minutes: float) -> Row:
    """Return the row that scores the methods without learning on a task; they go to baselines.csv, which all experiments share.

    Args:
        task: name of the task: cases, and what is seen of them.
        score: function that returns rows of `method`, `case` and scores, which have the names of the networks' scores.
    """

    def run() -> list[dict]:
        rows = pd.DataFrame(score()).melt(["method", "case"], var_name="score").dropna()
        return rows.to_dict("records")

    return Row("baselines", {"experiment": store.name, "task": task}, run, minutes, part="baselines")


def vitals_row(store: Store, row: str, checkpoint: str, cases: Callable[[], Sequence[Case]]) -> Row:
    """Return the row that examines a network that ships with the project, as `Store.examine` does.

    Args:
        row: the row of vitals.csv that a training of this network makes.
        checkpoint: name of the network's file, without its ending.
        cases: function that returns the cases to look at.
    """

    def run() -> list[dict]:
        model = models.load(paths.shipped("checkpoints", f"{checkpoint}.safetensors"))
        return [_signs_row(vitals.examine(model, cases()[:4]))]

    return Row("vitals", {"experiment": store.name, "row": row}, run, 0.1, part="vitals", extra=True)


def _signs_row(signs: VitalSigns) -> dict:
    rarest = min(signs.recall, key=signs.recall.get)
    return {
        "alive": signs.alive,
        "constant": signs.constant,
        "rarest_class": rarest,
        "lowest_recall": signs.recall[rarest],
        "silent": signs.silent,
    }


def beside_baselines(store: Store, networks: dict[str, pd.DataFrame]) -> dict[str, str]:
    """Return the block "baselines" of a page: networks beside the methods without learning, and where a network loses.

    Args:
        networks: for each task of baselines.csv the networks' mean scores, one row for each network, by its name; the more, the better.
    """
    texts = []
    for task, means in networks.items():
        simple = store.baselines(task)
        if simple.empty or means.empty:
            continue
        simple = simple[list(means)].dropna(how="all")
        best, lost = simple.agg(["max", "idxmax"]), []
        for network, row in means.iterrows():
            worse = [f"{s} {row[s]:.3f} ({best[s]['idxmax']} {best[s]['max']:.3f})" for s in means if row[s] < best[s]["max"]]
            lost += [f"* {network} loses: {', '.join(worse)}"] if worse else []
        texts.append(markdown(pd.concat([means, simple]).rename_axis(task).reset_index()))
        texts.append("\n".join(lost) or "No network loses to a method without learning.")
    return {"baselines": "\n\n".join(texts)} if texts else {}


def lesion_scores(found: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> dict[str, float]:
    """Return the columns of DeepMedic's tables, distances in mm, volumes in ml, and the number of pieces that touch no lesion.

    Args:
        found, truth: voxels of the lesion, `(D, H, W)` bool.
        spacing: mm between voxels along each axis.
    """
    ml = np.prod(spacing) / 1000
    pieces, count = ndimage.label(found)
    return {
        "dice": metrics.dice(found, truth),
        "precision": metrics.precision(found, truth),
        "sensitivity": metrics.sensitivity(found, truth),
        "assd": metrics.assd(found, truth, spacing=spacing),
        "hausdorff": metrics.hausdorff(found, truth, spacing=spacing),
        "true_ml": truth.sum() * ml,
        "found_ml": found.sum() * ml,
        "false_islands": count - len(np.unique(pieces[truth & found])),
    }


def moved(p: np.ndarray, threshold: float) -> np.ndarray:
    """Return the probabilities `(2, *shape)` of background and lesion, with odds that make a `p` of `threshold` one half."""
    p = np.clip(p, 1e-6, 1 - 1e-6)
    odds, rest = p * (1 - threshold), (1 - p) * threshold
    return (np.stack([rest, odds]) / (odds + rest)).astype(np.float32)


def scan(seed: int, **options) -> Case:
    """Return the brain phantom of a seed, scanned at site A, B or C in turn; options as for `phantoms.brain`."""
    return phantoms.brain(seed, site="ABC"[seed % 3], **options)


def flip(image, label, *, rng):
    """Exchange left and right in every second batch: tumours have no favourite side."""
    return (image.flip(2), label.flip(1)) if rng.random() < 0.5 else (image, label)


def main(script: str, plan: Callable, report: Callable, settings: dict, arguments: Sequence[str] | None = None) -> None:
    """Run an experiment from the command line.

    Args:
        script: the script's `__file__`.
        plan: function `plan(store, seeds)` that returns the rows. `seeds` is None where the command line names none.
        report: function `report(store)` that returns the blocks of the page from the stored tables.
        settings: numbers or words by name, that `--set` may change.
        arguments: words of the command line; by default those of this process.
    """
    options = _parse(sys.modules[plan.__module__].__doc__, settings, arguments)
    torch.set_num_threads(options.threads)
    store = Store(script, options.results)
    rows = plan(store, options.seeds)
    only, words = set(options.only), dict.fromkeys(name for row in rows for name in row.names[1:])
    if unknown := only - words.keys() - {row.names[0] for row in rows}:
        raise SystemExit(
            f"--only {', '.join(unknown)}: no such row; expected a row that --plan shows, or one of: {'; '.join(words)}"
        )
    rows = [row for row in rows if (only & set(row.names[: 2 if row.extra else None]) if only else not row.extra)]
    waiting = [row for row in rows if options.again or not store.holds(row)]
    print(
        f"{len(waiting)} of {len(rows)} rows to make, about {sum(row.minutes for row in waiting):.0f} minutes of one CPU core"
    )
    if options.plan:
        print(*(f"{f'{r.minutes:.1f} min' if r in waiting else 'stored':>10}  {r.names[0]}" for r in rows), sep="\n")
        return
    for row in waiting:
        cpu, clock = time.process_time(), time.perf_counter()
        found = row.run()
        tables = found if isinstance(found, dict) else {row.table: list(found)}
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        for table in sorted(tables, key=lambda name: name == row.table):  # its own table last: then the row is complete
            store.put(table, tables[table], row.key)
        key = {"experiment": store.name, "row": row.names[0]}
        store.put("runs", [{"cpu_seconds": round(cpu), "seconds": round(clock)} | provenance()], key)
        store.fill(report(store) | {"made": machine()})
        print(f"{row.names[0]}: {cpu:.0f} s of CPU, {clock:.0f} s", flush=True)
    store.fill(report(store))


def _parse(description: str, settings: dict, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and change the settings that `--set` names."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="show the rows and their minutes, and make none")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="make only rows with these names, parts or values")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds, or folds, of the rows")
    parser.add_argument(
        "--again", action="store_true", help="make stored rows again and replace them; what runs/ holds is used"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--results", metavar="FOLDER", help="write everything below this folder instead of into the repository")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE", help=f"with --results: other settings, {settings}"
    )
    options = parser.parse_args(arguments)
    if options.set and not options.results:
        parser.error("--set makes rows that do not belong into the stored tables; give --results FOLDER, too")
    for name, _, value in (word.partition("=") for word in options.set):
        if name not in settings:
            parser.error(f"--set {name}: no such setting; expected one of {', '.join(settings)}")
        settings[name] = type(settings[name])(value)
    return options
