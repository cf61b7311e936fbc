"""A small language model, trained from random weights on the King James text."""

from __future__ import annotations

import torch
from torch import nn

from harness.context import Context
from harness.testing import make_context
from harness.training import TrainSettings
from tests.zoo_models import training_tokens

BUDGET = TrainSettings(steps=450, lr=3e-3, batch_size=16, seq_len=64, warmup_share=1 / 9)


def nano_model(seed: int = 0) -> nn.Module:
    """Untrained: width 96, 3 layers, 4 heads, FFN 256, 4096 tokens, tied."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def nano_context(model: nn.Module, settings: TrainSettings = BUDGET) -> Context:
    return make_context(model, tokens=training_tokens(), settings=settings)
