"""Product of a stored 4-bit matrix and tens to thousands of rows on Hopper's tensor cores.

Computes ``y.T = W x.T``. As in `gluon_vector`, a word shifted by `j` fields and masked holds two fields,
which two operations make ``(q - zero) * scale`` in the type of the activations, and a pair of halves is what
a thread holds of an operand: here of ``wgmma``, which takes the first operand from registers and the second
from shared memory. The order of columns that this implies is given to x once, by a kernel of its own
(`arrange_kernel`); a tile of x then comes as it is.

Tensor cores work on one tile while the weights of the next are unpacked: a product is asynchronous, and is
waited for when the next one is ready.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: RUF005 (the language adds tuples, it does not unpack into them)

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from harness.kernels.gluon_vector import halves, pick, powers, subtract

__all__ = ["arrange_kernel", "weight_only_matrix_kernel"]

_PAIRS = gl.constexpr(4)  # of fields in a word
_WORDS = gl.constexpr(16)  # of a row in a tile


@triton.jit
def arrange_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """x [rows, tiles * 128], contiguous, in the order of columns in which fields are unpacked.

    Column ``32 j + 8 i + 2 q + h`` of a tile is field ``j + 4 h`` of word ``4 q + i``, which is column
    ``16 (j + 4 h) + 4 q + i`` of the matrix.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at % 128
    j, i, q, h = inside // 32, inside // 8 % 4, inside // 2 % 4, inside % 2
    source = at - inside + (j + 4 * h) * 16 + q * 4 + i
    x = tl.load(x_ptr + source, mask=at < size, other=0.0)
    tl.store(out_ptr + at, x, mask=at < size)


@gluon.constexpr_function
def _words_layout(warps, rows):
    """Words [rows, quads, words of a quad]: one quad to each thread of four that share a row."""
    registers = [[0, 0, 1], [0, 0, 2], [8, 0, 0]] + [
        [16 * warps * i, 0, 0] for i in powers(rows // 16 // warps)
    ]
    lanes = [[0, 1, 0], [0, 2, 0], [1, 0, 0], [2, 0, 0], [4, 0, 0]]
    return gl.DistributedLinearLayout(
        registers, lanes, [[16 * i, 0, 0] for i in powers(warps)], [], [rows, 4, 4]
    )


@gluon.constexpr_function
def _multiply(is_bfloat16):
    """Halves times halves. Adding -0 changes no product."""
    if is_bfloat16:
        return "{ .reg .b32 none; mov.b32 none, 0x80008000; fma.rn.bf16x2 $0, $1, $2, none; }"
    return "mul.rn.f16x2 $0, $1, $2;"


@gluon.jit
def _twice(value):
    """16-bit numbers as both halves of a word."""
    half = value.to(gl.int16, bitcast=True).to(gl.int32) & 0xFFFF
    return half | (half << 16)


@gluon.jit
def _load_tile(
    codes_ptr, scales_ptr, zeros_ptr, within, n, n_zeros, tile, N, zero_bytes, tiles_per_group,
    SCALES: gl.constexpr, ZEROS: gl.constexpr,
):  # fmt: skip
    words = gl.load(codes_ptr + tile * N * _WORDS + within)
    group = tile // tiles_per_group
    scale = gl.load(scales_ptr + (group + n * 0 if SCALES == 2 else group * N + n))
    zero = 0
    if ZEROS != 0:
        zero = gl.load(zeros_ptr + group * zero_bytes + n_zeros // 2)
    return words, scale, zero


@gluon.jit
def weight_only_matrix_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    M, N, tiles, zero_bytes, tiles_per_group, base,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``x W.T + bias`` [M, N] for x [M, tiles * 128] in a 16-bit type, as `arrange_kernel` leaves it.

    STAGES: tiles of x in shared memory. SCALES and ZEROS: as in `harness.kernels.triton_fields`, 1 or 2 and 0
    or 1.
    """
    TILE: gl.constexpr = 128
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    IS_BFLOAT16: gl.constexpr = dtype == gl.bfloat16
    BASE: gl.constexpr = 128 if IS_BFLOAT16 else 1024
    PICK: gl.constexpr = pick(15)
    SUBTRACT: gl.constexpr = subtract(IS_BFLOAT16)
    MULTIPLY: gl.constexpr = _multiply(IS_BFLOAT16)
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    words_layout: gl.constexpr = _words_layout(num_warps, BLOCK_N)
    rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, words_layout))
    shared: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, TILE], dtype)
    copied: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])

    # Programs that read the same weights follow one another.
    first_m, first_n = gl.program_id(0) * BLOCK_M, gl.program_id(1) * BLOCK_N
    n = first_n + gl.arange(0, BLOCK_N, rows)
    if not EVEN:  # rows that are not there are the last one again, and not stored
        n = gl.minimum(n, N - 1)
    n_zeros = n * 0 if SCALES == 2 else n
    quad = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(2, words_layout)))
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, words_layout)))
    within = (n * _WORDS)[:, None, None] + (quad * 4)[None, :, None] + word[None, None, :]
    bases = gl.full([BLOCK_N, 4, 4], 0, gl.int32, words_layout) + base

    m = gl.minimum(first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, copied)), M - 1)
    column = gl.arange(0, TILE, gl.SliceLayout(0, copied))
    from_x = x_ptr + (m * (tiles * TILE))[:, None] + column[None, :]
    buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, TILE], shared)
    for stage in gl.static_range(STAGES - 1):
        inside = (m * 0 + stage < tiles)[:, None]
        async_copy.async_copy_global_to_shared(buffers.index(stage), from_x + stage * TILE, mask=inside)
        async_copy.commit_group()
    words, scale, zero = _load_tile(
        codes_ptr, scales_ptr, zeros_ptr, within, n, n_zeros, 0, N, zero_bytes, tiles_per_group, SCALES, ZEROS
    )
    acc = warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, sums))
    for tile in range(tiles):
        later_words, later_scale, later_zero = _load_tile(
            codes_ptr, scales_ptr, zeros_ptr, within, n, n_zeros, gl.minimum(tile + 1, tiles - 1),
            N, zero_bytes, tiles_per_group, SCALES, ZEROS,
        )  # fmt: skip
        if ZEROS == 0:
            code = gl.full([BLOCK_N], 8, gl.int32, rows)
        else:
            code = (zero.to(gl.int32) >> (n_zeros % 2 * 4)) & 15
        low = _twice((code + BASE).to(gl.float32).to(dtype))[:, None, None]
        factor = _twice(scale.to(gl.float32).to(dtype))[:, None, None]
        slices = ()
        for j in gl.static_range(_PAIRS):
            w = gl.inline_asm_elementwise(PICK, "=r,r,r", [words >> (j * 4), bases], gl.int32, True, 1)
            w = gl.inline_asm_elementwise(SUBTRACT, "=r,r,r", [w, low], gl.int32, True, 1)
            w = gl.inline_asm_elementwise(MULTIPLY, "=r,r,r", [w, factor], gl.int32, True, 1)
            # [rows, quad, word, half] as [rows, word, quad, half]
            slices = slices + (halves(w).permute(0, 2, 1, 3).reshape([BLOCK_N, 32]),)
        a = gl.join(gl.join(slices[0], slices[2]), gl.join(slices[1], slices[3]))
        a = a.permute(0, 2, 3, 1).reshape([BLOCK_N, TILE]).to(dtype, bitcast=True)
        a = gl.convert_layout(a, operand, assert_trivial=True)
        acc = warpgroup_mma_wait(0, deps=[acc])
        async_copy.wait_group(STAGES - 2)
        gl.thread_barrier()
        fence_async_shared()
        acc = warpgroup_mma(a, buffers.index(tile % STAGES).permute((1, 0)), acc, is_async=True)
        # Into the buffer of the product that was waited for.
        ahead = tile + STAGES - 1
        inside = (m * 0 + ahead < tiles)[:, None]
        async_copy.async_copy_global_to_shared(
            buffers.index(ahead % STAGES), from_x + ahead * TILE, mask=inside
        )
        async_copy.commit_group()
        words, scale, zero = later_words, later_scale, later_zero
    y = warpgroup_mma_wait(0, deps=[acc])
    n_out = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums))
    m_out = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums))
    if HAS_BIAS:
        y += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    mask = (n_out < N)[:, None] & (m_out < M)[None, :]
    gl.store(out_ptr + (m_out * N)[None, :] + n_out[:, None], y.to(dtype), mask=mask)
