"""Pooling key-value heads: exact arithmetic, exact cache sizes, and models that stay usable."""

from __future__ import annotations

import copy

import pytest
import torch
from harness_plugins.attention._pooling import pool_heads
from harness_plugins.attention.mqa import (
    GQA,
    MQA,
    GqaOptions,
    MqaOptions,
    groups_of,
    uptraining_steps,
)
from torch import nn
from transformers import DynamicCache, StaticCache

from harness.errors import ConfigError, NotApplicable
from harness.measure.generation import decode_logits_match
from harness.measure.memory import kv_cache_bytes_per_token
from harness.models.info import info_from_config
from harness.nn.grouped_query import regroup_key_values
from harness.nn.sdpa import shared_heads_sdpa
from harness.testing import make_context, tiny_model

DECODERS = ["llama", "opt", "gpt2"]
HEADS, WIDTH = 4, 32


def _tokens(length: int, batch: int = 2) -> torch.Tensor:
    return torch.randint(3, 256, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
def _logits(model, tokens, **kwargs):
    return model(input_ids=tokens, **kwargs).logits


def _mean(heads: torch.Tensor, groups: int) -> torch.Tensor:
    return pool_heads(heads, groups, "mean")


def _head_rows(model, kind: str):
    """(tensor, slice) of the key or value rows of every layer's weight and bias."""
    for name, parameter in model.named_parameters():
        if f"{kind}_proj" in name:
            yield parameter, slice(None)
        elif "c_attn" in name:
            start = {"k": 1, "v": 2}[kind] * HEADS * WIDTH
            yield parameter, slice(start, start + HEADS * WIDTH)


def _make_heads_identical(model, groups: int) -> None:
    with torch.no_grad():
        for kind in "kv":
            for parameter, rows in _head_rows(model, kind):
                heads = parameter[rows].view(groups, HEADS // groups, WIDTH, *parameter.shape[1:])
                heads.copy_(heads[:, :1].clone().expand_as(heads))


def _random_biases(model) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


# --- pooling --------------------------------------------------------------------------------------


def test_mean_pools_neighbouring_heads():
    heads = torch.randn(6, 3, 5)
    pooled = pool_heads(heads, 2)
    for group in range(2):
        expected = sum(heads[group * 3 + member] for member in range(3)) / 3
        assert torch.allclose(pooled[group], expected)


def test_first_and_random():
    heads = torch.randn(6, 3, 50)
    assert torch.equal(pool_heads(heads, 3, "first"), heads[::2])
    noise = pool_heads(heads, 2, "random", torch.Generator().manual_seed(0))
    again = pool_heads(heads, 2, "random", torch.Generator().manual_seed(0))
    assert torch.equal(noise, again)
    assert noise.std() == pytest.approx(float(heads.std()), rel=0.15)
    assert pool_heads(heads[..., 0], 2, "random").abs().max() == 0  # biases


# --- on models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", DECODERS)
def test_as_many_groups_as_heads_is_the_identity(family):
    """Also proves that the replacement modules compute bit for bit what OPT's and GPT-2's do."""
    model, tokens = tiny_model(family), _tokens(40)
    _random_biases(model)
    before = _logits(model, tokens)
    regroup_key_values(model, HEADS, _mean)
    assert torch.equal(_logits(model, tokens), before)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("init", ["mean", "first"])
def test_identical_heads_pool_without_loss(family, groups, init):
    model, tokens = tiny_model(family), _tokens(40)
    _random_biases(model)
    _make_heads_identical(model, groups)
    before = _logits(model, tokens)
    regroup_key_values(model, groups, lambda heads, g: pool_heads(heads, g, init))
    assert (_logits(model, tokens) - before).abs().max() <= 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_pooling_equals_sharing_the_averaged_head(family):
    """Reference: the original model whose every head holds its group's average."""
    pooled, reference = tiny_model(family), tiny_model(family)
    regroup_key_values(pooled, 2, _mean)
    with torch.no_grad():
        for kind in "kv":
            for parameter, rows in _head_rows(reference, kind):
                heads = parameter[rows].view(2, 2, WIDTH, *parameter.shape[1:])
                heads.copy_(heads.mean(1, keepdim=True).expand_as(heads))
    tokens = _tokens(40)
    assert (_logits(pooled, tokens) - _logits(reference, tokens)).abs().max() <= 1e-5


def test_a_grouped_model_is_pooled_further():
    model = tiny_model("llama")
    regroup_key_values(model, 2, _mean)
    once = copy.deepcopy(model)
    regroup_key_values(once, 1, _mean)
    straight = tiny_model("llama")
    regroup_key_values(straight, 1, _mean)
    assert (_logits(once, _tokens(20)) - _logits(straight, _tokens(20))).abs().max() <= 1e-5
    assert once.config.num_key_value_heads == 1


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_the_cache_shrinks_by_exactly_heads_over_groups(family, groups):
    before, after = tiny_model(family), tiny_model(family)
    regroup_key_values(after, groups, _mean)
    measured = [
        kv_cache_bytes_per_token(
            model, info_from_config(model.config, family), torch.device("cpu"), torch.float32
        )[0]
        for model in (before, after)
    ]
    assert measured[0] / measured[1] == HEADS / groups
    held = []
    for model in (before, after):
        static = StaticCache(config=model.config, max_cache_len=32)
        positions = {"position_ids": torch.arange(10)[None]}
        _logits(model, _tokens(10), past_key_values=static, **positions)
        held.append(sum(layer.keys.nbytes + layer.values.nbytes for layer in static.layers))
        assert held[-1] % (2 * 32) == 0  # batch of two, 32 places
    assert held[0] / held[1] == HEADS / groups


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_token_by_token_equals_one_shot(family, kind):
    model, length = tiny_model(family), 24
    regroup_key_values(model, 2, _mean)
    tokens = _tokens(length)
    expected = _logits(model, tokens)
    cache = (
        DynamicCache(config=model.config)
        if kind == "dynamic"
        else StaticCache(config=model.config, max_cache_len=length)
    )
    pieces, seen = [], 0
    for size in (7, 3, *[1] * 14):
        kwargs = {
            "position_ids": torch.arange(seen, seen + size)[None],
            "attention_mask": torch.ones(2, length if kind == "static" else seen + size),
        }
        pieces.append(_logits(model, tokens[:, seen : seen + size], past_key_values=cache, **kwargs))
        seen += size
    assert (torch.cat(pieces, 1) - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", DECODERS)
def test_the_timed_decode_step_computes_the_model(family):
    model = tiny_model(family)
    regroup_key_values(model, 1, _mean)
    assert decode_logits_match(model, _tokens(9), 16) <= 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_logits_do_not_depend_on_later_tokens(family):
    model, tokens = tiny_model(family), _tokens(30)
    regroup_key_values(model, 1, _mean)
    changed = tokens.clone()
    changed[:, 12:] = 255 - changed[:, 12:]
    assert torch.equal(_logits(model, changed)[:, :12], _logits(model, tokens)[:, :12])


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_both_attentions_of_transformers_agree(family, attention):
    model, tokens = tiny_model(family), _tokens(30)
    regroup_key_values(model, 2, _mean)
    expected = _logits(model, tokens)
    model.set_attn_implementation(attention)
    assert (_logits(model, tokens) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("family", DECODERS)
def test_local_attention_and_shared_heads_combine(family):
    from harness_plugins.attention.block_local import METHOD, BlockLocalOptions

    one, other = tiny_model(family), tiny_model(family)
    regroup_key_values(one, 2, _mean)
    METHOD.transform(one, BlockLocalOptions(window=8), make_context(one))
    METHOD.transform(other, BlockLocalOptions(window=8), make_context(other))
    regroup_key_values(other, 2, _mean)
    tokens = _tokens(50)
    assert torch.equal(_logits(one, tokens), _logits(other, tokens))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_decode_step_that_reads_shared_heads_once_computes_the_same(kv_heads):
    query, key, value = (torch.randn(2, heads, n, 8) for heads, n in ((4, 1), *[(kv_heads, 9)] * 2))
    allowed = torch.rand(2, 1, 1, 9) < 0.7
    allowed[..., 0] = True
    repeated = (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated, attn_mask=allowed)
    result = shared_heads_sdpa(query, key, value, allowed)
    assert torch.allclose(result, expected.transpose(1, 2), atol=1e-6)


def test_uptraining_trains_and_is_recorded():
    model = tiny_model("opt")
    context = make_context(model)
    MQA.transform(model, MqaOptions(), context)
    assert context.trained_steps == context.settings.steps
    recorded = {record.metric: record.value for record in context.records}
    assert recorded["key_value_heads"] == 1
    assert recorded["uptraining_loss"] > 0
    assert model.model.decoder.layers[0].self_attn.k_proj.weight.requires_grad


def test_random_weights_are_only_pooled():
    model = tiny_model("llama")
    config = model.config
    for kind in ("synthetic", "scratch"):
        info = info_from_config(config, "shape:llama", **{kind: True})
        fresh = tiny_model("llama")
        context = make_context(fresh, info)
        MQA.transform(fresh, MqaOptions(), context)
        assert context.trained_steps == 0
        assert fresh.config.num_key_value_heads == 1


def test_the_length_of_uptraining():
    assert uptraining_steps(MqaOptions(), 200) == 200
    assert uptraining_steps(MqaOptions(alpha=0.05), 200) == 10
    assert uptraining_steps(MqaOptions(steps=7), 200) == 7
    assert MQA.needs_of(MqaOptions(steps=0)) == {"decoder"}
    with pytest.raises(ConfigError, match="not both"):
        MqaOptions.parse({"steps": 3, "alpha": 0.5})


def test_the_number_of_groups():
    assert groups_of(MqaOptions(), 32) == 1
    assert groups_of(GqaOptions(), 32) == 8
    assert groups_of(GqaOptions(), 2) == 1
    assert groups_of(GqaOptions(groups=4), 32) == 4


def test_it_says_where_it_does_not_fit():
    llama = info_from_config(tiny_model("llama").config, "llama")
    encoder = info_from_config(tiny_model("encoder").config, "encoder")
    assert MQA.applies(llama, MqaOptions()) is None
    assert "cache" in MQA.applies(encoder, MqaOptions())
    assert "already" in GQA.applies(llama, GqaOptions(groups=4))
    assert "divide" in GQA.applies(llama, GqaOptions(groups=3))
    assert "more than" in GQA.applies(llama, GqaOptions(groups=8))
    with pytest.raises(ConfigError, match="groups=3"):
        regroup_key_values(tiny_model("llama"), 3, _mean)
    with pytest.raises(ConfigError, match="groups"):
        GqaOptions.parse({"groups": 0})


def test_projections_that_are_no_longer_plain_are_refused():
    model = tiny_model("llama")
    model.model.layers[1].self_attn.k_proj = nn.Identity()
    with pytest.raises(NotApplicable, match="plain query"):
        regroup_key_values(model, 1, _mean)


def test_a_pooled_llama_saves_and_loads(tmp_path):
    from transformers import LlamaForCausalLM

    model = tiny_model("llama")
    regroup_key_values(model, 2, _mean)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(_logits(loaded, _tokens(30)), _logits(model, _tokens(30)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_decoding_over_a_long_cache_gets_faster():
    """32 heads of 128, batch 64, context 8k: 8 groups at most 0.45x, one group 0.25x of 32."""
    from triton.testing import do_bench

    times = {}
    query = torch.randn(64, 32, 1, 128, device="cuda", dtype=torch.bfloat16)
    for groups in (32, 8, 1):
        key = torch.randn(64, groups, 8192, 128, device="cuda", dtype=torch.bfloat16)
        times[groups] = do_bench(
            lambda: shared_heads_sdpa(query, key, key)  # noqa: B023
        )
    assert times[8] <= 0.45 * times[32]
    assert times[1] <= 0.25 * times[32]
