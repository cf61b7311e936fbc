"""The core of GPTQ: matrices that read the same input, rounded column by column.

Rows do not depend on each other, so that all matrices that read the same input share one factorised
Hessian and are quantized as one. Nothing inside the loops waits for a GPU.

What a pruner before it made zero stays zero: such a weight is rounded to zero whatever the columns before it
ask of it, and the columns after it make up for that, as SparseGPT does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch

from harness import NumericalFailure
from harness.kernels.gptq import quantize_columns
from harness.nn.hessian import Factor, factorise
from harness.nn.quantizer import Grid, QuantizedWeight, group_grid, padded_to_groups

__all__ = ["Factor", "GptqResult", "Rounding", "factorise", "gptq_quantize", "quantize_stack"]

_PRUNED = 0.01  # share of zeros; in 16 bits a matrix that nobody pruned has one in a million


@dataclass(frozen=True, kw_only=True)
class Rounding:
    """How weights are rounded; see the options of the method."""

    bits: int
    group_size: int = -1
    sym: bool = False
    static_groups: bool = False
    clip: Literal["absmax", "mse"] = "absmax"
    block_size: int = 128

    @property
    def is_static(self) -> bool:
        """Grids are those of the weights as given."""
        return self.static_groups or self.group_size == -1


@dataclass(frozen=True)
class GptqResult:
    """A quantized matrix, its loss ``tr((W - Q)(H + damp)(W - Q)^T)`` and the damping that was used."""

    quantized: QuantizedWeight
    loss: float
    damp: float


@torch.no_grad()
def gptq_quantize(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    bits: int,
    group_size: int = -1,
    sym: bool = False,
    act_order: bool = False,
    damp: float = 0.01,
    block_size: int = 128,
    static_groups: bool = False,
    clip: Literal["absmax", "mse"] = "absmax",
) -> GptqResult:
    """Quantize a matrix [out, in] given ``mean(x x^T)`` [in, in] of its inputs; float32 or float64.

    A group's grid follows from the weights as corrected up to its first column (`static_groups`: as
    given), with ``clip="mse"`` by the least loss of its own columns. Columns that no token ever reaches
    (``H_jj = 0``) become zeros. In a matrix of which a hundredth or more is zero, zeros stay zero. The result
    does not depend on `block_size`; the last group may be shorter.

    Raises:
        NumericalFailure: weights or Hessian are not finite, or the Hessian cannot be factorised.
    """
    if not bool(torch.isfinite(weight).all()):
        raise NumericalFailure("weights are NaN or infinite")
    factor = factorise(hessian.to(weight.dtype), damp=damp, act_order=act_order)
    rounding = Rounding(
        bits=bits,
        group_size=group_size,
        sym=sym,
        static_groups=static_groups,
        clip=clip,
        block_size=block_size,
    )
    return quantize_stack([weight], factor, rounding)[0]


@torch.no_grad()
def quantize_stack(weights: Sequence[torch.Tensor], factor: Factor, rounding: Rounding) -> list[GptqResult]:
    """Quantize finite matrices [out, in] that read the same input, each as if it were alone.

    Raises:
        NumericalFailure: the corrected weights became NaN or infinite.
    """
    width = len(factor.root) if rounding.group_size == -1 else rounding.group_size
    kept = [_kept(weight) for weight in weights]
    weights = [weight.detach().masked_fill(factor.dead, 0) for weight in weights]
    # Grids of the weights as given: the ones to use, or only the type and shape of what is stored.
    importance = None
    if rounding.clip == "mse" and rounding.is_static:
        importance = _importance(factor.root)
        if factor.order is not None:
            importance = importance[torch.argsort(factor.order)]
        importance = padded_to_groups(importance[None], width)[0]
    grids = [
        group_grid(
            padded_to_groups(weight, width),
            bits=rounding.bits,
            group_size=rounding.group_size,
            sym=rounding.sym,
            importance=importance,
        )
        for weight in weights
    ]
    results: list[GptqResult | None] = [None] * len(weights)
    # One stack, but where some matrices alone need scales of the larger range.
    for dtype in dict.fromkeys(grid.scale.dtype for grid in grids):
        members = [i for i, grid in enumerate(grids) if grid.scale.dtype == dtype]
        stack = _quantize(
            [weights[i] for i in members],
            [grids[i] for i in members],
            [kept[i] for i in members],
            factor,
            rounding,
        )
        for i, result in zip(members, stack, strict=True):
            results[i] = result
    return [result for result in results if result is not None]


def _kept(weight: torch.Tensor) -> torch.Tensor | None:
    """False where a pruned matrix [out, in] is zero; None for one that nobody pruned."""
    keep = weight.detach() != 0
    return keep if int(keep.sum()) <= (1 - _PRUNED) * keep.numel() else None


def _quantize(
    weights: list[torch.Tensor],
    grids: list[Grid],
    kept: list[torch.Tensor | None],
    factor: Factor,
    rounding: Rounding,
) -> list[GptqResult]:
    keep = None
    if any(each is not None for each in kept):
        keep = torch.cat(
            [
                torch.ones_like(weight, dtype=torch.bool) if each is None else each
                for weight, each in zip(weights, kept, strict=True)
            ]
        )
    scale, sizes = torch.cat([grid.scale for grid in grids]), [len(weight) for weight in weights]
    zero = None if rounding.sym else torch.cat([grid.zero for grid in grids if grid.zero is not None])
    codes, losses = _round_columns(torch.cat(weights), factor, rounding, scale, zero, keep)
    order = factor.order
    if order is not None and rounding.is_static:  # groups are those of the columns' own order
        codes, order = codes[:, torch.argsort(order)], None
    totals: list[float] = torch.stack([part.sum() for part in losses.split(sizes)]).tolist()
    if not all(map(math.isfinite, totals)):
        raise NumericalFailure("the corrected weights became NaN or infinite")
    bits, group_size, columns = rounding.bits, rounding.group_size, codes.shape[1]
    order = None if order is None else order.to(torch.int32)
    parts = zip(
        padded_to_groups(codes, group_size).split(sizes),
        scale.split(sizes),
        [None] * len(sizes) if zero is None else zero.split(sizes),
        totals,
        strict=True,
    )
    return [
        GptqResult(QuantizedWeight(*arrays, bits, group_size, columns, order), total, factor.damp)
        for *arrays, total in parts
    ]


def _importance(root: torch.Tensor) -> torch.Tensor:
    """What a squared rounding error in each column costs."""
    return root.diagonal() ** -2


def _round_columns(
    weight: torch.Tensor,
    factor: Factor,
    rounding: Rounding,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, in] in the order of rounding, and the loss of each row [out]; zeros where `keep` is False.

    Unless the groups are static, `scale` and `zero` [out, groups] are overwritten.
    """
    (out, columns), device, root = weight.shape, weight.device, factor.root
    width = columns if rounding.group_size == -1 else rounding.group_size
    places = torch.arange(columns, device=device)
    if factor.order is not None:
        weight = weight[:, factor.order]
        keep = None if keep is None else keep[:, factor.order]
        places = factor.order if rounding.is_static else places
    groups = (places // width).to(torch.int32)
    importance = _importance(root)
    codes = torch.empty(out, columns, dtype=torch.uint8, device=device)
    losses = weight.new_zeros(out)
    # A block never straddles the start of a group, so every correction has arrived by then.
    group_starts = () if rounding.is_static else range(0, columns, width)
    for start, end in pairwise(sorted({*range(0, columns, rounding.block_size), *group_starts, columns})):
        if not rounding.is_static and start % width == 0:
            values = weight[:, start : start + width]
            grid = group_grid(
                values if keep is None else values.where(keep[:, start : start + width], 0),
                bits=rounding.bits,
                sym=rounding.sym,
                scale_dtype=scale.dtype,
                importance=importance[start : start + width] if rounding.clip == "mse" else None,
                known_finite=True,
            )
            scale[:, start // width] = grid.scale[:, 0]
            if zero is not None and grid.zero is not None:
                zero[:, start // width] = grid.zero[:, 0]
        codes[:, start:end], errors = quantize_columns(
            weight[:, start:end],
            root[start:end, start:end],
            scale,
            zero,
            groups[start:end],
            rounding.bits,
            None if keep is None else keep[:, start:end],
        )
        losses += errors.square().sum(1)
        weight[:, end:].addmm_(errors, root[start:end, end:], alpha=-1)
    return codes, losses
