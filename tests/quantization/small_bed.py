"""A tiny model that has really learnt something, in seconds: a noisy chain of tokens.

Two tokens decide the next by a random table with probability 0.8, else any of 16 follows. Rounding to 2
bits visibly damages what was learnt, and a few steps can repair it.
"""

from __future__ import annotations

import copy
from functools import cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from harness.testing import make_context
from harness.tokens import TextTokens
from harness.training import TrainSettings, causal_loss, train

BUDGET = TrainSettings(steps=40, lr=1e-3, batch_size=4, seq_len=32)
_TOKENS = 16


@cache
def chain_tokens(seed: int = 0) -> torch.Tensor:
    """int64 [20000]; the same chain for every seed, other noise."""
    follower = torch.randint(_TOKENS, (_TOKENS, _TOKENS), generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(_TOKENS, (20000,), generator=generator)
    is_noise = torch.rand(20000, generator=generator) < 0.2
    tokens = noise.clone()
    for index in range(2, len(tokens)):
        if not is_noise[index]:
            tokens[index] = follower[tokens[index - 2], tokens[index - 1]]
    return tokens


@cache
def _learnt() -> nn.Module:
    config = LlamaConfig(
        vocab_size=_TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    settings = TrainSettings(steps=300, lr=5e-3, batch_size=16, seq_len=32)
    train(model, TextTokens(chain_tokens(), "chain"), settings, torch.Generator().manual_seed(0))
    return model


def learnt_model() -> nn.Module:
    return copy.deepcopy(_learnt())


def context_for(model: nn.Module, **keywords):
    """With the chain to train on."""
    return make_context(model, **{"tokens": chain_tokens(), "settings": BUDGET, **keywords})


@torch.no_grad()
def held_out_loss(model: nn.Module) -> float:
    return float(causal_loss(model, chain_tokens(1)[: 64 * 32].view(64, 32)))
