"""Linear layers that multiply 8-bit activations with 8-bit weights of which two of four are stored (2:4).

Codes and scales are those of `harness.nn.quantized.Int8Linear` and `harness.nn.fp8.Fp8Linear`: one scale for
each row of the matrix, one for each token. Off CUDA, and for activations in float32, the codes are
decompressed and multiplied as there, with its bits. On CUDA cuSPARSELt multiplies them on sparse tensor cores
and writes the sums in bfloat16, to which the scales are applied: one inside the library would have to be
known to the host, which no captured graph can wait for. Of a few rows the project's own kernel applies them
to sums that are not rounded.

Source: Mishra et al. 2021, "Accelerating Sparse Deep Neural Networks" (arXiv:2104.08378), section 2.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import nn

from harness.errors import ConfigError, NumericalFailure
from harness.kernels import fp8, int8
from harness.kernels import semi_structured as kernel
from harness.nn.quantizer import QuantizedWeight
from harness.nn.semi_structured import SemiStructuredLinear, misfit

__all__ = ["SparseFp8Linear", "SparseInt8Linear"]


class _Sparse8BitLinear(SemiStructuredLinear, ABC):
    """2:4 weights in 8 bits, activations rounded to 8 bits token by token: 0.625 of the bytes of 8 bits.

    Args:
        in_features, out_features, bias, tuned: as of `SemiStructuredLinear`.
    """

    scales: torch.Tensor
    a_bits = 8
    a_gran = "per-token"
    input_scale = None
    _kept = ("scales", "values")
    _type: torch.dtype
    _name: str

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
        super().__init__(in_features, out_features, tuned=tuned, dtype=self._type, device=device)
        self.register_buffer("scales", torch.ones(out_features, dtype=torch.float32, device=device))
        if bias:
            value = torch.zeros(out_features, dtype=dtype, device=device)
            self.bias = nn.Parameter(value, requires_grad=False)

    def _hold_codes(self, codes: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None) -> None:
        """Store codes [out, in] that are 2:4, their scales, one for all or each row, and a bias as it is."""
        self.scales = scales.reshape(-1).float().expand(codes.shape[0]).contiguous()
        self._hold(codes, bias)

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of a weight that is stored, its place not counted."""
        return 8

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel that the forward pass runs for so many rows of this type."""
        if self.packed is not None and dtype in (torch.bfloat16, torch.float16):
            return f"{kernel.name_of(rows, self.reads_rows)} {self._name}"
        return f"decompress+{self._dense_kernel()}"

    @property
    def kernel_name(self) -> str:
        """The kernel for activations of the type that is usual on this device."""
        return self.kernel_for(1, torch.bfloat16 if self.scales.is_cuda else torch.float32)

    def row_scales(self) -> torch.Tensor:
        """The weight scales, float32 [out]."""
        return self.scales

    def codes_of_all(self) -> torch.Tensor:
        """The codes [out, in], zeros included."""
        return self._stored()

    def dense_weight(self) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for, float32."""
        return self._stored().float() * self.scales[:, None]

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        if self.packed is None or x.dtype == torch.float32:
            return self._multiply_dense(x)
        codes, scale = self._round(x)
        return kernel.linear_8_bit(
            codes, self.packed, scale, self.scales, self.bias, x.dtype, self.tuned, self.reads_rows
        )

    @abstractmethod
    def _multiply_dense(self, x: torch.Tensor) -> torch.Tensor:
        """The product with all codes, zeros included."""

    @abstractmethod
    def _round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [rows, in] and scales [rows, 1] of activations."""

    @abstractmethod
    def _dense_kernel(self) -> str:
        """The name of the kernel of that product."""

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, 2:4, {self._name} codes, bias={self.bias is not None}"
        )

    def _runs_packed(self) -> bool:
        assert self.values is not None
        fits = misfit(self.out_features, self.in_features, self._type) is None
        return fits and kernel.is_available(self.values.device, self._type)


class SparseInt8Linear(_Sparse8BitLinear):
    """2:4 weights and activations in int8."""

    group_size = -1
    sym = True
    _type = torch.int8
    _name = "int8"

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
        layer = cls(codes.shape[1], codes.shape[0], tuned=tuned, device="meta")
        layer._hold_codes(codes, weight.scale, bias)
        return layer

    def int8_codes(self) -> torch.Tensor:
        """As `codes_of_all`: what every layer of int8 weights has."""
        return self._stored()

    def _multiply_dense(self, x: torch.Tensor) -> torch.Tensor:
        return int8.linear(x, self._stored(), self.scales, self.bias)

    def _round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return int8.quantize_tokens(x)

    def _dense_kernel(self) -> str:
        return str(int8.choose(self.scales.device))


class SparseFp8Linear(_Sparse8BitLinear):
    """2:4 weights and activations in E4M3."""

    fmt = "e4m3"
    _type = torch.float8_e4m3fn
    _name = "fp8"

    @classmethod
    def from_float(
        cls, weight: torch.Tensor, bias: torch.Tensor | None = None, *, tuned: bool = True
    ) -> SparseFp8Linear:
        """Round a 2:4 matrix [out, in]; `bias` [out] keeps its type.

        Raises:
            NumericalFailure: weights are NaN or infinite.
            ConfigError: the matrix is not 2:4.
        """
        if not bool(torch.isfinite(weight).all()):
            raise NumericalFailure("weights are NaN or infinite")
        codes, scales = fp8.quantize(weight.detach(), cls._type, per_row=True)
        layer = cls(weight.shape[1], weight.shape[0], tuned=tuned, device="meta")
        layer._hold_codes(codes, scales, bias)
        return layer

    def _multiply_dense(self, x: torch.Tensor) -> torch.Tensor:
        return fp8.linear(x, self._stored(), self.scales, self.bias)

    def _round(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return fp8.quantize(x, self._type, per_row=True)

    def _dense_kernel(self) -> str:
        return str(fp8.choose(self.scales.device, self._type))
