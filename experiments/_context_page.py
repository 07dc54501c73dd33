"""The tables of context.md, made from the stored ones."""

import numpy as np
import pandas as pd
from _frame import Store, beside_baselines, markdown

from medseg_lite import statistics

REGIONS = ("whole", "core", "enhancing")
PAIRS = (
    ("A", "standard"),
    ("A", "standard, longer"),
    ("A", "A, near"),
    ("A, near", "standard"),
    ("A", "2D axial"),
    ("A", "2D, three planes"),
    ("A", "2D U-Net"),
    ("A", "B"),
    ("A", "C"),
    ("A", "A, other cases"),
    ("A", "A, raw scores"),
)


def table(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Return the scores of one network's runs as runs × patients."""
    return rows.pivot(index="seed", columns="case", values=column).to_numpy()


def compare(test: pd.DataFrame) -> pd.DataFrame:
    """Return the differences of pairs of rows in Dice points, with 95 % intervals over runs and patients."""
    cells = []
    for a, b in PAIRS:
        first, second = (test[test["row"] == row] for row in (a, b))
        if min(first["seed"].nunique(), second["seed"].nunique()) > 1:
            found = [statistics.two_way(100 * table(first, f"dice_{r}"), 100 * table(second, f"dice_{r}")) for r in REGIONS]
            cells.append([f"{a} − {b}", *(f"{f.mean:+.1f} ({f.low:+.1f} to {f.high:+.1f})" for f in found)])
    return pd.DataFrame(cells, columns=["pair", *REGIONS])


def costs(test: pd.DataFrame) -> pd.DataFrame:
    """Return what each row costs, with all its networks."""
    cells = []
    for row, group in test.groupby("row", sort=False):
        first = group.iloc[0]
        seconds = f"{group.groupby('seed')['seconds'].first().mean():.0f}"
        thousands = f"{first['multiplications'] / 1000:,.0f}"
        cells.append([row, f"{first['parameters']:,}", thousands, f"{first['updates']}", seconds])
    return pd.DataFrame(cells, columns=["network", "parameters", "1000 multiplications a voxel", "updates", "CPU s"])


def summarise(test: pd.DataFrame) -> pd.DataFrame:
    """Return means with intervals and medians of the Dice of each row, in %; stripes and false positives."""
    cells = []
    for row, group in test.groupby("row", sort=False):
        cell = [row, str(group["seed"].nunique())]
        for region in REGIONS:
            scores = 100 * table(group, f"dice_{region}")
            found = statistics.two_way(scores) if len(scores) > 1 else None
            cell.append(f"{scores.mean():.1f}" + (f" ({found.low:.1f} to {found.high:.1f})" if found else ""))
        cell += [" / ".join(f"{100 * group[f'dice_{region}'].median():.1f}" for region in REGIONS)]
        cell += [
            f"{group['stripes_axial'].mean():.2f}",
            f"{group['false_ml'].mean():.1f}",
            f"{group['false_rim_ml'].mean():.1f}",
        ]
        cells.append(cell)
    columns = ["network", "runs", *REGIONS, "medians", "stripes", "false ml", "of them at the rim"]
    truth = test.drop_duplicates("case")
    cells.append(["truth", *[""] * 5, f"{truth['true_stripes_axial'].mean():.2f}", "", ""])
    return pd.DataFrame(cells, columns=columns)


def gaps(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the Dice of the 2D networks on their training patients and on unseen ones."""
    cells = []
    for row in rows.loc[rows["set"] == "train", "row"].unique():
        for region in REGIONS:
            seen, unseen = (
                100 * rows[(rows["row"] == row) & (rows["set"] == part)].groupby("seed")[f"dice_{region}"].mean()
                for part in ("train", "test")
            )
            each = ", ".join(f"{gap:+.1f}" for gap in seen - unseen)
            cells.append([row, region, f"{seen.mean():.1f}", f"{unseen.mean():.1f}", each])
    return pd.DataFrame(cells, columns=["network", "region", "12 seen", "10 unseen", "gap of each run"])


def noise(copies: pd.DataFrame) -> pd.DataFrame:
    """Return the mean Dice of runs that differ by a millionth in their first weights, and the range of these means."""
    cells = []
    for (method, training), rows in copies.groupby(["method", "training"], sort=False):
        means = 100 * rows.groupby("copy")[[f"dice_{region}" for region in REGIONS]].mean()
        each = [", ".join(f"{m:.1f}" for m in means[c]) for c in means]
        cells.append([method, training, *each, " / ".join(f"{means[c].max() - means[c].min():.1f}" for c in means)])
    return pd.DataFrame(cells, columns=["network", "training", *REGIONS, "range"])


def report(store: Store) -> dict[str, str]:
    blocks, rows = {}, store.read("context")
    if not rows.empty:
        test = rows[rows["set"] == "test"]
        blocks["networks"] = "\n\n".join([markdown(summarise(test)), markdown(costs(test))])
        blocks["pairs"] = markdown(compare(test))
        blocks["gaps"] = markdown(gaps(rows))
        means = test.groupby("row", sort=False)[[f"dice_{region}" for region in REGIONS]].mean()
        blocks |= beside_baselines(store, {"2 mm": means})
    curves = store.read("context_curves")
    if not curves.empty:
        kind = curves["network"].str.replace(r"_\d+$", "", regex=True)
        means = curves[~kind.str.contains("copy")].assign(network=kind).groupby(["network", "step"], sort=False)
        blocks["curves"] = markdown(means[["loss", *(f"dice_{region}" for region in REGIONS)]].mean().reset_index())
    copies = store.read("context_noise")
    if not copies.empty:
        blocks["noise"] = markdown(noise(copies))
    return blocks | store.dead_networks()
