"""Product of a stored 4-bit matrix and tens to thousands of rows on Hopper's tensor cores.

Computes ``y.T = W x.T``: of the operands of ``wgmma`` the first may come from registers. Field `f` of the 16
words of a tile's row is columns ``16 f`` to ``16 f + 15`` of the matrix, which is what one such instruction
sums over. So words are read in the layout of that operand, each of their fields is unpacked where it is, and
x is read as it lies; no unpacked weight passes through shared memory.

Unpacking is most of what the warps do, and the wider a block is in x, the more products an unpacked weight
serves: 128 x 256 has as many sums as registers hold. Three products of a warp are in flight while the next
field is unpacked, so the tensor cores have work where the warps wait for each other.

The language is Gluon, Triton's own for explicit layouts; it has no interpreter.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: SIM108 (what is known when compiling is asked first, and leaves no code)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

__all__ = ["weight_only_matrix_kernel"]

_TILE = gl.constexpr(128)
_WORDS = gl.constexpr(16)  # of a row in a tile
_FIELDS = gl.constexpr(8)  # of a word
_HALF = gl.constexpr(64)  # columns of x that are fetched at once: rows of 128 bytes
_IN_FLIGHT = gl.constexpr(3)  # products that a warp does not wait for
_SLICE = gl.constexpr(16)  # columns that one instruction sums over: one field of all words


@gluon.jit
def _load_tile(
    codes_ptr, scales_ptr, zeros_ptr, words_at, n, tile, N, zero_bytes, tiles_per_group,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, EACH: gl.constexpr,
):  # fmt: skip
    words = gl.load(codes_ptr + tile * (N * _WORDS) + words_at)
    group = tile if EACH else tile // tiles_per_group
    if SCALES == 2:
        scale = gl.load(scales_ptr + group + n * 0)
    else:
        scale = gl.load(scales_ptr + group * N + n)
    zero = n * 0 + 8
    if ZEROS != 0:
        column = n * 0 if SCALES == 2 else n
        zero = gl.load(zeros_ptr + group * zero_bytes + column // 2).to(gl.int32)
    return words, scale, zero


@gluon.jit
def _fetch(x, buffers, arrived, first_m, half, last, stage, BLOCK_M: gl.constexpr):
    """Ask for half a tile of x, if it is there."""
    there = half < last * 2
    mbarrier.expect(arrived.index(stage), BLOCK_M * _HALF * 2, pred=there)
    tma.async_copy_global_to_shared(
        x, [first_m, half * _HALF], arrived.index(stage), buffers.index(stage), pred=there
    )


@gluon.jit
def _slice_of(words, scale, less, base, F: gl.constexpr):
    """Field `F` of all words, less the zero point, times the scale, exact in float32.

    A field at bit 12 of a word is the lowest digit of a float of 2048 and more, one at bit 16 of 128 and
    more: less that number and the zero point, times the scale, is one multiply-add that rounds nothing.
    """
    ODD: gl.constexpr = F % 2
    SHIFT: gl.constexpr = 12 - F // 2 * 8
    shifted = words << SHIFT if SHIFT > 0 else words >> -SHIFT
    picked = (shifted & (0xF0000 if ODD else 0xF000)) | base
    return picked.to(gl.float32, bitcast=True) * scale[:, None] + less[:, None]


@gluon.jit
def weight_only_matrix_kernel(
    x, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, partials_ptr,
    M, N, tiles, zero_bytes, tiles_per_group, blocks_m, whole, splits, tiles_per_split, even, odd,
    BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr, SCALES: gl.constexpr,
    ZEROS: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN: gl.constexpr, EACH: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``x W^T + bias`` [M, N] in a 16-bit type.

    Args:
        x: descriptor of [M, tiles * 128] in blocks [BLOCK_M, 64].
        whole: blocks of the result whose program sums over all columns; of the others each of `splits`
            programs sums over `tiles_per_split` tiles and leaves float32 [blocks, splits, BLOCK_N, BLOCK_M].
        STAGES: halves of tiles of x in shared memory, two or more.
        SCALES, ZEROS: as in `harness.kernels.triton_fields`, 1 or 2 and 0 or 1.
        EVEN: BLOCK_N divides N. EACH: a group is a tile.
        even, odd: the bits of the floats 2048 and 128, on top of which fields are set.
    """
    dtype: gl.constexpr = x.dtype
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, operand)

    unit = gl.program_id(0)
    # Bounds are computed even where nothing is shared out: with constant ones the loop comes out in a form
    # for which the assembler waits for every product.
    shared_out = unit >= whole
    block = gl.where(shared_out, whole + (unit - whole) // splits, unit)
    first = gl.where(shared_out, (unit - whole) % splits * tiles_per_split, 0)
    last = gl.where(shared_out, gl.minimum(first + tiles_per_split, tiles), tiles)
    first_m, first_n = block % blocks_m * BLOCK_M, block // blocks_m * BLOCK_N
    n = first_n + gl.arange(0, BLOCK_N, rows)
    if not EVEN:  # rows that are not there are the last one again, and not stored
        n = gl.minimum(n, N - 1)
    word = gl.arange(0, _WORDS, gl.SliceLayout(0, operand))
    words_at = (n * _WORDS)[:, None] + word[None, :]

    buffers = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, _HALF], x.layout)
    arrived = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(arrived.index(stage), count=1)
    fence_async_shared()
    words, scale, zero = _load_tile(
        codes_ptr, scales_ptr, zeros_ptr, words_at, n, first,
        N, zero_bytes, tiles_per_group, SCALES, ZEROS, EACH,
    )  # fmt: skip
    for stage in gl.static_range(STAGES - 1):
        _fetch(x, buffers, arrived, first_m, first * 2 + stage, last, stage, BLOCK_M)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, sums)
    # Operands of the last three products: kept until those are done, as the compiler would use their
    # registers again.
    first_a = gl.zeros([BLOCK_N, _SLICE], dtype, operand)
    second_a, third_a = first_a, first_a
    for tile in range(first, last):
        later_words, later_scale, later_zero = _load_tile(
            codes_ptr, scales_ptr, zeros_ptr, words_at, n, gl.minimum(tile + 1, last - 1),
            N, zero_bytes, tiles_per_group, SCALES, ZEROS, EACH,
        )  # fmt: skip
        if ZEROS != 0:
            zero = (zero >> ((n * 0 if SCALES == 2 else n) % 2 * 4)) & 15
        scale = scale.to(gl.float32)
        less_even, less_odd = (zero + 2048).to(gl.float32) * -scale, (zero + 128).to(gl.float32) * -scale
        for f in gl.static_range(_FIELDS):
            half = (tile - first) * 2 + f // 4
            if f % 4 == 0:
                mbarrier.wait(arrived.index(half % STAGES), half // STAGES & 1)
            if f % 2 == 0:
                a = _slice_of(words, scale, less_even, even, f).to(dtype)
            else:
                a = _slice_of(words, scale, less_odd, odd, f).to(dtype)
            b = buffers.index(half % STAGES).slice(f % 4 * _SLICE, _SLICE, dim=1).permute((1, 0))
            token = warpgroup_mma(a, b, acc, is_async=True)
            acc, first_a = warpgroup_mma_wait(_IN_FLIGHT, deps=[token, first_a])
            first_a, second_a, third_a = second_a, third_a, a
            if f % 4 == _IN_FLIGHT:
                # All warps have waited for the products of the half before, whose buffer is filled again,
                # while the tensor cores have three more to do.
                gl.thread_barrier()
                ahead = half + STAGES - 1
                _fetch(x, buffers, arrived, first_m, first * 2 + ahead, last, ahead % STAGES, BLOCK_M)
        words, scale, zero = later_words, later_scale, later_zero
    acc, first_a, second_a, third_a = warpgroup_mma_wait(0, deps=[acc, first_a, second_a, third_a])
    row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums))
    column = gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums))
    if shared_out:
        part = partials_ptr + (unit - whole) * (BLOCK_N * BLOCK_M)
        gl.store(part + (row * BLOCK_M)[:, None] + column[None, :], acc)
        return
    if HAS_BIAS:
        n_out = first_n + row
        acc += gl.load(bias_ptr + n_out, mask=n_out < N, other=0.0).to(gl.float32)[:, None]
    # Rows of W are columns of the result, which lie together: turned in shared memory.
    turned = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], x.layout)
    turned.permute((1, 0)).store(acc.to(dtype))
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (BLOCK_N // 8), BLOCK_N // 8], [num_warps, 1], [1, 0]
    )
    y = turned.load(layout)
    row = first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
    column = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    mask = (row < M)[:, None] & (column < N)[None, :]
    gl.store(out_ptr + (row * N)[:, None] + column[None, :], y, mask=mask)
