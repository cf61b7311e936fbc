"""Triton kernels for packed weights and 16- or 32-bit activations.

Three forms of the same product, chosen by the number of rows in `harness.kernels.weight_only`:

- *gemv* (one row): fields are turned into floats by setting the exponent bits of 2^23 above them and
  subtracting 2^23, one logical operation and one addition per weight; a field that sits at bit `p` of
  its word comes out multiplied by 2^p, which is undone on the activation. The zero point is applied
  to the sum: ``sum (q - z) x = sum q x - z sum x``.
- *small*: tiles of activations and of unpacked weights through tensor cores.
- *dequantize*: writes the full-precision matrix for a library product.

All accumulate in float32. Where the rows of a matrix do not fill the device, the input columns are split
between programs, whose partial sums a second kernel adds in a fixed order: no atomics, so the same
inputs give the same bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from harness.nn.packing import PLANES, PackedWeight

__all__ = ["dequantize", "gemv", "small"]

_GEMV_ROWS = 64  # matrix rows per program
_SMALL_ROWS = 64
_STEP_WORDS = 16  # words of each row per step
_PROGRAMS_PER_PROCESSOR = 8
_EXPONENT = 0x4B000000  # the bits of the float 2^23
_MAX_SPLITS = 16


@triton.jit
def _zero_points(
    zeros_ptr, group, n, mask, zero_bytes, BITS: tl.constexpr, HAS_ZEROS: tl.constexpr
):  # `group` broadcasts against n
    if not HAS_ZEROS:
        zero = tl.zeros_like(group + n) + 2 ** (BITS - 1)
    elif BITS == 3:
        low = tl.load(zeros_ptr + group * zero_bytes + n // 4, mask=mask, other=0).to(tl.int32)
        high_ptr = zeros_ptr + group * zero_bytes + zero_bytes // 3 * 2 + n // 8
        high = tl.load(high_ptr, mask=mask, other=0).to(tl.int32)
        zero = ((low >> (n % 4 * 2)) & 3) | (((high >> (n % 8)) & 1) << 2)
    else:
        PER_BYTE: tl.constexpr = 8 // BITS
        raw = tl.load(zeros_ptr + group * zero_bytes + n // PER_BYTE, mask=mask, other=0)
        zero = (raw.to(tl.int32) >> (n % PER_BYTE * BITS)) & (2**BITS - 1)
    return zero


@triton.jit
def _field_products(words, x, exponent, INDEX: tl.constexpr, WIDTH: tl.constexpr):
    """Field INDEX of words int32 [rows, c] times x float32 [c].

    `exponent` is 0x4B000000, the exponent bits of 2^23. It is no literal, so that it lives in a
    register: one three-input operation takes a single literal, which the mask already is.
    """
    HIGH: tl.constexpr = INDEX * WIDTH + WIDTH > 23  # beyond the mantissa: use the upper half
    PLACE: tl.constexpr = INDEX * WIDTH - 16 if HIGH else INDEX * WIDTH
    source = words >> 16 if HIGH else words
    field = (source & ((2**WIDTH - 1) << PLACE)) | exponent
    return (field.to(tl.float32, bitcast=True) - 8388608.0) * (x * (0.5**PLACE))[None, :]


@triton.jit
def _plane_sums(
    x_ptr, words, k, mask, total, exponent,
    WIDTH: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Sums over the fields of each word of one plane, and `total` plus those of x alone [c].

    words: int32 [rows, c]; k [c]: the column of field 0 of each word.
    """
    sums = tl.zeros(words.shape, dtype=tl.float32)
    for i in tl.static_range(32 // WIDTH):
        if EVEN:
            x = tl.load(x_ptr + k + i * WORDS).to(tl.float32)
        else:
            x = tl.load(x_ptr + k + i * WORDS, mask=mask, other=0.0).to(tl.float32)
        total += x
        sums += _field_products(words, x, exponent, i, WIDTH)
    return sums, total


@triton.jit
def _words(
    codes_ptr, tile, c, n, n_mask, last, N,
    ROW_WORDS: tl.constexpr, WORDS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Words [rows, c] of one plane from `tile` on, c running over the words of several tiles."""
    at = tile + c // WORDS
    pointers = codes_ptr + (at[None, :] * N + n[:, None]) * ROW_WORDS + (c % WORDS)[None, :]
    if EVEN:
        words = tl.load(pointers)
    else:
        words = tl.load(pointers, mask=n_mask[:, None] & (at < last)[None, :], other=0)
    return words


@triton.jit
def _gemv_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    N, tiles, chunks_per_split, x_stride, scale_stride, zero_bytes, tiles_per_group, exponent,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_GROUP: tl.constexpr, PER_TENSOR: tl.constexpr, HAS_ZEROS: tl.constexpr,
    HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pid_n, pid_split, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    n_mask = n < N
    n_scale = n * 0 if PER_TENSOR else n
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS  # of the first plane
    WORDS: tl.constexpr = TILE * WIDTH // 32
    c = tl.arange(0, CHUNK * WORDS)
    acc = tl.zeros((BLOCK_N, CHUNK * WORDS), dtype=tl.float32)
    x_ptr += row * x_stride
    first = pid_split * chunks_per_split * CHUNK
    last = tl.minimum(first + chunks_per_split * CHUNK, tiles)
    # Loads run one step ahead: while a step computes, the next one's words are on their way.
    words = _words(codes_ptr, first, c, n, n_mask, last, N, ROW_WORDS, WORDS, EVEN)
    group = first // tiles_per_group
    if ONE_GROUP:
        scale = tl.load(scales_ptr + group * scale_stride + n_scale, mask=n_mask, other=0.0)
        zero = _zero_points(zeros_ptr, group, n_scale, n_mask, zero_bytes, BITS, HAS_ZEROS)
    for tile in range(first, last, CHUNK):
        ahead = tl.where(tile + CHUNK < last, tile + CHUNK, tile)
        next_words = _words(codes_ptr, ahead, c, n, n_mask, last, N, ROW_WORDS, WORDS, EVEN)
        at = tile + c // WORDS
        total = tl.zeros((CHUNK * WORDS,), dtype=tl.float32)
        k = at * TILE + c % WORDS
        sums, total = _plane_sums(x_ptr, words, k, at < last, total, exponent, WIDTH, WORDS, EVEN)
        if ONE_GROUP:
            group = ahead // tiles_per_group
            next_scale = tl.load(scales_ptr + group * scale_stride + n_scale, mask=n_mask, other=0.0)
            next_zero = _zero_points(zeros_ptr, group, n_scale, n_mask, zero_bytes, BITS, HAS_ZEROS)
            sums -= zero.to(tl.float32)[:, None] * total[None, :]
            acc += scale.to(tl.float32)[:, None] * sums
            scale, zero = next_scale, next_zero
        else:
            group_2 = (at // tiles_per_group)[None, :]
            mask_2 = n_mask[:, None] & (at < last)[None, :]
            scale_2 = tl.load(scales_ptr + group_2 * scale_stride + n_scale[:, None], mask=mask_2, other=0.0)
            zero_2 = _zero_points(zeros_ptr, group_2, n_scale[:, None], mask_2, zero_bytes, BITS, HAS_ZEROS)
            acc += scale_2.to(tl.float32) * (sums - zero_2.to(tl.float32) * total[None, :])
        words = next_words
    y = tl.sum(acc, 1)
    if BITS == 3:  # the second plane weighs 4 and has no zero point
        ROW: tl.constexpr = TILE // 32
        c = tl.arange(0, CHUNK * ROW)
        high = tl.zeros((BLOCK_N, CHUNK * ROW), dtype=tl.float32)
        for tile in range(first, last, CHUNK):
            at = tile + c // ROW
            mask_2 = n_mask[:, None] & (at < last)[None, :]
            bits = _words(codes_ptr + WORDS, tile, c, n, n_mask, last, N, ROW_WORDS, ROW, EVEN)
            total = tl.zeros((CHUNK * ROW,), dtype=tl.float32)
            k = at * TILE + c % ROW
            sums, total = _plane_sums(x_ptr, bits, k, at < last, total, exponent, 1, ROW, EVEN)
            group_2 = (at // tiles_per_group)[None, :]
            scale_2 = tl.load(scales_ptr + group_2 * scale_stride + n_scale[:, None], mask=mask_2, other=0.0)
            high += 4.0 * scale_2.to(tl.float32) * sums
        y += tl.sum(high, 1)
    if SPLIT:
        tl.store(out_ptr + (pid_split * tl.num_programs(2) + row) * N + n, y, mask=n_mask)
    else:
        if HAS_BIAS:
            y += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * N + n, y.to(out_ptr.dtype.element_ty), mask=n_mask)


@triton.jit
def _small_kernel(
    x_ptr, codes_ptr, scales_ptr, zeros_ptr, bias_ptr, out_ptr,
    M, N, tiles, chunks_per_split, x_stride, scale_stride, zero_bytes, tiles_per_group, exponent,
    BITS: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, ONE_GROUP: tl.constexpr, PER_TENSOR: tl.constexpr,
    HAS_ZEROS: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    pid_n, pid_split, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_mask, n_mask = m < M, n < N
    n_scale = n * 0 if PER_TENSOR else n
    WORDS: tl.constexpr = TILE * BITS // 32
    c = tl.arange(0, CHUNK * WORDS)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    first = pid_split * chunks_per_split * CHUNK
    last = tl.minimum(first + chunks_per_split * CHUNK, tiles)
    for tile in range(first, last, CHUNK):
        words = _words(codes_ptr, tile, c, n, n_mask, last, N, WORDS, WORDS, EVEN)
        at = tile + c // WORDS
        if ONE_GROUP:
            group = tile // tiles_per_group
            scale = tl.load(scales_ptr + group * scale_stride + n_scale, mask=n_mask, other=0.0)
            zero = _zero_points(zeros_ptr, group, n_scale, n_mask, zero_bytes, BITS, HAS_ZEROS)
            zero = zero.to(tl.float32)[:, None]
            part = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        else:
            group_2 = (at // tiles_per_group)[None, :]
            mask_2 = n_mask[:, None] & (at < last)[None, :]
            scale = tl.load(
                scales_ptr + group_2 * scale_stride + n_scale[:, None], mask=mask_2, other=0.0
            ).to(tl.float32)
            zero = _zero_points(zeros_ptr, group_2, n_scale[:, None], mask_2, zero_bytes, BITS, HAS_ZEROS).to(
                tl.float32
            )
        x_mask = m_mask[:, None] & (at < last)[None, :]
        x_pointers = x_ptr + m[:, None] * x_stride + (at * TILE + c % WORDS)[None, :]
        for i in tl.static_range(32 // BITS):
            x = tl.load(x_pointers + i * WORDS, mask=x_mask, other=0.0)
            field = ((words >> (i * BITS)) & (2**BITS - 1)) | exponent
            w = field.to(tl.float32, bitcast=True) - (8388608.0 + zero)
            if ONE_GROUP:  # whole numbers below 256 are exact in every type: scale the sum
                part = tl.dot(x, tl.trans(w.to(x.dtype)), part, input_precision="ieee")
            else:
                w = (w * scale).to(x.dtype)
                acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
        if ONE_GROUP:
            acc += part * scale.to(tl.float32)[None, :]
    out_mask = m_mask[:, None] & n_mask[None, :]
    if SPLIT:
        out_ptr += pid_split * M * N
        tl.store(out_ptr + m[:, None] * N + n[None, :], acc, mask=out_mask)
    else:
        if HAS_BIAS:
            acc += tl.load(bias_ptr + n, mask=n_mask, other=0.0).to(tl.float32)[None, :]
        y = acc.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + m[:, None] * N + n[None, :], y, mask=out_mask)


@triton.jit
def _dequantize_kernel(
    codes_ptr, scales_ptr, zeros_ptr, out_ptr,
    N, in_features, scale_stride, zero_bytes, group_columns,
    BITS: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PER_TENSOR: tl.constexpr, HAS_ZEROS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    mask = (n < N) & (k < in_features)
    n_scale = n * 0 if PER_TENSOR else n
    ROW_WORDS: tl.constexpr = TILE * BITS // 32
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = TILE * WIDTH // 32
    row_ptr = codes_ptr + (k // TILE * N + n) * ROW_WORDS
    inside = k % TILE
    words = tl.load(row_ptr + inside % WORDS, mask=mask, other=0)
    codes = (words >> (inside // WORDS * WIDTH)) & (2**WIDTH - 1)
    if BITS == 3:
        WORDS_1: tl.constexpr = TILE // 32
        words = tl.load(row_ptr + WORDS + inside % WORDS_1, mask=mask, other=0)
        codes |= ((words >> (inside // WORDS_1)) & 1) << 2
    group = k // group_columns
    scale = tl.load(scales_ptr + group * scale_stride + n_scale, mask=mask, other=0.0)
    zero = _zero_points(zeros_ptr, group, n_scale, mask, zero_bytes, BITS, HAS_ZEROS)
    w = (codes - zero).to(tl.float32) * scale.to(tl.float32)
    pointers = out_ptr + n.to(tl.int64) * in_features + k
    tl.store(pointers, w.to(out_ptr.dtype.element_ty), mask=mask)


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


def gemv(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` for very few rows x [rows, in], each by itself."""
    x = _padded(x, weight)
    launch = _Launch(weight, bias, x, _GEMV_ROWS, blocks_m=x.shape[0])
    with torch.cuda.device_of(x):
        _gemv_kernel[launch.grid](
            x, launch.codes, weight.scales, launch.zeros, launch.bias, launch.target,
            weight.out_features, launch.tiles, launch.chunks_per_split, x.stride(0),
            weight.scales.shape[1], launch.zero_bytes, launch.tiles_per_group, _EXPONENT,
            BLOCK_N=_GEMV_ROWS, num_warps=2, **launch.constants,
        )  # fmt: skip
    return launch.finish()


def small(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """``x @ dequantize(weight).T + bias`` for some tens of rows x [rows, in]; not for 3 bits."""
    x = _padded(x, weight)
    rows = x.shape[0]
    block_m = min(64, max(16, triton.next_power_of_2(rows)))
    launch = _Launch(weight, bias, x, _SMALL_ROWS, blocks_m=triton.cdiv(rows, block_m))
    with torch.cuda.device_of(x):
        _small_kernel[launch.grid](
            x, launch.codes, weight.scales, launch.zeros, launch.bias, launch.target,
            rows, weight.out_features, launch.tiles, launch.chunks_per_split, x.stride(0),
            weight.scales.shape[1], launch.zero_bytes, launch.tiles_per_group, _EXPONENT,
            BLOCK_M=block_m, BLOCK_N=_SMALL_ROWS, num_warps=4, num_stages=3, **launch.constants,
        )  # fmt: skip
    return launch.finish()


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The matrix [out, in] of a packed weight, computed in float32 and rounded to `dtype`."""
    out, columns = weight.out_features, weight.in_features
    w = torch.empty(out, columns, dtype=dtype, device=weight.codes.device)
    zeros = weight.scales if weight.zeros is None else weight.zeros
    with torch.cuda.device_of(w):
        _dequantize_kernel[(triton.cdiv(columns, 128), triton.cdiv(out, 32))](
            weight.codes.view(torch.int32), weight.scales, zeros, w,
            out, columns, weight.scales.shape[1], zeros.shape[1], weight.group_columns,
            BITS=weight.bits, TILE=weight.tile, BLOCK_N=32, BLOCK_K=128,
            PER_TENSOR=_is_per_tensor(weight), HAS_ZEROS=weight.zeros is not None, num_warps=4,
        )  # fmt: skip
    return w


class _Launch:
    """What the launches have in common: absent pointers, the split of the columns, the output.

    Where the columns are split, the kernel writes partial sums [splits, rows, out] in float32.
    """

    def __init__(
        self,
        weight: PackedWeight,
        bias: torch.Tensor | None,
        x: torch.Tensor,
        block_n: int,
        blocks_m: int,
    ) -> None:
        tiles, tile, out = weight.codes.shape[0], weight.tile, weight.out_features
        chunk = max(1, _STEP_WORDS * 32 // (tile * PLANES[weight.bits][0]))
        blocks_n, chunks = triton.cdiv(out, block_n), triton.cdiv(tiles, chunk)
        wanted = _PROGRAMS_PER_PROCESSOR * processors(x.device) // (blocks_n * blocks_m)
        self.chunks_per_split = triton.cdiv(chunks, min(max(1, wanted), chunks, _MAX_SPLITS))
        splits = triton.cdiv(chunks, self.chunks_per_split)
        self.grid = (blocks_n, splits, blocks_m)
        self.codes = weight.codes.view(torch.int32)
        self.zeros = weight.scales if weight.zeros is None else weight.zeros
        self.bias = weight.scales if bias is None else bias
        self.zero_bytes = self.zeros.shape[1]
        self.tiles, self.tiles_per_group = tiles, weight.group_columns // tile
        self.y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
        self.target = self.y
        if splits > 1:
            self.target = torch.empty(splits, *self.y.shape, dtype=torch.float32, device=x.device)
        one_group = weight.scales.shape[0] == 1 or self.tiles_per_group % chunk == 0
        self.constants = {
            "BITS": weight.bits,
            "TILE": tile,
            "CHUNK": chunk,
            "ONE_GROUP": one_group,
            "PER_TENSOR": _is_per_tensor(weight),
            "HAS_ZEROS": weight.zeros is not None,
            "HAS_BIAS": bias is not None,
            "SPLIT": splits > 1,
            "EVEN": out % block_n == 0 and tiles % chunk == 0,
        }

    def finish(self) -> torch.Tensor:
        """The result [rows, out]: partial sums are added in a fixed order."""
        splits = self.grid[1]
        if splits > 1:
            size = self.y.numel()
            with torch.cuda.device_of(self.y):
                _add_partials_kernel[(triton.cdiv(size, 256),)](
                    self.target, self.bias, self.y, self.y.shape[1], size,
                    SPLITS=splits, BLOCK=256, HAS_BIAS=self.constants["HAS_BIAS"], num_warps=2,
                )  # fmt: skip
        return self.y


def _is_per_tensor(weight: PackedWeight) -> bool:
    return weight.scales.shape[1] == 1 and weight.out_features > 1


def _padded(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """x with zero columns where the stored matrix has padding, and unit stride along the columns."""
    missing = weight.columns - x.shape[1]
    x = torch.nn.functional.pad(x, (0, missing)) if missing else x
    return x if x.stride(1) == 1 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """The number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(device).multi_processor_count
