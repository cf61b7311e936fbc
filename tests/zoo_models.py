"""The bundled models and the King James text for tests that need trained weights."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from harness.corpus import kjv_held_out_chapters, kjv_training_text
from harness.models.loading import ZOO_DIR


def zoo_model(name: str) -> nn.Module:
    """A bundled model in float32, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(ZOO_DIR / name, dtype=torch.float32).eval()


@cache
def _tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(ZOO_DIR / "llama-6m")


def _tokens(text: str) -> torch.Tensor:
    ids = _tokenizer()(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids)


@cache
def training_tokens() -> torch.Tensor:
    """The start of the training books, int64 [about 400,000]."""
    return _tokens(kjv_training_text()[:1_500_000])


@cache
def held_out_tokens() -> torch.Tensor:
    """The books that nothing trains on, int64 [about 28,000]."""
    return _tokens("\n".join(chapter.text for chapter in kjv_held_out_chapters()))


@torch.no_grad()
def held_out_nll(model: nn.Module, *, windows: int = 48, seq_len: int = 128) -> float:
    """Nats per token over the first `windows` windows of the held-out books."""
    tokens = held_out_tokens()[: windows * seq_len].view(windows, seq_len)
    losses = [model(input_ids=batch, labels=batch, use_cache=False).loss for batch in tokens.split(8)]
    return float(torch.stack(losses).mean())
