"""The launches that ``python -m harness.kernels.tune`` tries, best guesses first."""

from __future__ import annotations

from dataclasses import replace

from harness.kernels.selection import WRITING, Launch, Writing, select, takes_matrix, takes_vector
from harness.kernels.stored import Form

__all__ = ["MOST_FUSED_ROWS", "WRITINGS", "candidates"]

MOST_FUSED_ROWS = 2048
"""Beyond so many rows writing the matrix out costs under a tenth of a library product."""

WRITINGS = (
    WRITING,
    Writing(64),
    Writing(64, warps=8),
    Writing(16, warps=4),
    Writing(32, words=32, warps=8),
    Writing(128, warps=8),
)
"""Ways to write a matrix out, today's first."""

_WIDE = (
    Launch("wide", 8, words=512, warps=4),
    Launch("wide", 8, words=256, warps=2),
    Launch("wide", 16, words=256, warps=2),
    Launch("wide", 4, words=512, warps=4),
    Launch("wide", 8, words=512, warps=8),
    Launch("wide", 16, words=128, warps=1),
    Launch("wide", 8, words=128, warps=1),
    Launch("wide", 16, words=512, warps=8),
)
_VECTOR = (
    Launch("vector", 16, stages=4),
    Launch("vector", 16, stages=2),
    Launch("vector", 16, warps=8, stages=2),
    Launch("vector", 16, warps=8, stages=4),
    Launch("vector", 16, warps=2, stages=4),
    Launch("vector", 32, stages=2),
)
_ROWS_TOGETHER = (
    Launch("few", 16, 16, stages=2),
    Launch("few", 16, 16, stages=4),
    Launch("few", 16, 16, warps=8, stages=2),
    Launch("few", 32, 16, stages=2),
    Launch("few", 32, 16, warps=8, stages=1),
)
_MATRIX = (
    Launch("matrix", 128, 256, warps=8, stages=6),
    Launch("matrix", 128, 128, warps=8, stages=4),
    Launch("matrix", 128, 64, warps=8, stages=8),
    Launch("matrix", 256, 64, warps=8, stages=6),
    Launch("matrix", 256, 32, warps=8, stages=8),
    Launch("matrix", 128, 32, warps=8, stages=12),
)
_GEMV = (
    Launch("gemv", 64, warps=2, programs=16),
    Launch("gemv", 32, warps=1, programs=16),
    Launch("gemv", 128, warps=4, programs=4),
    Launch("gemv", 64, warps=4, programs=8),
)
_FEW = (
    Launch("fused", 64, 16, programs=2, stages=4),
    Launch("fused", 64, 16, programs=4, stages=4),
    Launch("fused", 64, 16, programs=1, stages=5),
    Launch("fused", 64, 16, programs=4, stages=2),
    Launch("fused", 64, 16, programs=4, sums=False),
    Launch("fused", 64, 16, programs=8),
    Launch("fused", 128, 16, programs=2, warps=4),
    Launch("fused", 128, 16, programs=2, warps=8),
    Launch("fused", 64, 16, programs=4, stages=1),
)
_MANY = (
    Launch("fused", 128, 128, programs=1, warps=8, sums=False),
    Launch("fused", 128, 256, programs=1, warps=8, sums=False, stages=2),
    Launch("fused", 128, 128, programs=1, warps=8, sums=False, stages=2),
    Launch("fused", 64, 256, programs=1, warps=4, sums=False, stages=2),
    Launch("fused", 128, 128, programs=1, warps=4, sums=False),
    Launch("fused", 256, 128, programs=1, warps=8, sums=False),
    Launch("fused", 64, 128, programs=2, warps=4, sums=False),
    Launch("fused", 128, 64, programs=2, warps=4, sums=False),
    Launch("fused", 128, 128, programs=1, warps=8, stages=2),
)


def candidates(form: Form, rows: int) -> list[Launch]:
    """Launches for so many rows of bfloat16, today's choice first, each once.

    Kernels that cannot read the matrix are left out; whether a launch compiles and fits the device is
    found out by trying.
    """
    found: list[Launch] = []
    chosen = select(form, rows, 16)
    if chosen is not None:
        found.append(chosen)
    if rows == 1:
        vector = takes_vector(form)
        found += [*_VECTOR, *_WIDE[:4]] if vector else () if form.is_table else _WIDE
        found += [*_GEMV, *(() if form.has_outliers else _FEW[:2])]
    elif not form.has_outliers and rows <= MOST_FUSED_ROWS:
        found += _some(form, rows)
    return [launch for place, launch in enumerate(found) if launch not in found[:place]]


def _some(form: Form, rows: int) -> list[Launch]:
    matrix = _MATRIX if takes_matrix(form) and rows > 16 else ()
    if rows > 64:
        return [*matrix, *_MANY[:7]] if matrix else list(_MANY)
    block_m = 16 if rows <= 16 else 32 if rows <= 32 else 64
    found = [replace(launch, block_m=block_m) for launch in _FEW]
    if not form.is_table and not form.has_float_zeros and form.bits != 3:
        found.append(Launch("small", 64, 64))
    if block_m <= 32 and takes_vector(form):
        together = _ROWS_TOGETHER if rows <= 16 else _ROWS_TOGETHER[:3]
        found = [*(replace(launch, block_m=block_m) for launch in together), *found]
    if block_m == 64:
        found += [Launch("fused", 128, 64, programs=2, warps=8, sums=False), _MANY[6]]
    return [*(launch for launch in matrix if launch.block_m <= block_m), *found]
