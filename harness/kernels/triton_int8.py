# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernels for int8 activations times int8 weights (W8A8).

`matmul` adds the products up exactly in int32 and applies both scales and the bias before anything is
written, so the int32 sums never reach memory (but where several programs share the columns of a tile).
One row is multiplied by `harness.kernels.triton_int8_gemv`. What each launches is given by a
`harness.kernels.int8_launches.Launch`.

`quantize_to` rounds to a scale that is known; `harness.kernels.triton_rows` has the others. Scales are
applied in the order of the plain form, without fused operations, so the results have its bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from harness.kernels import triton_rows
from harness.kernels.int8_launches import ALIGNMENT, Launch, choose
from harness.kernels.triton_int8_gemv import Outliers, gemv
from harness.kernels.triton_rows import ROUNDER, round_int8

__all__ = ["matmul", "quantize_to", "quantize_tokens"]

_WIDEST_FLOAT32 = 128 * 128  # a wider tile of float32 results does not fit shared memory beside its operands


@triton.jit
def _quantize_to_kernel(
    x_ptr, codes_ptr, scale_ptr, K, x_stride, rounder, BLOCK: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + k, mask=k < K, other=0.0).to(tl.float32)
    q = round_int8(x, tl.div_rn(1.0, tl.load(scale_ptr)), rounder)
    tl.store(codes_ptr + row * K + k, q.to(tl.int8), mask=k < K)


@triton.jit
def scaled(
    acc, m, n, m_mask, n_mask, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    """float32 of the int32 sums `acc`; m [rows, 1] and n [1, out] are their places in the result.

    HAS_ZEROS: the weights have zero points int32 [out]; sums_ptr: what the codes of each row sum up to.
    """
    if HAS_ZEROS:
        sums = tl.load(sums_ptr + m, mask=m_mask, other=0)
        acc -= sums * tl.load(zeros_ptr + n, mask=n_mask, other=0)
    y = acc.to(tl.float32)
    if PER_TOKEN:
        y *= tl.load(a_scale_ptr + m, mask=m_mask, other=0.0)
    else:
        y *= tl.load(a_scale_ptr)
    if PER_CHANNEL:
        y *= tl.load(b_scale_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    else:
        y *= tl.load(b_scale_ptr).to(tl.float32)
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    return y


@triton.jit
def tile_of(pid, blocks_m, blocks_n, GROUP: tl.constexpr):
    """The tile of a program: columns of GROUP row blocks, so that neighbours share weights in the cache."""
    first_m = pid // (GROUP * blocks_n) * GROUP
    group_m = tl.minimum(blocks_m - first_m, GROUP)
    return first_m + pid % (GROUP * blocks_n) % group_m, pid % (GROUP * blocks_n) // group_m


@triton.jit
def _matmul_kernel(
    a_ptr, b_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr, out_ptr,
    outliers_ptr, outlier_weights_ptr, used_ptr, M, N, K, steps_per_split,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    pid_m, pid_n = tile_of(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offsets = tl.arange(0, BLOCK_K)
    # Rows beyond the end are read as row 0 again and never stored.
    a_rows = a_ptr + tl.where(m < M, m, 0).to(tl.int64)[:, None] * K
    b_rows = b_ptr + tl.where(n < N, n, 0).to(tl.int64)[None, :] * K
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32)
    first, last = 0, K
    if SPLIT:
        first = tl.program_id(1) * steps_per_split * BLOCK_K
        last = tl.minimum(first + steps_per_split * BLOCK_K, K)
    for start in range(first, last, BLOCK_K):
        k = start + offsets
        if EVEN_K:
            a = tl.load(a_rows + k[None, :])
            b = tl.load(b_rows + k[:, None])
        else:
            a = tl.load(a_rows + k[None, :], mask=k[None, :] < K, other=0)
            b = tl.load(b_rows + k[:, None], mask=k[:, None] < K, other=0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    m_2, n_2 = m[:, None], n[None, :]
    mask = (m_2 < M) & (n_2 < N)
    pointers = out_ptr + m.to(tl.int64)[:, None] * N + n_2
    if SPLIT:
        tl.store(pointers + tl.program_id(1).to(tl.int64) * M * N, acc, mask=mask)
    else:
        y = scaled(
            acc, m_2, n_2, m_2 < M, n_2 < N, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr,
            PER_TOKEN, PER_CHANNEL, HAS_BIAS, HAS_ZEROS,
        )  # fmt: skip
        if SLOTS > 0:
            s = tl.arange(0, 16)
            used = tl.load(used_ptr)
            for start in range(0, used, 16):
                at = m.to(tl.int64)[:, None] * SLOTS + start + s[None, :]
                x = tl.load(outliers_ptr + at, mask=m_2 < M, other=0.0)
                at = n.to(tl.int64)[None, :] * SLOTS + start + s[:, None]
                w = tl.load(outlier_weights_ptr + at, mask=n_2 < N, other=0.0)
                y = tl.dot(x, w, y, input_precision="ieee")
        tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _tma_kernel(
    a_desc, b_desc, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr, out_ptr, M, N, K,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ZEROS: tl.constexpr,
    GROUP: tl.constexpr, IS_FLOAT: tl.constexpr,
):  # fmt: skip
    """Programs that stay: each takes every so many-th tile. IS_FLOAT: the operands are float8."""
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), blocks_m * blocks_n, tl.num_programs(0), flatten=True):
        pid_m, pid_n = tile_of(tile, blocks_m, blocks_n, GROUP)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32 if IS_FLOAT else tl.int32)
        for start in range(0, K, BLOCK_K):
            # What lies beyond the end of an operand comes as zeros.
            a = a_desc.load([pid_m * BLOCK_M, start])
            b = b_desc.load([pid_n * BLOCK_N, start])
            acc = tl.dot(a, b.T, acc, out_dtype=acc.dtype)
        m = (pid_m * BLOCK_M + tl.arange(0, BLOCK_M))[:, None]
        n = (pid_n * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
        y = scaled(
            acc, m, n, m < M, n < N, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr,
            PER_TOKEN, PER_CHANNEL, HAS_BIAS, HAS_ZEROS,
        )  # fmt: skip
        pointers = out_ptr + m.to(tl.int64) * N + n
        tl.store(pointers, y.to(out_ptr.dtype.element_ty), mask=(m < M) & (n < N))


@triton.jit
def _add_splits_kernel(
    partials_ptr, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr, out_ptr, M, N,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, PER_TOKEN: tl.constexpr, PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) + tl.zeros((1, 1), dtype=tl.int32)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    at = m.to(tl.int64) * N + n
    acc = tl.zeros((1, BLOCK), dtype=tl.int32)
    size = tl.num_programs(0).to(tl.int64) * N
    for split in tl.static_range(SPLITS):
        acc += tl.load(partials_ptr + split * size + at, mask=n < N, other=0)
    y = scaled(
        acc, m, n, m < M, n < N, a_scale_ptr, b_scale_ptr, bias_ptr, sums_ptr, zeros_ptr,
        PER_TOKEN, PER_CHANNEL, HAS_BIAS, HAS_ZEROS,
    )  # fmt: skip
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=n < N)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [rows, in] and float32 scales [rows, 1] of x [rows, in], one scale per row."""
    return triton_rows.quantize(x)


def quantize_to(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """int8 codes [rows, in] of x [rows, in] on the grid of one float32 scale [1]."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    block = min(4096, triton.next_power_of_2(columns))
    with torch.cuda.device_of(x):
        _quantize_to_kernel[(rows, triton.cdiv(columns, block))](
            x, codes, scale, columns, x.stride(0), ROUNDER, BLOCK=block, num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes


def matmul(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    b: torch.Tensor,
    b_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    sums: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    outliers: Outliers | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """``(a @ b.T - sums * zeros) * a_scale * b_scale + bias`` for a [rows, in] and b [out, in], as `dtype`.

    Args:
        a, b: int8; float8 as well where the launch is of the kind ``tma``.
        a_scale: float32 [rows, 1] or [1]. b_scale: float32 [out] or [1].
        sums: int32 [rows], what the codes of each row sum up to. zeros: int32 [out]. Both or none.
        outliers: a product in floating point to be added, with its weights.
        launch: by default that of `choose`.
    """
    (rows, columns), out = a.shape, b.shape[0]
    launch = launch or choose(rows, out, columns)
    if launch.kind == "gemv" and outliers is None and zeros is None:
        return gemv(a, a_scale, b, b_scale, bias, dtype, launch=launch)
    if launch.kind == "gemv":
        launch = choose(2, out, columns)
    a = a if a.is_contiguous() else a.contiguous()
    y = torch.empty(rows, out, dtype=dtype, device=a.device)
    absent = b_scale
    optional = [absent if each is None else each for each in (bias, sums, zeros)]
    epilogue = (a_scale, b_scale, *optional)
    switches = {
        "PER_TOKEN": a_scale.ndim == 2,
        "PER_CHANNEL": b_scale.numel() > 1,
        "HAS_BIAS": bias is not None,
        "HAS_ZEROS": zeros is not None,
    }
    tiles = triton.cdiv(rows, launch.m) * triton.cdiv(out, launch.n)
    blocks = {"BLOCK_M": launch.m, "BLOCK_N": launch.n, "BLOCK_K": launch.k, "GROUP": launch.group}
    how = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": False}
    with torch.cuda.device_of(a):
        if launch.kind == "tma" and outliers is None and _fits_tma(launch, columns, dtype):
            from triton.tools.tensor_descriptor import TensorDescriptor

            _tma_kernel[(min(tiles, processors(a.device)),)](
                TensorDescriptor.from_tensor(a, [launch.m, launch.k]),
                TensorDescriptor.from_tensor(b, [launch.n, launch.k]),
                *epilogue, y, rows, out, columns, IS_FLOAT=a.dtype != torch.int8,
                **blocks, **switches, **how,
            )  # fmt: skip
            return y
        steps = triton.cdiv(columns, launch.k)
        per_split = steps if outliers is not None else triton.cdiv(steps, launch.split)
        splits = triton.cdiv(steps, per_split)
        target = y if splits == 1 else y.new_empty(splits, rows, out, dtype=torch.int32)
        slots = (absent, absent, absent)
        if outliers is not None:
            assert outliers.weights is not None
            slots = (outliers.values, outliers.weights, outliers.used)
        _matmul_kernel[(tiles, splits)](
            a, b, *epilogue, target, *slots, rows, out, columns, per_split,
            EVEN_K=columns % launch.k == 0, SPLIT=splits > 1,
            SLOTS=0 if outliers is None else outliers.values.shape[1], **blocks, **switches, **how,
        )  # fmt: skip
        if splits > 1:
            _add_splits_kernel[(rows, triton.cdiv(out, 1024))](
                target, *epilogue, y, rows, out, SPLITS=splits, BLOCK=1024, **switches,
                enable_fp_fusion=False,
            )  # fmt: skip
    return y


def _fits_tma(launch: Launch, columns: int, dtype: torch.dtype) -> bool:
    """Whether the copy engine can read the rows, and the tile of the result fits beside the operands."""
    return columns % ALIGNMENT == 0 and (dtype.itemsize == 2 or launch.m * launch.n <= _WIDEST_FLOAT32)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; a few for Triton's interpreter."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
