"""What the kernels on tensor cores with layouts written out have in common: tiles of stored words, and the
pairs of fields in them as an operand.

See `harness.kernels.gluon_vector` for how fields become numbers without moving.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,var-annotated"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

__all__ = [
    "BFLOAT16_BASE",
    "FLOAT16_BASE",
    "add_halves",
    "fields_of",
    "first_operand_of",
    "halves_of",
    "in_rows",
    "load_tiles",
    "offsets_of",
    "pick_fields",
    "powers",
    "scales_of",
    "words_layout_of",
    "zeros_of",
]

BFLOAT16_BASE = 0x43004300
"""128 in bfloat16, twice: the number on top of which fields are set. The kernel takes it as an argument, so
that it lives in a register: one three-input operation takes a single literal, which the mask already is."""
FLOAT16_BASE = 0x64006400
"""1024 in float16, twice."""


@gluon.constexpr_function
def powers(count):
    """1, 2, 4 ... below `count`, a power of two."""
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def words_layout_of(warps, pairs, words):
    """Words [warps, pairs of rows, words] of even or of odd rows: what a thread has of them in a first
    operand whose rows 0 to 7 are the even ones and 8 to 15 the odd ones."""
    quarter = words // 4
    registers = [[0, 0, i] for i in powers(quarter)] + [[0, 8 * i, 0] for i in powers(pairs // 8)]
    lanes = [[0, 0, quarter], [0, 0, 2 * quarter], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0, 0] for i in powers(warps)], [], [warps, pairs, words]
    )


@gluon.constexpr_function
def pick_fields(field):
    """Both fields of a word that is shifted to them, on top of what there is: ``(word & fields) | there``."""
    return f"lop3.b32 $0, $1, {field * 0x10001}, $2, 0xEA;"


@gluon.constexpr_function
def add_halves(is_bfloat16):
    """Halves plus halves, exact for whole numbers this small. bfloat16 before compute capability 9.0 only has
    the fused form: ``1 * a + b``."""
    if is_bfloat16:
        return "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }"
    return "add.rn.f16x2 $0, $1, $2;"


@gluon.jit
def halves_of(pairs):
    """Lower and upper halves of int32 [..., n] as int16 [..., n, 2]; nothing moves."""
    return gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16))


@gluon.jit
def first_operand_of(even, odd):
    """Even and odd rows [warps, pairs, columns] as the rows of a first operand; nothing moves."""
    warps: gl.constexpr = even.shape[0]
    pairs: gl.constexpr = even.shape[1]
    columns: gl.constexpr = even.shape[2]
    both = gl.join(even, odd).reshape([warps, pairs // 8, 8, columns, 2])
    return both.permute([0, 1, 4, 2, 3]).reshape([warps, 2 * pairs, columns])


@gluon.jit
def in_rows(even, odd):
    """Numbers of even and odd rows [warps, pairs] in the order of `first_operand_of`."""
    warps: gl.constexpr = even.shape[0]
    pairs: gl.constexpr = even.shape[1]
    both = gl.join(even, odd).reshape([warps, pairs // 8, 8, 2])
    return both.permute([0, 1, 3, 2]).reshape([warps, 2 * pairs])


@gluon.jit
def load_tiles(
    codes, scales, zeros, offsets, first, warp, n, tiles, N, zero_bytes, tiles_per_group,
    ROW_WORDS: gl.constexpr, BITS: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
    EVEN: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    """A tile for each warp, `first` and those after it: words of even and odd rows, scales and (packed) zero
    points; nothing beyond the last tile. An address is a number that all threads share and an offset that
    stays, which leaves little to compute."""
    words_at, high_at, line_at, zeros_at, zeros_high_at = offsets
    inside = first + warp < tiles
    rows = inside[:, None]
    rows_odd = rows
    if not EVEN:
        rows, rows_odd = rows & (n < N)[None, :], rows & (n + 1 < N)[None, :]
    start = codes + first * (N * ROW_WORDS)
    even = gl.load(start + words_at, mask=rows[:, :, None], other=0)
    odd = gl.load(start + words_at + ROW_WORDS, mask=rows_odd[:, :, None], other=0)
    even_high, odd_high = even, odd
    if BITS == 3:
        even_high = gl.load(start + high_at, mask=rows[:, :, None], other=0)
        odd_high = gl.load(start + high_at + ROW_WORDS, mask=rows_odd[:, :, None], other=0)
    if EACH:  # each tile is a group
        line, zeros_line = scales + first * N, zeros + first * zero_bytes
    else:
        group = (first + warp) // tiles_per_group
        line, zeros_line = scales, zeros
        line_at += (group * N)[:, None]
        if ZEROS != 0:
            zeros_at += (group * zero_bytes)[:, None]
            zeros_high_at += (group * zero_bytes)[:, None]
    if SCALES == 2:
        one = gl.load(scales + (first + warp) // tiles_per_group, mask=inside, other=0.0)
        scale = one[:, None].broadcast_to([warp.shape[0], n.shape[0]])
        scale_odd = scale
    elif EVEN and scales.dtype.element_ty.primitive_bitwidth == 16:  # the two lie together
        both = (line + line_at).to(gl.pointer_type(gl.int32), bitcast=True)
        scale = gl.load(both, mask=rows, other=0)
        scale_odd = scale
    else:
        scale = gl.load(line + line_at, mask=rows, other=0.0)
        scale_odd = gl.load(line + line_at + 1, mask=rows_odd, other=0.0)
    zero = 0
    if ZEROS != 0:
        zero = gl.load(zeros_line + zeros_at, mask=rows, other=0).to(gl.int32)
        if BITS == 3:
            zero |= gl.load(zeros_line + zeros_high_at, mask=rows, other=0).to(gl.int32) << 8
    return even, odd, even_high, odd_high, scale, scale_odd, zero


@gluon.jit
def offsets_of(
    n, warp, word, N, zero_bytes,
    WORDS: gl.constexpr, ROW_WORDS: gl.constexpr, BITS: gl.constexpr, SCALES: gl.constexpr,
    EACH: gl.constexpr,
):  # fmt: skip
    """Where the first tiles of the warps have their words, scales and zero points, for the even rows `n`."""
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    row = (warp * N)[:, None] + n[None, :]
    words_at = (row * ROW_WORDS)[:, :, None] + word[None, None, :]
    # Of three bits the high one of word `j` lies in word ``j % w`` of the second plane, ``j // w`` bits up.
    high_at = (row * ROW_WORDS + WORDS)[:, :, None] + (word % (WORDS // 2))[None, None, :]
    column = n * 0 if SCALES == 2 else n
    line = (warp * 0)[:, None]
    line_at, zeros_line = line + column[None, :], line
    if EACH:
        line_at, zeros_line = (warp * N)[:, None] + column[None, :], (warp * zero_bytes)[:, None]
    zeros_at = zeros_line + (column // (8 // WIDTH))[None, :]
    zeros_high_at = zeros_line + zero_bytes // 3 * 2 + (column // 8)[None, :]
    return words_at, high_at, line_at, zeros_at, zeros_high_at


@gluon.jit
def scales_of(scale, scale_odd, DTYPE: gl.constexpr):
    """Scales of even and odd rows in float32."""
    if scale.dtype == gl.int32:
        even = scale.to(gl.int16).to(DTYPE, bitcast=True)
        odd = (scale >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    else:
        even, odd = scale, scale_odd
    return even.to(gl.float32), odd.to(gl.float32)


@gluon.jit
def zeros_of(zero, n, base, BITS: gl.constexpr, ZEROS: gl.constexpr, SCALES: gl.constexpr):
    """``-(base + zero)`` of even and odd rows [warps, pairs], as a float of 16 bits in both halves: small
    whole numbers added to the bits of the base, which do not mind its sign."""
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    NEGATIVE: gl.constexpr = 0x80008000 - (1 << 32)
    if ZEROS == 0:
        even = (n * 0 + 2 ** (BITS - 1))[None, :]
        odd = even
    else:
        at = (n * 0 if SCALES == 2 else n)[None, :]
        step: gl.constexpr = 0 if SCALES == 2 else 1
        shift = at % (8 // WIDTH) * WIDTH
        even, odd = zero >> shift, zero >> (shift + step * WIDTH)
        even, odd = even & (2**WIDTH - 1), odd & (2**WIDTH - 1)
        if BITS == 3:
            high = zero >> (8 + at % 8)
            even, odd = even | (high & 1) << 2, odd | (high >> step & 1) << 2
    return even * 0x10001 + (base ^ NEGATIVE), odd * 0x10001 + (base ^ NEGATIVE)


@gluon.jit
def fields_of(
    words, high, less, bases, J: gl.constexpr, BITS: gl.constexpr, PICK: gl.constexpr,
    PICK_HIGH: gl.constexpr, ADD: gl.constexpr, DTYPE: gl.constexpr,
):  # fmt: skip
    """Pairs of fields `J` of words [warps, pairs, words], less zero points: [warps, pairs, 2 * words]."""
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    fields = gl.inline_asm_elementwise(PICK, "=r,r,r", [words >> (J * WIDTH), bases], gl.int32, True, 1)
    if BITS == 3:
        above = high << 2 if J == 0 else high >> (J * WIDTH - 2)
        fields = gl.inline_asm_elementwise(PICK_HIGH, "=r,r,r", [above, fields], gl.int32, True, 1)
    fields = gl.inline_asm_elementwise(ADD, "=r,r,r", [fields, less], gl.int32, True, 1)
    flat = halves_of(fields).reshape([words.shape[0], words.shape[1], 2 * words.shape[2]])
    return flat.to(DTYPE, bitcast=True)
