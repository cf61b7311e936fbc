"""Row groups against rounding per tensor and per row, and against a plain loop."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.quantizer import quantize_weight
from harness.nn.row_groups import quantize_in_row_groups, row_group_sizes


def weight(rows=768, columns=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scales = torch.randn(rows, 1, generator=generator).mul(0.5).exp()
    return torch.randn(rows, columns, generator=generator) * scales


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_ends_are_rounding_per_tensor_and_per_row_bit_for_bit(bits):
    w = weight()
    one = quantize_in_row_groups(w, bits=bits, sizes=row_group_sizes(768, 1))
    rows = quantize_in_row_groups(w, bits=bits, sizes=row_group_sizes(768, -1))
    per_row = quantize_weight(w, bits=bits, sym=False)
    assert torch.equal(rows.codes, per_row.codes)
    assert torch.equal(rows.scale, per_row.scale)
    assert rows.scale.dtype == per_row.scale.dtype
    assert torch.equal(rows.zero, per_row.zero)
    per_tensor = quantize_weight(w, bits=bits, sym=False, per_tensor=True)
    assert torch.equal(one.codes, per_tensor.codes)
    assert torch.equal(one.dequantize(), per_tensor.dequantize())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_more_groups_never_round_worse(bits):
    w = weight()
    errors = [
        float(torch.linalg.vector_norm(quantize_in_row_groups(w, bits=bits, sizes=sizes).dequantize() - w))
        for sizes in (row_group_sizes(768, groups) for groups in (1, 2, 4, 8, 16, 32, 64, 128, 256, 768))
    ]
    assert all(finer <= coarser for coarser, finer in pairwise(errors))
    assert errors[-1] < 0.7 * errors[0]


def test_uneven_groups_are_those_of_a_loop():
    w = weight(12, 8)
    sizes = row_group_sizes(12, 5)
    found = quantize_in_row_groups(w, bits=3, sizes=sizes).dequantize()
    for rows, part in zip(w.split(sizes), found.split(sizes), strict=True):
        expected = quantize_weight(rows, bits=3, sym=False, per_tensor=True).dequantize()
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_the_groups_of_the_paper_respect_heads():
    sizes = row_group_sizes(768, 128, heads=12)
    assert len(sizes) == 128
    assert set(sizes) == {5, 6, 7}
    bounds = set(torch.tensor(sizes).cumsum(0).tolist())
    assert {64 * head for head in range(1, 13)} <= bounds
    assert row_group_sizes(768, 4, heads=12) == [192] * 4  # three whole heads each


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((64, 128), "a matrix of 64 rows has 1 to 64 groups"),
        ((64, 0), "1 to 64"),
        ((96, 5, 12), "would split a head: 12 heads need a divisor of 12, or 12 to 96 groups"),
        ((65, 13, 12), "65 rows are not 12 equal heads"),
    ],
)
def test_impossible_groups(arguments, message):
    with pytest.raises(ConfigError, match=message):
        row_group_sizes(*arguments)


def test_bad_matrices():
    with pytest.raises(ConfigError, match="row groups of 3 rows do not fit a matrix of 4"):
        quantize_in_row_groups(torch.ones(4, 2), bits=4, sizes=[3])
    with pytest.raises(NumericalFailure, match="NaN"):
        quantize_in_row_groups(torch.full((4, 2), float("nan")), bits=4, sizes=[4])
