"""Quantizers after quantizers: what a chain may hold, and that the second packs what the first leaves."""

from __future__ import annotations

import pytest
import torch

from harness import NotApplicable
from harness.chain import parse_chain
from harness.grid import refusal
from harness.models.info import info_from_config
from harness.nn.quantized import Int8Linear, PackedLinear, QuantizedLinear
from harness.nn.surgery import block_linears
from harness.plugins import load_plugins
from harness.testing.making import make_context
from harness.testing.models import tiny_model

METHODS = load_plugins().methods


def reason(chain: str, family: str = "llama") -> str | None:
    found = refusal(parse_chain(chain, METHODS), info_from_config(tiny_model(family).config, "tiny"), "cpu")
    return None if found is None else found.reason


def applied(chain: str, model: torch.nn.Module) -> torch.nn.Module:
    steps = parse_chain(chain, METHODS).steps
    context = make_context(model)
    for place, step in enumerate(steps):
        context.last_in_chain = step is steps[-1]
        context.holds_zeros = any(each.method.leaves_zeros for each in steps[:place])
        context.records.clear()  # each step of a real chain has a context of its own
        model = step.method.transform(model, step.options, context)
    return model


def pruned_before_others(text: str, model: torch.nn.Module, *, last: bool = False):
    """A model after a method that is the last of its chain or not, and the notes on what it recorded."""
    (step,) = parse_chain(text, METHODS).steps
    context = make_context(model)
    context.last_in_chain = last
    step.method.transform(model, step.options, context)
    return model, {record.metric: record.note or "" for record in context.records}


@pytest.mark.parametrize(
    "first",
    [
        "awq",
        "awq:quantize=false",
        "awq:quantize=true:ragged=skip",
        "hqq:ragged=skip",
        "nf4:ragged=skip",
        "gptq:ragged=skip",
        "qat:bits=16",
        "qat-kd:bits=16",
    ],
)
def test_a_quantizer_that_leaves_layers_may_come_before_another(first):
    assert reason(f"{first}+rtn") is None


@pytest.mark.parametrize("first", ["awq:quantize=true", "hqq", "nf4", "gptq", "qat", "qat-kd:bits=8"])
def test_one_that_quantizes_every_layer_may_not(first):
    assert "comes before it and quantizes every linear layer" in reason(f"{first}+rtn")


@pytest.mark.parametrize(
    "second",
    [
        "magnitude-prune",
        "gmp",
        "iterative-prune",
        "structured-prune",
        "wanda",
        "sparsegpt",
        "nm-prune",
        "channel-permute",
        "sr-ste",
        "top-kast",
        "gqa:groups=2",
        "mqa",
        "torchao",
        "bitsandbytes:scheme=nf4",
    ],
)
@pytest.mark.parametrize("first", ["gptq:group_size=32", "torchao", "bitsandbytes:scheme=nf4"])
def test_what_needs_plain_layers_is_refused_after_what_packs_them_all(first, second):
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    assert "comes before it and quantizes every linear layer" in reason(f"{first}+{second}")
    if second in ("wanda", "sparsegpt"):
        assert reason(f"{second}+{first}") is None


def test_pruning_that_also_quantizes_leaves_nothing_to_quantize():
    assert "comes before it" in reason("sparsegpt:bits=4:group_size=32+rtn:group_size=32")
    assert reason("sparsegpt:bits=4:group_size=32:targets=mlp+rtn:group_size=32") is None


@pytest.mark.parametrize("method", ["rtn", "gptq", "hqq", "nf4", "torchao", "bitsandbytes:scheme=nf4"])
def test_layers_that_torchao_packed_are_quantized_already(method):
    """They are still of the class `nn.Linear`; a plugin may load a model that has such ones."""
    pytest.importorskip("torchao")
    pytest.importorskip("bitsandbytes")
    model = applied("torchao", tiny_model("llama"))
    with pytest.raises(NotApplicable, match="quantized already"):
        applied(method, model)


@pytest.mark.parametrize("first", ["awq:n_grid=2", "qat:bits=16:steps=1"])
def test_the_second_packs_what_the_first_leaves(first, logits):
    assert reason(f"{first}+rtn:bits=8") is None
    model = applied(f"{first}+rtn:bits=8", tiny_model("llama"))
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert [layer.bits for layer in layers] == [8] * 14
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("second", ["zeroquant", "zeroquant-lkd:iters=2"])
@pytest.mark.parametrize(
    ("family", "first", "fused"),
    [
        ("llama", "gptq:targets=self_attn", 2),  # the norms before the FFN are left
        ("opt", "gptq:targets=v_proj", 2),
        ("gpt2", "gptq:targets=attn", 2),
        ("bert", "gptq:targets=query", 0),
        ("llama", "llm-int8:targets=k_proj", 2),  # takes such tokens, but would look for no outliers in them
        ("llama", "gptq:targets=o_proj", 4),
    ],
)
def test_no_tokens_are_quantized_for_layers_that_another_method_packed(family, first, fused, second, logits):
    assert reason(f"{first}+{second}", family) is None
    model = tiny_model(family)
    before = logits(model)
    model = applied(f"{first}+{second}", model)
    plain = applied(f"{first}+{second}:fuse=false", tiny_model(family))
    assert torch.equal(logits(model), logits(plain))
    assert float((logits(model) - before).norm() / before.norm()) < 0.3
    assert sum(type(module).__name__ == "QuantizingNorm" for module in model.modules()) == fused
    packed = [module for module in model.modules() if isinstance(module, PackedLinear)]
    assert any(type(layer) is Int8Linear for layer in packed)
    assert any(type(layer) is not Int8Linear for layer in packed)


@pytest.mark.parametrize("first", ["rtn:bits=16:a_bits=8:targets=attn", "nf4:targets=attn:lora_r=2:steps=1"])
def test_distilled_blocks_keep_the_type_of_what_is_not_packed(first, logits):
    chain = f"{first}+zeroquant-lkd:iters=4"
    assert reason(chain) is None
    model = applied(chain, tiny_model("llama").bfloat16())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert bool(torch.isfinite(logits(model)).all())


@pytest.mark.parametrize("second", ["rtn:group_size=32", "gptq:bits=3:group_size=32:act_order=true"])
@pytest.mark.parametrize(
    ("first", "family"), [("nm-prune", "gpt2"), ("magnitude-prune:sparsity=0.4", "llama")]
)
def test_rounding_after_pruning_keeps_every_zero(first, second, family):
    pruned, _ = pruned_before_others(first, tiny_model(family))
    zeros = {name: linear.weight == 0 for name, linear in block_linears(pruned)}
    assert zeros
    model = applied(f"{first}+{second}", tiny_model(family))
    for name, zero in zeros.items():
        values = model.get_submodule(name).dequantize()
        assert zero.float().mean() >= 0.39
        assert bool((values[zero] == 0).all()), name
        assert bool((values[~zero] != 0).any()), name


@pytest.mark.parametrize(
    "second",
    [
        "qat:bits=8:group_size=-1:steps=12:lr=0.01",
        "qat-kd:bits=8:group_size=-1:steps=12:lr=0.01",
        "zeroquant-lkd:iters=40:lr=0.0003",
        "structured-prune:head_ratio=0:ffn_ratio=0:compensate=none:steps=12",
        "magnitude-prune:sparsity=0.2:steps=12",
        "sr-ste:n=3:m=4:steps=12:backend=dense",
    ],
)
def test_training_after_pruning_keeps_every_zero(second):
    pruned, _ = pruned_before_others("magnitude-prune:sparsity=0.4", tiny_model("llama"))
    zeros = {name: linear.weight == 0 for name, linear in block_linears(pruned)}
    model = applied(f"magnitude-prune:sparsity=0.4+{second}", tiny_model("llama"))
    moved = 0
    for name, zero in zeros.items():
        layer = model.get_submodule(name)
        values = layer.dequantize() if hasattr(layer, "dequantize") else layer.weight
        assert zero.float().mean() >= 0.39
        assert bool((values[zero] == 0).all()), name
        moved += int((values != pruned.get_submodule(name).weight).sum())
    assert moved, "nothing was trained"


@pytest.mark.parametrize("first", ["nm-prune:n=1", "magnitude-prune"])
def test_figures_of_zeros_say_that_other_methods_follow(first):
    _, alone = pruned_before_others(first, tiny_model("llama"), last=True)
    _, noted = pruned_before_others(first, tiny_model("llama"))
    for metric in {"bitmap_bytes", "pruned_share_of_targets", "nm_groups"} & set(alone):
        assert "before what follows in the chain" in noted[metric]
        assert "before" not in alone[metric]
