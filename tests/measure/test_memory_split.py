"""The parts of a peak, and what loading and transforming cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.measure import cost as cost_module
from harness.measure.cost import PhaseCost
from harness.measure.footprint import decode_peak, prefill_peak, stored_weights
from harness.measure.memory_split import bytes_on, split_of, split_records, weight_tensors
from harness.records import Scenario
from tests.measure.test_scenario import measured_of

CPU = torch.device("cpu")
MIB = 2**20


def device_memory(**values):
    defaults = {
        "peak_bytes": 1000, "reserved_bytes": 1300, "outside_bytes": 400, "mode": "cuda_allocator",
        "host_mode": "rss_high_water", "host_peak_bytes": 5000, "start_bytes": 650,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **values})


def test_the_parts_add_up_to_all_that_is_used_of_the_device():
    memory = device_memory()
    split = split_of(memory, weights=600, kv_cache=100, lasting=50)
    assert (split.weights, split.kv_cache, split.activations) == (600, 100, 250)
    assert split.workspace == 50 + 300 + 400
    assert split.total == memory.reserved_bytes + memory.outside_bytes
    for words in ("lasting", "reserved and not allocated", "beside the allocator"):
        assert words in split.note


def test_parts_are_never_negative():
    split = split_of(device_memory(peak_bytes=100, reserved_bytes=90), weights=600, kv_cache=0)
    assert split.activations == 0
    assert split.workspace == 400


def test_on_the_cpu_activations_and_workspace_are_one():
    memory = device_memory(reserved_bytes=None, outside_bytes=None, mode="rss_sampled")
    split = split_of(memory, weights=600, kv_cache=100)
    assert (split.activations, split.workspace) == (900, None)
    records = {r.metric: r for r in split_records("decode", split, memory)}
    assert set(records) == {
        "decode_weight_bytes", "decode_kv_cache_bytes", "decode_activation_bytes", "decode_host_peak_bytes",
    }  # fmt: skip
    assert "together" in records["decode_activation_bytes"].note


def test_every_part_of_a_device_is_a_record():
    memory = device_memory(host_mode="rss_lifetime")
    records = {r.metric: r.value for r in split_records("load", split_of(memory, 600, 0, 0), memory)}
    assert records == {
        "load_weight_bytes": 600, "load_kv_cache_bytes": 0, "load_activation_bytes": 400,
        "load_workspace_bytes": 700, "load_host_peak_bytes": 5000,
    }  # fmt: skip
    host = split_records("load", split_of(memory, 600, 0, 0), memory)[-1]
    assert "upper bound" in host.note


def test_weights_are_counted_where_they_are():
    model = nn.Linear(8, 8, bias=False)
    model.register_buffer("elsewhere", torch.zeros(100, device="meta"))
    assert bytes_on(weight_tensors(model), "cpu") == 256
    assert bytes_on(weight_tensors(model), "meta") == 400


def test_the_cache_of_the_timed_shape_is_counted(tiny_llama):
    batch, prompt, new = 2, 16, 8
    measured = measured_of(tiny_llama, Scenario(batch, prompt, new))
    records = {r.metric: r for meter in (prefill_peak, decode_peak) for r in meter(measured)}
    cache = 2 * 2 * batch * (prompt + new) * 64 * 4  # keys and values, layers
    for phase in ("prefill", "decode"):
        assert cache <= records[f"{phase}_kv_cache_bytes"].value <= cache + 64  # and its counters
        assert records[f"{phase}_weight_bytes"].value == stored_weights(measured)[0].value
        assert records[f"{phase}_host_peak_bytes"].value > 50 * MIB  # a process with torch in it
        assert records[f"{phase}_activation_bytes"].value >= 0


# --- cost ---------------------------------------------------------------------------------------------


class Counter:
    source = "stand-in"

    def __init__(self):
        self.joules, self.open = 10.0, 0

    def __enter__(self):
        self.open += 1
        return self

    def __exit__(self, *_error):
        self.open -= 1

    def read_j(self):
        self.joules += 2.5
        return self.joules


def test_the_cost_of_a_block_is_time_memory_energy_and_bytes(monkeypatch, tmp_path):
    counter = Counter()
    monkeypatch.setattr(cost_module, "energy_counter", lambda _device: counter)
    model = nn.Linear(16, 16, bias=False)
    with PhaseCost(CPU, model) as cost:
        held = torch.ones(48 * MIB // 4)
        (tmp_path / "file").write_bytes(b"x" * 100_000)
        (tmp_path / "file").read_bytes()
        del held
    records = {r.metric: r for r in cost.records("transform", model)}
    assert records["transform_s"].value > 0
    assert 40 * MIB < records["transform_peak_bytes"].value < 90 * MIB
    assert records["transform_weight_bytes"].value == 16 * 16 * 4
    assert records["transform_kv_cache_bytes"].value == 0
    assert (records["transform_energy"].value, records["transform_energy"].unit) == (2.5, "J")
    assert records["transform_written_bytes"].value >= 100_000
    assert records["transform_read_bytes"].value >= 100_000
    assert counter.open == 0


def test_without_a_counter_there_is_no_energy(monkeypatch):
    def absent(_device):
        raise OSError("no counter")

    monkeypatch.setattr(cost_module, "energy_counter", absent)
    model = nn.Linear(4, 4)
    with PhaseCost(CPU) as cost:
        pass
    assert "load_energy" not in {r.metric for r in cost.records("load", model)}


def test_an_error_inside_passes_and_closes_the_counter(monkeypatch):
    counter = Counter()
    monkeypatch.setattr(cost_module, "energy_counter", lambda _device: counter)
    with pytest.raises(ZeroDivisionError), PhaseCost(CPU):
        _ = 1 / 0
    assert counter.open == 0
