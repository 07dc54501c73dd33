"""Cross-validation: a network for each fold, trained on the others, and every case segmented by one that has not seen it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from .. import __version__, context, datasets, ensembles, inference, metrics, models, postprocess, statistics
from ..engine import distributed
from ..files import write_nifti
from ..paths import atomic_write
from ..training import BEST
from ..volume import Case
from . import named

RUN = "run.json"


def cross_validate(
    recipe: str | dict,
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
    engine: dict | None = None,
    command: str = "",
    progress: bool = True,
    **settings,
) -> pd.DataFrame:
    """Train a recipe's network for each fold, segment the fold's cases and score them.

    The same call goes on from an interrupted run. Folds may be run one by one (`fold`), also on different machines that share
    `out`. In several processes (`distributed`) the cases to segment are dealt out to them.

    Args:
        recipe: name of one of `named.RECIPES`, or one like those.
        cases: the data set, as read, with labels. They are stored once as the network sees them, so that a cohort may be larger
            than memory.
        out: gets `run.json` (recipe, folds, settings, command), for each fold `fold0/model.safetensors`, `best.safetensors` where
            there was a validation, `history.csv` and `evaluation.csv`; `predictions/CASE.nii.gz` on the grid of the case's own
            files, for any viewer; and `evaluation.csv` of all folds that are done.
        folds: by default the recipe's; 1 trains on all cases and scores none.
        fold: 0 to `folds` − 1, to do this one alone.
        stored: where the prepared cases are kept; by default `out/cases`.
        scores: folder with scores of 2D networks, which become further channels (see `context.with_scores`). "{fold}" in its name
            stands for the number of the fold, whose cases those networks must not have seen.
        members: networks per fold, which differ by their seed and whose probabilities are averaged.
        seed: of the folds, weights, samples and dropout.
        device: "cpu", "cuda", ….
        engine: options of `training.fit` for the machine at hand.
        command: is kept in `run.json` and in the checkpoints' cards.
        progress: whether to show bars and results.
        settings: of the paper's recipe that are to be others than the named ones: `steps=500, width=0.3`. "{fold}" in a text,
            such as `first="runs/two_path/fold{fold}/model.safetensors"`, stands for the number of the fold.

    Returns:
        The table of `metrics.evaluate_cohort` (or V_rand and V_info of every slice) for all folds that are done.

    Raises:
        ValueError: the folder holds another run, or folds and cases do not fit each other.
    """
    recipe = {"name": recipe, **named.recipe_of(recipe)} if isinstance(recipe, str) else recipe
    first, out = distributed.number() == 0, Path(out)
    if recipe.get("needs") == "scores" and scores is None:
        raise ValueError(f"{recipe['name']} is told what 2D networks see: give it the folder of their scores")
    if recipe.get("needs") == "first" and "first" not in settings:
        raise ValueError(f"{recipe['name']} starts from a trained two_path_cnn: give it as first")
    settings = recipe["settings"] | settings
    names = datasets.case_names(cases)
    count = recipe["folds"] if folds is None else folds
    parts = named.folds_of(names, count, seed=seed) if count > 1 else [[]]
    if fold is not None and not 0 <= fold < len(parts):
        raise ValueError(f"fold {fold} of {len(parts)}; expected 0 to {len(parts) - 1}")
    members = members or recipe.get("members", 1)
    _same_run(out, recipe, parts, settings, members, seed, command)

    plane = recipe.get("plane", "axial")
    for k in range(len(parts)) if fold is None else [fold]:
        folder = out / f"fold{k}" if count > 1 else out
        seen = _prepared(cases, recipe, Path(stored or out / "cases"), scores, k, progress)
        train, validation = _split(names, parts[k], recipe.get("validation", 0.0), seed)
        networks = []
        for member in range(members):
            place = folder / f"member{member}" if members > 1 else folder
            facts = {
                "held_out": parts[k],
                "command": command,
                "normalise": recipe["normalise"],
                "plane": plane,
                "label_map": {str(old): new for old, new in (recipe.get("label_map") or {}).items()},
            }
            training, deciding = ([seen[name] for name in part] for part in (train, validation))
            networks.append(
                _trained(
                    recipe,
                    training,
                    deciding,
                    place,
                    _of_fold(settings, k),
                    seed + member,
                    device,
                    engine,
                    progress and first,
                    facts,
                )
            )
        model = ensembles.Ensemble(networks) if members > 1 else networks[0]
        rows = []
        for name in parts[k][distributed.number() :: distributed.count()]:
            original = cases[names.index(name)] if plane != "axial" else seen[name]
            rows.append(_segmented(model, seen[name], original, plane, recipe, out / "predictions"))
        tables = [t for some in distributed.from_all([r.to_dict("list") for r in rows]) for t in some]
        if tables and first:
            table = pd.concat([pd.DataFrame(t) for t in tables]).assign(fold=k)
            _write(folder / "evaluation.csv", table.sort_values("case", kind="stable"))
    if count == 1:
        return pd.DataFrame()
    distributed.wait()
    done = [out / f"fold{k}" / "evaluation.csv" for k in range(len(parts))]
    table = pd.concat([pd.read_csv(path) for path in done if path.exists()], ignore_index=True)
    if first:
        _write(out / "evaluation.csv", table)
        if progress:
            print(report(table, recipe))
    distributed.wait()
    return table


def report(table: pd.DataFrame, recipe: dict) -> str:
    """Means (standard deviations) of a run beside the paper's own, each with the data that they are of."""
    ours = statistics.summary(table.drop(columns="fold"), decimals=3)
    lines = [
        f"{recipe.get('name', recipe['network'])}: mean (standard deviation) over {table['case'].nunique()} cases, each segmented by a "
        "network that has not seen it",
        ours.to_string(),
    ]
    reported = recipe.get("reported")
    if reported:
        numbers = {m: v for m, v in reported.items() if m != "where"}
        lines += [f"\nthe paper ({reported['where']}):", pd.DataFrame(numbers).reindex(ours.index).to_string(na_rep="–")]
    if recipe.get("data"):
        lines.append(f"\nThe recipe is for {recipe['data']}.")
    if recipe.get("departs"):
        lines.append(f"Where it departs from the paper: {recipe['departs']}.")
    return "\n".join(lines)


def _prepared(cases, recipe: dict, folder: Path, scores, fold: int, progress: bool) -> datasets.Cohort:
    """The cases as the network sees them, on disk; written by the first process, and only where they are not there yet."""
    if scores is not None:
        folder = folder / f"fold{fold}" if "{fold}" in str(scores) else folder
        scores = str(scores).replace("{fold}", str(fold))
    prepare = partial(
        named.prepared,
        channels=tuple(recipe["channels"]),
        label_map=recipe.get("label_map"),
        normalise=recipe["normalise"],
        plane=recipe.get("plane", "axial"),
        scores=scores,
    )
    dtype = "float16" if recipe["normalise"] == "standardise" else "float32"  # raw intensities may be too large
    first = distributed.number() == 0
    store = partial(datasets.store, cases, folder, normalise=prepare, dtype=dtype, progress=progress and first)
    found = store() if first else None
    distributed.wait()
    return found or store()


def _of_fold(settings: dict, fold: int) -> dict:
    """The settings with the fold's number in the names of files."""
    return {k: v.replace("{fold}", str(fold)) if isinstance(v, str) else v for k, v in settings.items()}


def _split(names: Sequence[str], test: Sequence[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """The cases to train on, and those that decide when to stop."""
    rest = [n for n in names if n not in set(test)]
    if not share:
        return rest, []
    if len(rest) < 2:
        raise ValueError(f"{len(rest)} cases are left to train on and to validate with; expected at least 2")
    part = named.folds_of(rest, min(max(round(1 / share), 2), len(rest)), seed=seed + 1)[0]
    return [n for n in rest if n not in set(part)], part


def _trained(recipe, train, validation, folder: Path, settings, seed: int, device, engine, progress, facts) -> nn.Module:
    from . import of_network

    if not validation:
        settings = {k: v for k, v in settings.items() if k not in ("patience", "validate_every")}
    model = of_network(recipe["network"])(
        train,
        network=recipe["network"],
        classes=recipe["classes"],
        validation=validation,
        folder=folder,
        device=device,
        seed=seed,
        engine=engine,
        progress=progress,
        **settings,
    )
    model.card |= {key: value for key, value in facts.items() if value} | {"recipe": recipe.get("name", recipe["network"])}
    if distributed.number() == 0:
        models.save(folder / "model.safetensors", model, model.card)
        if (folder / BEST).exists():
            best = models.load(folder / BEST)
            models.save(folder / BEST, best, model.card | best.card)
    distributed.wait()
    return model


def _segmented(model: nn.Module, case: Case, original: Case, plane: str, recipe: dict, folder: Path) -> pd.DataFrame:
    """Segment and score one case, and write what was found on the grid of its own files."""
    truth, regions = case.label, recipe["regions"]
    if regions == "cells":
        probabilities = inference.predict(model, case, output="probabilities", progress=False)
        labels, inside = probabilities.argmax(0).astype(np.uint8), probabilities[0]
        row = {"case": [case.name], "region": ["cells"]}
        row |= {m.__name__: [m(inside, truth == 0)] for m in (metrics.v_rand, metrics.v_info)}
        table = pd.DataFrame(row)
    else:
        labels = inference.predict(model, case, progress=False)
        if recipe.get("postprocess") == "largest":
            labels = postprocess.largest_component(labels)
        table = metrics.evaluate(labels, truth, regions=regions, spacing=case.spacing, case=case.name)
    write_nifti(folder / f"{case.name}.nii.gz", context.facing_back(labels, plane), original)
    return table


def _same_run(out: Path, recipe: dict, parts, settings: dict, members: int, seed: int, command: str) -> None:
    """Write down what is done in this folder, or see that it is what was done there before."""
    facts = {
        "recipe": recipe.get("name", recipe["network"]),
        "network": recipe["network"],
        "members": members,
        "seed": seed,
        "settings": {
            k: v if isinstance(v, (int, float, str, list, tuple, type(None))) else str(v) for k, v in settings.items()
        },
        "folds": parts,
    }
    facts = json.loads(json.dumps(facts))  # tuples become lists, as in the file
    path = out / RUN
    if distributed.number() == 0:
        if path.exists():
            before = json.loads(path.read_text("utf-8"))
            different = [key for key in facts if before.get(key) != facts[key]]
            if different:
                raise ValueError(
                    f"{path} is of another run: {', '.join(different)} differ; choose another folder, or repeat the command"
                )
        else:
            about = {k: recipe[k] for k in ("paper", "data", "reported", "departs") if recipe.get(k)}
            made = {
                "command": command,
                "version": __version__,
                "torch": torch.__version__,
                "machine": platform.machine(),
                "date": str(date.today()),
            }
            with atomic_write(path) as temporary:
                temporary.write_text(json.dumps(facts | about | made, indent=1, ensure_ascii=False), "utf-8")


def _write(path: Path, table: pd.DataFrame) -> None:
    with atomic_write(path) as temporary:
        table.to_csv(temporary, index=False)
