"""A few rows times stored matrices on tensor cores: what one row leaves unused of them.

A product of one row (`harness.kernels.gluon_vector`) multiplies each weight by eight columns that are all the
same. Here they are eight rows of x, or sixteen or 32 in several products: the words are unpacked once for all
of them, which is what takes the time, and memory delivers each word once. The pairs of x are made where they
are used, since the warps, which share the columns, have no value of x in common.

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

__all__ = ["weight_only_few_kernel"]


@gluon.constexpr_function
def _x_layout(warps, count):
    """What a thread reads of x for its words of a tile [warps, 4, rows], and holds of the second operand."""
    registers = [[0, 0, 8 * i] for i in powers(count // 8)]
    lanes = [[0, 1, 0], [0, 2, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0, 0] for i in powers(warps)], [], [warps, 4, count]
    )


@gluon.jit
def _load_x(x_ptr, x_at, first, inside, PAIRS: gl.constexpr, TILE: gl.constexpr, WORDS: gl.constexpr):
    """Of a tile for each warp the values that belong to each pair of fields, as many neighbours as a thread
    has words: those of the lower half and, after all of them, of the upper."""
    neighbours: gl.constexpr = gl.pointer_type(gl.int64) if WORDS == 16 else gl.pointer_type(gl.int32)
    start = x_ptr + first * TILE + x_at
    found = ()
    for field in gl.static_range(2 * PAIRS):
        at = (start + field * WORDS).to(neighbours, bitcast=True)
        found = found + (gl.load(at, mask=inside[:, None, None], other=0),)
    return found


@gluon.jit
def _pairs(lower, upper):
    """Two neighbours each, int32, as pairs of one of the lower and one of the upper."""
    low = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [lower, upper], gl.int32, True, 1
    )
    high = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x7632;", "=r,r,r", [lower, upper], gl.int32, True, 1
    )
    return gl.join(low, high)


@gluon.jit
def _second_operand(lower, upper, DTYPE: gl.constexpr):
    """Neighbours [warps, 4, rows] of both halves of a word as pairs of both: [warps, 2 * words, rows]. One
    operation for a pair; nothing moves."""
    warps: gl.constexpr = lower.shape[0]
    count: gl.constexpr = lower.shape[2]
    if lower.dtype == gl.int64:
        first = _pairs(lower.to(gl.int32), upper.to(gl.int32))
        second = _pairs((lower >> 32).to(gl.int32), (upper >> 32).to(gl.int32))
        pairs = gl.join(first, second).permute([0, 1, 4, 3, 2]).reshape([warps, 16, count])
    else:
        pairs = _pairs(lower, upper).permute([0, 1, 3, 2]).reshape([warps, 8, count])
    flat = halves_of(pairs).permute([0, 1, 3, 2]).reshape([warps, 2 * pairs.shape[1], count])
    return flat.to(DTYPE, bitcast=True)


@gluon.jit
def weight_only_few_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, N, zero_bytes,
    codes_1, scales_1, zeros_1, bias_1, out_1, N_1, zero_bytes_1,
    codes_2, scales_2, zeros_2, bias_2, out_2, N_2, zero_bytes_2,
    M, x_stride, tiles, tiles_per_group, base,
    MATRICES: gl.constexpr, BITS: gl.constexpr, TILE: gl.constexpr, ROWS: gl.constexpr,
    COUNT: gl.constexpr, STAGES: gl.constexpr, SCALES: gl.constexpr, ZEROS: gl.constexpr,
    HAS_BIAS: gl.constexpr, EVEN: gl.constexpr, EACH: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``x W^T + bias`` [M, N] for x [M, tiles * TILE] in a 16-bit type, and for the second and third W.

    As `harness.kernels.gluon_vector.weight_only_vector_kernel`. COUNT: 8, 16 or 32, at least M; `x_stride`: a
    multiple of four.
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
    second_operand: gl.constexpr = gl.DotOperandLayout(1, sums, WORDS // 2)
    words_layout: gl.constexpr = words_layout_of(num_warps, ROWS // 2, WORDS)
    x_layout: gl.constexpr = _x_layout(num_warps, COUNT)
    x_pairs: gl.constexpr = gl.SliceLayout(2, x_layout)
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
    x_warp = gl.arange(0, num_warps, gl.SliceLayout(1, x_pairs))
    x_word = WORDS // 4 * gl.arange(0, 4, gl.SliceLayout(0, x_pairs))
    # Rows that are not there are the last one again, and not stored.
    x_row = gl.minimum(gl.arange(0, COUNT, gl.SliceLayout(0, gl.SliceLayout(1, x_layout))), M - 1)
    x_at = (x_warp * TILE)[:, None] + x_word[None, :]
    x_at = x_at[:, :, None] + (x_row * x_stride)[None, None, :]

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (
            load_tiles(
                codes_ptr, scales_ptr, zeros_ptr, offsets, stage * num_warps, warp, n, tiles, N, zero_bytes,
                tiles_per_group, ROW_WORDS, BITS, SCALES, ZEROS, EVEN, EACH,
            ),
        )  # fmt: skip
    acc = gl.zeros([num_warps, ROWS, COUNT], gl.float32, sums)
    for first in range(0, tiles, num_warps * STAGES):
        later = ()
        for stage in gl.static_range(STAGES):
            tile = first + stage * num_warps
            even, odd, even_high, odd_high, scale, scale_odd, zero = ahead[stage]
            x = _load_x(x_ptr, x_at, tile, tile + x_warp < tiles, PAIRS, TILE, WORDS)
            if BITS == 3:
                even_high, odd_high = even_high >> beside, odd_high >> beside
            less, less_odd = zeros_of(zero, n, base, BITS, ZEROS, SCALES)
            less, less_odd = less[:, :, None], less_odd[:, :, None]
            part = gl.zeros([num_warps, ROWS, COUNT], gl.float32, sums)
            for j in gl.static_range(PAIRS):
                a = first_operand_of(
                    fields_of(even, even_high, less, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                    fields_of(odd, odd_high, less_odd, bases, j, BITS, PICK, PICK_HIGH, ADD, dtype),
                )
                a = gl.convert_layout(a, first_operand, assert_trivial=True)
                b = _second_operand(x[j], x[j + PAIRS], dtype)
                b = gl.convert_layout(b, second_operand, assert_trivial=True)
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
    m = gl.arange(0, COUNT, gl.SliceLayout(0, y_layout))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    mask = (n_out < N)[:, None] & (m < M)[None, :]
    gl.store(out_ptr + n_out[:, None] + (m * N)[None, :], y.to(dtype), mask=mask)
