"""Layers in the formats' own layouts, read by other code than that which wrote them."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme

from harness.export import compressed_tensors, gptq
from harness.export.forms import FloatForm, NoForm, dense_form_of, form_of
from harness.export.words import pack_words, unpack_words
from harness.nn.activation_grid import grouped_grid
from harness.nn.fp8 import Fp8Linear
from harness.nn.integer_linear import IntegerLinear
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import QuantizedWeight, quantize_row_groups, quantize_weight
from harness.nn.static_int8 import StaticInt8Linear
from tests.export.models import integer_model

OUT, IN = 64, 96


def weight(seed=0):
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def quantized(bits, *, group_size=32, sym=False, order=None, per_tensor=False):
    made = quantize_weight(
        weight() if order is None else weight()[:, order],
        bits=bits, group_size=group_size, sym=sym, per_tensor=per_tensor,
    )  # fmt: skip
    order = None if order is None else order.to(torch.int32)
    made = QuantizedWeight(made.codes, made.scale, made.zero, bits, group_size, IN, order)
    return QuantizedLinear.from_weight(made, torch.arange(OUT).float())


# --- words -------------------------------------------------------------------------------------------


def bits_of(words: torch.Tensor, bits: int, n: int) -> list[int]:
    """The codes in a row of words, by counting bits in one long number."""
    stream = 0
    for place, word in enumerate(words.tolist()):
        stream |= (word & 0xFFFFFFFF) << (32 * place)
    return [stream >> (bits * i) & (2**bits - 1) for i in range(n)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("n", [1, 31, 64, 100])
def test_codes_are_a_dense_stream_of_bits(bits, n):
    codes = torch.randint(0, 2**bits, (3, n), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (3, -(-n * bits // 32))
    assert [bits_of(row, bits, n) for row in words] == codes.tolist()
    assert torch.equal(unpack_words(words, bits, n), codes)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_are_those_of_the_package(bits):
    codes = torch.randint(0, 2**bits, (8, 96), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack_words(codes, bits), pack_to_int32(signed, bits))


# --- compressed-tensors ------------------------------------------------------------------------------


def decompressed(form):
    """The weight as the package itself reads it."""
    config = compressed_tensors.quantization_config({"layer": form}, [])
    (group,) = config["config_groups"].values()
    reader = BaseCompressor.get_value_from_registry(group["format"])
    return reader.decompress(compressed_tensors.tensors_of(form), QuantizationScheme(**group))[
        "weight"
    ], group


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_the_package_reads_packed_layers_as_they_are(bits, sym, group_size):
    layer = quantized(bits, group_size=group_size, sym=sym)
    form = form_of(layer)
    read, group = decompressed(form)
    assert group["format"] == "pack-quantized"
    # The package multiplies in the scale's type.
    expected = layer.dequantize(layer.scales.dtype)
    assert torch.allclose(read.float(), expected.float(), rtol=2**-10, atol=0)
    assert torch.equal(
        compressed_tensors.decode(compressed_tensors.tensors_of(form), group), layer.dequantize()
    )


@pytest.mark.parametrize("per_tensor", [True, False])
def test_one_scale_per_tensor_or_row(per_tensor):
    layer = quantized(4, group_size=-1, sym=False, per_tensor=per_tensor)
    form = form_of(layer)
    assert torch.equal(form.dequantize(), layer.dequantize())
    assert compressed_tensors.tensors_of(form)["weight_scale"].shape == (OUT, 1)


@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_products(a_gran, bits):
    scale = torch.tensor([0.25]) if a_gran == "per-tensor-static" else None
    made = quantize_weight(weight(), bits=bits, sym=True)
    layer = Int8Linear.from_weight(made, None, a_gran=a_gran, input_scale=scale)
    form = form_of(layer)
    read, group = decompressed(form)
    assert torch.equal(read, layer.dequantize())
    assert group["format"] == ("int-quantized" if bits == 8 else "pack-quantized")
    inputs = group["input_activations"]
    assert inputs["strategy"] == ("token" if a_gran == "per-token" else "tensor")
    assert inputs["dynamic"] is (a_gran != "per-tensor-static")
    assert ("input_scale" in compressed_tensors.tensors_of(form)) is (a_gran == "per-tensor-static")


def test_rows_that_share_a_scale_each_get_their_own():
    made = quantize_row_groups(weight(), bits=8, row_groups=4)
    layer = Int8Linear.from_weight(made, None, row_groups=4)
    assert layer.scales.numel() == 4
    assert torch.equal(decompressed(form_of(layer))[0], layer.dequantize())


def test_asymmetric_weights_with_rounded_inputs():
    layer = IntegerLinear.from_weight(quantize_weight(weight(), bits=8, sym=False))
    read, group = decompressed(form_of(layer))
    assert not group["weights"]["symmetric"]
    assert torch.allclose(read.float(), layer.dequantize(), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("per_tensor", [True, False])
def test_float8(per_tensor):
    layer = Fp8Linear.from_float(weight(), None, per_tensor=per_tensor)
    form = form_of(layer)
    assert isinstance(form, FloatForm)
    read, group = decompressed(form)
    assert group["format"] == "float-quantized"
    assert torch.equal(read, layer.dequantize())


def test_layers_of_several_schemes_are_targeted_by_name():
    forms = {"a": form_of(quantized(4)), "b": form_of(quantized(8)), "c": form_of(quantized(4))}
    config = compressed_tensors.quantization_config(forms, ["head"])
    assert [group["targets"] for group in config["config_groups"].values()] == [["a", "c"], ["b"]]
    assert config["ignore"] == []


# --- GPTQ --------------------------------------------------------------------------------------------


def by_definition(tensors: dict[str, torch.Tensor], bits: int) -> torch.Tensor:
    """The matrix [out, in] of a GPTQ layer, one number after the other."""
    groups, out = tensors["scales"].shape
    g_idx = tensors["g_idx"].tolist()
    columns = [bits_of(tensors["qweight"][:, j], bits, len(g_idx)) for j in range(out)]
    zeros = [bits_of(tensors["qzeros"][g], bits, out) for g in range(groups)]
    scales = tensors["scales"].float().tolist()
    return torch.tensor(
        [[(columns[j][i] - zeros[g][j]) * scales[g][j] for i, g in enumerate(g_idx)] for j in range(out)]
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptq_layers_by_the_definition(bits, sym, act_order):
    order = torch.randperm(IN, generator=torch.Generator().manual_seed(3)) if act_order else None
    layer = quantized(bits, sym=sym, order=order)
    form = form_of(layer)
    tensors = gptq.tensors_of(form)
    assert tensors["qweight"].shape == (IN * bits // 32, OUT)
    assert tensors["qzeros"].shape == (3, OUT * bits // 32)
    assert torch.equal(by_definition(tensors, bits), layer.dequantize())
    assert torch.equal(gptq.decode(tensors, gptq.quantization_config({"x": form})), layer.dequantize())
    assert gptq.quantization_config({"x": form})["desc_act"] is act_order


def test_a_reordering_inside_groups_is_no_reordering():
    order = torch.cat([torch.randperm(32) + start for start in (0, 32, 64)])
    form = form_of(quantized(4, order=order))
    assert form.group_of is None
    assert compressed_tensors.unfit(form) is None


def test_what_gptq_cannot_hold():
    assert "input" in gptq.unfit(form_of(Int8Linear.from_weight(quantize_weight(weight(), bits=8, sym=True))))
    assert "integer" in gptq.unfit(form_of(Fp8Linear.from_float(weight())))
    narrow = QuantizedLinear.from_weight(quantize_weight(weight()[:, :80], bits=4, group_size=16, sym=True))
    assert "multiples of 32" in gptq.unfit(form_of(narrow))


# --- without a standard form -------------------------------------------------------------------------


def test_a_short_last_group_has_no_form():
    layer = QuantizedLinear.from_weight(quantize_weight(weight(), bits=4, group_size=64, sym=True, pad=True))
    form = form_of(layer)
    assert isinstance(form, NoForm)
    assert "do not divide its 96 columns" in form.reason


def test_e5m2_has_no_form():
    assert "E5M2" in form_of(Fp8Linear.from_float(weight(), fmt="e5m2")).reason


def test_a_derived_class_is_not_taken_for_its_base():
    class Other(QuantizedLinear):
        """Computes who knows what."""

    assert isinstance(form_of(Other.from_weight(quantize_weight(weight(), bits=4, sym=True))), NoForm)


@pytest.mark.parametrize("a_bits", [8, 16])
@pytest.mark.parametrize("is_reordered", [False, True])
def test_the_bias_is_found_again_in_the_offset_of_a_static_layer(a_bits, is_reordered):
    low, high = -torch.rand(IN) - 0.1, torch.rand(IN) + 0.1
    order = torch.randperm(IN) if is_reordered else None
    grid = grouped_grid(low, high, a_bits, (48, 48), order)
    bias = torch.randn(OUT)
    layer = StaticInt8Linear.from_weight(quantize_weight(weight(), bits=8, sym=True), grid, bias)
    form = dense_form_of(layer)
    assert torch.allclose(form.bias, bias, atol=1e-4)
    assert torch.equal(form.weight, layer.dequantize())
    assert form.differs is not None
    assert isinstance(form_of(layer), NoForm)
    without = StaticInt8Linear.from_weight(quantize_weight(weight(), bits=8, sym=True), grid)
    assert not dense_form_of(without).bias.any()


# --- size --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "layout"),
    [
        (4, 32, True, "ct"),
        (4, 32, False, "ct"),
        (8, -1, True, "ct"),
        (3, 32, False, "ct"),
        (4, 32, False, "gptq"),
    ],
)
def test_bytes_are_those_on_paper(bits, group_size, sym, layout):
    model = integer_model("llama", bits=bits, group_size=group_size, sym=sym)
    stored = paper = 0
    for layer in model.modules():
        if not isinstance(layer, QuantizedLinear):
            continue
        tensors_of = compressed_tensors.tensors_of if layout == "ct" else gptq.tensors_of
        stored += sum(
            t.numel() * t.element_size() for n, t in tensors_of(form_of(layer)).items() if n != "g_idx"
        )
        weights, groups = layer.out_features * layer.in_features, layer.scales.numel()
        paper += weights * bits / 8 + groups * layer.scales.element_size() + (0 if sym else groups * bits / 8)
    assert stored == pytest.approx(paper, rel=0.02)
