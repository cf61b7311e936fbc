"""Tensor-core kernel for stored matrices and some rows of activations.

Computes ``y.T = W x.T``: the matrix is the first operand, which tensor cores take from registers. Field
`i` of the words of a block is a slice [rows of W, words] of the matrix, in the very layout of its words; so
words are brought into the layout of an operand once, and each of their fields is unpacked where it is and
multiplied with its own columns of x. No unpacked weight passes through shared memory.

The scale of a group is applied to its sum (SUMS) or to every weight. The first costs one multiply-add for
each output and 128 columns, the second one multiplication for each weight: few rows want the first.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton_fields import field_value, load_scale, load_words, load_zero, table_value

__all__ = ["weight_only_fused_gemm_kernel"]


@triton.jit
def weight_only_fused_gemm_kernel(
    x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr, numbers_ptr,
    M, N, tiles, chunks_per_split, x_stride, zero_bytes, tiles_per_group,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_GROUP: tl.constexpr, SUMS: tl.constexpr, SCALES: tl.constexpr,
    ZEROS: tl.constexpr, TABLE: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    # Programs that read the same weights follow one another.
    pid_m, pid_n, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    c = tl.arange(0, CHUNK * WORDS)
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    exponent = tl.load(numbers_ptr + 256 + n * 0)[:, None]
    first = pid_split * chunks_per_split * CHUNK
    last = tl.minimum(first + chunks_per_split * CHUNK, tiles)
    for tile in range(first, last, CHUNK):
        words, high = load_words(codes_ptr, numbers_ptr, tile, c, n, n_mask, last, N, BITS, TILE, EVEN)
        at = tile + c // WORDS
        if ONE_GROUP:
            group = tile // tiles_per_group
            if SCALES != 0:
                scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, n_mask, N, SCALES)[:, None]
            if not TABLE:
                zero = load_zero(
                    zeros_ptr, numbers_ptr, group, n, n_mask, zero_bytes, BITS, ZEROS, SCALES == 2
                )
                zero = zero[:, None]
        else:
            groups, rows = (at // tiles_per_group)[None, :], n[:, None]
            mask = n_mask[:, None] & (at < last)[None, :]
            scale = load_scale(scales_ptr, steps_ptr, mean_ptr, groups, rows, mask, N, SCALES)
            if not TABLE:
                zero = load_zero(
                    zeros_ptr, numbers_ptr, groups, rows, mask, zero_bytes, BITS, ZEROS, SCALES == 2
                )
        if SUMS:
            part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        x_pointers = x_ptr + (m * x_stride)[None, :] + (at * TILE + c % WORDS)[:, None]
        x_mask = m_mask[None, :] if EVEN else m_mask[None, :] & (at < last)[:, None]
        for i in tl.static_range(32 // WIDTH):
            x = tl.load(x_pointers + i * WORDS, mask=x_mask, other=0.0)  # [words, BLOCK_M]
            if TABLE:
                w = table_value(table_ptr, words, high, i, BITS)
            else:
                w = field_value(words, high, exponent, zero, i, BITS, ZEROS != 2)
            if SUMS:
                part = tl.dot(w.to(x.dtype), x, part, input_precision="ieee")
            else:
                if SCALES != 0:
                    w = w * scale
                acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
        if SUMS:
            acc += part * scale
    out_mask = n_mask[:, None] & m_mask[None, :]
    if SPLIT:
        out_ptr += pid_split * M * N
        tl.store(out_ptr + m[None, :] * N + n[:, None], acc, mask=out_mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[:, None]
        y = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m[None, :] * N + n[:, None], y, mask=out_mask)
