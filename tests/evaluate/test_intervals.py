"""Bootstrap draws against the standard errors of theory."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.special import xlogy

from harness.evaluate.intervals import (
    bootstrap_statistic,
    bootstrap_weighted_mean,
    changed_share,
    generator,
    percentile_interval,
    sum_of_independent,
    wilson,
)


def test_bootstrap_of_a_mean_has_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, size=300)
    draws = bootstrap_weighted_mean(values, generator(0, "x"), resamples=4000)
    assert np.mean(draws) == pytest.approx(values.mean(), abs=0.02)
    assert np.std(draws) == pytest.approx(values.std() / np.sqrt(300), rel=0.05)
    lower, upper = percentile_interval(draws)
    assert upper - lower == pytest.approx(2 * 1.96 * values.std() / np.sqrt(300), rel=0.06)


def test_bootstrap_of_a_weighted_mean_is_that_of_the_ratio():
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 50, size=80).astype(float)
    values = rng.normal(size=80) + weights / 25
    mean = np.average(values, weights=weights)
    # The delta method for a ratio of sums.
    expected = np.sqrt(np.sum((weights * (values - mean)) ** 2)) / weights.sum()
    draws = bootstrap_weighted_mean(values, generator(0, "x"), weights, resamples=4000)
    assert np.std(draws) == pytest.approx(expected, rel=0.06)
    assert np.mean(draws) == pytest.approx(mean, abs=0.03)


def test_bootstrap_of_any_statistic():
    values = [1.0, 2.0, 4.0, 8.0]
    draws = bootstrap_statistic(values, max, generator(0, "x"), resamples=2000)
    # The largest of n is missed with probability (1 - 1/n)^n.
    assert np.mean(draws == 8.0) == pytest.approx(1 - 0.75**4, abs=0.03)


def test_draws_depend_on_seed_and_name_alone():
    first = generator(0, "acc").random(3).tolist()
    assert generator(0, "acc").random(3).tolist() == first
    assert generator(1, "acc").random(3).tolist() != first
    assert generator(0, "nll").random(3).tolist() != first


def test_large_samples_are_drawn_in_pieces(monkeypatch):
    monkeypatch.setattr("harness.evaluate.intervals._DRAWS_AT_ONCE", 100)
    draws = bootstrap_weighted_mean(np.arange(30.0), generator(0, "x"), resamples=50)
    assert draws.shape == (50,)
    assert np.all((draws > 0) & (draws < 29))


def test_sides_of_independent_readings_are_added_in_squares():
    """A lopsided reading, alone, turned round by its weight, and with another."""
    lopsided = (10.0, 7.0, 14.0)
    assert sum_of_independent([(*lopsided, 1.0)]) == pytest.approx(lopsided)
    assert sum_of_independent([(*lopsided, -2.0)]) == pytest.approx((-20.0, -28.0, -14.0))
    value, lower, upper = sum_of_independent([(*lopsided, 1.0), (5.0, 1.0, 8.0, -1.0)])
    assert (value, lower, upper) == pytest.approx((5.0, 5.0 - np.hypot(3, 3), 5.0 + np.hypot(4, 4)))
    assert sum_of_independent([]) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize("n", [1, 10, 1500])
def test_no_changed_item_is_as_uncertain_as_no_success(n):
    lower, upper = changed_share(0, 0, n)
    assert (-lower, upper) == pytest.approx([wilson(0, n)[1]] * 2)


@pytest.mark.parametrize(("lost", "won", "n"), [(0, 1, 10), (3, 9, 100), (9, 0, 44), (0, 6, 6), (2, 2, 5)])
def test_a_changed_share_is_bounded_where_the_score_test_turns(lost, won, n):
    """By the definition: the likelihood of the shares given the difference, maximised by brute force."""
    z = stats.norm.ppf(0.975)

    def square(difference):
        shares = np.linspace(max(0, -difference), (1 - difference) / 2, 200_001)[1:-1]  # of lost items
        with np.errstate(divide="ignore", invalid="ignore"):
            kept = 1 - 2 * shares - difference
            fit = xlogy(lost, shares) + xlogy(won, shares + difference) + xlogy(n - lost - won, kept)
        share = shares[np.argmax(fit)]
        return (won - lost - n * difference) ** 2 / (n * (2 * share + difference * (1 - difference)))

    for bound in changed_share(lost, won, n):
        if abs(bound) < 1:
            assert square(bound) == pytest.approx(z**2, rel=2e-3)
    lower, upper = changed_share(lost, won, n)
    assert changed_share(won, lost, n) == pytest.approx((-upper, -lower))
    assert lower <= (won - lost) / n <= upper
