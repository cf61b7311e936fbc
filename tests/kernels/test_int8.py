"""The int8 kernels against plain torch: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_int8.py``, where triton is
installed.
"""

from __future__ import annotations

import pytest
import torch

from harness.kernels import int8, int8_launches, reference
from harness.kernels.int8_launches import Launch
from harness.nn.quantizer import quantize_activation
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY, same

pytestmark = OLD_NUMPY

# rows, out, in; sizes that fill no program among them
FORMS = [(1, 37, 64), (5, 40, 100), (33, 70, 208)]
DOT = Launch("dot", 16, 32, 64, 4, 2, group=2)
SPLIT = Launch("dot", 16, 16, 32, 4, 2, split=3)
TMA = Launch("tma", 16, 32, 64, 4, 2, group=2)
GEMV = Launch("gemv", 1, 8, 256, 4, 1)


def operands(rows: int, out: int, columns: int, device: str, dtype: torch.dtype):
    """x [rows, in], weights [out, in], their scales [out], a bias [out]."""
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8, generator=generator)
    scale = torch.rand(out, generator=generator) / columns
    x = torch.randn(rows, columns, generator=generator).to(dtype)
    bias = torch.randn(out, generator=generator).to(dtype)
    return (each.to(device) for each in (x, weight, scale, bias))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("launch", [DOT, SPLIT, TMA], ids=["dot", "split", "tma"])
def test_products_have_the_bits_of_plain_torch(device, dtype, form, launch):
    from harness.kernels import triton_int8

    if launch.kind == "tma" and form[2] % int8_launches.ALIGNMENT:
        pytest.skip("rows that the copy engine cannot read")
    x, weight, scale, bias = operands(*form, device, dtype)
    for per_token in (True, False):
        codes, x_scale = quantize_activation(x, per_token=per_token)
        exact = codes.double() @ weight.double().T
        assert torch.equal(reference.int8_matmul(codes, weight).double(), exact)
        for b in (None, bias):
            for w_scale in (scale, scale[:1]):
                y = triton_int8.matmul(codes, x_scale, weight, w_scale, b, dtype, launch=launch)
                same(y, reference.int8_linear(codes, x_scale, weight, w_scale, b, torch.float32), dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("launch", [DOT, SPLIT, TMA], ids=["dot", "split", "tma"])
def test_sums_are_exact_and_zero_points_are_taken_off(device, launch):
    """Scales of one leave the int32 sums themselves, here below 2^24 and so exact in float32."""
    from harness.kernels import triton_int8

    x, weight, _, _ = operands(19, 40, 512, device, torch.float32)
    codes, _ = quantize_activation(x)
    one = torch.ones(1, device=device)
    y = triton_int8.matmul(codes, one, weight, one, None, torch.float32, launch=launch)
    assert torch.equal(y.double(), codes.double() @ weight.double().T)
    sums = codes.sum(1, dtype=torch.int32)
    zeros = torch.arange(-20, 20, dtype=torch.int32, device=device)
    y = triton_int8.matmul(
        codes, one, weight, one, None, torch.float32, sums=sums, zeros=zeros, launch=launch
    )
    assert torch.equal(y.double(), codes.double() @ (weight.double() - zeros.double()[:, None]).T)


@pytest.mark.parametrize("device", DEVICES)
def test_float32_results_of_a_wide_tile(device):
    """They would not fit beside the operands that the copy engine brings: the other form runs."""
    from harness.kernels import triton_int8

    x, weight, scale, _ = operands(140, 300, 256, device, torch.float32)
    codes, x_scale = quantize_activation(x)
    wide = Launch("tma", 128, 256, 128, 8, 3)
    for dtype in (torch.float32, torch.float16):
        y = triton_int8.matmul(codes, x_scale, weight, scale, None, dtype, launch=wide)
        same(y, reference.int8_linear(codes, x_scale, weight, scale, None, torch.float32), dtype)


@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_sums_do_not_overflow(device):
    from harness.kernels import triton_int8

    codes = torch.full((1, 4096), 127, dtype=torch.int8, device=device)
    weight = torch.full((9, 4096), -127, dtype=torch.int8, device=device)
    one = torch.ones(1, device=device)
    for launch in (DOT, GEMV):
        y = triton_int8.matmul(codes, one, weight, one, None, torch.float32, launch=launch)
        assert y.tolist() == [[-127.0 * 127 * 4096] * 9]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("out", "columns"), [(37, 64), (50, 1008), (9, 2048), (16, 4112)])
def test_one_row_is_rounded_on_the_way(device, dtype, out, columns):
    """From codes, from floats whose scale is found, and from floats with a given scale: the same bits."""
    from harness.kernels import triton_int8_gemv

    x, weight, scale, bias = operands(1, out, columns, device, dtype)
    x[0, 5] *= 40
    codes, x_scale = quantize_activation(x)
    for b in (None, bias):
        for w_scale in (scale, scale[:1]):
            expected = reference.int8_linear(codes, x_scale, weight, w_scale, b, torch.float32)
            for given, by in ((codes, x_scale), (x, None), (x, x_scale.view(1))):
                y = triton_int8_gemv.gemv(given, by, weight, w_scale, b, dtype, launch=GEMV)
                same(y, expected, dtype)
    low = x_scale.view(1) / 3  # values beyond it are clipped
    codes, _ = quantize_activation(x, low)
    assert int((codes.abs() == 127).sum()) >= 1
    y = triton_int8_gemv.gemv(x, low, weight, scale, None, dtype, launch=GEMV)
    same(y, reference.int8_linear(codes, low, weight, scale, None, torch.float32), dtype)


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("device", DEVICES)
def test_a_row_of_zeros_and_one_with_nan(device):
    from harness.kernels import triton_int8_gemv

    weight = torch.ones(5, 32, dtype=torch.int8, device=device)
    x, one = torch.zeros(1, 32, device=device), torch.ones(1, device=device)
    y = triton_int8_gemv.gemv(x, None, weight, one, None, torch.float32, launch=GEMV)
    assert y.tolist() == [[0.0] * 5]
    x[0, 3] = float("nan")
    y = triton_int8_gemv.gemv(x, None, weight, one, None, torch.float32, launch=GEMV)
    assert bool(torch.isnan(y).all())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("in_gemv", [True, False], ids=["rounded in it", "rounded before"])
def test_linear_runs_them(device, dtype, in_gemv, monkeypatch):
    """`int8.linear` as layers call it, for every way to find a scale, in an odd stride of the input."""
    monkeypatch.setattr(int8, "has_triton", lambda device: True)
    monkeypatch.setattr(int8_launches, "ROUND_IN_GEMV", in_gemv)
    for rows in (1, 18):
        x, weight, scale, bias = operands(rows, 50, 208, device, dtype)
        x = x.T.contiguous().T
        given = torch.tensor([0.02], device=device)
        for per_token, by in ((True, None), (False, None), (False, given)):
            codes, x_scale = quantize_activation(x, by, per_token=per_token)
            y = int8.linear(x, weight, scale, bias, per_token=per_token, scale=by)
            same(y, reference.int8_linear(codes, x_scale, weight, scale, bias, torch.float32), dtype)
        codes, x_scale = quantize_activation(x)
        y = int8.linear_of_codes(codes, x_scale, weight, scale, bias, dtype)
        same(y, reference.int8_linear(codes, x_scale, weight, scale, bias, torch.float32), dtype)


SIZES = [1, 2, 15, 16, 17, 32, 33, 64, 65, 300, 512, 513, 2048, 8192]


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize(("out", "columns"), [(4096, 4096), (11008, 4096), (4096, 11008), (33, 100), (8, 8)])
def test_shapes_alone_choose_the_launch(rows, out, columns):
    launch = int8_launches.choose(rows, out, columns)
    assert (launch.kind == "gemv") == (rows == 1 and columns % 16 == 0)
    for size in (launch.n, launch.k, launch.m):
        assert size & (size - 1) == 0, "a power of two"
    if launch.kind == "gemv":
        return
    assert launch.m >= 16
    assert launch.m // 2 < max(rows, 32), "not twice as many rows as there are"
    assert launch.stages * (launch.m + launch.n) * launch.k <= 227 << 10, "shared memory of an H100"
    if out >= 4096:
        assert int8_launches.programs(launch, rows, out) >= 120 or rows in range(17, 513)


def test_the_widest_tile_that_fills_the_device_is_taken():
    assert int8_launches.choose(8192, 11008, 4096).m == 128
    assert int8_launches.choose(512, 4096, 4096).n == 128
    assert int8_launches.choose(100, 11008, 4096).split == 1
    assert int8_launches.choose(100, 4096, 11008).split == 2
    assert int8_launches.programs(Launch("dot", 16, 32, 64, 4, 2, split=3), 17, 33) == 2 * 2 * 3


def test_few_rows_unpack_weights_inside_the_product():
    assert int8_launches.choose_packed(1, 4096).kind == "gemv"
    for rows in (2, 16, 17, 64):
        assert int8_launches.choose_packed(rows, 4096).m >= min(rows, 64)
    assert int8_launches.choose_packed(16, 11008).n > int8_launches.choose_packed(16, 4096).n
    assert int8_launches.choose_packed(65, 4096) is None


def test_float8_products_of_some_rows_are_the_librarys(monkeypatch):
    assert int8_launches.choose_float8(2048, 4096) is None
    assert int8_launches.choose_float8(8192, 4096).kind == "tma"
    monkeypatch.setattr(int8_launches, "_FLOAT8", None)
    assert int8_launches.choose_float8(8192, 4096) is None
    monkeypatch.setattr(int8_launches, "_FLOAT8", (512, TMA))
    assert int8_launches.choose_float8(512, 4096) == TMA
    assert int8_launches.choose_float8(511, 4096) is None
    assert int8_launches.choose_float8(512, 4100) is None
