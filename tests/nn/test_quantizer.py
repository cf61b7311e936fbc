"""The quantizers against closed forms, brute force and figures known for Gaussian weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from harness.errors import ConfigError, NumericalFailure
from harness.nn.quantizer import (
    Grid,
    find_grid,
    group_grid,
    quantize_activation,
    quantize_weight,
    round_up,
    search_grid,
)


def rel_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@pytest.fixture(scope="module")
def gaussian() -> torch.Tensor:
    return torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "per_tensor", "expected"),
    [
        (8, True, -1, False, 0.0087),
        (4, True, -1, False, 0.158),
        (3, True, -1, False, 0.368),
        (8, True, -1, True, 0.0115),
        (4, True, -1, True, 0.209),
        (8, True, 128, False, 0.0065),
        (4, True, 128, False, 0.117),
        (3, True, 128, False, 0.274),
        (8, False, 128, False, 0.0059),
        (4, False, 128, False, 0.1006),
        (3, False, 128, False, 0.2156),
        (2, False, 128, False, 0.503),
        (4, False, 64, False, 0.0911),
    ],
)
def test_error_of_rounding_gaussian_weights(gaussian, bits, sym, group_size, per_tensor, expected):
    quantized = quantize_weight(gaussian, bits=bits, sym=sym, group_size=group_size, per_tensor=per_tensor)
    assert rel_error(quantized.dequantize(), gaussian) == pytest.approx(expected, rel=0.03)


def test_rows_of_different_size_need_a_scale_each(gaussian):
    rows = torch.exp(0.5 * torch.randn(1024, 1, generator=torch.Generator().manual_seed(1)))
    weight = gaussian[:, :1024] * rows
    per_tensor = quantize_weight(weight, bits=8, sym=True, per_tensor=True).dequantize()
    per_channel = quantize_weight(weight, bits=8, sym=True).dequantize()
    assert rel_error(per_channel, weight) == pytest.approx(0.0080, rel=0.1)
    assert rel_error(per_tensor, weight) >= 2.5 * rel_error(per_channel, weight)


def heavy_tailed(out: int = 64, columns: int = 512, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(out, columns, generator=generator)
    # Student's t with 3 degrees of freedom.
    chi2 = torch.randn(3, out, columns, generator=generator).square().sum(0)
    return normal / (chi2 / 3).sqrt()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_finer_granularity_never_loses(bits, sym):
    weight = heavy_tailed()
    errors = [
        rel_error(quantize_weight(weight, bits=bits, sym=sym, **granularity).dequantize(), weight)
        for granularity in (
            {"per_tensor": True},
            {"group_size": -1},
            {"group_size": 128},
            {"group_size": 64},
        )
    ]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_every_weight_is_within_half_a_step(bits, sym, group_size):
    weight = heavy_tailed(seed=bits)
    quantized = quantize_weight(weight, bits=bits, sym=sym, group_size=group_size)
    step = quantized.scale.double().repeat_interleave(512 // quantized.scale.shape[1], 1)
    error = (quantized.dequantize(torch.float64) - weight.double()).abs()
    assert bool((error <= step / 2 * (1 + 1e-6)).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [-1, 64])
def test_what_is_on_a_symmetric_grid_stays_there(bits, group_size):
    once = quantize_weight(heavy_tailed(), bits=bits, sym=True, group_size=group_size)
    again = quantize_weight(once.dequantize(), bits=bits, sym=True, group_size=group_size)
    assert torch.equal(again.codes, once.codes)
    torch.testing.assert_close(again.scale, once.scale, rtol=2e-7, atol=0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_what_fills_an_asymmetric_grid_stays_there(bits):
    once = quantize_weight(heavy_tailed(), bits=bits, sym=False, group_size=64)
    again = quantize_weight(once.dequantize(), bits=bits, sym=False, group_size=64)
    grouped = once.codes.view(64, -1, 64)
    # A group that rounding left without its first or last code has a smaller range: another grid.
    full = (grouped.amin(-1) == 0) & (grouped.amax(-1) == 2**bits - 1)
    assert float(full.float().mean()) > 0.8
    same = (again.codes.view(64, -1, 64) == grouped).all(-1)
    assert bool(same[full].all())
    assert torch.equal(again.scale[full], once.scale[full])


@pytest.mark.parametrize("sym", [True, False])
def test_zero_is_exact_also_where_all_values_have_one_sign(sym):
    weight = torch.rand(8, 64) + 3  # far from zero
    weight[:, 5] = 0
    for signed in (weight, -weight):
        dequantized = quantize_weight(signed, bits=4, sym=sym, group_size=32).dequantize()
        assert bool((dequantized[:, 5] == 0).all())


@pytest.mark.parametrize("sym", [True, False])
def test_a_group_of_zeros_stays_zeros(sym):
    weight = torch.randn(3, 64)
    weight[1, 32:] = 0
    quantized = quantize_weight(weight, bits=4, sym=sym, group_size=32)
    assert bool((quantized.dequantize()[1, 32:] == 0).all())
    assert float(quantized.scale[1, 1]) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sym", [True, False])
def test_nan_and_infinity_are_refused(value, sym):
    weight = torch.randn(4, 8)
    weight[2, 3] = value
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        quantize_weight(weight, bits=4, sym=sym)


@pytest.mark.parametrize("bits", [0, 1, 9, 16])
def test_impossible_bits_are_refused(bits):
    with pytest.raises(ConfigError, match=f"2 to 8, not {bits}"):
        quantize_weight(torch.randn(4, 8), bits=bits, sym=True)


def test_groups_must_divide_the_columns():
    with pytest.raises(ConfigError, match="group_size 3 does not divide 8 columns"):
        quantize_weight(torch.randn(4, 8), bits=4, sym=True, group_size=3)
    with pytest.raises(ConfigError, match="has no groups"):
        quantize_weight(torch.randn(4, 8), bits=4, sym=True, group_size=4, per_tensor=True)


def test_padding_completes_the_last_group():
    weight = torch.randn(5, 20)
    padded = quantize_weight(weight, bits=4, sym=False, group_size=8, pad=True)
    assert padded.codes.shape == (5, 24)
    assert padded.scale.shape == (5, 3)
    expected = torch.cat(
        [
            quantize_weight(weight[:, :16], bits=4, sym=False, group_size=8).dequantize(),
            quantize_weight(weight[:, 16:], bits=4, sym=False).dequantize(),
        ],
        1,
    )
    torch.testing.assert_close(padded.dequantize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("sym", [True, False])
def test_single_rows_and_columns(shape, sym):
    weight = torch.randn(shape)
    dequantized = quantize_weight(weight, bits=8, sym=sym).dequantize()
    assert dequantized.shape == shape
    torch.testing.assert_close(dequantized, weight, rtol=0.02, atol=0.02)


def test_symmetric_codes_leave_out_the_lowest():
    codes = quantize_weight(heavy_tailed(), bits=2, sym=True, group_size=32).codes
    assert set(codes.unique().tolist()) == {1, 2, 3}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_rounded_up_to_the_next_number(dtype):
    scale = torch.rand(2000, generator=torch.Generator().manual_seed(3)) * 10 + 1e-3
    stored = round_up(scale, dtype)
    assert stored.dtype == dtype
    assert bool((stored.float() >= scale).all())
    if dtype == torch.float16:
        below = np.nextafter(stored.numpy(), np.float16(0)).astype(np.float32)
        assert bool((below < scale.numpy()).all())
    exact = torch.tensor([0.5, 1.0, 2.0])
    assert torch.equal(round_up(exact, dtype).float(), exact)


def test_the_storage_type_of_scales():
    def dtype(weight: torch.Tensor, **options) -> torch.dtype:
        return group_grid(weight, sym=True, **options).scale.dtype

    weight = torch.randn(4, 64)
    assert dtype(weight, bits=8) == torch.float32
    assert dtype(weight, bits=8, per_tensor=True) == torch.float32
    assert dtype(weight, bits=4, group_size=32) == torch.float16
    assert dtype(weight, bits=3) == torch.float16
    assert dtype(weight * 1e6, bits=4, group_size=32) == torch.bfloat16  # beyond 65504
    assert dtype(weight * 1e-6, bits=4, group_size=32) == torch.bfloat16  # below 2^-14


def test_codes_are_the_nearest_points_of_the_grid():
    values = torch.randn(6, 50, dtype=torch.float64)
    for sym in (True, False):
        grid = find_grid(values, bits=3, sym=sym)
        lowest = 1 if sym else 0
        points = torch.stack([grid.decode(torch.tensor(code), torch.float64) for code in range(lowest, 8)])
        points = points.expand(8 - lowest, 6, 1).permute(1, 2, 0)  # [6, 1, points]
        nearest = (values[:, :, None] - points).abs().amin(-1)
        torch.testing.assert_close((grid.round(values) - values).abs(), nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_search_finds_the_best_of_all_clipped_ranges(sym, dtype):
    """Each range is that of the values times 1, .99 ... .33; the widest of the best."""
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(12, 3, 64, generator=generator) ** 3
    values[4] = 0
    importance = torch.rand(3, 64, generator=generator)
    found = search_grid(values, importance, bits=3, sym=sym, scale_dtype=dtype)
    tried = [
        find_grid(values * (1 - percent / 100), bits=3, sym=sym, scale_dtype=dtype) for percent in range(68)
    ]
    losses = torch.stack([((grid.round(values) - values) ** 2 * importance).sum(-1) for grid in tried])
    best = losses.argmin(0)[..., None]
    assert int(best.max()) > 10
    expected = torch.stack([grid.scale for grid in tried]).gather(0, best[None])[0]
    assert torch.equal(found.scale, expected)
    if not sym:
        zeros = torch.stack([grid.zero for grid in tried]).gather(0, best[None])[0]
        assert torch.equal(found.zero, zeros)


def test_ties_go_to_even():
    grid = Grid(4, torch.tensor([1.0]), None)
    values = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5])
    assert grid.round(values).tolist() == [0, 2, 2, 0, -2]


# --- activations ---------------------------------------------------------------------------


def test_each_token_has_its_own_scale():
    x = torch.randn(5, 16) * torch.tensor([1e-3, 1.0, 7.0, 100.0, 0.0])[:, None]
    codes, scale = quantize_activation(x)
    assert codes.dtype == torch.int8
    assert scale.shape == (5, 1)
    torch.testing.assert_close(scale[:4, 0], x[:4].abs().amax(1) / 127)
    assert codes[:4].abs().amax(1).tolist() == [127] * 4
    assert bool((codes[4] == 0).all())
    assert float(scale[4]) == 1
    assert bool(((codes * scale - x).abs() <= scale / 2 * (1 + 1e-5)).all())


def test_one_scale_for_all_tokens():
    x = torch.randn(5, 16)
    codes, scale = quantize_activation(x, per_token=False)
    assert scale.shape == (1,)
    torch.testing.assert_close(scale[0], x.abs().amax() / 127)
    assert int(codes.abs().amax()) == 127


def test_a_given_scale_clips():
    codes, scale = quantize_activation(torch.tensor([[0.3, -5.0, 400.0]]), torch.tensor([0.1]))
    assert codes.tolist() == [[3, -50, 127]]
    assert scale.tolist() == pytest.approx([0.1])


def test_per_token_scales_matter_where_tokens_differ():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 768, generator=generator)
    x *= torch.exp(torch.randn(2048, 1, generator=generator))

    def errors(per_token: bool) -> tuple[float, float]:
        codes, scale = quantize_activation(x, per_token=per_token)
        difference = codes * scale - x
        return rel_error(codes * scale, x), float((difference.norm(dim=1) / x.norm(dim=1)).mean())

    (whole, whole_mean), (token, token_mean) = errors(False), errors(True)
    assert token == pytest.approx(0.0074, rel=0.05)
    assert whole >= 10 * token
    assert whole_mean >= 10 * token_mean


def test_nan_shows_in_the_scale_of_its_token_alone():
    x = torch.randn(3, 8)
    x[1, 2] = float("nan")
    assert torch.isnan(quantize_activation(x)[1][:, 0]).tolist() == [False, True, False]


def test_denormal_activations_become_zeros():
    codes, scale = quantize_activation(torch.full((1, 4), 1e-40))
    assert codes.tolist() == [[0, 0, 0, 0]]
    assert scale.tolist() == [[1.0]]
