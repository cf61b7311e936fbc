"""Operations and bytes of tiny models against closed forms, and what they make of a latency."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from harness.measure.ceilings import Ceilings
from harness.measure.generation import Generation
from harness.measure.roofline import bound_seconds, decode_records, prefill_records
from harness.measure.workload import (
    PhaseWork,
    cache_of,
    cache_read_bytes,
    counted,
    visible_pairs,
    work_of,
)
from harness.nn.codebook_embedding import CodebookEmbedding
from harness.nn.quantized import QuantizedLinear
from harness.records import Record, Scenario
from tests.measure.models import tiny_grouped, tiny_mistral
from tests.measure.test_scenario import measured_of

LAYERS, HIDDEN, FFN, VOCAB, HEAD = 2, 64, 128, 256, 16
BLOCK = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN  # weights of the linear layers of a Llama block


def brute_force_pairs(tokens, window):
    return sum(1 for query in range(tokens) for key in range(query + 1) if query - key < window)


@pytest.mark.parametrize(("tokens", "window"), [(1, 1), (7, 3), (16, 8), (8, 16), (5, 5)])
def test_visible_pairs_are_those_of_the_mask(tokens, window):
    assert visible_pairs(tokens, window) == brute_force_pairs(tokens, window)
    assert visible_pairs(tokens) == brute_force_pairs(tokens, tokens)
    assert visible_pairs(tokens, causal=False) == tokens**2


def test_the_operations_of_a_llama(tiny_llama):
    batch, prompt, new = 3, 16, 4
    work = work_of(measured_of(tiny_llama, Scenario(batch, prompt, new)))
    head = VOCAB * HIDDEN
    # The head sees the last position only.
    assert work.prefill.linear_flops == 2 * batch * (LAYERS * BLOCK * prompt + head)
    assert work.prefill.attention_flops == 4 * batch * HIDDEN * LAYERS * prompt * (prompt + 1) / 2
    assert work.decode.linear_flops == 2 * batch * (LAYERS * BLOCK + head)
    stored = prompt + (new + 1) / 2  # the mean over the steps, which see 17, 18, 19 and 20 keys
    assert stored == sum(range(prompt + 1, prompt + new + 1)) / new
    assert work.decode.attention_flops == 4 * batch * HIDDEN * LAYERS * stored


def test_the_bytes_that_a_step_must_read(tiny_llama):
    batch, prompt, new = 3, 16, 4
    work = work_of(measured_of(tiny_llama, Scenario(batch, prompt, new))).decode
    norms = (2 * LAYERS + 1) * HIDDEN
    buffers = sum(b.numel() * b.element_size() for b in {id(b): b for b in tiny_llama.buffers()}.values())
    # Tied: the head reads the whole table, the embedding a row for each sequence.
    table, rows = VOCAB * HIDDEN, batch * HIDDEN
    assert work.weight_bytes == 4 * (LAYERS * BLOCK + norms + table + rows) + buffers
    assert work.cache_bytes == pytest.approx(2 * LAYERS * batch * (prompt + 2.5) * HIDDEN * 4)
    assert work.read_bytes == work.weight_bytes + work.cache_bytes


def test_an_embedding_without_a_head_is_looked_up_and_not_read(tiny_opt):
    tiny_opt.lm_head.weight = nn.Parameter(tiny_opt.lm_head.weight.detach().clone())
    work = work_of(measured_of(tiny_opt, Scenario(1, 8, 2))).decode
    everything = sum(p.numel() for p in tiny_opt.parameters())
    tables = tiny_opt.model.decoder.embed_tokens.weight.numel()
    tables += tiny_opt.model.decoder.embed_positions.weight.numel()
    assert work.weight_bytes == 4 * (everything - tables + 2 * HIDDEN)


def test_grouped_queries_shrink_the_cache_and_not_the_attention():
    whole, grouped = (work_of(measured_of(tiny_grouped(heads), Scenario(1, 8, 2))).decode for heads in (4, 1))
    assert grouped.attention_flops == whole.attention_flops
    assert grouped.cache_bytes == pytest.approx(whole.cache_bytes / 4)


def test_a_window_bounds_pairs_and_cache():
    window, prompt = 8, 16
    work = work_of(measured_of(tiny_mistral(window), Scenario(1, prompt, 4)))
    assert work.prefill.attention_flops == 4 * HIDDEN * LAYERS * brute_force_pairs(prompt, window)
    assert work.decode.attention_flops == 4 * HIDDEN * LAYERS * window
    assert work.decode.cache_bytes == 2 * LAYERS * window * 2 * HEAD * 4  # two key-value heads


def test_an_encoder_sees_all_pairs_and_decodes_nothing(tiny_bert):
    batch, tokens = 2, 16
    work = work_of(measured_of(tiny_bert, Scenario(batch, tokens, 0)))
    block = 4 * HIDDEN * HIDDEN + 2 * HIDDEN * FFN
    pooler = HIDDEN * HIDDEN  # reads the first token
    assert work.prefill.linear_flops == 2 * batch * (LAYERS * block * tokens + pooler)
    assert work.prefill.attention_flops == 4 * batch * HIDDEN * LAYERS * tokens**2
    assert work.decode is None


def test_only_what_runs_is_counted():
    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            return self.used(x)

    model = Partly()
    with counted(model) as counter:
        model(torch.zeros(2, 5, 8))
    assert counter.linear_flops == 2 * 10 * 8 * 4
    assert counter.weight_bytes == 4 * (8 * 4 + 4)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_runs_twice_is_read_once():
    layer = nn.Linear(8, 8, bias=False)
    with counted(nn.Sequential(layer, layer)) as counter:
        layer(layer(torch.zeros(1, 8)))
    assert counter.linear_flops == 2 * 2 * 8 * 8
    assert counter.weight_bytes == 4 * 8 * 8


def test_packed_weights_count_as_they_are_stored():
    layer = QuantizedLinear(128, 32, bits=4, group_size=128)
    with counted(layer) as counter:
        layer(torch.zeros(3, 128))
    assert counter.linear_flops == 2 * 3 * 128 * 32
    stored = sum(b.numel() * b.element_size() for b in layer.buffers())
    assert counter.weight_bytes == stored < 128 * 32


def test_a_packed_embedding_reads_the_rows_that_it_looks_up():
    embedding = CodebookEmbedding(100, 64, bits=4, outliers=5, most_outliers=1)
    with counted(embedding) as counter:
        embedding(torch.tensor([[3, 7, 99]]))
    stored = sum(b.numel() * b.element_size() for b in embedding.buffers())
    assert stored == 100 * 32 + 16 * 4 + 5 * 8
    assert counter.weight_bytes == 3 * stored // 100
    assert counter.linear_flops == 0


def test_the_hooks_go_even_where_the_model_fails():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), counted(model):
        model(torch.zeros(1, 5))
    assert not model[0]._forward_pre_hooks


def test_a_cache_without_keys_is_read_whole():
    state = SimpleNamespace(states=[torch.zeros(2, 10), torch.zeros(2, 10)])
    assert cache_read_bytes(state, 5) == 2 * 20 * 4


def test_the_cache_of_a_generation_is_found(tiny_llama):
    generation = Generation(tiny_llama, torch.zeros(1, 4, dtype=torch.int64), 4)
    generation.prefill()
    whole = 2 * LAYERS * 8 * HIDDEN * 4  # room for prompt and new tokens
    assert cache_read_bytes(cache_of(generation), 8) == whole
    assert cache_read_bytes(cache_of(generation), 4) == whole / 2


# --- achieved -----------------------------------------------------------------------------------------

CEILINGS = Ceilings("a device", 1, {"matmul_float32": 1e12, "copy": 2e9, "read": 4e9})
LATENCY = Record("decode_latency", 0.01, "s", lower=0.008, upper=0.016, n=9, mode="graph")
WORK = PhaseWork(linear_flops=3e9, attention_flops=1e9, weight_bytes=15_000_000, cache_bytes=1_000_000.0)


def test_utilisation_is_what_is_needed_over_what_is_possible():
    records = {r.metric: r for r in decode_records(WORK, LATENCY, CEILINGS, "float32")}
    assert records["decode_flops"].value == 4e9
    assert records["decode_flops_per_s"].value == 4e11
    assert records["decode_mfu"].value == pytest.approx(0.4)
    assert records["decode_read_bytes"].value == 16e6
    assert records["decode_bytes_per_s"].value == pytest.approx(1.6e9)
    mbu = records["decode_mbu"]
    assert mbu.value == pytest.approx(0.4)  # of the faster of reading and copying
    assert (mbu.lower, mbu.upper) == (pytest.approx(0.25), pytest.approx(0.5))
    assert (mbu.n, mbu.mode, mbu.unit) == (9, "graph", "1")
    assert "0.004 TB/s" in mbu.note


def test_without_a_ceiling_there_is_no_share_but_the_reason():
    records = {r.metric: r for r in prefill_records(WORK, LATENCY, CEILINGS, "bfloat16")}
    assert set(records) == {"prefill_flops", "prefill_flops_per_s"}
    assert records["prefill_flops_per_s"].note == "no ceiling to compare with: bfloat16 matrix product"


def test_the_bounds_of_a_phase():
    assert bound_seconds(WORK, CEILINGS, "float32") == (pytest.approx(4e-3), pytest.approx(4e-3))
    assert bound_seconds(WORK, Ceilings(), "float32") == (None, None)
