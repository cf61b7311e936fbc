"""A few rows times a 2:4 matrix as cuSPARSELt holds it, on sparse tensor cores.

The library pads one row to eight and takes longer for it than a dense product; its form can be read directly
(`harness.kernels.sparse_rows` says where it has what). Memory delivers each value and each byte of metadata
once, and nothing is unpacked:

- *Values are an operand as they lie.* A thread's 16 bytes of a row are four registers of ``mma.sp``, two for
  each of two instructions, if groups of four columns are numbered accordingly. A sum does not mind the order
  of its columns.
- *Metadata takes few operations.* Of 16 bits an instruction reads a register of two threads of four, and
  which two can be said: so two threads make that of the first instruction and the others that of the second,
  in six operations. A byte of the library's is two rows there, and an instruction wants four groups of one
  row together. Of 8 bits each thread has a register for each instruction, which is one permutation of bytes.
- *x comes from the first-level cache*, into the other operand directly.

What a warp reads at once is a *unit*: 64 bytes of the values of each of 16 rows and what belongs to them, for
64 columns of 16 bits or 128 of 8. Every warp has units of its own and goes through them alone; what it needs
later is on its way meanwhile. At the end the sums of the warps are added up in a fixed order.

Matrices that read the same x may share a launch, as in `harness.kernels.gluon_vector`.

The language is Gluon, Triton's own for explicit layouts; it has no sparse product, so that is assembly, of
which one element of a tensor is the register of one thread.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 (the language adds tuples, it does not unpack into them)
# ruff: noqa: SIM102 (what is known when compiling is asked first, and leaves no code)

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from harness.kernels.gluon_tiles import powers

__all__ = ["sparse_few_kernel"]


@gluon.constexpr_function
def _threads(warps):
    """One element a thread: [warps, 32]."""
    lanes = [[0, i] for i in powers(32)]
    return gl.DistributedLinearLayout([], lanes, [[i, 0] for i in powers(warps)], [], [warps, 32])


@gluon.constexpr_function
def _vectors(warps, size):
    """So many neighbours a thread: [warps, 32, size]."""
    registers, lanes = [[0, 0, i] for i in powers(size)], [[0, i, 0] for i in powers(32)]
    return gl.DistributedLinearLayout(
        registers, lanes, [[i, 0, 0] for i in powers(warps)], [], [warps, 32, size]
    )


@gluon.constexpr_function
def _product(kind, half):
    """``mma.sp``, 16 rows and eight of x: of 16 bits 32 columns with the metadata that threads 0 and 1 of
    four hold (`half` 0), or 2 and 3; of 8 bits 64 columns with that of all four."""
    columns, sums, selector = (64, "f32", 0) if kind in ("s8", "e4m3") else (32, "f32", half)
    sums = "s32" if kind == "s8" else sums
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k{columns}.row.col.{sums}.{kind}.{kind}.{sums} "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, "
        f"0x{selector};"
    )


@gluon.constexpr_function
def _constraints(kind):
    """Of the operands of that: four sums, four and four words, four sums and metadata."""
    one = "r" if kind == "s8" else "f"
    return ",".join([f"={one}"] * 4 + ["r"] * 8 + [one] * 4 + ["r"])


@gluon.jit
def _halves_of(vectors):
    """The even and the odd ones of neighbours [..., size]; nothing moves."""
    return gl.split(vectors.reshape(vectors.shape[:-1] + [vectors.shape[-1] // 2, 2]))


@gluon.jit
def _flat(word):
    """[warps, 32] in the layout that all operands of an instruction have; nothing moves."""
    return gl.convert_layout(word, _threads(word.shape[0]), assert_trivial=True)


@gluon.jit
def _words_of(vectors):
    """The four words of each thread, [warps, 32] each."""
    even, odd = _halves_of(vectors)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return _flat(first), _flat(second), _flat(third), _flat(fourth)


@gluon.jit
def _load_weights(words_ptr, places, rows, unit, units, BLOCKS: gl.constexpr, BITS: gl.constexpr):
    """A unit for each warp: of each block of 16 rows the values of its upper and its lower half
    [warps, 32, 4] and twice the metadata [warps, 32, words]; zeros beyond the last column. An address is a
    number that all threads share and an offset that stays."""
    values_at, meta_at, own_values, own_meta = places
    UNIT: gl.constexpr = 2048 // BITS  # words of metadata of 64 rows, in two parts
    inside = (unit + own_values < units)[:, :, None]
    inside_meta = (unit + own_meta < units)[:, :, None]
    found = ()
    for block in gl.static_range(BLOCKS):
        first_row, first_meta = rows[block]
        upper = words_ptr + (first_row * 16 * units + unit * 16)
        lower = words_ptr + ((first_row + 8) * 16 * units + unit * 16)
        meta = words_ptr + (first_meta + unit * UNIT)
        # Read once: what is to stay in the cache is x.
        found = found + (
            (
                gl.load(upper + values_at, mask=inside, other=0, eviction_policy="evict_first"),
                gl.load(lower + values_at, mask=inside, other=0, eviction_policy="evict_first"),
                gl.load(meta + meta_at, mask=inside_meta, other=0, eviction_policy="evict_first"),
                gl.load(meta + meta_at + UNIT // 2, mask=inside_meta, other=0, eviction_policy="evict_first"),
            ),
        )
    return found


@gluon.jit
def _load_x(x_ptr, x_at, unit, own, odd, units, COUNT: gl.constexpr, BITS: gl.constexpr, WIDE: gl.constexpr):
    """The second operands for a unit of each warp: for each eight rows of x and each of the two instructions
    four words, [warps, 32] each."""
    start = x_ptr + unit * 32
    inside = unit + own < units
    found = ()
    for eight in gl.static_range(COUNT // 8):
        at = start + x_at[eight]
        if WIDE:
            a, b = _every_other(at, inside, odd, 0)
            c, d = _every_other(at, inside, odd, 4)
            e, f = _every_other(at, inside, odd, 16)
            g, h = _every_other(at, inside, odd, 20)
        else:
            a = gl.load(at, mask=inside, other=0)
            b = gl.load(at + 2, mask=inside, other=0)
            c = gl.load(at + 4, mask=inside, other=0)
            d = gl.load(at + 6, mask=inside, other=0)
            e = gl.load(at + 16, mask=inside, other=0)
            f = gl.load(at + 18, mask=inside, other=0)
            g = gl.load(at + 20, mask=inside, other=0)
            h = gl.load(at + 22, mask=inside, other=0)
        # Two threads have the two halves of a group of 16 bits, or two groups of 8, and groups follow.
        if BITS == 16:
            found = found + (((a, e, b, f), (c, g, d, h)),)
        else:
            found = found + (((a, e, c, g), (b, f, d, h)),)
    return found


@gluon.jit
def _every_other(at, inside, odd, WORD: gl.constexpr):
    """Of four neighbours the even or the odd ones: two threads read the same four."""
    first, second, third, fourth = _words_of(gl.load(at + WORD, mask=inside[:, :, None], other=0))
    return gl.where(odd, second, first), gl.where(odd, fourth, third)


@gluon.jit
def _pick_bytes(first, second, pick):
    """Four of the eight bytes of two words."""
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, pick], gl.int32, True, 1
    )


@gluon.jit
def _metadata(first, second, pick, BITS: gl.constexpr):
    """Metadata registers of both instructions from the two parts of a unit's."""
    if BITS == 8:
        first, first_later = gl.split(first)
        second, second_later = gl.split(second)
        return (
            _pick_bytes(_flat(first), _flat(second), pick),
            _pick_bytes(_flat(first_later), _flat(second_later), pick),
        )
    # Bytes with a group of one row in their low bits and of the row eight below in their high bits become
    # four groups of the one row below four of the other.
    OUTER: gl.constexpr = 0xF00FF00F - (1 << 32)
    both = _pick_bytes(_flat(first.reshape(pick.shape)), _flat(second.reshape(pick.shape)), pick)
    both = (both & OUTER) | ((both << 4) & 0x0F000F00) | ((both >> 4) & 0x00F000F0)
    both = gl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x3120;", "=r,r", [both], gl.int32, True, 1)
    return both, both


@gluon.jit
def _multiply(acc, weights, x, pick, KIND: gl.constexpr, BLOCKS: gl.constexpr, COUNT: gl.constexpr):
    """The sums of `acc` and of the products of a unit: for each block and eight rows of x a thread's four."""
    BITS: gl.constexpr = 8 if KIND == "s8" or KIND == "e4m3" else 16
    INTEGERS: gl.constexpr = (gl.int32, gl.int32, gl.int32, gl.int32)
    FLOATS: gl.constexpr = (gl.float32, gl.float32, gl.float32, gl.float32)
    # Where a thread's second register of a row is: it has two neighbours at once, or every other word.
    STEP: gl.constexpr = 2 if BITS == 16 else 1
    APART: gl.constexpr = 1 if BITS == 16 else 2
    found = ()
    for block in gl.static_range(BLOCKS):
        upper, lower, first, second = weights[block]
        upper, lower = _words_of(upper), _words_of(lower)
        meta = _metadata(first, second, pick, BITS)
        of_block = ()
        for eight in gl.static_range(COUNT // 8):
            sums = acc[block][eight]
            for half in gl.static_range(2):
                b = x[eight][half]
                sums = gl.inline_asm_elementwise(
                    _product(KIND, half),
                    _constraints(KIND),
                    [
                        upper[STEP * half], lower[STEP * half],
                        upper[STEP * half + APART], lower[STEP * half + APART],
                        b[0], b[1], b[2], b[3], sums[0], sums[1], sums[2], sums[3], meta[half],
                    ],
                    INTEGERS if KIND == "s8" else FLOATS, True, 1,
                )  # fmt: skip
            of_block = of_block + (sums,)
        found = found + (of_block,)
    return found


@gluon.jit
def _zeros(KIND: gl.constexpr, BLOCKS: gl.constexpr, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """The sums of nothing."""
    zero = gl.zeros([num_warps, 32], gl.int32 if KIND == "s8" else gl.float32, _threads(num_warps))
    found = ()
    for _ in gl.static_range(BLOCKS):
        of_block = ()
        for _eight in gl.static_range(COUNT // 8):
            of_block = of_block + ((zero, zero, zero, zero),)
        found = found + (of_block,)
    return found


@gluon.jit
def _total(a, b, c, d):
    """Four numbers of each thread added up over the warps: [32, 4]."""
    four = gl.join(gl.join(a, c), gl.join(b, d))
    return gl.sum(four, 0).reshape([32, 4])


@gluon.jit
def sparse_few_kernel(
    x_ptr, words_ptr, bias_ptr, x_scales_ptr, scales_ptr, out_ptr, M, N, x_stride, units,
    words_1, bias_1, scales_1, out_1, N_1,  # last, which leaves the code for one matrix as it was
    words_2, bias_2, scales_2, out_2, N_2,
    MATRICES: gl.constexpr, KIND: gl.constexpr, BLOCKS: gl.constexpr, COUNT: gl.constexpr,
    STAGES: gl.constexpr, WIDE: gl.constexpr, HAS_BIAS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """``x W^T + bias`` [M, N] for x [M, 32 * units] and W [N, ...] in cuSPARSELt's form, both int32 words;
    and for the second and third W (MATRICES).

    A program has 16 * BLOCKS rows of one W (1, 2 or 4 blocks; N a multiple of 64) and all columns: its first
    index counts them, its second the matrices, which have the same type and columns. KIND: "bf16" or "f16";
    "s8" or "e4m3", whose sums are multiplied with the scales, float32, of rows of x [M] and of W [N]. COUNT:
    8 or 16, at least M. STAGES: units that a warp has on their way. WIDE: x is read 16 bytes at once, half
    of them for nothing. `x_stride`: in words.
    """
    BITS: gl.constexpr = 8 if KIND == "s8" or KIND == "e4m3" else 16
    WORDS: gl.constexpr = 16 // BITS  # of metadata that a thread has of each part of a unit
    threads: gl.constexpr = _threads(num_warps)
    vectors: gl.constexpr = _vectors(num_warps, 4)
    pairs: gl.constexpr = _vectors(num_warps, WORDS)

    # A warp's units are neighbours: a line of memory is read by one warp, all of it at once.
    warp = gl.arange(0, num_warps, gl.SliceLayout(1, gl.SliceLayout(2, vectors)))
    lane_values = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, vectors)))
    word_values = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, vectors)))
    own_values = (STAGES * warp)[:, None] + (lane_values * 0)[None, :]
    values_at = own_values * 16 + (lane_values // 4 * (16 * units) + lane_values % 4 * 4)[None, :]
    values_at = values_at[:, :, None] + word_values[None, None, :]

    warp = gl.arange(0, num_warps, gl.SliceLayout(1, gl.SliceLayout(2, pairs)))
    lane = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(2, pairs)))
    word = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(1, pairs)))
    own_meta = (STAGES * warp)[:, None] + (lane * 0)[None, :]
    meta_at = own_meta * (2048 // BITS) + ((lane // 4 * 2 + lane % 4 // 2) * WORDS)[None, :]
    meta_at = meta_at[:, :, None] + word[None, None, :]
    places = (values_at, meta_at, own_values, own_meta)

    warp = gl.arange(0, num_warps, gl.SliceLayout(1, threads))
    lane = gl.arange(0, 32, gl.SliceLayout(0, threads))
    own = (STAGES * warp)[:, None] + (lane * 0)[None, :]
    if BITS == 16:  # halves of words
        pick = own * 0 + gl.where(lane % 2 == 0, 0x5410, 0x7632)[None, :]
    else:  # every other byte
        pick = own * 0 + gl.where(lane % 2 == 0, 0x6420, 0x7531)[None, :]
    odd = own * 0 + (lane % 2)[None, :] == 1
    x_at = ()
    for eight in gl.static_range(COUNT // 8):
        # Rows that are not there are the last one again, and not stored.
        if WIDE:
            m = gl.minimum(lane_values // 4 + 8 * eight, M - 1)
            at = own_values * 32 + (m * x_stride + lane_values % 4 // 2 * 8)[None, :]
            x_at = x_at + (at[:, :, None] + word_values[None, None, :],)
        else:
            m = gl.minimum(lane // 4 + 8 * eight, M - 1)
            x_at = x_at + (own * 32 + (m * x_stride + lane % 4 // 2 * 8 + lane % 2)[None, :],)
    own_x = own_values if WIDE else own
    if MATRICES > 1:
        if gl.program_id(1) == 1:
            words_ptr, bias_ptr, scales_ptr, out_ptr, N = words_1, bias_1, scales_1, out_1, N_1
    if MATRICES > 2:
        if gl.program_id(1) == 2:
            words_ptr, bias_ptr, scales_ptr, out_ptr, N = words_2, bias_2, scales_2, out_2, N_2
    first_row = gl.program_id(0) * (16 * BLOCKS)
    if MATRICES > 1:
        if first_row >= N:  # of a matrix with fewer rows than another
            return
    rows = ()
    for block in gl.static_range(BLOCKS):
        row = first_row + 16 * block
        # A row's values are 16 words a unit, the metadata of 64 rows 128 or 256.
        meta = N * 16 * units + row // 64 * (2048 // BITS * units) + row % 64 * WORDS
        rows = rows + ((row, meta),)

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (_load_weights(words_ptr, places, rows, stage, units, BLOCKS, BITS),)
    x = _load_x(x_ptr, x_at, 0, own_x, odd, units, COUNT, BITS, WIDE)
    acc = _zeros(KIND, BLOCKS, COUNT, num_warps)
    for first in range(0, units, num_warps * STAGES):
        later = ()
        for stage in gl.static_range(STAGES):
            coming = first + stage + 1 if stage + 1 < STAGES else first + num_warps * STAGES
            x_later = _load_x(x_ptr, x_at, coming, own_x, odd, units, COUNT, BITS, WIDE)
            acc = _multiply(acc, ahead[stage], x, pick, KIND, BLOCKS, COUNT)
            unit = first + stage + num_warps * STAGES
            later = later + (_load_weights(words_ptr, places, rows, unit, units, BLOCKS, BITS),)
            x = x_later
        ahead = later

    stored: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [1, num_warps], [0, 1])
    lane = gl.arange(0, 32, gl.SliceLayout(1, stored))[:, None]
    number = gl.arange(0, 4, gl.SliceLayout(0, stored))[None, :]
    for block in gl.static_range(BLOCKS):
        n = first_row + 16 * block + lane // 4 + number // 2 * 8
        for eight in gl.static_range(COUNT // 8):
            sums = acc[block][eight]
            y = gl.convert_layout(_total(sums[0], sums[1], sums[2], sums[3]), stored)
            m = 8 * eight + lane % 4 * 2 + number % 2
            if BITS == 8:
                y = y.to(gl.float32) * gl.load(x_scales_ptr + m, mask=m < M, other=0.0)
                y *= gl.load(scales_ptr + n)
            if HAS_BIAS:
                y += gl.load(bias_ptr + n).to(gl.float32)
            gl.store(out_ptr + (m * N + n), y.to(out_ptr.dtype.element_ty), mask=m < M)
