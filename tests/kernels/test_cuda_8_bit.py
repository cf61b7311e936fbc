"""The 8-bit layers without kernels of their own on a CUDA device: outlier columns and float8."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.kernels import fp8
from harness.nn.fp8 import Fp8Linear
from harness.nn.outlier_int8 import OutlierInt8Linear
from tests.nn.test_fp8 import from_definition
from tests.nn.test_outlier_int8 import from_equations

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [1, 2, 16, 17, 300]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tolerance(dtype: torch.dtype) -> float:
    return {torch.bfloat16: 1e-2, torch.float16: 3e-3, torch.float32: 1e-3}[dtype]


def rel_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    assert bool(torch.isfinite(value).all())
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def with_outliers(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator).clamp(-5, 5)
    x[:, [3, columns // 2]] = 40.0
    return x.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "columns"), [(256, 1024), (200, 688), (33, 100)])
def test_outlier_columns(out, columns, dtype):
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(out))
    bias = torch.randn(out)
    layer = OutlierInt8Linear.from_float(weight.cuda(), bias.cuda())
    for rows in ROWS:
        x = with_outliers(rows, columns, dtype)
        expected = from_equations(x, weight, bias, 6.0)
        y = layer(x.cuda())
        assert y.dtype == dtype
        assert rel_error(y.cpu(), expected) <= tolerance(dtype), rows
    assert layer.counters.tolist() == [len(ROWS) * columns, len(ROWS) * 2, 0]


def test_outlier_columns_are_captured_and_follow_the_data():
    """What a replay takes out depends on the input that it finds, though the launches do not."""
    weight = torch.randn(256, 1024, device="cuda")
    layer = OutlierInt8Linear.from_float(weight, capacity=4)
    x = with_outliers(32, 1024, torch.bfloat16).cuda()
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        layer.reset_counters()
        for place, beyond in ((slice(7, 8), 0), (slice(100, 104), 0), (slice(500, 506), 2), (None, 0)):
            x.copy_(torch.randn_like(x).clamp(-5, 5))
            if place is not None:
                x[:, place] = 30.0
            before = int(layer.counters[2])
            graph.replay()
            assert int(layer.counters[2]) - before == beyond
            assert torch.equal(y, layer(x))
            layer.counters[2] -= beyond  # those of the call just made


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
def test_nothing_asks_the_host():
    layers = [
        OutlierInt8Linear.from_float(
            torch.randn(64, 128, device="cuda"), columns=torch.arange(3, device="cuda")
        ),
        Fp8Linear.from_float(torch.randn(64, 128, device="cuda")),
    ]
    x = torch.randn(32, 128, device="cuda", dtype=torch.bfloat16)
    for layer in layers:
        layer(x)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


needs_fp8 = pytest.mark.skipif(
    torch.cuda.is_available() and fp8.device_problem(torch.device("cuda")) is not None,
    reason="needs compute capability 8.9",
)


@needs_fp8
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", ["e4m3", "e5m2"])
@pytest.mark.parametrize("per_tensor", [False, True])
@pytest.mark.parametrize("a_gran", ["per-token", "per-tensor-dynamic", "per-tensor-static"])
def test_float8(dtype, fmt, per_tensor, a_gran):
    weight = torch.randn(208, 688, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.02]) if a_gran == "per-tensor-static" else None
    layer = Fp8Linear.from_float(
        weight, torch.randn(208), fmt=fmt, per_tensor=per_tensor, a_gran=a_gran, input_scale=scale
    )
    inputs = [with_outliers(rows, 688, dtype) for rows in ROWS]
    expected = [from_definition(layer, x) for x in inputs]
    layer = layer.cuda()
    assert layer.kernel_name == ("triton float8" if fmt == "e4m3" else "dequantize+matmul")
    for x, wanted in zip(inputs, expected, strict=True):
        y = layer(x.cuda())
        assert y.dtype == dtype
        assert rel_error(y.cpu(), wanted) <= tolerance(dtype), x.shape


@needs_fp8
@pytest.mark.parametrize("rows", [1, 32])
def test_float8_is_captured(rows):
    layer = Fp8Linear.from_float(torch.randn(256, 512, device="cuda"))
    x = torch.randn(rows, 512, device="cuda", dtype=torch.bfloat16)
    with torch.inference_mode():
        layer(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            graph.replay()
            assert torch.equal(y, layer(x))
            dense = functional.linear(x.float(), layer.dequantize())
            assert rel_error(y, dense) <= 0.05
