"""Triton kernels for int8 activations times int8 weights (W8A8).

`quantize_tokens` finds the scale of each row and rounds it in one launch; `quantize_to` rounds to a
scale that is known. `matmul` adds the products up exactly in int32 and applies both scales and the
bias before anything is written, so the int32 sums never reach memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.nn.quantizer import SMALLEST_SCALE

__all__ = ["matmul", "quantize_to", "quantize_tokens"]

# 1.5 * 2^23: adding and subtracting it rounds half to even. The kernels that use it are launched without
# fusing multiplication and addition, which would round the exact product and not the float32 one.
_ROUND = 12582912.0


@triton.jit
def _quantize_tokens_kernel(
    x_ptr, codes_ptr, scales_ptr, K, x_stride, rounder,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    peaks = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        k = start + offsets
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        # NaN must reach the scale: maximum() drops it unless told not to.
        peaks = tl.maximum(peaks, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    finite_peak = tl.max(peaks, 0)
    peak = tl.where(tl.sum((peaks != peaks).to(tl.int32), 0) > 0, float("nan"), finite_peak)
    scale = tl.div_rn(peak, 127.0)
    scale = tl.where(scale < SMALLEST, 1.0, scale)
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K, BLOCK):
        k = start + offsets
        x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
        q = (x * inverse + rounder) - rounder
        q = tl.minimum(tl.maximum(q, -127.0), 127.0)
        tl.store(codes_ptr + row * K + k, q.to(tl.int8), mask=k < K)


@triton.jit
def _quantize_to_kernel(
    x_ptr, codes_ptr, scale_ptr, K, x_stride, rounder, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    inverse = tl.div_rn(1.0, tl.load(scale_ptr))
    # Clipped before rounding: beyond 2^22 the sum below would not round to whole numbers.
    q = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    q = (q + rounder) - rounder
    tl.store(codes_ptr + row * K + k, q.to(tl.int8), mask=k < K)


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    # Programs walk in columns of GROUP row blocks, so that neighbours share weights in the cache.
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first_m = pid // (GROUP * blocks_n) * GROUP
    group_m = tl.minimum(blocks_m - first_m, GROUP)
    pid_m = first_m + pid % (GROUP * blocks_n) % group_m
    pid_n = pid % (GROUP * blocks_n) // group_m
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    # Rows beyond the end are read as row 0 again and never stored.
    a_rows = a_ptr + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K
    b_rows = b_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    for start in range(0, K, BLOCK_K):
        k = start + offsets
        if EVEN_K:
            a = tl.load(a_rows + k[None, :])
            b = tl.load(b_rows + k[:, None])
        else:
            a = tl.load(a_rows + k[None, :], mask=k[None, :] < K, other=0)
            b = tl.load(b_rows + k[:, None], mask=k[:, None] < K, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    m_mask, n_mask = m < M, n < N
    y = acc.to(tl.float32)
    if PER_TOKEN:
        y *= tl.load(a_scale_ptr + m, mask=m_mask, other=0.0)[:, None]
    else:
        y *= tl.load(a_scale_ptr)
    if PER_CHANNEL:
        y *= tl.load(b_scale_ptr + n, mask=n_mask, other=0.0)[None, :]
    else:
        y *= tl.load(b_scale_ptr)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
    pointers = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [rows, in] and float32 scales [rows, 1] of x [rows, in], one scale per row."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = min(4096, triton.next_power_of_2(columns))
    with torch.cuda.device_of(x):
        _quantize_tokens_kernel[(rows,)](
            x, codes, scales, columns, x.stride(0), _ROUND,
            SMALLEST=SMALLEST_SCALE, BLOCK=block, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


def quantize_to(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 codes [rows, in] of x [rows, in] on the grid of one float32 scale [1]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    block = min(4096, triton.next_power_of_2(columns))
    with torch.cuda.device_of(x):
        _quantize_to_kernel[(rows, triton.cdiv(columns, block))](
            x, codes, scale, columns, x.stride(0), _ROUND, BLOCK=block, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes


def matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(a @ b.T) * a_scale * b_scale + bias`` for int8 a [rows, in] and b [out, in], as `dtype`.

    Args:
        a_scale: float32 [rows, 1] or [1]. b_scale: float32 [out] or [1].
    """
    (rows, columns), out = a.shape, b.shape[0]
    block_m, block_n, block_k, warps, stages = _blocks(rows)
    y = torch.empty(rows, out, dtype=dtype, device=a.device)
    grid = (triton.cdiv(rows, block_m) * triton.cdiv(out, block_n),)
    with torch.cuda.device_of(a):
        _matmul_kernel[grid](
            a, b, a_scale, b_scale, b_scale if bias is None else bias, y, rows, out, columns,
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, PER_TOKEN=a_scale.ndim == 2,
            PER_CHANNEL=b_scale.numel() > 1, HAS_BIAS=bias is not None,
            EVEN_K=columns % block_k == 0, GROUP=8, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return y


def _blocks(rows: int) -> tuple[int, int, int, int, int]:
    """Rows, columns and depth of a program's tile, its warps, and the stages of its pipeline."""
    if rows <= 16:
        return 16, 32, 256, 4, 5
    if rows <= 64:
        return 64, 64, 128, 4, 4
    if rows <= 512:
        return 128, 128, 128, 8, 3
    return 128, 256, 128, 8, 3
