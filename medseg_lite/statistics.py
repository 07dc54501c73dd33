"""Comparisons of methods: the paired t-test and the mean (sd) tables of the papers, corrections when many methods are compared at
once, intervals over training runs and cases, and agreement of measurements."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
import scipy  # which imports scipy.stats, half a second's work, when it is first used

from .arrays import as_array

ALTERNATIVES = ("two-sided", "greater", "less")


@dataclass(frozen=True)
class TTest:
    """The result of `paired_t_test`; `print` it for one readable line.

    Attributes:
        t: mean difference divided by its standard error.
        p: probability of a t at least this extreme if the mean difference were 0.
        n: number of pairs used.
        mean: mean of a - b.
        low, high: 95 % confidence interval of that mean. One end is infinite for a one-sided alternative.
        alternative: "two-sided", "greater" or "less".
        dropped: number of pairs left out because one of their values was NaN.
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
    """Apply Student's t-test for paired samples: two methods on the same cases, value i of both from case i.

    With d = a - b, t = mean(d) / (sd(d) / sqrt(n)) follows a t distribution with n - 1 degrees of freedom when d is
    normal with mean 0. Kamnitsas et al. 2017 use the test two-sided on the Dice of each case.

    Args:
        a, b: one value per case, in the same order of cases.
        alternative: "two-sided" asks whether the means differ, "greater" whether that of a is larger, "less" whether it is
            smaller. Decide before you look at the values.
        nan: "raise" raises an error if a value is NaN (a surface distance to nothing). "omit" leaves such pairs out and
            counts them in the result's `dropped`.

    When all differences are 0, t is 0 and p is 1. When all differences are the same other number, t is infinite.
    """
    if alternative not in ALTERNATIVES:
        raise ValueError(f"alternative is {alternative!r}; expected one of {', '.join(map(repr, ALTERNATIVES))}")
    if nan not in ("raise", "omit"):
        raise ValueError(f"nan is {nan!r}; expected 'raise' or 'omit'")
    a, b = _as_numbers(a), _as_numbers(b)
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
    # Differences that are equal except for rounding have no spread; without this case their t would be a huge random number.
    rounding = 4 * np.finfo(float).eps * max(np.abs(a).max(), np.abs(b).max())
    if np.ptp(difference) <= rounding:
        mean = 0.0 if abs(mean) <= rounding else mean
        t = math.copysign(math.inf, mean) if mean else 0.0
        p = {"two-sided": 0.0, "greater": float(mean < 0), "less": float(mean > 0)}[alternative] if mean else 1.0
        low, high = (-math.inf if alternative == "less" else mean), (math.inf if alternative == "greater" else mean)
    else:
        test = scipy.stats.ttest_rel(a, b, alternative=alternative)
        t, p, (low, high) = test.statistic, test.pvalue, test.confidence_interval(0.95)
    return TTest(float(t), float(p), n, mean, float(low), float(high), alternative, int(missing.sum()))


def summary(table: pd.DataFrame, *, by: str | Sequence[str] = "region", decimals: int = 2) -> pd.DataFrame:
    """Return mean (standard deviation) of every metric in each group of a table from `metrics.evaluate_cohort`.

    The standard deviation is that of a sample (divided by n - 1). NaN values are left out. A cell with fewer values than its
    group has cases says so, as in `4.02 (2.54) [7/8]`.

    Args:
        table: table with one row per case and region, and metrics in columns of numbers.
        by: column or columns to group by, for example `["method", "region"]`. Groups keep the order in which they appear.
        decimals: number of digits after the point.
    """
    by = [by] if isinstance(by, str) else list(by)
    missing = [column for column in by if column not in table.columns]
    if missing:
        raise ValueError(f"the table has no column {', '.join(missing)}; it has {', '.join(map(str, table.columns))}")
    values = [c for c in table.columns.unique() if c not in (*by, "case") and _holds_numbers(table[c])]
    if not len(values) or not len(table):
        raise ValueError("the table has no column of numbers to summarise" if len(table) else "the table has no rows")
    table = table.assign(**{c: _as_numbers(table[c]) for c in values})
    groups = table.groupby(by, sort=False, dropna=False)
    result = groups[values].agg(lambda column: _mean_sd(column, decimals))
    result.insert(0, "n", groups.size())
    return result


def _holds_numbers(column: pd.Series) -> bool:
    """Return whether a column has numbers only, NaN aside, whatever its type says: joined tables often have columns of objects."""
    if column.dtype != object:
        return pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column)
    known = column.dropna()
    return len(known) > 0 and all(isinstance(v, numbers.Number) and not isinstance(v, (bool, np.bool_)) for v in known)


def _as_numbers(values: Sequence[float]) -> np.ndarray:
    """Return numbers of any type as float64, missing ones as NaN."""
    if isinstance(values, pd.Series):
        return pd.to_numeric(values).to_numpy(float, na_value=np.nan)
    return as_array(values).astype(float)


def _mean_sd(column: pd.Series, decimals: int) -> str:
    known = column.dropna()
    if known.empty:
        return "–"
    spread = f"{known.std():.{decimals}f}" if len(known) > 1 else "–"
    share = f" [{len(known)}/{len(column)}]" if len(known) < len(column) else ""
    return f"{known.mean():.{decimals}f} ({spread}){share}"


# ---------------------------------------------------------------------------------------------------- many comparisons


def holm(p_values: Sequence[float]) -> np.ndarray:
    """Adjust p-values for their number.

    If you call adjusted p-values of at most α significant, the probability of one or more false calls is at most α. With m tests
    and the p-values sorted, p_(1) ≤ … ≤ p_(m), the adjusted value is p̃_(k) = max over j ≤ k of min(1, (m - j + 1) p_(j)). The
    method needs no assumption about how the tests depend on each other, and is never less powerful than Bonferroni's m p.

    Args:
        p_values: one p-value for each test, in any order.

    Returns:
        The adjusted p-values, in the same order.

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
    """Apply `paired_t_test` to every two methods, with Holm's correction for the number of tests.

    Args:
        scores: table with one row for each case and one column for each method.
        nan: "raise" or "omit" for NaN, as in `paired_t_test`, for each pair of methods separately.

    Returns:
        One row for each pair of methods, in the order of the columns: `a`, `b`, the mean difference a - b as `mean`, its 95 %
        confidence interval `low` to `high` (for this pair alone, not corrected), `p`, `p_holm`, the numbers of cases in which a is
        higher (`wins`) and lower (`losses`), and the number of pairs of values used, `n`.
    """
    if scores.shape[1] < 2 or not scores.columns.is_unique:
        raise ValueError(
            f"scores has the columns {', '.join(map(str, scores.columns))}; expected a column each for two methods or more"
        )
    scores, rows = scores.apply(_as_numbers), []
    for a, b in combinations(scores.columns, 2):
        test, difference = paired_t_test(scores[a], scores[b], nan=nan), scores[a] - scores[b]
        wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
        rows.append((a, b, test.mean, test.low, test.high, test.p, wins, losses, test.n))
    table = pd.DataFrame(rows, columns=["a", "b", "mean", "low", "high", "p", "wins", "losses", "n"])
    table.insert(6, "p_holm", holm(table["p"]))
    return table


@dataclass(frozen=True)
class Ranking:
    """The result of `ranks`.

    Attributes:
        mean: mean rank of each method over the cases, best (near 1) first.
        p: probability of mean ranks at least this unequal if all methods were alike (Friedman's test).
        critical: critical difference. Two methods whose mean ranks differ by more are different at the chosen level (Nemenyi's
            test).
        n: number of cases.
    """

    mean: pd.Series
    p: float
    critical: float
    n: int


def ranks(scores: pd.DataFrame, *, higher_is_better: bool = True, level: float = 0.05) -> Ranking:
    """Rank the methods within each case, and test whether the mean ranks differ by more than chance.

    Ranks ignore the size of a difference, so that one disaster counts no more than any other last place. Equal values share
    the mean of their ranks.

    Args:
        scores: table with one row for each case and one column for each of three methods or more, without NaN.
        higher_is_better: whether a higher score is better; False for distances.
        level: significance level of Nemenyi's test, for all pairs of methods together. The critical difference is
            q √(k (k + 1) / 6 n) for k methods and n cases, where q is the studentized range's quantile divided by √2.

    Source: Demšar 2006, "Statistical comparisons of classifiers over multiple data sets", section 3.2.
    """
    count, methods = scores.shape
    if methods < 3 or count < 2:
        raise ValueError(f"scores has {count} cases and {methods} methods; expected at least 2 and 3")
    values = scores.apply(_as_numbers).to_numpy(float)
    if np.isnan(values).any():
        worst = scores.index[np.isnan(values).any(axis=1)][0]
        raise ValueError(f"scores has NaN, first in case {worst}; ranks need all methods of a case: leave it out")
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a probability between 0 and 1, for example 0.05")
    table = scipy.stats.rankdata(-values if higher_is_better else values, axis=1)
    mean = pd.Series(table.mean(axis=0), index=scores.columns, name="mean rank").sort_values(kind="stable")
    alike = (table == table[:, :1]).all()  # a tie in every case, for which Friedman's test is undefined
    p = 1.0 if alike else float(scipy.stats.friedmanchisquare(*values.T).pvalue)
    q = scipy.stats.studentized_range.ppf(1 - level, methods, np.inf) / math.sqrt(2)
    return Ranking(mean, p, float(q * math.sqrt(methods * (methods + 1) / (6 * count))), count)


# ------------------------------------------------------------------------------------------------- runs, cases, agreement


@dataclass(frozen=True)
class Interval:
    """The result of `two_way`; `print` it for one readable line.

    Attributes:
        mean: mean over runs and cases, or the difference of two such means.
        low, high: the interval around it.
        runs: number of training runs; of two methods, that of the one with fewer.
        cases: number of cases.
        level: share of repeated studies whose interval holds the true mean.
    """

    mean: float
    low: float
    high: float
    runs: int
    cases: int
    level: float = 0.95

    @property
    def decided(self) -> bool:
        """The answer to whether the interval leaves 0 out, so that the sign of a difference is known."""
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return (
            f"{self.mean:+.4g} ({self.level:.0%} interval {self.low:+.4g} to {self.high:+.4g} "
            f"over {self.runs} runs and {self.cases} cases)"
        )


def two_way(a, b=None, *, level: float = 0.95, draws: int = 4000, seed: int = 0) -> Interval:
    """Estimate the mean score of a method over its training runs and over cases, or the difference of two methods.

    Another seed and other patients would both have given other scores, so the bootstrap draws both again. The runs of two methods are
    drawn apart: run 1 of one has nothing to do with run 1 of the other. The cases are drawn once for both, because both methods
    segment the same patients. Of n runs or cases each draw takes n − 1 with replacement, which makes the variance of their mean
    unbiased. The quantiles of the draws are stretched by Student's t over the normal quantile, because three runs know their own
    spread badly.

    Args:
        a: scores `(runs, cases)` of a method.
        b: scores of a rival on the same cases, which may have another number of runs. None estimates the mean of `a`.
        level: share of repeated studies whose interval shall hold the true mean.
        draws: number of draws of the bootstrap.
        seed: seed of the draws.

    Raises:
        ValueError: fewer than two runs or cases, other cases in `b`, or a NaN.
    """
    tables = [_as_scores(scores, name) for scores, name in ((a, "a"), (b, "b")) if scores is not None]
    cases = tables[0].shape[1]
    if tables[-1].shape[1] != cases:
        raise ValueError(f"a has {cases} cases and b {tables[-1].shape[1]}; expected the same cases in both")
    if not 0 < level < 1:
        raise ValueError(f"level={level}; expected a share between 0 and 1, for example 0.95")
    rng = np.random.default_rng(seed)
    signs = (1, -1)[: len(tables)]
    mean = sum(sign * table.mean() for sign, table in zip(signs, tables))

    columns = rng.multinomial(cases - 1, np.full(cases, 1 / cases), draws) / (cases - 1)
    drawn, variance, freedom = np.zeros(draws), 0.0, 0.0
    for sign, table in zip(signs, tables):
        runs = len(table)
        rows = rng.multinomial(runs - 1, np.full(runs, 1 / runs), draws) / (runs - 1)
        drawn += sign * np.einsum("dr,rc,dc->d", rows, table, columns, optimize=True)
        part = table.mean(axis=1).var(ddof=1) / runs
        variance, freedom = variance + part, freedom + part**2 / (runs - 1)
    part = sum(sign * table.mean(axis=0) for sign, table in zip(signs, tables)).var(ddof=1) / cases
    variance, freedom = variance + part, freedom + part**2 / (cases - 1)
    tail = (1 - level) / 2
    low, high = np.quantile(drawn - mean, [tail, 1 - tail])
    # Welch and Satterthwaite's degrees of freedom of a sum of variances.
    stretch = scipy.stats.t.ppf(1 - tail, variance**2 / freedom) / scipy.stats.norm.ppf(1 - tail) if freedom else 1.0
    low, high = mean + stretch * low, mean + stretch * high
    return Interval(float(mean), float(low), float(high), min(map(len, tables)), cases, level)


def noise_floor(runs) -> float:
    """Return the largest difference between mean scores of runs that differ by nothing that matters.

    Train a baseline several times from the same start, with weights changed by a millionth (`training.perturb_weights`). What their
    scores differ by is rounding that has grown. An effect that is not clearly larger shows nothing.

    Args:
        runs: scores `(runs, cases)`.
    """
    means = _as_scores(runs, "runs").mean(axis=1)
    return float(means.max() - means.min())


@dataclass(frozen=True)
class Agreement:
    """The result of `bland_altman`; `print` it for one readable line.

    Attributes:
        bias: mean of measured − reference.
        low, high: limits of agreement, bias ± 1.96 standard deviations. About 95 % of single differences lie between them.
        trend: rank correlation of the difference with the mean of both. Below 0, large objects are measured too small or small ones
            too large, which a bias near 0 hides.
        p: probability of a trend at least this strong if there were none.
        n: number of cases.
    """

    bias: float
    low: float
    high: float
    trend: float
    p: float
    n: int

    def __str__(self) -> str:
        return (
            f"bias {self.bias:+.3g} (limits of agreement {self.low:+.3g} to {self.high:+.3g}), "
            f"trend with size {self.trend:+.2f} (p = {self.p:.2g}), n = {self.n}"
        )


def bland_altman(measured: Sequence[float], reference: Sequence[float]) -> Agreement:
    """Compare two measurements of one quantity, such as lesion volumes by a network and by hand.

    Two measurements may be closely correlated and still disagree. So look at their difference, and at whether it depends on the size.

    Args:
        measured, reference: one value for each case, in the same unit and order, without NaN. At least three cases.

    Source: Bland and Altman 1986, "Statistical methods for assessing agreement between two methods of clinical measurement".
    """
    measured, reference = _as_numbers(measured), _as_numbers(reference)
    if measured.ndim != 1 or measured.shape != reference.shape or len(measured) < 3:
        raise ValueError(
            f"measured has shape {measured.shape} and reference {reference.shape}; expected the same three cases or more"
        )
    if not (np.isfinite(measured).all() and np.isfinite(reference).all()):
        raise ValueError("measured or reference holds values that are not finite; leave those cases out of both, and say so")
    difference, size = measured - reference, (measured + reference) / 2
    bias, spread = float(difference.mean()), float(difference.std(ddof=1))
    constant = np.ptp(difference) == 0 or np.ptp(size) == 0
    trend, p = (0.0, 1.0) if constant else map(float, scipy.stats.spearmanr(size, difference))
    return Agreement(bias, bias - 1.96 * spread, bias + 1.96 * spread, trend, p, len(difference))


def _as_scores(scores, name: str) -> np.ndarray:
    """Return scores as `(runs, cases)`, after a check."""
    scores = as_array(scores).astype(float)
    if scores.ndim != 2 or min(scores.shape) < 2:
        raise ValueError(f"{name} has shape {scores.shape}; expected (runs, cases) with at least two of each")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} holds scores that are not finite; leave those cases out of all runs, and say so")
    return scores
