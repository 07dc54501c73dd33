"""Is one method better than another, or only luckier? The paired t-test and the mean (sd) tables of the papers, and what to do
when many methods are compared at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

ALTERNATIVES = ("two-sided", "greater", "less")


@dataclass(frozen=True)
class TTest:
    """Result of `paired_t_test`; `print` it for one readable line.

    Attributes:
        t: mean difference over its standard error.
        p: chance of a t at least this extreme if the mean difference were 0.
        n: pairs used.
        mean: mean of a - b.
        low, high: 95 % confidence interval of that mean; one end is infinite for a one-sided alternative.
        alternative: "two-sided", "greater" or "less".
        dropped: pairs left out because one of their values was NaN.
    """

    t: float
    p: float
    n: int
    mean: float
    low: float
    high: float
    alternative: str = "two-sided"
    dropped: int = 0

    def __str__(self) -> str:
        p = "p < 0.0001" if self.p < 1e-4 else f"p = {self.p:.2g}"
        line = (
            f"mean difference {self.mean:+.4g} (95 % CI {self.low:+.4g} to {self.high:+.4g}), "
            f"t({self.n - 1}) = {self.t:.3g}, {p} ({self.alternative} paired t-test, n = {self.n})"
        )
        if self.dropped:
            line += f"; {self.dropped} pair{'s' * (self.dropped > 1)} with NaN left out"
        return line


def paired_t_test(a: Sequence[float], b: Sequence[float], *, alternative: str = "two-sided", nan: str = "raise") -> TTest:
    """Student's t-test for paired samples: two methods on the same cases, value i of both from case i.

    With d = a - b, t = mean(d) / (sd(d) / sqrt(n)) follows a t distribution with n - 1 degrees of freedom when d is
    normal with mean 0. Kamnitsas 2017 uses it two-sided on the Dice of each case.

    Args:
        a, b: one value per case, in the same order of cases.
        alternative: "two-sided" asks whether the means differ, "greater" whether a's is larger, "less" whether it is
            smaller. Decide before you look at the values.
        nan: "raise" for an error where a value is NaN (a surface distance to nothing), "omit" to leave such pairs out
            and count them in the result's `dropped`.

    When all differences are 0, t is 0 and p is 1; when all are the same other number, t is infinite.
    """
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative is {alternative!r}; expected one of {', '.join(map(repr, ALTERNATIVES))}")
    if nan not in ("raise", "omit"):
        raise ValueError(f"nan is {nan!r}; expected 'raise' or 'omit'")
    a, b = np.asarray(a, float), np.asarray(b, float)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"a has shape {a.shape} and b {b.shape}; expected one value per case in each, the same cases")
    missing = np.isnan(a) | np.isnan(b)
    if missing.any() and nan == "raise":
        raise ValueError(
            f"{missing.sum()} of {len(a)} pairs hold NaN (the first is number {np.flatnonzero(missing)[0]}); "
            "pass nan='omit' to leave them out, and say so beside the result"
        )
    a, b = a[~missing], b[~missing]
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("a or b holds infinite values; a mean does not exist: leave those cases out of both")
    n = len(a)
    if n < 2:
        raise ValueError(f"{n} usable pair{'s' * (n != 1)}; a t-test needs at least 2")

    difference = a - b
    mean = float(difference.mean())
    # Differences that are equal but for rounding have no spread: without this their t would be a huge random number.
    rounding = 4 * np.finfo(float).eps * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(difference) <= rounding:
        mean = 0.0 if abs(mean) <= rounding else mean
        t, error = (math.copysign(math.inf, mean) if mean else 0.0), 0.0
    else:
        error = float(difference.std(ddof=1)) / math.sqrt(n)
        t = mean / error

    freedom = n - 1
    low, high = -math.inf, math.inf
    if alternative == "two-sided":
        p = 2 * stats.t.sf(abs(t), freedom)
        reach = stats.t.ppf(0.975, freedom) * error
        low, high = mean - reach, mean + reach
    elif alternative == "greater":
        p = stats.t.sf(t, freedom)
        low = mean - stats.t.ppf(0.95, freedom) * error
    else:
        p = stats.t.cdf(t, freedom)
        high = mean + stats.t.ppf(0.95, freedom) * error
    if mean == 0 and error == 0:
        p = 1.0
    return TTest(t, float(p), n, mean, float(low), float(high), alternative, int(missing.sum()))


def summary(table: pd.DataFrame, *, by: str | Sequence[str] = "region", decimals: int = 2) -> pd.DataFrame:
    """Mean (standard deviation) of every metric in each group of a table from `metrics.evaluate_cohort`.

    The standard deviation is that of a sample (divided by n - 1). NaN values are left out; a cell to which fewer cases
    contribute than its group has says so, as in `4.02 (2.54) [7/8]`.

    Args:
        table: one row per case and region, metrics in columns of numbers.
        by: column or columns to group by, `["method", "region"]`; groups keep the order in which they appear.
        decimals: digits after the point.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = [column for column in by if column not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    values = table.select_dtypes("number").columns.difference([*by, "case"], sort=False)
    if not len(values) or not len(table):
        raise ValueError("the table has no column of numbers to summarise" if len(table) else "the table has no rows")
    groups = table.groupby(by, sort=False)
    result = groups[list(values)].agg(lambda column: _mean_sd(column, decimals))
    result.insert(0, "n", groups.size())
    return result


def _mean_sd(column: pd.Series, decimals: int) -> str:
    known = column.dropna()
    if known.empty:
        return "–"
    spread = f"{known.std():.{decimals}f}" if len(known) > 1 else "–"
    share = f" [{len(known)}/{len(column)}]" if len(known) < len(column) else ""
    return f"{known.mean():.{decimals}f} ({spread}){share}"


# ---------------------------------------------------------------------------------------------------- many comparisons


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for their number: call those at most α significant, and any false call among all has chance at most α.

    With m tests and the p-values sorted, p_(1) ≤ … ≤ p_(m), the adjusted p̃_(k) = max over j ≤ k of min(1, (m - j + 1) p_(j)). It needs no
    assumption about how the tests depend on each other, and is never less powerful than m p (Bonferroni).

    Args:
        p_values: one for each test; in any order.

    Returns:
        The adjusted ones, in the same order.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure". The papers of this course correct nothing.
    """
    p = np.asarray(p_values, float)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():  # a NaN fails too
        raise ValueError(f"p_values={p_values}; expected a list of numbers from 0 to 1")
    order = np.argsort(p, kind="stable")
    stepped = np.minimum((len(p) - np.arange(len(p))) * p[order], 1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted


def pairwise(scores: pd.DataFrame, *, nan: str = "raise") -> pd.DataFrame:
    """`paired_t_test` between every two methods, with Holm's correction for their number.

    Args:
        scores: one row for each case, one column for each method.
        nan: as for `paired_t_test`, pair by pair.

    Returns:
        One row for each pair, in the order of the columns: `a`, `b`, the mean difference a - b as `mean`, its 95 % confidence interval
        `low` to `high` (of this pair alone, not corrected), `p`, `p_holm`, the cases in which a is higher (`wins`) and lower (`losses`),
        and the pairs of values used, `n`.
    """
    if scores.shape[1] < 2 or not scores.columns.is_unique:
        raise ValueError(
            f"scores has the columns {', '.join(map(str, scores.columns))}; expected a column each for two methods or more"
        )
    rows = []
    for a, b in combinations(scores.columns, 2):
        test, difference = paired_t_test(scores[a], scores[b], nan=nan), scores[a] - scores[b]
        rows.append(
            {
                "a": a,
                "b": b,
                "mean": test.mean,
                "low": test.low,
                "high": test.high,
                "p": test.p,
                "wins": int((difference > 0).sum()),
                "losses": int((difference < 0).sum()),
                "n": test.n,
            }
        )
    table = pd.DataFrame(rows)
    table.insert(6, "p_holm", holm(table["p"]))
    return table


@dataclass(frozen=True)
class Ranking:
    """Result of `ranks`.

    Attributes:
        mean: mean rank of each method over the cases, best (near 1) first.
        p: chance of mean ranks at least this unequal if all methods were alike (Friedman's test).
        critical: two methods whose mean ranks are further apart than this differ at the level asked for (Nemenyi's test).
        n: cases.
    """

    mean: pd.Series
    p: float
    critical: float
    n: int


def ranks(scores: pd.DataFrame, *, higher_is_better: bool = True, level: float = 0.05) -> Ranking:
    """Rank the methods within each case, and ask whether the mean ranks differ by more than chance.

    Ranks forget by how much a case was lost, so that one disaster counts no more than any other last place. Equal
    values share their ranks' mean.

    Args:
        scores: one row for each case, one column for each of three methods or more; no NaN.
        higher_is_better: False for distances.
        level: of Nemenyi's test, for all pairs of methods together. Its critical difference is q √(k (k + 1) / 6 n) for k methods and n
            cases, with q the studentized range's quantile over √2.

    Source: Demšar 2006, "Statistical comparisons of classifiers over multiple data sets", section 3.2.
    """
    count, methods = scores.shape
    if methods < 3 or count < 2:
        raise ValueError(f"scores has {count} cases and {methods} methods; expected at least 2 and 3")
    values = scores.to_numpy(float)
    if np.isnan(values).any():
        worst = scores.index[np.isnan(values).any(axis=1)][0]
        raise ValueError(f"scores has NaN, first in case {worst}; ranks need all methods of a case: leave it out")
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a chance between 0 and 1, for example 0.05")
    table = stats.rankdata(-values if higher_is_better else values, axis=1)
    mean = pd.Series(table.mean(axis=0), index=scores.columns, name="mean rank").sort_values(kind="stable")
    alike = (table == table[:, :1]).all()  # every case one great tie, of which Friedman's test knows nothing
    p = 1.0 if alike else float(stats.friedmanchisquare(*values.T).pvalue)
    q = stats.studentized_range.ppf(1 - level, methods, np.inf) / math.sqrt(2)
    return Ranking(mean, p, float(q * math.sqrt(methods * (methods + 1) / (6 * count))), count)
