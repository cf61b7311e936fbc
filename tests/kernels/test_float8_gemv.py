"""One row of float8 codes times float8 weights: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_float8_gemv.py``.
"""

from __future__ import annotations

import pytest
import torch

from harness.kernels import fp8
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY

TOLERANCE = {torch.bfloat16: 6e-3, torch.float16: 5e-4, torch.float32: 1e-6}


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("out", "columns"), [(64, 2048), (33, 4096), (16, 688), (130, 16), (8, 11008)], ids=str
)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_it_is_the_scaled_product_of_the_codes(out, columns, per_channel, with_bias, dtype, device):
    from harness.kernels.triton_float8_gemv import gemv

    generator = torch.Generator().manual_seed(out + columns)
    weight = torch.randn(out, columns, generator=generator)
    weight[0, 0] = 40.0  # so that codes of all sizes occur, subnormal ones too
    codes, weight_scale = fp8.quantize(weight, torch.float8_e4m3fn, per_row=per_channel)
    x, scale = fp8.quantize(
        torch.randn(1, columns, generator=generator), torch.float8_e4m3fn, per_row=per_channel
    )
    bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
    expected = x.double() @ codes.double().T * scale.double() * weight_scale.double().view(-1)
    expected = expected if bias is None else expected + bias.double()
    moved = [None if each is None else each.to(device) for each in (x, scale, codes, weight_scale, bias)]
    y = gemv(*moved, dtype)
    assert (y.shape, y.dtype) == ((1, out), dtype)
    assert float((y.cpu().double() - expected).norm() / expected.norm()) <= TOLERANCE[dtype]


@pytest.mark.parametrize("device", DEVICES[:1])  # the interpreter makes numbers of them
def test_values_that_are_no_numbers_stay_so(device):
    from harness.kernels.triton_float8_gemv import gemv

    x = torch.ones(1, 32)
    x[0, 5] = float("nan")
    weight, scale = torch.ones(4, 32), torch.ones(1, device=device)
    codes = [each.to(torch.float8_e4m3fn).to(device) for each in (x, weight)]
    assert gemv(codes[0], scale, codes[1], scale, None, torch.float32).isnan().all()


def test_one_row_runs_it_whatever_the_type_and_many_only_16_bits(monkeypatch):
    monkeypatch.setattr(fp8, "has_triton", lambda device: True)
    device = torch.device("cuda")
    assert fp8.runs_own(device, torch.float32, 1, 4096)
    assert fp8.runs_own(device, torch.bfloat16, 1, 4096)
    assert not fp8.runs_own(device, torch.bfloat16, 1, 4100)
    assert not fp8.runs_own(device, torch.bfloat16, 2, 4096)
    assert fp8.runs_own(device, torch.bfloat16, 8192, 4096)
    assert not fp8.runs_own(device, torch.float32, 8192, 4096)
