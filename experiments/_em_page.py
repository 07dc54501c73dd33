"""The tables of em.md, made from the stored ones."""

import numpy as np
import pandas as pd
from _em_real import MEASURES, SYSTEMS
from _frame import Store, beside_baselines, markdown

from medseg_lite import statistics


def table(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return scores as seeds × slices; one row twice where a method has no seeds."""
    scores = rows.pivot(index="seed", columns="slice", values=column).to_numpy()
    return np.repeat(scores, 2, axis=0) if len(scores) == 1 else scores


def interval(rows: pd.DataFrame, column: str) -> str:
    found = statistics.two_way(table(rows, column))
    return f"{found.mean:.3f} ({found.low:.3f} to {found.high:.3f})"


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the table of the real stack: single networks, their means, and methods without learning."""
    cells = []
    for (system, mean, turns), rows in scores.groupby(["system", scores["seed"].str.startswith("mean"), "turns"], sort=False):
        if mean or not rows["steps"].notna().any():
            number = 1
        else:
            number = rows["seed"].nunique()
        first, cell = rows.iloc[0], {"system": system}
        cell["networks"] = "–" if np.isnan(first["steps"]) else ("mean of 3" if mean else f"{number}, each alone")
        cell["turns"] = turns
        cell["parameters"] = f"{first['parameters']:,.0f}" if first["parameters"] > 0 else "–"
        cell["CPU s"] = f"{rows['seconds'].mean():.0f}" if first["seconds"] > 0 else "–"
        for reading in ("official", "share"):
            part = rows[rows["reading"] == reading]
            cell[f"V_rand, {reading}"] = interval(part, "v_rand") if number > 1 else f"{part['v_rand'].mean():.3f}"
            cell[f"V_info, {reading}"] = f"{part['v_info'].mean():.3f}"
        cell["share"] = ", ".join(f"{t:.2f}" for t in rows[rows["reading"] == "share"].groupby("seed")["threshold"].first())
        cell["Dice"] = f"{rows['dice'].mean():.3f}" if not np.isnan(first["steps"]) else "–"
        cells.append(cell)
    return pd.DataFrame(cells)


def compare(scores: pd.DataFrame) -> list[str]:
    """Return a line for each pair of systems, by both readings, each network alone; and each system less the blur."""
    lines = []
    alone = scores[~scores["seed"].str.startswith("mean")]
    for reading in ("official", "share"):
        by_system = {s: table(r, "v_rand") for s, r in alone[alone["reading"] == reading].groupby("system", sort=False)}
        pairs = [("learned", "standardised"), ("learned", "u-net"), ("u-net", "standardised")]
        pairs += [(system, "blur + threshold") for system in SYSTEMS]
        for a, b in pairs:
            if a in by_system and b in by_system and min(len(by_system[a]), len(by_system[b])) > 1:
                lines.append(f"* V_rand, {reading}: {a} − {b}, {statistics.two_way(by_system[a], by_system[b])}")
    return lines


def report(store: Store, variants) -> dict[str, str]:
    """Return the blocks of the page; the rows of "inputs" stand in the order of `variants`."""
    blocks, scores = {}, store.read("em_scores")
    if not scores.empty:
        cells = []
        for variant in [v for v in variants if v in set(scores["variant"])]:
            r = scores[scores["variant"] == variant]
            seeds = r.groupby("seed")[MEASURES].mean()
            means = [f"{seeds[m].mean():.3f} ({seeds[m].min():.3f}–{seeds[m].max():.3f})" for m in MEASURES]
            facts = [f"{r.width.iloc[0]:g}", f"{r.parameters.iloc[0]:,}", r.steps.iloc[0]]
            cells.append([variant, *facts, f"{r.groupby('seed').seconds.first().mean():.0f}", len(seeds), *means])
        columns = ["input", "width", "parameters", "updates", "CPU s", "seeds", "V_rand", "V_info", "Dice"]
        blocks["inputs"] = markdown(pd.DataFrame(cells, columns=columns))
        blocks |= beside_baselines(store, {"inputs": scores.groupby("variant", sort=False)[MEASURES].mean()})
    real_scores = store.read("em_real", dtype={"seed": str})
    if not real_scores.empty:
        real_scores["seed"] = real_scores["seed"].fillna("")
        for column in ("steps", "parameters", "seconds", "width"):
            real_scores[column] = real_scores.get(column, np.nan)
        blocks["real"] = "\n\n".join([markdown(summarise(real_scores)), "\n".join(compare(real_scores))])
        curves = store.read("em_real_curves")
        if not curves.empty:
            names = ["loss", "validation_loss", "v_rand"]
            means = curves.groupby(["system", "step"], sort=False)[names].mean().reset_index()
            blocks["curves"] = markdown(means)
    layers = store.read("em_blocks")
    if not layers.empty:
        single = layers[(layers["count"] == 1) | layers["what"].isin(["handed on", "raw"])].assign(
            lost=lambda rows: rows["whole"] - rows["dice"]
        )
        cells = single.groupby(["system", "what", "seed"], sort=False)[["whole", "dice", "lost"]].median().reset_index()
        blocks["blocks"] = markdown(cells[cells["what"] != "estimate"])
    starts = store.read("em_start")
    if not starts.empty:
        cells = []
        for (start, penalty), rows in starts.groupby(["start", "penalty"], sort=False):
            first, last = rows.iloc[0], rows.iloc[-1]
            spans = [f"{r['low']:.3g} to {r['high']:.3g}" for r in (first, last)]
            cells.append([start, f"{penalty:g}", *spans, f"{last['loss']:.3f}"])
        columns = ["start", "weight decay", "range, fresh", f"range after {starts['step'].max()} updates", "loss at the end"]
        blocks["start"] = markdown(pd.DataFrame(cells, columns=columns))
    return blocks | store.dead_networks()
