"""Attention inside a `Band`, at a cost that grows linearly with the length.

Two forms of the same thing. *Gathered*: queries in tiles, each beside a copy of the keys that it
can see, tiles folded into the batch of one `scaled_dot_product_attention`; runs and trains
anywhere. *Flex*: FlexAttention compiled with a block mask, on CUDA, for long inputs without
padding. Both take queries [batch, heads, n, d], keys and values [batch, kv_heads, n, d]; they
return [batch, n, heads, d].
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.nn import functional as F

from harness.nn.masks import Band, band_block_mask

__all__ = ["flex_attention_in_band", "gathered_attention"]

_MOST_SHAPES = 256  # compiled forms of FlexAttention in one process


def gathered_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    padding: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of every query to the keys of its tile's span that the band lets it see.

    Args:
        padding: bool [batch, n], False where there is no token. A query whose keys are all masked
            sees itself, so that no row is empty; what it returns has no meaning.
    """
    batch, heads, length, width = query.shape
    tiling = band.tiling
    tiles = -(-length // tiling.tile)
    missing = tiles * tiling.tile - length
    if (repeats := heads // key.shape[1]) > 1:
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))

    def spans(tensor: torch.Tensor) -> torch.Tensor:  # -> [batch * tiles, heads, span, d]
        padded = F.pad(tensor, (0, 0, tiling.back, missing + tiling.ahead))
        windows = padded.unfold(2, tiling.span, tiling.tile)  # [batch, heads, tiles, d, span]
        return windows.permute(0, 2, 1, 4, 3).reshape(batch * tiles, heads, tiling.span, width)

    folded = F.pad(query, (0, 0, 0, missing)).view(batch, heads, tiles, tiling.tile, width)
    out = F.scaled_dot_product_attention(
        folded.transpose(1, 2).reshape(batch * tiles, heads, tiling.tile, width),
        spans(key),
        spans(value),
        attn_mask=_tile_mask(band, batch, tiles, length, padding, query.device),
        dropout_p=dropout,
        scale=scaling,
    )  # [batch * tiles, heads, tile, d]
    return out.transpose(1, 2).reshape(batch, tiles * tiling.tile, heads, width)[:, :length]


def _tile_mask(
    band: Band,
    batch: int,
    tiles: int,
    length: int,
    padding: torch.Tensor | None,
    device: torch.device,
) -> torch.Tensor:
    """bool [batch * tiles, 1, tile, span]."""
    tiling = band.tiling
    start = torch.arange(tiles, device=device)[:, None, None] * tiling.tile
    i = start + torch.arange(tiling.tile, device=device)[:, None]
    j = start + torch.arange(-tiling.back, tiling.tile + tiling.ahead, device=device)
    allowed = band.visible(i, j) & (j >= 0) & (j < length)  # [tiles, tile, span]
    if padding is not None:
        present = padding[:, j.clamp(0, length - 1)]  # [batch, tiles, 1, span]
        allowed = allowed & present
    allowed = (allowed | (i == j)).expand(batch, tiles, tiling.tile, tiling.span)
    return allowed.reshape(batch * tiles, 1, tiling.tile, tiling.span)


def flex_attention_in_band(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    band: Band,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """The same on CUDA through FlexAttention, which skips the tiles that the band leaves empty."""
    heads = query.shape[1]
    # Under autocast rotated queries and keys are wider than values; the kernel wants one type.
    query, key = query.to(value.dtype), key.to(value.dtype)
    repeats = heads // key.shape[1]
    if repeats > 1 and heads & (heads - 1):  # the grouped form needs a power of two of query heads
        key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
        repeats = 1
    out = _flex_attention()(
        query,
        key,
        value,
        block_mask=_cached_block_mask(band, query.shape[2], query.device),
        scale=scaling,
        enable_gqa=repeats > 1,
    )
    return out.transpose(1, 2)


@cache
def _cached_block_mask(band: Band, length: int, device: torch.device) -> Any:
    return band_block_mask(band, length, device)


def _flex_attention() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Inside another compilation FlexAttention is lowered by that one.
    if torch.compiler.is_compiling():
        function: Callable[..., torch.Tensor] = flex_attention
        return function
    return _compiled(flex_attention)


@cache
def _compiled(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    compiled: Callable[..., torch.Tensor] = torch.compile(function, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> torch.Tensor:
        # Beyond its limit of shapes dynamo would go on without compiling, many times slower.
        limits = {"recompile_limit": _MOST_SHAPES, "fail_on_recompile_limit_hit": True}
        with torch._dynamo.config.patch(limits):
            return compiled(*args, **kwargs)

    return run
