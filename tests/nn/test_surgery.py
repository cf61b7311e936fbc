"""Finding and replacing modules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.anatomy import ANATOMIES, anatomy_of, blocks_of, find, norm_sites
from harness.nn.surgery import (
    block_linears,
    conv1d_to_linear,
    linear_from,
    replace_linears,
    replace_module,
)

FAMILIES = {"tiny_llama": "llama", "tiny_opt": "opt", "tiny_gpt2": "gpt2", "tiny_bert": "bert"}


@pytest.fixture(params=FAMILIES)
def named_model(request):
    return FAMILIES[request.param], request.getfixturevalue(request.param)


def test_the_anatomy_names_parts_that_exist(named_model):
    family, model = named_model
    anatomy = anatomy_of(model)
    assert anatomy.family == family
    assert find(model, anatomy.embedding) is not None
    blocks = blocks_of(model)
    assert len(blocks) == model.config.num_hidden_layers
    for _, block in blocks:
        for name in (*anatomy.linears, anatomy.attention):
            block.get_submodule(name)
        for site in anatomy.norm_sites:
            norm = block.get_submodule(site.norm)
            for consumer in site.consumers:
                assert block.get_submodule(consumer).in_features == norm.weight.numel()


def test_the_anatomy_covers_every_linear_layer_of_a_block(named_model):
    _, model = named_model
    anatomy = anatomy_of(model)
    for _, block in blocks_of(model):
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == set(anatomy.linears)
    grouped = [name for group in anatomy.sequential_groups for name in group]
    assert grouped == list(anatomy.linears)


def test_layers_of_a_group_read_the_same_input_and_groups_run_in_order(named_model):
    _, model = named_model
    anatomy = anatomy_of(model)
    order: list[tuple[str, torch.Tensor]] = []
    block = blocks_of(model)[0][1]
    for name in anatomy.linears:
        block.get_submodule(name).register_forward_pre_hook(
            lambda _m, args, name=name: order.append((name, args[0]))
        )
    with torch.no_grad():
        model(input_ids=torch.arange(8)[None])
    inputs = dict(order)
    for group in anatomy.sequential_groups:
        for name in group[1:]:
            assert torch.equal(inputs[name], inputs[group[0]])
    places = [[name for name, _ in order].index(group[0]) for group in anatomy.sequential_groups]
    assert places == sorted(places)


def test_an_unknown_architecture_is_refused_by_name():
    with pytest.raises(NotApplicable, match="'Linear' is not known; known families: llama"):
        anatomy_of(nn.Linear(2, 2))


def test_a_family_with_fused_projections_is_not_taken_for_llama():
    from transformers import Phi3Config, Phi3ForCausalLM

    model = Phi3ForCausalLM(
        Phi3Config(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
            num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
            bos_token_id=1, eos_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="phi3"):
        anatomy_of(model)


def test_post_norm_opt_has_no_norm_that_can_be_folded(tiny_opt):
    assert norm_sites(tiny_opt) == ANATOMIES["opt"].norm_sites
    tiny_opt.config.do_layer_norm_before = False
    assert norm_sites(tiny_opt) == ()


def test_block_linears_come_in_the_order_in_which_they_run(named_model):
    _, model = named_model
    linears = anatomy_of(model).linears
    expected = [f"{prefix}.{name}" for prefix, _ in blocks_of(model) for name in linears]
    assert [name for name, _ in block_linears(model)] == expected


def test_targets_select_by_regular_expression(tiny_llama):
    names = [name for name, _ in block_linears(tiny_llama, targets=r"layers\.1\..*(up|gate)_proj$")]
    assert names == ["model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj"]
    with pytest.raises(ConfigError, match="matches no linear layer"):
        list(block_linears(tiny_llama, targets="nothing"))
    with pytest.raises(ConfigError, match="no regular expression"):
        (list(block_linears(tiny_llama, targets="(")),)


class Doubled(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(x)


def test_replace_linears_replaces_the_targets_and_nothing_else(tiny_llama):
    head = tiny_llama.lm_head
    asked = []

    def make(name: str, linear: nn.Linear) -> nn.Module:
        asked.append(name)
        return Doubled(linear)

    assert replace_linears(tiny_llama, make, targets="down_proj") is tiny_llama
    assert asked == [f"model.layers.{index}.mlp.down_proj" for index in range(2)]
    kinds = {name: type(module) for name, module in tiny_llama.named_modules()}
    assert kinds["model.layers.0.mlp.down_proj"] is Doubled
    assert kinds["model.layers.0.mlp.up_proj"] is nn.Linear
    assert tiny_llama.lm_head is head


def test_replace_module_carries_the_training_flag_over(tiny_llama):
    tiny_llama.eval()
    new = Doubled(nn.Linear(64, 64))
    replace_module(tiny_llama, "model.layers.1.self_attn.q_proj", new)
    assert tiny_llama.model.layers[1].self_attn.q_proj is new
    assert not new.training
    assert not new.linear.training


def test_linear_from_does_not_copy():
    weight, bias = torch.randn(3, 5), torch.randn(3)
    linear = linear_from(weight, bias)
    assert linear.weight.data_ptr() == weight.data_ptr()
    assert linear.bias.data_ptr() == bias.data_ptr()
    assert (linear.in_features, linear.out_features) == (5, 3)
    x = torch.randn(2, 5)
    assert torch.equal(linear(x), nn.functional.linear(x, weight, bias))


def test_conv1d_becomes_the_equal_linear_layer():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    model.transformer.h[0].mlp.c_fc.bias.requires_grad_(False)
    tokens = torch.randint(64, (2, 9))
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        assert conv1d_to_linear(model) == 8
        after = model(input_ids=tokens).logits
    torch.testing.assert_close(after, before, atol=1e-4, rtol=1e-5)
    linear = model.transformer.h[0].attn.c_attn
    assert isinstance(linear, nn.Linear)
    assert linear.weight.is_contiguous()
    assert linear.weight.shape == (96, 32)
    assert conv1d_to_linear(model) == 0
    # Converting must not freeze what was trainable, nor thaw what was frozen.
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["transformer.h.0.mlp.c_fc.bias"]
