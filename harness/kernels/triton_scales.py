# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernel that applies scales of rows and of columns to sums, and reads and writes each value once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["apply_scales"]

_BLOCK, _WARPS = 2048, 8


@triton.jit
def _scales_kernel(
    sums_ptr, row_ptr, column_ptr, bias_ptr, out_ptr, N, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = n < N
    place = row.to(tl.int64) * N + n
    y = tl.load(sums_ptr + place, mask=inside, other=0.0).to(tl.float32) * tl.load(row_ptr + row)
    y *= tl.load(column_ptr + n, mask=inside, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, y.to(out_ptr.dtype.element_ty), mask=inside)


def apply_scales(
    sums: torch.Tensor,
    rows: torch.Tensor,
    columns: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """As `harness.kernels.semi_structured.apply_scales`, in one launch with the bits of plain torch."""
    count, out = sums.shape
    y = torch.empty(count, out, dtype=dtype, device=sums.device)
    with torch.cuda.device_of(sums):
        _scales_kernel[(count, triton.cdiv(out, _BLOCK))](
            sums.contiguous(), rows.contiguous(), columns.contiguous(), columns if bias is None else bias, y,
            out, HAS_BIAS=bias is not None, BLOCK=_BLOCK, num_warps=_WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return y
