"""A Triton kernel for dense weights and one row: as fast as memory delivers the weights.

A decode step multiplies every weight of a model with a vector. Libraries are made for many rows: at one
row, cuBLAS on an H100 reaches about 80 % of the bandwidth of a matrix of 90 MB and 70 % of one of 34 MB,
because it splits the columns and adds the parts up in a second launch. Here a program holds two rows of
the matrix, its threads read 16 bytes at a time, and nothing is added up twice.

Up to three matrices that read the same vector (query, key and value; gate and up) share one launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from harness.kernels.dense import ALIGNMENT, MOST_MATRICES

__all__ = ["linears"]

_PROGRAM_ELEMENTS = 4096  # weights that a program holds at a time: 16 for each of its threads


@triton.jit
def _dense_gemv_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, w_1, w_2, bias_1, bias_2, out_1, out_2,
    N_0, N_1, N_2, blocks_0, blocks_1, K,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`w_1` is where the second matrix begins, counted from the first in units of 16 weights."""
    pid = tl.program_id(0)
    is_2 = pid >= blocks_0 + blocks_1
    is_1 = (pid >= blocks_0) & (pid < blocks_0 + blocks_1)
    block = tl.where(is_2, pid - blocks_0 - blocks_1, tl.where(is_1, pid - blocks_0, pid))
    N = tl.where(is_2, N_2, tl.where(is_1, N_1, N_0))
    # In 64 bits: matrices of one model lie further apart than 32 bits can count.
    w_ptr += tl.where(is_2, w_2, tl.where(is_1, w_1, w_1 * 0)).to(tl.int64) * 16
    out_ptr += tl.where(is_2, out_2, tl.where(is_1, out_1, out_1 * 0))
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Rows beyond the end are read as row 0 again and never stored.
    w_rows = w_ptr + tl.where(n < N, n, 0).to(tl.int64)[:, None] * K
    offsets = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + offsets
        if EVEN_K:
            w = tl.load(w_rows + k[None, :], eviction_policy="evict_first")
        else:
            mask = (k < K)[None, :]
            w = tl.load(w_rows + k[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
    y = tl.sum(acc, 1)
    if HAS_BIAS:
        bias_ptr += tl.where(is_2, bias_2, tl.where(is_1, bias_1, bias_1 * 0))
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n < N)


def linears(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """``[x @ w.T + b for w, b in zip(weights, biases)]`` in one launch; x [1, in], w [out, in].

    Args:
        x: contiguous, one row.
        weights: at most `MOST_MATRICES`, contiguous, of x's type, aligned to `ALIGNMENT` elements.
        biases: one for each weight, or none at all.
    """
    columns = x.shape[1]
    outs = [x.new_empty(1, weight.shape[0]) for weight in weights]
    block_k = min(2048, triton.next_power_of_2(columns))
    block_n = min(16, _PROGRAM_ELEMENTS // block_k)
    blocks = [triton.cdiv(weight.shape[0], block_n) for weight in weights]
    blocks_0, blocks_1, _ = _filled(blocks)
    _, w_1, w_2 = _filled([step // ALIGNMENT for step in _steps(weights)])
    _, bias_1, bias_2 = _filled(_steps(biases))
    _, out_1, out_2 = _filled(_steps(outs))
    sizes = _filled([weight.shape[0] for weight in weights])
    with torch.cuda.device_of(x):
        _dense_gemv_kernel[(sum(blocks),)](
            x, weights[0], biases[0] if biases else x, outs[0],
            w_1, w_2, bias_1, bias_2, out_1, out_2, *sizes, blocks_0, blocks_1, columns,
            BLOCK_N=block_n, BLOCK_K=block_k, HAS_BIAS=bool(biases), EVEN_K=columns % block_k == 0,
            num_warps=8 if block_n * block_k >= _PROGRAM_ELEMENTS else 4, num_stages=1,
        )  # fmt: skip
    return outs


def _steps(tensors: Sequence[torch.Tensor]) -> list[int]:
    """Where each tensor begins, in elements from the first."""
    return [(each.data_ptr() - tensors[0].data_ptr()) // each.element_size() for each in tensors]


def _filled(values: Sequence[int]) -> list[int]:
    return [*values, *([0] * (MOST_MATRICES - len(values)))]
