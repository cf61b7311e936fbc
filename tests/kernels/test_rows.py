"""Rows rounded to 8 bits by a kernel against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_rows.py``, where triton is
installed.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from harness.kernels import fp8, int8
from harness.nn.quantizer import quantize_activation
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY, rounded

pytestmark = [
    OLD_NUMPY,
    # Of the interpreter, where a row has NaN.
    pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
]

COLUMNS = [1, 100, 4096, 11008, 20000]  # the last is read twice
KINDS = ["layer", "rms", "rms-unit-offset"]


def rows_of(columns: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """7 rows of different sizes, one of zeros, one with NaN, one of numbers below any scale."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(7, columns, generator=generator) * torch.randn(7, 1, generator=generator).exp()
    x[:, : columns // 2] *= torch.rand(columns // 2, generator=generator) ** 8  # tiny ones, too
    x[3] = 0
    x[4, columns // 3] = float("nan")
    x[6] = 1e-40
    return x.to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_int8_codes_scales_and_sums(device, dtype, columns):
    from harness.kernels import triton_rows

    x = rows_of(columns, device, dtype)
    codes, scale = quantize_activation(x)
    ours, our_scale = triton_rows.quantize(x.T.contiguous().T)
    valid = torch.tensor([0, 1, 2, 3, 5, 6], device=device)
    assert torch.equal(ours[valid], codes[valid])
    torch.testing.assert_close(our_scale, scale, rtol=0, atol=0, equal_nan=True)
    assert torch.isnan(our_scale[:, 0]).tolist() == [row == 4 for row in range(7)]
    sums = torch.empty(6, dtype=torch.int32, device=device)
    triton_rows.quantize(x[valid], sums=sums)
    assert torch.equal(sums.long(), codes[valid].long().sum(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fmt", fp8.FORMATS)
@pytest.mark.parametrize("columns", COLUMNS)
def test_float8_codes_and_scales(device, dtype, fmt, columns):
    from harness.kernels import triton_rows

    x = rows_of(columns, device, dtype)
    # On the CPU, where nothing of this runs a kernel.
    codes, scale = fp8.quantize(x.cpu(), fp8.FORMATS[fmt], per_row=True)
    ours, our_scale = (each.cpu() for each in triton_rows.quantize(x, fp8.FORMATS[fmt]))
    assert ours.dtype == fp8.FORMATS[fmt]
    torch.testing.assert_close(our_scale, scale, rtol=0, atol=0, equal_nan=True)
    is_number = ~torch.isnan(codes.float())
    assert torch.equal(~torch.isnan(ours.float()), is_number)
    assert is_number.all(1).tolist() == [row != 4 for row in range(7)]
    assert torch.equal(ours.view(torch.uint8)[is_number], codes.view(torch.uint8)[is_number])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fmt", fp8.FORMATS)
def test_every_float8_number_and_the_middles_between_them(device, fmt):
    """With a scale of exactly one: each number stays, each middle goes to the even neighbour."""
    from harness.kernels import triton_rows

    dtype = fp8.FORMATS[fmt]
    every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    every = every[torch.isfinite(every)].sort().values.unique()
    middles = (every[1:] + every[:-1]) / 2
    around = torch.cat([torch.nextafter(middles, every[1:]), torch.nextafter(middles, every[:-1])])
    x = torch.cat([every, middles, around])[None]
    codes, scale = triton_rows.quantize(x.to(device), dtype)
    assert float(scale) == 1.0
    assert torch.equal(codes.cpu().float(), x.to(dtype).float())


def from_statistics(x, weight, bias, statistics, kind: str) -> torch.Tensor:
    """The norm written out, with the mean and the reciprocal root given; rounded where models round."""
    values = x.float()
    if kind == "layer":
        values = values - statistics[:, :1]
    values = values * statistics[:, 1:]
    if kind == "rms":
        values = rounded(values, x.dtype).float() * weight.float()
    else:
        values = values * (weight.float() + (1.0 if kind == "rms-unit-offset" else 0.0))
    return rounded(values if bias is None else values + bias.float(), x.dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [33, 300, 4096])
def test_a_norm_and_its_rounding(device, dtype, kind, columns):
    """Statistics against float64; everything after them bit for bit."""
    from harness.kernels import triton_rows

    generator = torch.Generator().manual_seed(columns)
    x = (torch.randn(9, columns, generator=generator) + 0.3).to(device, dtype)
    weight = torch.randn(columns, generator=generator).to(device, dtype)
    bias = torch.randn(columns, generator=generator).to(device, dtype) if kind == "layer" else None
    found = torch.empty(9, 2, device=device)
    codes, scale = triton_rows.normalize_quantize(x, weight, bias, eps=1e-5, kind=kind, statistics=found)
    exact = x.double()
    mean = exact.mean(1) if kind == "layer" else exact.new_zeros(9)
    torch.testing.assert_close(found[:, 0].double(), mean, rtol=2e-6, atol=1e-6)
    root = ((exact - mean[:, None]).pow(2).mean(1) + 1e-5).rsqrt()
    torch.testing.assert_close(found[:, 1].double(), root, rtol=2e-6, atol=0)
    expected, expected_scale = quantize_activation(from_statistics(x, weight, bias, found, kind))
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_sums_that_are_exact_in_any_order_give_the_bits_of_the_definition(device, kind, monkeypatch):
    """Small whole numbers and a power of two of columns: no order of adding up can be told from another."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-8, 9, (2, 5, 256), generator=generator).half()
    x -= x.float().mean(-1, keepdim=True).round().half()
    if kind == "layer":
        x[..., 128:] = -x[..., :128]  # a mean of zero
    weight = torch.randn(256, generator=generator).half()
    x, weight = x.to(device), weight.to(device)
    expected, expected_scale = int8.normalize_quantize(x.cpu(), weight.cpu(), None, eps=0.25, kind=kind)
    monkeypatch.setattr(int8, "has_triton", lambda device: True)
    codes, scale = int8.normalize_quantize(x, weight, None, eps=0.25, kind=kind)
    assert codes.shape == x.shape
    # The reciprocal root of a device may be off by its last bit, which float16 mostly does not show.
    assert float((codes.cpu() != expected).float().mean()) <= (0.0 if device == "cpu" else 0.01)
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=0 if device == "cpu" else 1e-3, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernel_does_not_take_is_done_in_two_steps(device, monkeypatch):
    """Parameters of another type than the input, and empty inputs."""
    x, weight = torch.randn(3, 64, device=device).half(), torch.randn(64, device=device)
    norm = weight * (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).half()
    expected = quantize_activation(norm)
    monkeypatch.setattr(int8, "has_triton", lambda device: True)
    codes, scale = int8.normalize_quantize(x, weight, None, eps=1e-6, kind="rms")
    assert torch.equal(codes, expected[0])
    assert torch.equal(scale, expected[1])
    assert int8.normalize_quantize(x[:0], weight.half(), None, eps=1e-6, kind="rms")[0].shape == (0, 64)


@pytest.mark.parametrize("device", DEVICES)
def test_the_float8_layer_runs_it(device, monkeypatch):
    monkeypatch.setattr(fp8, "has_triton", lambda device: True)
    x = torch.randn(6, 64, device=device)
    weight, w_scale = fp8.quantize(torch.randn(32, 64, device=device), torch.float8_e4m3fn, per_row=True)
    y = fp8.linear(x, weight, w_scale.view(-1), None)
    expected = functional.linear(x, weight.float() * w_scale)
    assert float((y - expected).norm() / expected.norm()) <= 0.05


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_of_float8_rows(device, dtype):
    """The kernel that may take the place of `torch._scaled_mm`."""
    from harness.kernels import triton_int8
    from harness.kernels.int8_launches import Launch

    if device == "cpu":
        pytest.skip("the interpreter has no float8 products")
    x, w = torch.randn(100, 256, device=device), torch.randn(96, 256, device=device)
    (a, a_scale), (b, b_scale) = (fp8.quantize(each, torch.float8_e4m3fn, per_row=True) for each in (x, w))
    bias = torch.randn(96, device=device).to(dtype)
    launch = Launch("tma", 64, 128, 128, 4, 3)
    y = triton_int8.matmul(a, a_scale, b, b_scale.view(-1), bias, dtype, launch=launch)
    expected = (a.double() * a_scale) @ (b.double() * b_scale).T + bias.double()
    assert y.dtype == dtype
    assert float((y.double() - expected).norm() / expected.norm()) <= 5e-3
