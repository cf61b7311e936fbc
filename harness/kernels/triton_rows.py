# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# mypy: disallow-untyped-calls=False
"""Triton kernels that round whole rows to 8 bits: a scale for each row and its codes in one launch.

A program takes a row. Up to 16,384 columns `quantize` asks for all of it at once and holds it, so that every
value is read once; a wider row is read a second time, while it is in the cache. `quantize` rounds to int8
or float8, `normalize_quantize` is a norm before that, of rows up to `WHOLE_ROW`, so that the floats between
the two never reach memory.

Codes and scales are those of `harness.nn.quantizer.quantize_activation` and `harness.kernels.fp8.quantize`
bit for bit: divisions round to nearest and nothing is fused. The mean of a norm is added up in another
order than torch adds it; what follows from the mean is, but for that, what torch computes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from harness.nn.quantizer import SMALLEST_SCALE

__all__ = ["WHOLE_ROW", "normalize_quantize", "quantize"]

WHOLE_ROW = 16384
"""Columns that a program can hold."""

_BLOCK, _WARPS = 2048, 8  # columns that the threads of a program read at once, and its warps
_MOST_BLOCKS = 8  # that they hold: beyond, a row is read twice
# 1.5 * 2^23: adding and subtracting it rounds half to even. The kernels that use it are launched without
# fusing multiplication and addition, which would round the exact product and not the float32 one.
ROUNDER = 12582912.0
_KINDS = {"layer": 1, "rms": 2, "rms-unit-offset": 3}
_FLOAT8 = {torch.float8_e4m3fn: (3, 448.0), torch.float8_e5m2: (2, 57344.0)}  # mantissa bits, largest


@triton.jit
def peak_of(values):
    """The largest of non-negative values, NaN where one is NaN."""
    finite = tl.max(values, 0)
    return tl.where(tl.sum((values != values).to(tl.int32), 0) > 0, float("nan"), finite)


@triton.jit
def scale_of(peak, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
    """The scale that maps `peak` to LARGEST; 1 for a row of zeros."""
    scale = tl.div_rn(peak, LARGEST)
    return tl.where(scale < SMALLEST, 1.0, scale)


@triton.jit
def round_int8(x, inverse, rounder):
    """int32 codes of float32 x. Clipped before rounding: beyond 2^22 the sum would not give whole numbers."""
    q = tl.minimum(tl.maximum(x * inverse, -127.0), 127.0)
    return ((q + rounder) - rounder).to(tl.int32)


@triton.jit
def _round_float8(x, inverse, MANTISSA: tl.constexpr, LARGEST: tl.constexpr):
    """The bits, uint8, of float32 x * inverse in a float8 format, clamped, half to even; NaN stays NaN."""
    BIAS: tl.constexpr = (1 << (6 - MANTISSA)) - 1
    DROPPED: tl.constexpr = 23 - MANTISSA
    v = x * inverse
    bits = v.to(tl.int32, bitcast=True)
    magnitude = tl.minimum(tl.abs(v), LARGEST)  # drops NaN, which is put back below
    raw = magnitude.to(tl.int32, bitcast=True)
    # Normal numbers: half a step up, less one where the last kept bit is even; a carry enters the exponent.
    rounded = raw + ((1 << (DROPPED - 1)) - 1) + ((raw >> DROPPED) & 1)
    normal = (rounded >> DROPPED) - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal number steps are equal: a sum whose last bit is one step rounds to them.
    ONE: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    RAW_ONE: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    subnormal = (magnitude + ONE).to(tl.int32, bitcast=True) - RAW_ONE
    code = tl.where(magnitude < 2.0 ** (1 - BIAS), subnormal, normal)
    code = tl.where(v != v, 127, code)
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def _to_e4m3(x, inverse):
    """`_round_float8` by the hardware's instruction for E4M3, two values at a time; NaN loses its sign."""
    return (x * inverse).to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@triton.jit
def _codes_of(
    x, inverse, rounder, MANTISSA: tl.constexpr, LARGEST: tl.constexpr, CONVERTS: tl.constexpr
):  # fmt: skip
    """Codes of float32 x: int8 (MANTISSA 0), as int32, or the bits of a float8."""
    if MANTISSA == 0:
        q = round_int8(x, inverse, rounder)
    elif CONVERTS:
        q = _to_e4m3(x, inverse)
    else:
        q = _round_float8(x, inverse, MANTISSA, LARGEST)
    return q


@triton.jit
def _quantize_kernel(
    x_ptr, codes_ptr, scales_ptr, sums_ptr, K, x_stride, rounder,
    MANTISSA: tl.constexpr, LARGEST: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr, SUMS: tl.constexpr, CONVERTS: tl.constexpr,
):  # fmt: skip
    """MANTISSA 0: int8. BLOCKS: of a row, all held at once; 0: read one after the other, and a second time.
    SUMS: store the sum of a row's codes as well. CONVERTS: the device rounds to E4M3."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    x_ptr += row * x_stride
    codes_ptr += row * K
    held = ()
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + offsets
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        held = held + (x,)  # type: ignore[assignment]  # noqa: RUF005 - the language has no unpacking
    peaks = tl.zeros((BLOCK,), dtype=tl.float32)
    # NaN must reach the scale: maximum() drops it unless told not to.
    for block in tl.static_range(BLOCKS):
        peaks = tl.maximum(peaks, tl.abs(held[block].to(tl.float32)), propagate_nan=tl.PropagateNan.ALL)
    if BLOCKS == 0:
        for start in range(0, K, BLOCK):
            k = start + offsets
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            peaks = tl.maximum(peaks, tl.abs(x), propagate_nan=tl.PropagateNan.ALL)
    scale = scale_of(peak_of(peaks), LARGEST, SMALLEST)
    tl.store(scales_ptr + row, scale)
    inverse = tl.div_rn(1.0, scale)
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for block in tl.static_range(BLOCKS):
        k = block * BLOCK + offsets
        q = _codes_of(held[block].to(tl.float32), inverse, rounder, MANTISSA, LARGEST, CONVERTS)
        if SUMS:
            total += q.to(tl.int32)
        tl.store(codes_ptr + k, q.to(codes_ptr.dtype.element_ty), mask=k < K)
    if BLOCKS == 0:
        for start in range(0, K, BLOCK):
            k = start + offsets
            x = tl.load(x_ptr + k, mask=k < K, other=0.0).to(tl.float32)
            q = _codes_of(x, inverse, rounder, MANTISSA, LARGEST, CONVERTS)
            if SUMS:
                total += q.to(tl.int32)
            tl.store(codes_ptr + k, q.to(codes_ptr.dtype.element_ty), mask=k < K)
    if SUMS:
        tl.store(sums_ptr + row, tl.sum(total, 0))


@triton.jit
def _normalize_quantize_kernel(
    x_ptr, weight_ptr, bias_ptr, codes_ptr, scales_ptr, statistics_ptr, K, x_stride, eps, rounder,
    KIND: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_STATISTICS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    mask = k < K
    raw = tl.load(x_ptr + row * x_stride + k, mask=mask, other=0.0)
    x = raw.to(tl.float32)
    mean = 0.0
    if KIND == 1:
        mean = tl.div_rn(tl.sum(x, 0), K * 1.0)
        x = tl.where(mask, x - mean, 0.0)
    factor = tl.rsqrt(tl.div_rn(tl.sum(x * x, 0), K * 1.0) + eps)
    if HAS_STATISTICS:
        tl.store(statistics_ptr + 2 * row, mean)
        tl.store(statistics_ptr + 2 * row + 1, factor)
    y = x * factor
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + k, mask=mask, other=0.0).to(tl.float32)
        if KIND == 2:  # Llama rounds before the gain
            y = y.to(raw.dtype).to(tl.float32)
        if KIND == 3:
            weight += 1.0
        y *= weight
    if HAS_BIAS:
        y += tl.load(bias_ptr + k, mask=mask, other=0.0).to(tl.float32)
    y = y.to(raw.dtype).to(tl.float32)
    scale = scale_of(peak_of(tl.where(mask, tl.abs(y), 0.0)), 127.0, SMALLEST)
    tl.store(scales_ptr + row, scale)
    q = round_int8(y, tl.div_rn(1.0, scale), rounder)
    tl.store(codes_ptr + row * K + k, q.to(tl.int8), mask=mask)


@functools.cache
def _converts(device: torch.device) -> bool:
    """Whether a device has the instruction that rounds two floats to E4M3."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )


def warps_for(block: int) -> int:
    """Warps that hold a row of so many columns, at most 64 of them a thread."""
    return min(8, max(4, block // 1024))


def quantize(
    x: torch.Tensor, dtype: torch.dtype = torch.int8, *, sums: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [rows, in] and float32 scales [rows, 1] of x [rows, in], one scale per row.

    Args:
        dtype: int8, float8_e4m3fn or float8_e5m2.
        sums: int32 [rows]: takes the sum of each row's int8 codes.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=dtype, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    mantissa, largest = _FLOAT8.get(dtype, (0, 127.0))
    block = min(_BLOCK, triton.next_power_of_2(columns))
    blocks = triton.cdiv(columns, block)
    with torch.cuda.device_of(x):
        _quantize_kernel[(rows,)](
            x, codes.view(torch.uint8) if mantissa else codes, scales, scales if sums is None else sums,
            columns, x.stride(0), ROUNDER, MANTISSA=mantissa, LARGEST=largest, SMALLEST=SMALLEST_SCALE,
            BLOCK=block, BLOCKS=blocks if blocks <= _MOST_BLOCKS else 0, SUMS=sums is not None,
            CONVERTS=mantissa == 3 and _converts(x.device), num_warps=_WARPS if block == _BLOCK else 4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales


def normalize_quantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    eps: float,
    kind: str,
    statistics: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """int8 codes [rows, d] and float32 scales [rows, 1] of a norm of x [rows, d], d up to `WHOLE_ROW`.

    Args:
        weight, bias: [d] in x's type, or None.
        kind: see `harness.kernels.reference.NormKind`.
        statistics: float32 [rows, 2]: takes the mean that was subtracted (0 for RMSNorm) and the
            reciprocal root that was multiplied with.
    """
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, columns = x.shape
    codes = torch.empty(rows, columns, dtype=torch.int8, device=x.device)
    scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(columns)
    with torch.cuda.device_of(x):
        _normalize_quantize_kernel[(rows,)](
            x, x if weight is None else weight, x if bias is None else bias, codes, scales,
            scales if statistics is None else statistics, columns, x.stride(0), eps, ROUNDER,
            KIND=_KINDS[kind], HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
            HAS_STATISTICS=statistics is not None, SMALLEST=SMALLEST_SCALE, BLOCK=block,
            num_warps=warps_for(block), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scales
