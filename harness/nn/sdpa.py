"""One call of `scaled_dot_product_attention` that reads shared key-value heads once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["shared_heads_sdpa"]


def shared_heads_sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    allowed: torch.Tensor | None = None,
    *,
    is_causal: bool = False,
    dropout: float = 0.0,
    scaling: float | None = None,
) -> torch.Tensor:
    """Queries [batch, heads, q, d], keys and values [batch, kv_heads, kv, d] -> [batch, q, heads, d].

    A single query per sequence has no order among its heads: the heads that share keys become the
    rows of one small matrix product, so the keys are neither repeated nor read again.

    Args:
        allowed: bool, broadcast to [batch, 1, q, kv].
    """
    batch, heads, q_len, width = query.shape
    repeats = heads // key.shape[1]
    grouped = False
    if repeats > 1 and q_len == 1:
        query = query.reshape(batch, key.shape[1], repeats, width)
        is_causal = False
    elif repeats > 1:
        # With a mask the grouped form falls back to the slow kernel: repeat the keys instead.
        grouped = allowed is None
        if not grouped:
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    out = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=allowed,
        dropout_p=dropout,
        scale=scaling,
        is_causal=is_causal,
        enable_gqa=grouped,
    )
    return out.reshape(batch, heads, q_len, value.shape[-1]).transpose(1, 2)
