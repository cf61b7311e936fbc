"""Which kernel runs where, and that what runs without CUDA is the reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from harness.kernels import bench, int8, reference, weight_only
from harness.nn.packing import pack_weight
from harness.nn.quantizer import quantize_activation, quantize_weight


def packed(bits: int = 4, shape: tuple[int, int] = (64, 256), **options):
    return pack_weight(quantize_weight(torch.randn(shape), bits=bits, sym=bits == 8, **options))


@pytest.fixture
def with_triton(monkeypatch):
    """As on a CUDA machine: only the choice is made, nothing runs."""
    monkeypatch.setattr(weight_only, "has_triton", lambda device: True)
    monkeypatch.setattr(int8, "has_triton", lambda device: True)


def test_without_cuda_weights_are_dequantized():
    weight = packed(group_size=128)
    assert weight_only.choose(weight, 1, torch.float32) == "dequantize+matmul"
    x, bias = torch.randn(3, 256), torch.randn(64)
    expected = reference.weight_only_linear(x, weight, bias)
    assert torch.equal(weight_only.linear(x, weight, bias), expected)
    assert torch.equal(weight_only.dequantize(weight, torch.float32), reference.dequantize(weight))


@pytest.mark.usefixtures("with_triton")
@pytest.mark.parametrize(
    ("bits", "rows", "kernel"),
    [
        (4, 1, "triton w4a16 gemv"),
        (4, 2, "triton w4a16 small"),
        (4, 64, "triton w4a16 small"),
        (4, 65, "triton dequantize+matmul"),
        (8, 1, "triton w8a16 gemv"),
        (8, 16, "triton w8a16 small"),
        (3, 1, "triton w3a16 gemv"),
        (3, 4, "triton w3a16 gemv"),
        (3, 5, "triton dequantize+matmul"),
        (2, 16, "triton w2a16 small"),
    ],
)
def test_the_kernel_follows_from_bits_and_rows(bits, rows, kernel):
    options = {} if bits == 8 else {"group_size": 128}
    assert weight_only.choose(packed(bits, **options), rows, torch.bfloat16) == kernel


@pytest.mark.usefixtures("with_triton")
def test_layouts_that_triton_cannot_read_fall_back():
    # A 3-bit tile of 16 columns has no whole word of its upper plane.
    narrow = packed(3, (8, 48), group_size=16)
    assert weight_only.choose(narrow, 1, torch.bfloat16) == "dequantize+matmul"
    # Zero points that are no whole numbers are not packed.
    free = packed(4, group_size=128)
    free = replace(free, zeros=torch.zeros(2, 64, dtype=torch.float16))
    assert weight_only.choose(free, 1, torch.bfloat16) == "dequantize+matmul"
    # Groups of 12 columns straddle the tiles.
    assert weight_only.choose(packed(4, (8, 48), group_size=12), 1, torch.bfloat16) == "dequantize+matmul"
    assert weight_only.choose(packed(group_size=128), 1, torch.float64) == "dequantize+matmul"


@pytest.mark.usefixtures("with_triton")
def test_the_name_gives_the_width_of_the_activations():
    assert weight_only.choose(packed(group_size=128), 1, torch.float32) == "triton w4a32 gemv"
    assert int8.choose(torch.device("cuda")) == "triton w8a8"


def test_int8_without_cuda_is_the_reference():
    weight = torch.randint(-127, 128, (40, 64), dtype=torch.int8)
    scale, bias, x = torch.rand(40), torch.randn(40), torch.randn(5, 64)
    codes, x_scale = quantize_activation(x)
    expected = reference.int8_linear(codes, x_scale, weight, scale, bias, x.dtype)
    assert torch.equal(int8.linear(x, weight, scale, bias), expected)
    assert int8.choose(x.device) == "_int_mm"


def test_the_benchmark_knows_its_schemes():
    weight = torch.randn(128, 256)
    for name, make in bench.SCHEMES.items():
        layer = make(weight)
        assert (layer.in_features, layer.out_features) == (256, 128), name
    assert "bf16" in bench.SCHEMES
