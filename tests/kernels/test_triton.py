"""Triton kernels against the plain-torch reference, on a CUDA device."""

from __future__ import annotations

import pytest
import torch

from harness.kernels import int8, reference, weight_only
from harness.nn.packing import PackedWeight, pack_weight
from harness.nn.quantized import Int8Linear, QuantizedLinear
from harness.nn.quantizer import quantize_activation, quantize_weight

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [1, 2, 7, 16, 17, 512]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]

FORMS = [
    ((256, 1024), {"bits": 4, "sym": False, "group_size": 128}),
    ((256, 640), {"bits": 4, "sym": False, "group_size": 128}),  # an odd number of groups
    ((200, 1024), {"bits": 4, "sym": True, "group_size": 64}),  # rows that do not fill a program
    ((130, 288), {"bits": 4, "sym": False, "group_size": 32}),
    ((96, 688), {"bits": 4, "sym": False}),
    ((96, 512), {"bits": 4, "sym": False, "per_tensor": True}),
    ((96, 300), {"bits": 4, "sym": False, "group_size": 128, "pad": True}),
    ((96, 1024), {"bits": 4, "sym": False, "group_size": 256}),
    ((256, 1024), {"bits": 3, "sym": False, "group_size": 128}),
    ((70, 1024), {"bits": 3, "sym": True}),
    ((256, 1024), {"bits": 2, "sym": False, "group_size": 64}),
    ((256, 1024), {"bits": 8, "sym": True}),
    ((100, 700), {"bits": 8, "sym": True}),
    ((96, 576), {"bits": 8, "sym": False, "group_size": 64}),
    ((4096, 4096), {"bits": 4, "sym": False, "group_size": 128}),
]
IDS = ["-".join(map(str, [*shape, *options.values()])) for shape, options in FORMS]


def on_cuda(shape: tuple[int, int], options: dict) -> PackedWeight:
    generator = torch.Generator().manual_seed(shape[0] + shape[1])
    weight = torch.randn(shape, generator=generator).cuda()
    return pack_weight(quantize_weight(weight, **options))


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]


def rel_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert bool(torch.isfinite(value).all())
    return float((value.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize(("shape", "options"), FORMS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weight_only(shape, options, dtype):
    weight = on_cuda(shape, options)
    dense = reference.dequantize(weight).double()
    # One type without a bias, so that both forms of every kernel run.
    bias = None if dtype == torch.float16 else torch.randn(shape[0], device="cuda").to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], device="cuda").to(dtype)
        expected = x.double() @ dense.T + (0 if bias is None else bias.double())
        assert weight_only.choose(weight, rows, dtype).startswith("triton")
        y = weight_only.linear(x, weight, bias)
        assert y.dtype == dtype
        assert rel_error(y, expected) <= tolerance(dtype), rows
        assert torch.equal(weight_only.linear(x, weight, bias), y), "the same bits every time"


@pytest.mark.parametrize(("shape", "options"), FORMS, ids=IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dequantize(shape, options, dtype):
    weight = on_cuda(shape, options)
    assert torch.equal(weight_only.dequantize(weight, dtype), reference.dequantize(weight, dtype))


@pytest.mark.parametrize(("out", "columns"), [(256, 1024), (200, 688), (4096, 4096), (33, 100)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
def test_w8a8(out, columns, dtype, a_gran):
    generator = torch.Generator("cuda").manual_seed(out)
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8, device="cuda", generator=generator)
    scale = torch.rand(out, device="cuda", generator=generator) / columns
    bias = None if dtype == torch.float16 else torch.randn(out, device="cuda", generator=generator).to(dtype)
    given = torch.tensor([0.03], device="cuda") if a_gran == "per-tensor-static" else None
    per_token = a_gran == "per-token"
    for rows in ROWS:
        x = torch.randn(rows, columns, device="cuda", generator=generator).to(dtype)
        codes, x_scale = quantize_activation(x, given, per_token=per_token)
        exact = codes.double() @ weight.double().T
        assert torch.equal(reference.int8_matmul(codes, weight).double(), exact)
        expected = exact * x_scale.double() * scale.double() + (0 if bias is None else bias.double())
        y = int8.linear(x, weight, scale, bias, per_token=per_token, scale=given)
        assert y.dtype == dtype
        assert rel_error(y, expected) <= tolerance(dtype), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizing_tokens_agrees_bit_for_bit(dtype):
    from harness.kernels import triton_int8

    x = (torch.randn(50, 5000, device="cuda") * torch.randn(50, 1, device="cuda").exp()).to(dtype)
    x[3] = 0
    codes, scale = quantize_activation(x)
    ours, our_scale = triton_int8.quantize_tokens(x)
    assert torch.equal(ours, codes)
    assert torch.equal(our_scale, scale)
    assert torch.equal(triton_int8.quantize_to(x, scale[:1, 0]), quantize_activation(x, scale[:1, 0])[0])
    x[7, 11] = float("nan")
    nan = torch.isnan(triton_int8.quantize_tokens(x)[1][:, 0]).tolist()
    assert nan == [row == 7 for row in range(50)]


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_a_graph_replays_new_inputs(rows):
    weight = torch.randn(512, 1024, device="cuda")
    layers = torch.nn.Sequential(
        QuantizedLinear.from_weight(quantize_weight(weight, bits=4, sym=False, group_size=128)),
        Int8Linear.from_weight(quantize_weight(weight.T.contiguous(), bits=8, sym=True)),
    )
    x = torch.randn(rows, 1024, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layers(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layers(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layers(x))
    assert layers[0].kernel_for(rows, x.dtype).startswith("triton")


def test_gradients_reach_the_input():
    layer = QuantizedLinear.from_weight(
        quantize_weight(torch.randn(64, 256, device="cuda"), bits=4, sym=False, group_size=128)
    )
    x = torch.randn(1, 256, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad[0], layer.dequantize().sum(0), rtol=1e-4, atol=1e-4)


def test_other_strides_and_empty_batches():
    layer = QuantizedLinear.from_weight(
        quantize_weight(torch.randn(64, 256, device="cuda"), bits=4, sym=False, group_size=128)
    )
    x = torch.randn(256, 3, device="cuda", dtype=torch.bfloat16).T
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=0)
    assert layer(x[:0]).shape == (0, 64)
