"""Packing of 2-, 3-, 4- and 8-bit codes into bytes: how many bytes a quantized matrix really takes.

Two layouts, both exact and without waste:

- *rows* (zero points): fields in their natural order, the first in the low bits of the first byte;
- *tiles* (matrices): the input columns are cut into tiles, stored ``[tiles, out, bytes]``, so that the
  programs of a kernel, which take some rows of one tile after the other, read contiguous memory.
  Inside a row of a tile the fields lie in words of 32 bits (16 or 8 where a tile is too narrow), and
  field `i` of word `j` is column ``i * words + j``: unpacking one field of neighbouring words gives
  neighbouring columns.

Three bits are a plane of two (the low ones) followed by a plane of one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from harness.nn.quantizer import QuantizedWeight

__all__ = [
    "PLANES",
    "PackedWeight",
    "choose_tile",
    "pack_matrix",
    "pack_rows",
    "pack_weight",
    "packed_columns",
    "unpack_matrix",
    "unpack_rows",
    "unpack_weight",
    "word_bits",
]

PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""The widths of the planes that hold a code of so many bits, low bits first."""

_TILES = (128, 64, 32, 16, 8)
_Unpack = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized matrix [out, in] as it is stored and as kernels read it.

    Args:
        codes: uint8 [tiles, out, bytes], as `pack_matrix` makes them.
        scales: [groups, out], or [1, 1] for one scale per tensor.
        zeros: uint8 [groups, bytes] (`pack_rows` along out), or None where symmetric; floating-point
            zero points are not packed: [groups, out].
        group_size: columns per scale, or -1 for one group of all columns.
        tile: columns per tile.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    group_size: int
    tile: int
    in_features: int
    out_features: int

    @property
    def columns(self) -> int:
        """The stored columns: `in_features` and padding."""
        return self.codes.shape[0] * self.tile

    @property
    def group_columns(self) -> int:
        """Columns per scale, never -1."""
        return self.columns if self.group_size == -1 else self.group_size


def pack_weight(weight: QuantizedWeight) -> PackedWeight:
    """Pack codes, scales and zero points; `order`, if any, stays with the caller."""
    out, columns = weight.codes.shape
    tile = choose_tile(columns, weight.group_size)
    codes = pack_matrix(weight.codes, weight.bits, tile)
    zeros = None
    if weight.zero is not None:
        zeros = weight.zero.t().contiguous()
        zeros = zeros if zeros.is_floating_point() else pack_rows(zeros, weight.bits)
    scales = weight.scale.t().contiguous()
    return PackedWeight(codes, scales, zeros, weight.bits, weight.group_size, tile, weight.in_features, out)


def unpack_weight(packed: PackedWeight) -> QuantizedWeight:
    """The inverse of `pack_weight`, but for padding beyond whole groups."""
    groups, rows = packed.scales.shape
    codes = unpack_matrix(packed.codes, packed.bits, packed.tile)
    if packed.group_size > 0:
        codes = codes[:, : groups * packed.group_size]
    zero = None
    if packed.zeros is not None:
        is_packed = not packed.zeros.is_floating_point()
        zero = (unpack_rows(packed.zeros, packed.bits, rows) if is_packed else packed.zeros).t()
    return QuantizedWeight(
        codes.contiguous(),
        packed.scales.t(),
        zero,
        packed.bits,
        packed.group_size,
        packed.in_features,
    )


def packed_columns(columns: int) -> int:
    """The columns that are stored for so many: the next multiple of 8."""
    return columns + -columns % 8


def choose_tile(columns: int, group_size: int) -> int:
    """The widest tile that divides the stored columns and, where it can, does not straddle groups."""
    unit = group_size if group_size > 0 and group_size % 8 == 0 else packed_columns(columns)
    return next(tile for tile in _TILES if unit % tile == 0)


def word_bits(tile: int, width: int) -> int:
    """The bits of a word in a plane of fields of `width` bits."""
    return next(bits for bits in (32, 16, 8) if tile * width % bits == 0)


def pack_rows(fields: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack uint8 [..., n] in natural order into uint8 [..., ceil(n / 8) * bits]."""
    fields = _pad_last(fields)
    return torch.cat([_pack_plane(plane, width) for plane, width in _planes(fields, bits)], -1)


def unpack_rows(packed: torch.Tensor, bits: int, n: int) -> torch.Tensor:
    """The inverse of `pack_rows`: uint8 [..., n]."""
    return _join_planes(packed, bits, _unpack_plane)[..., :n]


def pack_matrix(codes: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """Pack uint8 [out, columns] into uint8 [columns / tile, out, tile * bits / 8].

    Columns are first padded with zero codes to a multiple of 8.
    """
    codes = _pad_last(codes)
    out, columns = codes.shape
    tiles = codes.view(out, columns // tile, tile).transpose(0, 1)  # [tiles, out, tile]
    packed = []
    for plane, width in _planes(tiles, bits):
        fields = word_bits(tile, width) // width
        words = plane.reshape(*plane.shape[:-1], fields, tile // fields).transpose(-1, -2)
        packed.append(_pack_plane(words.flatten(-2), width))
    return torch.cat(packed, -1).contiguous()


def unpack_matrix(packed: torch.Tensor, bits: int, tile: int) -> torch.Tensor:
    """The inverse of `pack_matrix`: uint8 [out, columns], padding included."""

    def unpack(plane: torch.Tensor, width: int) -> torch.Tensor:
        fields = word_bits(tile, width) // width
        flat = _unpack_plane(plane, width)
        words = flat.view(*flat.shape[:-1], tile // fields, fields)
        return words.transpose(-1, -2).flatten(-2)

    tiles = _join_planes(packed, bits, unpack)  # [tiles, out, tile]
    return tiles.transpose(0, 1).reshape(tiles.shape[1], tiles.shape[0] * tile)


def _pad_last(fields: torch.Tensor) -> torch.Tensor:
    missing = -fields.shape[-1] % 8
    return torch.nn.functional.pad(fields, (0, missing)) if missing else fields


def _planes(fields: torch.Tensor, bits: int) -> list[tuple[torch.Tensor, int]]:
    planes, shift = [], 0
    for width in PLANES[bits]:
        planes.append(((fields >> shift) & (2**width - 1), width))
        shift += width
    return planes


def _join_planes(packed: torch.Tensor, bits: int, unpack: _Unpack) -> torch.Tensor:
    sizes = [packed.shape[-1] * width // bits for width in PLANES[bits]]
    joined, shift = None, 0
    for plane, width in zip(packed.split(sizes, -1), PLANES[bits], strict=True):
        fields = unpack(plane, width) << shift
        joined = fields if joined is None else joined | fields
        shift += width
    assert joined is not None
    return joined


def _pack_plane(fields: torch.Tensor, width: int) -> torch.Tensor:
    per_byte = 8 // width
    parts: torch.Tensor = fields.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for index in range(1, per_byte):
        packed |= parts[..., index] << (index * width)
    return packed


def _unpack_plane(packed: torch.Tensor, width: int) -> torch.Tensor:
    if width == 8:
        return packed
    mask = 2**width - 1
    parts = [(packed >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(parts, -1).flatten(-2)
