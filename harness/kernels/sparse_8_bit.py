"""8-bit 2:4 products of cuSPARSELt, as layers to be timed: no method makes them.

Weights are pruned to 2:4 by magnitude and rounded to int8 with a scale per row, or to E4M3 with one for all;
activations with a scale per token, or one for all. The library's product comes out in bfloat16, to which the
scales are applied: one inside it would have to be known to the host, which no captured graph can wait for.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import nn

from harness.errors import NotApplicable
from harness.kernels import fp8, int8
from harness.kernels import semi_structured as kernel
from harness.nn.quantizer import quantize_weight

__all__ = ["SparseFp8Linear", "SparseInt8Linear", "prune_2_of_4"]


def prune_2_of_4(weight: torch.Tensor) -> torch.Tensor:
    """A matrix [out, in] with the two smallest magnitudes of every four along the inputs set to zero."""
    groups = weight.detach().view(weight.shape[0], -1, 4)
    smallest = groups.abs().topk(2, dim=-1, largest=False).indices
    return groups.scatter(-1, smallest, 0.0).view(weight.shape)


class _Sparse8BitLinear(nn.Module):
    """Holds codes in the library's form, `codes`, and their scales; the rounded matrix is kept nowhere."""

    codes: torch.Tensor
    scales: torch.Tensor
    name: str

    def __init__(self, codes: torch.Tensor, scales: torch.Tensor) -> None:
        super().__init__()
        if not kernel.is_available(codes.device, codes.dtype):
            raise NotApplicable(f"cuSPARSELt does not multiply {codes.dtype} on this device")
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", kernel.compress(codes))
        self.register_buffer("scales", scales)

    @property
    def kernel_name(self) -> str:
        return f"cusparselt 2:4 {self.name}"

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        return self.kernel_name

    def _multiply(self, codes: torch.Tensor) -> torch.Tensor:
        """The product of codes [rows, in] with those of the weights, bfloat16 [rows, out]."""
        return kernel.product(self.codes, codes, self.out_features, out_dtype=torch.bfloat16, tuned=True)


class SparseInt8Linear(_Sparse8BitLinear):
    """int8 weights and activations; y has the type of x."""

    name = "int8"

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> Self:
        """Prune and round a matrix [out, in].

        Raises:
            NotApplicable: the device has no kernel for it.
        """
        quantized = quantize_weight(prune_2_of_4(weight), bits=8, sym=True)
        codes = (quantized.codes.to(torch.int16) - 128).to(torch.int8)
        return cls(codes, quantized.scale[:, 0].float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [rows, out] for x [rows, in]."""
        codes, scale = int8.quantize_tokens(x)
        return (self._multiply(codes) * scale * self.scales).to(x.dtype)


class SparseFp8Linear(_Sparse8BitLinear):
    """E4M3 weights and activations; y has the type of x."""

    name = "fp8"

    @classmethod
    def from_dense(cls, weight: torch.Tensor) -> Self:
        """As `SparseInt8Linear.from_dense`."""
        codes, scale = fp8.quantize(prune_2_of_4(weight), torch.float8_e4m3fn, per_row=False)
        return cls(codes, scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [rows, out] for x [rows, in]."""
        codes, scale = fp8.quantize(x, torch.float8_e4m3fn, per_row=False)
        return (self._multiply(codes) * scale * self.scales).to(x.dtype)
