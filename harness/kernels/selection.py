"""Which kernel multiplies with a stored matrix, and how it is launched: constants and a pure function.

`RULES` is the one table to change after ``python -m harness.kernels.tune`` has measured a device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from harness.kernels.stored import Form
from harness.nn.packing import PLANES

__all__ = [
    "MOST_MATRICES",
    "RULES",
    "SHARING",
    "WRITING",
    "Launch",
    "Rule",
    "Writing",
    "rows_per_program",
    "select",
    "split_blocks",
    "takes_matrix",
    "takes_vector",
    "tiles_abreast",
    "tiles_per_step",
]

Kernel = Literal["gemv", "wide", "vector", "few", "small", "fused", "matrix"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One way to launch a kernel.

    Args:
        block_n: rows of the matrix a program. block_m: rows of activations a program, at most; 1 for gemv,
            wide and vector.
        words: 32-bit words of every matrix row a step. Of three bits those of the low plane.
        programs: for each multiprocessor; the columns are split until there are so many (not *matrix*: see
            `split_blocks`).
        stages: steps whose words are on their way at once; of *vector* and *few* for each warp, a power of
            two; of *matrix* halves of tiles of x in shared memory, two or more.
        sums: *fused* only: the scale is applied to the sum of a group, where a step is inside one.
    """

    kernel: Kernel
    block_n: int
    block_m: int = 1
    words: int = 16
    programs: int = 8
    warps: int = 4
    stages: int = 3
    sums: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """`launch` is for these bits, up to so many rows.

    Args:
        table: for places in a table, or for integers on a grid.
        activation_bits: of the types it is for.
        least_out: rows of the matrix, or of all that share the launch.
    """

    bits: tuple[int, ...]
    up_to: int
    launch: Launch
    table: bool = False
    activation_bits: tuple[int, ...] = (16,)
    least_out: int = 0


@dataclass(frozen=True, slots=True)
class Writing:
    """How a matrix is written out: rows and words of each row a program, and its warps."""

    block_n: int
    words: int = 16
    warps: int = 4


_ALL = tuple(PLANES)
MOST_MATRICES = 3
"""Matrices that share a launch of *vector*, *few* or *matrix*, or of *2:4 few*."""
SHARING = ("vector", "few", "matrix")
"""Kernels that multiply several matrices in one launch."""
# Of *matrix*, in steps of a program: its start and end, waiting for others, and programs whose sums are added
# up in one.
_AROUND, _ADDING, _ADDED = 5, 3, 64
_MOST_SPLITS = 16
_LEAST_WEIGHTS = 1 << 23  # of *matrix*: with twice as many it gains a tenth at 512 rows, with few it loses
_MOST_COLUMNS = 1 << 15  # of *vector*: 64 KiB of shared memory

WRITING = Writing(block_n=32)
"""For every matrix that is written out in full precision."""

RULES: tuple[Rule, ...] = (
    # Integers on a grid. One row: nothing is added up twice. Of many programs each needs less on its way.
    Rule((4,), 1, Launch("vector", block_n=16, stages=2), least_out=8192),
    Rule((2, 3, 4), 1, Launch("vector", block_n=16, stages=4)),
    Rule(_ALL, 1, Launch("wide", block_n=8, words=256, warps=2), activation_bits=(16, 32)),
    # A few rows: unpacked once for all of them, until reading x again for every 16 rows takes the time.
    Rule((4,), 16, Launch("few", block_n=32, block_m=16, stages=2), least_out=8192),
    Rule((4,), 8, Launch("few", block_n=16, block_m=16, stages=4)),
    Rule((3,), 16, Launch("fused", block_n=128, block_m=16, programs=2)),
    Rule(_ALL, 16, Launch("fused", block_n=64, block_m=16, programs=4)),
    # On Hopper: the more rows a block of x has, the less is unpacked for each product. Where rows of the
    # matrix are few, narrow blocks of them are more programs; where they are many, these fill the device
    # more evenly.
    Rule((4,), 32, Launch("matrix", block_n=128, block_m=32, warps=8, stages=12), least_out=16384),
    Rule((4,), 32, Launch("matrix", block_n=256, block_m=32, warps=8, stages=8), least_out=8192),
    Rule((4,), 32, Launch("matrix", block_n=128, block_m=32, warps=8, stages=12)),
    Rule((4,), 64, Launch("matrix", block_n=128, block_m=64, warps=8, stages=8), least_out=16384),
    Rule((4,), 64, Launch("matrix", block_n=256, block_m=64, warps=8, stages=6), least_out=8192),
    Rule((4,), 64, Launch("matrix", block_n=128, block_m=64, warps=8, stages=8)),
    Rule((4,), 128, Launch("matrix", block_n=128, block_m=128, warps=8, stages=4)),
    Rule((4,), 4096, Launch("matrix", block_n=128, block_m=256, warps=8, stages=6), least_out=8192),
    Rule((4,), 3072, Launch("matrix", block_n=128, block_m=256, warps=8, stages=6)),
    Rule(_ALL, 32, Launch("fused", block_n=64, block_m=32, programs=4)),
    Rule((4,), 64, Launch("fused", block_n=128, block_m=64, programs=2)),
    Rule((3,), 64, Launch("fused", block_n=128, block_m=64, programs=2, warps=8)),
    Rule(_ALL, 64, Launch("fused", block_n=64, block_m=64, programs=2)),
    # From here on arithmetic counts: a tile of weights is unpacked once for 128 rows. Beyond 128 rows
    # writing the matrix takes less time than what a library product is ahead of these by.
    Rule((4,), 128, Launch("fused", block_n=256, block_m=128, programs=1, warps=8, sums=False)),
    Rule((8,), 128, Launch("fused", block_n=128, block_m=128, programs=1, warps=8, sums=False)),
    # Narrow fields take more slices of x a step, and shared memory for them.
    Rule((2, 3), 128, Launch("fused", block_n=128, block_m=128, programs=1, warps=8, stages=2, sums=False)),
    # float32 activations have no tensor cores that are exact.
    Rule((2, 4, 8), 64, Launch("small", block_n=64, block_m=64), activation_bits=(32,)),
    # Places in a table are looked up one by one, so they are worth it for few rows only.
    Rule(_ALL, 1, Launch("gemv", block_n=32, warps=4), table=True, activation_bits=(16, 32)),
    Rule(_ALL, 16, Launch("fused", block_n=64, block_m=16, programs=4), table=True),
)
"""The first that fits is taken; where none does, the matrix is written out and multiplied by the library."""


def select(
    form: Form, rows: int, activation_bits: int, *, vector: bool = True, matrix: bool = True
) -> Launch | None:
    """How to multiply so many rows with such a matrix; None: write it out in full precision first.

    Args:
        vector: whether the device runs *vector* and *few*.
        matrix: whether it runs *matrix*.
    """
    if not form.fits:
        return None
    for rule in RULES:
        if (
            rows <= rule.up_to
            and form.out_features >= rule.least_out
            and form.bits in rule.bits
            and form.is_table == rule.table
            and activation_bits in rule.activation_bits
            and not (rule.launch.kernel == "small" and form.has_float_zeros)
            and not (rule.launch.kernel == "wide" and form.is_table)
            and not (rule.launch.kernel in ("vector", "few") and not (vector and takes_vector(form)))
            and not (rule.launch.kernel == "matrix" and not (matrix and _gains_by_matrix(form)))
            and not (rule.launch.kernel != "gemv" and form.has_outliers)
        ):
            return rule.launch
    return None


def takes_vector(form: Form) -> bool:
    """Whether *vector* and *few* read such a matrix: a tile must fill an operand of a tensor core, with two
    fields of every word, and a row of activations must fit into shared memory."""
    words = form.tile * PLANES[form.bits][0] // 32
    return (
        form.bits in (2, 3, 4)
        and not form.is_table
        and not form.has_float_zeros
        and not form.has_outliers
        and words in (8, 16)
        and form.columns <= _MOST_COLUMNS
    )


def takes_matrix(form: Form) -> bool:
    """Whether *matrix* reads such a matrix: each field of a tile's row is what one instruction sums over."""
    return (
        form.bits == 4
        and form.tile == 128
        and not form.is_table
        and not form.has_float_zeros
        and not form.has_outliers
    )


def _gains_by_matrix(form: Form) -> bool:
    """Of small matrices the start and the end of a program are most of its time."""
    return takes_matrix(form) and form.columns * form.out_features >= _LEAST_WEIGHTS


def split_blocks(blocks: int, tiles: int, processors: int) -> tuple[int, int]:
    """Blocks of a result that get one program of *matrix* each, and the programs for each of the others.

    Programs take turns on the multiprocessors, one on each. The blocks of full turns are not split; those
    that are left would keep a part of the device waiting, so their columns are shared out. On an H200 the
    choice was at most 5 % slower than the best of one to four programs, for Llama-7B's matrices at 32 to
    4096 rows.

    Args:
        tiles: steps of a program that sums over all columns.
    """
    left = blocks % processors

    def steps(splits: int) -> float:
        turns = math.ceil(left * splits / processors)
        adding = _ADDING + left * splits / _ADDED if splits > 1 else 0
        return turns * (math.ceil(tiles / splits) + _AROUND) + adding

    splits = min(range(1, min(_MOST_SPLITS, tiles) + 1), key=steps)
    splits = math.ceil(tiles / math.ceil(tiles / splits))  # none without a tile
    return (blocks - left, splits) if splits > 1 else (blocks, 1)


def tiles_per_step(form: Form, words: int, least: int = 1) -> int:
    """Tiles a step for so many words of a row, at least `least` words in all; a power of two.

    A step stays inside one group where `least` lets it. Three bits take one tile: the high words then have
    the same layout in registers as the low ones.
    """
    per_tile = form.tile * PLANES[form.bits][0] // 32
    chunk = 1
    while chunk * per_tile < words and form.bits != 3 and form.group_columns % (2 * chunk * form.tile) == 0:
        chunk *= 2
    while chunk * per_tile < least:
        chunk *= 2
    return chunk


def tiles_abreast(form: Form, words: int) -> int:
    """Tiles a step of *wide*: a power of two, no more than the matrix needs, across groups."""
    per_tile = form.tile * PLANES[form.bits][0] // 32
    chunk = 1
    while 2 * chunk * per_tile <= words and chunk * form.tile < form.columns:
        chunk *= 2
    return chunk


def rows_per_program(form: Form, launch: Launch, chunk: int) -> int:
    """Rows of the matrix a program of *gemv*: more than `block_n` where steps are narrower than `words`."""
    narrower = launch.words * 32 // (chunk * form.tile * PLANES[form.bits][0])
    return min(256, launch.block_n * max(1, narrower))
