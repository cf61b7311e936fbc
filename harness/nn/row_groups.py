"""Ranges that consecutive rows of a matrix share: between one for the matrix and one for each row.

A row is what one output neuron reads, so such a scale is constant along the summed columns and may leave an
integer product. Where rows belong to attention heads, no group spans two heads unless it holds whole ones.

Source: Shen, Dong, Ye et al. 2020, "Q-BERT" (arXiv:1909.05840), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.errors import ConfigError
from harness.nn.quantizer import Grid, QuantizedWeight, find_grid

__all__ = ["quantize_in_row_groups", "row_group_sizes"]


def row_group_sizes(rows: int, groups: int, heads: int = 1) -> list[int]:
    """How many consecutive rows each of `groups` groups holds: as even as heads allow.

    Args:
        groups: from 1 to `rows`, or -1 for one per row.
        heads: equal runs of rows. Fewer groups than heads hold whole heads, more are dealt out to the
            heads so that their numbers differ by one at most.

    Raises:
        ConfigError: more groups than rows, or fewer than heads that do not divide them.

    >>> row_group_sizes(12, 4), row_group_sizes(12, 5), row_group_sizes(12, 3, heads=2)
    ([3, 3, 3, 3], [3, 3, 2, 2, 2], [3, 3, 6])
    """
    groups = rows if groups == -1 else groups
    if not 1 <= groups <= rows:
        raise ConfigError(
            f"groups={groups}: a matrix of {rows} rows has 1 to {rows} groups (-1: one per row)"
        )
    if rows % heads:
        raise ConfigError(f"{rows} rows are not {heads} equal heads")
    if groups < heads:
        if heads % groups:
            raise ConfigError(
                f"groups={groups} would split a head: {heads} heads need a divisor of {heads}, or {heads} to "
                f"{rows} groups"
            )
        return [rows // groups] * groups
    of_head = _even(groups, heads)
    return [size for count in of_head for size in _even(rows // heads, count)]


def _even(total: int, parts: int) -> list[int]:
    """`total` as `parts` numbers that differ by one at most, larger ones first."""
    share, left = divmod(total, parts)
    return [share + 1] * left + [share] * (parts - left)


def quantize_in_row_groups(weight: torch.Tensor, *, bits: int, sizes: Sequence[int]) -> QuantizedWeight:
    """Round a matrix [out, in] on the asymmetric grids of its row groups' ranges.

    Scales are stored as `group_grid` stores those of rows: float32 for 8 bits, else float16 (bfloat16 where
    the range needs it). One group gives the numbers of ``quantize_weight(per_tensor=True)``, one per row
    those of ``group_size=-1``.

    Args:
        sizes: rows of each group, in order; they add up to `out`.

    Returns:
        A scale and a zero point for each row, [out, 1], equal inside a group.

    Raises:
        ConfigError: `bits` outside 2 to 8, or sizes that do not add up.
        NumericalFailure: the matrix has NaN or infinite values.
    """
    weight = weight.detach().float()
    out, columns = weight.shape
    if sum(sizes) != out:
        raise ConfigError(f"row groups of {sum(sizes)} rows do not fit a matrix of {out}")
    group = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(weight.device)  # [out]
    start = weight.new_zeros(len(sizes))
    low = start.scatter_reduce(0, group, weight.amin(1), "amin")
    high = start.scatter_reduce(0, group, weight.amax(1), "amax")
    scale_dtype = torch.float32 if bits == 8 else None
    found = find_grid(torch.stack([low, high], 1), bits=bits, sym=False, scale_dtype=scale_dtype)
    assert found.zero is not None
    grid = Grid(bits, found.scale[group], found.zero[group])
    return QuantizedWeight(grid.encode(weight), grid.scale, grid.zero, bits, -1, columns)
