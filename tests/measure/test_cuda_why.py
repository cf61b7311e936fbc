"""Kernels, ceilings, energy and the parts of memory on a GPU."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch import nn

from harness.measure.ceilings import ceilings_of_sweep, measure_ceilings
from harness.measure.cost import PhaseCost
from harness.measure.energy import energy_problem
from harness.measure.footprint import decode_peak, prefill_peak
from harness.measure.generation import Generation, forward_only, random_prompt
from harness.measure.graphs import prepare_call, prepare_generation
from harness.measure.inspecting import ENERGY, KERNELS, inspect_generation
from harness.measure.meter import Measured
from harness.measure.profile import profile_forward, profile_generation
from harness.models.info import info_from_config
from harness.records import Scenario

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = torch.device("cuda")
MIB = 2**20


def sizeable_llama():
    """Large enough that a step takes tenths of a millisecond: 200 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=2048, intermediate_size=5504, num_hidden_layers=4,
        num_attention_heads=16, num_key_value_heads=16, max_position_embeddings=1024,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(CUDA, torch.bfloat16).eval()


@pytest.fixture(scope="module")
def model():
    return sizeable_llama()


def measured_of(model: nn.Module, scenario: Scenario) -> Measured:
    return Measured(
        model=model,
        info=info_from_config(model.config, "sizeable"),
        scenario=scenario,
        device=CUDA,
        dtype=torch.bfloat16,
        seed=0,
        shared={},
    )


def prepared(model, batch=1, prompt=256, new=16):
    generation = Generation(model, random_prompt(4096, batch, prompt, 0, CUDA), new)
    return generation, *prepare_generation(generation)


def seconds_of_steps(generation, prefill, step):
    times = []
    for _ in range(5):
        generation.reset()
        prefill.run()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(generation.new_tokens):
            step.run()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started) / generation.new_tokens)
    return statistics.median(times)


def test_kernels_inside_replayed_graphs_are_seen(model):
    generation, prefill, step = prepared(model)
    assert step.is_captured
    found = profile_generation(generation, prefill, step)
    for phase in (found.prefill, found.decode):
        assert phase.problem is None
        gemm = sum(kernel.share for kernel in phase.kernels if kernel.family == "gemm")
        assert gemm > 0.4, phase.kernels
        other = sum(kernel.share for kernel in phase.kernels if kernel.family == "other")
        assert other < 0.1, [kernel.name for kernel in phase.kernels if kernel.family == "other"]
    # Kernels do not overlap in one stream: their time is at most the step's, and most of it.
    step_s = seconds_of_steps(generation, prefill, step)
    assert 0.5 * step_s < found.decode.seconds < 1.3 * step_s


def test_profiling_again_and_again_changes_neither_results_nor_times(model):
    generation, prefill, step = prepared(model)
    generation.reset()
    before = [prefill.run().clone(), step.run().clone()]
    fast = seconds_of_steps(generation, prefill, step)
    started = time.perf_counter()
    for _ in range(3):
        assert profile_generation(generation, prefill, step).decode.problem is None
    assert time.perf_counter() - started < 15
    assert seconds_of_steps(generation, prefill, step) < 1.15 * fast
    generation.reset()
    after = [prefill.run().clone(), step.run().clone()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    # What is captured after a profile is seen as well.
    assert profile_generation(*prepared(model)).decode.problem is None


def test_an_encoder_is_profiled(tiny_bert):
    tiny_bert.to(CUDA)
    tokens = random_prompt(256, 2, 32, 0, CUDA)
    found = profile_forward(prepare_call(lambda: forward_only(tiny_bert, tokens), CUDA), CUDA)
    assert found.prefill.problem is None
    assert found.prefill.calls > 10


def test_the_ceilings_are_those_of_a_gpu():
    started = time.perf_counter()
    found = measure_ceilings("cuda", threads=4)
    assert time.perf_counter() - started < 10
    assert found.notes == () or all("float8" in note for note in found.notes), found.notes
    values = found.values
    assert values["matmul_bfloat16"] > 2 * values["matmul_float32"]
    assert values["matmul_tf32"] > values["matmul_float32"]
    assert 0.5 < values["matmul_float16"] / values["matmul_bfloat16"] < 2
    assert values["read"] > 0.6 * values["copy"]
    assert 1e-7 < values["graph_launch"] < values["launch"] < 1e-4
    properties = torch.cuda.get_device_properties(0)
    if "H100" in properties.name and "PCIe" not in properties.name:
        assert 500e12 < values["matmul_bfloat16"] < 1000e12
        assert 2.2e12 < values["copy"] < 3.4e12
        assert values["matmul_int8"] > values["matmul_bfloat16"]
        assert values["matmul_float8_e4m3fn"] > values["matmul_bfloat16"]
    assert torch.cuda.memory_allocated() < 2**33


def test_ceilings_are_measured_in_a_process_of_their_own():
    found = ceilings_of_sweep("cuda", 4)
    assert found["values"]["matmul_bfloat16"] > 0, found["notes"]


@pytest.mark.skipif(
    torch.cuda.is_available() and energy_problem("cuda") is not None, reason="no energy counter"
)
def test_energy_is_between_idle_and_the_power_cap(model):
    scenario = Scenario(1, 256, 16)
    measured = measured_of(model, scenario)
    lane = prepared(model)
    started = time.perf_counter()
    inspect_generation(*lane, measured)
    assert time.perf_counter() - started < 12
    energy = measured.shared[ENERGY]
    step_s = seconds_of_steps(*lane)
    for reading in (energy.prefill, energy.decode):
        assert reading.problem is None
        assert len(reading.joules) >= 2
        assert max(reading.joules) < 1.5 * min(reading.joules)
    watts = statistics.median(energy.decode.joules) / step_s
    assert energy.decode.idle_w is None or 0.8 * energy.decode.idle_w < watts
    assert 40 < watts < 1200
    assert measured.shared[KERNELS]


def test_the_parts_of_memory_add_up(model):
    scenario = Scenario(2, 512, 16)
    records = {
        record.metric: record.value
        for meter in (prefill_peak, decode_peak)
        for record in meter(measured_of(model, scenario))
    }
    weights = sum({p.untyped_storage().data_ptr(): p.nbytes for p in model.parameters()}.values())
    cache = 2 * 4 * 2 * (512 + 16) * 2048 * 2  # keys and values, layers, batch, slots, width, bytes
    for phase in ("prefill", "decode"):
        assert records[f"{phase}_weight_bytes"] == pytest.approx(weights, rel=0.01)
        assert cache <= records[f"{phase}_kv_cache_bytes"] < 1.05 * cache
        known = [records[f"{phase}_{part}_bytes"] for part in ("weight", "kv_cache", "activation")]
        assert sum(known) <= records[f"{phase}_peak_bytes"] * 1.01
        assert records[f"{phase}_workspace_bytes"] > 0
        assert records[f"{phase}_host_peak_bytes"] > 100 * MIB
    # A prefill of 512 tokens holds the activations of the widest layer; a step hardly any.
    assert records["prefill_activation_bytes"] > 2 * 512 * 5504 * 2
    assert records["decode_activation_bytes"] < records["prefill_activation_bytes"]


def test_the_cost_of_loading_is_measured_on_both_sides():
    with PhaseCost(CUDA) as cost:
        loaded = nn.Linear(4096, 4096, bias=False, device=CUDA, dtype=torch.bfloat16)
        scratch = torch.ones(64 * MIB, dtype=torch.uint8, device=CUDA)
        del scratch
    records = {record.metric: record.value for record in cost.records("load", loaded)}
    assert records["load_weight_bytes"] == 4096 * 4096 * 2
    assert 64 * MIB <= records["load_activation_bytes"] < 80 * MIB
    assert records["load_workspace_bytes"] > 0
    assert records["load_host_peak_bytes"] > 100 * MIB
    assert ("load_energy" in records) == (energy_problem("cuda") is None)
