"""Exponents and break-even batch sizes: exact power laws, noise, and every way not to cross."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from harness.errors import ConfigError
from harness.scaling import Point, break_even, length_exponent

LENGTHS = (128, 256, 512, 1024, 2048)


def points(values, sizes, noise=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return [
        Point(size, value, value * np.exp(noise * rng.standard_normal(1000)) if noise else None)
        for size, value in zip(sizes, values, strict=True)
    ]


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.7, 2.0, -0.5])
def test_an_exact_power_law_gives_its_exponent_everywhere(exponent):
    found = length_exponent(points([3e-4 * n**exponent for n in LENGTHS], LENGTHS))
    assert found.exponent == pytest.approx(exponent, abs=1e-12)
    assert [each.exponent for each in found.local] == pytest.approx([exponent] * 4, abs=1e-12)
    assert (found.first, found.last, found.points) == (128, 2048, 5)
    assert (found.lower, found.upper) == (None, None)


def test_the_fit_is_scipys_regression_of_logarithms():
    rng = np.random.default_rng(0)
    values = [1e-4 * n**1.3 * math.exp(0.2 * rng.standard_normal()) for n in LENGTHS]
    expected = stats.linregress(np.log(LENGTHS), np.log(values)).slope
    shuffled = [points(values, LENGTHS)[index] for index in (3, 0, 4, 1, 2)]
    assert length_exponent(shuffled).exponent == pytest.approx(expected)


def test_overhead_shows_in_the_local_exponents():
    found = length_exponent(points([5e-3 + 1e-8 * n**2 for n in LENGTHS], LENGTHS))
    local = [each.exponent for each in found.local]
    assert local == sorted(local)
    assert local[0] < 0.15
    assert local[-1] > 1.5
    assert local[0] < found.exponent < local[-1]


def test_the_interval_holds_the_true_exponent_about_95_times_in_100():
    rng, covered = np.random.default_rng(1), 0
    for _ in range(400):
        true = [1e-4 * n**1.5 for n in LENGTHS]
        measured = [value * math.exp(0.03 * rng.standard_normal()) for value in true]
        drawn = [
            Point(n, value, value * np.exp(0.03 * rng.standard_normal(500)))
            for n, value in zip(LENGTHS, measured, strict=True)
        ]
        found = length_exponent(drawn)
        covered += found.lower <= 1.5 <= found.upper
    assert 0.92 < covered / 400 < 0.98


def test_an_exponent_needs_two_different_sizes_and_positive_values():
    for wrong in ([Point(8, 1.0)], [Point(8, 1.0), Point(8, 2.0)]):
        with pytest.raises(ConfigError, match="at least two sizes"):
            length_exponent(wrong)
    with pytest.raises(ConfigError, match="positive"):
        length_exponent([Point(8, 1.0), Point(16, 0.0)])


# --- break-even ---------------------------------------------------------------------------------------

BATCHES = (1, 4, 16, 64)


def test_the_crossing_is_interpolated_in_logarithms():
    # ratio = (batch / 8) ** 0.5: faster below 8, slower above, and exact in logarithms.
    (found,) = break_even(points([(b / 8) ** 0.5 for b in BATCHES], BATCHES, noise=0.02))
    assert found.outcome == "crosses"
    assert found.batch == pytest.approx(8)
    assert found.lower < 8 < found.upper
    assert found.upper / found.lower < 1.3
    assert found.better_below is True
    assert found.share == 1.0
    (reverse,) = break_even(points([(8 / b) ** 0.5 for b in BATCHES], BATCHES))
    assert (reverse.batch, reverse.better_below) == (pytest.approx(8), False)


@pytest.mark.parametrize(
    ("ratios", "outcome", "says"),
    [
        ((0.4, 0.5, 0.7, 0.9), "above", "above 64"),  # faster, and losing ground
        ((0.9, 0.7, 0.5, 0.4), "below", "below 1"),  # faster, and gaining: it was slower earlier
        ((1.1, 1.3, 1.6, 2.0), "below", "below 1"),  # slower, and getting worse
        ((2.0, 1.6, 1.3, 1.1), "above", "above 64"),  # slower, and catching up
        ((0.5, 0.7, 0.9, 1.0), "above", "above 64"),  # faster, until it is just as fast
        ((1.0, 0.9, 0.7, 0.5), "below", "below 1"),
        ((2.0, 1.6, 1.3, 1.0), "above", "above 64"),
        ((0.5, 0.5, 0.5, 0.5), "none", "none"),
    ],
)
def test_nothing_is_extrapolated(ratios, outcome, says):
    for noise in (0.0, 0.001):
        (found,) = break_even(points(ratios, BATCHES, noise))
        assert (found.outcome, str(found)) == (outcome, says)
        assert found.batch is None


def test_a_trend_within_the_noise_is_no_trend():
    (found,) = break_even(points((0.50, 0.501, 0.502, 0.503), BATCHES, noise=0.05))
    assert str(found) == "none"


def test_every_crossing_of_a_ratio_that_turns_is_reported():
    found = break_even(points((0.5, 2.0, 2.0, 0.5), BATCHES, noise=0.01))
    assert [each.better_below for each in found] == [True, False]
    assert [each.batch for each in found] == pytest.approx([2.0, 32.0])
    assert all(each.lower < each.batch < each.upper for each in found)


def test_touching_1_is_no_crossing_and_lying_on_it_is_one_at_its_start():
    (touching,) = break_even(points((0.5, 1.0, 0.8, 0.7), BATCHES))
    assert touching.batch is None
    (lying,) = break_even(points((0.5, 1.0, 1.0, 2.0), BATCHES))
    assert lying.batch == pytest.approx(4)
    (equal,) = break_even(points((1.0, 1.0), (1, 8)))
    assert str(equal) == "none"


def test_a_bound_outside_of_what_was_measured_says_so():
    (found,) = break_even(points((0.8, 0.9, 0.95, 1.01), BATCHES, noise=0.03))
    assert found.outcome == "crosses"
    assert found.upper == math.inf
    assert str(found).endswith("above 64]")
    assert 0.5 < found.share < 0.95


def test_the_interval_of_a_crossing_covers_it():
    rng, covered = np.random.default_rng(3), 0
    for _ in range(150):
        measured = [(b / 8) ** 0.3 * math.exp(0.05 * rng.standard_normal()) for b in BATCHES]
        drawn = [
            Point(b, value, value * np.exp(0.05 * rng.standard_normal(300)))
            for b, value in zip(BATCHES, measured, strict=True)
        ]
        (found,) = break_even(drawn)
        covered += found.lower <= 8 <= found.upper
    assert 0.9 < covered / 150 <= 0.99


def test_a_break_even_needs_two_batch_sizes():
    with pytest.raises(ConfigError, match="two batch sizes"):
        break_even([Point(1, 0.5)])
    with pytest.raises(ConfigError, match="positive ratios"):
        break_even([Point(1, 0.5), Point(2, 0.0)])
