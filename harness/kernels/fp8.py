"""The choice of a kernel for 8-bit floating-point activations and weights.

`quantize` is the one place where activations and weights become float8. `torch._scaled_mm` multiplies
them: on CUDA from compute capability 8.9 on, with both sizes of the weight divisible by 16, and on CPUs
where torch has it. Elsewhere the codes are turned into floats, which is exact, and multiplied: the same
numbers at a full-precision kernel's speed, and `choose` says so.
"""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from harness.kernels import int8_launches
from harness.kernels.constants import constant_when_compiled
from harness.kernels.weight_only import has_triton
from harness.nn.quantizer import SMALLEST_SCALE

__all__ = ["ALIGNMENT", "FORMATS", "OWN", "choose", "device_problem", "linear", "quantize", "runs_own"]

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
"""Largest values 448 and 57344; 3 and 2 bits of mantissa."""
ALIGNMENT = 16
"""What both sizes of a weight must be divisible by."""
OWN = "triton float8"
"""The name of the project's own product."""

_OLDEST = (8, 9)  # compute capability
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32)
_FALLBACK = "dequantize+matmul"


def quantize(
    values: torch.Tensor,
    dtype: torch.dtype,
    *,
    per_row: bool,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix [rows, columns] to float8 with a scale that maps its largest value to the format's.

    Values are multiplied by the reciprocal of the scale, and clamped before the cast: not every version
    of torch saturates there.

    Args:
        dtype: one of `FORMATS`.
        per_row: one scale per row, else one in all.
        scale: float32 [1], found by calibration (values beyond it are clamped); by default it follows
            from these very values.

    Returns:
        float8 [rows, columns] and the scale, float32 [rows, 1] or [1]. NaN stays NaN.

    With row scales of its own, eager on CUDA it is one kernel that reads the values once, with the same bits.
    """
    is_traced = torch.compiler.is_compiling()
    if per_row and scale is None and not is_traced and has_triton(values.device) and values.numel():
        from harness.kernels import triton_rows

        return triton_rows.quantize(values, dtype)
    values = values.float()
    largest = torch.finfo(dtype).max
    if scale is None:
        peak = values.abs().amax(-1, keepdim=True) if per_row else values.abs().amax().view(1)
        # By a tensor: on CUDA torch divides by a Python number through its reciprocal, an ulp off.
        scale = peak / torch.full_like(peak, largest)
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return (values * (1 / scale)).clamp(-largest, largest).to(dtype), scale


def device_problem(device: torch.device) -> str | None:
    """Why a CUDA device has no float8 products; None where it has, and for a device that is no CUDA."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_capability(device)
    if found >= _OLDEST:
        return None
    return (
        f"float8 products need compute capability {_OLDEST[0]}.{_OLDEST[1]} or newer (Ada, Hopper); "
        f"this device has {found[0]}.{found[1]}"
    )


@constant_when_compiled
def choose(device: torch.device, dtype: torch.dtype) -> str:
    """The name of the kernel that `linear` runs on this device for this format."""
    if device.type == "cuda":
        # Neither cuBLASLt nor CUTLASS multiplies E5M2 with E5M2.
        works = device_problem(device) is None and dtype == torch.float8_e4m3fn
    else:
        works = _multiplies(device.type, dtype)
    return "_scaled_mm" if works else _FALLBACK


def runs_own(device: torch.device, dtype: torch.dtype, rows: int, columns: int) -> bool:
    """Whether so many rows of activations of this type, with a scale each, run the project's own product."""
    if not has_triton(device) or columns % ALIGNMENT:
        return False
    return rows == 1 or (dtype.itemsize == 2 and int8_launches.choose_float8(rows, columns) is not None)


@functools.cache
def _multiplies(device_type: str, dtype: torch.dtype) -> bool:
    """Whether `torch._scaled_mm` has this device and format, in both forms; found by asking it."""
    ones = torch.ones(ALIGNMENT, ALIGNMENT, device=device_type).to(dtype)
    scale = torch.ones(ALIGNMENT, 1, device=device_type)
    try:
        torch._scaled_mm(ones, ones.t(), scale_a=scale[0], scale_b=scale[0], out_dtype=torch.float32)
        torch._scaled_mm(ones, ones.t(), scale_a=scale, scale_b=scale.t(), out_dtype=torch.float32)
    except (AttributeError, NotImplementedError, RuntimeError, ValueError):
        return False
    return True


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    per_token: bool = True,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x [rows, in] to the weight's format, multiply, and scale back to x's type.

    Args:
        weight: float8 [out, in]. weight_scale: float32 [out] or [1].
        per_token: one scale per row of x; else one for all of x.
        scale: a calibrated scale [1], used instead of one found in x.
    """
    codes, scale = quantize(x, weight.dtype, per_row=per_token and scale is None, scale=scale)
    if choose(x.device, weight.dtype) == _FALLBACK:
        # Codes are exact in both types; float16 could not hold the products.
        wide = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        y = functional.linear(codes.to(wide), weight.to(wide)).float() * scale * weight_scale
    else:
        if scale.numel() == x.shape[0] and runs_own(x.device, x.dtype, *x.shape):
            own: torch.Tensor = _linear_of_codes(codes, scale, weight, weight_scale, bias, x.dtype)
            return own
        y = _scaled_mm(codes, scale, weight, weight_scale, x.dtype)
    return (y if bias is None else y + bias).to(x.dtype)


def _scaled_mm(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The scaled product [rows, out], in `dtype` or float32; codes [rows, in], weight [out, in]."""
    dtype = dtype if dtype in _OUTPUTS else torch.float32
    if scale.numel() == weight_scale.numel() == 1:
        return _product(codes, scale.view(()), weight, weight_scale.view(()), dtype)
    if codes.is_cuda and dtype != torch.bfloat16:
        # Row scales inside the kernel give bfloat16 only, which is too coarse here.
        one = torch.ones((), device=codes.device)
        return _product(codes, one, weight, one, torch.float32) * scale * weight_scale
    rows = scale.expand(codes.shape[0], 1).contiguous()
    columns = weight_scale.expand(weight.shape[0]).contiguous().view(1, -1)
    return _product(codes, rows, weight, columns, dtype)


@torch.library.custom_op("harness::float8_linear_of_codes", mutates_args=())
def _linear_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The scaled product by the project's own kernels; by the library's where they do not run."""
    if not runs_own(codes.device, dtype, *codes.shape):
        y = _scaled_mm(codes, scale, weight, weight_scale, dtype)
        return (y if bias is None else y + bias).to(dtype)
    if codes.shape[0] == 1:
        from harness.kernels import triton_float8_gemv

        return triton_float8_gemv.gemv(codes, scale, weight, weight_scale, bias, dtype)
    from harness.kernels import triton_int8

    launch = int8_launches.choose_float8(*codes.shape)
    return triton_int8.matmul(codes, scale, weight, weight_scale, bias, dtype, launch=launch)


@_linear_of_codes.register_fake
def _(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


def _product(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    # Fast accumulation keeps some bits less than float32: far below what rounding to float8 costs.
    return torch._scaled_mm(
        codes, weight.t(), scale_a=scale, scale_b=weight_scale, out_dtype=dtype, use_fast_accum=True
    )
