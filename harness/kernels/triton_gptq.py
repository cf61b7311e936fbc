"""Triton kernels for GPTQ: the columns of a block in one launch, and the search for clipped ranges.

Both do in float32 exactly what the plain-torch form does: division rounds to nearest, rounding to whole
numbers is half to even, and they are launched without fusing multiplication and addition. So the codes of
a block are the same bit for bit. The search adds up a group's errors in another order: where two ranges
are as good as each other up to rounding, it may keep the other one.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from harness.nn.quantizer import Grid

__all__ = ["quantize_columns", "search_grid"]

# 1.5 * 2^23: adding and subtracting it rounds half to even.
_ROUND = 12582912.0
_TILE = 2048  # elements that a program holds


@triton.jit
def _columns_kernel(
    block_ptr, root_ptr, scale_ptr, zero_ptr, group_ptr, codes_ptr, errors_ptr, rows,
    block_stride, root_stride, scale_stride, rounder,
    HAS_ZERO: tl.constexpr, MIDDLE: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr,
    columns: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    is_row, is_column = row < rows, column < columns
    mask = is_row[:, None] & is_column[None, :]
    long_row = row.to(tl.int64)
    block = tl.load(block_ptr + long_row[:, None] * block_stride + column[None, :], mask=mask, other=0.0)
    # Codes are written column by column, so that the rows of a program lie together.
    code_ptrs = codes_ptr + row
    for j in range(columns):
        after = tl.load(root_ptr + j * root_stride + column, mask=is_column & (column > j), other=0.0)
        diagonal = tl.load(root_ptr + j * root_stride + j)
        group = tl.load(group_ptr + j)
        scale = tl.load(scale_ptr + long_row * scale_stride + group, mask=is_row, other=1.0).to(tl.float32)
        value = tl.sum(tl.where((column == j)[None, :], block, 0.0), 1)
        # Clipped before rounding: beyond 2^22 the sum below would not round to whole numbers.
        steps = tl.minimum(tl.maximum(tl.div_rn(value, scale), -1024.0), 1024.0)
        steps = (steps + rounder) - rounder
        zero = tl.zeros((ROWS,), tl.float32) + MIDDLE
        if HAS_ZERO:
            zero = tl.load(zero_ptr + long_row * scale_stride + group, mask=is_row, other=0).to(tl.float32)
        code = tl.minimum(tl.maximum(steps + zero, LOWEST), HIGHEST)
        error = tl.div_rn(value - (code - zero) * scale, diagonal)
        tl.store(code_ptrs, code.to(tl.uint8), mask=is_row)
        code_ptrs += rows
        # A finished column's place keeps its error.
        block = tl.where((column == j)[None, :], error[:, None], block - error[:, None] * after[None, :])
    tl.store(errors_ptr + long_row[:, None] * columns + column[None, :], block, mask=mask)


@triton.jit
def _search_kernel(
    values_ptr, importance_ptr, factors_ptr, scale_ptr, zero_ptr, rows, groups,
    row_stride, group_stride, importance_stride, rounder,
    SYM: tl.constexpr, REACH: tl.constexpr, MIDDLE: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, columns: tl.constexpr, steps: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    group = tl.program_id(1)
    offsets = tl.arange(0, COLUMNS)
    is_row = row < rows
    long_row = row.to(tl.int64)
    starts = values_ptr + long_row * row_stride + group.to(tl.int64) * group_stride
    importances = importance_ptr + group.to(tl.int64) * importance_stride
    low, high = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, columns, COLUMNS):
        mask = is_row[:, None] & (start + offsets < columns)[None, :]
        values = tl.load(starts[:, None] + (start + offsets)[None, :], mask=mask, other=0.0)
        low, high = tl.minimum(low, tl.min(values, 1)), tl.maximum(high, tl.max(values, 1))
    least = tl.full((ROWS,), float("inf"), tl.float32)
    best_scale = tl.zeros((ROWS,), tl.float32)
    best_zero = tl.zeros((ROWS,), tl.float32)
    for step in range(steps):
        factor = tl.load(factors_ptr + step)
        below, above = low * factor, high * factor
        reach = tl.maximum(-below, above) if SYM else above - below
        wide = tl.div_rn(reach, REACH)
        scale = _round_up(tl.where(wide == 0.0, 1.0, wide), scale_ptr.dtype.element_ty)
        zero = tl.zeros((ROWS,), tl.float32) + MIDDLE
        if not SYM:
            zero = tl.minimum(tl.maximum(tl.div_rn(-below, scale), 0.0), HIGHEST)
            zero = (zero + rounder) - rounder
        loss = tl.zeros((ROWS,), tl.float32)
        for start in range(0, columns, COLUMNS):
            is_column = start + offsets < columns
            mask = is_row[:, None] & is_column[None, :]
            values = tl.load(starts[:, None] + (start + offsets)[None, :], mask=mask, other=0.0)
            weights = tl.load(importances + start + offsets, mask=is_column, other=0.0)
            code = tl.minimum(tl.maximum(tl.div_rn(values, scale[:, None]), -1024.0), 1024.0)
            code = (code + rounder) - rounder + zero[:, None]
            code = tl.minimum(tl.maximum(code, LOWEST), HIGHEST)
            error = (code - zero[:, None]) * scale[:, None] - values
            loss += tl.sum(error * error * weights[None, :], 1)
        # The first step is the whole range, which stays where no loss is a number.
        better = (loss < least) | (step == 0)
        least = tl.where(better, loss, least)
        best_scale = tl.where(better, scale, best_scale)
        best_zero = tl.where(better, zero, best_zero)
    best_scale = best_scale.to(scale_ptr.dtype.element_ty)  # a number of that type: nothing is rounded
    tl.store(scale_ptr + long_row * groups + group, best_scale, mask=is_row)
    if not SYM:
        tl.store(zero_ptr + long_row * groups + group, best_zero.to(tl.uint8), mask=is_row)


@triton.jit
def _round_up(scale, dtype: tl.constexpr):
    """The smallest numbers of `dtype`, as float32, that are not below the positive `scale`."""
    stored = scale.to(dtype)
    if dtype != tl.float32:
        raw = stored.to(tl.int16, bitcast=True)  # the next float above a positive one is the next integer
        raw = tl.where(stored.to(tl.float32) < scale, raw + 1, raw).to(tl.int16)
        stored = raw.to(dtype, bitcast=True)
    return stored.to(tl.float32)


def quantize_columns(
    block: torch.Tensor,
    root: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
    groups: torch.Tensor,
    bits: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and errors of a block of GPTQ in float32; see `harness.kernels.gptq.quantize_columns`."""
    (rows, columns), device = block.shape, block.device
    block, root = (each if each.stride(1) == 1 else each.contiguous() for each in (block, root))
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=device)
    errors = torch.empty(rows, columns, dtype=torch.float32, device=device)
    width = max(16, triton.next_power_of_2(columns))
    per_program = max(1, _TILE // width)
    with torch.cuda.device_of(block):
        _columns_kernel[(triton.cdiv(rows, per_program),)](
            block, root, scale, scale if zero is None else zero, groups, codes, errors, rows,
            block.stride(0), root.stride(0), scale.stride(0), _ROUND,
            HAS_ZERO=zero is not None, MIDDLE=2.0 ** (bits - 1), LOWEST=float(zero is None),
            HIGHEST=2.0**bits - 1, columns=columns, ROWS=per_program, COLUMNS=width, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes.t(), errors


def search_grid(
    values: torch.Tensor,
    importance: torch.Tensor,
    factors: tuple[float, ...],
    bits: int,
    sym: bool,
    scale_dtype: torch.dtype,
) -> Grid:
    """The grid of values [out, groups, columns]; see `harness.nn.quantizer.least_error_grid`.

    Args:
        importance: float32 [groups, columns].
    """
    (rows, groups, columns), device = values.shape, values.device
    values = values if values.stride(2) == 1 else values.contiguous()
    importance = importance.contiguous()
    scale = torch.empty(rows, groups, 1, dtype=scale_dtype, device=device)
    zero = None if sym else torch.empty(rows, groups, 1, dtype=torch.uint8, device=device)
    width = min(1024, max(16, triton.next_power_of_2(columns)))
    per_program = max(1, _TILE // width)
    with torch.cuda.device_of(values):
        _search_kernel[(triton.cdiv(rows, per_program), groups)](
            values, importance, _on_device(factors, device), scale, scale if zero is None else zero,
            rows, groups, values.stride(0), values.stride(1), importance.stride(0), _ROUND,
            SYM=sym, REACH=2.0 ** (bits - sym) - 1, MIDDLE=2.0 ** (bits - 1), LOWEST=float(sym),
            HIGHEST=2.0**bits - 1, columns=columns, steps=len(factors), ROWS=per_program, COLUMNS=width,
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return Grid(bits, scale, zero)


@functools.cache
def _on_device(factors: tuple[float, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor(factors, dtype=torch.float32, device=device)
