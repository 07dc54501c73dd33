"""The tables of brains.md, made from the stored ones."""

import numpy as np
import pandas as pd
from _frame import Store, beside_baselines, markdown

from medseg_lite import metrics, statistics

ALL = ("flair", "t1", "t1c", "t2")
SUBSETS = [("flair",), ("t1",), ("t1c",), ("t2",), ("flair", "t1c"), ("flair", "t1c", "t2")]  # Table 2's rows, but the last
CLASSES = ("necrosis", "oedema", "nonenhancing", "enhancing")
REGIONS = metrics.regions["brats2015"]
SCORED = tuple(f"dice_{name}" for name in dict.fromkeys((*CLASSES, *REGIONS)))
SITES = "ABCD"


def of_runs(table: pd.DataFrame, column: str, group: str = "test", sites: str = SITES) -> np.ndarray:
    """Return a score as folds × persons, each the mean over the sites at which the person was imaged."""
    rows = table[(table["set"] == group) & table["site"].isin(list(sites))]
    return rows.pivot_table(index="fold", columns="person", values=column).to_numpy()


def own_site(table: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of patients at the one site where the networks of Table 2 see them."""
    return table[(table["set"] == "test") & (table["site"] == [SITES[p % 3] for p in table["person"]])]


def table_2(store: Store) -> pd.DataFrame:
    """Return the test rows of all networks of Table 2; that with all sequences is "ill" of the other table."""
    healthy = store.read("brains_healthy")
    whole = healthy[healthy["variant"] == "ill"].assign(variant="+".join(ALL)) if len(healthy) else healthy
    parts = [part for part in (store.read("brains_modalities"), whole) if len(part)]
    return own_site(pd.concat(parts)) if parts else pd.DataFrame()


def difference(a: np.ndarray, b: np.ndarray, digits: int = 3) -> str:
    if min(len(a), len(b)) < 2:
        return "one fold so far"
    found = statistics.two_way(a, b)
    return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def report_healthy(table: pd.DataFrame) -> dict[str, str]:
    rows, variants = [], dict(list(table.groupby("variant", sort=False)))
    for variant, mine in variants.items():
        row = {"variant": variant, "folds": mine["fold"].nunique()}
        for group in ("healthy", "mirrored", "stroke"):
            by_site = mine[mine["set"] == group].groupby("site")["false_ml_whole"].mean()
            row[f"false ml, {group}, A / B / C / D"] = " / ".join(f"{ml:.1f}" for ml in by_site)
        row["specificity, healthy"] = f"{mine.loc[mine['set'] == 'healthy', 'specificity_whole'].mean():.4f}"
        test = mine[mine["set"] == "test"]
        seen = test[test["site"] != "D"][[f"dice_{region}" for region in ("whole", "core", "enhancing")]].mean()
        row |= {f"{name}, A to C": value for name, value in seen.items()}
        row["dice_whole, D"] = test.loc[test["site"] == "D", "dice_whole"].mean()
        rows.append(row)
    lines = []
    for variant, rival in (
        ("ill", "healthy beside"),
        ("ill", "healthy beside, longer"),
        ("ill", "ill + intensity"),
        ("healthy beside", "healthy beside + intensity"),
        ("healthy apart", "healthy apart, smoothed"),
        ("healthy apart", "healthy beside"),
        ("ill", "cross-entropy"),
    ):
        if {variant, rival} <= set(variants):
            for group, sites in (("healthy", "ABC"), ("healthy", "D"), ("stroke", SITES)):
                pair = (of_runs(variants[v], "false_ml_whole", group, sites) for v in (variant, rival))
                lines.append(f"* false ml, {group}, {' '.join(sites)}: {variant} − {rival}, {difference(*pair, 2)}")
            for region in ("dice_whole", "dice_core", "dice_enhancing", "dice_oedema"):
                pair = (of_runs(variants[v], region, "test", "ABC") for v in (variant, rival))
                lines.append(f"* {region}, A B C: {variant} − {rival}, {difference(*pair)}")
    mirrored = table[table["set"] == "mirrored"]["person"].unique()
    for variant, mine in variants.items():
        same = mine[mine["person"].isin(mirrored)]
        pair = (of_runs(same, "false_ml_whole", group) for group in ("mirrored", "healthy"))
        lines.append(f"* the same {len(mirrored)} persons, {variant}: mirrored − healthy, false ml {difference(*pair, 2)}")
    return {"healthy": markdown(pd.DataFrame(rows)), "false alarms": "\n".join(lines)}


def report_modalities(table: pd.DataFrame) -> dict[str, str]:
    rows, variants = [], dict(list(table.groupby("variant", sort=False)))
    order = [v for v in ("+".join(s) for s in (*SUBSETS, ALL)) if v in variants]
    for variant in order:
        mine = variants[variant]
        row = {"variant": variant, "folds": mine["fold"].nunique()}
        row |= {name: f"{mine[name].mean():.3f} / {mine[name].median():.3f}" for name in SCORED}
        rows.append(row)
    lines = []
    for best, rival, names in (
        *(("t1c", rival, ("dice_necrosis", "dice_nonenhancing", "dice_enhancing")) for rival in ("flair", "t1", "t2")),
        *(("flair", rival, ("dice_oedema",)) for rival in ("t1", "t1c", "t2")),
        ("t2", "t1c", ("dice_oedema",)),
        ("+".join(ALL), "flair+t1c", tuple(f"dice_{name}" for name in CLASSES)),
        ("flair+t1c+t2", "+".join(ALL), ("dice_necrosis",)),
    ):
        if {best, rival} <= set(variants):
            lines += [
                f"* {name}: {best} − {rival}, {difference(of_runs(variants[best], name), of_runs(variants[rival], name))}"
                for name in names
            ]
    return {"modalities": markdown(pd.DataFrame(rows)), "orders": "\n".join(lines)}


def report_curves(store: Store) -> str:
    rows = []
    for part in ("healthy", "modalities"):
        curves = store.read(f"brains_{part}_curves")
        for variant, mine in curves.groupby("variant", sort=False) if len(curves) else ():
            means = mine.groupby("step")[["dice_whole", "dice_core", "dice_enhancing"]].mean()
            late = means[means.index >= 2 / 3 * means.index.max()]
            row = {"variant": variant, "steps": means.index.max()}
            rows.append(row | {f"gain in the last third, {n[5:]}": late[n].iloc[-1] - late[n].iloc[0] for n in means})
    return markdown(pd.DataFrame(rows)) if rows else ""


def report(store: Store) -> dict[str, str]:
    blocks, networks = {}, {}
    healthy, sequences, memory = store.read("brains_healthy"), table_2(store), store.read("brains_memory")
    if len(healthy):
        blocks |= report_healthy(healthy)
        for variant, row in own_site(healthy).groupby("variant", sort=False)[list(SCORED)].mean().iterrows():
            networks.setdefault("+".join(ALL), {})[variant] = row
    if len(sequences):
        blocks |= report_modalities(sequences)
        for variant, row in sequences.groupby("variant", sort=False)[list(SCORED)].mean().iterrows():
            if variant != "+".join(ALL):
                networks.setdefault(variant, {})[variant] = row
    if len(memory):
        means = memory.groupby("variant", sort=False)[list(SCORED)].mean()
        blocks["memory"] = markdown(means.assign(folds=memory.groupby("variant")["fold"].nunique()).reset_index())
        networks["2 mm"] = dict(means[[f"dice_{region}" for region in REGIONS]].iterrows())
    for name, keys in (("contrasts", ["kind", "question", "channel"]), ("shares", ["kind", "volume"])):
        if len(found := store.read(f"brains_{name}")):
            means = found.groupby(keys, sort=False).mean(numeric_only=True)
            blocks[name] = markdown(means.assign(cases=found.groupby(keys)["case"].nunique()).reset_index(), 4)
    if curves := report_curves(store):
        blocks["curves"] = curves
    simple = store.baselines("+".join(ALL))
    if "false_ml_A" in simple:
        blocks["simple alarms"] = markdown(simple[[f"false_ml_{site}" for site in SITES]].reset_index(), 1)
    blocks |= store.dead_networks()
    blocks |= beside_baselines(store, {task: pd.DataFrame(rows).T for task, rows in networks.items()})
    alone = {task: store.baselines(task) for task in map("+".join, SUBSETS) if task not in networks}
    for task, simple in alone.items():  # sequences that no network was trained with
        if len(simple):
            table = markdown(simple[list(SCORED)].rename_axis(task).reset_index())
            blocks["baselines"] = "\n\n".join(filter(None, [blocks.get("baselines"), table]))
    return blocks
