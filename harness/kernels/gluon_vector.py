"""Matrix-vector kernel on tensor cores for stored matrices, with the layouts of its operands written out.

The kernels in Triton spend about five instructions on a weight, which takes longer than reading its four
bits. Here it is two and a half, by three choices:

- *Two fields at once.* A word shifted by `j` fields and masked holds field `j` in its lower half and field
  ``j + fields / 2`` in its upper half. Set below the exponent of 128 (of 1024 in float16) both halves are
  16-bit floats, and one operation makes both of them ``q - zero``, exactly.
- *No weight moves.* Such a pair is what a thread holds of an operand of ``mma.m16n8k16``, if columns are
  numbered in that order, which a sum does not mind. x is brought into the order once, in shared memory.
- *Every warp has tiles of its own* and goes through them alone; the words of later tiles are on their way
  meanwhile. At the end the sums of the warps are added up in a fixed order.

All eight columns of the product are the same x: tensor cores have time to spare where memory is the limit.
Tiles are summed in float32, and their scales are applied to the sums.

Matrices that read the same x may share a launch: what starting a kernel takes, and its last programs leave
idle, is then paid once.

The language is Gluon, Triton's own for explicit layouts; it has no interpreter.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 (the language adds tuples, it does not unpack into them)
# ruff: noqa: SIM102 (what is known when compiling is asked first, and leaves no code)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

__all__ = ["BFLOAT16_BASE", "FLOAT16_BASE", "weight_only_vector_kernel"]

BFLOAT16_BASE = 0x43004300
"""128 in bfloat16, twice: the number on top of which fields are set. The kernel takes it as an argument, so
that it lives in a register: one three-input operation takes a single literal, which the mask already is."""
FLOAT16_BASE = 0x64006400
"""1024 in float16, twice."""


@gluon.constexpr_function
def _powers(count):
    """1, 2, 4 ... below `count`, a power of two."""
    return [1 << i for i in range(count.bit_length() - 1)]


@gluon.constexpr_function
def _words_layout(warps, pairs, words):
    """Words [warps, pairs of rows, words] of even or of odd rows: what a thread has of them in a first
    operand whose rows 0 to 7 are the even ones and 8 to 15 the odd ones."""
    quarter = words // 4
    registers = [[0, 0, i] for i in _powers(quarter)] + [[0, 8 * i, 0] for i in _powers(pairs // 8)]
    lanes = [[0, 0, quarter], [0, 0, 2 * quarter], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0, 0] for i in _powers(warps)], [], [warps, pairs, words]
    )


@gluon.constexpr_function
def _x_layout(warps, words):
    """Pairs of x [warps, words] beside such words: a second operand, the same in every column."""
    quarter = words // 4
    lanes = [[0, quarter], [0, 2 * quarter], [0, 0], [0, 0], [0, 0]]
    registers = [[0, i] for i in _powers(quarter)]
    return gl.DistributedLinearLayout(registers, lanes, [[i, 0] for i in _powers(warps)], [], [warps, words])


@gluon.constexpr_function
def _pick(field):
    """Both fields of a word that is shifted to them, on top of what there is: ``(word & fields) | there``."""
    return f"lop3.b32 $0, $1, {field * 0x10001}, $2, 0xEA;"


@gluon.constexpr_function
def _add(is_bfloat16):
    """Halves plus halves, exact for whole numbers this small. bfloat16 before compute capability 9.0 only has
    the fused form: ``1 * a + b``."""
    if is_bfloat16:
        return "{ .reg .b32 one; mov.b32 one, 0x3F803F80; fma.rn.bf16x2 $0, $1, one, $2; }"
    return "add.rn.f16x2 $0, $1, $2;"


@gluon.jit
def _halves(pairs):
    """Lower and upper halves of int32 [..., n] as int16 [..., n, 2]; nothing moves."""
    return gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16))


@gluon.jit
def _operand(even, odd):
    """Even and odd rows [warps, pairs, columns] as the rows of a first operand; nothing moves."""
    warps: gl.constexpr = even.shape[0]
    pairs: gl.constexpr = even.shape[1]
    columns: gl.constexpr = even.shape[2]
    both = gl.join(even, odd).reshape([warps, pairs // 8, 8, columns, 2])
    return both.permute([0, 1, 4, 2, 3]).reshape([warps, 2 * pairs, columns])


@gluon.jit
def _rows(even, odd):
    """Numbers of even and odd rows [warps, pairs] in the order of `_operand`."""
    warps: gl.constexpr = even.shape[0]
    pairs: gl.constexpr = even.shape[1]
    both = gl.join(even, odd).reshape([warps, pairs // 8, 8, 2])
    return both.permute([0, 1, 3, 2]).reshape([warps, 2 * pairs])


@gluon.jit
def _load_tiles(
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
def _offsets(
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
def _scales_of(scale, scale_odd, DTYPE: gl.constexpr):
    """Scales of even and odd rows in float32."""
    if scale.dtype == gl.int32:
        even = scale.to(gl.int16).to(DTYPE, bitcast=True)
        odd = (scale >> 16).to(gl.int16).to(DTYPE, bitcast=True)
    else:
        even, odd = scale, scale_odd
    return even.to(gl.float32), odd.to(gl.float32)


@gluon.jit
def _zeros_of(zero, n, base, BITS: gl.constexpr, ZEROS: gl.constexpr, SCALES: gl.constexpr):
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
def _fields(
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
    flat = _halves(fields).reshape([words.shape[0], words.shape[1], 2 * words.shape[2]])
    return flat.to(DTYPE, bitcast=True)


@gluon.jit
def _pairs_of_x(
    x_ptr, tiles,
    TILE: gl.constexpr, WORDS: gl.constexpr, PAIRS: gl.constexpr, STEPS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """x in shared memory: int32 [steps * pairs, warps, words], the halves those of a pair of fields."""
    layout: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WORDS, WORDS // 4], [num_warps, 1], [1, 0])
    line = gl.arange(0, STEPS * PAIRS * num_warps, gl.SliceLayout(1, layout))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, layout))
    tile = line // (PAIRS * num_warps) * num_warps + line % num_warps
    field = line // num_warps % PAIRS
    pointers = x_ptr + (tile * TILE + field * WORDS)[:, None] + word[None, :]
    inside = (tile < tiles)[:, None]
    lower = gl.load(pointers, mask=inside, other=0.0).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    upper = gl.load(pointers + TILE // 2, mask=inside, other=0.0).to(gl.int16, bitcast=True).to(gl.int32)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    shape: gl.constexpr = [STEPS * PAIRS * num_warps, WORDS]
    pairs = gl.allocate_shared_memory(gl.int32, shape, plain, lower | (upper << 16))
    return pairs._reinterpret(gl.int32, [STEPS * PAIRS, num_warps, WORDS], plain)


@gluon.jit
def weight_only_vector_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, N, zero_bytes,
    codes_1, scales_1, zeros_1, bias_1, out_1, N_1, zero_bytes_1,
    codes_2, scales_2, zeros_2, bias_2, out_2, N_2, zero_bytes_2,
    tiles, tiles_per_group, base,
    MATRICES: gl.constexpr, BITS: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr,
    STAGES: gl.constexpr, STEPS: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr, EVEN: gl.constexpr, EACH: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``W x + bias`` [N] for x [tiles * TILE] in a 16-bit type, and for the second and third W (MATRICES).

    A program has ROWS rows of one W: its first index counts them, its second the matrices, which are stored
    alike. STEPS: tiles of a warp, rounded up to a power of two that STAGES divides. SCALES and ZEROS: as in
    `harness.kernels.triton_fields`, 1 or 2 and 0 or 1. EACH: tiles are groups.
    """
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    WORDS: gl.constexpr = TILE * WIDTH // 32
    ROW_WORDS: gl.constexpr = TILE * BITS // 32
    PAIRS: gl.constexpr = 16 // WIDTH
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    scale_dtype: gl.constexpr = scales_ptr.dtype.element_ty
    PICK: gl.constexpr = _pick(2**WIDTH - 1)
    PICK_HIGH: gl.constexpr = _pick(4)
    ADD: gl.constexpr = _add(dtype == gl.bfloat16)
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, sums, WORDS // 2)
    second_operand: gl.constexpr = gl.SliceLayout(2, gl.DotOperandLayout(1, sums, WORDS // 2))
    words_layout: gl.constexpr = _words_layout(num_warps, ROWS // 2, WORDS)
    x_layout: gl.constexpr = _x_layout(num_warps, WORDS)
    pairs_layout: gl.constexpr = gl.SliceLayout(2, words_layout)
    row_sums: gl.constexpr = gl.SliceLayout(2, sums)

    if MATRICES > 1:
        if gl.program_id(1) == 1:
            codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr = codes_1, scales_1, zeros_1, bias_1, out_1
            N, zero_bytes = N_1, zero_bytes_1
    if MATRICES > 2:
        if gl.program_id(1) == 2:
            codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr = codes_2, scales_2, zeros_2, bias_2, out_2
            N, zero_bytes = N_2, zero_bytes_2
    first_row = gl.program_id(0) * ROWS
    if MATRICES > 1:
        if first_row >= N:  # of a matrix with fewer rows than another
            return
    n = first_row + 2 * gl.arange(0, ROWS // 2, gl.SliceLayout(0, pairs_layout))
    warp = gl.arange(0, num_warps, gl.SliceLayout(1, pairs_layout))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, words_layout)))
    offsets = _offsets(n, warp, word, N, zero_bytes, WORDS, ROW_WORDS, BITS, SCALES, EACH)
    beside = (word // (WORDS // 2))[None, None, :]  # of three bits: see `_offsets`
    bases = gl.full([num_warps, ROWS // 2, WORDS], 0, gl.int32, words_layout) + base

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (
            _load_tiles(
                codes_ptr, scales_ptr, zeros_ptr, offsets, stage * num_warps, warp, n, tiles, N, zero_bytes,
                tiles_per_group, ROW_WORDS, BITS, SCALES, ZEROS, EVEN, EACH,
            ),
        )  # fmt: skip
    x_pairs = _pairs_of_x(x_ptr, tiles, TILE, WORDS, PAIRS, STEPS, num_warps)
    acc = gl.zeros([num_warps, ROWS, 8], gl.float32, sums)
    for first in range(0, tiles, num_warps * STAGES):
        later = ()
        for stage in gl.static_range(STAGES):
            tile = first + stage * num_warps
            even, odd, even_high, odd_high, scale, scale_odd, zero = ahead[stage]
            if BITS == 3:
                even_high, odd_high = even_high >> beside, odd_high >> beside
            less, less_odd = _zeros_of(zero, n, base, BITS, ZEROS, SCALES)
            less, less_odd = less[:, :, None], less_odd[:, :, None]
            part = gl.zeros([num_warps, ROWS, 8], gl.float32, sums)
            for j in gl.static_range(PAIRS):
                a = _operand(
                    _fields(even, even_high, less, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                    _fields(odd, odd_high, less_odd, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                )
                a = gl.convert_layout(a, first_operand, assert_trivial=True)
                x = x_pairs.index(tile // num_warps * PAIRS + j).load(x_layout)
                b = _halves(x).reshape([num_warps, 2 * WORDS]).to(dtype, bitcast=True)
                b = gl.convert_layout(b, second_operand, assert_trivial=True)
                b = b[:, :, None].broadcast_to([num_warps, 2 * WORDS, 8])
                part = mma_v2(a, b, part)
            scale, scale_odd = _scales_of(scale, scale_odd, scale_dtype)
            scale = gl.convert_layout(_rows(scale, scale_odd), row_sums, assert_trivial=True)
            acc += part * scale[:, :, None]
            later = later + (
                _load_tiles(
                    codes_ptr, scales_ptr, zeros_ptr, offsets, tile + STAGES * num_warps, warp, n, tiles, N,
                    zero_bytes, tiles_per_group, ROW_WORDS, BITS, SCALES, ZEROS, EVEN, EACH,
                ),
            )  # fmt: skip
        ahead = later
    y = gl.sum(acc, 0)
    y_layout: gl.constexpr = gl.SliceLayout(0, sums)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
    n_out = first_row + row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # see `_operand`
    column = gl.arange(0, 8, gl.SliceLayout(0, y_layout))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    mask = (n_out < N)[:, None] & (column == 0)[None, :]
    gl.store(out_ptr + n_out[:, None] + (column * 0)[None, :], y.to(dtype), mask=mask)
