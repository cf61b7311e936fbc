"""Scales of rows and columns on sums: on a CUDA device, or in Triton's interpreter.

Without a CUDA device: ``TRITON_INTERPRET=1 python -m pytest tests/kernels/test_scales.py``.
"""

from __future__ import annotations

import pytest
import torch

from harness.kernels import semi_structured
from tests.kernels.interpreting import DEVICES, DTYPES, OLD_NUMPY, same


def inputs(count, out, dtype, with_bias):
    generator = torch.Generator().manual_seed(out)
    sums = (torch.randn(count, out, generator=generator) * 1e4).bfloat16()
    rows, columns = torch.rand(count, 1, generator=generator), torch.rand(out, generator=generator) / 1e3
    bias = torch.randn(out, generator=generator).to(dtype) if with_bias else None
    return sums, rows, columns, bias


@OLD_NUMPY
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("count", "out"), [(3, 64), (1, 5000), (17, 2048)], ids=str)
def test_the_kernel_has_the_bits_of_plain_torch(count, out, dtype, with_bias, device):
    from harness.kernels.triton_scales import apply_scales

    given = inputs(count, out, dtype, with_bias)
    expected = semi_structured.apply_scales(*given, torch.float32)
    moved = [None if each is None else each.to(device) for each in given]
    same(apply_scales(*moved, dtype), expected.to(device), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_values_are_rounded_once(dtype, with_bias):
    sums, rows, columns, bias = inputs(5, 48, dtype, with_bias)
    exact = sums.double() * rows.double() * columns.double() + (0 if bias is None else bias.double())
    y = semi_structured.apply_scales(sums, rows, columns, bias, dtype)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-7)
