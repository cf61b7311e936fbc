"""Packed weights times int8 tokens against the same in float64; packed embeddings against their matrix."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from harness.errors import ConfigError, NotApplicable
from harness.nn.integer_linear import IntegerLinear
from harness.nn.packing import PLANES
from harness.nn.quantized import QuantizedLinear
from harness.nn.quantized_embedding import QuantizedEmbedding, quantize_embedding
from harness.nn.quantizer import quantize_activation, quantize_weight
from harness.testing.models import tiny_model


def make(rows=37, columns=50, bits=3, bias=True):
    generator = torch.Generator().manual_seed(bits)
    w = torch.randn(rows, columns, generator=generator) + 0.3
    layer = IntegerLinear.from_weight(
        quantize_weight(w, bits=bits, sym=False), torch.randn(rows, generator=generator) if bias else None
    )
    return layer, torch.randn(2, 5, columns, generator=generator)


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("bias", [True, False])
def test_the_product_is_that_of_the_rounded_operands(bits, bias):
    layer, x = make(bits=bits, bias=bias)
    codes, scale = quantize_activation(x.flatten(0, 1))
    expected = (codes.double() * scale.double()) @ layer.dequantize(torch.float64).t()
    if bias:
        expected += layer.bias.double()
    torch.testing.assert_close(layer(x).flatten(0, 1).double(), expected, atol=1e-5, rtol=1e-5)
    assert layer(x[:0]).shape == (0, 5, 37)


def test_it_stores_what_the_weight_only_layer_stores_and_survives_saving():
    layer, x = make(bits=2)
    plain = QuantizedLinear.from_weight(quantize_weight(layer.dequantize(), bits=2, sym=False), layer.bias)
    sizes = [sum(t.numel() * t.element_size() for t in each.state_dict().values()) for each in (layer, plain)]
    assert sizes[0] == sizes[1]
    other = make(bits=2)[0]
    nn.init.zeros_(other.bias)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    assert layer.kernel_name == layer.kernel_for(7, torch.bfloat16)
    half = copy.deepcopy(layer).to(torch.bfloat16)
    assert half.scales.dtype == layer.scales.dtype
    assert half(x.bfloat16()).dtype == torch.bfloat16


# --- embeddings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_lookup_gives_the_rows_of_the_packed_matrix(bits):
    w = torch.randn(101, 24, generator=torch.Generator().manual_seed(0))
    rows = QuantizedLinear.from_weight(quantize_weight(w, bits=bits, sym=False))
    embedding = QuantizedEmbedding(rows, torch.float32)
    tokens = torch.tensor([[0, 1, 2, 100], [55, 55, 99, 3]])
    torch.testing.assert_close(embedding(tokens), rows.dequantize()[tokens], rtol=0, atol=0)
    assert embedding(tokens[:0]).shape == (0, 4, 24)
    assert embedding.to(torch.bfloat16)(tokens).dtype == torch.bfloat16


def test_other_forms_are_refused():
    w = torch.randn(16, 8)
    for weight in (quantize_weight(w, bits=3, sym=False), quantize_weight(w, bits=8, sym=True)):
        with pytest.raises(ConfigError, match="4 or 8 bits with a scale and a zero point"):
            QuantizedEmbedding(QuantizedLinear.from_weight(weight), torch.float32)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "bert", "encoder"])
def test_a_tied_head_shares_the_packed_rows(family):
    model = tiny_model(family)
    before = model.get_input_embeddings().weight.detach().clone()
    tied = quantize_embedding(model, lambda w: quantize_weight(w, bits=8, sym=False))
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert tied == (family != "encoder")
    if tied:
        assert model.get_output_embeddings() is embedding.rows
        moved = copy.deepcopy(model).to(torch.float64)
        assert moved.get_output_embeddings() is moved.get_input_embeddings().rows
    assert float((embedding.rows.dequantize() - before).abs().max()) < 0.01
    with torch.no_grad():
        output = model(torch.tensor([[1, 2, 3]]))
    assert torch.isfinite(output[0]).all()


def test_an_embedding_that_does_more_is_left_alone():
    class Scaled(nn.Embedding):
        pass

    model = tiny_model("llama")
    model.model.embed_tokens = Scaled(256, 128)
    with pytest.raises(NotApplicable, match="no plain nn"):
        quantize_embedding(model, lambda w: quantize_weight(w, bits=8, sym=False))
