"""The choice of a kernel for packed weights and full-precision activations."""

from __future__ import annotations

import functools
import importlib.util

import torch
from torch.nn import functional

from harness.kernels import reference
from harness.nn.packing import PLANES, PackedWeight

__all__ = ["FEW_ROWS", "MANY_ROWS", "choose", "dequantize", "has_triton", "linear"]

FEW_ROWS = 4
"""3-bit weights: up to so many rows each takes a matrix-vector kernel."""
MANY_ROWS = 64
"""Beyond so many rows the weights are dequantized once and multiplied by the library's kernel."""

_FALLBACK = "dequantize+matmul"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def has_triton(device: torch.device) -> bool:
    """Whether Triton kernels can run on this device."""
    return device.type == "cuda" and _is_triton_installed()


@functools.cache
def _is_triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _fits_triton(weight: PackedWeight, dtype: torch.dtype) -> bool:
    """Triton reads whole 32-bit words of one group, and packed zero points."""
    whole_words = all(weight.tile * width % 32 == 0 for width in PLANES[weight.bits])
    packed_zeros = weight.zeros is None or not weight.zeros.is_floating_point()
    return (
        dtype in _FLOATS
        and whole_words
        and packed_zeros
        and weight.group_columns % weight.tile == 0
        and has_triton(weight.codes.device)
    )


def choose(weight: PackedWeight, rows: int, dtype: torch.dtype) -> str:
    """The name of the kernel that `linear` runs for so many rows of activations of this type."""
    if not _fits_triton(weight, dtype):
        return _FALLBACK
    scheme = f"triton w{weight.bits}a{torch.finfo(dtype).bits}"
    if rows <= (FEW_ROWS if weight.bits == 3 else 1):
        return f"{scheme} gemv"
    if rows <= MANY_ROWS and weight.bits != 3:
        return f"{scheme} small"
    return f"triton {_FALLBACK}"


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in], computed in float32 and rounded to `dtype`."""
    if _fits_triton(weight, dtype):
        from harness.kernels import triton_weight_only

        return triton_weight_only.dequantize(weight, dtype)
    return reference.dequantize(weight, dtype)


def linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` for x [rows, in] by the kernel that `choose` names.

    Where gradients flow to x, the matrix is dequantized: the fused kernels have no backward pass. For
    torch.compile the whole is one operator, ``torch.ops.harness.weight_only_linear``.
    """
    if torch.compiler.is_compiling() and not _needs_gradient(x):
        y: torch.Tensor = _operator(
            x, weight.codes, weight.scales, weight.zeros, bias,
            weight.bits, weight.group_size, weight.tile, weight.in_features,
        )  # fmt: skip
        return y
    return _linear(x, weight, bias)


@torch.library.custom_op("harness::weight_only_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tile: int,
    in_features: int,
) -> torch.Tensor:
    weight = PackedWeight(codes, scales, zeros, bits, group_size, tile, in_features, codes.shape[1])
    return _linear(x, weight, bias)


@_operator.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    group_size: int,
    tile: int,
    in_features: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


def _needs_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _linear(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    kernel = choose(weight, x.shape[0], x.dtype)
    if not _needs_gradient(x):
        if kernel.endswith(" gemv"):
            from harness.kernels import triton_weight_only

            return triton_weight_only.gemv(x, weight, bias)
        if kernel.endswith(" small"):
            from harness.kernels import triton_weight_only

            return triton_weight_only.small(x, weight, bias)
    return functional.linear(x, dequantize(weight, x.dtype), bias)
