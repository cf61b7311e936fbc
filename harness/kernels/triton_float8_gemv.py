# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernel for one row of float8 codes times float8 weights: as fast as memory delivers the weights.

Libraries multiply float8 on tensor cores in tiles of 16 rows and more; at one row their kernel takes longer
than the same product in 16 bits. Here a program holds some rows of the matrix, its threads read 16 bytes at
a time, codes become float32 exactly, and sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

__all__ = ["gemv"]

_ROWS, _COLUMNS, _WARPS = 4, 1024, 4  # of a program: its rows of the matrix, their columns at a time


@triton.jit
def _float8_gemv_kernel(
    x_ptr, scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, N, K,
    PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    n_mask = n < N
    # Rows beyond the end are read as row 0 again and never stored.
    w_rows = w_ptr + tl.where(n_mask, n, 0).to(tl.int64)[:, None] * K
    offsets = tl.arange(0, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for start in range(0, K, COLUMNS):
        k = start + offsets
        if EVEN:
            w = tl.load(w_rows + k[None, :], eviction_policy="evict_first")
            x = tl.load(x_ptr + k)
        else:
            w = tl.load(w_rows + k[None, :], mask=(k < K)[None, :], other=0.0, eviction_policy="evict_first")
            x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    y = tl.sum(acc, 1) * tl.load(scale_ptr)
    if PER_CHANNEL:
        y *= tl.load(w_scale_ptr + n, mask=n_mask, other=0.0)
    else:
        y *= tl.load(w_scale_ptr)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)


def gemv(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """One row of codes [1, in] times float8 [out, in], scaled: [1, out] in `dtype`.

    Args:
        scale: float32, one number. weight_scale: float32 [out] or [1].
        codes, weight: E4M3; `in` is a multiple of 16.
    """
    columns, out = codes.shape[1], weight.shape[0]
    y = torch.empty(1, out, dtype=dtype, device=codes.device)
    block = min(_COLUMNS, triton.next_power_of_2(columns))
    with torch.cuda.device_of(codes):
        _float8_gemv_kernel[(triton.cdiv(out, _ROWS),)](
            codes.contiguous(), scale, weight, weight_scale, weight_scale if bias is None else bias, y,
            out, columns, PER_CHANNEL=weight_scale.numel() > 1, HAS_BIAS=bias is not None, ROWS=_ROWS,
            COLUMNS=block, EVEN=columns % block == 0, num_warps=_WARPS, num_stages=1,
        )  # fmt: skip
    return y
