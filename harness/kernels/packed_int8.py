"""The choice of a kernel for int8 activations and packed weights of 2 to 8 bits, one scale per row.

Up to `harness.kernels.int8_launches.PACKED_ROWS` rows the weights are unpacked inside the product; beyond,
once before it: a product of many rows would unpack them once for each block of rows.
"""

from __future__ import annotations

import torch

from harness.errors import NotApplicable
from harness.kernels import int8, int8_launches, reference, weight_only
from harness.nn.packing import PLANES, PackedWeight

__all__ = ["choose", "linear", "linear_of_codes"]


def fits(weight: PackedWeight) -> bool:
    """Whether the kernels read this layout: whole words of 32 bits, packed zero points, on CUDA."""
    whole_words = all(weight.tile * width % 32 == 0 for width in PLANES[weight.bits])
    packed_zeros = weight.zeros is None or not weight.zeros.is_floating_point()
    return whole_words and packed_zeros and weight_only.has_triton(weight.codes.device)


def choose(weight: PackedWeight, rows: int) -> str:
    """The name of the kernel that `linear` runs for so many rows."""
    product = int8.choose(weight.codes.device)
    if not fits(weight) or int8_launches.choose_packed(rows, weight.out_features) is None:
        return f"unpack, {product}"
    return f"triton w{weight.bits}a8 {'gemv' if rows == 1 else 'small'}"


def linear(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    *,
    per_token: bool = True,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize x [rows, in] to int8, multiply with a packed weight [out, in], scale back to x's type.

    Args:
        weight: with one scale per row, per group of consecutive rows or in all ([1, scales]), float32 or
            16 bits, and zero points ([1, bytes], packed along out) or none.
        per_token, scale: as of `harness.kernels.int8.linear`.
    """
    codes, scale = int8.quantize(x, scale, per_token=per_token)
    return linear_of_codes(codes, scale, weight, bias, x.dtype)


def linear_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The second half of `linear`, for codes int8 [rows, in] and float32 scales [rows, 1] or [1].

    For torch.compile the whole is one operator, ``torch.ops.harness.packed_int8_linear``.

    Raises:
        NotApplicable: scales that vary along the columns, which cannot leave an integer sum.
    """
    if weight.scales.shape[0] != 1:
        raise NotApplicable("an integer product needs scales that are constant along the columns")
    if not torch.compiler.is_compiling():
        return _linear_of_codes(codes, scale, weight, bias, dtype)
    y: torch.Tensor = _operator(
        codes, scale, weight.codes, weight.scales, weight.zeros, bias, dtype,
        weight.bits, weight.tile, weight.in_features,
    )  # fmt: skip
    return y


def _linear_of_codes(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    if not fits(weight):
        return reference.packed_int8_linear(codes, scale, weight, bias, dtype)
    from harness.kernels import triton_int8, triton_packed_int8

    rows, out = codes.shape[0], weight.out_features
    launch = int8_launches.choose_packed(rows, out)
    if launch is not None:
        run = triton_packed_int8.gemv if launch.kind == "gemv" else triton_packed_int8.small
        return run(codes, scale, weight, bias, dtype, launch)
    matrix = triton_packed_int8.unpack(weight)
    scales = weight.scales.view(-1).float()
    if 1 < scales.numel() < out:
        scales = scales.repeat_interleave(out // scales.numel(), output_size=out)
    sums = zeros = None
    if weight.bits == 8:
        sums = codes.sum(1, dtype=torch.int32)
        zeros = reference.packed_zeros(weight) - 128
    return triton_int8.matmul(codes, scale, matrix, scales, bias, dtype, sums=sums, zeros=zeros)


@torch.library.custom_op("harness::packed_int8_linear", mutates_args=())
def _operator(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    bits: int,
    tile: int,
    in_features: int,
) -> torch.Tensor:
    packed = PackedWeight(weight, weight_scale, zeros, bits, -1, tile, in_features, weight.shape[1])
    return _linear_of_codes(codes, scale, packed, bias, dtype)


@_operator.register_fake
def _(
    codes: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zeros: torch.Tensor | None,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    bits: int,
    tile: int,
    in_features: int,
) -> torch.Tensor:
    return codes.new_empty(codes.shape[0], weight.shape[1], dtype=dtype)
