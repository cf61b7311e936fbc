"""Which keys a query sees: local patterns as intervals of positions.

Every pattern here gives the query at position i one interval of keys, ``first(i) <= j <= last(i)``,
whose ends never move back as i grows. Masks of any shape, the tiles of FlexAttention, the blocks
that the gathered form reads and the size of the cache follow from those two ends, so there is one
definition of a pattern and no second one to disagree with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["Band", "Tiling", "band_block_mask"]

Position = TypeVar("Position", int, torch.Tensor)

_FLEX_TILE = 128  # FlexAttention's own tile, in queries and in keys
_MIN_TILE, _MAX_TILE = 32, 128


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the gathered form cuts a sequence, in tokens: each tile of queries reads the `back` keys
    before it, its own `tile` keys and the `ahead` keys after it."""

    tile: int
    back: int
    ahead: int

    @property
    def span(self) -> int:
        return self.back + self.tile + self.ahead


@dataclass(frozen=True, slots=True)
class Band:
    """A local pattern.

    Args:
        kind: ``sliding``: the last `size` positions, the query's own included (bidirectional: at
            most size // 2 away). ``block``: the query's own block of `size` positions and the
            `lookback` blocks before it (bidirectional: and after it).
        size: the window or the block, in tokens.
        lookback: further blocks; unused by ``sliding``.
        causal: no query sees a later position.
    """

    kind: str
    size: int
    lookback: int = 0
    causal: bool = True

    def first(self, i: Position) -> Position:
        """The first visible key of the query at i (may be negative)."""
        if self.kind == "sliding":
            return i - (self.size - 1 if self.causal else self.size // 2)
        return (i // self.size - self.lookback) * self.size

    def last(self, i: Position) -> Position:
        """The last visible key of the query at i (may lie beyond the end)."""
        if self.causal:
            return i
        if self.kind == "sliding":
            return i + self.size // 2
        return (i // self.size + self.lookback + 1) * self.size - 1

    def visible(self, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        """Whether the query at i sees the key at j, elementwise; positions are not clipped."""
        return (j >= self.first(i)) & (j <= self.last(i))

    @property
    def reach(self) -> int:
        """The most keys that a causal query sees: what a cache must keep."""
        return self.size if self.kind == "sliding" else (self.lookback + 1) * self.size

    @property
    def tiling(self) -> Tiling:
        """Tiles small enough to waste little and large enough to be worth a matrix product."""
        if self.kind == "sliding":
            tile = min(max(self.size, _MIN_TILE), _MAX_TILE)
            back = self.size - 1 if self.causal else self.size // 2
        else:
            tile = self.size * -(-_MIN_TILE // self.size)  # whole blocks
            back = self.lookback * self.size
        back = -(-back // tile) * tile
        return Tiling(tile, back, 0 if self.causal else back)


def band_block_mask(band: Band, length: int, device: torch.device) -> BlockMask:
    """FlexAttention's tiles for `length` queries and keys, computed from the ends of the intervals.

    `create_block_mask` evaluates length² positions; this evaluates (length / 128)² tiles.
    """
    from torch.nn.attention.flex_attention import BlockMask

    tiles = -(-length // _FLEX_TILE)
    start = torch.arange(tiles, device=device) * _FLEX_TILE
    end = start + _FLEX_TILE - 1
    row_start, row_end = start[:, None], end.clamp(max=length - 1)[:, None]
    touched = (end >= band.first(row_start)) & (start <= band.last(row_end))
    # A tile that sticks out of the sequence is never full: the kernel must look at every position.
    inside = (end < length) & (end < length)[:, None]
    full = inside & (start >= band.first(row_end)) & (end <= band.last(row_start))

    def mask_mod(_batch: torch.Tensor, _head: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        return band.visible(i, j)

    partial_count, partial_index = _tile_lists(touched & ~full)
    full_count, full_index = _tile_lists(full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_index,
        full_count,
        full_index,
        BLOCK_SIZE=_FLEX_TILE,
        mask_mod=mask_mod,
        seq_lengths=(length, length),
    )


def _tile_lists(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bool [rows, cols] -> int32 counts [1, 1, rows], indices [1, 1, rows, cols], chosen first."""
    order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
    counts = chosen.sum(-1, dtype=torch.int32)
    return counts[None, None], order.to(torch.int32)[None, None].contiguous()
