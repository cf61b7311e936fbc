"""Training through a grid: LSQ's gradient in closed form, and the packed layer computes the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from harness.errors import ConfigError, NumericalFailure
from harness.nn.fake_quant import (
    FakeQuantLinear,
    learned_step,
    lsq_gradient_scale,
    lsq_initial_scale,
    nearest_initial_scale,
    straight_through,
)
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_weight


def _linear(out: int = 24, columns: int = 64, *, seed: int = 0, bias: bool = True) -> nn.Linear:
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, out, bias=bias)
    linear.weight.data = 0.1 * torch.randn(out, columns, generator=generator)
    if bias:
        linear.bias.data = torch.randn(out, generator=generator)
    return linear


def _moved(layer: FakeQuantLinear) -> FakeQuantLinear:
    """As training leaves it: weights and steps that no formula gives."""
    generator = torch.Generator().manual_seed(5)
    layer.weight.data += 0.02 * torch.randn(layer.weight.shape, generator=generator)
    if layer.scale is not None:
        layer.scale.data *= 0.7 + 0.6 * torch.rand(layer.scale.shape, generator=generator)
    return layer


# --- the gradient -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("lowest", "highest"), [(-2, 1), (-8, 7), (-127, 127), (0, 15)])
def test_lsq_gradients_equal_the_closed_form(lowest, highest):
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(3, 4, 10, generator=generator, dtype=torch.float64).mul_(3).requires_grad_()
    s = (0.1 + torch.rand(3, 4, 1, generator=generator, dtype=torch.float64)).requires_grad_()
    upstream = torch.randn(3, 4, 10, generator=generator, dtype=torch.float64)
    g = lsq_gradient_scale(10, highest)
    assert g == 1 / math.sqrt(10 * highest)
    result = learned_step(v, s, lowest=lowest, highest=highest, gradient_scale=g)
    result.backward(upstream)
    gradients, result, values, steps = (v.grad, s.grad), result.detach(), v.detach(), s.detach()
    for i in range(3):
        for j in range(4):
            step, to_step = float(steps[i, j]), 0.0
            for k in range(10):
                ratio, up = float(values[i, j, k]) / step, float(upstream[i, j, k])
                if lowest < ratio < highest:
                    expected, slope, to_value = round(ratio), round(ratio) - ratio, up
                else:
                    expected = slope = lowest if ratio <= lowest else highest
                    to_value = 0.0
                to_step += up * slope
                assert float(result[i, j, k]) == pytest.approx(step * expected, rel=1e-12, abs=1e-12)
                assert float(gradients[0][i, j, k]) == to_value
            assert float(gradients[1][i, j, 0]) == pytest.approx(g * to_step, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_a_layer_hands_both_gradients_on(group_size):
    layer = _moved(FakeQuantLinear(_linear(), bits=3, group_size=group_size))
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    upstream = torch.randn(7, 24, generator=torch.Generator().manual_seed(2))
    layer(x).backward(upstream)
    width = 64 if group_size == -1 else group_size
    steps = (
        layer.weight / layer.scale.half().float().view(24, -1, 1).expand(-1, -1, width).flatten(1)
    ).detach()
    to_weight = upstream.t() @ x
    inside = (steps > -4) & (steps < 3)
    slope = torch.where(inside, steps.round() - steps, steps.clamp(-4, 3))
    to_scale = (to_weight * slope).view(24, -1, width).sum(-1) / math.sqrt(width * 3)
    torch.testing.assert_close(layer.weight.grad, to_weight * inside)
    torch.testing.assert_close(layer.scale.grad, to_scale.flatten())
    torch.testing.assert_close(layer.bias.grad, upstream.sum(0))


def test_straight_through_gives_one_value_and_the_gradient_of_the_other():
    values = torch.tensor([0.1, -3.7, 1e-9], requires_grad=True)
    rounded = torch.tensor([1e8, 0.3, 0.0])
    result = straight_through(values, rounded)
    assert torch.equal(result, rounded)
    (result * torch.tensor([2.0, 3.0, 5.0])).sum().backward()
    assert values.grad.tolist() == [2.0, 3.0, 5.0]


def test_plain_steps_pass_every_gradient():
    layer = FakeQuantLinear(_linear(), bits=2, learn_scale=False)
    layer.fake_weight().sum().backward()
    assert torch.equal(layer.weight.grad, torch.ones(24, 64))
    assert layer.scale is None


# --- the grid ---------------------------------------------------------------------------------------


def test_the_initial_step_is_the_papers():
    values = torch.tensor([[1.0, -3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]])
    assert lsq_initial_scale(values, 7).flatten().tolist() == pytest.approx([4 / math.sqrt(7), 1.0])


def test_the_nearest_initial_step_is_the_best_of_a_brute_force_search():
    values = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    values[5] = 0
    found = nearest_initial_scale(values, -2, 1)
    assert found[5] == 1
    for row, step in zip(values[:5], found[:5], strict=True):
        errors = {}
        for percent in range(21, 101):
            candidate = row.abs().max() * percent / 100
            errors[candidate] = float(
                ((row / candidate).round().clamp(-2, 1) * candidate - row).square().sum()
            )
        assert float(step) == pytest.approx(float(min(errors, key=errors.get)), rel=1e-6)


@pytest.mark.parametrize("init", ["mse", "lsq"])
def test_learned_steps_begin_where_asked(init):
    linear = _linear()
    layer = FakeQuantLinear(linear, bits=4, group_size=16, scale_init=init)
    groups = linear.weight.detach().view(24, 4, 16)
    expected = lsq_initial_scale(groups, 7) if init == "lsq" else nearest_initial_scale(groups, -8, 7)
    assert torch.equal(layer.scale.detach(), expected.flatten())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_learned_grid_has_all_points_and_a_fixed_zero(bits):
    weight = FakeQuantLinear(_linear(), bits=bits).quantized()
    assert set(weight.zero.flatten().tolist()) == {2 ** (bits - 1)}
    layer = FakeQuantLinear(_linear(), bits=bits)
    layer.scale.data *= 0.2
    codes = layer.quantized().codes
    assert (int(codes.min()), int(codes.max())) == (0, 2**bits - 1)
    integers = (layer.fake_weight() / layer.scale.half().float()[:, None]).detach().round()
    assert (int(integers.min()), int(integers.max())) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def test_at_8_bits_the_grid_is_symmetric():
    layer = FakeQuantLinear(_linear(), bits=8)
    layer.scale.data *= 0.05
    weight = layer.quantized()
    assert weight.sym
    assert weight.scale.dtype == torch.float32
    assert (int(weight.codes.min()), int(weight.codes.max())) == (1, 255)


@pytest.mark.parametrize("learn_scale", [True, False])
@pytest.mark.parametrize(
    ("bits", "group_size", "a_bits"),
    [(2, -1, 16), (3, -1, 16), (4, -1, 16), (8, -1, 16), (2, 16, 16), (4, 32, 16), (8, 16, 16), (8, -1, 8)],
)
def test_the_packed_layer_computes_what_was_trained(bits, group_size, a_bits, learn_scale):
    layer = _moved(
        FakeQuantLinear(_linear(), bits=bits, group_size=group_size, a_bits=a_bits, learn_scale=learn_scale)
    )
    packed = layer.packed()
    assert isinstance(packed, Int8Linear if a_bits == 8 else QuantizedLinear)
    assert torch.equal(packed.dequantize(), layer.fake_weight())
    x = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, expected = packed(x), layer(x)
    assert (y - expected).norm() <= 1e-5 * expected.norm()
    if not learn_scale:
        sym = bits == 8
        rounded = quantize_weight(layer.weight, bits=bits, group_size=group_size, sym=sym)
        assert torch.equal(packed.dequantize(), rounded.dequantize())


def test_inputs_are_rounded_per_token_with_the_gradient_of_themselves():
    layer = FakeQuantLinear(_linear(bias=False), bits=8, a_bits=8)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    y = layer(x)
    scale = x.detach().abs().amax(1, keepdim=True) / 127
    expected = F.linear((x.detach() / scale).round() * scale, layer.fake_weight())
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    torch.testing.assert_close(x.grad, layer.fake_weight().sum(0).expand(3, -1))


def test_half_precision_layers_train_in_float32_and_pack_the_same_grid():
    linear = _linear().to(torch.bfloat16)
    layer = FakeQuantLinear(linear, bits=4)
    assert layer.weight.dtype == torch.float32
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.no_grad():
        y, expected = layer.packed()(x), layer(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(y, expected)


# --- edges ------------------------------------------------------------------------------------------


def test_a_row_of_zeros_stays_zeros():
    linear = _linear()
    linear.weight.data[3] = 0
    layer = FakeQuantLinear(linear, bits=2)
    layer.fake_weight().sum().backward()
    assert bool(torch.isfinite(layer.scale.grad).all())
    assert torch.equal(layer.packed().dequantize()[3], torch.zeros(64))


@pytest.mark.parametrize(("bits", "smallest"), [(4, 2.0**-14), (8, 1e-8)])
def test_steps_are_kept_above_what_can_be_stored(bits, smallest):
    layer = FakeQuantLinear(_linear(), bits=bits)
    assert int(layer.clamp_scale()) == 0
    layer.scale.data[:5] = torch.tensor([-1.0, 0.0, smallest / 2, smallest, 1.0])
    assert int(layer.clamp_scale()) == 3
    assert float(layer.scale.detach().min()) == pytest.approx(smallest)
    assert bool(torch.isfinite(layer.packed().dequantize()).all())
    assert int(FakeQuantLinear(_linear(), bits=bits, learn_scale=False).clamp_scale()) == 0


def test_what_cannot_be_is_refused():
    with pytest.raises(ConfigError, match="8-bit weights"):
        FakeQuantLinear(_linear(), bits=4, a_bits=8)
    with pytest.raises(ConfigError, match="does not divide"):
        FakeQuantLinear(_linear(), bits=4, group_size=48)
    spoilt = _linear()
    spoilt.weight.data[0, 0] = math.nan
    with pytest.raises(NumericalFailure, match="NaN"):
        FakeQuantLinear(spoilt, bits=4)
    layer = FakeQuantLinear(_linear(), bits=4)
    layer.scale.data[1] = math.inf
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        layer.packed()
