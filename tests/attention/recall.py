"""A tiny language model and the recall task that tell attention patterns apart.

Two layers, width 64, two heads, rotary positions, and a width-4 depthwise convolution on queries, keys
and values, without which such small models do not learn recall at all, whatever their attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from harness.nn.attention import attend_in_band
from harness.nn.masks import Band
from harness.nn.sdpa import shared_heads_sdpa

WIDTH, HEADS, LAYERS = 64, 2, 2
KEYS, VALUES, PAIRS, FILLERS = 32, 32, 8, 32
VOCAB = KEYS + VALUES + 1  # and one filler

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return shared_heads_sdpa(query, key, value, is_causal=True)


def sliding(window: int) -> Attend:
    return lambda q, k, v: attend_in_band(q, k, v, None, Band("sliding", window))


class _Attention(nn.Module):
    def __init__(self, attend: Attend, kv_heads: int) -> None:
        super().__init__()
        self.attend, self.kv_heads, self.head_dim = attend, kv_heads, WIDTH // HEADS
        self.sizes = (WIDTH, kv_heads * self.head_dim, kv_heads * self.head_dim)
        self.qkv = nn.Linear(WIDTH, sum(self.sizes), bias=False)
        self.conv = nn.Conv1d(sum(self.sizes), sum(self.sizes), 4, groups=sum(self.sizes))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = F.silu(self.conv(F.pad(self.qkv(x).transpose(1, 2), (3, 0)))).transpose(1, 2)
        q, k, v = (
            part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in mixed.split(self.sizes, dim=-1)
        )
        return self.out(self.attend(_rotated(q), _rotated(k), v).flatten(-2))


def _rotated(x: torch.Tensor) -> torch.Tensor:
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half) / half)
    angle = torch.arange(x.shape[-2])[:, None] * frequencies
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)


class RecallModel(nn.Module):
    def __init__(self, attend: Attend, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.RMSNorm(WIDTH),
                    "attention": _Attention(attend, kv_heads),
                    "norm2": nn.RMSNorm(WIDTH),
                    "ffn": nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
                }
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.RMSNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            x = x + block["ffn"](block["norm2"](x))
        return self.head(self.norm(x))


def recall_batch(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [batch, 64], positions of the queries [8], the answers [batch, 8]).

    Eight key-value pairs, 32 fillers, then the eight keys in another order, each with its answer.
    """
    keys = torch.rand(batch, KEYS, generator=generator).argsort(1)[:, :PAIRS]
    values = KEYS + torch.randint(VALUES, (batch, PAIRS), generator=generator)
    order = torch.rand(batch, PAIRS, generator=generator).argsort(1)
    pairs = torch.stack([keys, values], -1).flatten(1)
    asked = torch.stack([keys.gather(1, order), values.gather(1, order)], -1).flatten(1)
    filler = torch.full((batch, FILLERS), KEYS + VALUES)
    queries = 2 * PAIRS + FILLERS + 2 * torch.arange(PAIRS)
    return torch.cat([pairs, filler, asked], 1), queries, values.gather(1, order)


def needle_batch(
    batch: int, generator: torch.Generator, nearest: int = 2, farthest: int = 63
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One key-value pair in 64 tokens of filler, between `nearest` and `farthest` before the query."""
    tokens = torch.full((batch, 64), KEYS + VALUES)
    key = torch.randint(KEYS, (batch, 1), generator=generator)
    value = KEYS + torch.randint(VALUES, (batch, 1), generator=generator)
    place = 63 - torch.randint(nearest, farthest + 1, (batch, 1), generator=generator)
    tokens.scatter_(1, place, key).scatter_(1, place + 1, value)
    tokens[:, 63:] = key
    return tokens, torch.tensor([63]), value


def train(
    model: nn.Module, make_batch: Callable[..., tuple[torch.Tensor, ...]], steps: int, seed: int = 0
) -> nn.Module:
    """AdamW at 3e-3 with a cosine, batches of 64; the loss is on the answers alone."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / steps)) / 2
        tokens, queries, answers = make_batch(64, generator)
        loss = F.cross_entropy(model(tokens)[:, queries].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, batch: tuple[torch.Tensor, ...]) -> float:
    tokens, queries, answers = batch
    return float((model(tokens)[:, queries].argmax(-1) == answers).float().mean())
