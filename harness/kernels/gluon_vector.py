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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

__all__ = [
    "BFLOAT16_BASE",
    "FLOAT16_BASE",
    "halves",
    "pick",
    "powers",
    "subtract",
    "weight_only_vector_kernel",
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
def _words_layout(warps, rows, words):
    """Words [warps, rows, words]: as pairs of fields [warps, rows, 2 * words] they are a first operand."""
    quarter = words // 4
    registers = [[0, 0, i] for i in powers(quarter)] + [[0, 8 * i, 0] for i in powers(rows // 8)]
    lanes = [[0, 0, quarter], [0, 0, 2 * quarter], [0, 1, 0], [0, 2, 0], [0, 4, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0, 0] for i in powers(warps)], [], [warps, rows, words]
    )


@gluon.constexpr_function
def _x_layout(warps, words):
    """Pairs of x [warps, words] beside such words: a second operand, the same in every column."""
    quarter = words // 4
    lanes = [[0, quarter], [0, 2 * quarter], [0, 0], [0, 0], [0, 0]]
    registers = [[0, i] for i in powers(quarter)]
    return gl.DistributedLinearLayout(registers, lanes, [[i, 0] for i in powers(warps)], [], [warps, words])


@gluon.constexpr_function
def pick(field):
    """Both fields of a word that is shifted to them, on top of what there is: ``(word & fields) | there``."""
    return f"lop3.b32 $0, $1, {field * 0x10001}, $2, 0xEA;"


@gluon.constexpr_function
def subtract(is_bfloat16):
    """Halves minus halves, exact for whole numbers this small. bfloat16 before compute capability 9.0 only
    has the fused form: ``1 * a + (-b)``."""
    if is_bfloat16:
        return (
            "{ .reg .b32 one, less; mov.b32 one, 0x3F803F80; xor.b32 less, $2, 0x80008000;"
            " fma.rn.bf16x2 $0, $1, one, less; }"
        )
    return "sub.rn.f16x2 $0, $1, $2;"


@gluon.jit
def halves(pairs):
    """Lower and upper halves of int32 [..., n] as int16 [..., n, 2]; nothing moves."""
    return gl.join(pairs.to(gl.int16), (pairs >> 16).to(gl.int16))


@gluon.jit
def _load_tiles(
    codes_ptr, scales_ptr, zeros_ptr, within, within_high, n_zeros, n_sums, warp_words, warp_sums,
    first, tiles, N, zero_bytes, tiles_per_group,
    ROW_WORDS: gl.constexpr, BITS: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    """A tile for each warp: its words, scales and (packed) zero points; nothing beyond the last one."""
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    at, at_sums = first + warp_words, first + warp_sums
    inside, inside_sums = at < tiles, at_sums < tiles
    starts = codes_ptr + (at * N * ROW_WORDS)[:, None, None]
    words = gl.load(starts + within, mask=inside[:, None, None], other=0)
    high = words
    if BITS == 3:
        high = gl.load(starts + within_high, mask=inside[:, None, None], other=0)
    group = at_sums // tiles_per_group
    places = group[:, None] + (n_sums * 0)[None, :] if SCALES == 2 else (group * N)[:, None] + n_sums[None, :]
    scale = gl.load(scales_ptr + places, mask=inside_sums[:, None], other=0.0)
    zero = 0
    if ZEROS != 0:
        line = zeros_ptr + (at // tiles_per_group * zero_bytes)[:, None]
        zero = gl.load(line + (n_zeros // (8 // WIDTH))[None, :], mask=inside[:, None], other=0).to(gl.int32)
        zero = zero >> (n_zeros % (8 // WIDTH) * WIDTH)[None, :]
        if BITS == 3:
            plane = line + zero_bytes // 3 * 2
            bit = gl.load(plane + (n_zeros // 8)[None, :], mask=inside[:, None], other=0).to(gl.int32)
            zero = (zero & 3) | (bit >> (n_zeros % 8)[None, :] & 1) << 2
    return words, high, scale, zero


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
    HAS_BIAS: gl.constexpr, EVEN: gl.constexpr, OVERLAP: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``W x + bias`` [N] for x [tiles * TILE] in a 16-bit type, and for the second and third W (MATRICES).

    A program has ROWS rows of one W: its first index counts them, its second the matrices, which are stored
    alike. STEPS: tiles of a warp, rounded up to a power of two that STAGES divides. SCALES and ZEROS: as in
    `harness.kernels.triton_fields`, 1 or 2 and 0 or 1. OVERLAP: as in `harness.kernels.overlap`.
    """
    WIDTH: gl.constexpr = 2 if BITS == 3 else BITS
    WORDS: gl.constexpr = TILE * WIDTH // 32
    ROW_WORDS: gl.constexpr = TILE * BITS // 32
    PAIRS: gl.constexpr = 16 // WIDTH
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    IS_BFLOAT16: gl.constexpr = dtype == gl.bfloat16
    BASE: gl.constexpr = 128 if IS_BFLOAT16 else 1024
    PICK: gl.constexpr = pick(2**WIDTH - 1)
    PICK_HIGH: gl.constexpr = pick(4)
    SUBTRACT: gl.constexpr = subtract(IS_BFLOAT16)
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, sums, WORDS // 2)
    second_operand: gl.constexpr = gl.SliceLayout(2, gl.DotOperandLayout(1, sums, WORDS // 2))
    words_layout: gl.constexpr = _words_layout(num_warps, ROWS, WORDS)
    x_layout: gl.constexpr = _x_layout(num_warps, WORDS)
    row_words: gl.constexpr = gl.SliceLayout(2, words_layout)
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
    n_words = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, row_words))
    n_sums = first_row + gl.arange(0, ROWS, gl.SliceLayout(0, row_sums))
    if not EVEN:  # rows that are not there are the last one again, and not stored
        n_words, n_sums = gl.minimum(n_words, N - 1), gl.minimum(n_sums, N - 1)
    n_zeros = n_words * 0 if SCALES == 2 else n_words
    warp_words = gl.arange(0, num_warps, gl.SliceLayout(1, row_words))
    warp_sums = gl.arange(0, num_warps, gl.SliceLayout(1, row_sums))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, words_layout)))
    within = (n_words * ROW_WORDS)[None, :, None] + word[None, None, :]
    # Of three bits the high one of word `j` lies in word ``j % w`` of the second plane, ``j // w`` bits up.
    HIGH_WORDS: gl.constexpr = TILE // 32
    within_high = (n_words * ROW_WORDS + WORDS)[None, :, None] + (word % HIGH_WORDS)[None, None, :]
    beside = (word // HIGH_WORDS)[None, None, :]
    bases = gl.full([num_warps, ROWS, WORDS], 0, gl.int32, words_layout) + base

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (
            _load_tiles(
                codes_ptr, scales_ptr, zeros_ptr, within, within_high, n_zeros, n_sums, warp_words, warp_sums,
                stage * num_warps, tiles, N, zero_bytes, tiles_per_group, ROW_WORDS, BITS, SCALES, ZEROS,
            ),
        )  # fmt: skip
    if OVERLAP:
        gdc_wait()
        gdc_launch_dependents()
    x_pairs = _pairs_of_x(x_ptr, tiles, TILE, WORDS, PAIRS, STEPS, num_warps)
    acc = gl.zeros([num_warps, ROWS, 8], gl.float32, sums)
    for first in range(0, tiles, num_warps * STAGES):
        later = ()
        for stage in gl.static_range(STAGES):
            tile = first + stage * num_warps
            words, high, scale, zero = ahead[stage]
            if BITS == 3:
                high = high >> beside
            if ZEROS == 0:
                code = gl.full([num_warps, ROWS], 2 ** (BITS - 1), gl.int32, row_words)
            else:
                code = zero & (2**BITS - 1)
            low = (code + BASE).to(gl.float32).to(dtype).to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
            low = (low | (low << 16))[:, :, None]
            part = gl.zeros([num_warps, ROWS, 8], gl.float32, sums)
            for j in gl.static_range(PAIRS):
                fields = gl.inline_asm_elementwise(
                    PICK, "=r,r,r", [words >> (j * WIDTH), bases], gl.int32, True, 1
                )
                if BITS == 3:
                    above = high << 2 if j == 0 else high >> (j * WIDTH - 2)
                    fields = gl.inline_asm_elementwise(
                        PICK_HIGH, "=r,r,r", [above, fields], gl.int32, True, 1
                    )
                fields = gl.inline_asm_elementwise(SUBTRACT, "=r,r,r", [fields, low], gl.int32, True, 1)
                a = halves(fields).reshape([num_warps, ROWS, 2 * WORDS]).to(dtype, bitcast=True)
                a = gl.convert_layout(a, first_operand, assert_trivial=True)
                x = x_pairs.index(tile // num_warps * PAIRS + j).load(x_layout)
                b = halves(x).reshape([num_warps, 2 * WORDS]).to(dtype, bitcast=True)
                b = gl.convert_layout(b, second_operand, assert_trivial=True)
                b = b[:, :, None].broadcast_to([num_warps, 2 * WORDS, 8])
                part = mma_v2(a, b, part)
            acc += part * scale.to(gl.float32)[:, :, None]
            later = later + (
                _load_tiles(
                    codes_ptr, scales_ptr, zeros_ptr, within, within_high, n_zeros, n_sums,
                    warp_words, warp_sums, tile + STAGES * num_warps, tiles, N, zero_bytes, tiles_per_group,
                    ROW_WORDS, BITS, SCALES, ZEROS,
                ),
            )  # fmt: skip
        ahead = later
    y = gl.sum(acc, 0)
    y_layout: gl.constexpr = gl.SliceLayout(0, sums)
    n = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
    column = gl.arange(0, 8, gl.SliceLayout(0, y_layout))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    mask = (n < N)[:, None] & (column == 0)[None, :]
    gl.store(out_ptr + n[:, None] + (column * 0)[None, :], y.to(dtype), mask=mask)
