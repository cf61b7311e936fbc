"""How the int8 products are launched: by the sizes of the operands alone, from one table.

`python -m harness.kernels.tune_int8` times the alternatives on a device and prints what to put here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = [
    "ALIGNMENT",
    "FULL",
    "PACKED_ROWS",
    "ROUND_IN_GEMV",
    "Launch",
    "choose",
    "choose_float8",
    "choose_packed",
    "programs",
]

Kind = Literal["gemv", "dot", "tma"]

ALIGNMENT = 16
"""What the columns must be divisible by for rows of codes to be read 16 bytes at a time."""
FULL = 132
"""Programs from which on a tile is wide enough: one for each processor of an H100 or H200."""
ROUND_IN_GEMV = True
"""One row of floats is rounded by the programs that multiply it, and not by a launch before them."""
PACKED_ROWS = 64
"""Beyond so many rows weights of fewer bits are unpacked once, before the product, and not inside it."""


@dataclass(frozen=True, slots=True)
class Launch:
    """How one product of int8 [rows, in] and int8 [out, in] is launched.

    Args:
        kind: ``gemv`` multiplies one row; ``dot`` reads its operands through pointers; ``tma`` through
            the copy engine of Hopper, with programs that stay and take one tile after the other.
        m, n, k: rows, outputs and columns that a program holds at a time.
        warps, stages: of the program and of its pipeline of loads.
        split: programs that share the columns of one tile; their sums are added up by a second launch.
        group: row blocks that neighbouring programs walk through before the next outputs.
    """

    kind: Kind
    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: int = 1
    group: int = 8


_GEMV = Launch("gemv", 1, 8, 1024, 4, 1)

_DOT: tuple[tuple[int | None, tuple[Launch, ...]], ...] = (
    (16, (Launch("dot", 16, 32, 256, 4, 5),)),
    (32, (Launch("dot", 32, 64, 256, 4, 4), Launch("dot", 32, 32, 256, 4, 5))),
    (64, (Launch("dot", 64, 64, 128, 4, 4), Launch("dot", 64, 32, 128, 4, 5))),
    (128, (Launch("dot", 64, 64, 128, 4, 4), Launch("dot", 64, 64, 128, 4, 4, split=2))),
    (512, (Launch("dot", 64, 128, 128, 4, 4), Launch("dot", 64, 64, 128, 4, 4))),
    (None, (Launch("dot", 128, 128, 128, 8, 3), Launch("dot", 64, 128, 128, 4, 4))),
)
"""Up to so many rows: tiles from the widest to the narrowest. The first that fills the device is taken."""

_PACKED_GEMV = Launch("gemv", 1, 64, 1024, 8, 1)
_PACKED: tuple[tuple[int, tuple[Launch, ...]], ...] = (
    (16, (Launch("dot", 16, 128, 256, 4, 3), Launch("dot", 16, 32, 256, 4, 4))),
    (32, (Launch("dot", 32, 64, 256, 4, 3),)),
    (PACKED_ROWS, (Launch("dot", 64, 64, 256, 4, 3),)),
)
_PACKED_FULL = 64
"""As `FULL`, for the products that unpack weights."""

_FLOAT8: tuple[int, Launch] | None = (4096, Launch("tma", 128, 256, 128, 8, 4))
"""From so many rows on, the launch of a float8 product with row scales; None: `torch._scaled_mm` always."""


def programs(launch: Launch, rows: int, out: int) -> int:
    """The tiles of a product, times the programs that share one."""
    return -(-rows // launch.m) * -(-out // launch.n) * launch.split


def choose(rows: int, out: int, columns: int) -> Launch:
    """The launch of a product of 8-bit weights [out, columns] with so many rows."""
    if rows == 1 and columns % ALIGNMENT == 0:
        return _GEMV
    tiles = next(tiles for most, tiles in _DOT if most is None or rows <= most)
    return _widest(tiles, rows, out, FULL)


def _widest(tiles: tuple[Launch, ...], rows: int, out: int, least: int) -> Launch:
    """The first that has so many programs; the last where none has."""
    return next((tile for tile in tiles if programs(tile, rows, out) >= least), tiles[-1])


def choose_packed(rows: int, out: int) -> Launch | None:
    """The launch of a product that unpacks weights of fewer bits; None: they are unpacked before it."""
    if rows == 1:
        return _PACKED_GEMV
    tiles = next((tiles for most, tiles in _PACKED if rows <= most), None)
    return None if tiles is None else _widest(tiles, rows, out, _PACKED_FULL)


def choose_float8(rows: int, columns: int) -> Launch | None:
    """The launch of a float8 product of so many rows and columns; None: that of the library."""
    if _FLOAT8 is None or rows < _FLOAT8[0] or columns % ALIGNMENT:
        return None
    return _FLOAT8[1]
