"""A stored matrix as the weight-only kernels read it: integers on a grid, or places in a table."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from harness.nn.packing import PLANES, PackedWeight

__all__ = ["Form", "StoredMatrix", "stored"]


@dataclass(frozen=True, slots=True)
class Form:
    """What the choice of a kernel looks at: shapes and types, never values.

    Args:
        bits: of a code: 2, 3, 4 or 8.
        is_table: a code is a place in a table; else an integer on a grid.
        has_float_zeros: zero points are floating-point numbers (HQQ).
        has_outliers: single weights are not what their code says (GOBO).
        tile: columns of a tile. group_columns: columns that share a scale; all of them without groups.
        columns: stored columns, padding included. out_features: rows of the matrix.
    """

    bits: int
    is_table: bool
    has_float_zeros: bool
    has_outliers: bool
    tile: int
    group_columns: int
    columns: int
    out_features: int

    @property
    def fits(self) -> bool:
        """Whether kernels can read it: whole 32-bit words of one group."""
        whole_words = all(self.tile * width % 32 == 0 for width in PLANES[self.bits])
        return whole_words and self.group_columns % self.tile == 0


@dataclass(frozen=True, slots=True)
class StoredMatrix:
    """A matrix [out, in] whose values are ``scale * (code - zero)`` or ``scale * table[code]``.

    Args:
        codes: uint8 [tiles, out, bytes], as `harness.nn.packing.pack_matrix` makes them.
        scales: [groups, out], or [1, 1] per tensor; int8 with `steps` and `mean`; None: 1.
        zeros: uint8 [groups, bytes] packed along out, or a floating type [groups, out]; None where symmetric.
        table: float32 [2^bits], or None for integers on a grid.
        steps, mean: of 8-bit scales, as in `harness.nn.codebook_weight.ScaleCodes`.
        outlier_index, outlier_values: as in `harness.nn.codebook_weight.Outliers`.
        group_columns: columns per scale, never -1.
    """

    codes: torch.Tensor
    bits: int
    tile: int
    group_columns: int
    in_features: int
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None
    table: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    mean: torch.Tensor | None = None
    outlier_index: torch.Tensor | None = None
    outlier_values: torch.Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.codes.shape[1]

    @property
    def columns(self) -> int:
        """The stored columns: `in_features` and padding."""
        return self.codes.shape[0] * self.tile

    @property
    def form(self) -> Form:
        return Form(
            self.bits,
            self.table is not None,
            self.zeros is not None and self.zeros.is_floating_point(),
            self.outlier_index is not None,
            self.tile,
            self.group_columns,
            self.columns,
            self.out_features,
        )


def stored(weight: PackedWeight) -> StoredMatrix:
    """A packed weight on a grid as kernels read it; nothing is copied."""
    return StoredMatrix(
        weight.codes,
        weight.bits,
        weight.tile,
        weight.group_columns,
        weight.in_features,
        weight.scales,
        weight.zeros,
    )
