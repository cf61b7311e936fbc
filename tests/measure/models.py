"""Small models whose attention matters, for comparing ways to run them."""

from __future__ import annotations

import torch
from torch import nn


def vivid(model: nn.Module, seed: int = 3) -> nn.Module:
    """Weights large enough that a wrong mask or position shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                scale = 1.5 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def tiny_mistral(window: int) -> nn.Module:
    """A Llama-like decoder with grouped queries and a sliding window."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        sliding_window=window,
    )  # fmt: skip
    return vivid(MistralForCausalLM(config))


def tiny_grouped(kv_heads: int) -> nn.Module:
    """A Llama with fewer key-value heads than query heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=kv_heads, max_position_embeddings=128,
    )  # fmt: skip
    return vivid(LlamaForCausalLM(config))
