"""The paired t-test against hand-computed numbers and SciPy; the summary table by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg_lite.statistics import paired_t_test, summary

ALTERNATIVES = ("two-sided", "greater", "less")


def test_by_hand():
    # Differences 1, 2, 3: mean 2, sd 1, standard error 1 / sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom.
    result = paired_t_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert result.t == pytest.approx(2 * math.sqrt(3))
    assert result.mean == 2 and result.n == 3 and result.dropped == 0
    # With 2 degrees of freedom P(|T| > t) = 1 - t / sqrt(2 + t²), and the 97.5 % quantile is 4.302653.
    assert result.p == pytest.approx(1 - math.sqrt(12) / math.sqrt(14))
    assert result.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-6)
    assert result.high == pytest.approx(2 + 4.302653 / math.sqrt(3), abs=1e-6)


@given(
    pairs=st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=2, max_size=20),
    alternative=st.sampled_from(ALTERNATIVES),
)
@settings(max_examples=150, deadline=None)
def test_agrees_with_scipy(pairs, alternative):
    a, b = np.array(pairs).T
    if np.ptp(a - b) < 1e-6:
        return
    ours, theirs = paired_t_test(a, b, alternative=alternative), stats.ttest_rel(a, b, alternative=alternative)
    interval = theirs.confidence_interval(0.95)
    assert ours.t == pytest.approx(theirs.statistic, rel=1e-6, abs=1e-9)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-6, abs=1e-12)
    assert (ours.low, ours.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)


def test_one_sided_alternatives_share_the_two_sided_p():
    a, b = [0.8, 0.7, 0.9, 0.85], [0.7, 0.65, 0.85, 0.9]
    two, greater, less = (paired_t_test(a, b, alternative=x) for x in ALTERNATIVES)
    assert two.mean > 0
    assert greater.p == pytest.approx(two.p / 2) and greater.p + less.p == pytest.approx(1)
    assert greater.high == math.inf and less.low == -math.inf


@pytest.mark.parametrize("alternative", ALTERNATIVES)
def test_identical_values_are_no_evidence(alternative):
    result = paired_t_test([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], alternative=alternative)
    assert (result.t, result.p, result.mean) == (0, 1, 0)


@pytest.mark.parametrize("alternative, p", [("two-sided", 0), ("greater", 0), ("less", 1)])
def test_the_same_difference_everywhere_has_infinite_t(alternative, p):
    # 1.1 - 1.0 and 2.1 - 2.0 differ by rounding only.
    result = paired_t_test([1.1, 2.1, 3.1], [1.0, 2.0, 3.0], alternative=alternative)
    assert result.t == math.inf and result.p == p
    assert result.mean == pytest.approx(0.1)
    assert paired_t_test([1.0, 2.0], [2.0, 3.0]).t == -math.inf


def test_nan_is_an_error_unless_it_is_asked_for():
    a, b = [1.0, np.nan, 3.0, 5.0, 2.0], [0.5, 1.0, np.nan, 4.0, 1.8]
    with pytest.raises(ValueError, match=r"2 of 5 pairs hold NaN \(the first is number 1\); pass nan='omit'"):
        paired_t_test(a, b)
    result = paired_t_test(a, b, nan="omit")
    alone = paired_t_test([1.0, 5.0, 2.0], [0.5, 4.0, 1.8])
    assert (result.t, result.p, result.n, result.dropped) == (alone.t, alone.p, 3, 2)
    assert str(result).endswith("n = 3); 2 pairs with NaN left out")


def test_reads_as_a_sentence():
    assert str(paired_t_test([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])) == (
        "mean difference +2 (95 % CI -0.4841 to +4.484), t(2) = 3.46, p = 0.074 (two-sided paired t-test, n = 3)"
    )
    assert "p < 0.0001" in str(paired_t_test(np.arange(9) + np.linspace(4, 5, 9), np.arange(9)))


@pytest.mark.parametrize(
    "a, b, options, message",
    [
        ([1.0], [2.0], {}, "1 usable pair; a t-test needs at least 2"),
        ([], [], {}, "0 usable pairs"),
        ([1.0, np.nan], [1.0, 2.0], {"nan": "omit"}, "1 usable pair;"),
        ([1.0, 2.0], [1.0, 2.0, 3.0], {}, r"a has shape \(2,\) and b \(3,\)"),
        ([[1.0, 2.0]], [[1.0, 2.0]], {}, "one value per case"),
        ([1.0, np.inf], [1.0, 2.0], {}, "infinite"),
        ([1.0, 2.0], [1.0, 2.0], {"alternative": "larger"}, "alternative is 'larger'; expected one of 'two-sided'"),
        ([1.0, 2.0], [1.0, 2.0], {"nan": "drop"}, "nan is 'drop'"),
    ],
)
def test_bad_input_is_named(a, b, options, message):
    with pytest.raises(ValueError, match=message):
        paired_t_test(a, b, **options)


TABLE = pd.DataFrame(
    {
        "case": [1, 1, 2, 2, 3, 3],
        "region": ["whole", "core"] * 3,
        "dice": [0.5, 0.6, 0.7, 0.8, 0.9, 1.0],
        "assd": [1.0, np.nan, 3.0, 2.0, np.nan, np.nan],
    }
)


def test_summary_by_hand():
    table = summary(TABLE)
    assert list(table.index) == ["whole", "core"]  # in order of appearance
    assert list(table.columns) == ["n", "dice", "assd"]  # the number of a case is not a metric
    assert table.loc["whole"].tolist() == [3, "0.70 (0.20)", "2.00 (1.41) [2/3]"]
    assert table.loc["core"].tolist() == [3, "0.80 (0.20)", "2.00 (–) [1/3]"]


def test_summary_by_method_and_region():
    both = pd.concat([TABLE.assign(method="b"), TABLE.assign(method="a", dice=1.0)])
    table = summary(both, by=["method", "region"], decimals=1)
    assert table.index[0] == ("b", "whole") and len(table) == 4
    assert table.loc[("a", "core"), "dice"] == "1.0 (0.0)"


def test_summary_of_nothing_but_nan():
    assert summary(TABLE.assign(assd=np.nan)).assd.tolist() == ["–", "–"]


def test_summary_names_bad_input():
    with pytest.raises(ValueError, match="no column method; it has case, region"):
        summary(TABLE, by="method")
    with pytest.raises(ValueError, match="no rows"):
        summary(TABLE[:0])
    with pytest.raises(ValueError, match="no column of numbers"):
        summary(TABLE[["case", "region"]])
