"""Correlations against scipy, and the paired comparison of two of them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from harness.comparing.quality import outcome_of
from harness.derive import baseline_records
from harness.errors import NumericalFailure
from harness.evaluate.correlation import compare_correlations, correlation, correlation_draws
from harness.records import Item

RNG = np.random.default_rng(0)
SCORES = RNG.integers(0, 6, size=200).astype(float)  # with many ties
GOOD = SCORES + RNG.normal(size=200)
WORSE = SCORES + 3 * RNG.normal(size=200)
BY_SCIPY = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_the_coefficients_are_those_of_scipy(kind):
    expected = BY_SCIPY[kind](GOOD, SCORES)[0]
    assert correlation(kind, GOOD, SCORES) == pytest.approx(expected, abs=1e-12)
    chosen = RNG.integers(0, 200, size=(20, 200))
    draws = correlation_draws(kind, GOOD, SCORES, chosen)
    assert draws == pytest.approx([BY_SCIPY[kind](GOOD[i], SCORES[i])[0] for i in chosen], abs=1e-12)


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_equal_values_correlate_with_nothing(kind):
    with pytest.raises(NumericalFailure, match="equal"):
        correlation(kind, np.ones(9), SCORES[:9])
    with pytest.raises(NumericalFailure, match="equal"):
        compare_correlations(kind, GOOD[:9], np.ones(9), SCORES[:9])
    assert correlation_draws(kind, np.ones(9), SCORES[:9], np.zeros((2, 9), dtype=int)).tolist() == [0, 0]


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_a_comparison_is_paired(kind):
    found = compare_correlations(kind, GOOD, WORSE, SCORES)
    expected = BY_SCIPY[kind](WORSE, SCORES)[0] - BY_SCIPY[kind](GOOD, SCORES)[0]
    assert found.difference.value == pytest.approx(expected, abs=1e-12)
    assert found.difference.lower < expected < found.difference.upper < 0
    assert found.p < 1e-3
    again = compare_correlations(kind, GOOD, GOOD, SCORES)
    assert tuple(again.difference) == (0, 0, 0)
    assert (again.p, again.n) == (1, 200)
    # What both get wrong alike cancels: a tiny loss that two separate intervals could never show.
    slightly = GOOD + 0.2 * RNG.normal(size=200)
    paired = compare_correlations(kind, GOOD, slightly, SCORES).difference
    bounds = [np.quantile(correlation_draws(kind, x, SCORES, RNG.integers(0, 200, size=(500, 200))), q)
              for x, q in ((GOOD, 0.025), (GOOD, 0.975))]  # fmt: skip
    assert paired.upper - paired.lower < 0.5 * (bounds[1] - bounds[0])


@pytest.mark.parametrize("kind", ["spearman", "pearson"])
def test_the_test_holds_its_level(kind):
    """Two variants of equal noise: p below 0.1 in about a tenth of the trials."""
    rng = np.random.default_rng(1)
    below = 0
    for _ in range(120):
        scores = rng.normal(size=24)
        a, b = (scores + rng.normal(size=24) for _ in range(2))
        below += compare_correlations(kind, a, b, scores).p < 0.1
    assert 3 <= below <= 23  # the binomial's 0.999 interval around 12


def items(values):
    return [Item(i, "cosine", float(v), {"target": float(SCORES[i])}) for i, v in enumerate(values)]


def test_what_is_stored_beside_a_variant():
    records = {record.metric: record for record in baseline_records(items(GOOD), items(WORSE))}
    assert set(records) == {"spearman_difference", "spearman_difference_p", "spearman_difference_detectable"}
    difference = records["spearman_difference"]
    assert difference.value == pytest.approx(
        correlation("spearman", WORSE, SCORES) - correlation("spearman", GOOD, SCORES)
    )
    assert difference.lower < difference.value < difference.upper
    assert records["spearman_difference_p"].unit == "p"
    # Four times in five, this many pairs show so much: of the order of the interval's half width.
    half = (difference.upper - difference.lower) / 2
    assert 0.8 * half < records["spearman_difference_detectable"].value < 2.5 * half


def test_compare_explains_a_correlation_by_its_items():
    value_a, value_b = (correlation("pearson", values, SCORES) for values in (GOOD, WORSE))
    found = outcome_of(items(GOOD), items(WORSE), "pearson", value_a, value_b)
    assert found.difference.value == pytest.approx(value_b - value_a)
    other = outcome_of(items(GOOD), items(WORSE)[:100], "pearson", value_a, value_b)
    assert other.name == "items"
