"""The choice of a kernel for int8 activations and int8 weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from harness.kernels import int8_launches, reference
from harness.kernels.selection import MOST_MATRICES
from harness.kernels.weight_only import has_triton
from harness.nn.quantizer import SMALLEST_SCALE, quantize_activation

__all__ = [
    "MOST_COLUMNS",
    "choose",
    "choose_norm",
    "linear",
    "linear_of_codes",
    "linears",
    "normalize_quantize",
    "quantize",
    "quantize_tokens",
    "share_a_launch",
]

MOST_COLUMNS = 16384
"""Columns of a row that one program holds for a norm."""


def choose(device: torch.device) -> str:
    """The name of the kernel that `linear` runs on this device."""
    return "triton w8a8" if has_triton(device) else "_int_mm"


def choose_norm(device: torch.device) -> str:
    """The name of what `normalize_quantize` runs on this device."""
    return "triton norm + w8a8 quantize" if has_triton(device) else "norm + quantize"


def quantize(
    x: torch.Tensor, scale: torch.Tensor | None = None, *, per_token: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes of x [rows, in] and float32 scales, [rows, 1] per token, else [1].

    Args:
        scale: a calibrated scale [1], used instead of one found in x.

    Traced by torch.compile it is plain torch.
    """
    if torch.compiler.is_compiling() or not has_triton(x.device) or x.numel() == 0:
        return quantize_activation(x, scale, per_token=per_token)
    from harness.kernels import triton_int8

    if scale is None and per_token:
        return triton_int8.quantize_tokens(x)
    if scale is None:
        peak = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32).view(1)
        scale = peak / torch.full_like(peak, 127)
        scale = torch.where(scale < SMALLEST_SCALE, torch.ones_like(scale), scale)
    return triton_int8.quantize_to(x, scale), scale


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [..., d] and float32 scales [..., 1] of x [..., d], one scale per token.

    Traced by torch.compile it is plain torch, which the compiler puts into one kernel with what made x.
    """
    if torch.compiler.is_compiling() or not has_triton(x.device) or x.numel() == 0:
        return quantize_activation(x)
    from harness.kernels import triton_int8

    codes, scale = triton_int8.quantize_tokens(x.reshape(-1, x.shape[-1]))
    return codes.view(x.shape), scale.view(*x.shape[:-1], 1)


def normalize_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    kind: reference.NormKind,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm and the rounding of its output to int8, as `quantize_tokens` gives it: the place to fuse them.

    Args:
        x: [..., d]. weight, bias: [d] or None.
        kind: see `harness.kernels.reference.NormKind`.

    Bit for bit what the norm and `quantize_tokens` make one after the other, but for the order in which
    the kernel (eager CUDA, up to `MOST_COLUMNS` columns, parameters of x's type) adds up a mean. Traced by
    torch.compile it is plain torch, which the compiler fuses.
    """
    if not torch.compiler.is_compiling() and _fuses_norm(x, weight, bias):
        from harness.kernels import triton_rows

        rows = x.reshape(-1, x.shape[-1])
        codes, scale = triton_rows.normalize_quantize(rows, weight, bias, eps=eps, kind=kind)
        return codes.view(x.shape), scale.view(*x.shape[:-1], 1)
    return quantize_tokens(reference.normalize(x, weight, bias, eps=eps, kind=kind))


def _fuses_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> bool:
    """Whether one kernel makes the norm and its rounding: by device, sizes and types alone."""
    same_type = all(each is None or each.dtype == x.dtype for each in (weight, bias))
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return False
    return same_type and has_triton(x.device) and x.numel() > 0 and x.shape[-1] <= MOST_COLUMNS


def linear_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The second half of `linear`, for codes int8 [rows, in] and scales [rows, 1] that are known already.

    For torch.compile the whole is one operator, ``torch.ops.harness.int8_linear_of_codes``.
    """
    run = _operator_of_codes if torch.compiler.is_compiling() else _linear_of_codes
    return run(codes, scale, weight, weight_scale, bias, dtype)


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
    launch = int8_launches.choose(x.shape[0], *weight.shape)
    if launch.kind == "gemv" and int8_launches.ROUND_IN_GEMV and has_triton(x.device):
        from harness.kernels import triton_int8_gemv

        # Of one row, the scale of the token is that of all.
        return triton_int8_gemv.gemv(x, scale, weight, weight_scale, bias, x.dtype, launch=launch)
    codes, scale = quantize(x, scale, per_token=per_token)
    return _linear_of_codes(codes, scale, weight, weight_scale, bias, x.dtype)


def _linear_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if not has_triton(codes.device):
        return reference.int8_linear(codes, scale, weight, weight_scale, bias, dtype)
    from harness.kernels import triton_int8

    return triton_int8.matmul(codes, scale, weight, weight_scale, bias, dtype)


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


_operator_of_codes = torch.library.custom_op(
    "harness::int8_linear_of_codes", _linear_of_codes, mutates_args=()
)


@_operator_of_codes.register_fake
def _(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[0], dtype=dtype)


def share_a_launch(rows: int, out: int, columns: int, device: torch.device) -> bool:
    """Whether weights of this size that read the same row can be multiplied in one launch."""
    return (
        rows == 1
        and has_triton(device)
        and int8_launches.ROUND_IN_GEMV
        and int8_launches.choose(rows, out, columns).kind == "gemv"
    )


@torch.library.custom_op("harness::int8_linears", mutates_args=())
def linears(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    """`linear_of_codes` of int8 codes, or `linear` of floats with a scale per token, for weights that read
    the same rows x [rows, in]; in one launch where it can be.

    Args:
        scale: of the codes, [rows, 1]; of floats a calibrated one [1], or None.
        weight_scales: of each weight, float32 [out], or [1] for all of them.
        biases: one for each weight, or none at all.
    """
    if _run_together(x, weights):
        from harness.kernels import triton_int8_gemv

        return triton_int8_gemv.gemv_several(x, scale, weights, weight_scales, biases, dtype)
    given: Sequence[torch.Tensor | None] = biases or [None] * len(weights)
    one_by_one = zip(weights, weight_scales, given, strict=True)
    if x.dtype == torch.int8:
        assert scale is not None
        return [_linear_of_codes(x, scale, *each, dtype) for each in one_by_one]
    return [_linear(x, *each, True, scale) for each in one_by_one]


def _run_together(x: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    return len(weights) <= MOST_MATRICES and all(
        share_a_launch(x.shape[0], weight.shape[0], weight.shape[1], x.device) for weight in weights
    )


@linears.register_fake
def _(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0], dtype=dtype) for weight in weights]
