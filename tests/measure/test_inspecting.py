"""What is learnt from a generation after it was timed, and the records that the meters make of it."""

from __future__ import annotations

import math
import time

import pytest
import torch

from harness.measure import inspecting
from harness.measure.bundled import register_meters
from harness.measure.energy import EnergyBudget
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.graphs import prepare_call, prepare_generation
from harness.measure.inspecting import ENERGY, KERNELS, PROFILE, inspect_forward, inspect_generation
from harness.measure.profile import GenerationProfile, PhaseProfile
from harness.measure.scenario import measure_scenario
from harness.measure.timing import TimingBudget
from harness.records import KernelUse, Scenario
from tests.measure.test_scenario import measured_of

CPU = torch.device("cpu")
WATTS = 50.0
SHAPE = Scenario(2, 8, 3)


class Counter:
    """Counts as if the machine drew the same all the time."""

    source = "stand-in"

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def read_j(self):
        return WATTS * time.perf_counter()


@pytest.fixture
def metered(monkeypatch):
    monkeypatch.setattr(inspecting, "energy_counter", lambda _device: Counter())
    monkeypatch.setattr(inspecting, "CPU_ENERGY", EnergyBudget(windows=2, window_s=0.03, idle_s=0.002))


@pytest.fixture
def unmetered(monkeypatch):
    def absent(_device):
        raise OSError("no counter here")

    monkeypatch.setattr(inspecting, "energy_counter", absent)


def inspected(model, scenario=SHAPE):
    measured = measured_of(model, scenario)
    prompt = random_prompt(256, scenario.batch_size, scenario.prompt_len, 0, CPU)
    generation = Generation(model, prompt, scenario.new_tokens)
    inspect_generation(generation, *prepare_generation(generation), measured)
    return measured.shared


@pytest.mark.usefixtures("metered")
def test_energy_and_kernels_of_both_phases_are_found(tiny_llama):
    shared = inspected(tiny_llama)
    for reading in (shared[ENERGY].prefill, shared[ENERGY].decode):
        assert 1 <= len(reading.joules) <= 2  # one where the machine is busy and a call takes long
        assert reading.idle_w == shared[ENERGY].prefill.idle_w == pytest.approx(WATTS, rel=0.5)
        # Constant power: joules of a call over its seconds are the watts.
        assert 0 < min(reading.joules) < WATTS
    assert isinstance(shared[PROFILE], GenerationProfile)
    assert {kernel.phase for kernel in shared[KERNELS]} == {"prefill", "decode"}
    assert all(isinstance(kernel, KernelUse) for kernel in shared[KERNELS])


@pytest.mark.usefixtures("metered")
def test_steps_that_cannot_be_repeated_alone_have_no_energy_but_a_reason(tiny_llama):
    measured = measured_of(tiny_llama, Scenario(1, 8, 2))
    generation = Generation(tiny_llama, random_prompt(256, 1, 8, 0, CPU), 2)
    prefill, step = prepare_generation(generation)
    generation.capture_problem = "layers of type strange have no cache of fixed size"
    inspect_generation(generation, prefill, step, measured)
    energy = measured.shared[ENERGY]
    assert energy.prefill.joules
    assert energy.decode.joules == ()
    assert energy.decode.problem.startswith("the steps cannot be repeated alone: layers of type strange")


@pytest.mark.usefixtures("unmetered")
def test_without_a_counter_the_kernels_are_found_all_the_same(tiny_llama, tiny_bert):
    shared = inspected(tiny_llama, Scenario(1, 8, 0))
    assert shared[ENERGY].decode is None
    assert shared[ENERGY].prefill.problem == "no counter here"
    assert shared[PROFILE].decode is None
    measured = measured_of(tiny_bert, Scenario(1, 8, 0))
    tokens = random_prompt(256, 1, 8, 0, CPU)
    inspect_forward(prepare_call(lambda: forward_only(tiny_bert, tokens), CPU), measured)
    assert measured.shared[KERNELS]


def records_of(model, scenario, **shared):
    measured = measured_of(model, scenario)
    measured.shared.update(shared)
    return {record.metric: record for record in measure_scenario(measured, register_meters())}


@pytest.fixture
def brief(monkeypatch):
    monkeypatch.setattr("harness.measure.timing.CPU_BUDGET", TimingBudget(2, 3, 0.0))


@pytest.mark.usefixtures("brief", "metered")
def test_a_cell_says_how_much_of_the_device_it_used(tiny_llama):
    ceilings = {"values": {"matmul_float32": 1e11, "read": 1e10}}
    records = records_of(tiny_llama, Scenario(2, 16, 3), ceilings=ceilings)
    for share, achieved, ceiling in (
        ("prefill_mfu", "prefill_flops_per_s", 1e11),
        ("decode_mfu", "decode_flops_per_s", 1e11),
        ("decode_mbu", "decode_bytes_per_s", 1e10),
    ):
        assert records[share].value == pytest.approx(records[achieved].value / ceiling)
        assert records[share].lower <= records[share].value <= records[share].upper
    latency = records["prefill_latency"].value
    assert records["prefill_flops_per_s"].value * latency == pytest.approx(records["prefill_flops"].value)
    assert records["decode_kernels"].value > 15
    assert records["decode_kernels"].note == "operators of ATen"
    assert 0 < records["decode_energy"].value < WATTS
    assert records["decode_energy"].unit == "J/token"


@pytest.mark.usefixtures("brief", "unmetered")
def test_what_was_not_seen_is_a_reason_and_never_a_number(tiny_llama, monkeypatch):
    blind = GenerationProfile(PhaseProfile(problem="no CUPTI"), PhaseProfile(problem="no CUPTI"))
    monkeypatch.setattr(inspecting, "profile_generation", lambda *_: blind)
    records = records_of(tiny_llama, Scenario(1, 8, 2))
    for phase in ("prefill", "decode"):
        assert math.isnan(records[f"{phase}_kernels"].value)
        assert records[f"{phase}_kernels"].note == "no CUPTI"
    assert "prefill_mfu" not in records
    assert "no ceiling" in records["prefill_flops_per_s"].note
    assert "decode_energy" not in records


@pytest.mark.usefixtures("brief", "unmetered")
def test_an_encoder_has_the_records_of_its_one_phase(tiny_bert):
    records = records_of(tiny_bert, Scenario(2, 16, 0))
    assert {"prefill_kernels", "prefill_flops", "prefill_weight_bytes"} <= set(records)
    assert not [metric for metric in records if metric.startswith("decode")]
