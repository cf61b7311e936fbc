"""Layers of packed places in a table, against the matrix that those places spell out."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.nn.codebook import CodebookLinear
from harness.nn.codebook_embedding import CodebookEmbedding, TiedHead, find_embedding, replace_embedding
from harness.nn.codebook_weight import CodebookWeight, Outliers, ScaleCodes, nearest_codes, quantize_scales
from harness.testing.models import tiny_model

FORMS = [
    {"bits": 3},
    {"bits": 3, "outliers": 7},
    {"bits": 2, "outliers": 1, "in_features": 33},
    {"bits": 4, "group_size": 64},
    {"bits": 4, "group_size": 64, "double_quant": True},
    {"bits": 4, "group_size": 64, "in_features": 100, "double_quant": True},
    {"bits": 3, "group_size": 12, "in_features": 60, "outliers": 3},
    {"bits": 8},
]


def example(
    bits: int,
    *,
    in_features: int = 192,
    out: int = 40,
    group_size: int = -1,
    double_quant: bool = False,
    outliers: int = 0,
    outlier_dtype: torch.dtype = torch.float32,
) -> tuple[CodebookWeight, torch.Tensor]:
    """Random places, and the matrix that they stand for, written out with a factor a weight."""
    generator = torch.Generator().manual_seed(bits + in_features)
    groups = 0 if group_size == -1 else -(-in_features // group_size)
    padded = groups * group_size if groups else in_features
    codes = torch.randint(2**bits, (out, padded), generator=generator, dtype=torch.uint8)
    table = torch.randn(2**bits, generator=generator).sort().values
    scales: torch.Tensor | ScaleCodes | None = None
    factors = torch.ones(out, padded)
    if groups:
        scales = torch.rand(groups, out, generator=generator) + 0.5
        if double_quant:
            scales = quantize_scales(scales)
        plain = scales.dequantize() if isinstance(scales, ScaleCodes) else scales
        for column in range(padded):
            factors[:, column] = plain[column // group_size]
    dense = (table[codes.long()] * factors)[:, :in_features].contiguous()
    kept = None
    if outliers:
        index = torch.randperm(dense.numel(), generator=generator)[:outliers].sort().values
        kept = Outliers(
            index.to(torch.int32), (torch.randn(outliers, generator=generator) * 9).to(outlier_dtype)
        )
        dense.view(-1)[index] = kept.values.float()
    return CodebookWeight(codes, table, bits, in_features, scales, group_size, kept), dense


def stored_bits(layer: nn.Module, weights: int) -> float:
    tensors = [t for name, t in layer.state_dict().items() if name != "bias"]
    return 8 * sum(t.numel() * t.element_size() for t in tensors) / weights


def saved_and_loaded(layer: nn.Module, empty: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file))
    return empty


# --- the weight --------------------------------------------------------------------------------------


def test_the_nearest_place_is_the_nearest():
    table = torch.randn(8).sort().values
    values = torch.randn(5, 400) * 2
    brute_force = (values[..., None] - table).abs().argmin(-1)
    assert torch.equal(nearest_codes(values, table).long(), brute_force)


def test_scales_in_8_bits_lie_within_half_a_step():
    scales = torch.rand(7, 300) + 0.5  # 2100 scales: eight blocks of 256 and a part of one
    packed = quantize_scales(scales)
    assert packed.codes.dtype == torch.int8
    assert packed.steps.shape == (9,)
    flat, mean = scales.flatten(), scales.mean()
    for start in range(0, 2100, 256):
        block = flat[start : start + 256] - mean
        step = float(block.abs().max()) / 127
        error = packed.dequantize().flatten()[start : start + 256] - flat[start : start + 256]
        assert float(error.abs().max()) <= step / 2 * 1.001
    equal = torch.full((2, 3), 0.25)
    assert torch.equal(quantize_scales(equal).dequantize(), equal)


def test_groups_and_scales_belong_together():
    with pytest.raises(ConfigError, match="groups need scales"):
        CodebookWeight(torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(8), 3, 8, group_size=4)


# --- the linear layer --------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_it_computes_what_its_places_say(form, has_bias):
    weight, dense = example(**form)
    bias = torch.randn(40) if has_bias else None
    layer = CodebookLinear.from_weight(weight, bias)
    assert torch.equal(layer.dense_weight(), dense)
    for shape in ((), (1,), (5,), (2, 3), (2, 1, 3)):
        x = torch.randn(*shape, weight.in_features)
        torch.testing.assert_close(layer(x), functional.linear(x, dense, bias), rtol=1e-6, atol=1e-6)
    assert layer(torch.randn(2, 0, weight.in_features)).shape == (2, 0, 40)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_layer_gives_the_same_bits(form):
    weight, _ = example(**form)
    layer = CodebookLinear.from_weight(weight, torch.randn(40))
    sizes = {"in_features": 192} | form
    loaded = saved_and_loaded(layer, CodebookLinear(out_features=40, bias=True, **sizes))
    x = torch.randn(7, weight.in_features)
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"bits": 3, "outliers": 262}, 3 + 0.001 * (32 + 32)),
        ({"bits": 3, "outliers": 262, "outlier_dtype": torch.float16}, 3 + 0.001 * (32 + 16)),
        ({"bits": 4, "group_size": 64}, 4.5),
        ({"bits": 4, "group_size": 64, "double_quant": True}, 4 + 8 / 64 + 32 / (64 * 256)),  # 4.127
    ],
)
def test_stored_bits_follow_the_formula(form, expected):
    generator = torch.Generator().manual_seed(0)
    groups = 1024 // form["group_size"] if "group_size" in form else 0
    layer = CodebookLinear(1024, 256, **form)
    layer.codes.random_(generator=generator)
    table = 32 * 2 ** form["bits"]
    assert groups == 0 or layer.scales.shape == (groups, 256)
    assert stored_bits(layer, 1024 * 256) == pytest.approx(expected + table / (1024 * 256), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_quantized_keeps_its_type(dtype):
    weight, dense = example(4, group_size=64, double_quant=True, outliers=3)
    layer = nn.Sequential(CodebookLinear.from_weight(weight, torch.randn(40))).to(dtype)[0]
    assert {layer.table.dtype, layer.scale_steps.dtype, layer.outlier_values.dtype} == {torch.float32}
    assert layer.bias.dtype == dtype
    assert torch.equal(layer.dense_weight(), dense)
    assert torch.equal(layer.dense_weight(dtype), dense.to(dtype))
    assert layer(torch.randn(2, 192, dtype=dtype)).dtype == dtype


def test_gradients_reach_the_input():
    weight, dense = example(3, outliers=2)
    x = torch.randn(3, 192, requires_grad=True)
    CodebookLinear.from_weight(weight)(x).sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(3, 192))


def test_it_says_what_it_is():
    layer = CodebookLinear.from_weight(example(4, group_size=64, double_quant=True, outliers=2)[0])
    assert repr(layer) == (
        "CodebookLinear(192, 40, bits=4, group_size=64, double_quant=True, outliers=2, bias=False)"
    )
    assert layer.kernel_name == layer.kernel_for(512, torch.float32) == "gather+matmul"
    assert layer.simulated is False
    with pytest.raises(ConfigError, match="takes 192 features, not 5"):
        layer(torch.randn(2, 5))
    with pytest.raises(ConfigError, match="not 5"):
        CodebookLinear(8, 8, bits=5)


# --- the embedding -----------------------------------------------------------------------------------


@pytest.mark.parametrize("outliers", [0, 1, 400])
@pytest.mark.parametrize("in_features", [192, 33])
def test_a_lookup_gives_the_rows_of_the_matrix(outliers, in_features):
    weight, dense = example(3, in_features=in_features, outliers=outliers)
    layer = CodebookEmbedding.from_weight(weight, torch.float32)
    ids = torch.randint(40, (3, 50))
    assert torch.equal(layer(ids), dense[ids])
    assert torch.equal(layer(torch.arange(40)), dense)
    assert torch.equal(layer(ids[:0]), dense[ids[:0]])
    empty = CodebookEmbedding(
        40, in_features, bits=3, outliers=outliers, most_outliers=layer.most_outliers, dtype=torch.float32
    )
    assert torch.equal(saved_and_loaded(layer, empty)(ids), dense[ids])


def test_outliers_stay_in_their_rows():
    """The first and the last place of a row that is nothing but outliers, beside rows that have none."""
    codes, table = torch.zeros(4, 8, dtype=torch.uint8), torch.arange(8.0)
    index = torch.tensor([*range(8, 16), 31], dtype=torch.int32)
    weight = CodebookWeight(codes, table, 3, 8, outliers=Outliers(index, torch.arange(1.0, 10.0)))
    layer = CodebookEmbedding.from_weight(weight, torch.float32)
    assert layer.most_outliers == 8
    expected = torch.zeros(4, 8)
    expected[1], expected[3, 7] = torch.arange(1.0, 9.0), 9.0
    assert torch.equal(layer(torch.tensor([0, 1, 2, 3])), expected)
    assert torch.equal(layer(torch.tensor([[3, 1, 1, 0]])), expected[[3, 1, 1, 0]][None])


def test_the_output_has_the_type_of_the_model():
    weight, dense = example(3, outliers=5)
    layer = CodebookEmbedding.from_weight(weight, torch.float16)
    assert layer(torch.arange(40)).dtype == torch.float16
    layer = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert torch.equal(layer(torch.arange(40)), dense.to(torch.bfloat16))
    assert torch.equal(layer.dense_weight(), dense)
    assert "like" not in layer.state_dict()


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert"])
def test_a_tied_head_reads_the_same_rows(family):
    model, dense_model = tiny_model(family), tiny_model(family)
    name, old = find_embedding(model)
    weight, dense = example(3, in_features=128, out=256, outliers=40)
    was_tied = replace_embedding(model, name, CodebookEmbedding.from_weight(weight, torch.float32))
    assert was_tied
    heads = [module for module in model.modules() if isinstance(module, TiedHead)]
    assert len(heads) == 1
    assert heads[0].embedding is model.get_submodule(name)
    assert find_embedding(model) is None
    with torch.no_grad():
        dense_model.get_submodule(name).weight.copy_(dense)
    tokens = torch.randint(256, (2, 16))
    torch.testing.assert_close(
        model(input_ids=tokens).logits, dense_model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5
    )
    assert old.weight.shape == (256, 128)
    # Still one object after a copy and a change of type.
    moved = copy.deepcopy(model).to(torch.bfloat16)
    head = next(module for module in moved.modules() if isinstance(module, TiedHead))
    assert head.embedding.codes.data_ptr() == moved.get_submodule(name).codes.data_ptr()


def test_a_head_of_its_own_stays():
    model = tiny_model("llama")
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    name, _ = find_embedding(model)
    weight, _ = example(3, in_features=128, out=256)
    assert not replace_embedding(model, name, CodebookEmbedding.from_weight(weight, torch.float32))
    assert isinstance(model.lm_head, nn.Linear)


def test_packed_rows_with_scales_are_refused():
    with pytest.raises(ConfigError, match="embedding has no groups"):
        CodebookEmbedding.from_weight(example(4, group_size=64)[0], torch.float32)
