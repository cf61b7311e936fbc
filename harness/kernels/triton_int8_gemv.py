# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
# ruff: noqa: SIM102 (what is known when compiling is asked first, and leaves no code)
"""Triton kernel for one row times int8 weights (W8A8): a matrix-vector product.

The row may be rounded to int8 on the way. The weights are read once, 16 bytes a thread, four products an
instruction. Columns that were taken out of the product (LLM.int8()) are added in floating point.

Scales are applied in the order of the plain form, without fused operations, so the results have its bits.
`harness.kernels.triton_int8` is for more rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from harness.kernels.int8_launches import Launch, choose
from harness.kernels.selection import MOST_MATRICES
from harness.kernels.triton_rows import ROUNDER, peak_of, round_int8, scale_of
from harness.nn.quantizer import SMALLEST_SCALE

__all__ = ["Outliers", "dot4", "gemv", "gemv_several", "has_dp4a"]


@dataclass(frozen=True, slots=True)
class Outliers:
    """Columns of the input that were taken out of an int8 product, to be added to it in floating point.

    Args:
        values: [rows, slots] in the type of the activations, the columns of the input.
        weights: [out, slots] in that type; None where they are read from `codes` (one row only).
        columns: int32 [slots], which column a slot is.
        used: int32 [1], how many slots are used, the first ones.
        kept, place: columns of the weight that are kept in 16 bits, [kept, out], and where, int32 [in].
    """

    values: torch.Tensor
    weights: torch.Tensor | None
    columns: torch.Tensor
    used: torch.Tensor
    kept: torch.Tensor | None = None
    place: torch.Tensor | None = None


@triton.jit
def dot4(words, q, acc, DP4A: tl.constexpr):
    """acc + the sum of the products of four signed bytes each of int32 `words` and `q`."""
    if DP4A:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [words, q, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for byte in tl.static_range(4):
            acc += ((words << (24 - 8 * byte)) >> 24) * ((q << (24 - 8 * byte)) >> 24)
    return acc


@triton.jit
def _gemv_kernel(
    x_ptr, scale_ptr, w_ptr, w_scale_ptr, bias_ptr, out_ptr, N,
    w_1, w_scale_1, bias_1, out_1, N_1, w_2, w_scale_2, bias_2, out_2, N_2,
    outliers_ptr, columns_ptr, used_ptr, codes_ptr, kept_ptr, place_ptr, K, rounder, MATRICES: tl.constexpr,
    ROUND: tl.constexpr, FIND: tl.constexpr, SMALLEST: tl.constexpr, PER_CHANNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
    HAS_OUTLIERS: tl.constexpr, HAS_KEPT: tl.constexpr, DP4A: tl.constexpr,
):  # fmt: skip
    """Words are four codes. ROUND: x is floats, rounded here; FIND: to a scale that is found here, too.

    A program's second index counts the matrices, which are stored alike but for their rows.
    """
    if MATRICES > 1:
        if tl.program_id(1) == 1:
            w_ptr, w_scale_ptr, bias_ptr, out_ptr, N = w_1, w_scale_1, bias_1, out_1, N_1
    if MATRICES > 2:
        if tl.program_id(1) == 2:
            w_ptr, w_scale_ptr, bias_ptr, out_ptr, N = w_2, w_scale_2, bias_2, out_2, N_2
    if MATRICES > 1:
        if tl.program_id(0) * BLOCK_N >= N:  # of a matrix with fewer rows than another
            return
    if FIND:
        offsets = tl.arange(0, 4 * WORDS)
        peaks = tl.zeros((4 * WORDS,), dtype=tl.float32)
        for start in range(0, K, 4 * WORDS):
            k = start + offsets
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
        scale = scale_of(peak_of(peaks), 127.0, SMALLEST)
    else:
        scale = tl.load(scale_ptr)
    inverse = tl.div_rn(1.0, scale)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    row_words = K // 4
    # Rows beyond the end are read as row 0 again and never stored.
    w_rows = w_ptr + tl.where(n_mask, n, 0).to(tl.int64)[:, None] * row_words
    offsets, byte = tl.arange(0, WORDS), tl.arange(0, 4)[None, :]
    acc = tl.zeros((BLOCK_N, WORDS), dtype=tl.int32)
    for start in range(0, row_words, WORDS):
        at = start + offsets
        if EVEN:
            w = tl.load(w_rows + at[None, :], eviction_policy="evict_first")
        else:
            mask = (at < row_words)[None, :]
            w = tl.load(w_rows + at[None, :], mask=mask, other=0, eviction_policy="evict_first")
        if ROUND:
            x = tl.load(x_ptr + at[:, None] * 4 + byte, mask=(at < row_words)[:, None], other=0.0)
            q = round_int8(x.to(tl.float32), inverse, rounder)
            q = tl.sum((q & 255) << (8 * byte), 1)
        else:
            q = tl.load(x_ptr + at, mask=at < row_words, other=0)
        acc = dot4(w, tl.broadcast_to(q[None, :], (BLOCK_N, WORDS)), acc, DP4A)
    y = tl.sum(acc, 1).to(tl.float32) * scale
    if PER_CHANNEL:
        w_scale = tl.load(w_scale_ptr + n, mask=n_mask, other=0.0)
    else:
        w_scale = tl.load(w_scale_ptr) + tl.zeros((BLOCK_N,), dtype=tl.float32)
    y *= w_scale
    if HAS_BIAS:
        y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
    if HAS_OUTLIERS:
        used = tl.load(used_ptr)
        for first in range(0, used, 16):
            slot = first + tl.arange(0, 16)
            is_used = slot < used
            column = tl.load(columns_ptr + slot, mask=is_used, other=0)[None, :]
            value = tl.load(outliers_ptr + slot, mask=is_used, other=0.0)[None, :]
            both = n_mask[:, None] & is_used[None, :]
            code = tl.load(codes_ptr + n.to(tl.int64)[:, None] * K + column, mask=both, other=0)
            weight = (code.to(tl.float32) * w_scale[:, None]).to(value.dtype).to(tl.float32)
            if HAS_KEPT:
                place = tl.load(place_ptr + column, mask=is_used[None, :], other=-1)
                at = tl.maximum(place, 0).to(tl.int64) * N + n[:, None]
                kept = tl.load(kept_ptr + at, mask=both, other=0.0).to(value.dtype).to(tl.float32)
                weight = tl.where(place >= 0, kept, weight)
            y += tl.sum(value.to(tl.float32) * weight, 1)
    tl.store(out_ptr + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)


def gemv(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    *,
    outliers: Outliers | None = None,
    launch: Launch | None = None,
) -> torch.Tensor:
    """One row x [1, in] times int8 [out, in], scaled: [1, out] in `dtype`.

    Args:
        x: int8 codes, or floats that are rounded on the way.
        scale: float32, one number: that of the codes, or what floats are rounded to; None: it follows
            from the floats.
        weight_scale: float32 [out] or [1].
        outliers: columns to be added in floating point; the weights are read from `weight`.
        launch: by default that of `choose`; `in` is a multiple of `ALIGNMENT`.
    """
    biases = [] if bias is None else [bias]
    [y] = gemv_several(x, scale, [weight], [weight_scale], biases, dtype, outliers=outliers, launch=launch)
    return y


def gemv_several(
    x: torch.Tensor,
    scale: torch.Tensor | None,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor],
    dtype: torch.dtype,
    *,
    outliers: Outliers | None = None,
    launch: Launch | None = None,
) -> list[torch.Tensor]:
    """As `gemv`, of matrices that read the same row, in one launch.

    Args:
        weights: at most `MOST_MATRICES`; one where there are outliers.
        weight_scales: of each, all with one number for a row or all with one.
        biases: one for each weight, or none at all.
    """
    columns = x.shape[1]
    launch = launch or choose(1, max(weight.shape[0] for weight in weights), columns)
    is_rounded = x.dtype == torch.int8
    x = x.contiguous()
    outputs = [torch.empty(1, weight.shape[0], dtype=dtype, device=x.device) for weight in weights]
    matrices: list[Any] = []
    for place in range(MOST_MATRICES):
        index = place if place < len(weights) else 0  # an absent matrix is another one, which is not read
        weight, weight_scale = weights[index], weight_scales[index]
        bias = biases[index] if biases else weight_scale
        matrices += [weight.view(torch.int32), weight_scale, bias, outputs[index], weight.shape[0]]
    absent = weight_scales[0]
    slots: list[torch.Tensor | None] = [None] * 6
    if outliers is not None:
        slots = [outliers.values, outliers.columns, outliers.used, weights[0], outliers.kept, outliers.place]
    words = min(launch.k, triton.next_power_of_2(columns)) // 4
    blocks = triton.cdiv(max(weight.shape[0] for weight in weights), launch.n)
    with torch.cuda.device_of(x):
        _gemv_kernel[(blocks, len(weights))](
            x.view(torch.int32) if is_rounded else x, absent if scale is None else scale, *matrices,
            *(absent if each is None else each for each in slots), columns, ROUNDER,
            MATRICES=len(weights), ROUND=not is_rounded, FIND=scale is None, SMALLEST=SMALLEST_SCALE,
            PER_CHANNEL=absent.numel() > 1, HAS_BIAS=bool(biases), BLOCK_N=launch.n,
            WORDS=words, EVEN=columns % (4 * words) == 0, HAS_OUTLIERS=outliers is not None,
            HAS_KEPT=slots[4] is not None, DP4A=has_dp4a(x.device), num_warps=launch.warps,
            num_stages=launch.stages, enable_fp_fusion=False,
        )  # fmt: skip
    return outputs


def has_dp4a(device: torch.device) -> bool:
    """Whether a device has the instruction for four 8-bit products (all of NVIDIA's that Triton knows)."""
    return device.type == "cuda" and torch.version.hip is None
