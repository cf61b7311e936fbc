"""Planted outliers: the activations change, the function does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.outliers import inject_outliers

TOKENS = torch.arange(24).reshape(2, 12) * 7 % 256


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def input_of(model: nn.Module, name: str, block: int = 0) -> torch.Tensor:
    """What a layer of a block reads, [tokens, in]."""
    caught = []
    layer = blocks_of(model)[block][1].get_submodule(name)
    handle = layer.register_forward_pre_hook(lambda _m, args: caught.append(args[0].detach()))
    logits(model)
    handle.remove()
    return caught[0].reshape(-1, caught[0].shape[-1]).clone()


def vivid(model: nn.Module) -> nn.Module:
    """Random gains, biases and larger weights: a fresh model has gains of one and hides mistakes."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = "norm" in name.lower() or "ln_" in name
            parameter.copy_(1 + 0.2 * noise if is_gain and "weight" in name else 0.1 * noise)
    return model


def gqa_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


CASES = [
    ("tiny_llama", ("norm",)),
    ("tiny_llama", ("ffn",)),
    ("tiny_llama", ("vo",)),
    ("tiny_llama", ("norm", "ffn", "vo")),
    ("tiny_opt", ("norm",)),
    ("tiny_opt", ("ffn",)),
    ("tiny_opt", ("vo",)),
    ("tiny_opt", ("norm", "ffn", "vo")),
    ("tiny_gpt2", ("norm",)),
]


@pytest.mark.parametrize(("name", "sites"), CASES)
def test_a_power_of_two_leaves_the_logits_bit_identical(request, name, sites):
    model = vivid(request.getfixturevalue(name))
    before = logits(model)
    assert inject_outliers(model, k=64.0, channels=4, sites=sites) is model
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("name", "sites"), CASES)
def test_any_factor_preserves_the_function(request, name, sites):
    model = vivid(request.getfixturevalue(name))
    before = logits(model)
    inject_outliers(model, k=77.7, channels=5, sites=sites)
    assert float((logits(model) - before).abs().max()) <= 1e-4


def test_bfloat16_is_bit_identical_too(tiny_llama):
    model = vivid(tiny_llama).to(torch.bfloat16)
    before = logits(model)
    inject_outliers(model, sites=("norm", "ffn", "vo"))
    assert torch.equal(logits(model), before)


def test_query_heads_that_share_a_key_value_head_are_all_compensated():
    model = vivid(gqa_llama())
    before = logits(model)
    inject_outliers(model, sites=("vo",), channels=3)
    assert torch.equal(logits(model), before)
    grown = input_of(model, "self_attn.o_proj").abs().amax(0)
    assert int((grown > 10 * grown.median()).sum()) == 6  # two query heads for each of three channels


@pytest.mark.parametrize(
    ("name", "site", "layer"),
    [
        ("tiny_llama", "norm", "self_attn.q_proj"),
        ("tiny_llama", "norm", "mlp.up_proj"),
        ("tiny_llama", "ffn", "mlp.down_proj"),
        ("tiny_llama", "vo", "self_attn.o_proj"),
        ("tiny_opt", "norm", "fc1"),
        ("tiny_opt", "ffn", "fc2"),
        ("tiny_gpt2", "norm", "attn.c_attn"),
    ],
)
def test_exactly_the_chosen_channels_grow_by_k_in_every_block(request, name, site, layer):
    model = vivid(request.getfixturevalue(name))
    before = [input_of(model, layer, block) for block in range(2)]
    inject_outliers(model, k=64.0, channels=4, sites=(site,))
    chosen = []
    for block in range(2):
        after = input_of(model, layer, block)
        ratio = after.abs().sum(0) / before[block].abs().sum(0).clamp(min=1e-9)
        grown = (ratio - 64).abs() < 1e-3
        assert int(grown.sum()) == 4
        assert torch.equal(after[:, ~grown], before[block][:, ~grown])
        chosen.append(grown)
    assert torch.equal(chosen[0], chosen[1])


def test_the_seed_chooses_the_channels(tiny_llama):
    def grown(seed: int) -> list[int]:
        from copy import deepcopy

        model = inject_outliers(deepcopy(tiny_llama), seed=seed)
        gain = model.model.layers[0].input_layernorm.weight
        return (gain > 10).nonzero().flatten().tolist()

    assert grown(0) == grown(0)
    assert grown(0) != grown(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0.0}, "k must be a positive number"),
        ({"k": float("nan")}, "k must be a positive number"),
        ({"channels": 0}, "channels must be at least 1"),
        ({"channels": 65}, "channels=65, but the norm site has 64"),
        ({"sites": ("norm", "head")}, "sites must be some of norm, ffn, vo"),
        ({"sites": ()}, "sites must be some of"),
        ({"sites": ("norm", "norm")}, "each once"),
    ],
)
def test_senseless_options_are_refused_before_anything_changes(tiny_llama, options, message):
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    with pytest.raises(ConfigError, match=message):
        inject_outliers(tiny_llama, **options)
    after = tiny_llama.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_sites_that_would_change_the_function_are_refused(tiny_bert, tiny_gpt2, tiny_opt):
    with pytest.raises(NotApplicable, match="residual branch reads its norms"):
        inject_outliers(tiny_bert)
    with pytest.raises(NotApplicable, match="activation of gpt2"):
        inject_outliers(tiny_gpt2, sites=("norm", "ffn"))
    with pytest.raises(NotApplicable, match="vo site"):
        inject_outliers(tiny_gpt2, sites=("vo",))
    tiny_opt.config.activation_function = "gelu"
    with pytest.raises(NotApplicable, match="activation of opt"):
        inject_outliers(tiny_opt, sites=("ffn",))
    tiny_opt.config.do_layer_norm_before = False
    with pytest.raises(NotApplicable, match="residual branch"):
        inject_outliers(tiny_opt)


def test_layers_that_are_already_replaced_are_refused(tiny_llama):
    name = anatomy_of(tiny_llama).qkv[0]
    last = blocks_of(tiny_llama)[-1][1]
    last.get_submodule("self_attn").q_proj = nn.Identity()
    with pytest.raises(NotApplicable, match=f"{name} is no nn.Linear but Identity"):
        inject_outliers(tiny_llama)
    assert bool((blocks_of(tiny_llama)[0][1].input_layernorm.weight == 1).all())
