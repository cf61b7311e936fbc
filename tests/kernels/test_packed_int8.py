"""Packed weights times int8 tokens against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_packed_int8.py``, where triton
is installed.
"""

from __future__ import annotations

import pytest
import torch

from harness.errors import NotApplicable
from harness.kernels import int8, packed_int8, reference, weight_only
from harness.kernels.int8_launches import Launch
from harness.nn.integer_linear import IntegerLinear
from harness.nn.packing import pack_weight, unpack_matrix
from harness.nn.quantized import Int8Linear
from harness.nn.quantizer import quantize_activation, quantize_row_groups, quantize_weight
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY, same

pytestmark = OLD_NUMPY

SMALL = Launch("dot", 16, 32, 256, 4, 2)
GEMV = Launch("gemv", 1, 16, 512, 4, 1)
BITS = [(2, False), (3, False), (4, False), (8, False), (2, True), (3, True), (4, True)]
# out, in: tiles of 128, of 32, and padding in the last of 8 columns (which 2 and 3 bits cannot read)
SHAPES = [(37, 384), (20, 96), (33, 344), (9, 1001)]


def packed(bits: int, sym: bool, shape: tuple[int, int], device: str = "cpu", **options):
    generator = torch.Generator().manual_seed(bits + shape[1])
    weight = quantize_weight(torch.randn(shape, generator=generator) + 0.2, bits=bits, sym=sym, **options)
    return pack_weight(type(weight)(**{
        field: value.to(device) if isinstance(value := getattr(weight, field), torch.Tensor) else value
        for field in weight.__dataclass_fields__
    }))  # fmt: skip


def whole_words(weight) -> bool:
    return all(weight.tile * width % 32 == 0 for width in ((2, 1) if weight.bits == 3 else (weight.bits,)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("bits", "sym"), BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_have_the_bits_of_plain_torch(device, dtype, bits, sym, shape):
    from harness.kernels import triton_packed_int8

    weight = packed(bits, sym, shape, device)
    if not whole_words(weight):
        pytest.skip("a tile without whole words")
    generator = torch.Generator().manual_seed(0)
    for rows in (1, 5, 17):
        x = torch.randn(rows, shape[1], generator=generator).to(device)
        bias = None if rows == 5 else torch.randn(shape[0], generator=generator).to(device, dtype)
        codes, scale = quantize_activation(x, per_token=rows != 5)
        expected = reference.packed_int8_linear(codes, scale, weight, bias, torch.float32)
        same(triton_packed_int8.small(codes, scale, weight, bias, dtype, SMALL), expected, dtype)
        if rows == 1:
            same(triton_packed_int8.gemv(codes, scale, weight, bias, dtype, GEMV), expected, dtype)


@pytest.mark.parametrize(("bits", "sym"), BITS)
@pytest.mark.parametrize("shape", [*SHAPES, (8, 24)], ids=str)
def test_the_reference_is_the_product_of_the_numbers_that_are_meant(bits, sym, shape):
    weight = packed(bits, sym, shape)
    x, bias = torch.randn(6, shape[1]), torch.randn(shape[0])
    codes, scale = quantize_activation(x)
    dense = reference.dequantize(weight).double()
    expected = (codes.double() * scale.double()) @ dense.T + bias.double()
    y = reference.packed_int8_linear(codes, scale, weight, bias, torch.float32)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("bits", "sym"), BITS)
def test_unpacking(device, bits, sym):
    from harness.kernels import triton_packed_int8

    weight = packed(bits, sym, (37, 352), device)
    if not whole_words(weight):
        pytest.skip("a tile without whole words")
    codes = unpack_matrix(weight.codes, bits, weight.tile)[:, :352].int()
    zero = torch.tensor([128], device=device) if bits == 8 else reference.packed_zeros(weight)
    assert torch.equal(triton_packed_int8.unpack(weight).int(), codes - zero[:, None])


@pytest.fixture
def with_triton(monkeypatch):
    monkeypatch.setattr(int8, "has_triton", lambda device: True)
    monkeypatch.setattr(weight_only, "has_triton", lambda device: True)


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_layers_run_them(device, bits, monkeypatch):
    """A few rows and many, zero points and none, scales of their own and shared by rows."""
    generator = torch.Generator().manual_seed(bits)
    weight, bias = torch.randn(24, 128, generator=generator), torch.randn(24, generator=generator)
    layers = [IntegerLinear.from_weight(quantize_weight(weight, bits=bits, sym=False), bias)]
    if bits < 8:
        groups = quantize_row_groups(weight, bits=bits, row_groups=6)
        layers += [
            Int8Linear.from_weight(quantize_weight(weight, bits=bits, sym=True)),
            Int8Linear.from_weight(groups, bias, row_groups=6),
        ]
    for layer in layers:
        layer = layer.to(device)
        for rows, kernel in ((1, "gemv"), (7, "small"), (70, "unpack")):
            assert kernel in layer.kernel_for(rows, torch.float32)
            x = torch.randn(rows, 128, generator=generator).to(device)
            codes, scale = quantize_activation(x)
            expected = reference.packed_int8_linear(codes, scale, layer.packed, layer.bias, torch.float32)
            same(layer(x), expected, torch.float32)


@pytest.mark.usefixtures("with_triton")
def test_the_choice(monkeypatch):
    weight = packed(4, True, (16, 128))
    assert packed_int8.choose(weight, 1) == "triton w4a8 gemv"
    assert packed_int8.choose(weight, 64) == "triton w4a8 small"
    assert packed_int8.choose(weight, 65) == "unpack, triton w8a8"
    # A tile of 8 columns has no whole word of 2 bits.
    assert packed_int8.choose(packed(2, True, (16, 1000)), 1) == "unpack, triton w8a8"
    monkeypatch.undo()
    assert packed_int8.choose(weight, 1) == "unpack, _int_mm"


def test_scales_along_the_columns_are_refused():
    weight = packed(4, True, (16, 128), group_size=32)
    codes, scale = quantize_activation(torch.randn(2, 128))
    with pytest.raises(NotApplicable, match="constant along the columns"):
        packed_int8.linear_of_codes(codes, scale, weight, None, torch.float32)


def test_a_compiler_sees_one_operator():
    layer = Int8Linear.from_weight(quantize_weight(torch.randn(8, 32), bits=4, sym=True))
    x = torch.randn(3, 32)
    seen = []

    def backend(module, _):
        seen.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
        return module.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    assert any("packed_int8_linear" in target for target in seen)
    assert not any("_int_mm" in target for target in seen)
