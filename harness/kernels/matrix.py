"""Launches of the product of a stored 4-bit matrix and many rows (`harness.kernels.gluon_matrix`)."""

# mypy: disallow-untyped-defs=false, disallow-incomplete-defs=false
# mypy: disallow-untyped-decorators=false, disallow-untyped-calls=false

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernels.selection import Launch, split_blocks
from harness.kernels.stored import StoredMatrix
from harness.kernels.triton_weight_only import Call, shared_arguments

__all__ = ["add_blocks", "prepare"]

_LEAST_ROWS = 16
_ADDED_ROWS, _ADDED_COLUMNS = 32, 64  # of a block, by a program that adds up
_EVEN_BASE, _ODD_BASE = 0x45000000, 0x43000000
"""The bits of the floats 2048 and 128: a field at bit 12 of a word, or at bit 16, is their lowest digit."""


@triton.jit
def _add_blocks_kernel(
    partials_ptr, bias_ptr, out_ptr, M, N, blocks_m, whole,
    SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    left = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    at = partials_ptr + left * (SPLITS * BLOCK_N * BLOCK_M) + row[:, None] * BLOCK_M + column[None, :]
    y = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(at + split * (BLOCK_N * BLOCK_M))
    n = (whole + left) // blocks_m * BLOCK_N + row
    m = (whole + left) % blocks_m * BLOCK_M + column
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    at = out_ptr + m[None, :] * N + n[:, None]
    tl.store(at, y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


def prepare(
    x: torch.Tensor, weight: StoredMatrix, bias: torch.Tensor | None, launch: Launch, processors: int
) -> list[Call]:
    """The kernels of ``x @ W.T + bias`` [rows, out] in their order, for x [rows, columns] in a 16-bit type.

    Where the blocks of the result do not fill the device evenly, some are shared out (see
    `harness.kernels.selection.split_blocks`), and a second kernel adds up their parts in a fixed order.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from harness.kernels.gluon_matrix import weight_only_matrix_kernel

    rows, out, tiles = x.shape[0], weight.out_features, weight.codes.shape[0]
    block_n = launch.block_n
    block_m = min(launch.block_m, max(_LEAST_ROWS, triton.next_power_of_2(rows)))
    blocks_m, blocks_n = triton.cdiv(rows, block_m), triton.cdiv(out, block_n)
    whole, splits = split_blocks(blocks_m * blocks_n, tiles, processors)
    left = blocks_m * blocks_n - whole

    shared = shared_arguments(weight, 1, block_n)
    codes, scales, zeros = shared.tensors[0], shared.tensors[1], shared.tensors[4]
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    target = y
    if left:
        target = torch.empty(left, splits, block_n, block_m, dtype=torch.float32, device=x.device)
    absent = codes if bias is None else bias
    # Hopper's tensor cores read x in rows of 128 bytes whose pieces of 16 are exchanged: half a tile.
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = TensorDescriptor.from_tensor(_aligned(x), [block_m, weight.tile // 2], layout)
    arguments = (
        descriptor, codes, scales, zeros, absent, y, target,
        rows, out, tiles, shared.zero_bytes, shared.tiles_per_group,
        blocks_m, whole, splits, triton.cdiv(tiles, splits), _EVEN_BASE, _ODD_BASE,
    )  # fmt: skip
    constants = {name: shared.constants[name] for name in ("SCALES", "ZEROS")}
    constants |= {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "STAGES": launch.stages,
        "HAS_BIAS": bias is not None,
        "EVEN": out % block_n == 0,
        "EACH": shared.tiles_per_group == 1,
        "num_warps": launch.warps,
    }
    calls = [Call(weight_only_matrix_kernel, (whole + left * splits,), arguments, constants, target)]
    return [*calls, add_blocks(target, bias, y, blocks_m, whole)] if left else calls


def add_blocks(
    partials: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, blocks_m: int, whole: int
) -> Call:
    """The launch that adds partials [blocks, splits, block_n, block_m] up over the splits, in their order.

    The blocks of y [rows, out] are numbered down its rows first, `blocks_m` of them; these are the ones from
    `whole` on.
    """
    blocks, splits, block_n, block_m = partials.shape
    columns = min(_ADDED_COLUMNS, block_m)
    constants = {"SPLITS": splits, "BLOCK_N": block_n, "BLOCK_M": block_m}
    constants |= {"ROWS": _ADDED_ROWS, "COLUMNS": columns, "HAS_BIAS": bias is not None, "num_warps": 4}
    arguments = (partials, y if bias is None else bias, y, *y.shape, blocks_m, whole)
    return Call(
        _add_blocks_kernel, (blocks, block_n // _ADDED_ROWS, block_m // columns), arguments, constants, y
    )


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin at multiples of 16 bytes and do not overlap, which the copy engine asks for."""
    is_aligned = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)
