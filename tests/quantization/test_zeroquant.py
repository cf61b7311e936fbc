"""ZeroQuant: rounding in the norm, row groups, tokens, packed FFN weights, and what it refuses."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from harness_plugins.quantization import rtn, zeroquant
from harness_plugins.quantization.zeroquant import METHOD
from torch import nn
from torch.nn import functional
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from harness.errors import ConfigError, NotApplicable, NumericalFailure
from harness.kernels import int8
from harness.measure.compiling import compiled
from harness.measure.generation import forward_only
from harness.measure.workload import counted
from harness.models.info import info_from_config
from harness.nn.anatomy import anatomy_of, blocks_of
from harness.nn.quantized import Int8Linear
from harness.nn.quantized_tokens import QuantizedTokens, QuantizingNorm
from harness.nn.quantizer import quantize_activation, quantize_row_groups, quantize_weight
from harness.nn.surgery import block_linears
from harness.testing.making import make_context
from harness.testing.models import tiny_model

FAMILIES = ["llama", "opt", "gpt2", "bert", "encoder"]
SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def options(**values) -> zeroquant.ZeroQuantOptions:
    return METHOD.options.parse(values, method="zeroquant")


def layers_of(model: nn.Module) -> dict[str, Int8Linear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Int8Linear)}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# --- a norm that rounds -----------------------------------------------------------------------------


def norm_of(kind: str, width: int) -> nn.Module:
    norm = {
        "layer": lambda: nn.LayerNorm(width, eps=1e-5),
        "layer without bias": lambda: nn.LayerNorm(width, bias=False),
        "rms": lambda: LlamaRMSNorm(width, eps=1e-6),
        "rms-unit-offset": lambda: GemmaRMSNorm(width, eps=1e-6),
    }[kind]()
    generator = torch.Generator().manual_seed(0)
    for parameter in norm.parameters():
        parameter.data = torch.randn(width, generator=generator) + 0.5
    return norm


def normalized_in_float64(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """From the definitions."""
    x, weight = x.double(), norm.weight.double()
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (x.var(-1, unbiased=False, keepdim=True) + norm.eps).sqrt() * weight
        return scaled if norm.bias is None else scaled + norm.bias.double()
    gain = weight + 1 if isinstance(norm, GemmaRMSNorm) else weight
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain


@pytest.mark.parametrize("kind", ["layer", "layer without bias", "rms", "rms-unit-offset"])
@torch.no_grad()
def test_fused_equals_separate(kind):
    """Scales to 1e-6, at most a thousandth of the codes off by one, from a norm in float64."""
    norm = norm_of(kind, 768)
    x = torch.randn(512, 768) * torch.randn(512, 1).exp() + 0.3
    x[7] = 0
    fused = QuantizingNorm.from_norm(norm)
    assert fused is not None
    assert fused.kind == kind.removesuffix(" without bias")
    tokens = fused(x.view(4, 128, 768))
    assert (tokens.shape, tokens.scale.shape, tokens.dtype) == ((4, 128, 768), (4, 128, 1), torch.float32)
    expected = normalized_in_float64(norm, x)
    scale = expected.abs().amax(-1, keepdim=True) / 127
    scale[scale == 0] = 1
    found = tokens.scale.view(512, 1).double()
    assert float(((found - scale) / scale).abs().max()) <= 1e-6
    difference = (tokens.codes.view(512, 768).double() - torch.round(expected / scale)).abs()
    assert float(difference.max()) <= 1
    assert float((difference > 0).double().mean()) <= 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["layer", "rms", "rms-unit-offset"])
@torch.no_grad()
def test_the_reference_has_the_bits_of_the_two_steps(kind, dtype):
    norm = norm_of(kind, 96).to(dtype)
    x = torch.randn(40, 96).to(dtype)
    tokens = QuantizingNorm.from_norm(norm)(x)
    codes, scale = quantize_activation(norm(x))
    assert torch.equal(tokens.codes, codes)
    assert torch.equal(tokens.scale, scale)


def test_a_norm_of_another_kind_is_left_alone():
    class Moved(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 0.01

    assert QuantizingNorm.from_norm(Moved(16)) is None
    assert QuantizingNorm.from_norm(nn.LayerNorm((4, 4))) is None
    assert QuantizingNorm.from_norm(nn.LayerNorm(16, elementwise_affine=False)) is None
    assert QuantizingNorm.from_norm(nn.Identity()) is None


def test_quantized_tokens_have_nothing_that_would_go_wrong_unseen():
    tokens = QuantizedTokens(*quantize_activation(torch.randn(2, 3, 8)), torch.bfloat16)
    assert (tokens.size(), tokens.size(-1), tokens.numel()) == ((2, 3, 8), 8, 48)
    assert tokens.dequantize().dtype == torch.bfloat16
    with pytest.raises(TypeError):
        torch.randn(2, 3, 8) + tokens
    with pytest.raises(TypeError):
        functional.linear(tokens, torch.randn(4, 8))


# --- layers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("row_groups", [1, 3, 12])
@pytest.mark.parametrize("size", [(12, 40), (12, 33)])
def test_layers_compute_the_integer_product(bits, row_groups, size):
    """Against int64 and float64: products are exact, only the scales round."""
    weight = torch.randn(size)
    rounded = quantize_row_groups(weight, bits=bits, row_groups=row_groups)
    layer = Int8Linear.from_weight(rounded, torch.ones(12), row_groups=row_groups)
    assert layer.scales.numel() == row_groups
    highest = 2 ** (bits - 1) - 1
    scale = weight.view(row_groups, -1).abs().amax(1) / highest
    scale = scale.repeat_interleave(12 // row_groups)[:, None]  # [out, 1]
    q = torch.round(weight / scale).clamp(-highest, highest)
    assert torch.equal(layer.int8_codes(), q.to(torch.int8))
    torch.testing.assert_close(layer.dequantize(), q * scale, rtol=1e-6, atol=0)
    x = torch.randn(2, 5, size[1])
    x_scale = x.abs().amax(-1, keepdim=True) / 127
    # By the reciprocal, as activations are rounded: one in some 10^7 numbers lies between the two.
    product = torch.round(x * (1 / x_scale)).long() @ q.long().T
    expected = product.double() * x_scale.double() * scale.T.double() + 1
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-6, atol=1e-5)
    tokens = QuantizedTokens(*quantize_activation(x), x.dtype)
    assert torch.equal(layer(tokens), layer(x))


def test_a_saved_packed_layer_gives_the_same_bits():
    weight = quantize_row_groups(torch.randn(12, 33), bits=4, row_groups=3)
    layer = Int8Linear.from_weight(weight, torch.randn(12), row_groups=3)
    empty = Int8Linear(33, 12, bits=4, row_groups=3, bias=True)
    empty.load_state_dict(layer.state_dict())
    x = torch.randn(7, 33)
    assert torch.equal(empty(x), layer(x))
    assert repr(layer) == (
        "Int8Linear(33, 12, bits=4, weights=3 row groups, activations=per-token, bias=True)"
    )
    assert layer.kernel_name == "unpack, _int_mm"


def test_tokens_of_nothing_and_a_layer_with_one_scale_for_all():
    weight = quantize_weight(torch.randn(8, 16), bits=8, sym=True)
    tokens = QuantizedTokens(*quantize_activation(torch.randn(0, 3, 16)), torch.bfloat16)
    empty = Int8Linear.from_weight(weight)(tokens)
    assert (empty.shape, empty.dtype) == ((0, 3, 8), torch.bfloat16)
    with pytest.raises(ConfigError, match="cannot take tokens quantized one by one"):
        Int8Linear.from_weight(weight, a_gran="per-tensor-dynamic")(tokens)
    with pytest.raises(ConfigError, match="takes 16 features, not 15"):
        Int8Linear.from_weight(weight)(
            QuantizedTokens(*quantize_activation(torch.randn(2, 15)), torch.float32)
        )
    with pytest.raises(ConfigError, match="not 5"):
        Int8Linear(8, 8, bits=5)


def test_row_groups_go_from_one_scale_to_one_per_row():
    weight = torch.randn(64, 48) * torch.randn(64, 1).exp()
    per_tensor = quantize_weight(weight, bits=8, sym=True, per_tensor=True)
    per_row = quantize_weight(weight, bits=8, sym=True)
    for groups, expected in ((1, per_tensor), (64, per_row)):
        found = quantize_row_groups(weight, bits=8, row_groups=groups)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.dequantize(), expected.dequantize())
    errors = [
        relative(quantize_row_groups(weight, bits=4, row_groups=2**k).dequantize(), weight) for k in range(7)
    ]
    assert errors == sorted(errors, reverse=True)
    with pytest.raises(ConfigError, match="5 row groups do not divide 64 rows"):
        quantize_row_groups(weight, bits=8, row_groups=5)


def test_one_scale_per_token_where_tokens_differ():
    """Measured: relative error per tensor .136, per token .0074; mean of the tokens' .52 and .0077."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 768, generator=generator)
    x = x * torch.randn(2048, 1, generator=generator).exp()
    errors = {}
    for per_token in (True, False):
        codes, scale = quantize_activation(x, per_token=per_token)
        off = codes * scale - x
        errors[per_token] = (relative(codes * scale, x), float((off.norm(dim=1) / x.norm(dim=1)).mean()))
    assert errors[False][0] >= 10 * errors[True][0]
    assert errors[False][1] >= 10 * errors[True][1]


# --- models -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_scale_per_row_is_rtn_w8a8(apply, logits, family, fuse):
    """Bit for bit: the codes, the scales and what the model computes, fused or not."""
    found = apply(METHOD, tiny_model(family), fuse=fuse)
    expected = apply(rtn.METHOD, tiny_model(family), bits=8, a_bits=8)
    assert torch.equal(logits(found), logits(expected))
    state, plain = found.state_dict(), expected.state_dict()
    assert state.keys() == plain.keys()
    assert all(torch.equal(state[name], plain[name]) for name in state)


OTHERS = {
    "gemma": lambda: GemmaForCausalLM(
        GemmaConfig(**SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=16)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(**SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=16)
    ),
    "post-norm opt": lambda: OPTForCausalLM(
        OPTConfig(**SMALL, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False)
    ),
}


@pytest.mark.parametrize(("name", "fused"), [("gemma", 4), ("qwen3", 4), ("post-norm opt", 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_architectures(logits, name, fused, dtype):
    torch.manual_seed(0)
    original = OTHERS[name]().eval().to(dtype)
    found = {}
    for fuse in (True, False):
        model = copy.deepcopy(original)
        context = make_context(model)
        model = METHOD.transform(model, options(fuse=fuse), context)
        found[fuse] = logits(model)
        (record,) = context.records
        assert (record.metric, record.value) == ("fused_norms", fused if fuse else 0)
        assert (record.note is not None) == (fuse and not fused)
    assert torch.equal(found[True], found[False])
    assert found[True].dtype == dtype


@pytest.mark.parametrize(
    ("family", "per_block", "apart"), [("llama", 4, 7), ("opt", 4, 6), ("gpt2", 4, 4), ("bert", 4, 6)]
)
def test_layers_that_read_the_same_share_one_rounding(apply, logits, monkeypatch, family, per_block, apart):
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return quantize_activation(*args, **kwargs)

    monkeypatch.setattr(int8, "quantize_activation", counting)
    for fuse, expected in ((True, per_block), (False, apart)):
        model = apply(METHOD, tiny_model(family), fuse=fuse)
        calls.clear()
        logits(model)
        assert len(calls) == expected * len(blocks_of(model))


def test_a_norm_that_is_not_known_is_not_fused(apply, logits):
    class Moved(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + 0.01

    model = tiny_model("llama")
    for _, block in blocks_of(model):
        block.input_layernorm.__class__ = Moved
    plain = logits(apply(METHOD, copy.deepcopy(model), fuse=False))
    context = make_context(model)
    model = METHOD.transform(model, options(), context)
    assert context.records[0].value == 2  # those before the FFN
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_copies_and_pickles_are_whole(apply, logits, family):
    model = apply(METHOD, tiny_model(family), w_bits_ffn=4)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(again), logits(model))


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_compiled_blocks_compute_the_same(apply, family):
    model = apply(METHOD, tiny_model(family), w_bits_ffn=4, w_groups=32)
    tokens = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        plain = forward_only(model, tokens)
        torch._dynamo.utils.counters.clear()
        try:
            with compiled(model, lambda module, _inputs: module.forward):
                torch.testing.assert_close(forward_only(model, tokens), plain, rtol=1e-5, atol=1e-5)
            assert not torch._dynamo.utils.counters["graph_break"]
        finally:
            torch._dynamo.reset()


def test_operations_are_counted_whether_fused_or_not(apply, logits):
    flops = []
    for fuse in (True, False):
        model = apply(METHOD, tiny_model("llama"), fuse=fuse)
        with counted(model) as counter:
            logits(model)
        flops.append(counter.linear_flops)
    assert flops[0] == flops[1] > 0


def test_the_ffn_is_packed_to_the_formula(apply, logits):
    model = apply(METHOD, tiny_model("llama"), w_bits_ffn=4, w_groups=64)
    for name, layer in layers_of(model).items():
        bits = 4 if ".mlp." in name else 8
        held = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
        assert (layer.bits, layer.scales.numel()) == (bits, 64)
        assert held * 8 == bits * layer.in_features * layer.out_features + 32 * 64
    expected = dict(block_linears(tiny_model("llama")))
    down = "model.layers.1.mlp.down_proj"
    rounded = quantize_row_groups(expected[down].weight, bits=4, row_groups=64)
    assert torch.equal(layers_of(model)[down].dequantize(), rounded.dequantize())
    dense = tiny_model("llama")
    for name, linear in block_linears(dense):
        linear.weight.data = layers_of(model)[name].dequantize()
    assert relative(logits(model), logits(dense)) < 0.02  # what rounding the tokens costs


# --- what it refuses ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"w_bits_attn": 5}, "w_bits_attn"),
        ({"w_bits_ffn": 16}, "w_bits_ffn"),
        ({"a_bits": 4}, "a_bits"),
        ({"w_groups": 0}, "must be positive"),
        ({"w_groups": -2}, "w_groups"),
        ({"group_size": 64}, "unknown option 'group_size'"),
    ],
)
def test_options_that_make_no_sense(values, message):
    with pytest.raises(ConfigError, match=message):
        options(**values)


def test_options_from_text():
    parsed = options(w_bits_ffn="4", a_bits="8", w_groups="64", fuse="false")
    assert parsed == options(w_bits_ffn=4, w_groups=64, fuse=False)


def test_groups_must_divide_the_rows(apply):
    info = info_from_config(tiny_model("llama").config, "tiny")
    assert METHOD.applies(info, options()) is None
    assert "does not divide the hidden size 128" in METHOD.applies(info, options(w_groups=48))
    assert "trained after" in METHOD.applies(
        info_from_config(tiny_model("llama").config, "scratch:tiny", scratch=True), options()
    )
    model = tiny_model("llama")
    with pytest.raises(NotApplicable, match=r"48 does not divide the 128 rows of model\.layers\.0"):
        apply(METHOD, model, w_groups=48)
    assert len(list(block_linears(model))) == 14  # untouched


def test_a_quantized_model_and_nan_weights_are_refused(apply):
    with pytest.raises(NotApplicable, match="quantized already"):
        apply(METHOD, apply(METHOD, tiny_model("opt")))
    model = tiny_model("opt")
    model.get_submodule(f"{blocks_of(model)[1][0]}.{anatomy_of(model).ffn_out}").weight.data[3, 3] = torch.nan
    with pytest.raises(NumericalFailure, match=r"layers\.1\.fc2: .*NaN"):
        apply(METHOD, model)
