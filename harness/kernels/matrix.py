"""Launches of the product of stored 4-bit matrices and many rows (`harness.kernels.gluon_matrix`)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton

from harness.kernels.selection import MOST_MATRICES, Launch, split_blocks
from harness.kernels.stored import StoredMatrix
from harness.kernels.triton_weight_only import Call, arguments_of_several

__all__ = ["new_flag", "prepare"]

_LEAST_ROWS = 16
_PIECES = (2, 4)
"""Programs that share a block out and each add up a piece of it."""
_EVEN_BASE, _ODD_BASE = 0x45000000, 0x43000000
"""The bits of the floats 2048 and 128: a field at bit 12 of a word, or at bit 16, is their lowest digit."""
_launches = itertools.count()


def prepare(
    x: torch.Tensor,
    weights: Sequence[StoredMatrix],
    biases: Sequence[torch.Tensor],
    launch: Launch,
    processors: int,
) -> tuple[Call, list[torch.Tensor]]:
    """The one launch of ``x @ W.T + bias`` [rows, out] for each W, and where its results are; x
    [rows, columns] in a 16-bit type.

    Where the blocks of the results do not fill the device evenly, some are shared out (see
    `harness.kernels.selection.split_blocks`).

    Args:
        weights: at most `MOST_MATRICES`, of one form but for their rows.
        biases: one for each weight, or none at all.
    """
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from harness.kernels.gluon_matrix import weight_only_matrix_kernel

    rows, tiles, tile = x.shape[0], weights[0].codes.shape[0], weights[0].tile
    block_n = launch.block_n
    block_m = min(launch.block_m, max(_LEAST_ROWS, triton.next_power_of_2(rows)))
    several = arguments_of_several(x, weights, biases, launch)
    blocks_m = triton.cdiv(rows, block_m)
    blocks_n = [triton.cdiv(weight.out_features, block_n) for weight in weights]
    # Blocks of rows of the matrices before the second and the third; of absent ones all.
    before = [sum(blocks_n[:place]) for place in range(1, MOST_MATRICES)]
    blocks = sum(blocks_n) * blocks_m
    whole, splits = split_blocks(blocks, tiles, processors)
    left = blocks - whole
    pieces = splits if splits in _PIECES and block_m // splits >= _LEAST_ROWS else 1
    slots = (left, pieces, pieces) if pieces > 1 else (left, splits - 1)
    size = block_n * block_m // pieces
    partials = torch.empty(*slots, size, dtype=torch.float32, device=x.device)
    flags = torch.empty(slots, dtype=torch.int64, device=x.device)
    # Hopper's tensor cores read x in rows of 128 bytes whose pieces of 16 are exchanged: half a tile.
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    descriptor = TensorDescriptor.from_tensor(_aligned(x), [block_m, tile // 2], layout)
    arguments = (
        descriptor, *several.matrices, partials, flags, rows, tiles, several.tiles_per_group, blocks_m,
        *before, whole, splits - 1, triton.cdiv(tiles, splits), new_flag(), _EVEN_BASE, _ODD_BASE,
    )  # fmt: skip
    constants = several.constants | {
        "BLOCK_N": block_n,
        "BLOCK_M": block_m,
        "STAGES": launch.stages,
        "PIECES": pieces,
    }
    grid, outputs = (whole + left * splits,), several.outputs
    return Call(weight_only_matrix_kernel, grid, arguments, constants, outputs[0]), outputs


def new_flag() -> int:
    """A 64-bit number that no other launch of this process has: nothing needs to be cleared before a launch,
    since memory holds it only where the launch itself has written it."""
    return 1 << 62 | next(_launches) * 0x9E3779B97F4A7C15 % 2**61 * 2 | 1


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin at multiples of 16 bytes and do not overlap, which the copy engine asks for."""
    is_aligned = x.stride(0) % 8 == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)
