"""A linear layer that multiplies 8-bit floating-point activations with 8-bit floating-point weights.

E4M3 has values up to 448 with three bits of mantissa, E5M2 up to 57344 with two. A scale maps the
largest value of a matrix, of a row or of a token to the largest of the format.

Source: Micikevicius et al. 2022, "FP8 Formats for Deep Learning" (arXiv:2209.05433).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from harness.errors import ConfigError, NumericalFailure
from harness.kernels import fp8
from harness.nn.quantized import ActivationScale, PackedLinear, stored_bias

__all__ = ["Fp8Format", "Fp8Linear"]

Fp8Format = Literal["e4m3", "e5m2"]


class Fp8Linear(PackedLinear):
    """A linear layer with float8 weights and activations (FP8).

    Args:
        in_features, out_features: as of `nn.Linear`.
        fmt: the format of both.
        per_tensor: one weight scale for the whole matrix, else one per output row.
        a_gran: ``per-token`` and ``per-tensor-dynamic`` find the scale in the input itself,
            ``per-tensor-static`` uses `input_scale`, found by calibration.
        bias: with a bias, in `dtype`.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    input_scale: torch.Tensor | None
    bias: nn.Parameter | None
    bits = 8
    a_bits = 8
    _kept = ("codes", "scales", "input_scale")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        fmt: Fp8Format = "e4m3",
        per_tensor: bool = False,
        a_gran: ActivationScale = "per-token",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if fmt not in fp8.FORMATS:
            raise ConfigError(f"fmt must be {' or '.join(fp8.FORMATS)}, not {fmt!r}")
        self.in_features, self.out_features = in_features, out_features
        self.fmt, self.a_gran = fmt, a_gran
        codes = torch.zeros(out_features, in_features, dtype=fp8.FORMATS[fmt], device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.ones(1 if per_tensor else out_features, device=device))
        is_static = a_gran == "per-tensor-static"
        self.register_buffer("input_scale", torch.ones(1, device=device) if is_static else None)
        bias_value = torch.zeros(out_features, dtype=dtype, device=device)
        self.bias = nn.Parameter(bias_value, requires_grad=False) if bias else None

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        fmt: Fp8Format = "e4m3",
        per_tensor: bool = False,
        a_gran: ActivationScale = "per-token",
        input_scale: torch.Tensor | None = None,
    ) -> Fp8Linear:
        """Quantize a matrix [out, in]; `bias` [out] keeps its type.

        Raises:
            NumericalFailure: weights are NaN or infinite.
            ConfigError: `input_scale` missing for ``per-tensor-static``, or given for another.
        """
        if not bool(torch.isfinite(weight).all()):
            raise NumericalFailure("weights are NaN or infinite")
        if (input_scale is not None) != (a_gran == "per-tensor-static"):
            raise ConfigError("a calibrated input scale belongs to a_gran=per-tensor-static alone")
        out, in_features = weight.shape
        layer = cls(in_features, out, fmt=fmt, a_gran=a_gran, bias=bias is not None, device="meta")
        codes, scales = fp8.quantize(weight.detach(), fp8.FORMATS[fmt], per_row=not per_tensor)
        layer.codes, layer.scales = codes.contiguous(), scales.view(-1)
        if input_scale is not None:
            layer.input_scale = input_scale.detach().float().view(1).to(codes.device)
        if bias is not None:
            layer.bias = stored_bias(bias)
        return layer

    @staticmethod
    def fits(linear: nn.Linear) -> bool:
        """Whether both sizes of a layer are ones that float8 kernels multiply."""
        return linear.in_features % fp8.ALIGNMENT == 0 and linear.out_features % fp8.ALIGNMENT == 0

    @property
    def kernel_name(self) -> str:
        """The kernel that the forward pass runs on this device, for one row."""
        return self.kernel_for(1, torch.bfloat16)

    def kernel_for(self, rows: int, dtype: torch.dtype) -> str:
        """The kernel for so many rows: one, and many with a scale each, run the project's own."""
        name = str(fp8.choose(self.codes.device, self.codes.dtype))
        has_scales = self.a_gran == "per-token" or rows == 1
        owns = has_scales and fp8.runs_own(self.codes.device, dtype, rows, self.in_features)
        return fp8.OWN if owns and name == "_scaled_mm" else name

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] that the codes stand for."""
        return (self.codes.float() * self.scales[:, None]).to(dtype)

    def dense_weight(self) -> torch.Tensor:
        """As `dequantize`: what is counted when the zeros of a layer are counted."""
        return self.dequantize()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        return self._flat(x, self._multiply)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        return fp8.linear(
            x,
            self.codes,
            self.scales,
            self.bias,
            per_token=self.a_gran == "per-token",
            scale=self.input_scale,
        )

    def extra_repr(self) -> str:
        weights = "per-tensor" if self.scales.numel() < self.out_features else "per-channel"
        return (
            f"{self.in_features}, {self.out_features}, fmt={self.fmt}, weights={weights}, "
            f"activations={self.a_gran}, bias={self.bias is not None}"
        )
