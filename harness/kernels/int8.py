"""The choice of a kernel for int8 activations and int8 weights."""

from __future__ import annotations

import torch

from harness.kernels import reference
from harness.kernels.weight_only import has_triton
from harness.nn.quantizer import SMALLEST_SCALE, quantize_activation

__all__ = ["choose", "linear"]


def choose(device: torch.device) -> str:
    """The name of the kernel that `linear` runs on this device."""
    return "triton w8a8" if has_triton(device) else "_int_mm"


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    per_token: bool = True,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x [rows, in] to int8, multiply with int8 [out, in], and scale back to x's type.

    Args:
        weight_scale: float32 [out] or [1].
        per_token: one scale per row of x; else one for all of x.
        scale: a calibrated scale [1], used instead of one found in x.

    For torch.compile the whole is one operator, ``torch.ops.harness.int8_linear``.
    """
    run = _operator if torch.compiler.is_compiling() else _linear
    return run(x, weight, weight_scale, bias, per_token, scale)


def _linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    per_token: bool,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    if not has_triton(x.device):
        codes, scale = quantize_activation(x, scale, per_token=per_token)
        return reference.int8_linear(codes, scale, weight, weight_scale, bias, x.dtype)
    from harness.kernels import triton_int8

    if scale is None and per_token:
        codes, scale = triton_int8.quantize_tokens(x)
    else:
        if scale is None:
            scale = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1) / 127
            scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
        codes = triton_int8.quantize_to(x, scale)
    return triton_int8.matmul(codes, scale, weight, weight_scale, bias, x.dtype)


_operator = torch.library.custom_op("harness::int8_linear", _linear, mutates_args=())


@_operator.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    per_token: bool,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])
