"""The choice of a kernel for int8 products with outlier columns in floating point."""

from __future__ import annotations

import torch

from harness.kernels.constants import constant_when_compiled
from harness.kernels.weight_only import has_triton

__all__ = ["MOST_COLUMNS", "MOST_OUTLIERS", "fits", "linear"]

MOST_OUTLIERS = 128
"""Outlier columns of one call that the kernels take; with room for more, plain torch runs."""
MOST_COLUMNS = 16384
"""Input columns that one program can look through."""

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@constant_when_compiled
def fits(device: torch.device, dtype: torch.dtype, columns: int, capacity: int) -> bool:
    """Whether the kernels take inputs of this type with so many columns and outliers."""
    return (
        has_triton(device)
        and dtype in _FLOATS
        and columns <= MOST_COLUMNS
        and min(capacity, columns) <= MOST_OUTLIERS
    )


@torch.library.custom_op("harness::outlier_int8_linear", mutates_args=("counters",))
def _operator(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    capacity: int,
    kept: torch.Tensor | None,
    place: torch.Tensor | None,
    kept_only: bool,
    counters: torch.Tensor,
) -> torch.Tensor:
    from harness.kernels import triton_outlier_int8

    return triton_outlier_int8.linear(
        x, weight, weight_scale, bias, threshold, capacity, kept, place, kept_only, counters
    )


@_operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    capacity: int,
    kept: torch.Tensor | None,
    place: torch.Tensor | None,
    kept_only: bool,
    counters: torch.Tensor,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    threshold: float,
    capacity: int,
    kept: torch.Tensor | None,
    place: torch.Tensor | None,
    kept_only: bool,
    counters: torch.Tensor,
) -> torch.Tensor:
    """x [rows, in] times int8 [out, in], columns of x with a value of at least `threshold` in x's type.

    One operator, ``torch.ops.harness.outlier_int8_linear``; only where `fits`.

    Args:
        weight_scale: float32 [out] or [1].
        capacity: columns to take out at most: the largest, of equal ones the first.
        kept, place: columns of the weight that are kept in 16 bits, [kept, out], and which of them a column
            is, int32 [in], negative for none; other columns come from the codes.
        kept_only: columns that are kept are outliers whatever they hold.
        counters: int64 [3], to which the columns, the outliers and those beyond the capacity are added.
    """
    y: torch.Tensor = _operator(
        x, weight, weight_scale, bias, threshold, capacity, kept, place, kept_only, counters
    )
    return y
