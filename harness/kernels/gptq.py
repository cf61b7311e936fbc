"""The choice of a kernel for the two loops of GPTQ: the columns of a block, and the clipped ranges."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.kernels import reference
from harness.kernels.weight_only import has_triton
from harness.nn.quantizer import Grid, least_error_grid

__all__ = ["MOST_COLUMNS", "choose", "quantize_columns", "search_grid"]

MOST_COLUMNS = 512
"""A program holds all columns of a block in registers."""


def choose(values: torch.Tensor, columns: int = 1) -> str:
    """The name of the kernel for values of this type and device and blocks of so many columns."""
    fits = values.dtype == torch.float32 and columns <= MOST_COLUMNS and has_triton(values.device)
    return "triton gptq" if fits else "torch"


def quantize_columns(
    block: torch.Tensor,
    root: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    groups: torch.Tensor,
    bits: int,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round the columns of a block one after the other; each error corrects the columns after it.

    Args:
        block: the weights [out, columns], float32 or float64; not changed.
        root: the same columns [columns, columns] of the upper triangular `inverse_root`.
        scale: [out, groups], in its storage type. zero: uint8 of the same shape, or None where symmetric.
        groups: int32 [columns], the group of each column.
        keep: bool [out, columns], False where a weight becomes zero whatever corrects it; None: nowhere. With
            it PyTorch does the work on every device.

    Returns:
        Codes, uint8 [out, columns], and errors [out, columns]: what each rounding changed, over ``root_jj``.
    """
    if keep is not None or choose(block, block.shape[1]) == "torch":
        return reference.quantize_columns(block, root, scale, zero, groups, bits, keep)
    from harness.kernels import triton_gptq

    return triton_gptq.quantize_columns(block, root, scale, zero, groups, bits)


def search_grid(
    values: torch.Tensor,
    importance: torch.Tensor,
    factors: Sequence[float],
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
) -> Grid:
    """`harness.nn.quantizer.least_error_grid` by the kernel that `choose` names."""
    if choose(values) == "torch" or values.ndim != 3:
        return least_error_grid(values, importance, factors, bits, sym, scale_dtype)
    from harness.kernels import triton_gptq

    return triton_gptq.search_grid(values, importance, tuple(factors), bits, sym, scale_dtype)
