"""A linear layer whose input is rounded to int8 while its weights stay floats: what rounding costs.

No kernel multiplies int8 with floats, so the rounded input is turned back into floats first: the layer
imitates the form, and says so.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from harness.errors import ConfigError
from harness.nn.kept_types import KeptTypes
from harness.nn.quantized import ActivationScale
from harness.nn.quantizer import quantize_activation

__all__ = ["RoundedInputLinear"]


class RoundedInputLinear(KeptTypes):
    """A linear layer with full-precision weights and int8 activations (W16A8, W32A8), simulated.

    Args:
        in_features, out_features: as of `nn.Linear`.
        a_gran: ``per-token`` and ``per-tensor-dynamic`` find the scale in the input itself,
            ``per-tensor-static`` uses `input_scale`, found by calibration.
        bias: with a bias.
        dtype: of weight and bias.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    input_scale: torch.Tensor | None
    a_bits = 8
    simulated = True
    kernel_name = "quantize+dequantize+matmul"
    _kept = ("input_scale",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        a_gran: ActivationScale = "per-token",
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.a_gran = in_features, out_features, a_gran

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=dtype, device=device))

        self.weight = parameter(out_features, in_features)
        self.bias = parameter(out_features) if bias else None
        is_static = a_gran == "per-tensor-static"
        self.register_buffer("input_scale", torch.ones(1, device=device) if is_static else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        a_gran: ActivationScale = "per-token",
        input_scale: torch.Tensor | None = None,
    ) -> RoundedInputLinear:
        """The same weight and bias, without a copy.

        Raises:
            ConfigError: `input_scale` missing for ``per-tensor-static``, or given for another.
        """
        if (input_scale is not None) != (a_gran == "per-tensor-static"):
            raise ConfigError("a calibrated input scale belongs to a_gran=per-tensor-static alone")
        layer = cls(linear.in_features, linear.out_features, a_gran=a_gran, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        if input_scale is not None:
            layer.input_scale = input_scale.detach().float().view(1).to(linear.weight.device)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y [..., out] for x [..., in], in x's type."""
        if x.numel() == 0:
            return functional.linear(x, self.weight, self.bias)
        codes, scale = quantize_activation(
            x.reshape(-1, self.in_features), self.input_scale, per_token=self.a_gran == "per-token"
        )
        return functional.linear((codes * scale).view(x.shape).to(x.dtype), self.weight, self.bias)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, activations={self.a_gran}, "
            f"bias={self.bias is not None}"
        )
