"""Low-rank adapters over a layer that stays as it is."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.nn.codebook import CodebookLinear
from harness.nn.lora import LoraLinear
from tests.nn.test_codebook import example


@pytest.fixture
def layer() -> LoraLinear:
    base = CodebookLinear.from_weight(example(4, group_size=64)[0], torch.randn(40))
    generator = torch.Generator().manual_seed(0)
    return LoraLinear(base, rank=4, alpha=8, generator=generator, dtype=torch.float32, device="cpu")


def test_at_first_it_is_the_base(layer):
    x = torch.randn(2, 5, 192)
    assert torch.equal(layer(x), layer.base(x))
    assert bool(layer.lora_a.any())
    assert float(layer.lora_a.detach().abs().max()) <= 192**-0.5


def test_trained_it_is_one_matrix(layer):
    with torch.no_grad():
        layer.lora_b.normal_()
    x = torch.randn(5, 192)
    merged = layer.base.dense_weight() + 8 / 4 * layer.lora_b.detach() @ layer.lora_a.detach()
    torch.testing.assert_close(layer.dense_weight(), merged)
    torch.testing.assert_close(layer(x), functional.linear(x, merged, layer.base.bias), rtol=1e-4, atol=1e-4)


def test_only_the_adapters_are_trainable(layer):
    layer(torch.randn(3, 192)).square().sum().backward()
    trainable = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert trainable == {"lora_a", "lora_b"}
    assert bool(layer.lora_b.grad.any())


def test_it_says_what_it_is(layer):
    assert (layer.in_features, layer.out_features) == (192, 40)
    assert layer.kernel_name == "gather+matmul+lora"
    assert layer.bits == 4 + 32 * 4 * (192 + 40) / (192 * 40)
    assert "rank=4, alpha=8" in repr(layer)
