"""Writes a stored matrix in full precision, for a library product.

A program reads the words of some rows of a tile once and writes every field of theirs: the fields of
neighbouring words are neighbouring columns, so each is a store of whole sectors.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

from harness.kernels.triton_fields import field_value, load_scale, load_words, load_zero, table_value

__all__ = ["weight_only_dequantize_kernel"]


@triton.jit
def weight_only_dequantize_kernel(
    codes_ptr, scales_ptr, steps_ptr, mean_ptr, zeros_ptr, table_ptr, out_ptr,
    N, in_features, tiles, zero_bytes, tiles_per_group, exponent, hide,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_GROUP: tl.constexpr, SCALES: tl.constexpr, ZEROS: tl.constexpr, TABLE: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0) * CHUNK
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    c = tl.arange(0, CHUNK * WORDS)
    if TABLE:
        c = c ^ hide
    at = tile + c // WORDS
    words, high = load_words(codes_ptr, None, tile, c, n, n_mask, tiles, N, BITS, TILE, EVEN)
    if ONE_GROUP:
        group = tile // tiles_per_group
        if SCALES != 0:
            scale = load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, n_mask, N, SCALES)[:, None]
        if not TABLE:
            zero = load_zero(zeros_ptr, None, group, n, n_mask, zero_bytes, BITS, ZEROS, SCALES == 2)
            zero = zero[:, None]
    else:
        groups, rows = (at // tiles_per_group)[None, :], n[:, None]
        mask = n_mask[:, None] & (at < tiles)[None, :]
        scale = load_scale(scales_ptr, steps_ptr, mean_ptr, groups, rows, mask, N, SCALES)
        if not TABLE:
            zero = load_zero(zeros_ptr, None, groups, rows, mask, zero_bytes, BITS, ZEROS, SCALES == 2)
    k = (at * TILE + c % WORDS)[None, :]
    pointers = out_ptr + n.to(tl.int64)[:, None] * in_features + k
    for i in tl.static_range(32 // WIDTH):
        if TABLE:
            w = table_value(table_ptr, words, high, i, BITS)
        else:
            w = field_value(words, high, exponent, zero, i, BITS, ZEROS != 2)
        if SCALES != 0:
            w = w * scale
        w = w.to(out_ptr.dtype.element_ty)
        if EVEN:
            tl.store(pointers + i * WORDS, w)
        else:
            tl.store(pointers + i * WORDS, w, mask=n_mask[:, None] & (k + i * WORDS < in_features))
