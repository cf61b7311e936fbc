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

from harness.kernels.gluon_tiles import (
    add_halves,
    fields_of,
    first_operand_of,
    halves_of,
    in_rows,
    load_tiles,
    offsets_of,
    pick_fields,
    powers,
    scales_of,
    words_layout_of,
    zeros_of,
)

__all__ = ["weight_only_vector_kernel"]


@gluon.constexpr_function
def _x_layout(warps, words):
    """Pairs of x [warps, words] beside such words: a second operand, the same in every column."""
    quarter = words // 4
    lanes = [[0, quarter], [0, 2 * quarter], [0, 0], [0, 0], [0, 0]]
    registers = [[0, i] for i in powers(quarter)]
    return gl.DistributedLinearLayout(registers, lanes, [[i, 0] for i in powers(warps)], [], [warps, words])


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
    PICK: gl.constexpr = pick_fields(2**WIDTH - 1)
    PICK_HIGH: gl.constexpr = pick_fields(4)
    ADD: gl.constexpr = add_halves(dtype == gl.bfloat16)
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    first_operand: gl.constexpr = gl.DotOperandLayout(0, sums, WORDS // 2)
    second_operand: gl.constexpr = gl.SliceLayout(2, gl.DotOperandLayout(1, sums, WORDS // 2))
    words_layout: gl.constexpr = words_layout_of(num_warps, ROWS // 2, WORDS)
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
    offsets = offsets_of(n, warp, word, N, zero_bytes, WORDS, ROW_WORDS, BITS, SCALES, EACH)
    beside = (word // (WORDS // 2))[None, None, :]  # of three bits: see `offsets_of`
    bases = gl.full([num_warps, ROWS // 2, WORDS], 0, gl.int32, words_layout) + base

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (
            load_tiles(
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
            less, less_odd = zeros_of(zero, n, base, BITS, ZEROS, SCALES)
            less, less_odd = less[:, :, None], less_odd[:, :, None]
            part = gl.zeros([num_warps, ROWS, 8], gl.float32, sums)
            for j in gl.static_range(PAIRS):
                a = first_operand_of(
                    fields_of(even, even_high, less, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                    fields_of(odd, odd_high, less_odd, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                )
                a = gl.convert_layout(a, first_operand, assert_trivial=True)
                x = x_pairs.index(tile // num_warps * PAIRS + j).load(x_layout)
                b = halves_of(x).reshape([num_warps, 2 * WORDS]).to(dtype, bitcast=True)
                b = gl.convert_layout(b, second_operand, assert_trivial=True)
                b = b[:, :, None].broadcast_to([num_warps, 2 * WORDS, 8])
                part = mma_v2(a, b, part)
            scale, scale_odd = scales_of(scale, scale_odd, scale_dtype)
            scale = gl.convert_layout(in_rows(scale, scale_odd), row_sums, assert_trivial=True)
            acc += part * scale[:, :, None]
            later = later + (
                load_tiles(
                    codes_ptr, scales_ptr, zeros_ptr, offsets, tile + STAGES * num_warps, warp, n, tiles, N,
                    zero_bytes, tiles_per_group, ROW_WORDS, BITS, SCALES, ZEROS, EVEN, EACH,
                ),
            )  # fmt: skip
        ahead = later
    y = gl.sum(acc, 0)
    y_layout: gl.constexpr = gl.SliceLayout(0, sums)
    row = gl.arange(0, ROWS, gl.SliceLayout(1, y_layout))
    n_out = first_row + row // 16 * 16 + row % 8 * 2 + row // 8 % 2  # see `first_operand_of`
    column = gl.arange(0, 8, gl.SliceLayout(0, y_layout))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    mask = (n_out < N)[:, None] & (column == 0)[None, :]
    gl.store(out_ptr + n_out[:, None] + (column * 0)[None, :], y.to(dtype), mask=mask)
