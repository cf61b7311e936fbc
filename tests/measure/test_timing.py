"""What is timed, how often, and what the timing meters make of it."""

from __future__ import annotations

import gc
import statistics
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.measure.bundled import register_meters
from harness.measure.clock import HostClock, paused_gc
from harness.measure.generation import random_prompt
from harness.measure.scenario import measure_scenario
from harness.measure.timing import TimingBudget, time_forward, time_generation
from harness.records import Scenario
from tests.measure.models import tiny_mistral
from tests.measure.test_scenario import measured_of

PREFILL_S, STEP_S = 0.030, 0.004
BRIEF = TimingBudget(least=3, most=4, seconds=0.0)


class Sleeper(nn.Module):
    """A decoder whose prefill and step take known times."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=True):
        tokens = input_ids.shape[1]
        self.calls.append(tokens)
        time.sleep(PREFILL_S if tokens > 1 else STEP_S)
        return SimpleNamespace(logits=torch.zeros(input_ids.shape[0], tokens, 5))


def prompt_of(length: int = 6, batch: int = 2) -> torch.Tensor:
    return random_prompt(5, batch, length, 0, torch.device("cpu"))


def test_each_quantity_is_measured_between_its_own_marks():
    times = time_generation(Sleeper(), prompt_of(), 5, BRIEF)
    assert min(times.prefill.samples_s) >= PREFILL_S
    assert min(times.decode.samples_s) >= STEP_S
    # The median, because a busy machine wakes a sleeper late now and then.
    assert statistics.median(times.decode.samples_s) < PREFILL_S
    assert min(times.end_to_end.samples_s) >= PREFILL_S + 5 * STEP_S


def test_the_whole_is_as_long_as_its_parts():
    times = time_generation(Sleeper(), prompt_of(), 4, TimingBudget(3, 3, 0.0))
    for run in range(3):
        steps = times.decode.samples_s[4 * run : 4 * run + 4]
        parts = times.prefill.samples_s[run] + sum(steps)
        assert times.end_to_end.samples_s[run] == pytest.approx(parts, rel=1e-6)


def test_a_run_is_one_prefill_and_all_its_steps_after_a_warm_up():
    model = Sleeper()
    times = time_generation(model, prompt_of(), 2, TimingBudget(3, 3, 0.0))
    assert len(times.end_to_end.samples_s) == 3
    assert len(times.decode.samples_s) == 6
    timed = model.calls[-9:]
    assert timed == [6, 1, 1] * 3
    assert model.calls[-12:-9] == [6, 1, 1]  # a whole untimed run


def test_few_runs_are_topped_up_with_prefills_alone():
    times = time_generation(Sleeper(), prompt_of(), 5, TimingBudget(3, 9, 0.2))
    assert len(times.end_to_end.samples_s) < 9
    assert len(times.prefill.samples_s) > len(times.end_to_end.samples_s)


def test_without_new_tokens_there_is_nothing_to_decode():
    times = time_generation(Sleeper(), prompt_of(), 0, BRIEF)
    assert times.decode is None
    assert times.prefill.samples_s == pytest.approx(times.end_to_end.samples_s)


def test_a_budget_bounds_repeats_and_time():
    budget = TimingBudget(least=2, most=5, seconds=10.0)
    now = time.perf_counter()
    assert budget.wants_more(4, now)
    assert not budget.wants_more(5, now)
    assert not budget.wants_more(2, now - 11)
    assert budget.wants_more(1, now - 11)


def test_the_reason_for_not_capturing_is_kept_for_the_record():
    times = time_forward(Sleeper(), prompt_of(), BRIEF)
    assert (times.mode, times.note) == ("cpu", None)
    assert min(times.samples_s) >= PREFILL_S


def test_no_garbage_is_collected_inside():
    gc.enable()
    with paused_gc():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with paused_gc():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_the_host_clock_tells_intervals_and_the_whole():
    assert HostClock().seconds([1.0, 1.5, 3.5]) == [0.5, 2.0, 2.5]


# --- the bundled meters -------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr("harness.measure.timing.CPU_BUDGET", TimingBudget(2, 3, 0.0))


def records_of(model, scenario: Scenario) -> dict:
    records = measure_scenario(measured_of(model, scenario), register_meters())
    return {record.metric: record for record in records}


def test_a_decoder_is_measured_in_every_respect(tiny_llama):
    records = records_of(tiny_llama, Scenario(3, 16, 4))
    units = {metric: record.unit for metric, record in records.items()}
    expected = {
        "weight_bytes": "B",
        "prefill_peak_bytes": "B",
        "decode_peak_bytes": "B",
        "kv_cache_bytes_per_token": "B/token",
        "prefill_latency": "s",
        "prefill_throughput": "tokens/s",
        "decode_latency": "s",
        "decode_throughput": "tokens/s",
        "end_to_end_latency": "s",
        "control_latency": "s",
    }
    assert units.items() >= expected.items()
    for metric in ("prefill_latency", "decode_latency", "end_to_end_latency"):
        record = records[metric]
        assert record.mode == "cpu"
        assert record.n == len(record.samples) > 0
        assert 0 < record.lower <= record.value <= record.upper
    assert records["decode_latency"].n == 2 * 4


def test_throughput_is_the_tokens_of_the_whole_batch_over_the_latency(tiny_llama):
    records = records_of(tiny_llama, Scenario(3, 16, 4))
    for seconds, rate in zip(
        records["prefill_latency"].samples, records["prefill_throughput"].samples, strict=True
    ):
        assert rate * seconds == pytest.approx(3 * 16)
    for seconds, rate in zip(
        records["decode_latency"].samples, records["decode_throughput"].samples, strict=True
    ):
        assert rate * seconds == pytest.approx(3)


def test_an_encoder_has_only_a_forward_pass(tiny_bert):
    records = records_of(tiny_bert, Scenario(2, 16, 0))
    assert set(records) >= {"weight_bytes", "prefill_peak_bytes", "prefill_latency", "prefill_throughput"}
    assert not [metric for metric in records if "decode" in metric or "end_to_end" in metric]
    assert records["prefill_throughput"].value > 0


def test_nothing_is_decoded_without_new_tokens(tiny_llama):
    records = records_of(tiny_llama, Scenario(2, 16, 0))
    assert not [metric for metric in records if "decode" in metric or "end_to_end" in metric]
    assert "prefill_latency" in records


def test_windowed_and_other_families_are_measured_too(tiny_opt, tiny_gpt2):
    for model in (tiny_opt, tiny_gpt2, tiny_mistral(8)):
        assert records_of(model, Scenario(1, 12, 3))["decode_latency"].value > 0


def test_measuring_leaves_the_model_as_it_was(tiny_llama):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    hooks = [len(module._forward_pre_hooks) for module in tiny_llama.modules()]
    records_of(tiny_llama, Scenario(1, 8, 2))
    after = tiny_llama.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [len(module._forward_pre_hooks) for module in tiny_llama.modules()] == hooks


def test_the_meters_say_which_way_is_better():
    better = {meter.name: meter.better for meter in register_meters()}
    assert {name for name, way in better.items() if way == "higher"} >= {
        "prefill_throughput",
        "decode_throughput",
        "speedups",
    }
    assert better["decode_latency"] == better["weight_bytes"] == "lower"
