"""Channels may move where it is said they may: outputs stay, in every family, with shared heads too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import NotApplicable
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.channel_order import (
    head_channels,
    order_ffn,
    order_query_key,
    order_residual,
    order_value_output,
    value_heads,
)
from harness.testing import tiny_model

HEADS, HEAD_DIM, WIDTH, FFN = 4, 32, 128, 256


def gqa_llama(tied: bool = True) -> nn.Module:
    """Four query heads, two value heads; biases, so that they have to move as well."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=WIDTH,
            intermediate_size=FFN,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=128,
            tie_word_embeddings=tied,
            attention_bias=True,
            mlp_bias=True,
        )
    ).eval()


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "gqa": gqa_llama,
    "gqa-untied": lambda: gqa_llama(tied=False),
    "opt": lambda: tiny_model("opt"),
    "gpt2": lambda: tiny_model("gpt2"),
    "bert": lambda: tiny_model("bert"),
    "encoder": lambda: tiny_model("encoder"),
}


def made(name: str) -> nn.Module:
    """With every bias and norm different in every channel, so that one that stays behind shows."""
    model = MODELS[name]()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def outputs(model: nn.Module) -> torch.Tensor:
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(0))
    output = model(input_ids=tokens)
    return getattr(output, "logits", getattr(output, "last_hidden_state", None))


def shuffled(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(2)).argsort(-1)


def rel(value: torch.Tensor, expected: torch.Tensor) -> float:
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def moved(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """The last parts of the names of what differs."""
    changed = {name for name, was in before.items() if not torch.equal(was, model.get_parameter(name))}
    return {".".join(name.split(".")[-2:]) for name in changed}


@pytest.mark.parametrize("name", MODELS)
def test_ffn_channels_move(name):
    model, expected = made(name), outputs(made(name))
    before = weights(model)
    for where, block in blocks_of(model):
        order_ffn(block, anatomy_of(model), shuffled(FFN), where)
    assert rel(outputs(model), expected) <= 1e-5
    consumer = anatomy_of(model).ffn_out.rpartition(".")[2]
    assert f"{consumer}.weight" in moved(model, before)


@pytest.mark.parametrize("name", MODELS)
def test_value_channels_move_inside_their_heads(name):
    model, expected = made(name), outputs(made(name))
    before = weights(model)
    for where, block in blocks_of(model):
        kv_heads, sharing, head_dim = value_heads(block, anatomy_of(model), where)
        assert (kv_heads, sharing, head_dim) == ((2, 2, 32) if "gqa" in name else (4, 1, 32))
        order_value_output(block, anatomy_of(model), shuffled(kv_heads, head_dim), where)
    assert rel(outputs(model), expected) <= 1e-5
    assert moved(model, before)


@pytest.mark.parametrize("name", ["opt", "gpt2", "bert"])
def test_query_and_key_channels_move_where_nothing_rotates_them(name):
    model, expected = made(name), outputs(made(name))
    before = weights(model)
    for where, block in blocks_of(model):
        order_query_key(block, anatomy_of(model), shuffled(HEADS, HEAD_DIM), HEADS, where)
    assert rel(outputs(model), expected) <= 1e-5
    assert moved(model, before)


def test_rotary_positions_forbid_it():
    model = made("llama")
    where, block = blocks_of(model)[0]
    with pytest.raises(NotApplicable, match="rotary"):
        order_query_key(block, anatomy_of(model), shuffled(HEADS, HEAD_DIM), HEADS, where)


@pytest.mark.parametrize("name", ["llama", "gqa", "gqa-untied", "opt", "gpt2"])
def test_the_residual_stream_moves_as_a_whole(name):
    model, expected = made(name), outputs(made(name))
    order = shuffled(WIDTH)
    order_residual(model, order)
    assert rel(outputs(model), expected) <= 1e-5
    original = made(name).get_input_embeddings().weight
    assert torch.equal(model.get_input_embeddings().weight, original[:, order])


@pytest.mark.parametrize("name", ["bert", "encoder"])
def test_outputs_that_are_the_residual_stream_forbid_it(name):
    model, expected = made(name), outputs(made(name))
    with pytest.raises(NotApplicable, match="residual stream is an output"):
        order_residual(model, shuffled(WIDTH))
    assert torch.equal(outputs(model), expected)


def test_a_projection_beside_the_embedding_forbids_it():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=16, ffn_dim=64, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    with pytest.raises(NotApplicable, match="projection beside the embedding"):
        order_residual(OPTForCausalLM(config), shuffled(32))


def test_a_consumer_that_is_no_linear_layer_is_refused():
    """Packed or wrapped (LoRA): it would keep the old order."""
    model = made("llama")
    where, block = blocks_of(model)[0]
    block.mlp.down_proj = nn.Sequential(block.mlp.down_proj)
    before = weights(model)
    with pytest.raises(NotApplicable, match="down_proj is a Sequential"):
        order_ffn(block, anatomy_of(model), shuffled(FFN), where)
    assert not moved(model, before)


def test_orders_inside_heads_by_hand():
    order = torch.tensor([[1, 0, 2], [2, 1, 0]])
    assert head_channels(order, 3).tolist() == [1, 0, 2, 5, 4, 3]
