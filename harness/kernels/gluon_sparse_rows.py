"""A few rows times a 2:4 matrix as cuSPARSELt holds it, on sparse tensor cores.

The library pads one row to eight and takes longer for it than a dense product; its form can be read directly
(`harness.kernels.sparse_rows` says where it has what). Memory delivers each value and each byte of metadata
once, and nothing is unpacked:

- *Values are an operand as they lie.* A thread's 16 bytes of a row, four groups of two values, are four
  registers of ``mma.sp.m16n8k32``, two for each of two instructions, if groups are numbered accordingly. A
  sum does not mind the order of its columns.
- *Metadata takes six operations for both instructions.* Each instruction reads a register of two threads of
  four, and which two can be said: so two threads make the register of the first and the others that of the
  second. A byte of the library's is two rows; an instruction wants four groups of one row together.
- *x comes from the first-level cache*, into the other operand directly.

Every warp has columns of its own and goes through them alone; what it needs later is on its way meanwhile. At
the end the sums of the warps are added up in a fixed order.

The language is Gluon, Triton's own for explicit layouts; it has no sparse product, so that is assembly, of
which one element of a tensor is the register of one thread.
"""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false
# mypy: disable-error-code="assignment,var-annotated"
# ruff: noqa: RUF005 (the language adds tuples, it does not unpack into them)

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
def _vectors(warps):
    """Four neighbours a thread: [warps, 32, 4]."""
    lanes = [[0, i, 0] for i in powers(32)]
    return gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2]], lanes, [[i, 0, 0] for i in powers(warps)], [], [warps, 32, 4]
    )


@gluon.constexpr_function
def _product(is_bfloat16, half):
    """``mma.sp``: a tile of 16 x 32 times 32 x 8, with the metadata that threads 0 and 1 of four hold
    (`half` 0), or 2 and 3."""
    kind = "bf16" if is_bfloat16 else "f16"
    return (
        f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9, $10, $11}, {$12, $13, $14, $15}, $16, "
        f"0x{half};"
    )


@gluon.jit
def _words_of(vectors):
    """The four words of each thread, [warps, 32] each; nothing moves."""
    warps: gl.constexpr = vectors.shape[0]
    layout: gl.constexpr = _threads(warps)
    even, odd = gl.split(vectors.reshape([warps, 32, 2, 2]))
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
        gl.convert_layout(third, layout, assert_trivial=True),
        gl.convert_layout(fourth, layout, assert_trivial=True),
    )


@gluon.jit
def _load_weights(words_ptr, values_at, meta_at, rows, unit, own, own_rows, units, BLOCKS: gl.constexpr):
    """64 columns for each warp: of each block of 16 rows the values of its upper and its lower half
    [warps, 32, 4] and two words of metadata; zeros beyond the last column. An address is a number that all
    threads share and an offset that stays."""
    inside = unit + own < units
    inside_rows = (unit + own_rows < units)[:, :, None]
    found = ()
    for block in gl.static_range(BLOCKS):
        first_row, first_meta = rows[block]
        upper = words_ptr + (first_row * 16 * units + unit * 16)
        lower = words_ptr + ((first_row + 8) * 16 * units + unit * 16)
        meta = words_ptr + (first_meta + unit * 128)
        # Read once: what is to stay in the cache is x.
        found = found + (
            (
                gl.load(upper + values_at, mask=inside_rows, other=0, eviction_policy="evict_first"),
                gl.load(lower + values_at, mask=inside_rows, other=0, eviction_policy="evict_first"),
                gl.load(meta + meta_at, mask=inside, other=0, eviction_policy="evict_first"),
                gl.load(meta + meta_at + 64, mask=inside, other=0, eviction_policy="evict_first"),
            ),
        )
    return found


@gluon.jit
def _load_x(x_ptr, x_at, unit, own, units, COUNT: gl.constexpr):
    """For 64 columns of each warp the registers of the second operands: for each eight rows of x and each
    of the two instructions four words, [warps, 32] each.
    """
    inside = unit + own < units
    start = x_ptr + unit * 32
    found = ()
    for eight in gl.static_range(COUNT // 8):
        at = start + x_at[eight]
        found = found + ((_load_operand(at, inside, 0), _load_operand(at, inside, 4)),)
    return found


@gluon.jit
def _load_operand(at, inside, WORD: gl.constexpr):
    """Of four groups one pair each; threads next to each other have both pairs of a group."""
    return (
        gl.load(at + WORD, mask=inside, other=0),
        gl.load(at + (WORD + 16), mask=inside, other=0),
        gl.load(at + (WORD + 2), mask=inside, other=0),
        gl.load(at + (WORD + 18), mask=inside, other=0),
    )


@gluon.jit
def _metadata(first, second, pick):
    """From two words of bytes, each with a group of one row in its low bits and of the row eight below in
    its high bits, four groups of the one row below four of the other."""
    bytes_ = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", [first, second, pick], gl.int32, True, 1
    )
    OUTER: gl.constexpr = 0xF00FF00F - (1 << 32)
    swapped = (bytes_ & OUTER) | ((bytes_ << 4) & 0x0F000F00) | ((bytes_ >> 4) & 0x00F000F0)
    return gl.inline_asm_elementwise("prmt.b32 $0, $1, $1, 0x3120;", "=r,r", [swapped], gl.int32, True, 1)


@gluon.jit
def _multiply(acc, weights, x, pick, IS_BFLOAT16: gl.constexpr, BLOCKS: gl.constexpr, COUNT: gl.constexpr):
    """The sums of `acc` and of the products of 64 columns: four of each block and eight rows of x."""
    FLOATS: gl.constexpr = (gl.float32, gl.float32, gl.float32, gl.float32)
    CONSTRAINTS: gl.constexpr = "=f,=f,=f,=f,r,r,r,r,r,r,r,r,f,f,f,f,r"
    found = ()
    for block in gl.static_range(BLOCKS):
        upper, lower, first, second = weights[block]
        upper, lower = _words_of(upper), _words_of(lower)
        meta = _metadata(first, second, pick)
        of_block = ()
        for eight in gl.static_range(COUNT // 8):
            sums = acc[block][eight]
            for half in gl.static_range(2):
                b = x[eight][half]
                sums = gl.inline_asm_elementwise(
                    _product(IS_BFLOAT16, half),
                    CONSTRAINTS,
                    [
                        upper[2 * half], lower[2 * half], upper[2 * half + 1], lower[2 * half + 1],
                        b[0], b[1], b[2], b[3], sums[0], sums[1], sums[2], sums[3], meta,
                    ],
                    FLOATS, True, 1,
                )  # fmt: skip
            of_block = of_block + (sums,)
        found = found + (of_block,)
    return found


@gluon.jit
def _zeros(BLOCKS: gl.constexpr, COUNT: gl.constexpr, num_warps: gl.constexpr):
    """The sums of nothing: for each block and eight rows of x four of each thread."""
    zero = gl.zeros([num_warps, 32], gl.float32, _threads(num_warps))
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
    x_ptr, words_ptr, bias_ptr, out_ptr, M, N, x_stride, units,
    BLOCKS: gl.constexpr, COUNT: gl.constexpr, STAGES: gl.constexpr, HAS_BIAS: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """``x W^T + bias`` [M, N] for x [M, 64 * units] in a 16-bit type and W in cuSPARSELt's form, int32 words.

    A program has 16 * BLOCKS rows of W (1, 2 or 4 blocks; N a multiple of 64) and all columns. COUNT: 8 or
    16, at least M. STAGES: times 64 columns that a warp has on their way. `x_stride`: even.
    """
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    threads: gl.constexpr = _threads(num_warps)
    vectors: gl.constexpr = _vectors(num_warps)
    value_rows: gl.constexpr = gl.SliceLayout(2, vectors)

    # A warp's units are neighbours: a line of memory is read by one warp, all of it at once.
    warp = gl.arange(0, num_warps, gl.SliceLayout(1, value_rows))
    lane = gl.arange(0, 32, gl.SliceLayout(0, value_rows))
    own_rows = (STAGES * warp)[:, None] + (lane * 0)[None, :]
    values_at = own_rows * 16 + (lane // 4 * (16 * units) + lane % 4 * 4)[None, :]
    word = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, vectors)))
    values_at = values_at[:, :, None] + word[None, None, :]

    warp = gl.arange(0, num_warps, gl.SliceLayout(1, threads))
    lane = gl.arange(0, 32, gl.SliceLayout(0, threads))
    own = (STAGES * warp)[:, None] + (lane * 0)[None, :]
    meta_at = own * 128 + (lane // 4 * 2 + lane % 4 // 2)[None, :]
    pick = own * 0 + gl.where(lane % 2 == 0, 0x5410, 0x7632)[None, :]
    x_words = x_ptr.to(gl.pointer_type(gl.int32), bitcast=True)
    x_at = ()
    for eight in gl.static_range(COUNT // 8):
        # Rows that are not there are the last one again, and not stored.
        m = gl.minimum(lane // 4 + 8 * eight, M - 1)
        x_at = x_at + (own * 32 + (m * (x_stride // 2) + lane % 4 // 2 * 8 + lane % 2)[None, :],)
    rows = ()
    first_row = gl.program_id(0) * (16 * BLOCKS)
    for block in gl.static_range(BLOCKS):
        row = first_row + 16 * block
        # Values are 16 words for 64 columns of a row, metadata 128 for 64 columns of 64 rows.
        rows = rows + ((row, N * 16 * units + row // 64 * (128 * units) + row % 64),)

    ahead = ()
    for stage in gl.static_range(STAGES):
        ahead = ahead + (
            _load_weights(words_ptr, values_at, meta_at, rows, stage, own, own_rows, units, BLOCKS),
        )
    x = _load_x(x_words, x_at, 0, own, units, COUNT)
    acc = _zeros(BLOCKS, COUNT, num_warps)
    for first in range(0, units, num_warps * STAGES):
        later = ()
        for stage in gl.static_range(STAGES):
            coming = first + stage + 1 if stage + 1 < STAGES else first + num_warps * STAGES
            x_later = _load_x(x_words, x_at, coming, own, units, COUNT)
            acc = _multiply(acc, ahead[stage], x, pick, dtype == gl.bfloat16, BLOCKS, COUNT)
            unit = first + stage + num_warps * STAGES
            later = later + (
                _load_weights(words_ptr, values_at, meta_at, rows, unit, own, own_rows, units, BLOCKS),
            )
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
            if HAS_BIAS:
                y += gl.load(bias_ptr + n).to(gl.float32)
            gl.store(out_ptr + (m * N + n), y.to(dtype), mask=m < M)
