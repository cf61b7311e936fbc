"""The core of SparseGPT: a matrix pruned column by column, each loss spread over the columns to come.

With ``H^-1 = U^T U`` (`harness.nn.hessian`) removing weight `w` of column `j` costs ``w^2 / U_jj^2`` once
the columns before it are settled, and the best answer of the columns after it is to subtract
``w / U_jj * U[j, j:]`` (Frantar and Alistarh 2023, section 3). Rounding the survivors in the same pass
costs nothing more: their rounding errors are spread like the removed weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch

from harness import ConfigError, NumericalFailure
from harness.nn.hessian import Factor, factorise
from harness.nn.magnitude import count_of
from harness.nn.n_of_m import keep_n_of_m
from harness.nn.quantizer import Grid, QuantizedWeight, group_grid, padded_to_groups

__all__ = ["Pruning", "SparseGptResult", "prune_matrix", "sparsegpt_prune"]


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How a matrix is pruned and rounded; see the options of the method."""

    sparsity: float = 0.5
    n: int | None = None
    m: int | None = None
    block_size: int = 128
    bits: int = 16
    group_size: int = -1
    sym: bool = False

    def __post_init__(self) -> None:
        if self.bits < 16 and self.m is not None and self.group_size > 0 and self.group_size % self.m:
            raise ConfigError(f"m={self.m} does not divide group_size={self.group_size}")

    def is_mask_start(self, column: int) -> bool:
        """Whether a mask of N:M is chosen at a column."""
        return self.m is not None and column % self.m == 0

    def is_grid_start(self, column: int) -> bool:
        """Whether a new scale begins at a column."""
        return self.bits < 16 and self.group_size > 0 and column % self.group_size == 0


@dataclass(frozen=True)
class SparseGptResult:
    """A pruned matrix.

    Args:
        weight: [out, in] with zeros, in the type of the matrix; rounded where it was quantized.
        keep: bool [out, in].
        loss: ``tr((W - weight)(H + damp)(W - weight)^T)``, without the columns that no token reaches.
        damp: the damping that was used.
        quantized: the same matrix as codes, for fewer than 16 bits.
    """

    weight: torch.Tensor
    keep: torch.Tensor
    loss: float
    damp: float
    quantized: QuantizedWeight | None = None


def sparsegpt_prune(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    sparsity: float = 0.5,
    n: int | None = None,
    m: int | None = None,
    damp: float = 0.01,
    block_size: int = 128,
    bits: int = 16,
    group_size: int = -1,
    sym: bool = False,
) -> SparseGptResult:
    """Prune a matrix [out, in] given ``mean(x x^T)`` [in, in] of its inputs; float32 or float64.

    Without `n` and `m` exactly ``floor(sparsity * out * in)`` weights go, evenly over the blocks of
    `block_size` columns; within a block all rows compete. With `n` and `m` the result does not depend on
    `block_size`. Below 16 `bits` the survivors are rounded as well.

    Raises:
        NumericalFailure: weights or Hessian are not finite, or the Hessian cannot be factorised.
        ConfigError: `damp` is not positive, or `m` does not divide the columns.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure("weights are NaN or infinite")
    pruning = Pruning(
        sparsity=sparsity, n=n, m=m, block_size=block_size, bits=bits, group_size=group_size, sym=sym
    )
    return prune_matrix(weight, factorise(hessian.to(weight.dtype), damp=damp), pruning)


@torch.no_grad()
def prune_matrix(weight: torch.Tensor, factor: Factor, pruning: Pruning) -> SparseGptResult:
    """`sparsegpt_prune` of a finite matrix with a factor that others may share, in the columns' own order.

    Raises:
        NumericalFailure: the corrected weights became NaN or infinite.
        ConfigError: `m` does not divide the columns.
    """
    columns, root = weight.shape[1], factor.root
    if pruning.m is not None and columns % pruning.m:
        raise ConfigError(f"groups of {pruning.m} do not divide the {columns} input columns of the layer")
    rest = weight.detach().clone()  # columns still to come, as corrected so far
    result, keep = torch.empty_like(rest), torch.ones_like(rest, dtype=torch.bool)
    rounding = _Rounding(rest, pruning) if pruning.bits < 16 else None
    loss = rest.new_zeros(())
    for start, end in _blocks(columns, pruning):
        block = slice(start, end)
        if rounding is not None and pruning.is_grid_start(start):
            rounding.start(rest[:, start:], start)
        if pruning.m is None:
            keep[:, block] = _block_mask(rest[:, block], factor, start, pruning.sparsity)
        result[:, block], errors = _prune_block(
            rest[:, block], keep[:, block], factor, start, pruning, rounding
        )
        loss += errors.square().sum(0).masked_fill(factor.dead[block], 0).sum()
        rest[:, end:].addmm_(errors, root[block, end:], alpha=-1)
    if not bool(torch.isfinite(result).all() & torch.isfinite(loss)):
        raise NumericalFailure("the corrected weights became NaN or infinite")
    quantized = None if rounding is None else rounding.quantized(result)
    return SparseGptResult(result, keep, float(loss), factor.damp, quantized)


def _blocks(columns: int, pruning: Pruning) -> Iterator[tuple[int, int]]:
    """Blocks of whole groups of N:M, and of whole groups of a scale or inside one of them."""
    size = pruning.block_size
    groups = range(0)
    if pruning.bits < 16 and pruning.group_size > 0:
        if pruning.group_size <= size:
            size -= size % pruning.group_size
        else:
            groups = range(0, columns, pruning.group_size)
    if pruning.m is not None:
        size = max(pruning.m, size - size % pruning.m)
    return pairwise(sorted({*range(0, columns, size), *groups, columns}))


def _scores(weights: torch.Tensor, factor: Factor, start: int) -> torch.Tensor:
    """What removing each weight [out, columns] costs; nothing in columns that no token reaches."""
    columns = slice(start, start + weights.shape[1])
    costs = (weights / factor.root.diagonal()[columns]).square()
    return costs.masked_fill(factor.dead[columns], 0)


def _block_mask(weights: torch.Tensor, factor: Factor, start: int, sparsity: float) -> torch.Tensor:
    """Keep mask [out, columns] of a block: its cheapest weights go, over all rows, in exact number."""
    out, columns = weights.shape
    pruned = count_of(sparsity, out * (start + columns)) - count_of(sparsity, out * start)
    order = _scores(weights, factor, start).flatten().sort(stable=True).indices
    keep = torch.ones(out * columns, dtype=torch.bool, device=weights.device)
    keep[order[:pruned]] = False
    return keep.view(out, columns)


def _prune_block(
    weights: torch.Tensor,
    keep: torch.Tensor,
    factor: Factor,
    start: int,
    pruning: Pruning,
    rounding: _Rounding | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """New weights and errors ``(w - new) / U_jj``, both [out, columns]; N:M fills in `keep`."""
    root = factor.root[start : start + weights.shape[1], start : start + weights.shape[1]]
    # Transposed: what a step reads and writes then lies together.
    rest = weights.t().contiguous()  # [columns, out]
    result, errors = torch.empty_like(rest), torch.empty_like(rest)
    for j in range(len(rest)):
        if pruning.is_mask_start(start + j):
            n, m = cast(int, pruning.n), cast(int, pruning.m)
            scores = _scores(rest[j : j + m].t(), factor, start + j)
            keep[:, j : j + m] = keep_n_of_m(scores, n, m)
        if rounding is not None and j and pruning.is_grid_start(start + j):
            rounding.start(rest[j:].t(), start + j)
        values = rest[j] if rounding is None else rounding.round(rest[j], start + j)
        result[j] = values.where(keep[:, j], 0)
        errors[j] = (rest[j] - result[j]) / root[j, j]
        rest[j + 1 :] -= torch.outer(root[j, j + 1 :], errors[j])
    return result.t(), errors.t()


class _Rounding:
    """Grids of groups of columns, each following from the weights as corrected up to its first column."""

    def __init__(self, weight: torch.Tensor, pruning: Pruning) -> None:
        self.pruning, self.columns = pruning, weight.shape[1]
        self.width = self.columns if pruning.group_size == -1 else pruning.group_size
        # Of the weights as given: what one scale per row uses, and the type of the others.
        grid = group_grid(
            padded_to_groups(weight, self.width),
            bits=pruning.bits,
            group_size=pruning.group_size,
            sym=pruning.sym,
        )
        self.scale, self.zero = grid.scale, grid.zero  # [out, groups]

    def start(self, rest: torch.Tensor, column: int) -> None:
        """Make the grid of the group that starts at a column; `rest` [out, ...] begins with its columns."""
        grid = group_grid(
            rest[:, : self.width],
            bits=self.pruning.bits,
            sym=self.pruning.sym,
            scale_dtype=self.scale.dtype,
            known_finite=True,
        )
        self.scale[:, column // self.width] = grid.scale[:, 0]
        if self.zero is not None and grid.zero is not None:
            self.zero[:, column // self.width] = grid.zero[:, 0]

    def round(self, values: torch.Tensor, column: int) -> torch.Tensor:
        """The nearest points of the grid for one column [out]."""
        group = column // self.width
        zero = None if self.zero is None else self.zero[:, group]
        return Grid(self.pruning.bits, self.scale[:, group], zero).round(values)

    def quantized(self, result: torch.Tensor) -> QuantizedWeight:
        """The codes of a matrix whose values are points of the grids; zero has a code on each."""
        padded = padded_to_groups(result, self.width)
        groups = padded.view(len(padded), -1, self.width)
        zero = None if self.zero is None else self.zero[:, :, None]
        codes = Grid(self.pruning.bits, self.scale[:, :, None], zero).encode(groups).view(padded.shape)
        return QuantizedWeight(
            codes, self.scale, self.zero, self.pruning.bits, self.pruning.group_size, self.columns
        )
