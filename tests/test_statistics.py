"""The tests and rankings against hand-computed numbers and SciPy; the summary table by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medseg_lite.statistics import bland_altman, holm, noise_floor, paired_t_test, pairwise, ranks, summary, two_way

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
    pairs=st.lists(st.tuples(*[st.floats(-100, 100)] * 2), min_size=2, max_size=20), alternative=st.sampled_from(ALTERNATIVES)
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


def test_holm_by_hand():
    # Sorted .01, .02, .03, .04 times 4, 3, 2, 1 is .04, .06, .06, .04, and no later one may be smaller.
    np.testing.assert_allclose(holm([0.04, 0.01, 0.03, 0.02]), [0.06, 0.04, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.6, 0.7]), [1, 1])
    assert holm([0.03]).tolist() == [0.03] and holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
@settings(max_examples=100, deadline=None)
def test_holm_decides_as_the_stepwise_procedure(p):
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(np.multiply(len(p), p), 1) + 1e-12).all()
    for level in (0.05, 0.2):
        rejected, left = set(), sorted(range(len(p)), key=lambda i: p[i])
        while left and p[left[0]] * len(left) <= level:
            rejected.add(left.pop(0))
        assert rejected == {i for i, value in enumerate(adjusted) if value <= level}


@pytest.mark.parametrize("p", [[0.1, 1.2], [-0.1], [np.nan], [[0.1]]])
def test_holm_names_bad_input(p):
    with pytest.raises(ValueError, match="numbers from 0 to 1"):
        holm(p)


SCORES = pd.DataFrame(
    {"good": [0.9, 0.8, 0.95, 0.7], "fair": [0.85, 0.82, 0.9, 0.6], "poor": [0.5, 0.4, 0.45, 0.2]},
    index=[f"case {i}" for i in range(4)],
)


def test_pairwise_is_every_pairs_test():
    table = pairwise(SCORES)
    assert list(zip(table.a, table.b)) == [("good", "fair"), ("good", "poor"), ("fair", "poor")]
    for row in table.itertuples():
        theirs = stats.ttest_rel(SCORES[row.a], SCORES[row.b])
        interval = theirs.confidence_interval(0.95)
        np.testing.assert_allclose([row.p, row.low, row.high], [theirs.pvalue, interval.low, interval.high])
    np.testing.assert_allclose(table.p_holm, holm(table.p))
    assert table.loc[0, ["wins", "losses", "n"]].tolist() == [3, 1, 4]


def test_pairwise_leaves_out_nan_pair_by_pair():
    scores = SCORES.copy()
    scores.loc["case 3", "poor"] = np.nan
    with pytest.raises(ValueError, match="omit"):
        pairwise(scores)
    assert pairwise(scores, nan="omit").n.tolist() == [4, 3, 3]
    with pytest.raises(ValueError, match="two methods or more"):
        pairwise(SCORES[["good"]])


def test_ranks_by_hand():
    # fair wins one case of four, poor is always last: mean ranks 1.25, 1.75, 3.
    ranking = ranks(SCORES)
    assert ranking.mean.to_dict() == {"good": 1.25, "fair": 1.75, "poor": 3.0} and ranking.n == 4
    # Friedman: 12 n / (k (k + 1)) (sum of squared mean ranks - k (k + 1)² / 4) = 6.5, with 2 degrees of freedom exp(-6.5 / 2).
    assert ranking.p == pytest.approx(math.exp(-6.5 / 2))
    assert ranks(-SCORES, higher_is_better=False).mean.equals(ranking.mean)


@pytest.mark.parametrize(("methods", "q"), [(3, 2.343), (5, 2.728), (10, 3.164)])
def test_critical_difference_is_of_the_published_table(methods, q):  # Demsar 2006, table 5a
    scores = pd.DataFrame(np.random.default_rng(0).random((30, methods)))
    assert ranks(scores).critical == pytest.approx(q * math.sqrt(methods * (methods + 1) / 180), rel=1e-3)


def test_ranks_of_ties_and_bad_input():
    same = ranks(SCORES.assign(fair=SCORES.good, poor=SCORES.good))
    assert same.mean.tolist() == [2, 2, 2] and same.p == 1
    with pytest.raises(ValueError, match="at least 2 and 3"):
        ranks(SCORES[["good", "fair"]])
    with pytest.raises(ValueError, match="first in case case 2"):
        ranks(SCORES.where(SCORES.poor != 0.45))
    with pytest.raises(ValueError, match="level=5"):
        ranks(SCORES, level=5)


# ------------------------------------------------------------------------------------------------- numbers of any type

VALUES = [0.5, 0.25, 0.75, 0.125]
TYPES = {
    "objects": lambda v: pd.Series(v, dtype=object),
    "float16": lambda v: pd.Series(v, dtype="float16"),
    "float32": lambda v: pd.Series(v, dtype="float32"),
    "nullable": lambda v: pd.Series(v, dtype="Float64"),
    "NumPy's numbers": lambda v: pd.Series([np.float32(x) for x in v], dtype=object),
    "mixed": lambda v: pd.Series([v[0], *map(np.float64, v[1:])], dtype=object),
}


@pytest.mark.parametrize("kind", TYPES)
def test_columns_of_any_type(kind):
    column, other = TYPES[kind](VALUES), TYPES[kind](VALUES[::-1])
    table = pd.DataFrame({"case": list("abcd"), "region": ["x", "x", "y", "y"], "dice": column})
    pd.testing.assert_frame_equal(summary(table), summary(table.assign(dice=VALUES)))
    assert paired_t_test(column, other) == paired_t_test(VALUES, VALUES[::-1])
    scores, plain = pd.DataFrame({"a": column, "b": other}), pd.DataFrame({"a": VALUES, "b": VALUES[::-1]})
    pd.testing.assert_frame_equal(pairwise(scores), pairwise(plain))
    three = {"c": [0.1, 0.2, 0.3, 0.9]}
    pd.testing.assert_series_equal(ranks(scores.assign(**three)).mean, ranks(plain.assign(**three)).mean)


def test_missing_values_of_any_type():
    for column in (pd.Series([1.0, None, 3.0], dtype=object), pd.Series([1, pd.NA, 3], dtype="Int64"), [1.0, None, 3.0]):
        assert paired_t_test(column, [0.0, 0.0, 1.0], nan="omit").n == 2
    table = pd.DataFrame({"region": ["x"] * 3, "dice": pd.Series([1, pd.NA, 3], dtype="Int64"), "note": ["1", "2", "3"]})
    assert summary(table).loc["x"].tolist() == [3, "2.00 (1.41) [2/3]"]  # and notes are no numbers
    assert paired_t_test(torch.tensor([1.0, 2.0]), [0.0, 0.0]).mean == 1.5


def test_unsigned_numbers_do_not_wrap_around():
    scores = pd.DataFrame({"a": np.array([1, 2, 3], np.uint8), "b": np.array([2, 3, 5], np.uint8)})
    row = pairwise(scores).iloc[0]
    assert (row["wins"], row["losses"]) == (0, 3) and row["mean"] == pytest.approx(-4 / 3)
    flags = pd.DataFrame({"a": [True, False, True], "b": [False, False, True]})
    assert pairwise(flags).iloc[0]["wins"] == 1


def test_a_group_without_a_name_is_not_lost():
    table = pd.DataFrame({"region": ["x", None, None], "dice": [1.0, 2.0, 4.0]})
    assert summary(table)["dice"].tolist() == ["1.00 (–)", "3.00 (1.41)"]


# ------------------------------------------------------------------------------------------------- runs, cases, agreement


def made_up(rng, runs: int, cases: int, *, of_runs: float, of_cases: float, rest: float = 0.3):
    """Scores with mean 0 that vary by run, by case, and by both; the cases' part is returned to be shared with a rival."""
    shared = rng.normal(0, of_cases, (1, cases))
    return lambda: shared + rng.normal(0, of_runs, (runs, 1)) + rng.normal(0, rest, (runs, cases))


@pytest.mark.parametrize(("of_runs", "of_cases"), [(1.0, 0.1), (0.1, 1.0), (0.5, 0.5)])
def test_the_interval_over_runs_and_cases_holds_the_truth_as_often_as_it_says(of_runs, of_cases):
    rng, held, studies = np.random.default_rng(0), 0, 300
    for number in range(studies):
        draw = made_up(rng, 3, 15, of_runs=of_runs, of_cases=of_cases)
        held += (result := two_way(draw(), draws=400, seed=number)).low < 0 < result.high
    assert 0.9 <= held / studies <= 0.995


def test_cases_are_paired_and_runs_are_not():
    rng = np.random.default_rng(1)
    draw = made_up(rng, 5, 20, of_runs=0.05, of_cases=5.0, rest=0.05)
    a, b = draw() + 0.3, draw()
    result = two_way(a, b)
    assert result.decided and result.mean == pytest.approx((a - b).mean())  # the cases' large spread cancels
    assert not two_way(a).decided
    nobody = two_way(b[::-1], b)  # the order of runs means nothing
    assert nobody.low < 0 < nobody.high and "over 5 runs and 20 cases" in str(nobody)
    shuffled = two_way(a[rng.permutation(5)], b)
    assert (shuffled.low, shuffled.high) == pytest.approx((result.low, result.high), abs=0.03)


def test_more_cases_do_not_make_up_for_few_runs():
    rng = np.random.default_rng(2)
    widths = []
    for cases in (10, 1000):
        result = two_way(made_up(rng, 3, cases, of_runs=1.0, of_cases=0.1)())
        widths.append(result.high - result.low)
    assert widths[1] > 1 and two_way(np.ones((3, 4))).low == 1


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (np.ones(3), None, r"a has shape \(3,\)"),
        (np.ones((1, 5)), None, "at least two of each"),
        (np.ones((2, 5)), np.ones((2, 4)), "a has 5 cases and b 4"),
        (np.full((2, 5), np.nan), None, "not finite"),
    ],
)
def test_two_way_refuses(a, b, message):
    with pytest.raises(ValueError, match=message):
        two_way(a, b)
    with pytest.raises(ValueError, match="level=95"):
        two_way(np.eye(3), level=95)


def test_noise_floor():
    assert noise_floor([[0.5, 0.7], [0.6, 0.8], [0.55, 0.75]]) == pytest.approx(0.1)


def test_agreement_by_hand():
    # Differences 1, -1, 3: mean 1, sd 2.
    result = bland_altman([2.0, 4.0, 9.0], [1.0, 5.0, 6.0])
    assert (result.bias, result.low, result.high) == pytest.approx((1, 1 - 3.92, 1 + 3.92))
    assert "bias +1 (limits of agreement -2.92 to +4.92)" in str(result)


def test_a_bias_near_zero_can_hide_a_trend():
    truth = np.linspace(10, 100, 19)
    shrunk = 55 + 0.6 * (truth - 55)  # small ones too large, large ones too small
    result = bland_altman(shrunk, truth)
    assert abs(result.bias) < 1e-9 and result.trend == pytest.approx(-1) and result.p < 1e-6
    assert bland_altman(truth, truth).trend == 0


@pytest.mark.parametrize("measured", [[1.0, 2.0], [1.0, np.nan, 2.0], [1.0, 2.0, 3.0, 4.0]])
def test_agreement_refuses(measured):
    with pytest.raises(ValueError):
        bland_altman(measured, [1.0, 2.0, 3.0])
