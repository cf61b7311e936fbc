"""Making one key-value head out of several."""

from __future__ import annotations

import torch

__all__ = ["pool_heads"]


def pool_heads(
    heads: torch.Tensor, groups: int, init: str = "mean", generator: torch.Generator | None = None
) -> torch.Tensor:
    """Merge heads [kv_heads, head_dim, ...] into [groups, head_dim, ...] (float32).

    Neighbouring heads form a group. ``mean``: their average (Ainslie 2023); ``first``: the first of
    them; ``random``: normal numbers of the same spread, zeros for biases.
    """
    # [groups, kv_heads / groups, head_dim, ...]
    grouped: torch.Tensor = heads.float().reshape(groups, -1, *heads.shape[1:])
    if init == "mean":
        return grouped.mean(1)
    first = grouped[:, 0]
    if init == "first":
        return first
    if heads.ndim == 2:  # a bias
        return torch.zeros_like(first)
    noise = torch.randn(first.shape, generator=generator).to(first.device)
    return noise * heads.float().std()
