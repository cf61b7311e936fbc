"""Dense linear layers of one row: which kernel runs, and the operator that a compiler can see.

`linears` is an operator (``torch.ops.harness.linears``): torch.compile keeps it as it is and fuses what
lies around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from harness.kernels.weight_only import has_triton

__all__ = ["MOST_MATRICES", "MOST_ROWS", "fits", "fits_bias", "linears"]

ALIGNMENT = 16
"""Elements: where a matrix must begin, counted from address 0."""
MOST_MATRICES = 3
"""Matrices that share a launch."""
MOST_ROWS = 1
"""Beyond so many rows the library's kernels are as fast."""

_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def fits(rows: int, weight: torch.Tensor) -> bool:
    """Whether the kernel takes so many rows of this matrix [out, in]; by shapes and types only."""
    return (
        0 < rows <= MOST_ROWS
        and weight.dim() == 2
        and weight.dtype in _FLOATS
        and weight.is_contiguous()
        and weight.shape[1] % 8 == 0
        and has_triton(weight.device)
    )


def fits_bias(bias: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the kernel can add this bias to a product with `weight`: a number for each row of the matrix,
    one beside the other. torch's own product also takes one for all rows, and any strides."""
    return bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.is_contiguous()


@torch.library.custom_op("harness::linears", mutates_args=())
def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """``[functional.linear(x, w, b), …]`` for matrices that read the same rows x [rows, in].

    Args:
        biases: one for each weight, or none at all.
    """
    x = x.contiguous()
    if _runs(x, weights, biases):
        from harness.kernels import triton_dense

        return triton_dense.linears(x, weights, biases)
    if not biases:
        return [functional.linear(x, weight) for weight in weights]
    return [functional.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


@linears.register_fake
def _(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]


def _runs(x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]) -> bool:
    rows, columns = x.shape
    return (
        len(weights) <= MOST_MATRICES
        and (not biases or len(biases) == len(weights))
        and all(weight.shape[1] == columns and weight.dtype == x.dtype for weight in weights)
        and all(fits_bias(bias, weight) for bias, weight in zip(biases, weights, strict=False))
        and all(fits(rows, weight) and _is_aligned(weight) for weight in weights)
    )


def _is_aligned(weight: torch.Tensor) -> bool:
    return weight.data_ptr() % (ALIGNMENT * weight.element_size()) == 0
