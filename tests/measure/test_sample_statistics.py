"""From readings to a value with an interval."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from harness.errors import ConfigError, NumericalFailure
from harness.measure.latency import tokens_per_second
from harness.measure.statistics import (
    median_draws,
    percentiles,
    record_from_samples,
    speedup,
    summarize,
)


def test_median_and_percentiles_are_those_of_the_readings():
    readings = [0.5, 0.1, 0.4, 0.2, 0.3]
    summary = summarize(readings)
    assert summary.median == summary.p50 == statistics.median(readings)
    assert summary.n == 5
    assert summary.p10 == pytest.approx(0.14)  # linear interpolation between 0.1 and 0.2
    assert summary.p90 == pytest.approx(0.46)
    assert summary.p99 == pytest.approx(0.496)


def test_percentiles_have_names_and_draws_the_spread_of_a_median():
    readings = list(range(1, 102))
    assert percentiles(readings) == {"p10": 11.0, "p50": 51.0, "p90": 91.0, "p99": 100.0}
    draws = median_draws(readings, np.random.default_rng(0), 3000)
    assert draws.shape == (3000,)
    # Of a uniform distribution of width 101: standard error 101 / (2 sqrt(n)).
    assert draws.std() == pytest.approx(101 / (2 * math.sqrt(101)), rel=0.1)


def test_the_interval_agrees_with_a_bootstrap_written_out():
    generator = random.Random(7)
    readings = [generator.lognormvariate(0.0, 0.5) for _ in range(41)]
    medians = sorted(statistics.median(generator.choices(readings, k=len(readings))) for _ in range(4000))
    summary = summarize(readings)
    spread = medians[-100] - medians[100]
    assert summary.lower == pytest.approx(medians[100], abs=0.15 * spread)
    assert summary.upper == pytest.approx(medians[-100], abs=0.15 * spread)
    assert summary.lower <= summary.median <= summary.upper


def test_the_interval_covers_the_true_median_about_95_times_in_100():
    generator = np.random.default_rng(0)
    true_median = 1.0
    covered = 0
    for _ in range(200):
        summary = summarize(generator.lognormal(0.0, 0.4, 25).tolist())
        covered += summary.lower <= true_median <= summary.upper
    assert 180 <= covered <= 199


def test_the_same_readings_give_the_same_interval():
    readings = np.random.default_rng(1).random(50).tolist()
    assert summarize(readings) == summarize(readings)


def test_many_readings_are_resampled_in_pieces():
    readings = np.random.default_rng(2).normal(10.0, 1.0, 30_000).tolist()
    summary = summarize(readings)
    standard_error = 1.2533 / math.sqrt(30_000)  # of the median of a normal distribution
    assert summary.upper - summary.lower == pytest.approx(2 * 1.96 * standard_error, rel=0.2)


def test_one_reading_has_no_interval():
    summary = summarize([3.0])
    assert (summary.median, summary.lower, summary.upper, summary.n) == (3.0, None, None, 1)


def test_no_or_broken_readings_are_refused():
    with pytest.raises(ConfigError, match="no readings"):
        summarize([])
    with pytest.raises(ConfigError, match="prefill_latency: there are no readings"):
        record_from_samples("prefill_latency", "s", [])
    with pytest.raises(NumericalFailure, match="decode_latency: a reading is NaN"):
        record_from_samples("decode_latency", "s", [1.0, math.nan])


def test_a_record_keeps_every_reading_in_its_unit():
    record = record_from_samples(
        "decode_latency", "ms", [0.001, 0.003, 0.002], mode="graph", note="why", scale=1000
    )
    assert record.samples == (1.0, 3.0, 2.0)
    assert record.value == 2.0
    assert (record.unit, record.n, record.mode, record.note) == ("ms", 3, "graph", "why")
    assert record.lower >= 1.0
    assert record.upper <= 3.0


def test_a_latency_that_is_not_positive_was_not_measured():
    # Decode time as the difference of two noisy totals goes negative; it must never be stored.
    with pytest.raises(NumericalFailure, match=r"a measured time must be positive, not -0\.01"):
        record_from_samples("decode_latency", "s", [0.02, -0.01, 0.03])
    assert record_from_samples("probe_output_change", "1", [-0.5, 0.5]).value == 0.0


def test_speedup_is_a_ratio_and_not_its_inverse_in_percent():
    assert speedup(2.95, 1.0) == pytest.approx(2.95)
    assert speedup(2.95, 1.0) != pytest.approx(1.3389)  # "+33.89 %" is 1 / 2.95 read as a gain
    assert speedup(1.0, 2.0) == 0.5
    for wrong in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match="positive number of seconds"):
            speedup(1.0, wrong)


def test_throughput_counts_tokens_and_not_samples():
    # Eight prompts of 128 tokens in half a second: 2048 tokens/s, and not 16 samples/s.
    assert tokens_per_second(0.5, tokens=8 * 128) == 2048.0
