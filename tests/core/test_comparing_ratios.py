"""On what a ratio of times rests, and what each basis is worth when the machine drifts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from harness.comparing.ratios import Reading, timing_ratio


def reading(values, mode="graph"):
    return Reading(float(np.median(values)), tuple(float(value) for value in values), mode=mode)


def noisy(value, rng, n=15, noise=0.02):
    return value * np.exp(noise * rng.standard_normal(n))


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_paired_rounds_come_first(rng):
    # The machine was half as fast beside b: the medians say 1x, the rounds 2x.
    a = {"decode_latency": reading(noisy(0.010, rng)), "control_latency": reading(noisy(1.0, rng))}
    b = {
        "decode_latency": reading(noisy(0.010, rng)),
        "control_latency": reading(noisy(2.0, rng)),
        "decode_speedup": reading(noisy(2.0, rng), mode="graph, paired"),
    }
    found = timing_ratio("decode_latency", a, b, a_is_baseline=True)
    assert (found.basis, round(found.value, 1)) == ("paired", 0.5)
    lower, upper = found.interval()
    assert lower < found.value < upper
    assert "control took 2" in found.flags[0]
    back = timing_ratio("decode_latency", b, a, b_is_baseline=True)
    assert back.value == pytest.approx(1 / found.value)
    assert back.interval() == pytest.approx((1 / upper, 1 / lower), rel=0.01)


def test_throughput_is_the_inverse_of_latency(rng):
    speedup = reading(noisy(2.0, rng), mode="graph, paired")
    a = {name: reading(noisy(5.0, rng)) for name in ("decode_throughput", "decode_latency")}
    b = {**a, "decode_speedup": speedup}
    latency = timing_ratio("decode_latency", a, b, a_is_baseline=True)
    throughput = timing_ratio("decode_throughput", a, b, a_is_baseline=True)
    assert throughput.value == pytest.approx(speedup.value)
    assert latency.value * throughput.value == pytest.approx(1)
    # The median of the draws is between readings, so that of the inverse may differ by a hair.
    assert np.quantile(throughput.draws, 0.5) * np.quantile(latency.draws, 0.5) == pytest.approx(1, rel=1e-3)


def test_two_variants_are_compared_by_the_quotient_of_their_speedups(rng):
    a = {"prefill_latency": reading([1.0] * 5), "prefill_speedup": reading(noisy(1.5, rng))}
    b = {"prefill_latency": reading([1.0] * 5), "prefill_speedup": reading(noisy(3.0, rng))}
    found = timing_ratio("prefill_latency", a, b)
    assert found.basis == "paired quotient"
    assert found.value == pytest.approx(0.5, rel=0.05)
    lower, upper = found.interval()
    assert lower < found.value < upper


def test_a_stored_interval_that_is_wider_than_the_readings_counts(rng):
    """Rounds of few captures: what they differ by, the readings cannot say."""
    samples = noisy(1.01, rng, n=40, noise=0.001)
    narrow = reading(samples, mode="compiled, paired")
    wide = replace(narrow, lower=0.99, upper=1.03)
    cell = {"decode_latency": reading(noisy(0.010, rng), mode="compiled")}
    found = [
        timing_ratio("decode_latency", cell, {**cell, "decode_speedup": each}, a_is_baseline=True).interval()
        for each in (narrow, wide)
    ]
    assert found[0][1] < 1.0, "a clear difference by the readings alone"
    assert found[1] == pytest.approx((1 / 1.03, 1 / 0.99), abs=0.01)
    assert found[1][0] < 1.0 < found[1][1]


def test_the_control_takes_the_machine_out(rng):
    a = {"decode_latency": reading(noisy(0.010, rng)), "control_latency": reading(noisy(1.0, rng))}
    b = {"decode_latency": reading(noisy(0.015, rng)), "control_latency": reading(noisy(1.5, rng))}
    found = timing_ratio("decode_latency", a, b)
    assert found.basis == "control"
    assert found.value == pytest.approx(1.0, abs=0.05)
    assert found.flags[0].startswith("beside b the control took 1.5")
    steady = {**b, "control_latency": a["control_latency"]}
    assert timing_ratio("decode_latency", a, steady).flags == ()
    fast = {"decode_throughput": reading([100.0] * 5), "control_latency": reading([1.0] * 5)}
    slow = {"decode_throughput": reading([50.0] * 5), "control_latency": reading([2.0] * 5)}
    assert timing_ratio("decode_throughput", fast, slow).value == pytest.approx(1.0)


def test_without_either_the_ratio_is_marked_unpaired(rng):
    a, b = {"decode_latency": reading(noisy(1, rng))}, {"decode_latency": reading(noisy(2, rng))}
    assert timing_ratio("decode_latency", a, b).basis == "unpaired"
    sizes = timing_ratio("weight_bytes", {"weight_bytes": Reading(4.0)}, {"weight_bytes": Reading(1.0)})
    assert (sizes.value, sizes.basis, sizes.interval()) == (0.25, "reading", (None, None))


def test_stored_bounds_are_used_where_the_rounds_were_not_kept():
    a = {"decode_latency": Reading(1.0)}
    b = {"decode_latency": Reading(1.0), "decode_speedup": Reading(2.0, lower=1.6, upper=2.5)}
    found = timing_ratio("decode_latency", a, b, a_is_baseline=True)
    assert found.interval() == pytest.approx((0.4, 0.625))
    assert timing_ratio("decode_latency", b, a, b_is_baseline=True).interval() == pytest.approx((1.6, 2.5))


def test_other_modes_are_named(rng):
    a = {"decode_latency": reading([1.0] * 5)}
    b = {
        "decode_latency": reading([1.0] * 5, mode="graph, simulated"),
        "decode_speedup": reading([1.0] * 5, mode="eager, paired"),
    }
    assert timing_ratio("decode_latency", a, b, a_is_baseline=True).flags == (
        "decode_speedup timed as eager, decode_latency as graph",
    )


@pytest.mark.parametrize("basis", ["paired", "paired quotient", "control", "unpaired"])
def test_intervals_cover_the_truth_and_drift_breaks_only_the_unpaired_one(basis):
    """Each side is timed while the machine runs at its own speed, unknown to the comparison."""
    rng = np.random.default_rng(7)
    covered, true = 0, 0.8
    for _ in range(120):
        mood_a, mood_b = np.exp(0.2 * rng.standard_normal(2))
        a = {"decode_latency": reading(noisy(1.0 * mood_a, rng))}
        b = {"decode_latency": reading(noisy(true * mood_b, rng))}
        if basis == "control":
            a["control_latency"] = reading(noisy(mood_a, rng))
            b["control_latency"] = reading(noisy(mood_b, rng))
        if basis.startswith("paired"):
            b["decode_speedup"] = reading(noisy(1 / true, rng))
        if basis == "paired quotient":
            a["decode_speedup"] = reading(noisy(1.0, rng))
        found = timing_ratio("decode_latency", a, b, a_is_baseline=basis == "paired")
        assert found.basis == basis
        lower, upper = found.interval()
        covered += lower <= true <= upper
    if basis == "unpaired":
        assert covered / 120 < 0.3
    else:
        assert 0.88 <= covered / 120 <= 1.0
