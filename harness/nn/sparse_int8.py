"""A linear layer that multiplies int8 activations with int8 weights of which two of four are stored (2:4).

The codes are those of `harness.nn.quantized.Int8Linear`, and so are the scales: one for each row of the
matrix, one for each token. Off CUDA, and for activations in float32, the codes are decompressed and
multiplied as there, with its bits. On CUDA cuSPARSELt multiplies them on sparse tensor cores and writes the
sums in bfloat16, to which the scales are applied: one inside the library would have to be known to the host,
which no captured graph can wait for.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv:2104.08378), section 2.
"""

from __future__ import annotations

import torch
from torch import nn

from harness.errors import ConfigError
from harness.kernels import int8
from harness.kernels import semi_structured as kernel
from harness.nn.quantizer import QuantizedWeight
from harness.nn.semi_structured import SemiStructuredLinear, compress_2_of_4, misfit

__all__ = ["SparseInt8Linear"]


class SparseInt8Linear(SemiStructuredLinear):
    """2:4 weights in int8, activations rounded to int8 token by token: 0.625 of the bytes of int8.

    Args:
        in_features, out_features, bias, tuned: as of `SemiStructuredLinear`.
    """

    scales: torch.Tensor
    a_bits = 8
    a_gran = "per-token"
    input_scale = None
    group_size = -1
    sym = True
    _kept = ("scales",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        tuned: bool = True,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, tuned=tuned, dtype=torch.int8, device=device)
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32, device=device))
        if bias:
            value = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(value, requires_grad=False)

    @classmethod
    def from_weight(
        cls, weight: QuantizedWeight, bias: torch.Tensor | None = None, *, tuned: bool = True
    ) -> SparseInt8Linear:
        """Store a matrix of 8-bit codes around zero that is 2:4; `bias` [out] keeps its type.

        Raises:
            ConfigError: other codes, scales of groups, or a matrix that is not 2:4.
        """
        if weight.bits != 8 or not weight.sym or weight.scale.shape[1] != 1:
            raise ConfigError("2:4 in int8 needs 8 bits, no zero points and no groups along the inputs")
        codes = (weight.codes.to(torch.int16) - 128).to(torch.int8)
        values, meta = compress_2_of_4(codes)
        layer = cls(codes.shape[1], codes.shape[0], tuned=tuned, device="meta")
        layer.values, layer.meta = values, meta
        layer.scales = weight.scale.reshape(-1).float().expand(codes.shape[0]).contiguous()
        if bias is not None:
            layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
        layer._prefer_packed()
        return layer

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a weight that is stored, its place not counted."""
        return 8

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for activations of this type, for any number of rows."""
        if self.packed is not None and dtype in (torch.bfloat16, torch.float16):
            return f"{kernel.KERNEL} int8"
        return f"decompress+{int8.choose(self.scales.device)}"

    @property
    def kernel_name(self) -> str:
        """The kernel for activations of the type that is usual on this device."""
        return self.kernel_for(1, torch.bfloat16 if self.scales.is_cuda else torch.float32)

    def int8_codes(self) -> torch.Tensor:
        """The codes int8 [out, in], zeros included."""
        return self._stored()

    def row_scales(self) -> torch.Tensor:
        """The weight scales, float32 [out]."""
        return self.scales

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for, float32."""
        return self._stored().float() * self.scales[:, None]

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None or x.dtype == torch.float32:
            return int8.linear(x, self._stored(), self.scales, self.bias)
        codes, scale = int8.quantize_tokens(x)
        sums = kernel.int8_product(codes, self.packed, self.out_features, self.tuned)
        y = sums * scale * self.scales
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, 2:4, int8 codes, bias={self.bias is not None}"

    def _runs_packed(self) -> bool:
        assert self.values is not None
        fits = misfit(self.out_features, self.in_features, torch.int8) is None
        return fits and kernel.is_available(self.values.device, torch.int8)
