"""Optimal Brain Quantization, written from its equations: the reference for GPTQ, for tiny matrices.

Frantar and Alistarh 2022 (arXiv:2208.11580): quantize one weight, update the others by
``w -= (w_p - q) / [H^-1]_pp * H^-1[:, p]``, remove row and column p from H^-1. Each row by itself,
cubic in the columns.
"""

from __future__ import annotations

import torch

from harness.nn.quantizer import Grid


def damped(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    return hessian + damp * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


def obq(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, *, greedy: bool, damp: float = 0.01
) -> torch.Tensor:
    """The quantized matrix [out, in]; greedy order, or from the first column to the last."""
    if weight.shape[1] > 1024:
        raise ValueError("the reference takes cubic time in the columns: at most 1024")
    rows = []
    for index in range(len(weight)):
        zero = None if grid.zero is None else grid.zero[index]
        row_grid = Grid(grid.bits, grid.scale[index], zero)
        rows.append(_row(weight[index].clone(), damped(hessian, damp), row_grid, greedy))
    return torch.stack(rows)


def _row(w: torch.Tensor, hessian: torch.Tensor, grid: Grid, greedy: bool) -> torch.Tensor:
    inverse = torch.linalg.inv(hessian)
    left = list(range(len(w)))
    result = torch.empty_like(w)
    while left:
        rounded = grid.round(w[left])
        errors = (rounded - w[left]) ** 2 / inverse[left, left]
        p = left[int(errors.argmin())] if greedy else left[0]
        result[p] = grid.round(w[p : p + 1])[0]
        w -= (w[p] - result[p]) / inverse[p, p] * inverse[:, p]
        inverse = inverse - torch.outer(inverse[:, p], inverse[p]) / inverse[p, p]
        left.remove(p)
    return result
