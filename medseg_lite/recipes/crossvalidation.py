"""Cross-validation: a network for each fold, trained on the others, and every case segmented by one that has not seen it."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import __version__, context, datasets, ensembles, inference, metrics, models, postprocess, statistics, transforms
from ..engine import distributed
from ..engine.identity import describe, find_differences
from ..files import write_nifti
from ..models import Network
from ..paths import atomic_write, file_for, say
from ..plain import make_plain
from ..training import BEST
from ..volume import Case
from .named import find_recipe
from .numbers import find_numbers, name_numbers
from .papers import find_settings, recipe_for
from .recipe import Recipe, check_labels

RUN, CLASSES = "run.json", "classes.json"


def cross_validate(
    recipe: str | Recipe | Mapping[str, object],
    cases: Sequence[Case],
    out: str | Path,
    *,
    folds: int | None = None,
    fold: int | None = None,
    stored: str | Path | None = None,
    scores: str | Path | None = None,
    members: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    engine: Mapping[str, object] | None = None,
    command: str = "",
    progress: bool = True,
    summary: bool = True,
    launch: Callable[[list[int]], None] | None = None,
    **settings,
) -> pd.DataFrame:
    """Train a recipe's network for each fold, segment the fold's cases and score them.

    The same call goes on from an interrupted run. Folds may be run one by one (`fold`), also on different machines that share
    `out`. In several processes (`engine.distributed`) the cases to segment are dealt out to them.

    Args:
        recipe: name of one of `RECIPES`, a `Recipe` of your own, or a dictionary of its attributes.
        cases: the data set, as read, with labels. The cases are stored once as the network sees them, so that a cohort may be larger
            than memory.
        out: folder that gets `run.json` (recipe, folds, settings, command), for each fold `fold0/model.safetensors`,
            `best.safetensors` where there was a validation, `history.csv` and `evaluation.csv`; `predictions/CASE.nii.gz` on the grid
            of the case's own files and in the class numbers of the data, for any viewer; `classes.json`, which says what these numbers
            stand for, where those of the network differ; and `evaluation.csv` of all folds that are done.
        folds: number of folds, by default the recipe's; 1 trains on all cases and scores none.
        fold: number of one fold to run alone, 0 to `folds` − 1.
        stored: folder of the prepared cases; by default `out/cases`.
        scores: folder with scores of 2D networks, which become further channels (see `context.with_scores`). "{fold}" in its name
            stands for the number of the fold, whose cases those networks must not have seen.
        members: number of networks per fold, which differ by their seed and whose probabilities are averaged.
        seed: seed of the folds, weights, samples and dropout.
        device: "cpu", "cuda", …
        engine: options for the machine at hand, as in `medseg_lite.recipes`.
        command: command that started the run, kept in `run.json` and in the checkpoints' cards.
        progress: whether to show bars and results.
        summary: whether to show the means over all cases at the end, with `progress`.
        launch: function that is given the numbers of the folds and returns when they are done, in place of doing them here one after
            the other. It may call `cross_validate` with `fold` in other processes, once for each. The cases are stored before.
        settings: arguments of the paper's recipe that replace the named recipe's: `steps=500, width=0.3`. "{fold}" in a text,
            such as `first="runs/two_path/fold{fold}/model.safetensors"`, stands for the number of the fold.

    Returns:
        The table of `metrics.evaluate_cohort` (or V_rand and V_info of every slice) for all folds that are done.

    Raises:
        ValueError: the folder holds another run, or folds and cases do not fit each other.
    """
    recipe = find_recipe(recipe) if isinstance(recipe, str) else Recipe(**recipe) if isinstance(recipe, Mapping) else recipe
    if recipe.needs == "scores" and scores is None:
        raise ValueError(f"{recipe.name} is told what 2D networks see: give it the folder of their scores")
    if recipe.needs == "first" and "first" not in settings:
        raise ValueError(f"{recipe.name} starts from a trained two_path_cnn: give it as first")
    recipe = replace(recipe, settings={**recipe.settings, **settings}, members=members or recipe.members)
    names, count = datasets.case_names(cases), recipe.folds if folds is None else folds
    parts = split_folds(names, count, seed=seed) if count > 1 else [[]]
    if fold is not None and not 0 <= fold < len(parts):
        raise ValueError(f"fold {fold} of {len(parts)}; expected 0 to {len(parts) - 1}")
    out = Path(out)
    _check_same_run(out, recipe, parts, seed, command)
    run = _Run(recipe, cases, names, out, Path(stored or out / "cases"), scores, seed, device, engine, command, progress)
    numbers = list(range(len(parts))) if fold is None else [fold]
    if launch is None:
        for number in numbers:
            run.fold(number, parts[number], out / f"fold{number}" if count > 1 else out)
    else:
        run.store_for_all()
        launch(numbers)
    table = pd.DataFrame()
    done = [path for n in range(count) if (path := out / f"fold{n}" / "evaluation.csv").exists()]
    if done and distributed.rank() == 0:
        table = pd.concat([metrics.read_table(path) for path in done], ignore_index=True)
        metrics.write_table(out / "evaluation.csv", table)
        if progress and summary:
            say(report(table, recipe))
    return distributed.broadcast(table)


def size_of_update(recipe: Recipe) -> tuple[int, int]:
    """Return the samples of a batch and the batches of an update of a named recipe.

    The larger of the two is how many processes can share an update, see `engine.distributed`.
    """
    settings = find_settings(recipe)
    return settings["batch_size"], settings.get("accumulate", 1)


@dataclass
class _Run:
    """A cross-validation, as all its folds need it."""

    recipe: Recipe
    cases: Sequence[Case]
    names: list[str]
    out: Path
    stored: Path
    scores: str | Path | None
    seed: int
    device: str | torch.device
    engine: Mapping[str, object] | None
    command: str
    progress: bool

    def fold(self, number: int, held_out: list[str], folder: Path) -> None:
        """Train the networks of one fold, segment the cases that they have not seen, and write the scores."""
        recipe, seen = self.recipe, self._store(number)
        check_labels(seen, recipe.classes)
        numbers = self._find_numbers(seen)
        parts = _split(self.names, held_out, recipe.validation, self.seed)
        training, validation = ([seen[name] for name in part] for part in parts)
        networks = []
        for member in range(recipe.members):
            place = folder / f"member{member}" if recipe.members > 1 else folder
            networks.append(self._train_member(number, held_out, training, validation, place, self.seed + member, numbers))
        model = ensembles.Ensemble(networks) if recipe.members > 1 else networks[0]

        def segment(name: str) -> pd.DataFrame:
            original = self.cases[self.names.index(name)] if recipe.plane != "axial" else seen[name]
            return segment_case(model, seen[name], original, recipe, self.out / "predictions", numbers)

        tables = distributed.deal_out(segment, held_out)
        if tables and distributed.rank() == 0:
            metrics.write_table(folder / "evaluation.csv", pd.concat(tables).assign(fold=number))

    def store_for_all(self) -> None:
        """Store the cases, unless each fold has cases of its own."""
        if "{fold}" not in str(self.scores):
            self._store(0)

    def _store(self, number: int) -> datasets.Cohort:
        """Return the cases as the network sees them, on disk. The first process writes them, where they are not there yet."""
        recipe, folder, scores = self.recipe, self.stored, self.scores
        if scores is not None:
            folder = folder / f"fold{number}" if "{fold}" in str(scores) else folder
            scores = str(scores).replace("{fold}", str(number))
        prepare = partial(
            prepare_case,
            channels=recipe.channels,
            label_map=recipe.label_map,
            normalise=recipe.normalise,
            plane=recipe.plane,
            scores=scores,
        )
        first = distributed.rank() == 0
        store = partial(datasets.store, self.cases, folder, normalise=prepare, progress=self.progress and first)
        found = store() if first else None
        distributed.barrier()
        return found or store()

    def _find_numbers(self, seen: datasets.Cohort) -> list[int]:
        """Return the number of each class in the data. Where they differ, the first process writes down what they stand for."""
        recipe = self.recipe
        present = set().union(*(case.info.get("data_labels", ()) for case in seen))
        numbers = find_numbers(recipe.label_map, recipe.classes, present)
        if recipe.label_map and distributed.rank() == 0:
            names = name_numbers(numbers, recipe.label_map, present, seen[0].info.get("classes"))
            _write_json(self.out / CLASSES, names)
        return numbers

    def _train_member(
        self,
        number: int,
        held_out: list[str],
        training: list[Case],
        validation: list[Case],
        folder: Path,
        seed: int,
        numbers: list[int],
    ) -> Network:
        """Train one network and save it with its card."""
        recipe = self.recipe
        without = () if validation else ("patience", "validate_every")
        settings = {name: value for name, value in recipe.settings.items() if name not in without}
        settings = {k: v.replace("{fold}", str(number)) if isinstance(v, str) else v for k, v in settings.items()}
        model = recipe_for(recipe.network)(
            training,
            network=recipe.network,
            classes=recipe.classes,
            validation=validation,
            folder=folder,
            device=self.device,
            seed=seed,
            engine=self.engine,
            progress=self.progress and distributed.rank() == 0,
            **settings,
        )
        facts = {
            "held_out": held_out,
            "command": self.command,
            "normalise": recipe.normalise,
            "plane": recipe.plane,
            "label_map": {str(old): new for old, new in recipe.label_map.items()},
            "data_labels": numbers if recipe.label_map else None,
        }
        model.card |= {name: value for name, value in facts.items() if value} | {"recipe": recipe.name}
        save_with_card(model, folder)
        distributed.barrier()
        return model


def save_with_card(model: Network, folder: Path) -> Path:
    """Save a trained network in its run's folder, and give the best one of the run the same card; done by the first process."""
    path = folder / "model.safetensors"
    if distributed.rank() == 0:
        models.save(path, model, model.card)
        if (folder / BEST).exists():
            best = models.load(folder / BEST)
            models.save(folder / BEST, best, model.card | best.card)
    return path


def segment_case(
    model: Network, case: Case, original: Case, recipe: Recipe, folder: Path, numbers: Sequence[int]
) -> pd.DataFrame:
    """Segment and score one case, and write the prediction on the grid of its own files, in the class numbers of the data."""
    if recipe.regions == "cells":
        probabilities = inference.predict(model, case, output="probabilities", progress=False)
        labels, inside = probabilities.argmax(0).astype(np.uint8), probabilities[0]
        row = {"case": [case.name], "region": ["cells"]}
        row |= {m.__name__: [m(inside, case.label == 0)] for m in (metrics.v_rand, metrics.v_info)}
        table = pd.DataFrame(row)
    else:
        labels = inference.predict(model, case, progress=False)
        if recipe.postprocess == "largest":
            labels = postprocess.largest_component(labels)
        table = metrics.evaluate(labels, case.label, regions=recipe.regions, spacing=case.steps, case=case.name)
    labels = np.asarray(numbers, np.uint8)[labels]
    write_nifti(file_for(folder, case.name, ".nii.gz"), context.facing_back(labels, recipe.plane), original)
    return table


def report(table: pd.DataFrame, recipe: Recipe) -> str:
    """Return the means (standard deviations) of a run beside the paper's own, each with its data."""
    ours = statistics.summary(table.drop(columns="fold"), decimals=3)
    lines = [
        f"{recipe.name}: mean (standard deviation) over {table['case'].nunique()} cases, each segmented by a network that has not "
        "seen it",
        ours.to_string(),
    ]
    if recipe.reported:
        numbers = {metric: row for metric, row in recipe.reported.items() if metric != "where"}
        paper = pd.DataFrame(numbers).reindex(ours.index).to_string(na_rep="–")
        lines += [f"\nthe paper ({recipe.reported['where']}):", paper]
    if recipe.data:
        lines.append(f"\nThe recipe is for {recipe.data}.")
    if recipe.departs:
        lines.append(f"Where it departs from the paper: {recipe.departs}.")
    return "\n".join(lines)


def prepare_case(
    case: Case,
    *,
    channels: Sequence[str],
    label_map: Mapping[int, int] | None = None,
    normalise: str = "standardise",
    plane: str = "axial",
    scores: str | None = None,
) -> Case:
    """Return a case as a recipe's network sees it: channels in order, normalised, labels renumbered, turned to a plane.

    `info["data_labels"]` says which labels the case had before.
    """
    case = case.select(channels)
    if label_map and case.label is not None:
        labels = np.flatnonzero(np.bincount(case.label.ravel())).tolist()
        case = case.relabelled(label_map).replace(info=case.info | {"data_labels": labels})
    case = transforms.normalise(case, normalise)
    if scores is not None:
        case = context.with_scores(case, scores)
    return case if plane == "axial" else context.facing(case, plane)


def split_folds(names: Sequence[str], count: int, *, seed: int = 0) -> list[list[str]]:
    """Deal cases out into folds of equal size, give or take one.

    The order is that of a hash of seed and name, so it depends neither on the machine nor on the order of the files.

    Args:
        names: names of the cases, all different.
        count: number of folds, 2 to the number of cases.
        seed: seed of the order. Another one makes other folds.
    """
    if len(set(names)) != len(names):
        raise ValueError("two cases have the same name; folds are made by name: rename one")
    if not 2 <= count <= len(names):
        raise ValueError(f"{count} folds of {len(names)} cases; expected 2 to {len(names)}")
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
    return [sorted(ordered[n::count]) for n in range(count)]


def _split(names: Sequence[str], test: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Return the cases to train on, and those that decide when to stop."""
    rest = [n for n in names if n not in set(test)]
    if not share:
        return rest, []
    if len(rest) < 2:
        raise ValueError(f"{len(rest)} cases are left to train on and to validate with; expected at least 2")
    part = split_folds(rest, min(max(round(1 / share), 2), len(rest)), seed=seed + 1)[0]
    return [n for n in rest if n not in set(part)], part


def _check_same_run(out: Path, recipe: Recipe, parts: list[list[str]], seed: int, command: str) -> None:
    """Write down what is done in this folder, or check that it is what was done there before."""
    if distributed.rank() > 0:
        return
    facts = {
        "recipe": recipe.name,
        "network": recipe.network,
        "members": recipe.members,
        "seed": seed,
        "channels": recipe.channels,
        "classes": recipe.classes,
        "label_map": recipe.label_map,
        "normalise": recipe.normalise,
        "plane": recipe.plane,
        "regions": recipe.regions,
        "validation": recipe.validation,
        "settings": recipe.settings,
        "folds": parts,
    }
    facts = make_plain(describe(facts), RUN)
    path = out / RUN
    if path.exists():
        before = json.loads(path.read_text("utf-8"))
        differences = find_differences({key: before.get(key) for key in facts}, facts)
        if differences:
            raise ValueError(
                f"{path} is of another run: {'; '.join(differences[:5])}; choose another folder, or repeat the command"
            )
        return
    about = {"paper": recipe.paper, "data": recipe.data, "reported": recipe.reported, "departs": recipe.departs}
    facts |= {name: value for name, value in about.items() if value}
    facts |= {"command": command, "version": __version__, "torch": torch.__version__}
    facts |= {"machine": platform.machine(), "date": str(date.today())}
    _write_json(path, facts)


def _write_json(path: Path, facts: Mapping[str, object]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(make_plain(facts, path.name), indent=1, ensure_ascii=False), "utf-8")
