"""What is put at an activation site changes exactly that tensor, in every family."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.errors import NotApplicable
from harness.measure.compiling import compiled
from harness.nn.activation_grid import ActivationQuantizer, tensor_grid
from harness.nn.activation_sites import (
    KINDS,
    Site,
    activation_sites,
    at_sites,
    inputs_of_linears,
    observe_sites,
    put_for_now,
    run,
)
from harness.nn.attention import swap_attention
from harness.nn.surgery import block_linears
from harness.testing.models import TINY_FAMILIES, tiny_model

TOKENS = torch.randint(5, 256, (2, 12), generator=torch.Generator().manual_seed(0))
Change = Callable[[str, torch.Tensor], torch.Tensor]


class Scaled(nn.Module):
    """A change that no other place could make up for."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def factor(kind: str) -> float:
    return 1 + 0.01 * (1 + list(KINDS).index(kind))


def changes(model: nn.Module) -> dict[Site, nn.Module]:
    return {site: Scaled(factor(site.kind)) for site in activation_sites(model)}


@torch.no_grad()
def output(model: nn.Module, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    return run(model, tokens)[0]


# --- against forward passes written out -----------------------------------------------------------


def changed(kind: str, x: torch.Tensor) -> torch.Tensor:
    return x * factor(kind)


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, causal: bool, scale: float
) -> torch.Tensor:
    batch, length, width = q.shape
    q, k, v = (changed(n, x) for n, x in zip(("query", "key", "value"), (q, k, v), strict=True))
    q, k, v = (x.view(batch, length, heads, -1).transpose(1, 2) for x in (q, k, v))
    scores = changed("scores", q @ k.transpose(2, 3) * scale)
    if causal:
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
    mixed = changed("probs", scores.softmax(-1)) @ v
    return changed("context", mixed.transpose(1, 2).reshape(batch, length, width))


def opt_by_hand(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    decoder = model.model.decoder
    positions = decoder.embed_positions.weight[torch.arange(tokens.shape[1]) + 2]
    x = changed("embedding_sum", decoder.embed_tokens(tokens) + positions)
    for block in decoder.layers:
        h = changed("attn_in", block.self_attn_layer_norm(x))
        a = block.self_attn
        scale = (x.shape[-1] // 4) ** -0.5
        c = attention(a.q_proj(h) * scale, a.k_proj(h), a.v_proj(h), 4, True, 1.0)
        x = changed("attn_sum", x + changed("attn_out", a.out_proj(c)))
        h = changed("ffn_in", block.final_layer_norm(x))
        h = changed("ffn_hidden", functional.relu(block.fc1(h)))
        x = changed("ffn_sum", x + changed("ffn_out", block.fc2(h)))
    return changed("logits", model.lm_head(changed("head_in", decoder.final_layer_norm(x))))


def llama_by_hand(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    x = changed("embedding_sum", model.model.embed_tokens(tokens))
    length, head_dim = tokens.shape[1], x.shape[-1] // 4
    angles = torch.outer(torch.arange(length), 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim))
    cos, sin = (f(torch.cat([angles, angles], -1))[:, None] for f in (torch.cos, torch.sin))

    def rotated(flat: torch.Tensor) -> torch.Tensor:
        y = flat.view(*flat.shape[:2], 4, head_dim)
        half = torch.cat([-y[..., head_dim // 2 :], y[..., : head_dim // 2]], -1)
        return (y * cos + half * sin).flatten(2)

    for block in model.model.layers:
        h = changed("attn_in", block.input_layernorm(x))
        a = block.self_attn
        c = attention(rotated(a.q_proj(h)), rotated(a.k_proj(h)), a.v_proj(h), 4, True, head_dim**-0.5)
        x = changed("attn_sum", x + changed("attn_out", a.o_proj(c)))
        h = changed("ffn_in", block.post_attention_layernorm(x))
        gate = changed("ffn_gate", functional.silu(block.mlp.gate_proj(h)))
        h = changed("ffn_hidden", gate * changed("ffn_up", block.mlp.up_proj(h)))
        x = changed("ffn_sum", x + changed("ffn_out", block.mlp.down_proj(h)))
    return changed("logits", model.lm_head(changed("head_in", model.model.norm(x))))


def gpt2_by_hand(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    base = model.transformer
    x = changed("embedding_sum", base.wte(tokens) + base.wpe.weight[: tokens.shape[1]])
    for block in base.h:
        h = changed("attn_in", block.ln_1(x))
        q, k, v = block.attn.c_attn(h).chunk(3, -1)
        c = attention(q, k, v, 4, True, (x.shape[-1] // 4) ** -0.5)
        x = changed("attn_sum", x + changed("attn_out", block.attn.c_proj(c)))
        h = changed("ffn_in", block.ln_2(x))
        h = changed("ffn_hidden", functional.gelu(block.mlp.c_fc(h), approximate="tanh"))
        x = changed("ffn_sum", x + changed("ffn_out", block.mlp.c_proj(h)))
    return changed("logits", model.lm_head(changed("head_in", base.ln_f(x))))


def encoder_by_hand(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    e = model.embeddings
    parts = e.position_embeddings.weight[: tokens.shape[1]] + e.token_type_embeddings.weight[0]
    x = changed("embedding_sum", e.word_embeddings(tokens) + parts)
    x = changed("embedding_norm", e.LayerNorm(x))
    for block in model.encoder.layer:
        a = block.attention.self
        c = attention(a.query(x), a.key(x), a.value(x), 4, False, (x.shape[-1] // 4) ** -0.5)
        y = changed("attn_sum", x + changed("attn_out", block.attention.output.dense(c)))
        y = changed("ffn_in", block.attention.output.LayerNorm(y))
        h = changed("ffn_hidden", functional.gelu(block.intermediate.dense(y)))
        x = changed("ffn_sum", y + changed("ffn_out", block.output.dense(h)))
        x = changed("block_out", block.output.LayerNorm(x))
    return x


@pytest.mark.parametrize(
    ("family", "by_hand"),
    [("opt", opt_by_hand), ("llama", llama_by_hand), ("gpt2", gpt2_by_hand), ("encoder", encoder_by_hand)],
)
def test_every_site_is_the_tensor_it_is_called(family, by_hand):
    model = tiny_model(family)
    with torch.no_grad():
        expected = by_hand(copy.deepcopy(model), TOKENS)
    at_sites(model, changes(model))
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_every_linear_reads_the_site_that_is_named(family):
    model = tiny_model(family)
    sites = activation_sites(model)
    reads = inputs_of_linears(model, sites)
    assert reads.keys() == {name for name, _ in block_linears(model)}
    seen: dict[str, torch.Tensor] = {}
    fed: dict[str, torch.Tensor] = {}
    for name in reads:
        model.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: fed.update({name: args[0].detach().flatten(0, -2)})
        )
    observe_sites(model, sites, [TOKENS], lambda site, x: seen.update({site.name: x.clone()}))
    for name, site in reads.items():
        assert torch.equal(fed[name], seen[site.name].flatten(0, -2)), name


# --- nothing else changes -------------------------------------------------------------------------


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_looking_changes_nothing_and_leaves_nothing(family):
    model = tiny_model(family)
    before, keys = output(model), list(model.state_dict())
    seen: dict[str, int] = {}
    observe_sites(model, activation_sites(model), [TOKENS], lambda s, x: seen.update({s.name: x.numel()}))
    assert len(seen) == len(activation_sites(model))
    assert {name.split(".")[-1] for name in seen} <= KINDS.keys()
    if family in ("llama", "opt", "gpt2"):  # hidden scores are not shown
        assert seen["0.scores"] == 2 * 4 * 12 * 13 // 2
    assert list(model.state_dict()) == keys
    assert torch.equal(output(model), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def rounded(family: str) -> nn.Module:
    model = tiny_model(family, layers=3)
    grid = tensor_grid(torch.tensor(-4.0), torch.tensor(4.0), 8)
    at_sites(model, {site: ActivationQuantizer(grid) for site in activation_sites(model)})
    return model


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_what_is_there_is_copied_and_saved(family):
    model = rounded(family)
    expected = output(model)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, ActivationQuantizer):
            module.scale.mul_(3)
    assert not torch.equal(output(twin), expected)
    assert torch.equal(output(model), expected)  # the copy shares nothing
    saved = io.BytesIO()
    torch.save(model.state_dict(), saved)
    saved.seek(0)
    twin.load_state_dict(torch.load(saved, weights_only=True))
    assert torch.equal(output(twin), expected)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_what_is_there_is_compiled(family):
    model = rounded(family)
    expected = output(model)
    with compiled(model, lambda graph, _inputs: graph.forward) as code:
        assert torch.equal(output(model), expected)
    assert len(code) <= 3  # blocks share their code


@pytest.mark.parametrize("family", ["gpt2"])
def test_a_site_that_only_some_blocks_have_is_seen_by_the_compiler(family):
    model = tiny_model(family, layers=3)
    sites = [site for site in activation_sites(model) if site.name in ("1.ffn_sum", "2.attn_out")]
    at_sites(model, {site: Scaled(1.5) for site in sites})
    expected = output(model)
    with compiled(model, lambda graph, _inputs: graph.forward):
        assert torch.equal(output(model), expected)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_generation_with_a_cache_is_generation_without(family):
    model = rounded(family)
    short = TOKENS[:, :6]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mask = torch.ones_like(short)
    with_cache = model.generate(short, attention_mask=mask, **options)
    assert torch.equal(with_cache, model.generate(short, attention_mask=mask, use_cache=False, **options))


def test_embeddings_that_a_caller_gives_are_not_written_to():
    model = rounded("llama")
    given = torch.randn(1, 5, 128)
    before = given.clone()
    with torch.no_grad():
        model(inputs_embeds=given)
    assert torch.equal(given, before)


def test_shared_key_value_heads_are_repeated():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    before = output(model)
    with put_for_now(model, {site: nn.Identity() for site in activation_sites(model)}):
        torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)


def test_padding_is_not_attended_to():
    model = rounded("encoder")
    mask = torch.ones_like(TOKENS)
    mask[:, -4:] = 0
    with torch.no_grad():
        padded = model(input_ids=TOKENS, attention_mask=mask).last_hidden_state[:, :-4]
    torch.testing.assert_close(padded, output(model, TOKENS[:, :-4]), rtol=1e-4, atol=1e-5)


# --- refusals -------------------------------------------------------------------------------------


def test_models_without_known_sites_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    post_norm = OPTConfig(
        vocab_size=64, hidden_size=16, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2,
        word_embed_proj_dim=16, max_position_embeddings=32, do_layer_norm_before=False,
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="post-norm OPT"):
        activation_sites(OPTForCausalLM(post_norm))


def test_an_attention_that_another_method_changed_is_refused():
    model = tiny_model("llama")
    swap_attention(model, "of_a_test", lambda *_a, **_k: (TOKENS, None), mask="eager")
    with pytest.raises(NotApplicable, match="another step of the chain"):
        at_sites(model, changes(model))
