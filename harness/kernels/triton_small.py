"""Tensor-core kernel for some tens of rows whose operands both come from shared memory.

The form for float32 activations, which `harness.kernels.triton_fused` serves less well; integers on a grid
with whole zero points, 2, 4 and 8 bits.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton_fields import field_value, load_scale, load_words, load_zero

__all__ = ["weight_only_small_gemm_kernel"]


@triton.jit
def weight_only_small_gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr,
    M, N, tiles, chunks_per_split, x_stride, zero_bytes, tiles_per_group, exponent, hide,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_GROUP: tl.constexpr, SUMS: tl.constexpr, SCALES: tl.constexpr,
    ZEROS: tl.constexpr, TABLE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    tl.static_assert(not TABLE and BITS != 3)
    pid_m, pid_n, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    WORDS: tl.constexpr = TILE * BITS // 32
    c = tl.arange(0, CHUNK * WORDS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = pid_split * chunks_per_split * CHUNK
    last = tl.minimum(first + chunks_per_split * CHUNK, tiles)
    for tile in range(first, last, CHUNK):
        words, high = load_words(codes_ptr, None, tile, c, n, n_mask, last, N, BITS, TILE, EVEN)
        at = tile + c // WORDS
        if ONE_GROUP:
            group = tile // tiles_per_group
            scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, n_mask, N, SCALES)
            zero = load_zero(zeros_ptr, None, group, n, n_mask, zero_bytes, BITS, ZEROS, SCALES == 2)[:, None]
        else:
            groups, rows = (at // tiles_per_group)[None, :], n[:, None]
            mask = n_mask[:, None] & (at < last)[None, :]
            scale = load_scale(scales_ptr, steps_ptr, mean_ptr, groups, rows, mask, N, SCALES)
            zero = load_zero(zeros_ptr, None, groups, rows, mask, zero_bytes, BITS, ZEROS, SCALES == 2)
        if SUMS:
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        x_mask = m_mask[:, None] & (at < last)[None, :]
        x_pointers = x_ptr + m[:, None] * x_stride + (at * TILE + c % WORDS)[None, :]
        for i in tl.static_range(32 // BITS):
            x = tl.load(x_pointers + i * WORDS, mask=x_mask, other=0.0)
            w = field_value(words, high, exponent, zero, i, BITS, ZEROS != 2)
            if SUMS:  # whole numbers below 256 are exact in every type: scale the sum
                part = tl.dot(x, tl.trans(w.to(x.dtype)), part, input_precision="ieee")
            else:
                w = w * (scale[:, None] if ONE_GROUP else scale)
                acc = tl.dot(x, tl.trans(w.to(x.dtype)), acc, input_precision="ieee")
        if SUMS:
            acc += part * scale[None, :]
    out_mask = m_mask[:, None] & n_mask[None, :]
    if SPLIT:
        out_ptr += pid_split * M * N
        tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=out_mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        y = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m[:, None] * N + n[None, :], y, mask=out_mask)
