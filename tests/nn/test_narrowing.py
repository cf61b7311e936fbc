"""Blocks with fewer heads and channels compute what the masked ones do, decode, save and load."""

from __future__ import annotations

import copy

import pytest
import torch
from harness_plugins.distillation._student import keep_layers

from harness.errors import NotApplicable
from harness.measure.generation import decode_logits_match
from harness.measure.memory import kv_cache_bytes_per_token
from harness.models.info import info_from_config
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.grouped_query import regroup_key_values
from harness.nn.narrowing import (
    add_to_bias,
    block_shapes,
    build_narrow,
    describe_in_config,
    keep_channels,
    keep_heads,
)
from harness.nn.surgery import linear_from, replace_module
from harness.testing import tiny_model

DECODERS = ["llama", "llama-gqa", "opt", "gpt2", "opt-gqa", "gpt2-gqa"]
FAMILIES = [*DECODERS, "bert", "encoder"]


def _model(family: str):
    """`-gqa`: two key-value heads for four query heads."""
    model = tiny_model(family.removesuffix("-gqa"))
    if family.endswith("-gqa"):
        regroup_key_values(model, 2, lambda heads, groups: heads.unflatten(0, (groups, -1)).mean(1))
    return model


@torch.no_grad()
def _logits(model) -> torch.Tensor:
    tokens = torch.randint(256, (2, 20), generator=torch.Generator().manual_seed(5))
    output = model(input_ids=tokens)
    logits = getattr(output, "logits", None)
    return output.last_hidden_state if logits is None else logits


def _chosen(model) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Another choice, and another number, in every block."""
    generator = torch.Generator().manual_seed(7)
    chosen = []
    for index, shape in enumerate(block_shapes(model)):
        heads = torch.randperm(shape.kv_heads, generator=generator)[: shape.kv_heads - 1].sort().values
        channels = torch.randperm(shape.ffn, generator=generator)[: shape.ffn // (2 + index)].sort().values
        chosen.append((heads, channels))
    return chosen


def _outside(shape, heads, channels):
    """Which inputs of the output projection and of the down projection belong to what goes."""
    of_heads = torch.ones(shape.kv_heads, shape.heads // shape.kv_heads * shape.head_dim, dtype=torch.bool)
    of_heads[heads] = False
    of_channels = torch.ones(shape.ffn, dtype=torch.bool)
    of_channels[channels] = False
    return of_heads.flatten(), of_channels


def _narrow(model, chosen) -> None:
    for index, (heads, channels) in enumerate(chosen):
        keep_heads(model, index, heads)
        keep_channels(model, index, channels)
    describe_in_config(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_that_nothing_reads_can_go(family):
    model = _model(family)
    chosen, anatomy = _chosen(model), anatomy_of(model)
    for (_, block), shape, pair in zip(blocks_of(model), block_shapes(model), chosen, strict=True):
        of_heads, of_channels = _outside(shape, *pair)
        with torch.no_grad():
            block.get_submodule(anatomy.out).weight[:, of_heads] = 0
            block.get_submodule(anatomy.ffn_out).weight[:, of_channels] = 0
    before = _logits(model)
    _narrow(model, chosen)
    assert float((_logits(model) - before).abs().max()) <= 1e-6


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_the_masked_model(family, dtype):
    model = _model(family).to(dtype)
    masked = copy.deepcopy(model)
    chosen, anatomy = _chosen(model), anatomy_of(model)
    for (_, block), shape, pair in zip(blocks_of(masked), block_shapes(masked), chosen, strict=True):
        for name, gone in zip((anatomy.out, anatomy.ffn_out), _outside(shape, *pair), strict=True):
            layer = block.get_submodule(name)
            layer.register_forward_pre_hook(lambda _m, args, gone=gone: (args[0] * ~gone, *args[1:]))
    _narrow(model, chosen)
    ours, expected = _logits(model).float(), _logits(masked).float()
    assert not torch.equal(expected, _logits(_model(family).to(dtype)).float())
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert float((ours - expected).norm() / expected.norm()) <= tolerance


@pytest.mark.parametrize("family", FAMILIES)
def test_the_parameters_that_go_are_those_of_the_parts(family):
    model = _model(family)
    before, shapes = sum(p.numel() for p in model.parameters()), block_shapes(model)
    anatomy = anatomy_of(model)
    bias = [int(anatomy.qkv[0] in shape.biased) for shape in shapes]
    chosen = _chosen(model)
    _narrow(model, chosen)
    gone = 0
    width = 128
    for shape, has_bias, (heads, channels) in zip(shapes, bias, chosen, strict=True):
        lost = shape.kv_heads - len(heads)
        shared = shape.heads // shape.kv_heads
        gone += lost * shape.head_dim * ((2 * shared + 2) * width + has_bias * (shared + 2))
        gone += (shape.ffn - len(channels)) * (len(anatomy.ffn_in) * (width + has_bias) + width)
    assert before - sum(p.numel() for p in model.parameters()) == gone


@pytest.mark.parametrize("family", DECODERS)
def test_it_decodes_with_a_smaller_cache(family):
    model = _model(family)
    info = info_from_config(model.config, "tiny")
    cpu = torch.device("cpu")
    before, _ = kv_cache_bytes_per_token(model, info, cpu, torch.float32)
    shapes = block_shapes(model)
    _narrow(model, _chosen(model))
    after, _ = kv_cache_bytes_per_token(model, info, cpu, torch.float32)
    assert before == sum(2 * 4 * shape.kv_heads * shape.head_dim for shape in shapes)
    assert after == sum(2 * 4 * (shape.kv_heads - 1) * shape.head_dim for shape in shapes)
    prompt = torch.randint(5, 256, (2, 12), generator=torch.Generator().manual_seed(1))
    assert decode_logits_match(model, prompt, 6) <= 1e-4
    greedy = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 1}
    mask = torch.ones_like(prompt)
    cached, plain = (
        model.generate(prompt, attention_mask=mask, use_cache=on, **greedy) for on in (True, False)
    )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
@pytest.mark.parametrize("equal", [True, False])
def test_it_is_saved_and_built_again(family, equal, tmp_path):
    model = _model(family)
    chosen = _chosen(model)
    _narrow(model, chosen[:1] * len(chosen) if equal else chosen)
    add_to_bias(blocks_of(model)[0][1], anatomy_of(model).out, torch.arange(128) / 100)
    describe_in_config(model)
    model.config.save_pretrained(tmp_path)
    config = type(model.config).from_pretrained(tmp_path)
    again = build_narrow(type(model), config).eval()
    assert block_shapes(again) == block_shapes(model)
    again.load_state_dict(model.state_dict())
    assert torch.equal(_logits(again), _logits(model))


@pytest.mark.parametrize(("family", "heads"), [("llama", 2), ("opt", 4), ("bert", 4)])
@pytest.mark.parametrize("biases", [False, True])
def test_what_transformers_can_build_it_loads_by_itself(family, heads, biases, tmp_path):
    """Llama with 4 -> 2 heads and any family with narrower FFNs; added biases by Llama's own switches."""
    model = _model(family)
    for index, (_, block) in enumerate(blocks_of(model)):
        keep_channels(model, index, torch.arange(0, 256, 2))
        if heads < 4:
            keep_heads(model, index, torch.tensor([1, 3]))
        if biases:
            for name in (anatomy_of(model).out, anatomy_of(model).ffn_out):
                add_to_bias(block, name, torch.arange(128) / 100)
    describe_in_config(model)
    assert not hasattr(model.config, "block_shapes")
    assert model.config.num_attention_heads == heads
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert torch.equal(_logits(loaded), _logits(model))
    info = info_from_config(loaded.config, "loaded")
    assert (info.num_kv_heads, info.ffn_size) == (heads, 128)


def test_a_second_narrowing_starts_from_the_first():
    model = _model("llama")
    _narrow(model, _chosen(model))
    first = [shape.ffn for shape in block_shapes(model)]
    assert [values["ffn"] for values in model.config.block_shapes] == first
    for index, ffn in enumerate(first):
        keep_channels(model, index, torch.arange(ffn // 2))
    describe_in_config(model)
    assert [values["ffn"] for values in model.config.block_shapes] == [ffn // 2 for ffn in first]


def test_what_goes_by_the_configuration_is_told():
    model = _model("opt")
    keep_heads(model, 0, torch.tensor([0, 2]))
    describe_in_config(model)
    with pytest.raises(NotApplicable, match="heads were taken out"):
        regroup_key_values(model, 1, lambda heads, groups: heads[:groups])
    keep_layers(model, (1,))
    assert [values["heads"] for values in model.config.block_shapes] == [4]


def test_described_heads_can_be_shared_afterwards():
    model = _model("llama")
    for index in range(2):
        keep_heads(model, index, torch.tensor([0, 2]))
    describe_in_config(model)
    regroup_key_values(model, 1, lambda heads, groups: heads[:groups])
    assert {(shape.heads, shape.kv_heads) for shape in block_shapes(model)} == {(2, 1)}
    assert bool(torch.isfinite(_logits(model)).all())


def test_other_layers_are_refused_by_name():
    model = _model("llama")
    block = model.model.layers[1]
    replace_module(block, "mlp.up_proj", torch.nn.Sequential(linear_from(torch.zeros(256, 128), None)))
    with pytest.raises(NotApplicable, match=r"layers\.1\.mlp\.up_proj is no nn\.Linear but Sequential"):
        block_shapes(model)


def test_what_could_be_trained_still_can():
    model = _model("opt")
    model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
    keep_channels(model, 0, torch.arange(16))
    layer = model.model.decoder.layers[0]
    assert not layer.fc1.weight.requires_grad
    assert layer.fc2.weight.requires_grad
    assert not layer.fc1.training
