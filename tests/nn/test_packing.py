"""Packing against a decoder that reads the documented layout bit by bit."""

from __future__ import annotations

import pytest
import torch

from harness.nn.packing import (
    choose_tile,
    pack_matrix,
    pack_rows,
    pack_weight,
    packed_columns,
    unpack_matrix,
    unpack_rows,
    unpack_weight,
    word_bits,
)
from harness.nn.quantizer import quantize_weight

BITS = [2, 3, 4, 8]


def codes_of(bits: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(bits)
    return torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)


def read_field(data: bytes, first_bit: int, width: int) -> int:
    """Bits are counted from the low end of the first byte."""
    return int.from_bytes(data, "little") >> first_bit & ((1 << width) - 1)


def decode_by_hand(packed: torch.Tensor, bits: int, tile: int, row: int, column: int) -> int:
    """One code, straight from the documentation: field i of word j is column i * words + j."""
    data = bytes(packed[column // tile, row].tolist())
    inside, code, plane_start, shift = column % tile, 0, 0, 0
    for width in (2, 1) if bits == 3 else (bits,):
        word = word_bits(tile, width)
        words = tile * width // word
        field, which = divmod(inside, words)
        code |= read_field(data, plane_start * 8 + which * word + field * width, width) << shift
        plane_start += tile * width // 8
        shift += width
    return code


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("out", "columns", "group_size"),
    [(3, 256, 128), (2, 640, 128), (5, 688, 16), (2, 96, 32), (3, 40, -1), (2, 24, 12), (1, 1, -1)],
)
def test_the_layout_is_as_documented(bits, out, columns, group_size):
    codes = codes_of(bits, out, columns)
    tile = choose_tile(columns, group_size)
    packed = pack_matrix(codes, bits, tile)
    stored = packed_columns(columns)
    assert packed.dtype == torch.uint8
    assert packed.shape == (stored // tile, out, tile * bits // 8)
    assert packed.is_contiguous()
    for row in range(out):
        for column in range(0, columns, 7):
            assert decode_by_hand(packed, bits, tile, row, column) == int(codes[row, column])
    assert torch.equal(unpack_matrix(packed, bits, tile)[:, :columns], codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("n", [1, 7, 8, 33, 64])
def test_rows_are_packed_in_natural_order(bits, n):
    fields = codes_of(bits, 3, n)
    packed = pack_rows(fields, bits)
    assert packed.shape == (3, packed_columns(n) * bits // 8)
    assert torch.equal(unpack_rows(packed, bits, n), fields)
    if bits != 3:
        data = bytes(packed[1].tolist())
        assert [read_field(data, i * bits, bits) for i in range(n)] == fields[1].tolist()


@pytest.mark.parametrize(
    ("columns", "group_size", "tile"),
    [(4096, 128, 128), (11008, 128, 128), (4096, 64, 64), (688, 16, 16), (4096, -1, 128), (688, -1, 16),
     (100, -1, 8), (384, 96, 32), (1024, 256, 128)],
)  # fmt: skip
def test_tiles_do_not_straddle_groups(columns, group_size, tile):
    assert choose_tile(columns, group_size) == tile


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((10, 256), {"group_size": 128}),
        ((10, 48), {"group_size": 16}),
        ((3, 24), {"group_size": 12}),
        ((9, 33), {}),
        ((9, 64), {"per_tensor": True}),
        ((6, 100), {"group_size": 32, "pad": True}),
        ((1, 1), {}),
    ],
)
def test_a_weight_survives_packing(bits, sym, shape, options):
    weight = quantize_weight(torch.randn(shape), bits=bits, sym=sym, **options)
    restored = unpack_weight(pack_weight(weight))
    assert torch.equal(restored.dequantize(), weight.dequantize())
    assert restored.sym == sym


def test_three_bits_take_three_bits():
    packed = pack_weight(quantize_weight(torch.randn(64, 1024), bits=3, sym=True, group_size=128))
    assert packed.codes.numel() * 8 == 64 * 1024 * 3
