"""Checksums against a reference in plain Python, and what they must tell apart."""

from __future__ import annotations

import struct

import pytest
import torch
from torch import nn

from harness.measure import fingerprint
from harness.measure.fingerprint import checksums, fingerprint_modules

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def reference(data: bytes) -> int:
    """The checksum of a tensor with these bytes, written with Python's integers."""

    def mixed(word: int) -> int:
        word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD & MASK
        word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53 & MASK
        return word ^ (word >> 33)

    whole = len(data) // 8 * 8
    words = [*struct.unpack(f"<{whole // 8}Q", data[:whole]), *data[whole:]]
    return sum(mixed((word + place * GOLDEN) & MASK) for place, word in enumerate(words)) & MASK


def checksum(tensor: torch.Tensor) -> int:
    return checksums({"it": tensor})["it"]


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8,
     torch.int64, torch.bool, torch.float8_e4m3fn],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (4, 16)])
def test_the_checksum_is_that_of_the_reference(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(shape, generator=generator) * 3).to(dtype)
    assert checksum(tensor) == reference(raw_bytes(tensor))


def test_the_size_of_the_chunks_does_not_matter(monkeypatch):
    tensor = torch.randn(67, 3)
    whole = checksum(tensor)
    for words in (8, 16, 100):
        monkeypatch.setattr(fingerprint, "_CHUNK_WORDS", {"cpu": words})
        assert checksum(tensor) == whole
    swapped = tensor.reshape(-1)[[*range(16, 32), *range(16), *range(32, 201)]]
    assert checksum(swapped) != whole


def test_layout_and_address_do_not_matter():
    tensor = torch.randn(8, 6)
    assert checksum(tensor) == checksum(tensor.t().contiguous().t())
    padded = torch.cat([torch.zeros(1), tensor.reshape(-1)])[1:]
    assert padded.storage_offset() % 2 == 1
    assert checksum(padded) == checksum(tensor.reshape(-1))


def test_every_single_bit_matters():
    tensor = torch.randn(9)
    whole = checksum(tensor)
    for position in range(9):
        for bit in range(32):
            flipped = tensor.clone().view(torch.int32)
            flipped[position] ^= -(1 << 31) if bit == 31 else 1 << bit
            assert checksum(flipped.view(torch.float32)) != whole


def test_positions_matter():
    tensor = torch.arange(64.0).reshape(8, 8)
    different = {
        checksum(tensor),
        checksum(tensor.t()),
        checksum(tensor.flip(0)),
        checksum(tensor.roll(1)),
        checksum(tensor[:, torch.tensor([1, 0, *range(2, 8)])]),
    }
    assert len(different) == 5


def test_flipped_signs_do_not_cancel():
    # Two signs flipped are two equal high bits changed; in a weighted sum they would cancel.
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(64, 64, generator=generator)
    seen = {checksum(tensor)}
    for column in range(63):
        flipped = tensor.clone()
        flipped[:, column : column + 2] *= -1
        seen.add(checksum(flipped))
    seen.add(checksum(-tensor))
    assert len(seen) == 65


def test_dtype_and_shape_are_part_of_the_fingerprint():
    module = nn.Module()
    module.register_buffer("table", torch.zeros(4, 2, dtype=torch.int32))
    before = fingerprint_modules(module)
    module.table = torch.zeros(2, 4, dtype=torch.int32)
    assert fingerprint_modules(module) != before
    module.table = torch.zeros(4, 2, dtype=torch.float32)
    assert fingerprint_modules(module) != before


def test_empty_and_meta_tensors_have_a_checksum_too():
    assert checksum(torch.zeros(0)) == 0
    assert checksum(torch.zeros(5, device="meta")) == 0


def test_tied_tensors_are_read_once(monkeypatch, tiny_llama):
    read = []
    original = fingerprint._mixed_sum

    def count(tensor, positions):
        read.append(tensor.data_ptr())
        return original(tensor, positions)

    monkeypatch.setattr(fingerprint, "_mixed_sum", count)
    found = fingerprint_modules(tiny_llama)
    assert len(read) == len(set(read))
    embedding = dict(found["model.embed_tokens"].tensors)["weight"]
    assert dict(found["lm_head"].tensors)["weight"] == embedding
