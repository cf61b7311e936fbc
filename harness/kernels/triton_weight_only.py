"""Launches of the Triton kernels for stored matrices and 16- or 32-bit activations.

The forms of the product are in `triton_gemv`, `triton_wide` and `gluon_vector` (one row), `triton_fused` and
`triton_small` (tensor cores) and `triton_dequantize` (writes the matrix for a library product);
`harness.kernels.selection` chooses. All accumulate in float32. Where the rows of a matrix do not fill the
device, all but *wide* and *vector* split the input columns between programs, whose partial sums a second
kernel (of *matrix* those programs) adds in a fixed order, so the same inputs give the same bits.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from harness.kernels.selection import (
    MOST_MATRICES,
    SHARING,
    WRITING,
    Launch,
    Writing,
    rows_per_program,
    tiles_abreast,
    tiles_per_step,
)
from harness.kernels.stored import StoredMatrix
from harness.kernels.triton_dequantize import weight_only_dequantize_kernel
from harness.kernels.triton_fields import EXPONENT
from harness.kernels.triton_fused import weight_only_fused_gemm_kernel
from harness.kernels.triton_gemv import weight_only_gemv_kernel
from harness.kernels.triton_small import weight_only_small_gemm_kernel
from harness.kernels.triton_wide import weight_only_wide_kernel

__all__ = [
    "Call",
    "arguments_of_several",
    "dequantize",
    "multiply",
    "multiply_several",
    "prepare",
    "prepare_dequantize",
    "prepare_several",
    "processors",
]

_KERNELS = {
    "gemv": weight_only_gemv_kernel,
    "fused": weight_only_fused_gemm_kernel,
    "small": weight_only_small_gemm_kernel,
}
_MAX_SPLITS = 16
_LEAST_WORDS = 16  # a product on tensor cores sums over no fewer
_LEAST_ROWS = 16


@dataclass(frozen=True, slots=True)
class Call:
    """A kernel, its grid and arguments: to be launched, or only compiled (`warmup`)."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    output: torch.Tensor

    def run(self) -> torch.Tensor:
        with torch.cuda.device_of(self.output):
            self.kernel[self.grid](*self.arguments, **self.constants)
        return self.output

    def compile(self) -> Any:
        """Compile without launching; the tensors may be on the meta device."""
        return self.kernel.warmup(*self.arguments, grid=self.grid, **self.constants)


@triton.jit
def _add_partials_kernel(
    partials_ptr, bias_ptr, out_ptr, N, size,
    SPLITS: tl.constexpr, BLOCK: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    y = tl.zeros((BLOCK,), dtype=tl.float32)
    for split in tl.static_range(SPLITS):
        y += tl.load(partials_ptr + split * size + at, mask=mask, other=0.0)
    if HAS_BIAS:
        y += tl.load(bias_ptr + at % N, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y.to(out_ptr.dtype.element_ty), mask=mask)


def multiply(
    x: torch.Tensor, weight: StoredMatrix, bias: torch.Tensor | None, launch: Launch
) -> torch.Tensor:
    """``x @ W.T + bias`` [rows, out] for x [rows, in], in x's type."""
    for call in prepare(x, weight, bias, launch, processors(x.device)):
        y = call.run()
    return y


def prepare(
    x: torch.Tensor, weight: StoredMatrix, bias: torch.Tensor | None, launch: Launch, device_processors: int
) -> list[Call]:
    """The kernels of a product in their order; the last one's output is the result.

    Where the columns are split, the first writes partial sums [splits, rows, out] in float32.
    """
    x = _padded(x, weight)
    if launch.kernel == "wide":
        return [_prepare_wide(x, weight, bias, launch)]
    if launch.kernel in SHARING:
        call, _ = prepare_several(x, [weight], [] if bias is None else [bias], launch, device_processors)
        return [call]
    rows, out, form = x.shape[0], weight.out_features, weight.form
    is_gemv = launch.kernel == "gemv"
    block_m = 1 if is_gemv else min(launch.block_m, max(_LEAST_ROWS, triton.next_power_of_2(rows)))
    chunk = tiles_per_step(form, launch.words, 1 if is_gemv else _LEAST_WORDS)
    block_n = rows_per_program(form, launch, chunk) if is_gemv else launch.block_n
    tiles = weight.codes.shape[0]
    blocks_n, blocks_m = triton.cdiv(out, block_n), triton.cdiv(rows, block_m)
    chunks = triton.cdiv(tiles, chunk)
    wanted = launch.programs * device_processors // (blocks_n * blocks_m)
    chunks_per_split = triton.cdiv(chunks, min(max(1, wanted), chunks, _MAX_SPLITS))
    splits = triton.cdiv(chunks, chunks_per_split)
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    target = y
    if splits > 1:
        target = torch.empty(splits, rows, out, dtype=torch.float32, device=x.device)
    shared = shared_arguments(weight, chunk, block_n)
    constants = {**shared.constants, "BLOCK_N": block_n, "HAS_BIAS": bias is not None, "SPLIT": splits > 1}
    if not is_gemv:
        constants |= {"BLOCK_M": block_m, "SUMS": _can_sum(weight, launch, shared.constants)}
    absent = weight.codes if bias is None else bias
    extra: tuple[Any, ...] = ()
    last: tuple[int, ...] = (EXPONENT, 0)
    if launch.kernel == "fused":
        extra, last = (numbers(x.device),), ()
    if is_gemv:
        index, values = weight.outlier_index, weight.outlier_values
        count = 0 if index is None else index.numel()
        constants["SEARCH_STEPS"] = count.bit_length()
        extra = (
            weight.codes if index is None else index,
            weight.codes if values is None else values,
            count,
            weight.in_features,
        )
    arguments = (
        x, *shared.tensors, absent, target, *extra,
        rows, out, tiles, chunks_per_split, x.stride(0),
        shared.zero_bytes, shared.tiles_per_group, *last,
    )  # fmt: skip
    constants |= {"num_warps": launch.warps, "num_stages": launch.stages}
    calls = [Call(_KERNELS[launch.kernel], (blocks_m, blocks_n, splits), arguments, constants, target)]
    if splits > 1:
        size = y.numel()
        constants = {"SPLITS": splits, "BLOCK": 256, "HAS_BIAS": bias is not None, "num_warps": 2}
        calls.append(
            Call(
                _add_partials_kernel, (triton.cdiv(size, 256),), (target, absent, y, out, size), constants, y
            )
        )
    return calls


def _prepare_wide(x: torch.Tensor, weight: StoredMatrix, bias: torch.Tensor | None, launch: Launch) -> Call:
    """One launch whatever the sizes: its programs hold all columns, a stretch at a time."""
    rows, out, tiles = x.shape[0], weight.out_features, weight.codes.shape[0]
    chunk = tiles_abreast(weight.form, launch.words)
    shared = shared_arguments(weight, chunk, launch.block_n)
    used = ("BITS", "TILE", "CHUNK", "SCALES", "ZEROS", "EVEN")
    constants = {name: shared.constants[name] for name in used}
    constants |= {"BLOCK_N": launch.block_n, "HAS_BIAS": bias is not None, "num_warps": launch.warps}
    y = torch.empty(rows, out, dtype=x.dtype, device=x.device)
    arguments = (
        x, *shared.tensors, weight.codes if bias is None else bias, y,
        rows, out, tiles, x.stride(0), shared.zero_bytes, shared.tiles_per_group, EXPONENT,
    )  # fmt: skip
    grid = (rows, triton.cdiv(out, launch.block_n))
    return Call(weight_only_wide_kernel, grid, arguments, constants, y)


def multiply_several(
    x: torch.Tensor,
    weights: Sequence[StoredMatrix],
    biases: Sequence[torch.Tensor],
    launch: Launch,
) -> list[torch.Tensor]:
    """``[x @ W.T + b for W, b in zip(weights, biases)]`` in one launch of *vector*, *few* or *matrix*;
    x [rows, in], W [out, in].

    Args:
        x: one row for *vector*, at most `launch.block_m` for *few*.
        weights: at most `MOST_MATRICES`, of one form but for their rows.
        biases: one for each weight, or none at all.
    """
    call, outputs = prepare_several(_padded(x, weights[0]), weights, biases, launch, processors(x.device))
    call.run()
    return outputs


def prepare_several(
    x: torch.Tensor,
    weights: Sequence[StoredMatrix],
    biases: Sequence[torch.Tensor],
    launch: Launch,
    device_processors: int,
) -> tuple[Call, list[torch.Tensor]]:
    """The one launch, and where its results are; of *vector* and *few* every warp takes each
    `launch.warps`-th tile."""
    # Of all kernels only these are written in Gluon, which Triton may still change.
    if launch.kernel == "matrix":
        from harness.kernels import matrix

        return matrix.prepare(x, weights, biases, launch, device_processors)
    from harness.kernels import gluon_few, gluon_tiles, gluon_vector

    several = arguments_of_several(x, weights, biases, launch)
    rows, tiles = x.shape[0], weights[0].codes.shape[0]
    steps = max(1, triton.next_power_of_2(tiles) // launch.warps)
    constants = several.constants | {
        "BITS": weights[0].bits,
        "TILE": weights[0].tile,
        "ROWS": launch.block_n,
        "STAGES": min(launch.stages, steps),
    }
    is_bfloat16 = x.dtype == torch.bfloat16
    base = gluon_tiles.BFLOAT16_BASE if is_bfloat16 else gluon_tiles.FLOAT16_BASE
    arguments = [x, *several.matrices, tiles, several.tiles_per_group, base]
    if launch.kernel == "vector":
        kernel = gluon_vector.weight_only_vector_kernel
        constants["STEPS"] = steps
    else:
        kernel = gluon_few.weight_only_few_kernel
        constants["COUNT"] = max(8, triton.next_power_of_2(rows))
        arguments[0] = x = _aligned(x)
        arguments[-3:-3] = [rows, x.stride(0)]
    blocks = triton.cdiv(max(weight.out_features for weight in weights), launch.block_n)
    grid = (blocks, len(weights))
    return Call(kernel, grid, tuple(arguments), constants, several.outputs[0]), several.outputs


@dataclass(frozen=True, slots=True)
class SeveralArguments:
    """What the kernels of several matrices are given of them: seven arguments of each, where the results are,
    and what is the same for all."""

    matrices: list[Any]
    outputs: list[torch.Tensor]
    tiles_per_group: int
    constants: dict[str, Any]


def arguments_of_several(
    x: torch.Tensor, weights: Sequence[StoredMatrix], biases: Sequence[torch.Tensor], launch: Launch
) -> SeveralArguments:
    """Those of a product as of `prepare_several`, whose results [rows, out] are allocated."""
    outputs = [x.new_empty(x.shape[0], weight.out_features) for weight in weights]
    matrices: list[Any] = []
    for place in range(MOST_MATRICES):
        index = place if place < len(weights) else 0  # an absent matrix is another one, which is not read
        weight, output = weights[index], outputs[index]
        shared = shared_arguments(weight, 1, launch.block_n)
        codes, scales, zeros = shared.tensors[0], shared.tensors[1], shared.tensors[4]
        bias = biases[index] if biases else codes
        matrices += [codes, scales, zeros, bias, output, weight.out_features, shared.zero_bytes]
    constants = {name: shared.constants[name] for name in ("SCALES", "ZEROS")}
    constants |= {
        "MATRICES": len(weights),
        "HAS_BIAS": bool(biases),
        "EVEN": all(weight.out_features % launch.block_n == 0 for weight in weights),
        "EACH": shared.tiles_per_group == 1,
        "num_warps": launch.warps,
    }
    return SeveralArguments(matrices, outputs, shared.tiles_per_group, constants)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """x with rows that begin at multiples of eight bytes, which is what a thread reads of them at once."""
    is_aligned = x.stride(0) % 4 == 0 and x.storage_offset() % 4 == 0
    return x if is_aligned else x.clone(memory_format=torch.contiguous_format)


def dequantize(weight: StoredMatrix, dtype: torch.dtype, writing: Writing = WRITING) -> torch.Tensor:
    """The matrix [out, in], computed in float32 and rounded to `dtype` once; no outliers."""
    return prepare_dequantize(weight, dtype, writing).run()


def prepare_dequantize(weight: StoredMatrix, dtype: torch.dtype, writing: Writing = WRITING) -> Call:
    """The launch that writes the matrix."""
    out = weight.out_features
    w = torch.empty(out, weight.in_features, dtype=dtype, device=weight.codes.device)
    block_n = writing.block_n
    chunk = tiles_per_step(weight.form, writing.words)
    shared = shared_arguments(weight, chunk, block_n)
    tiles = weight.codes.shape[0]
    arguments = (
        *shared.tensors, w, out, weight.in_features, tiles,
        shared.zero_bytes, shared.tiles_per_group, EXPONENT, 0,
    )  # fmt: skip
    constants = {**shared.constants, "BLOCK_N": block_n, "num_warps": writing.warps}
    constants["EVEN"] = constants["EVEN"] and weight.columns == weight.in_features
    # As plain torch does it: a product is rounded before something is added to it.
    constants["enable_fp_fusion"] = False
    grid = (triton.cdiv(tiles, chunk), triton.cdiv(out, block_n))
    return Call(weight_only_dequantize_kernel, grid, arguments, constants, w)


@dataclass(frozen=True, slots=True)
class SharedArguments:
    """What the kernels are given of a matrix."""

    tensors: tuple[torch.Tensor, ...]
    zero_bytes: int
    tiles_per_group: int
    constants: dict[str, Any]


def shared_arguments(weight: StoredMatrix, chunk: int, block_n: int) -> SharedArguments:
    """What every launch passes of a matrix; for an absent tensor another one, which is not read."""
    codes, scales, zeros = weight.codes.view(torch.int32), weight.scales, weight.zeros
    tiles, tiles_per_group = codes.shape[0], weight.group_columns // weight.tile
    tensors = (codes, scales, weight.steps, weight.mean, zeros, weight.table)
    has_one_group = tiles_per_group >= tiles or tiles_per_group % chunk == 0
    constants = {
        "BITS": weight.bits,
        "TILE": weight.tile,
        "CHUNK": chunk,
        "ONE_GROUP": scales is None or has_one_group,
        "SCALES": _kind_of_scale(weight),
        "ZEROS": 0 if zeros is None else 2 if zeros.is_floating_point() else 1,
        "TABLE": weight.table is not None,
        "EVEN": weight.out_features % block_n == 0 and tiles % chunk == 0,
    }
    present = tuple(codes if tensor is None else tensor for tensor in tensors)
    return SharedArguments(present, 0 if zeros is None else zeros.shape[1], tiles_per_group, constants)


def _kind_of_scale(weight: StoredMatrix) -> int:
    if weight.scales is None:
        return 0
    if weight.steps is not None:
        return 3
    return 2 if weight.scales.shape[1] == 1 and weight.out_features > 1 else 1


def _can_sum(weight: StoredMatrix, launch: Launch, constants: dict[str, Any]) -> bool:
    return launch.sums and bool(constants["ONE_GROUP"]) and weight.scales is not None


def _padded(x: torch.Tensor, weight: StoredMatrix) -> torch.Tensor:
    """x with zero columns where the stored matrix has padding, and unit stride along the columns."""
    missing = weight.columns - x.shape[1]
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def numbers(device: torch.device) -> torch.Tensor:
    """What `triton_fields` looks up: int32, the integers from 0 to 255 and `EXPONENT`."""
    return torch.cat([torch.arange(256), torch.tensor([EXPONENT])]).to(device, torch.int32)


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device; 1 in Triton's interpreter."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count
