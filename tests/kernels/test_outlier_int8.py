"""The kernels of LLM.int8() against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device, where triton is installed:
``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_outlier_int8.py``.
"""

from __future__ import annotations

import math

import pytest
import torch

from harness.kernels import outlier_int8
from harness.nn.outlier_int8 import OutlierInt8Linear
from harness.nn.quantizer import quantize_activation
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY
from tests.nn.test_outlier_int8 import from_equations

pytestmark = OLD_NUMPY

KEPT = torch.tensor([3, 7, 40])
OPTIONS = {
    "plain": {},
    "kept": {"columns": KEPT},
    "kept only": {"columns": KEPT, "kept_only": True},
    "few slots": {"capacity": 2},
    "many slots": {"capacity": 100, "threshold": 1.5},
    "one slot of equal ones": {"capacity": 1},
    "none": {"threshold": math.inf},
}


def planted(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """Outliers in the columns 3, 17 (the largest) and 30; 3 and 30 have the same peak."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, columns, generator=generator).clamp(-4, 4)
    x[:, [3, 17, 30]] = 40.0
    x[0, 17] = -50.0
    return x.to(dtype)


def run(layer: OutlierInt8Linear, x: torch.Tensor) -> torch.Tensor:
    return outlier_int8.linear(
        x, layer.codes, layer.row_scales(), layer.bias, threshold=layer.threshold, capacity=layer.capacity,
        kept=layer.kept, place=layer.place, kept_only=layer.kept_only, counters=layer.counters,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(48, 20), (100, 37), (320, 70)], ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_layer(device, dtype, size, options):
    """Against the fixed form in float32, whose split is that of the very same numbers; counters too."""
    if device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter has no products of bfloat16")
    columns, out = size
    generator = torch.Generator().manual_seed(columns)
    weight, bias = torch.randn(out, columns, generator=generator), torch.randn(out, generator=generator)
    if options.get("capacity") == 1:
        bias = None
    layer = OutlierInt8Linear.from_float(weight, bias, **options)
    for rows in (1, 3, 40):
        x = planted(rows, columns, dtype)
        if options.get("capacity") == 1:
            x[:, 17] = 0.0  # the peaks of 3 and 30 are the same: the first is taken
            regular = x.float().clone()
            regular[:, 3] = 0
            codes, scale = quantize_activation(regular)
            expected = (codes.float() * scale) @ layer.dequantize().T
            expected += torch.outer(x[:, 3].float(), layer.dequantize(dtype)[:, 3].float())
            counted = torch.tensor([columns, 2, 1])
        else:
            layer.reset_counters()
            expected = layer.multiply(x.float(), fixed=True)
            counted = layer.counters.clone()
        layer.reset_counters()
        on_device = layer.to(device)
        y = run(on_device, x.to(device)).cpu()
        assert torch.equal(on_device.counters.cpu(), counted), rows
        layer = on_device.cpu()
        assert y.dtype == dtype
        error = float((y.float() - expected).norm() / expected.norm())
        assert error <= {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], rows


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 9])
def test_the_equations_of_the_paper(device, rows):
    generator = torch.Generator().manual_seed(3)
    x, weight = planted(rows, 64, torch.float32), torch.randn(21, 64, generator=generator)
    bias = torch.randn(21, generator=generator)
    layer = OutlierInt8Linear.from_float(weight, bias).to(device)
    y = run(layer, x.to(device)).cpu()
    expected = from_equations(x, weight, bias, 6.0)
    assert float((y - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 30])
def test_the_rest_is_rounded_as_without_outliers(device, rows):
    """Codes and scales bit for bit, in the rows' own scales after the outliers are out."""
    from harness.kernels import triton_outlier_int8

    x = planted(rows, 96, torch.float16)
    layer = OutlierInt8Linear.from_float(torch.randn(16, 96)).to(device)
    codes, scale, outliers = triton_outlier_int8.split(
        x.to(device), 6.0, 64, layer.counters, layer.codes, layer.row_scales(), None, None, False
    )
    regular = x.clone()
    regular[:, [3, 17, 30]] = 0
    expected, expected_scale = quantize_activation(regular)
    assert torch.equal(codes.cpu(), expected)
    assert torch.equal(scale.cpu(), expected_scale)
    assert int(outliers.used) == 3
    assert outliers.columns[:3].tolist() == [3, 17, 30]
    assert torch.equal(outliers.values[:, :3].cpu(), x[:, [3, 17, 30]])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # of the interpreter
def test_a_column_with_nan_is_no_outlier(device):
    from harness.kernels import triton_outlier_int8

    x = planted(20, 64, torch.float32)
    x[4, 30] = float("nan")
    x[11, 8] = float("inf")
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    columns, used, taken = triton_outlier_int8.select(x.to(device), 6.0, 8, counters, None)
    assert columns[: int(used)].tolist() == [3, 8, 17]
    assert taken.nonzero()[:, 0].tolist() == [3, 8, 17]
    assert counters.tolist() == [64, 3, 0]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("capacity", [1, 5, 16, 63, 64])
def test_the_largest_are_taken_where_there_is_no_room_for_all(device, capacity):
    from harness.kernels import triton_outlier_int8

    x = torch.rand(7, 64, generator=torch.Generator().manual_seed(capacity)) + 7
    counters = torch.zeros(3, dtype=torch.int64, device=device)
    columns, used, _ = triton_outlier_int8.select(x.to(device), 6.0, capacity, counters, None)
    assert int(used) == capacity
    largest = x.amax(0).topk(capacity).indices.sort().values
    assert columns[:capacity].tolist() == largest.tolist()
    assert counters.tolist() == [64, 64, 64 - capacity]


def test_what_the_kernels_take(monkeypatch):
    monkeypatch.setattr(outlier_int8, "has_triton", lambda device: True)
    device = torch.device("cuda")
    assert outlier_int8.fits(device, torch.bfloat16, 4096, 64)
    assert outlier_int8.fits(device, torch.bfloat16, 11008, 128)
    assert not outlier_int8.fits(device, torch.bfloat16, 4096, 4096), "a threshold of zero"
    assert not outlier_int8.fits(device, torch.bfloat16, 20000, 64)
    assert not outlier_int8.fits(device, torch.float64, 4096, 64)
    monkeypatch.undo()
    assert not outlier_int8.fits(torch.device("cpu"), torch.float32, 64, 8)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 11])
def test_the_layer_runs_them_unless_a_gradient_is_wanted(device, rows, monkeypatch):
    monkeypatch.setattr(outlier_int8, "has_triton", lambda device: True)
    x = planted(rows, 64, torch.float32).to(device)
    layer = OutlierInt8Linear.from_float(torch.randn(21, 64), torch.randn(21)).to(device)
    y = layer(x[None])
    assert y.shape == (1, rows, 21)
    assert torch.equal(y[0], run(layer, x))
    calls = []
    monkeypatch.setattr(outlier_int8, "linear", lambda *args, **kwargs: calls.append(args))
    with_gradient = layer(x.clone().requires_grad_())
    torch.testing.assert_close(with_gradient.detach(), y[0], rtol=1e-5, atol=1e-4)
    assert not calls
    assert layer(x[:0]).shape == (0, 21)
