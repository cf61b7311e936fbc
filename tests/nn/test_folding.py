"""Folding scales must not change what a block computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from harness.errors import NotApplicable, NumericalFailure
from harness.nn.anatomy import NormSite, anatomy_of, blocks_of, norm_sites
from harness.nn.folding import (
    linears_of,
    scale_norm_site,
    scale_up_down,
    scale_value_output,
    value_channels,
)
from harness.testing.models import tiny_model

TOKENS = torch.randint(256, (2, 16), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def output(model: nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS).logits


def scales(size: int) -> torch.Tensor:
    return torch.exp(torch.randn(size, generator=torch.Generator().manual_seed(1)))


def unusual(model: nn.Module) -> nn.Module:
    """Norms and biases that are not ones and zeros."""
    torch.manual_seed(2)
    for _, block in blocks_of(model):
        for parameter in block.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_norm_sites_preserve_the_function(family):
    model = unusual(tiny_model(family))
    before = output(model)
    for name, block in blocks_of(model):
        for site in norm_sites(model):
            gain = block.get_submodule(site.norm).weight.detach().clone()
            scale_norm_site(block, site, scales(128), name)
            torch.testing.assert_close(block.get_submodule(site.norm).weight, gain / scales(128))
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_value_and_ffn_folds_preserve_the_function(family):
    model = unusual(tiny_model(family))
    before, anatomy = output(model), anatomy_of(model)
    for name, block in blocks_of(model):
        scale_value_output(block, anatomy, scales(128), 32, name)
        scale_up_down(block, anatomy, scales(256), name)
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)


def test_query_heads_share_the_scales_of_their_value_head():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    before = output(model)
    ((name, block),) = blocks_of(model)
    peaks = torch.arange(64.0)  # 8 query heads of 8 channels; 4 of them read one value head
    shared = value_channels(peaks, 16, 8)
    assert shared.tolist() == [*range(24, 32), *range(56, 64)]
    scale_value_output(block, anatomy_of(model), scales(16), 8, name)
    torch.testing.assert_close(output(model), before, rtol=1e-4, atol=1e-5)


class _PlusOneNorm(nn.Module):
    """A norm that keeps its gain less one, as Gemma's do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def test_a_gain_that_is_kept_less_one():
    block = nn.ModuleDict({"norm": _PlusOneNorm(), "up": nn.Linear(8, 4)})
    x = torch.randn(5, 8)
    before = block["up"](block["norm"](x))
    scale_norm_site(block, NormSite("norm", ("up",)), scales(8), "block")
    torch.testing.assert_close(block["up"](block["norm"](x)), before)


def test_what_cannot_be_folded_is_named():
    block = nn.ModuleDict(
        {"norm": nn.LayerNorm(8), "up": nn.Identity(), "bare": nn.LayerNorm(8, elementwise_affine=False)}
    )
    with pytest.raises(NotApplicable, match="block has no layer 'down'"):
        linears_of(block, ("down",), "block")
    with pytest.raises(NotApplicable, match=r"block\.up is a Identity"):
        scale_norm_site(block, NormSite("norm", ("up",)), torch.ones(8), "block")
    with pytest.raises(NotApplicable, match="has no gain"):
        scale_norm_site(block, NormSite("bare", ()), torch.ones(8), "block")


def test_overflow_is_found():
    block = nn.ModuleDict({"norm": nn.LayerNorm(8), "up": nn.Linear(8, 4)}).half()
    with pytest.raises(NumericalFailure, match=r"block\.up: scaled values do not fit torch\.float16"):
        scale_norm_site(block, NormSite("norm", ("up",)), torch.full((8,), 1e7), "block")
