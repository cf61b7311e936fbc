"""The packed linear layers against `F.linear` on the numbers they stand for."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError, NotApplicable
from harness.kernels import reference
from harness.nn.fp8 import Fp8Linear
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import QuantizedWeight, quantize_weight
from harness.nn.semi_structured import SemiStructuredLinear

FORMS = [
    {"bits": 4, "sym": False, "group_size": 32},
    {"bits": 4, "sym": True, "group_size": 32},
    {"bits": 3, "sym": False, "group_size": 32},
    {"bits": 2, "sym": False, "group_size": 16},
    {"bits": 8, "sym": True},
    {"bits": 8, "sym": False, "group_size": 64},
    {"bits": 3, "sym": True},
    {"bits": 4, "sym": False, "per_tensor": True},
]


def stored_bits(layer: nn.Module) -> float:
    tensors = [t for name, t in layer.state_dict().items() if name != "bias"]
    return 8 * sum(t.numel() * t.element_size() for t in tensors) / (layer.in_features * layer.out_features)


def saved_and_loaded(layer: nn.Module, empty: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    empty.load_state_dict(torch.load(file))
    return empty


# --- weights only ----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(192,), (1, 192), (5, 192), (2, 3, 192), (2, 1, 3, 192)])
def test_it_computes_what_its_numbers_say(form, has_bias, shape):
    weight = quantize_weight(torch.randn(40, 192), **form)
    bias = torch.randn(40) if has_bias else None
    layer = QuantizedLinear.from_weight(weight, bias)
    x = torch.randn(shape)
    expected = functional.linear(x, weight.dequantize(), bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    assert layer(x).dtype == x.dtype


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_gives_an_empty_output(form):
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(40, 192), **form))
    assert layer(torch.randn(0, 192)).shape == (0, 40)
    assert layer(torch.randn(2, 0, 192)).shape == (2, 0, 40)


@pytest.mark.parametrize("form", FORMS)
def test_a_saved_layer_gives_the_same_bits(form):
    weight = quantize_weight(torch.randn(40, 192), **form)
    layer = QuantizedLinear.from_weight(weight, torch.randn(40))
    empty = QuantizedLinear(
        192,
        40,
        bits=form["bits"],
        group_size=form.get("group_size", -1),
        sym=form["sym"],
        per_tensor=form.get("per_tensor", False),
        bias=True,
        scale_dtype=layer.scales.dtype,
    )
    loaded = saved_and_loaded(layer, empty)
    x = torch.randn(7, 192)
    assert torch.equal(loaded(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ({"bits": 4, "sym": False, "group_size": 128}, 4 + 16 / 128 + 4 / 128),  # 4.156
        ({"bits": 3, "sym": False, "group_size": 128}, 3 + 16 / 128 + 3 / 128),
        ({"bits": 2, "sym": True, "group_size": 64}, 2 + 16 / 64),
        ({"bits": 8, "sym": True}, 8 + 32 / 1024),
        ({"bits": 4, "sym": True}, 4 + 16 / 1024),
    ],
)
def test_stored_bits_follow_the_formula(form, expected):
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(256, 1024), **form))
    assert stored_bits(layer) == pytest.approx(expected, rel=1e-3)


def test_columns_may_be_stored_in_another_order():
    order = torch.randperm(64)
    weight = torch.randn(8, 64)
    shuffled = quantize_weight(weight[:, order], bits=4, sym=False, group_size=16)
    reordered = QuantizedWeight(
        shuffled.codes, shuffled.scale, shuffled.zero, 4, 16, 64, order.to(torch.int32)
    )
    layer = QuantizedLinear.from_weight(reordered)
    expected = torch.empty(8, 64)
    expected[:, order] = shuffled.dequantize()
    assert torch.equal(layer.dequantize(), expected)
    x = torch.randn(3, 64)
    torch.testing.assert_close(layer(x), x @ expected.T, rtol=1e-5, atol=1e-5)
    empty = QuantizedLinear(64, 8, bits=4, group_size=16, reordered=True)
    assert torch.equal(saved_and_loaded(layer, empty)(x), layer(x))


@pytest.mark.parametrize("size", [(1, 7), (7, 1), (1, 1), (3, 33)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_odd_sizes(size, bits):
    weight = quantize_weight(torch.randn(size), bits=bits, sym=False)
    layer = QuantizedLinear.from_weight(weight)
    x = torch.randn(4, size[1])
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=1e-6, atol=1e-6)


def test_a_padded_last_group():
    weight = quantize_weight(torch.randn(6, 100), bits=4, sym=False, group_size=32, pad=True)
    layer = QuantizedLinear.from_weight(weight)
    x = torch.randn(4, 100)
    torch.testing.assert_close(layer(x), x @ weight.dequantize().T, rtol=1e-6, atol=1e-6)


def test_scales_keep_their_type_when_a_model_changes_its_own():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(8, 64), bits=8, sym=True), torch.randn(8))
    before = layer.dequantize()
    layer = nn.Sequential(layer).to(torch.bfloat16)[0]
    assert layer.scales.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.dequantize(), before)
    assert layer(torch.randn(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_gradients_reach_the_input():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(8, 64), bits=4, sym=True, group_size=16))
    x = torch.randn(3, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize().sum(0).expand(3, 64))


def test_it_says_what_it_is():
    layer = QuantizedLinear.from_weight(quantize_weight(torch.randn(8, 64), bits=4, sym=False, group_size=16))
    assert repr(layer) == "QuantizedLinear(64, 8, bits=4, group_size=16, sym=False, bias=False)"
    assert layer.kernel_name == layer.kernel_for(512, torch.float32) == "dequantize+matmul"
    assert layer.simulated is False
    with pytest.raises(ConfigError, match="takes 64 features, not 63"):
        layer(torch.randn(2, 63))
    with pytest.raises(ConfigError, match="not 5"):
        QuantizedLinear(8, 8, bits=5)


# --- integers times integers -----------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 16, 17, 33])
@pytest.mark.parametrize(
    ("in_features", "out_features"), [(64, 40), (100, 33), (7, 5), (1, 5), (5, 1), (1, 1)]
)
def test_the_integer_product_is_exact(rows, in_features, out_features):
    a = torch.randint(-127, 128, (rows, in_features), dtype=torch.int8)
    b = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    product = reference.int8_matmul(a, b)
    assert product.dtype == torch.int32
    assert torch.equal(product.to(torch.int64), a.to(torch.int64) @ b.to(torch.int64).T)


def expected_w8a8(x, weight, bias, scale):
    """In float64, from the definition."""
    w_scale = weight.scale.double()
    w = torch.round(weight.dequantize(torch.float64) / w_scale)
    q = torch.round(x.double() / scale.double()).clamp(-127, 127)
    return (q @ w.T) * scale.double() * w_scale.T + bias.double()


@pytest.mark.parametrize("per_tensor", [True, False])
@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
@pytest.mark.parametrize("shape", [(1, 48), (5, 48), (2, 3, 48)])
def test_w8a8_is_the_product_of_the_rounded(per_tensor, a_gran, shape):
    torch.manual_seed(0)  # a number in the middle between two others may be rounded to either
    weight = quantize_weight(torch.randn(20, 48), bits=8, sym=True, per_tensor=per_tensor)
    bias, x = torch.randn(20), torch.randn(shape) * 3
    given = torch.tensor([0.05]) if a_gran == "per-tensor-static" else None
    layer = Int8Linear.from_weight(weight, bias, a_gran=a_gran, input_scale=given)
    if a_gran == "per-token":
        scale = x.abs().amax(-1, keepdim=True) / 127
    else:
        scale = given if given is not None else x.abs().amax() / 127
    torch.testing.assert_close(layer(x).double(), expected_w8a8(x, weight, bias, scale), rtol=1e-5, atol=1e-4)
    assert torch.equal(layer.dequantize(), weight.dequantize())
    empty = Int8Linear(48, 20, per_tensor=per_tensor, a_gran=a_gran, bias=True)
    assert torch.equal(saved_and_loaded(layer, empty)(x), layer(x))


def test_w8a8_of_nothing_and_of_zeros():
    layer = Int8Linear.from_weight(quantize_weight(torch.randn(8, 16), bits=8, sym=True), torch.ones(8))
    assert layer(torch.randn(0, 16)).shape == (0, 8)
    assert torch.equal(layer(torch.zeros(3, 16)), torch.ones(3, 8))


def test_nan_reaches_the_output_of_its_token():
    layer = Int8Linear.from_weight(quantize_weight(torch.randn(8, 16), bits=8, sym=True))
    x = torch.randn(3, 16)
    x[1, 5] = float("nan")
    assert torch.isnan(layer(x)).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    "form",
    [
        {"bits": 8, "sym": True, "group_size": 16},
        {"bits": 8, "sym": False},
        {"bits": 4, "sym": True, "group_size": 16},
    ],
)
def test_scales_that_cannot_leave_the_sum_are_refused(form):
    with pytest.raises(NotApplicable, match="cannot leave the sum"):
        Int8Linear.from_weight(quantize_weight(torch.randn(8, 64), **form))


def test_a_static_scale_belongs_to_static_activations():
    weight = quantize_weight(torch.randn(8, 64), bits=8, sym=True)
    with pytest.raises(ConfigError, match="per-tensor-static"):
        Int8Linear.from_weight(weight, a_gran="per-tensor-static")
    with pytest.raises(ConfigError, match="per-tensor-static"):
        Int8Linear.from_weight(weight, input_scale=torch.ones(1))


def test_int8_storage_and_names():
    layer = Int8Linear.from_weight(quantize_weight(torch.randn(64, 512), bits=8, sym=True))
    assert stored_bits(layer) == pytest.approx(8 + 32 / 512)
    assert layer.kernel_name == "_int_mm"
    assert "weights=per-channel, activations=per-token" in repr(layer)
    before = layer.dequantize()
    assert torch.equal(layer.to(torch.bfloat16).dequantize(), before)


@pytest.mark.parametrize(
    "make",
    [
        lambda w, b: QuantizedLinear.from_weight(quantize_weight(w, bits=4, sym=True), b),
        lambda w, b: Int8Linear.from_weight(quantize_weight(w, bits=8, sym=True), b),
        lambda w, b: Fp8Linear.from_float(w, b),
        lambda w, b: OutlierInt8Linear.from_float(w, b),
        lambda w, b: SemiStructuredLinear.from_dense(w * torch.tensor([1.0, 0, 0, 1]).repeat(16), b),
    ],
    ids=["packed", "int8", "float8", "outliers", "2:4"],
)
def test_a_bias_is_kept_side_by_side_as_kernels_read_it(make):
    weight, apart = torch.randn(32, 64), torch.randn(64)[::2]
    layer = make(weight, apart)
    assert layer.bias.is_contiguous()
    assert torch.equal(layer.bias, apart)
    beside = apart.clone()
    assert make(weight, beside).bias.data_ptr() == beside.data_ptr(), "and not copied where it lies so"
