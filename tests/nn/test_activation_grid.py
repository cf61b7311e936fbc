"""Static grids of activations: one range, ranges by group, 16 bits."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.activation_grid import (
    ActivationGrid,
    ActivationQuantizer,
    group_sizes,
    grouped_grid,
    tensor_grid,
)


def outliers(dimensions: int = 768) -> tuple[torch.Tensor, torch.Tensor]:
    """Standard normal values [2048, d] with 6 dimensions 40 times wider, and which are those.

    They lie in four of six unsorted groups, as many as are to be expected.
    """
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2048, dimensions, generator=generator)
    wide = torch.zeros(dimensions, dtype=torch.bool)
    wide[torch.randperm(dimensions, generator=generator)[:6]] = True
    x[:, wide] *= 40
    return x, wide


def grid_of(x: torch.Tensor, groups: int, *, permute: bool = True, bits: int = 8) -> ActivationGrid:
    low, high = x.amin(0), x.amax(0)
    order = torch.argsort(high - low, stable=True) if permute else None
    return grouped_grid(low, high, bits, group_sizes(x.shape[1], groups), order)


def formula(x: torch.Tensor, low: float, high: float, bits: int) -> torch.Tensor:
    low, high = torch.tensor(min(low, 0.0)), torch.tensor(max(high, 0.0))
    scale = (high - low) / (2**bits - 1)
    zero = torch.round(-low / scale)
    return scale * (torch.clip(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("shift", [0.0, 3.0, -9.0])
def test_a_tensor_is_rounded_by_the_formula(bits, shift):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) + shift
    rounded = tensor_grid(x.amin(), x.amax(), bits).round(x)
    torch.testing.assert_close(rounded, formula(x, float(x.min()), float(x.max()), bits))
    step = float(tensor_grid(x.amin(), x.amax(), bits).scale)
    assert float((rounded - x).abs().max()) <= step * (1 + 1e-4)  # half a step, and one at the zero point
    assert torch.equal(tensor_grid(x.amin(), x.amax(), bits).round(torch.zeros(3)), torch.zeros(3))


def test_one_group_is_the_tensor_and_as_many_as_dimensions_are_each_its_own():
    x, _ = outliers(96)
    whole = tensor_grid(x.amin(), x.amax(), 8).round(x)
    each = torch.stack([formula(c, float(c.min()), float(c.max()), 8) for c in x.T], 1)
    for permute in (True, False):
        assert torch.equal(grid_of(x, 1, permute=permute).round(x), whole)
        torch.testing.assert_close(grid_of(x, 96, permute=permute).round(x), each)


def test_groups_in_the_order_of_ranges_keep_outliers_to_themselves():
    """Relative error on the other dimensions, measured: 1 group .377, 6 unsorted .262, 6 sorted .151,
    12 .104, 64 .035, 768 .0078."""
    x, wide = outliers()

    def error(groups: int, permute: bool = True) -> float:
        found = grid_of(x, groups, permute=permute).round(x)[:, ~wide]
        return float((found - x[:, ~wide]).norm() / x[:, ~wide].norm())

    errors = [error(groups) for groups in (1, 6, 12, 64, 768)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] == pytest.approx(0.377, rel=0.02)
    assert errors[-1] == pytest.approx(0.0078, rel=0.02)
    assert errors[1] <= 0.65 * error(6, permute=False)


def test_the_module_keeps_its_scales_and_says_that_it_imitates():
    x, _ = outliers(96)
    quantizer = ActivationQuantizer(grid_of(x, 6))
    expected = quantizer(x)
    assert quantizer.simulated
    quantizer.to(torch.bfloat16)
    assert quantizer.scale.dtype == torch.float32
    assert torch.equal(quantizer(x), expected)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_a_range_of_zeros_stays_zeros():
    quantizer = ActivationQuantizer(tensor_grid(torch.tensor(0.0), torch.tensor(0.0), 8))
    assert quantizer.scale.item() == 1
    assert torch.equal(quantizer(torch.zeros(4)), torch.zeros(4))


def test_groups_divide_or_are_told_to_be_ragged():
    assert group_sizes(768, 6) == (128,) * 6
    assert group_sizes(256, 6, ragged=True) == (32, 48, 48, 32, 48, 48)
    assert sum(group_sizes(100, 7, ragged=True)) == 100
    for groups in (0, 9):
        with pytest.raises(ConfigError, match="1 to 8 groups"):
            group_sizes(8, groups)
    with pytest.raises(ConfigError, match="choose a divisor or ragged"):
        group_sizes(256, 6)


def test_what_no_grid_can_be_is_refused():
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        tensor_grid(torch.tensor(float("-inf")), torch.tensor(1.0), 8)
    with pytest.raises(ConfigError, match="2 to 16 bits"):
        tensor_grid(torch.tensor(0.0), torch.tensor(1.0), 17)
    with pytest.raises(ConfigError, match="do not fit a tensor of 8"):
        grouped_grid(torch.zeros(8), torch.ones(8), 8, (4, 5), None)
