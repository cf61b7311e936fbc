"""The int8 layer with outlier columns against plain torch, written from the paper's equations."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
from torch.nn import functional

from harness.errors import ConfigError, NumericalFailure
from harness.kernels import int8
from harness.nn.outlier_int8 import OutlierInt8Linear, split_exact, split_fixed
from harness.nn.quantized import Int8Linear
from harness.nn.quantizer import quantize_weight

PLANTED = [5, 300, 900]
FORMS = pytest.mark.parametrize("fixed", [False, True], ids=["exact", "fixed"])


def rel(value: torch.Tensor, expected: torch.Tensor, scale: torch.Tensor | None = None) -> float:
    scale = expected if scale is None else scale
    return float((value - expected).double().norm() / scale.double().norm())


def planted(rows: int = 512, columns: int = 1024, out: int = 768) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, columns, generator=generator)
    x[:, PLANTED] *= 60
    return x, torch.randn(out, columns, generator=generator) / 32


def small(columns: int = 48, out: int = 20, rows: int = 9) -> tuple[torch.Tensor, torch.Tensor]:
    """An input [rows, columns] with outliers in columns 3 and 17, and a weight [out, columns]."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=generator)
    x[2, 3], x[5, 17] = 40.0, -8.0
    return x, torch.randn(out, columns, generator=generator)


def from_equations(x, weight, bias, threshold: float, kept: dict[int, torch.Tensor] | None = None):
    """Column by column in float64: equation 8 with vector-wise scales, the row scales after removal."""
    x, weight = x.double(), weight.double()
    w_scale = weight.abs().amax(1) / 127
    codes = torch.round(weight / w_scale[:, None])
    outliers = [j for j in range(x.shape[1]) if float(x[:, j].abs().max()) >= threshold]
    regular = [j for j in range(x.shape[1]) if j not in outliers]
    y = bias.double().expand(x.shape[0], -1).clone()
    for j in outliers:
        column = codes[:, j] * w_scale if kept is None or j not in kept else kept[j].double()
        y += torch.outer(x[:, j], column)
    if regular:
        x_scale = x[:, regular].abs().amax(1, keepdim=True) / 127
        x_scale[x_scale == 0] = 1
        y += torch.round(x[:, regular] / x_scale) @ codes[:, regular].T * x_scale * w_scale
    return y


# --- the accepted figures ---------------------------------------------------------------------------


@FORMS
def test_without_a_threshold_to_reach_it_is_plain_vector_wise_int8(fixed):
    x, weight = planted(rows=33)
    bias = torch.randn(768)
    plain = Int8Linear.from_weight(quantize_weight(weight, bits=8, sym=True), bias)
    layer = OutlierInt8Linear.from_float(weight, bias, threshold=math.inf)
    assert torch.equal(layer.multiply(x, fixed=fixed), plain(x))
    assert torch.equal(layer.codes, plain.codes)
    assert torch.equal(layer.scales, plain.scales)


@FORMS
def test_a_threshold_of_zero_multiplies_everything_in_the_type_of_the_activations(fixed):
    x, weight = planted(rows=33)
    bias = torch.randn(768)
    layer = OutlierInt8Linear.from_float(weight, bias, threshold=0.0)
    expected = functional.linear(x, layer.dequantize(), bias)
    assert rel(layer.multiply(x, fixed=fixed), expected) <= 1e-6
    # With all columns kept it is the original layer, whose weights here are exact in float16.
    weight = weight.half().float()
    layer = OutlierInt8Linear.from_float(weight, bias, threshold=0.0, columns=torch.arange(1024))
    assert rel(layer.multiply(x, fixed=fixed), functional.linear(x, weight, bias)) <= 1e-6
    assert layer.counters.tolist() == [1024, 1024, 0]


@FORMS
def test_planted_outliers_do_not_spoil_the_rest(fixed):
    """Measured: the regular part .0111, with the outliers in it .197; the whole output .0080."""
    x, weight = planted()
    regular = x.clone()
    regular[:, PLANTED] = 0
    layer = OutlierInt8Linear.from_float(weight)
    parts = layer.split(x, fixed=fixed)
    assert torch.equal(parts.regular, regular)
    assert int(parts.found) == 3
    ours = int8.linear(parts.regular, layer.codes, layer.scales, None)
    error = rel(ours, regular @ weight.T)
    plain = OutlierInt8Linear.from_float(weight, threshold=math.inf).multiply(x, fixed=fixed)
    vector_wise = rel(plain, x @ weight.T, regular @ weight.T)
    assert error == pytest.approx(0.0111, rel=0.03)
    assert vector_wise == pytest.approx(0.195, rel=0.03)
    assert vector_wise >= 10 * error
    assert rel(layer.multiply(x, fixed=fixed), x @ weight.T) <= 0.01
    assert layer.counters.tolist() == [1024, 3, 0]


@FORMS
def test_the_order_of_the_columns_does_not_matter(fixed):
    x, weight = planted(rows=64)
    order = torch.randperm(1024, generator=torch.Generator().manual_seed(2))
    one = OutlierInt8Linear.from_float(weight).multiply(x, fixed=fixed)
    other = OutlierInt8Linear.from_float(weight[:, order]).multiply(x[:, order], fixed=fixed)
    assert rel(other, one) <= 1e-6


# --- equations ----------------------------------------------------------------------------------------


@FORMS
@pytest.mark.parametrize("threshold", [0.0, 2.0, 6.0, 20.0, 1e9])
@pytest.mark.parametrize("size", [(48, 20), (33, 7), (1, 5)])
def test_it_is_the_decomposition_of_the_paper(threshold, size, fixed):
    columns, out = size
    x, weight = small(max(columns, 18), out)
    x, weight = x[:, :columns], weight[:, :columns]
    bias = torch.randn(out)
    layer = OutlierInt8Linear.from_float(weight, bias, threshold=threshold)
    expected = from_equations(x, weight, bias, threshold)
    assert rel(layer.multiply(x, fixed=fixed), expected) <= 1e-5


@FORMS
def test_scales_are_found_after_the_outliers_are_out(fixed):
    """What is often done wrong: with the scale of the whole row the others keep two or three levels."""
    x, weight = small()
    x[2, 3] = 4000
    layer = OutlierInt8Linear.from_float(weight)
    parts = layer.split(x, fixed=fixed)
    wrong_scale = x.abs().amax(1, keepdim=True) / 127
    wrong = torch.round(parts.regular / wrong_scale) * wrong_scale @ layer.dequantize().T
    wrong = wrong + parts.outliers @ layer.column_weights(parts.columns, x.dtype).T
    rest = parts.regular[2] @ weight.T  # of the token with the outlier
    dense = x[2] @ layer.dequantize().T  # the error of the weights is not what this is about
    assert rel(layer.multiply(x, fixed=fixed)[2], dense, rest) <= 0.02
    assert rel(wrong[2], dense, rest) >= 0.9, "not even one level is left"


@FORMS
def test_kept_columns_are_multiplied_as_they_were(fixed):
    x, weight = small()
    weight = weight.half().float()
    columns = torch.tensor([17, 30])  # 3 is an outlier that calibration did not see, 30 is none today
    layer = OutlierInt8Linear.from_float(weight, torch.zeros(20), columns=columns)
    assert layer.kept.dtype == torch.float16
    kept = {17: weight[:, 17], 30: weight[:, 30]}
    assert rel(layer.multiply(x, fixed=fixed), from_equations(x, weight, torch.zeros(20), 6.0, kept)) <= 1e-5
    dense = layer.dequantize()
    assert torch.equal(dense[:, [17, 30]], weight[:, [17, 30]])
    assert not torch.equal(dense[:, 3], weight[:, 3])


@FORMS
def test_columns_without_codes_are_always_taken_out(fixed):
    x, weight = small()
    weight = weight.half().float()
    weight[:, 30] *= 8  # would set the scale of every row
    layer = OutlierInt8Linear.from_float(
        weight, threshold=1e9, columns=torch.tensor([30]), kept_only=True, capacity=1
    )
    rest = [j for j in range(48) if j != 30]
    assert not layer.codes[:, 30].any()
    torch.testing.assert_close(layer.scales, weight[:, rest].abs().amax(1) / 127)
    expected = from_equations(x[:, rest], weight[:, rest], torch.zeros(20), 1e9)
    expected += torch.outer(x[:, 30].double(), weight[:, 30].double())
    assert rel(layer.multiply(x, fixed=fixed), expected) <= 1e-5


# --- the fixed form -----------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [2, 3, 8, 48, 1000])
def test_the_fixed_form_is_the_exact_one_within_its_capacity(capacity):
    x, weight = small()
    layer = OutlierInt8Linear.from_float(weight, torch.randn(20), capacity=capacity)
    exact, fixed = layer.split(x, fixed=False), layer.split(x, fixed=True)
    assert torch.equal(fixed.regular, exact.regular)
    assert fixed.columns.shape == (min(capacity, 48),)  # by shapes alone
    assert int(fixed.found) == int(exact.found) == 2
    torch.testing.assert_close(
        layer.multiply(x, fixed=True), layer.multiply(x, fixed=False), rtol=1e-6, atol=1e-5
    )
    assert int(layer.counters[2]) == 0


def test_what_is_beyond_the_capacity_stays_in_int8_and_is_counted():
    x, weight = small()
    layer = OutlierInt8Linear.from_float(weight, capacity=1)
    parts = layer.split(x, fixed=True)
    assert parts.columns.tolist() == [3], "the largest is taken"
    assert torch.equal(parts.regular[:, 17], x[:, 17])
    one_out = from_equations(x, weight, torch.zeros(20), 20.0)  # as if only column 3 were an outlier
    assert rel(layer.multiply(x, fixed=True), one_out) <= 1e-5
    assert layer.counters.tolist() == [48, 2, 1]
    layer.multiply(x, fixed=True)
    assert layer.counters.tolist() == [96, 4, 2]
    share, beyond = layer.count_records(layer.counters)
    assert share.value == pytest.approx(4 / 96)
    assert (beyond.metric, beyond.value) == ("outlier_columns_beyond_capacity", 2)
    layer.reset_counters()
    assert layer.counters.tolist() == [0, 0, 0]


def test_the_fixed_form_asks_nothing_of_the_data():
    """It traces as one graph, which a question about values would break; the exact form does not."""
    x, weight = small()
    layer = OutlierInt8Linear.from_float(weight, torch.randn(20))
    compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=False)
    with torch.inference_mode():
        assert torch.equal(compiled(x), layer.multiply(x, fixed=True))
        for scale in (0.01, 100.0):  # no outlier, all outliers: the same graph
            torch.testing.assert_close(
                compiled(x * scale), layer.multiply(x * scale, fixed=False), rtol=1e-5, atol=1e-4
            )


# --- edges --------------------------------------------------------------------------------------------


@FORMS
def test_tokens_of_zeros_and_values_that_are_no_numbers(fixed):
    x, weight = small()
    layer = OutlierInt8Linear.from_float(weight, torch.ones(20))
    x[4] = 0
    assert torch.equal(layer.multiply(x, fixed=fixed)[4], torch.ones(20))
    assert torch.equal(layer.multiply(torch.zeros(3, 48), fixed=fixed), torch.ones(3, 20))
    nan = x.clone()
    nan[1, 5] = float("nan")
    assert torch.isnan(layer.multiply(nan, fixed=fixed)).all(1).tolist() == [row == 1 for row in range(9)]
    infinite = x.clone()
    infinite[1, 5] = math.inf  # an outlier column like any other: it concerns its own token only
    y = layer.multiply(infinite, fixed=fixed)
    assert torch.isfinite(y).all(1).tolist() == [row != 1 for row in range(9)]


def test_a_column_of_nan_takes_no_slot_from_an_outlier():
    x, _ = small()
    x[1, 5] = float("nan")
    parts = split_fixed(x, 6.0, 2)
    assert sorted(parts.columns.tolist()) == [3, 17]
    assert torch.equal(parts.regular.isnan(), split_exact(x, 6.0).regular.isnan())


@pytest.mark.parametrize("shape", [(48,), (2, 3, 48), (0, 48), (2, 0, 48)])
def test_any_number_of_dimensions(shape):
    layer = OutlierInt8Linear.from_float(torch.randn(20, 48), torch.randn(20))
    x = torch.randn(shape) * 3
    y = layer(x)
    assert y.shape == (*shape[:-1], 20)
    if x.numel():
        assert torch.equal(y.view(-1, 20), layer.multiply(x.reshape(-1, 48), fixed=False))


@FORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_activations(dtype, fixed):
    x, weight = small()
    layer = OutlierInt8Linear.from_float(weight, torch.zeros(20)).to(dtype)
    y = layer.multiply(x.to(dtype), fixed=fixed)
    assert y.dtype == dtype
    expected = from_equations(x.to(dtype), weight, torch.zeros(20), 6.0)
    assert rel(y, expected) <= 3 * torch.finfo(dtype).eps


@pytest.mark.parametrize("kept_only", [False, True])
def test_a_saved_layer_gives_the_same_bits(kept_only):
    x, weight = small()
    layer = OutlierInt8Linear.from_float(
        weight, torch.randn(20), columns=torch.tensor([3, 9]), kept_only=kept_only
    )
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty = OutlierInt8Linear(48, 20, kept=2, kept_only=kept_only, bias=True)
    state = torch.load(file)
    assert "counters" not in state, "what happened is no part of what the layer is"
    empty.load_state_dict(state)
    assert torch.equal(empty(x), expected)
    assert torch.equal(copy.deepcopy(layer)(x), expected)


def test_storage_follows_the_formula():
    layer = OutlierInt8Linear.from_float(torch.randn(256, 512), columns=torch.arange(4))
    stored = sum(t.numel() * t.element_size() for t in layer.state_dict().values())
    assert 8 * stored / (256 * 512) == pytest.approx(8 + 32 / 512 + 16 * 4 / 512 + 32 / 256)
    plain = OutlierInt8Linear.from_float(torch.randn(256, 512))
    assert sum(t.numel() * t.element_size() for t in plain.state_dict().values()) == 256 * 512 + 4 * 256


def test_a_model_of_another_type_keeps_scales_and_kept_columns():
    layer = OutlierInt8Linear.from_float(torch.randn(20, 48), columns=torch.tensor([3]))
    before = layer.dequantize()
    layer = layer.to(torch.bfloat16)
    assert (layer.scales.dtype, layer.kept.dtype) == (torch.float32, torch.float16)
    assert torch.equal(layer.dequantize(), before)


def test_kept_columns_that_float16_cannot_hold():
    weight = torch.randn(4, 8)
    weight[0, 2] = 1e6
    assert OutlierInt8Linear.from_float(weight, columns=torch.tensor([2])).kept.dtype == torch.bfloat16


def test_it_says_what_it_is_and_refuses_nonsense():
    layer = OutlierInt8Linear.from_float(torch.randn(20, 48), columns=torch.tensor([3]))
    assert repr(layer) == "OutlierInt8Linear(48, 20, threshold=6, capacity=48, kept=1, bias=False)"
    assert layer.kernel_name == layer.kernel_for(512, torch.float32) == "_int_mm + outlier columns"
    assert layer.simulated is False
    for values, message in (
        ({"threshold": -1.0}, "at least 0, not -1"),
        ({"threshold": math.nan}, "at least 0"),
        ({"capacity": 0}, "at least 1 column"),
    ):
        with pytest.raises(ConfigError, match=message):
            OutlierInt8Linear(48, 20, **values)
    with pytest.raises(NumericalFailure, match="NaN or infinite"):
        OutlierInt8Linear.from_float(torch.full((2, 2), math.nan))
