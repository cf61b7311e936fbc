"""Matrix-vector kernel for stored matrices: every row of activations by itself, everything in float32.

A field at bit `p` of its word comes out of the exponent trick (`triton_fields`) multiplied by ``2^p``,
which is undone on the activation: one logical operation, one addition and one multiply-add a weight. The
zero point is applied to the sum: ``sum (q - z) x = sum q x - z sum x``. The values of a table are looked up
instead, where they stay in the first-level cache.

Outliers are weights that are not what their code says. They are sorted by row, so a program finds those
of its rows by halving, all rows at once, and adds what they differ by, one outlier of every row at a time.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton_fields import (
    field_product,
    load_scale,
    load_words,
    load_zero,
    stored_value,
    table_value,
)

__all__ = ["weight_only_gemv_kernel"]


@triton.jit
def _first_outlier(index_ptr, outliers, least, STEPS: tl.constexpr):
    """How many of the ascending indices are below `least`, for each of its elements."""
    low = tl.zeros_like(least)
    high = low + outliers
    for _ in range(STEPS):
        middle = (low + high) // 2
        is_open = low < high
        is_below = tl.load(index_ptr + middle, mask=is_open, other=0) < least
        low = tl.where(is_open & is_below, middle + 1, low)
        high = tl.where(is_open & (is_below == 0), middle, high)
    return low


@triton.jit
def _outlier_sums(
    x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, table_ptr, index_ptr,
    values_ptr, outliers, in_features, n, n_mask, N, tiles_per_group,
    BITS: tl.constexpr, TILE: tl.constexpr, SCALES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """What outliers add to rows n of the product, beyond what their codes do: float32, as n."""
    at = _first_outlier(index_ptr, outliers, n * in_features, STEPS)
    end = _first_outlier(index_ptr, outliers, (n + 1) * in_features, STEPS)
    sums = tl.zeros(n.shape, dtype=tl.float32)
    for _ in range(tl.max(tl.where(n_mask, end - at, 0), 0)):
        mask = (at < end) & n_mask
        k = tl.load(index_ptr + at, mask=mask, other=0) - n * in_features
        value = tl.load(values_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + k, mask=mask, other=0.0).to(tl.float32)
        stored = stored_value(table_ptr, codes_ptr, n, k, mask, N, BITS, TILE)
        if SCALES != 0:
            group = k // (TILE * tiles_per_group)
            stored *= load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, mask, N, SCALES)
        sums += tl.where(mask, (value - stored) * x, 0.0)
        at += 1
    return sums


@triton.jit
def weight_only_gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, zeros_ptr, table_ptr, bias_ptr, out_ptr,
    outlier_index_ptr, outlier_values_ptr, outliers, in_features,
    M, N, tiles, chunks_per_split, x_stride, zero_bytes, tiles_per_group, exponent, hide,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_GROUP: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr, SEARCH_STEPS: tl.constexpr,
):  # fmt: skip
    row, pid_n, pid_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    c = tl.arange(0, CHUNK * WORDS)
    if TABLE:
        c = c ^ hide
    acc = tl.zeros((BLOCK_N, CHUNK * WORDS), dtype=tl.float32)
    x_ptr += row * x_stride
    first = pid_split * chunks_per_split * CHUNK
    last = tl.minimum(first + chunks_per_split * CHUNK, tiles)
    # Loads run one step ahead: while a step computes, the next one's words are on their way.
    words, high = load_words(codes_ptr, None, first, c, n, n_mask, last, N, BITS, TILE, EVEN)
    if ONE_GROUP:
        group = first // tiles_per_group
        if SCALES != 0:
            scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, n_mask, N, SCALES)
        if not TABLE:
            zero = load_zero(zeros_ptr, None, group, n, n_mask, zero_bytes, BITS, ZEROS, SCALES == 2)
    for tile in range(first, last, CHUNK):
        ahead = tl.where(tile + CHUNK < last, tile + CHUNK, tile)
        next_words, next_high = load_words(codes_ptr, None, ahead, c, n, n_mask, last, N, BITS, TILE, EVEN)
        at = tile + c // WORDS
        k = at * TILE + c % WORDS
        sums = tl.zeros((BLOCK_N, CHUNK * WORDS), dtype=tl.float32)
        total = tl.zeros((CHUNK * WORDS,), dtype=tl.float32)
        for i in tl.static_range(32 // WIDTH):
            if EVEN:
                x = tl.load(x_ptr + k + i * WORDS).to(tl.float32)
            else:
                x = tl.load(x_ptr + k + i * WORDS, mask=at < last, other=0.0).to(tl.float32)
            if TABLE:
                sums += table_value(table_ptr, words, high, i, BITS) * x[None, :]
            else:
                sums += field_product(words, high, exponent, x, i, BITS)
                total += x
        if ONE_GROUP:
            if not TABLE:
                sums -= zero[:, None] * total[None, :]
            if SCALES != 0:
                acc += scale[:, None] * sums
            else:
                acc += sums
            group = ahead // tiles_per_group
            if SCALES != 0:
                scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, n_mask, N, SCALES)
            if not TABLE:
                zero = load_zero(zeros_ptr, None, group, n, n_mask, zero_bytes, BITS, ZEROS, SCALES == 2)
        else:
            groups = (at // tiles_per_group)[None, :]
            rows = n[:, None]
            mask = n_mask[:, None] & (at < last)[None, :]
            if not TABLE:
                zeros = load_zero(zeros_ptr, None, groups, rows, mask, zero_bytes, BITS, ZEROS, SCALES == 2)
                sums -= zeros * total[None, :]
            scales = load_scale(scales_ptr, steps_ptr, mean_ptr, groups, rows, mask, N, SCALES)
            acc += scales * sums
        words, high = next_words, next_high
    y = tl.sum(acc, 1)
    if SEARCH_STEPS > 0 and pid_split == 0:
        y += _outlier_sums(
            x_ptr, codes_ptr, scales_ptr, steps_ptr, mean_ptr, table_ptr, outlier_index_ptr,
            outlier_values_ptr, outliers, in_features, n, n_mask, N, tiles_per_group,
            BITS, TILE, SCALES, SEARCH_STEPS,
        )  # fmt: skip
    if SPLIT:
        tl.store(out_ptr + (pid_split * M + row) * N + n, y, mask=n_mask)
    else:
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)
