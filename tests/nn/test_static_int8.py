"""Linear layers on static grids: exact integer products against plain float arithmetic."""

from __future__ import annotations

import pytest
import torch

from harness.errors import ConfigError, NotApplicable
from harness.measure.linears import linear_states
from harness.nn.activation_grid import ActivationGrid, group_sizes, grouped_grid, tensor_grid
from harness.nn.quantizer import quantize_weight
from harness.nn.static_int8 import StaticInt8Linear

IN, OUT = 96, 40


def inputs(rows: int = 33, shift: float = 1.5) -> torch.Tensor:
    x = torch.randn(rows, IN, generator=torch.Generator().manual_seed(1)) + shift
    x[:, 5] *= 30
    return x


def grid(x: torch.Tensor, groups: int, bits: int = 8, permute: bool = True) -> ActivationGrid:
    low, high = x.amin(0), x.amax(0)
    if groups == 1:
        return tensor_grid(low.amin(), high.amax(), bits)
    order = torch.argsort(high - low) if permute else None
    return grouped_grid(low, high, bits, group_sizes(IN, groups), order)


def weight(per_tensor: bool = True):
    values = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2)) / 10
    return quantize_weight(values, bits=8, sym=True, per_tensor=per_tensor)


@pytest.mark.parametrize("groups", [1, 2, 6, 96])
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("per_tensor", [True, False])
def test_it_is_the_product_of_the_rounded_values(groups, bits, per_tensor):
    x, w = inputs(), weight(per_tensor)
    bias = torch.linspace(-1, 1, OUT)
    on = grid(x, groups, bits)
    layer = StaticInt8Linear.from_weight(w, on, bias)
    expected = on.round(x).double() @ w.dequantize(torch.float64).T + bias.double()
    torch.testing.assert_close(
        layer(x).double(), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max())
    )
    assert torch.equal(layer.dequantize(), w.dequantize())
    products = groups * bits // 8
    assert layer.kernel_name == ("_int_mm" if products == 1 else f"{products} x _int_mm")


@pytest.mark.parametrize("rows", [1, 17, 33])
def test_the_integer_sum_is_exact(rows):
    """With scales of one everything is whole numbers, and float32 holds them."""
    codes = torch.randint(-127, 128, (OUT, IN), generator=torch.Generator().manual_seed(3))
    x = torch.randint(-100, 156, (rows, IN), generator=torch.Generator().manual_seed(4))
    w = quantize_weight(codes.float(), bits=8, sym=True, per_tensor=True)
    w.scale.fill_(1.0)
    object.__setattr__(w, "codes", (codes + 128).to(torch.uint8))
    on = ActivationGrid(8, torch.ones(1), torch.full((1,), 100.0))
    found = StaticInt8Linear.from_weight(w, on)(x.float())
    assert torch.equal(found.long(), x.long() @ codes.long().T)


def test_sorted_columns_are_the_same_layer():
    x, w = inputs(), weight()
    same = grid(x, 1)
    sizes, order = group_sizes(IN, 6), torch.randperm(IN, generator=torch.Generator().manual_seed(5))
    split = ActivationGrid(8, same.scale.expand(6).clone(), same.zero.expand(6).clone(), sizes, order)
    plain, grouped = (StaticInt8Linear.from_weight(w, on)(x) for on in (same, split))
    torch.testing.assert_close(plain, grouped, rtol=1e-5, atol=1e-5 * float(plain.abs().max()))


def test_a_rounded_input_keeps_its_codes():
    """Also in float16; bfloat16 has too few digits for codes more than 128 from the zero point."""
    x, w = inputs(shift=-4.0), weight()
    on = grid(x, 6)
    layer = StaticInt8Linear.from_weight(w, on)
    exact = layer(on.round(x))
    assert torch.equal(exact, layer(x))
    assert torch.equal(layer(on.round(x).half()), exact.half())


def test_it_stores_a_byte_a_weight():
    layer = StaticInt8Linear.from_weight(weight(), grid(inputs(), 6))
    (state,) = linear_states(torch.nn.ModuleDict({"layer": layer}), ("",)).values()
    on_paper = OUT * IN + 4 + 4 * OUT + 2 * 4 * 6 + 4 * IN  # codes, scale, offset, grids, order
    assert state.held_bytes == on_paper
    assert not state.simulated


def test_shapes_types_and_casts():
    layer = StaticInt8Linear.from_weight(weight(), grid(inputs(), 6))
    assert layer(torch.zeros(2, 3, IN)).shape == (2, 3, OUT)
    assert layer(torch.zeros(0, IN)).shape == (0, OUT)
    expected = layer(inputs())
    layer.to(torch.bfloat16)
    assert layer.offset.dtype == torch.float32
    assert torch.equal(layer(inputs()), expected)


def test_what_no_int8_product_can_do_is_refused():
    on = grid(inputs(), 1)
    for bad in (
        {"bits": 4, "sym": True},
        {"bits": 8, "sym": False},
        {"bits": 8, "sym": True, "group_size": 32},
    ):
        with pytest.raises(NotApplicable, match="symmetric 8-bit weights"):
            StaticInt8Linear.from_weight(quantize_weight(torch.randn(OUT, IN), **bad), on)
    with pytest.raises(ConfigError, match="do not fit 96 columns"):
        StaticInt8Linear.from_weight(weight(), ActivationGrid(8, torch.ones(2), torch.zeros(2), (4, 5)))
    with pytest.raises(ConfigError, match="8 or 16 bits, not 4"):
        StaticInt8Linear.from_weight(weight(), grid(inputs(), 1, bits=4))
