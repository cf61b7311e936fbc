"""Product of a stored 4-bit matrix and tens to thousands of rows on Hopper's tensor cores.

Computes ``y.T = W x.T``: of the operands of ``wgmma`` the first may come from registers. Field `f` of the 16
words of a tile's row is columns ``16 f`` to ``16 f + 15`` of the matrix, which is what one such instruction
sums over. So words are read in the layout of that operand, each of their fields is unpacked where it is, and
x is read as it lies; no unpacked weight passes through shared memory.

Unpacking is most of what the warps do, and the wider a block is in x, the more products an unpacked weight
serves: 128 x 256 has as many sums as registers hold. Three products of a warp are in flight while the next
field is unpacked, so the tensor cores have work where the warps wait for each other.

Where the columns of a block are shared out to two or four programs, each of them adds up a piece of what all
have; of other numbers the last one adds up everything. Programs begin in the order of their numbers, so of
those that wait for each other all but the last ones that fit on the device are there.

Matrices that read the same x may share a launch: together their blocks fill the device more evenly.

The language is Gluon, Triton's own for explicit layouts; it has no interpreter.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,misc,var-annotated"
# ruff: noqa: SIM102, SIM108 (what is known when compiling is asked first, and leaves no code)

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

__all__ = ["places", "weight_only_matrix_kernel"]

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
def places(row, column, BLOCK_M: gl.constexpr, num_warps: gl.constexpr):
    """Where sums [rows, columns] lie while another program waits for them: as threads hold them, so that
    those of a warp are one stretch."""
    above = (row // (16 * num_warps) * (BLOCK_M // 4) + row // 8 % 2)[:, None] + (column // 8 * 2)[None, :]
    warp = (row // 16 % num_warps * 64 + row % 8 * 8)[:, None] + (column % 8)[None, :]
    return above * (num_warps * 64) + warp


@gluon.jit
def _halves(acc, LAYOUT: gl.constexpr):
    """The first and the second half of the columns; nothing moves."""
    count: gl.constexpr = acc.shape[1] // 2
    low, high = acc.reshape([acc.shape[0], 2, count]).permute([0, 2, 1]).split()
    low = gl.convert_layout(low, LAYOUT, assert_trivial=True)
    return low, gl.convert_layout(high, LAYOUT, assert_trivial=True)


@gluon.jit
def _pieces(acc, PIECES: gl.constexpr, num_warps: gl.constexpr):
    """Two or four pieces of sums, cut between columns."""
    half: gl.constexpr = acc.shape[1] // 2
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, half, 16])
    low, high = _halves(acc, layout)
    if PIECES == 2:
        pieces = (low, high)
    else:
        quarter: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, half // 2, 16])
        pieces = _halves(low, quarter) + _halves(high, quarter)
    return pieces


@gluon.jit
def _wait(flag, done):
    """Until another program has set a flag, which is taken away."""
    while gl.atomic_cas(flag, done, done - done, sem="acquire") != done:
        pass


@gluon.jit
def _write(
    acc, bias_ptr, out_ptr, first_m, first_n, M, N, SHARED: gl.constexpr, HAS_BIAS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """Store sums [rows of W, rows of x] as the result, whose rows are those of x."""
    BLOCK_N: gl.constexpr = acc.shape[0]
    COUNT: gl.constexpr = acc.shape[1]
    sums: gl.constexpr = acc.type.layout
    if HAS_BIAS:
        n = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums))
        acc += gl.load(bias_ptr + n, mask=n < N, other=0.0).to(gl.float32)[:, None]
    # Rows of W are columns of the result, which lie together: turned in shared memory.
    dtype: gl.constexpr = out_ptr.dtype.element_ty
    turned = gl.allocate_shared_memory(dtype, [COUNT, BLOCK_N], SHARED)
    turned.permute((1, 0)).store(acc.to(dtype))
    layout: gl.constexpr = gl.BlockedLayout(
        [1, 8], [32 // (BLOCK_N // 8), BLOCK_N // 8], [num_warps, 1], [1, 0]
    )
    y = turned.load(layout)
    row = first_m + gl.arange(0, COUNT, gl.SliceLayout(1, layout))
    column = first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    mask = (row < M)[:, None] & (column < N)[None, :]
    gl.store(out_ptr + (row * N)[:, None] + column[None, :], y, mask=mask)


# Counts that follow from the rows and the device: one compiled kernel is for all of them.
@gluon.jit(
    do_not_specialize=[
        "M",
        "tiles",
        "tiles_per_group",
        "blocks_m",
        "before_1",
        "before_2",
        "whole",
        "others",
        "tiles_per_split",
        "done",
    ]
)
def weight_only_matrix_kernel(
    x, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr, N, zero_bytes,
    codes_1, scales_1, zeros_1, bias_1, out_1, N_1, zero_bytes_1,
    codes_2, scales_2, zeros_2, bias_2, out_2, N_2, zero_bytes_2,
    partials_ptr, flags_ptr, M, tiles, tiles_per_group, blocks_m, before_1, before_2,
    whole, others, tiles_per_split, done, even, odd,
    MATRICES: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
    SCALES: gl.constexpr, ZEROS: gl.constexpr, HAS_BIAS: gl.constexpr, EVEN: gl.constexpr,
    EACH: gl.constexpr, PIECES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``x W^T + bias`` [M, N] in a 16-bit type, and for the second and third W (MATRICES), stored alike.

    Args:
        x: descriptor of [M, tiles * 128] in blocks [BLOCK_M, 64].
        before_1, before_2: blocks of rows of the matrices before the second and the third.
        whole: blocks of the result whose program sums over all columns; of each one beyond, 1 + `others`
            programs sum over `tiles_per_split` tiles each.
        PIECES: 1: the last of them adds up. 2 or 4, as many as they are: each adds up a piece of the block.
        partials_ptr, flags_ptr: float32 [blocks, others, BLOCK_N * BLOCK_M] and int64 [blocks, others];
            with pieces [blocks, PIECES, PIECES, BLOCK_N * BLOCK_M / PIECES] and [blocks, PIECES, PIECES].
        done: what a flag becomes when its sums are there; no flag may be that before. It is taken away again.
        STAGES: halves of tiles of x in shared memory, two or more.
        SCALES, ZEROS: as in `harness.kernels.triton_fields`, 1 or 2 and 0 or 1.
        EVEN: BLOCK_N divides all N. EACH: a group is a tile.
        even, odd: the bits of the floats 2048 and 128, on top of which fields are set.
    """
    dtype: gl.constexpr = x.dtype
    shared: gl.constexpr = x.layout
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_M, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    rows: gl.constexpr = gl.SliceLayout(1, operand)

    unit = gl.program_id(0)
    # Bounds are computed even where nothing is shared out: with constant ones the loop comes out in a form
    # for which the assembler waits for every product.
    shared_out = unit >= whole
    block = gl.where(shared_out, whole + (unit - whole) // (others + 1), unit)
    part = gl.where(shared_out, (unit - whole) % (others + 1), 0)
    first = part * tiles_per_split
    last = gl.where(shared_out, gl.minimum(first + tiles_per_split, tiles), tiles)
    block_n = block // blocks_m
    before = 0
    if MATRICES > 1:
        if block_n >= before_1:
            codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr = codes_1, scales_1, zeros_1, bias_1, out_1
            N, zero_bytes, before = N_1, zero_bytes_1, before_1
    if MATRICES > 2:
        if block_n >= before_2:
            codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr = codes_2, scales_2, zeros_2, bias_2, out_2
            N, zero_bytes, before = N_2, zero_bytes_2, before_2
    first_m, first_n = block % blocks_m * BLOCK_M, (block_n - before) * BLOCK_N
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
    if PIECES == 1:
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums))
        at = places(row, gl.arange(0, BLOCK_M, gl.SliceLayout(0, sums)), BLOCK_M, num_warps)
        slot = (block - whole) * others + part
        if shared_out & (part < others):
            gl.store(partials_ptr + slot * (BLOCK_N * BLOCK_M) + at, acc)
            gl.thread_barrier()
            gl.atomic_xchg(flags_ptr + slot, done, sem="release")
            return
        for other in range(slot - part, gl.where(shared_out, slot, slot - part)):
            _wait(flags_ptr + other, done)
            acc += gl.load(partials_ptr + other * (BLOCK_N * BLOCK_M) + at)
    elif shared_out:
        COUNT: gl.constexpr = BLOCK_M // PIECES
        piece_sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, COUNT, 16])
        row = gl.arange(0, BLOCK_N, gl.SliceLayout(1, piece_sums))
        at = places(row, gl.arange(0, COUNT, gl.SliceLayout(0, piece_sums)), COUNT, num_warps)
        pieces = _pieces(acc, PIECES, num_warps)
        # Of each block and program a place for every piece; that of its own stays empty.
        slots = (block - whole) * (PIECES * PIECES)
        mine = pieces[0]
        for to in gl.static_range(PIECES):
            mine = gl.where(part == to, pieces[to], mine)
            if part != to:
                gl.store(partials_ptr + (slots + part * PIECES + to) * (BLOCK_N * COUNT) + at, pieces[to])
        gl.thread_barrier()
        for to in range(PIECES):
            if part != to:
                gl.atomic_xchg(flags_ptr + slots + part * PIECES + to, done, sem="release")
        for one in range(PIECES):
            if part != one:
                slot = slots + one * PIECES + part
                _wait(flags_ptr + slot, done)
                mine += gl.load(partials_ptr + slot * (BLOCK_N * COUNT) + at)
        _write(mine, bias_ptr, out_ptr, first_m + part * COUNT, first_n, M, N, shared, HAS_BIAS, num_warps)
        return
    _write(acc, bias_ptr, out_ptr, first_m, first_n, M, N, shared, HAS_BIAS, num_warps)
