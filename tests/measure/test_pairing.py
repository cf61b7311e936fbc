"""Ratios of paired readings, rounds, the control, and the A/A check."""

from __future__ import annotations

import dataclasses
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from harness.measure.control import Control
from harness.measure.graphs import Call
from harness.measure.meter import Measured
from harness.measure.pairing import (
    LEAST_ROUNDS,
    Ratio,
    captured_interval,
    median_interval,
    ratios,
    speedups,
)
from harness.measure.scenario_timing import scenario_times
from harness.measure.self_comparison import COMPARISONS, ROUNDS_EACH, compare_with_itself, judge
from harness.measure.timing import Lane, Rounds, TimingBudget, capture_in, more_prefills, run_rounds
from harness.models.info import info_from_config
from harness.records import Scenario

CPU = torch.device("cpu")


class Sleeper(nn.Module):
    """A decoder that takes so long for a prompt and for a step."""

    def __init__(self, prefill_s: float, step_s: float, log: list[str] | None = None) -> None:
        super().__init__()
        self.prefill_s, self.step_s, self.log = prefill_s, step_s, log

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True):
        is_prompt = input_ids.shape[1] > 1
        if self.log is not None and is_prompt:
            self.log.append(f"{self.prefill_s:g}")
        time.sleep(self.prefill_s if is_prompt else self.step_s)
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[0], input_ids.shape[1], 5))


def lane_of(model: nn.Module, steps: int = 2) -> Lane:
    return Lane.of_generation(model, torch.zeros(1, 3, dtype=torch.int64), steps)


# --- ratios -------------------------------------------------------------------------------------------


def test_speedups_are_baseline_over_variant_round_by_round():
    baseline = [[4.0, 1.0, 1.2, 6.2], [8.0, 2.0, 2.4, 12.4]]
    variant = [[2.0, 0.5, 0.6, 3.1], [2.0, 0.5, 0.6, 3.1]]
    found = speedups(baseline, variant)
    assert found["prefill"].samples == (2.0, 4.0)
    assert found["decode"].samples == pytest.approx((2.0, 4.0))
    assert found["end_to_end"].value == pytest.approx(3.0)
    assert found["prefill"].lower is None  # two readings bound nothing


def test_without_steps_there_is_no_decode_ratio():
    assert set(speedups([[1.0, 1.0]], [[2.0, 2.0]])) == {"prefill", "end_to_end"}


@pytest.mark.parametrize("n", [6, 8, 9, 15, 16, 50])
def test_the_interval_is_that_of_the_sign_test(n):
    samples = np.random.default_rng(n).normal(size=n)
    lower, upper = median_interval(samples)
    # A median is inside exactly where the sign test does not reject it.
    inside = [m for m in np.sort(samples) if stats.binomtest(int((samples < m).sum()), n).pvalue > 0.05]
    assert lower <= min(inside)
    assert upper >= max(m for m in inside if m <= upper)
    for bound, side in ((lower - 1e-9, samples < lower), (upper + 1e-9, samples > upper)):
        outside = int(side.sum())
        assert stats.binomtest(outside, n).pvalue < 0.05, (bound, outside)


@pytest.mark.parametrize("n", [1, 5])
def test_too_few_readings_have_no_interval(n):
    assert median_interval([1.0] * n) == (None, None)


@pytest.mark.parametrize("n", [LEAST_ROUNDS, 16, 41])
def test_the_interval_covers_the_median_at_least_at_its_rate(n):
    random = np.random.default_rng(0)
    true = np.exp(0.0)
    covered = 0
    for _ in range(800):
        lower, upper = median_interval(np.exp(random.normal(0, 0.5, n)))
        covered += lower <= true <= upper
    assert covered / 800 > 0.935


def test_a_drift_that_slows_both_cancels():
    slower = np.linspace(1.0, 3.0, 20)
    found = ratios(list(2.0 * slower), list(1.0 * slower))
    assert found.value == pytest.approx(2.0)
    assert found.upper - found.lower < 1e-9


def rounds_of_captures(random: np.random.Generator, rounds: int, captures: int = 4):
    """Ratios of two equal models whose captures differ by far more than their rounds."""
    ours, theirs = random.normal(0, 0.003, (2, captures))
    pairs = [(capture_in(i, 0, captures), capture_in(i, 1, captures)) for i in range(rounds)]
    samples = [float(np.exp(ours[a] - theirs[b] + random.normal(0, 0.0003))) for a, b in pairs]
    return samples, pairs


@pytest.mark.parametrize(("rounds", "least"), [(LEAST_ROUNDS, 0.93), (16, 0.95), (50, 0.95)])
def test_captures_that_differ_are_what_the_interval_covers(rounds, least):
    random = np.random.default_rng(rounds)
    covered = by_rounds = 0
    for _ in range(1000):
        samples, pairs = rounds_of_captures(random, rounds)
        found = ratios(samples, [1.0] * rounds, pairs)
        covered += found.lower <= 1.0 <= found.upper
        lower, upper = median_interval(samples)
        by_rounds += lower <= 1.0 <= upper
    assert covered / 1000 > least
    if rounds > LEAST_ROUNDS:  # of the fewest rounds either takes the smallest and the largest
        assert by_rounds / 1000 < 0.9, "rounds alone claim too much"


def test_too_few_captures_leave_the_sign_test():
    samples, pairs = rounds_of_captures(np.random.default_rng(0), 18, captures=3)
    found = ratios(samples, [1.0] * 18, pairs)
    assert (found.lower, found.upper) == median_interval(samples)
    one_side = [(a, 0) for a, _ in rounds_of_captures(np.random.default_rng(0), 18)[1]]
    assert captured_interval(samples, one_side) is None


def test_the_interval_of_captures_reaches_over_the_medians_of_pairs():
    pairs = [(a, b) for a in range(4) for b in range(4)] * 3
    samples = [1.0 + a / 10 - b / 100 for a, b in pairs]
    samples[0] = 9.0  # one outlier of the three rounds of a pair
    assert captured_interval(samples, pairs) == pytest.approx((0.97, 1.3))


# --- rounds -------------------------------------------------------------------------------------------


def test_lanes_take_turns_and_the_order_is_reversed():
    log: list[str] = []
    lanes = [lane_of(Sleeper(0.0, 0.0, log)), lane_of(Sleeper(1e-6, 0.0, log))]
    log.clear()
    rounds = run_rounds(lanes, TimingBudget(3, 3, 0.0), control=lambda: 0.25)
    warm_up, timed = log[:2], log[2:]
    assert warm_up == ["0", "1e-06"]
    assert timed == ["0", "1e-06", "1e-06", "0", "0", "1e-06"]
    assert [len(runs) for runs in rounds.runs] == [3, 3]
    assert rounds.control_s == [0.25] * 3


@pytest.mark.parametrize("captures", [1, 2, 4])
def test_lanes_meet_in_all_pairs_of_their_captures(captures):
    pairs = [(capture_in(i, 0, captures), capture_in(i, 1, captures)) for i in range(captures**2)]
    assert len(set(pairs)) == captures**2
    for start in range(0, captures**2, captures):  # each once in every so many rounds
        for side in zip(*pairs[start : start + captures], strict=True):
            assert sorted(side) == list(range(captures))


def captured_lane(log: list[int], prefills: int = 4, steps: int = 4) -> Lane:
    """A lane whose calls note which capture of them ran."""

    def call(count: int, offset: int) -> Call:
        first, *again = (lambda i=i: log.append(offset + i) for i in range(count))
        return Call(first, "graph", again=tuple(again))

    return Lane(call(prefills, 0), call(steps, 10), None, 2, CPU)


def test_rounds_go_through_the_captures():
    log: list[int] = []
    lanes = [captured_lane(log), captured_lane([])]
    rounds = run_rounds(lanes, TimingBudget(5, 5, 0.0))
    warm_up, timed = log[:9], log[9:]
    assert warm_up == [0, 10, 10, 1, 11, 2, 12, 3, 13], "a whole run, and a short one of each other capture"
    assert timed == [each for i in (0, 1, 2, 3, 0) for each in (i, 10 + i, 10 + i)]
    assert rounds.captures == [[0, 1, 2, 3, 0], [0, 1, 2, 3, 1]]


def test_a_lane_has_as_many_captures_as_its_call_with_the_fewest():
    assert captured_lane([], 4, 1).captures == 1
    assert dataclasses.replace(captured_lane([], 3), step=None).captures == 3
    log: list[int] = []
    lane = captured_lane(log, 4, 2)
    found = more_prefills(lane, [[0.0]], TimingBudget(0, 4, 10.0))
    assert (len(found), log) == (3, [0, 1, 0])


def test_the_budget_is_for_each_lane():
    lanes = [lane_of(Sleeper(0.002, 0.0), 0)] * 2
    started = time.perf_counter()
    rounds = run_rounds(lanes, TimingBudget(1, 1000, 0.05))
    assert time.perf_counter() - started > 0.1
    assert len(rounds.runs[0]) < 50


def test_the_control_takes_time_and_says_what_it_is():
    control = Control(CPU)
    assert control() > 0
    assert control.mode == "cpu"
    assert "products" in control.note


# --- a cell -------------------------------------------------------------------------------------------


def cell(model: nn.Module, baseline: nn.Module | None, tiny_llama, baseline_bytes: int = 0) -> Measured:
    return Measured(
        model=model,
        info=info_from_config(tiny_llama.config, "tiny"),
        scenario=Scenario(1, 4, 3),
        device=CPU,
        dtype=torch.float32,
        seed=0,
        shared={},
        baseline=None if baseline is None else lambda: baseline,
        baseline_bytes=baseline_bytes,
    )


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr("harness.measure.timing.CPU_BUDGET", TimingBudget(2, 3, 0.0))


def test_a_variant_is_timed_in_turn_with_the_baseline(tiny_llama):
    measured = cell(Sleeper(0.010, 0.002), Sleeper(0.030, 0.001), tiny_llama)
    times = scenario_times(measured)
    assert times.alone is None
    assert times.pair.speedups["prefill"].value == pytest.approx(3.0, rel=0.25)
    assert times.pair.speedups["decode"].value == pytest.approx(0.5, rel=0.25)
    assert len(times.pair.speedups["prefill"].samples) == LEAST_ROUNDS
    assert times.pair.modes == {"prefill": "cpu", "decode": "cpu", "end_to_end": "cpu"}
    assert len(times.control.samples_s) == LEAST_ROUNDS
    assert scenario_times(measured) is times


def test_the_baseline_is_timed_alone_and_without_a_ratio(tiny_llama):
    times = scenario_times(cell(Sleeper(0.001, 0.001), None, tiny_llama))
    assert times.pair is None
    assert times.alone is None


def test_what_does_not_fit_beside_the_baseline_says_so(tiny_llama):
    measured = cell(Sleeper(0.001, 0.001), Sleeper(0.001, 0.001), tiny_llama, baseline_bytes=10**15)
    times = scenario_times(measured)
    assert times.pair is None
    assert times.alone.startswith("not in turn with the baseline, which does not fit beside it (1000000.")


def test_a_baseline_that_runs_out_of_memory_does_not_cost_the_variant_its_numbers(tiny_llama):
    def no_room() -> nn.Module:
        raise MemoryError("17 GiB were asked for")

    measured = dataclasses.replace(cell(Sleeper(0.001, 0.001), None, tiny_llama), baseline=no_room)
    times = scenario_times(measured)
    assert times.pair is None
    assert times.alone.endswith("memory ran out beside it: 17 GiB were asked for")
    assert min(times.own.prefill.samples_s) >= 0.001


def test_the_records_say_how_they_were_paired(tiny_llama):
    from harness.measure.latency import control_latency
    from harness.measure.latency import speedups as records_of

    measured = cell(tiny_llama, tiny_llama, tiny_llama)
    found = {record.metric: record for record in [*records_of(measured), *control_latency(measured)]}
    record = found["decode_speedup"]
    assert (record.unit, record.mode, record.n) == ("x", "cpu, paired", len(record.samples))
    assert record.lower <= record.value <= record.upper
    assert found["control_latency"].unit == "s"


# --- the same model twice -----------------------------------------------------------------------------


def test_two_identical_models_do_not_differ():
    found = compare_with_itself(
        Sleeper(0.002, 0.002), Sleeper(0.002, 0.002), 5, Scenario(1, 3, 1), CPU, comparisons=3
    )
    assert {each.phase for each in found} == {"prefill", "decode", "end_to_end"}
    for each in found:
        assert each.ratio == pytest.approx(1.0, abs=0.2)
        assert each.comparisons == 3


def test_each_comparison_of_a_model_with_itself_has_captures_of_its_own(monkeypatch):
    random, made = np.random.default_rng(1), []

    def lane(model, prompt, new_tokens, more):
        assert more(10**12)
        made.append(model)
        return captured_lane([])

    def rounds(lanes, budget):
        of_pair, pairs = rounds_of_captures(random, ROUNDS_EACH)
        runs = [[[s, 1.0, s] for s in of_pair], [[1.0, 1.0, 1.0]] * ROUNDS_EACH]
        return Rounds(runs, captures=[list(side) for side in zip(*pairs, strict=True)])

    monkeypatch.setattr("harness.measure.self_comparison.Lane.of_generation", lane)
    monkeypatch.setattr("harness.measure.self_comparison.run_rounds", rounds)
    found = compare_with_itself(nn.Identity(), nn.Identity(), 5, Scenario(1, 3, 1), CPU)
    assert len(made) == 2 * COMPARISONS["cpu"]
    assert all(each.problem is None for each in found)


def ratio_around(center: float, spread: float, random: np.random.Generator) -> Ratio:
    samples = [float(value) for value in random.normal(center, spread, ROUNDS_EACH)]
    return ratios(samples, [1.0] * len(samples))


def test_a_difference_of_a_per_cent_is_a_problem():
    random = np.random.default_rng(0)
    good = judge("decode", "graph", [ratio_around(1.0, 0.002, random) for _ in range(20)])
    assert good.problem is None
    assert good.covering >= 18
    bad = judge("decode", "graph", [ratio_around(1.02, 0.002, random) for _ in range(20)])
    assert bad.problem.startswith("two identical models differ by 2.0 %")


def test_intervals_that_miss_too_often_are_a_problem():
    random = np.random.default_rng(0)
    # Each comparison is off by its own offset, as where something drifts between rounds of lanes.
    found = [ratio_around(1.0 + 0.004 * (-1) ** k, 0.001, random) for k in range(20)]
    judged = judge("decode", "graph", found)
    assert judged.problem == "only 0 of 20 intervals cover 1, where 95% should"
