# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernels for int8 activations times packed weights of 2 to 8 bits (W4A8 and the like).

Weights lie in tiles as `harness.nn.packing` stores them: field `i` of word `j` is column
``i * words + j`` of the tile. All sums are exact in int32, whatever order they are added in.

- *gemv* (one row): four fields of a word at a time become the bytes of another word by one shift and one
  mask; they are multiplied with the four activations that belong to them by one instruction. Zero points
  are applied to the sum: ``sum a (q - z) = sum a q - z sum a``.
- *small*: the fields of the words of several tiles are 32 columns of a tile of int8 for tensor cores. Up to 4
  bits the zero point is taken off the field, which int8 holds; of 8 bits it is applied to the sum.
- *unpack* writes the int8 matrix, for many rows: a program that multiplies many rows would unpack the same
  weights once for each block of them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernels.int8_launches import Launch
from harness.kernels.triton_int8_gemv import dot4, has_dp4a
from harness.nn.packing import PackedWeight

__all__ = ["gemv", "small", "unpack"]

_WORDS = 32  # words of a row that a program of `small` reads at a time: the depth of a tensor-core product


@triton.jit
def zero_points(
    zeros_ptr, group, n, mask, zero_bytes, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr
):  # `group` broadcasts against n
    """Whole numbers, int32; without stored ones the middle of the grid."""
    if not HAS_ZEROS:
        zero = tl.zeros_like(group + n) + 2 ** (BITS - 1)
    elif BITS == 3:
        low = tl.load(zeros_ptr + group * zero_bytes + n // 4, mask=mask, other=0).to(tl.int32)
        high_ptr = zeros_ptr + group * zero_bytes + zero_bytes // 3 * 2 + n // 8
        high = tl.load(high_ptr, mask=mask, other=0).to(tl.int32)
        zero = ((low >> (n % 4 * 2)) & 3) | (((high >> (n % 8)) & 1) << 2)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        raw = tl.load(zeros_ptr + group * zero_bytes + n // PER_BYTE, mask=mask, other=0)
        zero = (raw.to(tl.int32) >> (n % PER_BYTE * BITS)) & (2**BITS - 1)
    return zero


@triton.jit
def _scaled_rows(
    acc, scale, n, n_mask, w_scale_ptr, bias_ptr, rows_per_scale, HAS_BIAS: tl.constexpr
):  # fmt: skip
    w_scale = tl.load(w_scale_ptr + n // rows_per_scale, mask=n_mask, other=0.0).to(tl.float32)
    y = acc.to(tl.float32) * scale * w_scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def _gemv_plane(
    a_ptr, codes_ptr, n, acc, total, tiles, N, K,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Add one plane's products to acc [BLOCK_N, STEP] and the activations to total [STEP]."""
    PER_BYTE: tl.constexpr = 8 // WIDTH
    # The lowest field of each of four bytes.
    MASK: tl.constexpr = (2**WIDTH - 1) * 0x01010101
    c, byte = tl.arange(0, STEP), tl.arange(0, 4)[None, :]
    for first in range(0, tiles, STEP // WORDS):
        at = first + c // WORDS
        pointers = codes_ptr + (at[None, :].to(tl.int64) * N + n[:, None]) * ROW_WORDS + (c % WORDS)[None, :]
        w = tl.load(pointers, mask=(at < tiles)[None, :], other=0, eviction_policy="evict_first")
        for s in tl.static_range(PER_BYTE):
            # Of 8 bits, 0..255 become -128..127: -2139062144 is 0x80808080.
            fields = w ^ -2139062144 if WIDTH == 8 else ((w >> (s * WIDTH)) & MASK) << SHIFT
            k = (at * TILE + c % WORDS + s * WORDS)[:, None] + byte * (PER_BYTE * WORDS)
            a = tl.load(a_ptr + k, mask=(k < K) & (at < tiles)[:, None], other=0).to(tl.int32)
            q = tl.sum((a & 255) << (8 * byte), 1)
            acc = dot4(fields, tl.broadcast_to(q[None, :], (BLOCK_N, STEP)), acc, DP4A)
            total += tl.sum(a, 1)
    return acc, total


@triton.jit
def _gemv_kernel(
    a_ptr, a_scale_ptr, codes_ptr, w_scale_ptr, zeros_ptr, bias_ptr, out_ptr,
    N, K, tiles, zero_bytes, rows_per_scale,
    BITS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    # Rows beyond the end are read as row 0 again and never stored.
    row = tl.where(n_mask, n, 0)
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS  # of the first plane
    WORDS: tl.constexpr = TILE * WIDTH // 32
    acc = tl.zeros((BLOCK_N, STEP), dtype=tl.int32)
    total = tl.zeros((STEP,), dtype=tl.int32)
    acc, total = _gemv_plane(
        a_ptr, codes_ptr, row, acc, total, tiles, N, K, 0, WIDTH, WORDS, ROW_WORDS, TILE, STEP, BLOCK_N, DP4A
    )
    token = tl.sum(total, 0)
    if BITS == 3:  # the second plane weighs 4
        acc, total = _gemv_plane(
            a_ptr, codes_ptr + WORDS, row, acc, total, tiles, N, K,
            2, 1, TILE // 32, ROW_WORDS, TILE, STEP, BLOCK_N, DP4A,
        )  # fmt: skip
    zero = zero_points(zeros_ptr, 0, n, n_mask, zero_bytes, BITS, HAS_ZEROS)
    if BITS == 8:
        zero -= 128
    sums = tl.sum(acc, 1) - zero * token
    scale = tl.load(a_scale_ptr)
    y = _scaled_rows(sums, scale, n, n_mask, w_scale_ptr, bias_ptr, rows_per_scale, HAS_BIAS)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _small_plane(
    a_ptr, codes_ptr, m, n, m_mask, acc, total, zero, tiles, N, K,
    SHIFT: tl.constexpr, WIDTH: tl.constexpr, WORDS: tl.constexpr, ROW_WORDS: tl.constexpr,
    TILE: tl.constexpr, STEP: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """Add one plane's products to acc [rows, out]; with SUMS, the activations to total [rows]."""
    c = tl.arange(0, STEP)
    for first in range(0, tiles, STEP // WORDS):
        at = first + c // WORDS
        pointers = codes_ptr + (at[None, :].to(tl.int64) * N + n[:, None]) * ROW_WORDS + (c % WORDS)[None, :]
        w = tl.load(pointers, mask=(at < tiles)[None, :], other=0)
        for i in tl.static_range(32 // WIDTH):
            k = at * TILE + c % WORDS + i * WORDS
            mask = m_mask[:, None] & ((k < K) & (at < tiles))[None, :]
            a = tl.load(a_ptr + m.to(tl.int64)[:, None] * K + k[None, :], mask=mask, other=0)
            field = (((w >> (i * WIDTH)) & (2**WIDTH - 1)) << SHIFT) - zero
            acc = tl.dot(a, tl.trans(field.to(tl.int8)), acc, out_dtype=tl.int32)
            if SUMS:
                total += tl.sum(a.to(tl.int32), 1)
    return acc, total


@triton.jit
def _small_kernel(
    a_ptr, a_scale_ptr, codes_ptr, w_scale_ptr, zeros_ptr, bias_ptr, out_ptr,
    M, N, K, tiles, zero_bytes, rows_per_scale,
    BITS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PER_TOKEN: tl.constexpr, HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    row = tl.where(n_mask, n, 0)
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    zero = zero_points(zeros_ptr, 0, n, n_mask, zero_bytes, BITS, HAS_ZEROS)
    # Of 8 bits a code less its zero point is no int8: 128 is taken off both, the rest off the sum.
    taken = zero * 0 + 128 if BITS == 8 else zero
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    total = tl.zeros((BLOCK_M,), dtype=tl.int32)
    acc, total = _small_plane(
        a_ptr, codes_ptr, m, row, m_mask, acc, total, taken[:, None], tiles, N, K,
        0, WIDTH, WORDS, ROW_WORDS, TILE, STEP, BITS == 8,
    )  # fmt: skip
    if BITS == 3:
        acc, total = _small_plane(
            a_ptr, codes_ptr + WORDS, m, row, m_mask, acc, total, 0, tiles, N, K,
            2, 1, TILE // 32, ROW_WORDS, TILE, STEP, False,
        )  # fmt: skip
    if BITS == 8:
        acc -= total[:, None] * (zero - 128)[None, :]
    at = m[:, None] if PER_TOKEN else m[:, None] * 0
    scale = tl.load(a_scale_ptr + at, mask=m_mask[:, None], other=0.0)
    y = _scaled_rows(acc, scale, n[None, :], n_mask[None, :], w_scale_ptr, bias_ptr, rows_per_scale, HAS_BIAS)
    pointers = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=m_mask[:, None] & n_mask[None, :])


@triton.jit
def _unpack_kernel(
    codes_ptr, zeros_ptr, out_ptr, N, K, zero_bytes,
    BITS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    k = (tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K))[None, :]
    mask = (n < N) & (k < K)
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    row_ptr = codes_ptr + ((k // TILE).to(tl.int64) * N + n) * ROW_WORDS
    inside = k % TILE
    words = tl.load(row_ptr + inside % WORDS, mask=mask, other=0)
    codes = (words >> (inside // WORDS * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        WORDS_1: tl.constexpr = TILE // 32
        words = tl.load(row_ptr + WORDS + inside % WORDS_1, mask=mask, other=0)
        codes |= ((words >> (inside // WORDS_1)) & 1) << 2
    if BITS == 8:
        codes -= 128
    else:
        codes -= zero_points(zeros_ptr, 0, n, n < N, zero_bytes, BITS, HAS_ZEROS)
    tl.store(out_ptr + n.to(tl.int64) * K + k, codes.to(tl.int8), mask=mask)


def gemv(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    launch: Launch,
) -> torch.Tensor:
    """The scaled product [1, out] of int8 codes [1, in] with a packed weight of one scale per row."""
    y = torch.empty(1, weight.out_features, dtype=dtype, device=codes.device)
    width = 2 if weight.bits == 3 else weight.bits
    step = min(launch.k * width // 32, triton.next_power_of_2(weight.columns) * width // 32)
    step = max(step, weight.tile * width // 32)
    with torch.cuda.device_of(codes):
        _gemv_kernel[(triton.cdiv(weight.out_features, launch.n),)](
            codes.contiguous(), scale, *_operands(weight, bias), y,
            weight.out_features, weight.in_features, weight.codes.shape[0], *_sizes(weight),
            BITS=weight.bits, TILE=weight.tile, STEP=step, BLOCK_N=launch.n,
            HAS_ZEROS=weight.zeros is not None, HAS_BIAS=bias is not None, DP4A=has_dp4a(codes.device),
            num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def small(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    launch: Launch,
) -> torch.Tensor:
    """The scaled product [rows, out] of int8 codes [rows, in] with a packed weight of one scale per row.

    Args:
        scale: float32 [rows, 1] or [1].
    """
    rows = codes.shape[0]
    y = torch.empty(rows, weight.out_features, dtype=dtype, device=codes.device)
    with torch.cuda.device_of(codes):
        _small_kernel[(triton.cdiv(weight.out_features, launch.n), triton.cdiv(rows, launch.m))](
            codes.contiguous(), scale, *_operands(weight, bias), y,
            rows, weight.out_features, weight.in_features, weight.codes.shape[0], *_sizes(weight),
            BITS=weight.bits, TILE=weight.tile, STEP=_WORDS, BLOCK_M=launch.m, BLOCK_N=launch.n,
            PER_TOKEN=scale.ndim == 2, HAS_ZEROS=weight.zeros is not None, HAS_BIAS=bias is not None,
            num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def unpack(weight: PackedWeight) -> torch.Tensor:
    """int8 [out, in]: the codes less their zero points; of 8 bits, less 128."""
    out, columns = weight.out_features, weight.in_features
    matrix = torch.empty(out, columns, dtype=torch.int8, device=weight.codes.device)
    words, _, zeros, _ = _operands(weight, None)
    with torch.cuda.device_of(matrix):
        _unpack_kernel[(triton.cdiv(columns, 128), triton.cdiv(out, 32))](
            words, zeros, matrix, out, columns, zeros.shape[1], BITS=weight.bits, TILE=weight.tile,
            BLOCK_N=32, BLOCK_K=128, HAS_ZEROS=weight.zeros is not None, num_warps=4,
        )  # fmt: skip
    return matrix


def _operands(weight: PackedWeight, bias: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
    zeros = weight.scales if weight.zeros is None else weight.zeros
    return weight.codes.view(torch.int32), weight.scales, zeros, weight.scales if bias is None else bias


def _sizes(weight: PackedWeight) -> tuple[int, int]:
    """Bytes of a row of zero points, and rows that share a scale."""
    zeros = weight.scales if weight.zeros is None else weight.zeros
    return zeros.shape[1], weight.out_features // weight.scales.shape[1]
