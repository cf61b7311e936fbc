"""What the weight-only Triton kernels share: words of codes, their fields as floats, scales, zero points.

A field becomes a float by setting the exponent bits of 2^23 above it: a field that sits at bit `p` of its
word then reads ``2^23 + q * 2^p``. Fields beyond the mantissa are read from the upper half of the word.
Three bits are two planes (`harness.nn.packing`). The high bit of field `i` of low word `j` is bit
``2 i + j // w`` of high word ``j % w``, where `w` is the number of high words of a tile: shifted by
``j // w``, a high word lies beside its low word, one bit for every two.

Where a field becomes an operand of a tensor core (`triton_fused`), the compiler keeps it in the layout of
an operand from its load on only if all that it is computed from was loaded or is constant. Indices are
neither. `numbers_ptr` then points to the integers from 0 to 255 and `EXPONENT`, and an integer made of
indices is looked up there; where it is None nothing is.

A table is read value by value, which the compiler gives a layout of its own, and every field would go
through shared memory into it. Kernels that look values up therefore load words one by one as well: `hide`
is 0, and ``c ^ hide`` are indices of which the compiler does not know that they follow one another.

Kinds of scale: 0 none, 1 one for a row of a group, 2 one for all, 3 int8 with steps and a mean. Kinds of
zero point: 0 the middle of the grid, 1 packed, 2 floating-point.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "EXPONENT",
    "field_product",
    "field_value",
    "load_scale",
    "load_words",
    "load_zero",
    "scaled_back",
    "stored_value",
    "table_value",
]

EXPONENT = 0x4B000000
"""The bits of the float 2^23. Kernels take it as an argument, so that it lives in a register: one
three-input operation takes a single literal, which the mask already is."""


@triton.jit
def load_scale(scales_ptr, steps_ptr, mean_ptr, group, n, mask, N, SCALES: tl.constexpr):
    """Scales float32 of rows n in `group`, which broadcasts against n; SCALES: their kind, not 0."""
    if SCALES == 1:
        scale = tl.load(scales_ptr + group * N + n, mask=mask, other=0.0).to(tl.float32)
    elif SCALES == 2:
        scale = tl.load(scales_ptr + group + n * 0, mask=mask, other=0.0).to(tl.float32)
    else:
        at = group * N + n
        code = tl.load(scales_ptr + at, mask=mask, other=0).to(tl.float32)
        step = tl.load(steps_ptr + at // 256, mask=mask, other=0.0)
        scale = tl.load(mean_ptr + n * 0) + step * code
    return scale


@triton.jit
def load_zero(
    zeros_ptr, numbers_ptr, group, n, mask, zero_bytes,
    BITS: tl.constexpr, ZEROS: tl.constexpr, PER_TENSOR: tl.constexpr,
):  # fmt: skip
    """Zero points float32 of rows n in `group`, which broadcasts against n; ZEROS: their kind."""
    at = n * 0 if PER_TENSOR else n
    if ZEROS == 0:
        zero = tl.zeros_like(group + at).to(tl.float32) + 2.0 ** (BITS - 1)
    elif ZEROS == 2:
        zero = tl.load(zeros_ptr + group * zero_bytes + at, mask=mask, other=0.0).to(tl.float32)
    else:
        if BITS == 3:
            low = tl.load(zeros_ptr + group * zero_bytes + at // 4, mask=mask, other=0).to(tl.int32)
            high_ptr = zeros_ptr + group * zero_bytes + zero_bytes // 3 * 2 + at // 8
            high = tl.load(high_ptr, mask=mask, other=0).to(tl.int32)
            code = ((low >> (at % 4 * 2)) & 3) | (((high >> (at % 8)) & 1) << 2)
        else:
            PER_BYTE: tl.constexpr = 8 // BITS
            raw = tl.load(zeros_ptr + group * zero_bytes + at // PER_BYTE, mask=mask, other=0)
            code = (raw.to(tl.int32) >> (at % PER_BYTE * BITS)) & (2**BITS - 1)
        if numbers_ptr is not None:
            code = tl.load(numbers_ptr + code)
        zero = code.to(tl.float32)
    return zero


@triton.jit
def load_words(
    codes_ptr, numbers_ptr, tile, c, n, n_mask, last, N,
    BITS: tl.constexpr, TILE: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Words int32 [rows, c] from `tile` on, c running over the (low) words of several tiles.

    Returns:
        words, and for 3 bits the high words beside them; else the words again.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    at = tile + c // WORDS
    rows = codes_ptr + (at[None, :] * N + n[:, None]) * ROW_WORDS
    inside = (c % WORDS)[None, :]
    mask = n_mask[:, None] & (at < last)[None, :]
    words = tl.load(rows + inside) if EVEN else tl.load(rows + inside, mask=mask, other=0)
    high = words
    if BITS == 3:
        HIGH_WORDS: tl.constexpr = TILE // 32
        if EVEN:
            high = tl.load(rows + (WORDS + inside % HIGH_WORDS))
        else:
            high = tl.load(rows + (WORDS + inside % HIGH_WORDS), mask=mask, other=0)
        beside = inside // HIGH_WORDS
        if numbers_ptr is not None:
            beside = tl.load(numbers_ptr + beside)
        high = high >> beside
    return words, high


@triton.jit
def _shifted(words, high, INDEX: tl.constexpr, BITS: tl.constexpr):
    """Words whose field INDEX lies inside a float's mantissa, and for 3 bits the high bits above it."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    UPPER: tl.constexpr = INDEX * WIDTH + BITS > 23
    source = words >> 16 if UPPER else words
    above = source
    if BITS == 3:
        above = high >> 14 if UPPER else high << 2
    return source, above


@triton.jit
def field_float(words, high, exponent, INDEX: tl.constexpr, BITS: tl.constexpr):
    """``2^23 + q * 2^p`` in float32 for field INDEX of words int32, where the field sits at bit `p`."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACE: tl.constexpr = INDEX * WIDTH - 16 if INDEX * WIDTH + BITS > 23 else INDEX * WIDTH
    source, above = _shifted(words, high, INDEX, BITS)
    field = (source & ((2**WIDTH - 1) << PLACE)) | exponent
    if BITS == 3:
        field = field | (above & (4 << PLACE))
    return field.to(tl.float32, bitcast=True)


@triton.jit
def scaled_back(x, INDEX: tl.constexpr, BITS: tl.constexpr):
    """x float32 divided by the power of two that field INDEX comes out of `field_float` multiplied by."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACE: tl.constexpr = INDEX * WIDTH - 16 if INDEX * WIDTH + BITS > 23 else INDEX * WIDTH
    return x * (0.5**PLACE)


@triton.jit
def field_product(words, high, exponent, x, INDEX: tl.constexpr, BITS: tl.constexpr):
    """``q * x`` in float32 for field INDEX of words [rows, c] and x float32 [c]."""
    f = field_float(words, high, exponent, INDEX, BITS)
    return (f - 8388608.0) * scaled_back(x, INDEX, BITS)[None, :]


@triton.jit
def field_value(words, high, exponent, zero, INDEX: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """``q - zero`` in float32 for field INDEX; exact where zero points are whole numbers (WHOLE)."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    PLACE: tl.constexpr = INDEX * WIDTH - 16 if INDEX * WIDTH + BITS > 23 else INDEX * WIDTH
    f = field_float(words, high, exponent, INDEX, BITS)
    if WHOLE:  # one operation, exact: its constant is a whole number below 2^24
        value = tl.fma(f, 0.5**PLACE, -8388608.0 * 0.5**PLACE - zero)
    else:
        value = tl.fma(f, 0.5**PLACE, -8388608.0 * 0.5**PLACE) - zero
    return value


@triton.jit
def table_value(table_ptr, words, high, INDEX: tl.constexpr, BITS: tl.constexpr):
    """``table[q]`` in float32 for field INDEX of words."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    code = (words >> (INDEX * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        code = code | (((high >> (INDEX * WIDTH)) & 1) << 2)
    return tl.load(table_ptr + code)


@triton.jit
def stored_value(table_ptr, codes_ptr, n, k, mask, N, BITS: tl.constexpr, TILE: tl.constexpr):
    """``table[q]`` in float32 of the weights in rows n and columns k."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    row = codes_ptr + (k // TILE * N + n) * (TILE * BITS // 32)
    inside = k % TILE
    word = tl.load(row + inside % WORDS, mask=mask, other=0)
    code = (word >> (inside // WORDS * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        word = tl.load(row + WORDS + inside % (TILE // 32), mask=mask, other=0)
        code = code | (((word >> (inside // (TILE // 32))) & 1) << 2)
    return tl.load(table_ptr + code, mask=mask, other=0.0)
