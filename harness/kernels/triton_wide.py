"""Matrix-vector kernel for stored matrices whose programs hold whole stretches of few rows.

Where `triton_gemv` gives a program many rows and one tile at a time, and so splits the columns between
programs and adds up in a second launch, here the threads of a program lie along the columns: one step takes
many tiles of a few rows, all of its loads are on their way at once, every value of x that a thread holds is
used for all rows, and nothing is added up twice.

The arithmetic is that of `triton_gemv`: everything in float32, the zero point applied to sums.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton_fields import field_float, load_scale, load_zero, scaled_back

__all__ = ["weight_only_wide_kernel"]


@triton.jit
def weight_only_wide_kernel(
    x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr,
    M, N, tiles, x_stride, zero_bytes, tiles_per_group, exponent,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALES: tl.constexpr, ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    row, pid_n = tl.program_id(0), tl.program_id(1)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    HIGH_WORDS: tl.constexpr = TILE // 32
    c = tl.arange(0, CHUNK)
    j = tl.arange(0, WORDS)
    x_ptr += row * x_stride
    acc = tl.zeros((CHUNK, BLOCK_N, WORDS), dtype=tl.float32)
    rows = n[None, :]
    for first in range(0, tiles, CHUNK):
        at = first + c
        inside = at < tiles
        starts = codes_ptr + (at[:, None] * N + rows)[:, :, None] * ROW_WORDS
        mask = inside[:, None] & n_mask[None, :]
        if EVEN:
            words = tl.load(starts + j[None, None, :])
        else:
            words = tl.load(starts + j[None, None, :], mask=mask[:, :, None], other=0)
        high = words
        if BITS == 3:
            high_at = starts + WORDS + (j % HIGH_WORDS)[None, None, :]
            high = tl.load(high_at, mask=mask[:, :, None], other=0) >> (j // HIGH_WORDS)[None, None, :]
        group = (at // tiles_per_group)[:, None]
        scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, rows, mask, N, SCALES)
        zero = load_zero(zeros_ptr, None, group, rows, mask, zero_bytes, BITS, ZEROS, SCALES == 2)
        k = at[:, None] * TILE + j[None, :]
        sums = tl.zeros((CHUNK, BLOCK_N, WORDS), dtype=tl.float32)
        total = tl.zeros((CHUNK, WORDS), dtype=tl.float32)
        for i in tl.static_range(32 // WIDTH):
            x = tl.load(x_ptr + k + i * WORDS, mask=inside[:, None], other=0.0).to(tl.float32)
            total += x
            f = field_float(words, high, exponent, i, BITS)
            sums += (f - 8388608.0) * scaled_back(x, i, BITS)[:, None, :]
        sums -= zero[:, :, None] * total[:, None, :]
        acc += scale[:, :, None] * sums
    y = tl.sum(tl.sum(acc, 2), 0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)
