"""The choice of a kernel for packed places in a table and full-precision activations.

The kernels are those of `harness.kernels.weight_only`; a value is looked up where an integer would be
converted. Where no kernel fits, the layer's own plain-torch form runs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from harness.kernels import reference
from harness.kernels.selection import WRITING, Writing
from harness.kernels.stored import StoredMatrix
from harness.kernels.weight_only import fits_triton, launch_for, name_of

__all__ = ["choose", "dequantize", "fits", "linear", "runs", "write"]

_MOST_PLACES = 2**31
"""Places of outliers are 32-bit integers."""


def fits(matrix: StoredMatrix, dtype: torch.dtype) -> bool:
    """Whether kernels can read this matrix and activations of this type, on its device."""
    places = matrix.out_features * matrix.in_features
    has_wide_outliers = matrix.outlier_index is not None and places >= _MOST_PLACES
    return not has_wide_outliers and fits_triton(matrix.form, dtype, matrix.codes.device)


def runs(x: torch.Tensor, matrix: StoredMatrix) -> bool:
    """Whether a layer should call `linear`; a traced layer always does on CUDA, where nothing is asked."""
    return x.is_cuda if torch.compiler.is_compiling() else fits(matrix, x.dtype)


def choose(matrix: StoredMatrix, rows: int, dtype: torch.dtype) -> str:
    """The name of the kernel that `linear` runs for so many rows of activations of this type."""
    if not fits(matrix, dtype):
        return "gather+matmul"
    return name_of(matrix.form, rows, dtype, matrix.codes.device)


def dequantize(matrix: StoredMatrix, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in], computed in float32 and rounded to `dtype` once, outliers exact; needs `fits`."""
    return write(matrix, dtype, WRITING)


def write(matrix: StoredMatrix, dtype: torch.dtype, writing: Writing) -> torch.Tensor:
    """As `dequantize`, for any stored matrix and by a launch of choice."""
    from harness.kernels import triton_weight_only

    weight = triton_weight_only.dequantize(matrix, dtype, writing)
    if matrix.outlier_index is not None and matrix.outlier_values is not None:
        weight.view(-1)[matrix.outlier_index.long()] = matrix.outlier_values.to(dtype)
    return weight


def linear(x: torch.Tensor, matrix: StoredMatrix, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x @ dequantize(matrix).T + bias`` for x [rows, in].

    Where gradients flow to x, the matrix is dequantized: the fused kernels have no backward pass. For
    torch.compile the whole is one operator, ``torch.ops.harness.table_linear``.
    """
    if torch.compiler.is_compiling():
        if _needs_gradient(x):  # plain torch, for the compiler to see through
            return functional.linear(x, reference.stored_matrix(matrix).to(x.dtype), bias)
        y: torch.Tensor = _operator(
            x, matrix.codes, matrix.table, matrix.scales, matrix.steps, matrix.mean,
            matrix.outlier_index, matrix.outlier_values, bias,
            matrix.bits, matrix.tile, matrix.group_columns, matrix.in_features,
        )  # fmt: skip
        return y
    return _linear(x, matrix, bias)


@torch.library.custom_op("harness::table_linear", mutates_args=())
def _operator(
    x: torch.Tensor,
    codes: torch.Tensor,
    table: torch.Tensor | None,
    scales: torch.Tensor | None,
    steps: torch.Tensor | None,
    mean: torch.Tensor | None,
    outlier_index: torch.Tensor | None,
    outlier_values: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    tile: int,
    group_columns: int,
    in_features: int,
) -> torch.Tensor:
    matrix = StoredMatrix(
        codes, bits, tile, group_columns, in_features, scales, None, table, steps, mean,
        outlier_index, outlier_values,
    )  # fmt: skip
    return _linear(x, matrix, bias)


@_operator.register_fake
def _(
    x: torch.Tensor,
    codes: torch.Tensor,
    table: torch.Tensor | None,
    scales: torch.Tensor | None,
    steps: torch.Tensor | None,
    mean: torch.Tensor | None,
    outlier_index: torch.Tensor | None,
    outlier_values: torch.Tensor | None,
    bias: torch.Tensor | None,
    bits: int,
    tile: int,
    group_columns: int,
    in_features: int,
) -> torch.Tensor:
    return x.new_empty(x.shape[0], codes.shape[1])


def _needs_gradient(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _linear(x: torch.Tensor, matrix: StoredMatrix, bias: torch.Tensor | None) -> torch.Tensor:
    if not fits(matrix, x.dtype):
        return functional.linear(x, reference.stored_matrix(matrix).to(x.dtype), bias)
    launch = None if _needs_gradient(x) else launch_for(matrix.form, x.shape[0], x.dtype, x.device)
    if launch is not None:
        from harness.kernels import triton_weight_only

        return triton_weight_only.multiply(x, matrix, bias, launch)
    return functional.linear(x, dequantize(matrix, x.dtype), bias)
