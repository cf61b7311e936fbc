# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernels for int8 products whose outlier columns are multiplied in floating point (LLM.int8()).

Four launches, whatever the data: the largest value of each column; the outliers among the columns, in one
program; the rows rounded to int8 without them, beside the outlier columns of the input and of the weight;
the product, with that of the outliers added to it before it is written. One row needs two: its values are
the largest of their columns, and the matrix-vector kernel reads the outliers' weights itself.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from harness.kernels import triton_int8
from harness.kernels.int8_launches import ALIGNMENT, Launch, choose
from harness.kernels.triton_int8_gemv import Outliers, gemv
from harness.kernels.triton_rows import ROUNDER, peak_of, round_int8, scale_of, warps_for
from harness.nn.quantizer import SMALLEST_SCALE

__all__ = ["linear", "select", "split"]

_ROW_CHUNKS = 8  # parts of the rows whose peaks are found side by side
_BLOCK_N = 64  # weight rows of a program that gathers outlier columns
# float32 products of outliers run outside tensor cores: a wide tile would not fit the registers.
_FLOAT32 = Launch("dot", 64, 64, 128, 4, 3)


@triton.jit
def _peaks_kernel(
    x_ptr, peaks_ptr, M, K, x_stride, rows_per_chunk, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * rows_per_chunk
    last = tl.minimum(first + rows_per_chunk, M)
    peaks = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    for start in range(first, last, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        mask = (m < last)[:, None] & (k < K)[None, :]
        x = tl.load(x_ptr + m.to(tl.int64)[:, None] * x_stride + k[None, :], mask=mask, other=0.0)
        # NaN must reach the peak: maximum() drops it unless told not to.
        peaks = tl.maximum(peaks, tl.abs(x.to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    has_nan = tl.max((peaks != peaks).to(tl.int32), 0) > 0
    peak = tl.where(has_nan, float("nan"), tl.max(peaks, 0))
    tl.store(peaks_ptr + tl.program_id(1) * K + k, peak, mask=k < K)


@triton.jit
def _select_kernel(
    x_ptr, peaks_ptr, place_ptr, columns_ptr, used_ptr, taken_ptr, counters_ptr,
    codes_ptr, scale_ptr, outliers_ptr, K, threshold, capacity, rounder,
    CHUNKS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr, HAS_ALWAYS: tl.constexpr,
):  # fmt: skip
    """One program. CHUNKS 0: x is one row, which is split and rounded here, too."""
    k = tl.arange(0, BLOCK)
    mask = k < K
    if CHUNKS == 0:
        raw = tl.load(x_ptr + k, mask=mask, other=0.0)
        x = raw.to(tl.float32)
        peaks = tl.abs(x)
    else:
        peaks = tl.zeros((BLOCK,), dtype=tl.float32)
        for chunk in tl.static_range(CHUNKS):
            part = tl.load(peaks_ptr + chunk * K + k, mask=mask, other=0.0)
            peaks = tl.maximum(peaks, part, propagate_nan=tl.PropagateNan.ALL)
    if HAS_ALWAYS:
        peaks = tl.where(tl.load(place_ptr + k, mask=mask, other=-1) >= 0, float("inf"), peaks)
    is_outlier = mask & (peaks >= threshold)
    found = tl.sum(is_outlier.to(tl.int32), 0)
    taken, used = is_outlier, found
    if found > capacity:
        # Non-negative floats are in the order of their bits: the capacity's last place by halving.
        bits = tl.where(is_outlier, peaks.to(tl.int32, bitcast=True), -1)
        low, high = found * 0, found * 0 + 0x7F800001
        while high - low > 1:
            middle = low + (high - low) // 2
            enough = tl.sum((bits >= middle).to(tl.int32), 0) >= capacity
            low = tl.where(enough, middle, low)
            high = tl.where(enough, high, middle)
        above = bits > low
        ties = is_outlier & (bits == low)
        rest = capacity - tl.sum(above.to(tl.int32), 0)
        taken = above | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= rest))
        used = tl.sum(taken.to(tl.int32), 0)
    tl.store(used_ptr, used)
    if used > 0:
        slot = tl.cumsum(taken.to(tl.int32), 0) - 1
        tl.store(columns_ptr + slot, k, mask=taken)
        if CHUNKS == 0:
            tl.store(outliers_ptr + slot, raw, mask=taken)
    count = tl.arange(0, 4)
    seen = tl.where(count == 0, K, tl.where(count == 1, found, found - used)).to(tl.int64)
    before = tl.load(counters_ptr + count, mask=count < 3, other=0)
    tl.store(counters_ptr + count, before + seen, mask=count < 3)
    if CHUNKS == 0:
        x = tl.where(taken, 0.0, x)
        scale = scale_of(peak_of(tl.abs(x)), 127.0, SMALLEST)
        tl.store(scale_ptr, scale)
        q = round_int8(x, tl.div_rn(1.0, scale), rounder)
        tl.store(codes_ptr + k, q.to(tl.int8), mask=mask)
    else:
        tl.store(taken_ptr + k, taken.to(tl.int8), mask=mask)


@triton.jit
def _split_kernel(
    x_ptr, columns_ptr, used_ptr, taken_ptr, codes_ptr, scales_ptr, outliers_ptr,
    w_ptr, w_scale_ptr, kept_ptr, place_ptr, outlier_weights_ptr, M, N, K, x_stride, rounder,
    SMALLEST: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, SLOTS: tl.constexpr,
    PER_CHANNEL: tl.constexpr, HAS_KEPT: tl.constexpr,
):  # fmt: skip
    """The first M programs take a row of x each, the others some rows of the weight."""
    pid = tl.program_id(0)
    used = tl.load(used_ptr)
    if pid < M:
        row = pid.to(tl.int64)
        k = tl.arange(0, BLOCK)
        mask = k < K
        x = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(tl.load(taken_ptr + k, mask=mask, other=0) != 0, 0.0, x)
        scale = scale_of(peak_of(tl.abs(x)), 127.0, SMALLEST)
        tl.store(scales_ptr + row, scale)
        q = round_int8(x, tl.div_rn(1.0, scale), rounder)
        tl.store(codes_ptr + row * K + k, q.to(tl.int8), mask=mask)
        s = tl.arange(0, SLOTS)
        column = tl.load(columns_ptr + s, mask=s < used, other=0)
        value = tl.load(x_ptr + row * x_stride + column, mask=s < used, other=0.0)
        tl.store(outliers_ptr + row * SLOTS + s, value)
    else:
        n = (pid - M) * BLOCK_N + tl.arange(0, BLOCK_N)
        n_mask = n < N
        slot = tl.arange(0, 16)
        if PER_CHANNEL:
            w_scale = tl.load(w_scale_ptr + n, mask=n_mask, other=0.0)[:, None]
        else:
            w_scale = tl.load(w_scale_ptr)
        for start in range(0, used, 16):
            is_used = start + slot < used
            of_slot = tl.load(columns_ptr + start + slot, mask=is_used, other=0)
            both = n_mask[:, None] & is_used[None, :]
            code = tl.load(w_ptr + n.to(tl.int64)[:, None] * K + of_slot[None, :], mask=both, other=0)
            weight = code.to(tl.float32) * w_scale
            if HAS_KEPT:
                place = tl.load(place_ptr + of_slot, mask=is_used, other=-1)[None, :]
                at = tl.maximum(place, 0).to(tl.int64) * N + n[:, None]
                kept = tl.load(kept_ptr + at, mask=both, other=0.0).to(tl.float32)
                weight = tl.where(place >= 0, kept, weight)
            at = n.to(tl.int64)[:, None] * SLOTS + start + slot[None, :]
            tl.store(outlier_weights_ptr + at, weight.to(outlier_weights_ptr.dtype.element_ty), mask=both)
            # What no slot uses is multiplied with zeros, and must be a number.
            tl.store(outlier_weights_ptr + at, 0.0, mask=n_mask[:, None] & ~is_used[None, :])


def select(
    x: torch.Tensor,
    threshold: float,
    capacity: int,
    counters: torch.Tensor,
    always: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The outlier columns of x [rows, in]: int32 columns [slots], how many are used [1], and int8 flags [in].

    Args:
        capacity: columns to take at most: the largest, of equal ones the first.
        counters: int64 [3], to which the columns, the outliers and those beyond the capacity are added.
        always: int32 [in], columns where it is not negative are outliers whatever they hold.
    """
    rows, columns = x.shape
    partial = torch.empty(_ROW_CHUNKS, columns, dtype=torch.float32, device=x.device)
    taken = torch.empty(columns, dtype=torch.int8, device=x.device)
    chosen, used = _slots(capacity, x.device)
    with torch.cuda.device_of(x):
        _peaks_kernel[(triton.cdiv(columns, 64), _ROW_CHUNKS)](
            x, partial, rows, columns, x.stride(0), triton.cdiv(rows, _ROW_CHUNKS),
            BLOCK_M=min(64, triton.next_power_of_2(rows)), BLOCK_K=64, num_warps=4,
        )  # fmt: skip
        _select(x, partial, chosen, used, taken, counters, always, threshold, capacity)
    return chosen, used, taken


def split(
    x: torch.Tensor,
    threshold: float,
    capacity: int,
    counters: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    kept: torch.Tensor | None,
    place: torch.Tensor | None,
    kept_only: bool,
) -> tuple[torch.Tensor, torch.Tensor, Outliers]:
    """int8 codes and scales of x [rows, in] without its outlier columns, and these."""
    (rows, columns), out = x.shape, weight.shape[0]
    always = place if kept_only else None
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    if rows == 1 and columns % ALIGNMENT == 0:
        chosen, used = _slots(capacity, x.device)
        values = torch.empty(1, chosen.numel(), dtype=x.dtype, device=x.device)
        with torch.cuda.device_of(x):
            _select(x, None, chosen, used, None, counters, always, threshold, capacity, codes, scales, values)
        return codes, scales, Outliers(values, None, chosen, used, kept, place)
    chosen, used, taken = select(x, threshold, capacity, counters, always)
    slots = chosen.numel()
    values = torch.empty(rows, slots, dtype=x.dtype, device=x.device)
    weights = torch.empty(out, slots, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(columns)
    absent = weight_scale
    with torch.cuda.device_of(x):
        _split_kernel[(rows + triton.cdiv(out, _BLOCK_N),)](
            x, chosen, used, taken, codes, scales, values, weight, weight_scale,
            absent if kept is None else kept, absent if place is None else place, weights,
            rows, out, columns, x.stride(0), ROUNDER, SMALLEST=SMALLEST_SCALE, BLOCK=block,
            BLOCK_N=_BLOCK_N, SLOTS=slots, PER_CHANNEL=weight_scale.numel() > 1,
            HAS_KEPT=kept is not None, num_warps=warps_for(block), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales, Outliers(values, weights, chosen, used)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    threshold: float,
    capacity: int,
    kept: torch.Tensor | None,
    place: torch.Tensor | None,
    kept_only: bool,
    counters: torch.Tensor,
    *,
    launch: Launch | None = None,
) -> torch.Tensor:
    """y [rows, out] of x [rows, in]; see `harness.kernels.outlier_int8.linear`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    codes, scales, outliers = split(
        x, threshold, capacity, counters, weight, weight_scale, kept, place, kept_only
    )
    if outliers.weights is None:
        return gemv(codes, scales, weight, weight_scale, bias, x.dtype, outliers=outliers, launch=launch)
    if launch is None:
        wide = x.dtype == torch.float32
        launch = _FLOAT32 if wide else choose(max(2, x.shape[0]), *weight.shape)
    return triton_int8.matmul(
        codes, scales, weight, weight_scale, bias, x.dtype, outliers=outliers, launch=launch
    )


def _slots(capacity: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for the columns, a power of two of at least 16, and for their number."""
    slots = max(16, triton.next_power_of_2(capacity))
    return torch.empty(slots, dtype=torch.int32, device=device), torch.empty(
        1, dtype=torch.int32, device=device
    )


def _select(
    x: torch.Tensor,
    peaks: torch.Tensor | None,
    chosen: torch.Tensor,
    used: torch.Tensor,
    taken: torch.Tensor | None,
    counters: torch.Tensor,
    always: torch.Tensor | None,
    threshold: float,
    capacity: int,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    values: torch.Tensor | None = None,
) -> None:
    block = triton.next_power_of_2(x.shape[1])
    _select_kernel[(1,)](
        x, *(used if each is None else each for each in (peaks, always)), chosen, used,
        used if taken is None else taken, counters,
        *(used if each is None else each for each in (codes, scale, values)),
        x.shape[1], threshold, capacity, ROUNDER, CHUNKS=0 if peaks is None else peaks.shape[0],
        SMALLEST=SMALLEST_SCALE, BLOCK=block, HAS_ALWAYS=always is not None,
        num_warps=min(32, max(8, block // 512)), enable_fp_fusion=False,
    )  # fmt: skip
