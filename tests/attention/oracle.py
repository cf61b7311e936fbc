"""Float64 references that share no indexing code with what they check."""

from __future__ import annotations

import math

import torch

from harness.nn.masks import Band


def pattern(band: Band, length: int) -> torch.Tensor:
    """bool [length, length], spelled out position by position as the definitions are written."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for i in range(length):
        for j in range(length):
            if band.kind == "sliding":
                seen = 0 <= i - j < band.size if band.causal else abs(i - j) <= band.size / 2
            else:
                blocks = math.floor(i / band.size) - math.floor(j / band.size)
                if band.causal:
                    seen = 0 <= blocks <= band.lookback and j <= i
                else:
                    seen = abs(blocks) <= band.lookback
            mask[i, j] = seen
    return mask


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """softmax(q k / sqrt d) v under a mask [n, n], in float64; rows without a key give zero.

    Queries [batch, heads, n, d], keys and values [batch, kv_heads, n, d] -> [batch, n, heads, d].
    """
    query, key, value = query.double(), key.double(), value.double()
    repeats = query.shape[1] // key.shape[1]
    key = torch.stack([key[:, head // repeats] for head in range(query.shape[1])], dim=1)
    value = torch.stack([value[:, head // repeats] for head in range(query.shape[1])], dim=1)
    allowed = mask.expand(query.shape[0], 1, *mask.shape)
    if padding is not None:
        allowed = allowed & padding[:, None, None, :]
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~allowed, -torch.inf)
    return (torch.softmax(scores, dim=-1).nan_to_num() @ value).transpose(1, 2)
