"""The plain-torch form of every kernel: what they are tested against, and what runs without CUDA."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional

from harness.kernels.stored import StoredMatrix
from harness.nn.codebook_weight import ScaleCodes
from harness.nn.packing import PackedWeight, unpack_matrix, unpack_rows, unpack_weight
from harness.nn.quantizer import Grid

__all__ = [
    "NormKind",
    "dequantize",
    "int8_linear",
    "int8_matmul",
    "normalize",
    "packed_int8_linear",
    "packed_zeros",
    "quantize_columns",
    "stored_matrix",
    "weight_only_linear",
]

NormKind = Literal["layer", "rms", "rms-unit-offset"]
"""LayerNorm; RMSNorm that rounds to the input's type before the gain (Llama); RMSNorm that multiplies by one
plus its gain in float32 (Gemma)."""

_CUDA_MIN_ROWS = 17  # torch._int_mm on CUDA needs more than 16 rows
_CUDA_MULTIPLE = 8  # ... and all sizes divisible by 8


def dequantize(weight: PackedWeight, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The matrix [out, in] that a packed weight stands for, computed in float32."""
    return unpack_weight(weight).dequantize(torch.float32).to(dtype)


def stored_matrix(matrix: StoredMatrix) -> torch.Tensor:
    """The matrix [out, in] in float32 that kernels read: on a grid or in a table, outliers exact."""
    codes = unpack_matrix(matrix.codes, matrix.bits, matrix.tile)
    groups_of = torch.arange(codes.shape[1], device=codes.device) // matrix.group_columns
    if matrix.table is not None:
        values = matrix.table[codes.int()]
    elif matrix.zeros is None:
        values = codes.float() - 2.0 ** (matrix.bits - 1)
    else:
        zeros, rows = matrix.zeros, matrix.out_features
        if not zeros.is_floating_point():
            assert matrix.scales is not None
            zeros = unpack_rows(zeros, matrix.bits, matrix.scales.shape[1])
        values = codes.float() - zeros.float().t()[:, groups_of].expand(rows, -1)
    if matrix.scales is not None:
        scales = matrix.scales
        if matrix.steps is not None and matrix.mean is not None:
            scales = ScaleCodes(scales, matrix.steps, matrix.mean).dequantize()
        values = values * scales.float().t()[:, groups_of]
    values = values[:, : matrix.in_features].contiguous()
    if matrix.outlier_index is not None and matrix.outlier_values is not None:
        values.view(-1)[matrix.outlier_index.long()] = matrix.outlier_values.float()
    return values


def weight_only_linear(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` for x [rows, in]."""
    return functional.linear(x, dequantize(weight, x.dtype), bias)


def int8_matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact product ``a @ b.T`` in int32 of int8 a [rows, in] and b [out, in].

    On CUDA, where `torch._int_mm` needs more than 16 rows and all sizes divisible by 8, the operands are
    padded with zeros. int32 cannot overflow below 133,152 columns (127 * 127 * columns < 2^31).
    """
    rows, out = a.shape[0], b.shape[0]
    if a.shape[1] == 1:  # torch 2.13 on the CPU takes the strides of one column for those of one row
        a, b = functional.pad(a, (0, 1)), functional.pad(b, (0, 1))
    if a.is_cuda:
        more = -rows % _CUDA_MULTIPLE if rows >= _CUDA_MIN_ROWS else 32 - rows
        a = functional.pad(a, (0, -a.shape[1] % _CUDA_MULTIPLE, 0, more))
        b = functional.pad(b, (0, -b.shape[1] % _CUDA_MULTIPLE, 0, -out % _CUDA_MULTIPLE))
    return torch._int_mm(a, b.t())[:rows, :out]


def int8_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(codes @ weight.T) * scale * weight_scale + bias``, exact up to the scales.

    Args:
        codes: int8 [rows, in]. scale: float32 [rows, 1] or [1].
        weight: int8 [out, in]. weight_scale: float32 [out] or [1].
        dtype: the type of the result [rows, out].
    """
    y = int8_matmul(codes, weight).float() * scale * weight_scale
    if bias is not None:
        y = y + bias.float()
    return y.to(dtype)


def packed_zeros(weight: PackedWeight) -> torch.Tensor:
    """The zero points of a packed weight with one group of columns, int32 [out] or [1]."""
    if weight.zeros is None:
        return torch.full((1,), 1 << weight.bits - 1, dtype=torch.int32, device=weight.codes.device)
    return unpack_rows(weight.zeros[0], weight.bits, weight.out_features).int()


def packed_int8_linear(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """``(codes @ q.T - sum codes * zero) * scale * weight_scale + bias``, exact up to the scales.

    Args:
        codes: int8 [rows, in]. scale: float32 [rows, 1] or [1].
        weight: packed codes q [out, in] with one scale per row, per group of consecutive rows or in all,
            and zero points that are whole numbers.

    int32 cannot overflow below 66,000 columns (127 * 255 * columns < 2^31).
    """
    q = unpack_matrix(weight.codes, weight.bits, weight.tile)[:, : weight.in_features]
    zeros = packed_zeros(weight)
    if weight.bits == 8:  # 0 to 255 do not fit int8: moved by half, as are the zero points
        q, zeros = q ^ 0x80, zeros - 128
    products = int8_matmul(codes, q.contiguous().view(torch.int8))
    scales = weight.scales.view(-1).float()
    if 1 < scales.numel() < weight.out_features:
        scales = scales.repeat_interleave(weight.out_features // scales.numel())
    y = (products - codes.int().sum(1, keepdim=True) * zeros).float() * scale * scales
    return (y if bias is None else y + bias.float()).to(dtype)


def quantize_columns(
    block: torch.Tensor,
    root: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    groups: torch.Tensor,
    bits: int,
    keep: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of a block of GPTQ; see `harness.kernels.gptq.quantize_columns`."""
    # Transposed: what a step reads and writes then lies together.
    rest = block.t().contiguous()  # [columns, out]
    columns = groups.long()
    scales = scale.t()[columns]
    zeros = None if zero is None else zero.t()[columns]
    codes, errors = torch.empty_like(rest, dtype=torch.uint8), torch.empty_like(rest)
    for j in range(len(rest)):
        grid = Grid(bits, scales[j], None if zeros is None else zeros[j])
        codes[j] = grid.encode(rest[j] if keep is None else rest[j].where(keep[:, j], 0))
        errors[j] = (rest[j] - grid.decode(codes[j], rest.dtype)) / root[j, j]
        rest[j + 1 :] -= torch.outer(root[j, j + 1 :], errors[j])
    return codes.t(), errors.t()


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    kind: NormKind,
) -> torch.Tensor:
    """What a norm of this kind makes of x [..., d], rounded to x's type where the models' norms round."""
    if kind == "layer":
        return functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    values = x.float()
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)
    assert weight is not None
    if kind == "rms":
        return weight * values.to(x.dtype)
    return (values * (1.0 + weight.float())).to(x.dtype)
