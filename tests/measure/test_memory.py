"""Bytes of weights, of caches and at the peak."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import NotApplicable
from harness.measure import memory as memory_module
from harness.measure.memory import PeakMemory, kv_cache_bytes_per_token, weight_bytes
from harness.measure.storage import bytes_per_tensor, storage_bytes, tensors_in
from harness.models.info import info_from_config
from tests.measure.models import tiny_grouped, tiny_mistral

CPU = torch.device("cpu")
MIB = 1024 * 1024


# --- weights --------------------------------------------------------------------------------------


def test_weights_are_the_bytes_of_parameters_and_buffers():
    model = nn.Sequential(nn.Linear(10, 20), nn.BatchNorm1d(20))
    # 10x20+20 and 20+20 parameters, 20+20 running statistics in float32, one int64 counter.
    assert weight_bytes(model) == 4 * (220 + 40 + 40) + 8


def test_tied_weights_count_once(tiny_llama):
    tied = sum(p.numel() for p in tiny_llama.parameters()) * 4  # parameters() gives each once
    buffers = sum(b.numel() * b.element_size() for b in tiny_llama.buffers())
    assert weight_bytes(tiny_llama) == tied + buffers
    tiny_llama.lm_head.weight = nn.Parameter(tiny_llama.lm_head.weight.detach().clone())
    assert weight_bytes(tiny_llama) == tied + buffers + 256 * 64 * 4


def test_a_view_counts_the_storage_that_it_keeps_alive():
    # Half of the rows "pruned" by slicing frees nothing.
    model = nn.Linear(8, 16, bias=False)
    model.weight = nn.Parameter(model.weight.detach()[:8])
    assert weight_bytes(model) == 8 * 16 * 4
    model.weight = nn.Parameter(model.weight.detach().clone())
    assert weight_bytes(model) == 8 * 8 * 4


def test_buffers_that_no_checkpoint_holds_count():
    model = nn.Linear(4, 4, bias=False)
    model.register_buffer("table", torch.zeros(100), persistent=False)
    assert weight_bytes(model) == 64 + 400


def test_packed_and_half_precision_weights_count_as_they_are_stored():
    model = nn.Module()
    model.register_buffer("codes", torch.zeros(64, dtype=torch.uint8))
    model.register_buffer("scales", torch.zeros(4, dtype=torch.float16))
    assert weight_bytes(model) == 64 + 8


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_layouts_count_values_and_indices():
    values, columns, ends = torch.ones(8), torch.arange(8), torch.arange(9)
    by_row = torch.sparse_csr_tensor(ends, columns, values, size=(8, 8), check_invariants=True)
    by_column = torch.sparse_csc_tensor(ends, columns, values, size=(8, 8), check_invariants=True)
    assert storage_bytes([by_row]) == storage_bytes([by_column]) == 8 * 4 + 8 * 8 + 9 * 8
    places = torch.stack([columns, columns])
    coordinates = torch.sparse_coo_tensor(places, values, (8, 8), check_invariants=True)
    assert storage_bytes([coordinates]) == 8 * 4 + 2 * 8 * 8


def test_bytes_per_tensor_counts_elements_and_not_shared_storage():
    whole = torch.zeros(100)
    assert bytes_per_tensor([whole[:10]]) == 40
    assert bytes_per_tensor([whole[:10], whole[:10]]) == 40
    assert bytes_per_tensor([whole[:10], whole[10:30]]) == 120
    assert bytes_per_tensor([torch.zeros(1).expand(1000)]) == 4


def test_tensors_are_found_in_nested_objects_once():
    class Layer:
        def __init__(self) -> None:
            self.keys = torch.zeros(3)
            self.parts = [torch.zeros(1), (torch.zeros(2), {"more": torch.zeros(4)})]
            self.owner: object = self
            self.model = nn.Linear(5, 5)
            self.made = lambda: None

    layer = Layer()
    assert sorted(tensor.numel() for tensor in tensors_in([layer, layer])) == [1, 2, 3, 4]


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_the_cache_grows_by_keys_and_values_of_every_layer(kv_heads):
    model = tiny_grouped(kv_heads)
    info = info_from_config(model.config, "tiny")
    value, note = kv_cache_bytes_per_token(model, info, CPU, torch.float32)
    assert value == 2 * 2 * kv_heads * 16 * 4  # keys and values, layers, heads, head_dim, float32
    assert note is None


def test_the_cache_follows_the_dtype_of_the_model():
    model = tiny_grouped(4).to(torch.bfloat16)
    info = info_from_config(model.config, "tiny")
    assert kv_cache_bytes_per_token(model, info, CPU, torch.bfloat16)[0] == 2 * 2 * 4 * 16 * 2


@pytest.mark.parametrize("name", ["tiny_opt", "tiny_gpt2"])
def test_other_families_have_a_cache_as_well(request, name):
    model = request.getfixturevalue(name)
    info = info_from_config(model.config, "tiny")
    assert kv_cache_bytes_per_token(model, info, CPU, torch.float32) == (2 * 2 * 64 * 4, None)


@pytest.mark.parametrize("window", [4, 8, 100])
def test_a_window_is_measured_before_it_is_full_and_noted(window):
    model = tiny_mistral(window)
    info = info_from_config(model.config, "tiny")
    value, note = kv_cache_bytes_per_token(model, info, CPU, torch.float32)
    assert value == 2 * 2 * 2 * 16 * 4
    assert note == f"layers with a window stop growing at {window} tokens"


def test_a_ring_in_one_of_the_layers_is_a_window_too(tiny_llama):
    from harness.nn.ring_cache import use_ring_caches

    assert use_ring_caches(tiny_llama.config, [8, None])
    info = info_from_config(tiny_llama.config, "tiny")
    value, note = kv_cache_bytes_per_token(tiny_llama, info, CPU, torch.float32)
    assert value == 2 * 2 * 4 * 16 * 4
    assert note == "layers with a window stop growing at 8 tokens"


class Remembering(nn.Module):
    """A decoder that keeps the last `limit` states, or a fixed state where `grows` is False."""

    def __init__(self, limit: int, grows: bool = True) -> None:
        super().__init__()
        self.limit, self.grows = limit, grows

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        from types import SimpleNamespace

        kept = min(input_ids.shape[1], self.limit) if self.grows else 10
        return SimpleNamespace(past_key_values=[torch.zeros(1, kept, 25)])


def test_a_cache_that_stops_growing_is_noticed(tiny_llama):
    info = info_from_config(tiny_llama.config, "tiny")
    value, note = kv_cache_bytes_per_token(Remembering(40), info, CPU, torch.float32)
    assert value == 100.0
    assert note == "at 32 tokens; beyond it grows more slowly (8.3 B/token)"
    value, note = kv_cache_bytes_per_token(Remembering(0, grows=False), info, CPU, torch.float32)
    assert value == 0.0
    assert note == "a fixed state of 1000 B per sequence (float32 model)"


def test_models_without_a_cache_are_not_measured(tiny_bert, tiny_llama):
    info = info_from_config(tiny_bert.config, "tiny")
    with pytest.raises(NotApplicable, match="keeps no cache"):
        kv_cache_bytes_per_token(tiny_bert, info, CPU, torch.float32)

    class Forgetful(nn.Module):
        def forward(self, input_ids, attention_mask=None, use_cache=False):
            return object()

    info = info_from_config(tiny_llama.config, "tiny")
    with pytest.raises(NotApplicable, match="returns no cache"):
        kv_cache_bytes_per_token(Forgetful(), info, CPU, torch.float32)


# --- peak -----------------------------------------------------------------------------------------


def allocate(mebibytes: int) -> None:
    held = torch.ones(mebibytes * MIB // 4)  # written, so that it is resident
    del held


@pytest.mark.parametrize("resettable", [True, False])
def test_the_peak_on_the_cpu_is_the_growth_while_it_lasted(monkeypatch, resettable):
    if not resettable:  # a system where the high-water mark cannot be set back
        monkeypatch.setattr(memory_module, "_reset_high_water", lambda: False)
    with PeakMemory("cpu") as memory:
        held = torch.ones(64 * MIB // 4)
        held += 1  # long enough for the sampler
        del held
        allocate(16)
    assert 60 * MIB < memory.peak_bytes < 80 * MIB
    assert memory.mode == ("rss_high_water" if resettable else "rss_sampled")
    assert "resident memory" in memory.note
    assert memory.reserved_bytes is None


def test_an_earlier_and_higher_peak_does_not_count():
    allocate(128)
    with PeakMemory("cpu") as memory:
        allocate(32)
    assert 28 * MIB < memory.peak_bytes < 48 * MIB


def test_growth_can_be_counted_from_an_earlier_start():
    with PeakMemory("cpu") as first:
        held = torch.ones(48 * MIB // 4)
    with PeakMemory("cpu", since=first) as second:
        allocate(16)
    del held
    assert 60 * MIB < second.peak_bytes < 80 * MIB


def test_without_proc_the_lifetime_peak_bounds_the_growth(monkeypatch, tmp_path):
    monkeypatch.setattr(memory_module, "_reset_high_water", lambda: False)
    monkeypatch.setattr(memory_module, "_STATM", tmp_path / "absent")
    with PeakMemory("cpu") as memory:
        allocate(8)
    assert memory.mode == "rss_lifetime"
    assert "lower bound" in memory.note
    assert memory.peak_bytes >= 0
