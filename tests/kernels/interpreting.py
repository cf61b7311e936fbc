"""What tests of Triton kernels share: where they run, and how close their results must be."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
DEVICES = [
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
    pytest.param(
        "cpu",
        marks=pytest.mark.skipif(not IS_INTERPRETED, reason="needs triton and TRITON_INTERPRET=1"),
    ),
]
# Triton 3.6's interpreter makes numbers of arrays, which numpy 1.25 to 2.3 warn of and 2.4 refuses.
OLD_NUMPY = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float32 values in another type as a kernel stores them: the interpreter cuts bfloat16 off."""
    if dtype == torch.bfloat16 and values.device.type == "cpu":
        kept = values.contiguous().view(torch.int32) & -65536
        return kept.view(torch.float32).to(dtype)
    return values.to(dtype)


def same(y: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that y, of type `dtype`, is `expected` (float32) bit for bit."""
    assert y.dtype == dtype
    assert y.shape == expected.shape
    torch.testing.assert_close(y, rounded(expected, dtype), rtol=0, atol=0)
